"""Image-to-video: TI2V-5B's clean first frame, and the channels of I2V-A14B."""

import math

import numpy as np
import torch.nn.functional as F

from checkpoint import BadInput
from conditions.base import Conditions, TextOnly
from media import cover, to_tensor


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

    def cached_bytes(self, item, shape):
        return 4 * (shape[0] + self.channels) * math.prod(shape[1:])


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
