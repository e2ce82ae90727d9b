"""Settings that PyTorch and its libraries read when they are loaded. Scripts import this before torch."""

import os
import platform
import sys

# Idle OpenMP threads sleep: beside another busy process, spinning makes a step tens of times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def grows_segments(argv, kernel):
    """Whether a GPU's memory is to lie in segments that grow, without holes between those that do not fit what comes
    next. Not where the user has set PyTorch's allocator; not under WSL, whose driver fails at the first allocation
    (pytorch/pytorch#192330); nor with CUDA graphs, for which PyTorch had switched them off until 2026
    (pytorch/pytorch#194767).
    """
    is_set = os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
    return not is_set and "microsoft" not in kernel.lower() and "--cuda_graphs" not in argv


if grows_segments(sys.argv, platform.release()):
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
