"""The VAE's causal 3-D convolution, streaming through time, with the RMS norm and SiLU before it; C++ and CUDA in csrc.

x (B,C,T,H,W); past (B,C,2,H,W), the frames before x as the convolution saw them, or None for zeros; weight (N,C,kt,k,k)
of 3x3x3, 3x1x1 or 1x1x1; gamma (C,...) or None for no norm. Returns out (B,N,T,H,W) and what the next chunk's `past` is
(None with kt = 1).
"""

import torch
import torch.nn.functional as F


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
