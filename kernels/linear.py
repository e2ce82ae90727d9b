"""Linears, alone or after a GELU. For a GELU and a linear, only the GELU's input is saved for the backward pass.

x (...,K), weight (N,K), bias (N) -> x W^T + b (...,N), or gelu(x) W^T + b. The backward pass writes the gradient of x
over that of gelu(x), so it needs two tensors of the size of x, not three.

On AMD's CPUs PyTorch multiplies large fp32 matrices with MKL, which is slow there. oneDNN, which PyTorch ships too, is
used instead. The choice depends only on the CPU and the tensors, so repeated runs make the same choice.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from kernels import BUILT
from kernels.gelu import gelu, gelu_backward_, gelu_ref


# ---- reference ---------------------------------------------------------------------------------------------------
def linear_ref(x, weight, bias=None, activated=False):
    """Return x W^T + b, or gelu(x) W^T + b if `activated`."""
    return F.linear(gelu_ref(x) if activated else x, weight, bias)


# ---- oneDNN on AMD's CPUs ----------------------------------------------------------------------------------------
CPUINFO = Path("/proc/cpuinfo")
PREFERS_ONEDNN = torch.backends.mkldnn.is_available() and CPUINFO.exists() and "AuthenticAMD" in CPUINFO.read_text()


def uses_onednn(x, weight):
    """Return whether oneDNN multiplies x (...,K) with this weight (N,K)."""
    return (
        PREFERS_ONEDNN
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and min(weight.shape) >= 512
        and x.numel() >= 8 * x.shape[-1]  # with fewer rows, the longer call costs more than oneDNN saves
        and weight.is_contiguous()
    )


def product(x, weight, bias=None):
    """Return x W^T + b (...,N), with oneDNN where it is faster. x (...,K), weight (N,K)."""
    if uses_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def product_backward(grad, weight):
    """Return grad W (...,K), the gradient of `product` with respect to x. grad (...,N), weight (N,K)."""
    if uses_onednn(grad, weight):
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
        return product(activate(x) if activated else x, weight, bias)

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
    """Compute the same as linear_ref, with the backward pass described at the top of this file."""
    return Linear.apply(x, weight, bias, activated)
