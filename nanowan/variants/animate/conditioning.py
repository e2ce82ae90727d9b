"""The inputs of Animate-14B for each segment of a video: a character, and the poses and faces of a driving video."""

from pathlib import Path

import torch

from nanowan.errors import BadInput
from nanowan.formats.layouts import read_headers, weight_files
from nanowan.formats.load import load_into
from nanowan.variants.animate import inputs
from nanowan.variants.animate.clip import load_vision
from nanowan.variants.animate.model import MOTION_PREFIX, MotionEncoder, motion_sizes
from nanowan.variants.conditioning import Conditioning, Conditions, Encoder, Video, draw_noise
from nanowan.variants.examples import Examples
from nanowan.video import has_sound, sound_delay


class ReferencedVideo(Video):
    """A video in segments, each of which has a reference picture as its first latent frame. known (1,3,n,H,W): the last
    frames of the previous segment, with which the next segment begins; None until a segment is decoded.
    """

    known = None

    def noise(self, r, seed):
        return draw_noise(self.shape, seed, self.device, r)  # segment r gets draw r of one generator

    def output(self, latents):
        return latents[:, 1:]

    def state(self):
        return {"known": self.known}

    def restore(self, state):
        self.known = state["known"].to(self.device)


class CharacterVideo(ReferencedVideo):
    """A video of a character that moves like the person in a driving video, or that replaces this person. The first
    `overlap` frames of each segment are the last frames of the previous segment.
    """

    def __init__(self, pipe, settings, folder, replace, overlap):
        self.pipe, self.overlap, self.device = pipe, overlap, pipe.device
        self.source = inputs.read_source(folder, replace, pipe.config().face_side)
        self.fps, self.n = self.source.fps, len(self.source.pose)
        self.spans = inputs.clip_ranges(self.n, settings.frames, overlap)
        self.count, height, width = len(self.spans), *self.source.pose[0].shape[:2]
        self.size, (_, sh, sw) = (width, height), settings.stride
        self.shape = settings.z_dim, 2 + (settings.frames - 1) // 4, height // sh, width // sw
        pose_file = Path(folder) / "src_pose.mp4"
        if has_sound(pose_file):
            self.sound, self.sound_offset = pose_file, sound_delay(pose_file)
        vae, clip = pipe.acquire_vae(self.size), pipe.acquire("clip")
        self.reference, self.clip = inputs.encode_reference(vae, clip, self.source, self.device)
        vae = clip = None
        pipe.drop("clip")

    def conditions(self, r):
        vae = self.pipe.acquire_vae(self.size)
        y, pose, face = inputs.encode_clip(vae, self.source, self.spans[r], self.reference, self.known)
        model_inputs = {"pose": pose, "face": face, "clip": self.clip}
        return Conditions(channels=y, inputs=model_inputs, uncond_inputs={"face": torch.full_like(face, -1.0)})

    def decode(self, r, latents, decode):
        video = decode(latents[:, :, 1:])  # the first latent frame is the reference
        begin = self.overlap if r else 0
        self.known = video[:, :, -self.overlap :].clone()  # a view would keep all frames in memory
        return video[0, :, begin : self.n - self.spans[r][0]]


def load_motion_encoder(path, device="cpu"):
    """Load only the motion encoder of a DiT, from a model folder or file. The motion encoder is frozen and in fp32, as
    it is in the full model.
    """
    entries = {n: e for n, e in read_headers(weight_files(path)).items() if not n.endswith(".kernel")}
    with torch.device("meta"):
        model = MotionEncoder(*motion_sizes(lambda name: entries[name].shape, entries).values())
    entries = {n.removeprefix(MOTION_PREFIX): e for n, e in entries.items() if n.startswith(MOTION_PREFIX)}
    return load_into(model, entries, device, torch.float32)


class Character(Conditioning):
    """Animate-14B's conditioning, which is read from the folder that preprocessing writes. Videos are sampled in
    segments.
    """

    by_segments = True
    title = "Animate-14B: a character that moves like the person in a video"
    flags = {
        "src_root_path": dict(
            help="folder with src_pose.mp4, src_face.mp4 and src_ref.png, written by nanowan.variants.animate.prepare "
            "or by the official preprocessing"
        ),
        "replace_flag": dict(
            action="store_true",
            help="replace the person in the driving video with the character (needs src_bg.mp4 and src_mask.mp4)",
        ),
        "refert_num": dict(
            type=int,
            choices=(1, 5),
            help="number of frames that a segment shares with the end of the previous segment (default: 1)",
        ),
    }
    encoders = {
        "clip": Encoder("", "models_clip*", load_vision),
        "motion": Encoder("", "diffusion_pytorch_model*.safetensors", load_motion_encoder, MOTION_PREFIX),
    }

    def check(self, ckpt_dir, image=None, last_image=None, **inputs):
        if image is not None or last_image is not None:
            raise BadInput(f"--image {image or last_image}: {ckpt_dir} takes its picture from --src_root_path")
        if inputs.get("src_root_path") is None:
            raise BadInput(f"{ckpt_dir}: a character that moves as a video does, --src_root_path is needed")

    def latent_frames(self, frames):
        return 2 + (frames - 1) // 4  # the first latent frame is the reference

    def video(self, pipe, settings, image=None, src_root_path=None, replace_flag=False, refert_num=1):
        return CharacterVideo(pipe, settings, src_root_path, replace_flag, refert_num)


class CharacterExamples(Examples):
    uncond_inputs = ("face",)

    def inputs(self, config, shape):
        C, frames, h, w = shape
        face = torch.empty(1, 3, 4 * frames - 7, config.face_side, config.face_side)
        return {"pose": torch.empty(1, C, frames - 1, h, w), "face": face, "clip": torch.empty(1, 257, config.clip_dim)}

    def entry(self, config, shape, continuation):
        entry = {k: v[0] for k, v in self.inputs(config, shape).items()}
        motion = torch.empty(entry["face"].shape[1], config.motion_dim)
        return entry | {"face": motion} | super().entry(config, shape, continuation)

    def decoded_frames(self, latent_frames):
        return latent_frames - 1
