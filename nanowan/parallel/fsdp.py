"""Weights sharded over ranks (FSDP2): each block is gathered while it runs, its gradients are summed."""

import torch
import torch.nn as nn


def apply_fsdp(model, world):
    """Shard a DiT's frozen weights; adapters, already in place, stay whole."""
    for block in model.blocks:
        shard(block, world, {p for p in block.parameters() if p.requires_grad})
    # nothing more than the adapters is left out here; blocks under one root are gathered ahead
    shard(model, world, {p for p in model.parameters() if not is_sharded(p)})
    model.cache_text_kv = False


def shard(module, world, whole=(), dtype=None):
    """Shard a module's parameters over the ranks that see all samples and tokens together, but for those in `whole`;
    gradients are summed, in fp32. dtype: what is computed in, if that is not the weights' own.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None)
    mesh = world.mesh["dp", "sp"]._flatten("dp_sp")
    fully_shard(module, mesh=mesh, ignored_params=set(whole) or None, mp_policy=policy)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)
    module._apply(lambda t: torch.empty_like(t, device=world.device) if t.is_meta else t)


def is_sharded(p):
    return hasattr(p, "placements")


def shard_like(t, like):
    """A whole tensor cut like the parameter `like`; itself where that is whole, or it is cut already."""
    if not is_sharded(like) or is_sharded(t):
        return t
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def full_tensor(t):
    """A tensor whole again; every rank calls this."""
    return t.full_tensor() if is_sharded(t) else t


def clip_grad_norm(params, max_norm):
    """Scale the gradients down to a common norm of at most `max_norm`; returns what it was."""
    return full_tensor(nn.utils.clip_grad_norm_(params, max_norm)).item()
