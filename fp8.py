"""Frozen linears in 8 bits: e4m3 weights, a scale per output channel, half of bf16's memory.

Made from bf16 or fp32 weights while they load (`convert` the empty model first), or read from ComfyUI's fp8_scaled
files as they are. A product is the GPU's own fp8 one where there is that (Ada, Hopper and newer; x is then rounded to
e4m3 too, with a scale per token), and elsewhere the weight, made dense for the moment. Adapters are added in their own
precision. The format: Micikevicius et al., 2022.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from checkpoint import BadInput, put

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
# What ComfyUI writes beside an fp8 weight, in its older and its newer files: the scale, and what is not needed here
SCALES, IGNORED = (".scale_weight", ".weight_scale"), (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")


def rounded(x):
    """x (n,m) of any float type -> e4m3 (n,m), and the scale (n,1) fp32 of each row: x is about their product."""
    scale = x.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / LARGEST
    return (x.float() / scale).to(E4M3), scale


def dense(weight, scale, dtype):
    return (weight.float() * scale).to(dtype)


def fp8_products(x, weight):
    """Whether x's device multiplies e4m3 matrices of these sizes with a scale for each row and column."""
    return (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(x.device) >= (8, 9)
        and not any(n % 16 for n in weight.shape)
    )


class Product(torch.autograd.Function):
    """x W^T + b; for the backward pass nothing but the 8-bit weight is kept."""

    @staticmethod
    def forward(ctx, x, weight, scale, bias):
        ctx.save_for_backward(weight, scale)
        if not fp8_products(x, weight):
            return F.linear(x, dense(weight, scale, x.dtype), bias)
        rows, by_row = rounded(x.flatten(0, -2))
        y = torch._scaled_mm(
            rows,
            weight.t(),
            scale_a=by_row,
            scale_b=scale.t().contiguous(),
            bias=bias,
            out_dtype=x.dtype,
            use_fast_accum=True,
        )
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, dy):
        weight, scale = ctx.saved_tensors
        return dy @ dense(weight, scale, dy.dtype), None, None, None


class Fp8Linear(nn.Linear):
    """A frozen linear whose weight (out,in) is e4m3, with `scales` (out,1) fp32. `norm` and `error` are the Frobenius
    norms of the weight that it was made from and of the difference; given scales, 8-bit weights are taken over
    unchanged, and their error is not known.
    """

    def __init__(self, linear, given=None):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias, self.given = (
            linear.in_features,
            linear.out_features,
            linear.bias,
            given,
        )
        self.weight = nn.Parameter(linear.weight.to(E4M3), requires_grad=False)
        self.register_buffer("scales", torch.empty(self.out_features, 1, device=linear.weight.device), persistent=False)

    def quantize(self, weight):
        """Take over a weight that was read."""
        if self.given is None:
            eight, self.scales = rounded(weight)
            self.norm, self.error = (
                t.float().norm() for t in (weight, weight.float() - dense(eight, self.scales, torch.float32))
            )
        else:
            eight, scale = weight.clone(), self.given.read().float().to(weight.device)
            if weight.dtype != E4M3 or scale.numel() not in (1, self.out_features):
                raise BadInput(
                    f"{self.given.file}: a weight {tuple(weight.shape)} in {weight.dtype} with {scale.numel()} scales; expected e4m3, and 1 or {self.out_features}"
                )
            self.scales = scale.reshape(-1, 1).expand(self.out_features, 1).contiguous()
            self.norm = dense(eight, self.scales, torch.float32).norm()
        put(self, "weight", eight)

    def forward(self, x):
        return Product.apply(x, self.weight, self.scales, self.bias)


def take_scales(entries):
    """Take ComfyUI's additions out of a model's headers: {name of a linear: Entry of its scale}."""
    found = {name.removesuffix(end): entries[name] for name in entries for end in SCALES if name.endswith(end)}
    for name in [n for n in entries if n.endswith(SCALES + IGNORED)]:
        del entries[name]
    return found


def convert(model, scales):
    """Give an empty DiT linears in 8 bits in all of its blocks; with `scales`, in those places only that have one.
    Linears outside of blocks stay dense, so BadInput where one of them has a scale.
    """
    stray = [name for name in scales if not name.startswith("blocks.")]
    if stray:
        raise BadInput(f"{scales[stray[0]].file}: {stray[0]} is in 8 bits; only the linears of blocks can be")
    for name, linear in list(model.blocks.named_modules(prefix="blocks")):
        if isinstance(linear, nn.Linear) and (not scales or name in scales):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, Fp8Linear(linear, scales.get(name)))


def report(model):
    """The error of 8-bit weights, per kind: the norm of the difference over that of the weights, of all blocks
    together. None without any.
    """
    kinds = {}
    for name, m in model.named_modules():
        if hasattr(m, "error"):
            kinds.setdefault(name.split(".", 2)[2], []).append(m)
    together = lambda values: math.hypot(*(v.item() for v in values))
    errors = {
        kind: together(m.error for m in ms) / max(together(m.norm for m in ms), 1e-30) for kind, ms in kinds.items()
    }
    return (
        "fp8 weights, relative error: " + ", ".join(f"{kind} {100 * e:.2f} %" for kind, e in errors.items())
        if errors
        else None
    )
