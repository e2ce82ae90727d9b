"""Devices and dtypes that flags name, and how much memory is free."""

import math
import sys

import torch

from kernels import attention_backends
from nanowan.errors import BadInput

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Bytes of activations at work, from the shapes of the largest layers: the VAE's per pixel of a frame, the DiT's per
# token and channel.
VAE_BYTES, DIT_BYTES = 18_000, 27


def pick_device(name=None):
    """The device that a flag names, or cuda where there is one. Raises BadInput where there is no such device, or it is
    older than Ampere: neither bf16 nor Triton's products work there.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    count = torch.cuda.device_count()
    if name not in ["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]:
        choice = f", cuda or cuda:0 to cuda:{count - 1}" if count else "; no CUDA device is available"
        raise BadInput(f"--device {name}: use cpu{choice}")
    if name != "cpu":
        check_gpu(torch.device(name))
    return name


def check_gpu(device):
    """Raise BadInput for a GPU that this cannot run on; say so where nobody has tried."""
    card, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if torch.version.hip:
        print(f"{card}: this has never been tried on ROCm", file=sys.stderr, flush=True)
    elif major < 8:
        raise BadInput(
            f"--device {device}: {card} has compute capability {major}.{minor}; 8.0 (Ampere) or newer is needed, or "
            "--device cpu"
        )


def pick_dtype(name, device):
    """The name of the dtype that a flag gives, or the device's default: bf16 on cuda, fp32 on cpu."""
    return name or ("bf16" if torch.device(device).type == "cuda" else "fp32")


def select_attention(name, device, dtype, gradients=False):
    """Let a run use the attention that a flag names; as kernels.attention_backends.select, but raises BadInput."""
    try:
        attention_backends.select(name, device, dtype, gradients)
    except ValueError as e:
        raise BadInput(f"--attention {name}: {e}") from None


def free_memory(device):
    """Bytes that can still be taken on a device, or on the host ("cpu"); infinite where that cannot be known."""
    if torch.device(device).type == "cuda":
        if not torch.cuda.is_available():
            return math.inf
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    try:
        with open("/proc/meminfo") as f:
            return 1024 * next(int(line.split()[1]) for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf


def activation_bytes(dim, tokens, batch=1):
    """About what a forward pass of a DiT of width `dim` takes beyond weights, without gradients."""
    return DIT_BYTES * batch * tokens * dim
