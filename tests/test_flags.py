"""What the trainers' flags promise, one by one, on the smallest runs."""

import itertools
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.scripts import NoPlan
from test_data import photo

import data
import flow
import train_lora
import train_te
from diagnostics.logits import open_dataset
from flow import eval_timesteps
from nanowan.cache import cached_probe, digest, latent_files
from nanowan.formats.header import load, save
from nanowan.formats.t5 import load_t5
from nanowan.pipeline import Pipeline
from nanowan.settings import released
from nanowan.training import flags, state
from nanowan.training.flags import pick, recommended_flags
from nanowan.training.previews import Previews
from nanowan.training.run_dir import Run
from nanowan.training.state import TrainState
from nanowan.variants.registry import parts_of
from nanowan.variants.samples import Samples


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Four captioned photographs."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(4):
        photo(folder / f"{i}.png", 32 + 32 * (i % 2), 32, caption=f"photo {i}")
    return folder


def on(photos, folder):
    """Flags of a run on the CPU, into `folder`."""
    where = f"--data {photos} --out {folder}/out --cache {folder}/cache"
    return f"{where} --device cpu --dtype fp32 --resolution 32x32 --frames 1"


def no_plan(*_, **__):
    """In the place of a script's `predict`, which takes longer than the rest."""
    return NoPlan()


def test_each_step_heeds_its_flags(checkpoints, photos, tmp_path, monkeypatch):
    """Of a run of both experts, one step each: the gradient's norm, the decay, which captions are shown, that dropout
    is another one at each step, and where each adapter begins.
    """
    steps, captions, masks = [], [], []
    adamw_step, noisy, dropout = torch.optim.AdamW.step, flow.make_noisy_batch, torch.nn.Dropout.forward

    def step(self, *args):
        (group,) = self.param_groups
        grads = [p.grad for p in group["params"] if p.grad is not None]
        steps.append((torch.stack([g.norm() for g in grads]).norm().item(), group["weight_decay"]))
        masks.append(None)
        return adamw_step(self, *args)

    def make_noisy_batch(entries, texts, *args):
        captions.extend(texts)
        return noisy(entries, texts, *args)

    def forward(self, x):
        out = dropout(self, x)
        masks.append(out == 0)
        return out

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    monkeypatch.setattr(data, "make_noisy_batch", make_noisy_batch)
    monkeypatch.setattr(torch.nn.Dropout, "forward", forward)
    monkeypatch.setattr(train_lora, "predict", no_plan)
    words = f"--ckpt {checkpoints['t2v']} {on(photos, tmp_path)}"
    words += " --batch 1 --steps 2 --steps_per_expert 1 --held_out 0 --lr 1e-12"
    words += " --grad_clip 1e-6 --weight_decay 0.25 --caption_dropout 1 --dropout 0.5 --rank 2"
    monkeypatch.setattr("sys.argv", ["train_lora.py", *words.split()])
    train_lora.main()
    assert [decay for _, decay in steps] == [0.25, 0.25] and captions == ["", ""]
    assert [norm for norm, _ in steps] == pytest.approx([1e-6, 1e-6], rel=1e-3)
    first, second = (list(group) for end, group in itertools.groupby(masks, lambda m: m is None) if not end)
    assert first[0].any() and not torch.equal(first[0], second[0])
    high, low = (load(tmp_path / "out" / f"adapter_model_{name}.safetensors")[0] for name in ("high", "low"))
    begun = [name for name in high if "lora_A" in name or "lora_down" in name]
    assert begun and high.keys() == low.keys() and not any(torch.equal(high[name], low[name]) for name in begun)


@pytest.mark.parametrize("script", [train_lora, train_te])
def test_the_averages_are_what_is_evaluated_seen_and_saved(checkpoints, photos, tmp_path, monkeypatch, script):
    """Under --ema, each when it is due and after the last step; the weights themselves are back afterwards."""
    states, seen, weights = [], [], []

    def new_state(*args):
        states.append(TrainState(*args))
        return states[0]

    def look(what):
        now = [p.detach().clone() for p in states[0].params]
        assert all(map(torch.equal, now, states[0].ema.average)), what
        assert not weights or not all(map(torch.equal, now, weights[-1])), what
        seen.append((what, len(weights)))

    def step(self, adamw_step=torch.optim.AdamW.step):
        assert not weights or all(map(torch.equal, states[0].params, weights[-1]))
        adamw_step(self)
        weights.append([p.detach().clone() for p in states[0].params])

    monkeypatch.setattr(script, "predict", no_plan)
    monkeypatch.setattr(script, "TrainState", new_state)
    monkeypatch.setattr(script, "held_out_loss", lambda *_: look("loss") or {"val_loss": 1.0})
    monkeypatch.setattr(Previews, "write", lambda self, step: look(f"preview {step}"))
    monkeypatch.setattr(Run, "log_image", lambda *_: None)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    writer = "write_lora" if script is train_lora else "save_tensors"
    monkeypatch.setattr(script, writer, lambda *_, **__: look("save"))
    (tmp_path / "p.txt").write_text("a fox\n")
    words = f"--ckpt {checkpoints['ti2v']} {on(photos, tmp_path)}"
    words += " --batch 1 --steps 5 --held_out 0.5 --lr 1e-2 --ema 0.9"
    words += f" --warmup 0 --eval_every 2 --preview_every 4 --save_every 3 --previews {tmp_path}/p.txt"
    monkeypatch.setattr("sys.argv", [script.__name__, *words.split()])
    script.main()
    assert len(weights) == 5
    assert [n for what, n in seen if what == "loss"] == [0, 2, 4, 5]
    assert [(what, n) for what, n in seen if "preview" in what] == [(f"preview {n}", n) for n in (0, 4, 5)]
    assert sorted({n for what, n in seen if what == "save"}) == [2, 3, 5]  # that of 2 as the best
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 2, 4, 5]


def test_steps_of_preserved_samples_alone_are_no_measure_for_others(checkpoints, photos, tmp_path, monkeypatch):
    """Of a run with --preserve: the guard is told which steps those are."""
    preserved, typical, targets, update = [], [], train_lora.with_base_targets, train_lora.update

    def with_base_targets(batch, *args):
        preserved.extend(batch.preserved.tolist())
        return targets(batch, *args)

    def noted_update(*args, **more):
        typical.append(more["typical"])
        return update(*args, **more)

    monkeypatch.setattr(train_lora, "predict", no_plan)
    monkeypatch.setattr(train_lora, "with_base_targets", with_base_targets)
    monkeypatch.setattr(train_lora, "update", noted_update)
    (tmp_path / "p.txt").write_text("a fox\n")
    words = f"--ckpt {checkpoints['ti2v']} {on(photos, tmp_path)} --batch 1 --steps 6 --held_out 0 --rank 2"
    words += f" --preserve 1 --preserve_prompts {tmp_path}/p.txt"
    monkeypatch.setattr("sys.argv", ["train_lora.py", *words.split()])
    train_lora.main()
    assert typical == [not p for p in preserved] and {*typical} == {True, False}


def test_rows_keep_the_norms_from_before_the_first_step(checkpoints, photos, tmp_path, monkeypatch):
    """Of a run of one step, --keyword_norm fixed."""
    monkeypatch.setattr(train_te, "predict", no_plan)
    words = f"--ckpt {checkpoints['ti2v']} {on(photos, tmp_path)}"
    words += " --batch 4 --steps 1 --held_out 0 --warmup 0 --anchor 0"
    words += " --keywords photo --train_blocks 0 --save delta --keyword_norm fixed --keyword_lr 0.5 --caption_dropout 0"
    monkeypatch.setattr("sys.argv", ["train_te.py", *words.split()])
    train_te.main()
    saved, _ = load(tmp_path / "out" / "text_encoder.safetensors")
    rows, table = saved["token_embedding.rows"], load_t5(checkpoints["ti2v"], dtype=torch.float32).token_embedding
    before = table.weight[saved["token_embedding.ids"]]
    assert (rows - before).norm() > 0.1 * before.norm()
    assert torch.allclose(rows.norm(dim=1), before.norm(dim=1), rtol=1e-5)


def test_a_trained_placeholder_is_known_to_what_reads_the_encoder(checkpoints, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(train_te, "predict", no_plan)
    words = f"--ckpt {checkpoints['ti2v']} {on(photos, tmp_path)}"
    words += " --batch 4 --steps 1 --held_out 0 --anchor 0 --save delta"
    words += " --keywords photo=placeholder:2 --train_blocks 0 --keyword_lr 0.5 --caption_dropout 0 --warmup 0"
    monkeypatch.setattr("sys.argv", ["train_te.py", *words.split()])
    train_te.main()
    file = tmp_path / "out" / "text_encoder.safetensors"
    plain, taught = (load_t5(checkpoints["ti2v"], dtype=torch.float32, weights=w) for w in (None, file))
    rows = load(file)[0]["token_embedding.ids"].tolist()
    assert len(rows) == 2 and not {*rows} & {*plain.tokenizer.ids("a photo 1")}
    assert {*rows} <= {*taught.tokenizer.ids("a photo 1")}
    assert not torch.equal(taught.token_embedding.weight[rows], plain.token_embedding.weight[rows])


def test_held_out_times_are_those_of_the_shift(tmp_path):
    """Each sample is seen at the same four times, in an expert's range, which the shift moves towards noise."""
    save(tmp_path / "a.safetensors", {"latents": torch.zeros(4, 1, 2, 2)})
    items = [SimpleNamespace(digest="1a" * 20, captions=["x", "y"])]
    for shift in (1.0, 5.0):
        batches = list(data.eval_batches(items, [tmp_path / "a.safetensors"], Samples(None), shift, 0.0, 0.9))
        times = torch.cat([batch.t for _, batch in batches])
        assert torch.equal(times, eval_timesteps(4, shift, 0.0, 0.9)) and times.max() < 0.9
        assert [i for i, _ in batches] == [0, 1, 2, 3] and all(batch.captions == ["x"] for _, batch in batches)
    assert not torch.equal(eval_timesteps(4, 1.0, 0.0, 0.9), eval_timesteps(4, 5.0, 0.0, 0.9))


def test_embeddings_are_of_their_tokenizer_too(checkpoints, tmp_path):
    """A folder with other pieces does not get the first one's embeddings from a shared cache."""
    shutil.copytree(checkpoints["ti2v"], tmp_path / "other")
    pieces = next((tmp_path / "other").rglob("spiece.model"))
    pieces.write_bytes(pieces.read_bytes() + b"\0")
    encoder = SimpleNamespace(encode=lambda texts: (torch.zeros(1, 2, 3), [2]))
    files = []
    for folder in (checkpoints["ti2v"], tmp_path / "other"):
        pipe = Pipeline(folder)
        pipe.acquire = lambda name: encoder
        dataset, config = object.__new__(data.Dataset), SimpleNamespace(cache=tmp_path / "cache")
        vars(dataset).update(pipe=pipe, config=config, texts=["a"], world=pipe.world)
        files += dataset.cache_texts().values()
    assert files[0].exists() and files[1].exists() and files[0] != files[1]


def test_a_variants_latents_are_not_anothers(checkpoints, tmp_path):
    """T2V and I2V have one VAE, and I2V's entries hold a first frame's channels beside the latents."""
    item = SimpleNamespace(digest="1a" * 20, bucket=(32, 32, 5), start=0.0, fps=16.0, changed={})
    vae = Pipeline(checkpoints["t2v"]).files("vae")[0]
    t2v, i2v = (latent_files([item], tmp_path, vae, parts_of(kind).samples(None))[0] for kind in ("t2v", "i2v"))
    assert t2v != i2v


def test_what_a_file_is_called_decides_how_it_is_looked_at(tmp_path):
    """The same bytes as a photograph and as a clip: what is remembered of one does not serve for the other."""
    photo(tmp_path / "a.png", 32, 32)
    shutil.copy(tmp_path / "a.png", tmp_path / "b.mkv")
    photograph, clip = (
        cached_probe(path, digest(path), tmp_path / "cache") for path in (tmp_path / "a.png", tmp_path / "b.mkv")
    )
    assert photograph[:3] == (32, 32, None) and clip[:3] == (32, 32, [0.0])


def test_which_flags_a_continuation_may_change():
    """Those that decide how long, where and how fast a run goes on, and what is looked at; never what is learned."""
    learned = (
        "lr weight_decay warmup schedule grad_clip grad_spike_factor ema shift t_distribution seed dtype batch "
        "accumulate caption_dropout i2v_prob continuation held_out resolution frames clip_mode expert steps_per_expert "
        "targets blocks rank alpha dropout delta_cap base_dtype allow_self_attn train_blocks keywords keyword_lr "
        "anchor optimizer caption_mode_probs trim_prob preserve keyword_norm min_t max_t"
    ).split()
    flags = {*vars(train_lora.arguments([])), *vars(train_te.arguments([]))}
    assert not set(learned) & set(state.RESUME_MAY_CHANGE)
    assert flags == {*learned, *state.RESUME_MAY_CHANGE}  # each is one or the other


def test_logits_look_at_all_samples(checkpoints, photos, tmp_path):
    where = {"data": photos, "cache": tmp_path, "resolution": "32x32", "frames": 1}
    dataset = open_dataset(Pipeline(checkpoints["ti2v"]), 3, **where)
    assert len(dataset.items) == 3 and not dataset.val_items


def test_what_a_checkpoint_recommends_stands_where_no_flag_is_given():
    s = replace(Pipeline("nano").settings, train={"shift": 2.5, "t_distribution": "uniform", "resolution": "64x32"})
    for given, shift in (([], 2.5), (["--shift", "7"], 7.0)):
        args = train_lora.arguments(given)
        args.device = "cpu"
        flags.resolve(args, s, "train_lora")
        assert (args.shift, args.t_distribution, args.resolution, args.frames) == (shift, "uniform", "64x32", s.frames)


@pytest.mark.parametrize("module, lr", [(train_lora, 1e-4), (train_te, 1e-5)])
def test_at_full_size_the_defaults_are_not_nanos(module, lr):
    args = module.arguments(["--ckpt", "ti2v-5B"])
    args.device = "cpu"
    flags.resolve(args, released("ti2v-5B"), module.__name__)
    assert (args.batch, args.lr, args.steps, args.t_distribution) == (1, lr, 2000, "logit-normal")
    nano = module.arguments(["--lr", "7"])
    nano.device = "cpu"
    settings = Pipeline("nano").settings
    flags.resolve(nano, settings, module.__name__)
    own = settings.train[module.__name__]
    assert nano.lr == 7 and (nano.batch, nano.shift) == (own["batch"], own["shift"]) and own["batch"] > 1
    assert recommended_flags(replace(settings, train={}), module.__name__)["batch"] == 1


def test_only_some_clips_have_their_first_frame_given(tmp_path):
    """At --i2v_prob, clip by clip: its first time is 0 and does not count, and all other times of a clip are one."""
    save(tmp_path / "a.safetensors", {"latents": torch.zeros(4, 3, 2, 2)})
    count = 16
    items = [SimpleNamespace(captions=["x"], frames=9, bucket=(32, 32, 9), weight=1.0)] * count
    args = train_lora.arguments("--i2v_prob 0.5 --seed 3".split())
    args.shift, args.t_distribution = 1.0, "uniform"
    dataset = object.__new__(data.Dataset)
    vars(dataset).update(
        config=pick(data.DataConfig, args, sources=(), cache=tmp_path, batch=count),
        items=items,
        files=[tmp_path / "a.safetensors"] * count,
        samples=Samples(None),
        batches=SimpleNamespace(at=lambda step: list(range(count)), size=count),
        world=SimpleNamespace(local_indices=lambda n: (range(n), 1.0), dp_size=1),
    )
    ((batch, weight),) = dataset.step(0, 0.0, 1.0)
    given = batch.t[:, 0] == 0
    assert weight == 1 and batch.t.shape == (count, 3) and 2 <= given.sum() <= count - 2
    assert (batch.t[:, 1:] > 0).all() and torch.equal(batch.t[:, 1], batch.t[:, 2])
    assert torch.equal(batch.t[~given, 0], batch.t[~given, 1])
    mask = batch.loss_mask.flatten(1)
    assert torch.equal(mask > 0, batch.t > 0) and abs(mask.mean() - 1) < 1e-6
