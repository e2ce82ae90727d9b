"""LayerNorm with modulation (a scale and a shift), alone or fused with the gated residual before it.

x (B,L,D) is the fp32 residual stream, y (B,L,D) a branch's output in any float dtype. gate, weight and shift (B,F,D)
fp32, contiguous along D, have F rows for each clip. Each row serves L/F successive tokens; if `index` (L,) int32 is
given, row index[l] serves token l. Each tensor is read or written once. So the lower bounds on memory traffic, in bytes
per element, are 4 + out for modulate, 8 + y + out for gate_modulate, and 8 + y for gate, where out and y stand for the
bytes of one element of that tensor.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import launchable, register, triton

if triton:
    import triton.language as tl


# ---- reference ---------------------------------------------------------------------------------------------------
def per_token(rows, length, index):
    """Return the row of each token: rows (B,F,D) -> (B,length,D), or (B,1,D) if one row serves all tokens."""
    if index is not None:
        return rows[:, index]
    return rows if rows.shape[1] == 1 else rows.repeat_interleave(length // rows.shape[1], 1)


def modulate_ref(x, weight, shift, eps, dtype, index=None):
    """Return LayerNorm(x) * weight + shift in `dtype`. Arguments: see the top of this file."""
    weight, shift = (per_token(rows, x.shape[1], index) for rows in (weight, shift))
    return (F.layer_norm(x, x.shape[-1:], eps=eps) * weight + shift).to(dtype)


def gate_ref(x, y, gate=None, index=None):
    """Return x + gate * y or, without a gate, x + y."""
    return x + y if gate is None else x + y.to(x.dtype) * per_token(gate, x.shape[1], index)


def gate_modulate_ref(x, y, gate, weight, shift, eps, dtype, index=None):
    """Return (x + gate * y, the result of modulate_ref for this sum)."""
    x = gate_ref(x, y, gate, index)
    return x, modulate_ref(x, weight, shift, eps, dtype, index)


# ---- Triton ------------------------------------------------------------------------------------------------------
if triton:

    @triton.jit
    def forward_kernel(
        x,
        y,
        gate,
        weight,
        shift,
        index,
        new,
        out,
        L,
        tokens,
        eps,
        gate_b,
        gate_f,
        weight_b,
        weight_f,
        shift_b,
        shift_f,
        D: tl.constexpr,
        BLOCK: tl.constexpr,
        ADD: tl.constexpr,
        GATE: tl.constexpr,
        NORM: tl.constexpr,
        INDEX: tl.constexpr,
    ):
        """Compute one token per program: the sum x + gate * y if ADD (x + y without GATE), then its LayerNorm and
        modulation if NORM.
        """
        i = tl.program_id(0).to(tl.int64)
        b = i // L
        f = tl.load(index + i % L) if INDEX else i % L // tokens
        d = tl.arange(0, BLOCK)
        inside = d < D
        a = tl.load(x + i * D + d, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            branch = tl.load(y + i * D + d, mask=inside, other=0.0).to(tl.float32)
            if GATE:
                branch *= tl.load(gate + b * gate_b + f * gate_f + d, mask=inside, other=0.0)
            a += branch
            tl.store(new + i * D + d, a, mask=inside)
        if NORM:
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
        gate,
        weight,
        index,
        dx,
        dy,
        sums,
        L,
        tokens,
        chunk,
        rows,
        eps,
        gate_b,
        gate_f,
        weight_b,
        weight_f,
        D: tl.constexpr,
        BLOCK: tl.constexpr,
        ADD: tl.constexpr,
        GATE: tl.constexpr,
        NORM: tl.constexpr,
        INDEX: tl.constexpr,
        SUMS: tl.constexpr,
    ):
        """Each program has one row of modulation and goes through `chunk` successive tokens. It computes the gradients
        of x and, with ADD, of y for the tokens that the row serves: all or, with INDEX, some. With SUMS, it also adds
        up the gradients of gate, weight and shift over these tokens, into sums (B*F,chunks,3,D). tokens: number of
        tokens in all chunks of a row: L/F or, with INDEX, L. rows: the number F of rows.
        """
        g, c = tl.program_id(0), tl.program_id(1)
        b, f = g // rows, g % rows
        begin = b.to(tl.int64) * L if INDEX else g.to(tl.int64) * tokens
        d = tl.arange(0, BLOCK)
        inside = d < D
        if GATE:
            r = tl.load(gate + b * gate_b + f * gate_f + d, mask=inside, other=0.0)
        if NORM:
            w = tl.load(weight + b * weight_b + f * weight_f + d, mask=inside, other=0.0)
        if SUMS:
            sum_gate = tl.zeros((BLOCK,), tl.float32)
            sum_weight = tl.zeros((BLOCK,), tl.float32)
            sum_shift = tl.zeros((BLOCK,), tl.float32)
        for j in range(c * chunk, min((c + 1) * chunk, tokens)):
            take = True
            if INDEX:
                take = tl.load(index + j) == f
            if take:
                at = (begin + j) * D + d
                grad = tl.zeros((BLOCK,), tl.float32)
                if ADD:
                    grad += tl.load(dnew + at, mask=inside, other=0.0)
                if NORM:
                    a = tl.load(new + at, mask=inside, other=0.0).to(tl.float32)
                    do = tl.load(dout + at, mask=inside, other=0.0).to(tl.float32)
                    centred = tl.where(inside, a - tl.sum(a, 0) / D, 0.0)
                    rstd = tl.rsqrt(tl.sum(centred * centred, 0) / D + eps)
                    normed = centred * rstd
                    dn = do * w
                    grad += rstd * (dn - tl.sum(dn, 0) / D - normed * (tl.sum(dn * normed, 0) / D))
                    if SUMS:
                        sum_weight += do * normed
                        sum_shift += do
                tl.store(dx + at, grad, mask=inside)
                if ADD:
                    if GATE:
                        if SUMS:
                            sum_gate += grad * tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
                        grad *= r
                    tl.store(dy + at, grad.to(dy.dtype.element_ty), mask=inside)
        if SUMS:
            at = (g * tl.num_programs(1) + c).to(tl.int64) * 3 * D + d
            tl.store(sums + at, sum_gate, mask=inside)
            tl.store(sums + at + D, sum_weight, mask=inside)
            tl.store(sums + at + 2 * D, sum_shift, mask=inside)


def strides(rows):
    return (0, 0) if rows is None else (rows.stride(0) if len(rows) > 1 else 0, rows.stride(1))


def launch_config(D):
    """Return the block size and the number of warps for rows of width D."""
    block = triton.next_power_of_2(D)
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 512))}


def count_rows(gate, weight):
    """Return F, the number of rows of gate or weight; 1 if both are None."""
    rows = gate if weight is None else weight
    return 1 if rows is None else rows.shape[1]


def triton_forward(x, y, gate, weight, shift, index, eps, dtype):
    B, L, D = x.shape
    new = None if y is None else torch.empty(B, L, D, device=x.device)
    out = None if weight is None else torch.empty(B, L, D, device=x.device, dtype=dtype)
    with launchable(x):
        forward_kernel[(B * L,)](
            x.contiguous(),
            None if y is None else y.contiguous(),
            gate,
            weight,
            shift,
            index,
            new,
            out,
            L,
            L // count_rows(gate, weight),
            eps,
            *strides(gate),
            *strides(weight),
            *strides(shift),
            D=D,
            ADD=y is not None,
            GATE=gate is not None,
            NORM=weight is not None,
            INDEX=index is not None,
            **launch_config(D),
        )
    return [t for t in (new, out) if t is not None]


def triton_backward(dnew, dout, new, y, gate, weight, index, eps, branch, need_rows):
    B, L, D = new.shape
    rows = count_rows(gate, weight)
    tokens = L // rows if index is None else L
    # for the sums, about a thousand programs, so that few partial sums are left to add
    chunk = -(-tokens * B * rows // 1024) if need_rows else 8
    chunks = -(-tokens // chunk)
    dx = torch.empty(B, L, D, device=new.device)
    dy = None if dnew is None else torch.empty(B, L, D, device=new.device, dtype=branch)
    sums = torch.empty(B * rows, chunks, 3, D, device=new.device) if need_rows else None
    with launchable(new):
        backward_kernel[(B * rows, chunks)](
            dnew,
            dout,
            new.contiguous(),
            None if y is None else y.contiguous(),
            gate,
            weight,
            index,
            dx,
            dy,
            sums,
            L,
            tokens,
            chunk,
            rows,
            eps,
            *strides(gate),
            *strides(weight),
            D=D,
            ADD=dnew is not None,
            GATE=gate is not None,
            NORM=weight is not None,
            INDEX=index is not None,
            SUMS=need_rows,
            **launch_config(D),
        )
    grads = [dx] if dnew is None else [dx, dy]
    return grads + [sums.sum(1).view(B, rows, 3, D)] if need_rows else grads


# ---- torch.library -----------------------------------------------------------------------------------------------
@torch.library.custom_op("nanowan::modulate", mutates_args=(), device_types=())
def _forward(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    index: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Return a list: if y is given, the sum x + gate * y (x + y without a gate); then, if weight is given, the result
    of modulate_ref for the sum or, without y, for x.
    """


@torch.library.custom_op("nanowan::modulate_backward", mutates_args=(), device_types=())
def _backward(
    dnew: Tensor | None,
    dout: Tensor | None,
    new: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    index: Tensor | None,
    eps: float,
    branch: torch.dtype,
    need_rows: bool,
) -> list[Tensor]:
    """Return a list of gradients: of x; if dnew is given, of y; if need_rows, of gate, weight and shift in one tensor
    (B,F,3,D). dnew, dout: the gradients of what `_forward` returned, the sum and the modulated result; new: the
    residual stream that the LayerNorm was applied to; branch: the dtype of y.
    """


register(_forward, triton_forward, "modulate")
register(_backward, triton_backward, "modulate_backward")


@_forward.register_fake
def _(x, y, gate, weight, shift, index, eps, dtype):
    new = [] if y is None else [torch.empty_like(x, memory_format=torch.contiguous_format)]
    return new + ([] if weight is None else [torch.empty(x.shape, dtype=dtype, device=x.device)])


@_backward.register_fake
def _(dnew, dout, new, y, gate, weight, index, eps, branch, need_rows):
    outputs = [new.new_empty(new.shape)] + ([new.new_empty(new.shape, dtype=branch)] if dnew is not None else [])
    return outputs + ([new.new_empty(len(new), count_rows(gate, weight), 3, new.shape[2])] if need_rows else [])


def setup_context(ctx, inputs, output):
    x, y, gate, weight, shift, index, ctx.eps, _ = inputs
    ctx.branch, ctx.need_rows = x.dtype if y is None else y.dtype, any(ctx.needs_input_grad[2:5])
    ctx.added, ctx.normed = y is not None, weight is not None
    ctx.save_for_backward(output[0] if ctx.added else x, y if ctx.need_rows else None, gate, weight, index)


def backward(ctx, grads):
    new, y, gate, weight, index = ctx.saved_tensors
    grads = [g.contiguous() for g in grads]
    dnew, dout = grads[0] if ctx.added else None, grads[-1] if ctx.normed else None
    dx, *rest = _backward(dnew, dout, new, y, gate, weight, index, ctx.eps, ctx.branch, ctx.need_rows)
    dy = rest.pop(0) if ctx.added else None
    dgate, dweight, dshift = rest.pop().unbind(2) if ctx.need_rows else (None,) * 3
    if gate is None:
        dgate = None
    if weight is None:
        dweight = dshift = None
    return dx, dy, dgate, dweight, dshift, None, None, None


_forward.register_autograd(backward, setup_context=setup_context)


# ---- public ------------------------------------------------------------------------------------------------------
def modulate(x, weight, shift, eps, dtype, index=None):
    """Compute the same as modulate_ref, with the fused kernels."""
    return _forward(x, None, None, weight, shift, index, eps, dtype)[0]


def gate(x, y, gate=None, index=None):
    """Compute the same as gate_ref, with the fused kernels."""
    return _forward(x, y, gate, None, None, index, 0.0, x.dtype)[0]


def gate_modulate(x, y, gate, weight, shift, eps, dtype, index=None):
    """Compute the same as gate_modulate_ref, with the fused kernels. gate, weight and shift must have the same number
    of rows.
    """
    return tuple(_forward(x, y, gate, weight, shift, index, eps, dtype))
