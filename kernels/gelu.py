"""GELU by its tanh formula on a CPU, where PyTorch's takes ten times as long as the memory traffic requires.

x (...) of any float dtype; the arithmetic is fp32. Lower bound on memory traffic: one read and one write of x. On GPUs
PyTorch's own GELU is fast.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import BUILT


# ---- reference ---------------------------------------------------------------------------------------------------
def gelu_ref(x):
    """Return the GELU of x by its tanh formula."""
    return F.gelu(x, approximate="tanh")


# ---- torch.library -----------------------------------------------------------------------------------------------
@torch.library.custom_op("nanowan::gelu", mutates_args=(), device_types="cpu")
def _forward(x: Tensor) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.ops.nanowan_csrc.gelu(x, out)
    return out


@torch.library.custom_op("nanowan::gelu_", mutates_args=("x",), device_types="cpu")
def _forward_(x: Tensor) -> None:
    torch.ops.nanowan_csrc.gelu(x, x)


@torch.library.custom_op("nanowan::gelu_backward", mutates_args=(), device_types="cpu")
def _backward(x: Tensor, grad: Tensor) -> Tensor:
    return gelu_backward_(x, grad.clone(memory_format=torch.contiguous_format))


@_forward.register_fake
def _(x):
    return x.new_empty(x.shape)


@_backward.register_fake
def _(x, grad):
    return x.new_empty(x.shape)


def setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def backward(ctx, grad):
    return _backward(*ctx.saved_tensors, grad)


_forward.register_autograd(backward, setup_context=setup_context)


# ---- public ------------------------------------------------------------------------------------------------------
def gelu(x):
    """Compute the same as gelu_ref, with csrc."""
    return _forward(x)


def gelu_(x):
    """Overwrite x with its GELU, computed by csrc without gradients, and return x. x must be contiguous."""
    _forward_(x)
    return x


def gelu_backward_(x, grad):
    """Multiply grad, in place, by the derivative of GELU at x, and return it. grad must be contiguous."""
    if BUILT and x.device.type == "cpu":
        torch.ops.nanowan_csrc.gelu_backward_(x, grad)
        return grad
    return torch.ops.aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=grad)
