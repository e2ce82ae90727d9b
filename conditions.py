"""What each variant's DiT is given beside noise, time and text, and how it is encoded: one class per kind of input.

A class says which inputs its model takes, which size of video follows from them, how they are encoded, and what of that
is cached in training. The sampler, the trainers and the plans ask only these; a model with an input of its own adds a
class here, and its name to CONDITIONING.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import animate_source
import s2v
import wav2vec2
from checkpoint import BadInput
from clip import load_clip
from media import Skip, cover, has_sound, open_image, read_frames, sound_start, to_tensor


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
    """A further part of a checkpoint: the folder in it, what its files are named, and load(folder, device)."""

    folder: str
    pattern: str
    load: Callable

    def bytes(self, ckpt_dir):
        return sum(f.stat().st_size for f in (ckpt_dir / self.folder).glob(self.pattern))


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


class TextOnly:
    """Text-to-video: nothing but the prompt."""

    channels = 0  # of the conditioning, behind the noise
    decodes_more = 0  # latent frames that are decoded beside those that are sampled
    flags = ()  # of sample.py's, those that only some variants take
    by_clips = False  # whether `sequence` makes a video of any length of it
    encoders = {}  # further parts of the checkpoint, {name: Encoder}
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

    def latent_frames(self, frames):
        """T' of the noise for a clip of so many frames."""
        return 1 + (frames - 1) // 4

    def plan_inputs(self, config, shape):
        """Tensors like Conditions.inputs of one clip, for a model of this configuration and latents (C,T',h,w)."""
        return {}

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


# ---- S2V-14B -----------------------------------------------------------------------------------------------------
class SpeechSequence(Sequence):
    """A picture that speaks: clips of `frames` frames at 16 per second, each after the 73 frames before it.

    Officially the first three frames are dropped while the sound begins with the file, so lips lead by 3/16 s;
    sync_sound begins the sound where they are.
    """

    fps = s2v.VIDEO_RATE

    def __init__(self, models, s, seed, image, audio, pose_video, frames, num_clip, start_from_ref, sync_sound):
        self.models, self.frames, self.seed, self.device = models, frames, seed, models.device
        self.sound, self.sound_offset = audio, DROPPED_FRAMES / self.fps if sync_sound else 0.0
        picture = open_image(image)
        self.size = s2v.fit_size(*picture.size, s.size[0] * s.size[1])
        samples = wav2vec2.read_audio(audio)
        features = wav2vec2.to_feature_rate(models.acquire("audio").features(samples))
        self.count = wav2vec2.count_clips(features.shape[1], frames)
        self.count = min(self.count, num_clip or self.count)
        self.features = wav2vec2.to_video_rate(features, self.count * frames)[None]  # (1,S,A,count * frames)
        models.drop("audio")
        self.pose = None if pose_video is None else self._read_pose(pose_video)
        self.picture = to_tensor(s2v.fit_picture(picture, self.size))[None, :, None].to(self.device)  # (1,3,1,H,W)
        self.shape = s.z_dim, frames // 4, self.size[1] // s.stride[1], self.size[0] // s.stride[2]
        self.ref = models.acquire_vae(self.size).encode(self.picture)
        self.has_motion = start_from_ref  # whether the clip at hand has motion tokens
        self.last = s2v.first_motion(self.picture, start_from_ref)  # (1,3,73,H,W)
        self.motion = models.acquire_vae(self.size).encode(self.last)

    def _read_pose(self, file):
        """The frames (T,3,H,W) of the pose video that are followed, one every sixteenth of a second, nearly."""
        try:
            frames = list(read_frames(file))
        except Skip as e:
            raise BadInput(f"--pose_video {file}: {e}") from None
        if len(frames) < MIN_POSE_FRAMES:
            raise BadInput(f"--pose_video {file}: {len(frames)} frames; at least {MIN_POSE_FRAMES} are needed")
        step = s2v.pose_step((len(frames) - 1) / frames[-1].seconds)
        taken = frames[::step][: self.count * self.frames]
        return torch.cat([s2v.fit_pose(to_tensor(f.image)[None], self.size) for f in taken])

    def noise(self, r):
        generator = torch.Generator(self.device).manual_seed(self.seed + r)
        return torch.randn(self.shape, generator=generator, device=self.device)

    def conditions(self, r):
        span = slice(r * self.frames, (r + 1) * self.frames)
        audio = self.features[..., span]
        inputs = {"ref": self.ref, "audio": audio}
        if self.has_motion:
            inputs["motion"] = self.motion
        if self.pose is not None:
            pose = s2v.pose_clip(self.pose[span], self.frames).to(self.device)
            inputs["pose"] = self.models.acquire_vae(self.size).encode(pose)[:, :, 1:]
        return Conditions(inputs=inputs, uncond_inputs=inputs | {"audio": torch.zeros_like(audio)})

    def decode(self, r, latents, decode):
        prefix = self.motion if self.has_motion else self.ref
        video = decode(torch.cat([prefix, latents], 2))[:, :, -self.frames :]
        video = video if self.has_motion else video[:, :, DROPPED_FRAMES:]
        self.last = s2v.next_motion(self.last, video)
        if r + 1 < self.count:
            self._continue()
        return video[0]

    def _continue(self):
        self.motion, self.has_motion = self.models.acquire_vae(self.size).encode(self.last), True

    def state(self):
        return {"last": self.last}

    def restore(self, state):
        self.last = state["last"].to(self.device)
        self._continue()


DROPPED_FRAMES = 3  # of a first clip: they are made with the reference picture before them, and look like it
MIN_POSE_FRAMES = 3


class Speech(TextOnly):
    """S2V-14B: a picture, a sound and, if wanted, a pose video; in clips."""

    takes_image = needs_image = by_clips = True
    decodes_more = s2v.MOTION_LATENTS
    flags = ("audio", "pose_video", "infer_frames", "num_clip", "start_from_ref", "sync_sound")

    encoders = {"audio": Encoder("wav2vec2-large-xlsr-53-english", "model*.safetensors", wav2vec2.load_wav2vec2)}

    def latent_frames(self, frames):
        return frames // 4

    def plan_inputs(self, config, shape):
        C, frames, h, w = shape
        ref, motion = torch.empty(1, C, 1, h, w), torch.empty(1, C, s2v.MOTION_LATENTS, h, w)
        audio = torch.empty(1, s2v.STATES, config.audio_dim, 4 * frames)
        return {"ref": ref, "audio": audio, "motion": motion, "pose": torch.empty(1, C, frames, h, w)}

    def sequence(
        self,
        models,
        s,
        seed,
        image=None,
        audio=None,
        pose_video=None,
        infer_frames=None,
        num_clip=None,
        start_from_ref=False,
        sync_sound=False,
    ):
        if image is None or audio is None:
            raise BadInput(f"{models.dir}: a picture that speaks, --image and --audio are needed")
        frames = infer_frames or s.frames
        if frames % 4 or frames < 4:
            raise BadInput(f"--infer_frames {frames}: must be a multiple of 4")
        if num_clip is not None and num_clip < 1:
            raise BadInput(f"--num_clip {num_clip}: at least 1")
        return SpeechSequence(models, s, seed, image, audio, pose_video, frames, num_clip, start_from_ref, sync_sound)


# ---- Animate-14B -------------------------------------------------------------------------------------------------
class AnimateSequence(Sequence):
    """A character that moves as a video does, or takes a person's place in it: clips that share their first `overlap`
    frames with the end of the one before.
    """

    def __init__(self, models, s, seed, folder, replace, overlap):
        self.models, self.overlap, self.seed, self.device = models, overlap, seed, models.device
        self.source = animate_source.read_source(folder, replace, models.config().face_side)
        self.fps, self.n = self.source.fps, len(self.source.pose)
        self.spans = animate_source.clip_ranges(self.n, s.frames, overlap)
        self.count, height, width = len(self.spans), *self.source.pose[0].shape[:2]
        self.size = width, height
        self.shape = s.z_dim, 2 + (s.frames - 1) // 4, height // s.stride[1], width // s.stride[2]
        pose_file = Path(folder) / "src_pose.mp4"
        if has_sound(pose_file):
            self.sound, self.sound_offset = pose_file, sound_start(pose_file)
        vae, clip = models.acquire_vae(self.size), models.acquire("clip")
        self.reference, self.clip = animate_source.encode_reference(vae, clip, self.source, self.device)
        vae = clip = None
        models.drop("clip")
        self.known = None  # the last frames (1,3,overlap,H,W) of the clip before

    def noise(self, r):
        generator = torch.Generator(self.device).manual_seed(self.seed)  # one for all clips
        for _ in range(r + 1):
            noise = torch.randn(self.shape, generator=generator, device=self.device)
        return noise

    def conditions(self, r):
        vae = self.models.acquire_vae(self.size)
        y, pose, face = animate_source.encode_clip(vae, self.source, self.spans[r], self.reference, self.known)
        inputs = {"pose": pose, "face": face, "clip": self.clip}
        return Conditions(channels=y, inputs=inputs, uncond_inputs=inputs | {"face": torch.full_like(face, -1.0)})

    def decode(self, r, latents, decode):
        video = decode(latents[:, :, 1:])  # but for the reference
        begin = self.overlap if r else 0
        self.known = video[:, :, -self.overlap :]
        return video[0, :, begin : self.n - self.spans[r][0]]

    def output(self, latents):
        return latents[:, 1:]

    def state(self):
        return {"known": self.known}

    def restore(self, state):
        self.known = state["known"].to(self.device)


class Character(TextOnly):
    """Animate-14B: the folder that its preprocessing writes; in clips."""

    by_clips = True
    channels = 20
    decodes_more = -1
    flags = ("src_root_path", "replace_flag", "refert_num")
    encoders = {"clip": Encoder("", "models_clip*", load_clip)}

    def latent_frames(self, frames):
        return 2 + (frames - 1) // 4  # the reference's is the first

    def plan_inputs(self, config, shape):
        C, frames, h, w = shape
        face = torch.empty(1, 3, 4 * frames - 7, config.face_side, config.face_side)
        return {"pose": torch.empty(1, C, frames - 1, h, w), "face": face, "clip": torch.empty(1, 257, config.clip_dim)}

    def sequence(self, models, s, seed, image=None, src_root_path=None, replace_flag=False, refert_num=1):
        if image is not None:
            raise BadInput(f"--image {image}: {models.dir} takes its picture from --src_root_path")
        if src_root_path is None:
            raise BadInput(f"{models.dir}: a character that moves as a video does, --src_root_path is needed")
        return AnimateSequence(models, s, seed, src_root_path, replace_flag, refert_num)


# by a variant's model_type
CONDITIONING = {
    "t2v": TextOnly(),
    "ti2v": FirstFrame(),
    "i2v": ImageChannels(),
    "s2v": Speech(),
    "animate": Character(),
}
