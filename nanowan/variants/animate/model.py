"""WanAnimate, the DiT of Wan2.2-Animate-14B: it also takes a character's picture, and poses and faces to follow.

Letters are those of wan.py, and  F frames of the driving video (4k+1)   T' latent frames of the DiT (1 reference + k+1)
S side of the face crops (512)   W width of a motion vector (512)   J face tokens per latent frame (5)   n image tokens

The reference picture is latent frame 0. Pose latents are embedded and added to the tokens of the later latent frames.
In every cross-attention, a second softmax attends to CLIP's tokens of the picture. The face crops become one motion
vector per frame, and the motion vectors become J tokens per latent frame. After blocks 0, 5, 10, ... an adapter lets
each token attend to the face tokens of its own latent frame. None of these inputs depends on t, so encode_motion,
embed_motion and embed_image compute them once per clip.
Source: official wan/modules/animate/{model_animate,face_blocks,motion_encoder}.py, whose tensor names are kept.
"""

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import ops
from nanowan.errors import BadInput
from wan import Block, CrossAttention, Text, Wan, WanConfig, embed_patches

EVERY = 5  # a face adapter follows every block whose index is a multiple of this
MOTION_PREFIX = "motion_encoder."


# ---- motion encoder: one face crop -> one vector -------------------------------------------------------------
class EqualConv2d(nn.Conv2d):
    """A convolution whose stored weight is divided by sqrt(fan-in) in each forward pass."""

    def forward(self, x):
        weight = self.weight * self.weight[0].numel() ** -0.5
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class EqualLinear(nn.Linear):
    """A linear layer whose stored weight is divided by sqrt(fan-in) in each forward pass."""

    def forward(self, x):
        return F.linear(x, self.weight * self.in_features**-0.5, self.bias)


class BiasedLeakyReLU(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x):
        return F.leaky_relu(x + self.bias, 0.2) * math.sqrt(2)


class Blur(nn.Module):
    """A convolution of each channel, zero-padded, with [1 3 3 1] x [1 3 3 1] / 64. Released files store this constant
    kernel as a buffer, which is not read.
    """

    def __init__(self, padding, stride=1):
        super().__init__()
        self.padding, self.stride = padding, stride

    def forward(self, x):
        row = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype, device=x.device)
        kernel = (row[:, None] * row / 64).expand(x.shape[1], 1, 4, 4)
        return F.conv2d(x, kernel, None, self.stride, self.padding, groups=x.shape[1])


class ResidualBlock(nn.Module):
    """A residual block that halves the height and width of the feature map."""

    def __init__(self, cin, cout):
        super().__init__()
        self.conv1 = nn.Sequential(EqualConv2d(cin, cin, 3, padding=1, bias=False), BiasedLeakyReLU(cin))
        self.conv2 = nn.Sequential(Blur(2), EqualConv2d(cin, cout, 3, stride=2, bias=False), BiasedLeakyReLU(cout))
        self.skip = nn.Sequential(Blur(1, stride=2), EqualConv2d(cin, cout, 1, bias=False))

    def forward(self, x):
        return (self.conv2(self.conv1(x)) + self.skip(x)) / math.sqrt(2)


class Direction(nn.Module):
    """The 20 directions (W,20) whose weighted sum is a motion vector."""

    def __init__(self, dim, directions):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim, directions))

    def forward(self, alpha):
        """Return motion vectors (B,W) for the weights alpha (B,20). The directions are orthonormalised by a QR
        decomposition with Householder reflections. The signs that this method gives are part of the model; other
        methods flip some of them. The QR runs on the CPU, so that the result is the same on every device.
        """
        q = torch.linalg.qr(self.weight.float().cpu() + 1e-8).Q
        return alpha @ q.T.to(alpha)


class MotionEncoder(nn.Module):
    """The network that turns a face crop into a motion vector. channels: widths of the feature maps, first at full
    size, then each at half the size of the previous one. style: width of the vector that the convolutions produce.
    """

    def __init__(self, channels, style, linears, dim, directions):
        super().__init__()
        first = nn.Sequential(EqualConv2d(3, channels[0], 1, bias=False), BiasedLeakyReLU(channels[0]))
        halve = [ResidualBlock(*pair) for pair in zip(channels, channels[1:])]
        convs = nn.Sequential(first, *halve, EqualConv2d(channels[-1], style, 4, bias=False))
        widths = [style] * linears + [directions]
        fc = nn.Sequential(*(EqualLinear(*pair) for pair in zip(widths, widths[1:])))  # no activation between them
        self.enc = nn.ModuleDict({"net_app": nn.ModuleDict({"convs": convs}), "fc": fc})
        self.dec = nn.ModuleDict({"direction": Direction(dim, directions)})
        self.side = 4 * 2 ** len(halve)

    def encode_clip(self, face):
        """Return motion vectors (B,F,W) for face crops (B,3,F,S,S) in [-1,1]. Raises BadInput if the crops' side is not
        the one that the encoder takes.
        """
        B, C, frames, *sides = face.shape
        if C != 3 or frames % 4 != 1 or sides != [self.side] * 2:
            raise BadInput(f"face crops {tuple(face.shape)}: this model takes (B,3,4k+1,S,S) with S = {self.side}")
        crops = face.transpose(1, 2).flatten(0, 1).split(8)  # a few crops at a time, since their feature maps are large
        return torch.cat([self(part) for part in crops]).unflatten(0, (B, frames))

    def forward(self, face):
        """Return motion vectors (B,W), one for each of the face crops (B,3,S,S) in [-1,1]."""
        maps = self.enc.net_app.convs(face.to(self.dec.direction.weight.dtype))  # (B,style,1,1)
        return self.dec.direction(self.enc.fc(maps.flatten(1)))


# ---- face encoder and adapters -------------------------------------------------------------------------------
class CausalConv1d(nn.Module):
    """A convolution over time whose output for a frame depends on that frame and the two before it. Copies of the first
    frame are used in place of the missing frames before it.
    """

    def __init__(self, cin, cout, stride):
        super().__init__()
        self.conv = nn.Conv1d(cin, cout, 3, stride)

    def forward(self, x):
        """Return the convolution (B,F/stride rounded up,C') of x (B,F,C)."""
        return self.conv(F.pad(x.transpose(1, 2), (2, 0), mode="replicate")).transpose(1, 2)


def norm_silu(x):
    """Return SiLU(LayerNorm(x)), computed in fp32 and returned in the dtype of x. The norm is over the last axis and
    has no weights.
    """
    return F.silu(F.layer_norm(x.float(), x.shape[-1:], eps=1e-6)).to(x.dtype)


class FaceEncoder(nn.Module):
    """The network that turns motion vectors into face tokens. motion: width W of a motion vector. heads: number of
    heads. Each head gives one face token per latent frame; one learned token is added to these. hidden: width of each
    head.
    """

    def __init__(self, motion, hidden, heads, dim):
        super().__init__()
        self.heads = heads
        self.conv1_local = CausalConv1d(motion, hidden * heads, 1)
        self.conv2, self.conv3 = CausalConv1d(hidden, hidden, 2), CausalConv1d(hidden, hidden, 2)
        self.out_proj = nn.Linear(hidden, dim)
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, motion):
        """Return face tokens (B,k+1,J,D) for motion vectors (B,F,W), F = 4k+1. J = heads + 1, because a learned token
        is added.
        """
        x = self.conv1_local(motion.to(self.out_proj.weight.dtype))  # (B,F,heads*hidden)
        x = x.unflatten(2, (self.heads, -1)).transpose(1, 2).flatten(0, 1)  # heads in the batch: (B*heads,F,hidden)
        x = norm_silu(self.conv2(norm_silu(x)))
        x = self.out_proj(norm_silu(self.conv3(x)))  # (B*heads,k+1,D)
        x = x.unflatten(0, (-1, self.heads)).transpose(1, 2)  # (B,k+1,heads,D)
        return torch.cat([x, self.padding_tokens.expand(*x.shape[:2], -1, -1)], 2)


class FaceAdapter(nn.Module):
    """An attention from the video tokens of each latent frame to the face tokens of the same latent frame."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.linear1_kv, self.linear1_q, self.linear2 = (
            ops.Linear(dim, 2 * dim),
            ops.Linear(dim, dim),
            ops.Linear(dim, dim),
        )
        self.q_norm, self.k_norm = (nn.RMSNorm(dim // heads, eps=1e-6) for _ in range(2))  # norms over one head's width

    def split(self, x, norm):
        """Return x (...,D) split into heads (...,N,d), each of which is normalised in fp32. The result has the dtype of
        x.
        """
        x = x.unflatten(-1, (self.heads, -1))
        return F.rms_norm(x.float(), x.shape[-1:], norm.weight.float(), norm.eps).to(x.dtype)

    def keys_values(self, face):
        """Return the keys and values (B,T',J,N,d) of face tokens (B,T',J,D)."""
        face = F.layer_norm(face.float(), face.shape[-1:], eps=1e-6).to(self.linear2.weight.dtype)
        k, v = self.linear1_kv(face).chunk(2, -1)
        return self.split(k, self.k_norm), v.unflatten(-1, (self.heads, -1))

    def forward(self, x, keys_values, frame):
        """Return the output (B,L,D) of the attention, which the caller adds to the tokens x (B,L,D), fp32. frame: (L,)
        latent frame of each token.
        """
        k, v = keys_values
        q = self.linear1_q(F.layer_norm(x, x.shape[-1:], eps=1e-6).to(v.dtype))
        other = frame[:, None] != torch.arange(k.shape[1], device=x.device).repeat_interleave(k.shape[2])  # (L,T'J)
        bias = torch.zeros(other.shape, dtype=v.dtype, device=x.device).masked_fill(other, -torch.inf)[None, None]
        return self.linear2(ops.attention(self.split(q, self.q_norm), k.flatten(1, 2), v.flatten(1, 2), bias))


class ImageEmbedding(nn.Module):
    """An MLP that maps CLIP's tokens (B,n,C) to the DiT's width (B,n,D)."""

    def __init__(self, clip, dim):
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(clip), nn.Linear(clip, clip), nn.GELU(), nn.Linear(clip, dim), nn.LayerNorm(dim)
        )

    def forward(self, clip):
        norm1, up, gelu, down, norm2 = self.proj
        dtype = up.weight.dtype
        return norm2(down(gelu(up(norm1(clip.float()).to(dtype)))).float()).to(dtype)


# ---- the DiT -------------------------------------------------------------------------------------------------
@dataclass
class AnimateConfig(WanConfig):
    """A WanConfig with the sizes of the modules that only Animate has."""

    clip_dim: int = 1280
    motion_channels: tuple = (32, 64, 128, 256, 512, 512, 512, 512)
    motion_style: int = 512
    motion_linears: int = 5
    motion_dim: int = 512
    motion_directions: int = 20
    face_hidden: int = 1024
    face_heads: int = 4

    @property
    def face_side(self):
        """The side, in px, of the face crops that the motion encoder takes."""
        return 4 * 2 ** (len(self.motion_channels) - 1)


class Context(NamedTuple):
    """The tokens to which a block's cross-attention attends: embedded text (B,S,D) and image tokens (B,n,D)."""

    text: torch.Tensor
    image: torch.Tensor

    @property
    def dtype(self):
        return self.text.dtype


class Image(NamedTuple):
    """An embedded picture, ready for the blocks: its tokens (B,n,D), and for each block the keys and values of these
    tokens, or None if the block is to compute them.
    """

    tokens: torch.Tensor
    keys_values: tuple


class Face(NamedTuple):
    """The embedded faces of a clip, ready for the adapters: face tokens (B,T',J,D), and for each adapter the keys and
    values of these tokens, or None if the adapter is to compute them.
    """

    tokens: torch.Tensor
    keys_values: tuple


class Inputs(NamedTuple):
    """The embedded inputs that WanAnimate takes in addition to those of Wan."""

    pose: torch.Tensor
    face: Face
    image: Image


class ImageCrossAttention(CrossAttention):
    """Attention to the text and, with a separate softmax, to the image. Both share q and the output projection o."""

    def __init__(self, dim, heads, eps):
        super().__init__(dim, heads, eps)
        self.k_img, self.v_img = ops.Linear(dim, dim), ops.Linear(dim, dim)
        self.norm_k_img = nn.RMSNorm(dim)

    def image_keys_values(self, image):
        """Return the keys and values (B,n,N,d) of embedded image tokens (B,n,D)."""
        (k,) = ops.qk_norm_rope([self.k_img(image)], [self.norm_k_img.weight], self.eps, self.heads)
        return k, self.v_img(image).unflatten(2, (self.heads, -1))

    def keys_values(self, context):
        """Return (k, v) of an embedded text (B,S,D), or (k, v, k_img, v_img) of a Context, that is, of its text and its
        image.
        """
        if isinstance(context, Context):
            return *super().keys_values(context.text), *self.image_keys_values(context.image)
        return super().keys_values(context)

    def forward(self, x, kv, bias):
        k, v, k_img, v_img = kv
        (q,) = ops.qk_norm_rope([self.q(x)], [self.norm_q.weight], self.eps, self.heads)
        return self.o(ops.attention(q, k, v, bias) + ops.attention(q, k_img, v_img))


class ImageBlock(Block):
    cross_attention = ImageCrossAttention


class ImageWan(Wan):
    """A Wan whose cross-attention also attends to a picture. The method embed_inputs of a subclass returns an object
    with the embedded picture in its field `image`.
    """

    block_class = ImageBlock

    def __init__(self, config):
        super().__init__(config)
        self.img_emb = ImageEmbedding(config.clip_dim, config.dim)

    def embed_image(self, clip, cache=False):
        """Return the Image of a picture. clip: CLIP's tokens (B,n,C) of the picture, or an Image, which is returned
        unchanged. cache: whether to compute every block's keys and values too.
        """
        if isinstance(clip, Image):
            return clip
        tokens = self.img_emb(clip)
        if not (cache and self.cache_text_kv):
            return Image(tokens, (None,) * len(self.blocks))
        return Image(tokens, tuple(block.cross_attn.image_keys_values(tokens) for block in self.blocks))

    def join_text(self, text, inputs):
        image = inputs.image
        kv = tuple(a and b and (*a, *b) for a, b in zip(text.keys_values, image.keys_values))
        return Text(Context(text.context, image.tokens), text.bias, kv)


class WanAnimate(ImageWan):
    """The DiT of Wan2.2-Animate-14B. In forward(x, t, context, context_lens=None, *, pose, face, clip), pose, face and
    clip are the arguments of embed_inputs. x (B,36,T',h,w) is the noise followed by the y of inputs.ClipInputs. The
    returned velocity includes the reference's latent frame.
    """

    config_class = AnimateConfig

    def __init__(self, config):
        super().__init__(config)
        c = config
        self.pose_patch_embedding = nn.Conv3d(c.out_dim, c.dim, c.patch_size, c.patch_size)
        self.motion_encoder = MotionEncoder(
            c.motion_channels, c.motion_style, c.motion_linears, c.motion_dim, c.motion_directions
        )
        self.face_encoder = FaceEncoder(c.motion_dim, c.face_hidden, c.face_heads, c.dim)
        adapters = (FaceAdapter(c.dim, c.num_heads) for _ in range(0, c.num_layers, EVERY))
        self.face_adapter = nn.ModuleDict({"fuser_blocks": nn.ModuleList(adapters)})

    def encode_motion(self, face):
        """Return motion vectors (B,F,W). face: crops (B,3,F,S,S) in [-1,1], or motion vectors, which are returned
        unchanged. Raises BadInput if the side of the crops is not the one that the motion encoder takes.
        """
        return face if face.dim() == 3 else self.motion_encoder.encode_clip(face)

    def embed_motion(self, motion, cache=False):
        """Return the Face for motion vectors (B,F,W), F = 4k+1. It has T' = k+2 latent frames, the first one for the
        reference. cache: whether to compute every adapter's keys and values too.
        """
        # the reference gets face tokens of zeros, and attends to them
        tokens = F.pad(self.face_encoder(motion), (0, 0, 0, 0, 1, 0))
        adapters = self.face_adapter.fuser_blocks
        kv = (a.keys_values(tokens) for a in adapters) if cache and self.cache_text_kv else (None,) * len(adapters)
        return Face(tokens, tuple(kv))

    def prepare_inputs(self, *, pose, face, clip):
        face = face if isinstance(face, Face) else self.embed_motion(self.encode_motion(face), cache=True)
        return {"pose": pose, "face": face, "clip": self.embed_image(clip, cache=True)}

    # ---- wan.py's hooks ------------------------------------------------------------------------------------------
    def embed_inputs(self, *, pose, face, clip):
        """Return the embedded Inputs. pose: latents (B,Cz,T'-1,h,w). face: crops (B,3,4T'-7,S,S) in [-1,1], the motion
        vectors of such crops, or a Face. clip: CLIP's tokens (B,n,C) of the reference picture, or an Image. T' includes
        the reference, which is latent frame 0 of x.
        """
        face = face if isinstance(face, Face) else self.embed_motion(self.encode_motion(face))
        image = self.embed_image(clip)
        frames = face.tokens.shape[1]
        if pose.shape[1:3] != (self.pose_patch_embedding.in_channels, frames - 1):
            raise BadInput(
                f"pose {tuple(pose.shape)} and face crops for {frames} latent frames: pose should be "
                f"(B,{self.pose_patch_embedding.in_channels},T'-1,h,w), and the face crops 4T'-7"
            )
        return Inputs(pose, face, image)

    def patchify(self, x, c):
        pose, want = c.inputs.pose, (len(x), x.shape[2] - 1, *x.shape[3:])
        if (len(pose), *pose.shape[2:]) != want:
            raise BadInput(f"pose {tuple(pose.shape)}: should be {(len(x), pose.shape[1], *want[1:])} for this x")
        tokens, pose = super().patchify(x, c), embed_patches(pose, self.pose_patch_embedding)
        tokens[:, -pose.shape[1] :] += pose  # added to all tokens except the reference's
        return tokens

    def after_block(self, i, x, c):
        if i % EVERY:
            return x
        adapter, face = self.face_adapter.fuser_blocks[i // EVERY], c.inputs.face
        kv = face.keys_values[i // EVERY] or adapter.keys_values(face.tokens)
        return x + adapter(x, kv, c.tokens.positions[:, 0])


def motion_sizes(shape, entries):
    """Return {field of AnimateConfig: value} for the motion encoder in a DiT. shape(name): returns the shape of a
    tensor. entries: the headers {name: Entry} of the DiT's tensors.
    """
    convs = "motion_encoder.enc.net_app.convs"
    halvings = sum(name.startswith(convs) and name.endswith(".conv2.1.weight") for name in entries)
    channels = [f"{convs}.0.0.weight", *(f"{convs}.{i + 1}.conv2.1.weight" for i in range(halvings))]
    dim, directions = shape("motion_encoder.dec.direction.weight")
    return dict(
        motion_channels=tuple(shape(name)[0] for name in channels),
        motion_style=shape(f"{convs}.{halvings + 1}.weight")[0],
        motion_linears=sum(bool(re.fullmatch(r"motion_encoder\.enc\.fc\.\d+\.weight", name)) for name in entries),
        motion_dim=dim,
        motion_directions=directions,
    )


def read_config(config, shape, entries, settings, path):
    """Return the AnimateConfig of a model folder. For the arguments, see read_config in
    nanowan/variants/s2v/model.py.
    """
    hidden = shape("face_encoder.conv2.conv.weight")[1]
    return AnimateConfig(
        **vars(config),
        **motion_sizes(shape, entries),
        clip_dim=shape("img_emb.proj.0.weight")[0],
        face_hidden=hidden,
        face_heads=shape("face_encoder.conv1_local.conv.weight")[0] // hidden,
    )
