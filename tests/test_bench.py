"""What benchmarks do on a GPU: keep what there is, whatever a job does; their runs of the scripts, at a small size."""

import json
import subprocess
import sys

import pytest

from benchmarks import full_size, gpu, kernels, tiny, tiny_animate, tiny_s2v
from t5 import Tokenizer

SPIECE = full_size.ROOT / "nano" / "checkpoint" / "google" / "umt5-xxl" / "spiece.model"


@pytest.mark.parametrize("how, said", [("crash", "failed: exit status -11"), ("hang", "failed: not done after")])
def test_a_job_that_fails_costs_no_other_figure(how, said, tmp_path, monkeypatch):
    real = subprocess.run

    def run(command, timeout):
        """A process that does what a job's can, instead of it: only a GPU runs those."""
        *_, name, _, file = map(str, command)
        do = {"crash": "kill -SEGV $$", "hang": "sleep 60", "work": f"echo '{{\"ms\": 1}}' > {file}"}[name]
        return real(["bash", "-c", do], timeout=min(timeout, 2))

    monkeypatch.setattr(gpu.subprocess, "run", run)
    results = gpu.on_gpu({"gpu": "none"}, tmp_path / "gpu.json", jobs=(how, "work"))
    assert results == json.loads((tmp_path / "gpu.json").read_text())
    assert results.pop(how).startswith(said) and results == {"gpu": "none", "work": {"ms": 1}}


def test_what_is_timed_on_a_gpu_runs(monkeypatch):
    """At a small size on the CPU: ours and the peers, forward and LoRA steps, guided steps."""
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "full_config", lambda variant: tiny.dit("ti2v").config)
    monkeypatch.setattr(gpu, "measure_on_gpu", run_once)
    names = {"ours", "ref", "diffusers", "diffusers, cuDNN"}
    assert gpu.gpu_guided_step(grid=(2, 4, 6)).keys() == names
    measured = gpu.gpu_dit("ti2v-5B", (2, 4, 6), "small", layers=2)
    for work in ("forward", "lora_step", "lora_step_checkpointing"):
        assert measured[work].keys() == names, work


@pytest.mark.parametrize(
    "name, small",
    [
        ("modulate", dict(grids=[((1, 2, 3), 2)])),
        ("qk_norm_rope", dict(grids=[((1, 2, 3), 2)])),
        ("causal_conv3d", dict(sizes=[(8, 2, 4, 6)])),
        ("gelu", dict(rows=20, dim=16, ffn_dim=24)),
        ("linear", dict(sizes=[(20, 16, 24)])),
    ],
)
def test_what_is_timed_of_a_kernel_runs(name, small):
    """Those that have a CPU's version, at a small size."""
    for result in getattr(kernels, f"time_{name}")(**small).values():
        assert result["ms"] > 0 and result["ref_ms"] > 0


def run_once(contenders, rounds):
    for run in contenders.values():
        run()
    return {name: {"ms": 1.0} for name in contenders}


def test_a_gpus_machine_needs_few_packages():
    """What reads media, the peers and what draws are not asked for until they are used."""
    code = """
import glob, sys

class Lacking:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("av", "ftfy", "diffusers", "transformers", "peft", "tensorboard", "matplotlib"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Lacking())
import benchmarks.__main__, pytest
files = [f for f in glob.glob("tests/test_*.py") if "mark" + ".gpu" in open(f).read()]
assert len(files) > 1 and pytest.main(["-q", "-p", "no:cacheprovider", "--co", *files]) == 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=full_size.ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_what_begins_too_late_is_named(tmp_path):
    results = gpu.on_gpu({}, tmp_path / "gpu.json", seconds=0, jobs=("ceilings",))
    assert results == {"ceilings": "left out: no time"} == json.loads((tmp_path / "gpu.json").read_text())


def test_runs_of_the_scripts_say_what_they_planned_and_used(tmp_path, monkeypatch):
    """Those of the full size with other numbers: the checkpoints that are made can be read, the lines are flags that
    the scripts have, and what fails is named and does not stop the rest.
    """
    dits = {"ti2v-5B": tiny.dit("ti2v"), "t2v-A14B": tiny.dit("t2v"), "s2v-14B": tiny_s2v.dit()}
    dits |= {"animate-14B": tiny_animate.animate()}
    monkeypatch.setattr(full_size, "build_dit", dits.get)
    vocabulary = Tokenizer(SPIECE.read_bytes()).pieces.get_piece_size()
    monkeypatch.setattr(full_size, "XXL", (vocabulary, tiny.TEXT_DIM, 24, 40, 3, 2))
    monkeypatch.setattr(full_size, "FULL_WIDTHS", {"2.1": (8, 8), "2.2": (8, 8)})
    monkeypatch.setattr(full_size, "SPEECH", (16, *full_size.SPEECH[1:3], tiny_s2v.AUDIO_DIM, 40, 2, 24, 4, 16))
    monkeypatch.setattr(full_size, "VISION", {**tiny_animate.CLIP_SIZES, "layers": 3})
    chosen = {"ti2v-5B: train_te, rows", "t2v-A14B: sample, fp8", "s2v-14B: sample, streamed"}
    chosen |= {"animate-14B: sample, streamed"}
    runs = {name: line for name, line in full_size.RUNS.items() if name in chosen}
    small = {"832x480": "64x64", "--frames 81": "--frames 9", "--frames 49": "--frames 9", "--infer_frames 80": ""}
    for old, new in (small | {" --stream_blocks 40": ""}).items():
        runs = {name: line.replace(old, new) for name, line in runs.items()}
    runs = {name: f"{line} --device cpu" for name, line in runs.items()} | {
        "ti2v-5B: other": "sample.py --no_such_flag"
    }
    full_size.write_inputs(tmp_path, size=(64, 64), face=tiny_animate.SIDE)
    made = full_size.Checkpoints(tmp_path, "cpu")
    results = full_size.run_scripts(made, tmp_path, {}, tmp_path / "run.json", runs=runs)
    assert results == json.loads((tmp_path / "run.json").read_text())
    assert "no_such_flag" in results.pop("ti2v-5B: other")
    for name, result in results.items():
        assert 0 < result["used_gb"] and 0 < result["planned_gb"] < 2, name
    assert {f.name for f in tmp_path.glob("*-*B")} == {"ti2v-5B", "animate-14B"}  # of 14B's the last
