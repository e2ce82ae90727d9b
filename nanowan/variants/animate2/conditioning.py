"""Animate-2-14B's inputs in sampling, segment by segment: a character's picture and a driving video.

Source: diffusers' modular pipeline of Wan-Animate-2 (0.42.1); docs/variants.md says where the official code differs.
"""

import contextlib
import math
import weakref
from fractions import Fraction
from pathlib import Path

import torch

from nanowan.errors import BadInput, Skip
from nanowan.variants.animate.clip import load_vision
from nanowan.variants.animate.conditioning import ReferencedVideo
from nanowan.variants.animate.inputs import encode_scene, frame_indices, mark_given
from nanowan.variants.conditioning import Conditioning, Conditions, Encoder
from nanowan.variants.examples import Examples
from nanowan.video import has_sound, probe, read_windows, sound_delay, to_tensor

OVERLAP = 1  # frames that a segment shares with the end of the previous one
MIN_FRAMES = 5  # fewest frames of a driving video: two latent frames
SIZE_MULTIPLE = 16
DRIVING_PROMPT = "人物动作的参考视频"  # default prompt of the driving video: "reference video of the person's motion"


# ---- pictures --------------------------------------------------------------------------------------------------------
def frame_size(width, height, area):
    """Return the (width, height) px of the video for a picture of width x height px. The video has about `area` px and
    about the picture's aspect ratio; its sides are rounded down to multiples of 16. Raises BadInput if a side would be
    0.
    """
    aspect = height // SIZE_MULTIPLE / max(1, width // SIZE_MULTIPLE)
    sides = (math.sqrt(area / aspect), math.sqrt(area * aspect)) if aspect else (0, 0)
    w, h = (int(side) // SIZE_MULTIPLE * SIZE_MULTIPLE for side in sides)
    if not w or not h:
        raise BadInput(f"--size of {area} px for a picture of {width}x{height}: a side would be under {SIZE_MULTIPLE}")
    return w, h


def letterbox_place(width, height, size):
    """Return the (left, top, width, height) px of a picture of width x height px after it is letterboxed
    into `size`.
    """
    w, h = size
    new_w = w if w / h < width / height else width * h // height
    new_h = h if w / h >= width / height else height * w // width
    return (w - new_w) // 2, (h - new_h) // 2, new_w, new_h


def letterbox(image, size, resample):
    """Return a PIL image as RGB, resized to fit `size` (width, height), with black bars if its aspect ratio differs.
    resample: a filter of PIL. Raises BadInput if a side of the resized image would be 0.
    """
    from PIL import Image

    left, top, w, h = letterbox_place(*image.size, size)
    if not w or not h:
        raise BadInput(f"a picture of {image.width}x{image.height} px is too narrow for a video of {size[0]}x{size[1]}")
    framed = Image.new("RGB", size)
    framed.paste(image.resize((w, h), resample), (left, top))
    return framed


# ---- the driving video -----------------------------------------------------------------------------------------------
class DrivingVideo:
    """A driving video, read at `fps` frames per second: for each multiple of 1/fps, the frame nearest in time is used.
    n: number of frames used. Raises BadInput if the file cannot be read or has too few frames.
    """

    def __init__(self, file, fps):
        self.file = Path(file)
        with self._reading():
            self.shown = probe(self.file)
        times = self.shown.times or [0.0]
        rate = Fraction((len(times) - 1) / times[-1]).limit_denominator(1001) if times[-1] else Fraction(fps)
        self.times = [times[i] for i in frame_indices(times, rate, fps)]
        self.n = len(self.times)
        if self.n < MIN_FRAMES:
            raise BadInput(f"--video {file}: {self.n} frames at {fps:g} per second; at least {MIN_FRAMES} are needed")

    @contextlib.contextmanager
    def _reading(self):
        try:
            yield
        except Skip as e:
            raise BadInput(f"--video {self.file}: {e}") from None

    def read(self, start, end, size):
        """Return frames start..end-1 as (1,3,end-start,H,W) in [-1,1], letterboxed into `size` (width, height). After
        its last frame, the video is played backwards, then forwards again, and so on. Every call reads the file from
        its beginning.
        """
        from PIL import Image

        def draw(frame):
            return to_tensor(letterbox(Image.fromarray(frame.shown()), size, Image.BILINEAR))

        places = [i % (2 * self.n) for i in range(start, end)]
        times = [self.times[min(i, 2 * self.n - 1 - i)] for i in places]
        wanted = sorted({*times})
        with self._reading():
            frames = dict(zip(wanted, next(read_windows(self.file, [wanted], draw, self.shown))))
        return torch.stack([frames[t] for t in times], 1)[None]


class DrivenVideo(ReferencedVideo):
    """A video of a character that moves like the person in a driving video. The first frame of each segment is the last
    frame of the previous segment.
    """

    def __init__(self, pipe, settings, picture, file, text):
        """picture: the character, a PIL image. file: the driving video. text: embedded tokens (1,S,D) of the driving
        video's prompt.
        """
        from PIL import Image

        self.pipe, self.device, self.fps, self.frames = pipe, pipe.device, settings.fps, settings.frames
        if self.frames % 4 != 1 or self.frames < MIN_FRAMES:
            raise BadInput(f"--frames {self.frames}: of a segment; should be 4k+1, and at least {MIN_FRAMES}")
        self.driving, self.text = DrivingVideo(file, self.fps), text
        self.starts = range(0, self.driving.n - OVERLAP, self.frames - OVERLAP)
        self.size = frame_size(*picture.size, math.prod(settings.size))
        self.count, self.place = len(self.starts), letterbox_place(*picture.size, self.size)
        (width, height), (_, sh, sw) = self.size, settings.stride
        self.shape = settings.z_dim, settings.conditioning.latent_frames(self.frames), height // sh, width // sw
        if has_sound(file):
            self.sound, self.sound_offset = file, sound_delay(file)
        image = to_tensor(letterbox(picture, self.size, Image.BICUBIC))[None, :, None].to(self.device)  # (1,3,1,H,W)
        self.reference = mark_given(pipe.acquire_vae(self.size).encode(image))
        clip = pipe.acquire("clip")
        self.clip = clip.encode(image[:, :, 0])
        self.driving_clip = clip.encode(self.driving.read(0, 1, self.size)[:, :, 0].to(self.device))
        clip = None
        pipe.drop("clip")

    def conditions(self, r):
        vae = self.pipe.acquire_vae(self.size)
        driving = self.driving.read(self.starts[r], self.starts[r] + self.frames, self.size).to(self.device)
        channels = encode_scene(vae, driving.shape, self.reference, known=self.known)
        inputs = {"driving": vae.encode(driving), "clip": self.clip}
        inputs |= {"driving_clip": self.driving_clip, "driving_text": self.text}
        uncond_inputs = {"unconditional": torch.ones(1, device=self.device)}
        return Conditions(channels=channels, inputs=inputs, uncond_inputs=uncond_inputs)

    def decode(self, r, latents, decode):
        video = decode(latents[:, :, 1:])  # the first latent frame is the reference
        self.known = video[:, :, -OVERLAP:].clone()  # a view would keep all frames in memory
        left, top, width, height = self.place
        end = self.driving.n - self.starts[r]
        # cut off the bars; the sides become even, as mp4 files need
        return video[0, :, OVERLAP * (r > 0) : end, top : top + height // 2 * 2, left : left + width // 2 * 2]


# ---- the interface to sample.py --------------------------------------------------------------------------------------
class Driven(Conditioning):
    """Animate-2-14B's conditioning: a picture and a driving video. Videos are sampled in segments."""

    takes_image = needs_image = by_segments = True
    title = (
        "Animate-2-14B: a character that moves like the person in a video (--size sets the area, the picture sets the "
        "aspect ratio)"
    )
    flags = {
        "video": dict(help="driving video; the character of --image gets its motion, and the result gets its sound"),
        "prompt_ref": dict(
            help=f"prompt that describes the motion in --video, not the character (default: {DRIVING_PROMPT})"
        ),
    }
    encoders = {"clip": Encoder("", "models_clip*", load_vision)}

    def __init__(self):
        self._embedded = weakref.WeakKeyDictionary()  # {pipeline: {prompt: (1,S,D)}}

    def check(self, ckpt_dir, image=None, last_image=None, **inputs):
        if last_image is not None:
            raise BadInput(f"--last_image {last_image}: {ckpt_dir} takes none")
        if image is None or inputs.get("video") is None:
            raise BadInput(f"{ckpt_dir}: a character that moves as a video does, --image and --video are needed")

    def latent_frames(self, frames):
        return 2 + (frames - 1) // 4  # the first latent frame is the reference

    def embed(self, pipe, prompt=DRIVING_PROMPT):
        """Return the embedded tokens (1,S,D) of a driving video's prompt. They are computed once per pipeline and
        prompt.
        """
        known = self._embedded.setdefault(pipe, {})
        if prompt not in known:
            known[prompt] = pipe.encode_prompts([prompt])[0]
        return known[prompt]

    def video(self, pipe, settings, image=None, video=None, prompt_ref=DRIVING_PROMPT):
        return DrivenVideo(pipe, settings, image, video, self.embed(pipe, prompt_ref))


class DrivenExamples(Examples):
    def inputs(self, config, shape):
        C, frames, h, w = shape
        picture, text = torch.empty(1, 257, config.clip_dim), torch.empty(1, 8, config.text_dim)
        driving = torch.empty(1, C, frames - 1, h, w)
        return {"driving": driving, "clip": picture, "driving_clip": picture, "driving_text": text}

    def entry(self, config, shape, continuation):
        return {k: v[0] for k, v in self.inputs(config, shape).items()} | super().entry(config, shape, continuation)

    def decoded_frames(self, latent_frames):
        return latent_frames - 1
