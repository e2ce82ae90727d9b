"""Files that commit 500b401 wrote are still read, and its runs go on: data/old_files.zip.

In it are six tiny clips and photos, their cache, and of four runs on nano (about.json: the flags) the state after two
of four steps, the log of all four, and what they ended with. Nothing is compared to the bit that a CPU has computed
since.
"""

import importlib
import json
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.scripts import NoPlan
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lora import adapter, inject
from nanowan import cache
from nanowan.formats.dit import load_wan
from nanowan.formats.header import load
from nanowan.formats.lora import start_from
from nanowan.formats.t5 import load_t5
from nanowan.pipeline import Pipeline
from nanowan.settings import NANO
from nanowan.training.run_dir import Run
from nanowan.training.state import TrainState
from nanowan.variants.registry import parts_of

ZIP = Path(__file__).parent / "data" / "old_files.zip"
RESULT = {"train_lora": "adapter_model.safetensors", "train_te": "text_encoder.safetensors"}
with zipfile.ZipFile(ZIP) as z:
    ABOUT = json.loads(z.read("about.json"))


@pytest.fixture
def old(tmp_path):
    with zipfile.ZipFile(ZIP) as z:
        z.extractall(tmp_path)
    return tmp_path


def saved_state(out):
    """The state that lies in a run's folder, with what is sharded in its place, as PyTorch alone reads it."""
    file = out / "checkpoints" / "step_000002.pt"
    state, shards = torch.load(file, weights_only=True), {}
    if state["shards"]:
        dcp_to_torch_save(file.with_suffix(".shards"), out / "whole.pt")
        shards = torch.load(out / "whole.pt", weights_only=True)

    def whole(v):
        if isinstance(v, dict):
            return {k: whole(x) for k, x in v.items()}
        return [whole(x) for x in v] if isinstance(v, list) else shards.get(v, v) if isinstance(v, str) else v

    return {k: whole(state[k]) for k in ("params", "opt", "guard", "ema")}


def tensors_of(tree):
    """All tensors and numbers in nested lists and dictionaries, by their places."""
    if isinstance(tree, (dict, list)):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {f"{k}.{place}": v for k, x in pairs for place, v in tensors_of(x).items()}
    return {"": tree}


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ABOUT["runs"])
def test_a_run_goes_on_from_its_state_and_its_cache(old, monkeypatch, capsys, name):
    """Parameters, moments, averages and the guard to the bit, and nothing is decoded or encoded again; then two steps
    at the old rates, on noise that is drawn anew (data.DRAWS), and a result of the same form. A run of two ranks goes
    on in one process.
    """
    script_name, flags = ABOUT["runs"][name]
    script, runs, restored = importlib.import_module(script_name), [], []
    want, before, out = saved_state(old / name), read_log(old / name), old / name
    lines, result = (out / "log.jsonl").read_text().splitlines(), load_file(out / RESULT[script_name])

    def restore(self, state, real=TrainState.restore):
        real(self, state)
        now = {k: v for k, v in self.state_dict().items() if k in want}
        restored.append({k: v.clone() if torch.is_tensor(v) else v for k, v in tensors_of(now).items()})

    def acquire(self, model, *more, real=Pipeline.acquire):
        assert model == "dit" or model == "text" and script_name == "train_te", f"{model} is needed again"
        return real(self, model, *more)

    monkeypatch.setattr(TrainState, "restore", restore)
    monkeypatch.setattr(Pipeline, "acquire", acquire)
    monkeypatch.setattr(cache, "read_items", None)  # nothing is decoded
    monkeypatch.setattr(script, "predict", lambda *_, **__: NoPlan())
    monkeypatch.setattr(script, "Run", lambda *args, **how: runs.append(Run(*args, **how)) or runs[0])
    where = f"--ckpt nano --data {old}/media --cache {old}/cache --out {out} --resume"
    flags = f"{where} {ABOUT['both']} {flags.replace('--fsdp --batch 1', '')}"
    monkeypatch.setattr("sys.argv", [script_name, *flags.split()])
    try:
        script.main()
    finally:
        for run in runs:
            run.close()
    assert "resumed at step 2" in capsys.readouterr().out

    (now,), want = restored, tensors_of(want)
    assert now.keys() == want.keys() and len(want) > 10
    for place, v in want.items():  # how a step is computed is no part of a state
        same = torch.equal(now[place], v) if torch.is_tensor(v) else now[place] == v or place.endswith("fused.")
        assert same, place
    kept = [line for line, r in zip(lines, before) if r["step"] <= 2]
    assert (out / "log.jsonl").read_text().splitlines()[: len(kept)] == kept
    for line, old_line in zip(read_log(out), before, strict=True):
        assert line["step"] == old_line["step"] and line.get("lr") == pytest.approx(old_line.get("lr"))
    found = load_file(out / RESULT[script_name])
    assert found.keys() == result.keys()
    for k, v in result.items():
        assert found[k].dtype == v.dtype and found[k].shape == v.shape and found[k].float().isfinite().all(), k


def test_an_adapter_is_merged_and_started_from(old):
    file = old / "lora" / "adapter_model.safetensors"
    raw = {k.removeprefix("diffusion_model."): v for k, v in load_file(file).items()}
    plain, dit = (Pipeline(NANO, loras=loras).acquire("dit").state_dict() for loras in ([], [f"{file}:1"]))
    assert {k for k in dit if not torch.equal(dit[k], plain[k])} == {f"blocks.3.cross_attn.{p}.weight" for p in "kv"}
    for p in "kv":
        name = f"blocks.3.cross_attn.{p}"
        change = raw[f"{name}.lora_B.weight"] @ raw[f"{name}.lora_A.weight"]
        assert change.norm() > 0
        assert torch.allclose(dit[f"{name}.weight"], plain[f"{name}.weight"] + change, atol=1e-6)
    model = load_wan(NANO, dtype=torch.float32)
    inject(model, rank=2, alpha=2, blocks=[3])
    start_from(adapter(model), file, 1.0, "dit")
    for name, (a, b) in adapter(model).items():
        assert torch.equal(a, raw[f"{name}.lora_A.weight"]) and torch.equal(b, raw[f"{name}.lora_B.weight"])


@pytest.mark.parametrize("name", ["te", "te_bf16", "te_shards"])
def test_a_delta_is_read_on_top_of_the_checkpoints_encoder(old, name):
    file = old / name / "text_encoder.safetensors"
    raw, metadata = load(file)
    assert metadata["delta"] == "True" and metadata["step"] == "4" and metadata["keywords"] == "crimson,azure"
    encoder, own = (load_t5(NANO, dtype=torch.float32, weights=w).state_dict() for w in (file, None))
    ids = raw["token_embedding.ids"]
    table = own.pop("token_embedding.weight")
    assert not torch.equal(raw["token_embedding.rows"].float(), table[ids])
    want = table.index_copy(0, ids, raw["token_embedding.rows"].float())
    assert torch.equal(encoder["token_embedding.weight"], want)
    assert all(torch.equal(encoder[k], v) for k, v in own.items())


def test_files_in_the_cache_have_the_names_that_they_had(tmp_path):
    """Those of every variant's samples, and of texts: what decides them is the same, and is written the same."""
    speech = tmp_path / "wav2vec2-large-xlsr-53-english"
    speech.mkdir()
    (speech / "model.safetensors").write_text("speech")
    (speech / "config.json").write_text("{}")
    for name, text in (("models_clip_x.pth", "clip"), ("vae", "vae"), ("t5", "t5")):
        (tmp_path / name).write_text(text)
    motion = torch.nn.Linear(2, 1).requires_grad_(False)
    motion.weight.fill_(1)
    motion.bias.fill_(2)
    files = {"s2v": {"pose": "ab", "sound": "cd"}, "animate": {"pose": "ab", "face": "ef"}}
    found = {}
    for kind in ("t2v", "ti2v", "i2v", "s2v", "animate"):
        sidecars = {k: ("file", digest) for k, digest in files.get(kind, {}).items()}
        how = {"bucket": (64, 48, 17), "start": 0.5, "fps": 16.0, "frames_after": 73 if kind == "s2v" else 0}
        how["changed"] = {}
        item = SimpleNamespace(digest="1a" * 64, sidecars=sidecars, **how)
        settings = SimpleNamespace(conditioning=parts_of(kind).conditioning)
        pipe = SimpleNamespace(dir=tmp_path, acquire=lambda name: motion, settings=settings)
        samples = parts_of(kind).samples(pipe)
        found[kind] = cache.latent_files([item], tmp_path, tmp_path / "vae", samples)[0].name
    for dtype in (torch.float32, torch.bfloat16):
        (file,) = cache.text_files(["a fox, 狐狸"], tmp_path, [cache.digest(tmp_path / "t5")], dtype).values()
        found[str(dtype)] = file.name
    assert found == ABOUT["names"]
