"""Several processes, one result: what torchrun starts works as one process with the same global batch would.

    torchrun --nproc_per_node=8 train_lora.py ...                       data parallel
    torchrun --nproc_per_node=8 train_lora.py --fsdp ...                the frozen weights sharded (train_te.py: the
    trained ones, and states)
    torchrun --nproc_per_node=8 train_lora.py --ulysses_size 4 ...      four ranks share each clip's tokens, two groups
    share the batch
    torchrun --nproc_per_node=8 train_lora.py --pipeline_stages 2 ...   each rank holds half of the blocks
    torchrun --nproc_per_node=2 sample.py --guidance_parallel ...       the two halves of guidance

One rule holds everywhere: every rank holds all adapters (they are small) and computes some part of the gradient, and
the sum over all ranks is the gradient. So clipping, the optimizer, averages and files are those of one process. The
engines are PyTorch's: fully_shard, DeviceMesh, all-to-all, pipelining. Without torchrun a World is one rank that never
communicates.
"""

import datetime
import os
import random
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import ops
from checkpoint import BadInput

PATIENCE = datetime.timedelta(
    hours=4
)  # ranks wait for each other's share of the cache; a dead rank ends the job at once, through torchrun


class World:
    """This process's place among `size` ranks: `rank`, whether it is the `main` one, its `device`, and its number
    `data` among the `datas` that see different samples. `team`: how many ranks share a clip while sampling; one of them
    `writes`. `sent`: bytes that this rank has given to collectives and neighbours, by kind.
    """

    def __init__(self, device, fsdp=False, ulysses=1, stages=1, guidance=False):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.fsdp, self.ulysses, self.stages, self.halves = fsdp, ulysses, stages, 2 if guidance else 1
        self.main, self.device, self.sent, self.pipelines = self.rank == 0, device, {}, {}
        self.data, self.datas, self.stage, self.place, self.half, self.scheduling = 0, 1, 0, 0, 0, False
        together, self.team, self.writes = ulysses * stages * self.halves, ulysses * self.halves, True
        if min(ulysses, stages) < 1 or self.size % together:
            raise BadInput(
                f"--ulysses_size {ulysses}, --pipeline_stages {stages}{', --guidance_parallel' * guidance}: {self.size} processes do not divide by {together}; "
                f"start torchrun with --nproc_per_node {together} or a multiple"
            )
        if fsdp and stages > 1 or ulysses > 1 and stages > 1:
            raise BadInput("--pipeline_stages: not together with --fsdp or --ulysses_size")
        self.alone = "RANK" not in os.environ
        if self.alone:
            return
        if torch.device(device).type == "cuda":
            self.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(self.device)
        kind = torch.device(device).type
        store, rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))
        store = dist.PrefixStore(
            f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store
        )  # torchrun's still holds the addresses of ranks that it has restarted
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
            timeout=PATIENCE,
            store=store,
            rank=rank,
            world_size=size,
        )
        self.datas = self.size // together
        self.mesh = dist.init_device_mesh(
            kind, (self.datas, self.halves, stages, ulysses), mesh_dim_names=("data", "half", "stage", "sequence")
        )
        self.data, self.half, self.stage, self.place = self.mesh.get_coordinate()
        self.writes = self.half == self.place == 0
        if self.team > 1:
            self.share_tiles = self.half * ulysses + self.place, self.team, self._add_up
        if not self.main:
            sys.stdout = open(os.devnull, "w")  # every line is said once

    def close(self):
        if not self.alone:
            dist.destroy_process_group()

    def barrier(self):
        if not self.alone:
            dist.all_reduce(torch.zeros(1))

    def machine(self):
        """How ranks of this machine share one host copy of whole weights, as sample.Models wants it; None for one rank,
        or where each has a part.
        """
        if self.alone or self.fsdp or self.stages > 1 or int(os.environ["LOCAL_WORLD_SIZE"]) == 1:
            return None
        folder = Path("/dev/shm" if Path("/dev/shm").is_dir() else tempfile.gettempdir())
        return (
            os.environ["LOCAL_RANK"] == "0",
            self.barrier,
            lambda part: folder / f"nanowan-{os.getuid()}-{os.environ['MASTER_PORT']}-{part}",
        )

    def count(self, kind, nbytes):
        self.sent[kind] = self.sent.get(kind, 0) + int(nbytes)

    def seed(self, *what, same=False):
        """Seed torch's generator from these values, and unless it is to be the `same` on all ranks, from which samples
        this one sees.
        """
        torch.manual_seed(random.Random(" ".join(map(str, [*what, 0 if same else self.data]))).getrandbits(62))

    def agree(self, yes, dim=None):
        """Whether all ranks say yes, or all along one dimension of the mesh: what each finds by itself, such as its
        free memory, may differ.
        """
        if self.alone:
            return yes
        told = torch.tensor(float(yes), device=self.device)
        dist.all_reduce(told, dist.ReduceOp.MIN, group=self.mesh[dim].get_group() if dim else None)
        return bool(told)

    def first(self, f):
        """What f() is on the first rank, on every rank: so that all see the same files, which are read once."""
        told = [f() if self.main else None]
        if not self.alone:
            dist.broadcast_object_list(told, 0)
        return told[0]

    # ---- data and gradients --------------------------------------------------------------------------------------
    def share(self, n):
        """Which of a global batch's n samples are this rank's, and their share of them. A rank for which there are none
        computes the first for nothing, since the others wait for it in every layer.
        """
        mine = list(range(self.data, n, self.datas))
        return mine or [0], len(mine) / n

    def sum(self, params, *numbers):
        """Add up the gradients of replicated parameters, and numbers, over all ranks; returns the numbers. Every rank
        gets the same bits.
        """
        if self.alone:
            return numbers
        whole = [p for p in params if not sharded(p)]
        for p in whole:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        told = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(told)
        if whole:
            flat = torch.cat([p.grad.float().flatten() for p in whole])
            dist.all_reduce(flat)
            self.count("gradients", flat.nbytes)
            for p, g in zip(whole, flat.split([p.numel() for p in whole])):
                p.grad.copy_(g.view_as(p))
        return told.tolist()

    def backward(self, model, batch, context, lens, share):
        """Back-propagate a Batch's loss times `share`; returns the part of it that this rank adds to the sum over
        ranks.
        """
        if self.stages > 1:
            return self._pipeline(model, batch, context, lens, share)
        loss = batch.loss(model, context, lens) * share
        loss.backward()
        return loss.item() if self.place == 0 else 0.0  # ranks that share a clip all know its loss

    # ---- models --------------------------------------------------------------------------------------------------
    def parallelize(self, model):
        """Split a DiT, still empty or with weights, as the flags ask; adapters, already in place, stay whole."""
        if self.ulysses > 1:
            self._share_tokens(model)
        if self.stages > 1:
            self._split_blocks(model)
        if self.fsdp:
            for block in model.blocks:
                self.shard(block, {p for p in block.parameters() if p.requires_grad})
            self.shard(
                model, {p for p in model.parameters() if not sharded(p)}
            )  # nothing more; but blocks under one root are gathered ahead
            model.keeps_text = False

    def shard(self, module, whole=frozenset(), dtype=None):
        """Shard a module's parameters over the ranks that see all samples and tokens together, but for those in
        `whole`; gradients are summed, in fp32. dtype: what is computed in, if that is not the weights' own.
        """
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None)
        fully_shard(
            module,
            mesh=self.mesh["data", "sequence"]._flatten("shard"),
            ignored_params=set(whole) or None,
            mp_policy=policy,
        )
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        module._apply(lambda t: torch.empty_like(t, device=self.device) if t.is_meta else t)

    def together(self, found):
        """The same dictionary of tensors, whole, on every rank: the first one's, or that of all stages of a pipeline."""
        found = {k: full(v).to("cpu") for k, v in found.items()}
        if self.stages == 1:
            return self.first(lambda: found)
        parts = [None] * self.stages
        dist.all_gather_object(parts, found, self.mesh["stage"].get_group())
        return {k: v for part in parts for k, v in part.items()}

    # ---- sampling -------------------------------------------------------------------------------------------------
    def exchange_halves(self, v):
        """This rank's half of guidance -> (with the prompt, without)."""
        parts = [torch.empty_like(v) for _ in range(2)]
        dist.all_gather(parts, v.contiguous(), self.mesh["half"].get_group())
        self.count("halves", v.nbytes)
        return parts

    def _add_up(self, t):
        dist.all_reduce(t, group=self.mesh["half", "sequence"]._flatten("team").get_group())
        self.count("pixels", t.nbytes)
        return t

    # ---- Ulysses: tokens ------------------------------------------------------------------------------------------
    def _share_tokens(self, model):
        """Each rank holds, of every latent frame, a strip of token rows or columns, and in self-attention a part of the
        heads of all tokens (DeepSpeed-Ulysses, Jacobs et al., 2023). Rows or columns that do not divide are filled up;
        attention never sees the filling.
        """
        heads, group = model.config.num_heads, self.mesh["sequence"].get_group()
        if heads % self.ulysses:
            raise BadInput(f"--ulysses_size {self.ulysses}: does not divide this model's {heads} heads")
        for block in model.blocks:
            block.self_attn.forward = lambda x, rope, attn=block.self_attn: self._attend(attn, x, rope, group)
        model.blocks[0].register_forward_pre_hook(lambda block, args: (self._strip(args[0], args[2][1]), *args[1:]))
        leave, head = model.leave, model.head.forward

        def left(x, time, grid):
            model.head.forward = lambda x, time: self._join(head(x, time), grid, group)
            return leave(x, time, grid)

        model.leave = left

    def _strip(self, x, grid):
        """x (B,L,D) -> this rank's tokens (B,L',D)."""
        axis, n = cut(grid, self.ulysses)
        x = filled(x.unflatten(1, grid), axis + 1, n * self.ulysses)
        return x.narrow(axis + 1, n * self.place, n).flatten(1, 3)

    def _join(self, x, grid, group):
        """This rank's tokens (B,L',D) -> all (B,L,D), on every rank."""
        axis, n = cut(grid, self.ulysses)
        part = [*grid]
        part[axis] = n
        self.count("tokens", x.nbytes * (self.ulysses - 1))
        parts = Gather.apply(x, self.place, self.ulysses, group)
        return torch.cat([p.unflatten(1, part) for p in parts], axis + 1).narrow(axis + 1, 0, grid[axis]).flatten(1, 3)

    def _attend(self, attn, x, rope, group):
        """SelfAttention.forward on this rank's tokens."""
        (table, grid), U, heads = rope, self.ulysses, attn.heads
        axis, n = cut(grid, self.ulysses)
        part = [*grid]
        part[axis] = n
        half = table.shape[1]
        third = half // 3
        pairs = slice(half - 2 * third, half - third) if axis == 1 else slice(half - third, half)
        at = (torch.arange(n, device=x.device) + n * self.place).clamp(max=len(table) - 1)
        mine = table.clone()
        mine[:n, pairs] = table[at, pairs]  # where this rank's rows or columns stand in the whole frame
        q, k = ops.qk_norm_rope(
            [attn.q(x), attn.k(x)], [attn.norm_q.weight, attn.norm_k.weight], attn.eps, heads, mine, part
        )
        v = attn.v(x).unflatten(2, (heads, -1))
        y = self._exchange(torch.stack([q, k, v]).unflatten(3, (U, -1)).movedim(3, 0), group)  # (U,3,B,L',N/U,d)
        y = y.unflatten(3, part).movedim(0, 2 + axis).flatten(2 + axis, 3 + axis)  # the ranks' strips beside each other
        y = ops.attention(*y.narrow(2 + axis, 0, grid[axis]).flatten(2, 4))  # (B,L,D/U)
        y = filled(y.unflatten(1, grid), 1 + axis, n * U).unflatten(1 + axis, (U, n)).movedim(1 + axis, 0)
        return attn.o(self._exchange(y.flatten(2, 4), group).permute(1, 2, 0, 3).flatten(2))  # (B,L',D)

    def _exchange(self, x, group):
        """Slice i of x (U,...) goes to rank i of the group; slice i of the result came from it."""
        from torch.distributed._functional_collectives import all_to_all_single_autograd

        nbytes = x.nbytes * (self.ulysses - 1) // self.ulysses
        self.count("tokens", nbytes)
        y = all_to_all_single_autograd(x.contiguous(), None, None, group)
        if y.requires_grad:
            y.register_hook(lambda gradient: self.count("tokens", nbytes))  # it goes the same way back
        return y

    # ---- pipeline: blocks -----------------------------------------------------------------------------------------
    def _split_blocks(self, model):
        """Each rank of a pipeline keeps a run of blocks. Outside of training steps the tokens are handed on by
        broadcast, so that Wan.forward works on every rank as ever.
        """
        total, S, group = len(model.blocks), self.stages, self.mesh["stage"].get_group()
        if S > total:
            raise BadInput(f"--pipeline_stages {S}: this model has {total} blocks")
        model.keeps_text, self.pipelines = False, {}
        for s in range(S):
            run = range(total * s // S, total * (s + 1) // S)
            for i in run:
                if s != self.stage:
                    model.blocks[i] = Elsewhere()
            model.blocks[run[-1]].register_forward_hook(
                lambda block, args, x, s=s: (
                    x if self.scheduling else self._hand_on(x, dist.get_global_rank(group, s), group)
                )
            )

    def _hand_on(self, x, source, group):
        x = x.clone()
        if self.rank == source:
            self.count("tokens", x.nbytes * (self.stages - 1))
        dist.broadcast(x, source, group)
        return x

    def _pipeline(self, model, batch, context, lens, share):
        """A training step of one batch, one sample a time down the pipeline and its gradient up (1F1B, Narayanan et
        al., 2019).
        """
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B

        B, S = len(batch.x), self.stages
        grid = (batch.x.shape[2], batch.x.shape[3] // 2, batch.x.shape[4] // 2)
        order = [*range(B), *[0] * (S - B)]  # a pipeline takes as many samples as it has stages, or more
        weights = torch.tensor([share / B] * B + [0.0] * (S - B))[:, None, None, None, None]
        weights = (weights if batch.counted is None else weights * batch.counted[order]).expand_as(
            batch.target[order][:, :1]
        )
        leaf = context.detach()[order].requires_grad_(context.requires_grad)
        key = (id(model), tuple(batch.x.shape), len(order))
        if key not in self.pipelines:
            stage = PipelineStage(
                Stage(model, grid, self.stage == 0, self.stage == S - 1),
                self.stage,
                S,
                torch.device(self.device),
                group=self.mesh["stage"].get_group(),
            )
            self.pipelines[key] = stage, Schedule1F1B(stage, len(order), loss_fn=weighted, scale_grads=False)
        target, losses = torch.cat([batch.target[order], weights], 1).to(self.device), []
        x, told = batch.x[order].to(self.device), dict(t=batch.t[order].to(self.device), context=leaf, lens=lens[order])
        self.scheduling = True
        try:
            first, last = self.stage == 0, self.stage == S - 1
            self.pipelines[key][1].step(*[x] * first, **told, **(dict(target=target, losses=losses) if last else {}))
        finally:
            self.scheduling = False
        tokens = 4 * len(order) * grid[0] * grid[1] * grid[2] * model.config.dim
        self.count(
            "tokens", tokens * (self.stage < S - 1) + tokens * (self.stage > 0)
        )  # downwards, and gradients upwards
        if context.requires_grad:
            gradient = torch.zeros_like(context)
            context.backward(
                gradient
                if leaf.grad is None
                else gradient.index_add(0, torch.tensor(order, device=leaf.device), leaf.grad)
            )
        return float(sum(losses)) if last else 0.0


def weighted(v, target):
    """Batch.loss of a velocity v (1,C,T',h,w); the target's last channel is the loss's weight."""
    return ((v - target[:, :-1]).square() * target[:, -1:]).mean()


class Stage(nn.Module):
    """What one rank of a pipeline computes of a DiT."""

    def __init__(self, model, grid, first, last):
        super().__init__()
        self.model, self.grid, self.first, self.last = model, grid, first, last

    def forward(self, x, t, context, lens):
        conditions = self.model.conditions(1000 * t, context, lens, self.grid)
        x = self.model.run(self.model.enter(x) if self.first else x, *conditions)
        return self.model.leave(x, conditions[0], self.grid) if self.last else x


class Elsewhere(nn.Module):
    """In the place of a block that another rank has."""

    def forward(self, x, *conditions):
        return x


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


def sharded(p):
    return hasattr(p, "placements")


def as_sharded(t, like):
    """A whole tensor cut like the parameter `like`; itself where that is whole, or it is cut already."""
    if not sharded(like) or sharded(t):
        return t
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def full(t):
    """A tensor whole again; every rank calls this."""
    return t.full_tensor() if sharded(t) else t


def clip(params, most):
    """Scale the gradients down to a common norm of at most `most`; returns what it was."""
    return full(nn.utils.clip_grad_norm_(params, most)).item()
