"""bench.py --gpu_run: the scripts on a random TI2V-5B of released size, and what memory they planned and used.

Only shapes count here: the weights are noise, and so is what comes out.
"""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.common import ROOT, keep_results
from media import write_mp4
from t5 import XXL, TextEncoder
from vae import FULL_WIDTHS, VAE
from wan import build

sys.path.insert(0, str(ROOT / "tests"))

import tiny  # noqa: E402  writes the official layout

CLIP = "--size 1280x704 --frames 121 --steps 4"
SHORT = "--size 832x480 --frames 17 --steps 4"
DATA = "--data {data} --resolution 832x480 --frames 49 --steps 3 --batch 1"
RUNS = {
    "sample": f"sample.py {CLIP}",
    "sample, fp8": f"sample.py {CLIP} --base_dtype fp8",
    "sample, streamed": f"sample.py {SHORT} --stream_blocks 30",
    "sample, compiled": f"sample.py {SHORT} --compile",
    "sample, CUDA graphs": f"sample.py {SHORT} --cuda_graphs",
    "train_lora": f"train_lora.py {DATA} --checkpointing",
    "train_lora, fp8 and streamed": f"train_lora.py {DATA} --base_dtype fp8 --stream_blocks 30",
    "train_te, rows": f"train_te.py {DATA} --checkpointing --train_blocks 0 --keywords wedge --save delta",
}


def random_weights(build_model, device):
    """A model in bf16, whose activations keep their size. Nothing of it stays on the device."""
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


def write_checkpoint(folder, device="cuda"):
    """A random TI2V-5B of released size in the official layout, with nano's tokenizer: 24 GB."""
    tiny.write_dit(folder, random_weights(lambda: build("ti2v-5B"), device), shards=3)
    for file, make in (
        ("models_t5_umt5-xxl-enc-bf16.pth", lambda: TextEncoder(*XXL)),
        ("Wan2.2_VAE.pth", lambda: VAE("2.2", *FULL_WIDTHS["2.2"])),
    ):
        torch.save(random_weights(make, device).state_dict(), folder / file)
    shutil.copytree(ROOT / "nano" / "google", folder / "google")


def write_clips(folder, size=(832, 480), frames=49, count=2):
    """Clips of noise with captions that hold the keyword of RUNS."""
    folder.mkdir(parents=True)
    for i in range(count):
        write_mp4(folder / f"{i}.mp4", torch.rand(3, frames, *size[::-1]) * 2 - 1, 24)
        (folder / f"{i}.txt").write_text(f"a wedge number {i}")


def run_script(command, seconds):
    """{"seconds", "used_gb", "planned_gb"} of a script, or a sentence saying why there is none."""
    began = time.monotonic()
    try:
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"failed: not done after {seconds:.0f} s"
    said = re.search(r"peak memory ([\d.]+) GB, planned ([\d.]+) GB", done.stdout)
    if done.returncode or not said:
        return f"failed: exit status {done.returncode}: {done.stderr[-300:]}"
    used, planned = map(float, said.groups())
    print(f"{command[0]}: {used:.1f} GB used, {planned:.1f} GB planned", flush=True)
    return {"seconds": round(time.monotonic() - began, 1), "used_gb": used, "planned_gb": planned}


def run_scripts(ckpt, work, about, path, seconds=450, runs=None):
    """Each of `runs` (default: RUNS) on a checkpoint, with results in the folder `work`, into the JSON file `path`,
    beside `about`; what runs after `seconds` is ended.
    """
    runs = runs or RUNS

    def run(name, left):
        samples, out = runs[name].startswith("sample"), Path(work, name.replace(", ", "_").replace(" ", "_"))
        command = [*runs[name].format(data=Path(work, "clips")).split(), "--ckpt", ckpt]
        command += ["--prompt", "a wedge", "--out", f"{out}.mp4"] if samples else ["--out", out]
        return run_script([str(c) for c in command], left)

    return keep_results(runs, run, about, path, seconds)
