"""Linears, and linears of a GELU, of which a backward pass keeps nothing but what went into the GELU.

    python -m kernels.linear      check against the reference, then time it

x (...,K), weight (N,K), bias (N) -> x W^T + b (...,N), or gelu(x) W^T + b. The backward pass works in place: of a DiT's
feed-forward that is a third of its memory. Large fp32 products go to AMX tiles where a CPU has them (csrc/linear.cpp):
six products of bf16 parts, as exact as fp32's own and faster. The idea: Henry, Tang and Heinecke, Leveraging the
bfloat16 artificial intelligence datatype for higher-precision computations, 2019.
"""

import torch
import torch.nn.functional as F

from kernels import BUILT, milliseconds, report, seeded, worst
from kernels.gelu import gelu, gelu_backward_, gelu_ref


# ---- reference ---------------------------------------------------------------------------------------------------
def linear_ref(x, weight, bias=None, activated=False):
    """x W^T + b, of gelu(x) if `activated`."""
    return F.linear(gelu_ref(x) if activated else x, weight, bias)


# ---- autograd ----------------------------------------------------------------------------------------------------
def activate(x):
    return gelu(x) if BUILT and x.device.type == "cpu" else gelu_ref(x)


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, activated):
        ctx.activated = activated
        ctx.save_for_backward(x if activated or weight.requires_grad else None, weight)
        if tiled(x, weight):
            return torch.ops.nanowan_csrc.linear(x, weight, bias, True, activated)
        return F.linear(activate(x) if activated else x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        (x, weight), dx, dw = ctx.saved_tensors, None, None
        if ctx.needs_input_grad[0]:
            dx = (
                torch.ops.nanowan_csrc.linear(grad, weight, None, False, False)
                if tiled(grad, weight)
                else grad @ weight
            )
            dx = gelu_backward_(x, dx) if ctx.activated else dx
        if ctx.needs_input_grad[1]:
            dw = grad.flatten(0, -2).t() @ (activate(x) if ctx.activated else x).flatten(0, -2)
        return dx, dw, grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None, None


# ---- public ------------------------------------------------------------------------------------------------------
def tiled(x, weight):
    """Whether tiles are there, and pay: for fewer numbers, splitting the weight costs more than they gain."""
    return (
        BUILT
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and min(weight.shape) >= 512
        and x.numel() >= 64 * x.shape[-1]
        and weight.is_contiguous()
        and torch.ops.nanowan_csrc.has_tiles()
    )


def linear(x, weight, bias=None, activated=False):
    """As linear_ref."""
    return Linear.apply(x, weight, bias, activated)


def check(dtype):
    """Worst relative error of value and gradients against the reference in fp64, with and without GELU, on strided
    inputs that tiles take and that they do not.
    """
    (_, random), found = seeded(), ([], [])
    for M, K, N in ((7, 24, 40), (100, 530, 520)):
        x, w, b, dy = (
            t.to(dtype) for t in (random(K, 2 * M).t()[::2], random(N, K) * K**-0.5, random(N), random(M, N))
        )
        for activated in (False, True):
            for (op, kind), out in zip(((linear, dtype), (linear_ref, torch.float64)), found):
                inputs = [t.detach().to(kind).requires_grad_() for t in (x, w, b)]
                y = op(inputs[0][None], *inputs[1:], activated)
                out += [y, *torch.autograd.grad(y, inputs, dy[None].to(kind))]
                if activated:  # with a frozen weight
                    y = op(inputs[0][None], inputs[1].detach(), inputs[2].detach(), True)
                    out += torch.autograd.grad(y, inputs[0], dy[None].to(kind))
    return worst(*found)


def check_tiles():
    """(Worst relative error of the tiles' products against fp64, that of PyTorch's), over sizes that fill no tile."""
    (_, random), found, tiles = seeded(), ([], [], []), torch.ops.nanowan_csrc.linear
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
        found[0].extend([tiles(x, w, b, True, False), tiles(x, w, None, True, True), tiles(dy, w, None, False, False)])
        for kind, out in ((torch.float64, found[1]), (torch.float32, found[2])):
            u, v, c, d = (t.to(kind) for t in (x, w, b, dy))
            out += [F.linear(u, v, c), F.linear(gelu_ref(u), v), d @ v]
    return worst(found[0], found[1]), worst(found[2], found[1])


def time_size(M, K, N):
    """GFLOP/s of x (M,K) times W (N,K) transposed, and of the gradient by x, on tiles and in PyTorch."""
    x, w, b, dy = torch.randn(M, K), torch.randn(N, K), torch.randn(N), torch.randn(M, N)
    runs = {
        "gflops": lambda: linear(x, w, b),
        "backward_gflops": lambda: torch.ops.nanowan_csrc.linear(dy, w, None, False, False),
        "ref_gflops": lambda: linear_ref(x, w, b),
        "ref_backward_gflops": lambda: dy @ w,
    }
    rates = {name: 2 * M * K * N / 1e6 / milliseconds(run) for name, run in runs.items()}
    forward, backward, ref_forward, ref_backward = rates.values()
    print(
        f"linear {M}x{K}x{N}: forward {forward:.0f} GFLOP/s (PyTorch {ref_forward:.0f}), "
        f"backward {backward:.0f} ({ref_backward:.0f})"
    )
    return rates


def main():
    results = {
        f"check {dtype}": report(f"linear, {dtype}", check(dtype), limit)
        for dtype, limit in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2))
    }
    if not BUILT or not torch.ops.nanowan_csrc.has_tiles():
        return results
    ours, theirs = check_tiles()
    results["check tiles"] = report(f"tiles, of PyTorch's {theirs:.1e}", ours, 2e-6)
    for M, K, N in ((480, 768, 768), (480, 768, 3072), (480, 3072, 768), (4096, 768, 768)):
        results[f"{M}x{K}x{N}"] = time_size(M, K, N)
    return results


if __name__ == "__main__":
    main()
