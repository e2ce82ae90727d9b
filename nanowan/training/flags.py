"""The flags that both trainers share: definitions, recommended values, checks.

A value comes from, in this order: the flag; the checkpoint's config.json ("train"); RECOMMENDED below; the variant's row
in VARIANTS. `resolve` applies it, once.
"""

import argparse
import math
import re
from dataclasses import fields

from kernels.attention_backends import CHOICES
from nanowan import memory_estimate
from nanowan.devices import DTYPES, free_memory, pick_dtype
from nanowan.errors import BadInput
from nanowan.settings import check_frames, parse_size
from nanowan.training.sources import CLIP_MODES

# for released sizes; nano's config.json has its own, under "train"
RECOMMENDED = {
    "train_lora": {"t_distribution": "logit-normal", "steps": 2000, "batch": 1, "lr": 1e-4, "weight_decay": 0.01},
    "train_te": {"t_distribution": "logit-normal", "steps": 2000, "batch": 1, "lr": 1e-5, "weight_decay": 0.0}
    | {"caption_mode_probs": "15,35,50", "trim_prob": 0.2, "keyword_init": "own", "keyword_lr": None},
}
POSITIVE = 1e-9  # as a lowest value


def comma_list(text):
    """ "a, b" -> ["a", "b"]."""
    return [word.strip() for word in text.split(",") if word.strip()]


def add_flags(p, script, out):
    """Add the flags of both trainers. script: of RECOMMENDED; out: the default of --out."""
    recommended = RECOMMENDED[script]
    add = p.add_argument_group("model and output").add_argument
    add("--ckpt", default="nano", help="checkpoint folder (default: nano, the toy checkpoint in the repository)")
    add("--expert", choices=("high", "low", "both"), help="which expert of an A14B to train (default: both, in turns)")
    add(
        "--steps_per_expert",
        type=int,
        default=50,
        help="steps on one expert before the other's turn (default: %(default)s)",
    )
    add("--text_encoder", help="text encoder file to start from (default: the checkpoint's own)")
    add("--out", default=out, help="folder of the run (default: %(default)s)")
    add = p.add_argument_group("data").add_argument
    add(
        "--data",
        help="folder of images and clips with .txt captions, or a JSONL or CSV of paths and captions (default: clips "
        "of the nano toy world)",
    )
    add("--cache", help="cache folder (default: cache/ beside the data)")
    add("--cache_only", action="store_true", help="fill the cache and exit")
    add("--resolution", help="WIDTHxHEIGHT in px; buckets of other aspects have its area (default: the checkpoint's)")
    add("--frames", type=int, help="frames per sample at most, 4k+1 (default: the checkpoint's)")
    modes = "; ".join(f"{k}: {v}" for k, v in CLIP_MODES.items())
    add(
        "--clip_mode",
        choices=list(CLIP_MODES),
        default="first",
        help=f"frames to take of a longer clip: {modes} (default: first)",
    )
    add(
        "--caption_dropout",
        type=float,
        default=0.1,
        help="share of samples trained without their caption, for guidance, and without their sound (S2V) or face "
        "(Animate) (default: %(default)s)",
    )
    add(
        "--i2v_prob",
        type=float,
        default=0.0,
        help="TI2V: share of clips trained with their first frame given (default: %(default)s)",
    )
    add(
        "--continuation",
        type=float,
        help="S2V, Animate: share of samples trained as a segment that continues another, if long enough (default: 0.5)",
    )
    add(
        "--held_out",
        type=float,
        default=0.05,
        help="share of files kept for the held-out loss, 16 at most (default: %(default)s)",
    )
    add = p.add_argument_group("training").add_argument
    add("--steps", type=int, help=f"optimizer steps (default: the checkpoint's, or {recommended['steps']})")
    add(
        "--batch",
        type=int,
        help=f"samples per step and data-parallel rank (default: the checkpoint's, or {recommended['batch']})",
    )
    add("--accumulate", type=int, default=1, help="batches per step (default: %(default)s)")
    add("--lr", type=float, help=f"peak learning rate (default: the checkpoint's, or {recommended['lr']:g})")
    add(
        "--weight_decay",
        type=float,
        help=f"AdamW's weight decay (default: the checkpoint's, or {recommended['weight_decay']:g})",
    )
    add("--warmup", type=int, default=10, help="steps of learning-rate warmup (default: %(default)s)")
    add(
        "--schedule",
        choices=("constant", "cosine"),
        default="cosine",
        help="learning-rate schedule; cosine ends at a tenth (default: %(default)s)",
    )
    add("--grad_clip", type=float, default=1.0, help="largest gradient norm (default: %(default)s)")
    add(
        "--grad_spike_factor",
        type=float,
        default=100.0,
        help="skip a step whose gradient norm is this many times the recent median (default: %(default)s)",
    )
    add(
        "--max_skipped", type=int, default=10, help="stop after this many skipped steps in a row (default: %(default)s)"
    )
    add(
        "--ema",
        type=float,
        default=0.0,
        help="decay of a moving average of the weights, which is then what is saved (default: 0, none)",
    )
    add("--shift", type=float, help="shift of the training timesteps towards noise (default: the checkpoint's)")
    add(
        "--t_distribution",
        choices=("logit-normal", "uniform"),
        help="distribution of the training timesteps before the shift (default: the checkpoint's, or logit-normal)",
    )
    add(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        help="recompute the DiT's activations in the backward pass (default: only if memory would not do without)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="random seed (data order, captions, timesteps, noise, dropout) (default: %(default)s)",
    )
    add("--device", help="cpu or cuda (default: cuda if there is one)")
    add(
        "--dtype",
        choices=list(DTYPES),
        help="dtype of frozen weights and matrix products (default: bf16 on cuda, fp32 on cpu)",
    )
    add(
        "--attention",
        choices=CHOICES,
        default="auto",
        help="self-attention on a GPU (default: auto, the fastest exact one)",
    )
    add = p.add_argument_group("several GPUs, under torchrun; --batch is per data-parallel rank").add_argument
    add("--fsdp", action="store_true", help="shard the weights over the ranks (FSDP2)")
    add("--ulysses_size", type=int, default=1, help="ranks that share the tokens of each clip (default: %(default)s)")
    add("--pipeline_stages", type=int, default=1, help="ranks that share the blocks (default: %(default)s)")
    add = p.add_argument_group("logs, previews and saves").add_argument
    add("--save_every", type=int, default=100, help="steps between saves (default: %(default)s)")
    add("--eval_every", type=int, default=100, help="steps between held-out losses (default: %(default)s)")
    add("--previews", help="text file of prompts to sample while training, one per line, always from the same seeds")
    add("--preview_every", type=int, default=500, help="steps between previews (default: %(default)s)")
    add("--resume", action="store_true", help="continue from the last state in --out")


def recommended_flags(s, script):
    """{flag: value} of a trainer for a checkpoint, by its Settings: the "train" entry of its config.json, in which
    {script: {flag: value}} is what differs between the trainers, over RECOMMENDED. Raises BadInput for unknown names.
    """
    general = {"resolution": "{}x{}".format(*s.size), "frames": s.frames, "shift": s.shift}
    known = {name: {*general, *flags} for name, flags in RECOMMENDED.items()}
    both = {k: v for k, v in s.train.items() if k not in RECOMMENDED}
    for entry, allowed in ((both, set().union(*known.values())), *((s.train.get(n, {}), known[n]) for n in known)):
        if strange := sorted(entry.keys() - allowed):
            raise BadInput(f'config.json, "train": {strange[0]} is none of {", ".join(sorted(allowed))}')
    both = {k: v for k, v in both.items() if k in known[script]}
    return general | RECOMMENDED[script] | both | s.train.get(script, {})


def resolve(args, s, script):
    """Fill in the flags that were not given, for a checkpoint with Settings s, and check those of add_flags."""
    for name, value in recommended_flags(s, script).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.dtype = pick_dtype(args.dtype, args.device)
    if args.expert and not s.is_moe:
        raise BadInput(f"--expert {args.expert}: {args.ckpt} has a single model")
    if s.is_moe:
        args.expert = args.expert or "both"
    samples, by_segments = s.parts.samples, s.conditioning.by_segments
    if args.i2v_prob and not samples.trains_first_frame:
        raise BadInput(
            f"--i2v_prob {args.i2v_prob}: only TI2V is trained both ways; {args.ckpt} is {s.model_type.upper()}"
        )
    if args.previews and (s.conditioning.needs_image or by_segments):
        raise BadInput(f"--previews {args.previews}: prompts alone; {args.ckpt} makes videos of more than a prompt")
    if not by_segments and args.continuation is not None:
        raise BadInput(f"--continuation {args.continuation}: {args.ckpt} makes single clips")
    if by_segments:
        if not args.data:
            raise BadInput(f"--data: needed, a folder of clips; there are none of the nano world for {args.ckpt}")
        args.continuation = 0.5 if args.continuation is None else args.continuation
        check_ranges(args, continuation=(0, 1))
        if args.pipeline_stages > 1:
            raise BadInput(
                f"--pipeline_stages {args.pipeline_stages}: not for {s.variant}; use --fsdp or --ulysses_size"
            )
        if samples.fixed_speed and args.clip_mode == "uniform":
            raise BadInput("--clip_mode uniform: would play clips faster than their sound; use another mode")
    if min(parse_size(args.resolution, "--resolution")) < s.size_multiple:
        raise BadInput(f"--resolution {args.resolution}: each side at least {s.size_multiple}")
    check_frames(args.frames, samples.frames_over)
    at_least_1 = ("steps", "batch", "accumulate", "save_every", "eval_every", "preview_every", "max_skipped")
    check_ranges(args, **dict.fromkeys((*at_least_1, "steps_per_expert"), (1, math.inf)))
    check_ranges(args, **dict.fromkeys(("lr", "warmup", "weight_decay"), (0, math.inf)))
    check_ranges(args, **dict.fromkeys(("grad_clip", "shift"), (POSITIVE, math.inf)))
    check_ranges(args, **dict.fromkeys(("caption_dropout", "i2v_prob"), (0, 1)))
    check_ranges(args, grad_spike_factor=(2, math.inf), held_out=(0, 0.5), ema=(0, 0.99999), seed=(0, 2**63 - 1))


def check_ranges(args, **ranges):
    """Raise BadInput for numbers out of range; per flag the lowest and the highest value."""
    for flag, (low, high) in ranges.items():
        value = getattr(args, flag)
        if not low <= value <= high or value == math.inf:
            least = "positive" if low == POSITIVE else f"at least {low}"
            raise BadInput(f"--{flag} {value}: must be {least}" + (f" and at most {high}" if high < math.inf else ""))


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


def expert_schedule(expert, s):
    """{name of a DiT to train through: its range [low, high) of timesteps in 0..1}, in the order of their turns. expert:
    the flag; s: the Settings.
    """
    if not expert:
        return {"dit": (0.0, 1.0)}
    ranges = {"high": (s.boundary, 1.0), "low": (0.0, s.boundary)}
    return ranges if expert == "both" else {expert: ranges[expert]}


def pick(config_class, args, **more):
    """A dataclass filled from the flags of its fields' names, and `more`."""
    names = {f.name for f in fields(config_class)} & vars(args).keys()
    return config_class(**{name: getattr(args, name) for name in names} | more)


def training_spec(args, s, **more):
    """The memory_estimate.TrainingSpec of resolved flags; more: its further fields, over what flags alone say."""
    return memory_estimate.TrainingSpec(
        **dict(
            settings=s,
            device=args.device,
            dtype=DTYPES[args.dtype],
            batch=args.batch,
            bucket=(*parse_size(args.resolution, "--resolution"), args.frames),
            checkpointing=bool(args.checkpointing),
            ema=args.ema > 0,
            first_frames=args.i2v_prob > 0,
            continuation=args.continuation,
            num_experts=len(expert_schedule(args.expert, s)),
        )
        | more
    )


def parallel_layout(args, ranks, fp8=False):
    """The ParallelLayout of a script's flags on so many ranks; fp8: also if the files are in 8 bits."""
    return memory_estimate.ParallelLayout(
        fp8,
        getattr(args, "stream_blocks", 0),
        ranks if getattr(args, "fsdp", False) else 1,
        args.ulysses_size,
        getattr(args, "pipeline_stages", 1),
    )


def choose_checkpointing(wanted, world, device, predict, memory=None):
    """(whether to checkpoint, the Plan): if the flag `wanted` is None, only if the run would take more than nine tenths
    of the memory without. predict(checkpointing) -> a Plan. memory: bytes of the device (default: what is free on it,
    of a CPU each rank's share).
    """
    need = predict(bool(wanted))
    memory = memory or free_memory(device) / (world.size if str(device) == "cpu" else 1)
    if wanted is not None or world.all_ranks(need.peak <= 0.9 * memory):
        return bool(wanted), need
    print(f"checkpointing: without it {memory_estimate.gb(need.peak)} would be needed of {memory_estimate.gb(memory)}")
    return True, predict(True)
