"""LoRA: W + (alpha/rank) B A on chosen linears of a built model; inject, merge, save, load, convert. Hu et al., 2021.

A target is the tail of a module's name within a block: self_attn.{q,k,v,o}, cross_attn.{q,k,v,o}, ffn.0, ffn.2.
Files are written so that ComfyUI, lightx2v and diffusers all read them alike: keys `diffusion_model.NAME.lora_A.weight`
and `.lora_B.weight`, alpha/rank folded into B, no alpha key. Read are those, kohya's and PEFT's names.
"""

import json
import math
import re
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from checkpoint import BadInput, load, save

TARGETS = tuple(f"{attn}.{p}" for attn in ("self_attn", "cross_attn") for p in "qkvo") + ("ffn.0", "ffn.2")


class LoRALinear(nn.Linear):
    """A frozen linear, of whatever class, with its own name and weight, plus scale * B A x. A and B are fp32 whatever
    the weight is.
    """

    @staticmethod
    def over(linear, rank, alpha, dropout=0.0, device=None):
        """Turn a linear into this, in place."""
        own = type(linear)
        if not isinstance(linear, LoRALinear):
            linear.__class__ = type(f"LoRA{own.__name__}", (LoRALinear, own), {})
        linear.scale, linear.dropout = alpha / rank, nn.Dropout(dropout)
        device = device or linear.weight.device
        linear.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, device=device))
        linear.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
        nn.init.kaiming_uniform_(linear.lora_A, a=math.sqrt(5))

    def forward(self, x):
        low = F.linear(self.dropout(x), self.lora_A.to(x.dtype))
        return super().forward(x) + F.linear(low, (self.scale * self.lora_B).to(x.dtype))


def parse_blocks(text, total):
    """ "20-29" or "0,3,5-7" -> sorted block numbers; None or "" -> all."""
    if not text:
        return list(range(total))
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise BadInput(f"--blocks {text}: give block numbers such as 20-29 or 0,3,5-7")
    found = set()
    for part in text.split(","):
        a, _, b = part.partition("-")
        found |= set(range(int(a), min(int(b or a), total) + 1))
    if not found or max(found) >= total:
        raise BadInput(f"--blocks {text}: this model has blocks 0 to {total - 1}")
    return sorted(found)


def inject(model, targets=("cross_attn.k", "cross_attn.v"), rank=16, alpha=16, dropout=0.0, blocks=None, device=None):
    """Put a LoRA on every target of the given blocks (default all) and freeze everything else, in place.

    targets: of TARGETS. rank: 1 or more. blocks: list of block numbers. device: of the adapters, where that is not the
    weights' (a model still empty). Returns the trainable parameters, A and B in turn, fp32. B starts at zero, so the
    model's output does not change.
    """
    unknown = [t for t in targets if t not in TARGETS]
    if unknown or not targets:
        raise BadInput(f"--targets {','.join(targets)}: choose from {', '.join(TARGETS)}")
    if rank < 1:
        raise BadInput(f"--rank {rank}: at least 1")
    model.requires_grad_(False)
    params = []
    for i in range(len(model.blocks)) if blocks is None else blocks:
        for target in targets:
            layer = model.blocks[i].get_submodule(target)
            LoRALinear.over(layer, rank, alpha, dropout, device)
            params += [layer.lora_A, layer.lora_B]
    return params


def layers(model):
    """{module name: LoRALinear} of an injected model."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def adapter(model):
    """{module name: (A, B)}, the trainable parameters of an injected model."""
    return {name: (m.lora_A, m.lora_B) for name, m in layers(model).items()}


def attach(model, pairs):
    """Let an injected model use these parameters instead of its own."""
    for name, m in layers(model).items():
        m.lora_A, m.lora_B = pairs[name]


@torch.no_grad()
def start_from(pairs, path, scale):
    """Fill an adapter with a LoRA file's weights. Raises BadInput unless modules and rank are the same."""
    given, _ = read_lora(path)
    shape = lambda p: {n: (tuple(a.shape), tuple(b.shape)) for n, (a, b) in p.items()}
    want, have = shape(pairs), shape(given)
    if want != have:
        odd = sorted(n for n in want.keys() | have.keys() if want.get(n) != have.get(n))
        raise BadInput(
            f"--init_lora {path}: {len(odd)} modules differ from what --targets, --blocks and --rank ask for, such as {odd[0]}: "
            f"A and B are {have.get(odd[0], 'not there')}, asked for are {want.get(odd[0], 'none')}"
        )
    for name, (a, b) in pairs.items():
        a.copy_(given[name][0])
        b.copy_(given[name][1] / scale)


@torch.no_grad()
def norms(model):
    """{module name: Frobenius norm () of its frozen weight} of an injected model."""
    return {name: m.norm if hasattr(m, "norm") else m.weight.float().norm() for name, m in layers(model).items()}


@torch.no_grad()
def clamp_weight_norm(pairs, scale, base, cap):
    """Scale down every dW = scale * B A whose Frobenius norm exceeds `cap` times that of its weight, base[name] ().
    Through the r x r products B^T B and A A^T; dW is never formed. Returns how many there were.
    """
    held = torch.zeros(())
    for name, (a, b) in pairs.items():
        norm = scale * ((b.t() @ b) * (a @ a.t())).sum().clamp(min=0).sqrt()
        factor = (cap * base[name] / norm.clamp(min=1e-30)).clamp(max=1)
        b.mul_(factor)
        held += (factor < 1).cpu()
    return int(held)


def save_lora(path, model, **metadata):
    """Write the adapter of an injected model."""
    write_lora(path, adapter(model), next(iter(layers(model).values())).scale, **metadata)


def write_lora(path, pairs, scale=1.0, **metadata):
    """Write an adapter {module name: (A, B)} whose dW is scale * B A (see the top of this file). Rank, targets and
    blocks join the metadata.
    """
    tensors, parts = {}, [re.match(r"blocks\.(\d+)\.(.+)", name).groups() for name in pairs]
    for name, (a, b) in pairs.items():
        tensors[f"diffusion_model.{name}.lora_A.weight"] = a
        tensors[f"diffusion_model.{name}.lora_B.weight"] = b * scale
    rank = len(next(iter(pairs.values()))[0])
    save(
        path,
        tensors,
        {
            "rank": rank,
            "alpha": scale * rank,
            "alpha_folded": True,
            "targets": ",".join(sorted({t for _, t in parts})),
            "blocks": ",".join(map(str, sorted({int(i) for i, _ in parts}))),
            **metadata,
        },
    )


PEFT_NAMES = [
    ("attn1.", "self_attn."),
    ("attn2.", "cross_attn."),
    (".to_q", ".q"),
    (".to_k", ".k"),
    (".to_v", ".v"),
    (".to_out.0", ".o"),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
]
KINDS = {"lora_A": "A", "lora_down": "A", "lora_B": "B", "lora_up": "B", "alpha": "alpha"}


def official_name(key):
    """A LoRA file's key -> (official module name, "A" | "B" | "alpha"), or None if it is no LoRA key of this model
    family.
    """
    m = re.fullmatch(r"(.+?)\.(lora_A|lora_B|lora_down|lora_up|alpha)(?:\.default)?(?:\.weight)?", key)
    if not m:
        return None
    name, kind = m.groups()
    if name.startswith("lora_unet_"):  # kohya writes dots as underscores
        m = re.fullmatch(r"blocks_(\d+)_(self_attn|cross_attn|ffn)_([qkvo02])", name.removeprefix("lora_unet_"))
        name = "blocks.{}.{}.{}".format(*m.groups()) if m else name
    else:
        for prefix in ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer."):
            name = name.removeprefix(prefix)
        for a, b in PEFT_NAMES:
            name = name.replace(a, b)
    m = re.fullmatch(r"blocks\.\d+\.(.+)", name)
    return (name, KINDS[kind]) if m and m.group(1) in TARGETS else None


def read_lora(path):
    """A LoRA file in any of the known layouts -> ({module name: (A, B)}, metadata), alpha folded into B, fp32.
    Raises BadInput for keys it does not know: a file is never half loaded."""
    tensors, metadata = load(path)
    found, unknown = {}, []
    for key, tensor in tensors.items():
        place = official_name(key)
        if place is None:
            unknown.append(key)
        else:
            found.setdefault(place[0], {})[place[1]] = tensor.float()
    fits = lambda p: {"A", "B"} <= set(p) and p["A"].dim() == p["B"].dim() == 2 and 0 < len(p["A"]) == p["B"].shape[1]
    broken = [n for n, p in found.items() if not fits(p) or p.get("alpha", torch.zeros(1)).numel() != 1]
    if unknown or broken or not found:
        raise BadInput(
            f"{path}: not a LoRA for Wan's blocks: {len(unknown)} unknown keys {unknown[:3]}, "
            f"{len(broken)} modules without a matching pair {broken[:3]}, {len(found)} usable"
        )
    default = _default_alpha(Path(path), metadata, any(k.startswith("base_model.") for k in tensors))
    result = {}
    for name, p in found.items():
        rank = len(p["A"])
        alpha = p["alpha"].item() if "alpha" in p else rank if default is None else default
        result[name] = (p["A"], p["B"] * (alpha / rank))
    return result, metadata


def _default_alpha(path, metadata, peft):
    """The alpha of a file without alpha keys, or None for the rank (a scale of 1): diffusers keeps it in the file's
    metadata, PEFT in adapter_config.json beside the file.
    """
    config, source = {}, path
    try:
        if "lora_adapter_metadata" in metadata:
            config = json.loads(metadata["lora_adapter_metadata"])
        elif peft:
            source = path.with_name("adapter_config.json")
            config = json.loads(source.read_text())
    except (ValueError, OSError) as e:
        raise BadInput(f"{source}: should hold the alpha of {path.name} ({e})") from None
    config = {k.rpartition(".")[2]: v for k, v in config.items()}
    if config.get("use_rslora") or config.get("use_dora") or config.get("alpha_pattern") or config.get("rank_pattern"):
        raise BadInput(f"{path}: uses a PEFT variant (rslora, dora, or alpha and rank patterns) that is not read here")
    return config.get("lora_alpha")


def named_expert(spec):
    """FILE:high or FILE:low -> (FILE, that expert); anything else -> (itself, None)."""
    file, _, expert = spec.rpartition(":")
    return (file, expert) if file and expert in ("high", "low") else (spec, None)


def check_fit(path, pairs, shapes):
    """Raises BadInput unless every pair of a LoRA file has a weight of its shape. shapes: {module name: (out, in)}."""
    bad = [
        f"{n} ({b.shape[0]}x{a.shape[1]} for {'x'.join(map(str, shapes[n])) if n in shapes else 'no such module'})"
        for n, (a, b) in pairs.items()
        if shapes.get(n) != (b.shape[0], a.shape[1])
    ]
    if bad:
        raise BadInput(f"{path}: does not fit this model: {len(bad)} of {len(pairs)} modules, {', '.join(bad[:3])}")


@torch.no_grad()
def merge(model, path, weight=1.0):
    """Add weight * B A of a LoRA file to the model's weights, in place; the sum is rounded once, to the weights' dtype.
    Beside 8-bit weights it stays. Raises BadInput, before anything is changed, if a module is missing or has another
    shape.
    """
    pairs, modules = read_lora(path)[0], dict(model.named_modules())
    check_fit(path, pairs, {name: m.weight.shape for name, m in modules.items() if name in pairs})
    for name, (a, b) in pairs.items():
        w = modules[name].weight
        if w.dtype.itemsize == 1:
            _beside(modules[name], a, weight * b)
        else:
            w.copy_(w.float() + weight * (b.to(w.device) @ a.to(w.device)))


def _beside(linear, a, b):
    """Let B A stay beside a linear: added to an 8-bit weight, most of it would be rounded away. A further one makes the
    rank larger.
    """
    if isinstance(linear, LoRALinear):
        a, b = (
            torch.cat([linear.lora_A.data, a.to(linear.lora_A)]),
            torch.cat([linear.scale * linear.lora_B.data, b.to(linear.lora_B)], 1),
        )
    LoRALinear.over(linear, len(a), len(a))
    linear.requires_grad_(False)
    linear.lora_A.copy_(a)
    linear.lora_B.copy_(b)
