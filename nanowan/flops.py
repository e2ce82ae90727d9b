"""Count the FLOPs of a DiT's passes as they run on fake tensors, and predict from them how long a GPU takes.

A multiply-add counts as two FLOPs. Only matrix products, convolutions and attention count. The formula of each
operation is PyTorch's (torch.utils.flop_counter). By these formulas, the backward pass of attention takes 2.5 times the
FLOPs of its forward pass.
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

ALIKE = ("t2v", "i2v", "ti2v")  # model types in which all blocks do the same work
aten = torch.ops.aten
FORMULAS = flop_registry | {
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


class Flops(NamedTuple):
    """Numbers of FLOPs by kind. A GPU computes each kind at a different rate."""

    linear: int = 0  # FLOPs of matrix products and convolutions in forward passes
    attention: int = 0  # FLOPs of attention in forward passes
    attention_backward: int = 0
    linear_backward: int = 0

    @property
    def total(self):
        return sum(self)

    def plus(self, other, times=1):
        """Return the sum of these Flops and of `other` multiplied by `times`."""
        return Flops(*(a + times * b for a, b in zip(self, other)))


class Card(NamedTuple):
    """The rates of a GPU in FLOP/s and byte/s. peak: the data sheet's rate for bf16 without sparsity. host: the rate of
    copies from host memory, derived from the GPU's PCIe generation. The other rates are assumptions, based on what
    others have measured at large sizes; nobody has measured them with this project.
    """

    peak: float
    linear: float
    linear_fp8: float | None
    attention: float
    attention_backward: float
    bandwidth: float
    host: float


CARDS = {  # {a part of torch.cuda.get_device_name: Card}
    "H100": Card(989e12, 700e12, 1150e12, 600e12, 430e12, 2.8e12, 50e9),
    "H200": Card(989e12, 720e12, 1180e12, 610e12, 440e12, 4.0e12, 50e9),
    "A100": Card(312e12, 255e12, None, 205e12, 150e12, 1.7e12, 25e9),
    "4090": Card(165e12, 150e12, 270e12, 155e12, 110e12, 0.9e12, 25e9),
    "5090": Card(209e12, 205e12, 370e12, 200e12, 140e12, 1.55e12, 50e9),
}


def card_of(device_name):
    """Return the Card for the GPU with this name, or None if the rates of that GPU are not known."""
    return next((card for name, card in CARDS.items() if name in device_name), None)


def predict_seconds(flops, device_name, fp8=False, nbytes=0):
    """Return the seconds that a GPU with this name needs to compute `flops`, a Flops, and to move `nbytes` bytes; None
    if the GPU's rates are not known. The time is predicted from assumed rates, not measured. fp8: whether matrix
    products of forward passes are computed in 8 bits. nbytes: the bytes that operations without counted FLOPs, such as
    norms, read and write.
    """
    card = card_of(device_name)
    linear = card and (card.linear_fp8 if fp8 else card.linear)
    if not linear:
        return None
    attention = flops.attention / card.attention + flops.attention_backward / card.attention_backward
    return flops.linear / linear + flops.linear_backward / card.linear + attention + nbytes / card.bandwidth


def elementwise_bytes(config, latents):
    """Return an estimate of the bytes that a forward pass reads and writes outside of matrix products and attention, at
    2 bytes per value. In each block, norms, rotations and gates pass 21 times over a token's `dim` values, and the GELU
    passes twice over its `ffn_dim` values. A backward pass moves about twice as many bytes, which are not included.
    latents (T',h,w): the size of the clip's latents.
    """
    tokens = math.prod(latents) // math.prod(config.patch_size)
    return 2 * tokens * config.num_layers * (21 * config.dim + 2 * config.ffn_dim)


def encoder_step(blocks, trained, tokens):
    """Return the Flops of a forward and a backward pass of a text encoder. blocks: number of parameters in the
    encoder's blocks. trained: how many of these are trained. tokens: number of tokens that the encoder reads. Attention
    is left out, since it costs little for so few tokens.
    """
    return Flops(linear=2 * blocks * tokens, linear_backward=2 * (blocks + trained) * tokens)


class Counter(TorchDispatchMode):
    """A count of the Flops of all operations that run in its `with` block."""

    def __init__(self):
        super().__init__()
        self.flops = Flops()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if formula := FORMULAS.get(func._overloadpacket):
            name = str(func)
            if "attention" in name:
                kind = "attention_backward" if "backward" in name else "attention"
            else:  # activation checkpointing runs forward passes during the backward pass, with gradients enabled
                in_backward = torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()
                kind = "linear_backward" if in_backward else "linear"
            count = formula(*args, **(kwargs or {}), out_val=out)
            self.flops = self.flops._replace(**{kind: getattr(self.flops, kind) + count})
        return out


def forward(config, latents, text=64, batch=1):
    """Return the Flops of one forward pass of a DiT in sampling. Operations that run once for all steps are not
    counted.

    config: the configuration of the DiT. latents (T',h,w): the size of a clip's latents. text: number of tokens of the
    prompt. batch: number of clips.
    """

    def count(config, _):
        with FakeTensorMode(), backend.using("ref"), torch.no_grad():
            dit, x, t, context, inputs = _example(config, latents, text, batch)
            prepared = dit.embed_text(context, cache=True), dit.prepare_inputs(**inputs)
            with Counter() as counter:
                dit(x, t, prepared[0], **prepared[1])
        return counter.flops

    return _of_few_blocks(count, config, ())


def training_step(config, latents, text=64, batch=1, adapted=(), rank=16, checkpointing=False):
    """Return the Flops of a forward and a backward pass of a DiT. adapted: names of the linear layers that have a
    trained LoRA of this rank; if there are none, gradients go to the text embedding, as in train_te. checkpointing: the
    value of Wan.checkpointing. The other arguments are those of `forward`.
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
    """Return count(config, adapted). If the DiT has four or more blocks, all alike, count is called only for DiTs of
    two and of three such blocks, and the Flops for all blocks are extrapolated from these two results.
    """
    inside = [{n.split(".", 2)[2] for n in adapted if n.startswith(f"blocks.{i}.")} for i in range(config.num_layers)]
    if config.model_type not in ALIKE or config.num_layers < 4 or any(names != inside[0] for names in inside):
        return count(config, adapted)
    two, three = (
        count(replace(config, num_layers=n), tuple(name for name in adapted if int(name.split(".")[1]) < n))
        for n in (2, 3)
    )
    return two.plus(three.plus(two, -1), config.num_layers - 2)


COUNTED = {}  # results of step_of, since counting takes seconds: {key: (tokens, Flops of one sample)}


def step_of(dit, latents, text, batch):
    """Return the Flops of a training step on a DiT, without those that activation checkpointing repeats. The arguments
    are as in `forward`. For each DiT, FLOPs are counted for one size of latents. For other sizes, the FLOPs of linear
    layers are scaled with the number of tokens, and those of attention with the number of token pairs.
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
    """Return (a DiT without weights, x, t, context, further keyword arguments of the DiT's forward)."""
    dit, inputs = (
        new_dit(config).requires_grad_(False),
        parts_of(config.model_type).examples.inputs(config, (config.out_dim, *latents)),
    )
    inputs = {k: v.repeat(batch, *[1] * (v.dim() - 1)) for k, v in inputs.items()}
    x, context = torch.empty(batch, config.in_dim, *latents), torch.empty(batch, text, config.text_dim)
    return dit, x, torch.empty(batch), context, inputs
