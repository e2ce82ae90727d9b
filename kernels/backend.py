"""Picks the implementation of every hot operation, once, at import; scripts print which (`chosen`).

NANOWAN_OPS=ref      the plain PyTorch definitions, in kernels/*.py
           =triton   the Triton kernels (on a CPU only under TRITON_INTERPRET=1)
           =cuda     Triton, and csrc's CUDA for what comes before the VAE's convolutions
           =cpp      csrc's C++, on a CPU
           =auto     the fastest that can be had: on a GPU Triton, on a CPU C++ if it was built, else the reference

An explicit choice that cannot be had raises ImportError with the reason.
"""

import contextlib
import os
import sys

import torch

import kernels
from kernels import linear as linear_kernel

CHOICES = ("auto", "ref", "cpp", "triton", "cuda")


def available():
    """{choice: None, or why it cannot be had}."""
    gpu, cpp, triton, cuda = torch.cuda.is_available(), None, None, None
    if not kernels.BUILT:
        cpp = f"the C++ extension is not built ({sys.executable} -m pip install -e . builds it)"
    if not gpu and not kernels.INTERPRETED:
        triton = "no CUDA device, and TRITON_INTERPRET is not 1"
    elif kernels.triton is None:
        triton = "triton is not installed"
    if not gpu:
        cuda = "no CUDA device"
    elif cpp or not torch.ops.nanowan_csrc.has_cuda():
        cuda = cpp or "the extension was built without CUDA (NANOWAN_CUDA=1 makes setup.py say why)"
    return {"auto": None, "ref": None, "cpp": cpp, "triton": triton, "cuda": triton or cuda}


def resolve(choice):
    """{device type: implementation} for one of CHOICES. Raises ImportError where an explicit one cannot be had."""
    if choice not in CHOICES:
        raise ImportError(f"NANOWAN_OPS={choice}: choose from {', '.join(CHOICES)}")
    why = available()
    if why[choice]:
        raise ImportError(f"NANOWAN_OPS={choice}: {why[choice]}")
    if choice == "auto":
        return {
            "cpu": "ref" if why["cpp"] else "cpp",
            "cuda": "cuda" if not why["cuda"] else "ref" if why["triton"] else "triton",
        }
    return {
        "cpu": choice if choice == "cpp" or choice == "triton" and kernels.INTERPRETED else "ref",
        "cuda": choice if choice in ("triton", "cuda") else "ref",
    }


CHOSEN = resolve(os.environ.get("NANOWAN_OPS", "auto"))


def fast(x):
    """Whether x's device has more than the reference."""
    return CHOSEN.get(x.device.type, "ref") != "ref"


def on_gpu(x):
    """Whether x is on a GPU, or in a plan (`using`, pretend) a fake tensor that stands for one there."""
    return x.is_cuda or CHOSEN["cpu"] in ("triton", "cuda") and not kernels.INTERPRETED


def capable(device, least=(0, 0), below=(99, 0)):
    """Whether least <= a GPU's (major, minor) < below; a plan that is made without a GPU is for a Hopper."""
    capability = 9, 0
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device if device.type == "cuda" else None)
    return least <= capability < below


def chosen(device):
    """What a device's operations are, for a run's first lines and its record."""
    kind = torch.device(device).type
    names = {"ref": "PyTorch's", "cpp": "C++", "triton": "Triton's", "cuda": "Triton's and CUDA's"}
    choice = CHOSEN.get(kind, "ref")
    where = ", large fp32 products by oneDNN" if choice == "cpp" and linear_kernel.PREFERS_ONEDNN else ""
    if kind == "cuda" and torch.__version__ < (2, 10) and (torch.backends.cudnn.version() or 0) < 91500:
        # pytorch/pytorch#166643
        where = "; torch 2.9 makes the VAE's bf16 convolutions without cuDNN, slowly and in much memory: take 2.10"
    return f"{names[choice]} operations on {kind}{where}"


@contextlib.contextmanager
def using(choice, pretend=False):
    """Another choice for a while: for tests and benchmarks. pretend: on fake CPU tensors, what a GPU would run."""
    global CHOSEN
    before, CHOSEN = CHOSEN, {"cpu": choice} if pretend else resolve(choice)
    try:
        yield
    finally:
        CHOSEN = before
