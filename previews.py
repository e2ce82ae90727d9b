"""Previews of a training run: fixed prompts sampled with the weights as they are, always from the same seeds."""

from pathlib import Path

import torch

from denoising import decode
from media import write_grid, write_mp4
from sample import read_prompts, sample_latents


class Previews:
    """Clips of fixed prompts from fixed seeds: OUT/previews/step_NNNNNN.png, and an mp4 of each."""

    def __init__(self, args, models):
        self.prompts = read_prompts(args.previews, "--previews") if args.previews else []
        self.models, self.out, self.seed = models, Path(args.out) / "previews", args.seed

    @torch.no_grad()
    def embed(self, encoder):
        """Embed the prompts with this encoder; all clips from now on are made from that."""
        texts = [*self.prompts, self.models.settings.negative]
        self.models.prompt_embeds = {p: encoder.encode([p])[0][0] for p in texts}

    def write(self, step, encoder=None):
        """Sample with the models as they are now, and with this encoder, if it is being trained."""
        clips, models = [], self.models
        if encoder:
            self.embed(encoder)
        for model in models.loaded():
            model.eval()
        for i, prompt in enumerate(self.prompts):
            z = sample_latents(models, [prompt], [self.seed + i], progress=False)
            if models.world.is_main:
                clips.append(decode(models, z)[0].cpu())
                write_mp4(self.out / f"step_{step:06d}_{i:02d}.mp4", clips[-1], models.settings.fps, prompt)
        if clips:
            models.evict("vae")
            write_grid(self.out / f"step_{step:06d}.png", clips, self.prompts)
            print(f"previews: {self.out / f'step_{step:06d}.png'}", flush=True)
