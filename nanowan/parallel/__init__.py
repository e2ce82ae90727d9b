"""Train and sample on several GPUs under torchrun: data parallelism, FSDP2, Ulysses, pipelines, split guidance.

The result equals that of one process with the same global batch.

    torchrun --nproc_per_node=8 train_lora.py ...                       data parallel
    torchrun --nproc_per_node=8 train_lora.py --fsdp ...                the frozen weights sharded (train_te.py: the
                                                                        trained ones and the optimizer's states too)
    torchrun --nproc_per_node=8 train_lora.py --ulysses_size 4 ...      four ranks split each clip's tokens; two groups
                                                                        of four ranks split the batch
    torchrun --nproc_per_node=8 train_lora.py --pipeline_stages 2 ...   each rank holds half of the blocks
    torchrun --nproc_per_node=2 sample.py --guidance_parallel ...       each rank computes one half of guidance

One rule holds everywhere: every rank holds all adapters (they are small) and computes a part of the gradient, and the
sum over all ranks is the gradient. So gradient clipping, the optimizer, EMA and files work as in one process.
PyTorch does the communication: fully_shard, DeviceMesh, all-to-all, pipelining. world.py describes the ranks. fsdp.py,
ulysses.py and pipeline_parallel.py contain one strategy each, in a function apply_*(model, world) that changes a DiT
in place.
"""

import torch.distributed as dist

from nanowan.parallel.fsdp import apply_fsdp, clip_grad_norm, full_tensor, is_sharded, shard, shard_like
from nanowan.parallel.ulysses import FirstRank, apply_ulysses
from nanowan.parallel.world import HostShare, World

__all__ = [
    "FirstRank",
    "HostShare",
    "World",
    "apply_fsdp",
    "apply_ulysses",
    "backward",
    "clip_grad_norm",
    "full_tensor",
    "gather_state",
    "is_sharded",
    "parallelize",
    "shard",
    "shard_like",
]


def parallelize(model, world):
    """Split a DiT, with or without weights, over the ranks as the flags demand. Its adapters, which must already be
    injected, are not split.
    """
    if world.sp_size > 1:
        apply_ulysses(model, world)
    if world.pp_size > 1:
        from nanowan.parallel.pipeline_parallel import apply_pipeline

        apply_pipeline(model, world)
    if world.fsdp:
        apply_fsdp(model, world)


def backward(world, model, batch, context, lens, loss_weight):
    """Back-propagate loss_weight times the loss of a Batch. Return this rank's summand of this product: the summands of
    all ranks that share the Batch add up to it. context (B,S,text_dim) and lens (B,): as for Wan.forward.
    """
    if world.pp_size > 1:
        from nanowan.parallel.pipeline_parallel import pipeline_backward

        return pipeline_backward(world, model, batch, context, lens, loss_weight)
    loss = batch.loss(model, context, lens) * loss_weight
    loss.backward()
    return loss.item() if world.sp_rank == 0 else 0.0  # ranks that share a clip all know its loss


def gather_state(world, tensors):
    """Return {name: tensor}, unsharded and on the CPU, the same on every rank. It contains the tensors of rank 0, or,
    in a pipeline, the tensors of all stages.
    """
    tensors = {k: full_tensor(v).to("cpu") for k, v in tensors.items()}
    if world.pp_size == 1:
        return world.broadcast_from_rank0(lambda: tensors)
    parts = [None] * world.pp_size
    dist.all_gather_object(parts, tensors, world.group("pp"))
    return {k: v for part in parts for k, v in part.items()}
