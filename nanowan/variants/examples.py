"""Stand-ins for the inputs of each variant's DiT. memory_estimate.py runs the DiT on them, as fake tensors."""

import torch


class Examples:
    """Stand-ins for T2V, TI2V and I2V. The other variants' classes of stand-ins are derived from this class. `shape` is
    always the shape of one clip's latents, (C,T',h,w).

    uncond_inputs: names of the `inputs` that have different values in the two halves of guidance, so that memory
    holds two values of each.
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
        """Return the number of frames that are encoded at once for a training sample of `frames` frames."""
        return frames

    def decoded_frames(self, latent_frames):
        """Return the number of latent frames that are decoded at once for a segment of `latent_frames`
        latent frames.
        """
        return latent_frames
