"""GELU by its tanh formula, on a CPU, where PyTorch's own takes ten times what the memory needs; GPUs have a fast one.

    python -m kernels.gelu      check against the reference, then time it

x (...) of any float dtype; the arithmetic is fp32. Floor: one read and one write of x.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import BUILT
from kernels.testing import milliseconds, report, worst


# ---- reference ---------------------------------------------------------------------------------------------------
def gelu_ref(x):
    """GELU of x by its tanh formula."""
    return F.gelu(x, approximate="tanh")


# ---- torch.library -----------------------------------------------------------------------------------------------
@torch.library.custom_op("nanowan::gelu", mutates_args=(), device_types="cpu")
def fused(x: Tensor) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.ops.nanowan_csrc.gelu(x, out)
    return out


@torch.library.custom_op("nanowan::gelu_", mutates_args=("x",), device_types="cpu")
def fused_(x: Tensor) -> None:
    torch.ops.nanowan_csrc.gelu(x, x)


@torch.library.custom_op("nanowan::gelu_backward", mutates_args=(), device_types="cpu")
def fused_backward(x: Tensor, grad: Tensor) -> Tensor:
    return gelu_backward_(x, grad.clone(memory_format=torch.contiguous_format))


@fused.register_fake
def _(x):
    return x.new_empty(x.shape)


@fused_backward.register_fake
def _(x, grad):
    return x.new_empty(x.shape)


def keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def differentiate(ctx, grad):
    return fused_backward(*ctx.saved_tensors, grad)


torch.library.register_autograd("nanowan::gelu", differentiate, setup_context=keep)


# ---- public ------------------------------------------------------------------------------------------------------
def gelu(x):
    """As gelu_ref."""
    return fused(x)


def gelu_(x):
    """As gelu_ref, in x's place, which is contiguous; no gradients."""
    fused_(x)
    return x


def gelu_backward_(x, grad):
    """grad times GELU's slope at x, in grad's place, which is contiguous."""
    if BUILT and x.device.type == "cpu":
        torch.ops.nanowan_csrc.gelu_backward_(x, grad)
        return grad
    return torch.ops.aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=grad)


def check(dtype):
    """Worst relative error of value and gradient against the reference in fp64, from -20 to 20, on a strided input."""
    x, results = torch.linspace(-20, 20, 3 * 1001).view(3, 1001).t().to(dtype), []
    for op, kind in ((gelu, dtype), (gelu_ref, torch.float64)):
        a = x.detach().to(kind).requires_grad_()
        y = op(a)
        y.sum().backward()
        results.append([y, a.grad])
    return worst(*results)


def main():
    results = {
        f"check {dtype}": report(f"gelu, {dtype}", check(dtype), limit)
        for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3))
    }
    x = torch.randn(480, 3072)
    ours, ref = milliseconds(lambda: gelu(x)), milliseconds(lambda: gelu_ref(x))
    results["480x3072"] = {"ms": ours, "ref_ms": ref}
    print(f"gelu 480x3072: {ours:.2f} ms, reference {ref:.2f} ms")
    return results


if __name__ == "__main__":
    main()
