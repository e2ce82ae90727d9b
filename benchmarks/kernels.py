"""Time each kernel and the PyTorch code that it replaces, the reference.

On a GPU, memory-bound kernels are also compared with the time that their memory traffic alone would take.

python -m benchmarks.kernels [NAME ...]     on a GPU if there is one, in bf16, else on the CPU, in fp32
"""

import functools
import math
import statistics
import sys
import time

import torch

from kernels import adamw8bit, attention, causal_conv3d, gelu, linear, modulate, ops, qk_norm_rope, quantize
from kernels.rope import grid_positions, rope_table

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
GRIDS = (((31, 22, 40), 24), ((21, 30, 52), 40))  # token grid and heads: 5B at 1280x704x121, A14B at 832x480x81
CONV_SIZES = (
    ((256, 4, 704, 1280), (512, 4, 352, 640), (1024, 2, 88, 160)) if GPU else ((128, 4, 64, 64), (512, 1, 8, 8))
)


def milliseconds(run, repeats=20):
    """Return the median milliseconds of a call of `run`. The call is timed on a GPU if there is one, with the L2 cache
    flushed before each call, else on the CPU.
    """
    if not GPU:
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
    """Return the bandwidth of the GPU's memory, in bytes read plus bytes written per second, measured by a copy.
    gigabytes: size of the copied tensor in GiB.
    """
    a = torch.empty(gigabytes << 28, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.nbytes / milliseconds(lambda: b.copy_(a)) * 1000


def compare(name, run, reference, floor_bytes=None, flops=None, repeats=20):
    """Time two functions, print the times and return {name: {"ms", "ref_ms"}}. If floor_bytes is given and there is a
    GPU, add "floor_ms", the time that reading and writing this many bytes takes. If flops is given, add "tflops" and
    "ref_tflops".
    """
    result = {"ms": milliseconds(run, repeats), "ref_ms": milliseconds(reference, repeats)}
    line = f"{name}: {result['ms']:.3f} ms, reference {result['ref_ms']:.3f} ms"
    if floor_bytes and GPU:
        result["floor_ms"] = 1000 * floor_bytes / bandwidth()
        line += f", {result['floor_ms'] / result['ms']:.0%} of its bandwidth floor"
    if flops:
        result |= {"tflops": flops / result["ms"] / 1e9, "ref_tflops": flops / result["ref_ms"] / 1e9}
        line += f" ({result['tflops']:.2f} TFLOP/s, {result['ref_tflops']:.2f})"
    print(line, flush=True)
    return {name: result}


# ---- one function per kernel -------------------------------------------------------------------------------------
def time_modulate(grids=GRIDS):
    results = {}
    for grid, heads in grids:
        L, D = math.prod(grid), heads * 128
        x, y = torch.randn(1, L, D, device=DEVICE), torch.randn(1, L, D, device=DEVICE, dtype=torch.bfloat16)
        row, *rest = torch.randn(3, 1, 1, D, device=DEVICE)
        rest += [1e-6, torch.bfloat16]
        cases = {"modulate": ((x, *rest), 6), "gate_modulate": ((x, y, row, *rest), 12)}
        for name, (inputs, nbytes) in cases.items():
            runs = (functools.partial(getattr(modulate, name + end), *inputs) for end in ("", "_ref"))
            results |= compare(f"{name} {L}x{D}", *runs, floor_bytes=nbytes * L * D)
    return results


def time_qk_norm_rope(grids=GRIDS):
    results = {}
    for grid, heads in grids:
        L, D = math.prod(grid), heads * 128
        q, k, _ = torch.randn(1, L, 3 * D, device=DEVICE, dtype=torch.bfloat16).chunk(3, -1)
        weights, table = list(torch.ones(2, D, device=DEVICE)), rope_table(max(grid), 128, DEVICE)
        inputs = [q, k], weights, 1e-6, heads, table, grid_positions(grid, DEVICE)
        runs = (functools.partial(op, *inputs) for op in (qk_norm_rope.qk_norm_rope, qk_norm_rope.qk_norm_rope_ref))
        results |= compare(f"qk_norm_rope {L}x{D}", *runs, floor_bytes=8 * L * D)
    return results


@torch.no_grad()
def time_attention(grids=GRIDS):
    """Time self-attention with heads of size 128 on one clip. The kernel also norms and rotates q; the reference does
    this with another kernel, before PyTorch's attention. grids: pairs of a token grid and a number of heads.
    """
    results = {}
    for grid, N in grids:
        L = math.prod(grid)
        q, k, v = torch.randn(1, L, 3, N, 128, device=DEVICE, dtype=torch.bfloat16).unbind(2)
        weight, table = torch.ones(N * 128, device=DEVICE), rope_table(max(grid), 128, DEVICE)
        how = weight, 1e-6, table, grid_positions(grid, DEVICE)

        def unfused(q=q, k=k, v=v, N=N, how=how):
            weight, eps, *rope = how
            (normed,) = qk_norm_rope.qk_norm_rope([q.flatten(2)], [weight], eps, N, *rope)
            return attention.attention_ref(normed, k, v)

        fused = functools.partial(attention.attention, q, k, v, *how)
        results |= compare(f"attention {L}x{N}", fused, unfused, flops=4 * L * L * N * 128, repeats=10)
    return results


def time_quantize():
    if torch.cuda.get_device_capability() < (8, 9):
        return {"left out": "this GPU has no e4m3"}
    results = {}
    for n, m, activated in ((27280, 3072, False), (27280, 14336, False), (27280, 14336, True)):
        x = torch.randn(n, m, device=DEVICE, dtype=torch.bfloat16)
        runs = (functools.partial(op, x, activated) for op in (quantize.quantize_rows, quantize.quantize_rows_ref))
        results |= compare(f"quantize_rows {n}x{m}{', of a GELU' * activated}", *runs, floor_bytes=3 * n * m)
    return results


def time_adamw8bit():
    p = torch.randn(4096, 10240, device=DEVICE, dtype=torch.bfloat16)
    compensation, codes, scale = adamw8bit.new_state(p)
    inputs = p, compensation, torch.randn_like(p), codes, scale, 2, 1e-4, (0.9, 0.99), 1e-8, 0.01
    runs = (functools.partial(op, *inputs) for op in (adamw8bit.step, adamw8bit.step_ref))
    return compare(f"adamw8bit {p.numel()}", *runs, floor_bytes=14 * p.numel())


@torch.no_grad()
def time_causal_conv3d(sizes=CONV_SIZES):
    """Time a causal 3x3x3 convolution with norm and SiLU before it, and with as many channels out as in. sizes: the
    shapes (C,T,H,W) of the inputs.
    """
    results, like = {}, dict(device=DEVICE, dtype=torch.bfloat16 if GPU else torch.float32)
    for C, *size in sizes:
        shapes = (1, C, *size), (1, C, 2, *size[1:]), (C, C, 3, 3, 3)
        x, past, w = (torch.randn(*s, **like).contiguous(memory_format=torch.channels_last_3d) for s in shapes)
        inputs = x, past, w, torch.zeros(C, **like), torch.ones(C, **like)
        runs = (functools.partial(op, *inputs) for op in (ops.causal_conv3d, causal_conv3d.causal_conv3d_ref))
        name = f"causal_conv3d {C} channels, {'x'.join(map(str, size))}"
        results |= compare(name, *runs, flops=2 * 27 * C * C * math.prod(size), repeats=5)
    return results


@torch.no_grad()
def time_gelu(rows=27280 if GPU else 480, dim=3072 if GPU else 768, ffn_dim=14336 if GPU else 3072):
    """Time the first matrix product of a feed-forward and the GELU after it. Linear.with_gelu computes both, as in the
    DiT; the reference computes the GELU after the product, with gelu_ref.
    """
    with torch.device(DEVICE):
        up, x = ops.Linear(dim, ffn_dim), torch.randn(1, rows, dim)
    up, x = (up.bfloat16(), x.bfloat16()) if GPU else (up, x)
    runs = (lambda: up.with_gelu(x, ops.GELU()), lambda: gelu.gelu_ref(up(x)))
    return compare(f"GELU with a product {rows}x{dim}x{ffn_dim}", *runs, flops=2 * rows * dim * ffn_dim)


@torch.no_grad()
def time_linear(sizes=((480, 768, 768), (480, 768, 3072), (480, 3072, 768), (4096, 768, 768))):
    """Time large fp32 matrix products as this project computes them on this CPU; the reference is PyTorch's F.linear.
    sizes: (rows of x, input features, output features) for each product.
    """
    results = {}
    for M, K, N in sizes:
        x, w, b = torch.randn(M, K), torch.randn(N, K), torch.randn(N)
        runs = (functools.partial(op, x, w, b) for op in (linear.linear, linear.linear_ref))
        results |= compare(f"linear {M}x{K}x{N}", *runs, flops=2 * M * K * N)
    return results


KERNELS = {"causal_conv3d": time_causal_conv3d, "gelu": time_gelu}
if GPU:
    KERNELS |= {"attention": time_attention, "modulate": time_modulate, "qk_norm_rope": time_qk_norm_rope}
    KERNELS |= {"quantize": time_quantize, "adamw8bit": time_adamw8bit}
else:
    KERNELS |= {"linear": time_linear}


def main(names):
    if unknown := sorted(set(names) - KERNELS.keys()):
        raise SystemExit(f"{unknown[0]}: choose from {', '.join(KERNELS)}")
    for name in names or KERNELS:
        KERNELS[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
