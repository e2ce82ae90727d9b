"""S2V-14B's training samples: clips with sound and, optionally, poses."""

import torch
import torch.nn.functional as F

from nanowan.cache import cached_is_sound_broken, digest
from nanowan.errors import BadInput, Skip
from nanowan.variants.s2v import model, wav2vec2
from nanowan.variants.sidecars import ClipSamples
from nanowan.video import has_sound, sound_delay, to_video


class SpeechSamples(ClipSamples):
    """Clips with their own sound or that of NAME.wav, and with the poses of NAME.pose.mp4 if that file exists.

    A sample of F frames is cached as a first segment; the sample's first frame is the reference picture. If the clip
    has 73 more frames after the sample, the sample is cached a second time as a continuation segment, under names that
    begin with "next.". That segment consists of frames 73 to 72+F, conditioned on the motion of frames 0 to 72, with
    the same reference picture.
    """

    videos = ("pose",)
    frames_over, frames_after, side_multiple, fixed_speed = 0, model.MOTION_FRAMES, 64, True
    extra_lora_targets = tuple(f"audio_injector.{p}" for p in "qkvo")
    lora_targets = *ClipSamples.lora_targets, "audio_injector.k", "audio_injector.v"

    def __init__(self, pipe):
        super().__init__(pipe)
        self._heard = None, None  # (path, digest, delay) of the last sound, and its features

    def find(self, path):
        files, sound = super().find(path), path.with_suffix(".wav")
        if sound.is_file():
            files["sound"] = sound
        elif not has_sound(path):
            raise Skip(f"has no sound track, and there is no {sound.name} beside it")
        return files

    def changed(self, path, shown, sidecars, cache):
        """Return what ClipSamples.changed returns and, if the sound is broken (video.is_sound_broken), also {"sound":
        ["gaps"]}. Earlier versions of nanoWan ignored gaps in a sound.
        """
        sound = sidecars.get("sound", (path, digest(path)))
        gaps = {"sound": ["gaps"]} if cached_is_sound_broken(*sound, cache) else {}
        return super().changed(path, shown, sidecars, cache) | gaps

    def group(self, item):
        """Return the key of Samples.group. Items with and without frames after the sample, and items with and without
        poses, have different keys.
        """
        return *item.bucket, item.frames_after, "pose" in item.sidecars

    def cache_key(self, item):
        names = {kind: name for kind, (_, name) in item.sidecars.items()}
        return ["speech", names, item.frames_after, self.encoder_key("audio")]

    def cached(self, vae, video, item, sidecars):
        audio = self._audio(item)
        vae = self.pipe.acquire("vae")  # the VAE may have been evicted to make room for the speech encoder
        n, picture = item.frames, video[:, :, :1]
        tensors = {
            "latents": vae.encode(torch.cat([picture, video[:, :, :n]], 2))[0, :, 1:],
            "ref": vae.encode(picture)[0],
            "audio": audio[..., :n].contiguous(),
        }
        if item.frames_after:
            z = vae.encode(video)[0]
            tensors["next.motion"], tensors["next.latents"] = z[:, : model.MOTION_LATENTS], z[:, model.MOTION_LATENTS :]
            tensors["next.audio"] = audio[..., -n:].contiguous()
        if "pose" in sidecars:
            frames = to_video(sidecars["pose"]).transpose(0, 1)  # (T,3,H,W)
            for prefix, part in {"": frames[:n], "next.": frames[-n:]}.items():
                if not prefix or item.frames_after:
                    pose = vae.encode(model.pose_clip(part, n).to(video.device))
                    tensors[f"{prefix}pose"] = pose[0, :, 1:]
        return tensors

    def _audio(self, item):
        """Return the speech features (S,A,n) of an item, including the frames after it: n = item.frames +
        item.frames_after.
        """
        file, name = item.sidecars.get("sound", (item.path, item.digest))
        delay = 0.0 if "sound" in item.sidecars else sound_delay(file)
        if self._heard[0] != (file, name, delay):
            try:
                samples = wav2vec2.read_audio(file)
            except BadInput as e:
                raise Skip(str(e).removeprefix(f"{file}: ")) from None
            shift = round(delay * wav2vec2.SAMPLE_RATE)
            samples = F.pad(samples, (shift, 0))  # a late sound gets silence in front; an early one is cut
            if len(samples) < wav2vec2.MIN_SAMPLES:
                raise Skip("its sound ends before its first frame")
            states = self.pipe.acquire("audio").features(samples)
            self._heard = (file, name, delay), wav2vec2.to_feature_rate(states)
        first, frames = round(item.start * item.fps), item.frames + item.frames_after
        features = self._heard[1]
        if first * wav2vec2.FEATURE_RATE / wav2vec2.VIDEO_RATE >= features.shape[1]:
            seconds = features.shape[1] / wav2vec2.FEATURE_RATE
            raise Skip(f"its sound ends at {seconds:.2f} s, before the sample at {item.start:.2f} s")
        return wav2vec2.to_video_rate(features, first + frames)[..., first:]

    def cached_bytes(self, item, shape):
        C, frames, h, w = shape
        pose, kinds = "pose" in item.sidecars, 2 if item.frames_after else 1
        latents = kinds * (1 + pose) * frames + 1 + bool(item.frames_after) * model.MOTION_LATENTS
        return 4 * (latents * C * h * w + kinds * model.STATES * self.pipe.config().audio_dim * item.frames)

    def draw(self, item, share, rng):
        return rng.random() < share and item.frames_after > 0  # whether it is trained as a continuation segment

    def shape(self, item, drawn):
        return *self.group(item), drawn

    def entry(self, tensors, drawn, has_caption):
        names = [f"next.{name}" if drawn else name for name in ("latents", "audio", "motion", "pose")]
        entry = {name.removeprefix("next."): tensors[name] for name in names if name in tensors}
        if not has_caption:
            entry["audio"] = torch.zeros_like(entry["audio"])
        return entry | {"ref": tensors["ref"]}

    def to_decode(self, latents, entry):
        return torch.cat([entry["ref"][None].to(latents), latents], 2)
