"""S2V-14B: a picture, a sound and, if wanted, a pose video; sampled and trained on in clips."""

import itertools
import math
import tempfile

import torch
import torch.nn.functional as F

import s2v
import wav2vec2
from checkpoint import BadInput
from conditions.base import Conditions, Encoder, Sequence, TextOnly
from conditions.companions import ClipSamples
from data import companion_frames, to_video
from media import Skip, has_sound, open_image, read_frames, sound_delay, to_tensor


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
        self._write_audio(models.acquire("audio"), num_clip)
        models.drop("audio")
        self.pose = pose_video
        if pose_video is not None:
            self.pose_step = self._pose_step()
        self.picture = to_tensor(s2v.fit_picture(picture, self.size))[None, :, None].to(self.device)  # (1,3,1,H,W)
        self.shape = s.z_dim, frames // 4, self.size[1] // s.stride[1], self.size[0] // s.stride[2]
        self.ref = models.acquire_vae(self.size).encode(self.picture)
        self.has_motion = start_from_ref  # whether the clip at hand has motion tokens
        self.last = s2v.first_motion(self.picture, start_from_ref)  # (1,3,73,H,W)
        self.motion = models.acquire_vae(self.size).encode(self.last)

    def _write_audio(self, encoder, num_clip):
        """Put the speech features of all clips into a file, where they wait for their turn and take no memory."""
        features = wav2vec2.to_feature_rate(encoder.features(wav2vec2.read_audio(self.sound)))
        self.count = wav2vec2.count_clips(features.shape[1], self.frames)
        self.count = min(self.count, num_clip or self.count)
        features = wav2vec2.to_video_rate(features, self.count * self.frames)[None].cpu()
        self.audio_shape, self.audio_file = (*features.shape[:3], self.frames), tempfile.TemporaryFile()
        for clip in features.split(self.frames, -1):
            self.audio_file.write(clip.contiguous().numpy())

    def _read_audio(self, r):
        """The speech features (1,S,A,frames) of clip r."""
        nbytes = 4 * math.prod(self.audio_shape)
        self.audio_file.seek(r * nbytes)
        return torch.frombuffer(bytearray(self.audio_file.read(nbytes)), dtype=torch.float32).view(self.audio_shape)

    def _pose_frames(self, images=True):
        try:
            yield from read_frames(self.pose, images)
        except Skip as e:
            raise BadInput(f"--pose_video {self.pose}: {e}") from None

    def _pose_step(self):
        """Every how many-th frame of the pose video is followed."""
        frames = list(self._pose_frames(images=False))
        if len(frames) < MIN_POSE_FRAMES:
            raise BadInput(f"--pose_video {self.pose}: {len(frames)} frames; at least {MIN_POSE_FRAMES} are needed")
        return s2v.pose_step((len(frames) - 1) / frames[-1].seconds)

    def _read_pose(self, r):
        """The poses (T,3,H,W) of clip r, T <= frames. The file is read from its beginning each time."""
        begin, end = (i * self.frames * self.pose_step for i in (r, r + 1))
        taken = itertools.islice(self._pose_frames(), begin, end, self.pose_step)
        none = torch.empty(0, 3, *self.size[::-1])
        return torch.cat([none, *(s2v.fit_pose(to_tensor(f.image)[None], self.size) for f in taken)])

    def noise(self, r):
        generator = torch.Generator(self.device).manual_seed(self.seed + r)
        return torch.randn(self.shape, generator=generator, device=self.device)

    def conditions(self, r):
        audio = self._read_audio(r).to(self.device)
        inputs = {"ref": self.ref, "audio": audio}
        if self.has_motion:
            inputs["motion"] = self.motion
        if self.pose is not None:
            pose = s2v.pose_clip(self._read_pose(r), self.frames).to(self.device)
            inputs["pose"] = self.models.acquire_vae(self.size).encode(pose)[:, :, 1:]
        return Conditions(inputs=inputs, uncond_inputs=inputs | {"audio": torch.zeros_like(audio)})

    def decode(self, r, latents, decode):
        # all of what is before: the decoder sees further back than that; with the last 14 of 20 latent frames a clip of
        # a random decoder is off by 0.6 %
        prefix = self.motion if self.has_motion else self.ref
        begin = -self.frames if self.has_motion else DROPPED_FRAMES - self.frames
        video = decode(torch.cat([prefix, latents], 2))[:, :, begin:].clone()  # a view would keep the prefix's frames
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
    title = "S2V-14B: a picture that speaks (--size is the area)"
    flags = {
        "audio": dict(help="the sound: any file that has a sound track"),
        "pose_video": dict(help="a video whose poses are followed"),
        "infer_frames": dict(type=int, help="frames of a clip, a multiple of 4 (default: 80)"),
        "num_clip": dict(type=int, help="make only so many clips (default: as many as the sound fills)"),
        "start_from_ref": dict(action="store_true", help="begin with the picture itself"),
        "sync_sound": dict(
            action="store_true", help="begin the sound at 3/16 s, where the lips are; officially it is at 0"
        ),
    }
    frames_over, size_multiple, fixed_speed = 0, 64, True
    lora_targets = *TextOnly.lora_targets, "audio_injector.k", "audio_injector.v"
    encoders = {"audio": Encoder("wav2vec2-large-xlsr-53-english", "model*.safetensors", wav2vec2.load_wav2vec2)}

    def latent_frames(self, frames):
        return frames // 4

    def plan_inputs(self, config, shape):
        C, frames, h, w = shape
        inputs = {"ref": torch.empty(1, C, 1, h, w), "pose": torch.empty(1, C, frames, h, w)}
        inputs["audio"] = torch.empty(1, s2v.STATES, config.audio_dim, 4 * frames)
        inputs["motion"] = torch.empty(1, C, s2v.MOTION_LATENTS, h, w)
        return inputs

    def plan_entry(self, config, shape, continuation):
        inputs = self.plan_inputs(config, shape)
        return {k: v[0] for k, v in inputs.items() if continuation or k != "motion"}

    def plan_frames(self, frames, continuation):
        return frames + (s2v.MOTION_FRAMES if continuation else 1)

    def samples(self, models):
        return SpeechSamples(models)

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


# ---- training ----------------------------------------------------------------------------------------------------
class SpeechSamples(ClipSamples):
    """Clips with their own sound, or that of NAME.wav, and the poses of NAME.pose.mp4 if there are any.

    A sample of F frames is a first clip, behind its own first frame as the reference picture. Where the clip holds 73
    frames more, it is cached a second time as a continuation, under names that begin with "next.": frames 73 to 72+F
    behind the motion of frames 0 to 72, with the same reference picture.
    """

    videos = ("pose",)
    frames_over, frames_after = Speech.frames_over, s2v.MOTION_FRAMES

    def __init__(self, models):
        super().__init__(models)
        self._heard = None, None  # the last file's (path, digest, delay), and its features

    def find(self, path):
        files, sound = super().find(path), path.with_suffix(".wav")
        if sound.is_file():
            files["sound"] = sound
        elif not has_sound(path):
            raise Skip(f"has no sound track, and there is no {sound.name} beside it")
        return files

    def group(self, item):
        """With and without motion tokens, and poses."""
        return *item.bucket, item.frames_after, "pose" in item.companions

    def cache_key(self, item):
        names = {kind: name for kind, (_, name) in item.companions.items()}
        return ["speech", names, item.frames_after, self.encoder_key("audio")]

    def cached(self, vae, video, item):
        audio = self._audio(item)
        vae = self.models.acquire("vae")  # it may have made room for the speech encoder
        n, picture = item.frames, video[:, :, :1]
        tensors = {
            "latents": vae.encode(torch.cat([picture, video[:, :, :n]], 2))[0, :, 1:],
            "ref": vae.encode(picture)[0],
            "audio": audio[..., :n].contiguous(),
        }
        if item.frames_after:
            z = vae.encode(video)[0]
            tensors["next.motion"], tensors["next.latents"] = z[:, : s2v.MOTION_LATENTS], z[:, s2v.MOTION_LATENTS :]
            tensors["next.audio"] = audio[..., -n:].contiguous()
        if "pose" in item.companions:
            frames = to_video(companion_frames(item, "pose")).transpose(0, 1)  # (T,3,H,W)
            for prefix, part in {"": frames[:n], "next.": frames[-n:]}.items():
                if not prefix or item.frames_after:
                    pose = vae.encode(s2v.pose_clip(part, n).to(video.device))
                    tensors[f"{prefix}pose"] = pose[0, :, 1:]
        return tensors

    def _audio(self, item):
        """Speech features (S,A,n), one vector for each frame of an item and of those after it."""
        file, name = item.companions.get("sound", (item.path, item.digest))
        delay = 0.0 if "sound" in item.companions else sound_delay(file)
        if self._heard[0] != (file, name, delay):
            try:
                samples = wav2vec2.read_audio(file)
            except BadInput as e:
                raise Skip(str(e).removeprefix(f"{file}: ")) from None
            shift = round(delay * wav2vec2.SAMPLE_RATE)
            samples = F.pad(samples, (shift, 0))  # silence, or what is heard before the first frame
            if len(samples) < wav2vec2.MIN_SAMPLES:
                raise Skip("its sound ends before its first frame")
            states = self.models.acquire("audio").features(samples)
            self._heard = (file, name, delay), wav2vec2.to_feature_rate(states)
        first, frames = round(item.start * item.fps), item.frames + item.frames_after
        features = self._heard[1]
        if first * wav2vec2.FEATURE_RATE / wav2vec2.VIDEO_RATE >= features.shape[1]:
            seconds = features.shape[1] / wav2vec2.FEATURE_RATE
            raise Skip(f"its sound ends at {seconds:.2f} s, before the sample at {item.start:.2f} s")
        return wav2vec2.to_video_rate(features, first + frames)[..., first:]

    def cached_bytes(self, item, shape):
        C, frames, h, w = shape
        pose, kinds = "pose" in item.companions, 2 if item.frames_after else 1
        latents = kinds * (1 + pose) * frames + 1 + bool(item.frames_after) * s2v.MOTION_LATENTS
        return 4 * (latents * C * h * w + kinds * s2v.STATES * self.models.config().audio_dim * item.frames)

    def draw(self, items, share, rng):
        goes_on = rng.random() < share and items[0].frames_after > 0  # all of a batch: the tokens are others
        return [goes_on] * len(items)

    def entry(self, tensors, drawn, has_caption):
        names = [f"next.{name}" if drawn else name for name in ("latents", "audio", "motion", "pose")]
        entry = {name.removeprefix("next."): tensors[name] for name in names if name in tensors}
        if not has_caption:
            entry["audio"] = torch.zeros_like(entry["audio"])
        return entry | {"ref": tensors["ref"]}
