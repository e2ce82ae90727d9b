"""LayerNorm with per-frame rows, alone or fused with the gated residual before it.

    python -m kernels.modulate      check against the reference, then time it (a GPU; or TRITON_INTERPRET=1 to check
    only)

x (B,L,D) is the fp32 residual stream, y (B,L,D) a branch's output in any float dtype, and rows (B,F,D) fp32 of any
stride serve L/F tokens each. Floors in bytes per element: modulate 4 + out, gate_modulate 8 + y + out, gate 8 + y: each
tensor is touched once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import launchable, register, report, timed, triton, worst

if triton:
    import triton.language as tl


# ---- reference ---------------------------------------------------------------------------------------------------
def modulate_ref(x, weight, shift, eps, dtype):
    """LayerNorm(x) * weight + shift in `dtype`."""
    y = F.layer_norm(x, x.shape[-1:], eps=eps).unflatten(1, (weight.shape[1], -1))
    return (y * weight[:, :, None] + shift[:, :, None]).flatten(1, 2).to(dtype)


def gate_ref(x, y, row=None):
    """x + row * y; without a row, x + y."""
    return (
        x + y if row is None else x + (y.to(x.dtype).unflatten(1, (row.shape[1], -1)) * row[:, :, None]).flatten(1, 2)
    )


def gate_modulate_ref(x, y, row, weight, shift, eps, dtype):
    """(x + row * y, and its modulate_ref)."""
    x = gate_ref(x, y, row)
    return x, modulate_ref(x, weight, shift, eps, dtype)


# ---- Triton ------------------------------------------------------------------------------------------------------
if triton:

    @triton.jit
    def forward_kernel(
        x,
        y,
        row,
        weight,
        shift,
        new,
        out,
        L,
        tokens,
        eps,
        row_b,
        row_f,
        weight_b,
        weight_f,
        shift_b,
        shift_f,
        D: tl.constexpr,
        BLOCK: tl.constexpr,
        GATED: tl.constexpr,
        ROW: tl.constexpr,
        NORMED: tl.constexpr,
    ):
        """One token a program: the gated sum if GATED (with a row if ROW), its norm and modulation if NORMED."""
        i = tl.program_id(0).to(tl.int64)
        b, f = i // L, i % L // tokens
        d = tl.arange(0, BLOCK)
        inside = d < D
        a = tl.load(x + i * D + d, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            branch = tl.load(y + i * D + d, mask=inside, other=0.0).to(tl.float32)
            if ROW:
                branch *= tl.load(row + b * row_b + f * row_f + d, mask=inside, other=0.0)
            a += branch
            tl.store(new + i * D + d, a, mask=inside)
        if NORMED:
            mean = tl.sum(a, 0) / D
            centred = tl.where(inside, a - mean, 0.0)
            rstd = tl.rsqrt(tl.sum(centred * centred, 0) / D + eps)
            w = tl.load(weight + b * weight_b + f * weight_f + d, mask=inside, other=0.0)
            s = tl.load(shift + b * shift_b + f * shift_f + d, mask=inside, other=0.0)
            tl.store(out + i * D + d, (centred * rstd * w + s).to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def backward_kernel(
        dnew,
        dout,
        new,
        y,
        row,
        weight,
        dx,
        dy,
        sums,
        tokens,
        chunk,
        frames,
        eps,
        row_b,
        row_f,
        weight_b,
        weight_f,
        D: tl.constexpr,
        BLOCK: tl.constexpr,
        GATED: tl.constexpr,
        ROW: tl.constexpr,
        NORMED: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        """One program walks `chunk` tokens of one row; with ROWS it sums the gradients of row, weight and shift on the
        way into sums (B*F,chunks,3,D).
        """
        g, c = tl.program_id(0), tl.program_id(1)
        b, f = g // frames, g % frames
        d = tl.arange(0, BLOCK)
        inside = d < D
        if ROW:
            r = tl.load(row + b * row_b + f * row_f + d, mask=inside, other=0.0)
        if NORMED:
            w = tl.load(weight + b * weight_b + f * weight_f + d, mask=inside, other=0.0)
        if ROWS:
            sum_row = tl.zeros((BLOCK,), tl.float32)
            sum_weight = tl.zeros((BLOCK,), tl.float32)
            sum_shift = tl.zeros((BLOCK,), tl.float32)
        for j in range(c * chunk, min((c + 1) * chunk, tokens)):
            at = (g.to(tl.int64) * tokens + j) * D + d
            grad = tl.zeros((BLOCK,), tl.float32)
            if GATED:
                grad += tl.load(dnew + at, mask=inside, other=0.0)
            if NORMED:
                a = tl.load(new + at, mask=inside, other=0.0).to(tl.float32)
                do = tl.load(dout + at, mask=inside, other=0.0).to(tl.float32)
                centred = tl.where(inside, a - tl.sum(a, 0) / D, 0.0)
                rstd = tl.rsqrt(tl.sum(centred * centred, 0) / D + eps)
                normed = centred * rstd
                dn = do * w
                grad += rstd * (dn - tl.sum(dn, 0) / D - normed * (tl.sum(dn * normed, 0) / D))
                if ROWS:
                    sum_weight += do * normed
                    sum_shift += do
            tl.store(dx + at, grad, mask=inside)
            if GATED:
                if ROW:
                    if ROWS:
                        sum_row += grad * tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
                    grad *= r
                tl.store(dy + at, grad.to(dy.dtype.element_ty), mask=inside)
        if ROWS:
            at = (g * tl.num_programs(1) + c).to(tl.int64) * 3 * D + d
            tl.store(sums + at, sum_row, mask=inside)
            tl.store(sums + at + D, sum_weight, mask=inside)
            tl.store(sums + at + 2 * D, sum_shift, mask=inside)


def strides(row):
    return (0, 0) if row is None else (row.stride(0) if len(row) > 1 else 0, row.stride(1))


def tuned(D):
    """Block and warps for rows of width D."""
    block = triton.next_power_of_2(D)
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 512))}


def triton_forward(x, y, row, weight, shift, eps, dtype):
    B, L, D = x.shape
    rows = row if weight is None else weight
    new = None if y is None else torch.empty(B, L, D, device=x.device)
    out = None if weight is None else torch.empty(B, L, D, device=x.device, dtype=dtype)
    with launchable(x):
        forward_kernel[(B * L,)](
            x.contiguous(),
            None if y is None else y.contiguous(),
            row,
            weight,
            shift,
            new,
            out,
            L,
            L // (1 if rows is None else rows.shape[1]),
            eps,
            *strides(row),
            *strides(weight),
            *strides(shift),
            D=D,
            GATED=y is not None,
            ROW=row is not None,
            NORMED=weight is not None,
            **tuned(D),
        )
    return [t for t in (new, out) if t is not None]


def triton_backward(dnew, dout, new, y, row, weight, eps, branch, need_rows):
    B, L, D = new.shape
    gated, rows = dnew is not None, row if weight is None else weight
    frames = 1 if rows is None else rows.shape[1]
    tokens = L // frames
    chunk = (
        -(-tokens * B * frames // 1024) if need_rows else 8
    )  # where rows are wanted, about a thousand programs, so that few sums are left to add up
    chunks = -(-tokens // chunk)
    dx = torch.empty(B, L, D, device=new.device)
    dy = torch.empty(B, L, D, device=new.device, dtype=branch) if gated else None
    sums = torch.empty(B * frames, chunks, 3, D, device=new.device) if need_rows else None
    with launchable(new):
        backward_kernel[(B * frames, chunks)](
            dnew,
            dout,
            new.contiguous(),
            None if y is None else y.contiguous(),
            row,
            weight,
            dx,
            dy,
            sums,
            tokens,
            chunk,
            frames,
            eps,
            *strides(row),
            *strides(weight),
            D=D,
            GATED=gated,
            ROW=row is not None,
            NORMED=weight is not None,
            ROWS=need_rows,
            **tuned(D),
        )
    found = [dx, dy] if gated else [dx]
    return found + [sums.sum(1).view(B, frames, 3, D)] if need_rows else found


# ---- torch.library -----------------------------------------------------------------------------------------------
@torch.library.custom_op("nanowan::modulate", mutates_args=(), device_types=())
def fused(
    x: Tensor,
    y: Tensor | None,
    row: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> list[Tensor]:
    """[the gated sum, where y is given] + [its norm and modulation, where weight is]."""


@torch.library.custom_op("nanowan::modulate_backward", mutates_args=(), device_types=())
def fused_backward(
    dnew: Tensor | None,
    dout: Tensor | None,
    new: Tensor,
    y: Tensor | None,
    row: Tensor | None,
    weight: Tensor | None,
    eps: float,
    branch: torch.dtype,
    need_rows: bool,
) -> list[Tensor]:
    """Gradients [x] + [y, where dnew is given] + [row, weight and shift (B,F,3,D), where need_rows]. new: the stream
    that was normed; branch: y's dtype.
    """


register(fused, triton_forward, "modulate")
register(fused_backward, triton_backward, "modulate_backward")


@fused.register_fake
def _(x, y, row, weight, shift, eps, dtype):
    return ([torch.empty_like(x, memory_format=torch.contiguous_format)] if y is not None else []) + (
        [torch.empty(x.shape, dtype=dtype, device=x.device)] if weight is not None else []
    )


@fused_backward.register_fake
def _(dnew, dout, new, y, row, weight, eps, branch, need_rows):
    rows = row if weight is None else weight
    found = [new.new_empty(new.shape)] + ([new.new_empty(new.shape, dtype=branch)] if dnew is not None else [])
    return found + ([new.new_empty(len(new), rows.shape[1], 3, new.shape[2])] if need_rows else [])


def keep(ctx, inputs, output):
    x, y, row, weight, shift, ctx.eps, _ = inputs
    ctx.branch, ctx.need_rows = x.dtype if y is None else y.dtype, any(ctx.needs_input_grad[2:5])
    ctx.gated, ctx.normed = y is not None, weight is not None
    ctx.save_for_backward(output[0] if ctx.gated else x, y if ctx.need_rows else None, row, weight)


def differentiate(ctx, grads):
    new, y, row, weight = ctx.saved_tensors
    grads = [g.contiguous() for g in grads]
    found = fused_backward(
        grads[0] if ctx.gated else None,
        grads[-1] if ctx.normed else None,
        new,
        y,
        row,
        weight,
        ctx.eps,
        ctx.branch,
        ctx.need_rows,
    )
    dx, dy = found[0], found[1] if ctx.gated else None
    drow, dweight, dshift = found[-1].unbind(2) if ctx.need_rows else (None,) * 3
    return dx, dy, drow if row is not None else None, *((dweight, dshift) if ctx.normed else (None, None)), None, None


torch.library.register_autograd("nanowan::modulate", differentiate, setup_context=keep)


# ---- public ------------------------------------------------------------------------------------------------------
def modulate(x, weight, shift, eps, dtype):
    """As modulate_ref."""
    return fused(x, None, None, weight, shift, eps, dtype)[0]


def gate(x, y, row=None):
    """As gate_ref."""
    return fused(x, y, row, None, None, 0.0, x.dtype)[0]


def gate_modulate(x, y, row, weight, shift, eps, dtype):
    """As gate_modulate_ref. row, weight and shift have equally many frames F."""
    return tuple(fused(x, y, row, weight, shift, eps, dtype))


def check(device, dtype, B=2, F=3, tokens=5, D=192):
    """Worst relative error of values and gradients against the reference in fp64, on inputs of odd strides."""
    g = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(shape, generator=g).to(device)
    x, y, rows = random(B, F * tokens, D), random(B, F * tokens, 2 * D).to(dtype)[..., :D], random(B, F, 3, D)
    ends, found = [random(B, F * tokens, D) for _ in range(2)], []
    for ops, kind in (
        ((modulate, gate, gate_modulate), torch.float32),
        ((modulate_ref, gate_ref, gate_modulate_ref), torch.float64),
    ):
        a, b, r = (
            u.detach().to(v).requires_grad_()
            for u, v in ((x, kind), (y, dtype if kind == torch.float32 else kind), (rows, kind))
        )
        weight, shift, row = r.unbind(2)
        out = dtype if kind == torch.float32 else kind
        h = [
            ops[0](a, weight, shift, 1e-6, out),
            ops[1](a, b, row),
            ops[1](a, b),
            *ops[2](a, b, row, weight, shift, 1e-6, out),
        ]
        (sum((u.to(kind) * ends[i % 2].to(kind)).sum() for i, u in enumerate(h))).backward()
        found.append([*h, a.grad, b.grad, r.grad])
    return worst(*found)


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = {}
    for dtype, limit in ((torch.float32, 3e-6), (torch.bfloat16, 8e-3)):
        results[f"check {dtype}"] = report(f"modulate, {dtype}", check(device, dtype), limit)
    if device == "cuda":
        for B, L, D in ((1, 27280, 3072), (1, 32760, 5120)):
            x, y = torch.randn(B, L, D, device=device), torch.randn(B, L, D, device=device, dtype=torch.bfloat16)
            row, weight, shift = torch.randn(3, B, 1, D, device=device)
            given = weight, shift, 1e-6, torch.bfloat16
            results[f"modulate {L}x{D}"] = timed(
                f"modulate {L}x{D}", lambda: modulate(x, *given), lambda: modulate_ref(x, *given), 6 * x.numel()
            )
            results[f"gate_modulate {L}x{D}"] = timed(
                f"gate_modulate {L}x{D}",
                lambda: gate_modulate(x, y, row, *given),
                lambda: gate_modulate_ref(x, y, row, *given),
                12 * x.numel(),
            )
    return results


if __name__ == "__main__":
    main()
