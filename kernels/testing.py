"""What checks and benchmarks of the kernels share: seeded inputs, the largest relative error, times on a GPU."""

import functools
import math
import statistics
import time

import torch


def seeded(device="cpu"):
    """(A generator that begins the same each time, random(*shape): normal numbers from it on a device)."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device)

    return generator, random


def worst(got, want):
    """Largest difference between two trees of tensors, as a share of the largest value in each tensor; infinite if
    anything is not finite.
    """
    got, want = (torch.utils._pytree.tree_leaves(t) for t in (got, want))
    errors = [
        ((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-30)).item()
        for a, b in zip(got, want, strict=True)
    ]
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


def milliseconds(run, repeats=20):
    """Median time of a call: on a GPU where there is one, with its L2 cache flushed before each, else on the CPU."""
    if not torch.cuda.is_available():
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            run()
            times.append(1000 * (time.perf_counter() - began))
        return statistics.median(times)
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


@functools.cache
def bandwidth(gigabytes=1):
    """Bytes per second of the GPU's memory, from a copy."""
    a = torch.empty(gigabytes << 28, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.nbytes / milliseconds(lambda: b.copy_(a)) * 1000


def report(name, error, limit):
    """Print an op's error beside its limit, and hold it to that. Returns what was measured."""
    print(f"{name}: error {error:.1e} (limit {limit:.0e})", flush=True)
    assert error <= limit, f"{name}: error {error:.1e} > {limit:.0e}"
    return {"error": error, "limit": limit}


def timed(name, run, reference, floor_bytes):
    """Print an op's GPU time beside its bandwidth floor and its reference's time. Returns what was measured."""
    ms, floor_ms, ref_ms = milliseconds(run), 1000 * floor_bytes / bandwidth(), milliseconds(reference)
    share = f"{floor_ms / ms:.0%} of its bandwidth floor"
    print(f"{name}: {ms:.3f} ms, {share}, reference {ref_ms:.3f} ms", flush=True)
    return {"ms": ms, "floor_ms": floor_ms, "ref_ms": ref_ms}
