"""The anchor of train_te.py: a penalty on moving the embeddings of prompts that contain no keyword."""

import random

import torch

from data import collate


class Anchor:
    """A penalty on moving the embeddings of `prompts` away from those that the encoder gives when this object is
    created. The penalty times `weight` is added to the loss. Which prompts a step draws depends on `seed` and the step.
    """

    @torch.no_grad()
    def __init__(self, encoder, prompts, weight, seed):
        self.encoder, self.prompts, self.weight, self.seed = encoder, prompts, weight, seed
        self.before = {p: encoder.encode([p])[0][0].cpu() for p in prompts}

    def back_propagate(self, step, count, batch, world):
        """Back-propagate the weighted penalty of one step. The penalty is the squared distance by which the embeddings
        of `count` drawn prompts have moved, divided by the squared norm of the original embeddings. Each rank encodes
        `batch` prompts at a time. Returns this rank's share of the penalty, before multiplication by the weight.
        """
        prompts = random.Random(f"{self.seed} anchors {step}").choices(self.prompts, k=count)
        size = sum(self.before[p].float().square().sum() for p in prompts) * (world.size // world.dp_size)
        at_once, total = batch * world.dp_size, 0.0
        for i in range(0, len(prompts), at_once):
            local, fraction = world.local_indices(len(prompts[i : i + at_once]))
            mine = [prompts[i + j] for j in local]
            now, _ = self.encoder.encode(mine)
            before = collate([self.before[p] for p in mine])[0].to(now)
            moved = (now.float() - before.float()).square().sum() / size.to(now) * (fraction > 0)
            (self.weight * moved).backward()
            total += moved.item()
        return total
