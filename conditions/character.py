"""Animate-14B: a character, and the poses and faces of a driving video; sampled and trained on in clips."""

import functools
import hashlib
from pathlib import Path

import torch

import animate_source
from animate import MOTION_PREFIX, load_motion_encoder
from checkpoint import BadInput
from clip import load_clip
from conditions.base import Conditions, Encoder, Sequence, TextOnly
from conditions.companions import ClipSamples
from data import companion_frames, to_video
from media import Skip, has_sound, sound_delay


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
            self.sound, self.sound_offset = pose_file, sound_delay(pose_file)
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
        self.known = video[:, :, -self.overlap :].clone()  # a view would keep all of it
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
    title = "Animate-14B: a character that moves as a video does"
    flags = {
        "src_root_path": dict(
            help="the folder that prepare.py or the official preprocessing wrote: src_pose.mp4, src_face.mp4, "
            "src_ref.png"
        ),
        "replace_flag": dict(
            action="store_true", help="put the character in the place of the video's person (src_bg, src_mask)"
        ),
        "refert_num": dict(
            type=int, choices=(1, 5), help="frames that a clip takes over from the one before (default: 1)"
        ),
    }
    encoders = {
        "clip": Encoder("", "models_clip*", load_clip),
        "motion": Encoder("", "diffusion_pytorch_model*.safetensors", load_motion_encoder, MOTION_PREFIX),
    }

    def latent_frames(self, frames):
        return 2 + (frames - 1) // 4  # the reference's is the first

    def plan_inputs(self, config, shape):
        C, frames, h, w = shape
        face = torch.empty(1, 3, 4 * frames - 7, config.face_side, config.face_side)
        return {"pose": torch.empty(1, C, frames - 1, h, w), "face": face, "clip": torch.empty(1, 257, config.clip_dim)}

    def plan_entry(self, config, shape, continuation):
        entry = {k: v[0] for k, v in self.plan_inputs(config, shape).items()}
        motion = torch.empty(entry["face"].shape[1], config.motion_dim)
        return entry | {"face": motion} | super().plan_entry(config, shape, continuation)

    def samples(self, models):
        return CharacterSamples(models)

    def sequence(self, models, s, seed, image=None, src_root_path=None, replace_flag=False, refert_num=1):
        if image is not None:
            raise BadInput(f"--image {image}: {models.dir} takes its picture from --src_root_path")
        if src_root_path is None:
            raise BadInput(f"{models.dir}: a character that moves as a video does, --src_root_path is needed")
        return AnimateSequence(models, s, seed, src_root_path, replace_flag, refert_num)


# ---- training ----------------------------------------------------------------------------------------------------
class CharacterSamples(ClipSamples):
    """Clips with what preprocessing draws of them: NAME.pose.mp4 and NAME.face.mp4, and for a character that takes a
    person's place also NAME.bg.mp4 and NAME.mask.mp4.

    The reference picture is a frame of the clip itself, which one its file decides. A sample that goes on from another
    is one whose first 1 or 5 frames are known.
    """

    videos = ("pose", "face", "bg", "mask")
    squares = ("face",)
    loss_from = 1  # behind the reference: what the model says of that is thrown away

    def find(self, path):
        files = super().find(path)
        needed = {"pose", "face"} | ({"bg", "mask"} if files.keys() & {"bg", "mask"} else set())
        if missing := sorted(needed - files.keys()):
            names = ", ".join(path.with_suffix(f".{kind}.mp4").name for kind in missing)
            raise Skip(f"has no {names} beside it")
        return files

    @functools.cached_property
    def _motion_key(self):
        """What identifies the motion encoder: its weights, since the files that hold them are the whole DiT's."""
        weights = hashlib.blake2b()
        for _, p in sorted(self.models.acquire("motion").named_parameters()):
            weights.update(p.cpu().numpy().tobytes())
        return weights.hexdigest()

    def cache_key(self, item):
        names = {kind: name for kind, (_, name) in item.companions.items()}
        return ["character", names, self.encoder_key("clip"), self._motion_key]

    def cached(self, vae, video, item):
        at = int(item.digest[:8], 16) % item.frames
        picture, device = video[:, :, at : at + 1], video.device
        tensors = {"clip": self.models.acquire("clip").encode(picture[:, :, 0])[0]}
        side = self.models.config().face_side
        face = to_video(companion_frames(item, "face", (side, side)))[None].to(device)
        with torch.no_grad():
            motion = self.models.acquire("motion").encode_clip
            tensors["face"], tensors["face.blank"] = motion(face)[0], motion(torch.full_like(face[:, :, :1], -1))[0, 0]
        vae = self.models.acquire("vae")  # the others may have made it leave
        z = vae.encode(picture)
        tensors["latents"] = torch.cat([z, vae.encode(video)], 2)[0]
        tensors["pose"] = vae.encode(to_video(companion_frames(item, "pose"))[None].to(device))[0]
        scene = None
        if "bg" in item.companions:
            scene = companion_frames(item, "bg"), [frame[..., 0] for frame in companion_frames(item, "mask")]
        for known in (0, *known_frames(item)):
            given = video[:, :, :known] if known else None
            y = animate_source.encode_scene(vae, video.shape, animate_source.mark_given(z), scene, given)
            tensors[f"y.{known}"] = y[0]
        return tensors

    def cached_bytes(self, item, shape):
        C, config = shape[0], self.models.config()
        conditions = (1 + len(known_frames(item))) * (C + 4)
        return 4 * ((2 * C + conditions) * shape[1] * shape[2] * shape[3] + item.frames * config.motion_dim)

    def draw(self, items, share, rng):
        return [rng.choice(known_frames(item)) if rng.random() < share else 0 for item in items]

    def entry(self, tensors, drawn, has_caption):
        face = tensors["face"] if has_caption else tensors["face.blank"].expand_as(tensors["face"])
        return {k: tensors[k] for k in ("latents", "pose", "clip")} | {"y": tensors[f"y.{drawn}"], "face": face}


def known_frames(item):
    """How many frames a sample may take over from the one before it, as --refert_num: at most half of its own."""
    return [n for n in animate_source.OVERLAPS if item.frames >= 2 * n]
