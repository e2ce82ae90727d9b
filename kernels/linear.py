"""Linears, and linears of a GELU, of which a backward pass keeps nothing but what went into the GELU.

    python -m kernels.linear      check against the reference, then time it

x (...,K), weight (N,K), bias (N) -> x W^T + b (...,N), or gelu(x) W^T + b. The backward pass works in place: of a DiT's
feed-forward that is a third of its memory.

Large fp32 products on a CPU: PyTorch calls MKL, which is slow on AMD's CPUs. There oneDNN multiplies, which PyTorch
ships as well. Where a CPU has AMX tiles these do (csrc/linear.cpp): six products of bf16 parts, as exact as fp32's own
and faster. The idea: Henry, Tang and Heinecke, Leveraging the bfloat16 artificial intelligence datatype for
higher-precision computations, 2019. Which it is follows from the CPU and the shape alone, so that a run's bits do.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from kernels import BUILT
from kernels.gelu import gelu, gelu_backward_, gelu_ref
from kernels.testing import milliseconds, report, seeded, worst


# ---- reference ---------------------------------------------------------------------------------------------------
def linear_ref(x, weight, bias=None, activated=False):
    """x W^T + b, of gelu(x) if `activated`."""
    return F.linear(gelu_ref(x) if activated else x, weight, bias)


# ---- which library -----------------------------------------------------------------------------------------------
def is_amd():
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()


# what multiplies large fp32 matrices faster than PyTorch's own choice here
FASTER = (
    "tiles"
    if BUILT and torch.ops.nanowan_csrc.has_tiles()
    else "onednn"
    if is_amd() and torch.backends.mkldnn.is_available()
    else None
)
LEAST_ROWS = {"tiles": 64, "onednn": 8}  # for fewer, splitting the weight, or the longer call, costs more than it gains


def faster(x, weight):
    """FASTER for products of x (...,K) with this weight (N,K), or None where it does not pay."""
    pays = (
        FASTER
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and min(weight.shape) >= 512
        and x.numel() >= LEAST_ROWS[FASTER] * x.shape[-1]
        and weight.is_contiguous()
    )
    return FASTER if pays else None


def product(x, weight, bias=None, activated=False):
    """x (...,K), weight (N,K) -> x W^T + b, of gelu(x) if `activated`."""
    library = faster(x, weight)
    if library == "tiles":
        return torch.ops.nanowan_csrc.linear(x, weight, bias, True, activated)
    x = activate(x) if activated else x
    if library == "onednn":
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def product_backward(grad, weight):
    """The gradient by x of `product`, grad W: (...,N) -> (...,K)."""
    library = faster(grad, weight)
    if library == "tiles":
        return torch.ops.nanowan_csrc.linear(grad, weight, None, False, False)
    if library == "onednn":
        return torch.ops.mkldnn._linear_pointwise(grad, weight.t(), None, "none", [], "")
    return grad @ weight


# ---- autograd ----------------------------------------------------------------------------------------------------
def activate(x):
    return gelu(x) if BUILT and x.device.type == "cpu" else gelu_ref(x)


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, activated):
        ctx.activated = activated
        ctx.save_for_backward(x if activated or weight.requires_grad else None, weight)
        return product(x, weight, bias, activated)

    @staticmethod
    def backward(ctx, grad):
        (x, weight), dx, dw = ctx.saved_tensors, None, None
        if ctx.needs_input_grad[0]:
            dx = product_backward(grad, weight)
            dx = gelu_backward_(x, dx) if ctx.activated else dx
        if ctx.needs_input_grad[1]:
            dw = grad.flatten(0, -2).t() @ (activate(x) if ctx.activated else x).flatten(0, -2)
        return dx, dw, grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None, None


# ---- public ------------------------------------------------------------------------------------------------------
def linear(x, weight, bias=None, activated=False):
    """As linear_ref."""
    return Linear.apply(x, weight, bias, activated)


def check(dtype):
    """Worst relative error of value and gradients against the reference in fp64, with and without GELU, on strided
    inputs of sizes that FASTER takes and that it does not.
    """
    (_, random), results = seeded(), ([], [])
    for M, K, N in ((7, 24, 40), (100, 530, 520)):
        x, w, b, dy = (
            t.to(dtype) for t in (random(K, 2 * M).t()[::2], random(N, K) * K**-0.5, random(N), random(M, N))
        )
        for activated in (False, True):
            for (op, kind), out in zip(((linear, dtype), (linear_ref, torch.float64)), results):
                inputs = [t.detach().to(kind).requires_grad_() for t in (x, w, b)]
                y = op(inputs[0][None], *inputs[1:], activated)
                out += [y, *torch.autograd.grad(y, inputs, dy[None].to(kind))]
                if activated:  # with a frozen weight
                    y = op(inputs[0][None], inputs[1].detach(), inputs[2].detach(), True)
                    out += torch.autograd.grad(y, inputs[0], dy[None].to(kind))
    return worst(*results)


def check_tiles():
    """(Worst relative error of the tiles' products against fp64, that of PyTorch's), over sizes that fill no tile."""
    (_, random), results, tiles = seeded(), ([], [], []), torch.ops.nanowan_csrc.linear
    for M, K, N in (
        (1, 1, 1),
        (5, 7, 9),
        (33, 40, 17),
        (64, 1030, 70),
        (31, 513, 300),
        (1100, 530, 40),
        (480, 768, 768),
    ):
        x, w, b, dy = random(K, 2 * M).t()[::2], random(N, K) * K**-0.5, random(N), random(M, N)
        results[0].extend(
            [tiles(x, w, b, True, False), tiles(x, w, None, True, True), tiles(dy, w, None, False, False)]
        )
        for kind, out in ((torch.float64, results[1]), (torch.float32, results[2])):
            u, v, c, d = (t.to(kind) for t in (x, w, b, dy))
            out += [F.linear(u, v, c), F.linear(gelu_ref(u), v), d @ v]
    return worst(results[0], results[1]), worst(results[2], results[1])


def time_size(M, K, N):
    """GFLOP/s of x (M,K) times W (N,K) transposed, and of the gradient by x, by FASTER and by PyTorch's choice."""
    x, w, b, dy = torch.randn(M, K), torch.randn(N, K), torch.randn(N), torch.randn(M, N)
    runs = {
        "gflops": lambda: linear(x, w, b),
        "backward_gflops": lambda: product_backward(dy, w),
        "ref_gflops": lambda: linear_ref(x, w, b),
        "ref_backward_gflops": lambda: dy @ w,
    }
    rates = {name: 2 * M * K * N / 1e6 / milliseconds(run) for name, run in runs.items()}
    forward, backward, ref_forward, ref_backward = rates.values()
    print(
        f"linear {M}x{K}x{N} by {FASTER}: forward {forward:.0f} GFLOP/s (PyTorch {ref_forward:.0f}), "
        f"backward {backward:.0f} ({ref_backward:.0f})"
    )
    return rates


def main():
    results = {
        f"check {dtype}": report(f"linear, {dtype}", check(dtype), limit)
        for dtype, limit in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2))
    }
    if FASTER == "tiles":
        ours, theirs = check_tiles()
        results["check tiles"] = report(f"tiles, of PyTorch's {theirs:.1e}", ours, 2e-6)
    for M, K, N in ((480, 768, 768), (480, 768, 3072), (480, 3072, 768), (4096, 768, 768)):
        results[f"{M}x{K}x{N}"] = time_size(M, K, N)
    return results


if __name__ == "__main__":
    main()
