"""Set environment variables that PyTorch and its libraries read when they load. Scripts import this before torch."""

import os
import platform
import sys

# Idle OpenMP threads sleep: if another process keeps the cores busy, spinning makes a step tens of times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def grows_segments(argv, kernel):
    """Return whether PyTorch should allocate a GPU's memory in segments that can grow. Such segments avoid holes that
    are too small for later tensors. The result is False in three cases: the user has configured PyTorch's allocator;
    the system is WSL, whose driver cannot allocate such a segment (pytorch/pytorch#192330); or CUDA graphs are used,
    for which PyTorch disabled such segments until 2026 (pytorch/pytorch#194767). argv: the script's flags. kernel: the
    release of the system's kernel, which contains "microsoft" in WSL.
    """
    is_set = os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
    return not is_set and "microsoft" not in kernel.lower() and "--cuda_graphs" not in argv


if grows_segments(sys.argv, platform.release()):
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
