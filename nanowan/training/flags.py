"""The flags that both trainers share: definitions, recommended values, checks.

A flag gets its value from the first of these places that names the flag: the command line or --config; "train" in the
checkpoint's config.json; RECOMMENDED below; the checkpoint's Settings (size, frames, shift).
"""

import argparse
import json
import math
import re
from dataclasses import fields
from pathlib import Path

from data import DataConfig, DataSource
from kernels.attention_backends import CHOICES
from nanowan import memory_estimate
from nanowan.devices import DTYPES, free_memory, pick_dtype
from nanowan.errors import BadInput
from nanowan.flags import DATA_KEYS
from nanowan.settings import check_frames, parse_size
from nanowan.training.scan import nearest_bucket
from nanowan.training.sources import CLIP_MODES

# for released models; nano has its own values under "train" in its config.json
RECOMMENDED = {
    "train_lora": {"t_distribution": "logit-normal", "steps": 2000, "batch": 1, "lr": 1e-4, "weight_decay": 0.01}
    | {"save_every": 100},
    # a save of the full encoder and its state writes 39 GB; it takes about a minute, as long as a hundred steps
    "train_te": {"t_distribution": "logit-normal", "steps": 2000, "batch": 1, "lr": 1e-5, "weight_decay": 0.0}
    | {"caption_mode_probs": "15,35,50", "trim_prob": 0.2, "keyword_init": "own", "keyword_lr": None}
    | {"save_every": 500},
}
ENCODER_LORA_LR = 10 * RECOMMENDED["train_te"]["lr"]  # --lr of train_te.py --rank, for released models
POSITIVE = 1e-9  # the lowest value of flags that must be above 0


def comma_list(text):
    """Split "a, b" into ["a", "b"]."""
    return [word.strip() for word in text.split(",") if word.strip()]


def clip_mode(text):
    """Return the value of --clip_mode. Refuse `uniform`, the old name of `spaced`: in the trainer musubi-tuner, it has
    another meaning.
    """
    if text == "uniform":
        raise argparse.ArgumentTypeError("uniform: it is called spaced (one clip of frames far apart)")
    return text


def data_set(text):
    """Parse one value of --data into a dict with keys among DATA_KEYS. text: a path, which becomes {"source": path}; or
    a JSON object, into which flags.Parser turns a [[data]] table of a config file.
    """
    values = json.loads(text) if text.startswith("{") else {"source": text}
    if strange := [k for k in values if k not in DATA_KEYS]:
        raise argparse.ArgumentTypeError(f"{strange[0]}: no setting of a data set, which are {', '.join(DATA_KEYS)}")
    if "source" not in values:
        raise argparse.ArgumentTypeError(f"{text}: no source, a folder or list")
    return values


def parse_checkpointing(text):
    """Parse the value of --checkpointing into a number of blocks, True for "all", or None for "auto". "none" is 0. A
    config file may have true and false, which mean "all" and "none".
    """
    words = {"auto": None, "all": True, "none": 0, "true": True, "false": 0}
    if text not in words and not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text}: give a number of blocks, all, none or auto")
    return words[text] if text in words else int(text)


def add_flags(p, script, out):
    """Add to the Parser p the flags that both trainers share. script: a key of RECOMMENDED. out: --out's default."""
    recommended = RECOMMENDED[script]
    add = p.add_argument_group("model and output").add_argument
    add("--ckpt", default="nano", help="checkpoint folder (default: nano, the toy checkpoint in the repository)")
    add(
        "--expert",
        choices=("high", "low", "both"),
        help="which expert of an A14B to train (default: both, alternating)",
    )
    add(
        "--steps_per_expert",
        type=int,
        default=50,
        help="number of steps on one expert before the run switches to the other (default: %(default)s)",
    )
    add(
        "--text_encoder",
        action="append",
        help="text encoder to use, FILE[:strength]: a full encoder, a delta or a LoRA; repeat it to stack several "
        "(default: the checkpoint's own)",
    )
    add("--out", default=out, help="folder of the run (default: %(default)s)")
    add = p.add_argument_group("data").add_argument
    add(
        "--data",
        type=data_set,
        action="append",
        help="folder of images and clips with .txt captions, or a JSONL or CSV file of paths and captions; repeatable; "
        "in a --config file, each data set can have its own settings (default: generated clips of moving shapes, for "
        "the toy model nano)",
    )
    add(
        "--cache",
        help="folder of the cache (default: cache/ in the first --data, or beside the first --data if that is a file)",
    )
    add("--cache_only", action="store_true", help="only fill the cache, then exit")
    add(
        "--resolution",
        help="WIDTHxHEIGHT of the samples in px; buckets with other aspect ratios have the same area (default: from "
        "the checkpoint's config.json, else the variant's default)",
    )
    add(
        "--frames",
        type=int,
        help="maximum number of frames per sample, 4k+1, or 4k for S2V (default: from the checkpoint's config.json, "
        "else the variant's default)",
    )
    modes = "; ".join(f"{k}: {v}" for k, v in CLIP_MODES.items())
    add(
        "--clip_mode",
        type=clip_mode,
        choices=list(CLIP_MODES),
        default="first",
        help=f"frames to take from a clip that is longer than --frames; {modes} (default: first)",
    )
    add(
        "--caption_dropout",
        type=float,
        default=0.1,
        help="probability that a sample is trained without its caption, and without its sound (S2V) or face (Animate), "
        "for classifier-free guidance (default: %(default)s)",
    )
    add(
        "--i2v_prob",
        type=float,
        default=0.0,
        help="TI2V: probability that a clip is trained as image-to-video, with its first frame given (default: "
        "%(default)s)",
    )
    add(
        "--continuation",
        type=float,
        help="S2V, Animate: probability that a sample with enough frames is trained as the continuation of a previous "
        "segment (default: 0.5)",
    )
    add(
        "--held_out",
        type=float,
        default=0.05,
        help="fraction of the files, at most 16 files, to leave out of training; their loss is the held-out loss "
        "(default: %(default)s)",
    )
    add = p.add_argument_group("training").add_argument
    add(
        "--steps",
        type=int,
        help=f"number of optimizer steps (default: from the checkpoint's config.json, else {recommended['steps']})",
    )
    add(
        "--batch",
        type=int,
        help="number of samples per batch on each data-parallel rank (default: from the checkpoint's config.json, else "
        f"{recommended['batch']})",
    )
    add("--accumulate", type=int, default=1, help="number of batches per optimizer step (default: %(default)s)")
    encoder_lora = f", or {ENCODER_LORA_LR:g} with --rank" if script == "train_te" else ""
    add(
        "--lr",
        type=float,
        help=f"peak learning rate (default: from the checkpoint's config.json, else {recommended['lr']:g}"
        f"{encoder_lora})",
    )
    add(
        "--weight_decay",
        type=float,
        help=f"AdamW's weight decay (default: from the checkpoint's config.json, else {recommended['weight_decay']:g})",
    )
    add("--warmup", type=int, default=10, help="number of learning-rate warmup steps (default: %(default)s)")
    add(
        "--schedule",
        choices=("constant", "cosine"),
        default="cosine",
        help="learning-rate schedule; cosine falls to a tenth of --lr (default: %(default)s)",
    )
    add(
        "--grad_clip",
        type=float,
        default=1.0,
        help="maximum gradient norm; larger gradients are scaled down to it (default: %(default)s)",
    )
    add(
        "--grad_spike_factor",
        type=float,
        default=100.0,
        help="skip a step whose gradient norm is more than this factor times the median norm of the last 100 steps "
        "(default: %(default)s)",
    )
    add(
        "--max_skipped",
        type=int,
        default=10,
        help="number of skipped steps in a row after which the run stops; steps are skipped by --grad_spike_factor, "
        "or if loss or gradient is not finite (default: %(default)s)",
    )
    add(
        "--ema",
        type=float,
        default=0.0,
        help="decay per step of a moving average of the trained weights; the average is saved instead of the weights "
        "(default: 0, no average)",
    )
    add("--min_t", type=float, default=0.0, help="lowest timestep, after the shift; 0: clean, 1: noise (default: 0)")
    add("--max_t", type=float, default=1.0, help="highest timestep, after the shift; 0: clean, 1: noise (default: 1)")
    add(
        "--shift",
        type=float,
        help="shift of the training timesteps towards noise (default: from the checkpoint's config.json, else the "
        "variant's default)",
    )
    add(
        "--t_distribution",
        choices=("logit-normal", "uniform"),
        help="distribution of the training timesteps before the shift (default: from the checkpoint's config.json, "
        "else logit-normal)",
    )
    add(
        "--checkpointing",
        nargs="?",
        const=True,
        type=parse_checkpointing,
        metavar="N",
        help="number of DiT blocks with activation checkpointing, or all, none or auto (the fewest with which the run "
        "fits into memory); the flag without a value means all (default: auto)",
    )
    add("--no-checkpointing", dest="checkpointing", action="store_const", const=0, help="the same as --checkpointing 0")
    add(
        "--seed",
        type=int,
        default=0,
        help="random seed for data order, captions, timesteps, noise and dropout (default: %(default)s)",
    )
    add("--device", help="cpu or cuda (default: cuda if there is one)")
    add(
        "--dtype",
        choices=list(DTYPES),
        help="dtype of weights and matrix products; LoRAs, and with --fsdp all trained weights, are fp32 (default: "
        "bf16 on cuda, fp32 on cpu)",
    )
    add(
        "--attention",
        choices=CHOICES,
        default="auto",
        help="self-attention kernel on a GPU (default: auto, the fastest exact kernel)",
    )
    add = p.add_argument_group("several GPUs, under torchrun; --batch is per data-parallel rank").add_argument
    add("--fsdp", action="store_true", help="shard the weights over the ranks (FSDP2)")
    add(
        "--ulysses_size",
        type=int,
        default=1,
        help="number of ranks over which each clip's tokens are split (default: %(default)s)",
    )
    add(
        "--pipeline_stages",
        type=int,
        default=1,
        help="number of ranks among which the DiT's blocks are divided (default: %(default)s)",
    )
    add = p.add_argument_group("logs, previews and saves").add_argument
    add(
        "--save_every",
        type=int,
        help="number of steps between saves (default: from the checkpoint's config.json, else "
        f"{recommended['save_every']})",
    )
    add(
        "--eval_every",
        type=int,
        default=100,
        help="number of steps between computations of the held-out loss (default: %(default)s)",
    )
    add(
        "--previews",
        help="text or JSONL file of prompts to sample during training, in the format of sample.py --prompts; for S2V "
        "and Animate, the other inputs come from held-out clips",
    )
    add("--preview_every", type=int, default=500, help="number of steps between previews (default: %(default)s)")
    add("--preview_size", help="WIDTHxHEIGHT of previews in px (default: that of --resolution)")
    add("--preview_frames", type=int, help="number of frames per preview (default: that of --frames)")
    add(
        "--preview_steps",
        type=int,
        help="number of sampling steps per preview (default: the checkpoint's recommended number, at most 20)",
    )
    add(
        "--log_every",
        type=int,
        default=10,
        help="number of steps between log lines on the screen (default: %(default)s)",
    )
    add("--wandb", metavar="PROJECT", help="also log to this Weights & Biases project (needs the wandb package)")
    add("--resume", action="store_true", help="continue from the last saved state in --out")


def recommended_flags(s, script):
    """Return {flag: value} of a trainer for a checkpoint with Settings s: RECOMMENDED, overridden by the "train" entry
    of the checkpoint's config.json. In that entry, {script: {flag: value}} holds the values of one trainer, and all
    other values are for both trainers. Raises BadInput for an unknown flag.
    """
    general = {"resolution": "{}x{}".format(*s.size), "frames": s.frames, "shift": s.shift}
    known = {name: {*general, *flags} for name, flags in RECOMMENDED.items()}
    both = {k: v for k, v in s.train.items() if k not in RECOMMENDED}
    for entry, allowed in ((both, set().union(*known.values())), *((s.train.get(n, {}), known[n]) for n in known)):
        if strange := sorted(entry.keys() - allowed):
            raise BadInput(f'config.json, "train": {strange[0]} is none of {", ".join(sorted(allowed))}')
    both = {k: v for k, v in both.items() if k in known[script]}
    return general | RECOMMENDED[script] | both | s.train.get(script, {})


def encoder_lora_lr(s):
    """Return the default of --lr for train_te.py --rank. If the checkpoint's config.json has a learning rate for
    training full blocks, LoRAs use it too: on nano, ten times this rate taught words no better, and changed clips of
    known words more (docs/experiments.md). Released models have no such entry; their LoRAs use ENCODER_LORA_LR, ten
    times the rate of full blocks, as is usual for LoRAs.
    """
    lr = {**s.train, **s.train.get("train_te", {})}.get("lr")
    return lr or ENCODER_LORA_LR


def resolve(args, s, script):
    """Fill in the flags that were not given, for a checkpoint with Settings s, and check the flags from add_flags.
    Raises BadInput.
    """
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
    if not by_segments and args.continuation is not None:
        raise BadInput(f"--continuation {args.continuation}: {args.ckpt} makes single clips")
    if by_segments:
        args.continuation = 0.5 if args.continuation is None else args.continuation
        check_ranges(args, continuation=(0, 1))
        if args.pipeline_stages > 1:
            raise BadInput(
                f"--pipeline_stages {args.pipeline_stages}: not for {s.variant}; use --fsdp or --ulysses_size"
            )
    data_source({"source": "of the flags"}, args, s)
    args.preview_steps = args.preview_steps or min(20, s.steps)
    counts = "steps batch accumulate save_every eval_every preview_every preview_steps log_every max_skipped".split()
    check_ranges(args, **dict.fromkeys((*counts, "steps_per_expert"), (1, math.inf)))
    check_ranges(args, **dict.fromkeys(("lr", "warmup", "weight_decay"), (0, math.inf)))
    check_ranges(args, **dict.fromkeys(("grad_clip", "shift"), (POSITIVE, math.inf)))
    check_ranges(args, **dict.fromkeys(("caption_dropout", "i2v_prob"), (0, 1)))
    if not 0 <= args.min_t < args.max_t <= 1:
        raise BadInput(
            f"--min_t {args.min_t:g} --max_t {args.max_t:g}: from 0 to 1, the lower one first (0.25, not 250)"
        )
    check_ranges(args, grad_spike_factor=(2, math.inf), held_out=(0, 0.5), ema=(0, 0.99999), seed=(0, 2**63 - 1))


def data_source(values, args, s):
    """Return the DataSource for one value of --data; the resolved flags give what the value leaves out. Raises
    BadInput.
    """
    name = f"--data {values['source']}"
    size = values.get("resolution", args.resolution)
    size = tuple(size) if isinstance(size, list) else parse_size(size, "--resolution")
    source = DataSource(
        Path(values["source"]),
        size,
        values.get("frames", args.frames),
        values.get("clip_mode", args.clip_mode),
        values.get("repeats", 1),
        values.get("weight", 1.0),
    )
    samples = s.parts.samples
    if min(size) < s.size_multiple:
        raise BadInput(f"{name}, --resolution {size[0]}x{size[1]}: each side at least {s.size_multiple}")
    check_frames(source.frames, samples.frames_over)
    if source.clip_mode not in CLIP_MODES:
        raise BadInput(f"{name}, --clip_mode {source.clip_mode}: one of {', '.join(CLIP_MODES)}")
    if samples.fixed_speed and source.clip_mode == "spaced":
        raise BadInput(f"{name}, --clip_mode spaced: would play clips faster than their sound; use another mode")
    if not isinstance(source.repeats, int) or source.repeats < 1 or not 0 < source.weight < math.inf:
        raise BadInput(
            f"{name}: repeats {source.repeats}, weight {source.weight}: a whole number from 1 on, and a positive one"
        )
    return source


def data_config(args, s, default):
    """Return the DataConfig for resolved flags. default() -> the data folder to use without --data."""
    sources = tuple(data_source(values, args, s) for values in args.data or [{"source": default()}])
    first = sources[0].source
    cache = Path(args.cache or (first if first.is_dir() else first.parent) / "cache")
    return pick(DataConfig, args, sources=sources, cache=cache)


def check_data(data, pipe):
    """Raise BadInput if --data is missing and the model makes videos in segments: nano's clips do not suit it."""
    if not data and pipe.settings.conditioning.by_segments:
        raise BadInput(f"--data: needed, a folder of clips; there are none of the nano world for {pipe.dir}")


def check_ranges(args, **ranges):
    """Raise BadInput for a flag that is out of its range. ranges: {flag: (lowest, highest)}; infinity is always
    refused.
    """
    for flag, (low, high) in ranges.items():
        value = getattr(args, flag)
        if not low <= value <= high or value == math.inf:
            least = "positive" if low == POSITIVE else f"at least {low}"
            raise BadInput(f"--{flag} {value}: must be {least}" + (f" and at most {high}" if high < math.inf else ""))


def check_blocks(args, num_blocks):
    """Check --checkpointing and --stream_blocks for a DiT of num_blocks blocks. Streaming turns on activation
    checkpointing in all blocks. It excludes --fsdp, which leaves a rank only a shard of each block, and
    --pipeline_stages, which leaves a rank only some of the blocks. Raises BadInput.
    """
    check_ranges(args, stream_blocks=(0, num_blocks))
    if args.checkpointing not in (None, True):
        check_ranges(args, checkpointing=(0, num_blocks))
    if not args.stream_blocks:
        return
    if args.checkpointing not in (None, True, num_blocks):
        raise BadInput(
            f"--checkpointing {args.checkpointing}: not with --stream_blocks, whose blocks run again while they are "
            "here"
        )
    args.checkpointing = True
    if args.fsdp or args.pipeline_stages > 1:
        raise BadInput(
            f"--stream_blocks {args.stream_blocks}: not together with --fsdp or --pipeline_stages, which leave a rank "
            "only a part of the blocks"
        )


def parse_blocks(text, total):
    """Parse "20-29" or "0,3,5-7" into sorted block numbers; None or "" means all `total` blocks. Raises BadInput."""
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


def expert_schedule(expert, s, min_t=0.0, max_t=1.0):
    """Return {name of a DiT: its range [low, high) of timesteps in 0..1} for the DiTs that the run uses, in the order
    in which they alternate. expert, min_t, max_t: the flags. s: the Settings. Raises BadInput if min_t and max_t leave
    an expert no timesteps.
    """
    ranges = {"high": (s.boundary, 1.0), "low": (0.0, s.boundary)} if expert else {"dit": (0.0, 1.0)}
    ranges = ranges if expert in (None, "both") else {expert: ranges[expert]}
    schedule = {name: (max(low, min_t), min(high, max_t)) for name, (low, high) in ranges.items()}
    for name, (low, high) in schedule.items():
        if low >= high:
            serves = "{:g} to {:g}".format(*ranges[name])
            raise BadInput(
                f"--min_t {min_t:g} --max_t {max_t:g}: the {name}-noise expert serves {serves}; give --expert"
            )
    return schedule


def pick(config_class, args, **more):
    """Return an instance of config_class. A field gets its value from `more`, else from the flag of the same name, else
    its default.
    """
    names = {f.name for f in fields(config_class)} & vars(args).keys()
    return config_class(**{name: getattr(args, name) for name in names} | more)


def bucket_of(args, s):
    """Return the bucket (width, height, frames) of media that have the aspect ratio of --resolution. args: resolved
    flags.
    """
    width, height = parse_size(args.resolution, "--resolution")
    return *nearest_bucket(width, height, width * height, s.size_multiple), args.frames


def training_spec(args, s, **more):
    """Return the memory_estimate.TrainingSpec for resolved flags. more: further fields, which override those from the
    flags.
    """
    return memory_estimate.TrainingSpec(
        **dict(
            settings=s,
            device=args.device,
            dtype=DTYPES[args.dtype],
            batch=args.batch,
            bucket=bucket_of(args, s),
            checkpointing=args.checkpointing or 0,
            ema=args.ema > 0,
            first_frames=args.i2v_prob > 0,
            continuation=args.continuation,
            num_experts=len(expert_schedule(args.expert, s)),
        )
        | more
    )


def fit(args, pipe, predict):
    """Choose the number of blocks with activation checkpointing and set it in args and in the Pipeline. Print the Plan
    of the run, and return it. predict(checkpointing) -> a Plan. Raises BadInput if the host has too little memory.
    """
    args.checkpointing, need = choose_checkpointing(args.checkpointing, pipe.world, args.device, predict)
    pipe.checkpointing, pipe.takes_turns = args.checkpointing, need.takes_turns
    print(need)
    need.check_host()
    return need


def choose_checkpointing(wanted, world, device, predict, memory=None):
    """Return (blocks, the run's Plan). blocks: the number of blocks with activation checkpointing, or True for all.
    wanted: the parsed value of --checkpointing. If it is None, choose the fewest blocks with which the run fits into
    nine tenths of `memory`. predict(checkpointing) -> a Plan. memory: bytes of the device (default: its free memory; on
    a CPU, each rank's share of the free memory).
    """
    memory = memory or free_memory(device) / (world.size if str(device) == "cpu" else 1)
    limit, plans = 0.9 * world.least(memory), {}

    def excess(n):
        plans[n] = predict(n)
        return plans[n].peak - limit

    if wanted is not None:
        return wanted, predict(wanted)
    if excess(0) <= 0:
        return 0, plans[0]
    print(
        f"checkpointing: without it the run would take {memory_estimate.gb(plans[0].peak)} of "
        f"{memory_estimate.gb(memory)}"
    )
    n = fewest(excess, 0, plans[0].learning_blocks, plans[0].peak - limit)
    return (True, predict(True)) if n is None else (n, plans[n])


def fewest(excess, low, high, excess_of_low):
    """Return the smallest n in (low, high] with excess(n) <= 0, or None if excess(high) > 0. excess(n) must fall
    linearly in n, except perhaps from high - 1 to high. excess_of_low: excess(low), which must be positive.
    """
    (n0, e0), (n1, e1) = (low, excess_of_low), (high, excess(high))
    if e1 > 0:
        return None
    while n1 - n0 > 1:
        n = n0 + max(1, math.ceil((n1 - n0) * e0 / (e0 - e1)))
        if n == n1 < high:
            break
        n = min(n, n1 - 1)
        if (e := excess(n)) > 0:
            n0, e0 = n, e
        else:
            n1, e1 = n, e
    return n1
