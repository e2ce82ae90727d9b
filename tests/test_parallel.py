"""Several ranks on one machine: what they learn and make equals one process with the same global batch. Over gloo, or
with TEST_DEVICE=cuda over NCCL.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import scripts

from diagnostics.scaling import bytes_sent
from nanowan.formats.dit import read_config, read_dit
from nanowan.formats.header import load, save
from nanowan.formats.layouts import read_headers, weight_files
from nanowan.formats.t5 import load_t5
from nanowan.memory_estimate import ParallelLayout
from nanowan.parallel import world
from nanowan.settings import NANO

ROOT = Path(__file__).parent.parent
PATHS = f"{ROOT}:{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}"
ENVIRONMENT = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=PATHS)
RESULT = {"train_lora": "adapter_model.safetensors", "train_te": "text_encoder.safetensors"}


def torchrun(n, *command, flags=()):
    """(command line, what subprocess needs) to run a script on n ranks; n = 1 is without torchrun."""
    start = (
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(n),
            "--master_port",
            str(random.Random().randint(20000, 29000)),
            *flags,
        ]
        if n > 1
        else [sys.executable]
    )
    return [*start, *map(str, command)], dict(cwd=ROOT, env=ENVIRONMENT, text=True)


def finished(n, *command, timeout=600, **given):
    """The finished process; the timeout only ends what hangs, as ranks do that wait for one that has died."""
    line, options = torchrun(n, *command, **given)
    return subprocess.run(line, capture_output=True, timeout=timeout, **options)


def smooth_encoder(folder):
    """The file of nano's text encoder with q and k at 1/64; made on the first call.

    Nano's own has attention logits of up to 2300 (T5 does not divide by sqrt(d)), where neighbouring fp32 numbers are
    2e-4 apart. Gradients that were summed over the samples in another order make weights that differ in their last
    bits; those moved the few probabilities that are neither 0 nor 1, and so the gradients of q and k, by 5e-5 of their
    size. With logits below 1 rounding stays rounding. The adapters never had this: the DiT normalizes q and k.
    """
    file = folder / "encoder.safetensors"
    if not file.exists():
        tensors = load_t5(NANO, dtype=torch.float32).state_dict()
        save(file, {k: t / 64 if k.endswith(("attn.q.weight", "attn.k.weight")) else t for k, t in tensors.items()})
    return file


def training(script, media, folder, name, *flags, batch, steps=5, **more):
    encoder = ["--text_encoder", str(smooth_encoder(folder))] if script == "train_te" else []
    return {
        "script": script,
        "sgd": True,
        **more,
        "argv": [
            *f"--data {media} --cache {folder}/cache --out {folder}/{name} --steps {steps} --batch {batch}".split(),
            *"--resolution 96x64 --frames 9 --held_out 0 --caption_dropout 0.3".split(),
            *f"--schedule constant --warmup 0 --shift 1.5 --device {scripts.DEVICE} --dtype fp32".split(),
            *("--lr 1 --grad_clip 0.05 --keywords dog" if script == "train_te" else "--lr 3 --rank 4").split(),
            *encoder,
            *flags,
        ],
    }


def sampling(folder, name, *flags):
    return {
        "script": "sample",
        "argv": [
            *f"--prompt fox --size 96x64 --frames 9 --steps 3 --device {scripts.DEVICE} --dtype fp32".split(),
            *f"--out {folder}/{name}.mp4 --save_latents {folder}/{name}.safetensors".split(),
            *flags,
        ],
    }


# between steps the encoder is run without gradients, with averages in its weights' place, and saved
EVALUATED = ("--held_out", "0.4", "--eval_every", "1", "--ema", "0.5", "--save_every", "2")
# number of processes: {name: job}; every training sees a global batch of 4, of which there are 2 clips and 1 photo
JOBS = {
    1: {
        "lora": ("train_lora", 4),
        "te": ("train_te", 4),
        "dropout": ("train_lora", 4, "--dropout", "0.3"),
        "preserve": ("train_lora", 4, "--preserve", "0.7", "--trigger", "dog"),
        "evaluated": ("train_te", 4, *EVALUATED),
        "video": (),
    },
    2: {
        "lora_data": ("train_lora", 2),
        "lora_fsdp": ("train_lora", 2, "--fsdp"),
        "lora_ulysses": ("train_lora", 4, "--ulysses_size", "2"),
        "lora_pipeline": ("train_lora", 4, "--pipeline_stages", "2"),
        "lora_checkpointing": ("train_lora", 4, "--pipeline_stages", "2", "--checkpointing"),
        "lora_stream": ("train_lora", 2, "--stream_blocks", "3"),
        "lora_bf16": ("train_lora", 2, "--fsdp", "--dtype", "bf16"),
        "dropout_ulysses": ("train_lora", 4, "--ulysses_size", "2", "--dropout", "0.3"),  # one draw for both ranks
        "preserve_fsdp": ("train_lora", 2, "--fsdp", "--preserve", "0.7", "--trigger", "dog"),
        "preserve_pipeline": ("train_lora", 4, "--pipeline_stages", "2", "--preserve", "0.7", "--trigger", "dog"),
        "te_data": ("train_te", 2),
        "te_fsdp": ("train_te", 2, "--fsdp"),
        "te_ulysses": ("train_te", 4, "--ulysses_size", "2"),
        "te_pipeline": ("train_te", 4, "--pipeline_stages", "2"),
        "evaluated_fsdp": ("train_te", 2, "--fsdp", *EVALUATED),
        "video_ulysses": ("--ulysses_size", "2"),
        "video_stream": ("--ulysses_size", "2", "--stream_blocks", "3"),
        "video_guidance": ("--guidance_parallel",),
    },
    4: {
        "lora_data4": ("train_lora", 1),
        "lora_ulysses4": ("train_lora", 4, "--ulysses_size", "4"),
        "lora_fsdp_ulysses": ("train_lora", 2, "--fsdp", "--ulysses_size", "2"),
        "lora_pipelines": ("train_lora", 2, "--pipeline_stages", "2"),
        "te_fsdp_ulysses": ("train_te", 2, "--fsdp", "--ulysses_size", "2"),
        "lora_fp8": ("train_lora", 1, "--fsdp", "--base_dtype", "fp8"),
        "video4": ("--ulysses_size", "4"),
        "video_both": ("--ulysses_size", "2", "--guidance_parallel"),
    },
}


def job(media, folder, name, what):
    if name.startswith("video"):
        return sampling(folder, name, *what)
    script, batch, *flags = what
    return training(script, media, folder, name, *flags, batch=batch)


def run_jobs(n, folder, jobs):
    (folder / f"jobs{n}.json").write_text(json.dumps(jobs))
    scripts.run(ROOT / "tests" / "helpers" / "ranks.py", folder / f"jobs{n}.json", ranks=n, check=True)


@pytest.fixture(scope="module")
def runs(media, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    for n, jobs in JOBS.items():
        run_jobs(n, folder, [job(media, folder, name, what) for name, what in jobs.items()])
    return folder


def log(folder):
    return [json.loads(line) for line in open(folder / "log.jsonl")]


def difference(a, b, script):
    """Worst relative difference of losses and gradient norms, and of the resulting tensors. A step of preserved samples
    alone has a loss of rounding, below 1e-10, and gradients below 1e-7; others are above 1e-4.
    """
    lines = zip(log(a), log(b), strict=True)
    pairs = [(x[k], y[k]) for x, y in lines for k in ("loss", "grad_norm", "val_loss") if k in x]
    x, y = (load(d / RESULT[script])[0] for d in (a, b))
    assert x.keys() == y.keys()
    return max(abs(u - v) / max(abs(u), 1e-4) for u, v in pairs), max(
        ((x[k].float() - y[k].float()).norm() / x[k].float().norm().clamp(min=1e-9)).item() for k in x
    )


@pytest.mark.parametrize(
    "name",
    [
        name
        for n in (2, 4)
        for name in JOBS[n]
        if not name.startswith("video") and "fp8" not in name and "bf16" not in name
    ],
)
def test_training_equals_one_process(runs, report, name):
    one = name.split("_")[0].rstrip("4")
    script = JOBS[1][one][0]
    losses, weights = difference(runs / one, runs / name, script)
    # of the encoder, through whose attention rounding grows (smooth_encoder), up to 1.1e-5 was seen
    report("losses and gradients", losses, 2e-5 if script == "train_te" else 1e-5)
    report("weights", weights, 1e-5)


def test_shards_in_bf16(runs, report):
    report("losses and gradients", difference(runs / "lora", runs / "lora_bf16", "train_lora")[0], 5e-2)


SUM = """
import torch
from nanowan.parallel import World, full_tensor, shard

with World("cpu", fsdp=True) as world:
    linear = torch.nn.Linear(2, 3, bias=False)
    shard(linear, world, dtype=torch.bfloat16)
    linear(torch.tensor([[1.0, 2.0**-9][world.rank]]).repeat(1, 2)).sum().backward()
    gradient = full_tensor(linear.weight.grad)
    assert gradient.dtype == torch.float32 and (gradient == 1 + 2.0**-9).all(), gradient
"""


def test_gradients_of_bf16_shards_are_summed_in_fp32():
    """1 and 2^-9: bf16 would lose the smaller."""
    scripts.run("sum", code=SUM, ranks=2, check=True)


def test_the_frozen_dit_is_sharded_in_both(runs):
    """train_te gathers the DiT's blocks as train_lora does, and the encoder's besides."""
    lora, te = (json.loads((runs / f"{name}_fsdp" / "sent.json").read_text())["weights"] for name in ("lora", "te"))
    encoder = sum(
        5 * 2 * e.nbytes // 2
        for f in weight_files(NANO / "models_t5_umt5-xxl-enc-bf16.pth")
        for e in read_headers([f]).values()
    )
    assert te > lora + 0.8 * encoder


def test_a_seed_at_random_is_one_for_all(tmp_path):
    two = sampling(tmp_path, "two", "--guidance_parallel", "--seed", "-1")["argv"]
    done = scripts.run(ROOT / "sample.py", *two, ranks=2, check=True)
    seed = json.loads(next(text for text in done.stdout.splitlines() if text.startswith("{")))["seed"]
    scripts.run(ROOT / "sample.py", *sampling(tmp_path, "one", "--seed", str(seed))["argv"], check=True)
    a, b = (load(tmp_path / f"{name}.safetensors")[0]["latents"] for name in ("one", "two"))
    assert (a - b).norm() < 1e-5 * a.norm()


def test_something_was_learned(runs):
    """Else nothing above could fail."""
    for name in ("lora", "te"):
        losses = [line["grad_norm"] for line in log(runs / name)]
        assert len(losses) == 5 and min(losses) > 1e-4
    before, after = load(smooth_encoder(runs))[0], load(runs / "te" / RESULT["train_te"])[0]
    change = {k: (after[k] - before[k]).norm() / after[k].norm() for k in after}
    assert change["blocks.0.attn.v.weight"] > 1e-3 and change["blocks.0.attn.q.weight"] > 5e-3
    rows = (after["token_embedding.weight"] - before["token_embedding.weight"]).norm(dim=1)
    assert 0 < (rows > 0).sum() < 10 and rows.max() > 1e-2  # those of the keyword
    assert min(t.norm() for k, t in load(runs / "lora" / RESULT["train_lora"])[0].items() if "lora_B" in k) > 1e-3


@pytest.mark.parametrize("name", [name for n in (2, 4) for name in JOBS[n] if name.startswith("video")])
def test_sampling_equals_one_process(runs, report, name):
    a, b = (load(runs / f"{n}.safetensors")[0]["latents"] for n in ("video", name))
    report("latents", ((a - b).norm() / a.norm()).item(), 1e-5)
    assert (runs / f"{name}.mp4").stat().st_size > 500


def test_the_library_on_ranks(tmp_path, report):
    """Two prompts in a batch, whose tokens divide by no number of ranks, and a decode of which each rank does some
    windows.
    """
    cases = {
        1: [("one", {})],
        2: [("ulysses", {"ulysses_size": 2}), ("guidance", {"cfg_parallel": True})],
        4: [("both", {"ulysses_size": 2, "cfg_parallel": True}), ("four", {"ulysses_size": 4})],
    }
    for n, jobs in cases.items():
        run_jobs(
            n,
            tmp_path,
            [
                {"script": "library", "argv": [str(tmp_path / f"{name}.safetensors")], "ranks": ranks}
                for name, ranks in jobs
            ],
        )
    want = load(tmp_path / "one.safetensors")[0]
    for name in ("ulysses", "guidance", "both", "four"):
        for what, t in load(tmp_path / f"{name}.safetensors")[0].items():
            report(f"{name}, {what}", ((t - want[what]).norm() / want[what].norm()).item(), 1e-5)


def test_any_tokens_on_ranks(tmp_path, report):
    """Ulysses takes whatever tokens a model has: outputs and gradients."""
    for n in (1, 2, 4):
        job = {"script": "tokens", "argv": [str(tmp_path / f"{n}.safetensors")], "ranks": {"ulysses_size": n}}
        run_jobs(n, tmp_path, [job])
    want = load(tmp_path / "1.safetensors")[0]
    for n in (2, 4):
        for what, t in load(tmp_path / f"{n}.safetensors")[0].items():
            report(f"{n} ranks, {what}", ((t - want[what]).norm() / want[what].norm()).item(), 1e-5)


def test_both_experts(checkpoints, media, tmp_path, report):
    """An A14B's experts in turns, with AdamW: a step on one must leave the other's adapter, and its moments, alone on
    every rank. AdamW divides gradients by their size, which carries the rounding of those near zero into the weights.
    """
    flags = ["--ckpt", str(checkpoints["t2v"]), "--steps_per_expert", "1", "--lr", "1e-3", "--resolution", "64x64"]
    run_jobs(1, tmp_path, [training("train_lora", media, tmp_path, "one", *flags, batch=2, sgd=False)])
    run_jobs(2, tmp_path, [training("train_lora", media, tmp_path, "two", *flags, batch=1, sgd=False)])
    for expert in ("high", "low"):
        a, b = (load(tmp_path / name / f"adapter_model_{expert}.safetensors")[0] for name in ("one", "two"))
        report(expert, max(((a[k] - b[k]).norm() / a[k].norm()).item() for k in a), 1e-4)


def test_loras_and_a_shared_host_copy(runs, tmp_path, report):
    """The second rank, which reads no weights, has the first one's merged ones; in 8 bits, it holds the adapter beside
    them.
    """
    flags = ["--lora", f"{runs / 'lora' / RESULT['train_lora']}:300", "--stream_blocks", "3"]
    cases = {"merged": flags, "beside": [*flags, "--base_dtype", "fp8"]}
    run_jobs(1, tmp_path, [sampling(tmp_path, f"{name}1", *flags) for name, flags in cases.items()])
    run_jobs(
        2, tmp_path, [sampling(tmp_path, f"{name}2", *flags, "--ulysses_size", "2") for name, flags in cases.items()]
    )
    plain = load(runs / "video.safetensors")[0]["latents"]
    for name in cases:
        a, b = (load(tmp_path / f"{name}{n}.safetensors")[0]["latents"] for n in (1, 2))
        report(name, ((a - b).norm() / a.norm()).item(), 1e-5)
        assert (a - plain).norm() > 1e-2 * a.norm()


def test_fp8_and_shards(media, runs, report):
    """8-bit weights, sharded over four, against 8-bit weights in one process."""
    folder = runs / "fp8"
    folder.mkdir()
    run_jobs(1, folder, [training("train_lora", media, folder, "lora", "--base_dtype", "fp8", batch=4)])
    report("losses", difference(folder / "lora", runs / "lora_fp8", "train_lora")[0], 1e-5)


def test_broken_on_purpose(media, runs, tmp_path):
    """Each of the equalities above is lost when what it stands on is taken away."""
    cases = {
        "no_sum": ("train_lora", 2),
        "no_positions": ("train_lora", 4, "--ulysses_size", "2"),
        "mean_gradients": ("train_te", 2, "--fsdp"),
        "equal_weights": ("train_lora", 4, "--pipeline_stages", "2"),
    }
    run_jobs(2, tmp_path, [{**job(media, tmp_path, name, what), "broken": name} for name, what in cases.items()])
    for name, (script, *_) in cases.items():
        assert max(difference(runs / ("lora" if script == "train_lora" else "te"), tmp_path / name, script)) > 1e-3


def test_gradients_are_summed_in_pieces(monkeypatch):
    """What is summed at once is no copy of all gradients."""
    sizes = []
    monkeypatch.setattr(dist, "all_reduce", lambda t: sizes.append(t.numel()) or t.mul_(2))
    monkeypatch.setattr(world, "BUCKET", 32)
    ranks = world.World("cpu", distributed=False)
    ranks.distributed = True  # of two alike
    params = [torch.nn.Parameter(torch.zeros(n, 3)) for n in (1, 2, 90, 5, 5, 5, 1)]
    for p in params:
        p.grad = torch.randn(p.shape)
    before = [p.grad.clone() for p in params]
    assert ranks.all_reduce_grads(params, 3.0) == [6.0]
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(params, before))
    assert sizes == [1, 279, 45, 3] and ranks.sent["gradients"] == 4 * 327


def test_bytes_sent(media, tmp_path, report):
    """What bytes_sent says of a step, against the bytes counted while it ran."""
    folder = tmp_path / "one"
    folder.mkdir()
    for end in (".mp4", ".txt"):
        shutil.copy(media / f"a{end}", folder / f"a{end}")
    cases = {
        "data": (ParallelLayout(), 1, ()),
        "fsdp": (ParallelLayout(fsdp_size=2), 1, ("--fsdp",)),
        "ulysses": (ParallelLayout(sp_size=2), 2, ("--ulysses_size", "2")),
        "checkpointing": (ParallelLayout(sp_size=2), 2, ("--ulysses_size", "2", "--checkpointing")),
        "pipeline": (ParallelLayout(pp_size=2), 2, ("--pipeline_stages", "2")),
    }
    run_jobs(
        2,
        tmp_path,
        [
            training("train_lora", folder, tmp_path, name, *flags, batch=batch, steps=1)
            for name, (_, batch, flags) in cases.items()
        ],
    )
    adapter = sum(t.nbytes for t in load(tmp_path / "data" / RESULT["train_lora"])[0].values())
    config = read_config(NANO, read_dit(NANO))
    for name, (layout, _, flags) in cases.items():
        counted = json.loads((tmp_path / name / "sent.json").read_text())
        told = bytes_sent(config, layout, (3, 2, 3), 1, adapter, 4, "--checkpointing" in flags)
        assert counted.keys() == told.keys()
        for kind in told:  # a block has small tensors too: biases, norms, modulation
            report(
                f"{name}, {kind}: {counted[kind]:,} bytes",
                abs(counted[kind] / told[kind] - 1),
                0.02 if kind == "weights" else 1e-12,
            )


# ---- checkpoints -------------------------------------------------------------------------------------------------
def test_save_on_4_resume_on_1_and_2(media, tmp_path, report):
    """States to the bit, and the same losses from there on: the encoder's shards, and adapters, with averages."""

    def cut(script, name, steps, batch, *flags):
        name = f"{script}_{name}"
        return training(
            script,
            media,
            tmp_path,
            name,
            "--lr",
            "1e-3",
            "--ema",
            "0.9",
            *flags,
            batch=batch,
            steps=steps,
            sgd=False,
            dump=str(tmp_path / name),
        )

    both = ("train_te", "train_lora")
    run_jobs(
        4,
        tmp_path,
        [cut(script, name, steps, 1, "--fsdp") for script in both for name, steps in (("whole", 5), ("a", 3))],
    )
    for script in both:
        subprocess.run(["cp", "-r", tmp_path / f"{script}_a", tmp_path / f"{script}_b"], check=True)
    assert (tmp_path / "train_te_b" / "checkpoints" / "step_000003.shards").is_dir()
    run_jobs(1, tmp_path, [cut(script, "a", 5, 4, "--resume") for script in both])
    run_jobs(2, tmp_path, [cut(script, "b", 5, 2, "--resume", "--fsdp") for script in both])
    for script in both:
        saved = torch.load(tmp_path / f"{script}_a_saved_3.pt")
        for name in "ab":
            restored = torch.load(tmp_path / f"{script}_{name}_restored_3.pt")
            assert (
                saved.keys() == restored.keys()
                and len(saved) > 10
                and all(torch.equal(saved[k], restored[k]) for k in saved)
            )
            losses = [
                abs(x["loss"] - y["loss"]) / x["loss"]
                for x, y in zip(log(tmp_path / f"{script}_whole"), log(tmp_path / f"{script}_{name}"), strict=True)
            ]
            report(f"losses after resuming ({script}, {name})", max(losses), 1e-6)


# ---- failures ----------------------------------------------------------------------------------------------------
DIES = """
import os, signal, sys
sys.path.insert(0, {root!r})
import {script} as script
right = script.World.all_reduce_grads
def summed(self, *args):
    summed.calls += 1
    if int(os.environ["RANK"]) == {rank} and summed.calls == {step} and {when}:
        {how}
    return right(self, *args)
summed.calls = 0
script.World.all_reduce_grads = summed
sys.argv[0] = {script!r}
script.cli(script.main)
"""


def dying(tmp_path, how, step, rank=1, script="train_lora", when="True"):
    file = tmp_path / f"dies_{random.Random().getrandbits(40)}.py"
    file.write_text(DIES.format(root=str(ROOT), script=script, rank=rank, step=step, how=how, when=when))
    return file


def argv(media, tmp_path, name, *flags, steps=8):
    return training(
        "train_lora", media, tmp_path, name, "--lr", "1e-3", "--save_every", "1", *flags, batch=2, steps=steps
    )["argv"]


@pytest.mark.slow
@pytest.mark.parametrize("kills", [10])
def test_kills_of_a_rank(media, tmp_path, kills):
    script, steps = ROOT / "train_lora.py", 3 * kills
    scripts.run(script, *argv(media, tmp_path, "whole", steps=steps), ranks=2, check=True)
    rng = random.Random(0)
    for kill in range(kills):
        killed = dying(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)", rng.randint(1, 2), rank=rng.randint(0, 1))
        done = finished(2, killed, *argv(media, tmp_path, "cut", *["--resume"] * (kill > 0), steps=steps))
        assert done.returncode
        assert "SIGKILL" in done.stderr or "Signal 9" in done.stderr
        assert (
            done.stderr.count("another rank has ended") <= 1 and done.stderr.count("Traceback") <= 1
        )  # torchrun's own
    scripts.run(script, *argv(media, tmp_path, "cut", "--resume", steps=steps), ranks=2, check=True)
    a, b = (load(tmp_path / n / RESULT["train_lora"])[0] for n in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert [line["loss"] for line in log(tmp_path / "whole")] == [line["loss"] for line in log(tmp_path / "cut")]


def test_restarts_resume(media, tmp_path):
    file = dying(
        tmp_path, "os.kill(os.getpid(), signal.SIGKILL)", 4, when="os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'"
    )
    done = finished(2, file, *argv(media, tmp_path, "run"), flags=["--max-restarts", "1"])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resumed at step 3" in done.stdout and [line["step"] for line in log(tmp_path / "run")] == list(range(1, 9))
    done = finished(2, ROOT / "train_lora.py", *argv(media, tmp_path, "run"))
    assert done.returncode and done.stderr.count("holds a run already") == 1


def test_bad_files_are_left_out_alike(media, tmp_path):
    """Every rank trains on what the first one found; what it did not take is said once."""
    bad = shutil.copytree(media, tmp_path / "data")
    for name, content in (
        ("broken.mp4", b"no clip"),
        ("short.png", (media / "c.png").read_bytes()[:40]),
        ("unnamed.png", b""),
    ):
        (bad / name).write_bytes(content)
        (bad / name).with_suffix(".txt").write_text("a red square")
    for name, folder in (("good", media), ("bad", bad)):
        done = scripts.run(ROOT / "train_lora.py", *argv(folder, tmp_path, name, steps=2), ranks=2, check=True)
    assert all(done.stdout.count(f"skipped {bad / name}:") == 1 for name in ("broken.mp4", "short.png", "unnamed.png"))
    assert [line["loss"] for line in log(tmp_path / "good")] == [line["loss"] for line in log(tmp_path / "bad")]


def test_an_error_is_shown_once(media, tmp_path):
    done = finished(2, dying(tmp_path, "raise script.BadInput('clip 7 is gone')", 2), *argv(media, tmp_path, "run"))
    assert done.returncode and done.stderr.count("error: rank 1: clip 7 is gone") == 1


def test_sigterm_saves_and_leaves(media, tmp_path):
    command, options = torchrun(
        2, ROOT / "train_lora.py", *argv(media, tmp_path, "run", "--save_every", 1000, "--log_every", 1, steps=100000)
    )
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGTERM)
            break
    process.stdout.read()
    process.wait()
    saved = sorted((tmp_path / "run" / "checkpoints").glob("step_*.pt"))
    assert len(saved) == 1 and int(re.search(r"\d+", saved[0].name)[0]) == log(tmp_path / "run")[-1]["step"] >= 3


@pytest.mark.parametrize(
    "flags,why",
    [
        (["--ulysses_size", "2"], "start torchrun with --nproc_per_node 2"),
        (["--pipeline_stages", "0"], "--pipeline_stages 0"),
    ],
)
def test_flags_that_need_torchrun(media, tmp_path, flags, why):
    done = scripts.run(ROOT / "train_lora.py", *argv(media, tmp_path, "run", *flags))
    assert done.returncode == 1 and why in done.stderr and "Traceback" not in done.stderr
