"""Measure how fast a GPU's matrix products, attention, convolutions and copies are, in about half a minute.

    python -m benchmarks.gpu_probe FILE.json

The code calls each measurement a question and its result the answer. FILE is written after each question. If a question
raises an error, the error is written as its answer.
"""

import math
import sys
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernels import milliseconds
from diagnostics.common import write_json

DEVICE = "cuda"
TEXT_AND_CLIP_ROWS = (46, 88, 128, 256, 257, 65520)  # tokens in the prompts of one or two samples and in two A14B clips
WEIGHTS = ((3072, 3072), (5120, 5120), (13824, 5120), (14336, 3072))  # (in, out) of linears in 5B and 14B


def random(*size, dtype=torch.bfloat16):
    return torch.randn(*size, device=DEVICE, dtype=dtype)


def product(M, N, K):
    """Return the TFLOP/s of a bf16 matrix product (M,K) x (K,N)."""
    a, b = random(M, K), random(N, K)
    return 2 * M * N * K / milliseconds(lambda: a @ b.t(), 5) / 1e9


def product_in_8_bits(M, N, K):
    """Return {"tflops", "error"} of an fp8 matrix product (M,K) x (K,N), with a scale for each row of the first factor
    and each column of the second. error: in the first 64 rows, the norm of the difference from the fp32 product over
    the norm of the fp32 product.
    """
    a, b = (random(n, K).to(torch.float8_e4m3fn) for n in (M, N))
    scales = torch.rand(M, 1, device=DEVICE), torch.rand(1, N, device=DEVICE)
    how = dict(scale_a=scales[0], scale_b=scales[1], out_dtype=torch.bfloat16, use_fast_accum=True)

    def run():
        return torch._scaled_mm(a, b.t(), **how)

    want = (a.float() * scales[0])[:64] @ (b.float().t() * scales[1])
    error = (run()[:64].float() - want).norm() / want.norm()
    return {"tflops": 2 * M * N * K / milliseconds(run, 5) / 1e9, "error": error.item()}


def attention(backend, L, heads, backward):
    """Return the TFLOP/s of self-attention over L tokens with `heads` heads of size 128. backward: whether to include
    the backward pass.
    """
    q, k, v = (random(1, L, heads, 128).transpose(1, 2).requires_grad_(backward) for _ in "qkv")

    def run():
        with sdpa_kernel([backend]):
            o = F.scaled_dot_product_attention(q, k, v)
        if backward:
            torch.autograd.grad(o, (q, k, v), o)

    return 4 * heads * L * L * 128 * (3.5 if backward else 1) / milliseconds(run, 3) / 1e9


def convolution(C, T, H, W, dtype, bias):
    """Return {"ms", "tflops"} of a 3x3x3 convolution of the VAE with C channels in and out, on an input (T,H,W)."""
    last = dict(memory_format=torch.channels_last_3d)
    x, w = random(1, C, T, H, W, dtype=dtype).contiguous(**last), random(C, C, 3, 3, 3, dtype=dtype).contiguous(**last)
    b = random(C, dtype=dtype) if bias else None
    ms = milliseconds(lambda: F.conv3d(x, w, b, padding=(0, 1, 1)), 5)
    return {"ms": ms, "tflops": 2 * 27 * C * C * (T - 2) * H * W / ms / 1e9}


def feed_forward(fused):
    """Return the ms of the first matrix product of TI2V-5B's feed-forward and the GELU after it. fused: whether both
    are one operation.
    """
    x, w, b = random(27280, 3072), random(14336, 3072), random(14336)
    if fused:
        return milliseconds(lambda: torch._addmm_activation(b, x, w.t(), use_gelu=True), 5)
    return milliseconds(lambda: F.gelu(F.linear(x, w, b), approximate="tanh"), 5)


def copies(pinned, up):
    """Return the GB/s of copies between host and device. pinned: whether the host memory is pinned. up: whether to copy
    from the host to the device.
    """
    host = torch.ones(1 << 30, dtype=torch.uint8).pin_memory() if pinned else torch.ones(1 << 30, dtype=torch.uint8)
    there = torch.ones_like(host, device=DEVICE)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(2):
        there.copy_(host, non_blocking=True) if up else host.copy_(there, non_blocking=True)
        torch.cuda.synchronize()
    return 2 * host.nbytes / (time.perf_counter() - began) / 1e9


def copies_to_fresh_memory():
    """Return the GB/s of copies from the device to newly allocated host tensors."""
    there = [torch.ones(100 << 20, dtype=torch.uint8, device=DEVICE) for _ in range(20)]
    began = time.perf_counter()
    here = [t.cpu() for t in there]
    return sum(t.nbytes for t in here) / (time.perf_counter() - began) / 1e9


def questions():
    """Return {question: a function that measures the answer}."""
    ask = {"bf16 product 54560x14336x3072, TFLOP/s": lambda: product(54560, 14336, 3072)}
    ask["bf16 product 65520x13824x5120, TFLOP/s"] = lambda: product(65520, 13824, 5120)
    for rows in TEXT_AND_CLIP_ROWS:
        for K, N in WEIGHTS:
            ask[f"fp8 product {rows}x{N}x{K}"] = lambda rows=rows, K=K, N=N: product_in_8_bits(rows, N, K)
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        for L, heads in ((8192, 24), (27280, 24), (32760, 40)):
            for backward in (False, True):
                name = f"{backend.name} {L}x{heads}{' and backward' * backward}, TFLOP/s"
                ask[name] = lambda how=(backend, L, heads, backward): attention(*how)
    for bias in (False, True):
        for size in ((256, 6, 352, 640), (512, 6, 176, 320)):
            name = f"conv3d {'x'.join(map(str, size))} bf16{', bias' * bias}"
            ask[name] = lambda size=size, bias=bias: convolution(*size, torch.bfloat16, bias)
    ask["conv3d 160x6x240x416 fp32 (TF32)"] = lambda: convolution(160, 6, 240, 416, torch.float32, False)
    for fused in (True, False):
        ask[f"GELU {'with' if fused else 'after'} the product, ms"] = lambda fused=fused: feed_forward(fused)
    for pinned in (False, True):
        for up in (True, False):
            name = f"copy {'to' if up else 'from'} the device, {'pinned' if pinned else 'pageable'}, GB/s"
            ask[name] = lambda pinned=pinned, up=up: copies(pinned, up)
    ask["copy from the device to new memory, GB/s"] = copies_to_fresh_memory
    return ask


def answer(ask, file):
    """Call the functions in `ask` {question: function}, and return {question: answer}. An answer is a number, a dict of
    numbers or the text of an error. The answers are also written to `file` after each question.
    """
    answers = {}
    for name, question in ask.items():
        try:
            answers[name] = question()
            if isinstance(answers[name], float) and not math.isfinite(answers[name]):
                raise ValueError(f"{answers[name]} was measured")
        except Exception as e:  # the next question may still be answered
            answers[name] = f"{type(e).__name__}: {str(e).splitlines()[0][:160]}"
        print(f"{name}: {answers[name]}", flush=True)
        write_json(file, answers)
    return answers


if __name__ == "__main__":
    answer(questions(), sys.argv[1])
