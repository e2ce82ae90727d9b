"""The Wan 2.2 DiT with the official tensor names, and VARIANTS: sizes and defaults of the T2V, I2V and TI2V models.

B batch size       C input channels    T' h w latent frames, height, width    H' W' height and width in tokens: h/2, w/2
L tokens           D model width       N attention heads, each of width d = D/N
S text tokens      F rows of modulation: 1 for the whole clip, or T', one per latent frame

A row of modulation holds the scales, shifts and gates (adaptive LayerNorm) that follow from one timestep. Each token is
modulated by one of the F rows. Self-attention rotates a token's q and k by its position (time, height, width). The
tokens of a clip are its T' H' W' patches; variants (subclasses of Wan, in nanowan/variants/) may append others.

Precision: time embedding, modulation, LayerNorms, residual stream and head are fp32; attention and all other linears
run in the weights' dtype. RMSNorm and RoPE of q and k are computed in fp32 and rounded once, before attention. The time
MLP runs once per row of modulation, not once per token. Source: official wan/modules/model.py.
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
    """Embed timesteps t (...,) in 0..1000 -> (..., dim) fp32: cosines, then sines, computed in fp64."""
    frequency = torch.pow(10000, -torch.arange(dim // 2, dtype=torch.float64, device=t.device) / (dim // 2))
    angle = t.double()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1).float()


def embed_patches(x, conv):
    """Embed x (B,C,T',h,w) -> tokens (B,L,D) fp32, one per complete patch. conv: a Conv3d with stride = kernel size."""
    (t, h, w), (T, H, W) = conv.kernel_size, (n // k for n, k in zip(x.shape[2:], conv.kernel_size))
    x = x[:, :, : T * t, : H * h, : W * w].unflatten(4, (W, w)).unflatten(3, (H, h)).unflatten(2, (T, t))
    x = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)  # (B,THW,C*t*h*w)
    return F.linear(x.to(conv.weight.dtype), conv.weight.flatten(1), conv.bias).float()


class Rope(NamedTuple):
    """How to rotate q and k, how many tokens the clip has, and what replaces full self-attention, if anything."""

    table: torch.Tensor  # (P,d/2,2), for P positions: kernels/rope.py
    positions: torch.Tensor  # (L,3): the position of each token of q and k
    length: int  # number of tokens in the clip; above L where ranks share a clip
    attention: object = None  # the result of Wan.attention_of


class Attention(nn.Module):
    def __init__(self, dim, heads, eps):
        super().__init__()
        self.heads, self.eps = heads, eps
        self.q, self.k, self.v, self.o = (ops.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim), nn.RMSNorm(dim)  # over D, not per head; applied by ops


def attend(q, k, v, weights, eps, heads, rope):
    """RMS-norm q and k with `weights`, rotate them by `rope`, and compute attention. q, k, v (B,L,D) -> (B,L,D)."""
    if rope.attention is None:
        return ops.self_attention(q, k, v, weights, eps, heads, rope.table, rope.positions)
    q, k = ops.qk_norm_rope([q, k], weights, eps, heads, rope.table, rope.positions)
    return rope.attention(q, k, v.unflatten(2, (heads, -1)))


class SelfAttention(Attention):
    def __init__(self, dim, heads, eps):
        super().__init__(dim, heads, eps)
        self.attend = attend  # Wan.share_tokens may replace it

    def forward(self, x, rope):
        """x (B,L,D) -> (B,L,D); rope: a Rope."""
        rows, weights = self.q.round_input(x), (self.norm_q.weight, self.norm_k.weight)
        q, k, v = (linear(x, rows=rows) for linear in (self.q, self.k, self.v))
        return self.o(self.attend(q, k, v, weights, self.eps, self.heads, rope))


class CrossAttention(Attention):
    def keys_values(self, context):
        """Return the keys and values, (B,S,N,d) each, of the embedded text (B,S,D)."""
        (k,) = ops.qk_norm_rope([self.k(context)], [self.norm_k.weight], self.eps, self.heads)
        return k, self.v(context).unflatten(2, (self.heads, -1))

    def forward(self, x, kv, bias):
        """x (B,L,D) -> (B,L,D). kv: from keys_values; bias (B,1,1,S): added to the attention logits."""
        (q,) = ops.qk_norm_rope([self.q(x)], [self.norm_q.weight], self.eps, self.heads)
        return self.o(ops.attention(q, *kv, bias))


class FeedForward(nn.Sequential):
    def forward(self, x):
        up, gelu, down = self  # down(gelu(up(x))); the GELU is fused with `up` or with `down`
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
        """x (B,L,D) fp32 -> (B,L,D) fp32. adaln (B,F,6,D) fp32: F rows of modulation (see the top of this file);
        context (B,S,D), bias (B,1,1,S): the text and its logit bias; kv: the text's keys and values, if computed
        already; row (L,): for each token, which of the F rows applies (default: each row to L/F successive tokens).
        """
        # The code below computes these lines; each fused call ends one branch and begins the next.
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
        """x (B,L,D) -> (B,L,out). time (B,F,D): the embedded timesteps; row (L,): as in Block."""
        shift, scale = (time[:, :, None] + self.modulation).unbind(2)
        return self.head(ops.modulate(x, 1 + scale, shift, self.eps, x.dtype, row))


@dataclass
class WanConfig:
    """The fields of the official config.json, and text_dim and patch_size, which that file leaves out."""

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
# guidance: scales for (low, high) noise. nanowan/variants/registry.py adds S2V-14B, Animate-14B and Animate-2-14B
VARIANTS = {
    "ti2v-5B": dict(model_type="ti2v", dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_dim=48, out_dim=48,
                    vae="2.2", fps=24, frames=121, steps=50, size=(1280, 704), shift=5.0, boundary=None,
                    guidance=(5.0, 5.0)),
    "t2v-A14B": dict(_A14B, model_type="t2v", in_dim=16, shift=12.0, boundary=0.875, guidance=(3.0, 4.0)),
    "i2v-A14B": dict(_A14B, model_type="i2v", in_dim=36, shift=5.0, boundary=0.900, guidance=(3.5, 3.5)),
}
# fmt: on


def config_of(row, config_class=WanConfig):
    """Return a config_class with the sizes in `row`, an entry of VARIANTS."""
    return config_class(**{f.name: row[f.name] for f in fields(config_class) if f.name in row})


def build(variant):
    """Build the DiT of `variant`, a name in VARIANTS, at its released size, on PyTorch's default device, untrained."""
    return Wan(config_of(VARIANTS[variant]))


class Text(NamedTuple):
    """Prompts prepared for the blocks: embedded tokens (B,S,D), their logit bias (B,1,1,S) or None, and for each block
    the keys and values of the prompts, or None if the block is to compute them.
    """

    context: torch.Tensor
    bias: torch.Tensor
    keys_values: tuple


class Tokens(NamedTuple):
    """The tokens that pass through the blocks; where ranks share a clip, only the tokens of this rank."""

    positions: torch.Tensor  # (L,3) int32: time, height, width; a video token's time is its latent frame
    num_video: int  # number of video tokens, which come first; T'H'W' in a clip
    length: int  # number of tokens in the clip, on all ranks together
    extent: int  # the length that the rope_table needs: 1 + the largest |position|
    row: torch.Tensor | None = None  # (L,) int32: each token's row of modulation; None: L/F tokens per row, in order


class BlockInputs(NamedTuple):
    """Everything that the blocks get in addition to the tokens."""

    time: torch.Tensor  # (B,F,D)
    adaln: torch.Tensor  # (B,F,6,D), before each block's own modulation is added
    table: torch.Tensor  # (P,d/2,2), as in Rope
    tokens: Tokens
    text: Text
    inputs: object = None  # the result of embed_inputs for a variant's further inputs
    text_learns: bool = False  # whether the text needs gradients; then gradients pass through all blocks


class Wan(nn.Module):
    """The DiT. A variant with further inputs is a subclass that overrides some of the methods from embed_inputs to
    after_block. They also work where ranks share tokens or blocks (nanowan/parallel/), and where blocks are offloaded.
    """

    config_class = WanConfig
    block_class = Block
    batches_guidance = True  # whether guidance may compute its two predictions in one batch

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.patch_embedding = nn.Conv3d(c.in_dim, c.dim, c.patch_size, c.patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(c.text_dim, c.dim), ops.GELU(), nn.Linear(c.dim, c.dim))
        self.time_embedding = nn.Sequential(nn.Linear(c.freq_dim, c.dim), nn.SiLU(), nn.Linear(c.dim, c.dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(c.dim, c.dim * 6))
        self.blocks = nn.ModuleList(self.block_class(c) for _ in range(c.num_layers))
        self.head = Head(c.dim, c.out_dim * math.prod(c.patch_size), c.eps)
        # number of blocks with activation checkpointing, from the first that needs gradients on; True: all of these
        self.checkpointing = 0
        self.cache_text_kv = True  # False where blocks have their weights only while they run (memory/, parallel/)
        self.share_tokens(lambda x, c: (x, c), lambda y, c: y, attend)
        self.surround_blocks()

    # ---- what is computed ----------------------------------------------------------------------------------------
    def forward(self, x, t, context, context_lens=None, **inputs):
        """Return the velocity (B,out_dim,T',h,w) fp32 at x.

        x (B,C,T',h,w): noisy latents, for I2V followed by the conditioning channels; t (B,) or, per latent frame,
        (B,T') in 0..1000; context (B,S,text_dim) and context_lens (B,) as in embed_text, or as context the Text
        that embed_text returned; inputs: a variant's further inputs. Raises ValueError for wrong shapes.
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
        """Return the token grid (T',H',W') of x. Raises ValueError if the model cannot take the shape of x or t."""
        c, (B, C, T, h, w), (pt, ph, pw) = self.config, x.shape, self.config.patch_size
        if C != c.in_dim or h % ph or w % pw or t.shape not in ((B,), (B, T)):
            raise ValueError(
                f"x {tuple(x.shape)}, t {tuple(t.shape)}: this model takes x (B,{c.in_dim},T',h,w) with h, w multiples "
                f"of {ph}, {pw}, and t (B,) or (B,T')"
            )
        return T // pt, h // ph, w // pw

    def embed_text(self, context, lens=None, cache=False):
        """Embed context (B,S,text_dim), prompts of lens (B,) tokens (default: all S) -> Text. cache: also compute the
        keys and values of every block. Raises ValueError if S exceeds config.text_len, or a length exceeds S.

        The official model pads each prompt with zeros to text_len and masks nothing: all n = text_len - len padding
        tokens have the same key and value. Here two tokens stand for n1 and n2 of them, with log(n1) and log(n2) added
        to their logits. A single token would need log(n), which bf16 attention would round, changing n by up to 1.6 %.
        So n1 is chosen such that log(n1) is a bf16 number, and n2 = n - n1 is small.
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
        # for a prompt without padding the last two biases are -inf
        bias = [torch.where(real, 0.0, -torch.inf), most[:, None], (n - most.exp()).log()[:, None]]
        context, kv = self.text_embedding(context), (None,) * len(self.blocks)
        if cache and self.cache_text_kv:
            kv = tuple(block.cross_attn.keys_values(context) for block in self.blocks)
        return Text(context, torch.cat(bias, 1)[:, None, None], kv)

    def prepare_block_inputs(self, t, context, context_lens, grid, **inputs):
        """Return the BlockInputs of a clip with the token grid (T',H',W'). Other arguments: as in forward."""
        inputs = self.embed_inputs(**inputs)
        text = context if isinstance(context, Text) else self.embed_text(context, context_lens)
        time = self.time_embedding(sinusoid(self.times(t), self.config.freq_dim))
        tokens = self.list_tokens(grid, t.device, inputs)
        table = rope_table(tokens.extent, self.config.dim // self.config.num_heads, t.device)
        adaln = self.time_projection(time).unflatten(2, (6, -1))
        learns = text.context.requires_grad
        return BlockInputs(time, adaln, table, tokens, self.join_text(text, inputs), inputs, learns)

    def forward_blocks(self, x, c, numbers=None):
        """Run the blocks (default: all; else those in `numbers`): x (B,L,D) -> (B,L,D). c: x's BlockInputs."""
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
        """Turn the head's output (B,L,out_dim*4) for the first T'H'W' tokens into a velocity (B,out_dim,T',h,w)."""
        c, (pt, ph, pw) = self.config, self.config.patch_size
        x = x[:, : math.prod(grid)].unflatten(1, grid).unflatten(4, (pt, ph, pw, c.out_dim))
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # (B,out_dim,T',pt,H',ph,W',pw)
        return x.reshape(len(x), c.out_dim, grid[0] * pt, grid[1] * ph, grid[2] * pw)

    # ---- what a subclass overrides -------------------------------------------------------------------------------
    def embed_inputs(self):
        """Return BlockInputs.inputs, computed from forward's further keyword arguments alone, without t and x."""

    def prepare_inputs(self, **inputs):
        """Compute once what is the same at every step of a clip. Takes forward's further inputs, and returns the inputs
        to give to forward in their place. Inputs that are prepared already are returned unchanged.
        """
        return inputs

    @staticmethod
    def kept_bytes(config, tokens, itemsize):
        """Return how many bytes the result of prepare_inputs takes for a clip of `tokens` tokens; 0 if negligible."""
        return 0

    def join_text(self, text, inputs):
        """Return the Text that the blocks get. A variant may append further tokens for cross-attention."""
        return text

    def times(self, t):
        """Return the timestep (B,F) of each row of modulation. t (B,) or (B,T'): as in forward."""
        return t.view(len(t), -1)

    def list_tokens(self, grid, device, inputs):
        """Return the Tokens of a clip with the token grid (T',H',W'). inputs: the result of embed_inputs."""
        n = math.prod(grid)
        return Tokens(grid_positions(grid, device), num_video=n, length=n, extent=max(grid))

    def patchify(self, x, c):
        """Embed x (B,C,T',h,w) -> all tokens (B,L,D) fp32 of the clip, in the order of list_tokens, on every rank."""
        return embed_patches(x, self.patch_embedding)

    def attention_of(self, i, c):
        """Return the function that replaces full self-attention in block i, or None. The function takes q and k, after
        norm and RoPE, and v, each (B,L,N,d): all tokens of some or all heads. It returns (B,L,N*d).
        """

    def after_block(self, i, x, c):
        """Return x (B,L,D), the output of block i, changed as the variant needs. Video tokens come first."""
        return x

    def linear_name(self, block, target):
        """Return the full name of a block's linear `target`, such as "cross_attn.k", or None if this block has none."""
        return f"blocks.{block}.{target}"

    def cross_attentions(self):
        """Return [(block number, "cross_attn" (S2V: also "audio_attn"), CrossAttention)] in order of computation."""
        return [(i, "cross_attn", block.cross_attn) for i, block in enumerate(self.blocks)]

    # ---- what parallel/ and memory/offload.py set -----------------------------------------------------------------
    def share_tokens(self, scatter, gather, attend):
        """Let ranks share a clip's tokens. scatter(x, c) -> x and BlockInputs of this rank's tokens; gather(y, c) ->
        the head's output for all tokens; y: that of this rank. c: all tokens' BlockInputs. attend: replaces wan.attend.
        """
        self.scatter_tokens, self.gather_tokens = scatter, gather
        for block in self.blocks:
            block.self_attn.attend = attend

    def surround_blocks(self, around=contextlib.nullcontext, recompute_contexts=noop_context_fn):
        """Make forward_blocks run within around(), a context manager. recompute_contexts: checkpoint()'s context_fn."""
        self.around_blocks, self.recompute_contexts = around, recompute_contexts
