"""Measure an encoder or a translator for runs/claims.sh, and make the table and the plot of the results."""

import argparse
import json
import math
import random
import sys
from itertools import combinations
from pathlib import Path
from statistics import mean

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from diagnostics.delta import delta, relative_norm  # noqa: E402
from diagnostics.logits import logits  # noqa: E402
from nano import world  # noqa: E402
from nano.evaluate import sample_and_grade, word_attribute  # noqa: E402
from nano.grader import shares  # noqa: E402
from nanowan.errors import cli  # noqa: E402
from nanowan.files import atomic  # noqa: E402
from nanowan.settings import checkpoint_dir  # noqa: E402
from sample import load  # noqa: E402

FAST = {"steps": 4, "guidance": (1.0,)}  # how runs/distill.py's LoRA is sampled with


def share_of_words(models, words, n, seed):
    """Return {word: accuracy} over n prompts of each word."""
    scores = {}
    for word in words:
        rows = world.prompts(n, seed, words=[word])
        asked = [word_attribute(row) for row in rows]
        scores[word] = next(iter(shares(sample_and_grade(models, rows, seed)[0], asked).values()))
    return scores


def share_of_pairs(models, words, n, seed):
    """Return the accuracy on n prompts that contain two new words of different kinds, such as a colour and a shape. A
    clip is right if it shows what both words mean. No training clip has such a caption.
    """
    kind_of = {word: world.NEW_WORDS[word][0] for word in words}
    pairs = [(a, b) for a, b in combinations(words, 2) if kind_of[a] != kind_of[b]]
    rng, rows = random.Random(f"pairs {seed}"), []
    for pair in (pairs * n)[:n]:
        attributes = world.sample_attributes(rng, world.triples_of(*pair))
        wanted = {kind_of[word]: attributes[kind_of[word]] for word in pair}
        rows.append({"prompt": world.caption_of(attributes, rng, pair), **wanted})
    grades, _ = sample_and_grade(models, rows, seed)
    right = [all(grade.get(key, value) == value for key, value in row.items()) for grade, row in zip(grades, rows)]
    return mean(right)


def load_model(args, loras, encoder):
    """Return the Pipeline of --ckpt with these LoRA files and, unless it is None, with the text encoder in the file
    `encoder`. With --fast, add the LoRA of --fast and use the settings FAST.
    """
    pipe = load(args.ckpt, lora=[*loras, *filter(None, [args.fast])], text_encoder=encoder)
    if args.fast:
        pipe.settings = pipe.settings.with_overrides(**FAST)
    return pipe


def score(args):
    """Measure the base, or the encoder or LoRA that was trained in DIR/NAME. Write the results to DIR/NAME.json or,
    with --fast, to DIR/NAME_fast.json. args: the flags of `score`.
    """
    run, words = args.folder / args.name, world.parse_words(args.words)
    neighbours = [w for w in world.NEW_WORDS if w not in words and w != "orange"]  # orange: never drawn
    encoder = run / "text_encoder.safetensors" if args.text_encoder else args.lora or None
    adapters = [str(run / "adapter_model.safetensors")] if args.lora is not None else []
    models = load_model(args, adapters, encoder)
    rows = world.prompts(args.n * len(words), args.seed)
    grades, clips = sample_and_grade(models, rows, args.seed)
    result = {
        "n": args.n,
        "new": share_of_words(models, words, args.n, args.seed),
        "near": share_of_words(models, neighbours, args.n, args.seed),
        "pairs": share_of_pairs(models, words, 3 * args.n, args.seed),
        "old": shares(grades, rows),
    }
    if encoder or adapters:
        errors = (clips - unchanged_clips(args, rows)).square().flatten(1).mean(1)
        result["psnr"] = mean(-10 * math.log10(max(e, 1e-9) / 4) for e in errors.tolist())
        drift = logits(args.ckpt, adapters, encoder, n=3, data=args.folder / "clips")
        result["drift"] = max(row["drift"] for rows in drift.values() for row in rows)
        log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        result["val_loss"] = next(row["val_loss"] for row in reversed(log) if "val_loss" in row)
    if adapters:
        result["moved"] = relative_norm(delta(adapters[0], checkpoint_dir(args.ckpt)))
    with atomic(args.folder / f"{args.name}{'_fast' * bool(args.fast)}.json") as tmp:
        tmp.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{args.folder.name} {args.name}: new words {mean(result['new'].values()):.3f}", flush=True)


def unchanged_clips(args, rows):
    """Return clips (N,3,9,64,64) of the prompts in `rows`, sampled without the encoder or LoRA that is measured. If a
    LoRA is measured, they are sampled with the encoder that it was trained with: the file in `args.lora` or, if that is
    empty, the checkpoint's own.
    """
    name = Path(args.lora).parent.name if args.lora else "base"
    file = args.folder / f"clips_of_{name}{'_fast' * bool(args.fast)}_{len(rows)}_{args.seed}.pt"
    if not file.exists():
        clips = sample_and_grade(load_model(args, [], args.lora or None), rows, args.seed)[1]
        with atomic(file) as tmp:
            torch.save(clips.half(), tmp)
    return torch.load(file).float()


def cells(folder):
    """Return {NAME: a list of the results in the files SEED/NAME.json, one for each seed}, with the NAMEs in the order
    in which they were first measured. folder: the folder that contains a folder for each seed.
    """
    folders = sorted(d for d in folder.iterdir() if d.name.isdigit())
    files = sorted((f for d in folders for f in d.glob("*.json")), key=lambda f: f.stat().st_mtime)
    return {f.stem: [json.loads((d / f.name).read_text()) for d in folders if (d / f.name).exists()] for f in files}


def table(args):
    columns = "run|accuracy on new words (each seed)|worst word|accuracy on two new words|accuracy on neighbours"
    columns += "|accuracy on known words: colour, shape, motion|PSNR, dB"
    columns = [*columns.split("|"), "dW/W", "logit drift", "held-out loss"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")

    def average(results, key, form):
        return form.format(mean(r[key] for r in results)) if key in results[0] else ""

    for name, results in cells(args.folder).items():
        each = [mean(r["new"].values()) for r in results]
        words = {w: mean(r["new"][w] for r in results) for w in results[0]["new"]}
        worst = min(words, key=words.get)
        row = [
            f"`{name}`",
            f"{mean(each):.3f} ({', '.join(f'{share:.2f}' for share in each)})",
            f"{worst} {words[worst]:.2f}",
            average(results, "pairs", "{:.3f}"),
            f"{mean(mean(r['near'].values()) for r in results):.3f}",
            ", ".join(f"{mean(r['old'][kind] for r in results):.3f}" for kind in ("color", "shape", "motion")),
            average(results, "psnr", "{:.1f}"),
            average(results, "moved", "{:.2f}"),
            average(results, "drift", "{:.2f}"),
            average(results, "val_loss", "{:.4f}"),
        ]
        print(f"| {' | '.join(row)} |")


def plot(args):
    """Make two plots against dW/W, the relative change of the weights: the accuracy on new words, and the PSNR between
    clips of known words with and without the translator. Both plots have a dot for each seed of each translator that
    the parts rank, cap and preserve of runs/claims.sh train.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for part in ("rank", "cap", "preserve"):
        rows = [r for name, results in cells(args.folder).items() if name.split("_")[0] == part for r in results]
        moved = [r["moved"] for r in rows]
        left.plot(moved, [mean(r["new"].values()) for r in rows], "o", label=part)
        right.plot(moved, [r["psnr"] for r in rows], "o", label=part)
    left.set(xlabel="dW/W", ylabel="new words")
    right.set(xlabel="dW/W", ylabel="old clips, dB to those before")
    left.legend(frameon=False)
    with atomic(args.file) as tmp:
        figure.savefig(tmp, format="png", dpi=110)


def main():
    p = argparse.ArgumentParser(description=__doc__)
    commands = p.add_subparsers(dest="command", required=True)
    c = commands.add_parser("score", help="measure the result of one training run, DIR/NAME")
    c.add_argument("folder", type=Path, metavar="DIR", help="the folder of a seed")
    c.add_argument("name", metavar="NAME", help="the name of the training run")
    c.add_argument("--ckpt", default="nano", help="checkpoint of the nano world (default: nano, in the repository)")
    c.add_argument("--words", required=True, help="new words that were taught, for example crimson,rouge=red")
    c.add_argument("--text_encoder", action="store_true", help="NAME is an encoder")
    trained_with = "NAME is a LoRA, trained on the output of this encoder (without a file: of the checkpoint's own)"
    c.add_argument("--lora", metavar="ENCODER", nargs="?", const="", help=trained_with)
    fast = "step-distilled LoRA (runs/distill.py) to add, with which clips are sampled in 4 steps without guidance"
    c.add_argument("--fast", metavar="FILE", help=fast)
    c.add_argument("--n", type=int, default=34, help="prompts per word (default: %(default)s)")
    c.add_argument("--seed", type=int, default=0, help="random seed of prompts and noise (default: %(default)s)")
    c.set_defaults(run=score)
    c = commands.add_parser("table", help="print the table of all measured runs")
    c.add_argument("folder", type=Path, metavar="DIR", help="the folder that contains a folder for each seed")
    c.set_defaults(run=table)
    c = commands.add_parser("plot", help="plot prompt adherence against budget")
    c.add_argument("folder", type=Path, metavar="DIR", help="the folder that contains a folder for each seed")
    c.add_argument("file", type=Path, metavar="FILE.png", help="the picture to write")
    c.set_defaults(run=plot)
    args = p.parse_args()
    args.run(args)


if __name__ == "__main__":
    cli(main)
