// What this extension was compiled for, from and with: the CPU's features, csrc's files, and torch (by setup.py).
// Loading it on a CPU without the features can die of SIGILL before any check in here could run, so kernels/__init__.py
// looks for this string in the file first.
#define QUOTE(x) #x
#define QUOTED(x) QUOTE(x)

extern "C" __attribute__((used, visibility("default"))) const char nanowan_built_for[] =
    "nanowan_csrc is built for: " QUOTED(NANOWAN_BUILT_FOR) " from: " QUOTED(NANOWAN_SOURCES) " with torch: " QUOTED(
        NANOWAN_TORCH);
