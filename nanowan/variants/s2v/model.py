"""WanS2V, the DiT of Wan2.2-S2V-14B: its further inputs are a sound, a reference picture, the previous clip and poses.

Letters are those of wan.py, and  A width of a speech feature (1024)   S hidden states of the speech encoder (25)
F video frames of a clip, 4T'   K audio tokens per latent frame (5)   M reference and motion tokens   n tokens per frame

The sequence consists of the noise tokens, then the tokens of the reference picture and, from the second clip on, the
motion tokens: the 19 latent frames before the clip, in patches that are larger the older a frame is. Reference and
motion tokens are clean and get the modulation of t = 0. On the time axis of RoPE the noise has positions from 0 up, the
reference has 30, and motion has negative positions. After some blocks, the noise tokens of each latent frame attend to
that frame's audio tokens. Only the noise and the timestep change from step to step, so embed_audio and embed_reference
compute the rest once per clip.
Source: official wan/modules/s2v/*, whose tensor names are kept, including `casual` for causal.
"""

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import ops
from kernels.rope import grid_positions
from nanowan.errors import BadInput
from nanowan.formats.header import count_blocks
from wan import CrossAttention, Tokens, Wan, WanConfig, embed_patches

MOTION_FRAMES, MOTION_LATENTS = 73, 19  # number of video frames, and of latent frames, before the clip
VIDEO_RATE = 16
REFERENCE_TIME = 30
NOISE, REFERENCE, MOTION = 0, 1, 2  # rows of trainable_cond_mask
STATES = 25  # number of hidden states of the speech encoder
# blocks of the released model that are followed by an audio injector; its tensors do not tell them
INJECT_LAYERS = (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)
# Settings of config.json that decide what the tensors mean. No published weights have other values.
PUBLISHED = dict(
    enable_adain=True,
    adain_mode="attn_norm",
    enable_framepack=True,
    framepack_drop_mode="padd",
    enable_motioner=False,
    enable_tsm=False,
    add_last_motion=True,
    zero_timestep=True,
    trainable_token_pos_emb=False,
)


# ---- sound -> audio tokens -------------------------------------------------------------------------------------
class CausalConv1d(nn.Module):
    """A convolution over time. The output at a position depends on the input at this position and at the two before it.
    Copies of the first input stand in for inputs before it.
    """

    def __init__(self, cin, cout, stride):
        super().__init__()
        self.conv = nn.Conv1d(cin, cout, 3, stride)

    def forward(self, x):
        """Return the convolution (B,T/stride rounded up,C') of x (B,T,C)."""
        return self.conv(F.pad(x.transpose(1, 2), (2, 0), mode="replicate")).transpose(1, 2)


def norm_silu(x):
    return F.silu(F.layer_norm(x, x.shape[-1:], eps=1e-6))


class AudioTokenizer(nn.Module):
    """The network that turns speech features into audio tokens. tokens: number of audio tokens per latent frame that
    are computed from the features; one learned token is added.
    """

    def __init__(self, audio_dim, dim, tokens):
        super().__init__()
        self.tokens = tokens
        self.conv1_local = CausalConv1d(audio_dim, tokens * dim // 4, 1)
        self.conv1_global = CausalConv1d(audio_dim, dim // 4, 1)
        self.conv2, self.conv3 = CausalConv1d(dim // 4, dim // 2, 2), CausalConv1d(dim // 2, dim, 2)
        self.final_linear = nn.Linear(dim, dim)
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def downsample(self, x):
        """Return x (B,T,D/4), downsampled to (B,T/4 rounded up,D)."""
        return norm_silu(self.conv3(norm_silu(self.conv2(norm_silu(x)))))

    def forward(self, x):
        """Return (one vector per latent frame (B,T',D), K tokens per latent frame (B,T',K,D)) for speech features x
        (B,T,A).
        """
        local = self.conv1_local(x).unflatten(2, (self.tokens, -1)).transpose(1, 2)  # (B,K-1,T,D/4)
        local = self.downsample(local.flatten(0, 1)).unflatten(0, (-1, self.tokens)).transpose(1, 2)  # (B,T',K-1,D)
        padding = self.padding_tokens.expand(*local.shape[:2], 1, -1)
        return self.final_linear(self.downsample(self.conv1_global(x))), torch.cat([local, padding], 2)


class AudioEncoder(nn.Module):
    """A weighted mean over the speech encoder's hidden states, then an AudioTokenizer. Both are in fp32, whatever the
    model's dtype.
    """

    def __init__(self, audio_dim, dim, tokens):
        super().__init__()
        self.weights = nn.Parameter(torch.full((1, STATES, 1, 1), 0.01))
        self.encoder = AudioTokenizer(audio_dim, dim, tokens)

    def forward(self, features):
        """Return (vectors (B,T',D), tokens (B,T',K,D)), T' = T/4 rounded up, for the speech features (B,S,A,T) of T
        video frames.
        """
        weights = F.silu(self.weights)
        x = (features.float() * weights).sum(1) / weights.sum(1)  # (B,A,T)
        return self.encoder(x.transpose(1, 2))

    def encode_clip(self, features):
        """Return (vectors, tokens), as forward does, for the F/4 latent frames of a clip with F speech features. The
        convolutions also look at features before the clip. Copies of the clip's first feature stand in for these, even
        if there is a previous clip.
        """
        first = features[..., :1].expand(-1, -1, -1, MOTION_FRAMES)
        return [x[:, MOTION_LATENTS:] for x in self(torch.cat([first, features], -1))]


class AdaLayerNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim)


class Injection(NamedTuple):
    """The keys, values and modulation that one injector computes from a clip's sound."""

    keys_values: tuple  # two (B,T'K,N,d)
    weight: torch.Tensor  # (B,T',D) fp32: multiplies the injector's normed input, frame by frame
    shift: torch.Tensor  # (B,T',D) fp32: is added to the product


class AudioInjector(nn.Module):
    """All audio injectors. Each follows one block and lets noise tokens attend to the sound. count: their number."""

    def __init__(self, count, dim, heads, eps):
        super().__init__()
        self.injector = nn.ModuleList(CrossAttention(dim, heads, eps) for _ in range(count))
        self.injector_adain_layers = nn.ModuleList(AdaLayerNorm(dim) for _ in range(count))

    def embed(self, vectors, tokens):
        """Return one Injection per injector, given vectors (B,T',D) and tokens (B,T',K,D) from the AudioEncoder."""
        injections = []
        for attention, norm in zip(self.injector, self.injector_adain_layers):
            dtype = norm.linear.weight.dtype
            shift, scale = norm.linear(F.silu(vectors).to(dtype)).float().chunk(2, -1)
            kv = attention.keys_values(tokens.flatten(1, 2).to(dtype))
            injections.append(Injection(kv, 1 + scale, shift))
        return tuple(injections)

    def forward(self, i, x, injection, frame):
        """Add to each noise token of x (B,L,D), fp32, the output of that token's attention to the sound of its latent
        frame. i: index of the injector. frame: (L,) latent frame of each token. The keys are the audio tokens of the
        full clip; for each noise token, a mask hides the audio tokens of other latent frames. The mask costs almost no
        time, and allows x to be any subset of the clip's noise tokens.
        """
        (k, v), frames = injection.keys_values, injection.shift.shape[1]
        frame_of_key = torch.arange(frames, device=x.device).repeat_interleave(k.shape[1] // frames)
        bias = torch.zeros(len(frame), len(frame_of_key), device=x.device)
        bias = bias.masked_fill_(frame[:, None] != frame_of_key, -torch.inf)
        y = ops.modulate(x, injection.weight, injection.shift, 1e-5, k.dtype, frame)
        return ops.gate(x, self.injector[i](y, (k, v), bias[None, None]))


# ---- reference and motion tokens -------------------------------------------------------------------------------
def positions_of(times, rows, columns, device):
    """Return the positions (L,3) of the tokens of a grid, given the coordinates on its three axes. Columns vary
    fastest.
    """
    axes = [torch.tensor([*axis], dtype=torch.int32, device=device) for axis in (times, rows, columns)]
    return torch.cartesian_prod(*axes).view(-1, 3)


def spread(n, size):
    """Return n evenly spaced coordinates from 0 to size-1. As in the official code, they are truncated to integers: a
    coordinate of 58.99... becomes 58.
    """
    return np.linspace(0, size - 1, n).astype(int).tolist()


class FramePacker(nn.Module):
    """The network that turns the end of the previous clip into tokens: its last latent frame in patches of 1x2x2, the
    two latent frames before that one in patches of 2x4x4, and the 16 before those in patches of 4x8x8.
    """

    def __init__(self, channels, dim):
        super().__init__()
        self.proj = nn.Conv3d(channels, dim, (1, 2, 2), (1, 2, 2))
        self.proj_2x = nn.Conv3d(channels, dim, (2, 4, 4), (2, 4, 4))
        self.proj_4x = nn.Conv3d(channels, dim, (4, 8, 8), (4, 8, 8))

    def forward(self, motion):
        """Return (tokens, their positions (L,3)) for the latents before the clip, (B,C,f,h,w). The last 19 latent
        frames are used; if there are fewer, zeros are put before them.
        """
        (h, w), device = motion.shape[3:], motion.device
        motion = motion[:, :, -MOTION_LATENTS:]
        motion = F.pad(motion, (0, 0, 0, 0, MOTION_LATENTS - motion.shape[2], 0))
        far, middle, latest = motion.split((16, 2, 1), 2)
        convs = (self.proj, latest), (self.proj_2x, middle), (self.proj_4x, far)
        tokens = torch.cat([embed_patches(x, conv) for conv, x in convs], 1)
        H, W = h // 2, w // 2
        at = [
            positions_of([-1], range(H), range(W), device),
            positions_of([-3], spread(h // 4, H), spread(w // 4, W), device),
            positions_of([-19, -14, -9, -4], spread(h // 8, H), spread(w // 8, W), device),
        ]
        return tokens, torch.cat(at)


# ---- pictures and clips: the inputs in pixels --------------------------------------------------------------------
def fit_size(width, height, area):
    """Return the (width, height) px of the video for a reference picture of width x height px. Sides are multiples of
    64, the aspect ratio is about the picture's, and the area is at most `area` px. The picture is never enlarged,
    except to round its sides up to multiples of 64. Raises BadInput if a side would be under 64; the official code then
    returns a side of 0.
    """
    pixels, longest = width * height, 1.0
    shortest = 0.1
    if pixels > area:
        longest = math.sqrt(area / pixels)  # the scale if no side were rounded up
        b, c = 63 * (height + width), 63**2 - area  # both sides rounded up by 63; the official formula has 2ac, not 4ac
        shortest = (math.sqrt(b * b - 2 * pixels * c) - b) / (2 * pixels)
    for i in range(100):
        scale = longest - (longest - shortest) * i / 100
        h, w = (-(-int(side * scale) // 64) * 64 for side in (height, width))
        if h and w and w * h <= area:
            return w, h
    raise BadInput(f"--size of {area} px for a picture of {width}x{height}: a side would be under 64")


def scale_to_shorter(width, height, size):
    """Return the (width, height) px of a picture of width x height px after it is scaled so that its shorter side
    equals the shorter side of `size`.
    """
    short = min(size)
    return (short, int(short * height / width)) if width <= height else (int(short * width / height), short)


def crop_start(n, size):
    """Return where the middle `size` px of a side of n px begin. The result is negative if n is less than `size`."""
    return round((n - size) / 2) if n >= size else -((size - n) // 2)


def fit_picture(image, size):
    """Return a PIL image at `size` (width, height). The image is scaled (bilinear) so that its shorter side equals the
    shorter side of `size`, and then cropped to `size` around its centre. Where the scaled image is smaller than `size`,
    black bars are added.
    """
    from PIL import Image

    w, h = scale_to_shorter(*image.size, size)
    image = image if image.size == (w, h) else image.resize((w, h), Image.BILINEAR)
    left, top = crop_start(w, size[0]), crop_start(h, size[1])
    return image.crop((left, top, left + size[0], top + size[1]))


def fit_pose(frames, size):
    """Return frames (T,3,H,W) in [-1,1], fitted to `size` (width, height) as in fit_picture, but with grey bars."""
    w, h = scale_to_shorter(frames.shape[3], frames.shape[2], size)
    if frames.shape[2:] != (h, w):
        frames = F.interpolate(frames, (h, w), mode="bilinear", align_corners=False, antialias=True)
    left, top = crop_start(w, size[0]), crop_start(h, size[1])
    return F.pad(frames, (-left, left + size[0] - w, -top, top + size[1] - h))


def pose_step(fps):
    """Return the stride n at which frames of a pose video at `fps` are sampled for the 16 fps output. The motion keeps
    its speed only if fps is a multiple of 16.
    """
    return max(1, round(fps / VIDEO_RATE))


def pose_clip(frames, infer_frames):
    """Return the poses (1,3,1+F,H,W) that are encoded for a clip: a copy of the first frame, then `frames` (T,3,H,W), T
    <= F, then black frames. The caller drops the first latent frame. infer_frames: F.
    """
    frames = F.pad(frames, (0, 0, 0, 0, 0, 0, 0, infer_frames - len(frames)), value=-1.0)
    return torch.cat([frames[:1], frames]).transpose(0, 1)[None]


def first_motion(picture, start_from_picture=False):
    """Return the 73 frames (1,3,73,H,W) that stand in for a previous clip before the first clip. They are grey. If the
    clip is to start from the reference picture (1,3,1,H,W), the last 6 of them are this picture.
    """
    motion = torch.zeros_like(picture).repeat(1, 1, MOTION_FRAMES, 1, 1)
    if start_from_picture:
        motion[:, :, -6:] = picture
    return motion


def next_motion(last, video):
    """Return the last 73 frames (1,3,73,H,W) of a video that consists of `last` (1,3,73,H,W) and the new frames `video`
    (1,3,T,H,W).
    """
    return torch.cat([last, video], 2)[:, :, -MOTION_FRAMES:].clone()  # a view would keep all frames in memory


# ---- the model -------------------------------------------------------------------------------------------------
@dataclass
class S2VConfig(WanConfig):
    """A WanConfig with the sizes of the modules that only S2V has. audio_inject_layers: indices, in ascending order, of
    the blocks that are followed by an audio injector.
    """

    audio_dim: int = 1024
    num_audio_token: int = 4
    cond_dim: int = 16
    audio_inject_layers: tuple = INJECT_LAYERS


class Audio(NamedTuple):
    """The sound of a clip, ready for the blocks: one Injection per injector."""

    injections: tuple


class Reference(NamedTuple):
    """The clean tokens (B,M,D) of a reference picture and of the previous clip, their positions (M,3), and the height
    and width of the picture's latents.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    size: tuple


class Inputs(NamedTuple):
    reference: Reference
    audio: Audio
    pose: torch.Tensor | None


class WanS2V(Wan):
    """The DiT of Wan2.2-S2V-14B. In forward(x, t, context, context_lens=None, *, ref, audio, motion=None, pose=None),
    the arguments after * are those of embed_inputs. t: (B,).
    """

    config_class = S2VConfig

    def __init__(self, config):
        super().__init__(config)
        c = config
        self.cond_encoder = nn.Conv3d(c.cond_dim, c.dim, c.patch_size, c.patch_size)
        self.trainable_cond_mask = nn.Embedding(3, c.dim)
        self.frame_packer = FramePacker(c.in_dim, c.dim)
        self.casual_audio_encoder = AudioEncoder(c.audio_dim, c.dim, c.num_audio_token)
        self.audio_injector = AudioInjector(len(c.audio_inject_layers), c.dim, c.num_heads, c.eps)

    def embed_audio(self, audio):
        """Return the Audio of a clip's speech features (B,S,A,F), F a multiple of 4. For guidance's unconditional half,
        the caller passes features of 0.
        """
        if audio.shape[1:3] != (STATES, self.config.audio_dim) or audio.shape[3] % 4 or not audio.shape[3]:
            raise BadInput(
                f"speech features {tuple(audio.shape)}: should be (B,{STATES},{self.config.audio_dim},F), F frames of "
                "video, a multiple of 4"
            )
        return Audio(self.audio_injector.embed(*self.casual_audio_encoder.encode_clip(audio)))

    def embed_reference(self, ref, motion=None):
        """Return the Reference of a clip. ref: the reference picture's latents (B,C,1,h,w). motion: the latents before
        the clip, (B,C,<=19,h,w), or None for a first clip.
        """
        H, W = ref.shape[3] // 2, ref.shape[4] // 2
        tokens = [embed_patches(ref, self.patch_embedding) + self.mask(REFERENCE)]
        at = [positions_of([REFERENCE_TIME], range(H), range(W), ref.device)]
        if motion is not None:
            if min(motion.shape[3:]) < 8 or motion.shape[3:] != ref.shape[3:]:
                raise BadInput(
                    f"motion latents {tuple(motion.shape)}: should be as high and wide as ref's {tuple(ref.shape)}, "
                    "and 8 or more"
                )
            packed, packed_at = self.frame_packer(motion)
            tokens, at = [*tokens, packed + self.mask(MOTION)], [*at, packed_at]
        return Reference(torch.cat(tokens, 1), torch.cat(at), tuple(ref.shape[3:]))

    def mask(self, row):
        return self.trainable_cond_mask.weight[row].float()

    def prepare_inputs(self, **inputs):
        return dict(zip(("ref", "audio", "pose"), self.embed_inputs(**inputs)))

    # ---- wan.py's hooks ------------------------------------------------------------------------------------------
    def embed_inputs(self, *, ref, audio, motion=None, pose=None):
        """Return the embedded inputs. ref: the reference picture's latents (B,C,1,h,w), or the Reference that
        embed_reference made of ref and motion. motion: the latents before the clip (B,C,<=19,h,w), or None. audio:
        speech features (B,S,A,4T'), or the Audio that embed_audio made of them. pose: latents (B,C,T',h,w), or None.
        """
        ref = ref if isinstance(ref, Reference) else self.embed_reference(ref, motion)
        return Inputs(ref, audio if isinstance(audio, Audio) else self.embed_audio(audio), pose)

    def times(self, t):
        if t.dim() != 1:
            raise BadInput(f"t {tuple(t.shape)}: S2V takes one time for a clip, (B,)")
        return torch.stack([t, torch.zeros_like(t)], 1)

    def list_tokens(self, grid, device, inputs):
        n, frames, clean = math.prod(grid), inputs.audio.injections[0].shift.shape[1], inputs.reference.positions
        if frames != grid[0]:
            raise BadInput(f"sound for {frames} latent frames, noise of {grid[0]}")
        row = torch.arange(n + len(clean), device=device) >= n  # index into the two `times`: 0 for t, 1 for t = 0
        positions = torch.cat([grid_positions(grid, device), clean])
        return Tokens(positions, num_video=n, length=len(row), extent=max(*grid, REFERENCE_TIME + 1), row=row.int())

    def patchify(self, x, c):
        ref, _, pose = c.inputs
        want = (len(x), self.config.cond_dim, *x.shape[2:])
        if ref.size != x.shape[3:] or pose is not None and pose.shape != want:
            shape = None if pose is None else tuple(pose.shape)
            raise BadInput(
                f"x {tuple(x.shape)}, ref {ref.size[0]}x{ref.size[1]}, pose {shape}: ref should be as high and wide as "
                f"x, and pose None or {want}"
            )
        # without a pose, its latents are zeros, and each of their tokens equals the bias
        pose = self.cond_encoder.bias.float() if pose is None else embed_patches(pose, self.cond_encoder)
        return torch.cat([super().patchify(x, c) + self.mask(NOISE) + pose, ref.tokens], 1)

    def linear_name(self, block, target):
        if not target.startswith("audio_injector."):
            return super().linear_name(block, target)
        layers = self.config.audio_inject_layers
        leaf = target.partition(".")[2]
        return f"audio_injector.injector.{layers.index(block)}.{leaf}" if block in layers else None

    def cross_attentions(self):
        audio = zip(self.config.audio_inject_layers, self.audio_injector.injector)
        return sorted([*super().cross_attentions(), *((i, "audio_attn", a) for i, a in audio)], key=lambda row: row[0])

    def after_block(self, i, x, c):
        if i not in self.config.audio_inject_layers:
            return x
        j = self.config.audio_inject_layers.index(i)
        injection = c.inputs.audio.injections[j]
        # When ranks share a clip, a rank may hold no noise tokens. It then runs the injector on another token and
        # discards the result, so that all ranks have the same gradients to exchange.
        n = max(c.tokens.num_video, 1)
        frame = c.tokens.positions[:n, 0].clamp(0, injection.shift.shape[1] - 1)
        noise = self.audio_injector(j, x[:, :n], injection, frame)
        if not c.tokens.num_video:
            noise = x[:, :n] + 0 * noise
        return torch.cat([noise, x[:, n:]], 1)


def read_config(config, shape, entries, settings, path):
    """Return the S2VConfig of a model folder.

    config: the WanConfig read from its files. shape(name): returns a tensor's shape, or raises BadInput. entries:
    {name: Entry} of all tensors. settings: the contents of config.json, or {} if there is no such file. Raises
    BadInput, naming `path`, if the injectors do not fit the weights, or if a setting differs from that of the released
    weights.
    """
    dim = shape("patch_embedding.weight")[0]
    local, audio_dim, _ = shape("casual_audio_encoder.encoder.conv1_local.conv.weight")
    wrong = [f"{k} is {settings[k]!r}, should be {v!r}" for k, v in PUBLISHED.items() if settings.get(k, v) != v]
    if wrong:
        raise BadInput(f"{path}: not the released S2V model: {'; '.join(wrong)}")
    layers, blocks = list(settings.get("audio_inject_layers", INJECT_LAYERS)), count_blocks(entries)
    count = sum(re.fullmatch(r"audio_injector\.injector\.\d+\.q\.weight", name) is not None for name in entries)
    if len(layers) != count or layers != sorted({*layers} & {*range(blocks)}):
        raise BadInput(
            f"{path}: audio_inject_layers {layers} (the released ones, without a config.json): should name {count} "
            f"of the {blocks} blocks, ascending"
        )
    return S2VConfig(
        **vars(config),
        audio_dim=audio_dim,
        num_audio_token=local * 4 // dim,
        cond_dim=shape("cond_encoder.weight")[1],
        audio_inject_layers=tuple(layers),
    )
