"""Choose which attention runs: PyTorch's, this project's Triton kernel or SageAttention.

`select` sets the choice; the default is `auto`. On a GPU, `auto` chooses by compute capability: cuDNN's attention on
Hopper and data-centre Blackwell (9.x, 10.x), and FlashAttention elsewhere. There, cuDNN's attention was measured at
0.82x the speed of FlashAttention on an A100, 0.93x on an A10G and 0.88x on an RTX PRO 6000
(huggingface/transformers#48163). If the package flash_attn_interface is installed and works, and every GPU is a Hopper,
PyTorch's FlashAttention is version 3, and `auto` chooses it. SageAttention (Zhang et al., 2024) multiplies in 8 bits:
it is not exact, and has no gradients.
"""

import functools
import importlib.util
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from kernels import attention as attention_kernel
from kernels import backend
from kernels import qk_norm_rope as norm_kernel

CHOICES = ("auto", "cudnn", "flash", "triton", "sage")
CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
FLASH_FIRST = [CUDNN_FIRST[1], CUDNN_FIRST[0], *CUDNN_FIRST[2:]]
# with a mask, PyTorch would choose cuDNN's attention; it is left out, since it makes a plan for each length, and since
# its gradients of q were NaN at some lengths on Hopper (pytorch/pytorch#196678)
MASKED_BACKENDS = CUDNN_FIRST[2:]
SELECTED, SAGE_ERROR = "auto", None  # set by `select`


# ---- the choice --------------------------------------------------------------------------------------------------
def select(name, device, dtype=torch.bfloat16, gradients=False):
    """Choose the attention that is used on a device from now on: `name`, one of CHOICES. dtype: the dtype of q, k and
    v. gradients: whether gradients will be needed. A choice other than "auto" is tried on a small random input. Raises
    ValueError, with the reason, if the choice is not available.
    """
    global SELECTED, SAGE_ERROR
    device = torch.device(device)
    if name not in CHOICES:
        raise ValueError(f"choose from {', '.join(CHOICES)}")
    if name != "auto":
        if device.type != "cuda":
            raise ValueError(f"attention is chosen on GPUs only; this is {device.type}")
        if name == "sage" and gradients:
            raise ValueError("SageAttention has no gradients; it is for sampling")
        if name == "sage" and not importlib.util.find_spec("sageattention"):
            raise ValueError("the package sageattention is not installed (https://github.com/thu-ml/SageAttention)")
        if name == "triton" and backend.implementation("cuda") == "ref":
            raise ValueError("Triton's operations are not used here")
        SAGE_ERROR = sample_error(name, device, dtype)
    SELECTED = name


@torch.no_grad()
def sample_error(name, device, dtype, shape=(1, 2048, 4, 128)):
    """Return the relative error of the attention `name`, one of CHOICES except "auto", against PyTorch's in fp32, for
    random normal q, k, v of `shape` (B,L,N,d). Raises ValueError if this attention does not run on the device.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in "qkv")
    by_name = {
        "cudnn": lambda: attention(q, k, v, backends=CUDNN_FIRST[:1]),
        "flash": lambda: attention(q, k, v, backends=FLASH_FIRST[:1]),
        "triton": lambda: attention_kernel.attention(q, k, v).flatten(2),
        "sage": lambda: sage_attention(q, k, v),
    }
    try:
        got = by_name[name]().float()
    except Exception as e:  # whatever a package or a kernel raises
        raise ValueError(f"does not run here ({backend.in_one_line(e)})") from None
    want = F.scaled_dot_product_attention(*(u.float().transpose(1, 2) for u in (q, k, v))).transpose(1, 2).flatten(2)
    return ((got - want).norm() / want.norm()).item()


@functools.cache
def by_capability(device):
    """Return what "auto" means on a GPU: "cudnn" or "flash"."""
    if flash_attention_3(device):
        return "flash"
    return "cudnn" if backend.capable(device, least=(9, 0), below=(11, 0)) else "flash"


def chosen(device):
    """Return which of CHOICES self-attention uses on `device`. If "auto" is selected, return what it stands for."""
    return by_capability(device) if SELECTED == "auto" else SELECTED


def describe(device):
    """Return a few words that say which attention is used on a GPU. A run prints them when it starts."""
    name = chosen(device)
    if name == "sage":
        return f"SageAttention, off by {100 * SAGE_ERROR:.2f} % on random inputs"
    flash = "FlashAttention 3" if name == "flash" and flash_attention_3(device) else "FlashAttention 2"
    return {"cudnn": "cuDNN's attention", "flash": flash, "triton": "Triton attention"}[name]


@functools.cache
def flash_attention_3(device):
    """Try to switch PyTorch's FlashAttention to version 3, and return whether this worked. Version 3 works if
    PyTorch is 2.11 or newer, every GPU is a Hopper, and the package flash_attn_interface runs on `device`.
    """
    known = getattr(torch.nn.attention, "list_flash_attention_impls", list)()
    if "FA3" not in known or not importlib.util.find_spec("flash_attn_interface"):
        return False
    if any(torch.cuda.get_device_capability(i)[0] != 9 for i in range(torch.cuda.device_count())):
        return False
    try:
        torch.nn.attention.activate_flash_attention_impl("FA3")
        keep = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)  # overrides any outer hooks
        with torch.enable_grad(), keep:
            q = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
            torch.autograd.grad(sdpa(q, q, q, backends=FLASH_FIRST).sum(), q)
    except Exception as e:  # whatever a package that was built for another PyTorch raises
        print(f"ops: flash_attn_interface does not work here ({backend.in_one_line(e)})", file=sys.stderr)
        torch.nn.attention.restore_flash_attention_impl()
        return False
    return True


if torch.cuda.is_available():
    # torch.compile treats the results of these functions as constants
    by_capability, flash_attention_3 = map(torch.compiler.assume_constant_result, (by_capability, flash_attention_3))


# ---- attention ---------------------------------------------------------------------------------------------------
def sdpa(q, k, v, mask=None, scale=None, backends=None):
    """Return PyTorch's softmax attention (B,N,L,d) of q (B,N,L,d) on k and v (B,N,S,d), with `mask` added to the
    logits. backends: PyTorch's backends to try, in this order; ignored on a CPU or with a mask. Default: all,
    beginning with the selected one if "cudnn" or "flash" is selected, else with the one that by_capability returns.
    """
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    if mask is not None:
        backends = MASKED_BACKENDS
    elif backends is None:
        name = SELECTED if SELECTED in ("cudnn", "flash") else by_capability(q.device)
        backends = CUDNN_FIRST if name == "cudnn" else FLASH_FIRST
    with sdpa_kernel(backends, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def sage_attention(q, k, v):
    """Return SageAttention's result (B,L,N*d) for q (B,L,N,d), k and v (B,S,N,d). Raises ValueError if gradients are
    needed.
    """
    from sageattention import sageattn

    if torch.is_grad_enabled() and any(u.requires_grad for u in (q, k, v)):
        raise ValueError("SageAttention has no gradients; it is for sampling")
    return sageattn(q, k, v, tensor_layout="NHD").flatten(2)


def attention(q, k, v, bias=None, backends=None):
    """Return the softmax attention (B,L,N*d) of q (B,L,N,d) on k and v (B,S,N,d), with bias (B,1,1,S) added to the
    logits. backends: as in sdpa.
    """
    if SELECTED == "sage" and q.is_cuda and bias is None and backends is None:
        return sage_attention(q, k, v)
    if bias is not None:
        bias = bias.to(q.dtype)
    q, k, v = (u.transpose(1, 2) for u in (q, k, v))
    return sdpa(q, k, v, bias, backends=backends).transpose(1, 2).flatten(2)


class NormedAttention(torch.autograd.Function):
    """PyTorch's attention on a CPU, with q and k normed and rotated first. q and k are saved as given for the backward
    pass, which norms and rotates them again.
    """

    @staticmethod
    def forward(ctx, q, k, v, weight_q, weight_k, eps, heads, table, positions):
        ctx.how = eps, heads, table, positions
        normed_q, normed_k = norm_kernel.qk_norm_rope([q, k], [weight_q, weight_k], *ctx.how)
        transposed = (u.transpose(1, 2) for u in (normed_q, normed_k, v.unflatten(2, (heads, -1))))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*transposed)
        ctx.save_for_backward(q, k, v, weight_q, weight_k, out, lse)
        return out.transpose(1, 2).flatten(2)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, weight_q, weight_k, out, lse = ctx.saved_tensors
        normed_q, normed_k = norm_kernel.qk_norm_rope([q, k], [weight_q, weight_k], *ctx.how)
        v = v.unflatten(2, (ctx.how[1], -1))
        transposed = (u.transpose(1, 2) for u in (grad.reshape(v.shape), normed_q, normed_k, v))
        attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads = attention_backward(*transposed, out, lse, 0.0, False)
        dnormed_q, dnormed_k, dv = (g.transpose(1, 2).contiguous() for g in grads)
        need_weights = any(ctx.needs_input_grad[3:5])
        dq, dk, *dweights = norm_kernel.qk_norm_rope_backward(
            [dnormed_q, dnormed_k], [q, k], [weight_q, weight_k], *ctx.how, need_weights
        )
        dweight_q, dweight_k = dweights[0] if need_weights else (None, None)
        return dq, dk, dv.flatten(2), dweight_q, dweight_k, None, None, None, None


def self_attention(q, k, v, weights, eps, heads, table, positions):
    """Norm q and k by `weights` and rotate them, then return self-attention (B,L,D). q, k, v (B,L,D): projections."""
    # in Triton's interpreter, this project's kernel runs, to test it; a plan's fake tensors take PyTorch's attention,
    # which needs more memory
    ours = kernels.INTERPRETED if not q.is_cuda else chosen(q.device) == "triton"
    if backend.has_triton(q) and ours:
        return fused_attention(q, k, v, weights, eps, heads, table, positions)
    if backend.implementation(q.device.type) == "cpp" and torch.is_grad_enabled():
        return NormedAttention.apply(q, k, v, *weights, eps, heads, table, norm_kernel.packed(positions))
    return unfused_attention(q, k, v, weights, eps, heads, table, positions)


def fused_attention(q, k, v, weights, eps, heads, table, positions):
    """Compute self_attention: norm and rotate k, then run this project's Triton kernel, which does the same to q."""
    (k,) = norm_kernel.qk_norm_rope([k], weights[1:], eps, heads, table, positions)
    q, v = (u.unflatten(2, (heads, -1)) for u in (q, v))
    return attention_kernel.attention(q, k, v, weights[0], eps, table, positions).flatten(2)


def unfused_attention(q, k, v, weights, eps, heads, table, positions):
    """Compute self_attention with the chosen attention, after norming and rotating q and k."""
    norm = norm_kernel.qk_norm_rope if backend.fast(q) else norm_kernel.qk_norm_rope_ref
    q, k = norm([q, k], weights, eps, heads, table, positions)
    return attention(q, k, v.unflatten(2, (heads, -1)))
