"""One fused op per file, each with its reference, Triton kernels, autograd and a check-and-time main.

On a GPU the kernels are Triton's; on a CPU they are the C++ of csrc/ where that is built. With TRITON_INTERPRET=1 the Triton kernels
themselves run on the CPU, slowly, which is how the tests check them.
"""
import contextlib
import importlib
import math
import os
import statistics

import torch

triton = None
if torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ:  # else there is nothing to launch, and importing it takes a second
    with contextlib.suppress(ImportError):
        triton = importlib.import_module("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
try:
    import nanowan_csrc  # noqa: F401  registers torch.ops.nanowan_csrc
    BUILT = True
except ImportError:
    BUILT = False


def launchable(x):
    """Around a launch: Triton uses the current GPU, which need not be x's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def register(op, triton_forward, cpp_name):
    """Give a custom op its kernels by device."""
    op.register_kernel("cuda")(triton_forward)
    op.register_kernel("cpu")(triton_forward if INTERPRETED or not BUILT else getattr(torch.ops.nanowan_csrc, cpp_name))


def worst(got, want):
    """Largest difference between two trees of tensors, as a share of the largest value in each tensor; infinite if anything is not finite."""
    got, want = (torch.utils._pytree.tree_leaves(t) for t in (got, want))
    errors = [((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-30)).item() for a, b in zip(got, want, strict=True)]
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


def milliseconds(run, repeats=20):
    """Median GPU time of a call, with the L2 cache flushed before each."""
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def bandwidth(gigabytes=1):
    """Bytes per second of the GPU's memory, from a copy."""
    a = torch.empty(gigabytes << 28, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.nbytes / milliseconds(lambda: b.copy_(a)) * 1000


def report(name, error, limit, run=None, floor_bytes=0, reference=None):
    """Print an op's error beside its limit, and on a GPU its time beside its bandwidth floor and its reference's. Returns what was measured."""
    line, told = f"{name}: error {error:.1e} (limit {limit:.0e})", {"error": error, "limit": limit}
    assert error <= limit, line
    if run is not None and torch.cuda.is_available():
        ms, floor = milliseconds(run), 1000 * floor_bytes / bandwidth()
        told |= {"ms": ms, "floor_ms": floor, "ref_ms": milliseconds(reference) if reference else None}
        line += f", {ms:.3f} ms, {floor / ms:.0%} of its bandwidth floor" + (f", reference {told['ref_ms']:.3f} ms" if reference else "")
    print(line, flush=True)
    return told
