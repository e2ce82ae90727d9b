"""Picks the implementation of every hot operation, once, at import; scripts print which (`chosen`).

NANOWAN_OPS=ref      the plain PyTorch definitions, in kernels/*.py and below
           =triton   the Triton kernels (on a CPU only under TRITON_INTERPRET=1)
           =cuda     Triton, and csrc's CUDA convolution for the VAE
           =cpp      csrc's C++, on a CPU
           =auto     what is there and pays: on a GPU Triton, on a CPU C++ where it was built, else the reference
An explicit choice that cannot be had raises ImportError with the reason. Models call these functions unconditionally.
"""

import contextlib
import os
import sys

import torch
import torch.nn.functional as F

import kernels
from kernels import attention as attention_kernel
from kernels import causal_conv3d as conv_kernel
from kernels import gelu as gelu_kernel
from kernels import linear as linear_kernel
from kernels import modulate as modulate_kernel
from kernels import qk_norm_rope as norm_kernel

CHOICES = ("auto", "ref", "cpp", "triton", "cuda")


def available():
    """{choice: None, or why it cannot be had}."""
    gpu, cpp, triton, cuda = torch.cuda.is_available(), None, None, None
    if not kernels.BUILT:
        cpp = f"the C++ extension is not built ({sys.executable} -m pip install -e . builds it)"
    if not gpu and not kernels.INTERPRETED:
        triton = "no CUDA device, and TRITON_INTERPRET is not 1"
    elif kernels.triton is None:
        triton = "triton is not installed"
    if not gpu:
        cuda = "no CUDA device"
    elif cpp or not torch.ops.nanowan_csrc.has_cuda():
        cuda = cpp or "the extension was built without CUDA (NANOWAN_CUDA=1 makes setup.py say why)"
    return {"auto": None, "ref": None, "cpp": cpp, "triton": triton, "cuda": triton or cuda}


def resolve(choice):
    """{device type: implementation} for one of CHOICES. Raises ImportError where an explicit one cannot be had."""
    if choice not in CHOICES:
        raise ImportError(f"NANOWAN_OPS={choice}: choose from {', '.join(CHOICES)}")
    why = available()
    if why[choice]:
        raise ImportError(f"NANOWAN_OPS={choice}: {why[choice]}")
    if choice == "auto":
        return {
            "cpu": "ref" if why["cpp"] else "cpp",
            "cuda": "cuda" if not why["cuda"] else "ref" if why["triton"] else "triton",
        }
    return {
        "cpu": choice if choice == "cpp" or choice == "triton" and kernels.INTERPRETED else "ref",
        "cuda": choice if choice in ("triton", "cuda") else "ref",
    }


CHOSEN = resolve(os.environ.get("NANOWAN_OPS", "auto"))


def fast(x):
    """Whether x's device has more than the reference."""
    return CHOSEN.get(x.device.type, "ref") != "ref"


def chosen(device):
    """What a device's operations are, for a run's first lines and its record."""
    kind = torch.device(device).type
    names = {"ref": "PyTorch's", "cpp": "C++", "triton": "Triton's", "cuda": "Triton's, and CUDA's convolution"}
    choice = CHOSEN.get(kind, "ref")
    products = {"tiles": ", large fp32 products on AMX tiles", "onednn": ", large fp32 products by oneDNN", None: ""}
    where = products[linear_kernel.FASTER] if choice == "cpp" else ""
    return f"{names[choice]} operations on {kind}{where}"


@contextlib.contextmanager
def using(choice, pretend=False):
    """Another choice for a while: for tests and benchmarks. pretend: on fake CPU tensors, what a GPU would run."""
    global CHOSEN
    before, CHOSEN = CHOSEN, {"cpu": choice} if pretend else resolve(choice)
    try:
        yield
    finally:
        CHOSEN = before


def modulate(x, weight, shift, eps, dtype, index=None):
    """LayerNorm(x) * weight + shift in `dtype`; x (B,L,D) fp32, weight and shift rows (B,F,D) fp32. index (L,) int32:
    which row serves each token; without one, each serves L/F in order.
    """
    return (modulate_kernel.modulate if fast(x) else modulate_kernel.modulate_ref)(x, weight, shift, eps, dtype, index)


def gate(x, y, gate=None, index=None):
    """x + gate * y, the residual stream x in fp32, y (B,L,D), gate rows (B,F,D) fp32; index as in modulate."""
    return (modulate_kernel.gate if fast(x) else modulate_kernel.gate_ref)(x, y, gate, index)


def gate_modulate(x, y, gate, weight, shift, eps, dtype, index=None):
    """(x + gate * y, and its `modulate`); all rows (B,F,D) of the same F."""
    fused = modulate_kernel.gate_modulate if fast(x) else modulate_kernel.gate_modulate_ref
    return fused(x, y, gate, weight, shift, eps, dtype, index)


def qk_norm_rope(xs, weights, eps, heads, table=None, positions=None):
    """RMSNorm each of xs (B,L,D), split it into heads and, with a rope_table and positions (L,3), rotate them:
    [(B,L,N,d)].
    """
    norm = norm_kernel.qk_norm_rope if fast(xs[0]) else norm_kernel.qk_norm_rope_ref
    return norm(xs, weights, eps, heads, table, positions)


class Linear(torch.nn.Linear):
    def forward(self, x, activated=False):
        """x W^T + b, of the GELU of x if `activated`."""
        ours = fast(x) and (activated or linear_kernel.faster(x, self.weight))
        return (linear_kernel.linear if ours else linear_kernel.linear_ref)(x, self.weight, self.bias, activated)


def gelu(x):
    """GELU by its tanh formula."""
    return gelu_kernel.gelu(x) if x.device.type == "cpu" and CHOSEN["cpu"] == "cpp" else gelu_kernel.gelu_ref(x)


class GELU(torch.nn.Module):
    def forward(self, x):
        return gelu(x)


def attention(q, k, v, bias=None):
    """Softmax attention of q (B,L,N,d) on k and v (B,S,N,d), with bias (B,1,1,S) added to the logits -> (B,L,N*d)."""
    if bias is not None:
        bias = bias.to(q.dtype)
    q, k, v = (u.transpose(1, 2) for u in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


class NormedAttention(torch.autograd.Function):
    """On a CPU, PyTorch's attention of q and k normed and rotated; what is kept are the bare ones, which the backward
    pass norms once more.
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
        dq, dk, *dweights = norm_kernel.fused_backward(
            [dnormed_q, dnormed_k], [q, k], [weight_q, weight_k], *ctx.how, need_weights
        )
        dweight_q, dweight_k = dweights[0] if need_weights else (None, None)
        return dq, dk, dv.flatten(2), dweight_q, dweight_k, None, None, None, None


PICKED = {}  # (device, shape, dtype, heads) -> whether the fused kernel is faster than PyTorch's attention


def self_attention(q, k, v, weights, eps, heads, table, positions):
    """Attention of the bare projections q, k, v (B,L,D) on themselves, q and k normed by `weights` and rotated ->
    (B,L,D).
    """
    if CHOSEN.get(q.device.type) in ("triton", "cuda") and fused_is_faster(q, heads):
        (k,) = qk_norm_rope([k], weights[1:], eps, heads, table, positions)
        q, v = (u.unflatten(2, (heads, -1)) for u in (q, v))
        return attention_kernel.attention(q, k, v, None, weights[0], eps, table, positions).flatten(2)
    if CHOSEN.get(q.device.type) == "cpp" and torch.is_grad_enabled():
        return NormedAttention.apply(q, k, v, *weights, eps, heads, table, norm_kernel.packed(positions))
    q, k = qk_norm_rope([q, k], weights, eps, heads, table, positions)
    return attention(q, k, v.unflatten(2, (heads, -1)))


def fused_is_faster(q, heads):
    """Whether q's attention is faster in our kernel, which norms and rotates q as it loads it, or in PyTorch's after
    that is done. Timed once for each shape, on a GPU; printed.
    """
    if not q.is_cuda:
        # nothing to time: in Triton's interpreter the kernel is what is to be tested, in a plan PyTorch's attention
        # takes more
        return kernels.INTERPRETED
    return timed(q.device, tuple(q.shape), q.dtype, heads)


def timed(device, shape, dtype, heads):
    key = (device, shape, dtype, heads)
    if key not in PICKED:
        u, w = torch.randn(shape, dtype=dtype, device=device), [torch.ones(shape[2], device=device)]
        split = u.unflatten(2, (heads, -1))
        with torch.no_grad(), torch.cuda.device(device):
            ours = kernels.milliseconds(lambda: attention_kernel.attention(split, split, split, None, w[0]), 3)
            theirs = kernels.milliseconds(
                lambda: attention(norm_kernel.qk_norm_rope([u], w, 1e-6, heads)[0], split, split), 3
            )
        PICKED[key] = ours < theirs
        faster = "the fused kernel" if PICKED[key] else "PyTorch after the fused norm and rotation"
        times = f"{ours:.2f} ms fused, {theirs:.2f} ms unfused"
        print(f"ops: attention of {shape} in {dtype}: {faster} ({times})", file=sys.stderr, flush=True)
    return PICKED[key]


if torch.cuda.is_available():  # elsewhere nothing is timed, and importing what torch.compile needs takes a second
    timed = torch.compiler.assume_constant_result(timed)  # torch.compile runs it while it traces, and leaves it out


def causal_conv3d(x, past, weight, bias, gamma=None):
    """Convolve x (B,C,T,H,W) after the frames `past` (B,C,2,H,W) that the convolution saw last, or None; with gamma,
    RMS norm and SiLU come first. Returns (B,N,T,H,W) and the next `past`. csrc has no backward pass: where gradients
    are wanted, the reference is used.
    """
    ours = CHOSEN.get(x.device.type) in ("cpp", "cuda") and not (
        torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    )
    return (conv_kernel.causal_conv3d if ours else conv_kernel.causal_conv3d_ref)(x, past, weight, bias, gamma)


def rms_norm(x, gamma):
    """x / |x| over the channels (axis 1), times sqrt(C) gamma."""
    return conv_kernel.rms_norm(x, gamma)
