"""Load a DiT: read its configuration from headers and config.json, build the empty model, and fill in the weights."""

import math
from dataclasses import fields, replace
from pathlib import Path

import torch

from kernels.fp8 import convert
from nanowan.errors import BadInput
from nanowan.files import read_json
from nanowan.formats.header import count_blocks
from nanowan.formats.layouts import expert_folders, official_config, read_weights, weight_files
from nanowan.formats.load import check_keys, load_weights
from nanowan.formats.scaled import linears_in_fp8
from nanowan.variants.registry import VARIANTS, parts_of
from wan import WanConfig, config_of

# Modules that stay fp32, whatever the model's dtype. Those of S2V and Animate run once per clip or are norms (img_emb).
FP32_MODULES = ("time_", "head.", "casual_audio_encoder.", "motion_encoder.", "img_emb.proj.0.", "img_emb.proj.4.")


# Models of the Wan family that are not supported: {name of a tensor by which the model is recognised: the model}
OTHER_MODELS = {
    "vace_patch_embedding.weight": "a VACE",
    "control_adapter.conv.weight": "a camera-control model",
    "ref_conv.weight": "a Fun-Control model",
    "audio_proj.audio_proj_glob_1.layer.bias": "HuMo",
    "patch_embedding_mask.weight": "SCAIL-2",
    "patch_embedding_pose.weight": "SCAIL",
    "patch_embedding_global.weight": "WanDancer",
    "img_emb.emb_pos": "Wan 2.1's FLF2V",
    "img_emb.proj.1.weight": "Wan 2.1's I2V",
}


def is_signed(row, entries):
    """Return whether a DiT with these headers {official name: Entry} has the signature of `row`, a row of VARIANTS. A
    signature is the name of a tensor that only one variant has, or a function that recognises the variant by the
    headers.
    """
    signature = row.get("signature")
    return signature(entries) if callable(signature) else signature in entries


def signed_type(entries):
    """Return the model_type of the row of VARIANTS for which is_signed(row, entries) is true, or None if there is no
    such row. entries: a DiT's headers {official name: Entry}.
    """
    return next((row["model_type"] for row in VARIANTS.values() if is_signed(row, entries)), None)


def known_by_files(path):
    """Return whether signed_type recognises the DiT in a folder or file by its tensors, so that no config.json is
    needed to tell its type. False if the file cannot be read.
    """
    try:
        return signed_type(read_dit(path)) is not None
    except BadInput:
        return False


def keep_fp32(name):
    """Return whether the parameter with this name stays fp32, whatever the model's dtype."""
    return "norm" in name or "modulation" in name or name.startswith(FP32_MODULES)


def read_config(path, entries):
    """Return the configuration of a DiT from its headers {official name: Entry} and, if there is one, from the
    config.json next to the weight files. path: the model folder or file. Raises BadInput if headers and config.json do
    not fit each other, or if the tensors are not those of a model in VARIANTS.
    """

    def shape(name):
        if name not in entries:
            raise BadInput(f"{path}: not a Wan DiT, it has no {name}")
        return entries[name].shape

    path = Path(path)
    file = (path if path.is_dir() else path.parent) / "config.json"
    settings = official_config(read_json(file), file) if file.exists() else {}
    kinds = [row["model_type"] for row in VARIANTS.values() if "signature" in row]
    signed = signed_type(entries) or next((kind for kind in kinds if kind == settings.get("model_type")), None)
    other = None if signed else next((what for name, what in OTHER_MODELS.items() if name in entries), None)
    if other:
        raise BadInput(f"{path}: this is {other}, another model; loaded are {', '.join(VARIANTS)} of Wan 2.2")
    dim, in_dim, *patch = shape("patch_embedding.weight")
    text_dim, freq_dim = shape("text_embedding.0.weight")[1], shape("time_embedding.0.weight")[1]
    layers = count_blocks(entries)
    out_dim, ffn_dim = shape("head.head.weight")[0] // math.prod(patch), shape("blocks.0.ffn.0.weight")[0]
    kind = signed or ("i2v" if in_dim > out_dim else "ti2v" if in_dim == 48 else "t2v")
    config = WanConfig(kind, dim, ffn_dim, dim // 128, layers, in_dim, out_dim, freq_dim, 512, text_dim, tuple(patch))
    if settings:
        named = [f.name for f in fields(WanConfig) if f.name not in ("text_dim", "patch_size")]
        config = replace(config, **{name: settings[name] for name in named if name in settings})
        config = replace(config, model_type=signed or config.model_type)
        measured = dict(dim=dim, ffn_dim=ffn_dim, num_layers=layers, in_dim=in_dim, out_dim=out_dim, freq_dim=freq_dim)
        wrong = [f"{k} is {getattr(config, k)}, the weights have {v}" for k, v in measured.items()]
        wrong = [text for text, (k, v) in zip(wrong, measured.items()) if getattr(config, k) != v]
        if dim % config.num_heads or dim // config.num_heads % 2:
            wrong.append(f"{config.num_heads} heads do not divide width {dim} evenly")
        if wrong:
            raise BadInput(f"{file}: does not fit {path}: {'; '.join(wrong)}")
    elif dim % 128:
        raise BadInput(f"{path}: width {dim} and no config.json beside it, so the number of heads is unknown")
    read_extra = parts_of(config.model_type).read_config
    return read_extra(config, shape, entries, settings, file if settings else path) if read_extra else config


def full_config(variant):
    """Return the configuration of a variant, a key of VARIANTS, in the size in which it was released."""
    row = VARIANTS[variant]
    return config_of(row, parts_of(row["model_type"]).model.config_class)


def new_dit(config):
    """Return a new DiT with this configuration, on the current default device. No weights are loaded."""
    return parts_of(config.model_type).model(config)


def build_dit(entries, path, dtype):
    """Return an empty, frozen DiT on the meta device that fits these headers {official name: Entry}. Its parameters
    have this dtype, except those for which keep_fp32 is true. The caller may turn its linear layers into 8-bit ones
    with `convert` in kernels/fp8.py. Raises BadInput, naming `path`, if the headers are not those of one complete
    model.
    """
    config = read_config(path, entries)
    with torch.device("meta"):
        model = new_dit(config).requires_grad_(False)
    check_keys(model, entries)
    for name, p in model.named_parameters():
        p.data = p.data.to(torch.float32 if keep_fp32(name) else dtype)
    return model


def read_dit(path):
    """Return {official name: Entry} of a DiT. path: a model folder or one file. The blur kernels in Animate's files are
    constants, and are left out.
    """
    return {name: e for name, e in read_weights(weight_files(path)).items() if not name.endswith(".kernel")}


def load_wan(path, device="cpu", dtype=torch.bfloat16, fp8=False):
    """Load one DiT, frozen and in eval mode: a Wan, WanS2V, WanAnimate or WanAnimate2.

    path: a model folder (config.json and weights; for an A14B the folder of one expert), a checkpoint folder with a
    single DiT, or one .safetensors or .gguf file. fp8: round the weights of the blocks' linear layers to 8 bits;
    weights that the file stores in fp8 with scales stay in 8 bits in any case. Raises BadInput, which names what does
    not fit.
    """
    folders = expert_folders(path)
    if "dit" not in folders:
        raise BadInput(f"{path}: holds two experts; give {folders['high']} or {folders['low']}")
    entries = read_dit(folders["dit"])
    dit, in_fp8 = build_dit(entries, folders["dit"], dtype), linears_in_fp8(entries)
    if fp8 or in_fp8:
        convert(dit, in_fp8)
    return load_weights(dit, entries, device, dtype, keep_fp32)
