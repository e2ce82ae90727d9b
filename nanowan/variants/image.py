"""Image-to-video: the clean first frame of TI2V-5B, and the extra input channels of I2V-A14B."""

import functools

import numpy as np
import torch
import torch.nn.functional as F

from nanowan.errors import BadInput
from nanowan.variants.conditioning import Conditioning, Conditions
from nanowan.video import cover, to_tensor


class FirstFrame(Conditioning):
    """TI2V's conditioning. An image, if given, becomes the first latent frame. A last image, if given, becomes the last
    latent frame: five copies of it are encoded as a video of two latent frames, and the second latent frame is used.
    Both given latent frames stay clean, at t = 0.
    """

    takes_image = True

    def video_size(self, size, image):
        return size if image is None else best_size(*image.size, size[0] * size[1], 32)

    def encode(self, vae, images, size, frames):
        known = {}
        for frame, image in zip((0, -1), images, strict=False):
            pixels = to_tensor(cover(image, *size))[None, :, None].to(next(vae.parameters()).device)
            known[frame] = vae.encode(pixels if frame == 0 else pixels.repeat(1, 1, 5, 1, 1))[:, :, -1:]
        return Conditions(known=known)


class ImageChannels(Conditioning):
    """I2V-A14B's conditioning. The noise is followed by 20 channels: a mask (4 channels), and the latents (16) of a
    video that consists of the image and grey frames.
    """

    takes_image = needs_image = True

    def video_size(self, size, image):
        area, aspect = size[0] * size[1], image.height / image.width
        h, w = (8 * round(np.sqrt(a) // 8 // 2 * 2) for a in (area * aspect, area / aspect))
        if not h or not w:
            raise BadInput(too_small(area, image.width, image.height, 16))
        return w, h

    def encode(self, vae, images, size, frames):
        (w, h), device = size, next(vae.parameters()).device
        first, *last = (F.interpolate(to_tensor(i)[None], size=(h, w), mode="bicubic")[:, :, None] for i in images)
        return Conditions(channels=image_channels(vae, first.to(device), frames, *(i.to(device) for i in last)))


def image_channels(vae, image, frames, last_image=None):
    """Return the 20 channels (B,4+z,T',h,w) that I2V-A14B gets for a first frame (B,3,1,H,W): a mask, and the latents
    of a video that consists of the first frame and frames-1 grey frames. `last_image`, if given, replaces the last grey
    frame. The mask's four channels stand for the four frames of a latent frame. All of them are 1 on latent frame 0;
    with a last image, the last channel is also 1 on the last latent frame.
    """
    video = F.pad(image, (0, 0, 0, 0, 0, frames - 1))
    if last_image is not None:
        video[:, :, -1:] = last_image
    z = encode_still(vae, video)
    mask = torch.zeros_like(z[:, :4])
    mask[:, :, 0] = 1
    if last_image is not None:
        mask[:, 3, -1] = 1
    return torch.cat([mask, z], 1)


def encode_still(vae, video):
    """Return vae.encode(video), computed faster if most frames of the video are equal. The VAE encodes the video in
    chunks, and its layers carry a state from chunk to chunk. If a layer's input and state are bit-identical to those of
    its previous run, the previous output is used again, so the result is exact. The last input and output of each layer
    are kept in memory.
    """
    encoder, known = vae.encoder, {}  # {layer: (input, output, whether the layer's state has stopped changing)}
    layers = [*encoder.downsamples, *encoder.middle]

    def forward_once(layer, forward, x, past):
        last_x, out, settled = known.get(layer, (None, None, False))
        same = last_x is not None and torch.equal(last_x, x)
        if same and settled:
            return out
        before = {m: past[m] for m in layer.modules() if m in past}
        out = forward(x, past)
        settled = same and all(
            a is past[m] or torch.is_tensor(a) and torch.equal(a, past[m]) for m, a in before.items()
        )
        known[layer] = x, out, settled
        return out

    for layer in layers:
        layer.forward = functools.partial(forward_once, layer, layer.forward)
    try:
        return vae.encode(video)
    finally:
        for layer in layers:
            del layer.forward  # so that the class's method is used again


def too_small(area, width, height, side):
    return f"--size of {area} px is too small for an image of {width}x{height}: a side would be under {side}"


def best_size(width, height, area, step):
    """Return the (width, height) px of a video with at most `area` px and about the aspect ratio of an image of width x
    height px. Sides are multiples of `step` (official best_output_size). Raises BadInput if a side would be 0.
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
