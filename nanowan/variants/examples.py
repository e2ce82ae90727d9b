"""Stand-ins for the inputs of each variant's DiT. memory_estimate.py runs the DiT on them, as fake tensors."""

import torch


class Examples:
    """Stand-ins for T2V, TI2V and I2V, and the base class of the other variants' stand-ins. In the methods, `shape` is
    the shape (C,T',h,w) of one clip's latents.

    uncond_inputs: names of the `inputs` that differ between guidance's conditional and unconditional halves, so that
    memory holds two values of each.
    """

    uncond_inputs = ()

    def inputs(self, config, shape):
        """Return stand-ins for the `inputs` in the Conditions of one clip, for a model with this configuration."""
        return {}

    def entry(self, config, shape, continuation):
        """Return stand-ins for the tensors that Samples.entry returns, except the latents. continuation: the value of
        --continuation, which is None or 0 if a run trains no continuation segments.
        """
        channels = config.in_dim - shape[0]
        return {"y": torch.empty(channels, *shape[1:])} if channels else {}

    def encoded_frames(self, frames, continuation):
        """Return the number of frames of the longest video that the VAE encodes for a training sample of `frames`
        frames.
        """
        return frames

    def decoded_frames(self, latent_frames):
        """Return the number of latent frames that the VAE decodes in one call, for a segment of `latent_frames` latent
        frames.
        """
        return latent_frames
