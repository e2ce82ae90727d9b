"""Tokens of a clip shared by ranks, heads in self-attention (DeepSpeed-Ulysses, Jacobs et al., 2023)."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

import ops
from checkpoint import BadInput


def apply_ulysses(model, world):
    """Each rank holds, of every latent frame, a strip of token rows or columns, and in self-attention a part of the
    heads of all tokens. Rows or columns that do not divide are filled up; attention never sees the filling.
    """
    heads, group = model.config.num_heads, world.group("sp")
    if heads % world.sp_size:
        raise BadInput(f"--ulysses_size {world.sp_size}: does not divide this model's {heads} heads")
    for block in model.blocks:
        block.self_attn.forward = lambda x, rope, attn=block.self_attn: ulysses_attention(attn, x, rope, world)
    model.blocks[0].register_forward_pre_hook(lambda block, args: (scatter_seq(args[0], args[2][1], world), *args[1:]))
    leave, head = model.leave, model.head.forward

    def left(x, time, grid):
        model.head.forward = lambda x, time: gather_seq(head(x, time), grid, world, group)
        return leave(x, time, grid)

    model.leave = left


def scatter_seq(x, grid, world):
    """x (B,L,D) -> this rank's tokens (B,L',D)."""
    axis, n = cut(grid, world.sp_size)
    x = filled(x.unflatten(1, grid), axis + 1, n * world.sp_size)
    return x.narrow(axis + 1, n * world.sp_rank, n).flatten(1, 3)


def gather_seq(x, grid, world, group):
    """This rank's tokens (B,L',D) -> all (B,L,D), on every rank."""
    axis, n = cut(grid, world.sp_size)
    part = [*grid]
    part[axis] = n
    world.count("tokens", x.nbytes * (world.sp_size - 1))
    parts = Gather.apply(x, world.sp_rank, world.sp_size, group)
    return torch.cat([p.unflatten(1, part) for p in parts], axis + 1).narrow(axis + 1, 0, grid[axis]).flatten(1, 3)


def ulysses_attention(attn, x, rope, world):
    """SelfAttention.forward on this rank's tokens."""
    (table, grid), U, heads, group = rope, world.sp_size, attn.heads, world.group("sp")
    axis, n = cut(grid, U)
    part = [*grid]
    part[axis] = n
    half = table.shape[1]
    third = half // 3
    pairs = slice(half - 2 * third, half - third) if axis == 1 else slice(half - third, half)
    at = (torch.arange(n, device=x.device) + n * world.sp_rank).clamp(max=len(table) - 1)
    mine = table.clone()
    mine[:n, pairs] = table[at, pairs]  # where this rank's rows or columns stand in the whole frame
    weights = [attn.norm_q.weight, attn.norm_k.weight]
    q, k = ops.qk_norm_rope([attn.q(x), attn.k(x)], weights, attn.eps, heads, mine, part)
    v = attn.v(x).unflatten(2, (heads, -1))
    y = exchange(torch.stack([q, k, v]).unflatten(3, (U, -1)).movedim(3, 0), world, group)  # (U,3,B,L',N/U,d)
    y = y.unflatten(3, part).movedim(0, 2 + axis).flatten(2 + axis, 3 + axis)  # the ranks' strips beside each other
    y = ops.attention(*y.narrow(2 + axis, 0, grid[axis]).flatten(2, 4))  # (B,L,D/U)
    y = filled(y.unflatten(1, grid), 1 + axis, n * U).unflatten(1 + axis, (U, n)).movedim(1 + axis, 0)
    return attn.o(exchange(y.flatten(2, 4), world, group).permute(1, 2, 0, 3).flatten(2))  # (B,L',D)


def exchange(x, world, group):
    """Slice i of x (U,...) goes to rank i of the group; slice i of the result came from it."""
    from torch.distributed._functional_collectives import all_to_all_single_autograd

    nbytes = x.nbytes * (world.sp_size - 1) // world.sp_size
    world.count("tokens", nbytes)
    y = all_to_all_single_autograd(x.contiguous(), None, None, group)
    if y.requires_grad:
        y.register_hook(lambda gradient: world.count("tokens", nbytes))  # it goes the same way back
    return y


class Gather(torch.autograd.Function):
    """Every rank's x, in a tuple; backwards a rank takes the gradient of its own, since all of them compute the same
    from here on.
    """

    @staticmethod
    def forward(ctx, x, place, size, group):
        ctx.place = place
        parts = [torch.empty_like(x) for _ in range(size)]
        dist.all_gather(parts, x.contiguous(), group)
        return tuple(parts)

    @staticmethod
    def backward(ctx, *grads):
        return grads[ctx.place], None, None, None


def cut(grid, ranks):
    """Which axis of a token grid (T',H',W') is shared by ranks: (rows 1 or columns 2, the one with less filling; its
    length per rank).
    """
    axis = min((1, 2), key=lambda a: -(-grid[a] // ranks) * ranks / grid[a])
    return axis, -(-grid[axis] // ranks)


def filled(x, axis, n):
    """x with zeros behind it along an axis, to a length of n."""
    return F.pad(x, (0, 0) * (x.dim() - 1 - axis) + (0, n - x.shape[axis]))
