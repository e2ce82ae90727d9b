"""The Settings of a checkpoint: its properties, and the values that sampling uses for flags that are not given."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from flow import SOLVERS
from nanowan.errors import BadInput
from nanowan.files import read_json
from nanowan.formats.dit import known_by_files, read_config, read_dit
from nanowan.formats.layouts import expert_folders, index_settings
from nanowan.variants.registry import VARIANTS, parts_of
from vae import GEOMETRY

NANO = Path(__file__).parent.parent / "nano" / "checkpoint"  # the toy checkpoint in the repository
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，"
    "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclass(frozen=True)
class Settings:
    """What a checkpoint is, and what it recommends: the entry of its variant in VARIANTS, overridden by what the
    checkpoint's files say, such as the "sample" entry of config.json.

    size: (width, height) px. guidance: scales for (low noise, high noise). boundary: the high-noise expert serves
    timesteps t >= 1000 * boundary; None if the model has no experts. z_dim: number of channels of a latent. stride:
    (frames, height, width) of the video that one latent pixel stands for. train: what config.json recommends for
    training. usual_loss: the held-out loss, from config.json, to expect on clips like those on which the checkpoint was
    trained.
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
    usual_loss: float | None = None

    @property
    def expert_names(self):
        return ("high", "low") if self.is_moe else ("dit",)

    @property
    def parts(self):
        """The Parts of this model_type: the code that differs between model types (variants/registry.py)."""
        return parts_of(self.model_type)

    @property
    def conditioning(self):
        """The Conditioning: the code for what the model gets in addition to noise, timestep and text."""
        return self.parts.conditioning

    @property
    def size_multiple(self):
        """The number, in px, of which a video's sides must be multiples: the side of a token (2x2 latent pixels), or a
        larger number if the variant demands one.
        """
        return max(2 * self.stride[1], self.parts.samples.side_multiple)

    @property
    def guided(self):
        return any(scale != 1 for scale in self.guidance)

    def expert_at(self, t):
        """Return (the name of the DiT that serves timestep t in 0..1000, the guidance scale at t)."""
        high = self.is_moe and t >= self.boundary * 1000
        return self.expert_names[0 if high else -1], self.guidance[1 if high else 0]

    def latent_shape(self, size, frames):
        """Return the shape (C,T',h,w) of the latents of a video. size: (width, height) px."""
        _, sh, sw = self.stride
        return self.z_dim, self.conditioning.latent_frames(frames), size[1] // sh, size[0] // sw

    def token_grid(self, size, frames):
        """Return the grid (T',H',W') of the tokens of a video. size: (width, height) px."""
        _, t, h, w = self.latent_shape(size, frames)
        return t, h // 2, w // 2

    def with_overrides(self, **overrides):
        """Return a copy of the settings with the overrides that are not None. Raises BadInput if a resulting value is
        not allowed.
        """
        s = replace(self, **{k: v for k, v in overrides.items() if v is not None})
        s = replace(s, guidance=tuple(np.broadcast_to(s.guidance, 2).tolist()), size=tuple(s.size))
        if not all(map(math.isfinite, s.guidance)) or not 0 < s.shift < math.inf:
            raise BadInput(
                f"--guidance {s.guidance}, --shift {s.shift}: guidance must be finite and the shift positive"
            )
        if s.steps < 1 or s.solver not in SOLVERS:
            raise BadInput(f"--steps {s.steps}, --solver {s.solver}: at least 1 step, and one of {', '.join(SOLVERS)}")
        if not s.conditioning.by_segments:  # the size of a video in segments follows from its inputs
            check_size(s.size, s.frames, s.size_multiple)
        return s


def checkpoint_dir(name):
    """Return the folder of a checkpoint; `nano` means the checkpoint in the repository."""
    return NANO if str(name) == "nano" and not (Path(name) / "config.json").exists() else Path(name)


def released(variant):
    """Return the Settings of `variant`, a key of VARIANTS, at its released size."""
    row = VARIANTS[variant]
    fields = {k: v for k, v in row.items() if k in Settings.__dataclass_fields__}
    z_dim, stride = GEOMETRY[row["vae"]]
    return Settings(variant=variant, z_dim=z_dim, stride=stride, is_moe=row["boundary"] is not None, **fields)


def read_settings(ckpt_dir):
    """Read the Settings of a checkpoint folder. Raises BadInput if the folder is not a Wan checkpoint."""
    folders = expert_folders(ckpt_dir)
    dit = next(iter(folders.values()))
    file = (dit.parent if dit.is_file() else dit) / "config.json"
    if not file.exists() and not known_by_files(dit):
        raise BadInput(f"{ckpt_dir}: not a Wan checkpoint folder, {file} is missing")
    config = read_json(file) if file.exists() else {}
    kind = config.get("model_type")
    if kind is None:  # Animate's and diffusers' configs lack it, and Animate-2 has no config: the tensors tell
        kind = read_config(dit, read_dit(dit)).model_type
    variants = {row["model_type"]: name for name, row in VARIANTS.items()}
    if kind not in variants:
        raise BadInput(f"{file}: model_type {kind!r} should be one of {', '.join(variants)}")
    try:
        is_moe = "dit" not in folders
        recommend = parts_of(kind).recommend
        overrides = recommend(read_config(dit, read_dit(dit))) if recommend else {}
        overrides |= config.get("sample", {}) | index_settings(ckpt_dir, is_moe, kind)
        s = replace(released(variants[kind]), is_moe=is_moe, train=config.get("train", {}), **overrides)
        s = replace(s, usual_loss=config.get("usual_loss"))
    except TypeError as e:
        raise BadInput(f'{file}: its "sample" should hold settings of sampling ({e})') from None
    return replace(s, size=tuple(s.size), guidance=tuple(np.broadcast_to(s.guidance, 2).tolist()))


def parse_size(text, flag="--size"):
    """Parse "832x480", or the official spelling "832*480", into (832, 480). flag: the flag that a BadInput names."""
    try:
        w, h = (int(v) for v in text.lower().replace("*", "x").split("x"))
        return w, h
    except ValueError:
        raise BadInput(f"{flag} {text}: give WIDTHxHEIGHT, such as 1280x704") from None


def parse_guidance(text):
    """Parse "4" or "3,4" (low noise, high noise) into a tuple of one or two numbers. Raises BadInput for other text."""
    try:
        values = tuple(float(v) for v in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in (1, 2):
        raise BadInput(f"--guidance {text}: give one number, or LOW,HIGH")
    return values


def nearest_multiple(value, of):
    return max(of, round(value / of) * of)


def check_size(size, frames, multiple, over=1):
    """Raise BadInput unless both sides of `size` (width, height), in px, are multiples of `multiple`, and `frames` is
    4k + `over`, where `over` is 0 or 1. The error names the nearest values that fit.
    """
    if size[0] % multiple or size[1] % multiple or min(size) < 1:
        near = "x".join(str(nearest_multiple(side, multiple)) for side in size)
        raise BadInput(f"--size {size[0]}x{size[1]}: sides must be multiples of {multiple}; nearest {near}")
    check_frames(frames, over)


def check_frames(frames, over=1):
    if frames % 4 != over or frames < 1:
        rule, nearest = "4k+1" if over else "a multiple of 4", round((frames - over) / 4) * 4 + over
        raise BadInput(f"--frames {frames}: must be {rule}; nearest {nearest if nearest > 0 else over or 4}")
