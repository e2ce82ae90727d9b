"""A tiny random Animate checkpoint in the official layout, videos that drive it, and the same weights in diffusers."""

import json
import re

import numpy as np
import torch
from PIL import Image
from torch import nn

from benchmarks import tiny
from nanowan.variants.animate.clip import VisionEncoder
from nanowan.variants.animate.model import AnimateConfig, WanAnimate

CLIP_SIZES = dict(dim=32, ffn_dim=52, patch=7, tokens=5)  # pictures of 14 px
MAPS = (6, 10, 14)  # widths of the motion encoder's maps: crops of 16 px
SIDE = 16


def animate(seed=20, layers=10, dim=48, heads=2):
    """Return a small WanAnimate with random weights. Nearly all of its widths differ from each other, so that none can
    be mistaken for another, and every part affects the result.
    """
    config = AnimateConfig(
        model_type="animate",
        dim=dim,
        ffn_dim=2 * dim + 8,
        num_heads=heads,
        num_layers=layers,
        in_dim=36,
        out_dim=16,
        text_dim=tiny.TEXT_DIM,
        clip_dim=CLIP_SIZES["dim"],
        motion_channels=MAPS,
        motion_style=22,
        motion_linears=5,
        motion_dim=26,
        motion_directions=7,
        face_hidden=18,
        face_heads=4,
    )
    model = tiny.randomize(WanAnimate(config), seed)
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        if name.startswith("motion_encoder") or "padding_tokens" in name:  # the motion encoder scales its own weights
            p.data = torch.randn(p.shape, generator=generator) * (0.3 if name.endswith("bias") else 1.0)
    return model


def clip_state(seed=21, layers=3, sizes=CLIP_SIZES):
    """Return the tensors of a small CLIP file: the vision tower, including its last block and head, and a part of the
    text tower.
    """
    model = tiny.randomize(VisionEncoder(**sizes, layers=layers), seed)
    generator, state = torch.Generator().manual_seed(seed), model.state_dict()
    dim = sizes["dim"]
    for name in ("cls_embedding", "pos_embedding"):
        state[f"visual.{name}"] = torch.randn(state[f"visual.{name}"].shape, generator=generator)
    unused = {"visual.head": torch.randn(dim, 20, generator=generator), "log_scale": torch.tensor(2.6)}
    for name, module in {"visual.post_norm": nn.LayerNorm(dim), "textual.token_embedding": nn.Linear(37, 41)}.items():
        unused |= {f"{name}.{k}": v for k, v in tiny.randomize(module, seed).state_dict().items()}
    return state | unused


def write_dit(folder, model):
    """Write a DiT into a folder as tiny.write_dit does, but with only the keys of Animate's released config.json, which
    has no model type.
    """
    tiny.write_dit(folder, model)
    config = json.loads((folder / "config.json").read_text())
    keys = ("dim", "ffn_dim", "freq_dim", "text_len", "in_dim", "out_dim", "num_heads", "num_layers", "eps")
    config = {"_class_name": "WanAnimateModel", "use_img_emb": True} | {k: config[k] for k in keys}
    (folder / "config.json").write_text(json.dumps(config))


def checkpoint(folder):
    """Write a complete tiny Animate checkpoint into a folder, and return the folder."""
    write_dit(folder, animate())
    torch.save(tiny.vae(False).state_dict(), folder / "Wan2.1_VAE.pth")
    torch.save(tiny.text_encoder().state_dict(), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(clip_state(), folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    (folder / "google" / "umt5-xxl" / "spiece.model").write_bytes(tiny.spiece())
    return folder


# ---- driving videos --------------------------------------------------------------------------------------------------
def frames(n, h, w, kind):
    """Return n frames (h,w,3) that differ in every pixel from each other, and from the frames of another `kind`."""
    i, y, x, c = np.ogrid[:n, :h, :w, :3]
    return list(((37 * i + 11 * y + 7 * x + 101 * c + (x * y * kind) % 13 + kind * 17) % 256).astype(np.uint8))


def write_video(path, images, rate=25):
    """Write RGB frames to an mp4 file losslessly. rate: frames per second."""
    import av

    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream("libx264rgb", rate=rate, options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = *images[0].shape[:2], "rgb24"
        for image in images:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(stream.encode())


def source_folder(folder, n=20, height=32, width=48, face=SIDE):
    """Write a folder like those of Animate's preprocessing, and return it. It also has the background and mask videos,
    which are needed to replace a person. The reference picture has the videos' size, so nothing is resized. n: number
    of frames. face: width and height of the face video in px.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for kind, (name, h, w) in enumerate((("pose", height, width), ("face", face, face), ("bg", height, width))):
        write_video(folder / f"src_{name}.mp4", frames(n, h, w, kind + 1))
    write_video(folder / "src_mask.mp4", frames(n, height, width, 4))
    Image.fromarray(frames(1, height, width, 5)[0]).save(folder / "src_ref.png")
    return folder


# ---- peer ------------------------------------------------------------------------------------------------------------
def diffusers_animate(model):
    from diffusers import WanAnimateTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    c = model.config
    last = len(c.motion_channels)  # the converter knows only the released number of maps
    state = {
        re.sub(rf"convs\.{last}\.", "convs.8.", k) if k.startswith("motion_encoder") else k: v.clone()
        for k, v in model.state_dict().items()
    }
    sides = [4 << i for i in reversed(range(last))]
    peer = WanAnimateTransformer3DModel(
        num_attention_heads=c.num_heads,
        attention_head_dim=c.dim // c.num_heads,
        in_channels=c.in_dim,
        latent_channels=c.out_dim,
        out_channels=c.out_dim,
        text_dim=c.text_dim,
        freq_dim=c.freq_dim,
        ffn_dim=c.ffn_dim,
        num_layers=c.num_layers,
        image_dim=c.clip_dim,
        added_kv_proj_dim=c.dim,
        motion_encoder_channel_sizes={str(side): width for side, width in zip(sides, c.motion_channels)},
        motion_encoder_size=sides[0],
        motion_style_dim=c.motion_style,
        motion_dim=c.motion_directions,
        motion_encoder_dim=c.motion_dim,
        face_encoder_hidden_dim=c.face_hidden,
        face_encoder_num_heads=c.face_heads,
    )
    peer.load_state_dict(convert_wan_transformer_to_diffusers(state), strict=True)
    return peer.eval().requires_grad_(False)
