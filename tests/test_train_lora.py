"""train_lora.py from the command line: every model type, resuming, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from helpers import scripts
from helpers.adapters import save_lora
from test_data import clip

from benchmarks import tiny
from diagnostics.delta import delta, relative_norm
from lora import inject
from nanowan import memory_estimate, pipeline
from nanowan.errors import BadInput
from nanowan.formats.header import load, save
from nanowan.formats.lora import read_lora
from nanowan.pipeline import Adapter, Pipeline
from nanowan.settings import released
from nanowan.training.run_dir import adapter_file, remove_older_adapters
from train_lora import arguments, check, initial_loras, predict

ROOT = Path(__file__).parent.parent


def adapters_in(out):
    return sorted(f.stem for f in out.glob("*.safetensors"))


def train(ckpt, media, out, *flags, check=True, code=None, plan=False):
    where = "--ckpt", ckpt, "--data", media, "--out", out, "--cache", out.parent / "cache"
    how = "--resolution 64x64 --frames 9 --steps 6 --batch 2 --rank 4 --device cpu --dtype fp32".split()
    return scripts.run(ROOT / "train_lora.py", *where, *how, *flags, code=code, check=check, plan=plan)


@pytest.mark.parametrize(
    "kind, flags, name",
    [
        ("ti2v", [], "adapter_model"),
        ("t2v", ["--expert", "high"], "adapter_model_high"),
        ("i2v", ["--expert", "low", "--checkpointing"], "adapter_model_low"),
    ],
)
def test_every_model_type_trains_and_samples(checkpoints, media, tmp_path, kind, flags, name):
    from PIL import Image

    from sample import generate
    from sample import load as load_models

    run = train(checkpoints[kind], media, tmp_path / "out", *flags, plan=True)
    assert "data: 3 files, 0 skipped" in run.stdout and "plan: peak memory" in run.stdout
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and all(line["loss"] > 0 for line in lines)
    changes, meta = read_lora(tmp_path / "out" / f"{name}.safetensors")
    assert len(changes) == 6 and all(change.norm() > 0 for change in changes.values())
    assert meta["expert"] == (flags[1] if flags else "dit") and meta["step"] == "6"
    image = Image.open(media / "c.png") if kind == "i2v" else None
    settings = dict(image=image, size=(32, 32) if kind != "ti2v" else (64, 64), frames=5, steps=4, progress=False)
    plain = generate(load_models(checkpoints[kind]), "a dog", **settings)[1]
    adapted = generate(
        load_models(checkpoints[kind], lora=[str(tmp_path / "out" / f"{name}.safetensors")]), "a dog", **settings
    )[1]
    assert not torch.equal(plain, adapted)
    none = generate(
        load_models(checkpoints[kind], lora=[str(tmp_path / "out" / f"{name}.safetensors:0")]), "a dog", **settings
    )[1]
    assert torch.equal(plain, none)


def test_a_stopped_run_goes_on_bit_for_bit(checkpoints, media, tmp_path):
    """Under another name for its files, of which the last two saves are kept, without a trace in what is learned."""
    run = train(checkpoints["ti2v"], media, tmp_path / "whole", "--dropout", 0.2)
    moved = relative_norm(delta(tmp_path / "whole" / "adapter_model.safetensors", checkpoints["ti2v"]))
    assert f"dW/W {moved:.2g}\n" in run.stdout and moved > 0
    named = ["--dropout", 0.2, "--save_every", 2, "--name", "my style", "--keep", 2, "--trigger", "red, dog"]
    assert train(checkpoints["ti2v"], media, tmp_path / "cut", *named, check=False, code=KILL).returncode == -9
    assert adapters_in(tmp_path / "cut") == ["my style", "my style_000002"]
    train(checkpoints["ti2v"], media, tmp_path / "cut", *named, "--resume")
    assert adapters_in(tmp_path / "whole") == ["adapter_model", "adapter_model_000006"]
    assert adapters_in(tmp_path / "cut") == ["my style", "my style_000004", "my style_000006"]
    a, b, kept, earlier = (
        load(tmp_path / f"{file}.safetensors")
        for file in ("whole/adapter_model", "cut/my style", "cut/my style_000006", "cut/my style_000004")
    )
    assert a[0].keys() == b[0].keys() and all(torch.equal(a[0][k], b[0][k]) for k in a[0])
    assert all(torch.equal(kept[0][k], b[0][k]) for k in b[0])
    assert [m["step"] for _, m in (a, b, kept, earlier)] == ["6", "6", "6", "4"]
    assert not all(torch.equal(earlier[0][k], b[0][k]) for k in b[0])
    began = json.loads((tmp_path / "whole" / "flags.json").read_text())["started"]
    assert a[1]["modelspec.date"] == began[:10] and "trained_words" not in a[1]
    assert (b[1]["modelspec.title"], kept[1]["modelspec.title"]) == ("my style", "my style_000006")
    assert b[1]["trained_words"] == b[1]["modelspec.trigger_phrase"] == "red, dog"
    assert json.loads(b[1]["ss_tag_frequency"]) == {"captions": {"red": 1, "dog": 1}}
    losses = [
        [
            (json.loads(line)["step"], json.loads(line)["loss"])
            for line in (tmp_path / d / "log.jsonl").read_text().splitlines()
        ]
        for d in ("whole", "cut")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_which_adapters_are_kept(tmp_path):
    """The last steps up to the one that was saved, of both experts; no other file, and no other name's."""
    others = ["style.safetensors", "style_high.safetensors", "style_2_000100.safetensors", "style_000100.txt"]
    for name in [*others, "style_v2_000100_low.safetensors"]:
        (tmp_path / name).touch()
    files = [
        adapter_file(tmp_path, f"style_{s:06d}", e) for s in (100, 200, 300, 1_000_000) for e in ("dit", "high", "low")
    ]
    assert [f.name for f in files[:3]] == [f"style_000100{e}.safetensors" for e in ("", "_high", "_low")]
    assert [adapter_file(tmp_path, "style", e).name for e in ("dit", "high")] == others[:2]
    for file in files:
        file.touch()
    remove_older_adapters(tmp_path, "style", 300, 2)
    assert [f for f in files if f.exists()] == files[3:]
    remove_older_adapters(tmp_path, "style", 1_000_000, 1)
    assert [f for f in files if f.exists()] == files[9:] and all((tmp_path / name).exists() for name in others)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--name", "out/style"], "--name out/style: a file's name without folder"),
        (["--name", ""], "--name : a file's name"),
        (["--name", ".style"], "--name .style"),
        (["--keep", "0"], "--keep 0: must be at least 1"),
    ],
)
def test_names_and_numbers_that_are_refused(checkpoints, flags, message):
    args = arguments(["--ckpt", str(checkpoints["ti2v"]), "--device", "cpu", "--dtype", "fp32", *flags])
    with pytest.raises(BadInput, match=message):
        check(args, Pipeline(checkpoints["ti2v"]).settings, 3)


KILL = """
import os, signal, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
import train_lora
real, calls = train_lora.update, []
def killing(*a, **how):
    calls.append(1)
    if len(calls) == 4:  # in the middle of step 4, when step 2 is what was saved
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*a, **how)
train_lora.update = killing
train_lora.main()
"""


def test_experts_draw_on_their_own_side(checkpoints, media, tmp_path):
    code = (
        "import os, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, os.path.dirname(sys.argv[0])); "
        "import data as m, train_lora; real = m.sample_timesteps\n"
        "def spy(*a):\n    t = real(*a); print('T', float(t.min()), float(t.max())); "
        "return t\nm.sample_timesteps = spy; train_lora.main()"
    )
    for expert, low, high in (("high", 0.875, 1.0), ("low", 0.0, 0.875)):
        where = ("--data", media, "--out", tmp_path / expert, "--cache", tmp_path / "cache", "--expert", expert)
        how = "--resolution 64x64 --frames 9 --steps 12".split()
        script = ROOT / "train_lora.py"
        run = scripts.run(script, "--ckpt", checkpoints["t2v"], *where, *how, code=code, check=True)
        drawn = [float(v) for line in run.stdout.splitlines() if line.startswith("T ") for v in line.split()[1:]]
        assert len(drawn) == 24 and low <= min(drawn) and max(drawn) <= high


@pytest.mark.parametrize(
    "kind, flags, message",
    [
        ("ti2v", ["--targets", "self_attn.q"], "--allow_self_attn"),
        ("ti2v", ["--targets", "cross_attn.x"], "--targets"),
        ("ti2v", ["--blocks", "1-7"], "0 to 2"),
        ("t2v", ["--i2v_prob", "0.5"], "only TI2V"),
        ("ti2v", ["--expert", "high"], "single model"),
        ("ti2v", ["--frames", "8"], "nearest 9"),
        ("ti2v", ["--caption_dropout", "5"], "at most 1"),
        ("ti2v", ["--alpha", "0"], "--alpha 0"),
        ("ti2v", ["--lr", "nan"], "--lr nan"),
        ("ti2v", ["--shift", "-2"], "--shift -2"),
        ("ti2v", ["--resolution", "8x8"], "at least 32"),
        ("ti2v", ["--targets", "ffn.0,ffn.0"], "each once"),
        ("ti2v", ["--rank", "0"], "--rank 0"),
        ("ti2v", ["--steps", "0"], "--steps 0"),
    ],
)
def test_what_it_refuses(checkpoints, media, tmp_path, kind, flags, message):
    run = train(checkpoints[kind], media, tmp_path / "out", *flags, check=False)
    assert (
        run.returncode == 1 and run.stderr.strip().splitlines()[-1].startswith("error: ") and message in run.stderr
    ), run.stderr
    assert "Traceback" not in run.stderr


def test_no_usable_data_exits_with_the_reasons(checkpoints, tmp_path):
    (tmp_path / "d").mkdir()
    clip(tmp_path / "d" / "tiny.mp4", 3)
    run = train(checkpoints["ti2v"], tmp_path / "d", tmp_path / "out", check=False)
    assert run.returncode == 1 and "nothing to train on; tiny.mp4 too short" in run.stderr


def test_a_finished_run_is_not_overwritten_but_may_go_on(checkpoints, media, tmp_path):
    train(checkpoints["ti2v"], media, tmp_path / "out")
    run = train(checkpoints["ti2v"], media, tmp_path / "out", check=False)
    assert run.returncode == 1 and "--resume" in run.stderr
    more = train(checkpoints["ti2v"], media, tmp_path / "out", "--resume", "--steps", 8).stdout
    assert "step 8/8 " in more and "--steps 8, which was 6: the cosine schedule is stretched" in more


@pytest.mark.parametrize("kind", ["ti2v", "i2v"])
def test_what_the_model_is_shown(checkpoints, media, tmp_path, monkeypatch, kind):
    """From what reaches the DiT alone: x is the cached latent at the time given as 1000 t, the loss is that of the
    velocity, the text is one of the item's own captions or, at the asked rate, the empty one, and I2V's conditioning
    stands behind the noise.
    """
    import train_lora
    from nanowan.cache import pixels
    from nanowan.formats.t5 import load_t5
    from nanowan.formats.vae import load_vae
    from nanowan.training.scan import scan
    from nanowan.variants.image import image_channels
    from wan import Wan

    seen, real = [], Wan.forward

    def spy(self, x, t, context, lens):
        out = real(self, x, t, context, lens)
        if type(out) is torch.Tensor:  # not the plan's fake one
            seen.append((x.detach(), t, context, lens, out.detach()))
        return out

    monkeypatch.setattr(Wan, "forward", spy)
    flags = [
        "--ckpt",
        checkpoints[kind],
        "--data",
        media,
        "--out",
        tmp_path / "out",
        "--cache",
        tmp_path / "cache",
        "--resolution",
        "64x64",
        "--frames",
        "9",
        "--steps",
        "40",
        "--batch",
        "1",
        "--rank",
        "2",
        "--device",
        "cpu",
        "--caption_dropout",
        "0.3",
        "--warmup",
        "5",
        "--lr",
        "1e-3",
        *(["--expert", "high"] if kind == "i2v" else []),
    ]
    monkeypatch.setattr("sys.argv", ["train_lora.py", *map(str, flags)])
    train_lora.main()
    items, _ = scan(media, 64 * 64, 32 if kind == "ti2v" else 16, 9, 24 if kind == "ti2v" else 16)
    vae, encoder = load_vae(checkpoints[kind]), load_t5(checkpoints[kind], dtype=torch.float32)
    clean = [vae.encode(pixels(i)[None]) for i in items]
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    empty, noises, items_seen = 0, [], []
    for (x, t, context, lens, out), line in zip(seen, lines, strict=True):
        assert t.dtype == torch.float32 and (875 <= t <= 1000 if kind == "i2v" else 0 < t < 1000)
        z, s = x[:, : vae.z_dim], t / 1000

        def fit(i, z=z, s=s):  # the noise, if item i is what was noised
            return None if clean[i].shape != z.shape else (z - (1 - s) * clean[i]) / s

        losses = {i: ((out - (fit(i) - clean[i])) ** 2).mean().item() for i in range(3) if fit(i) is not None}
        item = min(losses, key=lambda i: abs(losses[i] - line["loss"]))
        assert abs(losses[item] - line["loss"]) < 1e-4 * line["loss"]
        items_seen.append(item)
        noises.append(fit(item).std().item())
        texts = {c: encoder.encode([c])[0] for c in ["", *items[item].captions]}
        said = [c for c, e in texts.items() if e.shape[1] == lens[0] and torch.equal(e, context)]
        assert len(said) == 1
        empty += said == [""]
        if kind == "i2v":
            assert torch.equal(x[:, 16:], image_channels(vae, pixels(items[item])[None][:, :, :1], items[item].frames))
    assert set(items_seen) == {0, 1, 2} and 4 <= empty <= 22 and all(0.9 < n < 1.1 for n in noises[:5])
    assert abs(lines[0]["lr"] - 2e-4) < 1e-9 and abs(lines[5]["lr"] - 1e-3) < 1e-9 and lines[-1]["lr"] < 1.1e-4


def test_resuming_another_run_is_refused(checkpoints, media, tmp_path):
    train(checkpoints["ti2v"], media, tmp_path / "out")
    for flags, message in (
        (["--rank", 8], "rank was 4, is 8"),
        (["--seed", 5], "seed was 0, is 5"),
        (["--blocks", "1-2"], "blocks was"),
    ):
        run = train(checkpoints["ti2v"], media, tmp_path / "out", "--resume", *flags, check=False)
        assert run.returncode == 1 and message in run.stderr.strip().splitlines()[-1], run.stderr


def test_a_lora_that_is_no_start_is_refused_before_anything_is_encoded(checkpoints, media, tmp_path, monkeypatch):
    """One that is not there, is of another rank, of another model, or for the other expert."""
    import train_lora

    def no_work(*args):
        raise AssertionError("something is computed")

    monkeypatch.setattr(pipeline.Pipeline, "acquire", no_work)
    monkeypatch.setattr(train_lora, "Dataset", no_work)
    for name, kind, rank, expert in (("rank", "ti2v", 2, "dit"), ("other", "t2v", 4, "dit"), ("low", "t2v", 4, "low")):
        model = tiny.dit(kind, dim=96 if name == "other" else 48)
        inject(model, rank=rank)
        save_lora(tmp_path / f"{name}.safetensors", model, expert=expert)
    for kind, flags, message in (
        ("ti2v", "none.safetensors", "none.safetensors"),
        ("ti2v", "rank.safetensors", "rank are .*48, 48.*, 2.*, asked for are .*48, 48.*, 4"),
        ("ti2v", "other.safetensors", "rank are .*96, 96"),
        ("ti2v", "rank.safetensors --blocks 0-1 --rank 2", "asked for are none"),
        ("t2v", "low.safetensors --expert high", "low"),
    ):
        file, *more = flags.split()
        line = f"--ckpt {checkpoints[kind]} --data {media} --out {tmp_path}/out --rank 4 --device cpu"
        line += f" --init_lora {tmp_path}/{file}"
        monkeypatch.setattr("sys.argv", ["train_lora.py", *line.split(), *more])
        with pytest.raises(BadInput, match=message) as e:
            train_lora.main()
        assert "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()


def test_halves_and_flags_of_files_to_start_from(checkpoints, tmp_path):
    """A file with both experts starts each of those that are trained; one that says no expert needs a flag."""
    model, files, pipe = tiny.dit("t2v"), {}, Pipeline(checkpoints["t2v"])
    inject(model, rank=4)
    for name, expert in (("named", "low"), ("plain", None)):
        files[name] = str(tmp_path / f"{name}.safetensors")
        save_lora(files[name], model, **({"expert": expert} if expert else {}))
    tensors = load(files["plain"])[0]
    both = {
        k.replace("diffusion_model.", f"{c}."): t for c in ("transformer", "transformer_2") for k, t in tensors.items()
    }
    files["both"] = str(tmp_path / "both.safetensors")
    save(files["both"], both)

    def chosen(*specs, experts=("high", "low")):
        adapter = Adapter(tuple(experts), ("cross_attn.k", "cross_attn.v"), 4, 4, 0.0, None, 0)
        return initial_loras([spec.format(**files) for spec in specs], pipe, dict.fromkeys(experts), adapter)

    b, n, p = files["both"], files["named"], files["plain"]
    assert chosen("{both}") == {"high": b, "low": b} and chosen("{both}", experts=["low"]) == {"low": b}
    assert chosen("{both}:high", "{named}") == {"high": b, "low": n} and chosen("{plain}", experts=["low"]) == {
        "low": p
    }
    assert chosen("{plain}:high", "{plain}:low") == chosen("{plain}:both") == {"high": p, "low": p}
    for specs, message in (
        (["{plain}"], "for which expert"),
        (["{both}", "{named}"], "is for the same expert"),
        (["{both}:0.5"], "a weight means nothing here"),
    ):
        with pytest.raises(BadInput, match=message):
            chosen(*specs)
    with pytest.raises(BadInput, match="as the flag says, and here is only low"):
        chosen("{both}:both", experts=["low"])


@pytest.mark.parametrize("flags, number", [([], 5), (["--keep", "2"], 4), (["--keep", "9"], 5)])
def test_the_plan_counts_kept_adapters(monkeypatch, flags, number):
    """250 steps, saved at 100, 200 and at the end, the result, and the best by held-out loss."""
    monkeypatch.setattr(memory_estimate, "training", lambda spec, *_: spec.num_results)
    args = arguments(["--data", "x", "--device", "cpu", "--steps", "250", "--save_every", "100", *flags])
    s = released("ti2v-5B")
    assert predict(args, s, {}, check(args, s, 30)) == number
