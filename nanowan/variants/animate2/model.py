"""WanAnimate2, the DiT of Wan2.2-Animate-2-14B: it also takes a character's picture and a driving video.

Letters are those of wan.py, and  T' latent frames: the reference picture, then those of the video   n tokens of a
latent frame, H'W'   S image tokens of CLIP

Before a clip is sampled, the driving video passes once through the same blocks, without noise and with t = 1 (of 1000).
In this pass, the blocks get the driving video's own prompt and the CLIP tokens of its first frame, and the keys and
values that they compute are stored. In every step, a token of the clip attends to all tokens of the clip and to the
driving video's tokens of the same latent frame. The positions of the driving video are shifted by one latent frame,
because the clip begins with the reference. They are also shifted to the right by the width of the clip.
Source: diffusers' WanAnimate2Transformer3DModel (0.42.1); the tensors are those of Wan 2.1's I2V-14B.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from kernels import ops
from kernels.rope import grid_positions
from nanowan.errors import BadInput
from nanowan.variants.animate.model import Image, ImageWan
from wan import WanConfig

SKIPPED = 9  # index of the block that guidance's unconditional half leaves out
DISTILLED_SCALE = -1.3  # log_scale of the distilled model, which its tensors do not tell
# Settings of config.json that decide the driving video's positions. No published weights have other values.
PUBLISHED = dict(refer_offset_t=1, refer_offset_h=0, refer_offset_w=-1, refer_stride=1, use_img_emb=True)


@dataclass
class Animate2Config(WanConfig):
    """A WanConfig with the settings that only Animate-2 has. log_scale: a number added to the attention logits of the
    keys of latent frame 1, the first one after the reference.
    """

    clip_dim: int = 1280
    log_scale: float = 0.0


class DrivenAttention(NamedTuple):
    """Attention to all tokens of the clip and to the driving video's tokens of the same latent frame. Latent frame 0,
    the reference, has no driving tokens. keys, values: (B,(T'-1)n,N,d) of the driving video.
    """

    keys: torch.Tensor
    values: torch.Tensor
    log_scale: float

    def __call__(self, q, k, v):
        """Return the output (B,T'n,N*d) for the clip's q, k, v (B,T'n,N,d). RoPE was applied to q, k and `keys`."""
        n = q.shape[1] - self.keys.shape[1]
        first, *later = q.split(n, 1)
        frames = [self.attend(first, k, v)]
        for q, more_k, more_v in zip(later, self.keys.split(n, 1), self.values.split(n, 1), strict=True):
            if torch.is_grad_enabled():  # the backward pass concatenates the keys again, so that no copy is stored
                frame = checkpoint(self.attend, q, k, v, more_k, more_v, use_reentrant=False, preserve_rng_state=False)
            else:
                frame = self.attend(q, k, v, more_k, more_v)
            frames.append(frame)
        return torch.cat(frames, 1)

    def as_dense(self, k):
        """Return (keys (B,M,N,d), bias (1,1,T'n,M)), M = T'n + (T'-1)n. Attention to all M keys with this bias equals
        the attention of this class. The keys are the clip's k (B,T'n,N,d), then those of the driving video. The bias
        adds log_scale, and hides the driving tokens of other latent frames. Used by diag.py logits.
        """
        length, n = k.shape[1], k.shape[1] - self.keys.shape[1]
        frame = torch.arange(length, device=k.device) // n
        bias = torch.zeros(length, length + len(frame[n:]), device=k.device)
        bias[:, length:].masked_fill_(frame[:, None] != frame[n:], -torch.inf)
        bias[:, n : 2 * n] += self.log_scale
        return torch.cat([k, self.keys], 1), bias[None, None]

    def attend(self, q, k, v, more_k=None, more_v=None):
        n, keys = q.shape[1], (k, v) if more_k is None else (torch.cat([k, more_k], 1), torch.cat([v, more_v], 1))
        bias = None
        if self.log_scale:
            bias = torch.zeros(1, 1, 1, keys[0].shape[1], device=q.device)
            bias[..., n : 2 * n] = self.log_scale
        return ops.attention(q, *keys, bias)


class Driving(NamedTuple):
    """A driving video, ready for the blocks: for each block its keys and values (B,(T'-1)n,N,d); and its numbers of
    tokens (T'-1,H',W') in time, height and width.
    """

    keys_values: tuple
    grid: tuple


class Recorder:
    """A stand-in for a Driving. It is used while the driving video itself passes through the blocks, and records the
    keys and values of each block.
    """

    def __init__(self):
        self.keys_values = {}

    def recording(self, i):
        """Return the self-attention function that block i uses while the driving video passes through it."""

        def attend(q, k, v):
            # activation checkpointing may run a block again; the first pair is kept
            self.keys_values.setdefault(i, (k, v))
            return ops.attention(q, k, v)

        return attend


class Inputs(NamedTuple):
    """The embedded inputs that WanAnimate2 takes in addition to those of Wan."""

    driving: Driving | Recorder
    image: Image
    unconditional: torch.Tensor | bool | None


class WanAnimate2(ImageWan):
    """The DiT of Wan2.2-Animate-2-14B. In forward(x, t, context, context_lens=None, *, driving, clip, driving_clip,
    driving_text, unconditional=None), the arguments after * are those of embed_inputs. x (B,36,T',h,w) is the noise
    followed by the result of encode_scene. The returned velocity includes the reference's latent frame.
    """

    config_class = Animate2Config
    batches_guidance = False  # a batch would hold the driving video's keys and values twice, and one half skips a block

    def read_driving(self, driving, clip, text):
        """Return the Driving of a driving video. driving: latents (B,Cz,F,h,w) of the video. clip: CLIP's tokens
        (B,S,C) of its first frame. text: the embedded tokens (B,L,text_dim) of its prompt.
        """
        x = torch.cat([driving, torch.ones_like(driving[:, :4]), driving], 1)  # mask 1: all frames are given
        t, recorder = torch.ones(len(x), device=x.device), Recorder()
        grid = self.check(x, t)
        c = self.prepare_block_inputs(t, text, None, grid, driving=recorder, clip=clip)
        x, local = self.scatter_tokens(self.patchify(x, c), c)
        self.forward_blocks(x, local)
        return Driving(tuple(recorder.keys_values[i] for i in range(len(self.blocks))), grid)

    @staticmethod
    def kept_bytes(config, tokens, itemsize):
        return 2 * config.num_layers * tokens * config.dim * itemsize

    def prepare_inputs(self, *, clip, unconditional=None, **driving):
        made = self.embed_inputs(clip=self.embed_image(clip, cache=True), unconditional=unconditional, **driving)
        if torch.is_tensor(unconditional) and bool((unconditional == unconditional[0]).all()):
            unconditional = bool(unconditional[0])  # a bool lets forward_block skip the block instead of masking it
        return {"driving": made.driving, "clip": made.image, "unconditional": unconditional}

    # ---- wan.py's hooks ------------------------------------------------------------------------------------------
    def embed_inputs(self, *, driving, clip, driving_clip=None, driving_text=None, unconditional=None):
        """Return the embedded Inputs. driving, driving_clip, driving_text: the three arguments of read_driving; or, as
        `driving` alone, the Driving that read_driving returned. clip: CLIP's tokens (B,S,C) of the reference picture,
        or an Image. unconditional: (B,), 1 for each sample in guidance's unconditional half and 0 for the others; or
        one bool for all samples. The unconditional half skips block SKIPPED.
        """
        if not isinstance(driving, Driving | Recorder):
            driving = self.read_driving(driving, driving_clip, driving_text)
        return Inputs(driving, self.embed_image(clip), unconditional)

    def list_tokens(self, grid, device, inputs):
        tokens = super().list_tokens(grid, device, inputs)
        T, H, W = grid
        extent = max(T, H, 2 * W)  # the driving video's positions reach twice the clip's width
        if isinstance(inputs.driving, Recorder):
            positions = grid_positions(grid, device) + torch.tensor([1, 0, W], dtype=torch.int32, device=device)
            return tokens._replace(positions=positions, extent=max(extent, T + 1))
        if inputs.driving.grid != (T - 1, H, W):
            raise BadInput(
                f"driving video of {'x'.join(map(str, inputs.driving.grid))} tokens, clip of {T}x{H}x{W}: should have "
                "one latent frame less than that, and be as high and wide"
            )
        return tokens._replace(extent=extent)

    def attention_of(self, i, c):
        driving = c.inputs.driving
        if isinstance(driving, Recorder):
            return driving.recording(i)
        return DrivenAttention(*driving.keys_values[i], self.config.log_scale)

    def forward_block(self, x, i, c):
        unconditional = c.inputs.unconditional if i == SKIPPED else None
        if unconditional is True:
            return x
        y = super().forward_block(x, i, c)
        if torch.is_tensor(unconditional):
            y = torch.where(unconditional.view(-1, 1, 1) > 0, x, y)
        return y


def read_config(config, shape, entries, settings, path):
    """Return the Animate2Config of a model folder. For the arguments, see read_config in nanowan/variants/s2v/model.py.
    The distilled weights are recognised by their file name, or by log_scale in config.json.
    """
    wrong = [f"{k} is {settings[k]!r}, should be {v!r}" for k, v in PUBLISHED.items() if settings.get(k, v) != v]
    if wrong:
        raise BadInput(f"{path}: not the released Animate-2 model: {'; '.join(wrong)}")
    distilled = any("distill" in entry.file.name.lower() for entry in entries.values())
    log_scale = settings.get("log_scale", DISTILLED_SCALE if distilled else 0.0)
    return Animate2Config(**vars(config), clip_dim=shape("img_emb.proj.0.weight")[0], log_scale=log_scale)


def recommend(config):
    """Return {field: value} of the Settings that the distilled weights need (few steps, no guidance); {} for the base
    model.
    """
    return {"steps": 10, "guidance": (1.0, 1.0)} if config.log_scale else {}
