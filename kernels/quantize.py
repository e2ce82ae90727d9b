"""Activations in 8 bits (e4m3) with a scale per row, for the GPU's fp8 matrix products, in one read and one write.

x (n,m) of any float dtype becomes e4m3 (n,m) and scales (n,1) fp32. A GELU can be applied to x in the same pass. The
largest absolute value in each row becomes 448, the largest number in e4m3. A row with an infinity or a NaN becomes NaN.
Lower bound on memory traffic: one read of x and one write of a byte per value.
"""

import torch
from torch import Tensor

from kernels import INTERPRETED, launchable, triton
from kernels.gelu import gelu_ref

if triton:
    import triton.language as tl

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max  # 448


# ---- reference ---------------------------------------------------------------------------------------------------
def quantize_rows_ref(x, activated=False):
    """Round x (n,m) of any float dtype, or its GELU if `activated`, to e4m3 (n,m), with a scale (n,1) fp32 per row.
    Returns (the e4m3 values, the scales). Values times scales approximate x, or its GELU.
    """
    x = gelu_ref(x.float()) if activated else x.float()
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-12) / E4M3_MAX  # also for a row of zeros
    return (x / scale).to(E4M3), scale


# ---- Triton ------------------------------------------------------------------------------------------------------
if triton:

    @triton.jit
    def quantize_kernel(x, out, scales, stride, M, ACTIVATED: tl.constexpr, BLOCK: tl.constexpr):
        """Each program quantizes one row, which it keeps in registers."""
        i, j = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        v = tl.load(x + i * stride + j, mask=j < M, other=0.0).to(tl.float32)
        if ACTIVATED:  # tanh(u) = 2 sigmoid(2u) - 1
            v = v / (1.0 + tl.exp(-1.5957691216057308 * (v + 0.044715 * v * v * v)))
        poison = tl.sum(v * 0.0, 0)  # NaN if any value is not finite, which the maximum would hide
        scale = tl.maximum(tl.max(tl.abs(v), 0), 1e-12) / 448.0 + poison
        tl.store(scales + i, scale)
        v = v / scale
        # round half to even, to 3 bits of mantissa or to 2^-9, since casts in Triton's interpreter are less exact
        bits = v.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        v = tl.where(tl.abs(v) < 0.015625, (v + 24576.0) - 24576.0, normal)
        tl.store(out + i * M + j, v.to(tl.float8e4nv), mask=j < M)


def launch_config(M):
    """Return the launch options of quantize_kernel for rows of M numbers, 32 of them per thread."""
    block = triton.next_power_of_2(M)
    return {"BLOCK": block, "num_warps": min(max(block // 1024, 1), 32)}


# ---- torch.library -----------------------------------------------------------------------------------------------
@torch.library.custom_op("nanowan::quantize_rows", mutates_args=(), device_types="cuda")
def _forward(x: Tensor, activated: bool) -> tuple[Tensor, Tensor]:
    x = x if x.stride(1) == 1 else x.contiguous()
    out, scales = torch.empty(x.shape, dtype=E4M3, device=x.device), x.new_empty(len(x), 1, dtype=torch.float32)
    with launchable(x):
        quantize_kernel[(len(x),)](x, out, scales, x.stride(0), x.shape[1], activated, **launch_config(x.shape[1]))
    return out, scales


if INTERPRETED:
    _forward.register_kernel("cpu")(_forward._init_fn)


@_forward.register_fake
def _(x, activated):
    return torch.empty(x.shape, dtype=E4M3, device=x.device), x.new_empty(x.shape[0], 1, dtype=torch.float32)


# ---- public ------------------------------------------------------------------------------------------------------
def quantize_rows(x, activated=False):
    """Compute the same as quantize_rows_ref, with the Triton kernel."""
    return _forward(x, activated)
