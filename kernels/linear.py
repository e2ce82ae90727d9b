"""Large fp32 matrix products on CPUs with AMX tiles, to fp32's accuracy in six products of bf16: csrc/linear.cpp.

    python -m kernels.linear      check against the reference, then time it

x (...,K), weight (N,K), bias (N) or None -> x W^T + b (...,N), fp32. The reference multiplies fp32 numbers, of which a CPU does fewer at once.
The idea: Henry, Tang and Heinecke, Leveraging the bfloat16 artificial intelligence datatype for higher-precision computations, 2019.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import BUILT, milliseconds, report, worst

# ---- reference ---------------------------------------------------------------------------------------------------
linear_ref = F.linear


# ---- torch.library -----------------------------------------------------------------------------------------------
@torch.library.custom_op("nanowan::linear", mutates_args=(), device_types="cpu")
def fused(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.nanowan_csrc.linear(x, weight, bias, True)


@torch.library.custom_op("nanowan::linear_backward", mutates_args=(), device_types="cpu")
def fused_backward(grad: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.nanowan_csrc.linear(grad, weight, None, False)


@fused.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], len(weight))


@fused_backward.register_fake
def _(grad, weight):
    return grad.new_empty(*grad.shape[:-1], weight.shape[1])


def setup_context(ctx, inputs, output):
    x, weight, bias = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)  # a frozen weight needs no x


def backward(ctx, grad):
    (x, weight), (dx, dw, db) = ctx.saved_tensors, ctx.needs_input_grad
    rows = grad.flatten(0, -2)
    return fused_backward(grad, weight) if dx else None, rows.t() @ x.flatten(0, -2) if dw else None, rows.sum(0) if db else None


torch.library.register_autograd("nanowan::linear", backward, setup_context=setup_context)


# ---- public ------------------------------------------------------------------------------------------------------
def pays(x, weight):
    """Whether the tiles are there, and faster for these: below, splitting the weight costs more than they gain."""
    return (BUILT and x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu" and min(weight.shape) >= 512
            and x.numel() >= 64 * x.shape[-1] and weight.is_contiguous() and torch.ops.nanowan_csrc.has_tiles())


def linear(x, weight, bias=None):
    """As linear_ref."""
    return fused(x, weight, bias)


def check():
    """(Worst relative error of value and gradients against fp64, that of the reference), over sizes that fill no tile, and strided inputs."""
    g, found = torch.Generator().manual_seed(0), ([], [], [])
    random = lambda *shape: torch.randn(shape, generator=g)
    for M, K, N in ((1, 1, 1), (5, 7, 9), (33, 40, 17), (64, 1030, 70), (31, 513, 300), (1100, 530, 40), (480, 768, 768)):
        x, w, b, dy = random(K, 2 * M).t()[::2], random(N, K) * K ** -0.5, random(N), random(M, N)
        for (op, kind), out in zip(((linear, torch.float32), (linear_ref, torch.float64), (linear_ref, torch.float32)), found):
            for bias in (b, None):
                inputs = [t.detach().to(kind).requires_grad_() for t in (x, w, b)]
                y = op(inputs[0][None], inputs[1], inputs[2] if bias is not None else None)
                out += [y, *torch.autograd.grad(y, inputs[:2 + (bias is not None)], dy[None].to(kind))]
    return worst(found[0], found[1]), worst(found[2], found[1])


def main():
    ours, theirs = check()
    results = {"check": report("linear", ours, 2e-6) | {"ref_error": theirs}}
    print(f"  PyTorch's: {theirs:.1e}")
    for M, K, N in ((480, 768, 768), (480, 768, 3072), (480, 3072, 768), (4096, 768, 768)):
        x, w, b, dy = torch.randn(M, K), torch.randn(N, K), torch.randn(N), torch.randn(M, N)
        rates = [2 * M * K * N / 1e6 / milliseconds(run) for run in (lambda: fused(x, w, b), lambda: fused_backward(dy, w), lambda: linear_ref(x, w, b), lambda: dy @ w)]
        results[f"{M}x{K}x{N}"] = dict(zip(("gflops", "backward_gflops", "ref_gflops", "ref_backward_gflops"), rates))
        print(f"linear {M}x{K}x{N}: forward {rates[0]:.0f} GFLOP/s (PyTorch {rates[2]:.0f}), backward {rates[1]:.0f} ({rates[3]:.0f})")
    return results


if __name__ == "__main__":
    if not BUILT or not torch.ops.nanowan_csrc.has_tiles():
        raise SystemExit("this CPU has no AMX tiles, or the C++ extension is not built")
    main()
