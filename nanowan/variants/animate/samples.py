"""Animate-14B's training samples: clips with the poses and faces that preprocessing makes from them."""

import functools
import hashlib

import torch

from nanowan.errors import Skip
from nanowan.variants.animate import inputs
from nanowan.variants.sidecars import ClipSamples
from nanowan.video import to_video


class CharacterSamples(ClipSamples):
    """Clips with the videos that preprocessing makes from them: NAME.pose.mp4 and NAME.face.mp4, and also NAME.bg.mp4
    and NAME.mask.mp4 if the clip is trained as a replacement.

    The reference picture is one of the clip's own frames, chosen by the digest of the clip's file. A continuation
    segment is a sample whose first 1 or 5 frames are known.
    """

    videos = ("pose", "face", "bg", "mask")
    squares = ("face",)
    extra_lora_targets = ("cross_attn.k_img", "cross_attn.v_img")
    loss_from = 1  # latent frame 0 is the reference, whose predicted velocity is not used

    def find(self, path):
        files = super().find(path)
        needed = {"pose", "face"} | ({"bg", "mask"} if files.keys() & {"bg", "mask"} else set())
        if missing := sorted(needed - files.keys()):
            names = ", ".join(path.with_suffix(f".{kind}.mp4").name for kind in missing)
            raise Skip(f"has no {names} beside it")
        return files

    @functools.cached_property
    def _motion_key(self):
        """Return a hash of the motion encoder's weights alone. A hash of their files would not do this, because the
        files also hold the rest of the DiT.
        """
        weights = hashlib.blake2b()
        for _, p in sorted(self.pipe.acquire("motion").named_parameters()):
            weights.update(p.cpu().numpy().tobytes())
        return weights.hexdigest()

    def cache_key(self, item):
        names = {kind: name for kind, (_, name) in item.sidecars.items()}
        return ["character", names, self.encoder_key("clip"), self._motion_key]

    def sidecar_sizes(self, item):
        sizes, side = super().sidecar_sizes(item), self.pipe.config().face_side
        return sizes | {"face": (side, side)}

    def cached(self, vae, video, item, sidecars):
        at = int(item.digest[:8], 16) % item.frames
        picture, device = video[:, :, at : at + 1], video.device
        tensors = {"clip": self.pipe.acquire("clip").encode(picture[:, :, 0])[0]}
        face = to_video(sidecars["face"], device)[None]
        with torch.no_grad():
            motion = self.pipe.acquire("motion").encode_clip
            tensors["face"], tensors["face.blank"] = motion(face)[0], motion(torch.full_like(face[:, :, :1], -1))[0, 0]
        vae = self.pipe.acquire("vae")  # the VAE may have been evicted to make room for other encoders
        z = vae.encode(picture)
        tensors["latents"] = torch.cat([z, vae.encode(video)], 2)[0]
        tensors["pose"] = vae.encode(to_video(sidecars["pose"], device)[None])[0]
        scene = None
        if "bg" in sidecars:
            scene = sidecars["bg"], [frame[..., 0] for frame in sidecars["mask"]]
        for known in (0, *known_frames(item)):
            known_latents = video[:, :, :known] if known else None
            y = inputs.encode_scene(vae, video.shape, inputs.mark_given(z), scene, known_latents)
            tensors[f"y.{known}"] = y[0]
        return tensors

    def cached_bytes(self, item, shape):
        C, config = shape[0], self.pipe.config()
        conditions = (1 + len(known_frames(item))) * (C + 4)
        return 4 * ((2 * C + conditions) * shape[1] * shape[2] * shape[3] + item.frames * config.motion_dim)

    def draw(self, item, share, rng):
        return rng.choice(known_frames(item)) if rng.random() < share else 0

    def entry(self, tensors, drawn, has_caption):
        face = tensors["face"] if has_caption else tensors["face.blank"].expand_as(tensors["face"])
        return {k: tensors[k] for k in ("latents", "pose", "clip")} | {"y": tensors[f"y.{drawn}"], "face": face}

    def to_decode(self, latents, entry):
        return latents[:, :, 1:]  # the first latent frame is the reference


def known_frames(item):
    """Return the numbers of known frames that a continuation segment of this item may have. Possible numbers are 1 and
    5; each needs an item of at least twice as many frames.
    """
    return [n for n in inputs.OVERLAPS if item.frames >= 2 * n]
