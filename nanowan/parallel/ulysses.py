"""Split a clip's tokens over ranks, and the heads in self-attention (DeepSpeed-Ulysses, Jacobs et al., 2023)."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from kernels import ops
from nanowan.errors import BadInput


def apply_ulysses(model, world, kind=None):
    """Make each of the ranks that share a clip compute a slice of the clip's tokens and, in self-attention, some of the
    heads for all tokens. Tokens that a variant adds to the video's are split in the same way. All slices have the
    same length: the last slices are padded with zeros, which attention leaves out. kind: the class that splits the
    clip, Ulysses (default), or FirstRank for memory_estimate.py.
    """
    if model.config.num_heads % world.sp_size:
        raise BadInput(f"--ulysses_size {world.sp_size}: does not divide this model's {model.config.num_heads} heads")
    ulysses = (kind or Ulysses)(world)
    model.share_tokens(ulysses.scatter, ulysses.gather, ulysses.attend)


class Ulysses:
    """The functions that Wan.share_tokens needs to split a clip. U: number of ranks; L: number of tokens of the clip;
    L' = ceil(L / U): number of tokens of a rank; N: number of heads; d: dimension of a head; D = N d.
    """

    def __init__(self, world):
        self.world, self.rank, self.size, self.group = world, world.sp_rank, world.sp_size, world.group("sp")

    def scatter(self, x, c):
        """Return this rank's slice (B,L',D) of all tokens x (B,L,D), and BlockInputs for that slice, cut from the
        BlockInputs c of all tokens.
        """
        tokens, rows = c.tokens, c.adaln.shape[1]
        row = tokens.row
        if row is None and rows > 1:
            row = torch.arange(tokens.length, dtype=torch.int32, device=x.device) // (tokens.length // rows)
        part = -(-tokens.length // self.size)
        local = tokens._replace(
            positions=self.own_slice(tokens.positions, 0),
            num_video=min(max(tokens.num_video - part * self.rank, 0), part),
            row=None if row is None else self.own_slice(row, 0),
        )
        return self.own_slice(x, 1), c._replace(tokens=local)

    def own_slice(self, t, dim):
        """Return a copy of this rank's slice of t along `dim`, a dimension of L tokens. The slice has L' tokens and is
        padded with zeros.
        """
        length = t.shape[dim]
        part = -(-length // self.size)
        begin, end = (min(part * r, length) for r in (self.rank, self.rank + 1))
        t = t.narrow(dim, begin, end - begin)
        return F.pad(t, (0, 0) * (t.dim() - 1 - dim) + (0, part - t.shape[dim]))

    def gather(self, y, c):
        """Return, on every rank, the output of the DiT's last layer (wan.Head) for all tokens (B,L,out_dim*4), gathered
        from the ranks' outputs y (B,L',out_dim*4) for their slices. c: the BlockInputs of all tokens.
        """
        self.world.count("tokens", y.nbytes * (self.size - 1))
        return torch.cat(Gather.apply(y, self.rank, self.size, self.group), 1)[:, : c.tokens.length]

    def attend(self, q, k, v, weights, eps, heads, rope):
        """Compute wan.attend for this rank's tokens: they attend to all tokens of the clip. q, k, v (B,L',D): the
        queries, keys and values of this rank's tokens.
        """
        q, k = ops.qk_norm_rope([q, k], weights, eps, heads, rope.table, rope.positions)
        q = self.seq_to_heads(q, rope.length)  # one after the other, since q, k and v are a rank's largest tensors
        k = self.seq_to_heads(k, rope.length)
        v = self.seq_to_heads(v.unflatten(2, (heads, -1)), rope.length)
        return self.heads_to_seq((rope.attention or ops.attention)(q, k, v))

    def seq_to_heads(self, x, length):
        """Return this rank's heads for all tokens (B,L,N/U,d), given all heads for this rank's tokens, x (B,L',N,d).
        Every rank sends each of the others the heads that the receiver computes. length: L.
        """
        x = self.exchange(x.unflatten(2, (self.size, -1)).movedim(2, 0))  # (U,B,L',N/U,d)
        return x.movedim(0, 1).flatten(1, 2)[:, :length]

    def heads_to_seq(self, y):
        """Return all heads for this rank's tokens (B,L',D), given this rank's heads for all tokens, y (B,L,D/U). Every
        rank sends each of the others the receiver's tokens.
        """
        part = -(-y.shape[1] // self.size)
        if missing := part * self.size - y.shape[1]:
            y = F.pad(y, (0, 0, 0, missing))
        y = self.exchange(y.unflatten(1, (self.size, part)).movedim(1, 0))  # (U,B,L',D/U), slice i with heads i
        return y.permute(1, 2, 0, 3).flatten(2)

    def exchange(self, x):
        """Send slice i of x (U,...) to rank i, for all i. Return a tensor whose slice i comes from rank i."""
        from torch.distributed._functional_collectives import all_to_all_single_autograd

        nbytes = x.nbytes * (self.size - 1) // self.size
        self.world.count("tokens", nbytes)
        y = all_to_all_single_autograd(x.contiguous(), None, None, self.group)
        if y.requires_grad:
            y.register_hook(lambda gradient: self.world.count("tokens", nbytes))  # the gradient is exchanged too
        return y


class Gather(torch.autograd.Function):
    """An operation that gathers every rank's x into a tuple. In the backward pass, a rank takes only the gradient of
    its own x, since all ranks compute the same after this operation.
    """

    @staticmethod
    def forward(ctx, x, rank, size, group):
        ctx.rank = rank
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(size)]
        dist.all_gather(parts, x.contiguous(), group)
        return tuple(parts)

    @staticmethod
    def backward(ctx, *grads):
        return grads[ctx.rank], None, None, None


class FirstRank(Ulysses):
    """A Ulysses for memory_estimate.py, in which one process stands for the first of world.sp_size ranks. The process
    uses as much memory as that rank uses in a run with all ranks, but does not communicate.
    """

    def __init__(self, world):
        self.rank, self.size = 0, world.sp_size

    def exchange(self, x):
        return x.contiguous().clone()

    def gather(self, y, c):
        return torch.cat([y.clone() for _ in range(self.size)], 1)[:, : c.tokens.length]
