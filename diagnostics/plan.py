"""diag.py plan: the memory estimate of a run that is not started, and flags that make it fit on given GPUs."""

import functools
import math
import re
from dataclasses import replace
from typing import NamedTuple

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
from nanowan.sampling import given_settings
from nanowan.settings import released
from nanowan.training.flags import choose_checkpointing, fewest
from nanowan.training.previews import preview_settings
from nanowan.variants.registry import VARIANTS
from nanowan.video import open_image

ASSUMED_GPU_BYTES = 80e9  # bytes of a GPU, where there is none to ask
SCRIPTS = {"train_lora": train_lora, "train_te": train_te, "sample": sample}


class Machine(NamedTuple):
    """What a run is planned for: GPUs, one for each rank, bytes of each, and of host memory; None: as they are here."""

    ranks: int = 1
    memory: float | None = None
    host: float | None = None


def planned(script, argv, machine=Machine(), mode=None):  # noqa: B008
    """The Plan of `script`, one of SCRIPTS, with these flags. --ckpt may name a released variant, of which no file is
    needed. mode: how sample.py computes guidance if it is guided and on one rank each (default: as it would choose
    itself).
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
    how = {"layout": memory_estimate.parallel_layout(args, machine.ranks, fp8)}
    how |= {"memory": machine.memory, "host": machine.host}
    if script == "sample":
        return planned_sampling(args, s, builders, pipe, mode, how)
    with torch.device("meta"):
        num_blocks = len(next(iter(builders.values()))().blocks)
    blocks = SCRIPTS[script].check(args, s, num_blocks)
    more = (blocks,) if script == "train_lora" else ()
    shown = preview_settings(args, s)
    how["previews"] = s.latent_shape(shown.size, shown.frames) if args.previews else ()
    absent = torch.device(args.device).type == "cuda" and not torch.cuda.is_available()

    def predict(checkpointing):
        return SCRIPTS[script].predict(args, s, builders, *more, checkpointing=checkpointing, **how)

    world, memory = World("cpu", distributed=False), machine.memory or (ASSUMED_GPU_BYTES if absent else None)
    return choose_checkpointing(args.checkpointing, world, args.device, predict, memory)[1]


def planned_sampling(args, s, builders, pipe, mode, how):
    check_at_least(1, ulysses_size=args.ulysses_size)
    s = s.with_overrides(**given_settings(args))
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
        tile=args.vae_tile,
        preview=args.preview_every > 0,
        **how,
    )
    return memory_estimate.sampling(spec, builders, args.device, DTYPES[pick_dtype(args.dtype, args.device)])


def is_guided(args):
    """Whether any step of sample.py with these flags is guided."""
    s = released(args.ckpt) if args.ckpt in VARIANTS else Pipeline(args.ckpt).settings
    return s.with_overrides(**given_settings(args)).guided


def shape_of(ckpt):
    """(blocks, heads) of a checkpoint's DiT."""
    if ckpt in VARIANTS:
        config = full_config(ckpt)
    else:
        config = Pipeline(ckpt).config()
    return config.num_layers, config.num_heads


# ---- flags that fit ----------------------------------------------------------------------------------------------
class Candidates(NamedTuple):
    """`flags`, and with them so many blocks as `counted` says, from the fewest to the most: "checkpointing" or
    "streamed"; None: nothing is counted.
    """

    flags: list
    counted: str | None
    fewest: int = 0
    most: int = 0

    def with_number(self, script, n):
        """The flags with n blocks."""
        if self.counted is None:
            return self.flags
        if self.counted == "streamed":
            return [*self.flags, *["--checkpointing"] * (script != "sample"), "--stream_blocks", str(n)]
        spelled = {0: ["--no-checkpointing"], self.most: ["--checkpointing"]}
        return self.flags + spelled.get(n, ["--checkpointing", str(n)])


def candidates(script, given, ranks, num_blocks, num_heads, guided=True):
    """[Candidates], the least intrusive first: exact results before 8 bits, what costs no time before what does. given:
    flags that the user has set, which stay.
    """

    def counted(flags):
        """With as few blocks that recompute as may be, if that is still to be said."""
        if script == "sample" or {"--checkpointing", "--no-checkpointing", "--stream_blocks"} & given:
            return Candidates(flags, None)
        return Candidates(flags, "checkpointing", 0, num_blocks)

    def streamed(flags):
        if {"--stream_blocks", "--no-checkpointing", "--fsdp", "--pipeline_stages"} & given:
            return []
        return [Candidates(flags, "streamed", 1, num_blocks)]

    dtypes = [[], *([["--base_dtype", "fp8"]] if "--base_dtype" not in given else [])]
    if script == "sample":
        halves = 2 if guided and ranks % 2 == 0 else 1
        ulysses = ["--ulysses_size", str(math.gcd(ranks // halves, num_heads))] if ranks > 1 else []
        share = ["--guidance_parallel"] * (halves == 2) + ulysses
        return [c for dtype in dtypes for c in (counted(share + dtype), *streamed(share + dtype))]
    shards = [["--fsdp"]] if ranks > 1 else []
    shards += [["--fsdp", "--ulysses_size", str(n)] for n in (2, 4, 8) if ranks % n == 0 and num_heads % n == 0]
    found = [c for dtype in dtypes for c in (*(counted(dtype + shard) for shard in ([], *shards)), *streamed(dtype))]
    if script == "train_te" and not {"--train_blocks", "--rank"} & given:  # only the keywords' embeddings learn
        found += [c._replace(flags=["--train_blocks", "0", "--save", "delta", *c.flags]) for c in found]
    return found


def propose(script, argv, machine):
    """The first of `candidates` that fits on a Machine: (flags, Plan). Raises BadInput where nothing fits."""
    args, given = SCRIPTS[script].arguments(argv), {text.split("=")[0] for text in argv}
    guided = script == "sample" and is_guided(args)
    least = {"memory": math.inf, "host": math.inf}

    @functools.cache
    def plan(flags, mode=None):
        return planned(script, [*argv, "--device", "cuda", *flags], machine, mode)

    def modes(flags):
        """How guidance may be computed, the fastest first; sample.py sees what there is room for."""
        return ("batched", "sequential") if guided and "--guidance_parallel" not in {*argv, *flags} else (None,)

    def smallest(flags):
        """The Plan in the mode that takes the least."""
        need = plan(tuple(flags), modes(flags)[-1])
        least["memory"] = min(least["memory"], need.peak)
        if need.peak <= machine.memory:
            least["host"] = min(least["host"], need.host_peak)
        return need

    def excess(flags):
        return smallest(flags).peak - machine.memory

    tile = tile_that_fits(smallest, machine.memory) if script == "sample" and "--vae_tile" not in given else []
    for group in candidates(script, given, machine.ranks, *shape_of(args.ckpt), guided):

        def flags_of(n, group=group):
            return [*tile, *group.with_number(script, n)]

        n = group.fewest
        if excess(flags_of(n)) > 0:
            n = fewest(lambda n: excess(flags_of(n)), n, group.most, excess(flags_of(n))) if group.counted else None
        if n is not None and smallest(flags_of(n)).host_peak <= (machine.host or math.inf):
            needs = [plan(tuple(flags_of(n)), mode) for mode in modes(flags_of(n))]
            return argv + flags_of(n), next(need for need in needs if need.peak <= machine.memory)
    needs = f"{least['memory'] / 1e9:.1f} GB on each"
    if least["memory"] <= machine.memory:
        needs = f"{least['host'] / 1e9:.1f} GB of host memory"
    raise BadInput(
        f"--gpus {machine.ranks}x{machine.memory / 1e9:g}: {script}.py needs at least {needs}; a smaller --resolution "
        "or --size, fewer --frames or a smaller --batch take less"
    )


TILES = (32, 16, 8)  # latent pixels; the last one is below what is exact


def tile_that_fits(plan, memory):
    """Flags with which sample.py's decode fits: none, or the largest tile that does."""
    for flags in ([], *(["--vae_tile", str(tile)] for tile in TILES)):
        need = plan(flags)
        if need.process + sum(need.phases["decode"].values()) <= memory:
            break
    return flags


def parse_machine(gpus, host):
    """--gpus COUNTxGB, --host GB -> Machine."""
    match = re.fullmatch(r"([1-9]\d*)x(\d+(?:\.\d+)?)", gpus)
    if not match or not float(match[2]):
        raise BadInput(f"--gpus {gpus}: COUNTxGB, such as 8x80 or 1x23.5")
    check_at_least(1, host=host)
    # a card's GB are 2^30: the 7 % between are for CUDA itself and for holes; as much of the host is for the system
    return Machine(int(match[1]), float(match[2]) * 1e9, math.inf if host is None else host * 1e9)


def run(args):
    script = SCRIPTS[args.script].arguments(args.flags)
    if script.ckpt in VARIANTS and getattr(script, "data", None):
        print(f"--data {script.data}: not read, since {script.ckpt} is no folder; clips of --resolution are planned")
    if args.gpus:
        machine = parse_machine(args.gpus, args.host)
        flags, need = propose(args.script, args.flags, machine)
        launcher = "python" if machine.ranks == 1 else f"torchrun --nproc_per_node={machine.ranks}"
        print(f"{launcher} {args.script}.py {' '.join(flags)}")
    else:
        need = planned(args.script, args.flags)
    print(need)
    write_json(
        args.json, {key: getattr(need, key) for key in ("peak", "process", "phases", "disk", "host", "host_peak")}
    )
