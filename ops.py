"""Picks the implementation of every hot operation, once, at import; scripts print which (`chosen`).

NANOWAN_OPS=ref      the plain PyTorch definitions, in kernels/*.py and below
           =triton   the Triton kernels (on a CPU only under TRITON_INTERPRET=1)
           =cuda     Triton, and csrc's CUDA for what comes before the VAE's convolutions
           =cpp      csrc's C++, on a CPU
           =auto     what is there and pays: on a GPU Triton, on a CPU C++ where it was built, else the reference
An explicit choice that cannot be had raises ImportError with the reason. Models call these functions unconditionally.
"""

import contextlib
import functools
import importlib.util
import math
import os
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from kernels import adamw8bit as adamw8bit_kernel
from kernels import attention as attention_kernel
from kernels import causal_conv3d as conv_kernel
from kernels import gelu as gelu_kernel
from kernels import linear as linear_kernel
from kernels import modulate as modulate_kernel
from kernels import qk_norm_rope as norm_kernel
from kernels import quantize as quantize_kernel
from kernels.rope import grid_positions, rope_table

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


def on_gpu(x):
    """Whether x is on a GPU, or in a plan (`using`, pretend) a fake tensor that stands for one there."""
    return x.is_cuda or CHOSEN["cpu"] in ("triton", "cuda") and not kernels.INTERPRETED


def capable(device, least=(0, 0), below=(99, 0)):
    """Whether least <= a GPU's (major, minor) < below; a plan that is made without a GPU is for a Hopper."""
    capability = 9, 0
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device if device.type == "cuda" else None)
    return least <= capability < below


def chosen(device):
    """What a device's operations are, for a run's first lines and its record."""
    kind = torch.device(device).type
    names = {"ref": "PyTorch's", "cpp": "C++", "triton": "Triton's", "cuda": "Triton's and CUDA's"}
    choice = CHOSEN.get(kind, "ref")
    products = {"tiles": ", large fp32 products on AMX tiles", "onednn": ", large fp32 products by oneDNN", None: ""}
    where = products[linear_kernel.FASTER] if choice == "cpp" else ""
    if kind == "cuda" and torch.__version__ < (2, 10) and (torch.backends.cudnn.version() or 0) < 91500:
        # pytorch/pytorch#166643
        where = "; torch 2.9 makes the VAE's bf16 convolutions without cuDNN, slowly and in much memory: take 2.10"
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


class GELU(torch.nn.Module):
    """GELU by its tanh formula; without gradients in x's place, which is contiguous, as nn.ReLU(inplace=True)."""

    def forward(self, x):
        ours = x.device.type == "cpu" and CHOSEN["cpu"] == "cpp"
        if torch.is_grad_enabled():
            return (gelu_kernel.gelu if ours else gelu_kernel.gelu_ref)(x)
        return gelu_kernel.gelu_(x) if ours else torch.ops.aten.gelu_(x, approximate="tanh")


def linear_gelu(linear, x):
    """The GELU of linear(x). Without gradients a GPU computes it with the product, of the sums before they are rounded
    to bf16: 2 to 3 % of a video DiT's step on an H100, but slower on consumers' Blackwells (sgl-project/sglang#33536,
    #34350).
    """
    plain = type(linear) is Linear and x.dtype == torch.bfloat16 and not torch.is_grad_enabled()
    if plain and fast(x) and on_gpu(x) and capable(x.device, below=(12, 0)):
        # on a GPU its GELU is the tanh formula, whatever library multiplies
        y = torch._addmm_activation(linear.bias, x.flatten(0, -2), linear.weight.t(), use_gelu=True)
        return y.unflatten(0, x.shape[:-1])
    return GELU()(linear(x))


# PyTorch's attention on a GPU, best first; from Hopper on cuDNN's is the fastest
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# with a mask not cuDNN's, PyTorch's own choice: it makes a plan for every length, and on Hopper its gradients by q were
# NaN at some (pytorch/pytorch#196678)
MASKED_BACKENDS = BACKENDS[2:]
FLASH_FIRST = [BACKENDS[1], BACKENDS[0], *BACKENDS[2:]]
FLASH = "FlashAttention 2"  # what FLASH_ATTENTION is; `race` asks flash_attention


def no_saved_tensor_hooks():
    """Within, what a backward pass needs is simply kept: of hooks the innermost count, and those of checkpointing would
    run the block again, and so the race in it.
    """
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)


@functools.cache
def flash_attention(device):
    """Which FlashAttention PyTorch has: 3 from now on, where the package flash_attn_interface is installed and works on
    `device`, every GPU is a Hopper and PyTorch can take it (2.11).
    """
    known = getattr(torch.nn.attention, "list_flash_attention_impls", list)()
    if "FA3" not in known or not importlib.util.find_spec("flash_attn_interface"):
        return "FlashAttention 2"
    if any(torch.cuda.get_device_capability(i)[0] != 9 for i in range(torch.cuda.device_count())):
        return "FlashAttention 2"
    try:
        torch.nn.attention.activate_flash_attention_impl("FA3")
        with torch.enable_grad(), no_saved_tensor_hooks():
            q = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
            torch.autograd.grad(sdpa(q, q, q, backends=FLASH_FIRST).sum(), q)
    except Exception as e:  # whatever a package that was built for another PyTorch raises
        print(f"ops: flash_attn_interface does not work here ({type(e).__name__}: {e})", file=sys.stderr)
        torch.nn.attention.restore_flash_attention_impl()
        return "FlashAttention 2"
    return "FlashAttention 3"


def sdpa(q, k, v, mask=None, scale=None, backends=BACKENDS):
    """Softmax attention of q (B,N,L,d) on k and v (B,N,S,d), with a mask added to the logits -> (B,N,L,d). backends:
    on a GPU and without a mask, which are tried in turn.
    """
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    with sdpa_kernel(backends if mask is None else MASKED_BACKENDS, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def sdpa_backend(q, k, v):
    """Which of BACKENDS takes q, k and v (B,N,L,d) without a mask."""
    cuda = torch.backends.cuda
    params = cuda.SDPAParams(q, k, v, None, 0.0, False, False)
    takes = cuda.can_use_cudnn_attention, cuda.can_use_flash_attention, cuda.can_use_efficient_attention
    return next((backend for backend, can in zip(BACKENDS, takes) if can(params)), SDPBackend.MATH)


def attention(q, k, v, bias=None, backends=BACKENDS):
    """Softmax attention of q (B,L,N,d) on k and v (B,S,N,d), with bias (B,1,1,S) added to the logits -> (B,L,N*d)."""
    if bias is not None:
        bias = bias.to(q.dtype)
    q, k, v = (u.transpose(1, 2) for u in (q, k, v))
    return sdpa(q, k, v, bias, backends=backends).transpose(1, 2).flatten(2)


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


def self_attention(q, k, v, weights, eps, heads, table, positions):
    """Attention of the bare projections q, k, v (B,L,D) on themselves, q and k normed by `weights` and rotated ->
    (B,L,D).
    """
    if CHOSEN.get(q.device.type) in ("triton", "cuda"):
        return contenders()[fastest(q, heads)](q, k, v, weights, eps, heads, table, positions)
    if CHOSEN.get(q.device.type) == "cpp" and torch.is_grad_enabled():
        return NormedAttention.apply(q, k, v, *weights, eps, heads, table, norm_kernel.packed(positions))
    return unfused_attention(q, k, v, weights, eps, heads, table, positions)


def fused_attention(q, k, v, weights, eps, heads, table, positions):
    """Ours, which norms and rotates q as it loads it."""
    (k,) = qk_norm_rope([k], weights[1:], eps, heads, table, positions)
    q, v = (u.unflatten(2, (heads, -1)) for u in (q, v))
    return attention_kernel.attention(q, k, v, None, weights[0], eps, table, positions).flatten(2)


def unfused_attention(q, k, v, weights, eps, heads, table, positions, backends=BACKENDS):
    """PyTorch's, after q and k were normed and rotated."""
    q, k = qk_norm_rope([q, k], weights, eps, heads, table, positions)
    return attention(q, k, v.unflatten(2, (heads, -1)), backends=backends)


def contenders():
    """{name: a self-attention on a GPU}."""
    return {
        "ours": fused_attention,
        "PyTorch's": unfused_attention,
        FLASH: functools.partial(unfused_attention, backends=FLASH_FIRST),
    }


RACED = {}  # what `race` found; a training's state keeps it, and the clips of a long video
RACE_GRID = (8, 32, 32)  # of tokens in a race; what wins there loses little at other lengths


def fastest(q, heads):
    """Which of `contenders` is the fastest for tokens like q's (B,L,D), with a backward pass where gradients are on."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "PyTorch's"  # ranks that work together would each race alone, and disagree
    if not q.is_cuda:
        # nothing to time: in Triton's interpreter the kernel is what is to be tested, in a plan PyTorch's attention
        # takes more
        return "ours" if kernels.INTERPRETED else "PyTorch's"
    return race(q.device, q.dtype, heads, q.shape[2] // heads, torch.is_grad_enabled())


def race(device, dtype, heads, d, learns):
    """The answer of `fastest` for `heads` of width d, timed at the first call; printed. It does not depend on the
    number of tokens: torch.compile, which runs it while it traces, need not trace anew for another length.
    """
    global FLASH
    FLASH = flash_attention(device)
    name = torch.cuda.get_device_name(device)
    key = f"{name}, {dtype}, {heads} heads of {d}{', trained' * learns}"
    if RACED.get(key) not in contenders():  # a state's may not be installed here
        generator, L = torch.Generator(device).manual_seed(0), math.prod(RACE_GRID)  # of its own: a run's draws stay
        like = dict(dtype=dtype, device=device)
        q, k, v = (torch.randn(1, L, heads * d, generator=generator, **like).requires_grad_(learns) for _ in "qkv")
        weights = torch.ones(2, heads * d, device=device).unbind()
        inputs = q, k, v, weights, 1e-6, heads, rope_table(max(RACE_GRID), d, device), grid_positions(RACE_GRID, device)

        def run(attend):
            out = attend(*inputs)
            if learns:
                torch.autograd.grad(out, (q, k, v), out)

        with torch.set_grad_enabled(learns), no_saved_tensor_hooks(), torch.cuda.device(device):
            backend = sdpa_backend(*(u.unflatten(2, (heads, -1)).transpose(1, 2) for u in (q, k, v)))
            hopper, racing = torch.cuda.get_device_capability() >= (9, 0), contenders()
            if backend != BACKENDS[0]:
                del racing[FLASH]  # PyTorch's is it already, or neither takes these
            times = {who: kernels.milliseconds(functools.partial(run, how), 5) for who, how in racing.items()}
        RACED[key] = min(times, key=times.get)
        each = ", ".join(f"{who} {ms:.2f} ms" for who, ms in times.items())
        print(
            f"ops: attention of {heads} heads of {d} in {dtype}: {RACED[key]} ({L} tokens{' and back' * learns}: "
            f"{each}; PyTorch's is by {FLASH if backend == BACKENDS[1] else backend.name})",
            file=sys.stderr,
            flush=True,
        )
        if hopper and backend != BACKENDS[0]:
            print(f"ops: cuDNN {torch.backends.cudnn.version()} does not take it", file=sys.stderr)
    return RACED[key]


if torch.cuda.is_available():  # elsewhere nothing is timed, and importing what torch.compile needs takes a second
    # torch.compile runs these while it traces, and leaves them out
    race, capable = map(torch.compiler.assume_constant_result, (race, capable))


def quantize_rows(x, activated=False):
    """x (n,m), or its GELU, in e4m3, and each row's scale (n,1) fp32."""
    fused = CHOSEN.get(x.device.type) in ("triton", "cuda")
    return (quantize_kernel.quantize_rows if fused else quantize_kernel.quantize_rows_ref)(x, activated)


def adamw8bit_step(weight, compensation, grad, codes, scale, step, lr, betas, eps, weight_decay):
    """The step-th step (from 1) of AdamW with 8-bit moments, in place (kernels/adamw8bit.py)."""
    fused = CHOSEN.get(weight.device.type) in ("triton", "cuda")
    update = adamw8bit_kernel.step if fused else adamw8bit_kernel.step_ref
    update(weight, compensation, grad, codes, scale, step, lr, betas, eps, weight_decay)


@functools.cache
def csrc_runs_on(device):
    """Whether csrc's CUDA was built for this GPU. Not asked at import, where it would take memory on the first GPU."""
    with torch.cuda.device(device):
        fits, name = torch.ops.nanowan_csrc.fits_this_gpu(), torch.cuda.get_device_name()
    if not fits:
        print(
            f"ops: the extension was not built for {name}; PyTorch's operations are used for the VAE ({sys.executable} "
            "setup.py build_ext --inplace builds it for the GPUs of this machine)",
            file=sys.stderr,
            flush=True,
        )
    return fits


def causal_conv3d(x, past, weight, bias, gamma=None):
    """Convolve x (B,C,T,H,W) after the frames `past` (B,C,2,H,W) that the convolution saw last, or None; with gamma,
    RMS norm and SiLU come first. Returns (B,N,T,H,W) and the next `past`. csrc has no backward pass: where gradients
    are wanted, the reference is used.
    """
    ours = CHOSEN.get(x.device.type) in ("cpp", "cuda") and not (
        torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    )
    ours = ours and (not x.is_cuda or csrc_runs_on(x.device))
    return (conv_kernel.causal_conv3d if ours else conv_kernel.causal_conv3d_ref)(x, past, weight, bias, gamma)


def rms_norm(x, gamma):
    """x / |x| over the channels (axis 1), times sqrt(C) gamma."""
    return conv_kernel.rms_norm(x, gamma)
