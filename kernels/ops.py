"""The operations that models call. Each function chooses its implementation in kernels/*.py with backend.py."""

import functools
import sys

import torch

from kernels import attention_backends
from kernels import gelu as gelu_kernel
from kernels import linear as linear_kernel
from kernels import modulate as modulate_kernel
from kernels import qk_norm_rope as norm_kernel
from kernels.attention_backends import attention as attention
from kernels.attention_backends import sdpa as sdpa
from kernels.attention_backends import self_attention as self_attention
from kernels.backend import capable, fast, has_triton, implementation, on_gpu


def modulate(x, weight, shift, eps, dtype, index=None):
    """Return LayerNorm(x) * weight + shift in `dtype`. x (B,L,D) fp32; weight, shift (B,F,D) fp32: rows of modulation;
    index (L,) int32: the number of the row that serves each token (default: each row serves L/F successive tokens).
    """
    return (modulate_kernel.modulate if fast(x) else modulate_kernel.modulate_ref)(x, weight, shift, eps, dtype, index)


def gate(x, y, gate=None, index=None):
    """Return x + gate * y or, without a gate, x + y. x (B,L,D) fp32: the residual stream; y (B,L,D): a branch's output;
    gate (B,F,D) fp32: rows of modulation; index: as in modulate.
    """
    return (modulate_kernel.gate if fast(x) else modulate_kernel.gate_ref)(x, y, gate, index)


def gate_modulate(x, y, gate, weight, shift, eps, dtype, index=None):
    """Return (x + gate * y, the result of `modulate` for this sum). gate, weight and shift have the same number F of
    rows; arguments as in `gate` and `modulate`.
    """
    fused = modulate_kernel.gate_modulate if fast(x) else modulate_kernel.gate_modulate_ref
    return fused(x, y, gate, weight, shift, eps, dtype, index)


def qk_norm_rope(xs, weights, eps, heads, table=None, positions=None):
    """Apply RMSNorm to each of xs (B,L,D), split it into heads and, if a rope_table and positions (L,3) are given,
    rotate it -> list of (B,L,N,d).
    """
    norm = norm_kernel.qk_norm_rope if fast(xs[0]) else norm_kernel.qk_norm_rope_ref
    return norm(xs, weights, eps, heads, table, positions)


class Linear(torch.nn.Linear):
    """A linear layer with unquantised weights in a DiT's block. Fp8Linear and LoRALinear, which can replace it, have
    the same methods.
    """

    @property
    def takes_gelu(self):
        """Whether `forward` should also apply the GELU before this linear. With gradients it should, to save memory."""
        return torch.is_grad_enabled()

    def forward(self, x, activated=False, rows=None):
        """Return x W^T + b, or gelu(x) W^T + b if `activated`. rows: for Fp8Linear only; ignored here."""
        ours = fast(x) and (activated or linear_kernel.uses_onednn(x, self.weight))
        return (linear_kernel.linear if ours else linear_kernel.linear_ref)(x, self.weight, self.bias, activated)

    def with_gelu(self, x, gelu):
        """Return gelu(self(x)). On Hopper and data-centre Blackwell GPUs, without gradients, the matrix product also
        computes the GELU, before the sums are rounded to bf16. This saves 2 to 3 % of a video DiT's step on an H100
        (sgl-project/sglang#33536). A GELU within the product was slower on an RTX 4090 (karpathy/llm.c#591) and on
        consumer Blackwells (sgl-project/sglang#34350).
        """
        fuses = x.dtype == torch.bfloat16 and not torch.is_grad_enabled()
        if fuses and fast(x) and on_gpu(x) and capable(x.device, least=(9, 0), below=(11, 0)):
            # on a GPU, the GELU of this call is the tanh formula, whichever library computes it
            y = torch._addmm_activation(self.bias, x.flatten(0, -2), self.weight.t(), use_gelu=True)
            return y.unflatten(0, x.shape[:-1])
        return gelu(self(x))

    def round_input(self, x):
        """Return None. Only an Fp8Linear rounds its input."""


class GELU(torch.nn.Module):
    """GELU by its tanh formula. Without gradients, the result overwrites x, as with nn.ReLU(inplace=True). x must be
    contiguous.
    """

    def forward(self, x):
        ours = implementation(x.device.type) == "cpp"
        if torch.is_grad_enabled():
            return (gelu_kernel.gelu if ours else gelu_kernel.gelu_ref)(x)
        return gelu_kernel.gelu_(x) if ours else torch.ops.aten.gelu_(x, approximate="tanh")


def quantize_rows(x, activated=False):
    """Return x (n,m), or its GELU if `activated`, in e4m3, and the scale (n,1) fp32 of each row."""
    from kernels import quantize

    return (quantize.quantize_rows if has_triton(x) else quantize.quantize_rows_ref)(x, activated)


def adamw8bit_step(weight, compensation, grad, codes, scale, step, lr, betas, eps, weight_decay):
    """Do AdamW's step number `step` (from 1) with 8-bit moments, in place (kernels/adamw8bit.py)."""
    from kernels import adamw8bit

    update = adamw8bit.step if has_triton(weight) else adamw8bit.step_ref
    update(weight, compensation, grad, codes, scale, step, lr, betas, eps, weight_decay)


@functools.cache
def csrc_runs_on(device):
    """Return whether csrc's CUDA part was built for this GPU. Do not call it at import, since it takes memory on the
    GPU.
    """
    with torch.cuda.device(device):
        fits, name = torch.ops.nanowan_csrc.fits_this_gpu(), torch.cuda.get_device_name()
    if not fits:
        print(
            f"ops: the extension was not built for {name}; Triton is used for the VAE ({sys.executable} setup.py "
            "build_ext --inplace builds it for the GPUs of this machine)",
            file=sys.stderr,
            flush=True,
        )
    return fits


def uses_cuda_kernel(device):
    """Return whether csrc's CUDA kernel runs before the VAE's convolutions on a device."""
    return device.type == "cuda" and implementation("cuda") == "cuda" and csrc_runs_on(device)


def causal_conv3d(x, past, weight, bias, gamma=None, input_bias=None, residual=None):
    """Convolve x (B,C,T,H,W), preceded by the two frames `past` (B,C,2,H,W) or, if it is None, by zeros. With gamma,
    RMS norm and SiLU are applied to x first, after adding input_bias (C). residual (B,N,T,H,W) is added to the result.
    Returns (B,N,T,H,W) and the next `past`. The fused versions have no backward pass: if gradients are needed, the
    reference is used.
    """
    from kernels import causal_conv3d as conv

    inputs = x, past, weight, bias, gamma, input_bias, residual
    if not fast(x) or torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return conv.causal_conv3d_ref(*inputs)
    if not has_triton(x):
        return conv.causal_conv3d_on_cpu(*inputs)
    return conv.causal_conv3d(
        *inputs, fill_buffer=torch.ops.nanowan_csrc.fill_buffer if uses_cuda_kernel(x.device) else None
    )


def rms_norm(x, gamma):
    """Return x / |x| * sqrt(C) * gamma, the norm |x| being taken over the C channels (axis 1)."""
    from kernels import causal_conv3d as conv

    return conv.rms_norm(x, gamma)


def describe(device):
    """Return a line that says which operations are used on a device. A run prints this line and records it."""
    device = torch.device(device)
    words = {"ref": "PyTorch's", "cpp": "C++", "triton": "Triton's", "cuda": "Triton's"}
    line = f"{words[implementation(device.type)]} operations on {device.type}"
    if implementation(device.type) == "cpp" and linear_kernel.PREFERS_ONEDNN:
        line += ", large fp32 products by oneDNN"
    if device.type == "cuda":
        line += f", {attention_backends.describe(device)}"
        line += ", CUDA's for the VAE" * uses_cuda_kernel(device)
        if torch.__version__ < (2, 10) and (torch.backends.cudnn.version() or 0) < 91500:  # pytorch/pytorch#166643
            line += "; torch 2.9 makes the VAE's bf16 convolutions without cuDNN, slowly and in much memory: take 2.10"
    return line
