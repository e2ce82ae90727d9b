"""Videos from prompts and images.

    python sample.py --ckpt DIR --prompt "a red square moves left"
    python sample.py --ckpt Wan2.2-TI2V-5B --prompt TEXT --image FILE --device cuda
    python sample.py --ckpt Wan2.2-T2V-A14B --prompts FILE --lora adapter_model_high.safetensors --lora
    adapter_model_low.safetensors

With --device cpu --dtype fp32 and a seed the latents equal the official pipelines' to fp32 rounding.
"""

import argparse
import gc
import json
import math
import os
import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import flow
import offload
import ops
from checkpoint import BadInput, atomic, cli, count_blocks, find, read_header, read_headers, save, weight_files
from data import Skip, open_photo
from fp8 import report as fp8_report
from fp8 import take_scales
from lora import check_fit, merge, named_expert, read_lora
from parallel import World, parallelize
from t5 import encoder_files, load_t5
from vae import load_vae
from wan import VARIANTS, load_wan

NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，"
    "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HERE = Path(__file__).parent


def checkpoint_dir(name):
    """`nano` means the checkpoint in the repository."""
    return HERE / "nano" if str(name) == "nano" and not Path(name).is_dir() else Path(name)


def released(variant):
    """The settings of one of VARIANTS at its released size."""
    return {
        "negative": NEGATIVE,
        "solver": "unipc",
        **VARIANTS[variant],
        "variant": variant,
        "experts": VARIANTS[variant]["boundary"] is not None,
        "train": {},
    }


def settings(ckpt_dir):
    """What a checkpoint recommends: its VARIANTS row, under what the "sample" entry of its config.json says; for
    training, "train".
    """
    ckpt_dir = Path(ckpt_dir)
    experts = (ckpt_dir / "high_noise_model").is_dir()
    file = (ckpt_dir / "high_noise_model" if experts else ckpt_dir) / "config.json"
    if not file.exists():
        raise BadInput(f"{ckpt_dir}: not a Wan checkpoint folder, {file} is missing")
    try:
        config = json.loads(file.read_text())
        variant = next(name for name, row in VARIANTS.items() if row["model_type"] == config["model_type"])
    except (ValueError, KeyError, TypeError, StopIteration):
        raise BadInput(
            f"{file}: model_type should be one of {', '.join(r['model_type'] for r in VARIANTS.values())}"
        ) from None
    return {**released(variant), "experts": experts, "train": config.get("train", {}), **config.get("sample", {})}


def free_memory(device):
    """Bytes that can still be taken on a device, or on the host ("cpu")."""
    if torch.device(device).type == "cuda":
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    try:
        return 1024 * next(int(line.split()[1]) for line in open("/proc/meminfo") if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf


class Models:
    """The parts of one checkpoint: "text", "vae", and "dit", or "high" and "low". Each is loaded when first asked for.
    When memory is short, and on an accelerator always between the two experts, the others make room: from the
    accelerator to the host, from the host (device "cpu") to nothing, to be read again when needed. fp8: hold the DiT's
    blocks in 8 bits (fp8.py); stream: so many of the DiT's blocks stay on the host (offload.py).
    """

    def __init__(self, ckpt_dir, device, dtype, loras=(), text_encoder=None, fp8=False, stream=0):
        self.dir, self.device, self.dtype, self.text_encoder = (
            checkpoint_dir(ckpt_dir),
            torch.device(device),
            dtype,
            text_encoder,
        )
        self.stream, self.streams, self.homes = stream, {}, {}
        self.settings = settings(self.dir)
        self.experts = ("high", "low") if self.settings["experts"] else ("dit",)
        # what is wrong with an expert's files, or with a LoRA, is better known now than after half the steps
        self.headers = {expert: read_headers(weight_files(self.folder(expert))) for expert in self.experts}
        self.fp8 = any([fp8, *map(take_scales, self.headers.values())])
        self.loras = [self._lora(spec) for spec in loras]
        self.parts, self.texts, self.conditions, self.compile = {}, {}, {}, None
        self.prepare = lambda name, model: None  # what is done to a DiT before its weights are read
        self.world = World(device, distributed=False)  # the ranks that share a clip
        self.agree = lambda yes: yes  # whether all ranks that run a DiT together say so
        self.machine, self.shared = (
            None,
            {},
        )  # the ranks of a machine, if they share host copies: (whether this is the first, barrier, file of a part)

    def _lora(self, spec):
        """FILE[:weight][:high|low] -> (file, weight, expert or None). A file's own metadata names its expert if the
        flag does not.
        """
        file, expert = named_expert(spec)
        fields, weight = file.split(":"), 1.0
        if len(fields) > 1:
            try:
                weight = float(fields[-1])
                fields.pop()
            except ValueError:
                pass
            if not math.isfinite(weight):
                raise BadInput(f"--lora {spec}: a weight of {weight}")
        file = ":".join(fields)
        pairs, metadata = read_lora(file)
        expert = expert or metadata.get("expert")
        if expert in ("high", "low") and expert not in self.experts:
            raise BadInput(
                f"--lora {spec}: made for the {expert}-noise expert of an A14B, and {self.dir} has a single model"
            )
        expert = expert if expert in ("high", "low") else None
        for name in [expert] if expert else self.experts:
            check_fit(file, pairs, {n.removesuffix(".weight"): e.shape for n, e in self.headers[name].items()})
        return file, weight, expert

    def folder(self, expert):
        return self.dir if expert == "dit" else self.dir / f"{expert}_noise_model"

    def files(self, part):
        if part == "text":
            return encoder_files(self.dir, self.text_encoder)
        return [find(self.dir, "*VAE*", "the VAE")] if part == "vae" else weight_files(self.folder(part))

    def part(self, name, activations=1 << 30):
        """A part on the device, ready to run with this many bytes of activations. Hold no reference to another one
        meanwhile.
        """
        model, cuda = self.parts.get(name), self.device.type == "cuda"
        here = [part for part, m in self.parts.items() if next(m.parameters()).device.type == self.device.type]
        resident = name in here
        need = activations + (0 if resident else self._bytes(name))
        for other in [part for part in here if part != name]:
            if free_memory(self.device) < need or cuda and {other, name} == {"high", "low"}:
                self.release(other)
        if not resident:
            self.parts[name] = self._load(name) if model is None else self._move(name, model, self.device)
        return self.parts[name]

    def _bytes(self, name):
        """What a part takes on the device."""
        entries = self.headers.get(name) or {n: e for f in self.files(name) for n, e in read_header(f)[0].items()}
        sizes = {n: e.numel for n, e in entries.items()}
        blocks = {n: v for n, v in sizes.items() if name in self.headers and n.startswith("blocks.")}
        each, block = 4 if name == "vae" else self.dtype.itemsize, sum(blocks.values())
        return each * (sum(sizes.values()) - block) + round(
            (1 if self.fp8 else each) * block * (1 - min(1, self.stream / max(1, count_blocks(blocks))))
        )

    def _move(self, name, model, device):
        """A part, but for what is trained, to another device; of a streamed DiT, what is not streamed. A shared host
        copy is only returned to, since nothing in it changes.
        """
        if name in self.streams:
            self.streams[name].to(device)
        elif name in self.shared and torch.device(device).type == "cpu":
            for t, host in self.homes[name]:
                t.data = host
        else:
            self.homes[name] = [
                (t, t.data)
                for t in [*model.parameters(), *model.buffers()]
                if name in self.shared and not t.requires_grad
            ]
            trained = [(t, t.data) for t in model.parameters() if t.requires_grad]
            model.to(device)
            for t, data in trained:  # adapters stay where their optimizer's states are
                t.data = data
        return model

    def release(self, name):
        """Give a part's memory back: to the host while there is room, else drop it."""
        if name in self.shared and self.device.type == "cpu":
            return  # it is the other ranks' too
        model, cuda = self.parts.pop(name), self.device.type == "cuda"
        if cuda and (name in self.shared or free_memory("cpu") > sum(p.nbytes for p in model.parameters()) + (1 << 30)):
            self.parts[name] = self._move(name, model, "cpu")
        elif name in self.streams:
            self.streams.pop(name).close()
            del model
            gc.collect()  # a streamed model and its Stream know each other
        if cuda:
            torch.cuda.empty_cache()

    def _load(self, name):
        if name == "text":
            return load_t5(self.dir, self.device, self.dtype, self.text_encoder)
        if (
            name == "vae"
            # fp32 is the official precision, and bf16 does harm to the encoder; to the decoder it does none, and halves its
            # memory
        ):
            vae = load_vae(self.dir, self.device, torch.float32)
            return vae.decode_in(self.dtype) if self.device.type == "cuda" else vae
        first, barrier, place = self.machine or (True, None, None)
        share = self.machine and (self.stream or self.device.type == "cuda" and len(self.experts) > 1)
        where = self.device if not (self.stream or share) else "cpu" if first else "meta"
        model = load_wan(self.folder(name), where, self.dtype, self.fp8, lambda model: self.prepare(name, model))
        for file, weight, expert in self.loras:
            if expert in (None, name):
                merge(model, file, weight)
        if first and (error := fp8_report(model)):
            print(f"{self.folder(name)}: {error}")
        if share:
            self.shared[name] = offload.share_host_copy(model, place(name), first, barrier, self.device.type == "cuda")
        if self.stream:
            self.streams[name] = offload.Stream(model, self.stream, self.device, self.shared.get(name))
        elif share:
            model = self._move(name, model, self.device)
        if self.compile == "blocks":  # they are all alike: compiled once
            for block in model.blocks:
                block.compile()
        elif self.compile == "graphs":
            model.compile(mode="reduce-overhead")
        return model

    @torch.no_grad()
    def encode_prompts(self, prompts):
        """list of str -> (embeddings (B,S,D), lens (B,)). Prompts already seen do not need the encoder again."""
        for p in dict.fromkeys(prompts):
            if (
                p not in self.texts
            ):  # one at a time: to the last bit, a prompt's embedding owes nothing to its neighbours
                self.texts[p] = self.part("text").encode([p])[0][0]
        rows = [self.texts[p] for p in prompts]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor(
            [len(r) for r in rows], device=self.device
        )


def load(ckpt_dir, device="cpu", dtype=torch.float32, lora=(), text_encoder=None, fp8=False, stream=0):
    """A checkpoint folder (or "nano") ready for `generate`.

    lora: list of "FILE[:weight][:high|low]". text_encoder: a file to use instead of the folder's own encoder. fp8: the
    DiT's blocks in 8 bits. stream: how many of them stay on the host. Weights are read when first needed; a LoRA that
    cannot be read raises BadInput here."""
    return Models(ckpt_dir, device, dtype, lora, text_encoder, fp8, stream)


# ---- conditioning ------------------------------------------------------------------------------------------------
def best_size(width, height, area, step):
    """TI2V: the size nearest an image's aspect with sides multiples of `step` and no more than `area` px (official
    best_output_size).
    """
    ratio = width / height
    ow = (area * ratio) ** 0.5
    oh = area / ow
    w1 = int(ow // step * step)
    h2 = int(oh // step * step)
    if not w1 or not h2:
        raise BadInput(
            f"--size of {area} px is too small for an image of {width}x{height}: a side would be under {step}"
        )
    h1, w2 = int(area / w1 // step * step), int(area / h2 // step * step)
    off = [max(ratio / (w / h), (w / h) / ratio) for w, h in ((w1, h1), (w2, h2))]
    return (w1, h1) if off[0] < off[1] else (w2, h2)


def open_image(image):
    """A PIL image, or a file as the training data are opened (upright, transparency on white), as RGB."""
    from PIL import Image

    if isinstance(image, Image.Image):
        return image.convert("RGB")
    try:
        return open_photo(image)
    except Skip as e:
        raise BadInput(f"--image {image}: {e}") from None


def to_tensor(image):
    """PIL image -> (3,H,W) in [-1,1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255).sub(0.5).div(0.5)


def check_size(size, frames, stride, patch=2):
    """Refuse what does not fit, naming the nearest that does."""
    near = lambda v, m: max(m, round(v / m) * m)
    sw, sh = stride[2] * patch, stride[1] * patch
    if size[0] % sw or size[1] % sh or min(size) < 1:
        raise BadInput(
            f"--size {size[0]}x{size[1]}: width must be a multiple of {sw} and height of {sh}; "
            f"nearest {near(size[0], sw)}x{near(size[1], sh)}"
        )
    if frames % 4 != 1 or frames < 1:
        raise BadInput(f"--frames {frames}: must be 4k+1; nearest {max(1, round((frames - 1) / 4) * 4 + 1)}")


def video_size(s, size, image):
    """(width, height) of the video: `size`, or with an image its area in the image's aspect, as the official pipelines
    have it.
    """
    if image is None:
        return size
    area = size[0] * size[1]
    if s["model_type"] == "ti2v":
        return best_size(*image.size, area, 32)
    aspect = image.height / image.width
    h, w = (8 * round(np.sqrt(a) // 8 // 2 * 2) for a in (area * aspect, area / aspect))
    if not h or not w:
        raise BadInput(
            f"--size of {area} px is too small for an image of {image.width}x{image.height}: a side would be under 16"
        )
    return w, h


def condition_on_image(vae, s, image, size, frames):
    """Image conditioning as the official pipelines do it: (first, y), TI2V's clean first latent frame (1,48,1,h,w) or
    None, and I2V's 20 extra channels (1,20,T',h,w) or None.
    """
    from PIL import Image

    (w, h), device = size, next(vae.parameters()).device
    if s["model_type"] == "ti2v":
        scale = max(w / image.width, h / image.height)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.LANCZOS)
        x, y = (image.width - w) // 2, (image.height - h) // 2
        return vae.encode(to_tensor(image.crop((x, y, x + w, y + h)))[None, :, None].to(device)), None
    pixels = F.interpolate(to_tensor(image)[None], size=(h, w), mode="bicubic")[:, :, None]
    return None, vae.condition(pixels.to(device), frames)


# ---- sampling ----------------------------------------------------------------------------------------------------
# Bytes of activations at work, from the shapes of the largest layers: the VAE per pixel of a frame, the DiT per token
# and channel.
VAE_BYTES, DIT_BYTES = 18_000, 30


def resolve(models, image=None, **given):
    """The checkpoint's recommended settings with what was given (not None) over them, checked. Adds the opened image,
    the size in pixels that it leads to, and the latents' shape (C,T',h,w).
    """
    s = dict(models.settings, **{k: v for k, v in given.items() if v is not None})
    s["guidance"] = tuple(np.broadcast_to(s["guidance"], 2).tolist())
    if not all(map(math.isfinite, s["guidance"])) or not 0 < s["shift"] < math.inf:
        raise BadInput(
            f"--guidance {s['guidance']}, --shift {s['shift']}: guidance must be finite and the shift positive"
        )
    st, sh, sw = (4, 16, 16) if s["vae"] == "2.2" else (4, 8, 8)
    check_size(s["size"], s["frames"], (st, sh, sw))
    if image is None and s["model_type"] == "i2v":
        raise BadInput(f"{models.dir}: an image-to-video model, --image is needed")
    if image is not None and s["model_type"] == "t2v":
        raise BadInput(f"--image {image}: {models.dir} is a text-to-video model and takes none")
    s["image"] = None if image is None else open_image(image)
    s["pixels"] = width, height = video_size(s, s["size"], s["image"])
    s["shape"] = (48 if s["vae"] == "2.2" else 16, 1 + (s["frames"] - 1) // st, height // sh, width // sw)
    s["method"] = flow.solver(s["solver"], s["steps"], s["shift"])
    s["guided"] = any(g != 1 for g in s["guidance"])
    return s


class Reuse:
    """Steps taken without the model, EasyCache (Zhou et al., "Less is Enough", 2025): velocity minus latent changes
    slowly, so the last one computed serves again while the change expected since then stays below `threshold` of the
    velocity. Inexact; `diag.py reuse` measures by how much.
    """

    def __init__(self, threshold):
        self.threshold, self.computed, self.v, self.rate = threshold, 0, None, None

    def guess(self, x):
        """The velocity at x, or None where it is to be computed."""
        if self.rate is None:
            return None
        self.error += (self.rate * (x - self.seen).norm() / self.v.norm()).item()
        self.seen = x
        return x + self.offset if self.error < self.threshold else None

    def learn(self, x, v):
        """The velocity v was computed at x."""
        if self.v is not None:
            self.rate = (v - self.v).norm() / (x - self.x).norm()
        self.computed, self.x, self.seen, self.v, self.offset, self.error = self.computed + 1, x, x, v, v - x, 0.0


@torch.no_grad()
def denoise(
    models,
    prompts,
    seeds,
    image=None,
    size=None,
    frames=None,
    steps=None,
    shift=None,
    guidance=None,
    solver=None,
    negative=None,
    progress=True,
    reuse=None,
    watch=None,
):
    """Latents (B,C,T',h,w) fp32 of B prompts, each from its own seed; a clip does not depend on what it is batched
    with, but for rounding. Arguments as in `generate`; reuse: a Reuse; watch(step, x0) sees the estimate of the clean
    latents after every step.
    """
    s = resolve(
        models,
        image,
        size=size,
        frames=frames,
        steps=steps,
        shift=shift,
        guidance=guidance,
        solver=solver,
        negative=negative,
    )
    B, shape, device = len(prompts), s["shape"], models.device
    emb, lens = models.encode_prompts(
        [*prompts, *([s["negative"]] if s["guided"] else [])]
    )  # the encoder is done before the DiT comes
    first = y = None
    if image is not None:
        key = (s["image"].size, s["image"].tobytes(), s["pixels"], s["frames"])
        if key not in models.conditions:
            vae = models.part("vae", VAE_BYTES * math.prod(s["pixels"]))
            models.conditions = {key: condition_on_image(vae, s, s["image"], s["pixels"], s["frames"])}
            vae = None
        first, y = models.conditions[key]
    x = torch.stack(
        [torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device) for seed in seeds]
    )
    if first is not None:
        x[:, :, :1] = first

    method, expert, reuse = s["method"], None, reuse or Reuse(0.0)
    timesteps = method.timesteps.tolist()
    for i, t in enumerate(tqdm(timesteps, disable=not progress, unit="step")):
        noisy = s["boundary"] is None or t >= s["boundary"] * 1000
        wanted = models.experts[0 if noisy else -1]
        if wanted != expert:
            model = run = both = alone = None  # the other expert, and its keys and values, go before this one comes
            activations = DIT_BYTES * B * math.prod(shape[1:]) // 4 * 5120
            expert, model, reuse.v, reuse.rate = wanted, models.part(wanted, activations), None, None
            run = (
                (lambda *args: model(*args).clone()) if models.compile == "graphs" else model
            )  # a graph's next replay overwrites what it gave
            apart = models.world.cfg_size == 2
            together = models.agree(
                not apart and free_memory(device) > 2 * activations
            )  # both halves of guidance in one batch
            alone = model.embed_text(emb[:B, : lens[:B].max()], lens[:B], cache=True)
            if s["guided"]:
                negatives = emb[B:].expand(B, -1, -1), lens[B:].expand(B)
                both = (
                    model.embed_text(
                        torch.cat([emb[:B], negatives[0]]), torch.cat([lens[:B], negatives[1]]), cache=True
                    )
                    if together
                    else model.embed_text(negatives[0][:, : lens[B]], negatives[1], cache=True)
                )
        g = s["guidance"][1 if noisy and len(models.experts) == 2 else 0]
        v = reuse.guess(x) if reuse.threshold and i < len(timesteps) - 1 else None
        if v is None:
            rows = torch.full((B,), float(t), device=device)
            if first is not None:  # the clean first frame is at t = 0
                rows = rows[:, None].repeat(1, shape[1])
                rows[:, 0] = 0
            inputs = x if y is None else torch.cat([x, y.expand(B, -1, -1, -1, -1)], 1)
            if g == 1:
                v = run(inputs, rows, alone)
            else:
                v, uncond = (
                    models.world.exchange_cfg(run(inputs, rows, both if models.world.cfg_rank else alone))
                    if apart
                    else run(torch.cat([inputs, inputs]), torch.cat([rows, rows]), both).chunk(2)
                    if together
                    else (run(inputs, rows, alone), run(inputs, rows, both))
                )
                v = uncond + g * (v - uncond)
            reuse.learn(x, v)
        if watch:
            x0 = x - float(method.sigma) * v
            if first is not None:
                x0[:, :, :1] = first
            watch(i, x0)
        x = method.step(v, x)
        if first is not None:
            x[:, :, :1] = first
    if not x.isfinite().all():
        raise BadInput(
            f"{models.dir}: the latents are not finite; with these settings, or this dtype, the model overflows"
        )
    return x


def decode(models, latents, tile=0):
    """Latents (B,C,T',h,w) -> videos (B,3,T,H,W) in [-1,1]; tile as in VAE.decode."""
    pixels = math.prod(latents.shape[3:]) * (256 if models.settings["vae"] == "2.2" else 64)
    vae = models.part("vae", VAE_BYTES * pixels)
    if models.world.clip_group_size == 1:
        return vae.decode(latents, tile)
    (h, w), team = latents.shape[3:], models.world.clip_group_size
    tiles = lambda side: -(-h // side) * -(-w // side)
    tile = tile or next(
        side
        for side in range(vae.decoder.reach(), max(h, w, vae.decoder.reach()) + 1)
        if tiles(side) <= team or side >= max(h, w)
    )
    return vae.decode(latents, tile, models.world.split_tiles)


def generate(
    models,
    prompt,
    image=None,
    size=None,
    frames=None,
    steps=None,
    shift=None,
    guidance=None,
    solver=None,
    seed=0,
    negative=None,
    progress=True,
):
    """One video. Whatever is None comes from the checkpoint's recommended settings.

    models: from `load`. prompt: str. image: file or PIL image to start from (then `size` gives the area and the image
    the aspect). size: (width, height) px. frames: 4k+1. shift: of the sigma grid. guidance: scale, or (low-noise,
    high-noise) scales; 1 means without. solver: "unipc", "dpm++" or "euler". Returns (video (3,T,H,W) in [-1,1],
    latents (C,T',h,w)), both fp32.
    """
    latents = denoise(models, [prompt], [seed], image, size, frames, steps, shift, guidance, solver, negative, progress)
    return decode(models, latents)[0], latents[0]


# ---- previews ----------------------------------------------------------------------------------------------------
@torch.no_grad()
def latent_to_rgb(vae):
    """A linear map (z+1,3) from a pixel of the latents, and a one, to the mean colour of what it stands for: fitted by
    least squares on a still clip of smooth noise.
    """
    device = next(vae.parameters()).device
    noise = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    image = F.interpolate(noise, scale_factor=2 * vae.stride[1], mode="bicubic").clamp(-1, 1)
    z = vae.encode(image[:, :, None].expand(-1, -1, 9, -1, -1).to(device))[0].flatten(1).t().cpu()
    colors = F.avg_pool2d(image, vae.stride[1])[0, :, None].expand(-1, 3, -1, -1).flatten(1).t()
    return torch.linalg.lstsq(torch.cat([z, torch.ones_like(z[:, :1])], 1), colors).solution


def previewer(models, path, every, label):
    """A `watch` for denoise that writes a small picture of the clip to come, to `path`, every so many steps."""
    colors = latent_to_rgb(models.part("vae"))

    def watch(step, x0):
        if (step + 1) % every == 0:
            z = x0[0].cpu()
            video = torch.einsum("cthw,cd->dthw", torch.cat([z, torch.ones_like(z[:1])]), colors)
            write_grid(
                path, [F.interpolate(video, scale_factor=8)], [f"step {step + 1}: {label}"], shown=min(5, z.shape[1])
            )

    return watch


# ---- files -------------------------------------------------------------------------------------------------------
def to_uint8(video):
    """(3,T,H,W) in [-1,1] -> (T,H,W,3) uint8."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()


def write_mp4(path, video, fps, comment=""):
    """H.264, yuv420p, crf 10. `comment` is stored in the file's metadata. Written under a temporary name, then renamed."""
    import av

    with atomic(path) as tmp, av.open(str(tmp), "w", format="mp4") as file:
        if comment:
            file.metadata["comment"] = comment
        # without x264's macroblock tree, which on small frames does not give the same bits each time
        stream = file.add_stream(
            "libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "10", "x264-params": "mbtree=0"}
        )
        stream.width, stream.height, stream.pix_fmt = video.shape[3], video.shape[2], "yuv420p"
        for frame in to_uint8(video):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())


def write_grid(path, videos, labels, columns=1, shown=3, scale=None):
    """A contact sheet PNG: each video as `shown` frames in a row (first to last) under its label, `columns` videos side
    by side.
    """
    from PIL import Image, ImageDraw

    strips = []
    for video in videos:
        frames = to_uint8(video)[np.linspace(0, video.shape[1] - 1, shown).round().astype(int)]
        strip = Image.fromarray(np.concatenate(list(frames), 1))
        factor = scale or max(1, round(384 / strip.width))
        strips.append(strip.resize((strip.width * factor, strip.height * factor), Image.NEAREST))
    w, h = strips[0].width + 8, strips[0].height + 22
    sheet = Image.new("RGB", (w * columns, h * -(-len(strips) // columns)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (strip, label) in enumerate(zip(strips, labels)):
        x, y = i % columns * w + 4, i // columns * h
        sheet.paste(strip, (x, y + 18))
        pen.text((x, y + 2), label if len(label) * 6 < w else label[: w // 6 - 3] + "...", fill="black")
    with atomic(path) as tmp:
        sheet.save(tmp, format="PNG")


def read_prompts(file, flag="--prompts"):
    """The lines of a text file that are not empty."""
    try:
        prompts = [line.strip() for line in Path(file).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"{flag} {file}: {e}") from None
    if not prompts:
        raise BadInput(f"{flag} {file}: holds no prompts")
    return prompts


def parse_size(text):
    try:
        w, h = (int(v) for v in text.lower().split("x"))
        return w, h
    except ValueError:
        raise BadInput(f"--size {text}: give WIDTHxHEIGHT, such as 1280x704") from None


def parse_guidance(text):
    try:
        values = tuple(float(v) for v in text.split(","))
        assert len(values) in (1, 2)
        return values
    except (ValueError, AssertionError):
        raise BadInput(f"--guidance {text}: give one number, or LOW,HIGH") from None


def pick_device(name):
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    count = torch.cuda.device_count()
    if name not in ["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]:
        raise BadInput(
            f"--device {name}: use cpu"
            + (f", cuda or cuda:0 to cuda:{count - 1}" if count else "; no CUDA device is available")
        )
    return name


def arguments(given=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", default="nano", help="checkpoint folder (default: the one in the repository)")
    p.add_argument("--prompt")
    p.add_argument("--prompts", help="a text file, one prompt per line")
    p.add_argument("--image", help="start from this image")
    p.add_argument("--size", help="WxH px; with --image the area")
    p.add_argument("--frames", type=int, help="4k+1")
    p.add_argument("--steps", type=int)
    p.add_argument("--shift", type=float)
    p.add_argument("--guidance", help="G or LOW,HIGH")
    p.add_argument("--solver", choices=list(flow.SOLVERS))
    p.add_argument("--seed", type=int, default=0, help="-1: at random")
    p.add_argument("--negative", help='negative prompt (default: the checkpoint\'s; "" is an empty one)')
    p.add_argument("--lora", action="append", default=[], help="FILE[:weight][:high|low]; may be repeated")
    p.add_argument("--text_encoder", help="an updated text encoder's file")
    p.add_argument("--dtype", choices=list(DTYPES), help="default: bf16 on cuda, fp32 on cpu")
    p.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    g = p.add_argument_group("speed and memory")
    g.add_argument(
        "--base_dtype", choices=("fp8",), help="hold the linears of the DiT's blocks in 8 bits (default: --dtype)"
    )
    g.add_argument(
        "--stream_blocks",
        type=int,
        default=0,
        help="keep N of the DiT's blocks in host memory, on the device only while they run",
    )
    g.add_argument("--compile", action="store_true", help="torch.compile the DiT's blocks")
    g.add_argument(
        "--cuda_graphs", action="store_true", help="torch.compile the whole DiT and replay it as CUDA graphs"
    )
    g.add_argument(
        "--reuse",
        type=float,
        default=0.0,
        help="skip steps whose velocity is expected to change by less than this share, such as 0.05 (inexact; see diag.py reuse)",
    )
    g.add_argument(
        "--vae_tile",
        type=int,
        default=0,
        help="decode in windows of N latent pixels a side, for less memory; exact from about 13",
    )
    g = p.add_argument_group(
        "several GPUs, under torchrun (parallel/); ranks beyond those that share a clip take other prompts"
    )
    g.add_argument("--ulysses_size", type=int, default=1, help="ranks that share the tokens of a clip")
    g.add_argument("--guidance_parallel", action="store_true", help="the two halves of guidance on different ranks")
    p.add_argument(
        "--preview_every",
        type=int,
        default=0,
        help="every N steps write what the clip will be, roughly, to OUT's name with _preview.png",
    )
    p.add_argument("--out", default="out/sample.mp4")
    p.add_argument("--save_latents", help="also write the final latents to this .safetensors file")
    p.add_argument("--grid", help="also write a contact sheet of all results to this .png file")
    return p.parse_args(given)


def main():
    args = arguments()
    prompts = [args.prompt] if args.prompt is not None else []
    prompts += read_prompts(args.prompts) if args.prompts else []
    prompts = prompts or ["a red square moves left"]
    if not -1 <= args.seed < 2**63:
        raise BadInput(f"--seed {args.seed}: from 0 to 2^63-1, or -1 for one at random")
    device = pick_device(args.device)
    with World(device, ulysses_size=args.ulysses_size, cfg_parallel=args.guidance_parallel) as world:
        run(args, prompts, world)


def run(args, prompts, world):
    import plan  # which is built on this file

    device = world.device
    seed = args.seed if args.seed >= 0 else world.broadcast_from_rank0(lambda: random.randrange(2**31))
    if len(prompts) < world.dp_size:
        raise BadInput(
            f"{len(prompts)} prompts for {world.dp_size} groups of ranks: fewer processes, or --ulysses_size and --guidance_parallel, which share a prompt"
        )
    dtype = args.dtype or ("bf16" if device.startswith("cuda") else "fp32")
    if args.compile and args.cuda_graphs or args.cuda_graphs and not device.startswith("cuda"):
        raise BadInput("--cuda_graphs: needs --device cuda, and does what --compile does as well; give one of them")
    if args.stream_blocks < 0 or (args.stream_blocks or args.ulysses_size > 1) and (args.compile or args.cuda_graphs):
        raise BadInput(
            f"--stream_blocks {args.stream_blocks}, --ulysses_size {args.ulysses_size}: 0 or more, and not with --compile or --cuda_graphs"
        )
    if not 0 <= args.reuse < 1 or args.preview_every < 0 or args.vae_tile < 0:
        raise BadInput(
            f"--reuse {args.reuse} must be from 0 to below 1, --preview_every {args.preview_every} and --vae_tile {args.vae_tile} 0 or more"
        )
    models = load(
        args.ckpt, device, DTYPES[dtype], args.lora, args.text_encoder, args.base_dtype == "fp8", args.stream_blocks
    )
    args.base_dtype = "fp8" if models.fp8 else None
    models.world, models.machine, models.prepare = (
        world,
        world.host_share(),
        lambda name, model: parallelize(model, world),
    )
    models.agree = lambda yes: world.all_ranks(yes, "sp")
    models.compile = "blocks" if args.compile else "graphs" if args.cuda_graphs else None
    given = dict(
        size=None if args.size is None else parse_size(args.size),
        frames=args.frames,
        steps=args.steps,
        shift=args.shift,
        guidance=None if args.guidance is None else parse_guidance(args.guidance),
        solver=args.solver,
        negative=args.negative,
    )
    s = resolve(models, args.image, **given)
    for flag, kind in (("out", ".mp4"), ("save_latents", ".safetensors"), ("grid", ".png")):
        path = getattr(args, flag)
        if path is None:
            continue
        parent = next((d for d in Path(path).absolute().parents if d.exists()), Path("/"))
        if Path(path).is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
            raise BadInput(f"--{flag} {path}: a file is to be written there, and it is a folder or may not be written")
        if Path(path).suffix != kind:
            raise BadInput(f"--{flag} {path}: should end in {kind}")
    used = {
        k: s[k]
        for k in ("variant", "size", "pixels", "frames", "fps", "steps", "shift", "guidance", "solver", "negative")
    }
    used |= {
        "ckpt": str(args.ckpt),
        "seed": seed,
        "dtype": dtype,
        "image": args.image,
        "lora": args.lora,
        "text_encoder": args.text_encoder,
    }
    used |= {k: getattr(args, k) for k in ("base_dtype", "reuse", "vae_tile") if getattr(args, k)}  # what is not exact
    print(json.dumps(used, ensure_ascii=False), ops.chosen(device), sep="\n")
    need = plan.sampling(
        s, plan.builders(models), device, DTYPES[dtype], layout=plan.Layout.of(args, world.size), tile=args.vae_tile
    )
    print(need)

    out = Path(args.out)
    name = lambda path, i: path if len(prompts) == 1 else path.with_stem(f"{path.stem}_{i:03d}")
    mine = list(enumerate(prompts))[world.dp_rank :: world.dp_size]
    models.encode_prompts([*(p for _, p in mine), *([s["negative"]] if s["guided"] else [])])
    latents = []
    for i, prompt in mine:
        reuse = Reuse(args.reuse)
        path = name(out, i).with_name(f"{name(out, i).stem}_preview.png")
        watch = previewer(models, path, args.preview_every, prompt) if args.preview_every and world.is_writer else None
        latents.append(denoise(models, [prompt], [seed], args.image, **given, reuse=reuse, watch=watch))
        if args.reuse:
            print(f"{reuse.computed} of {s['steps']} steps computed")
        if args.save_latents and world.is_writer:
            save(name(Path(args.save_latents), i), {"latents": latents[-1][0]}, {"prompt": prompt})
    shown = []
    for (i, prompt), z in zip(mine, latents):
        video = decode(models, z, args.vae_tile)[0].cpu()
        if not world.is_writer:
            continue
        if args.vae_tile and not i and world.clip_group_size == 1:
            overlap, exact = models.part("vae").overlap(args.vae_tile)
            off = (
                "exact"
                if exact
                else f"blended; the first frame differs by at most {(decode(models, z[:, :, :1])[0].cpu() - video[:, :1]).abs().max():.3f} of 2"
            )
            print(f"tiles of {args.vae_tile} latent pixels overlap by {overlap} on each side: {off}")
        write_mp4(name(out, i), video, s["fps"], json.dumps({"prompt": prompt, **used}, ensure_ascii=False))
        print(name(out, i))
        shown.append(video[:, [0, video.shape[1] // 2, -1]])
    if args.grid and world.is_writer:
        sheet = Path(args.grid).with_stem(f"{Path(args.grid).stem}_{world.dp_rank}") if world.dp_size > 1 else args.grid
        write_grid(sheet, shown, [p for _, p in mine])
        print(sheet)
    for stream in models.streams.values():
        print(stream.report())
    print(need.compare(device))


if __name__ == "__main__":
    cli(main)
