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
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flow import make_noisy_batch
from kernels import backend, fp8
from nanowan import flops
from nanowan.devices import free_memory
from nanowan.formats.dit import full_config, keep_fp32, new_dit, read_config
from nanowan.formats.layouts import read_weights
from nanowan.formats.t5 import XXL, build_t5, read_encoder
from nanowan.formats.vae import FULL_WIDTHS, build_vae
from nanowan.memory.offload import spread
from nanowan.memory.tiled_vae import decode_tiled
from nanowan.parallel import FirstRank, apply_ulysses
from nanowan.settings import Settings
from nanowan.training.optim import EMA, AdamW8bit, adamw
from nanowan.variants.registry import VARIANTS
from t5 import TextEncoder
from vae import VAE, channels_last

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
        self.seen.update(storages((args, kwargs)))  # made outside, such as weights, whose views are no new memory
        out = func(*args, **(kwargs or {}))
        for storage in storages(out):
            if storage not in self.seen:
                self.seen.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage.nbytes())
        self.peak = max(self.peak, self.now + scratch_bytes(func, args))
        return out

    def _gone(self, nbytes):
        self.now -= nbytes


def storages(tree):
    """The storages of all tensors in a tree."""
    return [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def scratch_bytes(func, args):
    """What an operation that was traced takes while it runs, and does not return."""
    if str(func) != "nanowan_csrc.causal_conv3d.default":
        return 0
    x, _, weight, _, gamma, *_ = args  # x behind the frames before it, normed
    B, C, T, H, W = x.shape
    before = weight.shape[2] - 1
    return B * C * (before + T) * H * W * x.itemsize if before or gamma is not None else 0


def traced(f):
    """Peak bytes of what f() makes, its result included."""
    with Tracker() as tracker:
        f()
    return tracker.peak


def nbytes(model):
    return sum(t.nbytes for t in [*model.parameters(), *model.buffers()])


@dataclass(frozen=True)
class ParallelLayout:
    """How a DiT lies on devices: in 8 bits, `stream_blocks` of its blocks on the host, sharded over fsdp_size ranks,
    its tokens over sp_size, its blocks over pp_size.
    """

    fp8: bool = False
    stream_blocks: int = 0
    fsdp_size: int = 1
    sp_size: int = 1
    pp_size: int = 1

    @property
    def caches_text_kv(self):
        """Whether a DiT keeps a prompt's keys and values: where all of its blocks have their weights at all times."""
        return not self.stream_blocks and self.fsdp_size == self.pp_size == 1

    def weights(self, dit):
        """(bytes of a DiT on a device, of it on the host); what is not in blocks is everywhere."""
        blocks = [nbytes(b) for b in dit.blocks]
        outside, mine = nbytes(dit) - sum(blocks), blocks[: math.ceil(len(blocks) / self.pp_size)]
        if self.stream_blocks:
            on_host = sum(blocks[i] for i in spread(self.stream_blocks, len(blocks)))
            return outside + sum(blocks) - on_host + 2 * max(blocks), on_host
        if self.fsdp_size > 1:  # the block at work and the next one are whole
            return outside + sum(mine) // self.fsdp_size + 2 * max(blocks), 0
        return outside + sum(mine), 0

    def share_tokens(self, dit):
        """Let a DiT compute as one rank of those that share a clip."""
        if self.sp_size > 1:
            apply_ulysses(dit, self, FirstRank)


SINGLE_DEVICE = ParallelLayout()


# ---- the parts, as fake tensors ----------------------------------------------------------------------------------
def builders(pipe):
    """{model: function that builds it} of a checkpoint, from its headers."""
    text, vae = read_encoder(pipe.files("text")).entries, read_weights(pipe.files("vae"))
    found = {
        name: lambda name=name, entries=entries: new_dit(read_config(pipe.folder(name), entries))
        for name, entries in pipe.headers.items()
    }
    return found | {"text": lambda: build_t5(text, pipe.dir), "vae": lambda: build_vae(vae, pipe.dir)}


def full_builders(s):
    """The same of a released size, of which no file is needed. s: the Settings of a variant."""
    dits = {name: lambda: new_dit(full_config(s.variant)) for name in s.expert_names}
    version = VARIANTS[s.variant]["vae"]
    return dits | {"text": lambda: TextEncoder(*XXL), "vae": lambda: VAE(version, *FULL_WIDTHS[version])}


def build(builders, part, dtype, cuda=False):
    """A part in the dtypes that its loader gives it, for the fake CPU, or as on a GPU, where the VAE decodes in
    `dtype`.
    """
    model = builders[part]().eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if part == "vae":
            full = not (cuda and name.startswith(("decoder.", "conv2.")))
        else:
            full = part != "text" and keep_fp32(name)
        p.data = p.data.to(torch.float32 if full else dtype)
    return channels_last(model) if part == "vae" else model


@contextlib.contextmanager
def pretending(cuda):
    """Tensors have no memory, and operations are those of a GPU, or a CPU's."""
    if cuda and torch.cuda.is_available():
        torch.cuda.init()  # an operation may ask what the GPU can do; within a checkpoint PyTorch forbids to begin then
    gpu_ops = backend.using("triton", pretend=True)
    with FakeTensorMode(), gpu_ops if cuda else contextlib.nullcontext():
        yield


# ---- plans -------------------------------------------------------------------------------------------------------
class Plan:
    """`phases` {name: {what: bytes}} of a run on `device`, of which the largest decides, `disk` {what: bytes}, and
    `host`, the same of what a GPU's rank keeps in host memory.
    """

    def __init__(self, device, phases, disk, host=None):
        self.cuda = torch.device(device).type == "cuda"
        self.device, self.phases, self.disk = device, phases, disk
        self.host = {k: v for k, v in (host or {}).items() if v and self.cuda}
        for name in ("av", "ftfy", "PIL.Image", "torch.utils.tensorboard"):  # a run imports them: its memory holds them
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        self.process = CUDA_CONTEXT if self.cuda else resident() + CPU_LIBRARIES

    @property
    def peak(self):
        return self.process + max(sum(p.values()) for p in self.phases.values())

    def __str__(self):
        lines = [f"plan: peak memory {gb(self.peak)} on {self.device}, {gb(self.process)} of it the process itself"]
        lines += [f"  {name}: {gb(sum(parts.values()))} ({itemized(parts)})" for name, parts in self.phases.items()]
        if self.host:
            lines.append("  in host memory: " + itemized(self.host))
        return "\n".join([*lines, "  on disk: " + itemized(self.disk)])

    def compare(self, device):
        """After the run: what it used beside what was planned."""
        planned = self.peak - self.process * self.cuda  # a GPU's context is not among its allocated bytes
        share = 100 * (planned / used(device) - 1)
        return f"peak memory {used(device) / 1e9:.3f} GB, planned {planned / 1e9:.3f} GB ({share:+.0f} %)"


def gb(n):
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def itemized(parts):
    return ", ".join(f"{what} {gb(n)}" for what, n in parts.items())


def denoising_bytes(dit, s, shape, batch, text, mode, layout):
    """Peak bytes beyond weights of a sampling step on `batch` clips of latents `shape`, guided as `mode` says: "none",
    "batched", "sequential" or "parallel" (Pipeline.guidance_mode). s: the Settings.
    """
    dit.cache_text_kv = layout.caches_text_kv
    layout.share_tokens(dit)
    forwards = 2 if mode == "batched" else 1  # how many are in one batch
    prompts = 1 if mode == "none" else 2  # whose keys and values are kept
    x = torch.empty(batch, dit.config.in_dim, *shape[1:])
    embeds = torch.empty(batch, text, dit.config.text_dim, dtype=dit.patch_embedding.weight.dtype)

    fake_inputs = s.parts.examples.inputs(dit.config, shape)

    @torch.no_grad()
    def step():
        kept = [prepared(1)] + [prepared(forwards)] * (prompts - 1)
        solver = [torch.empty_like(x[:, : shape[0]]) for _ in range(4)]  # the latents and what it remembers
        times = (forwards * batch, shape[1]) if s.parts.samples.trains_first_frame else forwards * batch
        if mode == "parallel":  # both halves, exchanged
            solver += [torch.empty(batch, *shape) for _ in range(2)]
        text, inputs = kept[-1]
        return dit(torch.cat([x] * forwards), torch.empty(times), text, **inputs), kept, solver

    def prepared(copies):
        inputs = {k: v.repeat(copies * batch, *[1] * (v.dim() - 1)) for k, v in fake_inputs.items()}
        return dit.embed_text(torch.cat([embeds] * copies), cache=True), dit.prepare_inputs(**inputs)

    return traced(step)


def decoding_bytes(vae, shape, batch, tile):
    """Peak bytes beyond weights of decoding `batch` latents `shape`, the videos included."""
    # a decode beyond its first three latent frames, and tiles beyond three a side, only add to the finished video
    (_, T, H, W), (_, sh, sw) = shape, vae.stride
    t, h, w = min(3, T), *(min(n, 3 * tile or n) for n in (H, W))
    short = torch.empty(batch, shape[0], t, h, w)
    pixels, traced_pixels = (1 + 4 * (T - 1)) * H * W * sh * sw, (1 + 4 * (t - 1)) * h * w * sh * sw
    return traced(lambda: decode_tiled(vae, short, tile) if tile else vae.decode(short)) + 4 * 3 * batch * (
        pixels - traced_pixels
    )


def encoding_bytes(vae, width, height, frames):
    """Peak bytes beyond weights of encoding one clip, itself included."""
    short = min(frames, 9)  # beyond, only the clip, and what it was decoded from, grow
    video = torch.empty(1, 3, short, height, width)
    return traced(lambda: vae.encode(video)) + 4 * 3 * height * width * (2 * frames - short)


@dataclass(frozen=True)
class SamplingSpec:
    """What `sampling` plans: clips of latents `shape` (C,T',h,w) and `size` (width, height) px, `batch` at once, with a
    prompt of `text` tokens, and an image or not. mode: of guidance, as in denoising_bytes. tile: --vae_tile. preview:
    whether --preview_every is on.
    """

    settings: Settings
    shape: tuple
    size: tuple
    image: bool = False
    mode: str = "batched"
    batch: int = 1
    text: int = 64
    layout: ParallelLayout = SINGLE_DEVICE
    tile: int = 0
    preview: bool = False


def sampling(spec, builders, device, dtype):
    """The Plan of a SamplingSpec. builders: of a checkpoint."""
    cuda, s, layout = torch.device(device).type == "cuda", spec.settings, spec.layout
    with pretending(cuda):
        dit, vae = build(builders, s.expert_names[0], dtype), build(builders, "vae", dtype, cuda)
        if layout.fp8:
            fp8.convert(dit, {})
        on_device, on_host = layout.weights(dit)
        step = denoising_bytes(dit, s, spec.shape, spec.batch, spec.text, spec.mode, layout)
        C, frames, h, w = spec.shape
        decode = decoding_bytes(vae, (C, s.parts.examples.decoded_frames(frames), h, w), spec.batch, spec.tile)
        vae_bytes = nbytes(vae)
        still = max(32 * vae.stride[1] if spec.preview else 0, *(spec.size if spec.image else (0, 0)))
        encode = encoding_bytes(vae, still, still, 9 if spec.preview else 1) if still else 0
        encoder = nbytes(build(builders, "text", dtype))
    if not cuda:
        on_device += on_host
    experts, (width, height), free = len(s.expert_names), spec.size, free_memory(device)
    how = {
        "batched": "both halves of guidance in one batch",
        "sequential": "guidance in two passes",
        "parallel": "guidance on two ranks",
    }
    denoising = "activations" + (f", {how[spec.mode]}" if spec.mode in how else "")
    # a GPU has one expert at a time; segment by segment the DiT and the VAE take turns and stay where there is room
    resident_experts = 1 if cuda or experts * on_device + vae_bytes + step > free else experts
    both_stay = s.conditioning.by_segments and on_device + vae_bytes + max(step, decode) <= free
    phases = {"encode prompts": {"encoder": encoder}}
    if encode:
        phases["encode images"] = {"VAE": vae_bytes, "activations": encode}
    phases["denoise"] = {"DiT": resident_experts * on_device, denoising: step}
    phases["decode"] = {"VAE": vae_bytes, "activations and video": decode}
    if both_stay:
        phases["decode"]["DiT"] = on_device
    if both_stay or (encode and not cuda):  # a CPU keeps the VAE that has encoded, a GPU sends it away until it decodes
        phases["denoise"]["VAE"] = vae_bytes
    disk = {"mp4, at most about": 3 * s.frames * width * height * spec.batch // 20}
    other_experts = (on_device + on_host) * (experts - 1)
    return Plan(device, phases, disk, {"streamed blocks": on_host, "the other expert": other_experts})


@dataclass(frozen=True)
class TrainingSpec:
    """What `training` plans, per rank.

    batch: samples per rank and micro-batch. optimizer: "adamw" or "adamw8bit". ema, anchor, first_frames: whether --ema,
    --anchor and --i2v_prob are on. continuation: the flag. num_experts: how many DiTs are trained through. bucket
    (width, height, frames): the largest. text: tokens of a long caption. cache: bytes of latents and of texts. encode,
    encode_texts: whether there are some to compute. previews: whether there are any. num_results: how many copies of
    what is trained stay on disk. save_delta: whether an encoder is saved as its changes alone.
    """

    settings: Settings
    device: str
    dtype: torch.dtype
    batch: int
    bucket: tuple
    checkpointing: bool = False
    layout: ParallelLayout = SINGLE_DEVICE
    optimizer: str = "adamw"
    ema: bool = False
    anchor: bool = False
    first_frames: bool = False
    continuation: float | None = None
    num_experts: int = 1
    text: int = 64
    cache: tuple = (0, 0)
    encode: bool = True
    encode_texts: bool = True
    previews: bool = False
    num_results: int = 1
    save_delta: bool = False


def training(spec, builders, make_trainable):
    """The Plan of a TrainingSpec. builders: of a checkpoint. make_trainable(dit, encoder) returns what is trained,
    parameters or optimizer groups; where it changes the encoder, that is run too.
    """
    s, dtype, layout, phases = spec.settings, spec.dtype, spec.layout, {}
    cuda, (width, height, frames) = torch.device(spec.device).type == "cuda", spec.bucket
    encoded_frames = s.parts.examples.encoded_frames(frames, spec.continuation)
    with pretending(cuda):
        dit, encoder, vae = (build(builders, name, dtype) for name in (s.expert_names[0], "text", "vae"))
        if spec.encode:
            phases["cache latents"] = {
                "VAE": nbytes(vae),
                "activations and video": encoding_bytes(vae, width, height, encoded_frames),
            }
        if layout.fp8:
            fp8.convert(dit, {})
        on_device, on_host = layout.weights(dit)
        weights = {"DiT": on_device if cuda else (on_device + on_host) * spec.num_experts}
        groups = make_trainable(dit, encoder)
        params = [p for g in groups for p in (g["params"] if isinstance(g, dict) else [g])]
        trains_encoder = any(p.requires_grad for p in encoder.parameters())
        shards_encoder = trains_encoder and layout.fsdp_size > 1
        trained = sum(p.nbytes for p in params)
        encoder_bytes = nbytes(encoder) - trained * trains_encoder  # what is trained is counted by itself
        if shards_encoder:  # the table, which is outside of blocks, is whole; a block is while none of the DiT's are
            encoder_bytes = encoder_bytes // layout.fsdp_size + nbytes(encoder.token_embedding)
        if trains_encoder:
            weights["encoder"] = encoder_bytes
        elif spec.encode_texts or spec.previews:
            phases["cache texts"] = {"encoder": encoder_bytes}
        result = nbytes(encoder) if trains_encoder and not spec.save_delta else None

        shape = s.latent_shape((width, height), frames)
        entry = {"latents": torch.empty(shape)} | s.parts.examples.entry(dit.config, shape, spec.continuation)
        peak, states = traced_training(spec, dit, encoder, groups, entry, trains_encoder)

        # an A14B's two adapters and their states are all kept
        adapters = 1 if trains_encoder else spec.num_experts
        activations = peak + (adapters - 1) * states
        if shards_encoder:  # gradients and states are sharded, and fp32 like the trained weights
            sharded = {k: n * 4 // dtype.itemsize // layout.fsdp_size for k, n in (("p", trained), ("s", states))}
            activations += sum(sharded.values()) - trained - states
            trained, states = sharded["p"], sharded["s"]
        offloaded = 0
        if (
            layout.stream_blocks
        ):  # inputs of checkpointed blocks wait on the host, but for the block at work and the next
            learns = [any(p.requires_grad for p in b.parameters()) for b in dit.blocks]
            kept_inputs = max(0, len(learns) - learns.index(True) - 2)
            tokens = math.prod(shape[1:]) // 4 // layout.sp_size
            offloaded = 4 * spec.batch * tokens * dit.config.dim * kept_inputs
            activations -= offloaded * cuda
        phases["training"] = weights | {"trained": adapters * trained, "states and activations": activations}

        if spec.previews:
            of = s.latent_shape(s.size, s.frames)
            dit.checkpointing = False
            step = denoising_bytes(dit, s, of, 1, spec.text, "batched" if s.guided else "none", layout)
            vae = build(builders, "vae", dtype, cuda)
            decode = decoding_bytes(vae, of, 1, 0)
            phases["previews"] = weights | {
                "trained and states": adapters * (trained + states),
                "VAE": nbytes(vae),
                "activations": max(step, decode),
            }
    states_on_disk = 3 * adapters * (trained + states)
    result = result or adapters * trained * spec.num_results
    disk = {"cache": sum(spec.cache), "result": result, "states": states_on_disk}
    other_experts = (on_device + on_host) * (spec.num_experts - 1)
    host = {"streamed blocks": on_host, "their inputs": offloaded, "the other expert": other_experts}
    return Plan(spec.device, phases, disk, host)


def traced_training(spec, dit, encoder, groups, entry, trains_encoder):
    """(peak bytes beyond weights of training steps, bytes of optimizer states and averages) of one rank. entry: a
    sample, as make_noisy_batch takes it.
    """
    dit.checkpointing, batch, shape, layout = spec.checkpointing, spec.batch, entry["latents"].shape, spec.layout
    params = [p for g in groups for p in (g["params"] if isinstance(g, dict) else [g])]
    layout.share_tokens(dit)
    passes, num_buffers = 1, 0
    if layout.pp_size > 1:  # the first stage has as many samples under way as there are stages
        dit.blocks = dit.blocks[-math.ceil(len(dit.blocks) / layout.pp_size) :]
        passes, batch = layout.pp_size, 1
        num_buffers = max(spec.batch, passes) * (2 if passes > 2 else 1)  # from the next stage; from both in the middle
    text_dim, text_dtype = dit.config.text_dim, dit.patch_embedding.weight.dtype
    first_frames = spec.first_frames and shape[1] > 1
    t = torch.empty((batch, shape[1]) if first_frames else batch)
    loss_mask = t[:, None, :, None, None] if first_frames else None

    def embed():
        if trains_encoder:
            return encoder(torch.zeros(spec.batch, spec.text, dtype=torch.long), torch.full((spec.batch,), spec.text))
        return torch.empty(spec.batch, spec.text, text_dim, dtype=text_dtype)

    with Tracker() as tracker:
        eight_bit = spec.optimizer == "adamw8bit"
        opt = (AdamW8bit if eight_bit else adamw)(groups, 1e-4)
        ema = EMA(params, 0.9, opt) if spec.ema else None
        # what other stages send has its place from the start
        buffers = [torch.empty(math.prod(shape[1:]) // 4, dit.config.dim) for _ in range(num_buffers)]
        for _ in range(2):
            noisy = make_noisy_batch([entry] * batch, [], t, torch.empty(batch, *shape), loss_mask)
            context = embed()
            losses = [noisy.loss(dit, context[:batch], None) for _ in range(passes)]
            opt.zero_grad(set_to_none=True)
            sum(losses).backward()
            del losses, context
            if spec.anchor:
                (embed() - torch.empty(spec.batch, spec.text, text_dim)).square().sum().backward()
            if eight_bit:  # works in pieces so small that only its states count
                opt.state.update({p: opt.new_state(p) for p in params if p not in opt.state})
            else:
                opt.step()
            if ema:
                ema.update()
        del buffers
    states = sum(v.nbytes for s in opt.state.values() for v in s.values() if torch.is_tensor(v))
    return tracker.peak, states + (sum(a.nbytes for a in ema.average) if ema else 0)


def mfu(dit, x, text, seconds, device):
    """Share of the GPU's peak that a training step of this batch reached, recomputation not counted; None where the peak
    is not known. x (B,C,T',h,w), text: tokens.
    """
    card = torch.device(device).type == "cuda" and flops.card_of(torch.cuda.get_device_name(device))
    return flops.step_of(dit, x.shape[2:], text, len(x)).total / seconds / card.peak if card else None
