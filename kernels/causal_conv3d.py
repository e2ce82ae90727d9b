"""The VAE's causal 3-D convolution, streaming through time, with the RMS norm and SiLU before it; C++ and CUDA in csrc.

    python -m kernels.causal_conv3d     check against the reference, then time it

x (B,C,T,H,W); past (B,C,2,H,W), the frames before x as the convolution saw them, or None for zeros; weight (N,C,kt,k,k)
of 3x3x3, 3x1x1 or 1x1x1; gamma (C,...) or None for no norm. Returns out (B,N,T,H,W) and what the next chunk's `past` is
(None with kt = 1).
"""

import torch
import torch.nn.functional as F

from kernels import BUILT
from kernels.testing import milliseconds, report, seeded, worst


# ---- reference ---------------------------------------------------------------------------------------------------
def rms_norm(x, gamma):
    """x / |x| over the channels, times sqrt(C) gamma."""
    return F.normalize(x, dim=1) * (x.shape[1] ** 0.5 * gamma)


def causal_conv3d_ref(x, past, weight, bias=None, gamma=None):
    """-> (out, the next chunk's past), as above."""
    if gamma is not None:
        x = F.silu(rms_norm(x, gamma.view(-1, 1, 1, 1)))
    pad = (0, weight.shape[3] // 2, weight.shape[4] // 2)
    if weight.shape[2] == 1:
        return F.conv3d(x, weight, bias, padding=pad), None
    x = torch.cat([x.new_zeros(*x.shape[:2], 2, *x.shape[3:]) if past is None else past, x], 2)
    return F.conv3d(x, weight, bias, padding=pad), x[:, :, -2:].clone()  # a view would keep the whole chunk alive


# ---- public ------------------------------------------------------------------------------------------------------
def causal_conv3d(x, past, weight, bias=None, gamma=None):
    """As causal_conv3d_ref; without gradients."""
    out, past = torch.ops.nanowan_csrc.causal_conv3d(x, past, weight, bias, None if gamma is None else gamma.flatten())
    return out, past if weight.shape[2] > 1 else None


def check(device, dtype):
    """Worst relative error against the reference in fp64 over kernels, odd sizes, layouts, with and without past, bias
    and norm, and of streaming.
    """
    (_, random), results = seeded(), ([], [])
    for C, N, kernel in (
        (16, 24, (3, 3, 3)),
        (17, 5, (3, 3, 3)),
        (48, 96, (3, 1, 1)),
        (33, 12, (1, 1, 1)),
        (130, 100, (3, 3, 3)),
    ):
        for normed in (False, True):
            x, w, b, gamma = (
                random(2, C, 5, 7, 9),
                random(N, C, *kernel) * (C * 27) ** -0.5,
                random(N),
                1 + 0.1 * random(C),
            )
            tensors = [t.to(dtype).to(device) for t in (x, w, b, gamma)]
            for op, kind, out in ((causal_conv3d, dtype, results[0]), (causal_conv3d_ref, torch.float64, results[1])):
                x, w, b, gamma = (t.to(kind) for t in tensors)
                x = x.transpose(3, 4)[..., 1:]  # strided
                whole, last = op(x, None, w, b, gamma if normed else None)
                first, past = op(x[:, :, :1], None, w, None, gamma if normed else None)
                second, past = op(x[:, :, 1:3], past, w, b, gamma if normed else None)
                out += [whole, first, second, *([] if last is None else [last, past])]
    return worst(*results)


@torch.no_grad()
def time_size(device, C, T, H, W):
    """{name: {"ms", "tflops"}} of a convolution of C channels to C, 3x3x3, over (T,H,W): in fp32, on a GPU in bf16."""
    like = dict(device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    sizes = ((1, C, T, H, W), (1, C, 2, H, W), (C, C, 3, 3, 3))
    tensors = (torch.randn(*size, **like).contiguous(memory_format=torch.channels_last_3d) for size in sizes)
    inputs = *tensors, torch.zeros(C, **like), torch.ones(C, **like)
    times = {
        "ours": milliseconds(lambda: causal_conv3d(*inputs), 5),
        "reference": milliseconds(lambda: causal_conv3d_ref(*inputs), 5),
    }
    results = {name: {"ms": ms, "tflops": 2 * 27 * C * C * T * H * W / ms / 1e9} for name, ms in times.items()}
    line = ", ".join(f"{name} {r['ms']:.2f} ms ({r['tflops']:.2f} TFLOP/s)" for name, r in results.items())
    print(f"causal_conv3d {C} channels, {T}x{H}x{W}: {line}", flush=True)
    return results


def main():
    device, results = "cuda" if torch.cuda.is_available() and torch.ops.nanowan_csrc.has_cuda() else "cpu", {}
    torch.backends.cudnn.allow_tf32 = False  # for the limit of fp32
    limits = {torch.float32: 3e-6, torch.bfloat16: 2e-2}
    for dtype, limit in limits.items():
        results[f"check {dtype}"] = report(f"causal_conv3d on {device}, {dtype}", check(device, dtype), limit)
    sizes = ((128, 4, 64, 64), (512, 1, 8, 8))
    if device == "cuda":
        sizes = ((256, 4, 704, 1280), (512, 4, 352, 640), (1024, 2, 88, 160))
    for C, T, H, W in sizes:
        results[f"{C}x{T}x{H}x{W}"] = time_size(device, C, T, H, W)
    return results


if __name__ == "__main__":
    if not BUILT:
        raise SystemExit("the C++ extension is not built")
    main()
