"""Put blocks on different ranks and send samples through this pipeline one by one (1F1B, Narayanan et al., 2019)."""

import functools
import math
import weakref

import torch
import torch.distributed as dist
import torch.nn as nn

from nanowan.errors import BadInput

PIPELINES = weakref.WeakKeyDictionary()  # {model: its Pipeline}


def apply_pipeline(model, world):
    """Make each rank of a pipeline keep only a range of consecutive blocks. A training step is run by
    `pipeline_backward`. At other times, tokens are broadcast from stage to stage, so that Wan.forward works on every
    rank.
    """
    if world.pp_size > len(model.blocks):
        raise BadInput(f"--pipeline_stages {world.pp_size}: this model has {len(model.blocks)} blocks")
    model.cache_text_kv = False
    PIPELINES[model] = Pipeline(model, world)


def pipeline_backward(world, model, batch, context, lens, loss_weight):
    """Back-propagate loss_weight times the loss of a Batch through the model's Pipeline. Return this product on the
    last rank of the pipeline, and 0 on the others.
    """
    return PIPELINES[model].backward(world, model, batch, context, lens, loss_weight)


class Pipeline:
    """A DiT on one rank of a pipeline, and its schedules for training. The rank has the blocks of its own stage;
    IdentityBlocks replace those of other stages.
    """

    def __init__(self, model, world):
        total, stages, group = len(model.blocks), world.pp_size, world.group("pp")
        self.schedules, self.in_schedule = {}, False  # in_schedule: a schedule runs, which sends the tokens
        for stage in range(stages):
            blocks = range(total * stage // stages, total * (stage + 1) // stages)
            if stage == world.pp_rank:
                self.blocks = blocks
            else:
                for i in blocks:
                    model.blocks[i] = IdentityBlock()
            source = dist.get_global_rank(group, stage)
            model.blocks[blocks[-1]].register_forward_hook(
                lambda block, args, x, source=source: (
                    x if self.in_schedule else broadcast_activations(x, source, group, world)
                )
            )

    def backward(self, world, model, batch, context, lens, loss_weight):
        is_first, is_last = world.pp_rank == 0, world.pp_rank == world.pp_size - 1
        micro = Microbatches(batch, loss_weight, world.pp_size, world.device)
        leaf = context.detach()[micro.order].requires_grad_(context.requires_grad)
        args, losses = [batch.x[micro.order].to(world.device)] if is_first else [], []
        kwargs = dict(t=batch.t[micro.order].to(world.device), context=leaf, lens=lens[micro.order])
        if is_last:  # the "target" of a microbatch is its number, which is passed to the loss
            kwargs |= dict(target=torch.arange(len(micro.order)), losses=losses)
        schedule, stage = self.schedule(world, model, batch.x.shape, len(micro.order))
        stage.microbatches = micro
        self.in_schedule = True
        try:
            schedule.step(*args, **kwargs)
        finally:
            self.in_schedule = False
        tokens = 4 * len(micro.order) * math.prod(stage.grid) * model.config.dim
        world.count("tokens", tokens * (not is_last) + tokens * (not is_first))  # tokens forward, gradients back
        if context.requires_grad:
            gradient = torch.zeros_like(context)  # this stage's blocks may not have used the text
            if leaf.grad is not None:
                gradient = gradient.index_add(0, torch.tensor(micro.order, device=leaf.device), leaf.grad)
            context.backward(gradient)
        return sum(loss.item() for loss in losses)

    def schedule(self, world, model, shape, count):
        """Return (Schedule1F1B, its Stage) for a Batch whose x has this shape and which is cut into `count`
        microbatches. Both are built once for each shape and count, and then reused.
        """
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B

        key = (tuple(shape), count)
        if key not in self.schedules:
            grid = tuple(n // p for n, p in zip(shape[2:], model.config.patch_size))
            stage = Stage(model, self.blocks, grid, world.pp_rank == 0, world.pp_rank == world.pp_size - 1)
            device, group = torch.device(world.device), world.group("pp")
            piped = PipelineStage(stage, world.pp_rank, world.pp_size, device, group=group)
            if torch.__version__ < (2, 10):
                piped._get_init_p2p_neighbors_ops = functools.partial(first_messages, piped)
            self.schedules[key] = Schedule1F1B(piped, count, loss_fn=stage.loss, scale_grads=False), stage
        return self.schedules[key]


def first_messages(stage):
    """Return the messages with which a PipelineStage opens its connections. Their tensors are cast to fp32. Without the
    cast, torch 2.9 sends them in one dtype and expects another (pytorch/pytorch#165539).
    """
    messages = type(stage)._get_init_p2p_neighbors_ops(stage)
    for message in messages:
        message.tensor = message.tensor.float()
    return messages


class Microbatches:
    """A Batch cut into single samples. order: for each microbatch, the index of its sample in the Batch. A pipeline
    needs at least as many microbatches as stages. If the Batch has fewer samples than that, the remaining microbatches
    repeat the first sample with weight 0.
    """

    def __init__(self, batch, loss_weight, stages, device):
        count = len(batch.x)
        surplus = max(0, stages - count)
        self.order = [*range(count), *[0] * surplus]
        self.batch, self.device = batch, device
        self.weights = [loss_weight / count] * count + [0.0] * surplus

    def loss(self, v, index):
        """Return the summand of the batch's loss for microbatch `index` (a tensor of one number). v (1,C,T',h,w): the
        velocity predicted for it.
        """
        i = self.order[index]
        error = (v - self.batch.target[i : i + 1].to(self.device)).square()
        if self.batch.loss_mask is not None:
            error = error * self.batch.loss_mask[i : i + 1].to(self.device)
        return self.weights[index] * error.mean()


class Stage(nn.Module):
    """The module that a Schedule1F1B runs on one rank: the rank's stage of a DiT."""

    def __init__(self, model, blocks, grid, is_first, is_last):
        super().__init__()
        self.model = weakref.ref(model)  # weak, so that PIPELINES, which refers to this Stage, forgets a dropped model
        self.blocks, self.grid, self.is_first, self.is_last = blocks, grid, is_first, is_last
        self.microbatches = None  # the Microbatches of the current step

    def forward(self, x, t, context, lens):
        model = self.model()
        c = model.prepare_block_inputs(1000 * t, context, lens, self.grid)
        x = model.forward_blocks(model.patchify(x, c) if self.is_first else x, c, self.blocks)
        return model.unpatchify(model.head(x, c.time, c.tokens.row), self.grid) if self.is_last else x

    def loss(self, v, index):
        return self.microbatches.loss(v, index)


class IdentityBlock(nn.Module):
    """The stand-in for a block that another rank holds. It returns its input."""

    def forward(self, x, *conditions):
        return x


def broadcast_activations(x, source, group, world):
    """Return, on all ranks of the group, the tokens x of the rank `source`."""
    x = x.clone()
    if world.rank == source:
        world.count("tokens", x.nbytes * (world.pp_size - 1))
    dist.broadcast(x, source, group)
    return x
