"""LoRA (Hu et al., 2021), W + (alpha/rank) B A for chosen linears of a DiT: inject, switch off, clamp, merge.

    params = inject(dit, targets=("cross_attn.k", "cross_attn.v"), rank=16, alpha=16)   # train these parameters, or
    merge(dit, read_lora(file), weight=0.8)                                             # add a trained LoRA for good

Files: nanowan.formats.read_lora, and nanowan/formats/lora.py.
"""

import contextlib
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

# the linears that can be adapted, by the ends of their names within a block
TARGETS = tuple(f"{attn}.{p}" for attn in ("self_attn", "cross_attn") for p in "qkvo") + ("ffn.0", "ffn.2")


class LoRALinear(nn.Module):
    """The frozen linear `base` plus scale * B A; scale = alpha / rank. A (rank,in) and B (out,rank) are always fp32."""

    takes_gelu = False

    def __init__(self, base, rank, alpha, dropout=0.0, device=None):
        super().__init__()
        self.base, self.scale, self.enabled = base, alpha / rank, True
        self.dropout = nn.Dropout(dropout)
        device = device or base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.train(base.training)

    def forward(self, x, rows=None):
        """x (...,in) -> (...,out). rows: the result of round_input(x), if known, for an 8-bit base (kernels/fp8.py)."""
        y = self.base(x) if rows is None else self.base(x, rows=rows)
        if not self.enabled:
            return y
        low, b = F.linear(self.dropout(x), self.lora_A.to(x.dtype)), (self.scale * self.lora_B).to(x.dtype)
        if torch.is_grad_enabled():
            return y + F.linear(low, b)
        y.view(-1, y.shape[-1]).addmm_(low.flatten(0, -2), b.t())  # in place, which saves two passes over y
        return y

    def with_gelu(self, x, gelu):
        return gelu(self(x))

    def round_input(self, x):
        return self.base.round_input(x)


def base_name(name):
    """Return the name that a parameter of a model with adapters has in the base model and in files."""
    return name.replace(".base.", ".")


def inject(model, targets=("cross_attn.k", "cross_attn.v"), rank=16, alpha=16, dropout=0.0, blocks=None, device=None):
    """Add a LoRA to every target in the given blocks (default: all) and freeze everything else, in place.

    targets: names in TARGETS, or further names that the variant's linear_name knows. rank: 1 or more. blocks: block
    numbers. device: of A and B (default: the weights' device, which may be meta). Returns the trainable parameters: A
    and B of each target, fp32. B starts at zero, so the model's output does not change. Raises ValueError for a rank
    below 1, for a target that the model does not have, or if there is nothing to adapt.
    """
    if rank < 1:
        raise ValueError(f"rank {rank}: at least 1")
    model.requires_grad_(False)
    blocks, modules, params = range(len(model.blocks)) if blocks is None else blocks, dict(model.named_modules()), []
    for block in blocks:
        for name in filter(None, (model.linear_name(block, target) for target in targets)):
            if name not in modules:
                raise ValueError(f"target {name}: this model has no such linear")
            layer = LoRALinear(modules[name], rank, alpha, dropout, device)
            model.set_submodule(name, layer)
            params += [layer.lora_A, layer.lora_B]
    if not params:
        raise ValueError(f"targets {', '.join(targets)}: there are none in blocks {', '.join(map(str, blocks))}")
    return params


def lora_layers(model):
    """Return {module name: LoRALinear} of a model with adapters."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def adapter(model):
    """Return {module name: (A, B)}, the trainable parameters of a model with adapters."""
    return {name: (m.lora_A, m.lora_B) for name, m in lora_layers(model).items()}


@contextlib.contextmanager
def adapter_off(model):
    """Within this context, a model with adapters computes what its frozen base model computes."""
    layers = lora_layers(model).values()
    for m in layers:
        m.enabled = False
    try:
        yield
    finally:
        for m in layers:
            m.enabled = True


@torch.no_grad()
def weight_norms(model):
    """Return {module name: Frobenius norm () of the frozen weight} for each LoRALinear of a model."""
    bases = {name: m.base for name, m in lora_layers(model).items()}
    return {name: b.norm if hasattr(b, "norm") else b.weight.float().norm() for name, b in bases.items()}


def change_norm(a, b, scale):
    """Return the Frobenius norm () of dW = scale * B A, from B^T B and A A^T (rank,rank), without forming dW."""
    return scale * ((b.t() @ b) * (a @ a.t())).sum().clamp(min=0).sqrt()


@torch.no_grad()
def clamp_weight_norm(pairs, scale, norms, cap):
    """Scale down, in place, each dW = scale * B A whose Frobenius norm exceeds cap * norms[name]. pairs: {name: (A,
    B)}; norms: {name: Frobenius norm () of the weight}. Returns how many dW were scaled down.
    """
    clamped = torch.zeros(())
    for name, (a, b) in pairs.items():
        norm = change_norm(a, b, scale)
        factor = (cap * norms[name] / norm.clamp(min=1e-30)).clamp(max=1)
        b.mul_(factor)
        clamped += (factor < 1).cpu()
    return int(clamped)


@torch.no_grad()
def merge(model, changes, weight=1.0):
    """Add `weight` * change to each parameter that `changes` names, in place, rounded once to the parameter's dtype.

    changes: {parameter name: Change} (nanowan/formats/lora.py). Rounding to 8 bits would lose most of a change. So an
    8-bit parameter stays unchanged, and a LoRALinear around its linear adds the change. Raises ValueError, before
    anything is changed, if the change of an 8-bit parameter is not of low rank.
    """
    parameters = {base_name(name): p for name, p in model.named_parameters()}
    beside = {name: change.factors() for name, change in changes.items() if parameters[name].dtype.itemsize == 1}
    if lost := [name for name, factors in beside.items() if factors is None]:
        raise ValueError(
            f"changes {len(lost)} weights that are in 8 bits here, such as {lost[0]}, by more than a low rank: rounded "
            "to 8 bits, most of it would be lost; use the model in bf16"
        )
    for name, change in changes.items():
        if name in beside:
            _add_beside(model, name.removesuffix(".weight"), *beside.pop(name), weight)
        else:
            change.add_to(parameters[name], weight)


def _add_beside(model, name, a, b, weight):
    """Wrap the linear `name` in a LoRALinear that adds weight * B A; an existing LoRALinear grows in rank instead."""
    linear = model.get_submodule(name)
    device = linear.lora_A.device if isinstance(linear, LoRALinear) else linear.weight.device
    if device.type != "meta":  # weights on meta arrive later, from another rank
        a, b = a.to(device), b.to(device)
    b = weight * b
    if isinstance(linear, LoRALinear):
        a, b, linear = torch.cat([linear.lora_A, a]), torch.cat([linear.scale * linear.lora_B, b], 1), linear.base
    layer = LoRALinear(linear, len(a), len(a), device=a.device).requires_grad_(False)
    layer.lora_A.copy_(a)
    layer.lora_B.copy_(b)
    model.set_submodule(name, layer)
