"""Frozen linears in 8 bits: e4m3 weights with a scale per output channel, in half of bf16's memory.

bf16 and fp32 weights are rounded to 8 bits while they load (call `convert` before loading). If a file stores fp8
weights with scales, as ComfyUI's fp8_scaled files do, those of linears in blocks are kept as they are; other fp8
weights, and int8 weights, are dequantised. On GPUs that multiply fp8 matrices (Ada, Hopper and newer), x is rounded to
e4m3 too, with a scale per token; elsewhere the weight is dequantised for each product. Adapters are added in their own
precision. The format: Micikevicius et al., 2022.
"""

import functools
import math
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import ops
from kernels.backend import in_one_line
from kernels.gelu import gelu_backward_
from kernels.quantize import E4M3, quantize_rows_ref

MIN_ROWS = 512  # minimum number of rows of x for a product in 8 bits


def dense(weight, scale, dtype):
    """Dequantise: return e4m3 weights (n,m) times their scales (n,1), as (n,m) in `dtype`."""
    return (weight.float() * scale).to(dtype)


def has_fp8_matmul(x, weight):
    """Return whether x (...,m) is multiplied with this weight (n,m) in 8 bits. If x has few rows, it is not: 8 bits
    would gain nothing, and cuBLAS refuses some sizes (pytorch/ao#4582).
    """
    fits = x.dtype == torch.bfloat16 and weight.dtype == E4M3 and not any(n % 16 for n in weight.shape)
    fits = fits and x.numel() >= MIN_ROWS * x.shape[-1]
    # for a memory plan's fake tensors, no GPU is asked
    return fits and ops.on_gpu(x) and ops.capable(x.device, least=(8, 9)) and (not x.is_cuda or multiplies(x.device))


@functools.cache
def multiplies(device):
    """Return whether a GPU can multiply e4m3 matrices with a scale for each row and column. One product is tried,
    because not every version of PyTorch can do this on every card (pytorch/pytorch#192707).
    """
    rows, weight = (torch.ones(n, 5120, device=device).to(E4M3) for n in (MIN_ROWS, 3072))
    scales = {"scale_a": torch.ones(MIN_ROWS, 1, device=device), "scale_b": torch.ones(1, 3072, device=device)}
    try:
        torch._scaled_mm(rows, weight.t(), **scales, out_dtype=torch.bfloat16, use_fast_accum=True)
    except Exception as e:  # whatever PyTorch or cuBLAS says
        print(
            f"fp8: no 8-bit products on {device} ({in_one_line(e)}); weights are dequantised for each product",
            file=sys.stderr,
        )
        return False
    return True


if torch.cuda.is_available():
    multiplies = torch.compiler.assume_constant_result(multiplies)  # for torch.compile


class Fp8Matmul(torch.autograd.Function):
    """x W^T + b, or gelu(x) W^T + b if `activated`. rows, x_scale: what rows_in_fp8 returned for x, to multiply in 8
    bits. If both are None, the weight is dequantised for the product, and `activated` must be False. The 8-bit weight
    is saved for the backward pass, and so is x if `activated`. The weight gets no gradient.
    """

    @staticmethod
    def forward(ctx, x, rows, x_scale, weight, scale, bias, activated):
        ctx.save_for_backward(x if activated else None, weight, scale)
        if rows is None:
            return F.linear(x, dense(weight, scale, x.dtype), bias)
        options = dict(bias=bias, out_dtype=x.dtype, use_fast_accum=True)
        y = torch._scaled_mm(rows, weight.t(), scale_a=x_scale, scale_b=scale.t().contiguous(), **options)
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, dy):
        x, weight, scale = ctx.saved_tensors
        dx = dy @ dense(weight, scale, dy.dtype)
        return dx if x is None else gelu_backward_(x, dx), *[None] * 6


def rows_in_fp8(x, activated=False):
    """Return the rows of x (...,m), or of its GELU if `activated`, in 8 bits, as (n,m), and their scales (n,1)."""
    return ops.quantize_rows(x.detach().flatten(0, -2), activated)


class Fp8Linear(nn.Linear):
    """A frozen linear whose weight (out,in) is in 8 bits, with `scales` (out,1) fp32. It replaces `linear`, whose
    weight has no values yet. norm: the Frobenius norm of the original weight; error: the norm of the difference between
    the 8-bit and the original weight. If the file has the weight in 8 bits, norm is that of the 8-bit weight, and there
    is no error, since the original is not known.
    """

    takes_gelu = True  # the GELU is computed in the kernel that rounds the input

    def __init__(self, linear, dtype=E4M3):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.weight = nn.Parameter(linear.weight.to(dtype), requires_grad=False)
        self.register_buffer("scales", torch.empty(self.out_features, 1, device=linear.weight.device), persistent=False)

    def quantize(self, weight):
        """Round `weight` (out,in) to e4m3: set scales, norm and error, and return the 8-bit weight."""
        weight8, self.scales = quantize_rows_ref(weight)
        self.norm = weight.float().norm()
        self.error = (weight.float() - dense(weight8, self.scales, torch.float32)).norm()
        return weight8

    def set_scales(self, weight8, scales):
        """Set the scales to those of a file: (out,1), or (1,) for all rows. Compute the norm of the file's weight."""
        self.scales = scales.float().reshape(-1, 1).expand(self.out_features, 1).contiguous()
        self.norm = dense(weight8, self.scales, torch.float32).norm()

    def forward(self, x, activated=False, rows=None):
        """Return x W^T + b, or gelu(x) W^T + b if `activated`. rows: the result of round_input(x). If it is None and
        the product is computed in 8 bits, the input of the product is rounded here.
        """
        weight = self.weight, self.scales, self.bias
        if has_fp8_matmul(x, self.weight):
            return Fp8Matmul.apply(x, *(rows or rows_in_fp8(x, activated)), *weight, activated)
        return Fp8Matmul.apply(ops.GELU()(x) if activated else x, None, None, *weight, False)

    def with_gelu(self, x, gelu):
        return gelu(self(x))

    def round_input(self, x):
        """Return x in 8 bits, to be shared by all linears with this input, or None if the product is not computed in 8
        bits.
        """
        return rows_in_fp8(x) if has_fp8_matmul(x, self.weight) else None


def convert(model, dtypes=None):
    """Replace linears in the blocks of a DiT, before its weights are loaded, by Fp8Linears: all linears, or those named
    in `dtypes` {name: 8-bit dtype}. Linears outside of blocks are not replaced.
    """
    for name, linear in list(model.blocks.named_modules(prefix="blocks")):
        if isinstance(linear, nn.Linear) and (not dtypes or name in dtypes):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, Fp8Linear(linear, (dtypes or {}).get(name, E4M3)))


# ---- what 8 bits cost --------------------------------------------------------------------------------------------
def total_norm(norms):
    """Return the norm of several tensors together, given the norm of each."""
    return math.hypot(*(n.item() for n in norms))


def report(model):
    """Return a line with the relative error of the 8-bit weights for each kind of linear, or None if no error is known.
    The relative error is the norm of the differences over the norm of the weights, taken over all blocks together.
    """
    kinds = {}
    for name, m in model.named_modules():
        if hasattr(m, "error"):
            kinds.setdefault(name.split(".", 2)[2], []).append(m)
    if not kinds:
        return None
    errors = {
        k: total_norm(m.error for m in ms) / max(total_norm(m.norm for m in ms), 1e-30) for k, ms in kinds.items()
    }
    return "fp8 weights, relative error: " + ", ".join(f"{kind} {100 * e:.2f} %" for kind, e in errors.items())
