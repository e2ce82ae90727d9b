"""`python setup.py build_ext --inplace` builds csrc/ into the extension nanowan_csrc.

If the extension cannot be built, because a compiler or something else is missing, one line says so, and nanoWan uses
PyTorch's operations. NANOWAN_CSRC=0 skips the build. The CUDA part is built if nvcc and a CUDA build of torch, both of
the same major version of CUDA, are installed. With NANOWAN_CUDA=1, setup.py fails if the extension or its CUDA part
cannot be built. NANOWAN_CUDA=0 leaves the CUDA part out. TORCH_CUDA_ARCH_LIST is honoured.
"""

import os
import re
import runpy
import shlex
import subprocess
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
sources_digest = runpy.run_path(str(HERE / "kernels" / "sources.py"))["sources_digest"]
CUDA = os.environ.get("NANOWAN_CUDA", "auto")
FLAGS = ["-std=c++20", "-O3", "-fopenmp", "-march=native", "-ffast-math", "-fno-finite-math-only"]


def native_features():
    """Return the features of this CPU that the compiler uses with FLAGS, named as in /proc/cpuinfo. Raises RuntimeError
    if the compiler lacks OpenMP or C++20.
    """
    cxx = shlex.split(os.environ.get("CXX", "c++"))
    done = subprocess.run(
        [*cxx, *FLAGS, "-include", "omp.h", "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(next((line for line in done.stderr.splitlines() if "error" in line), f"{cxx[0]} fails"))
    used = {
        name.replace("_", "")
        for name in re.findall(r"define __(?:arm_feature_)?(\w+?)(?:__)? 1$", done.stdout.lower(), re.M)
    }
    cpuinfo = Path("/proc/cpuinfo")
    flags = re.search(r"^(?:flags|Features)\s*:(.*)", cpuinfo.read_text() if cpuinfo.exists() else "", re.M)
    return sorted(f for f in set(flags[1].split() if flags else ()) if f.replace("_", "") in used)


def cuda_lack(torch_cuda, cuda_home):
    """Return why the CUDA part cannot be built, or "" if it can. torch_cuda: torch.version.cuda. cuda_home: CUDA's
    folder or None.
    """
    if torch_cuda is None:
        return "this torch was built without CUDA"
    if cuda_home is None:
        return "there is no nvcc"
    done = subprocess.run([Path(cuda_home) / "bin" / "nvcc", "--version"], capture_output=True, text=True)
    release = re.search(r"release (\d+)", done.stdout)
    if release and release[1] != torch_cuda.split(".")[0]:
        return f"nvcc is of CUDA {release[1]}, torch of CUDA {torch_cuda}"
    return ""


def extension():
    """Return ext_modules and cmdclass for setup(), [Extension] and {"build_ext": command}; with NANOWAN_CSRC=0, both
    are empty.
    """
    if os.environ.get("NANOWAN_CSRC") == "0":
        return [], {}
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

    class Build(BuildExtension):
        def run(self):
            for old in HERE.glob("nanowan_csrc*.so"):  # else an outdated file would stay if the build fails
                old.unlink()
            try:
                made = [
                    f"-DNANOWAN_BUILT_FOR={'.'.join(native_features())}",
                    f"-DNANOWAN_SOURCES={sources_digest(HERE / 'csrc')}",
                ]
                for e in self.extensions:
                    e.extra_compile_args["cxx"] += [*made, f"-DNANOWAN_TORCH={torch.__version__}"]
                super().run()
            except Exception as e:
                if CUDA == "1":
                    raise
                self.extensions = []
                why = (" ".join(str(e).split()) or type(e).__name__) + "; NANOWAN_CUDA=0 tries it without CUDA" * cuda
                print(f"nanowan: the C++ extension cannot be built, PyTorch's operations are used instead ({why})")

    lack = cuda_lack(torch.version.cuda, CUDA_HOME)
    if CUDA == "1" and lack:
        raise SystemExit(f"nanowan: NANOWAN_CUDA=1, but {lack}")
    cuda = CUDA != "0" and not lack
    if not cuda:
        print(f"nanowan: the C++ extension without CUDA ({lack or 'NANOWAN_CUDA=0'})")
    sources, flags = sorted((HERE / "csrc").glob("*.cpp")), {"cxx": FLAGS + ["-DNANOWAN_CUDA"] * cuda}
    if cuda:
        cards = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())} or {(8, 0), (9, 0)}
        # with PTX at the end, which newer GPUs compile to their own code
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(f"{a}.{b}" for a, b in sorted(cards)) + "+PTX")
        # a .cu needs a name that no .cpp has: their object files go to the same folder
        sources += sorted((HERE / "csrc").glob("*.cu"))
        flags["nvcc"] = ["-O3"]
    kind, names = CUDAExtension if cuda else CppExtension, [str(f.relative_to(HERE)) for f in sources]
    return [kind("nanowan_csrc", names, extra_compile_args=flags)], {"build_ext": Build}


modules, commands = extension()
setup(ext_modules=modules, cmdclass=commands)
