"""RMSNorm over the full width, with a weight, then the 3-axis rotation of every head, for q and k in one launch.

xs: one or two tensors (B,L,D) of one dtype; weights: one (D,) fp32 for each. The arithmetic is fp32, and the result is
rounded once. The rotation follows from `table` (P,d/2,2) and `positions` (L,3), which rope.py defines: the kernels read
three integers per token, not a table (L,d/2) of angles. Lower bound on memory traffic: one read and one write of xs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import launchable, register, triton
from kernels.rope import rotate

if triton:
    import triton.language as tl


# ---- reference ---------------------------------------------------------------------------------------------------
def qk_norm_rope_ref(xs, weights, eps, heads, table=None, positions=None):
    """Return a list of (B,L,N,d), in the dtype of xs: each of xs (B,L,D) normed and, if a table is given, rotated."""
    results = []
    for x, weight in zip(xs, weights):
        y = F.rms_norm(x.to(torch.promote_types(x.dtype, torch.float32)), weight.shape, weight, eps).unflatten(
            2, (heads, -1)
        )
        results.append((y if table is None else rotate(y, table, positions)).to(x.dtype))
    return results


# ---- Triton ------------------------------------------------------------------------------------------------------
if triton:

    @triton.jit
    def turn(a, b, table, position, HALF: tl.constexpr, PAIRS: tl.constexpr, inside, back: tl.constexpr):
        """Rotate the pairs (a,b) of one token; with `back`, in the opposite direction. position: a pointer to the
        token's three integers. a, b (PAIRS,): the pairs of all heads, one head after another, padded at the end.
        inside (PAIRS,): which pairs are not padding.
        """
        p = tl.arange(0, PAIRS) % HALF
        third: tl.constexpr = HALF // 3
        t, h, w = tl.load(position), tl.load(position + 1), tl.load(position + 2)
        at = tl.where(p < HALF - 2 * third, t, tl.where(p < HALF - third, h, w))
        cos = tl.load(table + (tl.abs(at) * HALF + p) * 2, mask=inside, other=0.0)
        sin = tl.load(table + (tl.abs(at) * HALF + p) * 2 + 1, mask=inside, other=0.0)
        sin = tl.where((at < 0) != back, -sin, sin)
        return a * cos - b * sin, a * sin + b * cos

    @triton.jit
    def forward_kernel(
        x0,
        x1,
        w0,
        w1,
        out0,
        out1,
        table,
        positions,
        L,
        eps,
        row0,
        row1,
        D: tl.constexpr,
        HALF: tl.constexpr,
        PAIRS: tl.constexpr,
        ROPE: tl.constexpr,
    ):
        """Each program norms and rotates one token: of q if the program's index on axis 1 is 0, of k if it is 1."""
        i, which = tl.program_id(0).to(tl.int64), tl.program_id(1)
        x, w, out, row = x0, w0, out0, row0
        if which == 1:
            x, w, out, row = x1, w1, out1, row1
        d = tl.arange(0, 2 * PAIRS)
        v = tl.load(x + i * row + d, mask=d < D, other=0.0).to(tl.float32)
        v *= tl.rsqrt(tl.sum(v * v, 0) / D + eps)
        v *= tl.load(w + d, mask=d < D, other=0.0)
        if ROPE:
            a, b = tl.split(tl.reshape(v, (PAIRS, 2)))
            a, b = turn(a, b, table, positions + i % L * 3, HALF, PAIRS, tl.arange(0, PAIRS) < D // 2, False)
            v = tl.reshape(tl.join(a, b), (2 * PAIRS,))
        tl.store(out + i * D + d, v.to(out.dtype.element_ty), mask=d < D)

    @triton.jit
    def backward_kernel(
        dout0,
        dout1,
        x0,
        x1,
        w0,
        w1,
        dx0,
        dx1,
        dw,
        table,
        positions,
        rows,
        L,
        chunk,
        eps,
        row0,
        row1,
        D: tl.constexpr,
        HALF: tl.constexpr,
        PAIRS: tl.constexpr,
        ROPE: tl.constexpr,
        WEIGHTS: tl.constexpr,
    ):
        """Compute the gradients of `chunk` tokens of q or k per program. With WEIGHTS, also write these tokens' part of
        the weight's gradient to dw (2,chunks,D).
        """
        c, which = tl.program_id(0), tl.program_id(1)
        x, w, dout, dx, row = x0, w0, dout0, dx0, row0
        if which == 1:
            x, w, dout, dx, row = x1, w1, dout1, dx1, row1
        d = tl.arange(0, 2 * PAIRS)
        inside = d < D
        weight = tl.load(w + d, mask=inside, other=0.0)
        if WEIGHTS:
            total = tl.zeros((2 * PAIRS,), tl.float32)
        for j in range(min(chunk, rows - c * chunk)):
            i = c.to(tl.int64) * chunk + j
            v = tl.load(x + i * row + d, mask=inside, other=0.0).to(tl.float32)
            g = tl.load(dout + i * D + d, mask=inside, other=0.0).to(tl.float32)
            if ROPE:
                a, b = tl.split(tl.reshape(g, (PAIRS, 2)))
                a, b = turn(a, b, table, positions + i % L * 3, HALF, PAIRS, tl.arange(0, PAIRS) < D // 2, True)
                g = tl.reshape(tl.join(a, b), (2 * PAIRS,))
            rstd = tl.rsqrt(tl.sum(v * v, 0) / D + eps)
            v *= rstd
            if WEIGHTS:
                total += g * v
            g *= weight
            tl.store(dx + i * D + d, (rstd * (g - v * (tl.sum(g * v, 0) / D))).to(dx.dtype.element_ty), mask=inside)
        if WEIGHTS:
            tl.store(dw + (which * tl.num_programs(0) + c).to(tl.int64) * D + d, total, mask=inside)


def launch_config(D):
    pairs = triton.next_power_of_2(D) // 2
    return {"PAIRS": pairs, "num_warps": max(1, min(16, pairs // 256))}


def rows_of(x):
    """Return x (B,L,D) if each row is contiguous and all B*L rows are evenly spaced, else a contiguous copy of x."""
    return x if x.stride(2) == 1 and x.stride(0) == x.shape[1] * x.stride(1) else x.contiguous()


def triton_forward(xs, weights, eps, heads, table, positions):
    B, L, D = xs[0].shape
    xs = [rows_of(x) for x in xs]
    outs = [torch.empty(B, L, heads, D // heads, device=x.device, dtype=x.dtype) for x in xs]
    with launchable(xs[0]):
        forward_kernel[(B * L, len(xs))](
            xs[0],
            xs[-1],
            weights[0],
            weights[-1],
            outs[0],
            outs[-1],
            table,
            positions,
            L,
            eps,
            xs[0].stride(1),
            xs[-1].stride(1),
            D=D,
            HALF=D // heads // 2,
            ROPE=table is not None,
            **launch_config(D),
        )
    return outs


def triton_backward(douts, xs, weights, eps, heads, table, positions, need_weights):
    B, L, D = xs[0].shape
    xs, chunk = [rows_of(x) for x in xs], -(-B * L // 1024) if need_weights else 8
    chunks = -(-B * L // chunk)
    dxs = [torch.empty(B, L, D, device=x.device, dtype=x.dtype) for x in xs]
    dw = torch.empty(len(xs), chunks, D, device=xs[0].device) if need_weights else None
    with launchable(xs[0]):
        backward_kernel[(chunks, len(xs))](
            douts[0],
            douts[-1],
            xs[0],
            xs[-1],
            weights[0],
            weights[-1],
            dxs[0],
            dxs[-1],
            dw,
            table,
            positions,
            B * L,
            L,
            chunk,
            eps,
            xs[0].stride(1),
            xs[-1].stride(1),
            D=D,
            HALF=D // heads // 2,
            ROPE=table is not None,
            WEIGHTS=need_weights,
            **launch_config(D),
        )
    return dxs + ([dw.sum(1)] if need_weights else [])


# ---- torch.library -----------------------------------------------------------------------------------------------
@torch.library.custom_op("nanowan::qk_norm_rope", mutates_args=(), device_types=())
def _forward(
    xs: list[Tensor], weights: list[Tensor], eps: float, heads: int, table: Tensor | None, positions: Tensor | None
) -> list[Tensor]:
    """Compute the same as qk_norm_rope_ref."""


@torch.library.custom_op("nanowan::qk_norm_rope_backward", mutates_args=(), device_types=())
def qk_norm_rope_backward(
    douts: list[Tensor],
    xs: list[Tensor],
    weights: list[Tensor],
    eps: float,
    heads: int,
    table: Tensor | None,
    positions: Tensor | None,
    need_weights: bool,
) -> list[Tensor]:
    """Return the gradients of xs and, with need_weights, the gradients of the weights as one tensor (1 or 2,D)."""


register(_forward, triton_forward, "qk_norm_rope")
register(qk_norm_rope_backward, triton_backward, "qk_norm_rope_backward")


@_forward.register_fake
def _(xs, weights, eps, heads, table, positions):
    return [x.new_empty(*x.shape[:2], heads, x.shape[2] // heads) for x in xs]


@qk_norm_rope_backward.register_fake
def _(douts, xs, weights, eps, heads, table, positions, need_weights):
    return [x.new_empty(x.shape) for x in xs] + (
        [weights[0].new_empty(len(xs), xs[0].shape[2])] if need_weights else []
    )


def setup_context(ctx, inputs, output):
    xs, weights, ctx.eps, ctx.heads, table, positions = inputs
    ctx.need_weights = any(w.requires_grad for w in weights)
    ctx.save_for_backward(*xs, *weights, table, positions)


def backward(ctx, douts):
    *both, table, positions = ctx.saved_tensors
    xs, weights = both[: len(both) // 2], both[len(both) // 2 :]
    results = qk_norm_rope_backward(
        [g.contiguous() for g in douts], list(xs), list(weights), ctx.eps, ctx.heads, table, positions, ctx.need_weights
    )
    return list(results[: len(xs)]), list(results[-1]) if ctx.need_weights else [None] * len(xs), None, None, None, None


_forward.register_autograd(backward, setup_context=setup_context)


# ---- public ------------------------------------------------------------------------------------------------------
def qk_norm_rope(xs, weights, eps, heads, table=None, positions=None):
    """Compute the same as qk_norm_rope_ref, with the fused kernels."""
    return _forward(xs, weights, eps, heads, table, packed(positions))


def packed(positions):
    """Return positions (L,3) as the kernels read them: int32 and contiguous."""
    return None if positions is None else positions.int().contiguous()
