"""Training samples: which tensors are cached for a clip, and which of the cached tensors a training step gets."""

import math

from nanowan.variants.image import image_channels


class Samples:
    """The samples of a text-to-video model, and the base class of every variant's samples. The training code handles
    all variants alike, through the attributes and methods of this class.

    frames_over: the number of frames in a sample is a multiple of 4, plus this number. frames_after: number of frames
    after the sample that are read as well, if the clip has them. loss_from: the first latent frame that counts in the
    loss. side_multiple: the sides of a sample are multiples of this many px, or of 2 latent pixels if these are
    larger. fixed_speed: whether clips must be read at their original speed. trains_first_frame: whether --i2v_prob
    applies. lora_targets: train_lora.py's default for --targets. extra_lora_targets: linear layers that a variant adds
    to lora.TARGETS.
    """

    frames_over, frames_after, loss_from, side_multiple = 1, 0, 0, 16
    fixed_speed = trains_first_frame = False
    lora_targets = ("cross_attn.k", "cross_attn.v")
    extra_lora_targets = ()

    def __init__(self, pipe):
        self.pipe = pipe

    def is_sidecar(self, path):
        """Return whether a file in the data folder is a sidecar, which belongs to a clip and is no sample itself.
        Raises Skip for a sidecar that is not used, for example because its clip does not exist.
        """
        return False

    def sidecars(self, path, shown, cache):
        """Return {kind: (file, digest)} for the sidecar files of a clip. shown: the result of cache.cached_probe for
        the clip. Raises Skip if a sidecar is missing or does not fit the clip.
        """
        return {}

    def changed(self, path, shown, sidecars, cache):
        """Return {kind: notes} for a clip (kind "") and each of its sidecars. The notes are the field `changed` of
        video.Shown: they name properties of the file that earlier versions of nanoWan ignored.
        """
        return {"": shown.changed}

    def sidecar_sizes(self, item):
        """Return {kind: (width, height) px}, the sizes to which the sidecar videos of `item`, a scan.Item, are resized
        before `cached` gets them.
        """
        return {}

    def group(self, item):
        """Return the key of an item's group. Each step is filled with items of one group. The items that then remain in
        each group, too few for a step, share steps with those of other groups.
        """
        return item.bucket

    def cache_key(self, item):
        """Return, as plain values, everything that the result of `cached` for `item` depends on. These values become
        part of the name of the item's cache file.
        """
        return ""

    def cached(self, vae, video, item, sidecars):
        """Return {name: tensor} of what is cached in addition to the latents of `item`. video: (1,3,T,H,W) in [-1,1].
        sidecars: {kind: frames (H,W,3) uint8, shown at the same times as those of the video}. May raise Skip.
        """
        return {}

    def cached_bytes(self, item, shape):
        """Return an estimate of the bytes that `item` takes in the cache: its latents, and the tensors that `cached`
        returns. shape: (C,T',h,w) of the latents.
        """
        return 4 * math.prod(shape)

    def draw(self, item, share, rng):
        """Choose at random how a step uses an item, for example as a continuation segment, and return this choice.
        share: the probability that the item continues a previous segment.
        """

    def shape(self, item, drawn):
        """Return the key by which the samples of a step are batched, given an item and what `draw` returned for it.
        Samples with equal keys can share a batch.
        """
        return self.group(item)

    def entry(self, tensors, drawn, has_caption):
        """Return {name: tensor}, the cached tensors of a sample that flow.make_noisy_batch needs. drawn: as returned by
        `draw`. A sample that is trained without its caption gets the inputs of guidance's unconditional half.
        """
        return tensors

    def to_decode(self, latents, entry):
        """Return the latents that the VAE decodes, given the latents (1,C,T',h,w) that were sampled with the inputs of
        `entry`. Subclasses remove or add the latent frame of the reference picture.
        """
        return latents


class FirstFrameSamples(Samples):
    """TI2V's samples, which are trained both with and without a given first frame."""

    trains_first_frame = True


class ImageChannelsSamples(Samples):
    """I2V-A14B's samples. The condition channels made from a clip's own first frame are cached with the clip."""

    channels = 20

    def cache_key(self, item):
        return "first frame"

    def cached(self, vae, video, item, sidecars):
        return {"y": image_channels(vae, video[:, :, :1], video.shape[2])[0]}

    def cached_bytes(self, item, shape):
        return 4 * (shape[0] + self.channels) * math.prod(shape[1:])
