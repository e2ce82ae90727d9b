// The module of `import nanowan_csrc`. It is empty: loading the library registers the operators,
// torch.ops.nanowan_csrc.*.
#include <Python.h>

PyMODINIT_FUNC PyInit_nanowan_csrc(void) {
    static PyModuleDef module = {
        PyModuleDef_HEAD_INIT, "nanowan_csrc", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
    return PyModule_Create(&module);
}
