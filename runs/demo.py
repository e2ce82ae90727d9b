"""`make demo`: the main job on nano, from captioned clips to a LoRA translator, and how much better the model listens.

The clips' captions use words that the base has never read. Everything runs through the same scripts as at full size.
Leaves mp4s, a before/after contact sheet and a plot of the loss in out/demo.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from checkpoint import cli  # noqa: E402
from media import write_grid, write_mp4  # noqa: E402
from nanoworld.grader import shares  # noqa: E402
from nanoworld.listening import print_scores, sample_and_grade, word_attribute  # noqa: E402
from nanoworld.world import FPS, prompts  # noqa: E402
from sample import load  # noqa: E402

WORDS = ("crimson", "wedge", "halts")
OUT = ROOT / "out" / "demo"


def run(*command):
    print("\n$ python " + " ".join(str(c).replace(str(ROOT) + "/", "") for c in command), flush=True)
    subprocess.run([sys.executable, *map(str, command)], check=True)


def listen(name, lora):
    """Grade the checkpoint with these LoRAs: {suite: {attribute: share right}}, and [(prompt, clip)], the first two of
    each suite, which are written too.
    """
    models, scores, shown = load("nano", "cpu", torch.float32, lora), {}, []
    suites = {f"the new word {w!r}": prompts(40, 1, words=[w]) for w in WORDS} | {"old words": prompts(100, 1)}
    for suite, rows in suites.items():
        asked = [word_attribute(r) for r in rows] if "word" in rows[0] else rows
        grades, clips = sample_and_grade(models, rows)
        scores[suite] = shares(grades, asked)
        print_scores(f"{name}: {suite}", asked, scores[suite], grades)
        stem = suite.split()[-1].strip("'")
        for i in range(2):
            comment = json.dumps({"prompt": rows[i]["prompt"]})
            write_mp4(OUT / name / f"{stem}_{i}.mp4", clips[i], FPS, comment)
            shown.append((rows[i]["prompt"], clips[i]))
    return scores, shown


def plot(log, file):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    loss = [row["loss"] for row in map(json.loads, log.read_text().splitlines()) if "loss" in row]
    window = 15
    mean = [sum(loss[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(loss))]
    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    axes.plot(loss, color="#bbbbbb", linewidth=0.8, label="each step")
    axes.plot(mean, color="#c0392b", label=f"mean of {window}")
    axes.set(xlabel="step", ylabel="flow-matching loss", title="train_lora.py on nano")
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    run(ROOT / "nano.py", "clips", "--out", OUT / "clips", "--n", 144, "--seed", 7, "--words", ",".join(WORDS))
    before, first = listen("before", [])
    flags = ["--steps", 1000, "--batch", 16, "--rank", 16, "--lr", 8e-3, "--save_every", 500]
    run(ROOT / "train_lora.py", "--ckpt", "nano", "--data", OUT / "clips", "--out", OUT / "lora", *flags)
    after, second = listen("after", [str(OUT / "lora" / "adapter_model.safetensors")])
    pairs = [pair for couple in zip(first, second) for pair in couple]
    labels = [f"{when}: {p}" for (p, _), when in zip(pairs, ("before", "after") * len(first))]
    write_grid(OUT / "before_after.png", [clip for _, clip in pairs], labels, columns=4, scale=2)
    plot(OUT / "lora" / "log.jsonl", OUT / "loss.png")
    print("\nlistening, before -> after")
    for suite in before:
        changes = [f"{kind} {old:.2f} -> {after[suite][kind]:.2f}" for kind, old in before[suite].items()]
        print(f"  {suite:24} {', '.join(changes)}")
    print(f"look at {OUT.relative_to(ROOT)}: before_after.png, loss.png, before/, after/, clips/")
    with open(OUT / "scores.json", "w") as f:
        json.dump({"before": before, "after": after}, f, indent=1)


if __name__ == "__main__":
    cli(main)
