"""A made-up variant of Wan for tests, which uses every hook for subclasses, and its forward pass written out in fp64.

The positions of its tokens form no grid. The clip's tokens are shifted, some to negative heights. The other tokens have
random positions, some of them equal or before the first frame, and are modulated as if t were 0. After every other
block, a vector that depends on the latent frame is added to each of the clip's tokens.
"""

import torch
import torch.nn.functional as F

from benchmarks import tiny
from wan import Tokens, Wan, WanConfig

SHIFT = torch.tensor([0, -1, 7], dtype=torch.int32)


def positions(grid, extra):
    """Return (own, further): the positions (time, height, width) of the clip's tokens, which are those of a grid,
    shifted, and of `extra` other tokens.
    """
    own = torch.tensor([(t, h, w) for t in range(grid[0]) for h in range(grid[1]) for w in range(grid[2])])
    g = torch.Generator().manual_seed(4)
    further = torch.randint(-19, 31, (extra, 3), generator=g)
    further[-1] = further[0]
    return own + SHIFT, further


class Scattered(Wan):
    def __init__(self, config):
        super().__init__(config)
        self.frame_vectors = torch.nn.Embedding(9, config.dim)

    def embed_inputs(self, *, extra):
        """Return the embeddings of the tokens that do not belong to the clip: extra (B,M,D), unchanged."""
        return extra

    def times(self, t):
        return torch.stack([t, torch.zeros_like(t)], 1)

    def list_tokens(self, grid, device, inputs):
        own, further = positions(grid, inputs.shape[1])
        row = torch.tensor([0] * len(own) + [1] * len(further), dtype=torch.int32)
        at = torch.cat([own, further]).int()
        return Tokens(at.to(device), len(own), len(at), int(at.abs().max()) + 1, row.to(device))

    def patchify(self, x, c):
        return torch.cat([super().patchify(x, c), c.inputs], 1)

    def after_block(self, i, x, c):
        if i % 2:
            return x
        own = c.tokens.num_video
        return torch.cat([x[:, :own] + self.frame_vectors(c.tokens.positions[:own, 0]), x[:, own:]], 1)


def model():
    """Return a Scattered with 3 blocks, 4 heads of size 12, 16 channels, and random weights from a seed."""
    config = WanConfig("t2v", 48, 104, 4, 3, 16, 16, text_dim=tiny.TEXT_DIM)
    return tiny.randomize(Scattered(config), 0)


def inputs(frames=3, h=6, w=10, extra=6, B=2):
    """Return the positional and the keyword arguments of Scattered.forward. With the defaults there are 51 tokens,
    which two or four ranks cannot share evenly.
    """
    g = torch.Generator().manual_seed(1)
    x, context = torch.randn(B, 16, frames, h, w, generator=g), torch.randn(B, 9, tiny.TEXT_DIM, generator=g)
    return (x, torch.rand(B, generator=g) * 1000, context), {"extra": torch.randn(B, extra, 48, generator=g)}


def plain(model, x, t, context, extra):
    """Compute model(x, t, context, extra=extra) in fp64, from the model's weights and the official formulas."""
    p, c = {k: v.double() for k, v in model.state_dict().items()}, model.config
    x, context, extra = x.double(), context.double(), extra.double()
    N, d = c.num_heads, c.dim // c.num_heads

    def linear(name, u):
        return F.linear(u, p[f"{name}.weight"], p[f"{name}.bias"])

    def norm(u):
        return F.layer_norm(u, u.shape[-1:], eps=c.eps)

    def rms(name, u):
        return u * (u.square().mean(-1, keepdim=True) + c.eps).rsqrt() * p[f"{name}.weight"]

    def heads(u):
        return u.unflatten(2, (N, d)).transpose(1, 2)

    def attention(q, k, v):
        return ((q @ k.transpose(2, 3) / d**0.5).softmax(3) @ v).transpose(1, 2).flatten(2)

    def rotated(u):
        pairs, third = d // 2, d // 2 // 3
        axis = torch.tensor([0] * (pairs - 2 * third) + [1] * third + [2] * third)
        within = torch.tensor([*range(pairs - 2 * third), *range(third), *range(third)]).double()
        frequency = 10000 ** (-within / torch.tensor([pairs - 2 * third, third, third])[axis])
        angle = at[:, axis].double() * frequency
        turned = torch.view_as_complex(u.unflatten(-1, (-1, 2)).contiguous()) * torch.exp(1j * angle)
        return torch.view_as_real(turned).flatten(-2)

    patches = F.conv3d(x, p["patch_embedding.weight"], p["patch_embedding.bias"], stride=c.patch_size)
    grid = patches.shape[2:]
    own, further = positions(grid, extra.shape[1])
    at, n = torch.cat([own, further]), len(own)
    u = torch.cat([patches.flatten(2).transpose(1, 2), extra], 1)
    zeros = torch.zeros(len(context), c.text_len - context.shape[1], context.shape[2], dtype=torch.float64)
    text = F.gelu(linear("text_embedding.0", torch.cat([context, zeros], 1)), approximate="tanh")
    text = linear("text_embedding.2", text)
    t = torch.cat([t[:, None].expand(-1, n), torch.zeros(len(t), len(further))], 1).double()  # for each token
    angle = t[..., None] * 10000 ** (-torch.arange(c.freq_dim // 2).double() / (c.freq_dim // 2))
    time = F.silu(linear("time_embedding.0", torch.cat([angle.cos(), angle.sin()], -1)))
    time = linear("time_embedding.2", time)
    adaln = linear("time_projection.1", F.silu(time)).unflatten(2, (6, -1))
    for i in range(c.num_layers):
        b = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = (adaln + p[f"{b}.modulation"][:, None]).unbind(2)
        y = norm(u) * (1 + scale1) + shift1
        q, k = (heads(rms(f"{b}.self_attn.norm_{s}", linear(f"{b}.self_attn.{s}", y))) for s in "qk")
        y = attention(rotated(q), rotated(k), heads(linear(f"{b}.self_attn.v", y)))
        u = u + gate1 * linear(f"{b}.self_attn.o", y)
        y = norm(u) * p[f"{b}.norm3.weight"] + p[f"{b}.norm3.bias"]
        q = heads(rms(f"{b}.cross_attn.norm_q", linear(f"{b}.cross_attn.q", y)))
        k = heads(rms(f"{b}.cross_attn.norm_k", linear(f"{b}.cross_attn.k", text)))
        u = u + linear(f"{b}.cross_attn.o", attention(q, k, heads(linear(f"{b}.cross_attn.v", text))))
        y = F.gelu(linear(f"{b}.ffn.0", norm(u) * (1 + scale2) + shift2), approximate="tanh")
        u = u + gate2 * linear(f"{b}.ffn.2", y)
        if i % 2 == 0:
            frames = p["frame_vectors.weight"][own[:, 0]].expand(len(u), -1, -1)
            u = u + torch.cat([frames, torch.zeros_like(u[:, n:])], 1)
    shift, scale = (time[:, :, None] + p["head.modulation"][:, None]).unbind(2)
    y = linear("head.head", norm(u) * (1 + scale) + shift)[:, :n]
    y = y.view(len(y), *grid, 1, 2, 2, c.out_dim).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return y.flatten(6, 7).flatten(4, 5).flatten(2, 3)
