"""`make demo`: the main job on nano, from captioned clips to an updated encoder and a small LoRA translator.

The demo shows what the encoder adds, and then what the translator adds. The encoder learns words for what the base can
draw. With the translator, the model can also draw orange figures, which the base has never drawn. The captions of the
training clips use words that the base has never read. New words that no caption uses are graded too.

Everything runs through the same scripts as at full size. The results, mp4s, a contact sheet and a plot of the losses,
are in out/demo.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from diagnostics.delta import delta, relative_norm  # noqa: E402
from nano.evaluate import SUITE_NAMES, print_scores, sample_and_grade, word_attribute  # noqa: E402
from nano.grader import shares  # noqa: E402
from nano.world import FPS, prompts  # noqa: E402
from nanowan.errors import cli  # noqa: E402
from nanowan.files import atomic  # noqa: E402
from nanowan.settings import NANO  # noqa: E402
from nanowan.video import write_grid, write_mp4  # noqa: E402
from sample import load  # noqa: E402

WORDS = ("crimson", "wedge", "orange")  # orange is a colour that the base has never drawn
NEAR = ("box", "orb", "sinks", "ascends")  # neighbours: words of the same kinds, which no caption contains
OUT = ROOT / "out" / "demo"


def run(*command):
    print("\n$ python " + " ".join(str(c).replace(str(ROOT) + "/", "") for c in command), flush=True)
    subprocess.run([sys.executable, *map(str, command)], check=True)


def listen(name, lora=(), encoder=None):
    """Grade nano with these LoRAs and this encoder. Returns (scores, clips): {suite: {attribute: accuracy}}, and
    [(prompt, clip)] with the first two clips of each suite. These clips are written to OUT/name as mp4 files too.
    """
    models, scores, shown = load("nano", "cpu", torch.float32, lora, encoder), {}, []
    suites = {f"the new word {w!r}": prompts(40, 1, words=[w]) for w in WORDS} | {"old words": prompts(100, 1)}
    suites |= {f"not trained: {w!r}": prompts(40, 1, words=[w]) for w in NEAR}
    for suite, rows in suites.items():
        asked = [word_attribute(r) for r in rows] if "word" in rows[0] else rows
        grades, clips = sample_and_grade(models, rows)
        scores[suite] = shares(grades, asked)
        print_scores(f"{name}: {SUITE_NAMES.get(suite, suite)}", asked, scores[suite], grades)
        stem = suite.split()[-1].strip("'")
        for i in range(2):
            comment = json.dumps({"prompt": rows[i]["prompt"]})
            write_mp4(OUT / name / f"{stem}_{i}.mp4", clips[i], FPS, comment)
            shown.append((rows[i]["prompt"], clips[i]))
    return scores, shown


def plot(logs, file):
    """Plot the losses of each run to a file. logs: {name of the script: path of its log.jsonl}."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(1, len(logs), figsize=(9, 3.2), layout="constrained")
    window = 15
    for axes, (name, log) in zip(all_axes, logs.items()):
        loss = [row["loss"] for row in map(json.loads, log.read_text().splitlines()) if "loss" in row]
        mean = [sum(loss[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(loss))]
        axes.plot(loss, color="#bbbbbb", linewidth=0.8, label="each step")
        axes.plot(mean, color="#c0392b", label=f"mean of {window}")
        axes.set(xlabel="step", ylabel="flow-matching loss", title=f"{name}.py on nano")
        axes.legend(frameon=False)
    figure.savefig(file, dpi=120)


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    clips, words = OUT / "clips", ",".join(WORDS)
    encoder, adapter = OUT / "te" / "text_encoder.safetensors", OUT / "lora" / "adapter_model.safetensors"
    run("-m", "nano", "clips", "--out", clips, "--n", 192, "--seed", 7, "--words", words)
    data, stages = ("--ckpt", "nano", "--data", clips), {"base": listen("base")}
    flags = [
        "--keywords",
        words.replace("orange", "orange=red"),  # --keyword_init search finds no word for what was never drawn
        "--train_blocks",
        0,
        "--trim_prob",
        0,
        "--steps",
        150,
    ]  # embeddings need only full captions
    run(ROOT / "train_te.py", *data, "--out", OUT / "te", *flags)
    stages["+ encoder"] = listen("encoder", encoder=encoder)
    flags = ["--text_encoder", encoder, "--trigger", words, "--preserve", 2, "--steps", 300]
    run(ROOT / "train_lora.py", *data, "--out", OUT / "lora", *flags)
    stages["+ encoder + translator"] = listen("translator", [str(adapter)], encoder)

    shown = [0, 2, 4, 5, 6, 8]  # clips of each word (two of orange), of known words, and of a neighbour
    rows = [(stage, *clips[i]) for i in shown for stage, (_, clips) in stages.items()]
    labels = [f"{stage}: {prompt}" for stage, prompt, _ in rows]
    write_grid(OUT / "before_after.png", [clip for *_, clip in rows], labels, columns=len(stages), scale=2)
    plot(
        {name: OUT / folder / "log.jsonl" for name, folder in (("train_te", "te"), ("train_lora", "lora"))},
        OUT / "loss.png",
    )
    scores = {stage: found for stage, (found, _) in stages.items()}
    print("\naccuracy: " + " / ".join(scores))
    for suite, kinds in scores["base"].items():
        numbers = [f"{kind} " + " / ".join(f"{found[suite][kind]:.2f}" for found in scores.values()) for kind in kinds]
        print(f"  {SUITE_NAMES.get(suite, suite):24} {', '.join(numbers)}")
    moved = {"encoder": relative_norm(delta(encoder, NANO)), "translator": relative_norm(delta(adapter, NANO))}
    print(f"the translator moves its matrices by {moved['translator']:.2f} of their norm")
    print(f"look at {OUT.relative_to(ROOT)}: before_after.png, loss.png, base/, encoder/, translator/, clips/")
    with atomic(OUT / "scores.json") as tmp:
        tmp.write_text(json.dumps({"scores": scores, "moved": moved}, indent=1))


if __name__ == "__main__":
    cli(main)
