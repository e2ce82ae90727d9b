"""Compute on the CPU what the kernels of a fake GPU leave out. PyTorch runs each CUDA operation, with all its checks.
Then the result is overwritten, in the same memory, by the result of the same operation on CPU tensors.
"""

import ctypes
import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils._pytree import tree_leaves, tree_map

aten, Generator = torch.ops.aten, torch.Generator
EMPTY = ("empty", "empty_strided", "new_empty", "new_empty_strided", "empty_like", "set_", "resize_", "record_stream")
NO_RESULT = ("_local_scalar_dense", "is_pinned", "_pin_memory")
# operations of which only the CPU's version runs: those whose results' shapes depend on data, such as a mask; and exp2,
# which PyTorch would compile at its first call, with a real driver
ON_HOST_ALONE = ("nonzero", "masked_select", "_unique2", "unique_dim", "repeat_interleave", "exp2")
COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")  # nccl.cpp moves the data of these


def host(t):
    """Return a CPU tensor that shares the memory of a CUDA tensor."""
    storage = t.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
    memory = (ctypes.c_byte * storage.nbytes()).from_address(storage.data_ptr())
    raw = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=t.dtype).set_(raw, t.storage_offset(), t.shape, t.stride())


def on_host(tree):
    """Return the arguments of an operation with CPU tensors, generators and devices in place of CUDA's."""

    def one(x):
        if isinstance(x, torch.Tensor):
            return host(x) if x.is_cuda else x
        if isinstance(x, Generator) and x.device.type == "cuda":  # equal states give equal numbers
            return torch.Generator().manual_seed(x.initial_seed() % 2**40 * 2**20 + x.get_offset())
        return torch.device("cpu") if isinstance(x, torch.device) else x

    return tree_map(one, tree)


def put(out, *values):
    """Copy `values` into the memory of the results `out`."""
    for r, v in zip(out, values):
        if r is not None and v is not None and r.numel():
            host(r).copy_(v)


# ---- operations that the CPU lacks or defines otherwise ----------------------------------------------------------
def attend(q, k, v, bias=None, scale=None):
    """Return the attention (B,N,L,d) and the log of the softmax's sum (B,N,L). q (B,N,L,d), k and v (B,N,S,d)."""
    logits = q.float() @ k.float().transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    logits = logits if bias is None else logits + bias.float()
    return (logits.softmax(-1) @ v.float()).to(q.dtype), logits.logsumexp(-1)


def attend_backward(grad, q, k, v, bias=None, scale=None):
    """Return the gradients of q, k and v. grad: the gradient of the attention."""
    dtype, scale = q.dtype, scale or q.shape[-1] ** -0.5
    grad, q, k, v = (u.float() for u in (grad, q, k, v))
    logits = q @ k.transpose(-1, -2) * scale
    p = (logits if bias is None else logits + bias.float()).softmax(-1)
    dp = grad @ v.transpose(-1, -2)
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
    return [u.to(dtype) for u in (ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad)]


def rms_norm_backward(out, grad, x, shape, rstd, weight, mask):
    dims = tuple(range(-len(shape), 0))
    g, y = grad.float(), x.float() * rstd
    gw = g if weight is None else g * weight.float()
    put(out, rstd * (gw - y * (gw * y).mean(dims, keepdim=True)), (g * y).sum(tuple(range(x.dim() - len(shape)))))


def addmm_gelu(out, bias, x, weight, use_gelu=False):
    y = x.float() @ weight.float() + bias.float()
    put([out], torch.nn.functional.gelu(y, approximate="tanh"))


def scaled_mm(out, a, b, scale_a, scale_b, bias=None, *_, **__):
    put([out], (a.float() * scale_a) @ (b.float() * scale_b) + (0 if bias is None else bias.float()))


SPECIAL = {
    aten._fused_rms_norm_backward.default: rms_norm_backward,
    aten._addmm_activation.default: addmm_gelu,
    aten._scaled_mm.default: scaled_mm,
}
# for each of PyTorch's attentions, the index of the bias among the arguments after v, in forward and in backward
for _name, _at in {"cudnn": (0, 4), "efficient": (0, 0), "flash": (None, None)}.items():

    def _forward(out, q, k, v, *more, scale=None, at=_at[0], **_):
        put(out[:1], attend(q, k, v, None if at is None else more[at], scale)[0])  # _backward needs no other result

    def _backward(out, grad, q, k, v, *more, scale=None, at=_at[1], **_):
        put(out[:3], *attend_backward(grad, q, k, v, None if at is None else more[at], scale))

    SPECIAL[getattr(aten, f"_scaled_dot_product_{_name}_attention").default] = _forward
    SPECIAL[getattr(aten, f"_scaled_dot_product_{_name}_attention_backward").default] = _backward


def add_ours():
    """Add this project's operations to SPECIAL, computed by their reference definitions."""
    import kernels
    from kernels import adamw8bit, attention, causal_conv3d, qk_norm_rope, quantize

    def attention_forward(out, q, k, v, weight, eps, table, positions):
        if weight is not None:
            (q,) = qk_norm_rope.qk_norm_rope_ref([q.flatten(2)], [weight], eps, q.shape[2], table, positions)
        o, lse = attend(*(u.transpose(1, 2) for u in (q, k, v)))
        put(out, o.transpose(1, 2), lse / math.log(2))

    def attention_backward(out, grad, q, k, v, *_):
        grads = attend_backward(*(u.transpose(1, 2) for u in (grad, q, k, v)))
        put(out, *(g.transpose(1, 2) for g in grads))

    def adamw(_, weight, compensation, grad, codes, scale, step, lr, b1, b2, eps, weight_decay):
        adamw8bit.step_ref(weight, compensation, grad, codes, scale, step, lr, (b1, b2), eps, weight_decay)

    def fill_buffer(_, x, past, input_bias, gamma, buffer, last):
        if gamma is not None:
            x = x if input_bias is None else x + input_bias.view(-1, 1, 1, 1)
            x = torch.nn.functional.silu(causal_conv3d.rms_norm(x, gamma.view(-1, 1, 1, 1)))
        buffer.copy_(torch.cat([torch.zeros_like(last) if past is None else past, x], 2))
        last.copy_(buffer[:, :, -last.shape[2] :])

    def add_residual(_, out, residual, bias):
        out.copy_(out + residual + (0 if bias is None else bias.view(-1, 1, 1, 1)))

    ours = torch.ops.nanowan
    SPECIAL[ours.attention.default], SPECIAL[ours.attention_backward.default] = attention_forward, attention_backward
    SPECIAL[ours.adamw8bit_step.default] = adamw
    SPECIAL[ours.fill_buffer.default], SPECIAL[ours.add_residual.default] = fill_buffer, add_residual
    if kernels.BUILT:
        SPECIAL[torch.ops.nanowan_csrc.fill_buffer.default] = fill_buffer
    SPECIAL[ours.quantize_rows.default] = lambda out, *a: put(out, *quantize.quantize_rows_ref(*a))
    assert attention.triton, "Triton is not there"


class Emulation(TorchDispatchMode):
    """A context in which CUDA operations return correct results."""

    ours = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.__name__.split(".")[0]
        if any(is_traceable_wrapper_subclass_type(t) for t in types):
            return NotImplemented  # the operation on a DTensor's shard comes here later
        if func.namespace in COLLECTIVES:
            return func(*args, **kwargs)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.is_cuda]
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if inputs and (name in ON_HOST_ALONE or by_mask):
            return tree_map(lambda t: t.cuda(), func(*on_host(args), **on_host(kwargs)))
        out = func(*args, **kwargs)
        outputs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.is_cuda]
        if not inputs and not outputs or name in EMPTY or name in NO_RESULT:
            return out
        if func.namespace.startswith("nanowan") and not self.ours:
            Emulation.ours = True
            add_ours()
        if func in SPECIAL:
            SPECIAL[func](out, *on_host(args), **on_host(kwargs))
            return out
        memory = {t.untyped_storage().data_ptr() for t in inputs}
        may_be_view = func.namespace == "aten" and not func._schema.is_mutable  # FSDP2's ops write into their results
        if may_be_view and outputs and all(t.untyped_storage().data_ptr() in memory for t in outputs):
            return out  # views
        moved = ("pin_memory", "non_blocking", *(("device",) if name == "_to_copy" else ()))
        done = func(*on_host(args), **{k: v for k, v in on_host(kwargs).items() if k not in moved})
        if func._schema.is_mutable:
            return out
        if name == "equal":
            return done
        for r, v in zip(tree_leaves(out), tree_leaves(done)):
            if isinstance(r, torch.Tensor):
                (host(r) if r.is_cuda else r).copy_(v)
        return out
