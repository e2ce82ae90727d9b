"""One fused operation per file: the reference, which defines it, then the kernel in C++ or Triton, then autograd.

On a GPU the kernels are in Triton, and one is also in the CUDA code of csrc/. On a CPU the kernels are the C++ code of
csrc/ if that is built. With TRITON_INTERPRET=1 the Triton kernels run slowly on the CPU; the tests check them this way.
"""

import contextlib
import importlib.util
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch

from kernels.sources import sources_digest

ROOT = Path(__file__).parent.parent
triton = None
# without a GPU or the interpreter there is nothing to launch, and importing Triton takes a second
if torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ:
    with contextlib.suppress(ImportError):
        import triton
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def check_interpreter(triton_version, numpy_version):
    """Raise ImportError if Triton's interpreter cannot run the loops of these kernels. In Triton below 3.7, the
    interpreter converts a loop's bounds with int(array of one element), which NumPy 2.4 and later refuse. Both
    arguments are strings such as "3.6.0".
    """
    versions = [tuple(int(n) for n in v.split(".")[:2]) for v in (triton_version, numpy_version)]
    if versions[0] < (3, 7) and versions[1] >= (2, 4):
        raise ImportError(
            f"TRITON_INTERPRET=1: the interpreter of Triton {triton_version} does not work with NumPy {numpy_version}; "
            "pip install 'numpy<2.4', or Triton 3.7"
        )


if INTERPRETED and triton:
    check_interpreter(triton.__version__, np.__version__)


def mismatch(file):
    """Return why the built extension `file` must not be loaded: it was built for another CPU, from other sources, or
    with another torch. Return "" if it may be loaded. The file contains, as text, the CPU features, the sources' digest
    and the version of torch that it was built with (csrc/built_for.cpp).
    """
    pattern = rb"nanowan_csrc is built for: ([\w.]*)(?: from: (\w+) with torch: ([\w.+]+))?"
    match, cpuinfo, csrc = re.search(pattern, file.read_bytes()), Path("/proc/cpuinfo"), ROOT / "csrc"
    features, sources, version = (g.decode() if g else "" for g in (match.groups() if match else ("", "", "")))
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set(features.split("."))
    lacking = [f for f in features.split(".") if f and f not in flags]
    if lacking:
        return f"was built for a CPU with {' '.join(lacking)}"
    if csrc.is_dir() and sources != sources_digest(csrc):
        return f"was built from other sources than {csrc}"
    return (
        "" if version in ("", torch.__version__) else f"was built with torch {version}, and this is {torch.__version__}"
    )


def load_csrc():
    """Load nanowan_csrc, which registers torch.ops.nanowan_csrc. Returns whether it is loaded. If it is built but
    cannot be loaded, the reason is printed.
    """
    spec = importlib.util.find_spec("nanowan_csrc")
    if spec is None:
        return False
    why = mismatch(Path(spec.origin))  # before loading it, which can end in SIGILL
    if not why:
        try:
            import nanowan_csrc  # noqa: F401

            return True
        except ImportError as e:
            why = f"does not load: {e}"
    rebuild = f"cd {ROOT} && {sys.executable} setup.py build_ext --inplace"
    print(f"nanowan: {spec.origin} {why}; PyTorch's operations are used. {rebuild} rebuilds it", file=sys.stderr)
    return False


BUILT = load_csrc()


def launchable(x):
    """Return a context in which Triton launches kernels on x's GPU, not on the current GPU."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def register(op, triton_forward, cpp_name):
    """Register the kernels of a custom op. On GPUs, triton_forward runs. On CPUs, triton_forward runs if Triton's
    interpreter is in use, else csrc's operator `cpp_name`. On a CPU without either, models
    do not call the op.
    """
    op.register_kernel("cuda")(triton_forward)
    op.register_kernel("cpu")(triton_forward if INTERPRETED or not BUILT else getattr(torch.ops.nanowan_csrc, cpp_name))
