"""What benchmarks do on a GPU: keep what there is, whatever a job does; their runs of the scripts, at a small size."""

import importlib.util
import json
import re
import subprocess
import sys
import tarfile

import pytest
import torch
from torch.nn.attention import SDPBackend

from benchmarks import full_size, gpu, gpu_probe, gpu_session, kernels, tiny, tiny_animate, tiny_s2v
from benchmarks.cpu import WORKS, on_cpu
from benchmarks.gpu_session import Job, Session
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


def test_a_session_keeps_what_each_job_gave_and_goes_on(tmp_path):
    """One job runs beside others until it is waited for; one that hangs or crashes costs no other; what is done is not
    done again.
    """
    once, built, out = (tmp_path / name for name in ("once", "built", "out"))
    jobs = {
        "count": Job(f"echo x >> {once}; echo '12.5 ms'", 9, 1),
        "build": Job(f"sleep 1; touch {built}", 9, 1, beside=True),
        "next": Job(f"test ! -e {built} && grep -q '12.5 ms' {out}/table.json", 9, 1),
        "hang": Job("sleep 60 & sleep 60", 1, 1),
        "crash": Job("kill -SEGV $$", 9, 1, after="build"),
        "uses": Job(f"test -e {built}", 9, 1),
    }
    table = Session(60, out, tmp_path / "state").run(jobs)
    assert table == json.loads((out / "table.json").read_text())
    said = {name: result["status"] for name, result in table.items() if name in jobs}
    assert said.pop("hang").startswith("ended after") and said.pop("crash") != 0
    assert said == {"count": 0, "next": 0, "build": 0, "uses": 0} and table["count"]["said"] == ["12.5 ms"]
    with tarfile.open(out / "logs.tgz") as tar:
        assert tar.extractfile("count.log").read() == b"12.5 ms\n" and len(tar.getnames()) == 6
    table = Session(60, tmp_path / "again", tmp_path / "state").run(jobs | {"more": Job("true", 9, 1)})
    assert once.read_text() == "x\n" and table["more"]["status"] == 0 and table["count"]["said"] == ["12.5 ms"]


def test_what_a_session_has_no_time_for_is_left_out(tmp_path, capsys):
    table = Session(0, tmp_path / "out", tmp_path / "state").run({"late": Job("true", 9, 1)})
    assert "late" not in table and "late: left out, 0 s left" in capsys.readouterr().out


def test_a_sessions_jobs_name_what_there_is(tmp_path):
    """Each benchmark, module, script and test file of the commands exists, and each job that is waited for."""
    jobs = gpu_session.jobs(tmp_path)
    text = "\n".join(job.command for job in jobs.values())
    assert set(re.findall(r"--job '([^']+)'", text)) <= {*gpu.JOBS, *gpu_session_kernels()}
    for file in re.findall(r"[\w/]+\.py\b", text):
        assert (full_size.ROOT / file).exists(), file
    for module in re.findall(r"-m (benchmarks[.\w]*)", text):
        assert importlib.util.find_spec(module), module
    assert {job.after for job in jobs.values()} <= {"", *(name for name, job in jobs.items() if job.beside)}
    assert all(0 < job.expected <= job.limit for job in jobs.values())


def gpu_session_kernels():
    """Those that are timed on a GPU only, which this process may lack."""
    return {name.removeprefix("time_") for name in dir(kernels) if name.startswith("time_")}


def test_a_probe_answers_the_questions_after_one_that_raises(tmp_path):
    def raises():
        raise RuntimeError("no such product\nand more")

    ask = {"a": lambda: 1.5, "b": raises, "c": lambda: float("nan"), "d": lambda: {"ms": 2}}
    found = gpu_probe.answer(ask, tmp_path / "probe.json")
    assert found == json.loads((tmp_path / "probe.json").read_text())
    assert found == {
        "a": 1.5,
        "b": "RuntimeError: no such product",
        "c": "ValueError: nan was measured",
        "d": {"ms": 2},
    }


def test_what_a_probe_asks_runs(monkeypatch):
    """At a small size on the CPU, but for fp8 products and copies, which only a GPU has."""
    monkeypatch.setattr(gpu_probe, "DEVICE", "cpu")
    assert gpu_probe.product(8, 4, 16) > 0 and gpu_probe.attention(SDPBackend.MATH, 8, 2, True) > 0
    assert gpu_probe.convolution(4, 3, 5, 6, torch.float32, True)["ms"] > 0
    assert len(gpu_probe.questions()) > 40


def test_what_begins_too_late_is_named(tmp_path):
    results = gpu.on_gpu({}, tmp_path / "gpu.json", seconds=0, jobs=("ceilings",))
    assert results == {"ceilings": "left out: no time"} == json.loads((tmp_path / "gpu.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("work", WORKS)
def test_each_benchmark_runs_and_measures_ours_the_reference_and_a_peer(work, capsys):
    measured = on_cpu([work], rounds=1)["works"][work]
    peer = measured["peer"]
    assert list(measured["seconds"]) == ["ours", "ref", peer] and min(map(min, measured["seconds"].values())) > 0
    assert measured["memory"].keys() == {"ours", peer} and f"({peer})" in capsys.readouterr().out


@pytest.mark.slow
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
