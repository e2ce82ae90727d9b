"""LoRA (Hu et al., 2021), W + (alpha/rank) B A on chosen linears of a built model: injected, trained, saved, merged.

Files are written so that ComfyUI, lightx2v and diffusers all read them alike: keys `diffusion_model.NAME.lora_A.weight`
and `.lora_B.weight`, alpha/rank folded into B, no alpha key. What is read, and how, is in lora_files.py.
"""

import contextlib
import json
import math
import re
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from checkpoint import BadInput, save
from lora_files import IMAGE_BRANCH, read_lora

# What can be trained: the ends of modules' names within a block; in every model, in Animate's, and in S2V's
TARGETS = tuple(f"{attn}.{p}" for attn in ("self_attn", "cross_attn") for p in "qkvo") + ("ffn.0", "ffn.2")
ANIMATE_TARGETS = ("cross_attn.k_img", "cross_attn.v_img")
S2V_TARGETS = tuple(f"audio_injector.{p}" for p in "qkvo")


def check_fit(path, changes, shapes):
    """The changes that a model takes: all but those of Wan 2.1's image branch, where the model has none.

    shapes: {parameter name: shape} of the model. Raises BadInput for a change without a parameter of its shape, and
    where nothing is left.
    """
    branch = any(IMAGE_BRANCH.match(name) for name in shapes)
    taken = {name: change for name, change in changes.items() if branch or not IMAGE_BRANCH.match(name)}
    if not taken:
        raise BadInput(f"{path}: does not fit this model: changes an image branch only, which the model does not have")

    def without_ones(shape):
        return [n for n in shape if n > 1]

    def fits(change, shape):  # a convolution's change may be flat, and sides of one element may be there or not
        flat = shape and (shape[0], math.prod(shape[1:]))
        return flat and without_ones(change.shape) in (without_ones(shape), without_ones(flat))

    def times(shape):
        return "x".join(map(str, shape))

    bad = [
        f"{name} ({times(c.shape)} for {times(shapes[name]) if name in shapes else 'no such parameter'})"
        for name, c in taken.items()
        if not fits(c, shapes.get(name))
    ]
    if bad:
        raise BadInput(f"{path}: does not fit this model: {len(bad)} of {len(changes)} changes, {', '.join(bad[:3])}")
    return taken


@torch.no_grad()
def merge(model, path, weight=1.0, expert=None):
    """Add weight times a LoRA file's changes to the model's parameters, in place; each sum is rounded once, to the
    parameter's dtype. Beside 8-bit weights a low-rank change stays as it is.

    expert: "high" or "low", which half of a file that holds both. Raises BadInput, before anything is changed, for what
    read_lora and check_fit refuse, and for a change of an 8-bit weight that is not of low rank.
    """
    changes, parameters = read_lora(path, expert)[0], dict(model.named_parameters())
    taken = check_fit(path, changes, {name: p.shape for name, p in parameters.items()})
    beside = {name: change.factors() for name, change in taken.items() if parameters[name].dtype.itemsize == 1}
    lost = [name for name, pair in beside.items() if pair is None]
    if lost:
        raise BadInput(
            f"{path}: changes {len(lost)} weights that are in 8 bits here, such as {lost[0]}, by more than a low rank: "
            "rounded to 8 bits, most of it would be lost; use the model in bf16"
        )
    for name, change in taken.items():
        if name in beside:
            _keep_beside(model.get_submodule(name.removesuffix(".weight")), *beside.pop(name), weight)
        else:
            change.add_to(parameters[name], weight)
    if len(taken) < len(changes):
        print(f"{path}: {len(changes) - len(taken)} changes of an image branch skipped, which this model does not have")


# ---- training ----------------------------------------------------------------------------------------------------
class LoRALinear(nn.Linear):
    """A frozen linear, of whatever class, with its own name and weight, plus scale * B A x. A and B are fp32 whatever
    the weight is.
    """

    enabled = True

    @staticmethod
    def wrap(linear, rank, alpha, dropout=0.0, device=None):
        """Turn a linear into this, in place."""
        own = type(linear)
        if not isinstance(linear, LoRALinear):
            linear.__class__ = type(f"LoRA{own.__name__}", (LoRALinear, own), {})
        linear.scale, linear.dropout = alpha / rank, nn.Dropout(dropout).train(linear.training)
        device = device or linear.weight.device
        linear.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, device=device))
        linear.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
        nn.init.kaiming_uniform_(linear.lora_A, a=math.sqrt(5))

    def forward(self, x, **how):
        """how: what the linear's own class takes beside x, but for `activated`: A is given x as it is."""
        assert not how.get("activated")
        if not self.enabled:
            return super().forward(x, **how)
        low = F.linear(self.dropout(x), self.lora_A.to(x.dtype))
        return super().forward(x, **how) + F.linear(low, (self.scale * self.lora_B).to(x.dtype))


def _keep_beside(linear, a, b, weight):
    """Let weight * B A stay beside a linear: added to an 8-bit weight, most of it would be rounded away. A further one
    makes the rank larger.
    """
    a, b = a.to(linear.weight.device), weight * b.to(linear.weight.device)
    if isinstance(linear, LoRALinear):
        a, b = torch.cat([linear.lora_A, a]), torch.cat([linear.scale * linear.lora_B, b], 1)
    LoRALinear.wrap(linear, len(a), len(a))
    linear.requires_grad_(False)
    linear.lora_A.copy_(a)
    linear.lora_B.copy_(b)


def parse_blocks(text, total):
    """ "20-29" or "0,3,5-7" -> sorted block numbers; None or "" -> all."""
    if not text:
        return list(range(total))
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise BadInput(f"--blocks {text}: give block numbers such as 20-29 or 0,3,5-7")
    blocks = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        blocks |= set(range(int(first), min(int(last or first), total) + 1))
    if not blocks or max(blocks) >= total:
        raise BadInput(f"--blocks {text}: this model has blocks 0 to {total - 1}")
    return sorted(blocks)


def inject(model, targets=("cross_attn.k", "cross_attn.v"), rank=16, alpha=16, dropout=0.0, blocks=None, device=None):
    """Put a LoRA on every target of the given blocks (default all) and freeze everything else, in place.

    targets: of TARGETS, and Animate's or S2V's own; audio_injector.q is that of the injectors behind these blocks.
    rank: 1 or more. blocks: list of block numbers. device: of the adapters, where that is not the weights' (a model
    still empty). Returns the trainable parameters, A and B in turn, fp32. B starts at zero, so the model's output does
    not change.
    """
    known = TARGETS + ANIMATE_TARGETS + S2V_TARGETS
    if not targets or not set(targets) <= set(known):
        raise BadInput(f"--targets {','.join(targets)}: choose from {', '.join(known)}")
    if rank < 1:
        raise BadInput(f"--rank {rank}: at least 1")
    model.requires_grad_(False)
    params, modules = [], dict(model.named_modules())
    injected = getattr(model.config, "audio_inject_layers", ())  # injector i stands behind this block
    for block in range(len(model.blocks)) if blocks is None else blocks:
        for target in targets:
            part, _, leaf = target.partition(".")
            if part != "audio_injector":
                name = f"blocks.{block}.{target}"
            elif block in injected:
                name = f"audio_injector.injector.{list(injected).index(block)}.{leaf}"
            elif injected:
                continue
            else:
                name = target
            if name not in modules:
                raise BadInput(f"--targets {target}: this model has no {name}")
            LoRALinear.wrap(modules[name], rank, alpha, dropout, device)
            params += [modules[name].lora_A, modules[name].lora_B]
    if not params:
        raise BadInput(f"--targets {','.join(targets)}: there are none in blocks {', '.join(map(str, blocks))}")
    return params


def lora_layers(model):
    """{module name: LoRALinear} of an injected model."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def adapter(model):
    """{module name: (A, B)}, the trainable parameters of an injected model."""
    return {name: (m.lora_A, m.lora_B) for name, m in lora_layers(model).items()}


def attach(model, pairs):
    """Let an injected model use these parameters instead of its own."""
    for name, m in lora_layers(model).items():
        m.lora_A, m.lora_B = pairs[name]


@contextlib.contextmanager
def adapter_off(model):
    """Within this an injected model computes what its frozen base does."""
    layers = lora_layers(model).values()
    for m in layers:
        m.enabled = False
    try:
        yield
    finally:
        for m in layers:
            m.enabled = True


def changes_to_start_from(pairs, path, expert=None):
    """{module name: change} of a LoRA file for an adapter {module name: (A, B)}, whose tensors may be on meta. Raises
    BadInput unless the file changes the same weights with the same ranks, and nothing else.
    """
    changes = {name.removesuffix(".weight"): change for name, change in read_lora(path, expert)[0].items()}
    want = {name: (tuple(b.shape[:1] + a.shape[1:]), len(a)) for name, (a, b) in pairs.items()}
    have = {name: (tuple(c.shape), getattr(c, "rank", None)) for name, c in changes.items()}
    if want != have:
        odd = sorted(n for n in want.keys() | have.keys() if want.get(n) != have.get(n))
        raise BadInput(
            f"--init_lora {path}: {len(odd)} modules differ from what --targets, --blocks and --rank ask for, such as "
            f"{odd[0]}: shape and rank are {have.get(odd[0], 'not there')}, asked for are {want.get(odd[0], 'none')}"
        )
    return changes


@torch.no_grad()
def start_from(pairs, path, scale, expert=None):
    """Fill an adapter {module name: (A, B)}, dW = scale * B A, with a LoRA file's weights. Raises BadInput where
    changes_to_start_from does.
    """
    changes = changes_to_start_from(pairs, path, expert)
    for name, (a, b) in pairs.items():
        given_a, given_b = changes[name].factors()
        a.copy_(given_a)
        b.copy_(given_b / scale)


@torch.no_grad()
def weight_norms(model):
    """{module name: Frobenius norm () of its frozen weight} of an injected model."""
    return {name: m.norm if hasattr(m, "norm") else m.weight.float().norm() for name, m in lora_layers(model).items()}


@torch.no_grad()
def clamp_weight_norm(pairs, scale, norms, cap):
    """Scale down every dW = scale * B A whose Frobenius norm exceeds `cap` times that of its weight, norms[name] ().
    Through the r x r products B^T B and A A^T; dW is never formed. Returns how many there were.
    """
    clamped = torch.zeros(())
    for name, (a, b) in pairs.items():
        norm = scale * ((b.t() @ b) * (a @ a.t())).sum().clamp(min=0).sqrt()
        factor = (cap * norms[name] / norm.clamp(min=1e-30)).clamp(max=1)
        b.mul_(factor)
        clamped += (factor < 1).cpu()
    return int(clamped)


# ---- writing -----------------------------------------------------------------------------------------------------
def save_lora(path, model, **metadata):
    """Write the adapter of an injected model; metadata as in write_lora."""
    write_lora(path, adapter(model), next(iter(lora_layers(model).values())).scale, **metadata)


def write_lora(path, pairs, scale=1.0, variant=None, date=None, trained_words=None, **metadata):
    """Write an adapter {module name: (A, B)} whose dW is scale * B A (see the top of this file).

    variant: of the base, such as ti2v-5B. date (ISO 8601; default: none, so that equal adapters are equal files) and
    trained_words {word: how many captions have it}: shown by LoRA managers, like the title, which is the file's name.
    Further metadata is written as it is; rank, targets and blocks join it.
    """
    tensors = {}
    for name, (a, b) in pairs.items():
        tensors[f"diffusion_model.{name}.lora_A.weight"] = a
        tensors[f"diffusion_model.{name}.lora_B.weight"] = b * scale
    rank = len(next(iter(pairs.values()))[0])
    parts = [re.match(r"blocks\.(\d+)\.(.+)|(audio_injector)\.injector\.\d+\.(.)", name).groups() for name in pairs]
    metadata |= {
        "format": "pt",
        "rank": rank,
        "alpha": scale * rank,
        "alpha_folded": True,
        "targets": ",".join(sorted({target or f"{owner}.{leaf}" for _, target, owner, leaf in parts})),
        "blocks": ",".join(map(str, sorted({int(block) for block, *_ in parts if block}))),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": Path(path).stem,
        "modelspec.implementation": "https://github.com/Wan-Video/Wan2.2",
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": scale * rank,
    }
    if variant:
        base = f"wan2.2-{variant}"
        metadata |= {"variant": variant, "modelspec.architecture": f"{base}/lora", "ss_base_model_version": base}
    if date:
        metadata["modelspec.date"] = date
    if trained_words:
        metadata["trained_words"] = metadata["modelspec.trigger_phrase"] = ", ".join(trained_words)
        metadata["ss_tag_frequency"] = json.dumps({"captions": trained_words}, ensure_ascii=False)
    save(path, tensors, metadata)


def write_changes(path, changes, metadata, factors):
    """Write {parameter name: change} of lora_files.py, each times factors[name] (default 1)."""
    tensors = {}
    for name, change in changes.items():
        tensors |= change.tensors(name, factors.get(name, 1.0))
    save(path, tensors, metadata)
