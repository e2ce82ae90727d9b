"""plan.py: what is counted, and that a plan knows the released sizes. Plans against measured runs are in test_train.py."""
import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import tiny
from diag import planned
from lora import inject
from plan import Tracker
from wan import Wan, full_config, keep_fp32

ROOT = Path(__file__).parent.parent


def test_the_tracker_counts_births_and_deaths():
    weight = torch.zeros(100, 100)
    with Tracker() as t:
        view = weight.t()[:50]                       # of what was there before: nothing
        assert (t.now, t.peak) == (0, 0)
        a = torch.empty(1000)
        b = a.view(10, 100)                          # another name for a
        c = b @ weight
        assert t.now == t.peak == 4000 + 4000
        del a, b
        assert t.now == 4000 and t.peak == 8000
        c.add_(1)
        del c, view
        assert t.now == 0 and t.peak == 8000


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fake_tensors_take_what_real_ones_do(checkpointing):
    """The same step on the fake CPU and on the real one: the same peak, but for the optimizer's step counters (4 bytes each)."""
    peaks = []
    for mode in (FakeTensorMode(), contextlib.nullcontext()):
        with mode:
            model = Wan(tiny.dit("ti2v").config)
            model.checkpointing = checkpointing
            params = inject(model, rank=4)
            opt = torch.optim.AdamW(params)
            x, t, context = torch.zeros(2, 48, 3, 8, 8), torch.zeros(2), torch.zeros(2, 7, tiny.TEXT_DIM)
            with Tracker() as tracker:
                for _ in range(2):
                    opt.zero_grad(set_to_none=True)
                    model(x, t, context).square().mean().backward()
                    opt.step()
            peaks.append(tracker.peak)
    assert abs(peaks[0] - peaks[1]) <= 4 * len(params) and peaks[1] > 100_000


@pytest.mark.parametrize("variant", ["ti2v-5B", "t2v-A14B", "i2v-A14B"])
def test_released_sizes_are_planned_without_files(variant):
    flags = ["--ckpt", variant, "--resolution", "256x256", "--frames", "9", "--batch", "1"]
    with torch.device("meta"):
        want = sum(p.numel() * (4 if keep_fp32(n) else 2) for n, p in Wan(full_config(variant)).named_parameters())
    plain, small = planned("train_lora", flags), planned("train_lora", [*flags, "--checkpointing"])
    both = 1 if variant == "ti2v-5B" else 2
    matrices, dim = (60, 3072) if variant == "ti2v-5B" else (80, 5120)
    assert plain.phases["training"]["DiT"] == want  # one expert at a time
    assert plain.phases["training"]["trained"] == both * 4 * 16 * 2 * dim * matrices
    assert small.phases["training"]["states and activations"] < 0.7 * plain.phases["training"]["states and activations"]
    assert abs(plain.phases["cache texts"]["encoder"] - 2 * 5_680_910_336) < 1e6
    assert abs(plain.disk["states"] / (3 * 3 * plain.phases["training"]["trained"]) - 1) < 1e-3  # three copies of weights and two moments
    sampled = planned("sample", ["--ckpt", variant, "--size", "256x256", "--frames", "9"])
    assert sampled.phases["denoise"]["DiT"] == want and sampled.peak > want


def test_the_command(tmp_path):
    run = subprocess.run([sys.executable, ROOT / "diag.py", "plan", "--json", tmp_path / "p.json", "train_te", "--ckpt", "nano", "--batch", "4", "--previews", "x"], capture_output=True, text=True)
    assert run.returncode == 0 and "plan: peak memory" in run.stdout and "previews:" in run.stdout, run.stderr
    told = json.loads((tmp_path / "p.json").read_text())
    assert told["peak"] == told["process"] + max(sum(p.values()) for p in told["phases"].values())
    bad = subprocess.run([sys.executable, ROOT / "diag.py", "plan", "train_lora", "--frames", "8"], capture_output=True, text=True)
    assert bad.returncode == 1 and "nearest 9" in bad.stderr
