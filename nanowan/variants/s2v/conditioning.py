"""The inputs of S2V-14B for each segment of a video, from a picture, a sound file and, optionally, a pose video."""

import contextlib
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from nanowan.errors import BadInput, Skip
from nanowan.variants.conditioning import Conditioning, Conditions, Encoder, Video, draw_noise
from nanowan.variants.examples import Examples
from nanowan.variants.s2v import model, wav2vec2
from nanowan.video import probe, read_windows, to_tensor

# number of frames dropped at the start of the first segment: they look like the reference picture, which precedes them
DROPPED_FRAMES = 3
MIN_POSE_FRAMES = 3


@dataclass(frozen=True)
class SpeechInputs:
    """The inputs of S2V that sample.py takes as flags."""

    audio: str | None = None
    pose_video: str | None = None
    infer_frames: int | None = None
    num_clip: int | None = None
    start_from_ref: bool = False
    sync_sound: bool = False

    def __post_init__(self):
        if self.infer_frames is not None and (self.infer_frames % 4 or self.infer_frames < 4):
            raise BadInput(f"--infer_frames {self.infer_frames}: must be a multiple of 4")
        if self.num_clip is not None and self.num_clip < 1:
            raise BadInput(f"--num_clip {self.num_clip}: at least 1")


class SpeechVideo(Video):
    """A video in which the person in a picture speaks. Its segments have `frames` frames at 16 per second, and each is
    conditioned on the previous 73 frames.

    As in the official code, the first three frames are dropped unless start_from_ref is set, but the sound is not cut.
    Frame n of the file was thus made for the sound at frame n + 3, so the lips move 3/16 s before the sound. With
    sync_sound, the first 3/16 s of the sound are cut as well.
    """

    fps = model.VIDEO_RATE

    def __init__(self, pipe, settings, picture, inputs):
        self.pipe, self.frames, self.device = pipe, inputs.infer_frames or settings.frames, pipe.device
        dropped = DROPPED_FRAMES if inputs.sync_sound and not inputs.start_from_ref else 0
        self.sound, self.sound_offset = inputs.audio, -dropped / self.fps
        self.size = model.fit_size(*picture.size, settings.size[0] * settings.size[1])
        self._write_audio(pipe.acquire("audio"), inputs.num_clip)
        pipe.drop("audio")
        self.pose = inputs.pose_video
        if self.pose is not None:
            self.pose_times = self._pose_times()
        self.picture = to_tensor(model.fit_picture(picture, self.size))[None, :, None].to(self.device)  # (1,3,1,H,W)
        _, sh, sw = settings.stride
        self.shape = settings.z_dim, self.frames // 4, self.size[1] // sh, self.size[0] // sw
        self.ref = pipe.acquire_vae(self.size).encode(self.picture)
        self.has_motion = inputs.start_from_ref  # whether the current segment has motion tokens
        self.last = model.first_motion(self.picture, inputs.start_from_ref)  # (1,3,73,H,W)
        self.motion = pipe.acquire_vae(self.size).encode(self.last)

    def _write_audio(self, encoder, num_clip):
        """Write the speech features of all segments to a temporary file, so that they take no memory. num_clip: the
        largest number of segments to make, or None.
        """
        features = wav2vec2.to_feature_rate(encoder.features(wav2vec2.read_audio(self.sound)))
        self.count = wav2vec2.count_clips(features.shape[1], self.frames)
        self.count = min(self.count, num_clip or self.count)
        features = wav2vec2.to_video_rate(features, self.count * self.frames)[None].cpu()
        self.audio_shape, self.audio_file = (*features.shape[:3], self.frames), tempfile.TemporaryFile()
        for segment in features.split(self.frames, -1):
            self.audio_file.write(segment.contiguous().numpy())

    def _read_audio(self, r):
        """Return the speech features (1,S,A,frames) of segment r, read from the temporary file."""
        nbytes = 4 * math.prod(self.audio_shape)
        self.audio_file.seek(r * nbytes)
        return torch.frombuffer(bytearray(self.audio_file.read(nbytes)), dtype=torch.float32).view(self.audio_shape)

    def _pose_times(self):
        """Return the times, in seconds, of the pose video's frames that are used, for all segments. As in the official
        code, these are every n-th frame, n = pose_step(fps). In a video of variable rate, frames are taken at regular
        times instead.
        """
        with self._reading_pose():
            shown = probe(Path(self.pose))
        times, count = shown.times or [0.0], self.count * self.frames
        if len(times) < MIN_POSE_FRAMES:
            raise BadInput(f"--pose_video {self.pose}: {len(times)} frames; at least {MIN_POSE_FRAMES} are needed")
        if "variable rate" in shown.notes:
            return [t for t in (k / self.fps for k in range(count)) if t <= times[-1]]
        return times[:: model.pose_step((len(times) - 1) / times[-1])][:count]

    @contextlib.contextmanager
    def _reading_pose(self):
        try:
            yield
        except Skip as e:
            raise BadInput(f"--pose_video {self.pose}: {e}") from None

    def _read_pose(self, r):
        """Return the poses (T,3,H,W) of segment r, T <= frames. Every call reads the pose video from its beginning."""
        wanted, poses = self.pose_times[r * self.frames : (r + 1) * self.frames], []
        with self._reading_pose():
            for (pose,) in read_windows(Path(self.pose), [[t] for t in wanted], self._fit_pose) if wanted else ():
                poses.append(pose)
        return torch.cat([torch.empty(0, 3, *self.size[::-1]), *poses])

    def _fit_pose(self, frame):
        return model.fit_pose(to_tensor(frame.shown())[None], self.size)

    def noise(self, r, seed):
        return draw_noise(self.shape, seed + r, self.device)

    def conditions(self, r):
        audio = self._read_audio(r).to(self.device)
        inputs = {"ref": self.ref, "audio": audio}
        if self.has_motion:
            inputs["motion"] = self.motion
        if self.pose is not None:
            pose = model.pose_clip(self._read_pose(r), self.frames).to(self.device)
            inputs["pose"] = self.pipe.acquire_vae(self.size).encode(pose)[:, :, 1:]
        return Conditions(inputs=inputs, uncond_inputs={"audio": torch.zeros_like(audio)})

    def decode(self, r, latents, decode):
        # The prefix holds all past latent frames that are known, because the decoder looks far back: with only the last
        # 14 of 20 past latent frames, the output of a random decoder is off by 0.6 %.
        prefix = self.motion if self.has_motion else self.ref
        begin = -self.frames if self.has_motion else DROPPED_FRAMES - self.frames
        video = decode(torch.cat([prefix, latents], 2))[:, :, begin:].clone()  # a view would keep the prefix in memory
        self.last = model.next_motion(self.last, video)
        if r + 1 < self.count:
            self._continue()
        return video[0]

    def _continue(self):
        self.motion, self.has_motion = self.pipe.acquire_vae(self.size).encode(self.last), True

    def state(self):
        return {"last": self.last}

    def restore(self, state):
        self.last = state["last"].to(self.device)
        self._continue()


class Speech(Conditioning):
    """S2V-14B's conditioning: a picture, a sound and, optionally, a pose video. Videos are sampled in segments."""

    takes_image = needs_image = by_segments = True
    title = "S2V-14B: the person in a picture speaks (--size sets the area, the picture sets the aspect ratio)"
    flags = {
        "audio": dict(help="sound or video file with the speech"),
        "pose_video": dict(help="video of drawn poses that the speaker follows"),
        "infer_frames": dict(type=int, help="number of frames per segment, a multiple of 4 (default: 80)"),
        "num_clip": dict(type=int, help="maximum number of segments (default: as many as the sound needs)"),
        "start_from_ref": dict(
            action="store_true",
            help="start the video from the picture of --image; otherwise, this picture is only a reference",
        ),
        "sync_sound": dict(
            action="store_true",
            help="cut the first 3/16 s of the video's sound, since it lags behind the lips by this time; no effect "
            "with --start_from_ref, with which there is no lag",
        ),
    }
    encoders = {"audio": Encoder("wav2vec2-large-xlsr-53-english", "model*.safetensors", wav2vec2.load_wav2vec2)}

    def check(self, ckpt_dir, image=None, **inputs):
        if image is None or inputs.get("audio") is None:
            raise BadInput(f"{ckpt_dir}: a picture that speaks, --image and --audio are needed")
        if inputs.pop("last_image", None) is not None:
            raise BadInput(f"--last_image: {ckpt_dir} takes none")
        SpeechInputs(**inputs)

    def latent_frames(self, frames):
        return frames // 4

    def video(self, pipe, settings, image=None, **inputs):
        return SpeechVideo(pipe, settings, image, SpeechInputs(**inputs))


class SpeechExamples(Examples):
    uncond_inputs = ("audio",)

    def inputs(self, config, shape):
        C, frames, h, w = shape
        inputs = {"ref": torch.empty(1, C, 1, h, w), "pose": torch.empty(1, C, frames, h, w)}
        inputs["audio"] = torch.empty(1, model.STATES, config.audio_dim, 4 * frames)
        inputs["motion"] = torch.empty(1, C, model.MOTION_LATENTS, h, w)
        return inputs

    def entry(self, config, shape, continuation):
        inputs = self.inputs(config, shape)
        return {k: v[0] for k, v in inputs.items() if continuation or k != "motion"}

    def encoded_frames(self, frames, continuation):
        return frames + (model.MOTION_FRAMES if continuation else 1)

    def decoded_frames(self, latent_frames):
        return latent_frames + model.MOTION_LATENTS
