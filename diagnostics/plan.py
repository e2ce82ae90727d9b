"""diag.py plan: what plan.py says of a run that is not started, and flags that make it fit on given GPUs."""

import math
import re
from dataclasses import replace

import torch

import sample
import train_lora
import train_te
from diagnostics.common import write_json
from nanowan import memory_estimate
from nanowan.devices import DTYPES, pick_device, pick_dtype
from nanowan.errors import BadInput, check_at_least
from nanowan.formats.dit import full_config
from nanowan.parallel import World
from nanowan.pipeline import Pipeline, Runtime
from nanowan.settings import released
from nanowan.training.flags import choose_checkpointing
from nanowan.variants.registry import VARIANTS
from nanowan.video import open_image

ASSUMED_GPU_BYTES = 80e9  # bytes of a GPU, where there is none to ask
SCRIPTS = {"train_lora": train_lora, "train_te": train_te, "sample": sample}


def planned(script, argv, ranks=1, mode=None):
    """The Plan of `script` with these flags, one of SCRIPTS, on so many ranks. --ckpt may name a released variant, of
    which no file is needed. mode: how sample.py computes guidance if it is guided and on one rank each (default: as it
    would choose itself).
    """
    args = SCRIPTS[script].arguments(argv)
    if args.ckpt in VARIANTS:
        pipe, s = None, released(args.ckpt)
        builders, args.device = memory_estimate.full_builders(s), args.device or "cuda"
    else:
        args.device = args.device or pick_device(None)
        here = torch.device(args.device).type == "cpu" or torch.cuda.is_available()
        pipe = Pipeline(args.ckpt, Runtime(args.device if here else "cpu"), text_encoder=args.text_encoder)
        s, builders = pipe.settings, memory_estimate.builders(pipe)
    fp8 = getattr(args, "base_dtype", None) == "fp8" or bool(pipe and pipe.fp8)
    layout = memory_estimate.parallel_layout(args, ranks, fp8)
    if script == "sample":
        return planned_sampling(args, s, builders, pipe, layout, mode)
    how = {"previews": bool(args.previews), "layout": layout}
    if script == "train_lora":
        with torch.device("meta"):
            num_blocks = len(next(iter(builders.values()))().blocks)
        more = (train_lora.check(args, s, num_blocks),)
    else:
        more = train_te.check(args, s) or ()
    absent = torch.device(args.device).type == "cuda" and not torch.cuda.is_available()

    def predict(checkpointing):
        return SCRIPTS[script].predict(args, s, builders, *more, checkpointing=checkpointing, **how)

    world, memory = World("cpu", distributed=False), ASSUMED_GPU_BYTES if absent else None
    return choose_checkpointing(args.checkpointing, world, args.device, predict, memory)[1]


def planned_sampling(args, s, builders, pipe, layout, mode):
    check_at_least(1, ulysses_size=args.ulysses_size)
    s = s.with_overrides(**sample.given_settings(args))
    image = None
    if s.conditioning.by_segments or args.image is None and s.conditioning.needs_image:  # in the size's own aspect
        s, size = replace(s, frames=args.infer_frames or s.frames), s.size
    else:
        s.conditioning.check(args.ckpt, args.image)
        image = None if args.image is None else open_image(args.image)
        size = s.conditioning.video_size(s.size, image)
    if not s.guided:
        mode = "none"
    elif args.guidance_parallel:
        mode = "parallel"
    elif mode is None:
        here = pipe and pipe.device.type == torch.device(args.device).type
        tokens = math.prod(s.token_grid(size, s.frames))
        mode = pipe.guidance_mode(tokens // args.ulysses_size) if here else "batched"
    spec = memory_estimate.SamplingSpec(
        settings=s,
        shape=s.latent_shape(size, s.frames),
        size=size,
        image=image is not None,
        mode=mode,
        layout=layout,
        tile=args.vae_tile,
        preview=args.preview_every > 0,
    )
    return memory_estimate.sampling(spec, builders, args.device, DTYPES[pick_dtype(args.dtype, args.device)])


def is_guided(args):
    """Whether any step of sample.py with these flags is guided."""
    s = released(args.ckpt) if args.ckpt in VARIANTS else Pipeline(args.ckpt).settings
    return s.with_overrides(**sample.given_settings(args)).guided


def shape_of(ckpt):
    """(blocks, heads) of a checkpoint's DiT."""
    if ckpt in VARIANTS:
        config = full_config(ckpt)
    else:
        config = Pipeline(ckpt).config()
    return config.num_layers, config.num_heads


def candidate_flags(script, ranks, num_blocks, num_heads, guided=True):
    """Flags to try in turn, those first that cost the least time."""
    fp8, checkpointing, stream = ["--base_dtype", "fp8"], ["--checkpointing"], ["--stream_blocks", str(num_blocks)]
    if script == "sample":
        halves = 2 if guided and ranks % 2 == 0 else 1
        share = ["--guidance_parallel"] if halves == 2 else []
        ulysses = math.gcd(ranks // halves, num_heads)
        share += ["--ulysses_size", str(ulysses)] if ranks > 1 else []
        return [share + more for more in ([], fp8, stream, fp8 + stream)]
    fsdp = [["--fsdp"]] if ranks > 1 else []
    ulysses = [["--fsdp", "--ulysses_size", str(n)] for n in (2, 4, 8) if ranks % n == 0 and num_heads % n == 0]
    if script == "train_te":
        return [["--no-checkpointing"], checkpointing, *(checkpointing + flags for flags in fsdp + ulysses)]
    return [
        ["--no-checkpointing"],
        checkpointing,
        *(checkpointing + flags for flags in fsdp),
        checkpointing + fp8,
        *(checkpointing + fp8 + flags for flags in fsdp),
        *(checkpointing + flags for flags in ulysses),
        checkpointing + fp8 + stream,
    ]


def propose(script, argv, gpus):
    """The first of candidate_flags that fits on GPUs given as COUNTxGB: (flags, Plan). sample.py's guidance may take
    two passes where one batch does not fit. Raises BadInput where nothing fits.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", gpus)
    if not match:
        raise BadInput(f"--gpus {gpus}: COUNTxGB, such as 8x80")
    # a card's GB are 2^30: the 7 % between are for CUDA itself and for holes
    ranks, limit = int(match[1]), int(match[2]) * 1e9
    args = SCRIPTS[script].arguments(argv)
    guided = script == "sample" and is_guided(args)
    modes = ("batched", "sequential") if guided and not args.guidance_parallel else (None,)
    least = math.inf
    for flags in candidate_flags(script, ranks, *shape_of(args.ckpt), guided):
        for mode in modes if "--guidance_parallel" not in flags else (None,):
            if "--no-checkpointing" in flags and {"--checkpointing", "--stream_blocks"} & set(argv):
                continue
            need = planned(script, [*argv, "--device", "cuda", *flags], ranks, mode)
            if need.peak <= limit:
                return argv + flags, need
            least = min(least, need.peak)
    raise BadInput(
        f"--gpus {gpus}: {script}.py needs at least {least / 1e9:.1f} GB on each; a smaller --resolution or --size, "
        "fewer --frames or a smaller --batch take less"
    )


def run(args):
    if args.gpus:
        flags, need = propose(args.script, args.flags, args.gpus)
        count = args.gpus.split("x")[0]
        launcher = "python" if count == "1" else f"torchrun --nproc_per_node={count}"
        print(f"{launcher} {args.script}.py {' '.join(flags)}")
    else:
        need = planned(args.script, args.flags)
    print(need)
    write_json(args.json, {key: getattr(need, key) for key in ("peak", "process", "phases", "disk", "host")})
