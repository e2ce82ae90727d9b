// A string with the CPU features that this extension was compiled for, the digest of csrc's files, and the version of
// torch; setup.py sets all three. Loading the extension on a CPU without these features can end in SIGILL before any
// check in here runs, so kernels/__init__.py first reads this string from the extension's file.
#define QUOTE(x) #x
#define QUOTED(x) QUOTE(x)

extern "C" __attribute__((used, visibility("default"))) const char nanowan_built_for[] =
    "nanowan_csrc is built for: " QUOTED(NANOWAN_BUILT_FOR) " from: " QUOTED(NANOWAN_SOURCES) " with torch: " QUOTED(
        NANOWAN_TORCH);
