"""diag.py inspect: tiny checkpoints, LoRA files, videos, and full-size headers."""
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import tiny
from checkpoint import BadInput
from diag import inspect
from lora import TARGETS, save_lora
from sample import write_mp4
from test_lora import trained
from wan import VARIANTS, Wan, full_config

ROOT = Path(__file__).parent.parent


def write_header(file, tensors):
    """A safetensors file of the right size in which only the header was ever written (the rest is a hole)."""
    header, at = {}, 0
    for name, t in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": [at, at + t.numel() * 4]}
        at += t.numel() * 4
    raw = json.dumps(header).encode()
    with open(file, "wb") as f:
        f.write(len(raw).to_bytes(8, "little") + raw)
        f.truncate(8 + len(raw) + at)


def full_size(folder, variant, shards=3):
    with torch.device("meta"):
        state = list(Wan(full_config(variant)).state_dict().items())
    row = VARIANTS[variant]
    config = {k: row[k] for k in ("model_type", "dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim")}
    for sub in ("high_noise_model", "low_noise_model") if row["boundary"] else (".",):
        (folder / sub).mkdir(parents=True, exist_ok=True)
        (folder / sub / "config.json").write_text(json.dumps({"_class_name": "WanModel", "eps": 1e-6, "freq_dim": 256, "text_len": 512, **config}))
        weight_map = {}
        for i in range(shards):
            name = f"diffusion_pytorch_model-{i + 1:05d}-of-{shards:05d}.safetensors"
            write_header(folder / sub / name, dict(state[i::shards]))
            weight_map |= {k: name for k, _ in state[i::shards]}
        (folder / sub / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return {v: full_size(tmp_path_factory.mktemp(v), v) for v in VARIANTS}


def test_full_size_headers_are_fast_and_small(released, tmp_path, report):
    """5B and both experts of both A14B models, in one process: time and peak memory."""
    code = ("import sys; sys.path.insert(0, sys.argv.pop(1)); import diag; diag.main(); import re\n"
            "print('PEAK', re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])")
    began = time.time()
    run = subprocess.run([sys.executable, "-c", code, ROOT, "inspect", *released.values(), "--json", tmp_path / "found.json"], capture_output=True, text=True)
    seconds = time.time() - began
    assert run.returncode == 0, run.stderr
    report("seconds", seconds, 5.0)
    report("peak bytes", int(re.search(r"PEAK (\d+)", run.stdout)[1]) * 1024, 600e6)
    found = json.loads((tmp_path / "found.json").read_text())["models"]
    assert [m["variant"] for m in found] == ["ti2v-5B", "t2v-A14B", "t2v-A14B", "i2v-A14B", "i2v-A14B"]


def test_the_numbers_of_5b(released):
    (m,) = inspect(released["ti2v-5B"])
    want = {"kind": "dit", "variant": "ti2v-5B", "width": 3072, "layers": 30, "heads": 24, "head_dim": 128, "ffn": 14336, "in_channels": 48, "out_channels": 48,
            "text_len": 512, "parameters": 4_999_787_712, "tensors": 825, "dtype": "float32", "bytes": 4 * 4_999_787_712, "experts": [],
            "image_conditioning_keys": False, "blocks_with": {t: 30 for t in TARGETS}}
    assert {k: m[k] for k in want} == want
    assert "single-tower" in m["summary"] and "TI2V" in m["summary"] and "no image-conditioning keys" in m["summary"]
    rows = {(r["targets"], r["rank"]): (r["matrices"], r["parameters"], r["mib_bf16"]) for r in m["lora_budget"]}
    assert rows["cross_attn.{k,v}", 16] == (60, 5_898_240, 11.25)
    assert rows["cross_attn.{q,k,v,o}", 16] == (120, 11_796_480, 22.5)
    assert rows["self_attn and cross_attn", 16] == (240, 23_592_960, 45.0)


def test_experts_are_told_apart(released):
    high, low = inspect(released["i2v-A14B"])
    assert high["experts"] == ["high_noise_model", "low_noise_model"] and high["path"].endswith("high_noise_model") and low["path"].endswith("low_noise_model")
    assert (high["in_channels"], high["out_channels"], high["parameters"]) == (36, 16, 14_288_901_184)


def test_a_checkpoint_folder_lists_all_its_models(checkpoints):
    kinds = {m["kind"]: m for m in inspect(checkpoints["t2v"])}
    assert set(kinds) == {"dit", "text_encoder", "vae"} and kinds["dit"]["variant"] is None and kinds["vae"]["variant"] == "2.1"
    assert kinds["text_encoder"]["layers"] == 2 and kinds["text_encoder"]["heads"] == 3


def test_prefixes_are_stripped(tmp_path):
    from safetensors.torch import save_file
    model = tiny.dit("ti2v", dim=128, heads=1)
    save_file({f"model.diffusion_model._orig_mod.{k}": v.half() for k, v in model.state_dict().items()}, tmp_path / "m.safetensors")
    (m,) = inspect(tmp_path / "m.safetensors")
    assert (m["kind"], m["model_type"], m["layers"], m["dtype"]) == ("dit", "ti2v", 3, "float16")


def test_lora_and_video_files(tmp_path):
    save_lora(tmp_path / "a.safetensors", trained(blocks=[1, 2]), variant="ti2v-5B")
    (m,) = inspect(tmp_path / "a.safetensors")
    assert (m["kind"], m["ranks"], m["blocks"], m["matrices"]) == ("lora", {4: 4}, [1, 2], 4) and m["metadata"]["variant"] == "ti2v-5B"
    write_mp4(tmp_path / "v.mp4", torch.zeros(3, 5, 32, 64), 16, json.dumps({"prompt": "一只猫", "seed": 3}))
    (m,) = inspect(tmp_path / "v.mp4")
    assert (m["kind"], m["width"], m["height"], m["frames"], m["fps"], m["settings"]) == ("video", 64, 32, 5, 16.0, {"prompt": "一只猫", "seed": 3})


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
    run = subprocess.run([sys.executable, ROOT / "diag.py", "inspect", tmp_path / "page.safetensors", checkpoints["ti2v"], "--json", tmp_path / "f.json"],
                         capture_output=True, text=True)
    assert run.returncode == 1 and "1 of 2 paths" in run.stderr and "Traceback" not in run.stderr
    assert [m["kind"] for m in json.loads((tmp_path / "f.json").read_text())["models"]] == ["unreadable", "dit", "text_encoder", "vae"]


def test_a_missing_expert_and_a_results_folder(checkpoints, tmp_path):
    import shutil
    shutil.copytree(checkpoints["t2v"], tmp_path / "c")
    shutil.rmtree(tmp_path / "c" / "low_noise_model")
    assert "low_noise_model is missing" in inspect(tmp_path / "c")[0]["summary"]
    (tmp_path / "out").mkdir()
    save_lora(tmp_path / "out" / "adapter_model.safetensors", trained())
    assert [m["kind"] for m in inspect(tmp_path / "out")] == ["lora"]


@pytest.mark.parametrize("rank", [1, 4])
def test_delta_equals_brute_force(tmp_path, checkpoints, rank, report):
    from diag import delta, together
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
        for got, want in ((r["norm"], d.norm()), (r["base"], w.norm()), (r["ratio"], d.norm() / w.norm()), (r["spectral"], s[0]), (r["rank"], (-(p * p.log()).sum()).exp())):
            worst = max(worst, abs(got / want.item() - 1))
        every.append((d.flatten(), w.flatten()))
    report("relative error", worst, 1e-5)
    d, w = (torch.cat(u).norm().item() for u in zip(*every))
    report("of all together", abs(together(rows) / (d / w) - 1), 1e-5)


def test_a_capped_lora_stays_under_its_cap(tmp_path, checkpoints):
    from diag import cap_lora, delta
    save_lora(tmp_path / "a.safetensors", trained())
    rows = delta(tmp_path / "a.safetensors", checkpoints["ti2v"])
    cap = sorted(r["ratio"] for r in rows)[2]
    assert cap_lora(tmp_path / "a.safetensors", rows, cap, tmp_path / "b.safetensors") == 3
    after = delta(tmp_path / "b.safetensors", checkpoints["ti2v"])
    for old, new in zip(rows, after):
        assert abs(new["ratio"] / min(old["ratio"], cap) - 1) < 1e-5


def test_delta_refuses_what_does_not_fit(tmp_path, checkpoints):
    from diag import delta
    save_lora(tmp_path / "a.safetensors", trained())
    with pytest.raises(BadInput, match="does not fit"):
        delta(tmp_path / "a.safetensors", ROOT / "nano")
