"""FLOPs of a DiT's passes, counted on fake tensors as they run, and the times that they predict on a card.

Two FLOPs for each multiply-add, of matrix products, convolutions and attention; nothing else counts. The formulas per
operation are PyTorch's (torch.utils.flop_counter): attention's backward pass is 2.5 of its forward pass.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from kernels import backend
from lora import LoRALinear, lora_layers
from nanowan.formats.dit import new_dit
from nanowan.variants.registry import parts_of

ALIKE = ("t2v", "i2v", "ti2v")  # models all of whose blocks do the same
aten = torch.ops.aten
FORMULAS = flop_registry | {
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


class Flops(NamedTuple):
    """FLOPs, apart by the rates that GPUs have for them."""

    linear: int = 0  # of matrix products and convolutions in forward passes
    attention: int = 0  # of attention in forward passes
    attention_backward: int = 0
    linear_backward: int = 0

    @property
    def total(self):
        return sum(self)

    def plus(self, other, times=1):
        """These, and so many times those of `other`."""
        return Flops(*(a + times * b for a, b in zip(self, other)))


class Card(NamedTuple):
    """Rates of a GPU in FLOP/s and byte/s. peak: dense bf16, of its data sheet; host: from the host's memory, by its
    generation of PCIe. The others are assumed: what others reached on large sizes; nobody has measured them with this
    project.
    """

    peak: float
    linear: float
    linear_fp8: float | None
    attention: float
    attention_backward: float
    bandwidth: float
    host: float


CARDS = {  # by what is in torch.cuda.get_device_name
    "H100": Card(989e12, 700e12, 1150e12, 600e12, 430e12, 2.8e12, 50e9),
    "H200": Card(989e12, 720e12, 1180e12, 610e12, 440e12, 4.0e12, 50e9),
    "A100": Card(312e12, 255e12, None, 205e12, 150e12, 1.7e12, 25e9),
    "4090": Card(165e12, 150e12, 270e12, 155e12, 110e12, 0.9e12, 25e9),
    "5090": Card(209e12, 205e12, 370e12, 200e12, 140e12, 1.55e12, 50e9),
}


def card_of(device_name):
    """The Card of a GPU's name, or None."""
    return next((card for name, card in CARDS.items() if name in device_name), None)


def predict_seconds(flops, device_name, fp8=False, nbytes=0):
    """A prediction, not a measurement: seconds that Flops, and `nbytes` of other traffic, take at the rates assumed for
    a GPU of this name. fp8: whether the products of forward passes are made in 8 bits. None where the rates are not
    known.
    """
    card = card_of(device_name)
    linear = card and (card.linear_fp8 if fp8 else card.linear)
    if not linear:
        return None
    attention = flops.attention / card.attention + flops.attention_backward / card.attention_backward
    return flops.linear / linear + flops.linear_backward / card.linear + attention + nbytes / card.bandwidth


def elementwise_bytes(config, latents):
    """About what a forward pass reads and writes beside its products and attention, in 2 bytes a value: norms,
    rotations and gates pass 21 times over a token's width in each block, the GELU twice over the feed-forward's. A
    backward pass is about twice that. latents (T',h,w).
    """
    tokens = math.prod(latents) // math.prod(config.patch_size)
    return 2 * tokens * config.num_layers * (21 * config.dim + 2 * config.ffn_dim)


def encoder_step(blocks, trained, tokens):
    """The Flops of a pass forward and backward of a text encoder: its blocks have so many parameters, of which
    `trained` are. Attention among so few tokens is left out.
    """
    return Flops(linear=2 * blocks * tokens, linear_backward=2 * (blocks + trained) * tokens)


class Counter(TorchDispatchMode):
    """Counts the Flops of what runs inside."""

    def __init__(self):
        super().__init__()
        self.flops = Flops()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if formula := FORMULAS.get(func._overloadpacket):
            name = str(func)
            if "attention" in name:
                kind = "attention_backward" if "backward" in name else "attention"
            else:  # what checkpointing computes again has gradients on
                in_backward = torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()
                kind = "linear_backward" if in_backward else "linear"
            count = formula(*args, **(kwargs or {}), out_val=out)
            self.flops = self.flops._replace(**{kind: getattr(self.flops, kind) + count})
        return out


def forward(config, latents, text=64, batch=1):
    """The Flops of a forward pass as in sampling: what does not change from step to step is not counted.

    config: of a DiT. latents (T',h,w), text: tokens of the prompt.
    """

    def count(config, _):
        with FakeTensorMode(), backend.using("ref"), torch.no_grad():
            dit, x, t, context, inputs = _example(config, latents, text, batch)
            given = dit.embed_text(context, cache=True), dit.prepare_inputs(**inputs)
            with Counter() as counter:
                dit(x, t, given[0], **given[1])
        return counter.flops

    return _of_few_blocks(count, config, ())


def training_step(config, latents, text=64, batch=1, adapted=(), rank=16, checkpointing=False):
    """The Flops of a pass forward and backward. adapted: names of the linears that have a LoRA of this rank, which is
    what is trained; without any, the text is, as in train_te. checkpointing: as in Wan. The rest as in `forward`.
    """

    def count(config, adapted, checkpointing=checkpointing):
        with FakeTensorMode(), backend.using("ref"), torch.enable_grad():
            dit, x, t, context, inputs = _example(config, latents, text, batch)
            for name in adapted:
                dit.set_submodule(name, LoRALinear(dit.get_submodule(name), rank, rank))
            dit.checkpointing = checkpointing
            with Counter() as counter:
                dit(x, t, context.requires_grad_(not adapted), **inputs).square().sum().backward()
        return counter.flops

    if checkpointing in (False, True):
        return _of_few_blocks(count, config, adapted)
    none, all_blocks = (training_step(config, latents, text, batch, adapted, rank, every) for every in (False, True))
    return none.plus(all_blocks.plus(none, -1), checkpointing / config.num_layers)


def _of_few_blocks(count, config, adapted):
    """count(config, adapted), a Flops, from those of two and of three blocks where all but the first do the same."""
    inside = [{n.split(".", 2)[2] for n in adapted if n.startswith(f"blocks.{i}.")} for i in range(config.num_layers)]
    if config.model_type not in ALIKE or config.num_layers < 4 or any(names != inside[0] for names in inside):
        return count(config, adapted)
    two, three = (
        count(replace(config, num_layers=n), tuple(name for name in adapted if int(name.split(".")[1]) < n))
        for n in (2, 3)
    )
    return two.plus(three.plus(two, -1), config.num_layers - 2)


COUNTED = {}  # {what: (tokens, Flops of one sample)} of `step_of`: counting takes seconds


def step_of(dit, latents, text, batch):
    """The Flops of a training step of a DiT that is being trained, recomputation left out; arguments as in `forward`.
    Counted once, and for other sizes in proportion to the tokens.
    """
    layers, tokens = lora_layers(dit), math.prod(latents) // 4
    key = repr(dit.config), tuple(layers), text
    if key not in COUNTED:
        rank = max((len(layer.lora_A) for layer in layers.values()), default=1)
        COUNTED[key] = tokens, training_step(dit.config, latents, text, 1, tuple(layers), rank)
    counted, flops = COUNTED[key]
    more = tokens / counted
    pairs = more * (tokens + text) / (counted + text)
    grown = Flops(more, pairs, pairs, more)
    return Flops(*(batch * factor * n for factor, n in zip(grown, flops)))


def _example(config, latents, text, batch):
    """(a DiT without weights, and what it is given)."""
    dit, inputs = (
        new_dit(config).requires_grad_(False),
        parts_of(config.model_type).examples.inputs(config, (config.out_dim, *latents)),
    )
    inputs = {k: v.repeat(batch, *[1] * (v.dim() - 1)) for k, v in inputs.items()}
    x, context = torch.empty(batch, config.in_dim, *latents), torch.empty(batch, text, config.text_dim)
    return dit, x, torch.empty(batch), context, inputs
