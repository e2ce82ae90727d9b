"""Tiny random checkpoints in the official layout, and the same weights inside the peers (diffusers, transformers)."""

import io
import json
import re
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from t5 import TextEncoder
from vae import VAE, channels_last
from wan import Wan, WanConfig

TEXT_DIM = 32
IN_OUT = {"ti2v": (48, 48), "t2v": (16, 16), "i2v": (36, 16)}


def randomize(model, seed, gain=1.0):
    """Fill a model with random weights and return it, frozen. Every part of the model affects the result: no output
    layer or bias is zero, and no norm's weight is one. gain: a factor that multiplies linear and convolution weights.
    """
    g = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        fan = p[0].numel() if p.dim() > 1 else 1
        r = torch.randn(p.shape, generator=g)
        if "norm" in name and name.endswith("weight") or name.endswith("gamma"):
            p.data = 1 + 0.1 * r
        elif p.dim() == 1:
            p.data = 0.1 * r
        elif "modulation" in name:
            p.data = 0.3 * r
        elif "embedding.weight" in name and "patch" not in name:
            p.data = r
        else:
            p.data = gain * r * fan**-0.5
    return model.eval().requires_grad_(False)


def dit(kind, seed=0, dim=48, heads=2, layers=3):
    cin, cout = IN_OUT[kind]
    return randomize(Wan(WanConfig(kind, dim, 2 * dim + 8, heads, layers, cin, cout, text_dim=TEXT_DIM)), seed)


def vae_of(model, seed=1):
    return channels_last(randomize(model, seed))


def vae(v22, seed=1):
    return vae_of(VAE("2.2", 8, 12) if v22 else VAE("2.1", 8, 8), seed)


def spiece(byte_fallback=False):
    """Return the bytes of a small sentencepiece model with T5's special ids. byte_fallback: whether unknown characters
    become bytes.
    """
    import sentencepiece

    lines = [
        "a red square moves left",
        "the quick brown fox jumps over the lazy dog 0123456789",
        "一只猫在草地上奔跑",
        "naïve café, 50% & more!",
        "色调艳丽，过曝，静态，细节模糊不清，字幕",
        "ABCDEFGHIJKLMNOPQRSTUVWXYZ.,;:!?'\"()-",
    ] * 5
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        vocab_size=440 if byte_fallback else 180,
        byte_fallback=byte_fallback,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return out.getvalue()


def text_encoder(seed=2, vocab=200):
    model = randomize(TextEncoder(vocab, TEXT_DIM, 24, 40, 3, 2), seed)
    for block in model.blocks:  # attention is unscaled: keep its logits so small that softmax is not one-hot
        block.attn.q.weight.data *= 0.4
    return model


def write_dit(folder, model, shards=2):
    """Write a DiT into a folder: a config.json with the official keys, and sharded safetensors with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {k: v for k, v in asdict(model.config).items() if k not in ("text_dim", "patch_size")}
    (folder / "config.json").write_text(
        json.dumps({"_class_name": "WanModel", "_diffusers_version": "0.33.0", **config})
    )
    state = list(model.state_dict().items())
    names = [f"diffusion_pytorch_model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    weight_map = {}
    for i, name in enumerate(names):
        part = dict(state[i::shards])
        save_file({k: v.contiguous() for k, v in part.items()}, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def checkpoint(folder, kind):
    """Write a complete tiny checkpoint ("ti2v", "t2v" or "i2v") in the official layout, .pth files included. Returns
    the folder.
    """
    folder = Path(folder)
    if kind == "ti2v":
        write_dit(folder, dit(kind))
    else:
        write_dit(folder / "high_noise_model", dit(kind, 10))
        write_dit(folder / "low_noise_model", dit(kind, 11))
    torch.save(vae(kind == "ti2v").state_dict(), folder / ("Wan2.2_VAE.pth" if kind == "ti2v" else "Wan2.1_VAE.pth"))
    torch.save(text_encoder().state_dict(), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    (folder / "google" / "umt5-xxl" / "spiece.model").write_bytes(spiece())
    return folder


# ---- peers -------------------------------------------------------------------------------------------------------
def diffusers_dit(model):
    from diffusers import WanTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    c = model.config
    peer = WanTransformer3DModel(
        num_attention_heads=c.num_heads,
        attention_head_dim=c.dim // c.num_heads,
        in_channels=c.in_dim,
        out_channels=c.out_dim,
        text_dim=c.text_dim,
        freq_dim=c.freq_dim,
        ffn_dim=c.ffn_dim,
        num_layers=c.num_layers,
    )
    peer.load_state_dict(
        convert_wan_transformer_to_diffusers({k: v.clone() for k, v in model.state_dict().items()}), strict=True
    )
    return peer.eval().requires_grad_(False)


def diffusers_vae(model):
    """Return diffusers' VAE with the same weights as `model`. diffusers can convert the keys of VAE 2.1; the keys of
    VAE 2.2 are converted here.
    """
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    from vae import LATENT_STATS

    state = {k: v.clone().contiguous() for k, v in model.state_dict().items()}
    mean, std = LATENT_STATS[model.z_dim]
    extra = dict(latents_mean=mean, latents_std=std)
    if model.patch == 2:
        extra |= dict(
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=16,
            decoder_base_dim=model.decoder.head[2].weight.shape[1],
        )
        renames = [
            (r"\.middle\.0\.", ".mid_block.resnets.0."),
            (r"\.middle\.1\.", ".mid_block.attentions.0."),
            (r"\.middle\.2\.", ".mid_block.resnets.1."),
            (r"coder\.conv1\.", "coder.conv_in."),
            (r"\.head\.0\.", ".norm_out."),
            (r"\.head\.2\.", ".conv_out."),
            (r"^conv1\.", "quant_conv."),
            (r"^conv2\.", "post_quant_conv."),
            (r"encoder\.downsamples\.(\d)\.downsamples\.2\.(resample|time)", r"encoder.down_blocks.\1.downsampler.\2"),
            (r"decoder\.upsamples\.(\d)\.upsamples\.3\.(resample|time)", r"decoder.up_blocks.\1.upsampler.\2"),
            (r"encoder\.downsamples\.(\d)\.downsamples\.", r"encoder.down_blocks.\1.resnets."),
            (r"decoder\.upsamples\.(\d)\.upsamples\.", r"decoder.up_blocks.\1.resnets."),
            (r"\.residual\.0\.", ".norm1."),
            (r"\.residual\.2\.", ".conv1."),
            (r"\.residual\.3\.", ".norm2."),
            (r"\.residual\.6\.", ".conv2."),
            (r"\.shortcut\.", ".conv_shortcut."),
        ]
        converted = {}
        for key, value in state.items():
            for a, b in renames:
                key = re.sub(a, b, key)
            converted[key] = value
    else:
        converted = convert_wan_vae_to_diffusers(state)
    peer = AutoencoderKLWan(base_dim=model.encoder.conv1.weight.shape[0], z_dim=model.z_dim, **extra)
    peer.load_state_dict(converted, strict=True)
    return peer.eval().requires_grad_(False)


def transformers_t5(model):
    from transformers import UMT5Config, UMT5EncoderModel

    block = model.blocks[0]
    heads = block.attn.heads
    peer = UMT5EncoderModel(
        UMT5Config(
            vocab_size=model.token_embedding.weight.shape[0],
            d_model=model.norm.weight.shape[0],
            d_kv=block.attn.q.weight.shape[0] // heads,
            d_ff=block.ffn.fc1.weight.shape[0],
            num_heads=heads,
            num_layers=len(model.blocks),
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )
    renames = [
        (r"token_embedding\.", "shared."),
        (r"^norm\.", "encoder.final_layer_norm."),
        (r"blocks\.(\d+)\.norm1", r"encoder.block.\1.layer.0.layer_norm"),
        (r"blocks\.(\d+)\.norm2", r"encoder.block.\1.layer.1.layer_norm"),
        (r"blocks\.(\d+)\.attn\.", r"encoder.block.\1.layer.0.SelfAttention."),
        (r"blocks\.(\d+)\.pos_embedding\.embedding", r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias"),
        (r"blocks\.(\d+)\.ffn\.gate\.0", r"encoder.block.\1.layer.1.DenseReluDense.wi_0"),
        (r"blocks\.(\d+)\.ffn\.fc1", r"encoder.block.\1.layer.1.DenseReluDense.wi_1"),
        (r"blocks\.(\d+)\.ffn\.fc2", r"encoder.block.\1.layer.1.DenseReluDense.wo"),
    ]
    state = {}
    for key, value in model.state_dict().items():
        for a, b in renames:
            key = re.sub(a, b, key)
        state[key] = value.clone()
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    peer.load_state_dict(state, strict=True)
    return peer.eval().requires_grad_(False)


def error(a, b):
    """Return the largest difference between a and b, divided by the largest absolute value in b."""
    return ((a - b).abs().max() / b.abs().max()).item()
