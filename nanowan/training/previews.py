"""Previews of a training run: fixed prompts sampled with the weights as they are, always from the same seeds."""

from pathlib import Path

import torch

from nanowan.pipeline import pad_embeddings
from nanowan.video import write_grid, write_mp4


class Previews:
    """Clips of fixed prompts from fixed seeds: OUT/previews/step_NNNNNN.png, and an mp4 of each.

    sample_latents, decode: sample.py's.
    """

    def __init__(self, pipe, prompts, out, seed, sample_latents, decode):
        self.pipe, self.prompts, self.out, self.seed = pipe, prompts, Path(out) / "previews", seed
        self.sample_latents, self.decode, self.texts = sample_latents, decode, []

    @torch.no_grad()
    def embed(self, encoder):
        """Embed the prompts, and the negative prompt, with this encoder; all clips from now on are made from that."""
        s, self.texts = self.pipe.settings, []
        negative = [encoder.encode([s.negative])[0][0]] if s.guided else []
        for prompt in self.prompts:
            context, lens = pad_embeddings([encoder.encode([prompt])[0][0], *negative])
            self.texts.append(((context[:1], lens[:1]), (context[1:], lens[1:]) if negative else None))

    def write(self, step):
        """Sample with the models as they are now."""
        clips, pipe = [], self.pipe
        for model in pipe.loaded():
            model.eval()
        for i, (prompt, text) in enumerate(zip(self.prompts, self.texts)):
            latents = self.sample_latents(pipe, text, [self.seed + i], progress=False)
            if pipe.world.is_main:
                clips.append(self.decode(pipe, latents)[0].cpu())
                write_mp4(self.out / f"step_{step:06d}_{i:02d}.mp4", clips[-1], pipe.settings.fps, prompt)
        if clips:
            pipe.evict("vae")
            write_grid(self.out / f"step_{step:06d}.png", clips, self.prompts)
            print(f"previews: {self.out / f'step_{step:06d}.png'}", flush=True)
