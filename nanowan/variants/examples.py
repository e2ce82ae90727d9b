"""Tensors like those that a variant's DiT is given, for memory_estimate.py, which runs it on fake ones."""

import torch


class Examples:
    """Of text-to-video, TI2V and I2V; the base of each variant's own. Shapes are of one clip, latents (C,T',h,w).

    uncond_inputs: names of those of `inputs` that take memory and differ in guidance's unconditional half.
    """

    uncond_inputs = ()

    def inputs(self, config, shape):
        """Like Conditions.inputs of one clip, for a model of this configuration."""
        return {}

    def entry(self, config, shape, continuation):
        """Like what Samples.entry returns, but for the latents; continuation: the flag, which is None or 0 if a run
        trains no continuation segments.
        """
        channels = config.in_dim - shape[0]
        return {"y": torch.empty(channels, *shape[1:])} if channels else {}

    def encoded_frames(self, frames, continuation):
        """How many frames are encoded at once for a training sample of `frames`."""
        return frames

    def decoded_frames(self, latent_frames):
        """How many latent frames are decoded at once for a segment of so many."""
        return latent_frames
