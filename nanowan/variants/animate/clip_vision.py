"""CLIP's visual tower (ViT-H/14 of open_clip's XLM-RoBERTa model), as far as Wan2.2-Animate uses it.

B images, S side of the input image (224), P patch (14), L = 1 + (S/P)^2 tokens (257), D width (1280), d = D/16 head
width. The DiT is given the state of all tokens after every block but the last: neither that block nor the norm and the
projection behind it are built, and the textual tower in the same file is never read.
Source: official wan/modules/animate/clip.py, whose tensor names are kept.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import ops
from nanowan.errors import BadInput
from nanowan.formats.layouts import find, read_headers
from nanowan.formats.load import load_into

HEADS = 16  # stands in no tensor's shape
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training images, RGB


class Attention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.to_qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # 3 x (B,16,L,d)
        return self.proj(ops.sdpa(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim, ffn_dim):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(), nn.Linear(ffn_dim, dim))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """layers: how many blocks are run, one less than the released model has."""

    def __init__(self, dim, ffn_dim, layers, patch, tokens):
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, dim, patch, patch, bias=False)
        self.cls_embedding = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embedding = nn.Parameter(torch.zeros(1, tokens, dim))
        self.pre_norm = nn.LayerNorm(dim)
        self.transformer = nn.Sequential(*(Block(dim, ffn_dim) for _ in range(layers)))

    def forward(self, x):
        """Normalised images (B,3,S,S) -> (B,L,D), the class token first."""
        x = self.patch_embedding(x).flatten(2).transpose(1, 2)  # (B,L-1,D)
        x = torch.cat([self.cls_embedding.expand(len(x), -1, -1), x], 1) + self.pos_embedding
        return self.transformer(self.pre_norm(x))


class CLIP(nn.Module):
    def __init__(self, dim, ffn_dim, layers, patch, tokens):
        super().__init__()
        self.visual = VisionTransformer(dim, ffn_dim, layers, patch, tokens)
        self.side = patch * math.isqrt(tokens - 1)

    @torch.no_grad()
    def encode(self, image):
        """(B,3,H,W) in [-1,1], any size -> tokens (B,L,D) fp32. The image is resized to the square S x S without
        antialiasing, its aspect not kept, as the DiT was trained.
        """
        x = F.interpolate(image.float(), (self.side, self.side), mode="bicubic", align_corners=False)
        mean, std = (torch.tensor(c, device=x.device).view(3, 1, 1) for c in (MEAN, STD))
        x = (x * 0.5 + 0.5 - mean) / std
        return self.visual(x.to(self.visual.pos_embedding.dtype)).float()


def build_clip(entries, path):
    """The tower whose tensors' headers these are, without its last block."""

    def shape(name):
        if (name := f"visual.{name}") not in entries:
            raise BadInput(f"{path}: not CLIP's visual tower, it has no {name}")
        return entries[name].shape

    (dim, _, patch, _), (_, tokens, _) = shape("patch_embedding.weight"), shape("pos_embedding")
    if dim % HEADS or math.isqrt(tokens - 1) ** 2 != tokens - 1:
        raise BadInput(
            f"{path}: width {dim} and {tokens} positions; the width should be a multiple of {HEADS}, the positions a "
            "square and one"
        )
    return CLIP(dim, shape("transformer.0.mlp.0.weight")[0], last_block(entries), patch, tokens)


def last_block(entries):
    """The highest N of the tensors named visual.transformer.N, 0 if there are none."""
    return max((int(n.split(".")[2]) for n in entries if n.startswith("visual.transformer.")), default=0)


def load_clip(path, device="cpu", dtype=torch.float32):
    """Load models_clip_open-clip-xlm-roberta-large-vit-huge-14 (.pth or .safetensors), from the file or the checkpoint
    folder that holds it. Frozen, in eval mode. Raises BadInput listing what does not fit in the visual half.
    """
    file = find(
        path, "models_clip*", "CLIP (models_clip_open-clip-xlm-roberta-large-vit-huge-14, .pth or .safetensors)"
    )
    entries = read_headers([file])
    unused = ("textual.", "log_scale", "visual.post_norm.", "visual.head", f"visual.transformer.{last_block(entries)}.")
    with torch.device("meta"):
        model = build_clip(entries, file)
    return load_into(model, {n: e for n, e in entries.items() if not n.startswith(unused)}, device, dtype)
