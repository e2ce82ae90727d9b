"""Estimate what a run will need before it starts: peak memory on the device and on the host, and bytes on disk.

The models are built from fake tensors, which have shapes but no memory. With these tensors, a DiT runs a forward pass,
a backward pass and an optimizer step, and the VAE encodes and decodes a clip. Every tensor made on the way counts from
its creation until it is freed. Temporary memory of the compiled causal_conv3d (csrc/) counts too. Memory that
PyTorch's operators use internally, and memory that an allocator wastes, are not counted.
"""

import contextlib
import math
import os
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
from nanowan.devices import ROOM, free_memory
from nanowan.errors import BadInput
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

CUDA_CONTEXT = 600 << 20  # approximate bytes that a process takes on a GPU before its first tensor
CUDA_LIBRARIES = 500 << 20  # approximate bytes that the CUDA libraries of the same process take on the host
CPU_LIBRARIES = 50 << 20  # bytes that MKL, oneDNN and the heap's holes take in a run, as measured on small runs


def used(device):
    """Return the peak memory in bytes so far: on a GPU, the memory that PyTorch allocated; on a CPU, this process's
    resident memory.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident("VmHWM")


def resident(field="VmRSS"):
    """Return this process's resident memory in bytes: the current value ("VmRSS") or the peak ("VmHWM")."""
    try:
        return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Tracker(TorchDispatchMode):
    """A count of the bytes of all tensors made in its `with` block. now: bytes of the tensors that still exist. peak:
    the largest value of `now` so far.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.update(storages((args, kwargs)))  # views of inputs made outside, such as weights, take no memory
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
    """Return the storages of all tensors in `tree`, a nesting of lists, tuples and dicts."""
    return [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def scratch_bytes(func, args):
    """Return the bytes of temporary memory that the compiled causal_conv3d (csrc/) takes while it runs with the
    arguments `args`. For any other operation `func`, return 0.
    """
    if str(func) != "nanowan_csrc.causal_conv3d.default":
        return 0
    x, _, weight, _, gamma, *_ = args  # the temporary holds the previous frames, then x, all normed
    B, C, T, H, W = x.shape
    before = weight.shape[2] - 1
    return B * C * (before + T) * H * W * x.itemsize if before or gamma is not None else 0


def traced(f):
    """Return the peak bytes of all tensors that f() makes. The result of f() is included."""
    with Tracker() as tracker:
        f()
    return tracker.peak


def nbytes(model):
    return sum(t.nbytes for t in [*model.parameters(), *model.buffers()])


@dataclass(frozen=True)
class ParallelLayout:
    """How a DiT is divided among ranks. fp8: whether the blocks are in 8 bits. stream_blocks: how many of the DiT's
    blocks lie on the host. fsdp_size: number of ranks over which the weights are sharded. sp_size: number of ranks over
    which a clip's tokens are split. pp_size: number of ranks among which the blocks are divided. ranks: number of all
    processes of the run.
    """

    fp8: bool = False
    stream_blocks: int = 0
    fsdp_size: int = 1
    sp_size: int = 1
    pp_size: int = 1
    ranks: int = 1

    @property
    def local_ranks(self):
        """The number of this run's processes on one machine. They share the machine's memory."""
        return min(self.ranks, int(os.environ.get("LOCAL_WORLD_SIZE", self.ranks)))

    @property
    def shares_host_copy(self):
        """Whether the ranks of a machine share one copy of a DiT on the host (World.host_share)."""
        return self.local_ranks > 1 and self.fsdp_size == self.pp_size == 1

    @property
    def caches_text_kv(self):
        """Whether a DiT keeps the cross-attention keys and values of a prompt from step to step. It does so only if the
        weights of all blocks are on the device at all times.
        """
        return not self.stream_blocks and self.fsdp_size == self.pp_size == 1

    def weights(self, dit):
        """Return the bytes of a DiT's weights, (on one device, on the host of one machine). Only streamed blocks are
        counted on the host. Weights outside of blocks are on every device.
        """
        blocks = [nbytes(b) for b in dit.blocks]
        outside, mine = nbytes(dit) - sum(blocks), blocks[: math.ceil(len(blocks) / self.pp_size)]
        if self.stream_blocks:
            on_host = sum(blocks[i] for i in spread(self.stream_blocks, len(blocks)))
            return outside + sum(blocks) - on_host + 2 * max(blocks), on_host
        if self.fsdp_size > 1:  # the block that runs and the next one are unsharded
            return outside + sum(mine) // self.fsdp_size + 2 * max(blocks), 0
        return outside + sum(mine), 0

    def share_tokens(self, dit):
        """If a clip's tokens are split over ranks, make a DiT compute only the first rank's share of them."""
        if self.sp_size > 1:
            apply_ulysses(dit, self, FirstRank)


SINGLE_DEVICE = ParallelLayout()


# ---- the models, as fake tensors ---------------------------------------------------------------------------------
def builders(pipe):
    """Return {model: function that builds the model} for the checkpoint of a Pipeline. Only the headers of the
    checkpoint's files are read.
    """
    text, vae = read_encoder(pipe.files("text")).entries, read_weights(pipe.files("vae"))
    dits = {
        name: lambda name=name, entries=entries: new_dit(read_config(pipe.folder(name), entries))
        for name, entries in pipe.headers.items()
    }
    return dits | {"text": lambda: build_t5(text, pipe.dir), "vae": lambda: build_vae(vae, pipe.dir)}


def full_builders(s):
    """Return {model: function that builds the model} for a variant at its released size. No files are read. s: the
    variant's Settings.
    """
    dits = {name: lambda: new_dit(full_config(s.variant)) for name in s.expert_names}
    version = VARIANTS[s.variant]["vae"]
    return dits | {"text": lambda: TextEncoder(*XXL), "vae": lambda: VAE(version, *FULL_WIDTHS[version])}


def build(builders, part, dtype, cuda=False):
    """Build the model `part`, a key of `builders`, and return it. Its weights get the dtypes that loading gives them on
    a GPU (if `cuda`) or on a CPU. dtype: the dtype of the text encoder, of most weights of the DiT and, if `cuda`, of
    the VAE's decoder; all other weights are in fp32.
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
    """Return a context manager in which tensors have no memory. cuda: whether to run the operations that a GPU runs,
    instead of those that a CPU runs.
    """
    if cuda and torch.cuda.is_available():
        torch.cuda.init()  # operations may query the GPU, but activation checkpointing cannot initialize CUDA
    gpu_ops = backend.using("triton", pretend=True)
    with FakeTensorMode(), gpu_ops if cuda else contextlib.nullcontext():
        yield


def import_libraries():
    """Import the libraries that a run imports sooner or later, so that this process's memory already includes them."""
    with contextlib.suppress(ImportError):
        import av  # noqa: F401
        import ftfy  # noqa: F401
        import PIL.Image  # noqa: F401
        import torch.utils.tensorboard  # noqa: F401


# ---- plans -------------------------------------------------------------------------------------------------------
class Plan:
    """The memory and disk space that a run on `device` needs. phases: {name of a phase: {what needs memory: bytes}} on
    the device; the largest phase is the peak. host: the same for host memory, if the device is a GPU; the bytes are
    those of all ranks of one machine together. disk: {what needs space: bytes}. layout: the ParallelLayout.

    takes_turns: whether the two experts alternate on the device (Pipeline). learning_blocks: number of blocks on
    one rank through which gradients pass; activation checkpointing saves memory only in these blocks.
    """

    takes_turns, learning_blocks = False, 0

    def __init__(self, device, phases, disk, host, layout):
        self.cuda = torch.device(device).type == "cuda"
        self.device, self.phases, self.disk, self.layout = device, phases, disk, layout
        import_libraries()
        process = resident() + CPU_LIBRARIES
        self.process = CUDA_CONTEXT if self.cuda else process
        self.host = {"process": {}} | {name: {k: n for k, n in parts.items() if n} for name, parts in host.items()}
        self.host_process = layout.local_ranks * (process + CUDA_LIBRARIES)

    @property
    def peak(self):
        """The peak memory on the device, in bytes."""
        return self.process + max(sum(p.values()) for p in self.phases.values())

    @property
    def host_peak(self):
        """The peak memory on the host of one machine, in bytes."""
        if not self.cuda:
            return self.layout.local_ranks * self.peak
        return self.host_process + max(sum(p.values()) for p in self.host.values())

    def __str__(self):
        lines = [f"plan: peak memory {gb(self.peak)} on {self.device}, {gb(self.process)} of it the process itself"]
        lines += [f"  {name}: {gb(sum(parts.values()))} ({itemized(parts)})" for name, parts in self.phases.items()]
        if self.cuda:
            lines.append(f"  in host memory: {gb(self.host_peak)} ({self._host_parts()})")
        return "\n".join([*lines, "  on disk: " + itemized(self.disk)])

    def _host_parts(self):
        return itemized({"process": self.host_process} | max(self.host.values(), key=lambda p: sum(p.values())))

    def check_host(self, free=None):
        """Raise BadInput if the free host memory is less than the plan needs. free: free bytes on the host (default:
        those of this machine).
        """
        if free is None:
            free = free_memory("cpu") + self.layout.local_ranks * resident()
        if self.host_peak <= free:
            return
        needs, streamed = f"{gb(self.host_peak)} of host memory are needed", self.layout.stream_blocks
        if not self.cuda:
            raise BadInput(
                f"--device cpu: {needs}, {gb(free)} are free; use a smaller size, fewer frames or --dtype bf16"
            )
        less = "fewer blocks, or a smaller size" if self.layout.fp8 else "--base_dtype fp8 halves the weights"
        flag = f"--stream_blocks {streamed}" if streamed else f"--device {self.device}"
        raise BadInput(f"{flag}: {needs} ({self._host_parts()}), {gb(free)} are free; {less}")

    def compare(self, device):
        """Return a line for the end of a run: the memory that the run used, next to the memory that was planned."""
        planned = self.peak - self.process * self.cuda  # allocated bytes do not include a GPU's context
        text = "peak memory " + beside(used(device), planned)
        if self.cuda:
            text += f", {gb(torch.cuda.max_memory_reserved(device))} reserved"
            if self.layout.ranks == 1:
                text += "; host memory " + beside(resident("VmHWM"), self.host_peak)
        return text


def beside(measured, planned):
    return f"{measured / 1e9:.3f} GB, planned {planned / 1e9:.3f} GB ({100 * (planned / measured - 1):+.0f} %)"


def free_beside_plan(spec, device):
    """Return (free bytes on the device, free bytes on the host) for a SamplingSpec or TrainingSpec: the numbers that
    the spec gives, else those of this machine, or infinity where they are not known. If the device is a CPU, this
    machine's number for the device is divided by the number of the run's processes on one machine.
    """
    here = torch.device(device).type == "cpu" or torch.cuda.is_available()
    share = spec.layout.local_ranks if torch.device(device).type == "cpu" else 1
    memory = free_memory(device) / share if spec.memory is None and here else spec.memory or math.inf
    host = free_memory("cpu") if spec.host is None and here else spec.host or math.inf
    return memory, host


def encoder_at_work(encoder, memory, cuda):
    """Return ({what needs memory: bytes} on the device, the same on the host) for a text encoder that is not trained.
    memory: free bytes on the device. If the encoder does not fit on a GPU, it is counted as streamed, as Pipeline does.
    """
    whole, blocks = nbytes(encoder), [nbytes(b) for b in encoder.blocks]
    if cuda and whole + ROOM > memory:
        on_host = {"encoder, read": whole + max(blocks)}  # each block is then moved to its buffer
        return {"encoder, streamed": whole - sum(blocks) + 2 * max(blocks)}, on_host
    return {"encoder": whole}, {"loading": max(p.nbytes for p in encoder.parameters())}


def gb(n):
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def itemized(parts):
    return ", ".join(f"{what} {gb(n)}" for what, n in parts.items())


def denoising_bytes(dit, s, shape, batch, text, mode, layout):
    """Return the peak bytes, without weights, of a sampling step on `batch` clips with latents of `shape` (C,T',h,w).
    s: the Settings. text: number of tokens of a prompt. mode: how guidance is computed, "none", "batched", "sequential"
    or "parallel" (Pipeline.guidance_mode).
    """
    dit.cache_text_kv = layout.caches_text_kv
    layout.share_tokens(dit)
    forwards = 2 if mode == "batched" else 1  # forward passes in one batch
    prompts = 1 if mode == "none" else 2  # prompts whose keys and values are kept
    x = torch.empty(batch, dit.config.in_dim, *shape[1:])
    embeds = torch.empty(batch, text, dit.config.text_dim, dtype=dit.patch_embedding.weight.dtype)

    fake_inputs = s.parts.examples.inputs(dit.config, shape)

    @torch.no_grad()
    def step():
        kept = [prepared(1)]
        if prompts == 2:  # the second of two passes shares the inputs that do not differ
            differing = s.parts.examples.uncond_inputs
            shared = {k: v for k, v in kept[0][1].items() if k not in differing and forwards == 1}
            kept += [prepared(forwards, shared)]
        solver = [torch.empty_like(x[:, : shape[0]]) for _ in range(4)]  # the latents and the solver's history
        times = (forwards * batch, shape[1]) if s.parts.samples.trains_first_frame else forwards * batch
        if mode == "parallel":  # both halves of guidance, after their exchange
            solver += [torch.empty(batch, *shape) for _ in range(2)]
        text, inputs = kept[-1]
        return dit(torch.cat([x] * forwards), torch.empty(times), text, **inputs), kept, solver

    def prepared(copies, shared={}):  # noqa: B006
        inputs = {k: v.repeat(copies * batch, *[1] * (v.dim() - 1)) for k, v in fake_inputs.items()} | shared
        return dit.embed_text(torch.cat([embeds] * copies), cache=True), dit.prepare_inputs(**inputs)

    return traced(step)


def decoding_bytes(vae, shape, batch, tile):
    """Return the peak bytes, without weights, of decoding `batch` latents of `shape` (C,T',h,w). The decoded videos are
    included. tile: the value of --vae_tile, 0 for no tiles.
    """
    # latent frames after the third, and tiles after the third on each side, only add to the finished video
    (_, T, H, W), (_, sh, sw) = shape, vae.stride
    t, h, w = min(3, T), *(min(n, 3 * tile or n) for n in (H, W))
    short = torch.empty(batch, shape[0], t, h, w)
    pixels, traced_pixels = (1 + 4 * (T - 1)) * H * W * sh * sw, (1 + 4 * (t - 1)) * h * w * sh * sw
    return traced(lambda: decode_tiled(vae, short, tile) if tile else vae.decode(short)) + 4 * 3 * batch * (
        pixels - traced_pixels
    )


def encoding_bytes(vae, width, height, frames):
    """Return the peak bytes, without weights, of encoding one clip. The clip itself is included."""
    short = min(frames, 9)  # with more frames, only the clip and the frames that it was made from take more memory
    video = torch.empty(1, 3, short, height, width)
    return traced(lambda: vae.encode(video)) + 4 * 3 * height * width * (2 * frames - short)


@dataclass(frozen=True)
class SamplingSpec:
    """The work that `sampling` plans for: `batch` clips at once, with latents of `shape` (C,T',h,w) and `size` (width,
    height) px, and with prompts of `text` tokens. image: whether an image is given. mode: how guidance is computed, as
    in denoising_bytes. tile: the value of --vae_tile. preview: whether --preview_every is on. memory, host: free bytes
    on the device and on the host (default: those of this machine).
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
    memory: float | None = None
    host: float | None = None


def sampling(spec, builders, device, dtype):
    """Return the Plan of a SamplingSpec. builders: as returned by `builders` or `full_builders`."""
    cuda, s, layout = torch.device(device).type == "cuda", spec.settings, spec.layout
    free, _ = free_beside_plan(spec, device)
    with pretending(cuda):
        dit, vae = build(builders, s.expert_names[0], dtype), build(builders, "vae", dtype, cuda)
        read = 4 * max(p.numel() for p in dit.parameters())
        if layout.fp8:
            fp8.convert(dit, {})
        on_device, on_host = layout.weights(dit)
        whole = nbytes(dit)
        step = denoising_bytes(dit, s, spec.shape, spec.batch, spec.text, spec.mode, layout)
        C, frames, h, w = spec.shape
        decode = decoding_bytes(vae, (C, s.parts.examples.decoded_frames(frames), h, w), spec.batch, spec.tile)
        vae_bytes = nbytes(vae)
        still = max(32 * vae.stride[1] if spec.preview else 0, *(spec.size if spec.image else (0, 0)))
        encode = encoding_bytes(vae, still, still, 9 if spec.preview else 1) if still else 0
        encoder, encoder_on_host = encoder_at_work(build(builders, "text", dtype), free, cuda)
    if not cuda:
        on_device += on_host
    width, height = spec.size
    how = {
        "batched": "both halves of guidance in one batch",
        "sequential": "guidance in two passes",
        "parallel": "guidance on two ranks",
    }
    denoising = "activations" + (f", {how[spec.mode]}" if spec.mode in how else "")
    # With segments the DiT and the VAE alternate; both stay on the device if there is room. Of two experts only one
    # counts, since it can be evicted for the other.
    both_stay = s.conditioning.by_segments and on_device + vae_bytes + max(step, decode) <= free
    phases = {"encode prompts": encoder}
    if encode:
        phases["encode images"] = {"VAE": vae_bytes, "activations": encode}
    phases["denoise"] = {"DiT": on_device, denoising: step}
    phases["decode"] = {"VAE": vae_bytes, "activations and video": decode}
    if both_stay:
        phases["decode"]["DiT"] = on_device
    if both_stay or (encode and not cuda):  # after encoding, a CPU keeps the VAE; a GPU evicts it until it decodes
        phases["denoise"]["VAE"] = vae_bytes
    disk = {"mp4, at most about": 3 * s.frames * width * height * spec.batch // 20}
    ranks, on_turns = layout.local_ranks, s.conditioning.by_segments and not both_stay
    shared = layout.shares_host_copy and (on_host or s.is_moe)
    kept = {"DiT": whole if shared or on_turns else on_host}
    if encode or on_turns:
        kept["VAE"] = ranks * vae_bytes
    host = {
        "encode prompts": {k: ranks * n for k, n in encoder_on_host.items()},
        "load": kept | {"loading": ranks * read},
        "decode": kept | {"video": 8 * ranks * spec.batch * 3 * s.frames * width * height},
    }
    return Plan(device, phases, disk, host, layout)


@dataclass(frozen=True)
class TrainingSpec:
    """The work that `training` plans for, per rank.

    batch: samples per rank and micro-batch. bucket: the largest (width, height, frames). optimizer: "adamw" or
    "adamw8bit". ema, anchor, first_frames: whether --ema, --anchor and --i2v_prob, respectively, are on. continuation:
    the value of --continuation. num_experts: number of DiTs that are trained, or through which the encoder's gradients
    pass. text: number of tokens per caption (default: as many as a long caption has). cache: bytes that (all latents,
    all text embeddings) take in the cache. encode: whether the cache lacks latents, so that the run computes them.
    encode_texts: whether the cache lacks text embeddings. previews: shape (C,T',h,w) of the largest preview's latents,
    or () if there are no previews. num_results: number of copies of the trained weights that stay on disk. save_delta:
    whether only the changes of a trained encoder are saved, and not the full encoder. memory, host: free bytes on the
    device and on the host (default: those of this machine).
    """

    settings: Settings
    device: str
    dtype: torch.dtype
    batch: int
    bucket: tuple
    checkpointing: bool | int = 0
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
    previews: tuple = ()
    num_results: int = 1
    save_delta: bool = False
    memory: float | None = None
    host: float | None = None


def training(spec, builders, make_trainable):
    """Return the Plan of a TrainingSpec. builders: as returned by `builders` or `full_builders`. make_trainable(dit,
    encoder) returns the trained parameters, as a list or as optimizer groups. If it makes parameters of the encoder
    trainable, the estimate runs the encoder too.
    """
    s, dtype, layout, phases, host = spec.settings, spec.dtype, spec.layout, {}, {}
    memory, free_on_host = free_beside_plan(spec, spec.device)
    cuda, (width, height, frames) = torch.device(spec.device).type == "cuda", spec.bucket
    encoded_frames = s.parts.examples.encoded_frames(frames, spec.continuation)
    with pretending(cuda):
        dit, encoder, vae = (build(builders, name, dtype) for name in (s.expert_names[0], "text", "vae"))
        if spec.encode:
            phases["cache latents"] = {
                "VAE": nbytes(vae),
                "activations and video": encoding_bytes(vae, width, height, encoded_frames),
            }
        read = 4 * max(p.numel() for p in dit.parameters())
        if layout.fp8:
            fp8.convert(dit, {})
        on_device, on_host = layout.weights(dit)
        whole = nbytes(dit)
        groups = make_trainable(dit, encoder)
        params = [p for g in groups for p in (g["params"] if isinstance(g, dict) else [g])]
        trains_encoder = any(p.requires_grad for p in encoder.parameters())
        shards_encoder = trains_encoder and layout.fsdp_size > 1
        trained = sum(p.nbytes for p in params)
        encoder_bytes = nbytes(encoder) - trained * trains_encoder  # trained weights are counted separately
        if shards_encoder:  # while a DiT block is unsharded, so is the embedding table, but no block of the encoder
            encoder_bytes = encoder_bytes // layout.fsdp_size + nbytes(encoder.token_embedding)
        if not trains_encoder and (spec.encode_texts or spec.previews):
            phases["cache texts"], on_host_then = encoder_at_work(encoder, memory, cuda)
            host["cache texts"] = {k: n * layout.local_ranks for k, n in on_host_then.items()}
        result = nbytes(encoder) if trains_encoder and not spec.save_delta else None

        learns = [trains_encoder or any(p.requires_grad for p in b.parameters()) for b in dit.blocks]
        learning = min(len(learns) - learns.index(True), math.ceil(len(learns) / layout.pp_size))  # blocks of one rank
        shape, inputs = s.latent_shape((width, height), frames), 0
        entry = {"latents": torch.empty(shape)} | s.parts.examples.entry(dit.config, shape, spec.continuation)
        peak, states = traced_training(spec, dit, encoder, groups, entry, trains_encoder)

        # both adapters of an A14B and their optimizer states stay in memory
        adapters = 1 if trains_encoder else spec.num_experts
        activations = peak + (adapters - 1) * states
        if shards_encoder:  # gradients and optimizer states are sharded, and in fp32 like the trained weights
            sharded = {k: n * 4 // dtype.itemsize // layout.fsdp_size for k, n in (("p", trained), ("s", states))}
            activations += sum(sharded.values()) - trained - states
            trained, states = sharded["p"], sharded["s"]
        if layout.stream_blocks:  # the blocks' inputs lie on the host; the inputs of two blocks are also on the device
            tokens = math.prod(shape[1:]) // 4 // layout.sp_size
            inputs = 4 * spec.batch * tokens * dit.config.dim * learning
            activations -= inputs * max(0, learning - 2) // learning * cuda
        weights = {"DiT": on_device if cuda else on_device + on_host}
        if trains_encoder:
            weights["encoder"] = encoder_bytes
        phases["training"] = weights | {"trained": adapters * trained, "states and activations": activations}
        if spec.previews:
            of = spec.previews
            dit.checkpointing = 0
            passes = "batched" if dit.batches_guidance else "sequential"
            step = denoising_bytes(dit, s, of, 1, spec.text, passes if s.guided else "none", layout)
            vae = build(builders, "vae", dtype, cuda)
            decode = decoding_bytes(vae, of, 1, 0)
            phases["previews"] = weights | {
                "trained and states": adapters * (trained + states),
                "VAE": nbytes(vae),
                "activations": max(step, decode),
            }

    # all experts lie on the device if they fit; else they alternate there, and a GPU copies them from the host
    others = (spec.num_experts - 1) * weights["DiT"]
    takes_turns = others > 0 and not others + sum(phases["training"].values()) <= 0.9 * memory < math.inf
    if not takes_turns:
        for name in phases.keys() & {"training", "previews"}:
            phases[name]["DiT"] += others
    copies, per_rank = spec.num_experts * (takes_turns or layout.shares_host_copy and s.is_moe), layout.local_ranks
    expert = whole - on_host
    if layout.fsdp_size > 1 or layout.pp_size > 1:
        expert = on_device * per_rank
        copies -= layout.fsdp_size > 1 and copies > 0  # sharded weights are moved: the expert on the device has no copy
    kept = {"streamed blocks": spec.num_experts * on_host, "inputs of blocks": per_rank * inputs}
    while copies and copies * expert + sum(kept.values()) + ROOM > free_on_host:
        copies -= 1  # without a copy, an expert is read from disk whenever it is used again
    kept["experts"] = copies * expert
    host["load"] = kept | {"inputs of blocks": 0, "loading": per_rank * read}
    host["training"] = kept
    states_on_disk = 3 * adapters * (trained + states)
    result = (result or adapters * trained) * spec.num_results
    disk = {"cache": sum(spec.cache), "result": result, "states": states_on_disk}
    plan = Plan(spec.device, phases, disk, host, layout)
    plan.takes_turns, plan.learning_blocks = takes_turns, learning
    return plan


def traced_training(spec, dit, encoder, groups, entry, trains_encoder):
    """Run a training step of one rank and return (peak bytes without the models' weights, bytes of optimizer states and
    EMA); the peak includes the second number. groups: what make_trainable returned. entry: a cached sample, as for
    flow.make_noisy_batch. trains_encoder: whether the text encoder is trained; if so, the step runs it too.
    """
    dit.checkpointing, batch, shape, layout = spec.checkpointing, spec.batch, entry["latents"].shape, spec.layout
    params = [p for g in groups for p in (g["params"] if isinstance(g, dict) else [g])]
    layout.share_tokens(dit)
    passes, num_buffers = 1, 0
    if layout.pp_size > 1:  # the first stage has as many samples in progress as there are stages
        dit.blocks = dit.blocks[-math.ceil(len(dit.blocks) / layout.pp_size) :]
        passes, batch = layout.pp_size, 1
        num_buffers = max(spec.batch, passes) * (2 if passes > 2 else 1)  # a middle stage receives from both sides
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
        # buffers for the tensors from other stages exist from the start
        buffers = [torch.empty(math.prod(shape[1:]) // 4, dit.config.dim) for _ in range(num_buffers)]

        def update():
            if eight_bit:  # this optimizer works in pieces so small that only its states count
                opt.state.update({p: opt.new_state(p) for p in params if p not in opt.state})
            else:
                opt.step()
            if ema:
                ema.update()

        for p in params:
            p.grad = torch.empty_like(p)
        update()  # optimizer states and gradients exist when the second step begins
        noisy = make_noisy_batch([entry] * batch, [], t, torch.empty(batch, *shape), loss_mask)
        context = embed()
        losses = [noisy.loss(dit, context[:batch], None) for _ in range(passes)]
        opt.zero_grad(set_to_none=True)
        sum(losses).backward()
        del losses, context
        if spec.anchor:
            (embed() - torch.empty(spec.batch, spec.text, text_dim)).square().sum().backward()
        update()
        del buffers
    states = sum(v.nbytes for s in opt.state.values() for v in s.values() if torch.is_tensor(v))
    return tracker.peak, states + (sum(a.nbytes for a in ema.average) if ema else 0)


def mfu(dit, x, text, seconds, device):
    """Return the share of the GPU's peak FLOP/s that a training step of `seconds` reached, or None if the peak is not
    known. FLOPs that activation checkpointing repeats are not counted. x (B,C,T',h,w): the batch. text: number of
    tokens per caption.
    """
    card = torch.device(device).type == "cuda" and flops.card_of(torch.cuda.get_device_name(device))
    return flops.step_of(dit, x.shape[2:], text, len(x)).total / seconds / card.peak if card else None
