"""Previews of a training run: fixed prompts from fixed seeds, sampled with the current weights.

Inputs other than the prompt come from the prompt's line in the --previews file, from options such as --i FILE. For
models that make videos in segments (S2V, Animate), they come from a held-out sample.
"""

import math
import random
from pathlib import Path

import torch

from flow import make_noisy_batch
from nanowan.errors import BadInput
from nanowan.formats.header import load
from nanowan.sampling import Request
from nanowan.settings import parse_size
from nanowan.variants.conditioning import Conditions, draw_noise
from nanowan.video import write_grid, write_mp4


def preview_settings(args, s):
    """Return the Settings for previews, from a trainer's resolved flags. Size and frames default to training's."""
    size = parse_size(args.preview_size or args.resolution, "--preview_size")
    return s.with_overrides(size=size, frames=args.preview_frames or args.frames, steps=args.preview_steps)


def preview_requests(args, s, prompts):
    """Return a Request for each Prompt in `prompts`. A prompt's own settings and seed take precedence over the flags.
    Raises BadInput for a prompt with inputs other than text if the model makes videos in segments.
    """
    settings, out = preview_settings(args, s) if prompts else s, Path(args.out) / "previews"
    if s.conditioning.by_segments and (with_inputs := next((p for p in prompts if p.inputs), None)):
        raise BadInput(
            f"--previews: --{next(iter(with_inputs.inputs))} is not taken; previews of {s.variant} are of held-out data"
        )
    return [
        Request(p.text, args.seed if p.seed is None else p.seed, settings.with_overrides(**p.settings), p.inputs, out)
        for p in prompts
    ]


class HeldOutVideo:
    """A Video (nanowan/variants/conditioning.py) of one segment, with the conditioning inputs of a cached sample. This
    is held-out sample i or, if none is held out, training sample i, where i is taken modulo the number of samples.
    """

    def __init__(self, dataset, i):
        items, files = (dataset.val_items, dataset.val_files) if dataset.val_items else (dataset.items, dataset.files)
        self.samples, self.device, self.fps = dataset.samples, dataset.pipe.device, items[i % len(items)].fps
        self.tensors = load(files[i % len(items)])[0]
        self.drawn = self.samples.draw(items[i % len(items)], 0.0, random.Random(0))
        self.shape = self._entry()["latents"].shape

    def _entry(self, has_caption=True):
        return self.samples.entry(self.tensors, self.drawn, has_caption)

    def noise(self, r, seed):
        return draw_noise(self.shape, seed, self.device)

    def conditions(self, r):
        cond, uncond = self._entry(), self._entry(has_caption=False)
        nothing = torch.zeros(1, *self.shape)
        inputs, uncond_inputs = (
            {k: v.to(self.device) for k, v in make_noisy_batch([e], [""], torch.ones(1), nothing).inputs.items()}
            for e in (cond, uncond)
        )
        uncond_inputs = {k: v for k, v in uncond_inputs.items() if k not in inputs or not torch.equal(v, inputs[k])}
        channels = cond["y"][None].to(self.device) if "y" in cond else None
        return Conditions(channels=channels, inputs=inputs, uncond_inputs=uncond_inputs)

    def decode(self, r, latents, decode):
        return decode(self.samples.to_decode(latents, self._entry()))[0]


class Previews:
    """The previews of a run: a clip for each Request. OUT/previews/step_NNNNNN.png shows all clips of a step, and each
    clip is also written as an mp4.

    sampler: the module sample.py.
    """

    def __init__(self, pipe, requests, sampler):
        self.pipe, self.requests, self.sampler, self.texts, self.videos = pipe, requests, sampler, [], []

    def shape(self):
        """Return the shape (C,T',h,w) of the largest preview's latents, from the size and frames of each Request; ()
        without previews. A preview made from a held-out sample has that sample's shape instead, which may be larger.
        """
        shapes = [r.settings.latent_shape(r.settings.size, r.settings.frames) for r in self.requests]
        return max(shapes, key=math.prod, default=())

    @torch.no_grad()
    def open(self, dataset):
        """Encode the inputs other than prompts and keep the results for the whole run. Call this once the dataset's
        latents are cached.
        """
        for i, r in enumerate(self.requests):
            if r.settings.conditioning.by_segments:
                video = HeldOutVideo(dataset, i)
            else:
                video = self.sampler.open_video(self.pipe, r.settings, **r.inputs)
            self.videos.append((video, video.conditions(0)))

    @torch.no_grad()
    def embed(self, encoder):
        """Embed the prompts and negative prompts with this encoder. All later previews use these embeddings."""
        self.texts = [self.sampler.encode_text(self.pipe, r.settings, [r.prompt], encoder) for r in self.requests]

    def write(self, step):
        """Sample the previews with the current weights and write them. Return the contact sheet's file on the main
        rank, None on the other ranks.
        """
        clips, pipe = [], self.pipe
        for model in pipe.loaded():
            model.eval()
        for i, (r, text, (video, conditions)) in enumerate(zip(self.requests, self.texts, self.videos)):
            latents = self.sampler.sample_clip(
                pipe, r.settings, text, video.noise(0, r.seed)[None], conditions, progress=False
            )
            if pipe.world.is_main:
                clips.append(video.decode(0, latents, lambda z: self.sampler.decode(pipe, z)).cpu())
                write_mp4(r.out / f"step_{step:06d}_{i:02d}.mp4", clips[-1], video.fps, r.prompt)
        if not clips:
            return None
        pipe.evict("vae")
        sheet = self.requests[0].out / f"step_{step:06d}.png"
        write_grid(sheet, clips, [r.prompt for r in self.requests])
        print(f"previews: {sheet}", flush=True)
        return sheet
