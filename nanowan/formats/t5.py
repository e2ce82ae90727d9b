"""Read, write and convert the text encoder's files: the official, transformers', ComfyUI's and llama.cpp's layouts."""

import base64
import fnmatch
import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from nanowan.errors import BadInput
from nanowan.files import atomic
from nanowan.formats.changes import Rows, Value
from nanowan.formats.header import Entry, count_blocks, read_header, save
from nanowan.formats.layouts import find, parts_folder, read_headers, weight_files
from nanowan.formats.load import cast, load_into
from nanowan.formats.lora import LowRank, list_lora, read_listing, save_adapter
from nanowan.formats.scaled import apply_scales
from t5 import EOS, PAD, TextEncoder, Tokenizer


def sentencepiece_model(file):
    """Return the bytes of a sentencepiece model. If `file` is a tokenizer.json, the model is built from its vocabulary
    and its normalisation table. Otherwise, the bytes of the file are returned. Raises BadInput for a tokenizer.json
    without a Unigram model. Source: sentencepiece_model.proto.
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
    """Return `data`, bytes, as a field in protobuf's encoding: the field's number, the length of the data (a varint,
    seven bits in each byte), and the data.
    """
    length, n = b"", len(data)
    while n > 127:
        length, n = length + bytes([n & 127 | 128]), n >> 7
    return bytes([number << 3 | 2]) + length + bytes([n]) + data


FILE_NAMES = ("models_t5*", "umt5-xxl-enc*", "umt5_xxl_*")  # the official file; Kijai's and city96's (GGUF); ComfyUI's
# places of the tokenizer: in official folders (the second is Animate-2's), and in diffusers' folders (the last two)
TOKENIZERS = (
    "google/umt5-xxl/spiece.model",
    "umt5-xxl/spiece.model",
    "tokenizer/spiece.model",
    "tokenizer/tokenizer.json",
)
# {official name: transformers' name}, outside the blocks and inside them
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
# {llama.cpp's name, in GGUF files: transformers' name}
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
    """Return transformers' name of a tensor, given the official name."""
    if m := re.match(r"blocks\.(\d+)\.(.+\.)", name):
        return name.replace(m.group(), f"encoder.block.{m.group(1)}.{BLOCK_NAMES[m.group(2)]}")
    outer = name[: name.index(".") + 1]
    return name.replace(outer, OUTER_NAMES[outer])


def official_name(name):
    """Return the official name of a tensor, given its name in transformers or llama.cpp. Other names are returned
    unchanged.
    """
    block, module, leaf = re.fullmatch(r"(enc\.blk\.\d+\.)?(.*?)([^.]*)", name).groups()
    if module in LLAMA_NAMES:
        name = (block or "").replace("enc.blk", "encoder.block") + LLAMA_NAMES[module] + leaf
    if m := re.match(r"encoder\.block\.(\d+)\.(.+\.)", name):
        ours = {theirs: ours for ours, theirs in BLOCK_NAMES.items()}.get(m.group(2))
        return name.replace(m.group(), f"blocks.{m.group(1)}.{ours}") if ours else name
    # transformers stores the token embeddings under two names
    for ours, theirs in [*OUTER_NAMES.items(), ("token_embedding.", "encoder.embed_tokens.")]:
        if name.startswith(theirs):
            return name.replace(theirs, ours)
    return name


TABLE = "token_embedding.weight"


class EncoderFile(NamedTuple):
    entries: dict  # {official name: Entry}
    spiece: Entry | None  # the tokenizer stored in the file, as bytes


def is_delta(file):
    """Return whether a file is a delta, as written by train_te.py --save delta. A delta changes a checkpoint's own
    encoder and holds only the values that were trained.
    """
    return read_header(file)[1].get("delta") == "True"


def read_encoder(files):
    """Return the EncoderFile of a complete encoder, given one file or several shards in any layout. Only headers are
    read.
    """
    files = list(files)
    if is_delta(files[0]):
        raise BadInput(f"{files[0]}: a delta, not a whole encoder")
    entries = read_headers(files)
    spiece = entries.pop("spiece_model", None)
    entries.pop("logit_scale", None)  # ComfyUI's CLIPSave adds this tensor to any encoder
    if spiece is not None and (spiece.dtype != torch.uint8 or len(spiece.shape) != 1):
        raise BadInput(f"{files[0]}: spiece_model is {spiece.dtype} {spiece.shape}; expected the tokenizer's bytes")
    apply_scales(entries)
    return EncoderFile({official_name(name): e for name, e in entries.items()}, spiece)


def own_encoder(ckpt_dir):
    """Return the files of a checkpoint's own encoder. ckpt_dir: a checkpoint folder in diffusers' layout, its
    text_encoder folder, or an official folder, in which the encoder's file is recognised by its name.
    """
    folder = parts_folder(ckpt_dir)
    if (folder / "text_encoder").is_dir():
        return weight_files(folder / "text_encoder", "model")
    if any(folder.glob("model.safetensors*")):
        return weight_files(folder, "model")
    names = [f.name.lower() for f in folder.iterdir()] if folder.is_dir() else []
    pattern = next((p for p in FILE_NAMES if fnmatch.filter(names, f"{p}.*")), FILE_NAMES[0])
    return [find(folder, pattern, "the text encoder (models_t5_umt5-xxl-enc-bf16, .pth or .safetensors)")]


# ---- an encoder and changes to it --------------------------------------------------------------------------------
class EncoderSpec(NamedTuple):
    file: Path  # a file or a folder
    strength: float = 1.0


def encoder_specs(weights):
    """Return a list of EncoderSpecs. weights: None, FILE[:strength] as for --text_encoder, or a list whose items are
    such strings or pairs (file, strength).
    """
    if weights is None or isinstance(weights, str | Path):
        weights = [] if weights is None else [weights]
    return [EncoderSpec(Path(w[0]), w[1]) if isinstance(w, tuple) else _parse_encoder_spec(str(w)) for w in weights]


def _parse_encoder_spec(text):
    file, _, strength = text.rpartition(":")
    try:
        number = float(strength)
    except ValueError:
        number = None
    if not file or number is None or Path(text).exists():
        return EncoderSpec(Path(text))
    if not math.isfinite(number):
        raise BadInput(f"--text_encoder {text}: a strength of {strength}; give a number")
    return EncoderSpec(Path(file), number)


class EncoderSource(NamedTuple):
    """The files that make up an encoder. base: the files of a complete encoder. changes: EncoderSpecs of the files that
    change this encoder, in the order in which they are applied.
    """

    base: list
    changes: list

    def files(self):
        return [*self.base, *(f for file, _ in self.changes for f in _files_of(file))]

    def digests(self, digest):
        """Return a list with the string digest(file) for every file of the encoder. A strength other than 1 is appended
        to this string. digest: a function.
        """
        changed = [(f, strength) for file, strength in self.changes for f in _files_of(file)]
        return [digest(f) for f in self.base] + [digest(f) + (f":{s}" if s != 1 else "") for f, s in changed]


def _files_of(file):
    return own_encoder(file) if file.is_dir() else [file]


def _is_whole(file):
    return file.is_dir() or not is_delta(file) and list_lora(file) is None


def encoder_source(ckpt_dir, weights=None):
    """Return the EncoderSource of a checkpoint folder. weights: as for encoder_specs. The base is the last complete
    encoder with strength 1 among the files of `weights`, else the folder's own encoder. The files after the base are
    the changes.
    """
    specs = encoder_specs(weights)
    whole = [i for i, (file, strength) in enumerate(specs) if strength == 1 and _is_whole(file)]
    base = _files_of(specs[whole[-1]].file) if whole else own_encoder(ckpt_dir)
    return EncoderSource(base, specs[whole[-1] + 1 :] if whole else specs)


@dataclass(frozen=True)
class TableLowRank(LowRank):
    """A LoRA of an embedding table, scale * B A. Most rows of B are zero. The product is formed only for the other rows
    of B.
    """

    def rows(self):
        """Return the rows of the table that change, as (ids (n) int64, values to add (n,D) fp32)."""
        a, b = self.factors()
        ids = b.any(1).nonzero().flatten()
        return ids, b[ids] @ a

    def add_to(self, parameter, strength=1.0):
        ids, values = (t.to(parameter.device) for t in self.rows())
        parameter[ids] = (parameter[ids].float() + strength * values).to(parameter.dtype)


def read_encoder_change(file):
    """Return {official parameter name: Change} of a file that changes an encoder: a complete encoder, a delta written
    by train_te.py, or a LoRA with ComfyUI's names. Only headers are read.
    """
    file = Path(file)
    if _is_whole(file):
        return {name: Value(entry) for name, entry in read_encoder(_files_of(file)).entries.items()}
    if is_delta(file):
        entries = read_headers([file])
        rows, ids = (entries.pop(f"token_embedding.{k}", None) for k in ("rows", "ids"))
        changes = {name: Value(entry) for name, entry in entries.items()}
        return changes | ({TABLE: Rows(rows, ids, replaces=True)} if rows else {})
    changes = {official_name(name): change for name, change in read_listing(file, "text").changes("text").items()}
    if type(table := changes.get(TABLE)) is LowRank:
        changes[TABLE] = TableLowRank(table.a, table.b, table.scale)
    return changes


def check_encoder_changes(source, entries):
    """Return [({parameter name: Change}, strength)], one pair for each file in the changes of an EncoderSource.
    entries: the headers {official name: Entry} of the source's base. Raises BadInput if a change does not fit the base.
    """
    pairs = []
    for file, strength in source.changes:
        changes = read_encoder_change(file)
        strays = [n for n, change in changes.items() if not (n in entries and change.fits(entries[n].shape))]
        if strays:
            there = f"is {entries[strays[0]].shape} there" if strays[0] in entries else "is not there"
            what = "a delta" if file.is_file() and is_delta(file) else "a change"
            raise BadInput(f"{file}: not {what} of {source.base[0]}: {strays[0]} {there}")
        pairs.append((changes, strength))
    return pairs


def tokenizer_file(ckpt_dir):
    """Return the file of a checkpoint folder's tokenizer: a sentencepiece model, else a tokenizer.json, else None."""
    folder = parts_folder(ckpt_dir)
    return next((f for name in TOKENIZERS if (f := folder / name).is_file()), None)


XXL = (256384, 4096, 4096, 10240, 64, 24)  # UMT5-XXL: vocabulary, width, inner width, ffn, heads, layers


def build_t5(entries, path):
    """Return a new encoder whose sizes come from the shapes in these headers {official name: Entry}. Raises BadInput,
    naming `path`, if the headers belong to another model.
    """

    def shape(name, dims=2):
        if name not in entries or len(entries[name].shape) != dims:
            raise BadInput(f"{path}: not a UMT5 encoder, it has no matrix {name}")
        return entries[name].shape

    (vocab, dim), (buckets, heads) = shape("token_embedding.weight"), shape("blocks.0.pos_embedding.embedding.weight")
    inner, ffn = shape("blocks.0.attn.q.weight")[0], shape("blocks.0.ffn.fc1.weight")[0]
    return TextEncoder(vocab, dim, inner, ffn, heads, count_blocks(entries), buckets)


@torch.no_grad()
def load_t5(ckpt_dir, device="cpu", dtype=torch.bfloat16, weights=None):
    """Load the encoder of a checkpoint folder, with its tokenizer.

    weights: FILE[:strength] as for --text_encoder, or a list of these, applied in order. A file is a complete encoder
    in any layout, a delta written by train_te.py, or a LoRA. For a complete encoder or a delta, strength s gives W + s
    (W_file - W), where W is the weight after the previous files. The tokenizer is the folder's, else the one inside the
    encoder's file. The tokenizer also knows the words to which train_te.py gave their own token embeddings
    (`placeholders` in a file's metadata).
    """
    source = encoder_source(ckpt_dir, weights)
    entries, spiece = read_encoder(source.base)
    changes = check_encoder_changes(source, entries)
    with torch.device("meta"):
        model = build_t5(entries, source.base[0])
    model = load_into(model, cast(entries, dtype), device, dtype)
    for part, strength in changes:
        for name, change in part.items():
            change.add_to(model.get_parameter(name), strength)
    model.tokenizer = load_tokenizer(ckpt_dir, spiece)
    for file in source.files():
        model.tokenizer.add_words(placeholder_words(file))
    return model


def placeholder_words(file):
    """Return {word: [token id]} from an encoder's file, for the words to which train_te.py gave their own token
    embeddings.
    """
    return json.loads(read_header(file)[1].get("placeholders", "{}"))


def load_tokenizer(ckpt_dir, spiece=None):
    """Load the Tokenizer of a checkpoint folder, or, if the folder has none, the one stored inside an encoder's file.
    spiece: the Entry of the stored tokenizer (EncoderFile.spiece), or None. Raises BadInput if there is no tokenizer,
    or if it cannot be read.
    """
    file = tokenizer_file(ckpt_dir)
    if file is None and spiece is None:
        file = Path(ckpt_dir) / TOKENIZERS[0]
        raise BadInput(f"{file}: no such file; the tokenizer is the checkpoint's google/umt5-xxl/spiece.model")
    try:
        model = spiece.read().numpy().tobytes() if file is None else sentencepiece_model(file)
        special, byte_fallback = {}, False
        if file is not None and (config := file.parent / "tokenizer.json").exists():  # the official pipelines read it
            config = json.loads(config.read_text(encoding="utf-8"))
            special = {t["content"]: t["id"] for t in config.get("added_tokens", [])}
            byte_fallback = bool(config.get("model", {}).get("byte_fallback"))
        return Tokenizer(model, special, byte_fallback)
    except ValueError as e:
        if isinstance(e, BadInput):
            raise
        raise BadInput(f"{file or spiece.file}: {e}") from None


LAYOUTS = ("official", "comfyui", "diffusers")


def in_layout(tensors, layout, spiece=None):
    """Return {key: tensor} of a complete encoder in one of LAYOUTS. tensors: {official name: tensor or Entry}. spiece:
    the bytes (n,) uint8 of the sentencepiece model, which ComfyUI's layout contains.
    """
    if layout == "official":
        return tensors
    tensors = {transformers_name(name): t for name, t in tensors.items()}
    return tensors | ({"spiece_model": spiece} if layout == "comfyui" else {})


def tokenizer_bytes(file):
    """Return the bytes of the sentencepiece model in a file (see sentencepiece_model) as a tensor, (n,) uint8."""
    return torch.frombuffer(bytearray(sentencepiece_model(Path(file))), dtype=torch.uint8)


def transformers_config(model):
    """Return the contents of the config.json from which transformers builds this encoder."""
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
    """Rewrite an encoder in another layout, one tensor at a time. Values stay bit-identical, except that 8-bit weights
    with scales, and weights of GGUF files, become bf16.

    source: one file in any layout, or a list of shards. out: a .safetensors file; for "diffusers", `out` may be a
    folder, in which config.json and model.safetensors are written. layout: "official" (also read by Kijai's nodes,
    musubi-tuner and diffusion-pipe), "comfyui", or "diffusers" (also read by transformers). tokenizer: the spiece.model
    to put into a file in ComfyUI's layout (default: the one inside the source). Raises BadInput if the source is not a
    complete encoder.
    """
    files = [source] if isinstance(source, str | Path) else source
    encoder, out = read_encoder(files), Path(out)
    with torch.device("meta"):
        model = build_t5(encoder.entries, files[0])
    load_into(model, encoder.entries, "meta", torch.bfloat16)  # raises if a tensor is missing or has another shape
    spiece = tokenizer_bytes(tokenizer) if tokenizer else encoder.spiece
    if layout == "comfyui" and spiece is None:
        raise BadInput(f"{files[0]}: has no tokenizer inside, and ComfyUI's layout needs one: give its spiece.model")
    if out.suffix != ".safetensors":
        if layout != "diffusers":
            raise BadInput(f"{out}: should end in .safetensors")
        with atomic(out / "config.json") as tmp:
            tmp.write_text(json.dumps(transformers_config(model), indent=2) + "\n")
        out = out / "model.safetensors"
    words = {k: v for k, v in read_header(files[0])[1].items() if k == "placeholders"}
    save(out, in_layout(cast(encoder.entries), layout, spiece), {"format": "pt", **words})


# ---- LoRAs of the encoder ----------------------------------------------------------------------------------------
LORA_PREFIX = "text_encoders.umt5xxl.transformer."


def write_encoder_lora(path, blocks, rows=None, ids=None, metadata=None, *, vocab, compact=False):
    """Write changes of the encoder as a LoRA that ComfyUI's LoraLoader reads.

    blocks: {official module name: (A (r,in), B (out,r))} with dW = B A. rows (n,D): vectors that are added to the token
    embeddings with these `ids` (n). They are written as a LoRA of the embedding table whose B (vocab,n) is one-hot.
    compact: write the ids instead of that B, which saves 0.5 MB for each id; only nanoWan reads such a file.
    """
    tensors = {}
    for name, (a, b) in blocks.items():
        module = LORA_PREFIX + transformers_name(f"{name}.weight").removesuffix(".weight")
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    if rows is not None:
        tensors[f"{LORA_PREFIX}shared.lora_A.weight"] = rows
        if compact:
            tensors[f"{LORA_PREFIX}shared.ids"] = ids
        else:
            tensors[f"{LORA_PREFIX}shared.lora_B.weight"] = one_hot(ids, vocab)
    save_adapter(path, tensors, {**(metadata or {}), "vocab": vocab})


def one_hot(ids, vocab):
    """Return a matrix (vocab,n), fp16, that holds a 1 at row ids[j] of each column j, and zeros elsewhere."""
    matrix = torch.zeros(vocab, len(ids), dtype=torch.float16)
    matrix[ids.cpu(), torch.arange(len(ids))] = 1
    return matrix


def convert_encoder_lora(file, out):
    """Rewrite a LoRA of the encoder in the form that ComfyUI reads. In a compact file, the ids are replaced by a
    one-hot B.
    """
    listing = read_listing(file, "text")
    tensors = {}
    for name, change in listing.changes("text").items():
        module = LORA_PREFIX + name.removesuffix(".weight")
        if isinstance(change, Rows):
            tensors[f"{module}.lora_A.weight"] = change.values
            tensors[f"{module}.lora_B.weight"] = one_hot(change.read()[0], int(listing.metadata.get("vocab", XXL[0])))
        else:
            tensors |= {f"{module}.{part}": t for part, t in change.saved("weight", 1)}
    save_adapter(out, tensors, listing.metadata)
