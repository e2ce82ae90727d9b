"""A tiny random Animate-2 checkpoint in the official layout, and the same weights in diffusers."""

import json
import re

import torch
from safetensors.torch import save_file

from benchmarks import tiny
from benchmarks.tiny_animate import clip_state
from nanowan.variants.animate2.model import Animate2Config, WanAnimate2

CLIP_SIZES = dict(dim=32, ffn_dim=52, patch=112, tokens=5)  # pictures of 224 px, a constant in diffusers


def animate2(seed=40, layers=11, dim=48, heads=2, log_scale=0.0):
    """Return a small WanAnimate2 with random weights. Its 11 blocks include block 9, which the unconditional pass of
    guidance skips, and one block after it. log_scale: as in Animate2Config.
    """
    config = Animate2Config(
        model_type="animate2",
        dim=dim,
        ffn_dim=2 * dim + 8,
        num_heads=heads,
        num_layers=layers,
        in_dim=36,
        out_dim=16,
        text_dim=tiny.TEXT_DIM,
        clip_dim=CLIP_SIZES["dim"],
        log_scale=log_scale,
    )
    return tiny.randomize(WanAnimate2(config), seed)


def official_names(model):
    """Return the weights {name: tensor} of a WanAnimate2 under the names of the released file, which have ".block"
    after the number of a block.
    """
    return {re.sub(r"^(blocks\.\d+)\.", r"\1.block.", k): v for k, v in model.state_dict().items()}


def checkpoint(folder, name="wan_animate_2_bf16", model=None):
    """Write a complete tiny checkpoint in the layout of Wan2.2-Animate-2-14B, and return the folder. A config.json
    gives the number of heads; for the released models, this number follows from their width. name: the DiT's file name
    without its ending. model: the DiT (default: that of animate2()).
    """
    model = model or animate2()
    dit, parts = folder / "wan_animate_2", folder / "videomodel" / "Wan-AI"
    dit.mkdir(parents=True)
    (parts / "umt5-xxl").mkdir(parents=True)
    save_file(official_names(model), dit / f"{name}.safetensors")
    (dit / "config.json").write_text(json.dumps({"num_heads": model.config.num_heads}))
    torch.save(tiny.vae(False).state_dict(), parts / "vae.pth")
    torch.save(tiny.text_encoder().state_dict(), parts / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(clip_state(sizes=CLIP_SIZES), parts / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    (parts / "umt5-xxl" / "spiece.model").write_bytes(tiny.spiece())
    return folder


# ---- peer ------------------------------------------------------------------------------------------------------------
def diffusers_animate2(model):
    from diffusers import WanAnimate2Transformer3DModel
    from diffusers.loaders.single_file_utils import convert_wan_animate_2_transformer_to_diffusers
    from diffusers.models.transformers import transformer_wan_animate_2

    c = model.config
    peer = WanAnimate2Transformer3DModel(
        in_dim=c.in_dim,
        dim=c.dim,
        ffn_dim=c.ffn_dim,
        freq_dim=c.freq_dim,
        text_dim=c.text_dim,
        out_dim=c.out_dim,
        num_heads=c.num_heads,
        num_layers=c.num_layers,
    )
    peer.img_emb = transformer_wan_animate_2.MLPProj(c.clip_dim, c.dim)  # its width is a constant in diffusers
    peer.load_state_dict(convert_wan_animate_2_transformer_to_diffusers(official_names(model)), strict=True)
    return peer.eval().requires_grad_(False)
