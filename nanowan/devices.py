"""Find the device, dtype and attention that flags name, and how much memory is free."""

import math
import sys
from pathlib import Path

import torch

from kernels import attention_backends
from nanowan.errors import BadInput

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Bytes of activations while a model runs, from the shapes of its largest layers: the VAE's per pixel of a frame, the
# DiT's per token and channel.
VAE_BYTES, DIT_BYTES = 18_000, 27
ROOM = 1 << 30  # bytes to leave free next to a model: on the device for activations, on the host for everything else
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def pick_device(name=None):
    """Return the device that a flag names, or, without a name, cuda if there is a GPU, else the CPU. Raises BadInput if
    the device does not exist, or if it is a GPU older than Ampere, on which neither bf16 nor Triton's matrix products
    work.
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
    """Raise BadInput for a GPU that is too old. Print a warning on ROCm, on which nobody has tried this project."""
    card, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if torch.version.hip:
        print(f"{card}: this has never been tried on ROCm", file=sys.stderr, flush=True)
    elif major < 8:
        raise BadInput(
            f"--device {device}: {card} has compute capability {major}.{minor}; 8.0 (Ampere) or newer is needed, or "
            "--device cpu"
        )


def pick_dtype(name, device):
    """Return the name of the dtype that a flag gives, or, without a name, the device's default: bf16 on cuda, fp32 on
    cpu.
    """
    return name or ("bf16" if torch.device(device).type == "cuda" else "fp32")


def select_attention(name, device, dtype, gradients=False):
    """Select the attention that --attention names. The arguments are those of kernels.attention_backends.select. Raises
    BadInput if this attention is not available.
    """
    try:
        attention_backends.select(name, device, dtype, gradients)
    except ValueError as e:
        raise BadInput(f"--attention {name}: {e}") from None


def free_memory(device):
    """Return the bytes that can still be allocated on a device, or on the host ("cpu"). The result is infinity if the
    number is not known.
    """
    if torch.device(device).type == "cuda":
        if not torch.cuda.is_available():
            return math.inf
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    try:
        lines = (PROC / "meminfo").read_text().splitlines()
        available = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        available = math.inf
    return min(available, cgroup_memory())


def cgroup_memory():
    """Return the bytes that this process may still use under its control groups (such as those of a container or a
    batch job), or infinity if these set no limit. The page cache does not count as used, since the system frees it when
    memory is short.
    """
    free = math.inf
    for line in _read(PROC / "self" / "cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            root, limit, usage, prefix = CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        elif number == "0":
            root, limit, usage, prefix = CGROUPS, "memory.max", "memory.current", ""
        else:
            continue
        group = root / path.lstrip("/")
        for folder in [group, *group.parents][: len(group.parts) - len(root.parts) + 1]:
            most, used = _read(folder / limit).strip(), _read(folder / usage).strip()
            if most.isdigit() and used.isdigit():  # else "max", or a group that this container cannot see
                stat = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
                cache = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
                free = min(free, int(most) - int(used) + cache)
    return free


def _read(file):
    try:
        return file.read_text()
    except OSError:
        return ""


def activation_bytes(dim, tokens, batch=1):
    """Return an estimate of the bytes of activations in a forward pass of a DiT of width `dim`, without gradients."""
    return DIT_BYTES * batch * tokens * dim
