// What `import nanowan_csrc` finds: loading the library registers the operators, torch.ops.nanowan_csrc.*; there is
// nothing else in it.
#include <Python.h>

PyMODINIT_FUNC PyInit_nanowan_csrc(void) {
    static PyModuleDef module = {
        PyModuleDef_HEAD_INIT, "nanowan_csrc", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
    return PyModule_Create(&module);
}
