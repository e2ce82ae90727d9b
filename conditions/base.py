"""What the kinds of conditioning have in common: one clip's Conditions, a video of many clips, a folder's samples."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from checkpoint import BadInput
from formats import read_headers


class Conditions(NamedTuple):
    """What a DiT is given at every step of a clip.

    first_frame (1,C,1,h,w): a latent frame that is known: it stays as it is, at t = 0. channels (1,c,T',h,w): stand
    behind the noise. inputs: keyword arguments of the model's forward; uncond_inputs: those of guidance's second half,
    where they differ.
    """

    first_frame: torch.Tensor | None = None
    channels: torch.Tensor | None = None
    inputs: dict = {}
    uncond_inputs: dict | None = None

    def put_known(self, x):
        """Latents (B,C,T',h,w) with the known frame in its place (x itself is changed)."""
        if self.first_frame is not None:
            x[:, :, :1] = self.first_frame
        return x

    def model_inputs(self, x, t):
        """Latents (B,C,T',h,w) at time t in 0..1000 -> what the DiT takes: x (B,C+c,T',h,w), t (B,) or (B,T')."""
        times = torch.full((len(x),), float(t), device=x.device)
        if self.first_frame is not None:
            times = times[:, None].repeat(1, x.shape[2])
            times[:, 0] = 0
        if self.channels is not None:
            x = torch.cat([x, self.channels.expand(len(x), -1, -1, -1, -1)], 1)
        return x, times


class Encoder(NamedTuple):
    """A further part of a checkpoint: the folder in it, what its files are named, and load(folder, device). prefix: of
    its tensors' names, where it is a part of the DiT.
    """

    folder: str
    pattern: str
    load: Callable
    prefix: str = ""

    def files(self, ckpt_dir):
        return sorted((ckpt_dir / self.folder).glob(self.pattern))

    def bytes(self, ckpt_dir):
        if self.prefix:
            entries = read_headers(self.files(ckpt_dir))
            return sum(4 * e.numel for n, e in entries.items() if n.startswith(self.prefix))
        return sum(f.stat().st_size for f in self.files(ckpt_dir))


class Sequence:
    """A video that is made clip by clip, each from what the one before left: what clips.py asks of a variant's inputs.
    What is not defined here is each variant's own.

    count: number of clips. size: (width, height) px. fps: of the video. sound: a file whose sound goes into the mp4, or
    None; sound_offset: seconds at which it begins there.
    """

    count = 1
    sound = None
    sound_offset = 0.0

    def noise(self, r):
        """(C,T',h,w) fp32 from which clip r begins."""
        raise NotImplementedError

    def conditions(self, r):
        """The Conditions of clip r; encodes what is needed for it."""
        raise NotImplementedError

    def decode(self, r, latents, decode):
        """Latents (1,C,T',h,w) of clip r -> its new frames (3,n,H,W) in [-1,1]; keeps what clip r+1 needs of them.
        decode: from latents to video (1,3,T,H,W).
        """
        raise NotImplementedError

    def output(self, latents):
        """What --save_latents writes of a clip's latents (C,T',h,w)."""
        return latents

    def state(self):
        """{name: tensor}: what clip r+1 needs of the clips before it."""
        return {}

    def restore(self, state):
        """Take over what `state` returned."""


class Samples:
    """What training makes of a folder's clips: which files belong to one, what is cached of it, and what a step sees of
    that. Here is what suits a model that is given nothing of a clip; data.py and train.py ask only this.
    """

    frames_over = 1  # a sample has a multiple of 4 frames and so many more
    frames_after = 0  # that are read too, where a clip has them
    loss_from = 0  # the first latent frame whose error counts

    def is_companion(self, path):
        """Whether a file in the folder belongs to a clip and is no sample of its own."""
        return False

    def companions(self, path, shown, cache):
        """{kind: (file, digest)} of what belongs to a clip, `shown` being what data.cached_probe tells of it. Raises
        Skip where something is missing or does not fit.
        """
        return {}

    def group(self, item):
        """Samples of one group can be in one batch."""
        return item.bucket

    def cache_key(self, item):
        """What decides `cached`, as plain values, for the name of the cache file of a data.Item."""
        return ""

    def cached(self, vae, video, item):
        """{name: tensor} that training caches beside an item's latents; video (1,3,T,H,W) in [-1,1]. May raise Skip."""
        return {}

    def cached_bytes(self, item, shape):
        """About what `cached` and the latents (C,T',h,w) take."""
        return 4 * math.prod(shape)

    def draw(self, items, share, rng):
        """What is drawn for each item of a batch, all of one group. share: of those trained as a clip that goes on from
        another.
        """
        return [None] * len(items)

    def entry(self, tensors, drawn, has_caption):
        """Of what is cached for a sample, what flow.make_noisy_batch is given. A sample without its caption is what
        guidance's second half sees.
        """
        return tensors


class TextOnly(Samples):
    """Text-to-video: nothing but the prompt."""

    channels = 0  # of the conditioning, behind the noise
    decodes_more = 0  # latent frames that are decoded beside those that are sampled
    title, flags = "", {}  # of sample.py's flags for this kind of input: {name: argparse's arguments}
    by_clips = False  # whether `sequence` makes a video of any length of it
    encoders = {}  # further parts of the checkpoint, {name: Encoder}
    takes_image = False  # with a prompt
    needs_image = False
    trains_first_frame = False  # --i2v_prob
    lora_targets = ("cross_attn.k", "cross_attn.v")  # where train_lora.py is not told
    fixed_speed = False  # samples must not be taken faster or slower than their clip
    size_multiple = 16  # of which the sides of a training sample are multiples, in px, at least

    def check(self, ckpt_dir, image):
        """Raise BadInput where an image is missing, or there is one that the model does not take."""
        if image is None and self.needs_image:
            raise BadInput(f"{ckpt_dir}: an image-to-video model, --image is needed")
        if image is not None and not self.takes_image:
            raise BadInput(f"--image {image}: {ckpt_dir} is a text-to-video model and takes none")

    def video_size(self, size, image):
        """(width, height) px of the video: `size`, or with a PIL image its area in the image's aspect."""
        return size

    def sequence(self, models, s, **inputs):
        """The Sequence of a variant that is sampled clip by clip, from sample.py's `flags`; None for one clip."""

    def latent_frames(self, frames):
        """T' of the noise for a clip of so many frames."""
        return 1 + (frames - 1) // 4

    def plan_inputs(self, config, shape):
        """Tensors like Conditions.inputs of one clip, for a model of this configuration and latents (C,T',h,w)."""
        return {}

    def samples(self, models):
        """The Samples of a training run."""
        return self

    def plan_entry(self, config, shape, continuation):
        """Tensors like those of Samples.entry, but for the latents; continuation: the flag of train.py."""
        channels = config.in_dim - shape[0]
        return {"y": torch.empty(channels, *shape[1:])} if channels else {}

    def plan_frames(self, frames, continuation):
        """How many frames are encoded at once for a sample of `frames`."""
        return frames

    def encode(self, vae, image, size, frames):
        """Conditions of a clip of `frames` at `size` (width, height) px; image: PIL or None."""
        return Conditions()
