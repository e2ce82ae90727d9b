"""Animate-14B: a character, and the poses and faces of a driving video; sampled and trained on in clips."""

from pathlib import Path

import torch

import animate_source
from checkpoint import BadInput
from clip import load_clip
from conditions.base import Conditions, Encoder, Sequence, TextOnly
from media import has_sound


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
        self.sound = next((f for f in (Path(folder) / "src_pose.mp4",) if has_sound(f)), None)
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
