"""The text encoder's files, read, written and converted: official, transformers', ComfyUI's, llama.cpp's."""

import base64
import fnmatch
import json
import re
import struct
from pathlib import Path
from typing import NamedTuple

import torch

from nanowan.errors import BadInput
from nanowan.files import atomic
from nanowan.formats.header import Entry, count_blocks, read_header, save
from nanowan.formats.layouts import find, read_headers, weight_files
from nanowan.formats.load import cast, load_into
from nanowan.formats.scaled import apply_scales
from t5 import EOS, PAD, TextEncoder, Tokenizer


def sentencepiece_model(file):
    """The bytes of a sentencepiece model: those of the file, or made from a tokenizer.json's vocabulary and table of
    normalisation. Raises BadInput for a tokenizer.json of another kind. Source: sentencepiece_model.proto.
    """
    if file.suffix != ".json":
        return file.read_bytes()
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        model, unk = config["model"], config["model"].get("unk_id")
        if model["type"] != "Unigram":
            raise KeyError(f"a {model['type']} model, not a Unigram one")
        charsmap = re.search(r'"precompiled_charsmap": "([^"]*)"', json.dumps(config.get("normalizer")))
        special = {t["content"] for t in config.get("added_tokens", []) if t["id"] in (PAD, EOS)}
        proto = b""
        for i, (piece, score) in enumerate(model["vocab"]):
            is_byte = model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", piece)
            kind = 2 if i == unk else 3 if piece in special else 6 if is_byte else 1  # unknown, control, byte, normal
            proto += message(
                1, message(1, piece.encode()) + struct.pack("<Bf", 2 << 3 | 5, score) + bytes([3 << 3, kind])
            )
        return proto + message(3, message(2, base64.b64decode(charsmap.group(1) if charsmap else "")))
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as e:
        raise BadInput(f"{file}: not a tokenizer of T5's kind ({type(e).__name__}: {e})") from None


def message(number, data):
    """A field of bytes in protobuf's encoding: its number, its length in groups of seven bits, and the bytes."""
    length, n = b"", len(data)
    while n > 127:
        length, n = length + bytes([n & 127 | 128]), n >> 7
    return bytes([number << 3 | 2]) + length + bytes([n]) + data


FILE_NAMES = ("models_t5*", "umt5-xxl-enc*", "umt5_xxl_*")  # the official one, Kijai's and city96's GGUF, ComfyUI's
# in an official folder, and in those of diffusers
TOKENIZERS = ("google/umt5-xxl/spiece.model", "tokenizer/spiece.model", "tokenizer/tokenizer.json")
# official names and transformers', outside of blocks and in them
OUTER_NAMES = {"token_embedding.": "shared.", "norm.": "encoder.final_layer_norm."}
BLOCK_NAMES = {
    "norm1.": "layer.0.layer_norm.",
    "norm2.": "layer.1.layer_norm.",
    **{f"attn.{p}.": f"layer.0.SelfAttention.{p}." for p in "qkvo"},
    "pos_embedding.embedding.": "layer.0.SelfAttention.relative_attention_bias.",
    "ffn.gate.0.": "layer.1.DenseReluDense.wi_0.",
    "ffn.fc1.": "layer.1.DenseReluDense.wi_1.",
    "ffn.fc2.": "layer.1.DenseReluDense.wo.",
}
# llama.cpp's names, in GGUF files, and transformers'
LLAMA_NAMES = {
    "token_embd.": "shared.",
    "enc.output_norm.": "encoder.final_layer_norm.",
    "attn_norm.": "layer.0.layer_norm.",
    "attn_rel_b.": "layer.0.SelfAttention.relative_attention_bias.",
    **{f"attn_{p}.": f"layer.0.SelfAttention.{p}." for p in "qkvo"},
    "ffn_norm.": "layer.1.layer_norm.",
    "ffn_gate.": "layer.1.DenseReluDense.wi_0.",
    "ffn_up.": "layer.1.DenseReluDense.wi_1.",
    "ffn_down.": "layer.1.DenseReluDense.wo.",
}


def transformers_name(name):
    """transformers' name of a tensor with this official one."""
    if m := re.match(r"blocks\.(\d+)\.(.+\.)", name):
        return name.replace(m.group(), f"encoder.block.{m.group(1)}.{BLOCK_NAMES[m.group(2)]}")
    outer = name[: name.index(".") + 1]
    return name.replace(outer, OUTER_NAMES[outer])


def official_name(name):
    """The official name of a tensor with this one of transformers or llama.cpp; any other name as it is."""
    block, module, leaf = re.fullmatch(r"(enc\.blk\.\d+\.)?(.*?)([^.]*)", name).groups()
    if module in LLAMA_NAMES:
        name = (block or "").replace("enc.blk", "encoder.block") + LLAMA_NAMES[module] + leaf
    if m := re.match(r"encoder\.block\.(\d+)\.(.+\.)", name):
        ours = {theirs: ours for ours, theirs in BLOCK_NAMES.items()}.get(m.group(2))
        return name.replace(m.group(), f"blocks.{m.group(1)}.{ours}") if ours else name
    for ours, theirs in [*OUTER_NAMES.items(), ("token_embedding.", "encoder.embed_tokens.")]:  # the table once more
        if name.startswith(theirs):
            return name.replace(theirs, ours)
    return name


class EncoderFile(NamedTuple):
    entries: dict  # {official name: Entry}
    spiece: Entry | None  # the tokenizer inside, as bytes
    rows: Entry | None  # of a delta: the embedding rows (n,D) that replace those with these ids (n)
    ids: Entry | None


def is_delta(file):
    """Whether this is a file of changes to a checkpoint's own encoder, by train_te.py --save delta."""
    return read_header(file)[1].get("delta") == "True"


def read_encoder(files):
    """The EncoderFile of what encoder_files gives: one file or several shards in any of the layouts, and perhaps a
    delta behind them. Reads headers only.
    """
    files = list(files)
    delta = read_headers([files.pop()]) if is_delta(files[-1]) else {}
    if not files:
        raise BadInput(f"{next(iter(delta.values())).file}: a delta, not a whole encoder")
    entries = read_headers(files)
    spiece = entries.pop("spiece_model", None)
    if spiece is not None and (spiece.dtype != torch.uint8 or len(spiece.shape) != 1):
        raise BadInput(f"{files[0]}: spiece_model is {spiece.dtype} {spiece.shape}; expected the tokenizer's bytes")
    apply_scales(entries)
    entries = {official_name(name): e for name, e in entries.items()}
    rows, ids = (delta.pop(f"token_embedding.{k}", None) for k in ("rows", "ids"))
    stray = [name for name in delta if name not in entries]
    if stray:
        raise BadInput(f"{delta[stray[0]].file}: not a delta of {files[0]}, which has no {stray[0]}")
    return EncoderFile(entries | delta, spiece, rows, ids)


def own_encoder(ckpt_dir):
    """The files of a folder's own encoder: of an official folder, found by name, of one of diffusers, or of the
    text_encoder folder in that.
    """
    folder = Path(ckpt_dir)
    if (folder / "text_encoder").is_dir():
        return weight_files(folder / "text_encoder", "model")
    if any(folder.glob("model.safetensors*")):
        return weight_files(folder, "model")
    names = [f.name.lower() for f in folder.iterdir()] if folder.is_dir() else []
    pattern = next((p for p in FILE_NAMES if fnmatch.filter(names, f"{p}.*")), FILE_NAMES[0])
    return [find(folder, pattern, "the text encoder (models_t5_umt5-xxl-enc-bf16, .pth or .safetensors)")]


def encoder_files(ckpt_dir, weights=None):
    """The files that an encoder comes from: `weights` alone, a file or a text_encoder folder, or the folder's own, and
    behind them `weights` where that is a delta.
    """
    if weights is not None and Path(weights).is_dir():
        return own_encoder(weights)
    if weights is not None and not is_delta(weights):
        return [Path(weights)]
    return own_encoder(ckpt_dir) + ([] if weights is None else [Path(weights)])


def tokenizer_file(ckpt_dir):
    """The sentencepiece model of a folder, or its tokenizer.json, or None."""
    return next((f for name in TOKENIZERS if (f := Path(ckpt_dir) / name).is_file()), None)


XXL = (256384, 4096, 4096, 10240, 64, 24)  # UMT5-XXL: vocabulary, width, inner width, ffn, heads, layers


def build_t5(entries, path):
    """The encoder whose tensors' headers these are."""

    def shape(name, dims=2):
        if name not in entries or len(entries[name].shape) != dims:
            raise BadInput(f"{path}: not a UMT5 encoder, it has no matrix {name}")
        return entries[name].shape

    (vocab, dim), (buckets, heads) = shape("token_embedding.weight"), shape("blocks.0.pos_embedding.embedding.weight")
    inner, ffn = shape("blocks.0.attn.q.weight")[0], shape("blocks.0.ffn.fc1.weight")[0]
    return TextEncoder(vocab, dim, inner, ffn, heads, count_blocks(entries), buckets)


def load_t5(ckpt_dir, device="cpu", dtype=torch.bfloat16, weights=None):
    """Load the encoder of a checkpoint folder, with its tokenizer.

    weights: a file to use: a whole encoder in any layout, or a delta of train_te.py, whose tensors and embedding rows
    replace the folder's. The tokenizer is the folder's spiece.model, else the one inside the encoder's file.
    """
    files = encoder_files(ckpt_dir, weights)
    entries, spiece, rows, ids = read_encoder(files)
    with torch.device("meta"):
        model = build_t5(entries, files[0])
    model = load_into(model, cast(entries, dtype), device, dtype)
    if rows:
        table = model.token_embedding.weight
        table[ids.read().to(device)] = rows.read().to(table)
    model.tokenizer = load_tokenizer(ckpt_dir, spiece)
    return model


def load_tokenizer(ckpt_dir, spiece=None):
    """The Tokenizer of a folder, else the one inside an encoder's file (EncoderFile.spiece). Raises BadInput."""
    file = tokenizer_file(ckpt_dir)
    if file is None and spiece is None:
        file = Path(ckpt_dir) / TOKENIZERS[0]
        raise BadInput(f"{file}: no such file; the tokenizer is the checkpoint's google/umt5-xxl/spiece.model")
    special, byte_fallback = {}, False
    if file is not None and (config := file.parent / "tokenizer.json").exists():  # what the official pipelines read
        config = json.loads(config.read_text(encoding="utf-8"))
        special = {t["content"]: t["id"] for t in config.get("added_tokens", [])}
        byte_fallback = bool(config.get("model", {}).get("byte_fallback"))
    try:
        model = spiece.read().numpy().tobytes() if file is None else sentencepiece_model(file)
        return Tokenizer(model, special, byte_fallback)
    except ValueError as e:
        if isinstance(e, BadInput):
            raise
        raise BadInput(f"{file or spiece.file}: {e}") from None


LAYOUTS = ("official", "comfyui", "diffusers")


def in_layout(tensors, layout, spiece=None):
    """{official name: tensor} of a whole encoder -> {key: tensor} of a file in one of LAYOUTS. spiece: the bytes of the
    sentencepiece model (n,) uint8, which ComfyUI's layout has inside. Entries may stand for tensors.
    """
    if layout == "official":
        return tensors
    tensors = {transformers_name(name): t for name, t in tensors.items()}
    return tensors | ({"spiece_model": spiece} if layout == "comfyui" else {})


def tokenizer_bytes(file):
    """A sentencepiece model, as Tokenizer takes it, as a tensor (n,) uint8."""
    return torch.frombuffer(bytearray(sentencepiece_model(Path(file))), dtype=torch.uint8)


def transformers_config(model):
    """The config.json with which transformers builds this encoder."""
    block = model.blocks[0]
    (vocab, dim), (buckets, heads) = model.token_embedding.weight.shape, block.pos_embedding.embedding.weight.shape
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "vocab_size": vocab,
        "d_model": dim,
        "d_kv": len(block.attn.q.weight) // heads,
        "d_ff": len(block.ffn.fc1.weight),
        "num_layers": len(model.blocks),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-06,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
    }


def convert_t5(source, out, layout, tokenizer=None):
    """Write an encoder (source: one file of any layout, or a list of shards) anew with the same bits, one tensor at a
    time.

    out: a .safetensors file; for "diffusers" also a folder, which gets config.json and model.safetensors. layout:
    "official" (read by Kijai's nodes, musubi-tuner and diffusion-pipe too), "comfyui", "diffusers" (transformers too).
    tokenizer: the spiece.model that goes into ComfyUI's; default: the source's own. 8-bit weights with scales, and
    GGUF's, become bf16. Raises BadInput for what is not a whole encoder.
    """
    files = [source] if isinstance(source, str | Path) else source
    encoder, out = read_encoder(files), Path(out)
    with torch.device("meta"):
        model = build_t5(encoder.entries, files[0])
    load_into(model, encoder.entries, "meta", torch.bfloat16)  # raises, unless all tensors are there with their shapes
    spiece = tokenizer_bytes(tokenizer) if tokenizer else encoder.spiece
    if layout == "comfyui" and spiece is None:
        raise BadInput(f"{files[0]}: has no tokenizer inside, and ComfyUI's layout needs one: give its spiece.model")
    if out.suffix != ".safetensors":
        if layout != "diffusers":
            raise BadInput(f"{out}: should end in .safetensors")
        with atomic(out / "config.json") as tmp:
            tmp.write_text(json.dumps(transformers_config(model), indent=2) + "\n")
        out = out / "model.safetensors"
    save(out, in_layout(cast(encoder.entries), layout, spiece), {"format": "pt"})
