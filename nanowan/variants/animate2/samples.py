"""Animate-2-14B's training samples: clips, each with a driving video that shows the same motion."""

import functools

import torch

from nanowan.cache import digest
from nanowan.errors import Skip
from nanowan.variants.animate.inputs import encode_scene, mark_given
from nanowan.variants.animate2.conditioning import DRIVING_PROMPT, OVERLAP
from nanowan.variants.sidecars import ClipSamples
from nanowan.video import to_video

COPYING = "the loss would fall to zero by copying; it should show somebody else move in the same way"
# a driving video counts as the clip itself if their pixels, in [-1,1], differ by less than this on average
SAME = 0.02


class DrivenSamples(ClipSamples):
    """Clips, each with a driving video NAME.driving.mp4 that shows somebody else move in the same way.

    The model gets the driving video unchanged. If this video showed the clip itself, the model would reach zero loss by
    copying the video, and learn nothing from the picture. So a clip is skipped if the driving video's file is identical
    to the clip's or shows about the same pixels.

    The reference picture is one of the clip's own frames, chosen by the digest of the clip's file. A continuation
    segment is a sample whose first frame is known.
    """

    videos = ("driving",)
    extra_lora_targets = ("cross_attn.k_img", "cross_attn.v_img")
    loss_from = 1  # latent frame 0 is the reference, whose predicted velocity is not used

    def find(self, path):
        files = super().find(path)
        if "driving" not in files:
            raise Skip(f"has no {path.with_suffix('.driving.mp4').name} beside it")
        if digest(files["driving"]) == digest(path):
            raise Skip(f"is its own {files['driving'].name}: {COPYING}")
        return files

    def cache_key(self, item):
        names = {kind: name for kind, (_, name) in item.sidecars.items()}
        text = self.pipe.encoder_source().digests(digest)
        return ["driven", names, self.encoder_key("clip"), text, DRIVING_PROMPT]

    @functools.cached_property
    def _text(self):
        return self.pipe.settings.conditioning.embed(self.pipe)[0].float().cpu()

    def cached(self, vae, video, item, sidecars):
        driving = to_video(sidecars["driving"], video.device)[None]
        if (video - driving).abs().mean() < SAME:
            raise Skip(f"its {item.sidecars['driving'][0].name} shows the clip itself: {COPYING}")
        at = int(item.digest[:8], 16) % item.frames
        picture, clip = video[:, :, at : at + 1], self.pipe.acquire("clip")
        tensors = {"clip": clip.encode(picture[:, :, 0])[0], "driving_clip": clip.encode(driving[:, :, 0])[0]}
        clip, tensors["driving_text"] = None, self._text
        vae = self.pipe.acquire("vae")  # the VAE may have been evicted to make room for other encoders
        z = vae.encode(picture)
        tensors |= {"latents": torch.cat([z, vae.encode(video)], 2)[0], "driving": vae.encode(driving)[0]}
        for known in (0, OVERLAP):
            known_latents = video[:, :, :known] if known else None
            tensors[f"y.{known}"] = encode_scene(vae, video.shape, mark_given(z), known=known_latents)[0]
        return tensors

    def cached_bytes(self, item, shape):
        C, frames, h, w = shape
        return 4 * (2 * C + 2 * (C + 4)) * frames * h * w

    def draw(self, item, share, rng):
        return OVERLAP if rng.random() < share else 0

    def entry(self, tensors, drawn, has_caption):
        names = ("latents", "driving", "clip", "driving_clip", "driving_text")
        entry = {k: tensors[k] for k in names} | {"y": tensors[f"y.{drawn}"]}
        return entry | {"unconditional": torch.tensor(float(not has_caption))}

    def to_decode(self, latents, entry):
        return latents[:, :, 1:]  # the first latent frame is the reference
