"""diag.py scale: predict the seconds per sample of a LoRA step on 1 to 64 GPUs, for several ways to divide the work."""

import math
from typing import NamedTuple

from nanowan import flops
from nanowan.errors import BadInput, check_at_least
from nanowan.formats.dit import full_config
from nanowan.memory_estimate import ParallelLayout
from nanowan.settings import check_size, parse_size, released
from nanowan.variants.registry import VARIANTS


def bytes_sent(c, layout, grid, batch, adapter, itemsize=2, checkpointing=False):
    """Return a prediction of {kind: bytes}, what one rank sends in a training step of a k/v translator on every block.

    c: the WanConfig. layout: memory_estimate.ParallelLayout. grid: tokens (T',H',W') of a clip. batch: samples per
    rank. adapter: bytes of the adapters' gradients. itemsize: bytes per weight. Kinds: "gradients"; "tokens", the
    activations; "weights", the shards of blocks, which are gathered in the forward pass and again in the backward pass.
    The first block's self-attention needs no gradient, so it sends no tokens in the backward pass.
    """
    sent, local = {"gradients": adapter}, math.ceil(math.prod(grid) / layout.sp_size)  # tokens of a rank
    if layout.sp_size > 1:
        others = batch * local * (layout.sp_size - 1)
        passes = c.num_layers * (2 if checkpointing else 1) + c.num_layers - 1
        per_token = 4 * c.dim * itemsize // layout.sp_size * passes + 4 * c.out_dim * math.prod(c.patch_size)
        sent["tokens"] = others * per_token
    if layout.pp_size > 1:
        sent["tokens"] = 4 * max(batch, layout.pp_size) * math.prod(grid) * c.dim
    if layout.fsdp_size > 1:
        block = 4 * c.dim**2 * 2 + 2 * c.dim * c.ffn_dim
        sent["weights"] = 2 * c.num_layers * block * itemsize // layout.fsdp_size * (layout.fsdp_size - 1)
    return sent


class Cluster(NamedTuple):
    """A cluster of machines with `per_machine` GPUs each. inside: bandwidth of a GPU to others in its machine, in
    bytes/s. between: bandwidth of a GPU to other machines, in bytes/s.
    """

    inside: float
    between: float
    per_machine: int = 8


def lora_step(c, grid, text=64):
    """Return the Flops of a training step of a k/v translator on all blocks, with checkpointing, on one clip. c: the
    WanConfig. grid: tokens (T',H',W') of the clip. text: tokens of the prompt.
    """
    translator = [f"blocks.{i}.cross_attn.{p}" for i in range(c.num_layers) for p in "kv"]
    latents = [n * side for n, side in zip(grid, c.patch_size)]
    return flops.training_step(c, latents, text, adapted=translator, checkpointing=True)


def step_times(c, grid, ranks, adapter, compute, cluster):
    """Return {strategy: (seconds per sample of a LoRA step with checkpointing, bytes of weights per rank)} on `ranks`
    GPUs of a Cluster. c: the WanConfig. grid: tokens (T',H',W') of a clip. adapter: bytes of the LoRA's gradients.
    compute: seconds that one GPU needs to compute a sample. Weights are assumed to be gathered during the computation
    of other blocks; the computation waits for what Ulysses and pipelines send.
    """

    def link(n):
        """Return the bandwidth of a GPU in bytes/s when n ranks exchange data."""
        return cluster.inside if n <= cluster.per_machine else cluster.between

    tokens = math.prod(grid)
    weights = 2 * c.num_layers * (8 * c.dim**2 + 2 * c.dim * c.ffn_dim)
    all_reduce = 2 * (ranks - 1) / ranks * adapter / link(ranks)
    times = {"data parallel": ((compute + all_reduce) / ranks, weights)}
    if ranks == 1:
        return times

    gather = bytes_sent(c, ParallelLayout(fsdp_size=ranks), grid, 1, adapter)["weights"] / link(ranks)
    times["--fsdp"] = (max(compute, gather) + all_reduce) / ranks, weights // ranks

    group = max(n for n in (1, 2, 4, 8) if ranks % n == 0 and c.num_heads % n == 0 and n <= cluster.per_machine)
    layout = ParallelLayout(sp_size=group)
    exchange = bytes_sent(c, layout, grid, 1, adapter, checkpointing=True).get("tokens", 0) / cluster.inside
    padding = math.ceil(tokens / group) * group / tokens
    seconds = compute / group * padding + exchange + all_reduce
    times[f"--ulysses_size {group}"] = seconds / (ranks // group), weights

    stages = min(ranks, cluster.per_machine)
    microbatches, hand_on = 2 * stages, 2 * 4 * tokens * c.dim / link(stages)
    seconds = (microbatches + stages - 1) * (compute / stages + hand_on) + all_reduce
    times[f"--pipeline_stages {stages}"] = seconds / microbatches / (ranks // stages), weights // stages
    return times


def run(args):
    if args.ckpt not in VARIANTS:
        raise BadInput(f"--ckpt {args.ckpt}: one of {', '.join(VARIANTS)}")
    check_at_least(1e-9, tflops=args.tflops, inside=args.inside, between=args.between)
    check_at_least(1, per_machine=args.per_machine, gb=args.gb)
    c, s = full_config(args.ckpt), released(args.ckpt)
    size = parse_size(args.size) if args.size else s.size
    frames = s.frames if args.frames is None else args.frames
    check_size(size, frames, s.size_multiple, s.parts.samples.frames_over)
    grid, adapter = s.token_grid(size, frames), c.num_layers * 2 * 16 * 2 * c.dim * 4
    print(
        f"{args.ckpt}, {size[0]}x{size[1]}x{frames}: seconds per sample, if a GPU sustains {args.tflops:g} TFLOP/s, "
        f"sends {args.inside:g} GB/s within a machine of {args.per_machine} and {args.between:g} GB/s beyond; in "
        "brackets, GB of weights on each"
    )
    step, cluster = lora_step(c, grid), Cluster(args.inside * 1e9, args.between * 1e9, args.per_machine)
    for ranks in (1, 2, 4, 8, 16, 32, 64):
        times = step_times(c, grid, ranks, adapter, step.total / (args.tflops * 1e12), cluster)
        # 0.4 of the memory is left for activations
        fits = {name: seconds for name, (seconds, size) in times.items() if size <= 0.6 * args.gb * 1e9}
        fastest = min(times, key=lambda name: times[name][0])
        fastest_that_fits = min(fits, key=fits.get, default=None)
        note = ""
        if fastest_that_fits is None:
            note = f"; none has weights that fit {args.gb} GB"
        elif fastest_that_fits != fastest:
            note = f", and with {args.gb} GB: {fastest_that_fits}"
        cells = [f"{name} {seconds:.2f} ({size / 1e9:.1f})" for name, (seconds, size) in times.items()]
        print(f"{ranks:3} GPUs  {'  '.join(cells)}; fastest: {fastest}{note}")
    cards = {name: flops.predict_seconds(step, name) for name in flops.CARDS}
    said = ", ".join(f"{name} {seconds:.2f}" for name, seconds in cards.items())
    print(f"predicted for one GPU, at rates that are assumed, not measured: {said} s")
