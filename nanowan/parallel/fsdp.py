"""Shard weights over ranks (FSDP2): each block is gathered while it runs, and its gradients are summed over ranks."""

import torch
import torch.nn as nn


def apply_fsdp(model, world):
    """Shard the frozen weights of a DiT's blocks. Adapters, which must be injected before this call, are not sharded,
    and neither are weights outside of blocks.
    """
    for block in model.blocks:
        shard(block, world, {p for p in block.parameters() if p.requires_grad})
    # This call shards nothing, but makes the DiT the root; with one root, FSDP gathers blocks ahead of their use.
    shard(model, world, {p for p in model.parameters() if not is_sharded(p)})
    model.cache_text_kv = False


def shard(module, world, whole=(), dtype=None):
    """Shard a module's parameters, except those in `whole`, over the mesh's dimensions dp and sp, that is, over ranks
    that compute different samples or different tokens. Gradients are summed over these ranks. If dtype is given, the
    module computes in this dtype, and gradients are summed in fp32. Otherwise both happen in the weights' own dtype.
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
    """Return an unsharded tensor t, sharded like the parameter `like`. If `like` is unsharded or t is already sharded,
    t itself is returned.
    """
    if not is_sharded(like) or is_sharded(t):
        return t
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def full_tensor(t):
    """Return the full tensor of a sharded one; an unsharded tensor is returned unchanged. Every rank must call this."""
    return t.full_tensor() if is_sharded(t) else t


def clip_grad_norm(params, max_norm):
    """Scale the gradients so that their norm, over all `params`, is at most `max_norm`. Return the norm before that."""
    return full_tensor(nn.utils.clip_grad_norm_(params, max_norm)).item()
