"""diag.py plan: predict the memory, disk space and time of a run, and propose flags with which it fits given GPUs."""

import functools
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

import sample
import train_lora
import train_te
from diagnostics.common import write_json
from lora import inject, lora_layers
from nanowan import flops, memory_estimate
from nanowan.devices import DTYPES, pick_device, pick_dtype
from nanowan.errors import BadInput, check_at_least
from nanowan.flags import parallel_layout
from nanowan.formats.dit import full_config
from nanowan.formats.t5 import XXL, read_encoder
from nanowan.parallel import World
from nanowan.pipeline import Pipeline, Runtime
from nanowan.sampling import given_settings
from nanowan.settings import released
from nanowan.training.flags import bucket_of, choose_checkpointing, data_config, fewest
from nanowan.training.log import duration
from nanowan.training.previews import preview_settings
from nanowan.training.scan import scan_source, sizes_of
from nanowan.variants.registry import VARIANTS
from nanowan.video import open_image

ASSUMED_GPU_BYTES = 80e9  # assumed memory of a GPU, if this machine has no GPU
USABLE = 0.95  # share of the memory that a plan may count on; the rest is for workspaces and fragmentation
SCRIPTS = {"train_lora": train_lora, "train_te": train_te, "sample": sample}
CARDS = {"4090": 24, "H100": 80}  # {GPU: its GB}; times are printed for these if no GPU is named


class Machine(NamedTuple):
    """A machine to plan a run for. ranks: number of GPUs, one per rank. memory: bytes of each GPU. host: bytes of host
    memory. If memory or host is None, the plan uses the memory of the machine on which diag.py runs. card: a name in
    flops.CARDS, or None if the GPU is not known.
    """

    ranks: int = 1
    memory: float | None = None
    host: float | None = None
    card: str | None = None


class Job:
    """A run of a script with given flags, to be planned. script: a name in SCRIPTS. argv: the flags. If --ckpt names a
    released variant, no checkpoint file is needed. If --data exists, it is scanned to find the largest bucket, the
    longest caption and the size of the cache. Raises BadInput for wrong flags.
    """

    def __init__(self, script, argv):
        self.script, self.args = script, SCRIPTS[script].arguments(argv)
        args = self.args
        if args.ckpt in VARIANTS:
            self.pipe, self.settings = None, released(args.ckpt)
            self.builders, args.device = memory_estimate.full_builders(self.settings), args.device or "cuda"
        else:
            args.device = args.device or pick_device(None)
            here = torch.device(args.device).type == "cpu" or torch.cuda.is_available()
            self.pipe = Pipeline(args.ckpt, Runtime(args.device if here else "cpu"), text_encoder=args.text_encoder)
            self.settings, self.builders = self.pipe.settings, memory_estimate.builders(self.pipe)
        self.fp8 = getattr(args, "base_dtype", None) == "fp8" or bool(self.pipe and self.pipe.fp8)
        self.config = self.pipe.config() if self.pipe else full_config(args.ckpt)
        if script == "sample":
            check_at_least(1, ulysses_size=args.ulysses_size)
            self._open_clip()
        else:
            self.blocks = SCRIPTS[script].check(args, self.settings, self.config.num_layers)
            self.sizes = self._data_sizes() if self.reads_data else {"bucket": bucket_of(args, self.settings)}
            self.checkpointing = args.checkpointing or 0

    # ---- what is computed ----------------------------------------------------------------------------------------
    @property
    def reads_data(self):
        """Whether all sources of --data exist, so that they can be scanned."""
        data = getattr(self.args, "data", None)
        return bool(data) and all(Path(values["source"]).exists() for values in data)

    def _data_sizes(self):
        """Return the sizes of the data and of the cache, as data.Dataset.sizes would return them for --data."""
        args, s = self.args, self.settings
        items, samples = data_items(self)[0], s.parts.samples(SimpleNamespace(config=lambda: self.config))
        entries = self.pipe and read_encoder(self.pipe.files("text")).entries
        width = entries["token_embedding.weight"].shape[1] if entries else XXL[1]
        row_bytes = width * DTYPES[args.dtype].itemsize * (self.script == "train_lora")  # train_te.py caches no texts
        texts = dict.fromkeys(["", *(c for i in items for c in i.captions)])
        return sizes_of(items, texts, samples, s, row_bytes)

    def _open_clip(self):
        """Set self.settings, self.image and self.size to the Settings, the image and the size of the video that
        sample.py would make.
        """
        args = self.args
        s, self.image = self.settings.with_overrides(**given_settings(args)), None
        # without an image the video has the aspect ratio of the size
        if s.conditioning.by_segments or args.image is None and s.conditioning.needs_image:
            s, self.size = replace(s, frames=args.infer_frames or s.frames), s.size
        else:
            s.conditioning.check(args.ckpt, args.image)
            self.image = None if args.image is None else open_image(args.image)
            self.size = s.conditioning.video_size(s.size, self.image)
        self.settings = s

    @property
    def latents(self):
        """The shape (C,T',h,w) of one sample's latents."""
        if self.script == "sample":
            return self.settings.latent_shape(self.size, self.settings.frames)
        *size, frames = self.sizes["bucket"]
        return self.settings.latent_shape(size, frames)

    @property
    def lacks_gpu(self):
        """Whether the Job is for a GPU, but the machine on which diag.py runs has none."""
        return torch.device(self.args.device).type == "cuda" and not torch.cuda.is_available()

    # ---- memory --------------------------------------------------------------------------------------------------
    def plan(self, machine=Machine(), mode=None):  # noqa: B008
        """Return the memory_estimate.Plan of this run on a Machine. mode: how sample.py computes guidance, "batched" or
        "sequential"; None: as sample.py would choose. A mode has no effect if sampling is not guided or
        --guidance_parallel is given.
        """
        how = {"layout": parallel_layout(self.args, machine.ranks, self.fp8)}
        how |= {"memory": machine.memory, "host": machine.host}
        if self.script == "sample":
            return self._plan_sampling(mode, how)
        args, s = self.args, self.settings
        memory = machine.memory or (ASSUMED_GPU_BYTES if self.lacks_gpu else None)
        how |= self.sizes | {"memory": memory}
        if args.previews:
            shown = preview_settings(args, s)
            how["previews"] = s.latent_shape(shown.size, shown.frames)
        more = (self.blocks,) if self.script == "train_lora" else ()

        def predict(checkpointing):
            return SCRIPTS[self.script].predict(args, s, self.builders, *more, checkpointing=checkpointing, **how)

        world = World("cpu", distributed=False)
        chosen = choose_checkpointing(args.checkpointing, world, args.device, predict, memory)
        self.checkpointing, need = chosen
        return need

    def _plan_sampling(self, mode, how):
        args, s, pipe = self.args, self.settings, self.pipe
        if not s.guided:
            mode = "none"
        elif args.guidance_parallel:
            mode = "parallel"
        elif not s.parts.model.batches_guidance:
            mode = "sequential"
        elif mode is None:
            here = pipe and pipe.device.type == torch.device(args.device).type
            tokens = math.prod(s.token_grid(self.size, s.frames))
            mode = pipe.guidance_mode(tokens // args.ulysses_size) if here else "batched"
        spec = memory_estimate.SamplingSpec(
            settings=s,
            shape=self.latents,
            size=self.size,
            image=self.image is not None,
            mode=mode,
            tile=args.vae_tile,
            preview=args.preview_every > 0,
            **how,
        )
        return memory_estimate.sampling(spec, self.builders, args.device, DTYPES[pick_dtype(args.dtype, args.device)])

    # ---- time ----------------------------------------------------------------------------------------------------
    @functools.cached_property
    def work(self):
        """The work of a step on one rank: (flops.Flops, bytes that elementwise operations read and write, bytes copied
        from the host).
        """
        args, c, latents = self.args, self.config, self.latents[1:]
        if self.script == "sample":
            passes, ranks = 2 if self.settings.guided else 1, args.ulysses_size * (1 + args.guidance_parallel)
            counted, passed = flops.Flops().plus(flops.forward(c, latents), passes), passes
            moved = passes / (1 + args.guidance_parallel)
        else:
            n, ranks = self.checkpointing, args.ulysses_size * args.pipeline_stages
            repeated = (c.num_layers if n is True else n) / c.num_layers
            text, batch, names, moved = self.sizes.get("text", 64), args.batch * args.accumulate, (), 2
            with torch.device("meta"):
                dit, encoder = self.builders[self.settings.expert_names[0]](), self.builders["text"]()
            if self.script == "train_lora":
                inject(dit, args.targets, args.rank, args.alpha, blocks=self.blocks)
                names = tuple(lora_layers(dit))
            one = flops.training_step(c, latents, text, 1, names, args.rank or 16, n)
            if getattr(args, "preserve", 0):  # half of the samples also need the base's prediction
                one = one.plus(flops.forward(c, latents, text), 0.5)
            if self.script == "train_te":
                blocks = [sum(p.numel() for p in block.parameters()) for block in encoder.blocks]
                top = len(blocks) if args.train_blocks is None else args.train_blocks
                trained = 0 if args.rank else sum(blocks[len(blocks) - top :])
                one = one.plus(flops.encoder_step(sum(blocks), trained, text), 1 + (args.anchor > 0))
            counted, passed = flops.Flops().plus(one, batch), batch * (3 + repeated)
        share = flops.Flops().plus(counted, 1 / ranks)
        streamed = args.stream_blocks * 2 * (4 * 2 * c.dim**2 + 2 * c.dim * c.ffn_dim) * moved / (1 + self.fp8)
        return share, passed * flops.elementwise_bytes(c, latents) / ranks, streamed

    def step_seconds(self, card):
        """Return the predicted seconds of a step on the GPU `card`, or None if the rates of this GPU are not known.
        Copies from host memory overlap with the computation.
        """
        counted, nbytes, streamed = self.work
        seconds = flops.predict_seconds(counted, card, self.fp8, nbytes)
        return seconds and max(seconds, streamed / flops.card_of(card).host)

    def times(self, card=None, peak=0):
        """Return a line of text with the predicted time on the GPU `card`. If card is None, the line names all of
        CARDS: those with less than `peak` bytes of memory as too small, the rest with the predicted time.
        """
        lines = []
        for name in (card,) if card else CARDS:
            step = self.step_seconds(name)
            steps, run = (self.settings.steps, "a video") if self.script == "sample" else (self.args.steps, "the run")
            said = "no rates are known" if step is None else f"{step:.2g} s a step, {duration(steps * step)} for {run}"
            if not card and peak > CARDS[name] * 2**30:
                said = f"has {CARDS[name]} GB, which is too little"
            lines.append(f"{name} {said}")
        beside = "text and decoding" if self.script == "sample" else "caching, previews and saves"
        steps = f"{steps} steps, {beside} not included"
        return f"  time, predicted from assumed rates, not measured ({steps}): {'; '.join(lines)}"


def data_items(job):
    """Scan the --data of a Job. Return ([Item], [(path, reason)]), as scan.scan does: the samples and the skipped
    files.
    """
    s, config = job.settings, data_config(job.args, job.settings, None)
    cache = config.cache if config.cache.is_dir() else None
    scans = [scanned(source, s.variant, s.size_multiple, s.fps, cache) for source in config.sources]
    return tuple(sum(lists, []) for lists in zip(*scans))


@functools.cache
def scanned(source, variant, multiple, fps, cache):
    """Return the result of scan_source for a source of data. The result is cached, so that `propose` scans the data
    once for all the flags it tries. variant: a name in VARIANTS. multiple, fps: the size_multiple and the fps of the
    Settings. cache: the cache folder, or None.
    """
    samples = released(variant).parts.samples(SimpleNamespace(config=lambda: full_config(variant)))
    return scan_source(source, SimpleNamespace(size_multiple=multiple, fps=fps), samples, cache)


def planned(script, argv, machine=Machine(), mode=None):  # noqa: B008
    """Return the Plan of a run on a Machine. script: a name in SCRIPTS. argv: the flags. mode: as in Job.plan."""
    return Job(script, argv).plan(machine, mode)


def is_guided(args):
    """Return whether sample.py with the flags in `args` computes guidance in any step."""
    s = released(args.ckpt) if args.ckpt in VARIANTS else Pipeline(args.ckpt).settings
    return s.with_overrides(**given_settings(args)).guided


def shape_of(ckpt):
    """Return (number of blocks, number of attention heads) of a checkpoint's DiT."""
    if ckpt in VARIANTS:
        config = full_config(ckpt)
    else:
        config = Pipeline(ckpt).config()
    return config.num_layers, config.num_heads


# ---- flags that fit ----------------------------------------------------------------------------------------------
class Candidates(NamedTuple):
    """Flags with which a run may fit: `flags`, and flags that set a number n of blocks, from `fewest` to `most`.
    counted: what n counts: "checkpointing", blocks with activation checkpointing; "streamed", blocks in host memory (in
    training, all blocks then use activation checkpointing); None, nothing: `flags` are all there is.
    """

    flags: list
    counted: str | None
    fewest: int = 0
    most: int = 0

    def with_number(self, script, n):
        """Return `flags`, followed by the flags that set the number of blocks to n."""
        if self.counted is None:
            return self.flags
        if self.counted == "streamed":
            return [*self.flags, *["--checkpointing"] * (script != "sample"), "--stream_blocks", str(n)]
        spelled = {0: ["--no-checkpointing"], self.most: ["--checkpointing"]}
        return self.flags + spelled.get(n, ["--checkpointing", str(n)])


def candidates(script, user_flags, ranks, num_blocks, num_heads, guided=True):
    """Return a list of Candidates in the order in which to try them: exact flags before 8-bit weights, flags that cost
    no time before flags that cost time. user_flags: names of the flags that the user has set, which limit what
    candidates contain. guided: whether sample.py computes guidance.
    """

    def counted(flags):
        """Return Candidates with `flags`, which count blocks with activation checkpointing. If the script is sample.py,
        or if the user has set --checkpointing, --no-checkpointing or --stream_blocks, they count nothing.
        """
        if script == "sample" or {"--checkpointing", "--no-checkpointing", "--stream_blocks"} & user_flags:
            return Candidates(flags, None)
        return Candidates(flags, "checkpointing", 0, num_blocks)

    def streamed(flags):
        if {"--stream_blocks", "--no-checkpointing", "--fsdp", "--pipeline_stages"} & user_flags:
            return []
        return [Candidates(flags, "streamed", 1, num_blocks)]

    dtypes = [[], *([["--base_dtype", "fp8"]] if "--base_dtype" not in user_flags else [])]
    if script == "sample":
        halves = 2 if guided and ranks % 2 == 0 else 1
        ulysses = ["--ulysses_size", str(math.gcd(ranks // halves, num_heads))] if ranks > 1 else []
        split_by_user = {"--ulysses_size", "--guidance_parallel"} & user_flags
        share = [] if split_by_user else ["--guidance_parallel"] * (halves == 2) + ulysses
        return [c for dtype in dtypes for c in (counted(share + dtype), *streamed(share + dtype))]
    fsdp = ["--fsdp"] * ("--fsdp" not in user_flags)
    shards = [fsdp] if fsdp and ranks > 1 else []
    if "--ulysses_size" not in user_flags:
        shards += [[*fsdp, "--ulysses_size", str(n)] for n in (2, 4, 8) if ranks % n == 0 and num_heads % n == 0]
    plans = [c for dtype in dtypes for c in (*(counted(dtype + shard) for shard in ([], *shards)), *streamed(dtype))]
    if script == "train_te" and not {"--train_blocks", "--rank"} & user_flags:
        # last of all, train only the keywords' embeddings
        save = ["--save", "delta"] * ("--save" not in user_flags)
        plans += [c._replace(flags=["--train_blocks", "0", *save, *c.flags]) for c in plans]
    return plans


def propose(script, argv, machine):
    """Find flags with which a run fits on a Machine. Return (flags, Plan of the run). flags: `argv`, then --vae_tile if
    decoding needs tiles, then the flags of the first of `candidates` that fits. Raises BadInput if none fits.
    """
    args, user_flags = SCRIPTS[script].arguments(argv), {text.split("=")[0] for text in argv}
    guided = script == "sample" and is_guided(args)
    least, least_on_host = (math.inf, []), (math.inf, [])

    @functools.cache
    def plan(flags, mode=None):
        return planned(script, [*argv, "--device", "cuda", *flags], machine, mode)

    def modes(flags):
        """Return the ways to compute guidance, the fastest first. sample.py uses the first way for which there is
        enough memory.
        """
        return ("batched", "sequential") if guided and "--guidance_parallel" not in {*argv, *flags} else (None,)

    def smallest(flags):
        """Return the Plan of a run with these flags that computes guidance in the way that takes the least memory. For
        the error message, `least` keeps the lowest peak of all Plans so far, with its flags; least_on_host keeps the
        lowest host_peak of those Plans whose peak fits the GPU.
        """
        nonlocal least, least_on_host
        need = plan(tuple(flags), modes(flags)[-1])
        least = min(least, (need.peak, flags))
        if need.peak <= machine.memory:
            least_on_host = min(least_on_host, (need.host_peak, flags))
        return need

    def excess(flags):
        """Return the bytes by which a run with these flags exceeds the GPU's memory; a negative number is free memory.
        The main phase, "denoise" or "training", is the only one that the number of checkpointed or streamed blocks
        affects. If every other phase fits, return the main phase's excess, else the largest excess of another phase.
        """
        need, changed = smallest(flags), "denoise" if script == "sample" else "training"
        phases = {name: need.process + sum(parts.values()) - machine.memory for name, parts in need.phases.items()}
        beside = max((n for name, n in phases.items() if name != changed), default=0)
        return beside if beside > 0 else phases[changed]

    tile = tile_that_fits(smallest, machine.memory) if script == "sample" and "--vae_tile" not in user_flags else []
    for group in candidates(script, user_flags, machine.ranks, *shape_of(args.ckpt), guided):

        def flags_of(n, group=group):
            return [*tile, *group.with_number(script, n)]

        n = group.fewest
        if excess(flags_of(n)) > 0:
            n = fewest(lambda n: excess(flags_of(n)), n, group.most, excess(flags_of(n))) if group.counted else None
        if n is not None and smallest(flags_of(n)).host_peak <= (machine.host or math.inf):
            needs = [plan(tuple(flags_of(n)), mode) for mode in modes(flags_of(n))]
            return argv + flags_of(n), next(need for need in needs if need.peak <= machine.memory)
    fits = least[0] <= machine.memory
    nbytes, flags = least_on_host if fits else least
    raise BadInput(
        f"--gpus: {script}.py needs at least {nbytes / 1e9:.1f} GB {'of host memory' if fits else 'on each GPU'}, with "
        f"{' '.join(flags) or 'these flags'}, and {(machine.host if fits else machine.memory) / 1e9:.1f} GB can be "
        "counted on; a smaller --resolution or --size, fewer --frames or a smaller --batch take less"
    )


TILES = (32, 16, 8)  # side of a tile in latent pixels; the smallest is too small for an exact result


def tile_that_fits(plan, memory):
    """Return the flags for sample.py with which decoding fits in `memory` bytes: [] if no tiles are needed, else
    --vae_tile with the largest of TILES that fits, or with the smallest if none fits. plan(flags) -> the Plan of a run
    with these flags.
    """
    for flags in ([], *(["--vae_tile", str(tile)] for tile in TILES)):
        need = plan(flags)
        if need.process + sum(need.phases["decode"].values()) <= memory:
            break
    return flags


def parse_machine(gpus, host):
    """Return the Machine that --gpus COUNTxGB[:CARD] and --host GB describe. A GB is 2^30 bytes, for a GPU as for the
    host. The Machine has only USABLE times the memory that the flags give. Raises BadInput for wrong values.
    """
    match = re.fullmatch(r"([1-9]\d*)x(\d+(?:\.\d+)?)(?::(\w+))?", gpus)
    if not match or not float(match[2]):
        raise BadInput(f"--gpus {gpus}: COUNTxGB or COUNTxGB:CARD, such as 8x80, 1x24 or 1x24:4090")
    if match[3] and match[3] not in flops.CARDS:
        raise BadInput(f"--gpus {gpus}: times are known for {', '.join(flops.CARDS)}")
    check_at_least(1, host=host)
    usable = USABLE * 2**30
    return Machine(int(match[1]), float(match[2]) * usable, math.inf if host is None else host * usable, match[3])


def run(args):
    card, notes = None, []
    if args.gpus:
        machine = parse_machine(args.gpus, args.host)
        flags, need = propose(args.script, args.flags, machine)
        launcher = "python" if machine.ranks == 1 else f"torchrun --nproc_per_node={machine.ranks}"
        print(f"{launcher} {args.script}.py {' '.join(flags)}")
        size = machine.memory / USABLE
        notes.append(
            f"  a GPU of {size / 2**30:g} GB has {size / 1e9:.1f} GB of 10^9 bytes, and {machine.memory / 1e9:.1f} of "
            "them are counted on"
        )
        if args.script == "train_te" and "--train_blocks" in flags[len(args.flags) :]:
            notes.append(
                "  all blocks do not fit: the keywords' embeddings alone learn; try --rank 16, a LoRA in every block"
            )
        job, card = Job(args.script, flags), machine.card
    else:
        job = Job(args.script, args.flags)
        need = job.plan()
        if job.lacks_gpu and args.script != "sample":
            notes.append(
                f"  a GPU of {ASSUMED_GPU_BYTES / 1e9:.0f} GB is assumed, as none is here; --gpus 1x24 names one"
            )
    data = getattr(job.args, "data", None)
    if data and not job.reads_data:
        notes.append(f"  --data {data[0]['source']}: not there; clips of --resolution and --frames are planned")
    elif data:
        notes.append("  --data: the largest clips are {}x{}, {} frames".format(*job.sizes["bucket"]))
    elif args.script != "sample":
        notes.append("  without --data the cache is not counted")
    if card is None and torch.device(job.args.device).type == "cuda" and torch.cuda.is_available():
        card = torch.cuda.get_device_name()
    timed = torch.device(job.args.device).type == "cuda" or bool(args.gpus)
    print(need, *[job.times(card, need.peak)] * timed, *notes, sep="\n")
    seconds = {name: job.step_seconds(name) for name in ((card,) if card else CARDS)} if timed else {}
    result = {key: getattr(need, key) for key in ("peak", "process", "phases", "disk", "host", "host_peak")}
    write_json(args.json, result | {"seconds": seconds})
