"""The memory estimate: what is counted, and that it knows the released sizes (test_train.py: against measured runs)."""

import contextlib
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import scripts
from safetensors.torch import load_file, save_file
from test_diag import full_size
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import _functional_collectives

import train_lora
import train_te
from benchmarks import tiny
from diagnostics.plan import Machine, planned, propose
from lora import inject
from nanowan.errors import BadInput
from nanowan.flags import parallel_layout
from nanowan.formats.dit import full_config, keep_fp32, new_dit
from nanowan.memory.tiled_vae import decode_tiled
from nanowan.memory_estimate import Tracker, build, builders, traced
from nanowan.parallel import ulysses
from nanowan.pipeline import Pipeline
from wan import Wan

ROOT = Path(__file__).parent.parent


def test_the_tracker_counts_births_and_deaths():
    weight = torch.zeros(100, 100)
    with Tracker() as t:
        view = weight.t()[:50]  # of what was there before: nothing
        assert (t.now, t.peak) == (0, 0)
        a = torch.empty(1000)
        b = a.view(10, 100)  # another name for a
        c = b @ weight
        assert t.now == t.peak == 4000 + 4000
        del a, b
        assert t.now == 4000 and t.peak == 8000
        c.add_(1)
        del c, view
        assert t.now == 0 and t.peak == 8000


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fake_tensors_take_what_real_ones_do(checkpointing):
    """The same step on the fake CPU and on the real one: the same peak, but for the optimizer's step counters (4 bytes
    each).
    """
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


@pytest.mark.parametrize("variant", ["ti2v-5B", "t2v-A14B", pytest.param("i2v-A14B", marks=pytest.mark.slow)])
def test_released_sizes_are_planned_without_files(variant):
    flags = ["--ckpt", variant, "--resolution", "256x256", "--frames", "9", "--batch", "1"]
    with torch.device("meta"):
        want = sum(p.numel() * (4 if keep_fp32(n) else 2) for n, p in Wan(full_config(variant)).named_parameters())
    plain, small = planned("train_lora", flags), planned("train_lora", [*flags, "--checkpointing"])
    both = 1 if variant == "ti2v-5B" else 2
    matrices, dim = (60, 3072) if variant == "ti2v-5B" else (80, 5120)
    assert plain.phases["training"]["DiT"] == both * want  # a GPU of 80 GB is assumed, which both experts fit
    assert planned("train_lora", flags, Machine(1, 48e9, math.inf)).phases["training"]["DiT"] == want  # one at a time
    assert plain.phases["training"]["trained"] == both * 4 * 16 * 2 * dim * matrices
    assert small.phases["training"]["states and activations"] < 0.7 * plain.phases["training"]["states and activations"]
    assert abs(plain.phases["cache texts"]["encoder"] - 2 * 5_680_910_336) < 1e6
    assert (
        abs(plain.disk["states"] / (3 * 3 * plain.phases["training"]["trained"]) - 1) < 1e-3
    )  # three copies of weights and two moments
    sampled = planned("sample", ["--ckpt", variant, "--size", "256x256", "--frames", "9"])
    assert sampled.phases["denoise"]["DiT"] == want and sampled.peak > want


@pytest.mark.parametrize("variant", ["s2v-14B", "animate-14B"])
def test_videos_of_segments_are_planned_without_files(variant):
    with torch.device("meta"):
        weights = new_dit(full_config(variant)).named_parameters()
    plan = planned("sample", ["--ckpt", variant, "--size", "256x256", "--device", "cuda"])
    assert plan.phases["denoise"]["DiT"] == sum(p.numel() * (4 if keep_fp32(n) else 2) for n, p in weights)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_one_rank_takes_what_it_takes_among_others(trains, batch, monkeypatch):
    """Ulysses as a plan traces it, against Ulysses whose messages go nowhere, where attention takes the most."""
    monkeypatch.setattr(dist, "all_gather", lambda parts, x, group: None)
    monkeypatch.setattr(_functional_collectives, "all_to_all_single_autograd", lambda x, *sizes: x.clone())
    ranks = SimpleNamespace(sp_size=2, sp_rank=0, group=lambda dim: None, count=lambda kind, nbytes: None)
    config, peaks = replace(tiny.dit("ti2v", heads=4).config, ffn_dim=8, dim=512, num_layers=2), []
    for kind in (ulysses.Ulysses, ulysses.FirstRank):
        with FakeTensorMode(), torch.set_grad_enabled(trains):
            model = Wan(config)
            inject(model, rank=4)
            ulysses.apply_ulysses(model, ranks, kind)
            x, t, context = torch.zeros(batch, 48, 5, 16, 16), torch.zeros(batch), torch.zeros(batch, 7, tiny.TEXT_DIM)
            with Tracker() as tracker:
                loss = model(x, t, context).square().mean()
                if trains:
                    loss.backward()
        peaks.append(tracker.peak)
    assert peaks[0] == peaks[1] > 1e6


def test_a_pipelines_first_stage_has_a_sample_for_each_stage():
    """Which it has under way at once, however many are in the batch."""
    flags = "--resolution 128x128 --checkpointing --device cpu --ckpt nano --pipeline_stages"
    one, two, many = (
        planned("train_lora", [*flags.split(), *more.split()]).phases["training"]["states and activations"]
        for more in ("2 --batch 1", "2 --batch 2", "2 --batch 4")
    )
    assert abs(one - two) < 0.05 * two and 0 < many - two < 0.5 * two


def test_what_is_kept_of_each_adapter_is_planned(checkpoints):
    """One is trained at a time; weights and both moments of the other are there all the same, with --ema a fourth copy;
    and in each of the three states on the disk, where results are the newest and two of earlier steps.
    """
    flags = ["--ckpt", str(checkpoints["t2v"]), *"--resolution 32x32 --frames 5 --batch 1 --device cpu".split()]
    flags += "--steps 10 --save_every 1 --keep 2 --held_out 0".split()
    one, both, averaged = (
        planned("train_lora", [*flags, "--expert", *more]) for more in (["high"], ["both"], ["high", "--ema", "0.9"])
    )
    adapter = one.phases["training"]["trained"]
    began = one.phases["training"]["states and activations"]
    assert both.phases["training"]["trained"] == 2 * adapter
    assert both.phases["training"]["states and activations"] - began == pytest.approx(2 * adapter, rel=1e-2)
    assert averaged.phases["training"]["states and activations"] - began == pytest.approx(adapter, rel=1e-2)
    for plan, copies in ((one, 3), (both, 6), (averaged, 4)):
        assert plan.disk["states"] == pytest.approx(3 * copies * adapter, rel=1e-2)
        assert plan.disk["result"] == 3 * adapter * (2 if plan is both else 1)


def test_texts_that_are_cached_need_no_encoder():
    """A second run on the same clips; previews are embedded all the same."""
    args, pipe = train_lora.arguments(["--ckpt", "nano", "--device", "cpu"]), Pipeline("nano")
    how = args, pipe.settings, builders(pipe), train_lora.check(args, pipe.settings, pipe.config().num_layers)
    assert "cache texts" in train_lora.predict(*how).phases
    assert "cache texts" not in train_lora.predict(*how, encode_texts=False).phases
    assert "cache texts" in train_lora.predict(*how, encode_texts=False, previews=(48, 3, 4, 4)).phases


@pytest.mark.parametrize("script", ["train_lora", "train_te", "sample"])
def test_a_checkpoint_in_8_bits_is_planned_as_such(checkpoints, tmp_path, script):
    """Its files decide, without a flag."""
    folder, tensors = shutil.copytree(checkpoints["ti2v"], tmp_path / "eight"), {}
    for file in folder.glob("diffusion_pytorch_model*"):
        if file.suffix == ".safetensors":
            tensors |= load_file(file)
        file.unlink()
    for name in [n for n, w in tensors.items() if n.startswith("blocks.") and n.endswith("weight") and w.dim() == 2]:
        tensors[name.removesuffix("weight") + "scale_weight"] = tensors[name].abs().max() / 448
        tensors[name] = (tensors[name] / tensors[name].abs().max() * 448).to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model_fp8_scaled.safetensors")
    flags = ["--device", "cpu", *("--size" if script == "sample" else "--resolution", "64x64"), "--frames", "5"]
    flags += ["--batch", "1"] if script != "sample" else []
    phase = "denoise" if script == "sample" else "training"
    whole, eight = (
        planned(script, ["--ckpt", str(f), *flags]).phases[phase]["DiT"] for f in (checkpoints["ti2v"], folder)
    )
    assert eight < 0.6 * whole


@pytest.mark.parametrize("script", [train_lora, train_te])
def test_a_plan_leaves_the_flags_alone(script):
    args, pipe = script.arguments("--ckpt nano --device cpu --batch 8 --pipeline_stages 2".split()), Pipeline("nano")
    found = script.check(args, pipe.settings, pipe.config().num_layers)
    more = (found,) if script is train_lora else ()
    before = dict(vars(args))
    how = dict(previews=(48, 3, 4, 4), layout=parallel_layout(args, 2))
    script.predict(args, pipe.settings, builders(pipe), *more, **how)
    assert vars(args) == before


def test_a_tiled_decode(report):
    """Planned from nine of its tiles: what all of them take, and less than one piece."""
    flags = ["--ckpt", "nano", "--size", "320x320", "--frames", "5"]
    whole, tiled = (
        planned("sample", [*flags, *more]).phases["decode"]["activations and video"]
        for more in ([], ["--vae_tile", "4"])
    )
    with FakeTensorMode():
        vae = build(builders(Pipeline("nano")), "vae", torch.float32)
        report("decode", abs(tiled / traced(lambda: decode_tiled(vae, torch.empty(1, 48, 2, 20, 20), 4)) - 1), 0.05)
    assert tiled < 0.7 * whole


def test_the_command(tmp_path):
    run = scripts.run(
        ROOT / "diag.py",
        "plan",
        "--json",
        tmp_path / "p.json",
        "train_te",
        "--ckpt",
        "nano",
        "--batch",
        "4",
        "--previews",
        "x",
        plan=True,
    )
    assert run.returncode == 0 and "plan: peak memory" in run.stdout and "previews:" in run.stdout, run.stderr
    told = json.loads((tmp_path / "p.json").read_text())
    assert told["peak"] == told["process"] + max(sum(p.values()) for p in told["phases"].values())
    bad = scripts.run(ROOT / "diag.py", "plan", "train_lora", "--frames", "8", plan=True)
    assert bad.returncode == 1 and "nearest 9" in bad.stderr


FULL_SIZE = """
import sys
import torch
sys.path.insert(0, {root!r})
from nanowan.formats.dit import full_config, load_wan
from nanowan.memory_estimate import ParallelLayout, build, used
from wan import Wan
with torch.device("meta"):
    plain = build({{"dit": lambda: Wan(full_config({variant!r}))}}, "dit", torch.bfloat16)
for fp8 in (False, True):
    model = load_wan({folder!r}, "meta", torch.bfloat16, True) if fp8 else plain
    for layout in (ParallelLayout(), ParallelLayout(stream_blocks=len(model.blocks)), ParallelLayout(stream_blocks=10),
            ParallelLayout(fsdp_size=8), ParallelLayout(pp_size=8)):
        print(*layout.weights(model))
print(used('cpu'))
"""


@pytest.mark.parametrize("variant", ["ti2v-5B"])
def test_released_sizes_load_without_being_allocated(variant, tmp_path):
    """A sparse file of the full size, through the loader, into 8 bits, and what of it lies where: in a process of less
    than 1 GB.
    """
    config = full_config(variant)
    with torch.device("meta"):
        model = Wan(config)
    full_size(tmp_path, variant, kind="BF16")
    code = FULL_SIZE.format(
        root=str(ROOT), variant=variant, folder=str(tmp_path / ("high_noise_model" if variant == "t2v-A14B" else "."))
    )
    *told, peak = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert int(peak) < 1e9
    linears = config.num_layers * (8 * config.dim**2 + 2 * config.dim * config.ffn_dim)
    scales = 4 * config.num_layers * (9 * config.dim + config.ffn_dim)
    whole = sum(p.numel() * (4 if keep_fp32(n) else 2) for n, p in model.named_parameters())
    layers = config.num_layers
    for size, lines in ((whole, told[:5]), (whole - linears + scales, told[5:])):
        (plain, none), (ring, away), (some, ten), (shard, _), (stage, _) = (map(int, line.split()) for line in lines)
        block = away // layers
        assert (
            plain == size
            and none == 0
            and away + ring == size + 2 * block
            and ten == 10 * block
            and some == size - 8 * block
        )
        rest = size - away
        assert shard == rest + away // 8 + 2 * block and stage == rest + -(-layers // 8) * block


@pytest.mark.parametrize(
    "gigabytes, script, flags, want",
    [
        (16, "sample", ["--ckpt", "t2v-A14B", "--size", "832x480"], ["--stream_blocks"]),
        pytest.param(
            *(
                24,
                "train_lora",
                ["--ckpt", "ti2v-5B", "--resolution", "960x544", "--frames", "81"],
                ["--checkpointing"],
            ),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_proposals_fit(gigabytes, script, flags, want):
    limit = gigabytes * 1e9
    found, need = propose(script, flags, Machine(1, limit))
    assert set(want) <= set(found) and need.peak <= limit
    plain = [*flags, "--no-checkpointing"] if script != "sample" else flags
    assert planned(script, [*plain, "--device", "cuda"]).peak > limit


@pytest.mark.slow
def test_what_cannot_fit_is_said():
    with pytest.raises(BadInput, match="needs at least"):
        propose("sample", ["--ckpt", "t2v-A14B"], Machine(1, 3e9))
