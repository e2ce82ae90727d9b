"""What each variant is given beside noise, time and text: one class per kind of conditioning.

A class says which inputs its model takes, which size of video follows from them, how they are encoded, and what of that
is cached in training. The sampler, the trainers and the plans ask only these; a model with an input of its own adds a
class here, and its name to CONDITIONING.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from checkpoint import BadInput
from media import cover, to_tensor


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


class Sequence:
    """A video that is made clip by clip, each from what the one before left: what clips.py asks of a variant's inputs.

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

    def decode(self, r, latents):
        """Latents (1,C,T',h,w) of clip r -> its new frames (3,n,H,W) in [-1,1]; keeps what clip r+1 needs of them."""
        raise NotImplementedError

    def output(self, latents):
        """What --save_latents writes of a clip's latents (C,T',h,w)."""
        return latents

    def state(self):
        """{name: tensor}: what clip r+1 needs of the clips before it."""
        return {}

    def restore(self, state):
        """Take over what `state` returned."""


class TextOnly:
    """Text-to-video: nothing but the prompt."""

    channels = 0  # of the conditioning, behind the noise
    flags = ()  # of sample.py's, those that only some variants take
    by_clips = False  # whether `sequence` makes a video of any length of it
    encoders = {}  # further parts of the checkpoint, {name: loader(folder, device)}
    takes_image = False  # with a prompt
    needs_image = False
    trains_first_frame = False  # --i2v_prob

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

    def encode(self, vae, image, size, frames):
        """Conditions of a clip of `frames` at `size` (width, height) px; image: PIL or None."""
        return Conditions()

    def cache_key(self, item):
        """What decides `cached`, as plain values, for the name of the cache file of a data.Item."""
        return ""

    def cached(self, vae, video, item):
        """{name: tensor} that training caches beside an item's latents; video (1,3,T,H,W) in [-1,1]."""
        return {}


class FirstFrame(TextOnly):
    """TI2V: an image, if there is one, is the first latent frame, clean, at t = 0."""

    takes_image = True
    trains_first_frame = True

    def video_size(self, size, image):
        return size if image is None else best_size(*image.size, size[0] * size[1], 32)

    def encode(self, vae, image, size, frames):
        if image is None:
            return Conditions()
        pixels = to_tensor(cover(image, *size))[None, :, None]
        return Conditions(first_frame=vae.encode(pixels.to(next(vae.parameters()).device)))


class ImageChannels(TextOnly):
    """I2V-A14B: 20 channels behind the noise, a mask (4) and the latents (16) of the image before grey frames."""

    channels = 20
    takes_image = needs_image = True

    def video_size(self, size, image):
        area, aspect = size[0] * size[1], image.height / image.width
        h, w = (8 * round(np.sqrt(a) // 8 // 2 * 2) for a in (area * aspect, area / aspect))
        if not h or not w:
            raise BadInput(too_small(area, image.width, image.height, 16))
        return w, h

    def encode(self, vae, image, size, frames):
        (w, h), device = size, next(vae.parameters()).device
        pixels = F.interpolate(to_tensor(image)[None], size=(h, w), mode="bicubic")[:, :, None]
        return Conditions(channels=vae.condition(pixels.to(device), frames))

    def cache_key(self, item):
        return "first frame"

    def cached(self, vae, video, item):
        return {"y": vae.condition(video[:, :, :1], video.shape[2])[0]}


CONDITIONING = {"t2v": TextOnly(), "ti2v": FirstFrame(), "i2v": ImageChannels()}  # by a variant's model_type


def too_small(area, width, height, side):
    return f"--size of {area} px is too small for an image of {width}x{height}: a side would be under {side}"


def best_size(width, height, area, step):
    """The size nearest an image's aspect with sides multiples of `step` and no more than `area` px (official
    best_output_size). Raises BadInput where a side would be 0.
    """
    ratio = width / height
    ow = (area * ratio) ** 0.5
    oh = area / ow
    w1 = int(ow // step * step)
    h2 = int(oh // step * step)
    if not w1 or not h2:
        raise BadInput(too_small(area, width, height, step))
    h1, w2 = int(area / w1 // step * step), int(area / h2 // step * step)
    off = [max(ratio / (w / h), (w / h) / ratio) for w, h in ((w1, h1), (w2, h2))]
    return (w1, h1) if off[0] < off[1] else (w2, h2)
