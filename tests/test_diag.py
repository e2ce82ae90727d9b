"""diag.py inspect: tiny checkpoints, LoRA files, videos, and full-size headers."""

import json
import math
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from test_lora import trained

from checkpoint import BadInput
from diagnostics.inspect import inspect
from lora import TARGETS, save_lora
from media import write_mp4
from wan import VARIANTS, Wan, full_config

ROOT = Path(__file__).parent.parent


def write_header(file, tensors, kind="F32"):
    """A safetensors file of the right size in which only the header was ever written (the rest is a hole)."""
    header, at, size = {}, 0, {"F32": 4, "BF16": 2}[kind]
    for name, t in tensors.items():
        header[name] = {"dtype": kind, "shape": list(t.shape), "data_offsets": [at, at + t.numel() * size]}
        at += t.numel() * size
    raw = json.dumps(header).encode()
    with open(file, "wb") as f:
        f.write(len(raw).to_bytes(8, "little") + raw)
        f.truncate(8 + len(raw) + at)


def full_size(folder, variant, shards=3, kind="F32"):
    with torch.device("meta"):
        state = list(Wan(full_config(variant)).state_dict().items())
    row = VARIANTS[variant]
    config = {k: row[k] for k in ("model_type", "dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim")}
    for sub in ("high_noise_model", "low_noise_model") if row["boundary"] else (".",):
        (folder / sub).mkdir(parents=True, exist_ok=True)
        (folder / sub / "config.json").write_text(
            json.dumps({"_class_name": "WanModel", "eps": 1e-6, "freq_dim": 256, "text_len": 512, **config})
        )
        weight_map = {}
        for i in range(shards):
            name = f"diffusion_pytorch_model-{i + 1:05d}-of-{shards:05d}.safetensors"
            write_header(folder / sub / name, dict(state[i::shards]), kind)
            weight_map |= {k: name for k, _ in state[i::shards]}
        (folder / sub / "diffusion_pytorch_model.safetensors.index.json").write_text(
            json.dumps({"weight_map": weight_map})
        )
    return folder


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return {v: full_size(tmp_path_factory.mktemp(v), v) for v in VARIANTS}


def test_full_size_headers_are_fast_and_small(released, tmp_path, report):
    """5B and both experts of both A14B models, in one process: time and peak memory."""
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import diag; diag.main(); import re\n"
        "print('PEAK', re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    began = time.time()
    run = subprocess.run(
        [sys.executable, "-c", code, ROOT, "inspect", *released.values(), "--json", tmp_path / "found.json"],
        capture_output=True,
        text=True,
    )
    seconds = time.time() - began
    assert run.returncode == 0, run.stderr
    report("seconds", seconds, 5.0)
    report("peak bytes", int(re.search(r"PEAK (\d+)", run.stdout)[1]) * 1024, 600e6)
    found = json.loads((tmp_path / "found.json").read_text())["models"]
    assert [m["variant"] for m in found] == ["ti2v-5B", "t2v-A14B", "t2v-A14B", "i2v-A14B", "i2v-A14B"]


def test_the_numbers_of_5b(released):
    (m,) = inspect(released["ti2v-5B"])
    want = {
        "kind": "dit",
        "variant": "ti2v-5B",
        "width": 3072,
        "layers": 30,
        "heads": 24,
        "head_dim": 128,
        "ffn": 14336,
        "in_channels": 48,
        "out_channels": 48,
        "text_len": 512,
        "parameters": 4_999_787_712,
        "tensors": 825,
        "dtype": "float32",
        "bytes": 4 * 4_999_787_712,
        "experts": [],
        "image_conditioning_keys": False,
        "blocks_with": {t: 30 for t in TARGETS},
    }
    assert {k: m[k] for k in want} == want
    assert "single-tower" in m["summary"] and "TI2V" in m["summary"] and "no image-conditioning keys" in m["summary"]
    rows = {(r["targets"], r["rank"]): (r["matrices"], r["parameters"], r["mib_bf16"]) for r in m["lora_budget"]}
    assert rows["cross_attn.{k,v}", 16] == (60, 5_898_240, 11.25)
    assert rows["cross_attn.{q,k,v,o}", 16] == (120, 11_796_480, 22.5)
    assert rows["self_attn and cross_attn", 16] == (240, 23_592_960, 45.0)


def test_experts_are_told_apart(released):
    high, low = inspect(released["i2v-A14B"])
    assert (
        high["experts"] == ["high_noise_model", "low_noise_model"]
        and high["path"].endswith("high_noise_model")
        and low["path"].endswith("low_noise_model")
    )
    assert (high["in_channels"], high["out_channels"], high["parameters"]) == (36, 16, 14_288_901_184)


def test_a_checkpoint_folder_lists_all_its_models(checkpoints):
    kinds = {m["kind"]: m for m in inspect(checkpoints["t2v"])}
    assert (
        set(kinds) == {"dit", "text_encoder", "vae"}
        and kinds["dit"]["variant"] is None
        and kinds["vae"]["variant"] == "2.1"
    )
    assert kinds["text_encoder"]["layers"] == 2 and kinds["text_encoder"]["heads"] == 3


def test_prefixes_are_stripped(tmp_path):
    from safetensors.torch import save_file

    model = tiny.dit("ti2v", dim=128, heads=1)
    save_file(
        {f"model.diffusion_model._orig_mod.{k}": v.half() for k, v in model.state_dict().items()},
        tmp_path / "m.safetensors",
    )
    (m,) = inspect(tmp_path / "m.safetensors")
    assert (m["kind"], m["model_type"], m["layers"], m["dtype"]) == ("dit", "ti2v", 3, "float16")


def test_lora_and_video_files(tmp_path):
    save_lora(tmp_path / "a.safetensors", trained(blocks=[1, 2]), variant="ti2v-5B")
    (m,) = inspect(tmp_path / "a.safetensors")
    assert (m["kind"], m["ranks"], m["blocks"], m["matrices"]) == ("lora", {4: 4}, [1, 2], 4) and m["metadata"][
        "variant"
    ] == "ti2v-5B"
    write_mp4(tmp_path / "v.mp4", torch.zeros(3, 5, 32, 64), 16, json.dumps({"prompt": "一只猫", "seed": 3}))
    (m,) = inspect(tmp_path / "v.mp4")
    assert (m["kind"], m["width"], m["height"], m["frames"], m["fps"], m["settings"]) == (
        "video",
        64,
        32,
        5,
        16.0,
        {"prompt": "一只猫", "seed": 3},
    )


def test_what_cannot_be_inspected(tmp_path):
    with pytest.raises(BadInput, match="no such file"):
        inspect(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="holds no weights"):
        inspect(tmp_path)
    write_mp4(tmp_path / "n.mp4", torch.zeros(3, 1, 32, 32), 8, "null")
    assert inspect(tmp_path / "n.mp4")[0]["settings"] == {}
    (tmp_path / "v.mp4").write_text("<html>")
    with pytest.raises(BadInput, match="not a readable video"):
        inspect(tmp_path / "v.mp4")


def test_one_bad_path_does_not_hide_the_others(checkpoints, tmp_path):
    (tmp_path / "page.safetensors").write_text("<html>")
    run = subprocess.run(
        [
            sys.executable,
            ROOT / "diag.py",
            "inspect",
            tmp_path / "page.safetensors",
            checkpoints["ti2v"],
            "--json",
            tmp_path / "f.json",
        ],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1 and "1 of 2 paths" in run.stderr and "Traceback" not in run.stderr
    assert [m["kind"] for m in json.loads((tmp_path / "f.json").read_text())["models"]] == [
        "unreadable",
        "dit",
        "text_encoder",
        "vae",
    ]


def test_a_missing_expert_and_a_results_folder(checkpoints, tmp_path):
    shutil.copytree(checkpoints["t2v"], tmp_path / "c")
    shutil.rmtree(tmp_path / "c" / "low_noise_model")
    assert "low_noise_model is missing" in inspect(tmp_path / "c")[0]["summary"]
    (tmp_path / "out").mkdir()
    save_lora(tmp_path / "out" / "adapter_model.safetensors", trained())
    assert [m["kind"] for m in inspect(tmp_path / "out")] == ["lora"]


@pytest.mark.parametrize("rank", [1, 4])
def test_delta_equals_brute_force(tmp_path, checkpoints, rank, report):
    from diagnostics.delta import delta, relative_norm
    from lora import merge
    from wan import load_wan

    save_lora(tmp_path / "a.safetensors", trained(TARGETS, rank=rank))
    rows = delta(tmp_path / "a.safetensors", checkpoints["ti2v"])
    base, moved = (load_wan(checkpoints["ti2v"], dtype=torch.float32) for _ in range(2))
    merge(moved, tmp_path / "a.safetensors")
    base, moved = dict(base.named_parameters()), dict(moved.named_parameters())
    assert len(rows) == 30
    worst, every = 0, []
    for r in rows:
        w = base[r["name"] + ".weight"].double()
        d = moved[r["name"] + ".weight"].double() - w
        s = torch.linalg.svdvals(d)[:rank]
        p = s / s.sum()
        for got, want in (
            (r["norm"], d.norm()),
            (r["base"], w.norm()),
            (r["ratio"], d.norm() / w.norm()),
            (r["spectral"], s[0]),
            (r["rank"], (-(p * p.log()).sum()).exp()),
        ):
            worst = max(worst, abs(got / want.item() - 1))
        every.append((d.flatten(), w.flatten()))
    report("relative error", worst, 1e-5)
    d, w = (torch.cat(u).norm().item() for u in zip(*every))
    report("of all together", abs(relative_norm(rows) / (d / w) - 1), 1e-5)


def test_a_capped_lora_stays_under_its_cap(tmp_path, checkpoints):
    from diagnostics.delta import cap_lora, delta

    save_lora(tmp_path / "a.safetensors", trained())
    rows = delta(tmp_path / "a.safetensors", checkpoints["ti2v"])
    cap = sorted(r["ratio"] for r in rows)[2]
    assert cap_lora(tmp_path / "a.safetensors", rows, cap, tmp_path / "b.safetensors") == 3
    after = delta(tmp_path / "b.safetensors", checkpoints["ti2v"])
    for old, new in zip(rows, after):
        assert abs(new["ratio"] / min(old["ratio"], cap) - 1) < 1e-5


def test_delta_refuses_what_does_not_fit(tmp_path, checkpoints):
    from diagnostics.delta import delta

    save_lora(tmp_path / "a.safetensors", trained())
    with pytest.raises(BadInput, match="does not fit"):
        delta(tmp_path / "a.safetensors", ROOT / "nano")


def test_delta_between_two_checkpoints_and_two_encoders(tmp_path, checkpoints, report):
    from types import SimpleNamespace

    from checkpoint import save
    from diagnostics.delta import delta
    from t5 import load_t5

    model, encoder = tiny.dit("ti2v"), load_t5(checkpoints["ti2v"], dtype=torch.float32)
    w = model.blocks[1].ffn[0].weight
    d = torch.randn(w.shape, generator=torch.Generator().manual_seed(1)) * 0.01
    base = w.clone()
    w += d
    (tmp_path / "moved").mkdir()
    save(tmp_path / "moved" / "diffusion_pytorch_model.safetensors", model.state_dict())
    rows = {r["name"]: r for r in delta(tmp_path / "moved", checkpoints["ti2v"])}
    r = rows.pop("blocks.1.ffn.0")
    d = (base + d) - base
    for got, want in ((r["norm"], d.norm()), (r["ratio"], d.norm() / base.norm())):
        report("relative error", abs(got / want.item() - 1), 1e-5)
    report("spectral norm by power iteration", abs(r["spectral"] / torch.linalg.matrix_norm(d, 2).item() - 1), 2e-2)
    assert (r["block"], r["kind"]) == (1, "ffn.0") and len(rows) > 30 and all(o["ratio"] == 0 for o in rows.values())

    table, ids = encoder.token_embedding.weight, torch.tensor([5, 9])
    moved = table[ids] * 1.5
    save(tmp_path / "te.safetensors", {"token_embedding.rows": moved, "token_embedding.ids": ids}, {"delta": True})
    (r,) = delta(tmp_path / "te.safetensors", checkpoints["ti2v"] / "models_t5_umt5-xxl-enc-bf16.pth")
    report("of two rows", abs(r["ratio"] / (0.5 * table[ids].norm() / table.norm()).item() - 1), 1e-5)
    run_delta(
        SimpleNamespace(
            lora=tmp_path / "te.safetensors", ckpt=checkpoints["ti2v"], cap=None, out=None, json=tmp_path / "d.json"
        )
    )
    assert len(json.loads((tmp_path / "d.json").read_text())["rows"]) == 1


@pytest.mark.parametrize("masked", [False, True])
def test_attention_stats_equal_brute_force(masked, report):
    """Against the softmax of one query and head at a time, in float64."""
    from diagnostics.logits import attention_stats

    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 11, 3, 8, generator=g), torch.randn(2, 7, 3, 8, generator=g)
    bias = torch.zeros(2, 1, 1, 7)
    if masked:
        bias[0, ..., 5:], bias[1, ..., 4] = -torch.inf, -torch.inf
        bias[:, ..., 3] = 5.0  # a key that stands for many
    got = attention_stats(q, k, bias if masked else None, chunk=4)
    for head in range(3):
        seen, entropy = [], []
        for b in range(2):
            for i in range(11):
                logits = (k[b, :, head].double() @ q[b, i, head].double()) / 8**0.5
                seen += [x for x, c in zip(logits.tolist(), bias[b, 0, 0].tolist()) if c == 0]
                p = torch.softmax(logits + bias[b, 0, 0].double(), 0)
                entropy.append(-sum(x * math.log(x) for x in p.tolist() if x))
        want = (statistics.pstdev(seen), max(seen), statistics.mean(entropy))
        report("relative error", max(abs(a / b - 1) for a, b in zip(got[head].tolist(), want)), 1e-5)


def test_logits_see_a_change_where_it_is_and_nowhere_before(tmp_path, checkpoints):
    from test_data import clip

    from diagnostics.logits import logits

    clip(tmp_path / "d" / "a.mp4", 24, 64, 64) if (tmp_path / "d").mkdir() is None else None
    save_lora(tmp_path / "k.safetensors", trained(["cross_attn.k"], blocks=[1]))
    seen = logits(
        checkpoints["ti2v"], [str(tmp_path / "k.safetensors")], n=1, data=tmp_path / "d", resolution="64x64", frames=9
    )["dit"]
    moved = {(r["block"], r["kind"]) for r in seen if r["drift"] > 1e-5}
    assert len(seen) == 3 * 2 * 2 and (1, "cross_attn") in moved and (2, "self_attn") in moved
    assert not {(0, "self_attn"), (0, "cross_attn"), (1, "self_attn")} & moved
    run = lambda *flags: subprocess.run(
        [
            sys.executable,
            ROOT / "diag.py",
            "logits",
            "--ckpt",
            checkpoints["ti2v"],
            "--lora",
            tmp_path / "k.safetensors",
            "--data",
            tmp_path / "d",
            "--resolution",
            "64x64",
            "--frames",
            "9",
            "--n",
            "1",
            "--ci",
            "--device",
            "cpu",
            *flags,
        ],
        capture_output=True,
        text=True,
    )
    worst = max(r["drift"] for r in seen)
    assert run("--threshold", str(worst * 1.01)).returncode == 0
    drifted = run("--threshold", str(worst * 0.99), "--json", tmp_path / "l.json")
    assert (
        drifted.returncode == 1
        and "drift by more than --threshold" in drifted.stderr
        and "<-- drifts" in drifted.stdout
    )
    assert json.loads((tmp_path / "l.json").read_text())["dit"] == seen


def test_drift_of_an_encoder(tmp_path, checkpoints, report):
    from diagnostics.drift import drift
    from t5 import load_t5

    old, new = (load_t5(checkpoints["ti2v"], dtype=torch.float32) for _ in range(2))
    still = drift(old, new, ["a red square", "a dog"], ["fox"])
    assert all(abs(t["cosine"] - 1) < 1e-6 and t["norm"] == 1 for r in still["prompts"] for t in r["tokens"])
    new.token_embedding.weight[new.tokenizer.ids("fox")] = 1.5 * new.token_embedding.weight[
        new.tokenizer.ids("dog")
    ].mean(0)
    found = drift(old, new, ["a red fox", "a dog"], ["fox"])
    a, b = (e.encode(["a red fox"])[0][0] for e in (old, new))
    want = [(x @ y / x.norm() / y.norm()).item() for x, y in zip(a, b)]
    report("cosine", max(abs(t["cosine"] - w) for t, w in zip(found["prompts"][0]["tokens"], want)), 1e-6)
    report(
        "norm",
        max(abs(t["norm"] - (y.norm() / x.norm()).item()) for t, x, y in zip(found["prompts"][0]["tokens"], a, b)),
        1e-6,
    )
    assert found["prompts"][0]["cosine"] < 0.999 and len(found["prompts"][0]["tokens"]) == len(a)
    before, after = found["keywords"]["fox"]
    mean = lambda e, w: e.encode([w])[0][0].mean(0)
    cosine = torch.nn.functional.cosine_similarity
    assert {w for w, _ in after} == {"a", "red", "dog"} and after[0][1] >= after[1][1] and dict(before) != dict(after)
    report("neighbour", abs(dict(after)["dog"] - cosine(mean(new, "dog"), mean(new, "fox"), dim=0).item()), 1e-6)


def test_listen_grades_new_words_apart_from_old(tmp_path):
    run = subprocess.run(
        [
            sys.executable,
            ROOT / "diag.py",
            "listen",
            "--ckpt",
            "nano",
            "--words",
            "crimson,ascends",
            "--n",
            "10",
            "--json",
            tmp_path / "l.json",
            "--device",
            "cpu",
        ],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    (found,) = json.loads((tmp_path / "l.json").read_text()).values()
    assert {s: list(k) for s, k in found.items()} == {
        "crimson": ["color"],
        "ascends": ["motion"],
        "new words": ["pooled"],
        "old words": ["color", "shape", "motion"],
    }
    assert all(
        v["low"] - 1e-9 <= v["right"] <= v["high"] + 1e-9 and v["n"] == (20 if s.endswith("words") else 10)
        for s, k in found.items()
        for v in k.values()
    )
    assert (
        found["new words"]["pooled"]["right"]
        == (found["crimson"]["color"]["right"] + found["ascends"]["motion"]["right"]) / 2
    )
    assert found["crimson"]["color"]["right"] <= 0.3 and all(v["right"] >= 0.8 for v in found["old words"].values())


def test_listen_on_other_models_draws_a_sheet(tmp_path, checkpoints):
    from PIL import Image

    save_lora(tmp_path / "k.safetensors", trained())
    (tmp_path / "p.txt").write_text("a fox\na dog\n")
    shutil.copytree(checkpoints["ti2v"], tmp_path / "d")
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    (tmp_path / "d" / "config.json").write_text(
        json.dumps(config | {"sample": {"size": [64, 32], "frames": 5, "steps": 2}})
    )
    run = subprocess.run(
        [
            sys.executable,
            ROOT / "diag.py",
            "listen",
            "--ckpt",
            tmp_path / "d",
            "--lora",
            tmp_path / "k.safetensors",
            "--prompts",
            tmp_path / "p.txt",
            "--out",
            tmp_path / "sheet.png",
            "--device",
            "cpu",
        ],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    sheet = Image.open(tmp_path / "sheet.png")
    left, right = (
        sheet.crop((0, 20, sheet.width // 2, sheet.height)),
        sheet.crop((sheet.width // 2, 20, sheet.width, sheet.height)),
    )
    assert len(set(sheet.tobytes())) > 50 and left.tobytes() != right.tobytes()


@pytest.mark.parametrize("script", ["train_lora", pytest.param("train_te", marks=pytest.mark.slow)])
def test_a_report_is_one_file_that_holds_everything(tmp_path, script):
    (tmp_path / "p.txt").write_text("a crimson box sinks\na red circle moves left\n")
    subprocess.run(
        [sys.executable, ROOT / "nano.py", "clips", "--out", tmp_path / "clips", "--n", "40", "--words", "crimson"],
        check=True,
        capture_output=True,
    )
    run = [
        sys.executable,
        ROOT / f"{script}.py",
        "--data",
        tmp_path / "clips",
        "--out",
        tmp_path / "run",
        "--steps",
        "4",
        "--batch",
        "4",
        "--device",
        "cpu",
        "--previews",
        tmp_path / "p.txt",
        "--eval_every",
        "2",
        *(["--keywords", "crimson"] if script == "train_te" else []),
    ]
    subprocess.run(run, check=True, capture_output=True)
    done = subprocess.run(
        [sys.executable, ROOT / "diag.py", "report", tmp_path / "run", "--n", "2"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "run" / "report.html").read_text()
    for wanted in (
        "<h2>Loss",
        "<h2>Learning rate",
        "<h2>How far the",
        "<h2>Attention logits",
        "<h2>Previews",
        "<h2>Listening",
        "<h2>Flags",
        "<h2>Versions",
        "step 000000",
        "step 000004",
        "crimson",
        torch.__version__,
        *(["nearest after"] if script == "train_te" else ["adapter_model.safetensors"]),
    ):
        assert wanted in page, wanted
    assert page.count("data:image/png;base64,") >= 7 and not re.search(r'(src|href)="(?!data:)', page)


def test_a_report_of_nothing(tmp_path):
    run = subprocess.run([sys.executable, ROOT / "diag.py", "report", tmp_path], capture_output=True, text=True)
    assert run.returncode == 1 and "not the --out of a training run" in run.stderr
