"""Compute outputs of S2V, and gradients of the audio injectors alone, on several ranks or on one: `s2v_ranks.py OUT`.

The clip has 176 tokens with the previous clip's frames, and 128 without. Three ranks cannot share them evenly, so
slices begin within a latent frame. Of the 176 tokens, the last rank has no noise tokens.
"""

import os
import sys
from pathlib import Path

import torch

from benchmarks import tiny_s2v
from nanowan.formats.header import save
from nanowan.parallel import World, parallelize


def main(out):
    with World("cpu", ulysses_size=int(os.environ.get("WORLD_SIZE", 1))) as world:
        model, found = tiny_s2v.dit(), {}
        parallelize(model, world)
        trained = list(model.audio_injector.injector.parameters())
        for p in trained:
            p.requires_grad_(True)
        for name, given in (("clip", tiny_s2v.inputs(B=2)), ("first", tiny_s2v.inputs(B=2))):
            if name == "first":
                del given["motion"]
            y = model(**given)
            (y * torch.sin(torch.arange(y.numel()).view(y.shape))).sum().backward()
            found[name] = y.detach()
        world.all_reduce_grads(trained)
        found |= {f"grad_{i}": p.grad for i, p in enumerate(trained)}
        if world.is_main:
            save(out, found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
