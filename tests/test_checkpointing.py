"""Recomputing the activations of some blocks: the same gradients for any number of them, and less memory for each."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import lora
from benchmarks import tiny
from nanowan.errors import BadInput
from nanowan.memory_estimate import Tracker
from nanowan.training import flags
from train_lora import arguments

X, T, CONTEXT = torch.randn(2, 48, 3, 4, 6), torch.tensor([300.0, 700.0]), torch.randn(2, 7, tiny.TEXT_DIM)


def adapted(blocks=None):
    """A DiT of 6 blocks with a LoRA in some of them, and its trained parameters."""
    dit = tiny.dit("ti2v", layers=6)
    params = lora.inject(dit, rank=4, blocks=blocks)
    for p in params:
        torch.nn.init.normal_(p, std=0.1)
    return dit, params


@pytest.mark.parametrize("blocks", [None, [2, 4]])
def test_any_number_of_blocks_gives_the_same_bits(blocks):
    dit, params = adapted(blocks)
    found = {}
    for n in (0, 1, 3, 6, True, False):
        dit.checkpointing = n
        loss = dit(X, T, CONTEXT).square().mean()
        found[n] = [loss.detach(), *torch.autograd.grad(loss, params)]
    assert all(torch.equal(a, b) for other in found.values() for a, b in zip(found[0], other, strict=True))


def test_the_first_blocks_that_learn_run_again():
    """The last ones, whose gradients come first, keep what they have computed."""
    (dit, params), ran = adapted([1, 2, 3, 4, 5]), []
    for i, block in enumerate(dit.blocks):
        block.register_forward_pre_hook(lambda block, args, i=i: ran.append(i))
    for n, again in ((0, []), (2, [1, 2]), (True, [1, 2, 3, 4, 5])):
        dit.checkpointing = n
        loss = dit(X, T, CONTEXT).square().mean()
        ran.clear()
        torch.autograd.grad(loss, params)
        assert sorted(ran) == again


def test_each_block_takes_its_part_of_memory():
    """The peak falls evenly with the number, but for the first, which keeps only what follows its adapter, and the last
    block, whose activations are there all the same when it runs again.
    """
    peaks = []
    for n in (0, 1, 2, 3, 4, 5, 6):
        with FakeTensorMode():
            dit, params = adapted()
            dit.checkpointing = n
            with Tracker() as tracker:
                dit(torch.empty(2, 48, 3, 16, 16), torch.empty(2), torch.empty(2, 7, tiny.TEXT_DIM)).sum().backward()
        peaks.append(tracker.peak)
    steps = [a - b for a, b in zip(peaks, peaks[1:])]
    assert min(steps[1:-1]) > 0.95 * max(steps[1:-1]) > 0.1 * peaks[0]
    assert 0 < steps[0] < steps[1] and 0 <= steps[-1] < steps[1]


@pytest.mark.parametrize(
    "given, want",
    [
        ([], None),
        (["--checkpointing"], True),
        (["--no-checkpointing"], 0),
        (["--checkpointing", "12"], 12),
        (["--checkpointing", "all"], True),
        (["--checkpointing", "none"], 0),
        (["--checkpointing", "auto"], None),
        (["--no-checkpointing", "--checkpointing", "--steps", "3"], True),
    ],
)
def test_the_flag(given, want):
    found = arguments(given).checkpointing
    assert found == want and type(found) is type(want)


def test_numbers_that_cannot_be_are_refused(capsys):
    with pytest.raises(SystemExit):
        arguments(["--checkpointing", "some"])
    assert "some: give a number of blocks, all, none or auto" in capsys.readouterr().err
    with pytest.raises(BadInput, match="--checkpointing 7: must be at least 0 and at most 6"):
        flags.check_blocks(arguments(["--checkpointing", "7"]), 6)
    with pytest.raises(BadInput, match="--checkpointing 3: not with --stream_blocks"):
        flags.check_blocks(arguments(["--checkpointing", "3", "--stream_blocks", "2"]), 6)


@pytest.mark.parametrize("memory", [1000, 445, 444, 300, 150, 120, 112, 100, 90])
def test_auto_takes_as_few_as_fit_with_few_plans(memory):
    """Into nine tenths of the memory. 40 blocks of 10 bytes, of which recomputing leaves 2, beside 0.4."""
    planned = []

    def predict(n):
        planned.append(n)
        n = 40 if n is True else n
        return SimpleNamespace(peak=0.4 + 10 * max(1, 40 - n) + 2 * min(n, 39), learning_blocks=40)

    n, plan = flags.choose_checkpointing(None, SimpleNamespace(least=float), "cuda", predict, memory)
    made, fit = len(planned), [n for n in range(41) if predict(n).peak <= 0.9 * memory]
    assert n == (fit[0] if fit else True) and plan.peak == predict(n).peak and made <= 4
