"""A checkpoint folder at work: its Settings, and Models, which loads, moves and evicts its parts as memory allows.

A part is "text" (the encoder), "vae", and "dit", or of an A14B "high" and "low", the two experts. `Models` loads a part
when it is first asked for. Where memory is short, and on an accelerator always between two experts, the others make
room: from the accelerator to the host, from the host (device "cpu") to nothing, to be read again when needed.
"""

import gc
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

import offload
from checkpoint import BadInput, read_header
from conditions import CONDITIONING
from formats import expert_folders, index_settings, read_json, read_weights, vae_files, weight_files
from fp8 import linears_in_fp8
from fp8 import report as fp8_report
from lora import check_fit, merge
from lora_files import choose_experts, parse_lora_spec, read_lora
from parallel import World, parallelize
from t5 import encoder_files, load_t5
from vae import GEOMETRY, load_vae
from wan import VARIANTS, load_wan, read_config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NANO = Path(__file__).parent / "nano"  # the checkpoint in the repository
# Bytes of activations at work, from the shapes of the largest layers: the VAE's per pixel of a frame, the DiT's per
# token and channel.
VAE_BYTES, DIT_BYTES = 18_000, 27
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，"
    "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


# ---- settings ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Settings:
    """What a checkpoint is and recommends: its row of wan.VARIANTS, under the "sample" entry of its config.json.

    size: (width, height) px. guidance: (low noise, high noise). boundary: the high-noise expert serves t/1000 >=
    boundary; None without experts. z_dim, stride: of the VAE's latents. train: what config.json recommends for
    training.
    """

    variant: str
    model_type: str
    z_dim: int
    stride: tuple
    fps: float
    frames: int
    steps: int
    size: tuple
    shift: float
    guidance: tuple
    boundary: float | None = None
    solver: str = "unipc"
    prompt: str = "a red square moves left"
    negative: str = NEGATIVE
    is_moe: bool = False
    train: dict = field(default_factory=dict)

    @property
    def expert_names(self):
        return ("high", "low") if self.is_moe else ("dit",)

    @property
    def conditioning(self):
        """What the model is given beside noise, time and text: one of conditions.CONDITIONING."""
        return CONDITIONING[self.model_type]

    @property
    def size_multiple(self):
        """Of which the sides of a video are multiples, in px: a token is a patch of 2x2 latent pixels."""
        return max(2 * self.stride[1], self.conditioning.size_multiple)

    @property
    def guided(self):
        return any(scale != 1 for scale in self.guidance)

    def expert_at(self, t):
        """(name of the DiT that serves time t in 0..1000, its guidance scale)."""
        high = self.is_moe and t >= self.boundary * 1000
        return self.expert_names[0 if high else -1], self.guidance[1 if high else 0]

    def latent_shape(self, size, frames):
        """(C,T',h,w) of a video's latents."""
        _, sh, sw = self.stride
        return self.z_dim, self.conditioning.latent_frames(frames), size[1] // sh, size[0] // sw

    def token_grid(self, size, frames):
        """(T',H',W') of a video's tokens."""
        _, t, h, w = self.latent_shape(size, frames)
        return t, h // 2, w // 2

    def with_overrides(self, **overrides):
        """These settings with what is not None over them, checked. Raises BadInput."""
        s = replace(self, **{k: v for k, v in overrides.items() if v is not None})
        s = replace(s, guidance=tuple(np.broadcast_to(s.guidance, 2).tolist()), size=tuple(s.size))
        if not all(map(math.isfinite, s.guidance)) or not 0 < s.shift < math.inf:
            raise BadInput(
                f"--guidance {s.guidance}, --shift {s.shift}: guidance must be finite and the shift positive"
            )
        if not s.conditioning.by_clips:  # those go by their inputs
            check_size(s.size, s.frames, s.size_multiple)
        return s


@dataclass(frozen=True)
class Request:
    """What a clip will be: settings in force, the opened image or None, and the video's (width, height) in px."""

    settings: Settings
    image: object
    pixels: tuple

    @property
    def shape(self):
        """(C,T',h,w) of the latents."""
        return self.settings.latent_shape(self.pixels, self.settings.frames)

    @property
    def tokens(self):
        return math.prod(self.settings.token_grid(self.pixels, self.settings.frames))


def checkpoint_dir(name):
    """`nano` means the checkpoint in the repository."""
    return NANO if str(name) == "nano" and not Path(name).is_dir() else Path(name)


def released(variant):
    """The Settings of one of wan.VARIANTS at its released size."""
    row = VARIANTS[variant]
    own = {k: v for k, v in row.items() if k in Settings.__dataclass_fields__}
    z_dim, stride = GEOMETRY[row["vae"]]
    return Settings(variant=variant, z_dim=z_dim, stride=stride, is_moe=row["boundary"] is not None, **own)


def settings(ckpt_dir):
    """The Settings of a checkpoint folder. Raises BadInput where it is none."""
    folders = expert_folders(ckpt_dir)
    file = next(iter(folders.values())) / "config.json"
    if not file.exists():
        raise BadInput(f"{ckpt_dir}: not a Wan checkpoint folder, {file} is missing")
    config = read_json(file)
    kind = config.get("model_type")
    if kind is None:  # Animate's and diffusers' do not say; their tensors do
        kind = read_config(file.parent, read_weights(weight_files(file.parent))).model_type
    variants = {row["model_type"]: name for name, row in VARIANTS.items()}
    if kind not in variants:
        raise BadInput(f"{file}: model_type {kind!r} should be one of {', '.join(variants)}")
    try:
        is_moe = "dit" not in folders
        own = config.get("sample", {}) | index_settings(ckpt_dir, is_moe, kind)
        s = replace(released(variants[kind]), is_moe=is_moe, train=config.get("train", {}), **own)
    except TypeError as e:
        raise BadInput(f'{file}: its "sample" should hold settings of sampling ({e})') from None
    return replace(s, size=tuple(s.size), guidance=tuple(np.broadcast_to(s.guidance, 2).tolist()))


def parse_size(text, flag="--size"):
    """ "832x480", or the official spelling "832*480", -> (832, 480)."""
    try:
        w, h = (int(v) for v in text.lower().replace("*", "x").split("x"))
        return w, h
    except ValueError:
        raise BadInput(f"{flag} {text}: give WIDTHxHEIGHT, such as 1280x704") from None


def nearest_multiple(value, of):
    return max(of, round(value / of) * of)


def check_size(size, frames, multiple):
    """Refuse a size (width, height) px or a number of frames that does not fit, naming the nearest that does."""
    if size[0] % multiple or size[1] % multiple or min(size) < 1:
        near = "x".join(str(nearest_multiple(side, multiple)) for side in size)
        raise BadInput(f"--size {size[0]}x{size[1]}: sides must be multiples of {multiple}; nearest {near}")
    check_frames(frames)


def check_frames(frames, over=1):
    if frames % 4 != over or frames < 1:
        rule, nearest = "4k+1" if over else "a multiple of 4", round((frames - over) / 4) * 4 + over
        raise BadInput(f"--frames {frames}: must be {rule}; nearest {nearest if nearest > 0 else over or 4}")


# ---- devices -----------------------------------------------------------------------------------------------------
def pick_device(name=None):
    """The device that a flag names, or cuda where there is one. Raises BadInput where there is no such device."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    count = torch.cuda.device_count()
    if name not in ["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]:
        choice = f", cuda or cuda:0 to cuda:{count - 1}" if count else "; no CUDA device is available"
        raise BadInput(f"--device {name}: use cpu{choice}")
    return name


def pick_dtype(name, device):
    """The name of the dtype that a flag gives, or the device's default: bf16 on cuda, fp32 on cpu."""
    return name or ("bf16" if torch.device(device).type == "cuda" else "fp32")


def free_memory(device):
    """Bytes that can still be taken on a device, or on the host ("cpu"); infinite where that cannot be known."""
    if torch.device(device).type == "cuda":
        if not torch.cuda.is_available():
            return math.inf
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    try:
        with open("/proc/meminfo") as f:
            return 1024 * next(int(line.split()[1]) for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf


def activation_bytes(dim, tokens, batch=1):
    """About what a forward pass of a DiT of width `dim` takes beyond weights, without gradients."""
    return DIT_BYTES * batch * tokens * dim


@dataclass
class Runtime:
    """How a checkpoint's models run.

    fp8: the DiT's blocks in 8 bits (fp8.py). stream_blocks: so many of the DiT's blocks stay on the host (offload.py).
    compile: None, "blocks" or "graphs". world: the ranks that work together (parallel.World; default: this process).
    on_model_built(name, model): what is done to a DiT before its weights are read, such as adapters.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    fp8: bool = False
    stream_blocks: int = 0
    compile: str | None = None
    world: World | None = None
    on_model_built: object = None

    def __post_init__(self):
        self.device = torch.device(self.device)
        self.world = self.world or World(str(self.device), distributed=False)

    @property
    def cuda(self):
        return self.device.type == "cuda"


class Models:
    """The parts of one checkpoint (see the top of this file), with `loras` merged into its DiTs.

    ckpt_dir: a folder, or "nano". loras: list of "FILE[:weight][:high|low|both]". text_encoder: a file to use instead
    of the folder's own encoder. What is wrong with an expert's files, or with a LoRA, raises BadInput here and not
    after half of the steps.
    """

    def __init__(self, ckpt_dir, runtime=None, loras=(), text_encoder=None):
        self.dir, self.runtime, self.text_encoder = checkpoint_dir(ckpt_dir), runtime or Runtime(), text_encoder
        self.settings = settings(self.dir)
        self.headers = {name: read_weights(self.files(name)) for name in self.settings.expert_names}
        self.fp8 = any([self.runtime.fp8, *map(linears_in_fp8, self.headers.values())])
        if self.settings.variant == "t2v-A14B" and not self.settings.is_moe and self.world.is_main:
            print(f"{self.dir}: of Wan 2.1, and shift and guidance are A14B's; its own are --shift 5 --guidance 5")
        self.loras = [self._check_lora(spec) for spec in loras]
        self.placements, self.prompt_embeds, self._conditions = {}, {}, (None, None)

    @property
    def device(self):
        return self.runtime.device

    @property
    def world(self):
        return self.runtime.world

    def _check_lora(self, spec):
        """FILE[:weight][:high|low|both] -> (file, weight, names of the DiTs that it is for)."""
        lora = parse_lora_spec(spec)
        experts, source = choose_experts(lora, self.settings.expert_names)
        for name in experts:
            shapes = {n: e.shape for n, e in self.headers[name].items()}
            check_fit(lora.file, read_lora(lora.file, name)[0], shapes)
        if source and self.world.is_main:
            print(f"{lora.file}: for {' and '.join(sorted(experts))} noise, as {source} says")
        return lora.file, lora.weight, experts

    # ---- files ---------------------------------------------------------------------------------------------------
    def folder(self, expert):
        return expert_folders(self.dir)[expert]

    def files(self, part):
        if part == "text":
            return encoder_files(self.dir, self.text_encoder)
        return vae_files(self.dir) if part == "vae" else weight_files(self.folder(part))

    def config(self, expert=None):
        """The WanConfig of a DiT (default: the first expert)."""
        expert = expert or self.settings.expert_names[0]
        return read_config(self.folder(expert), self.headers[expert])

    # ---- parts ---------------------------------------------------------------------------------------------------
    def acquire(self, name, activations=1 << 30):
        """A part on the device, ready to run with this many bytes of activations: loaded where it is not, others
        evicted where they are in the way. Hold no reference to another part meanwhile.
        """
        part, device = self.placements.get(name), self.device
        need = activations + (0 if part and part.is_on(device) else self._bytes(name))
        for other in [n for n, p in self.placements.items() if n != name and p.is_on(device)]:
            if free_memory(device) < need or self.runtime.cuda and {other, name} == {"high", "low"}:
                self.evict(other)
        if part is None:
            part = self.placements[name] = self._load(name)
        elif not part.is_on(device):
            part.to(device)
        return part.model

    def acquire_vae(self, size):
        """The VAE, ready for frames of (width, height) px."""
        return self.acquire("vae", VAE_BYTES * math.prod(size))

    def evict(self, name):
        """Give a part's memory back: to the host while there is room, else drop it."""
        part, cuda = self.placements[name], self.runtime.cuda
        if part.shared and not cuda:
            return  # it is the other ranks' too
        nbytes = sum(p.nbytes for p in part.model.parameters())
        if cuda and (part.shared or free_memory("cpu") > nbytes + (1 << 30)):
            part.to("cpu")
            torch.cuda.empty_cache()
        else:
            part = None
            self.drop(name)

    def drop(self, *names):
        """Give parts up (default: all); they are read again when asked for."""
        for name in names or list(self.placements):
            if self.placements.pop(name, None):
                gc.collect()  # a streamed model and its Stream know each other
        if self.runtime.cuda:
            torch.cuda.empty_cache()

    def loaded(self):
        """The models in memory."""
        return [part.model for part in self.placements.values()]

    def streams(self):
        """The offload.Streams of the DiTs in memory."""
        return [part.stream for part in self.placements.values() if isinstance(part, offload.StreamedPlacement)]

    def _bytes(self, name):
        """What a part's weights take on the device."""
        if name in self.settings.conditioning.encoders:
            return self.settings.conditioning.encoders[name].bytes(self.dir)
        if name in self.headers:
            run = self.runtime
            return offload.device_bytes(self.headers[name], run.dtype, self.fp8, run.stream_blocks)
        numel = sum(e.numel for f in self.files(name) for e in read_header(f)[0].values())
        return numel * (4 if name == "vae" else self.runtime.dtype.itemsize)

    def _load(self, name):
        run = self.runtime
        if name == "text":
            return offload.Placement(load_t5(self.dir, run.device, run.dtype, self.text_encoder))
        if name == "vae":
            # fp32 is the official precision, and bf16 does harm to the encoder; to the decoder it does none, and
            # halves its memory
            vae = load_vae(self.dir, run.device, torch.float32)
            return offload.Placement(vae.decode_in(run.dtype) if run.cuda else vae)
        if name in self.settings.conditioning.encoders:
            encoder = self.settings.conditioning.encoders[name]
            return offload.Placement(encoder.load(self.dir / encoder.folder, run.device))
        shares_host = run.stream_blocks or run.cuda and self.settings.is_moe  # weights that wait on the host
        share = self.world.host_share() if shares_host else None
        host_first = "cpu" if share is None or share.is_first else "meta"
        where = host_first if run.stream_blocks or share else run.device
        model = load_wan(self.folder(name), where, run.dtype, self.fp8, lambda model: self._built(name, model))
        for file, weight, experts in self.loras:
            if name in experts:
                merge(model, file, weight, name)
        if self.world.is_main and (error := fp8_report(model)):
            print(f"{self.folder(name)}: {error}")
        buffer = None
        if share:
            buffer = offload.share_host_copy(model, share.path_of(name), share.is_first, share.barrier, run.device)
        if run.stream_blocks:
            part = offload.StreamedPlacement(model, run.stream_blocks, run.device, buffer)
        elif share:
            part = offload.SharedPlacement(model)
            part.to(run.device)
        else:
            part = offload.Placement(model)
        if run.compile == "blocks":  # they are all alike: compiled once
            for block in model.blocks:
                block.compile()
        elif run.compile == "graphs":
            model.compile(mode="reduce-overhead")
        return part

    def _built(self, name, model):
        """A DiT has its shape and no weights yet: let the script add to it, then split it over the ranks."""
        if self.runtime.on_model_built:
            self.runtime.on_model_built(name, model)
        parallelize(model, self.world)

    # ---- what models are given -----------------------------------------------------------------------------------
    @torch.no_grad()
    def encode_prompts(self, prompts):
        """list of str -> (embeddings (B,S,D), lens (B,)). Prompts already seen do not need the encoder again."""
        for p in dict.fromkeys(prompts):
            if p not in self.prompt_embeds:  # one at a time: an embedding owes nothing, to the last bit, to neighbours
                self.prompt_embeds[p] = self.acquire("text").encode([p])[0][0]
        rows = [self.prompt_embeds[p] for p in prompts]
        lens = torch.tensor([len(r) for r in rows], device=self.device)
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lens

    def encode_conditions(self, image, size, frames):
        """The Conditions of a clip of `frames` at `size` px; image: PIL or None. The last ones are kept."""
        key = (image and (image.size, image.tobytes()), size, frames)
        if key != self._conditions[0]:
            vae = image and self.acquire_vae(size)
            self._conditions = key, self.settings.conditioning.encode(vae, image, size, frames)
            if vae and self.runtime.cuda:  # the VAE will come back, but the DiT, which comes now, is the largest
                vae = None
                self.evict("vae")
        return self._conditions[1]

    def guidance_mode(self, tokens, batch=1):
        """How guidance's two halves are computed for clips of so many tokens: "parallel", on two ranks; "batched", in
        one forward pass; or "sequential", one after the other, where there is no memory for that.
        """
        if self.world.cfg_size == 2:
            return "parallel"
        need = 2 * activation_bytes(self.config().dim, tokens // self.world.sp_size, batch)
        if not any(part.is_on(self.device) for name, part in self.placements.items() if name in self.headers):
            need += self._bytes(self.settings.expert_names[0]) + (1 << 28)  # and what lies beside it
        return "batched" if self.world.all_ranks(free_memory(self.device) > need, "sp") else "sequential"
