"""Frozen linears in 8 bits: e4m3 weights, a scale per output channel, half of bf16's memory.

Made from bf16 or fp32 weights while they load (`convert` the empty model first), or read from ComfyUI's fp8_scaled
files as they are. GPUs that multiply fp8 matrices (Ada, Hopper and newer) do so, x then being rounded to e4m3 too, with
a scale per token; elsewhere the weight is made dense for the moment. Adapters are added in their own precision.
The format: Micikevicius et al., 2022.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from checkpoint import BadInput, put

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max  # 448
# Endings of what ComfyUI writes beside an fp8 weight, in its older and its newer files: the scale, and what is not
# needed here
SCALES, IGNORED = (".scale_weight", ".weight_scale"), (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")


def quantize_rows(x):
    """x (n,m) of any float type -> e4m3 (n,m), and the scale (n,1) fp32 of each row: x is about their product."""
    scale = x.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / E4M3_MAX  # a row of zeros has a scale too
    return (x.float() / scale).to(E4M3), scale


def dense(weight, scale, dtype):
    """The inverse of quantize_rows: (n,m) in dtype."""
    return (weight.float() * scale).to(dtype)


def has_fp8_matmul(x, weight):
    """Whether x's device multiplies e4m3 matrices of these sizes with a scale for each row and column."""
    return (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(x.device) >= (8, 9)
        and not any(n % 16 for n in weight.shape)
    )


class Fp8Matmul(torch.autograd.Function):
    """x W^T + b; for the backward pass nothing but the 8-bit weight is kept. The weight gets no gradient."""

    @staticmethod
    def forward(ctx, x, weight, scale, bias):
        ctx.save_for_backward(weight, scale)
        if not has_fp8_matmul(x, weight):
            return F.linear(x, dense(weight, scale, x.dtype), bias)
        x8, x_scale = quantize_rows(x.flatten(0, -2))
        options = dict(bias=bias, out_dtype=x.dtype, use_fast_accum=True)
        y = torch._scaled_mm(x8, weight.t(), scale_a=x_scale, scale_b=scale.t().contiguous(), **options)
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, dy):
        weight, scale = ctx.saved_tensors
        return dy @ dense(weight, scale, dy.dtype), None, None, None


class Fp8Linear(nn.Linear):
    """A frozen linear whose weight (out,in) is e4m3, with `scales` (out,1) fp32. `norm` is the Frobenius norm of the
    weight that it was made from, and `error` that of the difference.

    scale_entry: the checkpoint.Entry of the scales of a weight that is stored in 8 bits: it is taken over unchanged,
    `norm` is that of what it stands for, and there is no `error`, since the original is not known.
    """

    def __init__(self, linear, scale_entry=None):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.scale_entry = scale_entry
        self.weight = nn.Parameter(linear.weight.to(E4M3), requires_grad=False)
        self.register_buffer("scales", torch.empty(self.out_features, 1, device=linear.weight.device), persistent=False)

    def quantize(self, weight):
        """Set the weight (out,in) that was read. BadInput where an 8-bit one and its scales do not fit."""
        if self.scale_entry is None:
            weight8, self.scales = quantize_rows(weight)
            self.norm = weight.float().norm()
            self.error = (weight.float() - dense(weight8, self.scales, torch.float32)).norm()
        else:
            weight8, scale = weight.clone(), self.scale_entry.read().float().to(weight.device)
            if weight.dtype != E4M3 or scale.numel() not in (1, self.out_features):
                raise BadInput(
                    f"{self.scale_entry.file}: a weight {tuple(weight.shape)} in {weight.dtype} with {scale.numel()} "
                    f"scales; expected e4m3, and 1 or {self.out_features}"
                )
            self.scales = scale.reshape(-1, 1).expand(self.out_features, 1).contiguous()
            self.norm = dense(weight8, self.scales, torch.float32).norm()
        put(self, "weight", weight8)

    def forward(self, x):
        return Fp8Matmul.apply(x, self.weight, self.scales, self.bias)


def take_scales(entries):
    """Take ComfyUI's additions out of a model's headers: {name of a linear: Entry of its scale}."""
    scales = {name.removesuffix(end): entries[name] for name in entries for end in SCALES if name.endswith(end)}
    for name in [n for n in entries if n.endswith(SCALES + IGNORED)]:
        del entries[name]
    return scales


def convert(model, scales):
    """Replace the linears in an empty DiT's blocks by ones in 8 bits; with `scales` (of take_scales), those only that
    have one. Linears outside of blocks stay dense, so BadInput where one of them has a scale.
    """
    outside = [name for name in scales if not name.startswith("blocks.")]
    if outside:
        raise BadInput(f"{scales[outside[0]].file}: {outside[0]} is in 8 bits; only the linears of blocks can be")
    for name, linear in list(model.blocks.named_modules(prefix="blocks")):
        if isinstance(linear, nn.Linear) and (not scales or name in scales):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, Fp8Linear(linear, scales.get(name)))


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
