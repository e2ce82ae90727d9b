"""CLIP (open_clip's ViT-H/14 with XLM-RoBERTa-large): it encodes Animate's pictures and scores clips against texts.

Images: B images, S side of the input image (224), P patch (14), L = 1 + (S/P)^2 tokens (257), D width (1280), d = D/16
head width. Texts: L tokens, D width (1024). E width of the space that images and texts share (1024).

Animate's DiT gets the image tokens that enter CLIP's last block, so `VisionEncoder` leaves out that block, everything
after it, and the textual tower. `CLIP` has both complete towers; diag.py listen uses it.
Source: official wan/modules/animate/clip.py, xlm_roberta.py and tokenizers.py, whose tensor names are kept. The class
token's norm and projection, which the official clip.py leaves out, follow CLIP (Radford et al., 2021).
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

HEADS = 16  # in both towers; no tensor's shape tells this number
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training images, RGB
BOS, EOS, UNK = 0, 2, 3  # XLM-RoBERTa's token ids; 1 is padding
FIRST_POSITION = 2  # position of a text's first token: fairseq's positions start after the padding's id
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
    """A vision transformer (ViT) without its output head. layers: number of blocks; the released model has 32."""

    def __init__(self, dim, ffn_dim, layers, patch, tokens):
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, dim, patch, patch, bias=False)
        self.cls_embedding = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embedding = nn.Parameter(torch.zeros(1, tokens, dim))
        self.pre_norm = nn.LayerNorm(dim)
        self.transformer = nn.Sequential(*(Block(dim, ffn_dim) for _ in range(layers)))
        self.side = patch * math.isqrt(tokens - 1)

    def forward(self, x):
        """Return the tokens (B,L,D) of normalised images (B,3,S,S). The class token comes first."""
        x = self.patch_embedding(x).flatten(2).transpose(1, 2)  # (B,L-1,D)
        x = torch.cat([self.cls_embedding.expand(len(x), -1, -1), x], 1) + self.pos_embedding
        return self.transformer(self.pre_norm(x))

    def prepare(self, image, antialias):
        """Return images (B,3,H,W) in [-1,1] of any size, resized to S x S without keeping the aspect ratio, and
        normalised.
        """
        size = self.side, self.side
        x = F.interpolate(image.float(), size, mode="bicubic", align_corners=False, antialias=antialias)
        mean, std = (torch.tensor(c, device=x.device).view(3, 1, 1) for c in (MEAN, STD))
        return ((x * 0.5 + 0.5 - mean) / std).to(self.pos_embedding.dtype)


class VisionEncoder(nn.Module):
    """The part of CLIP that encodes a picture for Animate's DiT."""

    def __init__(self, dim, ffn_dim, layers, patch, tokens):
        super().__init__()
        self.visual = VisionTransformer(dim, ffn_dim, layers, patch, tokens)

    @torch.no_grad()
    def encode(self, image):
        """Return the tokens (B,L,D), fp32, of images (B,3,H,W) in [-1,1] of any size. Images are resized without
        antialiasing, as in the DiT's training.
        """
        return self.visual(self.visual.prepare(image, antialias=False)).float()


class ImageTower(VisionTransformer):
    """CLIP's complete image tower, which maps images into the space that they share with texts."""

    def __init__(self, dim, ffn_dim, layers, patch, tokens, out_dim):
        super().__init__(dim, ffn_dim, layers, patch, tokens)
        self.post_norm = nn.LayerNorm(dim)
        self.head = nn.Parameter(torch.zeros(dim, out_dim))

    def forward(self, x):
        """Return the features (B,E) of normalised images (B,3,S,S). The features are computed from the class token."""
        return self.post_norm(super().forward(x)[:, 0]) @ self.head


# ---- texts -------------------------------------------------------------------------------------------------------
class XlmRobertaTokenizer:
    """A tokenizer that gives the token ids of transformers' XLM-RoBERTa tokenizer: the start token, the pieces, the end
    token. The id of a piece is one above its id in sentencepiece.bpe.model. A text is cut off after `length` ids, but
    keeps its end token. Unlike in transformers, the name of a special token, such as </s>, is tokenized like other
    text.

    model: the bytes of sentencepiece.bpe.model. Raises ValueError if they are not a sentencepiece model.
    """

    def __init__(self, model, length=512):
        self.pieces, self.length = Tokenizer(model).pieces, length

    def __call__(self, text):
        """Return the ids (L,) int64 of one text."""
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
    """A transformer block that normalises the sum after each residual connection, as in BERT."""

    def __init__(self, dim, ffn_dim):
        super().__init__()
        self.attn = TextAttention(dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(), nn.Linear(ffn_dim, dim))

    def forward(self, x):
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.ffn(x))


class TextTower(nn.Module):
    """XLM-RoBERTa, followed by the mean over the tokens and a projection of two layers."""

    def __init__(self, vocab, positions, dim, ffn_dim, layers, out_dim):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab, dim)
        self.type_embedding = nn.Embedding(1, dim)  # BERT has several sentence types, XLM-RoBERTa one
        self.pos_embedding = nn.Embedding(positions, dim)
        self.norm = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(TextBlock(dim, ffn_dim) for _ in range(layers))
        middle = (dim + out_dim) // 2
        self.head = nn.Sequential(nn.Linear(dim, middle, bias=False), nn.GELU(), nn.Linear(middle, out_dim, bias=False))

    def forward(self, ids):
        """Return the features (B,E) of token ids (B,L) without padding."""
        positions = torch.arange(FIRST_POSITION, FIRST_POSITION + ids.shape[1], device=ids.device)
        x = self.token_embedding(ids) + self.type_embedding.weight[0] + self.pos_embedding(positions)
        x = self.norm(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class CLIP(nn.Module):
    """CLIP with its image and text towers. `tokenizer`, which encode_texts needs, is None until load_clip sets it."""

    def __init__(self, visual, textual):
        super().__init__()
        self.visual, self.textual = visual, textual
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.tokenizer = None

    @torch.no_grad()
    def encode_images(self, images):
        """Return features (B,E) of norm 1 for images (B,3,H,W) in [-1,1] of any size."""
        x = self.visual.prepare(images.to(self.log_scale.device), antialias=True)
        return F.normalize(self.visual(x), dim=1)

    @torch.no_grad()
    def encode_texts(self, texts):
        """Return features (B,E) of norm 1 for a list of texts. Each text is encoded on its own, so that
        none is padded.
        """
        ids = [self.tokenizer(text)[None].to(self.log_scale.device) for text in texts]
        return F.normalize(torch.cat([self.textual(i) for i in ids]), dim=1)

    def probabilities(self, images, texts):
        """Return (B,A): for each of B images, the probability of each of A texts, assuming that exactly one of the
        texts describes the image. images, texts: their features (B,E) and (A,E).
        """
        return (self.log_scale.exp() * images @ texts.T).softmax(1)


# ---- files -------------------------------------------------------------------------------------------------------
def shape_of(entries, name, path):
    if name not in entries:
        raise BadInput(f"{path}: not CLIP's {name.split('.')[0]} tower, it has no {name}")
    return entries[name].shape


def vision_sizes(entries, path):
    """Return the keyword arguments of VisionTransformer, except `layers`. entries: the headers {name: Entry} of the
    tensors in CLIP's file `path`.
    """
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
    """Return the highest N among the tensors named visual.transformer.N, or 0 if no tensor has such a name."""
    return max((int(n.split(".")[2]) for n in entries if n.startswith("visual.transformer.")), default=0)


def read_clip(path):
    """Return the path of CLIP's file, models_clip_open-clip-xlm-roberta-large-vit-huge-14 (.pth or .safetensors), and
    the headers {name: Entry} of its tensors. path: this file, or a checkpoint folder that holds it.
    """
    what = "CLIP (models_clip_open-clip-xlm-roberta-large-vit-huge-14, .pth or .safetensors)"
    file = find(path, "models_clip*", what)
    return file, read_headers([file])


def load_vision(path, device="cpu", dtype=torch.float32):
    """Load the VisionEncoder from a file or folder, frozen and in eval mode. Raises BadInput if the tensors of
    the visual tower do not fit; the message says which.
    """
    file, entries = read_clip(path)
    unused = ("textual.", "log_scale", "visual.post_norm.", "visual.head", f"visual.transformer.{last_block(entries)}.")
    with torch.device("meta"):
        model = VisionEncoder(**vision_sizes(entries, file), layers=last_block(entries))
    return load_into(model, {n: e for n, e in entries.items() if not n.startswith(unused)}, device, dtype)


def load_clip(path, device="cpu", dtype=torch.float32):
    """Load CLIP with both towers, frozen and in eval mode, and its tokenizer. The tokenizer's file,
    sentencepiece.bpe.model, is next to the weights or in the folder xlm-roberta-large/ next to them. With device
    "meta", the weights are not read. Raises BadInput if something is missing or does not fit.
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
