"""What decides a run: which samples a step sees and what is drawn for them, on ranks alike, and what a state is of."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import data
import train_lora
import train_te
from nanowan.parallel import World
from nanowan.training import step as steps
from nanowan.training.optim import AdamW8bit
from nanowan.training.scan import Item
from nanowan.training.state import RESUME_MAY_CHANGE, TrainState, resume_fingerprint
from nanowan.variants.samples import Samples


def world(rank=0, ranks=1):
    """A World that says it is one of several ranks, and tells the others nothing."""
    world = World("cpu", distributed=False)
    world.dp_rank, world.dp_size = rank, ranks
    return world


def items_of(n, width=16, frames=9):
    return [Item(Path(f"{width}_{i}"), [f"a {i}", f"b {i}"], width, 8, frames, 8, digest=f"{i:04}") for i in range(n)]


# ---- what a step draws -----------------------------------------------------------------------------------------------
def dataset_of(items, batch, accumulate=1, rank=0, ranks=1):
    """A Dataset without files whose batches are lists of Draws."""
    config = dict(batch=batch, accumulate=accumulate, seed=3, caption_dropout=0.2, i2v_prob=0.5, continuation=None)
    dataset = object.__new__(data.Dataset)
    dataset.config = SimpleNamespace(**config, shift=3.0, t_distribution="uniform")
    dataset.items = dataset.files = items
    dataset.world, dataset.samples = world(rank, ranks), Samples(None)
    dataset.batches = data.Batches(items, batch * accumulate * ranks, seed=3)
    dataset._batch = lambda draws, preserves: draws
    return dataset


def drawn(draw):
    """What a Draw is of, as plain values: its item, caption, timestep and noise."""
    noise = torch.randn(3, generator=draw.generator).tolist()
    return draw.item.path.name, draw.caption, draw.first_frame_given, draw.t.item(), *noise


@pytest.mark.parametrize("batch, accumulate, ranks", [(2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)])
def test_a_step_is_one_large_batch_however_it_is_divided(batch, accumulate, ranks):
    """The same samples under the same captions, times and noise; in one step, and from step to step, all of them
    differ.
    """
    items = items_of(12)
    seen = []
    for step in range(3):
        whole = Counter(drawn(d) for draws, _ in dataset_of(items, 4).step(step, 0.0, 1.0) for d in draws)
        parts = Counter()
        for rank in range(ranks):
            for draws, _ in dataset_of(items, batch, accumulate, rank, ranks).step(step, 0.0, 1.0):
                assert len(draws) == batch
                parts.update(map(drawn, draws))
        assert parts == whole
        seen += whole.elements()
    for column in (0, 3, 4):  # an epoch of 12 samples, their times, their noise
        assert len({row[column] for row in seen}) == 12


def test_steps_of_small_and_large_buckets_are_mixed():
    """The first of twenty steps is of the first bucket in half of the epochs."""
    items = items_of(20) + items_of(20, 32)
    batches = data.Batches(items, 2, seed=0)
    first = [[items[i].width for i in batches.at(20 * epoch)] for epoch in range(200)]
    assert 70 <= first.count([16, 16]) <= 130 and first.count([16, 16]) + first.count([32, 32]) == 200  # 4 deviations
    changes = [batches.at(i)[0] // 20 != batches.at(i + 1)[0] // 20 for i in range(4000)]
    assert 0.45 < sum(changes) / 4000 < 0.6


def test_a_photograph_is_never_given_as_its_own_first_frame():
    dataset = dataset_of(items_of(20) + items_of(20, frames=1), 40)
    given = [d.item.frames for step in range(5) for d in dataset.draw(step, 0.0, 1.0) if d.first_frame_given]
    assert {*given} == {9} and 30 <= len(given) <= 70


@pytest.mark.parametrize("share, count", [(0.0, 0), (0.01, 4), (0.5, 16)])
def test_sixteen_files_are_held_out_at_most(monkeypatch, share, count):
    """Whole files, of which none is trained on."""
    items = items_of(400) + items_of(400, 32)  # two samples of each file
    monkeypatch.setattr(data, "scan_source", lambda *args: (items, []))
    monkeypatch.setattr(data.Dataset, "_choose_batches", lambda self: None)
    monkeypatch.setattr(data.report, "describe", lambda dataset: None)
    monkeypatch.setattr(data.report, "text", lambda described: "")
    pipe = SimpleNamespace(world=world(), settings=SimpleNamespace(parts=SimpleNamespace(samples=Samples)))
    dataset = data.Dataset(SimpleNamespace(sources=[None], held_out=share, cache="cache"), pipe)
    files, held_out = ({i.digest for i in part} for part in (dataset.items, dataset.val_items))
    assert len(held_out) == count and len(files) == 400 - count and not files & held_out
    assert len(dataset.val_items) == 2 * count


# ---- what a step does ------------------------------------------------------------------------------------------------
def test_tokens_of_a_rank_that_computes_for_nothing_do_not_count():
    watch, batch = steps.Stopwatch(), SimpleNamespace(x=torch.zeros(2, 16, 3, 4, 6))
    for weight in (0.5, 0.0, 0.25):
        watch.count(batch, weight)
    assert watch.tokens == 2 * (2 * 3 * 2 * 3)


def test_equal_gradients_leave_ranks_with_equal_bits():
    """Of bf16 weights, which are rounded at random, though what is drawn before differs from rank to rank."""
    found, drawn = [], []
    for rank in range(2):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(700).bfloat16())]
        state, on = TrainState(params, AdamW8bit(params, 1e-3), 10.0), world(rank, 2)
        args = SimpleNamespace(steps=5, warmup=0, schedule="constant", grad_clip=1.0, seed=0)
        for step in range(5):
            on.seed(args.seed, step)
            drawn.append(torch.rand(1).item())
            params[0].grad = torch.sin(torch.arange(700.0) + step).bfloat16()
            steps.update(state, on, step, args, 1.0)
        found.append([params[0], *(state.opt.state[params[0]][k] for k in ("compensation", "codes", "scale"))])
    assert len(set(drawn)) == 10
    assert all(torch.equal(a, b) for a, b in zip(*found))


# ---- what a state is of ----------------------------------------------------------------------------------------------
def fingerprint(args, items=(), **changes):
    given = dict(files=[Path(f"cache/{i.path.name}") for i in items], items=items, is_cached=lambda: True, digest=str)
    pipe = SimpleNamespace(settings=SimpleNamespace(expert_names=("dit",)), files=lambda name: ["a", "b"])
    pipe.world = world(ranks=changes.pop("ranks", 1))
    return resume_fingerprint(args, pipe, SimpleNamespace(**given | changes))


@pytest.mark.parametrize("script", [train_lora, train_te])
def test_a_state_is_of_every_flag_that_is_not_said_to_be_free(script):
    """By construction: of one that was never heard of too."""
    args = script.arguments(["--batch", "2"])
    before = fingerprint(args)
    for name in [*vars(args), "a_new_flag"]:
        changed = SimpleNamespace(**vars(args) | {name: 17})
        assert (fingerprint(changed) != before) == (name not in RESUME_MAY_CHANGE), name


def test_a_state_is_of_its_samples_its_base_and_its_batch():
    args, (first, second) = SimpleNamespace(batch=2, accumulate=1), items_of(2)
    twice, light = (Item(**vars(first) | change) for change in ({"repeat": 2}, {"weight": 0.5}))
    sets = [[], [first], [second], [first, second], [second, first], [twice, second], [twice]]
    sets += [[light], [light, second], [second, light]]
    assert len({str(fingerprint(args, items)) for items in sets}) == len(sets)
    assert fingerprint(args, ranks=2) != fingerprint(args)
    assert fingerprint(SimpleNamespace(batch=1, accumulate=1), ranks=2) == fingerprint(args)  # the same global batch
    assert fingerprint(args, digest=lambda f: f"other {f}") != fingerprint(args)
    assert "samples" not in fingerprint(args, is_cached=lambda: False)  # some may turn out not to be usable
