"""One fused op per file, each with its reference, Triton kernels, autograd and a check-and-time main.

On a GPU the kernels are Triton's; on a CPU they are the C++ of csrc/ where that is built. With TRITON_INTERPRET=1 the
Triton kernels themselves run on the CPU, slowly, which is how the tests check them.
"""

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import math
import os
import re
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
triton = None
# without a GPU or the interpreter there is nothing to launch, and importing Triton takes a second
if torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ:
    with contextlib.suppress(ImportError):
        triton = importlib.import_module("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def check_interpreter(triton_version, numpy_version):
    """Raise ImportError where Triton's interpreter cannot run the loops of the kernels here. Before 3.7 it makes a
    loop's bounds Python integers by int(array of one element), which NumPy refuses from 2.4 on.
    """
    versions = [tuple(int(n) for n in v.split(".")[:2]) for v in (triton_version, numpy_version)]
    if versions[0] < (3, 7) and versions[1] >= (2, 4):
        raise ImportError(
            f"TRITON_INTERPRET=1: the interpreter of Triton {triton_version} does not work with NumPy {numpy_version}; "
            "pip install 'numpy<2.4', or Triton 3.7"
        )


if INTERPRETED and triton:
    check_interpreter(triton.__version__, np.__version__)


def sources_digest(folder):
    """Of csrc's files, as setup.py computes it too (which cannot import this)."""
    files = sorted(f for f in folder.iterdir() if f.suffix in (".cpp", ".cu", ".h"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def mismatch(file):
    """Why a built nanowan_csrc must not be loaded here, or "": another CPU, other sources or another torch than it was
    built for (csrc/built_for.cpp).
    """
    pattern = rb"nanowan_csrc is built for: ([\w.]*)(?: from: (\w+) with torch: ([\w.+]+))?"
    found, cpuinfo, csrc = re.search(pattern, file.read_bytes()), Path("/proc/cpuinfo"), ROOT / "csrc"
    features, sources, version = (g.decode() if g else "" for g in (found.groups() if found else ("", "", "")))
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
    """Whether nanowan_csrc is there and was loaded, which registers torch.ops.nanowan_csrc; says why it was not."""
    spec = importlib.util.find_spec("nanowan_csrc")
    if spec is None:
        return False
    why = mismatch(Path(spec.origin))  # before loading, which can end in SIGILL
    if not why:
        try:
            importlib.import_module("nanowan_csrc")
            return True
        except ImportError as e:
            why = f"does not load: {e}"
    rebuild = f"cd {ROOT} && {sys.executable} setup.py build_ext --inplace"
    print(f"nanowan: {spec.origin} {why}; PyTorch's operations are used. {rebuild} rebuilds it", file=sys.stderr)
    return False


BUILT = load_csrc()


def launchable(x):
    """Around a launch: Triton uses the current GPU, which need not be x's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def register(op, triton_forward, cpp_name):
    """Give a custom op its kernels by device."""
    op.register_kernel("cuda")(triton_forward)
    op.register_kernel("cpu")(triton_forward if INTERPRETED or not BUILT else getattr(torch.ops.nanowan_csrc, cpp_name))


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
