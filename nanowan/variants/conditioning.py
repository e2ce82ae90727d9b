"""The inputs that a DiT gets in sampling in addition to noise, timestep and text; and the segments of a video.

Conditioning serves text-to-video, and is the base class of every variant's conditioning. sample.py handles all
variants alike, through the classes of this file. The inputs in training are in samples.py, and stand-ins for the memory
estimate are in examples.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from nanowan.errors import BadInput
from nanowan.formats.layouts import parts_folder, read_headers


class Conditions(NamedTuple):
    """The inputs of a DiT that are the same at every step of a clip.

    known {latent frame: (1,C,1,h,w)}: the latent frames that are given, by index (0 the first, -1 the last); they have
    no noise and t = 0. channels (1,c,T',h,w): concatenated after the channels of the noise. inputs: keyword arguments
    of the model's forward. uncond_inputs: keyword arguments that replace some of `inputs`, or are added to them, in
    guidance's unconditional half.
    """

    known: dict = {}
    channels: torch.Tensor | None = None
    inputs: dict = {}
    uncond_inputs: dict = {}

    def put_known(self, x):
        """Put the known frames into the latents x (B,C,T',h,w), in place, and return x."""
        for frame, latents in self.known.items():
            x[:, :, frame] = latents[:, :, 0]
        return x

    def model_inputs(self, x, t):
        """Return the x (B,C+c,T',h,w) and t (B,) or (B,T') that the DiT gets, given latents x (B,C,T',h,w) and a
        timestep t in 0..1000.
        """
        times = torch.full((len(x),), float(t), device=x.device)
        if self.known:
            times = times[:, None].repeat(1, x.shape[2])
            times[:, list(self.known)] = 0
        if self.channels is not None:
            x = torch.cat([x, self.channels.expand(len(x), -1, -1, -1, -1)], 1)
        return x, times


class Encoder(NamedTuple):
    """A further model in a checkpoint, such as CLIP. folder: its folder in the checkpoint. pattern: a glob pattern for
    the names of its files. load(folder, device): the function that loads it. prefix: the prefix of its tensors' names
    if the model is stored in the DiT's files.
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
    """Return normal noise (fp32) of this shape. It is draw r, counted from 0, from a generator with this seed."""
    generator = torch.Generator(device).manual_seed(seed)
    for _ in range(r + 1):
        noise = torch.randn(shape, generator=generator, device=device)
    return noise


class Video:
    """A video to be sampled segment by segment. This class makes a video of one segment, a single clip. In the
    subclasses for S2V, Animate and Animate-2, each segment continues the previous one.

    count: number of segments. size: (width, height) px. shape: (C,T',h,w) of a segment's latents. fps: frames per
    second. sound: a file whose sound goes into the mp4, or None. sound_offset: when the sound begins in the mp4, in
    seconds.
    """

    count = 1
    images = ()  # PIL images: none, only the first frame, or the first and the last
    sound = None
    sound_offset = 0.0

    def __init__(self, pipe, settings, image=None, last_image=None):
        """image, last_image: PIL images (not paths), or None."""
        self.pipe, self.frames, self.fps = pipe, settings.frames, settings.fps
        self.images = tuple(i for i in (image, last_image) if i is not None)
        if last_image is not None and self.frames < 5:
            raise BadInput(f"--frames {self.frames}: with --last_image at least 5")
        self.conditioning = settings.conditioning
        self.size = self.conditioning.video_size(settings.size, image)
        self.shape = settings.latent_shape(self.size, settings.frames)

    def noise(self, r, seed):
        """Return the noise (C,T',h,w), fp32, from which segment r is sampled."""
        return draw_noise(self.shape, seed, self.pipe.device)

    def conditions(self, r):
        """Encode the inputs of segment r, and return its Conditions."""
        vae = self.pipe.acquire_vae(self.size) if self.images else None
        conditions = self.conditioning.encode(vae, self.images, self.size, self.frames)
        if vae and self.pipe.runtime.cuda:  # the DiT runs next and needs the memory; the VAE is loaded again later
            vae = None
            self.pipe.evict("vae")
        return conditions

    def decode(self, r, latents, decode):
        """Return the new frames (3,n,H,W) in [-1,1] of segment r, given its latents (1,C,T',h,w). Also keep, in this
        object, the frames or latents that segment r+1 needs. decode: a function from latents to a video (1,3,T,H,W).
        """
        return decode(latents)[0]

    def output(self, latents):
        """Return the tensor that --save_latents writes for a segment with these latents (C,T',h,w)."""
        return latents

    def state(self):
        """Return {name: tensor} with everything that the next segment needs from the previous ones."""
        return {}

    def restore(self, state):
        """Continue the video from `state`, a result of the method `state`."""


class Conditioning:
    """The conditioning of text-to-video: no inputs except the prompt."""

    # sample.py's flags for the inputs of this variant: their heading in --help, and {name: argparse's arguments}
    title, flags = "", {}
    by_segments = False  # whether a video may have any number of segments
    encoders = {}  # further models of the checkpoint, {name: Encoder}
    takes_image = needs_image = False  # whether --image may be given, and whether it must be

    def check(self, ckpt_dir, image=None, last_image=None, **inputs):
        """Raise BadInput if an image or another input is missing, or if the model does not take an input that is given.
        inputs: the values of this class's `flags`, by name. No file is opened.
        """
        if image is None and (self.needs_image or last_image is not None):
            raise BadInput(f"{ckpt_dir}: --image is needed" + ", with --last_image too" * (not self.needs_image))
        if image is not None and not self.takes_image:
            raise BadInput(f"--image {image}: {ckpt_dir} is a text-to-video model and takes none")

    def video_size(self, size, image):
        """Return the (width, height) px of the video. Without an image this is `size`. With a PIL image, the video has
        about the area of `size`, and the image's aspect ratio.
        """
        return size

    def latent_frames(self, frames):
        """Return T', the number of latent frames that are sampled for a clip of `frames` frames."""
        return 1 + (frames - 1) // 4

    def video(self, pipe, settings, image=None, last_image=None):
        """Return the Video for the inputs given to sample.py, after `check` has accepted them. image, last_image: PIL
        images (not paths), or None. Subclasses also take the values of their `flags`, by name.
        """
        return Video(pipe, settings, image, last_image)

    def encode(self, vae, images, size, frames):
        """Return the Conditions of a clip with `frames` frames and `size` (width, height) px. images: a tuple of PIL
        images. It is empty, or holds the first frame, or the first and the last frame.
        """
        return Conditions()
