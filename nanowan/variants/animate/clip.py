"""CLIP (open_clip's ViT-H/14 with XLM-RoBERTa-large): the pictures that Wan2.2-Animate is given, and a judge of clips.

B images, S side of the input image (224), P patch (14), L = 1 + (S/P)^2 tokens (257), D width (1280), d = D/16 head
width; of a text L tokens, D width (1024); E width of the space that images and texts share (1024).

Animate's DiT is given the state of all image tokens after every block but the last: `VisionEncoder` has neither that
block nor what follows it, and no textual tower. `CLIP` has both towers, for diag.py listen.
Source: official wan/modules/animate/clip.py, xlm_roberta.py and tokenizers.py, whose tensor names are kept; the class
token's norm and projection, which that file leaves out, are those of CLIP (Radford et al., 2021).
"""

import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import ops
from nanowan.errors import BadInput
from nanowan.formats.header import count_blocks
from nanowan.formats.layouts import find, read_headers
from nanowan.formats.load import load_into
from t5 import Tokenizer

HEADS = 16  # of both towers; stands in no tensor's shape
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training images, RGB
BOS, EOS, UNK = 0, 2, 3  # XLM-RoBERTa's token ids; 1 is padding
FIRST_POSITION = 2  # of a text's tokens: fairseq counts from the padding's id on
TOKENIZER = "xlm-roberta-large/sentencepiece.bpe.model"


# ---- images ------------------------------------------------------------------------------------------------------
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
    """layers: how many blocks there are; the released model has 32."""

    def __init__(self, dim, ffn_dim, layers, patch, tokens):
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, dim, patch, patch, bias=False)
        self.cls_embedding = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embedding = nn.Parameter(torch.zeros(1, tokens, dim))
        self.pre_norm = nn.LayerNorm(dim)
        self.transformer = nn.Sequential(*(Block(dim, ffn_dim) for _ in range(layers)))
        self.side = patch * math.isqrt(tokens - 1)

    def forward(self, x):
        """Normalised images (B,3,S,S) -> (B,L,D), the class token first."""
        x = self.patch_embedding(x).flatten(2).transpose(1, 2)  # (B,L-1,D)
        x = torch.cat([self.cls_embedding.expand(len(x), -1, -1), x], 1) + self.pos_embedding
        return self.transformer(self.pre_norm(x))

    def prepare(self, image, antialias):
        """(B,3,H,W) in [-1,1], any size, squeezed to the square S x S, its aspect not kept, and normalised."""
        size = self.side, self.side
        x = F.interpolate(image.float(), size, mode="bicubic", align_corners=False, antialias=antialias)
        mean, std = (torch.tensor(c, device=x.device).view(3, 1, 1) for c in (MEAN, STD))
        return ((x * 0.5 + 0.5 - mean) / std).to(self.pos_embedding.dtype)


class VisionEncoder(nn.Module):
    """What Animate's DiT is given of a picture."""

    def __init__(self, dim, ffn_dim, layers, patch, tokens):
        super().__init__()
        self.visual = VisionTransformer(dim, ffn_dim, layers, patch, tokens)

    @torch.no_grad()
    def encode(self, image):
        """(B,3,H,W) in [-1,1], any size -> tokens (B,L,D) fp32. The image is resized without antialiasing, as the DiT
        was trained.
        """
        return self.visual(self.visual.prepare(image, antialias=False)).float()


class ImageTower(VisionTransformer):
    """The whole tower: images -> their place in the space that texts share."""

    def __init__(self, dim, ffn_dim, layers, patch, tokens, out_dim):
        super().__init__(dim, ffn_dim, layers, patch, tokens)
        self.post_norm = nn.LayerNorm(dim)
        self.head = nn.Parameter(torch.zeros(dim, out_dim))

    def forward(self, x):
        """Normalised images (B,3,S,S) -> (B,E), from the class token."""
        return self.post_norm(super().forward(x)[:, 0]) @ self.head


# ---- texts -------------------------------------------------------------------------------------------------------
class XlmRobertaTokenizer:
    """Token ids as transformers' XLM-RoBERTa tokenizer gives them: the start, the pieces, the end; cut to `length` with
    the end kept. Ids are fairseq's, one above sentencepiece's. A special token that a text spells out is text here.

    model: the bytes of sentencepiece.bpe.model. Raises ValueError for other bytes.
    """

    def __init__(self, model, length=512):
        self.pieces, self.length = Tokenizer(model).pieces, length

    def __call__(self, text):
        """Ids (L,) int64 of one text."""
        ids = [i + 1 if i else UNK for i in self.pieces.encode(Tokenizer.clean(text))]
        return torch.tensor([BOS, *ids[: self.length - 2], EOS])


class TextAttention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x):
        q, k, v = (f(x).unflatten(2, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(ops.sdpa(q, k, v).transpose(1, 2).flatten(2))


class TextBlock(nn.Module):
    """Normed after each residual sum, as BERT is."""

    def __init__(self, dim, ffn_dim):
        super().__init__()
        self.attn = TextAttention(dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(), nn.Linear(ffn_dim, dim))

    def forward(self, x):
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.ffn(x))


class TextTower(nn.Module):
    """XLM-RoBERTa, the mean over its tokens, and a projection of two layers."""

    def __init__(self, vocab, positions, dim, ffn_dim, layers, out_dim):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab, dim)
        self.type_embedding = nn.Embedding(1, dim)  # BERT's kinds of sentences, of which there is one here
        self.pos_embedding = nn.Embedding(positions, dim)
        self.norm = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(TextBlock(dim, ffn_dim) for _ in range(layers))
        middle = (dim + out_dim) // 2
        self.head = nn.Sequential(nn.Linear(dim, middle, bias=False), nn.GELU(), nn.Linear(middle, out_dim, bias=False))

    def forward(self, ids):
        """ids (B,L) without padding -> (B,E)."""
        positions = torch.arange(FIRST_POSITION, FIRST_POSITION + ids.shape[1], device=ids.device)
        x = self.token_embedding(ids) + self.type_embedding.weight[0] + self.pos_embedding(positions)
        x = self.norm(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class CLIP(nn.Module):
    """Both towers. `tokenizer` is set when the model is loaded."""

    def __init__(self, visual, textual):
        super().__init__()
        self.visual, self.textual = visual, textual
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.tokenizer = None

    @torch.no_grad()
    def encode_images(self, images):
        """(B,3,H,W) in [-1,1], any size -> features (B,E) of norm 1."""
        x = self.visual.prepare(images.to(self.log_scale.device), antialias=True)
        return F.normalize(self.visual(x), dim=1)

    @torch.no_grad()
    def encode_texts(self, texts):
        """list of str -> features (B,E) of norm 1. One at a time, so no text is padded."""
        ids = [self.tokenizer(text)[None].to(self.log_scale.device) for text in texts]
        return F.normalize(torch.cat([self.textual(i) for i in ids]), dim=1)

    def probabilities(self, images, texts):
        """Features (B,E) and (A,E) -> (B,A): how likely each text is which belongs to an image, if one of them does."""
        return (self.log_scale.exp() * images @ texts.T).softmax(1)


# ---- files -------------------------------------------------------------------------------------------------------
def shape_of(entries, name, path):
    if name not in entries:
        raise BadInput(f"{path}: not CLIP's {name.split('.')[0]} tower, it has no {name}")
    return entries[name].shape


def vision_sizes(entries, path):
    """The arguments of VisionTransformer, but for `layers`, by the headers of its tensors."""
    (dim, _, patch, _), (_, tokens, _), (ffn_dim, _) = (
        shape_of(entries, f"visual.{name}", path)
        for name in ("patch_embedding.weight", "pos_embedding", "transformer.0.mlp.0.weight")
    )
    if dim % HEADS or math.isqrt(tokens - 1) ** 2 != tokens - 1:
        raise BadInput(
            f"{path}: width {dim} and {tokens} positions; the width should be a multiple of {HEADS}, the positions a "
            "square and one"
        )
    return dict(dim=dim, ffn_dim=ffn_dim, patch=patch, tokens=tokens)


def last_block(entries):
    """The highest N of the tensors named visual.transformer.N, 0 if there are none."""
    return max((int(n.split(".")[2]) for n in entries if n.startswith("visual.transformer.")), default=0)


def read_clip(path):
    """(file, {name: Entry}) of models_clip_open-clip-xlm-roberta-large-vit-huge-14 (.pth or .safetensors): the file, or
    the one in a checkpoint folder.
    """
    what = "CLIP (models_clip_open-clip-xlm-roberta-large-vit-huge-14, .pth or .safetensors)"
    file = find(path, "models_clip*", what)
    return file, read_headers([file])


def load_vision(path, device="cpu", dtype=torch.float32):
    """The VisionEncoder of a file or folder. Frozen, in eval mode. Raises BadInput listing what does not fit in the
    visual half.
    """
    file, entries = read_clip(path)
    unused = ("textual.", "log_scale", "visual.post_norm.", "visual.head", f"visual.transformer.{last_block(entries)}.")
    with torch.device("meta"):
        model = VisionEncoder(**vision_sizes(entries, file), layers=last_block(entries))
    return load_into(model, {n: e for n, e in entries.items() if not n.startswith(unused)}, device, dtype)


def load_clip(path, device="cpu", dtype=torch.float32):
    """CLIP, both towers, with its tokenizer (xlm-roberta-large/sentencepiece.bpe.model, or that file beside the
    weights). Frozen, in eval mode; on the meta device nothing but headers and the tokenizer is read. Raises BadInput.
    """
    file, entries = read_clip(path)
    candidates = [file.parent / TOKENIZER, file.parent / Path(TOKENIZER).name]
    tokenizer = next((f for f in candidates if f.is_file()), None)
    if tokenizer is None:
        raise BadInput(f"{candidates[0]}: no such file; CLIP's texts need this tokenizer")

    def size(name):
        return shape_of(entries, f"textual.{name}", file)

    (vocab, dim), (positions, _) = size("token_embedding.weight"), size("pos_embedding.weight")
    ffn_dim, out_dim = size("blocks.0.ffn.0.weight")[0], size("head.2.weight")[0]
    blocks = count_blocks(n.removeprefix("textual.") for n in entries)
    with torch.device("meta"):
        visual = ImageTower(**vision_sizes(entries, file), layers=1 + last_block(entries), out_dim=out_dim)
        model = CLIP(visual, TextTower(vocab, positions, dim, ffn_dim, blocks, out_dim))
    model = load_into(model, entries, device, dtype)
    try:
        model.tokenizer = XlmRobertaTokenizer(tokenizer.read_bytes(), positions - FIRST_POSITION)
    except ValueError as e:
        raise BadInput(f"{tokenizer}: {e}") from None
    return model
