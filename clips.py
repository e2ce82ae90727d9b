"""Sampling of long videos, clip by clip, each from what the one before left (S2V-14B, Animate-14B); resumable.

A conditions.Sequence knows what each clip is given and how clips join. Here they are sampled in order, and written as
they are done, so that a sample that was killed goes on where it was.
"""

import hashlib
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

import ops
import plan
from checkpoint import BadInput, load, save
from denoising import EasyCache, decode, denoise, encode_prompts, preview_colors, preview_writer
from media import to_uint8, write_frames
from models import Request


class Parts:
    """The clips of one video that are done, each in a file of a folder beside the video: OUT.clips/clip_000.safetensors
    holds its latents and its frames (n,H,W,3) uint8; after_000.safetensors, of the last one, the Sequence's state.
    """

    on_every_rank = False  # one rank keeps them, in files that all read

    def __init__(self, out, settings, resume):
        """settings: JSON of all that decides the video. Raises BadInput where the folder is another video's."""
        self.folder = Path(out).with_suffix(".clips")
        self.key = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=20).hexdigest()
        if not resume:
            self.remove()
        elif self.file(0).exists():
            metadata = load(self.file(0))[1]
            if metadata.get("key") != self.key:
                raise BadInput(
                    f"--resume: {self.folder} holds clips of a video with other settings; leave --resume out"
                )
            ops.RACED.update(json.loads(metadata.get("raced", "{}")))  # so that the clips to come have the same bits

    def file(self, r):
        return self.folder / f"clip_{r:03d}.safetensors"

    def done(self):
        """How many clips there are."""
        r = 0
        while self.file(r).exists():
            r += 1
        return r

    def state_file(self, r):
        return self.folder / f"after_{r:03d}.safetensors"

    def save(self, r, latents, frames, state):
        save(self.state_file(r), state)  # before the clip, which counts as done once it is there
        metadata = {"key": self.key, "raced": json.dumps(ops.RACED)}
        save(self.file(r), {"latents": latents, "frames": torch.from_numpy(to_uint8(frames))}, metadata)
        if r:
            self.state_file(r - 1).unlink(missing_ok=True)

    def state(self, r):
        return load(self.state_file(r))[0]

    def latents(self, r):
        return load(self.file(r))[0]["latents"]

    def frames(self):
        """Yield the frames (n,H,W,3) uint8 of each clip."""
        for r in range(self.done()):
            yield load(self.file(r))[0]["frames"].numpy()

    def remove(self):
        shutil.rmtree(self.folder, ignore_errors=True)


class PartsInMemory:
    """The clips of one video that are done, as `generate` returns them: latents (C,T',h,w) and frames (3,n,H,W)."""

    on_every_rank = True

    def __init__(self):
        self.latents, self.frames = [], []

    def done(self):
        return len(self.latents)

    def save(self, r, latents, frames, state):
        self.latents.append(latents)
        self.frames.append(frames)


def generate(models, s, prompt, image, seed, progress, inputs):
    """sample.generate of a variant that goes clip by clip. s: the Settings in force; inputs: those that only some
    variants take, as sample.py's flags name them.
    """
    if strange := sorted(inputs.keys() - {*s.conditioning.flags}):
        raise BadInput(f"{strange[0]} {inputs[strange[0]]}: {models.dir} takes no such input")
    sequence, parts = s.conditioning.sequence(models, s, seed=seed, image=image, **inputs), PartsInMemory()
    sample_clips(models, s, prompt, sequence, parts, progress)
    return torch.cat(parts.frames, 1), parts.latents


@torch.no_grad()
def sample_clips(models, s, prompt, sequence, parts, progress=True, reuse=0.0, callback_on_step_end=None):
    """Make the clips of a Sequence that are not done yet; `parts` keeps them: all ranks' in memory, one's in files. s:
    the Settings in force; reuse: an EasyCache's threshold; callback_on_step_end as in denoise.
    """
    embeds, negative = encode_prompts(models, s, [prompt])
    first = parts.done()
    if first:
        sequence.restore(parts.state(first - 1))
    clips = tqdm(range(first, sequence.count), initial=first, total=sequence.count, unit="clip", disable=not progress)
    for r in clips:
        conditions = sequence.conditions(r)
        x = sequence.noise(r)[None]
        z = denoise(models, s, x, embeds, negative, conditions, False, EasyCache(reuse), callback_on_step_end)
        conditions = None  # the DiT's inputs go before the VAE comes
        frames = sequence.decode(r, z, lambda latents: decode(models, latents))
        if models.world.is_writer or parts.on_every_rank:
            parts.save(r, sequence.output(z[0]), frames, sequence.state())
        z = frames = None  # they go before the next clip's come
        models.world.barrier()


def check_disk(out, sequence, done=0):
    """Raise BadInput where the disk that `out` is to lie on has no room for the clips of a Sequence that are not done,
    which all wait there for the last one, and for the video.
    """
    (_, frames, _, _), (width, height) = sequence.shape, sequence.size
    pixels = 3 * 4 * frames * width * height  # of a clip, one byte each
    waiting, mp4 = pixels + 4 * math.prod(sequence.shape), pixels // 20  # the latter at most, about
    states = 2 * sum(t.nbytes for t in sequence.state().values() if t is not None)
    need = (sequence.count - done) * waiting + sequence.count * mp4 + states
    parent = next(d for d in Path(out).absolute().parents if d.exists())
    if need > (free := shutil.disk_usage(parent).free):
        raise BadInput(
            f"--out {out}: {sequence.count} clips of {width}x{height} need {need / 1e9:.3g} GB until they are one "
            f"video, and {parent} has {free / 1e9:.3g} GB free; make it shorter or smaller (--size)"
        )


def write_video(out, parts, sequence, comment, save_latents=None):
    """The mp4 of all clips, with the Sequence's sound; save_latents: a file for their latents_0, latents_1, ..."""
    write_frames(out, parts.frames(), sequence.fps, comment, sound=sequence.sound, sound_offset=sequence.sound_offset)
    if save_latents:
        save(save_latents, {f"latents_{r}": parts.latents(r) for r in range(sequence.count)}, {"settings": comment})
    parts.remove()


def run(args, prompts, models, s, seed, inputs):
    """What sample.py does for a variant that goes clip by clip. args: its flags; s: the Settings in force; inputs:
    those flags that only some variants take.
    """
    if len(prompts) > 1:
        raise BadInput(f"{len(prompts)} prompts: {args.ckpt} makes one video at a time; start it once for each")
    world = models.world
    if world.dp_size > 1:
        raise BadInput(
            f"{world.size} processes for one video: give --ulysses_size, --guidance_parallel or both, so that they "
            "share it"
        )
    sequence = s.conditioning.sequence(models, s, seed=seed, image=args.image, **inputs)
    used = {k: getattr(s, k) for k in ("variant", "frames", "steps", "shift", "guidance", "solver", "negative")}
    used |= {"prompt": prompts[0], "size": sequence.size, "fps": sequence.fps, "seed": seed, "ckpt": str(args.ckpt)}
    used |= {k: getattr(args, k) for k in ("image", "lora", "text_encoder", "reuse")} | inputs
    used |= {"dtype": str(models.runtime.dtype).removeprefix("torch."), "base_dtype": "fp8" if models.fp8 else None}
    print(json.dumps(used, ensure_ascii=False), ops.chosen(models.device), f"{sequence.count} clips", sep="\n")
    shape = Request(replace(s, frames=inputs.get("infer_frames", s.frames)), None, sequence.size)
    layout, mode = plan.ParallelLayout.of(args, world.size, models.fp8), "none"
    if s.guided:
        mode = models.guidance_mode(math.prod(sequence.shape[1:]) // 4)
    need = plan.sampling(shape, plan.builders(models), models.device, models.runtime.dtype, mode, layout=layout)
    print(need)
    if world.is_main:
        parts = Parts(args.out, used, args.resume)
    world.barrier()  # until the first rank has cleared the folder
    if not world.is_main:
        parts = Parts(args.out, used, resume=True)
    check_disk(args.out, sequence, parts.done())
    callback = None
    if args.preview_every and world.is_writer:
        preview = Path(args.out).with_name(f"{Path(args.out).stem}_preview.png")
        callback = preview_writer(preview_colors(models), preview, args.preview_every, prompts[0])
    encode_prompts(models, s, prompts)  # which `models` keeps, so that the encoder can go
    models.drop("text")
    sample_clips(models, s, prompts[0], sequence, parts, reuse=args.reuse, callback_on_step_end=callback)
    if world.is_writer:
        write_video(args.out, parts, sequence, json.dumps(used, ensure_ascii=False), args.save_latents)
        print(args.out)
    print(need.compare(models.device))
