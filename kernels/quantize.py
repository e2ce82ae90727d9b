"""Rows of activations in 8 bits (e4m3), a scale per row, for the GPU's fp8 matrix products: one read, one write.

    python -m kernels.quantize     check against the reference, then time it (a GPU; or TRITON_INTERPRET=1 to check
    only)

x (n,m) of any float dtype -> e4m3 (n,m) and scales (n,1) fp32, the largest value of each row being 448; of x, or of
its GELU, which then costs no pass of its own. Floor: one read of x and one write of a byte per value. A row that is not
finite becomes NaN.
"""

import functools

import torch
from torch import Tensor

from kernels import INTERPRETED, launchable, triton
from kernels.gelu import gelu_ref
from kernels.testing import report, seeded, timed

if triton:
    import triton.language as tl

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max  # 448


# ---- reference ---------------------------------------------------------------------------------------------------
def quantize_rows_ref(x, activated=False):
    """x (n,m) of any float type, or its GELU -> e4m3 (n,m), and the scale (n,1) fp32 of each row: x is about their
    product.
    """
    x = gelu_ref(x.float()) if activated else x.float()
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-12) / E4M3_MAX  # a row of zeros has a scale too
    return (x / scale).to(E4M3), scale


# ---- Triton ------------------------------------------------------------------------------------------------------
if triton:

    @triton.jit
    def quantize_kernel(x, out, scales, stride, M, ACTIVATED: tl.constexpr, BLOCK: tl.constexpr):
        """A row a program, all of it in registers."""
        i, j = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        v = tl.load(x + i * stride + j, mask=j < M, other=0.0).to(tl.float32)
        if ACTIVATED:  # tanh(u) = 2 sigmoid(2u) - 1
            v = v / (1.0 + tl.exp(-1.5957691216057308 * (v + 0.044715 * v * v * v)))
        poison = tl.sum(v * 0.0, 0)  # NaN of what is not finite, which a maximum leaves out
        scale = tl.maximum(tl.max(tl.abs(v), 0), 1e-12) / 448.0 + poison
        tl.store(scales + i, scale)
        v = v / scale
        # rounded here, half to even, to three bits of mantissa, or to 2^-9: Triton's interpreter casts less well
        bits = v.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        v = tl.where(tl.abs(v) < 0.015625, (v + 24576.0) - 24576.0, normal)
        tl.store(out + i * M + j, v.to(tl.float8e4nv), mask=j < M)


def tuned(M):
    """Of quantize_kernel for rows of M numbers: 32 of them in each thread."""
    block = triton.next_power_of_2(M)
    return {"BLOCK": block, "num_warps": min(max(block // 1024, 1), 32)}


# ---- torch.library -----------------------------------------------------------------------------------------------
@torch.library.custom_op("nanowan::quantize_rows", mutates_args=(), device_types="cuda")
def fused(x: Tensor, activated: bool) -> tuple[Tensor, Tensor]:
    x = x if x.stride(1) == 1 else x.contiguous()
    out, scales = torch.empty(x.shape, dtype=E4M3, device=x.device), x.new_empty(len(x), 1, dtype=torch.float32)
    with launchable(x):
        quantize_kernel[(len(x),)](x, out, scales, x.stride(0), x.shape[1], activated, **tuned(x.shape[1]))
    return out, scales


if INTERPRETED:
    fused.register_kernel("cpu")(fused._init_fn)


@fused.register_fake
def _(x, activated):
    return torch.empty(x.shape, dtype=E4M3, device=x.device), x.new_empty(x.shape[0], 1, dtype=torch.float32)


# ---- public ------------------------------------------------------------------------------------------------------
def quantize_rows(x, activated=False):
    """As quantize_rows_ref."""
    return fused(x, activated)


def check(device, dtype):
    """The largest difference from the reference, as a share of the row's largest value; of odd sizes, a strided input,
    rows of zeros, and values on every step of e4m3 and between two.
    """
    (_, random), worst = seeded(device), 0.0
    steps = torch.arange(1, 127, dtype=torch.uint8).view(E4M3).float()
    halves = torch.cat([steps, (steps[1:] + steps[:-1]) / 2])[None].repeat(2, 1).to(device)
    for x in (random(5, 300), random(3, 2100)[:, ::2], torch.zeros(2, 7, device=device), halves, random(1, 1)):
        x = x.to(dtype)
        (got, scale), (want, want_scale) = quantize_rows(x), quantize_rows_ref(x)
        error = (
            (got.float() * scale - want.float() * want_scale).abs() / (x.float().abs().amax(1, True) + 1e-12)
        ).max()
        worst = max(worst, error.item(), (scale / want_scale - 1).abs().max().item())
    for bad in (torch.nan, torch.inf):
        values, scale = quantize_rows(torch.tensor([[1, bad], [1, 2]], device=device, dtype=dtype))
        assert (values.float() * scale).isnan()[:, 1].tolist() == [True, False]
    return worst


def check_activated(device, dtype):
    """How far the GELU of x comes out from that in fp64, in halves of the step to which e4m3 rounds it; and the largest
    relative difference of a row's scale.
    """
    (_, random), results = seeded(device), []
    for x in (4 * random(5, 300), random(3, 2100)[:, ::2], torch.linspace(-60, 60, 4097, device=device)[None]):
        got, scale = quantize_rows(x.to(dtype), True)
        want = gelu_ref(x.to(dtype).double())
        want_scale = want.abs().amax(1, keepdim=True) / E4M3_MAX
        half_step = (want / want_scale).abs().clamp(min=2.0**-6).log2().floor().exp2() * 2.0**-4
        results.append(
            [((got.double() - want / want_scale).abs() / half_step).max(), (scale / want_scale - 1).abs().max()]
        )
    return [max(values).item() for values in zip(*results)]


def main():
    device, results = "cuda" if torch.cuda.is_available() else "cpu", {}
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        return {"left out": "this GPU has no e4m3"}
    for dtype in (torch.float32, torch.bfloat16):
        # a value that rounding has put on the other side of a half may differ by a step, 32 of 448, on a GPU
        limit = 1e-6 if device == "cpu" else 0.08
        results[f"check {dtype}"] = report(f"quantize_rows, {dtype}", check(device, dtype), limit)
        steps, scales = check_activated(device, dtype)
        results[f"check GELU {dtype}"] = report(f"quantize_rows of a GELU, {dtype}, in half steps", steps, 1.001)
        report(f"the same, scales, {dtype}", scales, 1e-5)
    if device == "cuda":
        for n, m, activated in ((27280, 3072, False), (27280, 14336, False), (27280, 14336, True)):
            x = torch.randn(n, m, device="cuda", dtype=torch.bfloat16)
            runs = (functools.partial(op, x, activated) for op in (quantize_rows, quantize_rows_ref))
            name = f"quantize_rows {n}x{m}{', of a GELU' * activated}"
            results[name] = timed(name, *runs, 3 * n * m)
    return results


if __name__ == "__main__":
    main()
