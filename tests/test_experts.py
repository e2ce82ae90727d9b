"""An A14B's two experts: when they leave the device, and that their frozen weights are copied up and never down."""

import math
import sys

import pytest
import torch

import sample
from benchmarks import tiny
from nanowan import pipeline
from nanowan.memory.placement import Placement
from nanowan.pipeline import Adapter, Pipeline, Runtime

X, T, CONTEXT = torch.randn(1, 16, 3, 4, 6), torch.tensor([300.0]), torch.randn(1, 7, tiny.TEXT_DIM)


class Card(Runtime):
    """The CPU in the part of an accelerator. Its host is another place: `to` with a string is the way there."""

    cuda = True


@pytest.fixture
def log(monkeypatch):
    """[(event, model)]: load; up, from the host to the device; leave the device, for a copy that the host has; down, to
    a copy that is made there; drop.
    """
    events, real_load, real_to, real_drop = [], Pipeline._load, Placement.to, Pipeline.drop

    def load(self, name, *args):
        events.append(("load", name))
        part = real_load(self, name, *args)
        part.name, part.there = name, True
        return part

    def to(self, device):
        if hasattr(self, "name"):  # else it is being loaded
            self.there = not isinstance(device, str)
            events.append(("up" if self.there else "down" if self.nbytes(whole=True) else "leave", self.name))
            if not self.there:
                self.settle(whole=True)
        real_to(self, torch.device("cpu"))

    def drop(self, *names):
        events.extend(("drop", name) for name in names or list(self.placements) if name in self.placements)
        real_drop(self, *names)

    monkeypatch.setattr(Pipeline, "_load", load)
    monkeypatch.setattr(Pipeline, "drop", drop)
    monkeypatch.setattr(Placement, "to", to)
    monkeypatch.setattr(Placement, "is_on", lambda self, device: self.there)
    return events


@pytest.fixture
def memory(monkeypatch):
    """{"device", "host"}: bytes that are free there."""
    free = {"device": math.inf, "host": math.inf}
    monkeypatch.setattr(pipeline, "free_memory", lambda d: free["host" if isinstance(d, str) else "device"])
    return free


def of_experts(log):
    return [event for event in log if event[1] in ("high", "low")]


@pytest.mark.parametrize("free, prompts", [(0, 1), (math.inf, 1), (math.inf, 3)])
def test_sampling_copies_no_expert_to_the_host(free, prompts, checkpoints, log, memory, monkeypatch, tmp_path):
    """All videos go through the one, which is then dropped, and through the other."""
    memory["device"] = free
    (tmp_path / "prompts.txt").write_text("a red square\n" * prompts)
    flags = f"--prompts {tmp_path / 'prompts.txt'} --size 64x64 --frames 5 --steps 4 --out {tmp_path / 'video.mp4'}"
    monkeypatch.setattr(sample, "Runtime", Card)
    monkeypatch.setattr(
        sys, "argv", ["sample.py", "--ckpt", str(checkpoints["t2v"]), "--device", "cpu", *flags.split()]
    )
    sample.main()
    assert of_experts(log) == [("load", "high"), ("drop", "high"), ("load", "low"), ("drop", "low")]


def run(pipe, name):
    with torch.no_grad():
        return pipe.acquire(name).eval()(X, T, CONTEXT)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("stream_blocks", [0, 1])
def test_experts_that_take_turns_are_copied_up_and_never_down(fp8, stream_blocks, checkpoints, log, memory):
    pipe, whole = (Pipeline(checkpoints["t2v"], Card(fp8=fp8, stream_blocks=n)) for n in (stream_blocks, 0))
    pipe.adapter, pipe.takes_turns = Adapter(("high", "low"), ("cross_attn.k",), 2, 2, 0.0, (0, 1), 0), True
    want = {name: run(whole, name) for name in ("high", "low")}
    log.clear()
    for turn in range(3):
        for name in ("high", "low"):
            assert torch.equal(run(pipe, name), want[name])
            other = "low" if name == "high" else "high"
            leaves = [("leave", other)] if turn or name == "low" else []
            assert log == [*leaves, ("up" if turn else "load", name)]
            log.clear()


def test_both_stay_where_there_is_room(checkpoints, log, memory):
    pipe = Pipeline(checkpoints["t2v"], Card())
    for name in ("high", "low", "high", "low"):
        run(pipe, name)
    assert log == [("load", "high"), ("load", "low")]


def test_without_room_on_the_host_experts_are_read_again(checkpoints, log, memory):
    memory["host"] = 0
    pipe = Pipeline(checkpoints["t2v"], Card())
    pipe.takes_turns = True
    for name in ("high", "low", "high"):
        run(pipe, name)
    assert log == [("load", "high"), ("drop", "high"), ("load", "low"), ("drop", "low"), ("load", "high")]


def test_what_returns_without_a_turn_is_copied_down_once(checkpoints, log, memory):
    """As in a notebook that samples again and again on a small card: the copy on the host stays."""
    memory["device"] = 0
    pipe = Pipeline(checkpoints["t2v"], Card())
    for _ in range(3):
        for name in ("high", "low"):
            run(pipe, name)
    assert [e for e in log if e[0] == "down"] == [("down", "high"), ("down", "low")]


@pytest.mark.parametrize("trained", [False, True])
def test_a_text_encoder_that_does_not_fit_is_streamed(trained, checkpoints, log, memory):
    """To the same bits; but not one that is to be trained."""
    whole, short = Pipeline(checkpoints["ti2v"], Card()), Pipeline(checkpoints["ti2v"], Card())
    want, _ = whole.encode_prompts(["a red square", "a dog runs"])
    memory["device"], short.trains_text = 1 << 30, trained
    found, _ = short.encode_prompts(["a red square", "a dog runs"])
    part = short.placements["text"]
    assert torch.equal(found, want) and whole.placements["text"].stream is None
    assert len(part.streamed) == (0 if trained else len(part.model.blocks))
