"""UMT5, the text encoder of Wan 2.2, and its sentencepiece tokenizer.

B prompts, L tokens (at most 512, including the end token), D model width, N attention heads, d width of a head.
Unlike in T5, every layer has its own table of relative positions. As in T5, attention is not scaled by 1/sqrt(d).
Source: official wan/modules/t5.py and tokenizers.py, whose tensor names are kept. Files: nanowan/formats/t5.py.
"""

import html
import math
import re

import torch
import torch.nn as nn

from kernels import ops

PAD, EOS, UNK = 0, 1, 2


class Tokenizer:
    """Gives the token ids of transformers' T5 tokenizer: sentencepiece ids, then the end token; at most `length` ids in
    all. Special tokens written in a prompt (</s>, <extra_id_0>, ...) become their own ids.

    model: the bytes of spiece.model; raises ValueError for other bytes. special: {token: id} in addition to <pad>, </s>
    and <unk>. byte_fallback: encode characters without a piece as bytes; else a run of such characters is one <unk>.
    """

    def __init__(self, model, special=None, byte_fallback=False, length=512):
        import sentencepiece

        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as e:
            raise ValueError(f"not a sentencepiece model ({str(e).splitlines()[0]})") from None
        self.length, self.byte_fallback = length, byte_fallback
        self.special = {"<pad>": PAD, "</s>": EOS, "<unk>": UNK} | (special or {})  # {token: id} and {word: [id]}
        self.add_words({})

    def add_words(self, ids_of):
        """From now on, encode each whole word of a text that is a key in ids_of, {word: [id]}, with its ids."""
        self.special |= ids_of
        longest_first = sorted(self.special, key=len, reverse=True)
        self.split = re.compile("(" + "|".join(map(self._pattern, longest_first)) + ")")

    def _pattern(self, token):
        bound = isinstance(self.special[token], list)
        return rf"(?<!\w){re.escape(token)}(?!\w)" if bound else re.escape(token)

    @staticmethod
    def clean(text):
        import ftfy

        return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()

    def ids(self, text):
        """Return the ids of one text, a result of `clean`, without the end token."""
        ids = []
        for part in filter(None, self.split.split(text)):
            known = self.special.get(part)
            ids += self._encode(part) if known is None else known if isinstance(known, list) else [known]
        return ids

    def _encode(self, text):
        ids = []
        for i in self.pieces.encode(text):
            if self.pieces.is_byte(i) and not self.byte_fallback:  # as in transformers: one <unk> per run
                if ids[-1:] == [UNK]:
                    continue
                i = UNK
            ids.append(i)
        return ids

    def __call__(self, texts):
        """Tokenize prompts (list of str) -> ids (B,L) int64, padded to the longest, and their lengths (B,)."""
        rows = [self.ids(self.clean(t))[: self.length - 1] + [EOS] for t in texts]
        lens = torch.tensor([len(r) for r in rows])
        ids = torch.full((len(rows), int(lens.max())), PAD)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        return ids, lens


class Norm(nn.Module):
    """T5's RMSNorm: statistics in fp32, no centring."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        x = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * x.to(self.weight.dtype)


class Attention(nn.Module):
    def __init__(self, dim, inner, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(dim, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, dim, bias=False)

    def forward(self, x, bias):
        q, k, v = (f(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = ops.sdpa(q, k, v, bias, scale=1.0)
        return self.o(x.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, dim, inner):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(dim, inner, bias=False), ops.GELU())
        self.fc1 = nn.Linear(dim, inner, bias=False)
        self.fc2 = nn.Linear(inner, dim, bias=False)

    def forward(self, x):
        return self.fc2(self.fc1(x) * self.gate(x))


class RelativePosition(nn.Module):
    """A logit per head for each of `buckets` ranges of signed token distance. Near 0, each range is one distance."""

    def __init__(self, buckets, heads):
        super().__init__()
        self.embedding = nn.Embedding(buckets, heads)

    def forward(self, L):
        at = torch.arange(L, device=self.embedding.weight.device)
        offset = at[None] - at[:, None]  # key minus query
        half = self.embedding.num_embeddings // 2
        exact, distance = half // 2, offset.abs()
        far = exact + (torch.log(distance.float() / exact) / math.log(128 / exact) * (half - exact)).long()
        bucket = torch.where(distance < exact, distance, far.clamp(max=half - 1)) + half * (offset > 0)
        return self.embedding(bucket).permute(2, 0, 1)  # (N,L,L)


class Block(nn.Module):
    def __init__(self, dim, inner, ffn, heads, buckets):
        super().__init__()
        self.norm1, self.norm2 = Norm(dim), Norm(dim)
        self.attn = Attention(dim, inner, heads)
        self.ffn = FeedForward(dim, ffn)
        self.pos_embedding = RelativePosition(buckets, heads)

    def forward(self, x, mask):
        """x (B,L,D) -> (B,L,D). mask (B,1,1,L): added to the attention logits."""
        bias = self.pos_embedding(x.shape[1]) + mask
        x = x + self.attn(self.norm1(x), bias)
        return x + self.ffn(self.norm2(x))


class TextEncoder(nn.Module):
    def __init__(self, vocab, dim, inner, ffn, heads, layers, buckets=32):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(Block(dim, inner, ffn, heads, buckets) for _ in range(layers))
        self.norm = Norm(dim)
        self.tokenizer = None

    def forward(self, ids, lens):
        """Encode ids (B,L) with lengths lens (B,) -> embeddings (B,L,D), zero beyond each prompt's length."""
        real = torch.arange(ids.shape[1], device=ids.device) < lens[:, None].to(ids.device)
        x = self.token_embedding(ids)
        mask = torch.zeros_like(real, dtype=x.dtype).masked_fill(~real, torch.finfo(x.dtype).min)[:, None, None]
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x) * real[..., None]

    def linear_name(self, block, target):
        """Return the full name of the linear `target`, such as "attn.k", of block number `block`."""
        return f"blocks.{block}.{target}"

    def encode(self, texts):
        """Encode prompts (list of str) -> embeddings (B,L,D), L being the length of the longest, and their lengths lens
        (B,). Gradients flow to the weights.
        """
        ids, lens = self.tokenizer(texts)
        device = self.norm.weight.device
        return self(ids.to(device), lens.to(device)), lens.to(device)
