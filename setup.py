"""`pip install --no-build-isolation -e .` puts the modules on the path (they are single files) and builds csrc/ into
nanowan_csrc.

Without a C++ compiler, or with NANOWAN_CSRC=0, nothing is built and the plain PyTorch operators are used. The CUDA part
is built where nvcc and a CUDA build of torch are; NANOWAN_CUDA=1 makes their lack an error, NANOWAN_CUDA=0 leaves it
out. TORCH_CUDA_ARCH_LIST is honoured.
"""

import os
import shutil
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent


def extension():
    """([Extension], {"build_ext": command}), both empty where there is nothing to build with."""
    if os.environ.get("NANOWAN_CSRC") == "0" or not shutil.which(os.environ.get("CXX", "g++")):
        print("nanowan: no C++ extension (no compiler, or NANOWAN_CSRC=0)")
        return [], {}
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

    wanted = os.environ.get("NANOWAN_CUDA", "auto")
    lack = (
        "this torch was built without CUDA"
        if torch.version.cuda is None
        else "there is no nvcc"
        if CUDA_HOME is None
        else None
    )
    if wanted == "1" and lack:
        raise SystemExit(f"nanowan: NANOWAN_CUDA=1, but {lack}")
    cuda = wanted != "0" and not lack
    if not cuda:
        print(f"nanowan: the C++ extension without CUDA ({lack or 'NANOWAN_CUDA=0'})")
    sources = sorted(str(f.relative_to(HERE)) for f in (HERE / "csrc").glob("*.cpp"))
    flags = {
        "cxx": ["-std=c++20", "-O3", "-fopenmp", "-march=native", "-ffast-math", "-fno-finite-math-only"]
        + (["-DNANOWAN_CUDA"] if cuda else [])
    }
    if cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0")
        # a .cu needs a name that no .cpp has: their object files lie side by side
        kernels = sorted(str(f.relative_to(HERE)) for f in (HERE / "csrc").glob("*.cu"))
        return [CUDAExtension("nanowan_csrc", sources + kernels, extra_compile_args=flags | {"nvcc": ["-O3"]})], {
            "build_ext": BuildExtension
        }
    return [CppExtension("nanowan_csrc", sources, extra_compile_args=flags)], {"build_ext": BuildExtension}


modules, commands = extension()
setup(
    name="nanowan",
    version="0.1.0",
    python_requires=">=3.11",
    packages=["diagnostics", "kernels", "nanoworld", "parallel"],
    ext_modules=modules,
    cmdclass=commands,
    py_modules=sorted(f.stem for f in HERE.glob("*.py") if f.stem != "setup"),
)
