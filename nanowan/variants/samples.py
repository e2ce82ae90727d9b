"""Training samples: the tensors that are cached for a clip, and the ones that a training step gets from the cache."""

import math

from nanowan.variants.image import image_channels


class Samples:
    """The samples of a text-to-video model, and the base class of every variant's samples. data.py uses only this
    interface.

    frames_over: a sample has a multiple of 4 frames plus this many. frames_after: frames after the sample that are read
    as well, if the clip has them. loss_from: the first latent frame that counts in the loss. side_multiple: the sides
    of a sample, in px, are multiples of at least this. fixed_speed: clips must not be played faster or slower.
    trains_first_frame: whether --i2v_prob applies. lora_targets: train_lora.py's default for --targets.
    extra_lora_targets: linear layers that a variant adds to lora.TARGETS.
    """

    frames_over, frames_after, loss_from, side_multiple = 1, 0, 0, 16
    fixed_speed = trains_first_frame = False
    lora_targets = ("cross_attn.k", "cross_attn.v")
    extra_lora_targets = ()

    def __init__(self, pipe):
        self.pipe = pipe

    def is_sidecar(self, path):
        """Whether a file in the folder belongs to a clip instead of being a sample. Raises Skip if that clip does not
        exist.
        """
        return False

    def sidecars(self, path, shown, cache):
        """Return {kind: (file, digest)} for the sidecar files of a clip. shown: what cache.cached_probe returned for
        the clip. Raises Skip if a sidecar is missing or does not fit the clip.
        """
        return {}

    def changed(self, path, shown, sidecars, cache):
        """Return {kind: `changed` of its video.Shown} for a clip, whose kind is "", and for its sidecars."""
        return {"": shown.changed}

    def sidecar_sizes(self, item):
        """Return {kind: (width, height) px}: the sizes at which `cached` gets the sidecar videos of a scan.Item."""
        return {}

    def group(self, item):
        """Return a key. Items with equal keys can share a batch, whatever is drawn for them."""
        return item.bucket

    def cache_key(self, item):
        """Return, as plain values, everything that the result of `cached` depends on. It becomes part of the name of a
        scan.Item's cache file.
        """
        return ""

    def cached(self, vae, video, item, sidecars):
        """Return {name: tensor}: what is cached in addition to an item's latents. video: (1,3,T,H,W) in [-1,1].
        sidecars: {kind: frames (H,W,3) uint8 at the same times}. May raise Skip.
        """
        return {}

    def cached_bytes(self, item, shape):
        """Estimate the bytes that the tensors of `cached` and the latents take. shape: (C,T',h,w) of the latents."""
        return 4 * math.prod(shape)

    def draw(self, item, share, rng):
        """Draw how an item is used in a step. share: the probability that it continues a previous segment."""

    def shape(self, item, drawn):
        """Return a key. Samples with equal keys can share a batch."""
        return self.group(item)

    def entry(self, tensors, drawn, has_caption):
        """Select from a sample's cached tensors those that flow.make_noisy_batch gets. Without its caption, a sample
        gets the inputs of guidance's unconditional half.
        """
        return tensors

    def to_decode(self, latents, entry):
        """Return the latents that the VAE decodes, given those (1,C,T',h,w) sampled with the inputs of an entry."""
        return latents


class FirstFrameSamples(Samples):
    """TI2V's samples: trained both with and without a given first frame."""

    trains_first_frame = True


class ImageChannelsSamples(Samples):
    """I2V-A14B's samples: the condition channels of a clip's own first frame are cached with it."""

    channels = 20

    def cache_key(self, item):
        return "first frame"

    def cached(self, vae, video, item, sidecars):
        return {"y": image_channels(vae, video[:, :, :1], video.shape[2])[0]}

    def cached_bytes(self, item, shape):
        return 4 * (shape[0] + self.channels) * math.prod(shape[1:])
