"""diag.py: each command on tiny checkpoints, against brute force; what cannot be done is said in one line."""

import argparse
import contextlib
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import scripts
from helpers.adapters import save_lora
from test_lora import trained

import train_lora
import train_te
from benchmarks import tiny, tiny_animate, tiny_s2v
from data import Batches
from diag import arguments
from diagnostics import advise
from diagnostics.advise import Clips, advice
from diagnostics.inspect import inspect
from diagnostics.plan import candidates, planned
from diagnostics.scaling import Cluster, step_times
from kernels import backend
from lora import TARGETS
from nano.world import NEW_WORDS
from nanowan.errors import BadInput
from nanowan.formats.dit import full_config, load_wan, new_dit
from nanowan.formats.header import load, read_header, save
from nanowan.formats.lora import merge_file
from nanowan.settings import NANO
from nanowan.settings import released as released_settings
from nanowan.training.scan import Item
from nanowan.variants.registry import VARIANTS
from nanowan.video import write_mp4

ROOT = Path(__file__).parent.parent


def diag(*argv):
    """Run a command in this process. What the command line says in one line is raised as BadInput."""
    args = arguments([str(a) for a in argv])
    args.run(args)


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
        state = list(new_dit(full_config(variant)).state_dict().items())
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


def test_full_size_headers_are_all_that_is_read(released, tmp_path, report):
    """All released models, in one process: bytes read from files, and the growth of memory."""
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import diag, re\n"
        "from nanowan.memory_estimate import resident\n"
        "def read(): return int(re.search(r'rchar: (\\d+)', open('/proc/self/io').read())[1])\n"
        "bytes_before, before = read(), resident(); diag.main()\n"
        "print('READ', read() - bytes_before); print('PEAK', resident('VmHWM') - before)"
    )
    command = [sys.executable, "-c", code, ROOT, "inspect", *released.values(), "--json", tmp_path / "found.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = [f for folder in released.values() for f in folder.rglob("*") if f.is_file()]
    headers = [int.from_bytes(open(f, "rb").read(8), "little") for f in files if f.suffix == ".safetensors"]
    texts = [f.stat().st_size for f in files if f.suffix == ".json"]
    report("bytes read", int(re.search(r"READ (\d+)", done.stdout)[1]), 3 * sum(headers + texts))
    report("peak bytes", int(re.search(r"PEAK (\d+)", done.stdout)[1]), 100e6)
    models = json.loads((tmp_path / "found.json").read_text())["models"]
    assert [m["variant"] for m in models] == [
        "ti2v-5B",
        *["t2v-A14B"] * 2,
        *["i2v-A14B"] * 2,
        "s2v-14B",
        "animate-14B",
        "animate2-14B",
    ]


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
        "blocks_with": dict.fromkeys(TARGETS, 30),
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
    page, result = tmp_path / "page.safetensors", tmp_path / "f.json"
    page.write_text("<html>")
    with pytest.raises(BadInput, match="1 of 2 paths"):
        diag("inspect", page, checkpoints["ti2v"], "--json", result)
    kinds = [m["kind"] for m in json.loads(result.read_text())["models"]]
    assert kinds == ["unreadable", "dit", "text_encoder", "vae"]


def test_an_encoders_changes_are_inspected(checkpoints, tmp_path):
    """A file of train_te.py --save delta: two of its blocks' tensors and three embedding rows."""
    state = torch.load(checkpoints["ti2v"] / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True)
    tensors = {name: t for name, t in state.items() if name.startswith("blocks.1.")}
    tensors |= {"token_embedding.rows": torch.zeros(3, tiny.TEXT_DIM), "token_embedding.ids": torch.tensor([5, 6, 9])}
    save(tmp_path / "d.safetensors", tensors, {"delta": True, "keywords": "fox"})
    (model,) = inspect(tmp_path / "d.safetensors")
    assert (model["kind"], model["blocks"], model["rows"]) == ("text_encoder_delta", [1], 3)
    assert "fox" in model["summary"] and "3 embedding rows" in model["summary"]


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

    save_lora(tmp_path / "a.safetensors", trained(TARGETS, rank=rank))
    rows = delta(tmp_path / "a.safetensors", checkpoints["ti2v"])
    base, moved = (load_wan(checkpoints["ti2v"], dtype=torch.float32) for _ in range(2))
    merge_file(moved, tmp_path / "a.safetensors")
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
        delta(tmp_path / "a.safetensors", NANO)


def test_delta_between_two_checkpoints_and_two_encoders(tmp_path, checkpoints, report):
    from diagnostics.delta import delta
    from nanowan.formats.t5 import load_t5

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
    diag("delta", tmp_path / "te.safetensors", "--ckpt", checkpoints["ti2v"], "--json", tmp_path / "d.json")
    assert len(json.loads((tmp_path / "d.json").read_text())["rows"]) == 1


def delta_rows(tmp_path, *argv):
    """The rows of a delta command, {(expert, name): row}."""
    diag("delta", *argv, "--json", tmp_path / "rows.json")
    return {(r["expert"], r["name"]): r for r in json.loads((tmp_path / "rows.json").read_text())["rows"]}


def test_delta_of_every_kind_of_change(checkpoints, tmp_path, report):
    """Differences of a weight, a bias and a modulation, and a LoKr, beside what merging the file moves."""
    g = torch.Generator().manual_seed(3)
    changes = {
        "ffn.0.diff": torch.randn(104, 48, generator=g),
        "ffn.0.diff_b": torch.randn(104, generator=g),
        "diff_m": torch.randn(1, 6, 48, generator=g),
        "self_attn.q.lokr_w1": torch.randn(4, 4, generator=g),
        "self_attn.q.lokr_w2": torch.randn(12, 12, generator=g),
    }
    save(tmp_path / "a.safetensors", {f"diffusion_model.blocks.1.{key}": t for key, t in changes.items()})
    base, moved = (load_wan(checkpoints["ti2v"], dtype=torch.float32) for _ in range(2))
    merge_file(moved, tmp_path / "a.safetensors")
    base, moved = dict(base.named_parameters()), dict(moved.named_parameters())
    rows = delta_rows(tmp_path, tmp_path / "a.safetensors", "--ckpt", checkpoints["ti2v"])
    names = {f"blocks.1.{name}" for name in ("ffn.0", "ffn.0.bias", "modulation", "self_attn.q")}
    assert {name for _, name in rows} == names
    for (_, name), row in rows.items():
        parameter = name if name in base else f"{name}.weight"
        difference = moved[parameter].double() - base[parameter].double()
        report(f"{name}, norm", abs(row["norm"] / difference.norm().item() - 1), 1e-5)
        report(f"{name}, ratio", abs(row["ratio"] / (difference.norm() / base[parameter].norm()).item() - 1), 1e-5)


def test_delta_between_sharded_folders(checkpoints, tmp_path):
    model = tiny.dit("ti2v")
    model.blocks[2].cross_attn.v.weight *= 1.5
    tiny.write_dit(tmp_path / "moved", model, shards=3)
    rows = delta_rows(tmp_path, tmp_path / "moved", "--ckpt", checkpoints["ti2v"])
    (name,) = [name for (_, name), row in rows.items() if row["ratio"]]
    assert name == "blocks.2.cross_attn.v" and abs(rows[None, name]["ratio"] - 0.5) < 1e-6


def test_delta_on_an_a14b_folder(checkpoints, tmp_path):
    """The expert that a file is for is the one that it is compared with; two experts are compared with each other's."""
    norms = {
        half: load_wan(checkpoints["t2v"] / f"{half}_noise_model", dtype=torch.float32)
        .blocks[0]
        .cross_attn.k.weight.norm()
        for half in ("high", "low")
    }
    name = "blocks.0.cross_attn.k"
    for file, metadata, flag in (("a", {"expert": "low"}, ""), ("b_low_noise", {}, ""), ("c", {}, ":low")):
        path = tmp_path / f"{file}.safetensors"
        save_lora(path, trained(kind="t2v"), **metadata)
        rows = delta_rows(tmp_path, f"{path}{flag}", "--ckpt", checkpoints["t2v"])
        assert {expert for expert, _ in rows} == {"low"}
        assert abs(rows["low", name]["base"] / norms["low"].item() - 1) < 1e-6
    with pytest.raises(BadInput, match="for which expert"):
        diag("delta", path, "--ckpt", checkpoints["t2v"])
    with pytest.raises(BadInput, match="holds two experts"):
        diag("delta", checkpoints["t2v"] / "low_noise_model", "--ckpt", checkpoints["t2v"])
    shutil.copytree(checkpoints["t2v"], tmp_path / "moved")
    tiny.write_dit(tmp_path / "moved" / "high_noise_model", tiny.dit("t2v", 12))
    rows = delta_rows(tmp_path, tmp_path / "moved", "--ckpt", checkpoints["t2v"])
    assert rows["low", name]["ratio"] == 0 and rows["high", name]["ratio"] > 0.5
    assert abs(rows["high", name]["base"] / norms["high"].item() - 1) < 1e-6


def test_delta_of_a_file_with_both_experts(checkpoints, tmp_path):
    """Each half on its own expert, as sampling takes them and inspect says; or the one that is asked for."""
    g = torch.Generator().manual_seed(4)
    key, tensors = "blocks.1.cross_attn.v", {}
    for component in ("transformer_1", "transformer_2"):
        for part, shape in (("lora_A", (3, 48)), ("lora_B", (48, 3))):
            tensors[f"diffusion_model.{component}.{key}.{part}.weight"] = torch.randn(shape, generator=g)
    file = tmp_path / "a_high_noise.safetensors"  # its keys go before its name
    save(file, tensors)
    want = {}
    for half in ("high", "low"):
        base, moved = (load_wan(checkpoints["t2v"] / f"{half}_noise_model", dtype=torch.float32) for _ in range(2))
        merge_file(moved, file, expert=half)
        old, new = (dict(m.named_parameters())[f"{key}.weight"].double() for m in (base, moved))
        want[half] = ((new - old).norm() / old.norm()).item()
    (model,) = inspect(file)
    assert (model["expert"], model["expert_from"]) == ("both", "its keys") and "for both noise" in model["summary"]
    for flag, halves in (("", ["high", "low"]), (":high", ["high"]), (":low", ["low"])):
        rows = delta_rows(tmp_path, f"{file}{flag}", "--ckpt", checkpoints["t2v"])
        assert sorted(half for half, _ in rows) == halves
        for half in halves:
            assert abs(rows[half, key]["ratio"] / want[half] - 1) < 1e-5
    with pytest.raises(BadInput, match="as its keys say, and here is a single model"):
        diag("delta", file, "--ckpt", checkpoints["ti2v"])
    with pytest.raises(BadInput, match="one expert's at a time"):
        diag("delta", file, "--ckpt", checkpoints["t2v"], "--cap", "0.1", "--out", tmp_path / "b.safetensors")
    diag("delta", f"{file}:low", "--ckpt", checkpoints["t2v"], "--cap", "0.1", "--out", tmp_path / "b.safetensors")
    (row,) = delta_rows(tmp_path, tmp_path / "b.safetensors", "--ckpt", checkpoints["t2v"]).values()
    assert row["expert"] == "low" and abs(row["ratio"] - 0.1) < 1e-6


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


def test_drift_of_logits_is_relative_to_before():
    """The largest of three changes over the value before: of the mean deviation 2 -> 3, the maximum 4 -> 5, ..."""
    from diagnostics.logits import logit_rows

    before = {(0, "self_attn"): [torch.tensor([[1.0, 2.0, 1.0]]), torch.tensor([[3.0, 4.0, 3.0]])]}
    after = {(0, "self_attn"): [torch.tensor([[3.0, 5.0, 2.0]]), torch.tensor([[3.0, 1.0, 2.2]])]}
    (row,) = logit_rows(before, after)
    assert (row["std"], row["max"]) == ([2.0, 3.0], [4.0, 5.0]) and abs(row["drift"] - 0.5) < 1e-6


@pytest.fixture(scope="module")
def one_clip(tmp_path_factory):
    """Flags of logits for one clip of nine frames."""
    from test_data import clip

    folder = tmp_path_factory.mktemp("clip")
    clip(folder / "a.mp4", 24, 64, 64)
    return {"data": folder, "resolution": "64x64", "frames": 9}


def test_logits_see_a_change_where_it_is_and_nowhere_before(tmp_path, checkpoints, one_clip, capsys):
    from diagnostics.logits import logits

    lora = tmp_path / "k.safetensors"
    save_lora(lora, trained(["cross_attn.k"], blocks=[1]))
    rows = logits(checkpoints["ti2v"], [str(lora)], n=1, **one_clip)["dit"]
    moved = {(r["block"], r["kind"]) for r in rows if r["drift"] > 1e-5}
    assert len(rows) == 3 * 2 * 2 and (1, "cross_attn") in moved and (2, "self_attn") in moved
    assert not {(0, "self_attn"), (0, "cross_attn"), (1, "self_attn")} & moved
    worst = max(r["drift"] for r in rows)
    flags = [word for key, value in one_clip.items() for word in (f"--{key}", value)]
    command = "logits", "--ckpt", checkpoints["ti2v"], "--lora", lora, *flags, "--n", "1", "--ci", "--device", "cpu"
    diag(*command, "--threshold", worst * 1.01)
    with pytest.raises(BadInput, match="drift by more than --threshold"):
        diag(*command, "--threshold", worst * 0.99, "--json", tmp_path / "l.json")
    assert "<-- drifts" in capsys.readouterr().out
    assert json.loads((tmp_path / "l.json").read_text())["dit"] == rows


@contextlib.contextmanager
def given_to_attention():
    """Within, a list of the attention_stats of all that attention is given, in order."""
    from diagnostics.logits import attention_stats
    from kernels import attention_backends, ops

    seen, real = [], ops.attention

    def attention(q, k, v, bias=None):
        seen.append(attention_stats(q, k, bias))
        return real(q, k, v, bias)

    with pytest.MonkeyPatch.context() as patch:
        for module in (ops, attention_backends):  # what models call, and what self_attention does
            patch.setattr(module, "attention", attention)
        yield seen


def test_logits_are_those_of_the_attention_itself(checkpoints):
    """The recorded maximum and deviation, against q and k as the reference operations hand them to attention."""
    from test_wan import inputs

    from diagnostics.logits import record_attention

    model = load_wan(checkpoints["ti2v"], dtype=torch.float32)
    x, t, context = inputs("ti2v")
    with torch.no_grad(), backend.using("ref"), record_attention(model) as stats, given_to_attention() as seen:
        model(x, t, context)
    order = [(block, kind) for block in range(3) for kind in ("self_attn", "cross_attn")]
    assert list(stats) == order
    for key, want in zip(order, seen):
        torch.testing.assert_close(stats[key][0], want)


@pytest.mark.parametrize("variant", ["s2v", "animate"])
def test_logits_of_what_variants_add(variant):
    """S2V's injectors hear the sound of their frame alone; Animate's picture has a softmax of its own."""
    import test_animate

    from diagnostics.logits import record_attention

    if variant == "s2v":
        model, args, given = tiny_s2v.dit(), (), tiny_s2v.inputs()
        want = [k for i in range(4) for k in [(i, "cross_attn")] + [(i, "audio_attn")] * (i in (0, 1, 3))]
    else:
        model = tiny_animate.animate(layers=5)
        (args, given), want = (
            test_animate.inputs(model),
            [(i, k) for i in range(5) for k in ("cross_attn", "image_attn")],
        )
    with torch.no_grad(), backend.using("ref"), record_attention(model) as stats, given_to_attention() as seen:
        model(*args, **given)
    assert [key for key in stats if key[1] != "self_attn"] == want
    seen = [s for s in seen if s.shape == seen[0].shape]
    for key in want:
        assert any(torch.allclose(stats[key][0], s, rtol=1e-4, atol=1e-5) for s in seen), key


def test_logits_that_are_no_numbers_fail_ci(tmp_path, checkpoints, one_clip, capsys):
    model = trained(["cross_attn.k"], blocks=[1])
    model.blocks[1].cross_attn.k.lora_B.data.fill_(math.nan)
    save_lora(tmp_path / "nan.safetensors", model)
    flags = [word for key, value in one_clip.items() for word in (f"--{key}", value)]
    command = "logits", "--ckpt", checkpoints["ti2v"], "--lora", tmp_path / "nan.safetensors", *flags, "--n", "1"
    with pytest.raises(BadInput, match="drift by more than --threshold"):
        diag(*command, "--ci", "--threshold", "1e9", "--device", "cpu")
    assert "drift nan" in capsys.readouterr().out
    diag("delta", tmp_path / "nan.safetensors", "--ckpt", checkpoints["ti2v"])
    assert "largest: blocks.1.cross_attn.k nan %" in capsys.readouterr().out
    with pytest.raises(BadInput, match="not finite"):
        flags = "--cap", "0.1", "--out", tmp_path / "capped.safetensors"
        diag("delta", tmp_path / "nan.safetensors", "--ckpt", checkpoints["ti2v"], *flags)


def test_drift_of_an_encoder(tmp_path, checkpoints, report):
    from diagnostics.drift import drift
    from nanowan.formats.t5 import load_t5

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
    report("norm of all", abs(found["prompts"][0]["norm"] - (b.norm() / a.norm()).item()), 1e-6)
    assert found["prompts"][0]["cosine"] < 0.999 and len(found["prompts"][0]["tokens"]) == len(a)
    before, after = found["keywords"]["fox"]
    fox, dog = (new.encode([word])[0][0].mean(0) for word in ("fox", "dog"))
    cosine = torch.nn.functional.cosine_similarity(dog, fox, dim=0).item()
    assert {w for w, _ in after} == {"a", "red", "dog"} and after[0][1] >= after[1][1] and dict(before) != dict(after)
    report("neighbour", abs(dict(after)["dog"] - cosine), 1e-6)


def test_drift_of_a_file_uses_the_tokenizer_of_its_folder(tmp_path, checkpoints, capsys):
    """OLD, where that is a folder; a file alone has none, and nano's would be silently wrong."""
    state = torch.load(checkpoints["ti2v"] / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True)
    save(tmp_path / "te.safetensors", state)
    (tmp_path / "p.txt").write_text("the lazy dog\n")
    diag("drift", checkpoints["ti2v"], tmp_path / "te.safetensors", "--prompts", tmp_path / "p.txt")
    assert "mean cosine 1.0000" in capsys.readouterr().out
    with pytest.raises(BadInput, match="no tokenizer; give"):
        diag("drift", tmp_path / "te.safetensors", tmp_path / "te.safetensors")
    with pytest.raises(BadInput, match="cannot be compared"):
        diag("drift", checkpoints["ti2v"], "nano", "--prompts", tmp_path / "p.txt")


def test_listen_grades_new_words_apart_from_old(tmp_path):
    from PIL import Image

    flags = "--words", "crimson,ascends", "--n", "10", "--json", tmp_path / "l.json", "--device", "cpu"
    diag("listen", "--ckpt", "nano", *flags, "--out", tmp_path / "sheet.png")
    assert len(set(Image.open(tmp_path / "sheet.png").tobytes())) > 50
    (scores,) = json.loads((tmp_path / "l.json").read_text()).values()
    assert {suite: list(kinds) for suite, kinds in scores.items()} == {
        "crimson": ["color"],
        "ascends": ["motion"],
        "new words": ["pooled"],
        "old words": ["color", "shape", "motion"],
    }
    for suite, kinds in scores.items():
        for s in kinds.values():
            assert s["low"] - 1e-9 <= s["right"] <= s["high"] + 1e-9 and s["n"] == (20 if "words" in suite else 10)
    crimson, ascends = scores["crimson"]["color"]["right"], scores["ascends"]["motion"]["right"]
    assert scores["new words"]["pooled"]["right"] == (crimson + ascends) / 2
    assert crimson <= 0.3 and all(s["right"] >= 0.8 for s in scores["old words"].values())


def test_listen_on_other_models_draws_a_sheet(tmp_path, checkpoints, capsys):
    from PIL import Image

    save_lora(tmp_path / "k.safetensors", trained())
    (tmp_path / "p.txt").write_text("a fox\na dog --d 3\n")
    shutil.copytree(checkpoints["ti2v"], tmp_path / "d")
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    config["sample"] = {"size": [64, 32], "frames": 5, "steps": 2}
    (tmp_path / "d" / "config.json").write_text(json.dumps(config))
    changed = "--ckpt", tmp_path / "d", "--lora", tmp_path / "k.safetensors", "--device", "cpu"
    diag("listen", *changed, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "sheet.png")
    assert "options of single prompts are left out" in capsys.readouterr().out
    sheet = Image.open(tmp_path / "sheet.png")
    w, h = sheet.size
    left, right = sheet.crop((0, 20, w // 2, h)), sheet.crop((w // 2, 20, w, h))
    assert len(set(sheet.tobytes())) > 50 and left.tobytes() != right.tobytes()


@pytest.mark.parametrize("script", ["train_lora", pytest.param("train_te", marks=pytest.mark.slow)])
def test_a_report_is_one_file_that_holds_everything(tmp_path, script, capsys):
    """Of new words it grades those that the run's captions hold."""
    (tmp_path / "p.txt").write_text("a crimson box sinks\na red circle moves left\n")
    clips = ["--out", tmp_path / "clips", "--n", "40", "--words", "crimson"]
    scripts.run("-m", "nano", "clips", *clips, check=True)
    flags = ["--data", tmp_path / "clips", "--out", tmp_path / "run", "--steps", "4", "--batch", "4", "--device", "cpu"]
    flags += ["--previews", tmp_path / "p.txt", "--eval_every", "2"]
    flags += ["--keywords", "crimson"] if script == "train_te" else ["--name", "mine", "--save_every", "2"]
    scripts.run(ROOT / f"{script}.py", *flags, check=True)
    diag("report", tmp_path / "run", "--n", "2")
    progress = capsys.readouterr().out
    assert progress.count("listening: ") == 2 and "crimson: 2 prompts" in progress  # the base, and with the result
    page = (tmp_path / "run" / "report.html").read_text()
    sections = (
        "Loss",
        "Learning rate",
        "How far the",
        "Attention logits",
        "Previews",
        "Prompt adherence",
        "Flags",
        "Versions",
    )
    wanted = [f"<h2>{section}" for section in sections] + ["step 000000", "step 000004", "crimson", torch.__version__]
    wanted.append("nearest after" if script == "train_te" else "How far the weights moved: mine.safetensors")
    assert not [text for text in wanted if text not in page] and "mine_000004.safetensors" not in page
    assert not [word for word in NEW_WORDS if word != "crimson" and f"<td>{word}</td>" in page]
    assert page.count("data:image/png;base64,") >= 7 and not re.search(r'(src|href)="(?!data:)', page)


def test_an_encoder_in_another_layout(checkpoints, tmp_path):
    """ComfyUI's holds the tokenizer; there and back again the tensors are the same, and nothing has moved."""
    comfyui, official = tmp_path / "comfyui.safetensors", tmp_path / "official.safetensors"
    diag("convert", checkpoints["ti2v"], comfyui, "--to", "comfyui")
    entries, _ = read_header(comfyui)
    assert "encoder.block.0.layer.0.SelfAttention.q.weight" in entries and "spiece_model" in entries
    assert inspect(comfyui)[0]["layers"] == 2
    assert not any(row["ratio"] for row in delta_rows(tmp_path, comfyui, "--ckpt", checkpoints["ti2v"]).values())
    diag("convert", comfyui, official, "--to", "official")
    want = torch.load(checkpoints["ti2v"] / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True)
    got, _ = load(official)
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


# ---- refusals ----------------------------------------------------------------------------------------------------
def test_a_report_of_nothing(tmp_path):
    with pytest.raises(BadInput, match="not the --out of a training run"):
        diag("report", tmp_path)
    (tmp_path / "flags.json").write_text('{"flags": {"ckpt": "nano", "data": null}, "started": "now"}')
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(BadInput, match="no step has been logged"):
        diag("report", tmp_path)


@pytest.fixture(scope="module")
def odd_files(tmp_path_factory):
    """An empty file of each kind, a weight file without tensors, and an mp4 with sound and no picture."""
    import av
    import numpy as np

    folder = tmp_path_factory.mktemp("odd")
    for name in ("empty.safetensors", "empty.mp4", "empty.pth", "empty.txt"):
        (folder / name).write_bytes(b"")
    save(folder / "none.safetensors", {})
    with av.open(str(folder / "sound.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return folder


@pytest.mark.parametrize(
    "command,message",
    [
        ("inspect {odd}/empty.safetensors", "not a weight file"),
        ("inspect {odd}/empty.pth", "not a weight file"),
        ("inspect {odd}/empty.mp4", "not a readable video"),
        ("inspect {odd}/sound.mp4", "holds no video, only audio"),
        ("delta {odd}/empty.safetensors", "not a weight file"),
        ("delta {odd}/none.safetensors", "holds no weights that could be compared"),
        ("delta {odd}/sound.mp4", "not a weight file"),
        ("delta {odd}/nowhere", "no such file"),
        ("delta {lora} --cap 0 --out x.safetensors", "--cap 0.0: at least"),
        ("delta {lora} --cap 0.1", "give both"),
        ("delta {ckpt} --ckpt {ckpt} --cap 0.1 --out x.safetensors", "only a LoRA file"),
        ("logits --lora {lora} --n 0", "--n 0: at least 1"),
        ("logits --ckpt {ckpt} --lora {lora} --data {odd}/empty.txt", "--data"),
        ("logits --ckpt {ckpt} --lora {odd}/empty.safetensors", "not a weight file"),
        ("drift {ckpt} {odd}/empty.safetensors", "not a weight file"),
        ("drift {ckpt} {ckpt} --prompts {odd}/empty.txt", "holds no prompts"),
        ("listen --n 0", "--n 0: at least 1"),
        ("reuse --thresholds 1.5", "--thresholds 1.5"),
        ("convert {ckpt} x.bin --to comfyui", "should end in .safetensors"),
        ("convert {odd}/none.safetensors x.safetensors --to official", "not a UMT5 encoder"),
        ("report {odd} --n -1", "--n -1: at least 0"),
        ("scale --frames 0", "--frames 0"),
        ("scale --per_machine 0", "--per_machine 0"),
        ("scale --tflops 0", "--tflops 0"),
        ("plan --gpus 0x80 sample", "COUNTxGB"),
        ("plan --gpus 8x0 sample", "COUNTxGB"),
    ],
)
def test_what_cannot_be_done_is_said(command, message, odd_files, checkpoints, tmp_path):
    save_lora(tmp_path / "a.safetensors", trained())
    words = command.format(odd=odd_files, ckpt=checkpoints["ti2v"], lora=tmp_path / "a.safetensors").split()
    with pytest.raises(BadInput, match=message):
        diag(*words)


def test_a_weight_file_without_tensors_is_inspected(odd_files):
    assert inspect(odd_files / "none.safetensors")[0]["summary"] == "holds no tensors"


def test_every_flag_is_explained(monkeypatch):
    """A sentence for each, and its default unless that is nothing."""
    parsers = []
    real = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda p, *a: parsers.append(p) or real(p, *a))
    arguments(["inspect", "x"])
    (commands,) = [a for a in parsers[0]._actions if isinstance(a, argparse._SubParsersAction)]
    assert {c.dest for c in commands._choices_actions if c.help} == set(commands.choices)
    for name, parser in commands.choices.items():
        assert f"diag.py {name}" in parsers[0].description
        for action in parser._actions:
            assert action.help, (name, action.option_strings)
            if action.default not in (None, False, [], argparse.SUPPRESS):
                assert "default" in action.help, (name, action.option_strings)


# ---- plans -------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_plan_knows_how_guidance_runs():
    """None: one forward pass and one prompt's keys and values. Two ranks: one pass, both prompts', and what they
    exchange. In turns: one pass, both prompts'. In one batch: two at once.
    """
    flags = ["--ckpt", "ti2v-5B", "--size", "256x256", "--frames", "9"]

    def denoising(*more, mode=None):
        (activations,) = (
            (what, n)
            for what, n in planned("sample", [*flags, *more], mode=mode).phases["denoise"].items()
            if what.startswith("activations")
        )
        return activations

    none, parallel = denoising("--guidance", "1"), denoising("--guidance_parallel")
    batched, sequential = denoising(), denoising(mode="sequential")
    assert none[1] < sequential[1] < parallel[1] < batched[1]
    exchanged = 2 * 4 * 48 * 3 * 16 * 16
    assert parallel[1] - sequential[1] == exchanged
    assert "one batch" in batched[0] and "two passes" in sequential[0] and "two ranks" in parallel[0]


def test_guidance_takes_two_passes_where_a_batch_does_not_fit(capsys):
    """Before anything that costs more time, and the plan says so."""
    big = planned("sample", ["--ckpt", "ti2v-5B", "--device", "cuda"]).peak
    assert big > 15e9
    diag("plan", "--gpus", "1x14", "sample.py", "--ckpt", "ti2v-5B")
    out = capsys.readouterr().out
    assert out.startswith("python sample.py --ckpt ti2v-5B\n") and "guidance in two passes" in out


def test_candidates_can_be_run():
    """Ranks divide into halves of guidance and parts of tokens, and the parts divide the heads."""
    for ranks in (1, 2, 3, 5, 8, 16):
        for heads, guided in ((24, True), (40, True), (24, False)):
            for flags in (c.flags for c in candidates("sample", set(), ranks, 30, heads, guided)):
                size = int(flags[flags.index("--ulysses_size") + 1]) if "--ulysses_size" in flags else 1
                halves = 2 if "--guidance_parallel" in flags else 1
                assert ranks % (size * halves) == 0 and heads % size == 0 and (guided or halves == 1)
    assert ["--guidance_parallel", "--ulysses_size", "4"] in [c.flags for c in candidates("sample", set(), 8, 30, 24)]


def test_advice_is_two_commands_that_the_scripts_take(media, tmp_path, capsys):
    """With what nano's config.json recommends, reasons in words, and what they will need."""
    where = ["--data", media, "--keywords", "dog,square", "--resolution", "64x64", "--device", "cpu"]
    diag("advise", *where, "--json", tmp_path / "advice.json")
    found, said = json.loads((tmp_path / "advice.json").read_text()), capsys.readouterr().out
    assert "keyword 'dog': in 1 different captions" in said and "'dog' is in the captions of 1 files; 20 or so" in said
    assert "--preserve 2: with a trained encoder it cost no words" in said
    assert "never drawn: 1, then 2" in said and "a style or a motion" in said and "docs/experiments.md" in said
    for script, module in (("train_te", train_te), ("train_lora", train_lora)):
        line = found["commands"][script]
        assert line in said and found["peak"][script] > 1e8
        args, own = module.arguments(line.split()[2:]), json.loads((NANO / "config.json").read_text())["train"]
        assert (args.batch, args.steps) == tuple(own[script][k] for k in ("batch", "steps"))
        assert args.resolution == "64x64"
        if script == "train_te":
            assert (args.keyword_init, args.keyword_lr) == ("search", own[script]["keyword_lr"])
            assert (args.train_blocks, args.rank) in ((0, None), (None, 16))
    assert args.trigger == ["dog", "square"] and args.preserve == 2 and args.lr == own["train_lora"]["lr"]
    assert args.text_encoder[-1].endswith("text_encoder.safetensors")
    with pytest.raises(BadInput, match="--keywords zebra: no caption"):
        diag("advise", "--data", media, "--keywords", "zebra")
    with pytest.raises(BadInput, match="--data nowhere: no such folder"):
        diag("advise", "--data", "nowhere")


def test_advice_for_a_released_variant_needs_no_weights(media, monkeypatch, tmp_path, capsys):
    peaks = {"train_te": 1e9, "train_lora": 26e9}
    monkeypatch.setattr(advise.Job, "plan", lambda job: SimpleNamespace(peak=peaks[job.script], disk={}))
    monkeypatch.setattr(advise.Job, "times", lambda job, peak: "  4090 2 s a step")
    diag("advise", "--data", media, "--ckpt", "ti2v-5B", "--keywords", "dog", "--json", tmp_path / "advice.json")
    te, lora = json.loads((tmp_path / "advice.json").read_text())["commands"].values()
    assert te.startswith("python train_te.py --ckpt Wan2.2-TI2V-5B --data ")
    assert "--keywords dog --train_blocks 0 --save lora --keyword_init search --keyword_lr 0.001 " in te
    said = capsys.readouterr().out
    assert "seen 667 times" in said and "2 with --blocks 20-29" in said and said.count("4090 2 s a step") == 2
    assert "plan --gpus 1x24 train_lora" in said and "plan --gpus 1x24 train_te" not in said
    assert "--lr 0.0001: that of DiffSynth-Studio's script" in said and "--trigger dog --preserve 2" in lora


def test_preservation_is_advised_only_for_captions_without_keywords():
    s, item = released_settings("ti2v-5B"), Item(Path("a.mp4"), ["a red dog"], 64, 64, 9, 24.0, digest="a")
    for captions, advised in ((["", "a red dog"], False), (["", "a red dog", "a cat"], True)):
        flags = advice(s, [], ["dog"], Clips([item], captions, ()))["train_lora"]
        assert any(f.name == "preserve" for f in flags) == advised
        assert any("are preserved" in (f.why or "") for f in flags) == advised


def test_words_whose_tokens_are_all_shared_need_blocks():
    s, item = released_settings("ti2v-5B"), Item(Path("a.mp4"), ["a red dog"], 64, 64, 9, 24.0, digest="a")
    shared = advice(s, [], ["dog"], Clips([item], ["a red dog"], ("dog",)))["train_te"]
    flags = {flag.name: flag for flag in shared}
    assert "train_blocks" not in flags and flags["rank"].value == 16 and "every token of dog" in flags["rank"].why
    args = train_te.arguments(["--device", "cpu"] + [str(word) for f in shared for word in (f"--{f.name}", f.value)])
    train_te.check(args, s, 30)
    assert args.lr == 1e-4 and args.save == "lora"
    assert "preserve" not in {flag.name for flag in advice(s, [], ["dog"], Clips([item], ["a red dog"]))["train_lora"]}


def test_how_often_a_sample_is_seen():
    """By counting what a run's steps draw: 44 samples in buckets of 30, 13 and 1, and 2 of 46 files held out."""
    sizes = [64] * 30 + [96] * 13 + [128] * 3
    items = [Item(Path(f"{i}.mp4"), ["a"], w, 64, 9, 24.0, digest=f"{i:02}") for i, w in enumerate(sizes)]
    clips = Clips(items, ["a"])
    assert len(clips.trained()) == 44
    for steps, batch in ((30, 16), (12, 100), (440, 1)):
        batches = Batches(clips.trained(), batch, 0)
        drawn = sum(len(batches.at(step)) for step in range(steps))
        assert clips.views(steps, batch) == pytest.approx(drawn / 44)


def test_step_times():
    """One GPU takes what it computes; what is sent costs; weights shrink by the ranks that share them."""
    config = full_config("ti2v-5B")
    cluster = Cluster(inside=2e11, between=25e9)

    def times(ranks, cluster=cluster):
        return step_times(config, (31, 22, 40), ranks, 4 * 16 * 2 * 3072 * 60, 5.0, cluster)

    one = times(1)["data parallel"]
    assert one[0] == 5 and one[1] > 9e9
    eight = times(8)
    data, ulysses, pipeline = (eight[k][0] for k in ("data parallel", "--ulysses_size 8", "--pipeline_stages 8"))
    assert one[0] / 8 < data < one[0] / 7.9 < ulysses < pipeline
    assert eight["--fsdp"][1] == eight["--pipeline_stages 8"][1] == one[1] // 8
    slow = times(16, cluster._replace(between=1e8))
    assert slow["--fsdp"][0] > slow["--ulysses_size 8"][0]  # weights cross the slow link, or adapters only
    wide = Cluster(inside=1e30, between=1e30)  # 27 tokens on 8 ranks: each computes 4, some of them padding
    shared, _ = step_times(config, (3, 3, 3), 8, 0, 5.0, wide)["--ulysses_size 8"]
    assert shared == pytest.approx(5 * 4 / 27)


@pytest.mark.parametrize("variant", ["t2v-A14B", "animate-14B", pytest.param("s2v-14B", marks=pytest.mark.slow)])
def test_the_scale_command(capsys, variant):
    diag("scale", "--ckpt", variant, "--size", "1024x704")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9 and lines[4].startswith("  8 GPUs  data parallel ") and "fastest: " in lines[4]
    assert lines[8].startswith("predicted for one GPU") and "not measured: H100 " in lines[8]
