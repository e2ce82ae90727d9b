"""What runs/claims.sh measures of an encoder or a translator, and the table of it."""

import argparse
import json
import math
import sys
from pathlib import Path
from statistics import mean

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from checkpoint import atomic, cli  # noqa: E402
from diagnostics.delta import delta, relative_norm  # noqa: E402
from diagnostics.logits import logits  # noqa: E402
from nanoworld.grader import shares  # noqa: E402
from nanoworld.listening import sample_and_grade, word_attribute  # noqa: E402
from nanoworld.world import prompts  # noqa: E402
from sample import load  # noqa: E402

WORDS = ("crimson", "azure", "wedge", "plus", "sinks", "halts")
NEAR = ("box", "orb", "ascends", "retreats", "advances")  # of the same kinds, and in no caption


def share_of_words(models, words, n, seed):
    """{word: share right}."""
    scores = {}
    for word in words:
        rows = prompts(n, seed, words=[word])
        asked = [word_attribute(row) for row in rows]
        scores[word] = next(iter(shares(sample_and_grade(models, rows, seed)[0], asked).values()))
    return scores


def score(args):
    """Write DIR/NAME.json."""
    run = args.folder / args.name
    encoder = run / "text_encoder.safetensors" if args.text_encoder else args.lora
    adapters = [str(run / "adapter_model.safetensors")] if args.lora else []
    models = load("nano", "cpu", torch.float32, adapters, encoder)
    rows = prompts(args.n * len(WORDS), args.seed)
    grades, clips = sample_and_grade(models, rows, args.seed)
    found = {
        "n": args.n,
        "new": share_of_words(models, WORDS, args.n, args.seed),
        "near": share_of_words(models, NEAR, args.n, args.seed),
        "old": shares(grades, rows),
    }
    if encoder or adapters:
        before = (
            args.folder / f"clips_of_{'te_short' if adapters else 'base'}_{args.n}_{args.seed}.pt"
        )  # of old words, without the change
        if not before.exists():
            unchanged = load("nano", text_encoder=args.lora)
            with atomic(before) as tmp:
                torch.save(sample_and_grade(unchanged, rows, args.seed)[1].half(), tmp)
        errors = (clips - torch.load(before).float()).square().flatten(1).mean(1)
        found["psnr"] = mean(-10 * math.log10(max(e, 1e-9) / 4) for e in errors.tolist())
        drift = logits("nano", adapters, encoder, n=3, data=args.folder / "clips")
        found["drift"] = max(row["drift"] for rows in drift.values() for row in rows)
        log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        found["val_loss"] = next(row["val_loss"] for row in reversed(log) if "val_loss" in row)
    if adapters:
        found["moved"] = relative_norm(delta(adapters[0], ROOT / "nano"))
    with atomic(args.folder / f"{args.name}.json") as tmp:
        tmp.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{args.folder.name} {args.name}: new words {mean(found['new'].values()):.3f}", flush=True)


def cells(folders):
    """{name of a cell: what is in its files}, in the order in which they were made."""
    files = sorted((f for d in folders for f in d.glob("*.json")), key=lambda f: f.stat().st_mtime)
    return {f.stem: [json.loads((d / f.name).read_text()) for d in folders if (d / f.name).exists()] for f in files}


def table(args):
    folders = sorted(d for d in args.folder.iterdir() if d.is_dir())
    columns = "row|new words (each seed)|worst word|near words|old words: colour, shape, motion|PSNR, dB"
    columns = [*columns.split("|"), "dW/W", "logit drift", "held-out loss"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")

    def average(found, key, form):
        return form.format(mean(f[key] for f in found)) if key in found[0] else ""

    for name, found in cells(folders).items():
        each = [mean(f["new"].values()) for f in found]
        words = {w: mean(f["new"][w] for f in found) for w in WORDS}
        worst = min(words, key=words.get)
        row = [
            f"`{name}`",
            f"{mean(each):.3f} ({', '.join(f'{share:.2f}' for share in each)})",
            f"{worst} {words[worst]:.2f}",
            f"{mean(mean(f['near'].values()) for f in found):.3f}",
            ", ".join(f"{mean(f['old'][kind] for f in found):.3f}" for kind in ("color", "shape", "motion")),
            average(found, "psnr", "{:.1f}"),
            average(found, "moved", "{:.2f}"),
            average(found, "drift", "{:.2f}"),
            average(found, "val_loss", "{:.4f}"),
        ]
        print(f"| {' | '.join(row)} |")


def main():
    p = argparse.ArgumentParser(description=__doc__)
    commands = p.add_subparsers(dest="command", required=True)
    c = commands.add_parser("score", help="measure one training's result, DIR/NAME")
    c.add_argument("folder", type=Path, metavar="DIR", help="of a seed")
    c.add_argument("name", metavar="NAME", help="of the cell")
    c.add_argument("--text_encoder", action="store_true", help="NAME is an encoder")
    c.add_argument("--lora", metavar="FILE", help="NAME is a translator, behind this encoder")
    c.add_argument("--n", type=int, default=34, help="prompts of each word (default: %(default)s)")
    c.add_argument("--seed", type=int, default=0, help="of prompts and noise (default: %(default)s)")
    c.set_defaults(run=score)
    c = commands.add_parser("table", help="of all cells")
    c.add_argument("folder", type=Path, metavar="DIR", help="of all seeds")
    c.set_defaults(run=table)
    args = p.parse_args()
    args.run(args)


if __name__ == "__main__":
    cli(main)
