"""File layouts: which files of a folder hold a model, and how the tensor names of other layouts become official ones.

The layouts are the official folders, diffusers' folders, and ComfyUI's one-file DiTs. Whatever the layout,
`read_weights` returns a DiT or VAE as {official name: Entry}; 8-bit weights with scales are scaled.ScaledEntry, and
quantized weights of a GGUF file are header.GgufEntry. The text encoder's names are in t5.py, those of LoRAs in lora.py.
Source of diffusers' names: its convert_wan_to_diffusers script, and its model classes.
"""

import fnmatch
import json
import re
from pathlib import Path

from nanowan.errors import BadInput
from nanowan.files import read_json
from nanowan.formats.header import read_header
from nanowan.formats.scaled import apply_scales, check_quantization


# ---- files -------------------------------------------------------------------------------------------------------
def _holds_dit(file):
    """Return whether a file contains a DiT's first layer. The result is also True if the file cannot be read."""
    try:
        return "patch_embedding.weight" in map(clean_key, read_header(file)[0])
    except BadInput:
        return True


def weight_files(path, stem="diffusion_pytorch_model"):
    """Return the files that hold one model. If `path` is a file, return it alone. In a folder, return all shards that
    the index lists, else the unsharded safetensors file, else the only other .safetensors or .gguf file. Files named
    like a VAE or a text encoder are ignored; if several others remain, those without a DiT are ignored too. stem: the
    name of the index and of the unsharded file, without endings. Raises BadInput, which names what is missing.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise BadInput(f"{path}: no such file or folder")
    index = path / f"{stem}.safetensors.index.json"
    if index.exists():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise BadInput(f"{index}: not a weight index (expected JSON with a weight_map)") from None
        missing = [s for s in shards if not (path / s).is_file()]
        if missing:
            raise BadInput(f"{path}: missing {', '.join(missing)} of {len(shards)} files named by {index.name}")
        return [path / s for s in shards]
    single = path / f"{stem}.safetensors"
    if single.is_file():
        return [single]
    # for example a ComfyUI file that replaces the official shards
    others = sorted(
        f
        for f in path.iterdir()
        if f.suffix in (".safetensors", ".gguf")
        and "vae" not in f.name.lower()
        and not f.name.lower().startswith(("models_t5", "umt5"))
    )
    if len(others) > 1:  # the folder may also hold a LoRA, an encoder under another name, ...
        others = [f for f in others if _holds_dit(f)] or others
    if len(others) == 1:
        return others
    raise BadInput(
        f"{path}: holds neither {index.name} nor {single.name}"
        + (f", but {len(others)} other .safetensors or .gguf files" if others else "")
        + "; give a model folder or one .safetensors or .gguf file"
    )


def find(path, pattern, what):
    """Return `path` if it is a file, else the only .pth, .safetensors or .gguf file in the folder whose name matches
    `pattern`, ignoring case. Raises BadInput unless there is exactly one such file. what: the description of the file
    in the error message.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise BadInput(f"{path}: no such file or folder")
    files = sorted(
        f
        for f in path.iterdir()
        if fnmatch.fnmatchcase(f.name.lower(), f"{pattern.lower()}.*") and f.suffix in (".pth", ".safetensors", ".gguf")
    )
    if len(files) != 1:
        raise BadInput(
            f"{path}: should hold {what}, "
            + (f"found {len(files)}: {', '.join(f.name for f in files)}" if files else "found none")
        )
    return files[0]


PREFIXES = ("model.diffusion_model.", "diffusion_model.")


def clean_key(key):
    """Return a tensor's name without the prefixes in ComfyUI's files and without the `_orig_mod.` that torch.compile
    adds.
    """
    key = key.replace("_orig_mod.", "")
    for prefix in PREFIXES:
        key = key.removeprefix(prefix)
    return key


def read_headers(files):
    """Return {name: Entry} for all files of a model together, with each name cleaned by clean_key. Raises BadInput if a
    name appears twice.
    """
    entries = {}
    for file in files:
        header, metadata = read_header(file)
        check_quantization(file, metadata.get("_quantization_metadata"))
        for name, entry in header.items():
            if (name := clean_key(name)) in entries:
                raise BadInput(f"{file}: {name} stands in {entries[name].file.name} too")
            entries[name] = entry
    return entries


# ---- the names of diffusers --------------------------------------------------------------------------------------
# {official module name: diffusers' name}; N is a block's number. The names of modulations are parameters' names.
DIFFUSERS_NAMES = {
    "blocks.N": "blocks.N",
    "blocks.N.modulation": "blocks.N.scale_shift_table",
    "blocks.N.norm3": "blocks.N.norm2",
    "blocks.N.ffn.0": "blocks.N.ffn.net.0.proj",
    "blocks.N.ffn.2": "blocks.N.ffn.net.2",
    "blocks.N.cross_attn.k_img": "blocks.N.attn2.add_k_proj",
    "blocks.N.cross_attn.v_img": "blocks.N.attn2.add_v_proj",
    "blocks.N.cross_attn.norm_k_img": "blocks.N.attn2.norm_added_k",
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head": "head",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
}
for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2")):
    for p, q in zip(("q", "k", "v", "o", "norm_q", "norm_k"), ("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k")):
        DIFFUSERS_NAMES[f"blocks.N.{ours}.{p}"] = f"blocks.N.{theirs}.{q}"
OFFICIAL_DIT = {theirs: ours for ours, theirs in DIFFUSERS_NAMES.items()}
# {part of a VAE's name in diffusers: official part}; official_vae_name adds what differs between VAE 2.1 and 2.2
VAE_PARTS = {
    ".mid_block.resnets.0.": ".middle.0.",
    ".mid_block.attentions.0.": ".middle.1.",
    ".mid_block.resnets.1.": ".middle.2.",
    "coder.conv_in.": "coder.conv1.",
    "coder.norm_out.": "coder.head.0.",
    "coder.conv_out.": "coder.head.2.",
}
RESIDUAL_PARTS = {
    ".norm1.": ".residual.0.",
    ".conv1.": ".residual.2.",
    ".norm2.": ".residual.3.",
    ".conv2.": ".residual.6.",
    ".conv_shortcut.": ".shortcut.",
}


def rename_dit(name, table):
    """Return the name of a DiT's tensor in another layout. table: DIFFUSERS_NAMES or its inverse. A name that is not in
    the table is returned unchanged.
    """
    block = re.match(r"blocks\.(\d+)\.", name)
    general = name.replace(block.group(), "blocks.N.", 1) if block else name
    module, _, leaf = general.rpartition(".")
    renamed = table.get(general) or (f"{table[module]}.{leaf}" if module in table else general)
    return renamed.replace("blocks.N.", block.group(), 1) if block else renamed


def official_dit_name(name):
    """Return the official name of a DiT's tensor, given diffusers' name."""
    return rename_dit(name, OFFICIAL_DIT)


def diffusers_dit_name(name):
    """Return diffusers' name of a DiT's tensor, given the official name."""
    return rename_dit(name, DIFFUSERS_NAMES)


def official_vae_name(name, v22):
    """Return the official name of a VAE's tensor, given diffusers' name. v22: whether the VAE is version 2.2."""
    if name.startswith(("quant_conv.", "post_quant_conv.")):
        return ("conv2." if name.startswith("post") else "conv1.") + name.split(".", 1)[1]
    for theirs, ours in VAE_PARTS.items():
        name = name.replace(theirs, ours)
    name = name.replace("encoder.down_blocks.", "encoder.downsamples.")
    if v22:
        name = re.sub(r"downsamples\.(\d+)\.resnets\.", r"downsamples.\1.downsamples.", name)
        name = re.sub(r"downsamples\.(\d+)\.downsampler\.", r"downsamples.\1.downsamples.2.", name)
        name = re.sub(r"decoder\.up_blocks\.(\d+)\.resnets\.", r"decoder.upsamples.\1.upsamples.", name)
        name = re.sub(r"decoder\.up_blocks\.(\d+)\.upsampler\.", r"decoder.upsamples.\1.upsamples.3.", name)
    elif m := re.match(r"decoder\.up_blocks\.(\d+)\.(?:resnets\.(\d+)|upsamplers\.0)\.", name):
        layer = 4 * int(m.group(1)) + int(m.group(2) or 3)  # each stage has three blocks and an upsampling
        name = name.replace(m.group(), f"decoder.upsamples.{layer}.")
    if "samples." in name or "middle." in name:
        for theirs, ours in RESIDUAL_PARTS.items():
            name = name.replace(theirs, ours)
    return name


IN_CONTEXT = re.compile(r"(blocks\.\d+\.)block\.")  # in Animate-2's official names, a module wraps each block


def is_animate2(entries):
    """Return whether a DiT's headers {name: Entry} are those of Animate-2. Its tensors have the same shapes as those of
    Wan 2.1's I2V, so it is recognised by the tensor names in its official files or the metadata in ComfyUI's file.
    """
    if "img_emb.proj.1.weight" not in entries:
        return False
    headers = [read_header(file) for file in {e.file for e in entries.values()}]
    return any(
        '"animate2"' in metadata.get("config", "") or any(IN_CONTEXT.match(clean_key(name)) for name in names)
        for names, metadata in headers
    )


def official_names(entries):
    """Return {official name: Entry} of a DiT or VAE. Diffusers' names are translated. In the names of Animate-2's
    official files, the "block." after each block's number is left out. Other names stay unchanged.
    """
    if "condition_embedder.time_proj.weight" in entries:
        return {official_dit_name(name): e for name, e in entries.items()}
    if any(IN_CONTEXT.match(name) for name in entries):
        return {IN_CONTEXT.sub(r"\1", name): e for name, e in entries.items()}
    if "post_quant_conv.weight" in entries:
        v22 = any(".resnets." in name and name.startswith("encoder.down_blocks.") for name in entries)
        return {official_vae_name(name, v22): e for name, e in entries.items()}
    return entries


def read_weights(files):
    """Return {official name: Entry} of the DiT or VAE that these files hold, in any layout. Weights are not read."""
    entries = official_names(read_headers(files))
    apply_scales(entries)
    return entries


# ---- the folders of diffusers ------------------------------------------------------------------------------------
def is_diffusers(ckpt_dir):
    """Return whether a checkpoint folder has the layout that diffusers' save_pretrained writes."""
    return any((Path(ckpt_dir) / name).exists() for name in ("model_index.json", "transformer"))


def parts_folder(ckpt_dir):
    """Return the folder that holds a checkpoint's VAE and encoders: a subfolder in Animate-2's official layout, else
    `ckpt_dir`.
    """
    within = Path(ckpt_dir) / "videomodel" / "Wan-AI"
    return within if within.is_dir() else Path(ckpt_dir)


def expert_folders(ckpt_dir):
    """Return {"high": folder, "low": folder} for an A14B's two DiTs, or {"dit": folder or file} for a single DiT.
    Animate-2's official folder holds two DiTs; the file of the base model is returned, not that of the distilled one.
    """
    ckpt_dir = Path(ckpt_dir)
    if files := sorted((ckpt_dir / "wan_animate_2").glob("*.safetensors")):
        return {"dit": min(files, key=lambda f: "distill" in f.name)}
    names = ("transformer", "transformer_2")
    if not is_diffusers(ckpt_dir):
        names = ("high_noise_model", "low_noise_model") if (ckpt_dir / "high_noise_model").is_dir() else (".",)
    elif not (ckpt_dir / names[1]).is_dir():
        names = names[:1]
    return dict(zip(("high", "low") if len(names) == 2 else ("dit",), (ckpt_dir / name for name in names)))


def vae_files(path):
    """Return the files of a VAE. path: the VAE's file, or a checkpoint folder that holds it."""
    if (Path(path) / "vae").is_dir() and is_diffusers(path):
        return weight_files(Path(path) / "vae")
    return [find(parts_folder(path), "*VAE*", "a VAE (Wan2.1_VAE or Wan2.2_VAE, .pth or .safetensors)")]


def index_settings(ckpt_dir, is_moe, model_type):
    """Return {"boundary": boundary_ratio} from the model_index.json of a folder in diffusers' layout, or {} for other
    folders. For a single DiT, the boundary is None. is_moe: whether the folder holds two DiTs. model_type: the type of
    its DiTs. Raises BadInput if model_index.json contradicts them.
    """
    file = Path(ckpt_dir) / "model_index.json"
    if not is_diffusers(ckpt_dir):
        return {}
    index = read_json(file) if file.is_file() else {}
    if index.get("expand_timesteps") and model_type != "ti2v":
        raise BadInput(f"{file}: expand_timesteps is true, which of Wan 2.2 only TI2V-5B is; this is a {model_type}")
    boundary = index.get("boundary_ratio")
    if not is_moe and (boundary is not None or (index.get("transformer_2") or [None])[0] is not None):
        raise BadInput(f"{ckpt_dir}: transformer_2 is missing, which {file.name} names")
    if is_moe and not (isinstance(boundary, int | float) and 0 <= boundary <= 1):
        raise BadInput(f"{file}: boundary_ratio is {boundary!r}; with a transformer_2 it is a number from 0 to 1")
    return {"boundary": boundary}


def check_latent_stats(path, stats):
    """Raise BadInput if the config.json of a VAE in diffusers' layout gives other means or standard deviations of the
    latents than `stats`, {number of channels: (mean, std)}. path: the checkpoint folder.
    """
    file = Path(path) / "vae" / "config.json"
    if not file.is_file():
        return
    config = read_json(file)
    latent_stats = config.get("latents_mean"), config.get("latents_std")
    known = stats.get(config.get("z_dim"), latent_stats)
    if None not in latent_stats and tuple(map(tuple, latent_stats)) != tuple(map(tuple, known)):
        raise BadInput(f"{file}: latents_mean and latents_std are not those of Wan's VAEs")


# {field of WanConfig: diffusers' name}; dim is num_attention_heads times attention_head_dim
CONFIG_NAMES = {"num_heads": "num_attention_heads", "in_dim": "in_channels", "out_dim": "out_channels"}
CONFIG_NAMES |= {name: name for name in ("ffn_dim", "num_layers", "freq_dim", "eps")}
# diffusers' settings that have the same value in every Wan 2.2 DiT
CONFIG_FIXED = {
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "image_dim": None,
    "added_kv_proj_dim": None,
}


def official_config(config, file):
    """Return the settings {name: value} of a DiT under official names. config: the contents of `file`, a config.json.
    Raises BadInput for a model class of diffusers other than WanTransformer3DModel, and for settings that no Wan 2.2
    model has.
    """
    name = config.get("_class_name")
    if name == "WanAnimate2Transformer3DModel":
        raise BadInput(f"{file}: a {name}; Animate-2 is read in the official layout, or from ComfyUI's file")
    if "num_attention_heads" not in config:
        return config
    if name not in (None, "WanTransformer3DModel"):
        raise BadInput(f"{file}: a {name}; only diffusers' WanTransformer3DModel is read")
    for key, value in CONFIG_FIXED.items():
        if config.get(key, value) != value:
            raise BadInput(f"{file}: {key} is {config[key]!r}, and {value!r} in every Wan 2.2 model")
    heads, width = config["num_attention_heads"], config.get("attention_head_dim")
    if not isinstance(heads, int) or not isinstance(width, int) or heads < 1:
        raise BadInput(f"{file}: {heads!r} heads of width {width!r} (num_attention_heads, attention_head_dim)")
    config = {ours: config[theirs] for ours, theirs in CONFIG_NAMES.items() if theirs in config}
    return config | {"dim": heads * width}


def diffusers_config(config):
    """Return the contents of the config.json that diffusers needs for a model with this WanConfig."""
    fields = {theirs: getattr(config, ours) for ours, theirs in CONFIG_NAMES.items()}
    fields |= {"attention_head_dim": config.dim // config.num_heads, "text_dim": config.text_dim}
    return {"_class_name": "WanTransformer3DModel", "patch_size": list(config.patch_size), **fields, **CONFIG_FIXED}
