"""Flash attention (Dao et al., 2022 and 2023) and its backward pass. Tiles of q are normed and rotated when loaded.

q (B,L,N,d), k and v (B,S,N,d) of one dtype, with any strides between tokens; softmax in fp32. If `weight` (N*d,) is
given, q is not normed yet: each token's N*d numbers are RMS-normed together, multiplied by `weight`, rotated if `table`
and `positions` are given (see rope.py), and only then rounded to the dtype of q. A small kernel first computes 1 / rms
of each token (B,L), since a tile has only one head. q is saved as given; the backward pass norms and rotates it again.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import INTERPRETED, launchable, qk_norm_rope, triton

if triton:
    import triton.language as tl


# ---- reference ---------------------------------------------------------------------------------------------------
def attention_ref(q, k, v, weight=None, eps=1e-6, table=None, positions=None):
    """Return the attention (B,L,N,d) of q on k and v. Arguments: see the top of this file."""
    if weight is not None:
        (q,) = qk_norm_rope.qk_norm_rope_ref([q.flatten(2)], [weight], eps, q.shape[2], table, positions)
    q, k, v = (u.transpose(1, 2) for u in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


# ---- Triton ------------------------------------------------------------------------------------------------------
if triton:

    @triton.jit
    def rstd_kernel(q, rstd, row, eps, D: tl.constexpr, BLOCK: tl.constexpr):
        i, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        v = tl.load(q + i * row + d, mask=d < D, other=0.0).to(tl.float32)
        tl.store(rstd + i, tl.rsqrt(tl.sum(v * v, 0) / D + eps))

    @triton.jit
    def dot(a, b, PRECISION: tl.constexpr):
        """Return a @ b. If PRECISION is "ieee", multiply in fp32; Triton's interpreter needs this, since it cannot
        multiply bf16.
        """
        if PRECISION == "ieee":
            return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
        return tl.dot(a, b, input_precision=PRECISION)

    @triton.jit
    def tile(x, at, head, stride, rows, total, d: tl.constexpr, DP: tl.constexpr):
        """Load rows of one head as (n,DP). rows (n,): the numbers of the rows. A row whose number is `total` or more
        is loaded as zeros, and so are columns from `d` on. at: the offset of the clip in x, in 64 bits. The offsets
        within the clip are in 32 bits, to use fewer registers.
        """
        j = tl.arange(0, DP)
        return tl.load(
            (x + (at + head * d)) + (rows[:, None] * stride + j[None, :]),
            mask=(rows < total)[:, None] & (j < d)[None, :],
            other=0.0,
        )

    @triton.jit
    def forward_kernel(
        q,
        k,
        v,
        out,
        lse,
        rstd,
        weight,
        table,
        positions,
        L,
        S,
        N,
        scale,
        q_b,
        q_l,
        k_b,
        k_l,
        v_b,
        v_l,
        d: tl.constexpr,
        DP: tl.constexpr,
        M: tl.constexpr,
        NK: tl.constexpr,
        NORM: tl.constexpr,
        ROPE: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """Compute the attention of M queries of one head per program, over all keys in tiles of NK keys."""
        b, head = (tl.program_id(1) // N).to(tl.int64), tl.program_id(1) % N
        rows = tl.program_id(0) * M + tl.arange(0, M)
        Q = tile(q, b * q_b, head, q_l, rows, L, d, DP)
        if NORM:
            j = tl.arange(0, DP)
            r = tl.load(rstd + b * L + rows, mask=rows < L, other=0.0)
            Qf = Q.to(tl.float32) * r[:, None] * tl.load(weight + head * d + j, mask=j < d, other=0.0)[None, :]
            if ROPE:
                p = tl.arange(0, DP // 2)
                third: tl.constexpr = d // 2 // 3
                t = tl.load(positions + rows * 3, mask=rows < L, other=0)[:, None]
                h = tl.load(positions + rows * 3 + 1, mask=rows < L, other=0)[:, None]
                w = tl.load(positions + rows * 3 + 2, mask=rows < L, other=0)[:, None]
                position = tl.where((p < d // 2 - 2 * third)[None, :], t, tl.where((p < d // 2 - third)[None, :], h, w))
                inside = (rows < L)[:, None] & (p < d // 2)[None, :]
                angle = table + (tl.abs(position) * (d // 2) + p[None, :]) * 2
                cos = tl.load(angle, mask=inside, other=0.0)
                sin = tl.load(angle + 1, mask=inside, other=0.0)
                sin = tl.where(position < 0, -sin, sin)
                x, y = tl.split(tl.reshape(Qf, (M, DP // 2, 2)))
                Qf = tl.reshape(tl.join(x * cos - y * sin, x * sin + y * cos), (M, DP))
            Q = Qf.to(Q.dtype)
        scale2 = scale * 1.4426950408889634  # for exp2 instead of exp
        top = tl.full((M,), float("-inf"), tl.float32)
        norm = tl.zeros((M,), tl.float32)
        acc = tl.zeros((M, DP), tl.float32)
        for start in range(0, S, NK):
            keys = start + tl.arange(0, NK)
            K = tile(k, b * k_b, head, k_l, keys, S, d, DP)
            logits = dot(Q, tl.trans(K), PRECISION) * scale2
            logits = tl.where((keys < S)[None, :], logits, float("-inf"))
            new = tl.maximum(top, tl.max(logits, 1))
            P = tl.exp2(logits - new[:, None])
            shrink = tl.exp2(top - new)
            norm = norm * shrink + tl.sum(P, 1)
            V = tile(v, b * v_b, head, v_l, keys, S, d, DP)
            acc = acc * shrink[:, None] + dot(P.to(V.dtype), V, PRECISION)
            top = new
        j = tl.arange(0, DP)
        at = rows[:, None] * (N * d) + j[None, :]
        tl.store(
            (out + (b * L * N + head) * d) + at,
            (acc / norm[:, None]).to(out.dtype.element_ty),
            mask=(rows < L)[:, None] & (j < d)[None, :],
        )
        tl.store(lse + (b * N + head) * L + rows, top + tl.log2(norm), mask=rows < L)

    @triton.jit
    def delta_kernel(out, dout, delta, d: tl.constexpr, DP: tl.constexpr):
        """Compute delta (B,L,N), the row sums of out * dout."""
        i, j = tl.program_id(0).to(tl.int64), tl.arange(0, DP)
        a = tl.load(out + i * d + j, mask=j < d, other=0.0).to(tl.float32) * tl.load(
            dout + i * d + j, mask=j < d, other=0.0
        ).to(tl.float32)
        tl.store(delta + i, tl.sum(a, 0))

    @triton.jit
    def keys_kernel(
        q,
        k,
        v,
        dout,
        lse,
        delta,
        dk,
        dv,
        L,
        S,
        N,
        scale,
        k_b,
        k_l,
        v_b,
        v_l,
        d: tl.constexpr,
        DP: tl.constexpr,
        M: tl.constexpr,
        NK: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """Compute the gradients of NK keys and values of one head, from all queries in tiles of M. q and dout must be
        contiguous.
        """
        b, head = (tl.program_id(1) // N).to(tl.int64), tl.program_id(1) % N
        keys = tl.program_id(0) * NK + tl.arange(0, NK)
        K, V = tile(k, b * k_b, head, k_l, keys, S, d, DP), tile(v, b * v_b, head, v_l, keys, S, d, DP)
        scale2 = scale * 1.4426950408889634
        dK = tl.zeros((NK, DP), tl.float32)
        dV = tl.zeros((NK, DP), tl.float32)
        for start in range(0, L, M):
            rows = start + tl.arange(0, M)
            Q, dO = (
                tile(q, b * L * N * d, head, N * d, rows, L, d, DP),
                tile(dout, b * L * N * d, head, N * d, rows, L, d, DP),
            )
            logits = dot(K, tl.trans(Q), PRECISION) * scale2
            top = tl.load(lse + (b * N + head) * L + rows, mask=rows < L, other=0.0)
            P = tl.where((keys < S)[:, None] & (rows < L)[None, :], tl.exp2(logits - top[None, :]), 0.0)
            dV += dot(P.to(dO.dtype), dO, PRECISION)
            part = tl.load(delta + (b * L + rows) * N + head, mask=rows < L, other=0.0)
            dS = P * (dot(V, tl.trans(dO), PRECISION) - part[None, :])
            dK += dot(dS.to(Q.dtype), Q, PRECISION)
        j = tl.arange(0, DP)
        first, at, inside = (
            (b * S * N + head) * d,
            keys[:, None] * (N * d) + j[None, :],
            (keys < S)[:, None] & (j < d)[None, :],
        )
        tl.store((dk + first) + at, (dK * scale).to(dk.dtype.element_ty), mask=inside)
        tl.store((dv + first) + at, dV.to(dv.dtype.element_ty), mask=inside)

    @triton.jit
    def queries_kernel(
        q,
        k,
        v,
        dout,
        lse,
        delta,
        dq,
        L,
        S,
        N,
        scale,
        k_b,
        k_l,
        v_b,
        v_l,
        d: tl.constexpr,
        DP: tl.constexpr,
        M: tl.constexpr,
        NK: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """Compute the gradients of M queries of one head, from all keys in tiles of NK; q, dout: contiguous."""
        b, head = (tl.program_id(1) // N).to(tl.int64), tl.program_id(1) % N
        rows = tl.program_id(0) * M + tl.arange(0, M)
        Q, dO = (
            tile(q, b * L * N * d, head, N * d, rows, L, d, DP),
            tile(dout, b * L * N * d, head, N * d, rows, L, d, DP),
        )
        top = tl.load(lse + (b * N + head) * L + rows, mask=rows < L, other=0.0)
        part = tl.load(delta + (b * L + rows) * N + head, mask=rows < L, other=0.0)
        scale2 = scale * 1.4426950408889634
        dQ = tl.zeros((M, DP), tl.float32)
        for start in range(0, S, NK):
            keys = start + tl.arange(0, NK)
            K, V = tile(k, b * k_b, head, k_l, keys, S, d, DP), tile(v, b * v_b, head, v_l, keys, S, d, DP)
            logits = dot(Q, tl.trans(K), PRECISION) * scale2
            P = tl.where((keys < S)[None, :], tl.exp2(logits - top[:, None]), 0.0)
            dS = P * (dot(dO, tl.trans(V), PRECISION) - part[:, None])
            dQ += dot(dS.to(K.dtype), K, PRECISION)
        j = tl.arange(0, DP)
        tl.store(
            (dq + (b * L * N + head) * d) + (rows[:, None] * (N * d) + j[None, :]),
            (dQ * scale).to(dq.dtype.element_ty),
            mask=(rows < L)[:, None] & (j < d)[None, :],
        )


def dense(x):
    """Return x (B,L,N,d) with its heads next to each other in memory; x is copied only if they are not."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


def tiles(d, dtype, kernel):
    """Return tile sizes and launch options for `kernel` ("forward", "keys" or "queries"). Tiles of bf16 with d = 128
    fit the registers of Hopper and Ampere GPUs. For fp32 and in the interpreter, tiles are smaller.
    """
    common = {
        "d": d,
        "DP": max(16, triton.next_power_of_2(d)),
        "PRECISION": "ieee" if INTERPRETED or dtype == torch.float32 else "tf32",
    }
    if INTERPRETED or dtype == torch.float32:
        return common | {"M": 32, "NK": 32, "num_warps": 4, "num_stages": 1}
    return (
        common
        | {
            "forward": {"M": 128, "NK": 64, "num_warps": 8, "num_stages": 3},
            "keys": {"M": 32, "NK": 64, "num_warps": 8, "num_stages": 2},
            "queries": {"M": 64, "NK": 32, "num_warps": 8, "num_stages": 2},
        }[kernel]
    )


def statistic(q, eps):
    """Return 1 / rms (B,L) of each token's N*d numbers in q (B,L,N,d)."""
    B, L, N, d = q.shape
    rstd = torch.empty(B, L, device=q.device)
    block = triton.next_power_of_2(N * d)
    flat = qk_norm_rope.rows_of(q.flatten(2))
    rstd_kernel[(B * L,)](
        flat, rstd, flat.stride(1), eps, D=N * d, BLOCK=block, num_warps=max(1, min(16, block // 512))
    )
    return rstd


@torch.library.custom_op("nanowan::attention", mutates_args=(), device_types=("cuda", "cpu"))
def _forward(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, eps: float, table: Tensor | None, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the attention (B,L,N,d), and log2 of the sum of exponentials in the softmax (B,N,L)."""
    (B, L, N, d), S = q.shape, k.shape[1]
    q, k, v = dense(q), dense(k), dense(v)
    out, lse = torch.empty(B, L, N, d, device=q.device, dtype=q.dtype), torch.empty(B, N, L, device=q.device)
    t = tiles(d, q.dtype, "forward")
    with launchable(q):
        rstd = None if weight is None else statistic(q, eps)
        forward_kernel[(triton.cdiv(L, t["M"]), B * N)](
            q,
            k,
            v,
            out,
            lse,
            rstd,
            weight,
            table,
            positions,
            L,
            S,
            N,
            d**-0.5,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            NORM=weight is not None,
            ROPE=table is not None,
            **t,
        )
    return out, lse


@torch.library.custom_op("nanowan::attention_backward", mutates_args=(), device_types=("cuda", "cpu"))
def _backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v. q must be normalised and rotated already."""
    (B, L, N, d), S = q.shape, k.shape[1]
    q, dout, k, v = q.contiguous(), dout.contiguous(), dense(k), dense(v)
    dq, (dk, dv) = torch.empty_like(q), (torch.empty(B, S, N, d, device=q.device, dtype=q.dtype) for _ in range(2))
    delta = torch.empty(B, L, N, device=q.device)
    keys, queries = tiles(d, q.dtype, "keys"), tiles(d, q.dtype, "queries")
    at = (L, S, N, d**-0.5, k.stride(0), k.stride(1), v.stride(0), v.stride(1))
    with launchable(q):
        delta_kernel[(B * L * N,)](out, dout, delta, d=d, DP=keys["DP"])
        keys_kernel[(triton.cdiv(S, keys["NK"]), B * N)](q, k, v, dout, lse, delta, dk, dv, *at, **keys)
        queries_kernel[(triton.cdiv(L, queries["M"]), B * N)](q, k, v, dout, lse, delta, dq, *at, **queries)
    return dq, dk, dv


@_forward.register_fake
def _(q, k, v, weight, eps, table, positions):
    B, L, N, d = q.shape
    return q.new_empty(q.shape), q.new_empty(B, N, L, dtype=torch.float32)


@_backward.register_fake
def _(dout, q, k, v, out, lse):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def setup_context(ctx, inputs, output):
    q, k, v, weight, ctx.eps, table, positions = inputs
    ctx.save_for_backward(q, k, v, weight, table, positions, *output)
    ctx.set_materialize_grads(False)


def backward(ctx, dout, _):
    q, k, v, weight, table, positions, out, lse = ctx.saved_tensors
    heads, dweight, ready = q.shape[2], None, q
    how = (ctx.eps, heads, table, positions)
    if weight is not None:
        (ready,) = qk_norm_rope.qk_norm_rope([q.flatten(2)], [weight], *how)
    dq, dk, dv = _backward(dout, ready, k, v, out, lse)
    if weight is not None:
        dq, *more = qk_norm_rope.qk_norm_rope_backward([dq], [q.flatten(2)], [weight], *how, weight.requires_grad)
        dq, dweight = dq.view(q.shape), more[0][0] if more else None
    return dq, dk, dv, dweight, None, None, None


_forward.register_autograd(backward, setup_context=setup_context)


# ---- public ------------------------------------------------------------------------------------------------------
def attention(q, k, v, weight=None, eps=1e-6, table=None, positions=None):
    """Compute the same as attention_ref, with the Triton kernels."""
    return _forward(q, k, v, weight, eps, table, qk_norm_rope.packed(positions))[0]
