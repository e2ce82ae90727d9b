"""diag.py inspect: describe checkpoint folders, weight files, LoRA files and videos from their headers alone."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import av
import torch

from diagnostics.common import write_json
from lora import TARGETS
from nanowan.errors import BadInput
from nanowan.formats.dit import full_config, known_by_files, read_config
from nanowan.formats.header import read_header
from nanowan.formats.layouts import clean_key, expert_folders, is_diffusers, parts_folder, read_weights, weight_files
from nanowan.formats.lora import TEXT_PREFIX, describe
from nanowan.formats.t5 import build_t5, is_delta, read_encoder
from nanowan.variants.registry import VARIANTS
from nanowan.video import CLIPS
from vae import GEOMETRY

LORA_TARGETS = {
    "cross_attn.{k,v}": ("cross_attn.k", "cross_attn.v"),
    "cross_attn.{q,k,v,o}": TARGETS[4:8],
    "self_attn and cross_attn": TARGETS[:8],
    "self_attn, cross_attn and ffn": TARGETS,
}
LORA_RANKS = (4, 8, 16, 32, 64)
EXPERT_FOLDERS = ("high_noise_model", "low_noise_model")  # in the official layout


def totals(entries):
    """Return a dictionary with the numbers of parameters, tensors and bytes in `entries` {name: Entry}, and the number
    of parameters of each dtype.
    """
    dtypes = Counter()
    for entry in entries.values():
        dtypes[entry.format] += entry.numel
    return {
        "parameters": sum(dtypes.values()),
        "tensors": len(entries),
        "dtype": dtypes.most_common(1)[0][0] if dtypes else None,
        "dtypes": dict(dtypes),
        "bytes": sum(entry.nbytes for entry in entries.values()),
    }


def lora_budget(entries):
    """Return how many parameters, and how many MiB in bf16, LoRAs on a DiT would have: a list with a dictionary for
    each of LORA_TARGETS and each rank. entries: {name: Entry} of the DiT.
    """
    rows = []
    for label, targets in LORA_TARGETS.items():
        pattern = re.compile(r"blocks\.\d+\.(" + "|".join(map(re.escape, targets)) + r")\.weight")
        shapes = [entry.shape for name, entry in entries.items() if pattern.fullmatch(name)]
        for rank in LORA_RANKS:
            parameters = sum(rank * (n_out + n_in) for n_out, n_in in shapes)
            row = {"targets": label, "rank": rank, "matrices": len(shapes), "parameters": parameters}
            rows.append(row | {"mib_bf16": round(parameters * 2 / 2**20, 4)})
    return rows


def blocks_with(entries, target):
    """Count the blocks of a DiT that have the linear layer `target`. entries: {name: Entry} of the DiT."""
    pattern = re.compile(rf"blocks\.(\d+)\.{re.escape(target)}\.weight")
    return len({m[1] for m in map(pattern.fullmatch, entries) if m})


def released_variant(config):
    """Return the name of the released variant whose DiT has the type and the sizes of a WanConfig, or None if there is
    no such variant.
    """

    def sizes(c):
        return c.model_type, c.dim, c.num_layers, c.in_dim, c.out_dim

    return next((name for name in VARIANTS if sizes(full_config(name)) == sizes(config)), None)


def inspect_dit(path, entries):
    c = read_config(path, entries)
    variant, counts = released_variant(c), {target: blocks_with(entries, target) for target in TARGETS}
    image_keys = sum("img_emb" in name or "_img." in name for name in entries)
    size = f"of the released size {variant}" if variant else "of no released size"
    image = f"{image_keys} image-conditioning keys" if image_keys else "no image-conditioning keys"
    if c.model_type == "i2v" and not image_keys:
        image += " (the image comes in through its extra input channels)"
    complete = all(n == c.num_layers for n in counts.values())
    parts = "every block has self- and cross-attention and a feed-forward net"
    return {
        "kind": "dit",
        "variant": variant,
        "model_type": c.model_type,
        "width": c.dim,
        "layers": c.num_layers,
        "heads": c.num_heads,
        "head_dim": c.dim // c.num_heads,
        "ffn": c.ffn_dim,
        "in_channels": c.in_dim,
        "out_channels": c.out_dim,
        "text_dim": c.text_dim,
        "text_len": c.text_len,
        **totals(entries),
        "blocks_with": counts,
        "image_conditioning_keys": image_keys > 0,
        "lora_budget": lora_budget(entries),
        "summary": f"{'an' if c.model_type[0] in 'ais' else 'a'} {c.model_type.upper()} DiT {size}, {image}; "
        + (parts if complete else "some blocks lack projections"),
    }


def inspect_encoder(entries):
    """Return a dictionary that describes a text encoder. entries: {name: Entry} from read_encoder. Raises BadInput if
    the encoder is no UMT5.
    """
    with torch.device("meta"):
        model = build_t5(entries, next(iter(entries.values())).file)
    layers, (vocabulary, width) = len(model.blocks), model.token_embedding.weight.shape
    return {
        "kind": "text_encoder",
        "vocabulary": vocabulary,
        "width": width,
        "layers": layers,
        "heads": model.blocks[0].attn.heads,
        "ffn": len(model.blocks[0].ffn.fc1.weight),
        **totals(entries),
        "summary": f"a UMT5 encoder of {layers} layers, width {width}, {vocabulary:,} pieces; each layer has its own "
        "position table",
    }


def inspect_encoder_delta(entries, metadata):
    """Return a dictionary that describes a file of train_te.py --save delta, with the blocks and the number of
    embedding rows that were trained. entries: {name: Entry} of the file.
    """
    rows = entries.get("token_embedding.rows")
    blocks = sorted({int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", name) for name in entries) if m})
    changed = [f"{len(blocks)} blocks ({blocks[0]} to {blocks[-1]})"] if blocks else []
    changed += [f"{rows.shape[0]} embedding rows of width {rows.shape[1]}"] if rows else []
    keywords = f", taught {metadata['keywords']}" if metadata.get("keywords") else ""
    return {
        "kind": "text_encoder_delta",
        "blocks": blocks,
        "rows": rows.shape[0] if rows else 0,
        "metadata": metadata,
        **totals(entries),
        "summary": f"changes to a UMT5 encoder, used over the checkpoint's own: {' and '.join(changed)}{keywords}",
    }


def inspect_vae(entries):
    z_dim = entries["conv2.weight"].shape[0]
    version = next((v for v, geometry in GEOMETRY.items() if geometry.z_dim == z_dim), None)
    stride = list(GEOMETRY[version].stride) if version else None
    return {
        "kind": "vae",
        "variant": version,
        "z_channels": z_dim,
        "encoder_width": entries["encoder.conv1.weight"].shape[0],
        "decoder_width": entries["decoder.head.2.weight"].shape[1],
        "stride": stride,
        **totals(entries),
        "summary": f"a Wan {version} VAE, {z_dim} latent channels, stride {'x'.join(map(str, stride))}"
        if version
        else f"a VAE of no Wan version, {z_dim} latent channels",
    }


def inspect_lora(kind, entries, lora):
    """Return a dictionary that describes a LoRA file. kind: Contents.kind. entries: {key: Entry} of the file. lora:
    what describe in nanowan/formats/lora.py returns.
    """
    blocks = lora["blocks"]
    text = f"a LoRA{' of the text encoder' if lora['model'] == 'text' else ''}: " + ", ".join(
        f"{form} {n}" for form, n in lora["forms"].items()
    )
    if lora["ranks"]:
        text += f", rank {', '.join(map(str, lora['ranks']))}"
    if blocks:
        text += f", on {', '.join(lora['targets'])} of {len(blocks)} blocks ({blocks[0]} to {blocks[-1]})"
    if lora["model"] == "text" and (rows := entries.get("shared.lora_A.weight")):
        text += f", and {rows.shape[0]} embedding rows"
    elif lora["elsewhere"]:
        text += f", {len(lora['elsewhere'])} outside of blocks"
    if lora["expert"]:
        text += f"; for {lora['expert']} noise ({lora['expert_from']})"
    if lora["problem"]:
        text += f"; not read: {lora['problem']}"
    return {"kind": kind, "matrices": sum(lora["forms"].values()), **lora, **totals(entries), "summary": text}


def files_of(path):
    """Return the weight files of one model. If `path` is a file, return [path]. If it is a folder, return the files of
    a text encoder that transformers has written, whose names begin with "model"; without these, return the DiT's files.
    """
    path = Path(path)
    names = [f.name for f in path.glob("model*.safetensors*")] if path.is_dir() else []
    is_encoder = any(re.match(r"model(-00001-of-\d+)?\.safetensors", name) for name in names)
    return weight_files(path, "model" if is_encoder else "diffusion_pytorch_model")


class Contents(NamedTuple):
    """What the weight files of one model contain. entries: {name: Entry}; the names are official for a DiT or a VAE,
    else those in the files, without the prefixes that ComfyUI and torch.compile add. lora: for a LoRA, what describe in
    nanowan/formats/lora.py returns; else None.
    """

    kind: str  # "lora", "text_encoder_lora", "text_encoder_delta", "dit", "text_encoder", "vae" or "unknown"
    files: list
    entries: dict
    lora: dict | None = None


def contents(path):
    """Return the Contents of a weight file, or of a folder with the files of one model. Raises BadInput for unreadable
    files.
    """
    files = files_of(path)
    if len(files) == 1 and (lora := describe(files[0])):
        kind = "text_encoder_lora" if lora["model"] == "text" else "lora"
        entries = {TEXT_PREFIX.sub("", clean_key(name)): e for name, e in read_header(files[0])[0].items()}
        return Contents(kind, files, entries, lora)
    entries = read_weights(files)
    if len(files) == 1 and is_delta(files[0]):
        return Contents("text_encoder_delta", files, entries)
    if {"patch_embedding.weight", "head.head.weight", "blocks.0.ffn.0.weight"} <= entries.keys():
        return Contents("dit", files, entries)
    tables = {"token_embedding.weight", "shared.weight", "encoder.embed_tokens.weight", "token_embd.weight"}
    if tables & entries.keys():
        return Contents("text_encoder", files, entries)
    if {"encoder.conv1.weight", "conv2.weight", "decoder.head.2.weight"} <= entries.keys():
        return Contents("vae", files, entries)
    return Contents("unknown", files, entries)


def kind_of(path):
    """Return the Contents.kind of a weight file, or of a folder with the files of one model. Raises BadInput for
    unreadable files.
    """
    return contents(path).kind


def inspect_weights(path):
    """Return a dictionary that describes a weight file, or the files of one model in a folder. Raises BadInput for
    unreadable files.
    """
    kind, files, entries, lora = contents(path)
    if lora:
        return inspect_lora(kind, entries, lora)
    if kind == "text_encoder_delta":
        return inspect_encoder_delta(entries, read_header(files[0])[1])
    if kind == "dit":
        return inspect_dit(path, entries)
    if kind == "text_encoder":
        return inspect_encoder(read_encoder(files).entries)
    if kind == "vae":
        return inspect_vae(entries)
    first = f"no model known here; its first keys are {', '.join(list(entries)[:3])}"
    return {"kind": "unknown", **totals(entries), "summary": first if entries else "holds no tensors"}


def inspect_video(path):
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise BadInput(
                    f"{path}: holds no video, only {', '.join(s.type for s in container.streams) or 'nothing'}"
                )
            stream, comment = container.streams.video[0], container.metadata.get("comment", "")
            info = {
                "width": stream.width,
                "height": stream.height,
                "frames": stream.frames or None,
                "fps": float(stream.average_rate or 0),
                "codec": stream.codec_context.name if stream.codec_context else "without a decoder here",
                "bytes": path.stat().st_size,
            }
    except (av.FFmpegError, OSError) as e:
        raise BadInput(f"{path}: not a readable video ({e})") from None
    try:
        settings = json.loads(comment)
    except ValueError:
        settings = {}
    settings = settings if isinstance(settings, dict) else {}
    made = "without generation settings"
    if "prompt" in settings:
        made = f"made from the prompt {settings['prompt']!r} with seed {settings.get('seed')}"
    return {
        "kind": "video",
        **info,
        "settings": settings,
        "summary": f"{info['frames'] or 'an unknown number of'} frames of {info['width']}x{info['height']} at "
        f"{info['fps']:g} fps, {made}",
    }


def inspect_experts(path):
    """Return a list of dictionaries that describe the DiTs in a checkpoint folder: the experts of an A14B, or a single
    DiT, or [] if the folder has no DiT.
    """
    names = ("transformer", "transformer_2") if is_diffusers(path) else EXPERT_FOLDERS
    experts = [name for name in names if (path / name).is_dir()]
    missing = [name for name in names if experts and name not in experts]
    single = expert_folders(path).get("dit", path)
    folders = [path / name for name in experts] or ([single] if single.is_file() or holds_dit(path) else [])
    if is_diffusers(path) and "dit" in expert_folders(path):
        experts = missing = []
    models = []
    for folder in folders:
        model = inspect_weights(folder)
        summary = model["summary"] if experts else "single-tower, " + model["summary"]
        summary += f"; experts found: {', '.join(experts)}" if experts else ""
        summary += f"; {missing[0]} is missing" if missing else ""
        models.append({"path": str(folder), "experts": experts, **model, "summary": summary})
    return models


def holds_dit(path):
    """Return whether a DiT's files lie in the checkpoint folder itself, rather than in a subfolder. They may have the
    official names, or be a single file with any name.
    """
    if any(path.glob("diffusion_pytorch_model*")):
        return True
    try:
        return ((path / "config.json").is_file() or known_by_files(path)) and kind_of(path) == "dit"
    except BadInput:
        return False


def other_parts(path):
    """Return the paths of the text encoders and VAEs in a checkpoint folder. In the layout of diffusers, the paths are
    folders; otherwise they are files.
    """
    if is_diffusers(path):
        return [path / name for name in ("text_encoder", "vae") if (path / name).is_dir()]
    names = sorted(f for f in parts_folder(path).iterdir() if f.suffix in (".pth", ".safetensors", ".gguf"))
    encoders = [f for f in names if f.name.lower().startswith(("models_t5", "umt5"))]
    return encoders + [f for f in names if "vae" in f.name.lower() and f not in encoders]


def inspect(path):
    """Return a list of dictionaries that describe everything at a path, one for each model, LoRA or video. Only headers
    are read, no tensors. Raises BadInput if nothing at the path can be read.
    """
    path = Path(path)
    if path.is_file():
        model = inspect_video(path) if path.suffix.lower() in CLIPS else inspect_weights(path)
        return [{"path": str(path), **model}]
    if not path.is_dir():
        raise BadInput(f"{path}: no such file or folder")
    models = inspect_experts(path)
    files = other_parts(path)
    if not models and not files:
        files = sorted(f for f in path.iterdir() if f.suffix in (".safetensors", ".gguf"))
    models += [{"path": str(f), **inspect_weights(f)} for f in files]
    if not models:
        raise BadInput(
            f"{path}: holds no weights known here (diffusion_pytorch_model*, high_noise_model, transformer, "
            "models_t5*, umt5*, *VAE*, *.safetensors, *.gguf)"
        )
    return models


def show(model):
    print(f"{model['path']}\n  {model['summary']}")
    if model["kind"] == "dit":
        print(
            "  width {width}, layers {layers}, heads {heads} x {head_dim}, ffn {ffn}, channels {in_channels} -> "
            "{out_channels}, text {text_len} x {text_dim}".format(**model)
        )
        print("  blocks with " + ", ".join(f"{target} {n}" for target, n in model["blocks_with"].items()))
    for key in ("metadata", "settings"):
        if key in model:
            print("  " + json.dumps(model[key], ensure_ascii=False))
    if "parameters" in model:
        print(
            f"  {model['parameters']:,} parameters in {model['tensors']} tensors, {model['bytes']:,} bytes as stored, "
            f"mostly {model['dtype']}"
        )
    if model.get("lora_budget"):
        print(f"  {'LoRA on':30} {'rank':>5} {'matrices':>9} {'parameters':>12} {'MiB (bf16)':>11}")
        for r in model["lora_budget"]:
            print(f"  {r['targets']:30} {r['rank']:5} {r['matrices']:9} {r['parameters']:12,} {r['mib_bf16']:11.2f}")


def run(args):
    models, failures = [], []
    for path in args.paths:
        try:
            models += inspect(path)
        except BadInput as e:
            failures.append(str(e))
            models.append({"path": path, "kind": "unreadable", "summary": str(e)})
    for model in models:
        show(model)
    write_json(args.json, {"models": models})
    if failures:
        raise BadInput(f"{len(failures)} of {len(args.paths)} paths cannot be inspected: {'; '.join(failures)}")
