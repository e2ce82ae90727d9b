"""What both trainers share: exact resumes, bad steps, held-out losses, previews, both experts, the plan."""

import copy
import importlib
import json
import math
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import scripts
from helpers.adapters import save_lora
from PIL import Image
from test_data import clip, photo

import data
from benchmarks import tiny
from nanowan import memory_estimate
from nanowan.cache import digest
from nanowan.formats.header import load, save
from nanowan.parallel import World
from nanowan.pipeline import Adapter, Pipeline
from nanowan.training import optim
from nanowan.training.state import TrainState, resume_fingerprint
from nanowan.variants.samples import Samples

ROOT = Path(__file__).parent.parent
WORDS = ["a red fox jumps over", "a dog runs", "a cat sleeps"]


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    for i in range(6):
        clip(folder / f"{i}.mp4", 30 + i, 64, 64, caption=WORDS[i % 3])
    photo(folder / "p.png", 64, 64)
    return folder


def train(script, ckpt, media, out, *flags, check=True, code=None, steps=4):
    where = "--ckpt", ckpt, "--data", media, "--out", out, "--cache", media.parent / "cache"
    how = f"--resolution 64x64 --frames 9 --steps {steps} --batch 2 --device cpu --dtype fp32".split()
    return scripts.run(ROOT / f"{script}.py", *where, *how, *flags, code=code, check=check)


def logged(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


KILLS = """
import os, random, signal, sys, time
from pathlib import Path
root, script, kills, *argv = sys.argv[1:]
sys.path.insert(0, root)
import torch, torch.utils.tensorboard, torch._dynamo, train_lora, train_te
torch.set_num_threads(1)
rng, lives, log = random.Random(7), 0, Path(argv[argv.index("--out") + 1], "log.jsonl")
while True:
    pid = os.fork()
    if pid == 0:
        sys.argv = [script, *argv, *(["--resume"] if lives else [])]
        sys.stdout = sys.stderr = open(os.devnull, "w")
        {"train_lora": train_lora, "train_te": train_te}[script].main()
        os._exit(0)
    if lives < int(kills):
        lines = 10 * lives + rng.randint(0, 9)  # so that every machine is this far
        while lines and (not log.exists() or log.read_bytes().count(b"\\n") < lines):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1 if lines else 2))
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    lives += 1
    if status == 0:
        print("done after", lives - 1, "kills")
        break
    if lives > int(kills):
        sys.exit(f"the last life ended with {status}")
"""


@pytest.mark.parametrize(
    "script, flags",
    [
        ("train_lora", ["--dropout", "0.1", "--ema", "0.9", "--accumulate", "2"]),
        ("train_te", ["--keywords", "crimson"]),
    ],
)
@pytest.mark.slow
@pytest.mark.parametrize("kills", [20])
def test_kills_at_random_moments_change_nothing(tmp_path, script, flags, kills):
    """A nano run killed many times, whatever it is doing, ends with the losses and weights of an undisturbed one, bit
    for bit.
    """
    scripts.run("-m", "nano", "clips", "--out", tmp_path / "clips", "--n", "40", "--words", "crimson", check=True)
    steps, results = 10 * kills + 20, []
    for times in (0, kills):
        out = tmp_path / f"{times}"
        argv = [
            "--ckpt",
            "nano",
            "--data",
            tmp_path / "clips",
            "--out",
            out,
            "--steps",
            steps,
            "--batch",
            1,
            "--save_every",
            3,
            "--eval_every",
            8,
            "--device",
            "cpu",
            *flags,
        ]
        steps_run = subprocess.run(
            [sys.executable, "-c", KILLS, *map(str, [ROOT, script, times, *argv])], capture_output=True, text=True
        )
        assert steps_run.returncode == 0, steps_run.stderr
        results.append(
            (
                steps_run.stdout,
                load(next(out.glob("*.safetensors")))[0],
                [(r["step"], r.get("loss"), r.get("val_loss")) for r in logged(out)],
            )
        )
    assert "after 0 kills" in results[0][0] and f"after {kills} kills" in results[1][0]
    (_, a, log_a), (_, b, log_b) = results
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert log_a == log_b and len(log_a) == steps + 1


POISON = """
import os, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
import data, {script}
real = data.Dataset.step
def step(self, step, *a, **more):
    for batch, share in real(self, step, *a, **more):
        yield batch._replace(target=batch.target * ({value} if {when} else 1)), share
data.Dataset.step = step
from nanowan.errors import cli
cli({script}.main)
"""


@pytest.mark.parametrize("script", ["train_lora", "train_te"])
def test_a_bad_step_is_skipped(checkpoints, media, tmp_path, script):
    """One step of NaN leaves the weights as they were before it, says so, and the run goes on."""
    done = train(
        script,
        checkpoints["ti2v"],
        media,
        tmp_path / "out",
        steps=6,
        code=POISON.format(script=script, value="float('nan')", when="step == 3"),
    )
    assert "step 4 skipped: the loss is nan" in done.stdout
    lines = logged(tmp_path / "out")
    assert [r.get("skipped") for r in lines] == [None, None, None, 1, None, None] and all(
        math.isfinite(r["loss"]) for i, r in enumerate(lines) if i != 3
    )
    assert all(v.isfinite().all() for v in load(next((tmp_path / "out").glob("*.safetensors")))[0].values())


@pytest.mark.parametrize(
    "script, value, why",
    [("train_lora", "float('inf')", "the loss is inf"), ("train_te", "1e6", "times the recent median")],
)
def test_many_bad_steps_end_the_run_with_the_last_good_state(checkpoints, media, tmp_path, script, value, why):
    good = train(script, checkpoints["ti2v"], media, tmp_path / "good", "--schedule", "constant", steps=25)
    assert good.returncode == 0
    bad = train(
        script,
        checkpoints["ti2v"],
        media,
        tmp_path / "bad",
        "--schedule",
        "constant",
        "--max_skipped",
        3,
        steps=60,
        check=False,
        code=POISON.format(script=script, value=value, when="step >= 25"),
    )
    assert (
        bad.returncode == 1
        and "3 steps in a row skipped" in bad.stderr
        and why in bad.stderr
        and "Traceback" not in bad.stderr
    )
    a, b = (load(next((tmp_path / d).glob("*.safetensors")))[0] for d in ("good", "bad"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert torch.load(tmp_path / "bad" / "checkpoints" / "step_000028.pt", weights_only=True)["step"] == 28


@pytest.mark.parametrize("script", ["train_lora", "train_te"])
def test_what_is_saved_with_ema_is_the_average(checkpoints, media, tmp_path, script):
    train(script, checkpoints["ti2v"], media, tmp_path / "out", "--ema", 0.5, steps=5)
    state = torch.load(tmp_path / "out" / "checkpoints" / "step_000005.pt", weights_only=True)
    saved = load(next((tmp_path / "out").glob("*.safetensors")))[0]
    average, now = state["ema"]["average"], state["params"]
    assert not torch.equal(average[1], now[1])
    assert any(torch.equal(average[1], v) for v in saved.values()) and not any(
        torch.equal(now[1], v) for v in saved.values()
    )


@pytest.mark.parametrize("script", ["train_lora", "train_te"])
def test_accumulated_batches_equal_one_large_batch(checkpoints, media, tmp_path, monkeypatch, script, report):
    """The gradient of a step of three batches of two is that of the mean loss over their six samples."""
    from flow import Batch

    module = importlib.import_module(script)
    seen = {}
    real_step, real_clip = data.Dataset.step, torch.nn.utils.clip_grad_norm_
    kept = []

    def keep(self, step, *a, **more):
        for batch, share in real_step(self, step, *a, **more):
            if batch.x.shape[2] == 3:
                kept.append((batch, share))
                yield batch, 1 / 3

    def together(self, step, *a, **more):
        x, t, target = (torch.cat([getattr(b, k) for b, _ in kept]) for k in ("x", "t", "target"))
        yield Batch(x, t, target, None, [c for b, _ in kept for c in b.captions]), 1.0

    def clip_norm(params, most):
        seen.setdefault(len(seen), [p.grad.clone() for p in params])
        return real_clip(params, most)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_norm)
    sum_of = (
        7  # four batches are an epoch: six clips and an image, whose batch is dropped here, its bucket being another
    )
    for name, step, n in (("many", keep, 4), ("one", together, 1)):
        monkeypatch.setattr(data.Dataset, "step", step)
        monkeypatch.setattr(
            "sys.argv",
            [
                script,
                *map(
                    str,
                    [
                        "--ckpt",
                        checkpoints["ti2v"],
                        "--data",
                        media,
                        "--out",
                        tmp_path / name,
                        "--cache",
                        media.parent / "cache",
                        "--resolution",
                        "64x64",
                        "--frames",
                        9,
                        "--steps",
                        1,
                        "--batch",
                        2,
                        "--accumulate",
                        n,
                        "--device",
                        "cpu",
                        "--lr",
                        0,
                        "--held_out",
                        0,
                    ],
                ),
            ],
        )
        module.main()
    assert len(kept) == 3 and all(len(b.x) == 2 and abs(s - 2 / sum_of) < 1e-9 for (b, s) in kept)
    report("relative error", max(tiny.error(a, b) for a, b in zip(seen[0], seen[1]) if b.abs().max() > 0), 1e-5)


def test_a_given_first_frame_is_clean_and_not_counted(checkpoints, media, tmp_path, monkeypatch):
    """TI2V with --i2v_prob 1: latent frame 0 reaches the DiT as it is, at t = 0, and its error does not change the
    loss; images are left alone.
    """
    import train_lora
    from wan import Wan

    seen, real = [], Wan.forward

    def spy(self, x, t, context, lens):
        out = real(self, x, t, context, lens)
        if type(out) is torch.Tensor:
            seen.append((x.detach(), t, out.detach()))
        return out

    batches, real_step = [], data.Dataset.step

    def spy_step(self, *a, **more):
        for found in real_step(self, *a, **more):
            batches.append(found)
            yield found

    monkeypatch.setattr(data.Dataset, "step", spy_step)
    monkeypatch.setattr(Wan, "forward", spy)
    monkeypatch.setattr(
        "sys.argv",
        [
            "train_lora.py",
            *map(
                str,
                [
                    "--ckpt",
                    checkpoints["ti2v"],
                    "--data",
                    media,
                    "--out",
                    tmp_path / "out",
                    "--cache",
                    media.parent / "cache",
                    "--resolution",
                    "64x64",
                    "--frames",
                    9,
                    "--steps",
                    8,
                    "--batch",
                    2,
                    "--i2v_prob",
                    1,
                    "--device",
                    "cpu",
                    "--held_out",
                    0,
                ],
            ),
        ],
    )
    train_lora.main()
    clean = [load(f)[0]["latents"] for f in (media.parent / "cache").glob("*.safetensors") if "latents" in load(f)[0]]
    clips = 0
    for (x, t, out), (batch, _), line in zip(seen, batches, logged(tmp_path / "out"), strict=True):
        if x.shape[2] == 1:
            assert t.shape == (len(x),) and batch.loss_mask is None
            continue
        clips += 1
        assert t.shape == (len(x), 3) and (t[:, 0] == 0).all() and (t[:, 1:] > 0).all() and (t[:, 1] == t[:, 2]).all()
        assert all(any(torch.equal(u[:, 0], z[:, 0]) for z in clean if z.shape == u.shape) for u in x)
        want = (out[:, :, 1:] - batch.target[:, :, 1:]).square().mean().item()
        assert abs(line["loss"] / want - 1) < 1e-5
    assert clips >= 5


def test_both_experts_in_one_run(checkpoints, media, tmp_path):
    """Two adapters, each trained only in its own turns and on its own side of the boundary; they equal those of
    separate runs' first stretch.
    """
    code = (
        "import os, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, os.path.dirname(sys.argv[0])); "
        "import data, train_lora; real = data.Dataset.draw\n"
        "def spy(self, step, *a):\n    draws = real(self, step, *a); times = [float(d.t) for d in draws]\n"
        "    print('T', step, min(times), max(times)); return draws\n"
        "data.Dataset.draw = spy; train_lora.main()"
    )
    done = train(
        "train_lora",
        checkpoints["t2v"],
        media,
        tmp_path / "both",
        "--steps_per_expert",
        3,
        "--schedule",
        "constant",
        steps=12,
        code=code,
    )
    drawn = [[float(v) for v in line.split()[1:]] for line in done.stdout.splitlines() if line.startswith("T ")]
    names = [r["expert"] for r in logged(tmp_path / "both")]
    assert names == ["high"] * 3 + ["low"] * 3 + ["high"] * 3 + ["low"] * 3
    assert [step for step, *_ in drawn] == [*range(12)]
    assert all(low >= 0.875 if n == "high" else high <= 0.875 for n, (_, low, high) in zip(names, drawn))
    adapters = {n: load(tmp_path / "both" / f"adapter_model_{n}.safetensors") for n in ("high", "low")}
    assert [adapters[n][1]["expert"] for n in adapters] == ["high", "low"]
    assert all(any(v.abs().max() > 0 for k, v in a[0].items() if "lora_B" in k) for a in adapters.values())
    train(
        "train_lora", checkpoints["t2v"], media, tmp_path / "one", "--expert", "high", "--schedule", "constant", steps=3
    )
    train(
        "train_lora",
        checkpoints["t2v"],
        media,
        tmp_path / "two",
        "--steps_per_expert",
        3,
        "--schedule",
        "constant",
        steps=3,
    )
    a, b = (load(tmp_path / d / "adapter_model_high.safetensors")[0] for d in ("one", "two"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert all(
        (v == 0).all() for k, v in load(tmp_path / "two" / "adapter_model_low.safetensors")[0].items() if "lora_B" in k
    )


def test_both_experts_resume_and_draw_previews(checkpoints, media, tmp_path):
    (tmp_path / "p.txt").write_text("a fox\n")
    small = tmp_path / "c"
    shutil.copytree(checkpoints["t2v"], small)
    for expert in ("high", "low"):
        file = small / f"{expert}_noise_model" / "config.json"
        file.write_text(
            json.dumps(json.loads(file.read_text()) | {"sample": {"size": [64, 32], "frames": 5, "steps": 4}})
        )
    flags = ["--steps_per_expert", 2, "--schedule", "constant", "--previews", tmp_path / "p.txt", "--preview_every", 4]
    train("train_lora", small, media, tmp_path / "whole", *flags, steps=8)
    train("train_lora", small, media, tmp_path / "cut", *flags, "--save_every", 3, steps=5)
    train("train_lora", small, media, tmp_path / "cut", *flags, "--resume", steps=8)
    for name in ("high", "low"):
        a, b = (load(tmp_path / d / f"adapter_model_{name}.safetensors")[0] for d in ("whole", "cut"))
        assert all(torch.equal(a[k], b[k]) for k in a)
    shown = sorted(p.name for p in (tmp_path / "whole" / "previews").iterdir())
    assert shown == [f"step_{i:06d}{end}" for i in (0, 4, 8) for end in (".png", "_00.mp4")]


def test_a_lora_goes_on_from_a_file(checkpoints, media, tmp_path):
    train("train_lora", checkpoints["ti2v"], media, tmp_path / "a", "--rank", 4, "--alpha", 8)
    file = tmp_path / "a" / "adapter_model.safetensors"
    train(
        "train_lora",
        checkpoints["ti2v"],
        media,
        tmp_path / "b",
        "--rank",
        4,
        "--alpha",
        2,
        "--init_lora",
        file,
        "--lr",
        0,
        "--weight_decay",
        0,
    )
    a, b = (load(tmp_path / d / "adapter_model.safetensors")[0] for d in "ab")
    assert (
        a.keys() == b.keys()
        and all(torch.allclose(a[k], b[k], rtol=1e-6, atol=0) for k in a)
        and max(v.abs().max() for v in a.values()) > 0
    )
    for flags, message in (
        (["--rank", 8], "asked for are"),
        (["--rank", 4, "--targets", "cross_attn.q"], "asked for are none"),
    ):
        run = train("train_lora", checkpoints["ti2v"], media, tmp_path / "c", *flags, "--init_lora", file, check=False)
        assert run.returncode == 1 and "--init_lora" in run.stderr and message in run.stderr, run.stderr
    run = train("train_lora", checkpoints["t2v"], media, tmp_path / "d", "--rank", 4, "--init_lora", file, check=False)
    assert run.returncode == 1 and "for which expert?" in run.stderr


def test_which_expert_starts_from_a_file(checkpoints, tmp_path):
    from nanowan.errors import BadInput
    from train_lora import initial_loras

    both, high, either = ("high", "low"), ("high",), ("dit",)
    pipe = Pipeline(checkpoints["t2v"])
    new_adapter = Adapter(both, ("cross_attn.k", "cross_attn.v"), 2, 2, 0.0, None, 0)
    foreign, low = (str(tmp_path / f"{name}.safetensors") for name in ("foreign", "low"))
    dit = tiny.dit("t2v")
    new_adapter.inject(dit, None)
    save_lora(foreign, dit)
    save_lora(low, dit, expert="low")

    def starts(specs, turns):
        return initial_loras(specs, pipe, dict.fromkeys(turns), new_adapter)

    assert starts([f"{foreign}:high", low], both) == {"high": foreign, "low": low}
    assert starts([foreign], high) == {"high": foreign} and starts([], either) == {}
    for specs, turns in (([foreign], both), ([low, f"{foreign}:low"], both), ([low], high)):
        with pytest.raises(BadInput, match="--init_lora"):
            starts(specs, turns)


def test_one_expert_at_a_time_where_memory_is_short(checkpoints, media, tmp_path):
    code = (
        "import os, sys, weakref; sys.argv = sys.argv[1:]; sys.path.insert(0, os.path.dirname(sys.argv[0])); "
        "import importlib; from nanowan import pipeline as m\n"
        "m.free_memory, real, alive = lambda device: 0, m.Pipeline._load, weakref.WeakValueDictionary()\n"
        "def load(self, name, need):\n    assert name not in ('high', 'low') or not set(alive), (name, list(alive))\n"
        "    part = real(self, name, need)\n"
        "    if name in ('high', 'low'):\n        alive[name] = part.model\n    print('LOADED', name)\n"
        "    return part\n"
        "m.Pipeline._load = load; importlib.import_module(os.path.basename(sys.argv[0])[:-3]).main()"
    )
    for script in ("train_lora", "train_te"):
        run = train(
            script,
            checkpoints["t2v"],
            media,
            tmp_path / script,
            "--steps_per_expert",
            1,
            "--held_out",
            0.3,
            "--eval_every",
            2,
            code=code,
        )
        assert run.stdout.count("LOADED high") > 2 and run.stdout.count("LOADED low") > 2


def test_a_delta_cap_holds_at_every_step(checkpoints, media, tmp_path):
    from diagnostics.delta import delta

    train("train_lora", checkpoints["ti2v"], media, tmp_path / "free", "--lr", 3e-2, "--schedule", "constant", steps=10)
    train(
        "train_lora",
        checkpoints["ti2v"],
        media,
        tmp_path / "held",
        "--lr",
        3e-2,
        "--schedule",
        "constant",
        "--delta_cap",
        0.02,
        "--ema",
        0.5,
        steps=10,
    )
    ratios = {
        d: [r["ratio"] for r in delta(tmp_path / d / "adapter_model.safetensors", checkpoints["ti2v"])]
        for d in ("free", "held")
    }
    assert max(ratios["free"]) > 0.1 and max(ratios["held"]) <= 0.02 * (1 + 1e-5) and max(ratios["held"]) > 0.015
    assert logged(tmp_path / "held")[-1]["n_clamped"] == 6


def test_held_out_losses_compare_runs(checkpoints, media, tmp_path):
    """Files that are held out are never trained on; before the first step the loss is the same whatever the run's seed,
    rank or batch.
    """
    flags = ["--held_out", 0.3, "--eval_every", 2]
    for name, more in (("a", ["--seed", 1]), ("b", ["--seed", 2, "--rank", 2, "--batch", 1, "--shift", 3])):
        train("train_lora", checkpoints["ti2v"], media, tmp_path / name, *flags, *more)
    a, b = (logged(tmp_path / d) for d in "ab")
    assert (
        a[0]["step"] == 0
        and a[0]["val_loss"] == b[0]["val_loss"]
        and a[0]["val_loss_by_t"] == b[0]["val_loss_by_t"]
        and len(a[0]["val_loss_by_t"]) == 4
    )
    assert [r["step"] for r in a if "val_loss" in r] == [0, 2, 4] and a[-1]["val_loss"] != a[0]["val_loss"]
    told = json.loads((tmp_path / "a" / "flags.json").read_text())
    assert told["data"]["held_out"] == 2 and told["data"]["samples"] == 5


def test_no_text_is_cached_for_an_encoder_that_is_trained(checkpoints, media, tmp_path):
    train("train_te", checkpoints["ti2v"], media, tmp_path / "out", "--cache", tmp_path / "cache")
    kinds = {next(iter(load(f)[0])) for f in (tmp_path / "cache").glob("*.safetensors")}
    assert kinds == {"latents"}


def test_cache_only_fills_the_cache_and_leaves(checkpoints, media, tmp_path):
    run = train(
        "train_lora", checkpoints["ti2v"], media, tmp_path / "out", "--cache_only", "--cache", tmp_path / "cache"
    )
    kinds = [next(iter(load(f)[0])) for f in (tmp_path / "cache").glob("*.safetensors")]
    assert (
        kinds.count("latents") == 7
        and kinds.count("embedding") == 5
        and "step 1" not in run.stdout
        and not list((tmp_path / "out").glob("*.safetensors"))
    )
    found = json.loads((tmp_path / "cache" / "data_report.json").read_text())
    assert found["files"] == found["samples"] == 7 and found["skipped"] == [] and found["several captions"] == 0
    assert Image.open(tmp_path / "out" / "data.png").size[0] > 1000


def test_blocks_below_the_first_adapted_one_keep_no_activations(report):
    """A step that adapts the top 2 of 8 blocks holds a quarter of the tensors of one that adapts all: counted, since
    what a process takes for them is its allocator's and its matrix library's affair.
    """
    from lora import inject
    from wan import Wan, WanConfig

    x, t, context = torch.randn(2, 48, 5, 32, 32), torch.full((2,), 500.0), torch.randn(2, 8, 32)
    peak = {}
    for blocks in ([*range(8)], [6, 7]):
        model = Wan(WanConfig("ti2v", 384, 1536, 4, 8, 48, 48, text_dim=32)).eval()
        inject(model, rank=4, blocks=blocks)
        peak[len(blocks)] = memory_estimate.traced(lambda model=model: model(x, t, context).square().mean().backward())
    report(f"of {peak[8] / 1e6:.0f} MB", peak[2] / peak[8], 0.3)


def test_gradients_do_not_depend_on_which_other_blocks_are_adapted(report):
    from lora import inject, lora_layers

    grads = {}
    for blocks in (None, [1, 2]):
        model = tiny.dit("ti2v")
        torch.manual_seed(3)
        inject(model, rank=2, blocks=blocks)
        for name, m in lora_layers(model).items():
            g = torch.Generator().manual_seed(len(name) + int(name.split(".")[1]))
            m.lora_A.data, m.lora_B.data = (
                torch.randn(p.shape, generator=g)
                * (0.1 if p is m.lora_A else (0.0 if name.startswith("blocks.0") else 0.1))
                for p in (m.lora_A, m.lora_B)
            )
        g = torch.Generator().manual_seed(5)
        x, context = torch.randn(1, 48, 3, 4, 4, generator=g), torch.randn(1, 6, tiny.TEXT_DIM, generator=g)
        model(x, torch.tensor([300.0]), context).square().mean().backward()
        grads[blocks and 1] = {n: (m.lora_A.grad, m.lora_B.grad) for n, m in lora_layers(model).items()}
    worst = max(tiny.error(a, b) for n, pair in grads[1].items() for a, b in zip(pair, grads[None][n]))
    report("relative error", worst, 1e-6)


# Six runs of the nano checkpoint and two of a checkpoint of 1 GB: batch, blocks, checkpointing, optimizer and script
# differ.
MANY_TARGETS = "cross_attn.q,cross_attn.k,cross_attn.v,cross_attn.o,ffn.0,ffn.2"
PLANS = [
    ("train_lora", "nano", ["--batch", 64]),
    ("train_te", "nano", ["--batch", 64]),
    *(
        pytest.param(*run, marks=pytest.mark.slow)
        for run in (
            ("train_lora", "nano", ["--batch", 64, "--checkpointing"]),
            ("train_lora", "nano", ["--batch", 128, "--blocks", "3"]),
            ("train_lora", "nano", ["--batch", 16, "--targets", MANY_TARGETS, "--rank", 64]),
            ("train_te", "nano", ["--batch", 16, "--dtype", "bf16", "--optimizer", "adamw8bit"]),
            ("train_lora", "medium", ["--batch", 2]),
            ("train_te", "medium", ["--batch", 2, "--checkpointing"]),
        )
    ),
]


@pytest.fixture(scope="module")
def medium(tmp_path_factory):
    """A TI2V checkpoint whose DiT alone takes 1 GB in fp32."""
    from wan import Wan, WanConfig

    folder = tmp_path_factory.mktemp("medium")
    tiny.checkpoint(folder, "ti2v")
    for f in folder.glob("diffusion*"):
        f.unlink()
    tiny.write_dit(folder, Wan(WanConfig("ti2v", 1024, 4096, 8, 14, 48, 48, text_dim=tiny.TEXT_DIM)))
    assert sum(f.stat().st_size for f in folder.glob("diffusion*.safetensors")) > 0.95e9
    yield folder
    for f in folder.glob("diffusion*.safetensors"):
        f.unlink()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano") / "clips"
    scripts.run("-m", "nano", "clips", "--out", folder, "--n", "130", "--words", "crimson", check=True)
    return folder


@pytest.mark.parametrize("script, size, flags", PLANS)
def test_the_plan_is_within_15_percent_of_the_measured_peak(clips, tmp_path, medium, script, size, flags, report):
    if size == "medium":  # four clips are enough
        (tmp_path / "clips").mkdir()
        for f in sorted(clips.glob("clip_000[0-3].*")):
            (tmp_path / "clips" / f.name).symlink_to(f)
        clips = tmp_path / "clips"
    run = subprocess.run(
        [
            sys.executable,
            ROOT / f"{script}.py",
            "--ckpt",
            "nano" if size == "nano" else medium,
            "--data",
            clips,
            "--out",
            tmp_path / "out",
            "--resolution",
            "64x64" if size == "nano" else "256x256",
            "--frames",
            "9",
            "--steps",
            "3",
            "--device",
            "cpu",
            "--held_out",
            "0",
            *map(str, flags),
        ],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    used, planned = map(float, re.search(r"peak memory ([\d.]+) GB, planned ([\d.]+) GB", run.stdout).groups())
    assert "plan: peak memory" in run.stdout and (size == "nano" or used > 1)
    report(f"planned {planned:.3f} GB, used {used:.3f} GB, error", abs(planned / used - 1), 0.15)


# ---- what a run writes down, and leaves alone ------------------------------------------------------------------------
def train_here(monkeypatch, script, ckpt, media, out, *flags):
    """A training of two steps in this process."""
    words = f"--ckpt {ckpt} --data {media} --out {out} --cache {media.parent}/cache --resolution 64x64 --frames 9"
    words += " --steps 2 --batch 2 --device cpu --dtype fp32"
    monkeypatch.setattr("sys.argv", [script, *words.split(), *map(str, flags)])
    importlib.import_module(script).main()


@pytest.mark.parametrize("script", ["train_lora", "train_te"])
def test_what_is_logged_and_which_flags_are_kept(checkpoints, media, tmp_path, monkeypatch, script):
    monkeypatch.setattr(memory_estimate, "mfu", lambda *args: 0.25)  # as where a device's peak is known
    train_here(monkeypatch, script, checkpoints["ti2v"], media, tmp_path / "out")
    for line in logged(tmp_path / "out"):
        assert line["tokens_per_s"] > 0 and line["mfu"] == 0.25 and line["ms"] > 0 and line["peak_gb"] > 0
    kept = json.loads((tmp_path / "out" / "flags.json").read_text())["flags"]
    assert kept.keys() == vars(importlib.import_module(script).arguments([])).keys()


@pytest.mark.parametrize("script", ["train_lora", "train_te"])
def test_filling_the_cache_ends_what_ranks_share(checkpoints, media, tmp_path, monkeypatch, script):
    """As one rank under torchrun: the process group is closed when the script ends, also with --cache_only."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    for name, value in dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1, MASTER_PORT=port).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    begun, module = [], importlib.import_module(script)

    def world(*args):
        begun.append(World(*args, distributed=True))
        return begun[0]

    monkeypatch.setattr(module, "World", world)
    train_here(monkeypatch, script, checkpoints["ti2v"], media, tmp_path / "out", "--cache_only")
    assert begun[0].distributed and not torch.distributed.is_initialized()


def test_held_out_samples_have_noise_of_their_own(tmp_path):
    """Another one for each, and the same one each time and whatever else is held out."""
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        save(file, {"latents": torch.zeros(4, 2, 4, 4)})  # the velocity's target is then the noise itself
    items = [SimpleNamespace(digest=digest * 20, captions=["x"]) for digest in ("1a", "2b")]

    def targets(*which):
        batches = data.eval_batches([items[i] for i in which], [files[i] for i in which], Samples(None), 3.0, 0.0, 1.0)
        return [batch.target for _, batch in batches]

    both = targets(0, 1)
    assert len(both) == 8 and not any(torch.equal(a, b) for i, a in enumerate(both) for b in both[:i])
    assert all(torch.equal(a, b) for a, b in zip(both[4:], targets(1)))


def test_what_the_guard_has_seen_is_restored():
    """A spike is one after a resume too."""

    def state():
        p = torch.nn.Parameter(torch.ones(3))
        return TrainState([p], torch.optim.AdamW([p]), grad_spike_factor=10)

    old, new = state(), state()
    for _ in range(30):
        assert not old.guard.should_skip(1.0, 2.0)
    assert old.guard.should_skip(1.0, 50.0)
    new.restore(old.state_dict() | {"step": 31, "shards": False})
    assert new.step == 31 and new.guard.skipped == 1
    assert new.guard.should_skip(1.0, 50.0) and not new.guard.should_skip(1.0, 3.0)


def test_how_a_step_is_computed_is_no_part_of_a_state():
    """One that an AdamW wrote which was not fused goes on fused, and the same but for rounding."""
    states = []
    for optimizer in (lambda params: torch.optim.AdamW(params, 1e-3, (0.9, 0.99), weight_decay=0.1, fused=False), None):
        p = torch.nn.Parameter(torch.ones(3))
        states.append(TrainState([p], optimizer([p]) if optimizer else optim.adamw([p], 1e-3, 0.1), 10))
    old, new = states
    for step in range(3):
        if step == 2:
            new.restore(copy.deepcopy(old.state_dict()) | {"step": 2, "shards": False})
        for state in states[: 1 + (step == 2)]:
            state.params[0].grad = torch.tensor([1.0, -2.0, 3.0]) * (step + 1)
            state.opt.step()
    assert new.opt.param_groups[0]["fused"] and not old.opt.param_groups[0]["fused"]
    assert (new.params[0] - old.params[0]).abs().max() < 1e-6


def test_a_run_goes_on_only_from_its_own_base(checkpoints, tmp_path):
    """Told by what its files hold: the other one's have the same names and sizes."""
    shutil.copytree(checkpoints["t2v"], tmp_path / "other")
    file = max((tmp_path / "other" / "low_noise_model").glob("*.safetensors"))
    tensors = load(file)[0]
    name = max(tensors)
    save(file, tensors | {name: tensors[name] + 1})
    args = SimpleNamespace(batch=2, rank=4)
    nothing = SimpleNamespace(files=[], items=[], is_cached=lambda: True, digest=digest)
    same, again, other = (
        resume_fingerprint(args, Pipeline(folder), nothing)
        for folder in (checkpoints["t2v"], checkpoints["t2v"], tmp_path / "other")
    )
    assert same == again and {k for k in same if same[k] != other[k]} == {"base"}
