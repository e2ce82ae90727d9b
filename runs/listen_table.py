"""Print the table of runs/listen.sh: means over the seeds, from OUT/SEED/*.json."""

import json
import sys
from pathlib import Path
from statistics import mean

NAMES = {
    "base": "base",
    "te": "encoder, 1500 steps, anchor 0.01",
    "te_lora": "that encoder + k/v translator",
    "te_short": "encoder, 200 steps",
    "te_short_lora": "that encoder + k/v translator",
    "te_anchor_0": "encoder, no anchor",
    "te_anchor_1": "encoder, anchor 1",
    "te_mix": "encoder, captions mixed 15/35/50",
    "te_rows": "embeddings of the new words alone",
    "lora": "k/v LoRA, no encoder",
    "lora_cross": "LoRA on q/k/v/o of cross-attention, no encoder",
    "lora_self": "LoRA on q/k/v/o of self-attention, no encoder",
    "orange_base": "orange: base",
    "orange_te": "orange: encoder, 400 steps",
    "orange_te_lora": "orange: that encoder + k/v translator",
}


def read(folders, name):
    """Return a list with the parsed JSON file `name` of each folder that has such a file."""
    return [json.loads((d / name).read_text()) for d in folders if (d / name).exists()]


def main():
    seeds = sorted(d for d in Path(sys.argv[1]).iterdir() if d.is_dir())
    columns = (
        "what was trained",
        "accuracy on new words (each seed)",
        "worst word",
        "accuracy on known words: colour, shape, motion",
        "logit drift",
    )
    print(f"| {' | '.join([*columns, 'dW/W'])} |\n{'|---' * 6}|")
    for name, label in NAMES.items():
        scores = read(seeds, f"{name}.json")
        if not scores:
            continue
        sides = [next(iter(s.values())) for s in scores]
        pooled = [s["new words"]["pooled"]["right"] for s in sides]
        words = {
            w: mean(next(iter(s[w].values()))["right"] for s in sides) for w in sides[0] if not w.endswith("words")
        }
        worst = min(words, key=words.get)
        old = ", ".join(f"{mean(s['old words'][k]['right'] for s in sides):.3f}" for k in ("color", "shape", "motion"))
        drift = [max(r["drift"] for rows in s.values() for r in rows) for s in read(seeds, f"{name}.logits.json")]
        moved = [s["relative_norm"] for s in read(seeds, f"{name}.delta.json")]
        cells = [
            label,
            f"{mean(pooled):.3f} ({', '.join(f'{p:.2f}' for p in pooled)})",
            f"{worst} {words[worst]:.2f}",
            old,
            f"{mean(drift):.2f}" if drift else "",
            f"{100 * mean(moved):.0f} %" if moved else "",
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
