// The CPU features that this extension was compiled for, csrc's files that it was compiled from, and its torch (set by
// setup.py). Loading it on a CPU without these features can end in SIGILL before any check in here runs, so
// kernels/__init__.py looks for this string in the file first.
#define QUOTE(x) #x
#define QUOTED(x) QUOTE(x)

extern "C" __attribute__((used, visibility("default"))) const char nanowan_built_for[] =
    "nanowan_csrc is built for: " QUOTED(NANOWAN_BUILT_FOR) " from: " QUOTED(NANOWAN_SOURCES) " with torch: " QUOTED(
        NANOWAN_TORCH);
