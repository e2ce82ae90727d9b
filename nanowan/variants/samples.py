"""What training makes of a clip: what is cached of it, and what a step is given of that."""

import math

from nanowan.variants.image import image_channels


class Samples:
    """The samples of a model that is given text alone; the base of each variant's own. data.py asks only this.

    frames_over: a sample has a multiple of 4 frames and so many more. frames_after: that are read too, if the clip has
    them. loss_from: the first latent frame whose error counts. side_multiple: the sides of a sample are multiples of
    this, in px, at least. fixed_speed: clips must not be played faster or slower. trains_first_frame: --i2v_prob.
    lora_targets: the default of train_lora.py; extra_lora_targets: linears that a variant adds to lora.TARGETS.
    """

    frames_over, frames_after, loss_from, side_multiple = 1, 0, 0, 16
    fixed_speed = trains_first_frame = False
    lora_targets = ("cross_attn.k", "cross_attn.v")
    extra_lora_targets = ()

    def __init__(self, pipe):
        self.pipe = pipe

    def is_sidecar(self, path):
        """Whether a file in the folder belongs to a clip and is no sample of its own. Raises Skip where there is no
        such clip.
        """
        return False

    def sidecars(self, path, shown, cache):
        """{kind: (file, digest)} of what belongs to a clip; `shown`: what cache.cached_probe tells of it. Raises Skip
        where something is missing or does not fit.
        """
        return {}

    def changed(self, path, shown, sidecars, cache):
        """{kind: video.Shown's `changed`} of a clip, under "", and of what belongs to it."""
        return {"": shown.changed}

    def sidecar_sizes(self, item):
        """{kind: (width, height) px} at which `cached` is given the videos that belong to a scan.Item."""
        return {}

    def group(self, item):
        """Items of one group can be in one batch, whatever is drawn for them."""
        return item.bucket

    def cache_key(self, item):
        """What decides `cached`, as plain values, for the name of the cache file of a scan.Item."""
        return ""

    def cached(self, vae, video, item, sidecars):
        """{name: tensor} that is cached beside an item's latents; video (1,3,T,H,W) in [-1,1]; sidecars: {kind: frames
        (H,W,3) uint8} of what belongs to it, at the same times. May raise Skip.
        """
        return {}

    def cached_bytes(self, item, shape):
        """About what `cached` and the latents (C,T',h,w) take."""
        return 4 * math.prod(shape)

    def draw(self, item, share, rng):
        """What is drawn for an item of a step. share: of the samples trained as a segment that continues another."""

    def shape(self, item, drawn):
        """Samples of one shape can be in one batch."""
        return self.group(item)

    def entry(self, tensors, drawn, has_caption):
        """Of what is cached for a sample, what flow.make_noisy_batch is given. A sample without its caption is what the
        unconditional half of guidance sees.
        """
        return tensors

    def to_decode(self, latents, entry):
        """Latents (1,C,T',h,w) that were sampled under the conditions of an entry -> what the VAE decodes of them."""
        return latents


class FirstFrameSamples(Samples):
    """TI2V: trained with and without its first frame given."""

    trains_first_frame = True


class ImageChannelsSamples(Samples):
    """I2V-A14B: the channels of a clip's own first frame are cached."""

    channels = 20

    def cache_key(self, item):
        return "first frame"

    def cached(self, vae, video, item, sidecars):
        return {"y": image_channels(vae, video[:, :, :1], video.shape[2])[0]}

    def cached_bytes(self, item, shape):
        return 4 * (shape[0] + self.channels) * math.prod(shape[1:])
