"""diag.py convert: a text encoder's file in another layout, with the same bits."""

from pathlib import Path

from checkpoint import BadInput
from models import checkpoint_dir
from t5 import convert_t5, own_encoder, tokenizer_file


def run(args):
    source, out = checkpoint_dir(args.source), Path(args.out)
    if out.suffix != ".safetensors":
        raise BadInput(f"{out}: should end in .safetensors")
    if args.tokenizer and not Path(args.tokenizer).is_file():
        raise BadInput(f"--tokenizer {args.tokenizer}: no such file")
    files, tokenizer = [source], args.tokenizer
    if source.is_dir():
        files, tokenizer = own_encoder(source), tokenizer or tokenizer_file(source)
    convert_t5(files, out, args.to, tokenizer)
    print(out)
