"""Test whether S2V learns to follow sound, on the nano world with sound (docs/experiments.md).

python runs/sound.py                     three seeds       python runs/sound.py --seeds 0 --steps 800

A tiny S2V checkpoint is made of nano's components. All weights of its DiT are trained on clips of shapes that grow with
the loudness of their sound, with the batches that train_lora.py makes. Before and after training, clips are sampled for
sounds that were never trained on, and in each clip the size of the shape is compared with the loudness of the sound,
frame by frame. The folder out/sound/SEED then holds a checkpoint for sample.py; the results are in
out/sound/scores.json and out/sound/sound.png.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_lora  # noqa: E402
from data import Dataset, collate  # noqa: E402
from nano import sound as world  # noqa: E402
from nano.pretrain import run_stage  # noqa: E402
from nano.world import caption_of  # noqa: E402
from nanowan.errors import cli  # noqa: E402
from nanowan.formats.header import load  # noqa: E402
from nanowan.pipeline import Pipeline  # noqa: E402
from nanowan.training.flags import data_config, resolve  # noqa: E402
from nanowan.variants.s2v.conditioning import DROPPED_FRAMES  # noqa: E402
from nanowan.video import to_uint8  # noqa: E402
from sample import generate  # noqa: E402

OUT = ROOT / "out" / "sound"
HELD_OUT = range(9000, 9008)  # seeds of the first pictures; the sounds to sample for have the next eight seeds


def train(ckpt, clips, steps, seed):
    """Train all weights of a checkpoint's DiT on the batches that train_lora.py makes of `clips`, and write the DiT
    back to the checkpoint.
    """
    flags = f"--ckpt {ckpt} --data {clips} --batch 16 --held_out 0 --continuation 0 --device cpu --seed {seed}"
    args, models = train_lora.arguments(flags.split()), Pipeline(ckpt)
    resolve(args, models.settings, "train_lora")
    dataset = Dataset(data_config(args, models.settings, None), models)
    dataset.cache_latents()
    texts = {caption: load(file)[0]["embedding"] for caption, file in dataset.cache_texts().items()}
    models.drop()
    model = models.acquire("dit").requires_grad_(True).train()

    def loss_at(step):
        ((batch, _),) = dataset.step(step, 0.0, 1.0)
        return batch.loss(model, *collate([texts[caption] for caption in batch.captions]))

    run_stage(ckpt, "dit", steps, model.parameters(), 1e-3, loss_at, ema=0.99)
    world.write_dit(ckpt, model)


def sample(ckpt):
    """Return [(clip (3,29,64,64), loudness (32,))] for sounds that were never trained on. A clip lacks the first 3 of
    the 32 frames, since S2V drops them. Each clip begins with a picture that was drawn for another sound. In a picture
    drawn for the clip's own sound, the size of the shape would tell how loud the sound begins.
    """
    from PIL import Image

    models, results = Pipeline(ckpt), []
    for seed in HELD_OUT:
        (a, _, clip), sound = world.example(seed), world.voice(seed + len(HELD_OUT))
        world.write_wav(OUT / f"{seed}.wav", sound)
        picture, caption = Image.fromarray(to_uint8(clip[:, :1])[0]), caption_of(a, random.Random(seed))
        video, _ = generate(models, caption, picture, seed=seed, progress=False, audio=str(OUT / f"{seed}.wav"))
        results.append((video, world.loudness(sound)))
    return results


@torch.no_grad()
def reconstruct(ckpt):
    """Return [(clip, loudness)] of clips that are drawn for held-out sounds, then encoded and decoded by the VAE. No
    sampled clip can follow its sound more closely.
    """
    vae, results = Pipeline(ckpt).acquire("vae"), []
    for seed in HELD_OUT:
        _, sound, clip = world.example(seed)
        again = vae.decode(vae.encode(torch.cat([clip[:, :1], clip], 1)[None]))[0, :, 1:]
        results.append((again[:, DROPPED_FRAMES:], world.loudness(sound)))
    return results


def score(results):
    """Return {"own", "worst", "other", "shift"} for `results` [(clip, loudness)]. own: the mean correlation of a clip's
    pulse (the size of its shape) with the loudness of its own sound. worst: the lowest correlation of a clip with its
    own sound. other: the mean correlation with the sounds of other clips. shift: by how many frames to move the sounds
    earlier (negative: later) so that the mean correlation of clips with their own sounds is highest.
    """
    pulses, levels = [world.pulse(clip) for clip, _ in results], [level for _, level in results]

    def at(i, j, shift=0):
        """Return the correlation of clip i with sound j, which is first moved earlier by `shift` frames. As in the
        official code, the first 3 frames of a clip are dropped, so frame n was made with the sound of frame n + 3.
        """
        level = levels[j][DROPPED_FRAMES + shift :]
        n = min(len(level), len(pulses[i]))
        return world.correlation(pulses[i][:n], level[:n])

    clips = range(len(results))
    own, other = [at(i, i) for i in clips], [at(i, j) for i in clips for j in clips if i != j]
    shift = max(range(-DROPPED_FRAMES, DROPPED_FRAMES + 1), key=lambda shift: sum(at(i, i, shift) for i in clips))
    return {"own": sum(own) / len(own), "worst": min(own), "other": sum(other) / len(other), "shift": shift}


def plot(before, after, file):
    """Plot four held-out sounds: frames of the clip sampled after training, and below them the loudness and the size of
    the shape, before and after training.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(4, 2, figsize=(10, 5), layout="constrained", height_ratios=(1, 2, 1, 2))
    for i in range(4):
        (clip, level), row, column = after[i], i // 2 * 2, i % 2
        level = level[DROPPED_FRAMES:]
        axes[row, column].imshow(torch.from_numpy(to_uint8(clip[:, 2::4])).permute(1, 0, 2, 3).flatten(1, 2))
        axes[row, column].axis("off")
        axis = axes[row + 1, column]
        axis.fill_between(range(len(level)), level, color="#dddddd", label="loudness")
        twin = axis.twinx()
        twin.plot(
            world.pulse(before[i][0]), color="#999999", linestyle=":", label="measured radius before training, px"
        )
        twin.plot(world.pulse(clip), color="#c0392b", label="after training")
        twin.set(ylim=(0, 20), xlim=(0, len(level) - 1))
        axis.set(ylim=(0, 1.1), yticks=[])
    handles = [h for a in (axis, twin) for h in a.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, frameon=False, loc="outside upper center", ncols=3)
    figure.savefig(file, dpi=80)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", default="0,1,2", help="random seeds, a run for each (default: %(default)s)")
    p.add_argument("--steps", type=int, default=400, help="training steps (default: %(default)s)")
    p.add_argument("--clips", type=int, default=160, help="number of clips to train on (default: %(default)s)")
    args = p.parse_args()
    clips, scores = OUT / "clips", {}
    world.write_clips(clips, range(args.clips))
    for seed in map(int, args.seeds.split(",")):
        ckpt = OUT / str(seed)
        world.write_checkpoint(ckpt, seed)
        before = sample(ckpt)
        train(ckpt, clips, args.steps, seed)
        after = sample(ckpt)
        scores[seed] = {"before": score(before), "after": score(after), "VAE alone": score(reconstruct(ckpt))}
        if len(scores) == 1:
            plot(before, after, OUT / "sound.png")
        (OUT / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
        print("| seed | | own sound | its worst clip | another's sound | best shift |\n|---|---|---|---|---|---|")
        for s, rows in scores.items():
            for when, row in rows.items():
                print(f"| {s} | {when} |", *(f"{row[k]:.2f} |" for k in ("own", "worst", "other")), row["shift"], "|")


if __name__ == "__main__":
    cli(main)
