"""train_lora.py --preserve: what the base says of prompts that must not change is what the adapter is held to."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_train_lora import KILL, train

import data
from benchmarks import tiny
from flow import make_noisy_batch
from lora import adapter, adapter_off, inject
from nanowan.errors import BadInput
from nanowan.formats.header import load, save
from nanowan.pipeline import Pipeline
from nanowan.training.flags import pick
from nanowan.training.optim import Guard
from nanowan.variants.samples import Samples
from train_lora import arguments, check, prompts_to_preserve, with_base_targets
from wan import Wan, WanConfig


def adapted():
    """A small DiT with an adapter that does something, and the same without it."""
    base = tiny.randomize(Wan(WanConfig("t2v", 64, 96, 4, 3, 16, 16, text_dim=32)), 0)
    model = copy.deepcopy(base)
    inject(model, rank=4)
    g = torch.Generator().manual_seed(1)
    for _, b in adapter(model).values():
        b.data.normal_(0, 0.05, generator=g)
    return base, model


def test_it_is_what_two_plain_passes_give(report):
    """Of four samples, two preserved at weight 0.7: loss and gradients beside a loop over single samples."""
    base, model = adapted()
    g = torch.Generator().manual_seed(2)
    latents, noise = (torch.randn(4, 16, 2, 4, 6, generator=g) for _ in range(2))
    t, context, lens = (
        torch.tensor([0.2, 0.5, 0.7, 0.9]),
        torch.randn(4, 7, 32, generator=g),
        torch.tensor([7, 3, 5, 6]),
    )
    preserved = torch.tensor([True, False, False, True])
    weight = torch.where(preserved, 0.7, 1.0)
    entries = [{"latents": x} for x in latents]
    batch = make_noisy_batch(entries, ["a"] * 4, t, noise, weight.view(-1, 1, 1, 1, 1), preserved)
    aimed = with_base_targets(batch, model, context, lens)
    assert torch.equal(aimed.target[1:3], batch.target[1:3]) and not torch.equal(aimed.target, batch.target)
    loss = aimed.loss(model, context, lens)
    loss.backward()
    ours = {name: (a.grad.clone(), b.grad.clone()) for name, (a, b) in adapter(model).items()}

    model.zero_grad()
    plain = 0
    for i in range(4):
        x, text = (1 - t[i]) * latents[i] + t[i] * noise[i], context[i : i + 1, : lens[i]]
        target = noise[i] - latents[i]
        if preserved[i]:
            with torch.no_grad():
                target = base(x[None], 1000 * t[i : i + 1], text)[0]
        plain = plain + weight[i] * F.mse_loss(model(x[None], 1000 * t[i : i + 1], text)[0], target) / 4
    plain.backward()
    report("loss", abs(loss.item() / plain.item() - 1), 1e-6)
    for name, (a, b) in adapter(model).items():
        for mine, theirs in zip(ours[name], (a.grad, b.grad)):
            report("gradients", ((mine - theirs).norm() / theirs.norm()).item(), 1e-5)


def test_an_adapter_that_is_off_is_none():
    base, model = adapted()
    x, t, context = torch.randn(1, 16, 1, 4, 4), torch.tensor([300.0]), torch.randn(1, 5, 32)
    with torch.no_grad():
        with adapter_off(model):
            assert torch.equal(model(x, t, context), base(x, t, context))
        assert not torch.equal(model(x, t, context), base(x, t, context))


def dataset(tmp_path, count=16, **flags):
    save(tmp_path / "a.safetensors", {"latents": torch.zeros(4, 1, 2, 2)})
    items = [SimpleNamespace(captions=["own"], frames=1, weight=1.0, bucket=(32, 32, 1))] * count
    args = arguments(["--preserve", "0.5"])
    vars(args).update({"shift": 1.0, "t_distribution": "uniform", "batch": count, **flags})
    made = object.__new__(data.Dataset)
    made.config = pick(data.DataConfig, args, sources=(), cache=tmp_path)
    made.items, made.files = items, [tmp_path / "a.safetensors"] * count
    made.batches = SimpleNamespace(at=lambda step: list(range(count)), size=count)
    made.samples, made.world = Samples(None), SimpleNamespace(local_indices=lambda n: (list(range(n)), 1.0), dp_size=1)
    return made


def test_half_of_the_samples_are_shown_a_prompt_that_must_not_change(tmp_path):
    """With the weight of the flag; dropped captions too, some on either side. Without prompts nothing is preserved."""
    data, seen = dataset(tmp_path, caption_dropout=0.2), []
    for step in range(60):
        ((batch, _),) = data.step(step, 0, 1, preserved_prompts=["p", "q"])
        for caption, keep, weight in zip(batch.captions, batch.preserved.tolist(), batch.loss_mask.flatten().tolist()):
            assert caption in (("", "p", "q") if keep else ("", "own")) and weight == (0.5 if keep else 1)
            seen.append((caption, keep))
    assert abs(sum(keep for _, keep in seen) / len(seen) - 0.5) < 0.07
    for caption, keep, share in (("p", True, 0.2), ("q", True, 0.2), ("", True, 0.1), ("", False, 0.1)):
        assert abs(seen.count((caption, keep)) / len(seen) - share) < 0.05
    ((batch, _),) = data.step(0, 0, 1)
    assert batch.preserved is None and batch.loss_mask is None


def test_which_prompts_are_preserved():
    captions = ["", "a red dog", "a Dog", "a cat", "dogma"]
    given = SimpleNamespace(preserve=1.0, trigger=["dog"], preserve_prompts=None)
    assert prompts_to_preserve(given, captions, []) == ["a cat", "dogma"]
    assert prompts_to_preserve(given, captions, ["x", "a cat"]) == ["x", "a cat", "dogma"]
    assert prompts_to_preserve(SimpleNamespace(**vars(given) | {"trigger": []}), captions, ["x"]) == ["x"]
    assert prompts_to_preserve(SimpleNamespace(**vars(given) | {"preserve": 0.0}), captions, []) == []
    with pytest.raises(BadInput, match="every caption holds a word of --trigger a"):
        prompts_to_preserve(SimpleNamespace(**vars(given) | {"trigger": ["a"]}), captions[:4], [])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--preserve", "-1"], "--preserve -1.0: must be at least 0"),
        (["--preserve_prompts", "p.txt"], "--preserve_prompts p.txt: needs --preserve WEIGHT"),
        (["--preserve", "1"], "--preserve 1.0: of what"),
    ],
)
def test_what_is_refused(checkpoints, flags, message):
    args = arguments(["--data", "x", "--device", "cpu", "--dtype", "fp32", *flags])
    with pytest.raises(BadInput, match=message):
        check(args, Pipeline(checkpoints["ti2v"]).settings, 3)


def test_steps_of_preserved_samples_alone_do_not_make_others_look_like_spikes():
    """At one sample a step, as at full size: gradients of preserved ones are thousands of times smaller."""
    guard = Guard(100.0)
    for step in range(200):
        preserved = step % 3 > 0
        assert guard.should_skip(0.1, 1e-5 if preserved else 0.1, typical=not preserved) is None
    assert "times the recent median" in guard.should_skip(0.1, 11.0)


@pytest.mark.parametrize("kind", ["ti2v", "t2v"])
def test_a_killed_run_goes_on_and_is_not_the_one_without(checkpoints, media, tmp_path, kind):
    """One model, or both experts in turns."""
    (tmp_path / "prompts.txt").write_text("a bird\na tree\n")
    turns = ["--steps_per_expert", 1] if kind == "t2v" else []
    preserve = ["--preserve", 2, "--preserve_prompts", tmp_path / "prompts.txt", "--trigger", "dog", *turns]
    run = train(checkpoints[kind], media, tmp_path / "whole", *preserve)
    assert "prompts preserved" in run.stdout
    killed = [*preserve, "--save_every", 2]
    assert train(checkpoints[kind], media, tmp_path / "cut", *killed, check=False, code=KILL).returncode == -9
    train(checkpoints[kind], media, tmp_path / "cut", *killed, "--resume")
    (tmp_path / "prompts.txt").write_text("a bird\n")
    again = train(checkpoints[kind], media, tmp_path / "cut", *killed, "--steps", 8, "--resume", check=False)
    assert again.returncode == 1 and "preserved was" in again.stderr
    train(checkpoints[kind], media, tmp_path / "without", *turns)
    for file in (tmp_path / "whole").glob("adapter_model*.safetensors"):
        if "_0" in file.name:
            continue
        whole, cut, without = (load(tmp_path / d / file.name)[0] for d in ("whole", "cut", "without"))
        assert all(torch.equal(whole[k], cut[k]) for k in whole)
        assert not all(torch.equal(whole[k], without[k]) for k in whole)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / d / "log.jsonl").read_text().splitlines()[:6]]
        for d in ("whole", "cut")
    ]
    assert losses[0] == losses[1]
