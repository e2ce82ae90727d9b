"""The Wan 2.2 DiT with the official tensor names, and VARIANTS: numbers and defaults of the text and image models.

B batch            C channels in      T' h w latent frames, height, width    H' W' the same after patching (h/2, w/2)
L tokens           D width            N heads              d = D/N head width
S text tokens      F rows of modulation: 1 for the whole clip, or T', one per latent frame

The tokens of a clip are its T' H' W' patches; a variant may put others behind them (S2V-14B and Animate-14B are
subclasses, in nanowan/variants/). Each token has a position (time, height, width), by which self-attention rotates
it, and one of the F rows modulates it.

Precision: time embedding, modulation, LayerNorms, residual stream and head are fp32; the big linears and attention run
in the weights' dtype. RMSNorm and RoPE of q and k are computed in fp32 and rounded once, before attention. Source:
official wan/modules/model.py. The time MLP runs on the F rows only, never on every token.
"""

import contextlib
import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint, noop_context_fn

from kernels import ops
from kernels.rope import grid_positions, rope_table


def sinusoid(t, dim):
    """t (...,) in 0..1000 -> (..., dim) fp32, cosines then sines; computed in fp64."""
    frequency = torch.pow(10000, -torch.arange(dim // 2, dtype=torch.float64, device=t.device) / (dim // 2))
    angle = t.double()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1).float()


def embed_patches(x, conv):
    """Tokens (B,L,D) fp32 of x (B,C,T,h,w): one for each patch that fits whole; `conv`'s kernel is its stride."""
    (t, h, w), (T, H, W) = conv.kernel_size, (n // k for n, k in zip(x.shape[2:], conv.kernel_size))
    x = x[:, :, : T * t, : H * h, : W * w].unflatten(4, (W, w)).unflatten(3, (H, h)).unflatten(2, (T, t))
    x = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)  # (B,THW,C*t*h*w)
    return F.linear(x.to(conv.weight.dtype), conv.weight.flatten(1), conv.bias).float()


class Rope(NamedTuple):
    """How self-attention rotates the tokens at hand, and how many there are in all."""

    table: torch.Tensor  # (P,d/2,2), kernels/rope.py
    positions: torch.Tensor  # (L,3) of these tokens
    length: int  # tokens of the clip; more than L where ranks share it
    attention: object = None  # what Wan.attention_of returned


class Attention(nn.Module):
    def __init__(self, dim, heads, eps):
        super().__init__()
        self.heads, self.eps = heads, eps
        self.q, self.k, self.v, self.o = (ops.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim), nn.RMSNorm(dim)  # over all heads together; ops applies them


def attend(q, k, v, weights, eps, heads, rope):
    """Attention of the bare projections (B,L,D) on themselves, q and k normed by `weights` and rotated -> (B,L,D)."""
    if rope.attention is None:
        return ops.self_attention(q, k, v, weights, eps, heads, rope.table, rope.positions)
    q, k = ops.qk_norm_rope([q, k], weights, eps, heads, rope.table, rope.positions)
    return rope.attention(q, k, v.unflatten(2, (heads, -1)))


class SelfAttention(Attention):
    def __init__(self, dim, heads, eps):
        super().__init__(dim, heads, eps)
        self.attend = attend  # another where ranks share the tokens: Wan.share_tokens

    def forward(self, x, rope):
        """x (B,L,D) -> (B,L,D)."""
        rows, weights = self.q.round_input(x), (self.norm_q.weight, self.norm_k.weight)
        q, k, v = (linear(x, rows=rows) for linear in (self.q, self.k, self.v))
        return self.o(self.attend(q, k, v, weights, self.eps, self.heads, rope))


class CrossAttention(Attention):
    def keys_values(self, context):
        """Embedded text (B,S,D) -> k, v (B,S,N,d)."""
        (k,) = ops.qk_norm_rope([self.k(context)], [self.norm_k.weight], self.eps, self.heads)
        return k, self.v(context).unflatten(2, (self.heads, -1))

    def forward(self, x, kv, bias):
        """x (B,L,D), kv: what keys_values returned, bias (B,1,1,S) -> (B,L,D)."""
        (q,) = ops.qk_norm_rope([self.q(x)], [self.norm_q.weight], self.eps, self.heads)
        return self.o(ops.attention(q, *kv, bias))


class FeedForward(nn.Sequential):
    def forward(self, x):
        up, gelu, down = self  # down(gelu(up(x))), the GELU fused with the one or the other
        return down(up(x), activated=True) if down.takes_gelu else down(up.with_gelu(x, gelu))


class Block(nn.Module):
    cross_attention = CrossAttention

    def __init__(self, c):
        super().__init__()
        self.eps = c.eps
        self.self_attn = SelfAttention(c.dim, c.num_heads, c.eps)
        self.norm3 = nn.LayerNorm(c.dim, c.eps)
        self.cross_attn = self.cross_attention(c.dim, c.num_heads, c.eps)
        self.ffn = FeedForward(ops.Linear(c.dim, c.ffn_dim), ops.GELU(), ops.Linear(c.ffn_dim, c.dim))
        self.modulation = nn.Parameter(torch.zeros(1, 6, c.dim))

    def forward(self, x, adaln, rope, context, bias, kv=None, row=None):
        """x (B,L,D) fp32, adaln (B,F,6,D) fp32, context (B,S,D) and bias (B,1,1,S), kv: the keys and values of the
        context where they are known, row (L,): which of the F rows modulates each token, by default L/F in order
        -> (B,L,D) fp32.
        """
        # Fused below, where one call ends a branch and begins the next:
        #   x = x + gate1 * self_attn(norm(x) * (1 + scale1) + shift1)
        #   x = x + cross_attn(norm3(x))
        #   x = x + gate2 * ffn(norm(x) * (1 + scale2) + shift2)
        shift1, scale1, gate1, shift2, scale2, gate2 = (adaln + self.modulation).unbind(2)
        weight3, shift3 = (p.expand_as(gate1) for p in (self.norm3.weight, self.norm3.bias))
        y = self.self_attn(ops.modulate(x, 1 + scale1, shift1, self.eps, context.dtype, row), rope)
        x, y = ops.gate_modulate(x, y, gate1, weight3, shift3, self.eps, context.dtype, row)
        y = self.cross_attn(y, kv or self.cross_attn.keys_values(context), bias)
        x, y = ops.gate_modulate(x, y, None, 1 + scale2, shift2, self.eps, context.dtype, row)
        return ops.gate(x, self.ffn(y), gate2, row)


class Head(nn.Module):
    def __init__(self, dim, out, eps):
        super().__init__()
        self.eps = eps
        self.head = nn.Linear(dim, out)
        self.modulation = nn.Parameter(torch.zeros(1, 2, dim))

    def forward(self, x, time, row=None):
        """x (B,L,D), time (B,F,D), row (L,) as in Block -> (B,L,out)."""
        shift, scale = (time[:, :, None] + self.modulation).unbind(2)
        return self.head(ops.modulate(x, 1 + scale, shift, self.eps, x.dtype, row))


@dataclass
class WanConfig:
    """The fields of the official config.json, and text_dim and patch_size, which it leaves out."""

    model_type: str
    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int
    out_dim: int
    freq_dim: int = 256
    text_len: int = 512
    text_dim: int = 4096
    patch_size: tuple = (1, 2, 2)
    eps: float = 1e-6


# fmt: off
_A14B = dict(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, out_dim=16, vae="2.1", fps=16, frames=81, steps=40,
             size=(1280, 720))
# sizes and recommended settings of the released models; boundary: the high-noise expert serves t/1000 >= boundary;
# guidance: (low noise, high noise). nanowan/variants/registry.py adds S2V-14B, Animate-14B and Animate-2-14B
VARIANTS = {
    "ti2v-5B": dict(model_type="ti2v", dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_dim=48, out_dim=48,
                    vae="2.2", fps=24, frames=121, steps=50, size=(1280, 704), shift=5.0, boundary=None,
                    guidance=(5.0, 5.0)),
    "t2v-A14B": dict(_A14B, model_type="t2v", in_dim=16, shift=12.0, boundary=0.875, guidance=(3.0, 4.0)),
    "i2v-A14B": dict(_A14B, model_type="i2v", in_dim=36, shift=5.0, boundary=0.900, guidance=(3.5, 3.5)),
}
# fmt: on


def config_of(row, config_class=WanConfig):
    """The configuration of a row of VARIANTS at its released size."""
    return config_class(**{f.name: row[f.name] for f in fields(config_class) if f.name in row})


def build(variant):
    """The DiT of one of VARIANTS at its released size, on the current default device, without weights."""
    return Wan(config_of(VARIANTS[variant]))


class Text(NamedTuple):
    """A prompt made ready for the blocks: embedded tokens (B,S,D), logit bias (B,1,1,S) or None, and per block its k
    and v, or None.
    """

    context: torch.Tensor
    bias: torch.Tensor
    keys_values: tuple


class Tokens(NamedTuple):
    """The list of tokens that the blocks compute, or the part of it that is here where ranks share it."""

    positions: torch.Tensor  # (L,3) int32: time, height, width; of the clip's own the time is the latent frame
    num_video: int  # video tokens, T'H'W' in all, come first; a variant's extra tokens follow
    length: int  # tokens in all, here or not
    extent: int  # 1 + the largest |position|: how long a rope_table must be
    row: torch.Tensor | None = None  # (L,) int32: which row modulates each; None: L/F tokens each, in order


class BlockInputs(NamedTuple):
    """What the blocks are given beside the tokens."""

    time: torch.Tensor  # (B,F,D)
    adaln: torch.Tensor  # (B,F,6,D), before each block's own modulation is added
    table: torch.Tensor  # (P,d/2,2), kernels/rope.py
    tokens: Tokens
    text: Text
    inputs: object = None  # what embed_inputs made of a variant's inputs
    text_learns: bool = False  # whether gradients go through the text, so that blocks need them without an adapter


class Wan(nn.Module):
    """The DiT. A variant with further inputs is a subclass that overrides the methods from embed_inputs to after_block;
    what it adds then works on shared tokens (parallel/ulysses.py), pipelines and streamed blocks too.
    """

    config_class = WanConfig
    block_class = Block
    batches_guidance = True  # whether guidance's two halves may be computed in one batch

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.patch_embedding = nn.Conv3d(c.in_dim, c.dim, c.patch_size, c.patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(c.text_dim, c.dim), ops.GELU(), nn.Linear(c.dim, c.dim))
        self.time_embedding = nn.Sequential(nn.Linear(c.freq_dim, c.dim), nn.SiLU(), nn.Linear(c.dim, c.dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(c.dim, c.dim * 6))
        self.blocks = nn.ModuleList(self.block_class(c) for _ in range(c.num_layers))
        self.head = Head(c.dim, c.out_dim * math.prod(c.patch_size), c.eps)
        # how many blocks recompute their activations in the backward pass: of those that learn the first; True: all
        self.checkpointing = 0
        self.cache_text_kv = True  # not where blocks have their weights only while they run (offload.py, parallel/)
        self.share_tokens(lambda x, c: (x, c), lambda y, c: y, attend)
        self.surround_blocks()

    # ---- what is computed ----------------------------------------------------------------------------------------
    def forward(self, x, t, context, context_lens=None, **inputs):
        """Velocity of the flow at x.

        x (B,C,T',h,w), for I2V with the conditioning channels after those of the noise; t (B,) or (B,T') in 0..1000;
        context (B,S<=512,text_dim) with context_lens (B,), or what embed_text made of them; a variant's further inputs
        -> (B,out_dim,T',h,w) fp32.
        """
        grid = self.check(x, t)
        c = self.prepare_block_inputs(t, context, context_lens, grid, **inputs)
        x = self.patchify(x, c)  # (B,L,D)
        x, local = self.scatter_tokens(x, c)
        x = self.forward_blocks(x, local)
        x = self.head(x, local.time, local.tokens.row)  # (B,L,out_dim*4)
        x = self.gather_tokens(x, c)
        return self.unpatchify(x, grid)  # (B,out_dim,T',h,w)

    def check(self, x, t):
        """The token grid of x; ValueError where x or t has a shape that the model does not take."""
        c, (B, C, T, h, w), (pt, ph, pw) = self.config, x.shape, self.config.patch_size
        if C != c.in_dim or h % ph or w % pw or t.shape not in ((B,), (B, T)):
            raise ValueError(
                f"x {tuple(x.shape)}, t {tuple(t.shape)}: this model takes x (B,{c.in_dim},T',h,w) with h, w multiples "
                f"of {ph}, {pw}, and t (B,) or (B,T')"
            )
        return T // pt, h // ph, w // pw

    def embed_text(self, context, lens=None, cache=False):
        """context (B,S,text_dim), lens (B,) true lengths (default: all S) -> Text. With `cache`, every block's keys and
        values too.

        The official model pads each prompt with zeros to text_len and masks nothing, so all n = text_len - len padding
        keys are the one vector text_embedding(0). Here two keys stand for them, their logits raised by log(n1) and
        log(n2), n1 + n2 = n: exact. Two, because bf16 attention rounds log(n) enough to miscount by 1.5 %; log(n1) is a
        bf16 number, and n2 the small rest.
        """
        B, S, _ = context.shape
        longest = S if lens is None else int(lens.max())
        lens = torch.full((B,), S, device=context.device) if lens is None else lens.to(context.device)
        if S > self.config.text_len or longest > S:
            raise ValueError(
                f"text of {max(S, longest)} tokens in a batch {S} wide; the model takes {self.config.text_len}"
            )
        real = torch.arange(S, device=context.device) < lens[:, None]
        context = F.pad(context.to(self.text_embedding[0].weight.dtype).masked_fill(~real[..., None], 0), (0, 0, 0, 2))
        n = (self.config.text_len - lens).float()
        most = (n.log() - 0.04).bfloat16().float()  # bf16 numbers of this size are at most 0.032 apart
        # of a prompt without padding the last two are -inf
        bias = [torch.where(real, 0.0, -torch.inf), most[:, None], (n - most.exp()).log()[:, None]]
        context, kv = self.text_embedding(context), (None,) * len(self.blocks)
        if cache and self.cache_text_kv:
            kv = tuple(block.cross_attn.keys_values(context) for block in self.blocks)
        return Text(context, torch.cat(bias, 1)[:, None, None], kv)

    def prepare_block_inputs(self, t, context, context_lens, grid, **inputs):
        """What every block is given beside the tokens, for a clip of the token grid (T',H',W'): BlockInputs."""
        inputs = self.embed_inputs(**inputs)
        text = context if isinstance(context, Text) else self.embed_text(context, context_lens)
        time = self.time_embedding(sinusoid(self.times(t), self.config.freq_dim))
        tokens = self.list_tokens(grid, t.device, inputs)
        table = rope_table(tokens.extent, self.config.dim // self.config.num_heads, t.device)
        adaln = self.time_projection(time).unflatten(2, (6, -1))
        learns = text.context.requires_grad
        return BlockInputs(time, adaln, table, tokens, self.join_text(text, inputs), inputs, learns)

    def forward_blocks(self, x, c, numbers=None):
        """The blocks, or those with these numbers. x (B,L,D), c: the BlockInputs of these tokens -> (B,L,D)."""
        recomputed = 0
        with self.around_blocks():
            for i in range(len(self.blocks)) if numbers is None else numbers:
                learns = c.text_learns or x.requires_grad or any(p.requires_grad for p in self.blocks[i].parameters())
                chosen = self.checkpointing is True or recomputed < self.checkpointing
                if chosen and torch.is_grad_enabled() and learns:
                    recomputed, contexts = recomputed + 1, self.recompute_contexts
                    x = checkpoint(self.forward_block, x, i, c, use_reentrant=False, context_fn=contexts)
                else:
                    x = self.forward_block(x, i, c)
        return x

    def forward_block(self, x, i, c):
        rope, text = Rope(c.table, c.tokens.positions, c.tokens.length, self.attention_of(i, c)), c.text
        x = self.blocks[i](x, c.adaln, rope, text.context, text.bias, text.keys_values[i], c.tokens.row)
        return self.after_block(i, x, c)

    def unpatchify(self, x, grid):
        """The head's output (B,L,out_dim*4), of which the clip's own come first -> (B,out_dim,T',h,w)."""
        c, (pt, ph, pw) = self.config, self.config.patch_size
        x = x[:, : math.prod(grid)].unflatten(1, grid).unflatten(4, (pt, ph, pw, c.out_dim))
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # (B,out_dim,T',pt,H',ph,W',pw)
        return x.reshape(len(x), c.out_dim, grid[0] * pt, grid[1] * ph, grid[2] * pw)

    # ---- what a subclass overrides -------------------------------------------------------------------------------
    def embed_inputs(self):
        """BlockInputs.inputs: what of forward's further keyword arguments depends on neither t nor x."""

    def prepare_inputs(self, **inputs):
        """The further inputs, as embed_inputs names them, with all computed that is the same at every step of a clip:
        to be given to forward in their place. Those that are prepared already stay as they are.
        """
        return inputs

    @staticmethod
    def kept_bytes(config, tokens, itemsize):
        """Bytes that prepare_inputs keeps for a clip of so many tokens, where they are too many to be overlooked."""
        return 0

    def join_text(self, text, inputs):
        """The Text that the blocks are given; what else cross-attention attends to is added here."""
        return text

    def times(self, t):
        """t (B,) or (B,T') -> (B,F): the times whose embeddings modulate."""
        return t.view(len(t), -1)

    def list_tokens(self, grid, device, inputs):
        """The Tokens of a clip of the grid (T',H',W')."""
        n = math.prod(grid)
        return Tokens(grid_positions(grid, device), num_video=n, length=n, extent=max(grid))

    def patchify(self, x, c):
        """x (B,C,T',h,w) -> the tokens (B,L,D) fp32, as list_tokens has them, all of them on every rank."""
        return embed_patches(x, self.patch_embedding)

    def attention_of(self, i, c):
        """What block i's self-attention is instead of each token's attention to all: a function of q, k, v (B,L,N,d)
        of all tokens, normed and rotated, and of any number of the heads -> (B,L,N*d). None: nothing else.
        """

    def after_block(self, i, x, c):
        """x (B,L,D) after block i. Of the L tokens that are here the first c.tokens.num_video are the clip's."""
        return x

    def linear_name(self, block, target):
        """The full name of the linear that a LoRA's `target` means in a block, or None where this block has none."""
        return f"blocks.{block}.{target}"

    def cross_attentions(self):
        """[(block, kind, CrossAttention)] in the order in which they are computed."""
        return [(i, "cross_attn", block.cross_attn) for i, block in enumerate(self.blocks)]

    # ---- what parallel/ and offload.py put in --------------------------------------------------------------------
    def share_tokens(self, scatter, gather, attend):
        """Let ranks share the tokens. scatter(x, c) -> this rank's x and BlockInputs; gather(y, c) -> the head's
        output y of all tokens, c being that of all; attend: as `attend` above, of this rank's tokens with all others.
        """
        self.scatter_tokens, self.gather_tokens = scatter, gather
        for block in self.blocks:
            block.self_attn.attend = attend

    def surround_blocks(self, around=contextlib.nullcontext, recompute_contexts=noop_context_fn):
        """around() is a context manager around all blocks; recompute_contexts is checkpoint's context_fn."""
        self.around_blocks, self.recompute_contexts = around, recompute_contexts
