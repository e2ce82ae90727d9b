"""The VAE's causal 3-D convolution, streaming through time, fused with the operations before and after it.

x (B,C,T,H,W): a chunk of frames; past (B,C,2,H,W): the two frames before x, after norm and SiLU, or None for zeros;
weight (N,C,kt,k,k), with kernels of 3x3x3, 3x1x1 or 1x1x1; bias (N) or None. If gamma (of C elements) is given, RMS
norm and SiLU are applied to x first, after adding input_bias (C), the bias that the previous convolution left out.
residual (B,N,T,H,W) or None is added to the result. Returns out (B,N,T,H,W) and the `past` of the next chunk (None with
kt = 1).

On a GPU one kernel writes the past frames and the normed chunk into a buffer, which cuDNN convolves. The kernel also
writes the last two frames of the buffer into the next `past`. PyTorch would add a bias in a separate pass after cuDNN.
Adding the bias together with the residual, or later as the input_bias of the next convolution, avoids that pass. On a
CPU csrc/causal_conv3d.cpp does all of this; the libraries that it calls add a bias at no cost.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import launchable, triton

if triton:
    import triton.language as tl

LAST = torch.channels_last_3d


# ---- reference ---------------------------------------------------------------------------------------------------
def rms_norm(x, gamma):
    """Return x / |x| * sqrt(C) * gamma, the norm |x| being taken over the C channels (axis 1)."""
    return F.normalize(x, dim=1) * (x.shape[1] ** 0.5 * gamma)


def causal_conv3d_ref(x, past, weight, bias=None, gamma=None, input_bias=None, residual=None):
    """Return (out, the `past` of the next chunk). Arguments: see the top of this file."""
    if gamma is not None:
        x = x if input_bias is None else x + input_bias.view(-1, 1, 1, 1)
        x = F.silu(rms_norm(x, gamma.view(-1, 1, 1, 1)))
    if weight.shape[2] > 1:
        x = torch.cat([x.new_zeros(*x.shape[:2], 2, *x.shape[3:]) if past is None else past, x], 2)
        past = x[:, :, -2:].clone()  # a view would keep the full chunk in memory
    out = F.conv3d(x, weight, bias, padding=(0, weight.shape[3] // 2, weight.shape[4] // 2))
    return out if residual is None else out + residual, past


# ---- Triton ------------------------------------------------------------------------------------------------------
if triton:

    @triton.jit
    def fill_kernel(
        x,
        past,
        bias,
        gamma,
        buffer,
        last,
        pixels,
        before,
        C: tl.constexpr,
        PAST: tl.constexpr,
        BIAS: tl.constexpr,
        NORM: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Write ROWS rows of a clip's buffer per program. A row is one pixel's C channels. The buffer begins with the
        `before` rows of past, and `pixels` rows of x follow. Its last `before` rows are also written to `last`.
        """
        i, b = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.program_id(1).to(tl.int64)
        c = tl.arange(0, BLOCK)[None, :]
        new, inside = (i >= before)[:, None], (i < before + pixels)[:, None] & (c < C)
        v = tl.load(x + (b * pixels + i - before)[:, None] * C + c, mask=inside & new, other=0.0)
        if NORM:
            y = v.to(tl.float32)
            if BIAS:
                y += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
            norm = tl.maximum(tl.sqrt(tl.sum(y * y, 1)), 1e-12)
            y *= (tl.sqrt(C * 1.0) / norm)[:, None] * tl.load(gamma + c, mask=c < C, other=0.0).to(tl.float32)
            v = (y / (1.0 + tl.exp(-y))).to(v.dtype)
        if PAST:
            old = tl.load(past + (b * before + i)[:, None] * C + c, mask=inside & (i < before)[:, None], other=0.0)
        else:
            old = tl.zeros((ROWS, BLOCK), v.dtype)
        v = tl.where(new, v, old)
        tl.store(buffer + (b * (before + pixels) + i)[:, None] * C + c, v, mask=inside)
        tl.store(last + (b * before + i - pixels)[:, None] * C + c, v, mask=inside & (i >= pixels)[:, None])

    @triton.jit
    def add_kernel(
        out, residual, bias, rows, C: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
    ):
        """Add residual and bias to out, in place, for ROWS rows of C channels per program."""
        i, c = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)[None, :]
        at, inside = i[:, None] * C + c, (i < rows)[:, None] & (c < C)
        v = tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
        v += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            v += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
        tl.store(out + at, v.to(out.dtype.element_ty), mask=inside)


def launch_config(C):
    """Return the launch options of a kernel for rows of C channels, with about 4,096 numbers per program."""
    block = triton.next_power_of_2(C)
    return {"BLOCK": block, "ROWS": max(1, 4096 // block), "num_warps": 4}


# ---- torch.library -----------------------------------------------------------------------------------------------
@torch.library.custom_op("nanowan::fill_buffer", mutates_args=("buffer", "last"), device_types=("cuda", "cpu"))
def _fill_buffer(
    x: Tensor, past: Tensor | None, input_bias: Tensor | None, gamma: Tensor | None, buffer: Tensor, last: Tensor
) -> None:
    B, C, before = len(x), x.shape[1], last.numel() // (x.shape[0] * x.shape[1])
    pixels, how = x.numel() // (B * C), launch_config(C)
    flags = {"PAST": past is not None, "BIAS": input_bias is not None, "NORM": gamma is not None}
    with launchable(x):
        fill_kernel[(triton.cdiv(before + pixels, how["ROWS"]), B)](
            x, past, input_bias, gamma, buffer, last, pixels, before, C=C, **flags, **how
        )


@torch.library.custom_op("nanowan::add_residual", mutates_args=("out",), device_types=("cuda", "cpu"))
def _add_residual(out: Tensor, residual: Tensor, bias: Tensor | None) -> None:
    C, how = out.shape[1], launch_config(out.shape[1])
    rows = out.numel() // C
    with launchable(out):
        add_kernel[(triton.cdiv(rows, how["ROWS"]),)](out, residual, bias, rows, C=C, BIAS=bias is not None, **how)


@_fill_buffer.register_fake
def _(x, past, input_bias, gamma, buffer, last):
    pass


@_add_residual.register_fake
def _(out, residual, bias):
    pass


# ---- public ------------------------------------------------------------------------------------------------------
def causal_conv3d(x, past, weight, bias=None, gamma=None, input_bias=None, residual=None, fill_buffer=None):
    """Compute the same as causal_conv3d_ref, on a GPU, without gradients. fill_buffer: csrc's operator to use instead
    of the Triton kernel fill_kernel.
    """
    x, (kt, kh, kw) = x.contiguous(memory_format=LAST), weight.shape[2:]
    (B, C, T, H, W), before = x.shape, kt - 1
    buffer, last = x, None
    if before or gamma is not None:
        like = dict(dtype=x.dtype, device=x.device, memory_format=LAST)
        buffer, last = (torch.empty((B, C, n, H, W), **like) for n in (before + T, before))
        past = None if past is None else past.contiguous(memory_format=LAST)
        (fill_buffer or _fill_buffer)(x, past, input_bias, None if gamma is None else gamma.flatten(), buffer, last)
    out = F.conv3d(buffer, weight, bias if residual is None else None, padding=(0, kh // 2, kw // 2))
    out = out.contiguous(memory_format=LAST)
    if residual is not None:
        _add_residual(out, residual.contiguous(memory_format=LAST), bias)
    return out, last if before else None


def causal_conv3d_on_cpu(x, past, weight, bias=None, gamma=None, input_bias=None, residual=None):
    """Compute the same as causal_conv3d_ref, with csrc, without gradients."""
    gamma = None if gamma is None else gamma.flatten()
    out, past = torch.ops.nanowan_csrc.causal_conv3d(x, past, weight, bias, gamma, input_bias, residual)
    return out, past if weight.shape[2] > 1 else None
