"""What a run will need, before it starts: peak memory and bytes on disk.

The models are built as fake tensors, which have shapes but no memory, and really run: a step forward, backward and
through the optimizer, an encode, a decode. Every tensor made on the way is counted from its birth to its death. What
PyTorch's operators use inside themselves, and an allocator's waste, are not seen.
"""

import contextlib
import importlib
import math
import resource
import weakref
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fp8
import kernels
import ops
from checkpoint import read_headers
from offload import spread
from optim import EMA, AdamW8bit, adamw
from parallel.ulysses import cut
from sample import DTYPES, free_memory, parse_size
from t5 import XXL, TextEncoder, build_t5
from train import experts, noised
from vae import FULL, VAE, build_vae, channels_last
from wan import Wan, full_config, keep_fp32, read_config

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12}  # dense bf16 of the data sheets
CUDA_CONTEXT = 600 << 20  # bytes that a process takes on a GPU before its first tensor, about
CPU_LIBRARIES = 50 << 20  # what MKL, oneDNN and the heap's holes take once work begins, as measured on small runs


def used(device):
    """Peak bytes so far: allocated on a GPU, or this process's resident memory."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident("VmHWM")


def resident(field="VmRSS"):
    """This process's resident memory now, or at its peak (VmHWM), in bytes."""
    try:
        return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Tracker(TorchDispatchMode):
    """Counts the bytes of all tensors made inside: `now` those alive, `peak` the most there were at once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        storages = lambda tree: [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
        self.seen.update(storages((args, kwargs)))  # made outside, such as weights, whose views are no new memory
        out = func(*args, **(kwargs or {}))
        for storage in storages(out):
            if storage not in self.seen:
                self.seen.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage.nbytes())
        return out

    def _gone(self, nbytes):
        self.now -= nbytes


def traced(f):
    """Peak bytes of what f() makes, its result included."""
    with Tracker() as tracker:
        f()
    return tracker.peak


def nbytes(model):
    return sum(t.nbytes for t in [*model.parameters(), *model.buffers()])


class Layout(NamedTuple):
    """How a DiT lies on devices: in 8 bits, `stream` blocks on the host, sharded over `shards` ranks, tokens over
    `sequence`, blocks over `stages`.
    """

    fp8: bool = False
    stream: int = 0
    shards: int = 1
    sequence: int = 1
    stages: int = 1

    @classmethod
    def of(cls, args, ranks):
        """That of a script's flags on so many ranks."""
        stages = getattr(args, "pipeline_stages", 1)
        return cls(
            getattr(args, "base_dtype", None) == "fp8",
            getattr(args, "stream_blocks", 0),
            ranks if getattr(args, "fsdp", False) else 1,
            args.ulysses_size,
            stages,
        )

    def weights(self, dit):
        """(bytes of a DiT on a device, of it on the host); what is not in blocks is everywhere."""
        blocks = [nbytes(b) for b in dit.blocks]
        rest, own = nbytes(dit) - sum(blocks), blocks[: -(-len(blocks) // self.stages)]
        if self.stream:
            away = sum(blocks[i] for i in spread(self.stream, len(blocks)))
            return rest + sum(blocks) - away + 2 * max(blocks), away
        if self.shards > 1:  # the block at work and the next one are whole
            return rest + sum(own) // self.shards + 2 * max(blocks), 0
        return rest + sum(own), 0

    def grid(self, grid):
        """Of a token grid (T',H',W'), one rank's part and its padding."""
        axis, n = cut(grid, self.sequence)
        return (*grid[:axis], n, *grid[axis + 1 :])

    def shape(self, shape):
        """The same of latents (C,T',h,w)."""
        t, h, w = self.grid((shape[1], shape[2] // 2, shape[3] // 2))
        return (shape[0], t, 2 * h, 2 * w)


ONE = Layout()


def builders(models):
    """{part: function that builds it} of a checkpoint, from its headers."""
    text, vae = read_headers(models.files("text")[:1]), read_headers(models.files("vae"))
    found = {
        name: lambda name=name, entries=entries: Wan(read_config(models.folder(name), entries))
        for name, entries in models.headers.items()
    }
    return found | {"text": lambda: build_t5(text, models.dir), "vae": lambda: build_vae(vae, models.dir)}


def full_builders(s):
    """The same of a released size, of which no file is needed. s: the settings of a variant."""
    dits = {name: lambda: Wan(full_config(s["variant"])) for name in (("high", "low") if s["experts"] else ("dit",))}
    return dits | {"text": lambda: TextEncoder(*XXL), "vae": lambda: VAE(*FULL[s["vae"]])}


def build(build, part, dtype, cuda=False):
    """A part in the dtypes that its loader gives it, for the fake CPU, or as on a GPU, where the VAE decodes in
    `dtype`.
    """
    model = build[part]().eval().requires_grad_(False)
    for name, p in model.named_parameters():
        full = (
            part == "vae"
            and not (cuda and name.startswith(("decoder.", "conv2.")))
            or part not in ("vae", "text")
            and keep_fp32(name)
        )
        p.data = p.data.to(torch.float32 if full else dtype)
    return channels_last(model) if part == "vae" else model


@contextlib.contextmanager
def pretending(cuda):
    """Tensors have no memory, and operations are those of a GPU, or a CPU's."""
    with (
        FakeTensorMode(),
        ops.using("cuda" if kernels.BUILT else "triton", pretend=True) if cuda else contextlib.nullcontext(),
    ):
        yield


class Plan:
    """`phases` {name: {what: bytes}} of a run on `device`, of which the largest decides, `disk` {what: bytes}, and
    `host`, the same of what a GPU's rank keeps in host memory.
    """

    def __init__(self, device, phases, disk, host={}):
        self.cuda = torch.device(device).type == "cuda"
        self.device, self.phases, self.disk = device, phases, disk
        self.host = {k: v for k, v in host.items() if v and self.cuda}
        for name in (
            "av",
            "ftfy",
            "PIL.Image",
            "torch.utils.tensorboard",
        ):  # what runs import, of which a process's memory is full
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        self.process = CUDA_CONTEXT if self.cuda else resident() + CPU_LIBRARIES

    @property
    def peak(self):
        return self.process + max(sum(p.values()) for p in self.phases.values())

    def __str__(self):
        gb = lambda n: f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"
        lines = [f"plan: peak memory {gb(self.peak)} on {self.device}, {gb(self.process)} of it the process itself"]
        lines += [
            f"  {name}: {gb(sum(parts.values()))} (" + ", ".join(f"{k} {gb(v)}" for k, v in parts.items()) + ")"
            for name, parts in self.phases.items()
        ]
        if self.host:
            lines.append("  in host memory: " + ", ".join(f"{k} {gb(v)}" for k, v in self.host.items()))
        return "\n".join(lines + ["  on disk: " + ", ".join(f"{k} {gb(v)}" for k, v in self.disk.items())])

    def compare(self, device):
        """After the run: what it used beside what was planned."""
        planned = self.peak - self.process * self.cuda  # a GPU's context is not among its allocated bytes
        return f"peak memory {used(device) / 1e9:.3f} GB, planned {planned / 1e9:.3f} GB ({100 * (planned / used(device) - 1):+.0f} %)"


def sampling_phase(parts, s, dtype, shape, pixels, frames, batch, text, cuda, layout=ONE, tile=0):
    """Bytes of the DiT on the device and the host, of the VAE, and beyond weights of denoising a batch (guided), and of
    decoding it.
    """
    dit, vae = build(parts, next(iter(parts)), dtype), build(parts, "vae", dtype, cuda)
    if layout.fp8:
        fp8.convert(dit, {})
    dit.cache_text_kv = layout == ONE or layout == ONE._replace(fp8=True)
    local = layout.shape(shape)
    x = torch.empty(batch, dit.config.in_dim, *local[1:])
    emb = torch.empty(batch, text, dit.config.text_dim, dtype=dtype)

    @torch.no_grad()
    def step():
        texts = dit.embed_text(emb, cache=True), dit.embed_text(torch.cat([emb, emb]), cache=True)
        state = [torch.empty_like(x[:, : shape[0]]) for _ in range(4)]  # the latents and what the solver remembers
        return dit(torch.cat([x, x]), torch.empty(2 * batch, local[1]), texts[1]), state

    # a decode beyond its first three latent frames, and tiles beyond three a side, only add to the finished video
    t, h, w = min(3, shape[1]), *(min(n, 3 * tile or n) for n in shape[2:])
    short, scale = torch.empty(batch, shape[0], t, h, w), pixels[0] // shape[3]
    more = 4 * 3 * batch * (pixels[0] * pixels[1] * frames - scale**2 * h * w * (1 + 4 * (t - 1)))
    return *layout.weights(dit), nbytes(vae), traced(step), traced(lambda: vae.decode(short, tile)) + more


def sampling(s, parts, device, dtype, batch=1, text=64, layout=ONE, tile=0):
    """Plan of sampling `batch` clips at once. s: the resolved settings (pixels, frames, shape); parts: from `builders`;
    tile: --vae_tile.
    """
    cuda = torch.device(device).type == "cuda"
    with pretending(cuda):
        dit, host, vae, step, decode = sampling_phase(
            parts, s, dtype, s["shape"], s["pixels"], s["frames"], batch, text, cuda, layout, tile
        )
        encoder = nbytes(build(parts, "text", dtype))
    if not cuda:
        dit += host
    experts, video = len(parts) - 2, 3 * s["frames"] * s["pixels"][0] * s["pixels"][1] * batch
    together = encoder + experts * dit + vae
    apart = cuda or together + max(step, decode) > free_memory(device)
    phases = {
        "encode prompts": {"encoder": encoder},
        "denoise": {"DiT": dit if apart else together, "activations": step},
        "decode": {"VAE": vae if apart else together, "activations and video": decode},
    }
    return Plan(
        device,
        phases,
        {"mp4, at most about": video // 20},
        {"streamed blocks": host, "the other expert": (dit + host) * (experts - 1), "encoder": encoder},
    )


def training(args, s, parts, adapt, bucket=None, text=64, cache=(0, 0), encode=True, previews=False, ranks=1):
    """Plan of a training run, per rank.

    args, s: resolved flags and settings. parts: from `builders`. adapt(dit, encoder) makes what is to be trained
    trainable and returns the parameters; where it changes the encoder, that is run too. bucket (width, height, frames):
    the largest. text: tokens of a long caption. cache: bytes of latents and of texts. encode: whether latents are still
    to be computed. ranks: how many processes there are.
    """
    dtype, cuda = DTYPES[args.dtype], torch.device(args.device).type == "cuda"
    w, h, frames = bucket or (*parse_size(args.resolution), args.frames)
    side = 16 if s["vae"] == "2.2" else 8
    turns, layout = len(experts(args, s)), Layout.of(args, ranks)
    phases = {}
    with pretending(cuda):
        dit, encoder, vae = (build(parts, name, dtype) for name in (next(iter(parts)), "text", "vae"))
        shape = (vae.z_dim, 1 + (frames - 1) // 4, h // side, w // side)
        if encode:
            short = min(frames, 9)
            video = torch.empty(1, 3, short, h, w)
            phases["cache latents"] = {
                "VAE": nbytes(vae),
                "activations and video": traced(lambda: vae.encode(video)) + 4 * 3 * h * w * (2 * frames - short),
            }
        if layout.fp8:
            fp8.convert(dit, {})
        here, host = layout.weights(dit)
        weights = {"DiT": here if cuda else (here + host) * turns, "encoder": nbytes(encoder)}
        groups = adapt(dit, encoder)
        params = [p for g in groups for p in (g["params"] if isinstance(g, dict) else [g])]
        trains_encoder = any(p.requires_grad for p in encoder.parameters())
        if not trains_encoder:
            phases["cache texts"] = {"encoder": weights.pop("encoder")}
        dit.checkpointing, whole = args.checkpointing, args.batch
        if layout.stages > 1:  # the first stage has as many samples under way as there are stages
            own = -(-len(dit.blocks) // layout.stages)
            dit.blocks, args.batch = dit.blocks[-own:], min(layout.stages, args.batch)
        if trains_encoder and layout.shards > 1:
            weights["encoder"] = (
                nbytes(encoder) // layout.shards
                + nbytes(encoder.token_embedding)
                + 2 * max(map(nbytes, encoder.blocks))
            )
        shape = layout.shape(shape)
        t = torch.empty((args.batch, shape[1]) if args.i2v_prob and shape[1] > 1 else args.batch)
        entry = {"latents": torch.empty(shape)} | (
            {"y": torch.empty(20, *shape[1:])} if dit.config.in_dim > shape[0] else {}
        )
        lens = torch.full((args.batch,), text)

        def embed():
            if trains_encoder:
                return encoder(torch.zeros(args.batch, text, dtype=torch.long), lens)
            return torch.empty(args.batch, text, dit.config.text_dim, dtype=dtype)

        with Tracker() as tracker:
            small = getattr(args, "optimizer", "adamw") == "adamw8bit"
            opt = (AdamW8bit if small else adamw)(groups, args.lr)
            ema = EMA(params, args.ema) if args.ema else None
            for _ in range(2):
                loss = noised(
                    [entry] * args.batch,
                    [],
                    t,
                    torch.empty(args.batch, *shape),
                    None if t.dim() == 1 else t[:, None, :, None, None],
                ).loss(dit, embed(), None)
                if getattr(args, "anchor", 0):
                    loss = loss + (embed() - torch.empty(args.batch, text, dit.config.text_dim)).square().sum()
                opt.zero_grad(set_to_none=True)
                loss.backward()
                if small:  # works in pieces so small that only its states count
                    opt.state.update({p: opt._new(p) for p in params if p not in opt.state})
                else:
                    opt.step()
                if ema:
                    ema.update()
                del loss
        states, trained = (
            sum(v.nbytes for s in opt.state.values() for v in s.values() if torch.is_tensor(v)),
            sum(p.nbytes for p in params),
        )
        states += sum(a.nbytes for a in ema.average) if ema else 0
        adapters = 1 if trains_encoder else turns  # an A14B's two adapters and their states are all kept
        beyond = tracker.peak + (adapters - 1) * states
        if trains_encoder and layout.shards > 1:
            beyond -= trained + states  # gradients and states are sharded too, and fp32 like the weights
            trained, states = (n * 4 // dtype.itemsize // layout.shards for n in (trained, states))
            beyond += trained + states
        inputs = 0
        if (
            layout.stream
        ):  # the inputs of checkpointed blocks wait on the host, but for that of the block at work and the next
            learn = [any(p.requires_grad for p in b.parameters()) for b in dit.blocks]
            inputs = (
                4 * args.batch * math.prod(shape[1:]) // 4 * dit.config.dim * max(0, len(learn) - learn.index(True) - 2)
            )
            beyond -= inputs * cuda
        args.batch = whole
        phases["training"] = weights | {"trained": adapters * trained, "states and activations": beyond}
        if previews:
            of = (shape[0], 1 + (s["frames"] - 1) // 4, s["size"][1] // side, s["size"][0] // side)
            _, _, vae_bytes, step, decode = sampling_phase(
                parts, s, dtype, of, s["size"], s["frames"], 1, text, cuda, layout
            )
            phases["previews"] = weights | {
                "trained and states": adapters * (trained + states),
                "VAE": vae_bytes,
                "activations": max(step, decode),
            }
    result = nbytes(encoder) if trains_encoder and args.save == "full" else adapters * trained
    kept = {"streamed blocks": host, "their inputs": inputs, "the other expert": (here + host) * (turns - 1)}
    return Plan(
        args.device, phases, {"cache": sum(cache), "result": result, "states": 3 * adapters * (trained + states)}, kept
    )


def mfu(dit, x, text, seconds, device):
    """Share of the GPU's peak that a training step of this batch reached, counting 4 FLOPs per multiply-add and weight
    (a forward pass and the gradient by the activations); None where the peak is not known. x (B,C,T',h,w), text:
    tokens.
    """
    peak = (
        next((f for k, f in PEAK_FLOPS.items() if k in torch.cuda.get_device_name(device)), None)
        if torch.device(device).type == "cuda"
        else None
    )
    c, tokens = dit.config, x.shape[2] * x.shape[3] * x.shape[4] // 4
    linear = c.num_layers * (6 * c.dim**2 + 2 * c.dim * c.ffn_dim)
    flops = (
        4 * x.shape[0] * (tokens * linear + c.num_layers * 2 * c.dim * (tokens * tokens + tokens * text + text * c.dim))
    )
    return peak and flops / seconds / peak


# ---- time on many GPUs -------------------------------------------------------------------------------------------
def linear_flops(c, tokens, text):
    """FLOPs of a forward pass of one sample: (in blocks' linears, in attention)."""
    linear = tokens * (6 * c.dim**2 + 2 * c.dim * c.ffn_dim) + 2 * text * c.dim**2
    return 2 * c.num_layers * linear, 2 * c.num_layers * 2 * c.dim * (tokens * tokens + tokens * text)


def sent(c, layout, grid, batch, adapter, itemsize=2, checkpointing=False):
    """Bytes that one rank gives away in a training step of a k/v translator on every block, by kind, as parallel.World
    counts them.

    grid: tokens (T',H',W') of a clip; batch: samples of a rank; adapter: bytes of the adapters; itemsize: of a weight.
    The first block's self-attention needs no gradient. "weights": each block's shards are gathered on the way up and
    once more on the way down.
    """
    found, local = {"gradients": adapter}, math.prod(layout.grid(grid))
    if layout.sequence > 1:
        given = batch * local * (layout.sequence - 1)
        passes = c.num_layers * (2 if checkpointing else 1) + c.num_layers - 1
        found["tokens"] = given * (
            4 * c.dim * itemsize // layout.sequence * passes + 4 * c.out_dim * math.prod(c.patch_size)
        )
    if layout.stages > 1:
        found["tokens"] = 4 * max(batch, layout.stages) * math.prod(grid) * c.dim
    if layout.shards > 1:
        block = 4 * c.dim**2 * 2 + 2 * c.dim * c.ffn_dim
        found["weights"] = 2 * c.num_layers * block * itemsize // layout.shards * (layout.shards - 1)
    return found


def step_times(c, grid, ranks, adapter, rate, inside, between, per_machine=8, text=64):
    """{strategy: (seconds per sample of a LoRA step with checkpointing, bytes of weights per rank)} on so many GPUs.

    rate: FLOP/s that a GPU sustains; inside, between: bytes/s of a link within a machine and to another one, per GPU.
    Weights are gathered while blocks compute; what Ulysses and pipelines send is waited for. A step is a forward pass,
    the forward pass again, and the gradient by activations.
    """
    tokens = math.prod(grid)
    compute, weights = (
        3 * sum(linear_flops(c, tokens, text)) / rate,
        2 * c.num_layers * (8 * c.dim**2 + 2 * c.dim * c.ffn_dim),
    )
    link = lambda n: inside if n <= per_machine else between
    ring = 2 * (ranks - 1) / ranks * adapter / link(ranks)
    found = {"data parallel": ((compute + ring) / ranks, weights)}
    if ranks > 1:
        gathered = sent(c, Layout(shards=ranks), grid, 1, adapter)["weights"] / link(ranks)
        found["--fsdp"] = (max(compute, gathered) + ring) / ranks, weights // ranks
        group = max(u for u in (1, 2, 4, 8) if ranks % u == 0 and c.num_heads % u == 0 and u <= per_machine)
        tokens_sent = sent(c, Layout(sequence=group), grid, 1, adapter, checkpointing=True).get("tokens", 0) / inside
        filling = math.prod(Layout(sequence=group).grid(grid)) * group / tokens
        found[f"--ulysses_size {group}"] = (compute / group * filling + tokens_sent + ring) / (ranks // group), weights
        stages = min(ranks, per_machine)
        micro = 2 * stages
        handed = 2 * 4 * tokens * c.dim / link(stages)
        found[f"--pipeline_stages {stages}"] = (
            ((micro + stages - 1) * (compute / stages + handed) + ring) / micro / (ranks // stages),
            weights // stages,
        )
    return found
