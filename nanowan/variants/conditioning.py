"""What a DiT is given beside noise, time and text when sampling: the Conditions of a clip, a video's segments.

Conditioning is text-to-video's, and the base of each variant's own. It answers sample.py's questions; what training
caches of a clip is samples.py, and stand-ins for the memory estimate are examples.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from nanowan.errors import BadInput
from nanowan.formats.layouts import parts_folder, read_headers


class Conditions(NamedTuple):
    """What a DiT is given at every step of a clip.

    known {latent frame: (1,C,1,h,w)}: frames that are known, such as 0 or -1, stay as they are, at t = 0. channels
    (1,c,T',h,w): stand behind the noise. inputs: keyword arguments of the model's forward; uncond_inputs: those that
    differ in guidance's unconditional half.
    """

    known: dict = {}
    channels: torch.Tensor | None = None
    inputs: dict = {}
    uncond_inputs: dict = {}

    def put_known(self, x):
        """Latents (B,C,T',h,w) with the known frames in their places (x itself is changed)."""
        for frame, latents in self.known.items():
            x[:, :, frame] = latents[:, :, 0]
        return x

    def model_inputs(self, x, t):
        """Latents (B,C,T',h,w) at time t in 0..1000 -> what the DiT takes: x (B,C+c,T',h,w), t (B,) or (B,T')."""
        times = torch.full((len(x),), float(t), device=x.device)
        if self.known:
            times = times[:, None].repeat(1, x.shape[2])
            times[:, list(self.known)] = 0
        if self.channels is not None:
            x = torch.cat([x, self.channels.expand(len(x), -1, -1, -1, -1)], 1)
        return x, times


class Encoder(NamedTuple):
    """A further model in a checkpoint: its folder there, a pattern of its files' names, and load(folder, device).
    prefix: of its tensors' names, where it is stored with the DiT.
    """

    folder: str
    pattern: str
    load: Callable
    prefix: str = ""

    def path(self, ckpt_dir):
        return parts_folder(ckpt_dir) / self.folder

    def files(self, ckpt_dir):
        return sorted(self.path(ckpt_dir).glob(self.pattern))

    def bytes(self, ckpt_dir):
        if self.prefix:
            entries = read_headers(self.files(ckpt_dir))
            return sum(4 * e.numel for n, e in entries.items() if n.startswith(self.prefix))
        return sum(f.stat().st_size for f in self.files(ckpt_dir))


def draw_noise(shape, seed, device, r=0):
    """Normal noise of this shape, fp32, from a seed and nothing else: the r-th that is drawn from it."""
    generator = torch.Generator(device).manual_seed(seed)
    for _ in range(r + 1):
        noise = torch.randn(shape, generator=generator, device=device)
    return noise


class Video:
    """A video to be sampled, segment by segment; a single clip is a video of one segment, and that is what this class
    makes. S2V's and Animate's continue each segment from the one before.

    count: number of segments. size: (width, height) px. shape: (C,T',h,w) of a segment's latents. fps. sound: a file
    whose sound goes into the mp4, or None; sound_offset: seconds at which it begins there.
    """

    count = 1
    images = ()  # PIL, with which a clip begins and perhaps ends
    sound = None
    sound_offset = 0.0

    def __init__(self, pipe, settings, image=None, last_image=None):
        """image, last_image: PIL images or None, already opened."""
        self.pipe, self.frames, self.fps = pipe, settings.frames, settings.fps
        self.images = tuple(i for i in (image, last_image) if i is not None)
        if last_image is not None and self.frames < 5:
            raise BadInput(f"--frames {self.frames}: with --last_image at least 5")
        self.conditioning = settings.conditioning
        self.size = self.conditioning.video_size(settings.size, image)
        self.shape = settings.latent_shape(self.size, settings.frames)

    def noise(self, r, seed):
        """(C,T',h,w) fp32 from which segment r begins."""
        return draw_noise(self.shape, seed, self.pipe.device)

    def conditions(self, r):
        """The Conditions of segment r; encodes what they need."""
        vae = self.pipe.acquire_vae(self.size) if self.images else None
        conditions = self.conditioning.encode(vae, self.images, self.size, self.frames)
        if vae and self.pipe.runtime.cuda:  # the VAE will be needed again, but the DiT comes next, and is the largest
            vae = None
            self.pipe.evict("vae")
        return conditions

    def decode(self, r, latents, decode):
        """Latents (1,C,T',h,w) of segment r -> its new frames (3,n,H,W) in [-1,1]; keeps what segment r+1 needs of
        them. decode: from latents to video (1,3,T,H,W).
        """
        return decode(latents)[0]

    def output(self, latents):
        """What --save_latents writes of a segment's latents (C,T',h,w)."""
        return latents

    def state(self):
        """{name: tensor}: what the next segment needs of the ones before it."""
        return {}

    def restore(self, state):
        """Take over what `state` returned."""


class Conditioning:
    """Text-to-video: nothing but the prompt."""

    title, flags = "", {}  # of sample.py's flags for a variant's own inputs: {name: argparse's arguments}
    by_segments = False  # whether a video is made of any number of segments
    encoders = {}  # further models of the checkpoint, {name: Encoder}
    takes_image = needs_image = False  # with a prompt

    def check(self, ckpt_dir, image=None, last_image=None, **inputs):
        """Raise BadInput where an image, or one of the flags' `inputs`, is missing, or there is one that the model does
        not take: before any of them is opened.
        """
        if image is None and (self.needs_image or last_image is not None):
            raise BadInput(f"{ckpt_dir}: --image is needed" + ", with --last_image too" * (not self.needs_image))
        if image is not None and not self.takes_image:
            raise BadInput(f"--image {image}: {ckpt_dir} is a text-to-video model and takes none")

    def video_size(self, size, image):
        """(width, height) px of the video: `size`, or with a PIL image its area in the image's aspect."""
        return size

    def latent_frames(self, frames):
        """T' of the noise for a clip of so many frames."""
        return 1 + (frames - 1) // 4

    def video(self, pipe, settings, image=None, last_image=None):
        """The Video of sample.py's inputs, which `check` has passed: the opened images, and the flags of `flags`."""
        return Video(pipe, settings, image, last_image)

    def encode(self, vae, images, size, frames):
        """Conditions of a clip of `frames` at `size` (width, height) px; images: none, the first frame, or also the
        last, PIL.
        """
        return Conditions()
