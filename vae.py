"""The two causal video VAEs of Wan 2.2: 2.1 (16 channels, stride 4x8x8) and 2.2 (48 channels, stride 4x16x16).

B batch size, C channels, T = 4k+1 frames, T' = k+1 latent frames, H W height and width in pixels, h w in latent pixels.
Both stream through time: the encoder takes 1 frame, then 4 at a time; the decoder takes 1 latent frame at a time.
`past` is a dictionary {layer: what this layer keeps of the previous chunk}; each encode or decode call has its own.
Source: official wan/modules/vae2_1.py and vae2_2.py, whose tensor names are kept.
"""

from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import ops


class Geometry(NamedTuple):
    """The shape of a VAE's latents: z_dim channels; each latent pixel stands for `stride` = (frames, height, width) of
    the video, except that the video's first frame has a latent frame of its own.
    """

    z_dim: int
    stride: tuple[int, int, int]

    def latent_shape(self, frames, height, width):
        """Return the shape (z_dim,T',h,w) of a video's latents; pixels beyond a multiple of the stride are cut off."""
        st, sh, sw = self.stride
        return self.z_dim, 1 + (frames - 1) // st, height // sh, width // sw


GEOMETRY = {"2.1": Geometry(16, (4, 8, 8)), "2.2": Geometry(48, (4, 16, 16))}

# fmt: off
LATENT_STATS = {  # number of channels: (mean, std) of each channel of the raw latents
    16: (
        [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
         0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921],
        [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
         3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160],
    ),
    48: (
        [-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
         0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
         -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
         -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667],
        [0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
         0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
         0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
         0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744],
    ),
}
# fmt: on


class CausalConv3d(nn.Conv3d):
    """Conv3d whose padding in time is all in front: zeros, or the last two frames of the previous chunk."""

    def __init__(self, cin, cout, kernel, pad=0):
        super().__init__(cin, cout, kernel, padding=(0, pad, pad))

    def forward(self, x, past, norm=None, before=None, residual=None, add_bias=True):
        """x (B,C,T,H,W) -> (B,N,T,H,W). norm: an RMSNorm to apply to x first, followed by SiLU; before: the convolution
        that computed x and left out its bias, which is added here; residual: a tensor to add to the result.
        """
        gamma, input_bias = None if norm is None else norm.gamma, None if before is None else before.bias
        bias = self.bias if add_bias else None
        out, past[self] = ops.causal_conv3d(x, past.get(self), self.weight, bias, gamma, input_bias, residual)
        return out


class RMSNorm(nn.Module):
    """x / |x| * sqrt(C) * gamma, with the norm |x| taken over the channels, axis 1."""

    def __init__(self, dim, ndim=3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * ndim))

    def forward(self, x):
        return ops.rms_norm(x, self.gamma)


class ResidualBlock(nn.Module):
    def __init__(self, cin, cout):
        super().__init__()
        before = [RMSNorm(cin), nn.SiLU(), CausalConv3d(cin, cout, 3, 1)]
        after = [RMSNorm(cout), nn.SiLU(), nn.Identity(), CausalConv3d(cout, cout, 3, 1)]
        self.residual = nn.Sequential(*before, *after)  # Identity, officially dropout, keeps the numbering
        self.shortcut = CausalConv3d(cin, cout, 1) if cin != cout else None

    def forward(self, x, past):
        norm1, _, conv1, norm2, _, _, conv2 = self.residual
        # conv2(silu(norm2(conv1(silu(norm1(x)))))) + shortcut(x), each bias added in the pass after its convolution
        y = conv1(x, past, norm1, add_bias=False)
        if self.shortcut is None:
            return conv2(y, past, norm2, before=conv1, residual=x)
        return self.shortcut(x, past, residual=conv2(y, past, norm2, before=conv1))


class AttentionBlock(nn.Module):
    """Single-head self-attention within each frame."""

    def __init__(self, dim):
        super().__init__()
        self.norm = RMSNorm(dim, 2)
        self.to_qkv = nn.Conv2d(dim, dim * 3, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x, past):
        B, C, T, H, W = x.shape
        y = self.norm(x.transpose(1, 2).flatten(0, 1))  # (BT,C,H,W)
        q, k, v = self.to_qkv(y).flatten(2).transpose(1, 2)[:, None].chunk(3, -1)  # 3 x (BT,1,HW,C)
        y = ops.sdpa(q, k, v)
        y = self.proj(y[:, 0].transpose(1, 2).reshape(B * T, C, H, W))
        return x + y.unflatten(0, (B, T)).transpose(1, 2)


class Resample(nn.Module):
    """Halve H and W, or double them if `up`; if `time`, halve or double T too."""

    def __init__(self, cin, cout, up, time):
        super().__init__()
        self.up = up
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest-exact") if up else nn.ZeroPad2d((0, 1, 0, 1)),
            nn.Conv2d(cin, cout, 3, padding=1) if up else nn.Conv2d(cin, cout, 3, stride=2),
        )
        self.time_conv = None
        if time:
            self.time_conv = (
                CausalConv3d(cin, cin * 2, (3, 1, 1)) if up else nn.Conv3d(cin, cin, (3, 1, 1), stride=(2, 1, 1))
            )

    def forward(self, x, past):
        if self.up and self.time_conv is not None:
            if self in past:
                x = self.time_conv(x, past).unflatten(1, (2, -1))  # (B,2,C,T,H,W): two halves to interleave
                x = x.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
            past[self] = True  # the first latent frame stays one frame; the second frame's time_conv does not see it
        B, T = x.shape[0], x.shape[2]
        x = x.transpose(1, 2).flatten(0, 1)
        if self.up:
            conv = self.resample[1]
            if conv not in past:
                past[conv] = fold_kernel(conv.weight), conv.bias.repeat(4)
            x = upsample_conv(x, *past[conv])
        else:
            x = self.resample(x)
        x = x.unflatten(0, (B, T)).transpose(1, 2)
        if not self.up and self.time_conv is not None:
            last = x[:, :, -1:].clone()
            if self in past:
                x = self.time_conv(torch.cat([past[self], x], 2))
            past[self] = last
        return x


def fold_kernel(weight):
    """Fold a kernel (N,C,3,3) for a map upsampled 2x (nearest neighbour) into kernels (4N,C,2,2) for the map itself: N
    for each of the 2x2 output pixels of an input pixel. Weights for the same input pixel are added. The result of the
    convolution stays the same, but for rounding.
    """

    def fold(w, axis):
        """Return the kernels, two weights long along `axis`, for the even and for the odd output pixels."""
        a, b, c = w.unbind(axis)
        return torch.stack([a, b + c], axis), torch.stack([a + b, c], axis)

    return torch.cat([part for rows in fold(weight, 2) for part in fold(rows, 3)])


def upsample_conv(x, weight, bias):
    """Upsample x (B,C,H,W) by 2 (nearest neighbour) and convolve it with a 3x3 kernel. Folding (fold_kernel) saves 5/9
    of the multiplications. weight: from fold_kernel; bias (4N,): the kernel's bias, four times. Returns (B,N,2H,2W).
    """
    B, _, H, W = x.shape
    y = F.conv2d(x, weight, bias, padding=1).unflatten(1, (2, 2, -1))  # (B,2,2,N,H+1,W+1)
    out = y.new_empty(B, 2 * H, 2 * W, y.shape[3]).permute(0, 3, 1, 2)
    for i in (0, 1):
        for j in (0, 1):
            out[:, :, i::2, j::2] = y[:, i, j, :, i : i + H, j : j + W]
    return out


def avg_down(x, cout, factors):
    """Return VAE 2.2's shortcut around a downsampling stage: move space and time of x to channels, then average groups
    of channels. factors (ft, fs): by how much time and space shrink; T is zero-padded in front to a multiple of ft.
    """
    ft, fs = factors
    x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % ft, 0))
    B, C, T, H, W = x.shape
    x = x.view(B, C, T // ft, ft, H // fs, fs, W // fs, fs).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(B, cout, -1, T // ft, H // fs, W // fs).mean(2)


def add_dup_up(y, x, factors, first):
    """Add VAE 2.2's shortcut around an upsampling stage to y (B,N,T,H,W), in place: x's channels, repeated and moved to
    space and time. factors (ft, fs): growth in time, space. first: whether y is the first chunk, which has one frame.
    """
    ft, fs = factors
    n, per = ft * fs * fs, x.shape[1] // y.shape[1]  # each channel of y takes from `per` channels of x
    for a in range(ft - 1 if first else 0, ft):
        frames = slice(None) if first else slice(a, None, ft)
        for b in range(fs):
            for c in range(fs):
                y[:, :, frames, b::fs, c::fs] += x[:, ((a * fs + b) * fs + c) * per // n :: per]
    return y


class Stage(nn.Module):
    """One resolution of VAE 2.2: residual blocks, a resampling, and a parameter-free shortcut around both."""

    def __init__(self, cin, cout, blocks, up, resample, time):
        super().__init__()
        layers = [ResidualBlock(cin if i == 0 else cout, cout) for i in range(blocks)]
        if resample:
            layers.append(Resample(cout, cout, up, time))
        self.up, self.resample, self.cout = up, resample, cout
        self.factors = (2 if time else 1, 2 if resample else 1)
        setattr(self, "upsamples" if up else "downsamples", nn.Sequential(*layers))

    def forward(self, x, past):
        y = x
        for layer in self.upsamples if self.up else self.downsamples:
            y = layer(y, past)
        if not self.up:
            return y + avg_down(x, self.cout, self.factors)
        if not self.resample:
            return y
        first, past[self] = self not in past, True
        return add_dup_up(y, x, self.factors, first)


class Coder(nn.Module):
    """The encoder or, if `up`, the decoder. v22: VAE 2.2, else 2.1; dims: width before the stages, then after each."""

    def __init__(self, v22, up, cin, cout, dims, blocks):
        super().__init__()
        self.conv1 = CausalConv3d(cin, dims[0], 3, 1)
        stages = []
        for i, (a, b) in enumerate(zip(dims, dims[1:])):
            last = i == len(dims) - 2
            time = not last and (i < 2 if up else i > 0)
            if v22:
                stages.append(Stage(a, b, blocks, up, not last, time))
                continue
            if up and i > 0:
                a //= 2  # VAE 2.1 halves the width in its upsampling
            stages += [ResidualBlock(a if j == 0 else b, b) for j in range(blocks)]
            if not last:
                stages.append(Resample(b, b // 2 if up else b, up, time))
        setattr(self, "upsamples" if up else "downsamples", nn.Sequential(*stages))
        mid = dims[0] if up else dims[-1]
        self.middle = nn.Sequential(ResidualBlock(mid, mid), AttentionBlock(mid), ResidualBlock(mid, mid))
        self.head = nn.Sequential(RMSNorm(dims[-1]), nn.SiLU(), CausalConv3d(dims[-1], cout, 3, 1))
        self.up = up

    def forward(self, x, past):
        if self.up:
            return self.forward_up(self.forward_mid(x, past), past)
        x = self.conv1(x, past)
        for layer in (*self.downsamples, *self.middle):
            x = layer(x, past)
        return self.forward_head(x, past)

    def forward_mid(self, x, past):
        """Run the first part of a decoder. It works at the latents' resolution; its attention sees full frames."""
        x = self.conv1(x, past)
        for layer in self.middle:
            x = layer(x, past)
        return x

    def forward_up(self, x, past):
        """Run the second part of a decoder. An output pixel depends only on x within receptive_radius latent pixels."""
        for layer in self.upsamples:
            x = layer(x, past)
        return self.forward_head(x, past)

    def forward_head(self, x, past):
        norm, _, conv = self.head
        return conv(x, past, norm)


class VAE(nn.Module):
    """A VAE. version: "2.1", or "2.2" (2x2 patches, stages with shortcuts); dim, dec_dim: base widths of encoder and
    decoder; mult: each stage's width, in base widths. `z_dim` and `stride` are those of GEOMETRY.
    """

    def __init__(self, version, dim, dec_dim, mult=(1, 2, 4, 4)):
        super().__init__()
        v22 = version == "2.2"
        self.patch = 2 if v22 else 1
        self.z_dim, self.stride = z_dim, _ = GEOMETRY[version]
        pixels = 3 * self.patch**2
        self.encoder = Coder(v22, False, pixels, 2 * z_dim, [dim] + [dim * m for m in mult], 2)
        self.conv1 = CausalConv3d(2 * z_dim, 2 * z_dim, 1)
        self.conv2 = CausalConv3d(z_dim, z_dim, 1)
        self.decoder = Coder(v22, True, z_dim, pixels, [dec_dim * m for m in (mult[-1], *mult[::-1])], 3)

    def decode_in(self, dtype):
        """Make the decoder compute in `dtype`, while the encoder keeps its dtype. Returns the model."""
        self.conv2.to(dtype)
        self.decoder.to(dtype)
        return self

    def _stats(self, like):
        return torch.tensor(LATENT_STATS[self.z_dim], dtype=torch.float32, device=like.device).view(2, 1, -1, 1, 1, 1)

    def moment_chunks(self, video):
        """Encode (B,3,T,H,W) in [-1,1]; yields each latent frame's raw mean and log-variance as (B,2z,1,h,w)."""
        past = {}
        for i in range(0, video.shape[2], 4):
            x = self.patchify(video[:, :, max(i - 3, 0) : i + 1])
            yield self.conv1(self.encoder(x, past), past)

    def patchify(self, x):
        """Turn pixels (B,3,T,H,W) into the encoder's input (B,3pp,T,H/p,W/p), p being the patch size."""
        p = self.patch
        if p > 1:  # b c f (h q) (w r) -> b (c r q) f h w
            x = x.unflatten(4, (-1, p)).unflatten(3, (-1, p)).permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)
        return x

    def unpatchify(self, x):
        """Turn the decoder's output (B,3pp,T,H/p,W/p) into unclamped pixels (B,3,T,H,W)."""
        p = self.patch
        if p > 1:  # b (c r q) f h w -> b c f (h q) (w r)
            x = x.unflatten(1, (3, p, p)).permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)
        return x

    def frame_chunks(self, z):
        """Decode raw latents (B,z,T',h,w); yields unclamped pixels: (B,3,1,H,W), then (B,3,4,H,W) repeatedly."""
        past = {}
        for i in range(z.shape[2]):
            yield self.unpatchify(self.decoder(self.conv2(z[:, :, i : i + 1], past), past))

    @torch.no_grad()
    def encode(self, video):
        """Video (B,3,T,H,W) in [-1,1] -> latents (B,z,T',h,w) fp32, normalised per channel. Raises ValueError unless T
        is 4k+1 and H and W are multiples of the stride.
        """
        B, _, T, H, W = video.shape
        st, sh, sw = self.stride
        if T % st != 1 or H % sh or W % sw:
            raise ValueError(
                f"video of {T} frames, {W}x{H} px: frames must be {st}k+1, width a multiple of {sw}, height of {sh}"
            )
        mean, std = self._stats(video)
        z = torch.empty(B, self.z_dim, 1 + T // st, H // sh, W // sw, device=video.device)
        for i, moments in enumerate(self.moment_chunks(video.to(self.conv1.weight.dtype))):
            z[:, :, i : i + 1] = (moments[:, : self.z_dim].float() - mean) / std
        return z

    def raw_latents(self, z):
        """Undo the normalisation of latents (B,z,T',h,w); returns raw latents in the decoder's dtype."""
        mean, std = self._stats(z)
        return (z.float() * std + mean).to(self.conv2.weight.dtype)

    @torch.no_grad()
    def decode(self, z):
        """Normalised latents (B,z,T',h,w) -> video (B,3,4T'-3,H,W) fp32 in [-1,1]. The memory needed in addition to the
        video does not grow with T'; nanowan/memory/tiled_vae.py decodes in tiles, with less memory.
        """
        B, _, T, h, w = z.shape
        st, sh, sw = self.stride
        video, frame = torch.empty(B, 3, 1 + st * (T - 1), h * sh, w * sw, device=z.device), 0
        for x in self.frame_chunks(self.raw_latents(z)):
            torch.clamp(x.float(), -1, 1, out=video[:, :, frame : frame + x.shape[2]])
            frame += x.shape[2]
        return video


def channels_last(model):
    """Convert the weights of every convolution to channels-last. Outputs of a convolution inherit this layout, in which
    oneDNN, cuDNN and csrc are fastest.
    """
    for m in model.modules():
        if isinstance(m, (nn.Conv2d, nn.Conv3d)):
            m.weight.data = m.weight.data.to(
                memory_format=torch.channels_last_3d if m.weight.dim() == 5 else torch.channels_last
            )
    return model
