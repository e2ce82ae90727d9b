"""What the trainers' flags promise, one by one, on the smallest runs."""

import itertools
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_data import photo

import data
import flow
import train_lora
import train_te
from diagnostics.logits import open_dataset
from flow import eval_timesteps
from nanowan.cache import cached_probe, latent_files
from nanowan.formats.header import load, save
from nanowan.pipeline import Pipeline
from nanowan.settings import released
from nanowan.training import flags, state, step
from nanowan.training.flags import recommended_flags
from nanowan.training.optim import EMA
from nanowan.training.previews import Previews
from nanowan.variants.conditioning import Conditioning
from nanowan.variants.registry import CONDITIONING


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Four captioned photographs."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(4):
        photo(folder / f"{i}.png", 32 + 32 * (i % 2), 32, caption=f"photo {i}")
    return folder


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
    monkeypatch.setattr(train, "make_noisy_batch", make_noisy_batch)
    monkeypatch.setattr(torch.nn.Dropout, "forward", forward)
    monkeypatch.setattr(train_lora, "predict", lambda *_, **__: SimpleNamespace(peak=0, compare=lambda device: ""))
    words = f"--ckpt {checkpoints['t2v']} --data {photos} --out {tmp_path}/out --cache {tmp_path}/cache --device cpu"
    words += " --resolution 32x32 --frames 1 --batch 1 --steps 2 --steps_per_expert 1 --held_out 0 --lr 1e-12"
    words += " --grad_clip 1e-6 --weight_decay 0.25 --caption_dropout 1 --dropout 0.5 --rank 2 --dtype fp32"
    monkeypatch.setattr("sys.argv", ["train_lora.py", *words.split()])
    train_lora.main()
    assert [decay for _, decay in steps] == [0.25, 0.25] and captions == ["", ""]
    assert [norm for norm, _ in steps] == pytest.approx([1e-6, 1e-6], rel=1e-3)
    first, second = (list(group) for end, group in itertools.groupby(masks, lambda m: m is None) if not end)
    assert first[0].any() and not torch.equal(first[0], second[0])
    high, low = (load(tmp_path / "out" / f"adapter_model_{name}.safetensors")[0] for name in ("high", "low"))
    begun = [name for name in high if "lora_A" in name or "lora_down" in name]
    assert begun and high.keys() == low.keys() and not any(torch.equal(high[name], low[name]) for name in begun)


def test_previews_have_a_seed_for_each_prompt_and_the_same_each_time(tmp_path, monkeypatch):
    drawn = []

    def sample_latents(models, prompts, seeds, progress):
        drawn.append((prompts[0], *seeds))
        return torch.zeros(1, 4, 1, 2, 2)

    monkeypatch.setattr("previews.sample_latents", sample_latents)
    (tmp_path / "p.txt").write_text("a\nb\n")
    world = SimpleNamespace(is_main=False)
    models = SimpleNamespace(world=world, loaded=list)
    previews = Previews(SimpleNamespace(previews=tmp_path / "p.txt", out=tmp_path, seed=5), models)
    for step in (10, 20):
        previews.write(step)
    assert drawn[:2] == drawn[2:] and [prompt for prompt, _ in drawn] == list("abab")
    assert drawn[0][1] != drawn[1][1] and drawn[0][1] == 5


def test_the_averages_are_what_is_evaluated_and_seen():
    """Under --ema; the weights themselves are back afterwards."""
    p = torch.nn.Parameter(torch.zeros(2))
    ema, seen = EMA([p], 0.5, torch.optim.AdamW([p])), {}
    p.data.fill_(1.0)
    p.grad = torch.zeros(2)
    ema.update()
    state = SimpleNamespace(averaged=ema.in_place)
    dataset = SimpleNamespace(val_items=[1], val_loss=lambda *_: seen.update(loss=p.data.clone()) or {"val_loss": 1.0})
    previews = SimpleNamespace(prompts=["a"], write=lambda *_: seen.update(preview=p.data.clone()))
    args = SimpleNamespace(steps=10, eval_every=5, preview_every=5)
    assert step.evaluate(args, state, dataset, previews, {}, None, 5) == {"val_loss": 1.0}
    assert torch.equal(p.data, torch.ones(2))
    for name in ("loss", "preview"):
        assert ((seen[name] > 0) & (seen[name] < 1)).all(), name
    seen.clear()
    assert step.evaluate(args, state, dataset, previews, {}, None, 6) == {} and not seen


def test_held_out_times_are_those_of_the_shift(tmp_path):
    """Each sample is seen at the same four times, in an expert's range, which the shift moves towards noise."""
    save(tmp_path / "a.safetensors", {"latents": torch.zeros(4, 1, 2, 2)})
    items = [SimpleNamespace(digest="1a" * 20, captions=["x", "y"])]
    for shift in (1.0, 5.0):
        batches = list(data.eval_batches(items, [tmp_path / "a.safetensors"], Conditioning(), shift, 0.0, 0.9))
        times = torch.cat([batch.t for _, batch in batches])
        assert torch.equal(times, eval_timesteps(4, shift, 0.0, 0.9)) and times.max() < 0.9
        assert [i for i, _ in batches] == [0, 1, 2, 3] and all(batch.captions == ["x"] for _, batch in batches)
    assert not torch.equal(eval_timesteps(4, 1.0, 0.0, 0.9), eval_timesteps(4, 5.0, 0.0, 0.9))


def test_embeddings_are_of_their_tokenizer_too(checkpoints, tmp_path):
    """A folder with other pieces does not get the first one's embeddings from a shared cache."""
    shutil.copytree(checkpoints["ti2v"], tmp_path / "other")
    pieces = next((tmp_path / "other").rglob("spiece.model"))
    pieces.write_bytes(pieces.read_bytes() + b"\0")
    world = SimpleNamespace(rank=0, size=1, barrier=lambda: None)
    encoder = SimpleNamespace(encode=lambda texts: (torch.zeros(1, 2, 3), [2]))
    files = []
    for folder in (checkpoints["ti2v"], tmp_path / "other"):
        parts = Pipeline(folder)
        models = SimpleNamespace(files=parts.files, dir=parts.dir, acquire=lambda name: encoder)
        dataset, args = object.__new__(data.Dataset), SimpleNamespace(dtype="fp32")
        vars(dataset).update(models=models, args=args, texts=["a"], world=world, cache=tmp_path / "cache")
        files += dataset.cache_texts().values()
    assert files[0].exists() and files[1].exists() and files[0] != files[1]


def test_a_variants_latents_are_not_anothers(checkpoints, tmp_path):
    """T2V and I2V have one VAE, and I2V's entries hold a first frame's channels beside the latents."""
    item = SimpleNamespace(digest="1a" * 20, bucket=(32, 32, 5), start=0.0, fps=16.0)
    vae = Pipeline(checkpoints["t2v"]).files("vae")[0]
    t2v, i2v = (latent_files([item], tmp_path, vae, CONDITIONING[kind])[0] for kind in ("t2v", "i2v"))
    assert t2v != i2v


def test_what_a_file_is_called_decides_how_it_is_looked_at(tmp_path):
    """The same bytes as a photograph and as a clip: what is remembered of one does not serve for the other."""
    photo(tmp_path / "a.png", 32, 32)
    shutil.copy(tmp_path / "a.png", tmp_path / "b.mkv")
    photograph, clip = (
        cached_probe(path, data.digest(path), tmp_path / "cache") for path in (tmp_path / "a.png", tmp_path / "b.mkv")
    )
    assert photograph == [32, 32, None] and clip == [32, 32, [0.0]]


def test_which_flags_a_continuation_may_change():
    """Those that decide how long, where and how fast a run goes on, and what is looked at; never what is learned."""
    learned = (
        "lr weight_decay warmup schedule grad_clip grad_spike_factor ema shift t_distribution seed dtype batch "
        "accumulate caption_dropout i2v_prob continuation held_out resolution frames clip_mode expert steps_per_expert "
        "targets blocks rank alpha dropout delta_cap base_dtype allow_self_attn train_blocks keywords keyword_lr "
        "anchor optimizer caption_mode_probs trim_prob preserve"
    ).split()
    flags = {*vars(train_lora.arguments([])), *vars(train_te.arguments([]))}
    assert not set(learned) & set(state.RESUME_MAY_CHANGE)
    assert flags == {*learned, *state.RESUME_MAY_CHANGE}  # each is one or the other


def test_logits_look_at_all_samples(checkpoints, photos, tmp_path):
    where = {"data": photos, "cache": tmp_path, "resolution": "32x32", "frames": 1}
    models = Pipeline(checkpoints["ti2v"])
    _, dataset = open_dataset(models, checkpoints["ti2v"], 3, **where)
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


@pytest.mark.parametrize(
    "given, memory, chosen", [(None, 12, False), (None, 11, True), (False, 9, False), (True, 12, True)]
)
def test_checkpointing_is_chosen_where_the_plan_asks_for_it(given, memory, chosen):
    args = SimpleNamespace(checkpointing=given, device="cpu")
    world = SimpleNamespace(all_ranks=bool)
    need = flags.choose_checkpointing(
        args, world, lambda: SimpleNamespace(peak=4 if args.checkpointing else 10), memory
    )
    assert args.checkpointing is chosen and need.peak == (4 if chosen else 10)


def test_only_some_clips_have_their_first_frame_given(tmp_path):
    """At --i2v_prob, clip by clip: its first time is 0 and does not count, and all other times of a clip are one."""
    save(tmp_path / "a.safetensors", {"latents": torch.zeros(4, 3, 2, 2)})
    count = 16
    items = [SimpleNamespace(captions=["x"], frames=9)] * count
    args = train_lora.arguments("--i2v_prob 0.5 --seed 3".split())
    args.shift, args.t_distribution = 1.0, "uniform"
    dataset = SimpleNamespace(
        args=args,
        items=items,
        files=[tmp_path / "a.safetensors"] * count,
        samples=Conditioning(),
        batches=SimpleNamespace(at=lambda step: list(range(count))),
        world=SimpleNamespace(local_indices=lambda n: (range(n), 1.0)),
    )
    ((batch, weight),) = data.Dataset.step(dataset, 0, 0.0, 1.0, lambda captions, rng: captions[0])
    given = batch.t[:, 0] == 0
    assert weight == 1 and batch.t.shape == (count, 3) and 2 <= given.sum() <= count - 2
    assert (batch.t[:, 1:] > 0).all() and torch.equal(batch.t[:, 1], batch.t[:, 2])
    assert torch.equal(batch.t[~given, 0], batch.t[~given, 1])
    mask = batch.loss_mask.flatten(1)
    assert torch.equal(mask > 0, batch.t > 0) and abs(mask.mean() - 1) < 1e-6
