"""diag.py convert: write a text encoder, a DiT or a LoRA in another layout, with the same values."""

import contextlib
from dataclasses import asdict
from pathlib import Path

from diagnostics.common import write_json
from diagnostics.inspect import files_of, kind_of
from nanowan.errors import BadInput
from nanowan.formats.dit import load_wan
from nanowan.formats.header import save
from nanowan.formats.layouts import diffusers_config, diffusers_dit_name, expert_folders, read_weights
from nanowan.formats.load import cast
from nanowan.formats.lora import LORA_LAYOUTS, kind_of_lora, parse_lora_spec, read_lora, write_changes
from nanowan.formats.t5 import LAYOUTS, convert_encoder_lora, convert_t5, own_encoder, tokenizer_file
from nanowan.settings import checkpoint_dir
from wan import Wan

DIT_LAYOUTS = ("official", "diffusers")
STEM = "diffusion_pytorch_model"  # the name of a DiT's files in both layouts
FILE_BYTES = 5_000_000_000  # the largest size of one of these files


def convert_dit(source, out, layout, file_bytes=FILE_BYTES):
    """Write a DiT into the folder `out` in another layout. Tensors keep their dtypes and bits, except that 8-bit
    weights with scales, and GGUF's weights, become bf16. The folder gets a config.json and one safetensors file; if
    that file would be larger than file_bytes, the folder gets several safetensors files and an index instead.

    source: a weight file, a folder with the DiT's files, or a checkpoint folder with one DiT. layout: "official" or
    "diffusers". Host memory holds one tensor at a time. Raises BadInput for an incomplete DiT, and for a DiT that
    diffusers' WanTransformer3DModel cannot represent.
    """
    model = load_wan(source, "meta")  # raises BadInput unless all tensors have their shapes
    if type(model) is not Wan:
        raise BadInput(f"{source}: of the kind {model.config.model_type}; DiTs of ti2v, t2v and i2v are converted")
    entries, out = cast(read_weights(files_of(next(iter(expert_folders(source).values()))))), Path(out)
    config = {k: v for k, v in asdict(model.config).items() if k not in ("text_dim", "patch_size")}
    config = diffusers_config(model.config) if layout == "diffusers" else {"_class_name": "WanModel", **config}
    files, size = [{}], 0
    for name, entry in sorted(entries.items()):
        nbytes = entry.numel * entry.dtype.itemsize
        if files[-1] and size + nbytes > file_bytes:
            files.append({})
            size = 0
        files[-1][diffusers_dit_name(name) if layout == "diffusers" else name] = entry
        size += nbytes
    names = [f"{STEM}-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    for name, part in zip(names if len(files) > 1 else [f"{STEM}.safetensors"], files):
        save(out / name, part, {"format": "pt"})
    if len(files) > 1:
        index = {key: name for name, part in zip(names, files) for key in part}
        write_json(out / f"{STEM}.safetensors.index.json", {"metadata": {}, "weight_map": index})
    write_json(out / "config.json", config)


def is_dit(source, part):
    """Return whether to convert a DiT, rather than a text encoder. part: the value of --part, which decides if it is
    given, or None. With None, the contents of `source` decide; in a checkpoint folder with a DiT and a text encoder,
    the text encoder is chosen.
    """
    if part or not source.is_dir():
        return (part or kind_of(source)) == "dit"
    with contextlib.suppress(BadInput):
        return not own_encoder(source)
    return kind_of(source) == "dit"


def convert_lora(text, out, layout):
    """Write a LoRA in another layout. text: FILE; if FILE holds both experts, FILE:high or FILE:low. layout: "comfyui"
    (diffusers reads it too) or, for a LoRA on a DiT, "musubi" (for musubi-tuner). The low-rank factors keep their bits,
    except that B is multiplied by the LoRA's scale, such as alpha / rank, if the scale is not 1. Raises BadInput if the
    layout cannot hold the LoRA.
    """
    if out.suffix != ".safetensors":
        raise BadInput(f"{out}: should end in .safetensors")
    if layout not in LORA_LAYOUTS:
        raise BadInput(f"--to {layout}: of a LoRA, one of {', '.join(LORA_LAYOUTS)}")
    spec = parse_lora_spec(text, "convert")
    if spec.weight != 1:
        raise BadInput(f"convert {text}: a weight means nothing here; give FILE, FILE:high or FILE:low")
    if kind_of_lora(spec.file) == "text":
        if layout != "comfyui":
            raise BadInput(f"--to {layout}: of a LoRA of the text encoder, comfyui")
        convert_encoder_lora(spec.file, out)
        return
    changes, metadata = read_lora(spec.file, spec.expert)
    write_changes(out, changes, metadata | ({"expert": spec.expert} if spec.expert else {}), layout=layout)


def run(args):
    source, out = checkpoint_dir(args.source), Path(args.out)
    file = Path(parse_lora_spec(args.source, "convert").file)
    if file.is_file() and kind_of(file).endswith("lora"):
        convert_lora(args.source, out, args.to)
        print(out)
        return
    if is_dit(source, args.part):
        if args.to not in DIT_LAYOUTS:
            raise BadInput(f"--to {args.to}: of a DiT, one of {', '.join(DIT_LAYOUTS)}")
        if out.suffix == ".safetensors" or out.is_file():
            raise BadInput(f"{out}: a DiT is written into a folder")
        convert_dit(source, out, args.to)
        print(out)
        return
    if args.to not in LAYOUTS:
        raise BadInput(f"--to {args.to}: of a text encoder, one of {', '.join(LAYOUTS)}")
    if args.tokenizer and not Path(args.tokenizer).is_file():
        raise BadInput(f"--tokenizer {args.tokenizer}: no such file")
    files, tokenizer = [source], args.tokenizer
    if source.is_dir():
        files, tokenizer = own_encoder(source), tokenizer or tokenizer_file(source)
    convert_t5(files, out, args.to, tokenizer)
    print(out)
