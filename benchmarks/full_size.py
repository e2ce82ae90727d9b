"""`python -m benchmarks --gpu_run`: the scripts at released size on random weights, and their peak memory.

The memory that each script uses is compared with the memory that it planned, that is, predicted. Only the shapes
matter here: the weights are noise, and so are the results.
"""

import contextlib
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import tiny, tiny_animate, tiny_s2v
from benchmarks.common import ROOT, keep_results
from nanowan.formats.dit import full_config, new_dit
from nanowan.formats.t5 import XXL
from nanowan.formats.vae import FULL_WIDTHS
from nanowan.variants.animate.clip import VisionEncoder
from nanowan.variants.registry import VARIANTS
from nanowan.variants.s2v.wav2vec2 import STRIDES, Wav2Vec2, Wav2Vec2Sizes
from nanowan.video import write_mp4
from t5 import TextEncoder
from vae import VAE

CLIP_SIZE = "--size 1280x704 --frames 121 --steps 4"
SHORT = "--size 832x480 --frames 17 --steps 4"
DATA = "--data {inputs}/clips --resolution 832x480 --frames 49 --steps 3 --batch 1"
RUNS = {  # the most informative runs come first
    "ti2v-5B: sample": f"sample.py {CLIP_SIZE}",
    "ti2v-5B: train_lora": f"train_lora.py {DATA} --checkpointing",
    "ti2v-5B: train_te, rows": f"train_te.py {DATA} --checkpointing --train_blocks 0 --keywords wedge --save delta",
    "ti2v-5B: train_te, LoRAs, fp8": f"train_te.py {DATA} --checkpointing --rank 16 --keywords wedge --base_dtype fp8",
    "t2v-A14B: sample, fp8": "sample.py --size 832x480 --frames 81 --steps 2 --base_dtype fp8",
    "t2v-A14B: sample, streamed": "sample.py --size 832x480 --frames 81 --steps 2 --stream_blocks 40",
    "ti2v-5B: sample, fp8": f"sample.py {CLIP_SIZE} --base_dtype fp8",
    "ti2v-5B: sample, streamed": f"sample.py {SHORT} --stream_blocks 30",
    "ti2v-5B: sample, compiled": f"sample.py {SHORT} --compile",
    "ti2v-5B: sample, CUDA graphs": f"sample.py {SHORT} --cuda_graphs",
    "ti2v-5B: train_lora, fp8 and streamed": f"train_lora.py {DATA} --base_dtype fp8 --stream_blocks 30",
    "s2v-14B: sample, streamed": "sample.py --size 832x480 --infer_frames 80 --num_clip 1 --steps 1 --stream_blocks 40 "
    "--image {inputs}/picture.png --audio {inputs}/sound.wav",
    "animate-14B: sample, streamed": "sample.py --steps 1 --stream_blocks 40 --src_root_path {inputs}/driving",
}
CARD_GB = 24  # in runs of 14B models, the card has only this much free memory
# wav2vec2-large-xlsr-53-english and ViT-H/14, as released
SPEECH = (512, (10, 3, 3, 3, 3, 2, 2), STRIDES, 1024, 4096, 16, 24, 16, 128)
VISION = dict(dim=1280, ffn_dim=5120, layers=32, patch=14, tokens=257)


def random_weights(build_model, device):
    """Return the model that build_model() makes, in bf16, on the host, with random weights that make activations
    neither grow nor shrink much. The weights are drawn on `device`, but none of them stays there.
    """
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = build_model().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    for name, p in model.named_parameters():
        if "norm" in name or name.endswith("gamma"):
            p.fill_(1)
        else:
            p.normal_(std=p[0].numel() ** -0.5 if p.dim() > 1 else 0.02)
    model.cpu()
    torch.cuda.empty_cache()
    return model


def build_dit(variant):
    return new_dit(full_config(variant))


def write_checkpoint(folder, variant, device, encoder=None):
    """Write a random checkpoint of released size in the official layout, with nano's tokenizer. The two experts of an
    A14B checkpoint are one folder under two names. encoder: the file of an existing text encoder to link to; None:
    write a new text encoder.
    """
    dit, version = random_weights(lambda: build_dit(variant), device), VARIANTS[variant]["vae"]
    if VARIANTS[variant]["boundary"]:
        tiny.write_dit(folder / "high_noise_model", dit, shards=6)
        (folder / "low_noise_model").symlink_to("high_noise_model")
    elif variant == "s2v-14B":
        tiny_s2v.write_dit(folder, dit)
    elif variant == "animate-14B":
        tiny_animate.write_dit(folder, dit)
    else:
        tiny.write_dit(folder, dit, shards=3)
    del dit
    vae = random_weights(lambda: VAE(version, *FULL_WIDTHS[version]), device)
    torch.save(vae.state_dict(), folder / f"Wan{version}_VAE.pth")
    if encoder:
        (folder / encoder.name).symlink_to(encoder)
    else:
        model = random_weights(lambda: TextEncoder(*XXL), device)
        torch.save(model.state_dict(), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    if variant == "s2v-14B":
        speech = random_weights(lambda: Wav2Vec2(Wav2Vec2Sizes(*SPEECH)), device).float()
        tiny_s2v.write_wav2vec2(folder / "wav2vec2-large-xlsr-53-english", speech)
    if variant == "animate-14B":
        clip = random_weights(lambda: VisionEncoder(**VISION), device)
        torch.save(clip.state_dict(), folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    shutil.copytree(ROOT / "nano" / "checkpoint" / "google", folder / "google")


def write_clips(folder, size=(832, 480)):
    """Write two clips of noise into a folder, with captions that contain the keyword "wedge". size: (width, height)."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(2):
        write_mp4(folder / f"{i}.mp4", torch.rand(3, 49, *size[::-1]) * 2 - 1, 24)
        (folder / f"{i}.txt").write_text(f"a wedge number {i}")


def write_inputs(folder, size=(832, 480), face=512):
    """Write the input files of the commands in RUNS into a folder: clips, a picture, a sound, and a folder like those
    of Animate's preprocessing. size: (width, height) of clips, pictures and videos. face: width and height of the face
    video in px.
    """
    write_clips(folder / "clips", size)
    tiny_s2v.write_picture(folder / "picture.png", *size)
    tiny_s2v.write_wav(folder / "sound.wav", tiny_s2v.sound(4)[None])
    tiny_animate.source_folder(folder / "driving", 77, *size[::-1], face=face)


def run_script(command, seconds):
    """Run a script for at most `seconds`. Returns {"seconds", "used_gb", "planned_gb"}: its duration, its measured
    peak memory and its planned peak memory. If the script fails, returns a sentence that says why. command: the script
    and its flags.
    """
    began = time.monotonic()
    try:
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"failed: not done after {seconds:.0f} s"
    said = re.search(r"peak memory ([\d.]+) GB, planned ([\d.]+) GB", done.stdout)
    if done.returncode or not said:
        return f"failed: exit status {done.returncode}: {done.stderr[-300:]}"
    used, planned = map(float, said.groups())
    script = next(c for c in command if c.endswith(".py"))
    print(f"{script}: {used:.1f} GB used, {planned:.1f} GB planned", flush=True)
    return {"seconds": round(time.monotonic() - began, 1), "used_gb": used, "planned_gb": planned}


@contextlib.contextmanager
def smaller_card(gigabytes):
    """Return a context in which a tensor occupies all but `gigabytes` of the GPU's free memory."""
    free, _ = torch.cuda.mem_get_info()
    taken = torch.empty(max(0, free - int(gigabytes * 1e9)), dtype=torch.uint8, device="cuda")
    yield
    del taken
    torch.cuda.empty_cache()


class Checkpoints:
    """A mapping {variant: folder of a random checkpoint}. Each checkpoint is written when its variant is first looked
    up. Only one 14B checkpoint is kept at a time, to save disk space.
    """

    def __init__(self, folder, device="cuda"):
        self.folder, self.device = folder, device

    def __getitem__(self, variant):
        folder = self.folder / variant
        if not folder.exists():
            for other in self.folder.glob("*14B"):
                shutil.rmtree(other)
            try:
                write_checkpoint(folder, variant, self.device, next(self.folder.glob("*-5B/models_t5*"), None))
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        return folder


def run_scripts(checkpoints, work, about, path, seconds=450, runs=None):
    """Run each command of `runs` {"VARIANT: TASK": command} (default: RUNS) on the checkpoint of its variant. Inputs
    and outputs are in the folder `work`. Results are added to `about`, which is written to the JSON file `path`.
    seconds: time for all commands and for writing checkpoints; a script that runs longer than this allows is ended.
    """
    runs = runs or RUNS

    def run(name, left):
        began, (variant, task) = time.monotonic(), name.split(": ")
        try:
            ckpt = checkpoints[variant]
        except Exception as e:  # a full disk can raise OSError, RuntimeError or SafetensorError
            return f"failed: no checkpoint: {e}"
        out = Path(work, re.sub(r"\W+", "_", name))
        command = [*runs[name].format(inputs=work).split(), "--ckpt", ckpt]
        command += ["--prompt", "a wedge", "--out", f"{out}.mp4"] if task.startswith("sample") else ["--out", out]
        with smaller_card(CARD_GB) if "14B" in variant and torch.cuda.is_available() else contextlib.nullcontext():
            return run_script([str(c) for c in command], max(1, left - (time.monotonic() - began)))

    return keep_results(runs, run, about, path, seconds)


if __name__ == "__main__":  # write a TI2V-5B checkpoint and clips to a folder, for gpu_session.py
    folder = Path(sys.argv[1])
    Checkpoints(folder)["ti2v-5B"]
    write_clips(folder / "clips")
