// The features of the CPU that this extension was compiled for.
// Loading it on a CPU without them can die of SIGILL before any check in here could run, so kernels/__init__.py looks
// for this string in the file first.
#define QUOTE(x) #x
#define QUOTED(x) QUOTE(x)

extern "C" __attribute__((used, visibility("default"))) const char nanowan_built_for[] =
    "nanowan_csrc is built for: " QUOTED(NANOWAN_BUILT_FOR);
