"""A step of AdamW with 8 bits per moment, for fp32 or Kahan-compensated bf16 weights; on a GPU, one kernel per tensor.

weight and grad: bf16 or fp32, of the same shape with n elements; codes (blocks,BLOCK) int16: both moments of each
element; scale (blocks,1) fp32: one per block. compensation: empty for fp32 weights; for bf16 weights it has their shape
and dtype, and the exact weight is weight - compensation. Weight and compensation together store 16 bits of mantissa,
the last bit rounded at random. Weight decay and update are applied to the exact weight, in fp32.
Compensation: Kahan, 1965, and Zamirai et al., 2020. Lower bound on memory traffic in bf16: 8 bytes read and 6 written
per element.
"""

import math

import torch
from torch import Tensor

from kernels import INTERPRETED, launchable, triton

if triton:
    import triton.language as tl

BLOCK = 256  # elements that share a scale
ROOT_LEVELS, RATIO_LEVELS = 511, 63  # levels of sqrt(v), in 9 bits, and of |m| / sqrt(v), in 7 bits with its sign
OCTAVES = 24  # range of sqrt(v) below the block's largest; with gradients clipped to norm 1, it extends to AdamW's eps
CHUNK = 1024  # blocks per chunk: the fp32 temporaries stay small, and in the cache


# ---- reference ---------------------------------------------------------------------------------------------------
def max_ratio(betas):
    """Return the largest |m| / sqrt(v) that any sequence of gradients can lead to (Cauchy-Schwarz). betas: (b1, b2).
    Raises ValueError if there is no bound.
    """
    b1, b2 = betas
    if not b1 * b1 < b2 < 1:
        raise ValueError(f"betas {betas}: 8-bit moments need b1^2 < b2 < 1, or m is not bounded by sqrt(v)")
    return (1 - b1) / math.sqrt((1 - b2) * (1 - b1 * b1 / b2))


def round_randomly(x):
    """Round each element of x up or down to an integer, at random, so that the expectation is x. So a moment that
    should change by less than one level per step still changes in the mean.
    """
    return (x + torch.rand_like(x)).floor()


def pack(level, share):
    """Pack a level 0..ROOT_LEVELS and a share -RATIO_LEVELS..RATIO_LEVELS (see encode_moments) into 16 bits."""
    return (level - 256) * 128 + share + 64


def unpack(codes):
    return (codes >> 7) + 256, (codes & 127) - 64


def round_to_bf16(x):
    """Round fp32 numbers to bf16, up or down at random, so that the expectation is x."""
    bits = x.view(torch.int32)
    return ((bits + torch.randint_like(bits, 1 << 16)) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


def decode_root(level, scale):
    """Turn levels 0..ROOT_LEVELS (n,BLOCK) and scales (n,1) into sqrt(v) (n,BLOCK) fp32."""
    return torch.where(level > 0, torch.exp2((level - ROOT_LEVELS) * (OCTAVES / (ROOT_LEVELS - 1))), 0) * scale


def encode_moments(m, v, betas):
    """Encode the moments m, v (n,BLOCK) fp32 as codes (n,BLOCK) int16 and scales (n,1) fp32.

    sqrt(v) is coded logarithmically, relative to the largest in its block; m is coded linearly, as a share of its
    largest possible value at this v. So two elements are coded with the same relative precision even if the gradients
    of one are a million times smaller. After Dettmers et al., 2022.
    """
    root = v.sqrt()
    scale = root.amax(1, keepdim=True)
    level = ROOT_LEVELS + (ROOT_LEVELS - 1) / OCTAVES * torch.log2(root / scale.clamp(min=1e-38))
    level = torch.where(root > 0, round_randomly(level).clamp(1, ROOT_LEVELS), 0)
    share = m / (max_ratio(betas) * decode_root(level, scale))
    share = round_randomly(share * RATIO_LEVELS).clamp(-RATIO_LEVELS, RATIO_LEVELS)
    share = torch.where(level > 0, share, 0)
    return pack(level, share).to(torch.int16), scale


def decode_moments(codes, scale, betas):
    """Invert encode_moments: return m and v (n,BLOCK) fp32."""
    level, share = unpack(codes)
    root = decode_root(level, scale)
    return share * (max_ratio(betas) / RATIO_LEVELS) * root, root.square()


def step_ref(weight, compensation, grad, codes, scale, step, lr, betas, eps, weight_decay):
    """Do step number `step` (from 1) on a tensor, in place (arguments: see the top of this file). The step is done in
    chunks. On a CPU, the temporaries of a chunk fit into the cache.
    """
    flat = [t.view(-1) for t in (weight, compensation, grad)]
    chunk = CHUNK * (16 if weight.is_cuda else 1)  # on a GPU, a chunk launches some 80 kernels, and no cache matters
    for start in range(0, len(codes), chunk):
        blocks, part = slice(start, start + chunk), slice(start * BLOCK, (start + chunk) * BLOCK)
        w, c, g = (t[part] for t in flat)  # c is empty for fp32 weights
        g = torch.nn.functional.pad(g.float(), (0, codes[blocks].numel() - len(g))).view(-1, BLOCK)
        b1, b2 = betas
        m, v = decode_moments(codes[blocks], scale[blocks], betas)
        m, v = torch.lerp(g, m, b1), torch.lerp(g * g, v, b2)
        codes[blocks], scale[blocks] = encode_moments(m, v, betas)
        update = m / (1 - b1**step) / ((v / (1 - b2**step)).sqrt() + eps)
        exact = w.float() - c.float() if len(c) else w
        exact = exact * (1 - lr * weight_decay) - lr * update.view(-1)[: len(w)]
        w.copy_(exact)
        if len(c):
            c.copy_(round_to_bf16(w.float() - exact))


# ---- Triton ------------------------------------------------------------------------------------------------------
if triton:

    @triton.jit
    def root_of(level, scale, LEVELS: tl.constexpr, OCTAVES: tl.constexpr):
        return tl.where(level > 0, tl.exp2((level - LEVELS) * (OCTAVES / (LEVELS - 1))), 0.0) * scale

    @triton.jit(do_not_specialize=["seed"])
    def step_kernel(
        weight,
        compensation,
        grad,
        codes,
        scales,
        n,
        seed,
        lr,
        keep,
        b1,
        b2,
        correction1,
        correction2,
        eps,
        ratio,
        BLOCK: tl.constexpr,
        LEVELS: tl.constexpr,
        SHARES: tl.constexpr,
        OCTAVES: tl.constexpr,
        COMPENSATED: tl.constexpr,
    ):
        """Do the step for one block of elements per program. keep: 1 - lr * weight_decay."""
        i = tl.program_id(0).to(tl.int64)
        j = i * BLOCK + tl.arange(0, BLOCK)
        g = tl.load(grad + j, mask=j < n, other=0.0).to(tl.float32)
        code = tl.load(codes + j).to(tl.int32)
        root = root_of((code >> 7) + 256.0, tl.load(scales + i), LEVELS, OCTAVES)
        m = ((code & 127) - 64) * (ratio / SHARES) * root
        v = root * root
        m = m - (m - g) * (1 - b1)  # as torch.lerp does: exact where m is 0
        v = v - (v - g * g) * (1 - b2)

        random1, random2, random3, _ = tl.randint4x(seed, j)
        root = tl.sqrt(v)
        scale = tl.max(root, 0)
        level = LEVELS + (LEVELS - 1) / OCTAVES * tl.log2(root / tl.maximum(scale, 1e-38))
        level = tl.floor(level + tl.uint_to_uniform_float(random1))
        level = tl.where(root > 0, tl.minimum(tl.maximum(level, 1.0), LEVELS * 1.0), 0.0)
        share = m / (ratio * root_of(level, scale, LEVELS, OCTAVES)) * SHARES
        share = tl.floor(share + tl.uint_to_uniform_float(random2))
        share = tl.where(level > 0, tl.minimum(tl.maximum(share, -SHARES * 1.0), SHARES * 1.0), 0.0)
        tl.store(codes + j, ((level - 256) * 128 + share + 64).to(tl.int16))
        tl.store(scales + i, scale)

        update = m / correction1 / (tl.sqrt(v / correction2) + eps)
        exact = tl.load(weight + j, mask=j < n, other=0.0).to(tl.float32)
        if COMPENSATED:
            exact -= tl.load(compensation + j, mask=j < n, other=0.0).to(tl.float32)
        exact = exact * keep - lr * update
        rounded = exact.to(weight.dtype.element_ty)
        tl.store(weight + j, rounded, mask=j < n)
        if COMPENSATED:
            bits = (rounded.to(tl.float32) - exact).to(tl.int32, bitcast=True) + (random3 & 0xFFFF).to(tl.int32)
            tl.store(compensation + j, (bits & -65536).to(tl.float32, bitcast=True).to(tl.bfloat16), mask=j < n)


# ---- torch.library -----------------------------------------------------------------------------------------------
@torch.library.custom_op(
    "nanowan::adamw8bit_step", mutates_args=("weight", "compensation", "codes", "scale"), device_types="cuda"
)
def _step(
    weight: Tensor,
    compensation: Tensor,
    grad: Tensor,
    codes: Tensor,
    scale: Tensor,
    step: int,
    lr: float,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
) -> None:
    seed = int(torch.randint(2**31, ()))  # from the CPU's generator, whose state a run saves
    corrections = 1 - b1**step, 1 - b2**step
    with launchable(weight):
        step_kernel[(len(codes),)](
            weight,
            compensation,
            grad.contiguous(),
            codes,
            scale,
            weight.numel(),
            seed,
            lr,
            1 - lr * weight_decay,
            b1,
            b2,
            *corrections,
            eps,
            max_ratio((b1, b2)),
            BLOCK=BLOCK,
            LEVELS=ROOT_LEVELS,
            SHARES=RATIO_LEVELS,
            OCTAVES=OCTAVES,
            COMPENSATED=compensation.numel() > 0,
        )


if INTERPRETED:
    _step.register_kernel("cpu")(_step._init_fn)


@_step.register_fake
def _(weight, compensation, grad, codes, scale, step, lr, b1, b2, eps, weight_decay):
    pass


# ---- public ------------------------------------------------------------------------------------------------------
def step(weight, compensation, grad, codes, scale, step, lr, betas, eps, weight_decay):
    """Compute the same as step_ref, with the Triton kernel."""
    _step(weight, compensation, grad, codes, scale, step, lr, *betas, eps, weight_decay)


def new_state(p):
    """Return the state of a parameter p before its first step: (compensation, codes, scale)."""
    blocks = -(-p.numel() // BLOCK)
    codes = torch.full((blocks, BLOCK), pack(0, 0), dtype=torch.int16, device=p.device)
    compensation = torch.zeros_like(p) if p.dtype == torch.bfloat16 else p.new_empty(0)
    return compensation, codes, torch.zeros(blocks, 1, device=p.device)
