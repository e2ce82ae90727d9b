"""Every layout that weights come in, and every way in which a file can be wrong."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import scripts
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_formats import write_gguf

from benchmarks import tiny
from nanowan.errors import BadInput, cli
from nanowan.files import atomic, save_pickle
from nanowan.formats import header
from nanowan.formats.dit import load_wan
from nanowan.formats.header import read_header, save
from nanowan.formats.layouts import read_headers, weight_files
from nanowan.formats.t5 import load_t5
from nanowan.formats.vae import load_vae

ROOT = Path(__file__).parent.parent


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_sharded_folder(checkpoints):
    assert same(load_wan(checkpoints["ti2v"], dtype=torch.float32), tiny.dit("ti2v"))


def test_unsharded_folder(tmp_path):
    model = tiny.dit("t2v")
    tiny.write_dit(tmp_path, model)
    for f in tmp_path.glob("*.safetensors*"):
        f.unlink()
    save_file(model.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    assert same(load_wan(tmp_path, dtype=torch.float32), model)


@pytest.mark.parametrize(
    "rename",
    ["{}", "model.diffusion_model.{}", "diffusion_model.{}", "_orig_mod.{}", "model.diffusion_model._orig_mod.{}"],
)
def test_one_file_alone_with_any_prefix(tmp_path, rename):
    """Without a config.json the head width is 128, as in every released size."""
    model = tiny.dit("i2v", dim=256, heads=2, layers=2)
    save_file({rename.format(k): v for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    loaded = load_wan(tmp_path / "model.safetensors", dtype=torch.float32)
    assert same(loaded, model) and loaded.config == model.config


def test_compile_leftovers_inside_keys(tmp_path):
    model = tiny.dit("t2v", dim=128, heads=1)
    save_file(
        {k.replace("blocks.1.", "blocks.1._orig_mod."): v for k, v in model.state_dict().items()},
        tmp_path / "m.safetensors",
    )
    assert same(load_wan(tmp_path / "m.safetensors", dtype=torch.float32), model)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_encoder_and_vae_in_both_formats(tmp_path, checkpoints, suffix):
    for f in ("models_t5_umt5-xxl-enc-bf16.pth", "Wan2.2_VAE.pth"):
        state = torch.load(checkpoints["ti2v"] / f, weights_only=True)
        if suffix == ".pth":
            torch.save(state, tmp_path / f)
        else:
            save_file({k: v.contiguous() for k, v in state.items()}, (tmp_path / f).with_suffix(suffix))
    (tmp_path / f"Wan2.2_VAE{suffix}").rename(tmp_path / f"wan2.2_vae{suffix}")  # ComfyUI's name
    shutil.copytree(checkpoints["ti2v"] / "google", tmp_path / "google")
    assert same(load_vae(tmp_path), tiny.vae(True))
    assert same(load_t5(tmp_path, dtype=torch.float32), tiny.text_encoder())


@pytest.mark.parametrize("v22, mult", [(False, (1, 3, 3, 5)), (True, (1, 2, 2, 6))])
def test_widths_come_from_the_shapes(tmp_path, v22, mult):
    from vae import VAE

    odd = tiny.randomize(VAE("2.2" if v22 else "2.1", 6, 10 if v22 else 6, mult), 0)
    torch.save(odd.state_dict(), tmp_path / "a_VAE.pth")
    assert same(load_vae(tmp_path), odd)


def test_pickles_are_read_tensor_by_tensor(tmp_path):
    """Offsets, shapes, dtypes and strides from a .pth header give back what torch.save wrote."""
    state = {
        "a": torch.randn(3, 4),
        "b": torch.randn(5).bfloat16(),
        "c": torch.randn(4, 6).t(),
        "d": torch.randn(10, 2)[3:5],
        "e": torch.randn(6, 5)[:, :3],
        "f": torch.randn(8, 2)[1::2],
    }
    torch.save(state, tmp_path / "x.pth")
    entries, _ = read_header(tmp_path / "x.pth")
    assert all(torch.equal(entries[k].read(), v) and entries[k].dtype == v.dtype for k, v in state.items())


def test_dtype_and_what_stays_fp32(checkpoints):
    state = load_wan(checkpoints["ti2v"]).state_dict()
    assert state["blocks.0.self_attn.q.weight"].dtype == state["text_embedding.0.weight"].dtype == torch.bfloat16
    for name in (
        "blocks.0.modulation",
        "blocks.0.norm3.weight",
        "blocks.0.self_attn.norm_q.weight",
        "time_embedding.0.weight",
        "time_projection.1.weight",
        "head.head.weight",
        "head.modulation",
    ):
        assert state[name].dtype == torch.float32, name


def test_missing_unexpected_and_misshapen_keys_are_all_listed(tmp_path):
    state = tiny.dit("t2v").state_dict()
    del state["blocks.1.norm3.bias"]
    state["blocks.0.extra"] = torch.zeros(1)
    state["head.head.bias"] = torch.zeros(3)
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t2v", "dim": 48, "num_heads": 2}))
    with pytest.raises(BadInput) as e:
        load_wan(tmp_path)
    for part in (
        "1 missing (blocks.1.norm3.bias)",
        "1 unexpected (blocks.0.extra)",
        "head.head.bias is (3,), should be (64,)",
    ):
        assert part in str(e.value)


class Code:
    def __reduce__(self):
        return print, ("this must never run",)


def break_checkpoint(folder, how):
    shard = sorted(folder.glob("*.safetensors"))[0]
    if how == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif how == "truncated header":
        shard.write_bytes(shard.read_bytes()[:50])
    elif how == "empty":
        shard.write_bytes(b"")
    elif how == "wrong shape":
        state = load_file(shard)
        save_file(
            {
                **state,
                "blocks.0.norm3.weight" if "blocks.0.norm3.weight" in state else next(iter(state)): torch.zeros(3),
            },
            shard,
        )
    elif how == "missing shard":
        shard.unlink()
    elif how == "pickle with code":
        torch.save({"w": Code()}, folder / "Wan2.2_VAE.pth")
    elif how == "old pickle":
        (folder / "Wan2.2_VAE.pth").write_bytes(pickle.dumps({"w": 1}))
    elif how == "html":
        shard.write_text("<!DOCTYPE html><html><body>404</body></html>")
    elif how == "truncated pickle":
        f = folder / "models_t5_umt5-xxl-enc-bf16.pth"
        f.write_bytes(f.read_bytes()[:1000])
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "other config":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "dim": 64}))
    elif how == "list config":
        (folder / "config.json").write_text("[]")
    elif how == "bad tokenizer":
        (folder / "google" / "umt5-xxl" / "spiece.model").write_text("<html>")
    elif how == "bad index":
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text("[]")


@pytest.mark.parametrize(
    "how, message",
    [
        ("truncated", "truncated"),
        ("truncated header", "truncated"),
        ("empty", "not a weight file"),
        ("wrong shape", "should be"),
        ("missing shard", "missing diffusion_pytorch_model-00001-of-00002"),
        ("pickle with code", "only tensors are accepted"),
        ("old pickle", "old-style pickle"),
        ("html", "a web page"),
        ("truncated pickle", "not a readable torch file"),
        ("no config", "config.json is missing"),
        ("bad index", "not a weight index"),
        ("other config", "dim is 64, the weights have 48"),
        ("list config", "not a model configuration"),
        ("bad tokenizer", "not a sentencepiece model"),
    ],
)
def test_a_broken_checkpoint_is_one_clear_line(checkpoints, tmp_path, how, message):
    folder = tmp_path / "c"
    shutil.copytree(checkpoints["ti2v"], folder)
    break_checkpoint(folder, how)
    run = scripts.run(
        ROOT / "sample.py",
        "--ckpt",
        folder,
        "--size",
        "32x32",
        "--frames",
        "1",
        "--steps",
        "1",
        "--device",
        "cpu",
        "--out",
        tmp_path / "v.mp4",
    )
    last = run.stderr.strip().splitlines()[-1]
    assert run.returncode == 1 and last.startswith("error: ") and message in last and str(folder) in last, run.stderr
    assert "Traceback" not in run.stderr and "this must never run" not in run.stdout


LOAD = r"""
import re, sys, torch
from nanowan.formats.dit import load_wan
def peak():
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
before = peak()
model = load_wan(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
print(peak() - before, sum(p.nbytes for p in model.parameters()))
"""


@pytest.fixture(scope="module")
def half_a_gigabyte(tmp_path_factory):
    folder = tmp_path_factory.mktemp("half_a_gigabyte")
    tiny.write_dit(folder, tiny.dit("t2v", dim=1024, heads=8, layers=10), 3)
    assert sum(f.stat().st_size for f in folder.glob("*.safetensors")) > 0.5e9
    yield folder
    shutil.rmtree(folder)


def peak_of_loading(folder, dtype):
    """(peak bytes while load_wan runs, beside what importing takes; bytes of the weights)."""
    run = subprocess.run(
        [sys.executable, "-c", LOAD, folder, dtype], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return map(int, run.stdout.split())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_needs_hardly_more_than_the_weights(half_a_gigabyte, dtype, report):
    """Twice the weights would be twice the limit."""
    peak, weights = peak_of_loading(half_a_gigabyte, dtype)
    report("peak memory over weights x 1.2 + 100 MB", peak / (weights * 1.2 + 100e6), 1.0)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("form", ["int8", "gguf"])
def test_decoding_while_loading_needs_hardly_more_than_the_weights(tmp_path, form, report):
    """Weights that are decoded to fp32 on the way to bf16: all of them in fp32 would be above the limit."""
    model = tiny.dit("t2v", dim=1024, heads=8, layers=4)
    tiny.write_dit(tmp_path, model)
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    state = dict(model.state_dict())
    if form == "gguf":
        write_gguf(tmp_path / "m.gguf", state, "Q8_0")
    else:
        for name in [n for n, w in state.items() if n.endswith(".weight") and w.dim() == 2]:
            scale = state[name].abs().amax(1, keepdim=True) / 127
            state[f"{name}_scale"], state[name] = scale, (state[name] / scale).round().to(torch.int8)
        save_file(state, tmp_path / "m.safetensors")
    peak, weights = peak_of_loading(tmp_path, "bfloat16")
    report("peak memory over weights x 1.2 + 50 MB", peak / (weights * 1.2 + 50e6), 1.0)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    save(tmp_path / "a.safetensors", {"x": torch.ones(2)}, {"step": 1})
    with pytest.raises(RuntimeError, match="power cut"):
        with atomic(tmp_path / "a.safetensors") as tmp:
            assert tmp.parent == tmp_path  # on the same disk, so that it can be renamed
            tmp.write_text("half")
            raise RuntimeError("power cut")
    assert load_file(tmp_path / "a.safetensors")["x"].sum() == 2
    assert [f.name for f in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_header_whose_length_spells_a_zip(tmp_path):
    """A safetensors header of 19280 bytes begins with b"PK", as a zip does."""
    from safetensors.torch import save_file

    tensors, metadata = {"a": torch.arange(3.0)}, {"pad": ""}
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    size = int.from_bytes((tmp_path / "a.safetensors").read_bytes()[:8], "little")
    for extra in range(19280 - size - 16, 19280 - size + 1):
        save_file(tensors, tmp_path / "a.safetensors", {"pad": "x" * extra})
        if (tmp_path / "a.safetensors").read_bytes()[:2] == b"PK":
            break
    assert (tmp_path / "a.safetensors").read_bytes()[:2] == b"PK"
    assert torch.equal(read_header(tmp_path / "a.safetensors")[0]["a"].read(), tensors["a"])


def test_what_is_saved_is_read_by_others_and_equal_bytes_each_time(tmp_path):
    """Every dtype and layout; neither the order in which tensors and metadata are given, nor the process, shows."""
    tensors = {
        "z": torch.randn(3, 4).t(),
        "a": torch.randn(5, 2).bfloat16(),
        "b": torch.tensor(3),
        "c": torch.ones(3, dtype=torch.bool),
        "d": torch.zeros(0, 4),
        "e": torch.randn(7, requires_grad=True).half(),
        "f": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "g": torch.arange(10)[::2],
        "é": torch.randn(1).double(),
    }
    metadata = {"step": 3, "keywords": "naïve, 猫", "base": None, "alpha": 1.5}
    save(tmp_path / "a.safetensors", tensors, metadata)
    save(tmp_path / "b.safetensors", dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, t in tensors.items():
        assert found[name].dtype == t.dtype and found[name].shape == t.shape
        assert torch.equal(found[name].float(), t.float()), name
    with safe_open(tmp_path / "a.safetensors", "pt") as f:
        assert f.metadata() == {k: str(v) for k, v in metadata.items()}
    entries, _ = read_header(tmp_path / "a.safetensors")
    assert all(torch.equal(entries[k].read().float(), v.float()) for k, v in tensors.items())
    assert all(e.offset % e.dtype.itemsize == 0 for e in entries.values())
    save(tmp_path / "none.safetensors", {"x": torch.ones(1)})
    with safe_open(tmp_path / "none.safetensors", "pt") as f:
        assert not f.metadata()


def write_header(path, header, size):
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + bytes(size))


@pytest.mark.parametrize(
    "offsets, size, message", [([0, 12], 16, "do not fit the shape of w"), ([0, 20], 20, "do not")]
)
def test_offsets_that_do_not_fit_the_shape(tmp_path, offsets, size, message):
    write_header(tmp_path / "a.safetensors", {"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": offsets}}, size)
    with pytest.raises(BadInput, match=f"a.safetensors: .*{message}"):
        read_header(tmp_path / "a.safetensors")


def test_a_tensor_in_two_files_is_refused(tmp_path):
    """Under the same name, or under one that only a prefix tells from it: which of the two would count?"""
    for second in ("x.weight", "model.diffusion_model.x.weight"):
        save(tmp_path / "a.safetensors", {"x.weight": torch.zeros(2)})
        save(tmp_path / "b.safetensors", {second: torch.ones(2)})
        with pytest.raises(BadInput, match=r"b.safetensors: x.weight stands in a.safetensors too"):
            read_headers([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])


def test_which_file_of_a_folder_is_the_dit(tmp_path):
    """One that has another name is, where nothing else can be; a VAE and a text encoder are not."""
    for name in ("models_t5_umt5-xxl-enc-bf16", "wan2.2_VAE", "umt5_xxl_fp16", "UMT5-xxl-enc-fp8_e4m3fn"):
        save(tmp_path / f"{name}.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(BadInput, match="holds neither"):
        weight_files(tmp_path)
    save(tmp_path / "wan2.2_ti2v_5B_fp16.safetensors", {"x": torch.zeros(1)})
    assert weight_files(tmp_path) == [tmp_path / "wan2.2_ti2v_5B_fp16.safetensors"]
    save(tmp_path / "another.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(BadInput, match="but 2 other .safetensors"):
        weight_files(tmp_path)
    save(tmp_path / "dit.safetensors", {"model.diffusion_model.patch_embedding.weight": torch.zeros(1)})
    assert weight_files(tmp_path) == [tmp_path / "dit.safetensors"]
    save(tmp_path / "diffusion_pytorch_model.safetensors", {"x": torch.zeros(1)})
    assert weight_files(tmp_path) == [tmp_path / "diffusion_pytorch_model.safetensors"]


def test_a_write_is_on_the_disk_before_its_name_is(tmp_path, monkeypatch):
    """The file is synced, then renamed, then its folder is synced."""
    events, fsync, replace = [], os.fsync, os.replace

    def note_sync(fd):
        name = Path(os.readlink(f"/proc/self/fd/{fd}")) if Path("/proc/self/fd").exists() else None
        events.append("sync folder" if os.path.isdir(name or f"/dev/fd/{fd}") else "sync file")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", lambda *a: (events.append("rename"), replace(*a)))
    save(tmp_path / "a.safetensors", {"x": torch.ones(2)})
    save_pickle(tmp_path / "a.pt", {"x": torch.ones(2)})
    assert events == ["sync file", "rename", "sync folder"] * 2
    assert torch.load(tmp_path / "a.pt")["x"].sum() == 2


def test_errors_of_the_system_name_the_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="File exists|Not a directory") as e:
        save(tmp_path / "file" / "a.safetensors", {"x": torch.ones(2)})
    assert e.value.filename == str(tmp_path / "file" / "a.safetensors")
    with pytest.raises(OSError, match="Is a directory"):
        save(tmp_path, {"x": torch.ones(2)})
    with pytest.raises(OSError, match="No such file or directory: .*/source") as e, atomic(tmp_path / "a"):
        open(tmp_path / "source")  # a file that is read meanwhile has its own name
    with pytest.raises(OSError, match="cannot be written .Input/output error; the disk at /.* GB free"):
        with atomic(tmp_path / "a"):
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt(), 130), (BadInput("--x: no"), "error: --x: no")])
def test_a_script_ends_without_a_traceback(error, code):
    def main():
        raise error

    with pytest.raises(SystemExit) as e:
        cli(main)
    assert e.value.code == code


def test_a_header_is_read_once_while_its_file_stays_as_it_is(tmp_path, monkeypatch):
    """Another file under its name is read anew, also in place and of the same size; what one caller does with what it
    was given is not seen by the next.
    """
    reads, real, file = [], header._read_header, tmp_path / "a.safetensors"
    monkeypatch.setattr(header, "_read_header", lambda path: reads.append(path) or real(path))

    def write(name, age):
        header.save(tmp_path / "new", {name: torch.zeros(3)}, {})
        file.write_bytes((tmp_path / "new").read_bytes())
        os.utime(file, times=(time.time() - age,) * 2)

    write("a", 10)
    for _ in range(3):
        entries, _ = header.read_header(file)
        assert [*entries] == ["a"]
        entries.clear()
    assert len(reads) == 1
    write("b", 9)
    assert [*header.read_header(file)[0]] == ["b"] and len(reads) == 2
    write("c", 0)  # so new that it may be written again within a tick of the clock
    assert [*header.read_header(file)[0]] == [*header.read_header(file)[0]] == ["c"] and len(reads) == 4
