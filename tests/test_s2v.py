"""WanS2V against figures of the official code, and its gradients against a plain, unfused version.

data/s2v.safetensors holds what Wan-Video/Wan2.2 at 42bf4cfa (wan/modules/s2v/model_s2v.py, with flash attention, which
needs a GPU, replaced by PyTorch's in fp32) computed on a CPU from `fill`'s weights and `inputs`, motion_frames=[73,19].
"""

from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from s2v import AudioEncoder, AudioInjector, FramePacker, embed_patches, spread

FIGURES = load_file(Path(__file__).parent / "data" / "s2v.safetensors")
DIM, HEADS, LAYERS, AUDIO_DIM, INJECT_LAYERS = 48, 3, 4, 24, (0, 1, 3)


def fill(model, seed=7):
    """Random weights, none of them zero, in the order of their names."""
    g = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        r = torch.randn(p.shape, generator=g)
        if "norm" in name and name.endswith("weight"):
            p.data = 1 + 0.1 * r
        elif name == "casual_audio_encoder.weights":
            p.data = 0.5 + 0.3 * r
        elif p.dim() == 1:
            p.data = 0.1 * r
        elif "modulation" in name or "mask" in name or "padding" in name:
            p.data = 0.3 * r
        else:
            p.data = r * p[0].numel() ** -0.5
    return model.eval().requires_grad_(False)


def inputs(B=1, T=3, h=16, w=8, motion_frames=19, seed=0):
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(B, *shape, generator=g)

    return dict(
        x=randn(16, T, h, w),
        ref=randn(16, 1, h, w),
        motion=randn(16, motion_frames, h, w),
        pose=randn(16, T, h, w),
        audio=randn(25, AUDIO_DIM, 4 * T),
        context=randn(9, tiny.TEXT_DIM),
        t=torch.tensor([871.0, 254.0])[:B],
        context_lens=torch.tensor([9, 4])[:B],
    )


# ---- the plain version -----------------------------------------------------------------------------------------
def plain(weights, x, t, context, context_lens, ref, audio, motion=None, pose=None):
    """The model written down step by step: nothing fused, cached or shared with the modules; weights {name: tensor}."""
    W, N = weights, HEADS

    def linear(name, x):
        return F.linear(x, W[f"{name}.weight"], W[f"{name}.bias"])

    def norm(x, eps=1e-6):
        return F.layer_norm(x, x.shape[-1:], eps=eps)

    def rms(name, x):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * W[f"{name}.weight"]

    def attend(q, k, v):  # (B,L,D)
        q, k, v = (u.unflatten(-1, (N, -1)).transpose(-2, -3) for u in (q, k, v))
        p = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return (p @ v).transpose(-2, -3).flatten(-2)

    def conv(name, x):
        kernel = W[f"{name}.weight"].shape[2:]
        return F.conv3d(x, W[f"{name}.weight"], W[f"{name}.bias"], kernel).flatten(2).transpose(1, 2)

    def causal(name, x, stride):  # (B,C,T)
        x = torch.cat([x[..., :1], x[..., :1], x], -1)
        return F.conv1d(x, W[f"{name}.conv.weight"], W[f"{name}.conv.bias"], stride)

    def silu_norm(x):  # over the channels of (B,C,T)
        return F.silu(norm(x.transpose(1, 2))).transpose(1, 2)

    # sound
    e = "casual_audio_encoder"
    mix = F.silu(W[f"{e}.weights"])
    sound = (torch.cat([audio[..., :1].repeat(1, 1, 1, 73), audio], -1) * mix).sum(1) / mix.sum(1)
    heads = causal(f"{e}.encoder.conv1_local", sound, 1).chunk(4, 1)
    paths = []
    for y in (*heads, causal(f"{e}.encoder.conv1_global", sound, 1)):
        y = causal(f"{e}.encoder.conv2", silu_norm(y), 2)
        paths.append(silu_norm(causal(f"{e}.encoder.conv3", silu_norm(y), 2)).transpose(1, 2)[:, 19:])
    local = torch.stack([*paths[:4], W[f"{e}.encoder.padding_tokens"][0].expand_as(paths[0])], 2)  # (B,T',5,D)
    whole = linear(f"{e}.encoder.final_linear", paths[4])  # (B,T',D)

    # tokens, where they stand, which row of the mask
    (B, _, T, h, w), mask = x.shape, W["trainable_cond_mask.weight"]
    H, V = h // 2, w // 2
    tokens = conv("patch_embedding", x) + conv("cond_encoder", torch.zeros_like(x) if pose is None else pose) + mask[0]
    L0 = tokens.shape[1]
    at = [(a, b, c) for a in range(T) for b in range(H) for c in range(V)]
    parts = [tokens, conv("patch_embedding", ref) + mask[1]]
    at += [(30, b, c) for b in range(H) for c in range(V)]
    if motion is not None:
        motion = F.pad(motion, (0, 0, 0, 0, 19, 0))[:, :, -19:]
        parts += [conv("frame_packer.proj", motion[:, :, 18:]) + mask[2]]
        parts += [conv("frame_packer.proj_2x", motion[:, :, 16:18]) + mask[2]]
        parts += [conv("frame_packer.proj_4x", motion[:, :, :16]) + mask[2]]
        at += [(-1, b, c) for b in range(H) for c in range(V)]
        for times, n, m in (((-3,), h // 4, w // 4), ((-19, -14, -9, -4), h // 8, w // 8)):
            rows, columns = ([int(i * (size - 1) / max(k - 1, 1)) for i in range(k)] for k, size in ((n, H), (m, V)))
            at += [(a, b, c) for a in times for b in rows for c in columns]
    x = torch.cat(parts, 1)

    # rotation
    half = DIM // N // 2
    each = half - 2 * (half // 3), half // 3, half // 3
    angle = torch.cat(
        [
            torch.tensor([p[axis] for p in at]).double()[:, None] * 10000.0 ** (-torch.arange(n).double() / n)
            for axis, n in enumerate(each)
        ],
        1,
    )
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]

    def rotate(x):  # (B,L,D)
        pairs = torch.view_as_complex(x.double().unflatten(2, (N, half, 2)))
        return torch.view_as_real(pairs * turn).flatten(2).float()

    # time and text
    frequency = 10000.0 ** (-torch.arange(32).double() / 32)
    angle = torch.stack([t, torch.zeros_like(t)], 1).double()[..., None] * frequency
    time = torch.cat([angle.cos(), angle.sin()], -1).float()
    time = linear("time_embedding.2", F.silu(linear("time_embedding.0", time)))  # (B,2,D)
    rows = linear("time_projection.1", F.silu(time)).unflatten(2, (6, -1))
    noise = torch.arange(x.shape[1]) < L0
    context = torch.stack([F.pad(c[:n], (0, 0, 0, 512 - n)) for c, n in zip(context, context_lens.tolist())])
    context = linear("text_embedding.2", F.gelu(linear("text_embedding.0", context), approximate="tanh"))

    for i in range(LAYERS):
        b = f"blocks.{i}"
        m = rows + W[f"{b}.modulation"][:, None]
        m = torch.where(noise[:, None, None], m[:, :1], m[:, 1:])  # (B,L,6,D)
        y = norm(x) * (1 + m[:, :, 1]) + m[:, :, 0]
        a = f"{b}.self_attn"
        q, k = rotate(rms(f"{a}.norm_q", linear(f"{a}.q", y))), rotate(rms(f"{a}.norm_k", linear(f"{a}.k", y)))
        x = x + m[:, :, 2] * linear(f"{a}.o", attend(q, k, linear(f"{a}.v", y)))
        a, y = f"{b}.cross_attn", norm(x) * W[f"{b}.norm3.weight"] + W[f"{b}.norm3.bias"]
        q, k = rms(f"{a}.norm_q", linear(f"{a}.q", y)), rms(f"{a}.norm_k", linear(f"{a}.k", context))
        x = x + linear(f"{a}.o", attend(q, k, linear(f"{a}.v", context)))
        y = norm(x) * (1 + m[:, :, 4]) + m[:, :, 3]
        x = x + m[:, :, 5] * linear(f"{b}.ffn.2", F.gelu(linear(f"{b}.ffn.0", y), approximate="tanh"))
        if i in INJECT_LAYERS:
            j = INJECT_LAYERS.index(i)
            a = f"audio_injector.injector.{j}"
            shift, scale = linear(f"audio_injector.injector_adain_layers.{j}.linear", F.silu(whole)).chunk(2, -1)
            y = x[:, :L0].unflatten(1, (T, -1))  # (B,T',n,D)
            q = rms(f"{a}.norm_q", linear(f"{a}.q", norm(y, 1e-5) * (1 + scale[:, :, None]) + shift[:, :, None]))
            y = y + linear(f"{a}.o", attend(q, rms(f"{a}.norm_k", linear(f"{a}.k", local)), linear(f"{a}.v", local)))
            x = torch.cat([y.flatten(1, 2), x[:, L0:]], 1)

    shift, scale = (time[:, :1, None] + W["head.modulation"]).unbind(2)
    y = linear("head.head", norm(x[:, :L0]) * (1 + scale) + shift)
    y = y.view(B, T, H, V, 1, 2, 2, 16).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return y.reshape(B, 16, T, h, w)
