"""Stand-ins for the inputs of each variant's DiT, for memory_estimate.py, which runs the DiT on fake tensors."""

import torch


class Examples:
    """Examples for text-to-video, TI2V and I2V, and the base class of the other variants' examples. Every `shape` is
    that of one clip's latents, (C,T',h,w).

    uncond_inputs: names of the `inputs` that take memory and differ in guidance's unconditional half.
    """

    uncond_inputs = ()

    def inputs(self, config, shape):
        """Return tensors like Conditions.inputs of one clip, for a model of this configuration."""
        return {}

    def entry(self, config, shape, continuation):
        """Return tensors like those of Samples.entry, without the latents. continuation: the value of --continuation,
        which is None or 0 if a run trains no continuation segments.
        """
        channels = config.in_dim - shape[0]
        return {"y": torch.empty(channels, *shape[1:])} if channels else {}

    def encoded_frames(self, frames, continuation):
        """Return how many frames are encoded at once for a training sample of `frames` frames."""
        return frames

    def decoded_frames(self, latent_frames):
        """Return how many latent frames are decoded at once for a segment of `latent_frames`."""
        return latent_frames
