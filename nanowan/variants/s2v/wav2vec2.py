"""wav2vec2-large, S2V-14B's speech encoder: it turns a waveform into features, resampled to the video's frame rate.

N samples at 16 kHz     T_a encoder frames, about 50 per second     A frames at 30 per second
D width (1024)          S = layers + 1 (25) hidden states           F video frames per clip at 16 per second

Source: official wan/modules/s2v/audio_encoder.py over transformers 4.51's Wav2Vec2ForCTC, whose tensor names are kept.
The last hidden state is taken after the final LayerNorm, as in transformers up to 4.51. transformers 5.x takes it
before this LayerNorm, and the released DiT was never trained on that.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import ops
from nanowan.errors import BadInput, Skip
from nanowan.formats.layouts import read_headers, weight_files
from nanowan.formats.load import load_into
from nanowan.video import read_sound

SAMPLE_RATE, FEATURE_RATE, VIDEO_RATE = 16000, 30, 16
ENCODER_RATE = 50  # nominal: the encoder makes 49.9 frames per second, which the official code does not correct for
STRIDES = (5, 2, 2, 2, 2, 2, 2)
MIN_SAMPLES = 720  # two encoder frames, the fewest from which one frame at 30 per second can be made


def read_audio(path):
    """Return the full sound of a file that FFmpeg reads (wav, mp3, mp4, ...) as mono at 16 kHz: (N,) float32, where
    full scale is 1.

    Channels are averaged, as librosa does. Gaps in the sound become silence. Raises BadInput if the file has no sound,
    or less than 0.045 s of it.
    """
    try:
        samples = torch.from_numpy(read_sound(path, SAMPLE_RATE)[1][0])
    except Skip as e:
        raise BadInput(f"{path}: {e}; give a file with sound (wav, mp3, mp4, ...)") from None
    if len(samples) < MIN_SAMPLES:
        seconds, least = len(samples) / SAMPLE_RATE, MIN_SAMPLES / SAMPLE_RATE
        raise BadInput(f"{path}: holds {seconds:.3f} s of sound; at least {least} s are needed")
    return samples


class ConvLayer(nn.Module):
    """A convolution without padding, followed by a LayerNorm over the channels and a GELU."""

    def __init__(self, cin, cout, kernel, stride):
        super().__init__()
        self.conv = nn.Conv1d(cin, cout, kernel, stride)
        self.layer_norm = nn.LayerNorm(cout)

    def forward(self, x):
        return F.gelu(self.layer_norm(self.conv(x).transpose(1, 2)).transpose(1, 2))


class FeatureExtractor(nn.Module):
    def __init__(self, dim, kernels, strides):
        super().__init__()
        widths = zip((1, *[dim] * len(kernels)), [dim] * len(kernels))
        self.conv_layers = nn.ModuleList(ConvLayer(*w, k, s) for w, k, s in zip(widths, kernels, strides))
        self.stride, self.reach = 1, 1  # samples from one frame to the next; samples that one frame depends on
        for k, s in zip(kernels, strides):
            self.reach += (k - 1) * self.stride
            self.stride *= s

    def forward(self, samples, chunk=1000):
        """Return frames (1,T_a,C) of samples (N,). To save memory, only `chunk` frames are computed at a time: the
        output of the first layer alone takes 6.5 MB per second of sound.
        """
        frames = (len(samples) - self.reach) // self.stride + 1
        parts = []
        for first in range(0, frames, chunk):
            last = min(first + chunk, frames) - 1
            x = samples[None, None, first * self.stride : last * self.stride + self.reach]
            for layer in self.conv_layers:
                x = layer(x)
            parts.append(x)
        return torch.cat(parts, 2).transpose(1, 2)


class FeatureProjection(nn.Module):
    def __init__(self, cin, dim):
        super().__init__()
        self.layer_norm = nn.LayerNorm(cin)
        self.projection = nn.Linear(cin, dim)

    def forward(self, x):
        return self.projection(self.layer_norm(x))


class WeightNormConv(nn.Module):
    """A grouped convolution along time whose weight is g v / |v|, with one norm for each tap of the kernel."""

    def __init__(self, dim, groups, kernel):
        super().__init__()
        self.groups = groups
        self.weight_g = nn.Parameter(torch.empty(1, 1, kernel))
        self.weight_v = nn.Parameter(torch.empty(dim, dim // groups, kernel))
        self.bias = nn.Parameter(torch.empty(dim))

    def forward(self, x):
        kernel = self.weight_v.shape[2]
        weight = self.weight_g * self.weight_v / self.weight_v.norm(dim=(0, 1), keepdim=True)
        x = F.conv1d(x, weight, self.bias, padding=kernel // 2, groups=self.groups)
        return x[..., :-1] if kernel % 2 == 0 else x


class PositionalConv(nn.Module):
    def __init__(self, dim, groups, kernel):
        super().__init__()
        self.conv = WeightNormConv(dim, groups, kernel)

    def forward(self, x):
        return F.gelu(self.conv(x.transpose(1, 2)).transpose(1, 2))


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x):
        q, k, v = (f(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(ops.sdpa(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, dim, ffn_dim):
        super().__init__()
        self.intermediate_dense, self.output_dense = nn.Linear(dim, ffn_dim), nn.Linear(ffn_dim, dim)

    def forward(self, x):
        return self.output_dense(F.gelu(self.intermediate_dense(x)))


class Layer(nn.Module):
    def __init__(self, dim, ffn_dim, heads):
        super().__init__()
        self.attention, self.feed_forward = Attention(dim, heads), FeedForward(dim, ffn_dim)
        self.layer_norm, self.final_layer_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x):
        x = x + self.attention(self.layer_norm(x))
        return x + self.feed_forward(self.final_layer_norm(x))


class Encoder(nn.Module):
    def __init__(self, dim, ffn_dim, heads, layers, groups, kernel):
        super().__init__()
        self.pos_conv_embed = PositionalConv(dim, groups, kernel)
        self.layers = nn.ModuleList(Layer(dim, ffn_dim, heads) for _ in range(layers))
        self.layer_norm = nn.LayerNorm(dim)

    def forward(self, x):
        """Return S hidden states (1,T_a,D) for x (1,T_a,D): the input of the first layer, and the output of each layer.
        The last output is normalised (LayerNorm).
        """
        x = x + self.pos_conv_embed(x)
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return [*states[:-1], self.layer_norm(states[-1])]


@dataclass(frozen=True)
class Wav2Vec2Sizes:
    """The sizes of a Wav2Vec2. kernels, strides: those of the convolutions. pos_groups, pos_kernel: those of the
    positional convolution.
    """

    conv_dim: int
    kernels: tuple
    strides: tuple
    dim: int
    ffn_dim: int
    heads: int
    layers: int
    pos_groups: int
    pos_kernel: int


class Wav2Vec2(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        s = sizes
        self.feature_extractor = FeatureExtractor(s.conv_dim, s.kernels, s.strides)
        self.feature_projection = FeatureProjection(s.conv_dim, s.dim)
        self.encoder = Encoder(s.dim, s.ffn_dim, s.heads, s.layers, s.pos_groups, s.pos_kernel)

    @torch.no_grad()
    def features(self, samples):
        """Return the hidden states (S,T_a,D), in the weights' dtype, of a full sound (N,) at 16 kHz. The sound is
        normalised first, so it may have any loudness.
        """
        samples = samples.to(self.encoder.layer_norm.weight.device, torch.float32)
        samples = (samples - samples.mean()) / torch.sqrt(samples.var(correction=0) + 1e-7)
        x = self.feature_extractor(samples.to(self.encoder.layer_norm.weight.dtype))
        return torch.cat(self.encoder(self.feature_projection(x)))


def to_feature_rate(states):
    """Return hidden states (S,T_a,D), nominally at 50 per second, resampled to 30 per second: (S,A,D), A = int(T_a / 50
    * 30).
    """
    size = int(states.shape[1] / ENCODER_RATE * FEATURE_RATE)
    return F.interpolate(states.transpose(1, 2), size=size, mode="linear", align_corners=True).transpose(1, 2)


def count_clips(frames, infer_frames=80):
    """Return the number of clips of `infer_frames` video frames that are needed for `frames` features at 30 per second.
    If the features fill these clips exactly, one silent clip is added, as in the official pipeline.
    """
    return int(frames / (infer_frames * FEATURE_RATE / VIDEO_RATE)) + 1


def to_video_rate(features, n):
    """Return (S,D,n): for each of n video frames at 16 per second, the nearest of the features (S,A,D) at 30 per
    second. Positions halfway between two features are rounded to even. For frames after the last feature, the result is
    zero.
    """
    at = torch.arange(n, dtype=torch.float64).mul(FEATURE_RATE / VIDEO_RATE).round().long().to(features.device)
    inside = at < features.shape[1]
    picked = features[:, at.clamp(max=features.shape[1] - 1)] * inside[:, None]
    return picked.transpose(1, 2)


# tensors that only speech recognition or training needs
UNUSED = {"lm_head.weight", "lm_head.bias", "wav2vec2.masked_spec_embed", "masked_spec_embed"}


def rename(key):
    """Return this model's name of a tensor, given its name in transformers' file. That file may use either of
    transformers' two ways of naming the tensors of weight norm.
    """
    key = key.removeprefix("wav2vec2.")
    key = key.replace("parametrizations.weight.original0", "weight_g")
    return key.replace("parametrizations.weight.original1", "weight_v")


def read_config(path):
    """Return (strides, number of heads), which the tensors' shapes do not show, from the config.json in or next to
    `path`. Without this file, the strides are those of the released model. The number of heads is None if it is not
    given.
    """
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.exists():
        return STRIDES, None
    try:
        config = json.loads(file.read_text())
        wanted = dict(model_type="wav2vec2", feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)
        wrong = [f"{k} is {config.get(k)!r}, should be {v!r}" for k, v in wanted.items() if config.get(k) != v]
        strides, heads = tuple(config.get("conv_stride", STRIDES)), config.get("num_attention_heads")
    except (ValueError, AttributeError, TypeError) as e:
        raise BadInput(f"{file}: not a model configuration ({e})") from None
    if wrong:
        raise BadInput(f"{file}: of another model than wav2vec2-large-xlsr-53-english: {'; '.join(wrong)}")
    return strides, heads


def build_wav2vec2(entries, path):
    """Return an encoder without weights that fits the headers {name: Entry} of its tensors. Widths, kernels and the
    number of layers come from the tensors' shapes.
    """

    def shape(name):
        if name not in entries:
            raise BadInput(f"{path}: not a wav2vec2 encoder with layer norms, it has no {name}")
        return entries[name].shape

    def count(prefix):
        return 1 + max((int(n.split(".")[2]) for n in entries if n.startswith(prefix)), default=-1)

    strides, heads = read_config(Path(path))
    conv = [
        shape(f"feature_extractor.conv_layers.{i}.conv.weight") for i in range(count("feature_extractor.conv_layers."))
    ]
    dim, conv_dim = shape("feature_projection.projection.weight")
    _, per_group, pos_kernel = shape("encoder.pos_conv_embed.conv.weight_v")
    ffn_dim = shape("encoder.layers.0.feed_forward.intermediate_dense.weight")[0]
    heads = heads or dim // 64
    if not heads or len(strides) != len(conv) or dim % heads or dim % per_group:
        raise BadInput(f"{path}: config.json ({len(strides)} strides, {heads} heads) does not fit the weights")
    kernels = [s[2] for s in conv]
    layers, groups = count("encoder.layers."), dim // per_group
    return Wav2Vec2(Wav2Vec2Sizes(conv_dim, kernels, strides, dim, ffn_dim, heads, layers, groups, pos_kernel))


def load_wav2vec2(folder, device="cpu", dtype=torch.float32):
    """Load wav2vec2-large-xlsr-53-english, frozen and in eval mode, from its folder (config.json, model.safetensors) or
    from one .safetensors file. The official pipeline runs this model in fp32. Raises BadInput if the
    tensors or config.json do not fit; the message says which.
    """
    entries = read_headers(weight_files(folder, "model"))
    entries = {rename(name): entry for name, entry in entries.items() if name not in UNUSED}
    with torch.device("meta"):
        model = build_wav2vec2(entries, folder)
    return load_into(model, entries, device, dtype)
