"""Frozen linears in 8 bits: e4m3 weights, a scale per output channel, half of bf16's memory.

Made from bf16 or fp32 weights while they load (`convert` the empty model first), or read from files with scales, such
as ComfyUI's fp8_scaled, as they are. What else such a file has in 8 bits, outside of blocks or in int8, becomes dense.
GPUs that multiply fp8 matrices (Ada, Hopper and newer) do so, x then being rounded to e4m3 too, with a scale per token;
elsewhere the weight is made dense for the moment. Adapters are added in their own precision.
The format: Micikevicius et al., 2022.
"""

import json
import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

import ops
from checkpoint import BadInput, Entry, put
from kernels.gelu import gelu_backward_
from kernels.quantize import E4M3, quantize_rows_ref

FP8 = (E4M3, torch.float8_e5m2)
# Endings of what stands beside an 8-bit weight: the scale, in ComfyUI's older and its newer files (lightx2v writes both
# too); what is not needed here; and the second scales that only 4-bit weights have
SCALES, IGNORED = (".scale_weight", ".weight_scale"), (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")
NVFP4_SCALES = (".weight_scale_2", ".weight_global_scale")
READ = "of those in few bits, fp8 and plain int8, with one scale or one for each row, are read"
REFUSED = ("nvfp4", "mxfp8", "mxfp4")  # ComfyUI's names of formats


def dense(weight, scale, dtype):
    """What e4m3 weights (n,m) and their scales (n,1) stand for: (n,m) in dtype."""
    return (weight.float() * scale).to(dtype)


def has_fp8_matmul(x, weight):
    """Whether x's device multiplies e4m3 matrices of these sizes with a scale for each row and column; in a plan that
    is made without a GPU, yes.
    """
    fits = x.dtype == torch.bfloat16 and weight.dtype == E4M3 and not any(n % 16 for n in weight.shape)
    return fits and ops.on_gpu(x) and ops.capable(x.device, least=(8, 9))


class Fp8Matmul(torch.autograd.Function):
    """x W^T + b, or gelu(x) W^T + b if `activated`. rows, x_scale: x, or its GELU, in 8 bits; None: the weight is made
    dense. For the backward pass the 8-bit weight is kept, and x where its GELU is taken. The weight gets no gradient.
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
    """The rows of x (...,m), or of its GELU, in 8 bits: (n,m), and their scales (n,1)."""
    return ops.quantize_rows(x.detach().flatten(0, -2), activated)


def project(x, *linears):
    """[m(x) for m in linears], x being rounded once for all that multiply it in 8 bits."""
    native = [isinstance(m, Fp8Linear) and has_fp8_matmul(x, m.weight) for m in linears]
    rows = rows_in_fp8(x) if any(native) else None
    return [m(x, rows=rows) if n else m(x) for m, n in zip(linears, native)]


class Fp8Linear(nn.Linear):
    """A frozen linear whose weight (out,in) is in 8 bits, with `scales` (out,1) fp32. `norm` is the Frobenius norm of
    the weight that it was made from, and `error` that of the difference.

    dtype: e4m3, or what a file has the weight in. Such a weight is taken over unchanged, `norm` is that of what it
    stands for, and there is no `error`, since the original is not known.
    """

    def __init__(self, linear, dtype=E4M3):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.weight = nn.Parameter(linear.weight.to(dtype), requires_grad=False)
        self.register_buffer("scales", torch.empty(self.out_features, 1, device=linear.weight.device), persistent=False)

    def load(self, entry, device, scratch=None):
        """Read the weight (checkpoint.Entry): as it is, where it is in 8 bits with scales, else rounded to e4m3."""
        if not isinstance(entry, ScaledEntry) or entry.stored.dtype not in FP8:
            self.quantize(entry.read_to(device, scratch))
            return
        weight8 = entry.stored.read_to(device, scratch).clone()
        self.scales = entry.scale.read_to(device).float().reshape(-1, 1).expand(self.out_features, 1).contiguous()
        self.norm = dense(weight8, self.scales, torch.float32).norm()
        put(self, "weight", weight8)

    def quantize(self, weight):
        """Set the weight (out,in), rounded to e4m3."""
        weight8, self.scales = quantize_rows_ref(weight)
        self.norm = weight.float().norm()
        self.error = (weight.float() - dense(weight8, self.scales, torch.float32)).norm()
        put(self, "weight", weight8)

    def forward(self, x, activated=False, rows=None):
        """x W^T + b, of the GELU of x if `activated`. rows: rows_in_fp8(x), where that is known."""
        weight = self.weight, self.scales, self.bias
        if has_fp8_matmul(x, self.weight):
            return Fp8Matmul.apply(x, *(rows or rows_in_fp8(x, activated)), *weight, activated)
        return Fp8Matmul.apply(ops.GELU()(x) if activated else x, None, None, *weight, False)


# ---- files with scales -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ScaledEntry(Entry):
    """A tensor that is the product of two in a file: `stored`, in 8 bits, and `scale`, one number or one for each row.
    Read as fp32.
    """

    stored: Entry | None = None
    scale: Entry | None = None

    @property
    def nbytes(self):
        return self.stored.nbytes + self.scale.nbytes

    @property
    def scratch_bytes(self):
        return 4 * self.numel + self.stored.nbytes

    @property
    def format(self):
        return self.stored.format

    def part(self, begin, end):
        stored, scale = self.stored.part(begin, end), self.scale
        scale = scale if scale.numel == 1 else scale.part(begin, end)
        return replace(self, shape=stored.shape, offset=stored.offset, stored=stored, scale=scale)

    def read(self, scratch=None):
        out = torch.empty(self.numel) if scratch is None else scratch[: 4 * self.numel].view(torch.float32)
        out = out.view(self.shape).copy_(self.stored.read(None if scratch is None else scratch[4 * self.numel :]))
        return out.mul_(self.scale.read().float().reshape(-1, *[1] * (len(self.shape) - 1)))


def check_quantization(file, text):
    """Raise BadInput where the JSON by which ComfyUI describes 8-bit weights names a format that is not read. text: str
    or bytes, of one layer or of all, or None.
    """
    try:
        layers = [json.loads(text or "{}")]
    except ValueError:
        raise BadInput(f"{file}: its description of 8-bit weights is not JSON") from None
    while layers:
        layer = layers.pop()
        if not isinstance(layer, dict):
            continue
        name = str(layer.get("format"))
        if layer.get("convrot") or name.startswith("convrot"):
            name = "ConvRot, which rotates them"
        if name.startswith("ConvRot") or name in REFUSED:
            raise BadInput(f"{file}: weights in {name}; {READ}")
        layers += layer.values()


def apply_scales(entries):
    """Make every weight with a scale in a model's headers a ScaledEntry, and take the scales out, with what else
    ComfyUI writes beside them. BadInput for formats of 8 and fewer bits that are not read.
    """
    scales = {}
    for name in [n for n in entries if n.endswith(SCALES + IGNORED + NVFP4_SCALES)]:
        entry = entries.pop(name)
        if name.endswith(NVFP4_SCALES):
            raise BadInput(
                f"{entry.file}: weights in nvfp4; of those in 8 bits, fp8 and plain int8 with scales are read"
            )
        if name.endswith(".comfy_quant"):
            check_quantization(entry.file, entry.read().numpy().tobytes())
        if name.endswith(SCALES):
            scales[name.rpartition(".")[0]] = entry
    for name, scale in scales.items():
        weight = entries.get(f"{name}.weight")
        if weight is None or scale.numel not in (1, weight.shape[0]) or not scale.dtype.is_floating_point:
            what = "no such weight" if weight is None else f"a weight {weight.shape} in {weight.format}"
            raise BadInput(f"{scale.file}: {name} has scales {scale.shape} in {scale.format} and {what}; {READ}")
        entries[f"{name}.weight"] = ScaledEntry(
            weight.file, torch.float32, weight.shape, weight.offset, stored=weight, scale=scale
        )
    for name, entry in entries.items():
        if name.endswith(".weight") and entry.dtype in (torch.int8, torch.uint8):
            raise BadInput(f"{entry.file}: {name} is in {entry.format} and has no scale")


def linears_in_fp8(entries):
    """{name: dtype} of the linears in a DiT's blocks that a file has in fp8 with scales: those stay in 8 bits."""
    return {
        name.removesuffix(".weight"): entry.stored.dtype
        for name, entry in entries.items()
        if name.startswith("blocks.") and isinstance(entry, ScaledEntry) and entry.stored.dtype in FP8
    }


def convert(model, dtypes=None):
    """Replace the linears in an empty DiT's blocks by ones in 8 bits: all of them, or those that `dtypes` (of
    linears_in_fp8) names. Linears outside of blocks stay dense.
    """
    for name, linear in list(model.blocks.named_modules(prefix="blocks")):
        if isinstance(linear, nn.Linear) and (not dtypes or name in dtypes):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, Fp8Linear(linear, (dtypes or {}).get(name, E4M3)))


# ---- what 8 bits cost --------------------------------------------------------------------------------------------
def total_norm(norms):
    """The norm of several tensors together, from the norm of each."""
    return math.hypot(*(n.item() for n in norms))


def report(model):
    """A line with the error of 8-bit weights per kind: the norm of the difference over that of the weights, of all
    blocks together. None where no error is known.
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
