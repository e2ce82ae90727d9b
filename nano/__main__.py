"""The nano world's command: write clips with captions, grade a checkpoint, or train nano's checkpoint from scratch.

    python -m nano clips --out DIR --n N --seed S          write mp4 and txt files, and attributes.jsonl
    python -m nano eval --ckpt DIR [--lora FILE] ...       grade how well a checkpoint follows its prompts
    python -m nano train --out DIR                         train everything in nano/checkpoint from scratch

A checkpoint trained on these clips is a complete Wan 2.2 TI2V in the official layout, small enough for two CPU cores,
and it follows its prompts. So each step of the research loop (teach a word, train a translator, measure) runs here as
it does at full size.
"""

import nanowan.environment  # noqa: F401  # isort: skip

import argparse
import json
import random
import shutil
import tempfile
from pathlib import Path

import torch

from nano import pretrain
from nano.evaluate import gradable, print_scores, read_graded_prompts, sample_and_grade, word_attribute
from nano.grader import shares
from nano.world import (
    FPS,
    FRAMES,
    NEW_WORDS,
    SIZE,
    caption_of,
    draw,
    held_out,
    parse_words,
    prompts,
    sample_attributes,
    triples_of,
)
from nanowan.errors import BadInput, check_at_least, cli
from nanowan.files import atomic, writing
from nanowan.video import write_grid, write_mp4
from sample import load

CRF = 10  # x264's quality, at which encoding does not change a clip's grades


def write_clips(args):
    """Write the clips that `args` asks for into the folder --out: mp4 and txt files, and attributes.jsonl. If anything
    fails, the folder is not written.
    """
    words = parse_words(args.words)
    folder, rng, lines = Path(args.out), random.Random(f"clips {args.seed}"), []
    if folder.exists() and any(folder.iterdir()):
        raise BadInput(f"--out {folder}: holds something already; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".tmp-"))  # replaces --out once all clips are written
    try:
        temporary.chmod(0o755)
        for i in range(args.n):
            word = (
                words[i // 2 % len(words)] if words and i % 2 else None
            )  # every second clip shows what a new word means
            caption = None
            while caption is None or held_out(caption, word):
                a = sample_attributes(rng, triples_of(word) if word else None)
                caption = caption_of(a, rng, [word] if word else [])
            name = f"clip_{i:04d}"
            write_mp4(temporary / f"{name}.mp4", draw([a], rng.random())[0], FPS, crf=CRF)
            with writing(temporary / f"{name}.txt"):
                (temporary / f"{name}.txt").write_text(caption + "\n")
            lines.append(json.dumps({"file": f"{name}.mp4", "caption": caption, **a}))
        with writing(temporary / "attributes.jsonl"):
            (temporary / "attributes.jsonl").write_text("\n".join(lines) + "\n")
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{args.n} clips in {folder}")


def suites_of(args):
    """Return {name of a suite: its prompts with their attributes}. A suite is a list of prompts that are graded
    together; the flags in `args` choose the suites.
    """
    words = parse_words(args.words)
    if args.prompts and words:
        raise BadInput("--words with --prompts: give one of them")
    if args.prompts:
        return {"prompts": read_graded_prompts(args.prompts)[: args.n]}
    if words:
        return {"new words": prompts(args.n or 40 * len(words), args.seed, words=words)}
    n = args.n or 200
    return {"seen triples": prompts(n, args.seed), "unseen triples": prompts(n, args.seed, unseen=True)}


def evaluate(args):
    """Sample clips from a checkpoint, grade them, and print the accuracy for each attribute."""
    models = load(args.ckpt, "cpu", torch.float32, args.lora, args.text_encoder)
    if not gradable(models.settings):
        raise BadInput(
            f"--ckpt {args.ckpt}: the grader reads the nano world's clips only, {SIZE}x{SIZE} and {FRAMES} frames"
        )
    overrides = {} if args.guidance is None else {"guidance": (args.guidance,)}
    results, sheet = {}, None
    for name, rows in suites_of(args).items():
        grades, clips = sample_and_grade(models, rows, args.seed, **overrides)
        asked = [word_attribute(r) for r in rows] if args.words else rows
        accuracy = shares(grades, asked)
        print_scores(name, asked, accuracy, grades)
        results[name] = {"n": len(rows), "accuracy": accuracy, "iou": sum(g["iou"] for g in grades) / len(grades)}
        sheet = sheet or (list(clips[:24]), [r["prompt"] for r in rows])
    if args.json:
        first = next(iter(results.values()))
        with atomic(args.json) as tmp:
            tmp.write_text(
                json.dumps({"n": first["n"], "accuracy": first["accuracy"], "suites": results}, indent=1) + "\n"
            )
    if args.grid:
        write_grid(args.grid, *sheet, columns=3)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    c = commands.add_parser("train", help="train the checkpoint in nano/ from scratch (1.5 hours on two cores)")
    add = c.add_argument
    add(
        "--out", default="out/nano", help="folder to write; an unfinished run in it is continued (default: %(default)s)"
    )
    add("--seed", type=int, default=0, help="random seed of weights, clips and noise (default: %(default)s)")
    add("--steps", type=int, default=14000, help="number of training steps of the DiT (default: %(default)s)")
    add("--layers", type=int, default=pretrain.DIT.num_layers, help="number of DiT blocks (default: %(default)s)")
    add("--vae", metavar="CKPT", help="checkpoint whose VAE is used (default: train a new VAE)")
    c.set_defaults(run=lambda args: pretrain.train(args.out, args.seed, args.steps, args.layers, args.vae))
    c = commands.add_parser("clips", help="write captioned clips")
    add = c.add_argument
    add("--out", default="out/clips", help="folder to write, which must be new or empty (default: %(default)s)")
    add("--n", type=int, default=100, help="number of clips (default: %(default)s)")
    add("--seed", type=int, default=0, help="random seed of the clips' contents (default: %(default)s)")
    add(
        "--words",
        help=f"new words, which take turns in every second caption: any of {','.join(NEW_WORDS)}, or WORD=MEANING such "
        "as scarlet=red (default: none)",
    )
    c.set_defaults(run=write_clips)
    c = commands.add_parser("eval", help="grade how well a checkpoint follows its prompts")
    add = c.add_argument
    add("--ckpt", default="nano", help="checkpoint folder (default: nano, the one in the repository)")
    add("--lora", action="append", default=[], help="LoRA to use, FILE[:weight]; may be repeated")
    add(
        "--text_encoder",
        action="append",
        help="text encoder to use, FILE[:strength]: a full encoder, a delta or a LoRA; repeat to stack several "
        "(default: the checkpoint's own)",
    )
    add("--prompts", help="JSONL file of prompts and their attributes (default: built-in held-out prompts)")
    add(
        "--words",
        help="new words, in the form of `clips --words`; prompts with these words are graded instead of the built-in "
        "lists (default: none)",
    )
    add(
        "--n",
        type=int,
        help="number of prompts to grade (default: 200 in each of the two built-in lists; 40 per word of --words; all "
        "of --prompts)",
    )
    add("--seed", type=int, default=0, help="random seed of prompts and noise (default: %(default)s)")
    add("--guidance", type=float, help="scale of classifier-free guidance (default: as the checkpoint recommends)")
    add("--json", help="also write the scores to this file")
    add("--grid", help="also write a contact sheet of the first 24 clips to this .png file")
    c.set_defaults(run=evaluate)
    args = p.parse_args()
    check_at_least(1, **{flag: getattr(args, flag, None) for flag in ("n", "steps", "layers")})
    args.run(args)


if __name__ == "__main__":
    cli(main)
