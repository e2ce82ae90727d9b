"""Picks the implementation of every hot operation, by the type of device.

NANOWAN_OPS=ref      the plain PyTorch definitions, in kernels/*.py
           =triton   the Triton kernels (on a CPU only under TRITON_INTERPRET=1)
           =cuda     Triton, and csrc's CUDA for what comes before the VAE's convolutions
           =cpp      csrc's C++, on a CPU
           =auto     on a GPU: Triton, with csrc's CUDA if that was built, or ref if Triton is not available;
                     on a CPU: C++, or ref if the C++ was not built

An explicit choice that is not available raises ImportError with the reason. Triton counts as available only if it can
launch a kernel: its first launch compiles C, and many machines have Triton but no compiler.
"""

import contextlib
import functools
import os
import sys

import torch

import kernels

CHOICES = ("auto", "ref", "cpp", "triton", "cuda")
REQUESTED = os.environ.get("NANOWAN_OPS", "auto")

if kernels.triton:

    @kernels.triton.jit
    def probe_kernel():
        pass


def in_one_line(error):
    """Return the type of an exception and the first line of its message."""
    return f"{type(error).__name__}: {next(filter(None, str(error).splitlines()), '')[:200]}"


@functools.cache
def launch_error():
    """Return why Triton cannot launch a kernel on the current GPU, in one line, or None if it can."""
    try:
        probe_kernel[(1,)]()
    except Exception as e:  # whatever a compiler, Triton or a driver says
        return f"Triton cannot launch a kernel ({in_one_line(e)}); try: apt install gcc python3-dev"


def lacking(choice):
    """Return why `choice`, one of CHOICES, is not available, or None if nothing is known to be missing. To take no
    memory on a GPU, this function does not try to launch a kernel.
    """
    gpu = torch.cuda.is_available()
    if choice == "cpp" and not kernels.BUILT:
        return f"the C++ extension is not built ({sys.executable} setup.py build_ext --inplace builds it)"
    if choice == "triton" and not gpu and not kernels.INTERPRETED:
        return "no CUDA device, and TRITON_INTERPRET is not 1"
    if choice == "cuda" and not gpu:
        return "no CUDA device"
    if choice in ("triton", "cuda") and kernels.triton is None:
        return "triton is not installed"
    if choice == "cuda" and not (kernels.BUILT and torch.ops.nanowan_csrc.has_cuda()):
        return "the extension is not built, or without CUDA (NANOWAN_CUDA=1 makes setup.py say why)"
    return None


def resolve(choice, device_type):
    """Return the implementation that `choice`, one of CHOICES, means on a type of device ("cpu", "cuda"): "ref", "cpp",
    "triton" or "cuda". Raises ImportError if an explicit choice is not available.
    """
    if choice not in CHOICES:
        raise ImportError(f"NANOWAN_OPS={choice}: choose from {', '.join(CHOICES)}")
    if why := lacking(choice):
        raise ImportError(f"NANOWAN_OPS={choice}: {why}")
    if device_type == "cpu":
        if choice == "auto":
            return "cpp" if kernels.BUILT else "ref"
        return choice if choice == "cpp" or choice == "triton" and kernels.INTERPRETED else "ref"
    if device_type != "cuda" or choice in ("ref", "cpp") or not torch.cuda.is_available():
        return "ref"
    if why := lacking("triton") or launch_error():
        if choice != "auto":
            raise ImportError(f"NANOWAN_OPS={choice}: {why}")
        print(f"ops: {why}; PyTorch's operations are used", file=sys.stderr, flush=True)
        return "ref"
    return "triton" if choice == "triton" or lacking("cuda") else "cuda"


CHOSEN = {"cpu": resolve(REQUESTED, "cpu")}  # {type of device: implementation}; "cuda" is added at its first use


def implementation(device_type):
    """Return the implementation in use on a type of device ("cpu", "cuda"): "ref", "cpp", "triton" or "cuda"."""
    if device_type not in CHOSEN:
        CHOSEN[device_type] = resolve(REQUESTED, device_type)
    return CHOSEN[device_type]


def fast(x):
    """Return whether x's device has an implementation other than the reference."""
    return implementation(x.device.type) != "ref"


def has_triton(x):
    """Return whether Triton kernels run on x's device: on a GPU, or on a CPU in Triton's interpreter."""
    return implementation(x.device.type) in ("triton", "cuda")


def on_gpu(x):
    """Return whether x is on a GPU, or is a fake CPU tensor that stands for a GPU tensor (the argument `pretend` of
    `using`).
    """
    return x.is_cuda or CHOSEN["cpu"] in ("triton", "cuda") and not kernels.INTERPRETED


def capable(device, least=(0, 0), below=(99, 0)):
    """Return whether the compute capability (major, minor) of a GPU is at least `least` and lower than `below`. If
    there is no GPU, a Hopper is assumed (for memory plans).
    """
    capability = 9, 0
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device if device.type == "cuda" else None)
    return least <= capability < below


if torch.cuda.is_available():  # only there, since importing what torch.compile needs takes a second
    # torch.compile treats the results of these functions as constants
    implementation, capable = map(torch.compiler.assume_constant_result, (implementation, capable))


@contextlib.contextmanager
def using(choice, pretend=False):
    """Use another of CHOICES within this context, for tests, benchmarks and memory plans. pretend: fake CPU tensors run
    the operations that a GPU would run.
    """
    global CHOSEN, REQUESTED
    before = CHOSEN, REQUESTED
    CHOSEN, REQUESTED = {"cpu": choice if pretend else resolve(choice, "cpu")}, choice
    try:
        yield
    finally:
        CHOSEN, REQUESTED = before
