"""A tiny random S2V checkpoint in the official layout, and its inputs: tensors, a picture, a sound, a pose video.

Checkpoint and inputs are made from seeds, and none of their tensors is zero. tests/data/s2v*.safetensors hold what the
official code computes from them. If anything here is changed, those files must be made again.
"""

import json
import wave
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks import tiny
from nanowan.variants.s2v.model import S2VConfig, WanS2V
from nanowan.variants.s2v.wav2vec2 import STRIDES, Wav2Vec2, Wav2Vec2Sizes
from vae import VAE

AUDIO_DIM, LAYERS = 24, 4
CONFIG = S2VConfig(
    model_type="s2v",
    dim=48,
    ffn_dim=104,
    num_heads=3,
    num_layers=LAYERS,
    in_dim=16,
    out_dim=16,
    freq_dim=64,
    text_dim=tiny.TEXT_DIM,
    audio_dim=AUDIO_DIM,
    audio_inject_layers=(0, 1, 3),
)


def fill(model, seed=7):
    """Fill a model with random weights, drawn in the order of the parameters' names, and return the model, frozen."""
    g = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        r = torch.randn(p.shape, generator=g)
        if "norm" in name and name.endswith("weight") or name.endswith(("gamma", "weight_g")):
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


def dit():
    return fill(WanS2V(CONFIG))


def wav2vec2():
    """Return a small wav2vec2 with 24 layers, because S2V uses the 25 hidden states of such a wav2vec2."""
    sizes = Wav2Vec2Sizes(16, (10, 3, 3, 3, 3, 2, 2), STRIDES, AUDIO_DIM, 40, 2, 24, 4, 16)
    return fill(Wav2Vec2(sizes), 8)


def vae():
    return fill(VAE("2.1", 8, 8), 9)


def inputs(B=1, T=3, h=16, w=8, motion_frames=19, seed=0, audio_dim=AUDIO_DIM):
    """Return {name: tensor} of random inputs to a WanS2V, for B samples with latents of shape (16,T,h,w)."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(B, *shape, generator=g)

    return dict(
        x=randn(16, T, h, w),
        ref=randn(16, 1, h, w),
        motion=randn(16, motion_frames, h, w),
        pose=randn(16, T, h, w),
        audio=randn(25, audio_dim, 4 * T),
        context=randn(9, tiny.TEXT_DIM),
        t=torch.tensor([871.0, 254.0])[:B],
        context_lens=torch.tensor([9, 4])[:B],
    )


def prompts():
    """Return two random tensors (L,text_dim), which stand for the embeddings of a prompt and of its negative prompt."""
    g = torch.Generator().manual_seed(3)
    return torch.randn(9, tiny.TEXT_DIM, generator=g), torch.randn(5, tiny.TEXT_DIM, generator=g)


# ---- files -------------------------------------------------------------------------------------------------------
def write_dit(folder, model, **changes):
    """Write a DiT into a folder: its weights, and a config.json like the released one. changes: keys to add or replace
    in config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {k: v for k, v in asdict(model.config).items() if k not in ("text_dim", "patch_size")}
    config |= dict(
        _class_name="WanModel_S2V",
        enable_adain=True,
        adain_mode="attn_norm",
        enable_framepack=True,
        framepack_drop_mode="padd",
        enable_motioner=False,
        enable_tsm=False,
        add_last_motion=True,
        zero_timestep=True,
        zero_init=True,
        trainable_token_pos_emb=False,
        motion_token_num=1024,
    )
    (folder / "config.json").write_text(json.dumps(config | changes))
    save_file(model.state_dict(), folder / "diffusion_pytorch_model.safetensors")


def write_wav2vec2(folder, model):
    """Write a wav2vec2 into a folder as transformers writes the released one, including the output head for letters."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder, state = model.encoder, model.state_dict()
    dim, per_group, kernel = state["encoder.pos_conv_embed.conv.weight_v"].shape
    config = dict(
        model_type="wav2vec2",
        architectures=["Wav2Vec2ForCTC"],
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        conv_bias=True,
        conv_dim=[len(state["feature_projection.layer_norm.bias"])] * 7,
        hidden_size=dim,
        num_hidden_layers=len(encoder.layers),
        num_attention_heads=encoder.layers[0].attention.heads,
        intermediate_size=len(state["encoder.layers.0.feed_forward.intermediate_dense.bias"]),
        num_conv_pos_embeddings=kernel,
        num_conv_pos_embedding_groups=dim // per_group,
        vocab_size=33,
    )
    (folder / "config.json").write_text(json.dumps(config))
    state = {f"wav2vec2.{name}": value for name, value in state.items()}
    unused = {"lm_head.weight": (33, dim), "lm_head.bias": (33,), "wav2vec2.masked_spec_embed": (dim,)}
    save_file(state | {name: torch.zeros(shape) for name, shape in unused.items()}, folder / "model.safetensors")


def checkpoint(folder):
    """Write a complete tiny S2V checkpoint into a folder in the official layout, and return the folder."""
    folder = Path(folder)
    write_dit(folder, dit())
    torch.save(vae().state_dict(), folder / "Wan2.1_VAE.pth")
    torch.save(tiny.text_encoder().state_dict(), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    (folder / "google" / "umt5-xxl" / "spiece.model").write_bytes(tiny.spiece())
    write_wav2vec2(folder / "wav2vec2-large-xlsr-53-english", wav2vec2())
    return folder


def sound(seconds, rate=16000):
    """Return a voice-like tone (N,), `seconds` long, whose loudness and pitch change. rate: samples per second."""
    t = torch.arange(round(seconds * rate), dtype=torch.float64) / rate
    tone = torch.sin(2 * torch.pi * (150 + 40 * torch.sin(3 * t)) * t) + 0.3 * torch.sin(2 * torch.pi * 700 * t)
    return (0.4 * tone * (0.6 + 0.4 * torch.sin(11 * t))).float()


def write_wav(path, samples, rate=16000):
    """Write samples (channels,N) in [-1,1] to a WAV file as 16-bit PCM."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(samples))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples.T.numpy() * 32767).round().astype("<i2").tobytes())


def picture(width, height, shift=0):
    """Return a smooth RGB picture of waves as an array (H,W,3). shift: phase of the waves, in radians."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    waves = [np.sin(7 * x + 3 * y + shift), np.cos(5 * y - 2 * x + 2 * shift), np.sin(4 * x * y + 1 + shift)]
    return (np.stack(waves, -1) * 100 + 128).round().astype(np.uint8)


def write_picture(path, width, height):
    Image.fromarray(picture(width, height)).save(path)


def write_pose_video(path, frames, width, height, fps):
    """Write a lossless video (FFV1 in a .mkv) of `frames` pictures that `picture` draws."""
    import av

    with av.open(str(path), "w") as file:
        stream = file.add_stream("ffv1", rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = width, height, "bgr0"
        for i in range(frames):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture(width, height, 0.2 * i), format="rgb24")))
        file.mux(stream.encode(None))
