"""Streaming: the same bits as resident weights, and exactly the copies that the ring needs."""

import errno
import gc
import mmap
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from helpers.streaming import CONTEXT, T, X, check_same_bits, streamed

from benchmarks import tiny
from nanowan.errors import BadInput
from nanowan.formats.dit import load_wan
from nanowan.memory import host, offload
from nanowan.memory.host import Copier, host_buffer, shared_buffer
from nanowan.memory.offload import ALIGNED, spread
from nanowan.memory.placement import Placement
from nanowan.parallel import HostShare, World
from nanowan.pipeline import Pipeline, Runtime
from sample import load, sample_latents

ROOT = Path(__file__).parent.parent


def model(count=0, blocks=None):
    dit, params, part = streamed(Copier("cpu"), count, blocks)
    return dit, params, part.stream


@pytest.mark.parametrize("count,blocks", [(6, None), (6, [4, 5]), (4, None), (3, [2]), (2, None), (1, None)])
def test_the_same_bits_as_resident(count, blocks):
    (a, pa, _), (b, pb, _) = model(0, blocks), model(count, blocks)
    check_same_bits(a, b, pa, pb)
    assert all(torch.equal(u, v) for u, v in zip(a.state_dict().values(), b.state_dict().values()))


def test_order_and_count_of_copies():
    dit, _, stream = model(6)
    for _ in range(2):
        dit(X, T, CONTEXT).square().mean().backward()
    step = [3, 2, 1, 0]  # downwards; 4 and 5 were here at the turn, and 0 and 1 are for the next pass
    assert stream.copies == [0, 1, 2, 3, 4, 5, *step, 2, 3, 4, 5, *step]
    assert stream.bytes == len(stream.copies) * stream.ring_bytes() // 2


def test_copies_while_sampling():
    dit, _, stream = model(4)
    assert stream.numbers == spread(4, 6) == [1, 2, 4, 5]
    with torch.no_grad():
        for _ in range(2):
            dit(X, T, CONTEXT)
    assert stream.copies == [1, 2, 4, 5, 1, 2, 4, 5, 1]  # the first of the next pass is on its way


def test_blocks_below_the_first_adapter_are_not_fetched_backwards():
    dit, _, stream = model(6, [4, 5])
    for _ in range(2):
        dit(X, T, CONTEXT).square().mean().backward()
    assert stream.copies == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0]


def test_memory_on_the_device():
    """Two blocks' buffers, and each tensor of a streamed block lies in one of them, or in its host buffer."""
    dit, _, stream = model(6)
    dit(X, T, CONTEXT)
    block = max(
        sum(-(-p.nbytes // ALIGNED) * ALIGNED for p in b.parameters() if not p.requires_grad) for b in dit.blocks
    )
    assert stream.ring_bytes() == 2 * block
    homes = {r.untyped_storage().data_ptr() for r in stream.ring} | {
        f.home.untyped_storage().data_ptr() for f in stream.flats.values()
    }
    assert {p.untyped_storage().data_ptr() for b in dit.blocks for p in b.parameters() if not p.requires_grad} <= homes


def test_buffers_of_kept_inputs_are_used_again(monkeypatch):
    """One for the input of each block that runs again, on pages of its own, for all steps."""
    made = []
    monkeypatch.setattr(offload, "host_buffer", lambda n, to: made.append(host_buffer(n, to)) or made[-1])
    dit, _, stream = model(6)
    made.clear()
    for _ in range(3):
        dit(X, T, CONTEXT).square().mean().backward()
    assert len(made) == 6 and {f.numel() for f in made} == {4 * X.numel() // 48 // 4 * dit.config.dim}
    assert len(stream.inputs.free) == 6
    assert not any(f.data_ptr() % mmap.PAGESIZE for f in made)
    for batch, count in (
        (slice(1), 6),
        (slice(None), 6),
        ([0, 1, 1], 12),
    ):  # smaller clips use them, larger need others
        dit(X[batch], T[batch], CONTEXT[batch]).square().mean().backward()
        assert len(made) == count and len(stream.inputs.free) == 6


def test_the_input_below_comes_back_early():
    """While a block runs again, the one that will run after it has its input."""
    kept = offload.InputsOnHost(Copier("cpu"))
    xs = [torch.randn(4, 5), torch.randn(2, 3).t(), torch.randn(7).bfloat16()]
    handles = [offload.Kept(kept, x) for x in xs]
    for i in (2, 1, 0):
        assert torch.equal(handles[i].unpack(), xs[i]) and handles[i].back is None
        assert i == 0 or handles[i - 1].back is not None
    handles.clear()
    assert sorted(map(len, kept.free)) == [14, 24, 80]


def test_what_is_not_on_the_device_is_kept_as_it_is():
    """As the empty tensor of the CPU that older versions of torch save with each checkpoint."""
    kept = offload.InputsOnHost(SimpleNamespace(device=torch.device("cuda")))
    with kept.hooks():
        x = torch.ones(3, requires_grad=True)
        y = x.sin().sum()
    assert torch.equal(torch.autograd.grad(y, x)[0], torch.ones(3).cos()) and kept.last is None
    kept = offload.InputsOnHost(Copier("cpu"))
    with kept.hooks():
        torch.empty(0, requires_grad=True).sin()
    assert kept.last is None


def test_a_buffer_that_cannot_be_made_is_one_error(monkeypatch, recwarn):
    """Nothing half made complains when it is given up."""
    monkeypatch.setattr(host, "HostPages", mock.Mock(side_effect=OSError(12, "no room")))
    with pytest.raises(BadInput, match="0.00 GB of host memory are needed .no room"):
        offload.Kept(offload.InputsOnHost(Copier("cpu")), torch.ones(3))
    gc.collect()
    assert not recwarn.list


RESIDENT = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
import lora
from benchmarks import tiny
from nanowan.memory.host import Copier, shared_buffer
from nanowan.memory.placement import Placement
from nanowan.memory_estimate import ParallelLayout, nbytes, resident, traced

def build(**size):
    dit = tiny.dit("ti2v", **size)
    lora.inject(dit, rank=4)
    return dit

def step(dit, tokens):
    dit(torch.ones(1, 48, 6, *tokens), torch.ones(1), torch.ones(1, 7, tiny.TEXT_DIM)).square().mean().backward()

step(build(), (4, 4))  # what PyTorch itself takes
with FakeTensorMode():
    dit = build(dim=768, heads=6, layers=12)
    dit.checkpointing = True
    planned = [ParallelLayout(stream_blocks=12).weights(dit)[0], traced(lambda: step(dit, (16, 16)))]
    whole = nbytes(dit)
before = resident("RssAnon")
dit = build(dim=768, heads=6, layers=12)
dit.zero_grad(set_to_none=True)
part = Placement(dit, Copier("cpu"), 12)
part.settle(True, shared_buffer(Path({file!r}), part.nbytes(True), "cpu", create=True))
part.start()
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
step(dit, (16, 16))
print(*planned, whole, resident("VmHWM") - resident("RssShmem") - resident("RssFile") - before)
"""


def test_resident_memory_is_that_of_the_plan(tmp_path, report):
    """The host's buffer is a file, which Linux counts apart: what else a process holds stands for the device. Ring,
    other weights, activations.
    """
    code = RESIDENT.format(root=str(ROOT), file=str(tmp_path / "host"))
    weights, activations, whole, peak = map(
        int,
        subprocess.run(
            [sys.executable, "-c", code],
            env=dict(os.environ, MALLOC_MMAP_THRESHOLD_=str(1 << 20)),
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split(),
    )
    assert weights + activations < whole / 2 and activations > 20e6
    report(
        f"{peak / 1e6:.0f} MB beyond {weights / 1e6:.0f} of weights and {activations / 1e6:.0f} of activations",
        peak / (weights + activations) - 1,
        0.05,
    )
    assert peak > 0.8 * (weights + activations)


@pytest.mark.parametrize("fp8", (False, True))
def test_sampling_with_streamed_blocks(checkpoints, fp8):
    given = dict(size=(64, 64), frames=5, steps=2, progress=False)
    want = sample_latents(load(checkpoints["ti2v"], fp8=fp8), ["a red square"], [0], **given)
    assert torch.equal(
        sample_latents(load(checkpoints["ti2v"], fp8=fp8, stream_blocks=2), ["a red square"], [0], **given), want
    )


def test_training_with_streamed_blocks(checkpoints, media, tmp_path):
    from nanowan.formats.header import load as read

    found = []
    for flags in ([], ["--stream_blocks", "3"]):
        out = tmp_path / f"run{len(flags)}"
        subprocess.run(
            [
                sys.executable,
                ROOT / "train_lora.py",
                "--ckpt",
                checkpoints["ti2v"],
                "--data",
                media,
                "--out",
                out,
                "--cache",
                tmp_path / "cache",
                "--resolution",
                "64x64",
                "--frames",
                "9",
                "--steps",
                "4",
                "--batch",
                "2",
                "--rank",
                "4",
                "--device",
                "cpu",
                *flags,
            ],
            check=True,
            capture_output=True,
        )
        found.append(read(out / "adapter_model.safetensors")[0])
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][k], found[1][k]) for k in found[0])


def test_too_many_blocks():
    with pytest.raises(BadInput, match="--stream_blocks 7: this model has 6"):
        Placement(tiny.dit("ti2v", layers=6), Copier("cpu"), 7)


def test_no_room_for_the_shared_copy(monkeypatch, tmp_path):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(BadInput, match="shared memory are needed .No space left"):
        shared_buffer(tmp_path / "shared", 1000, "cpu", create=True)


def test_a_released_stream_is_gone(checkpoints):
    pipe = load(checkpoints["ti2v"], stream_blocks=2)
    kept = weakref.ref(pipe.acquire("dit"))
    pipe.evict("dit")
    assert kept() is None and not pipe.streams()


@pytest.mark.parametrize("fp8", (False, True))
def test_one_host_copy_for_two_ranks(checkpoints, tmp_path, fp8):
    """Two ranks, here threads: the first reads the weights, both have them, and they are the same memory."""
    meeting, models, read = threading.Barrier(2, timeout=60), {}, []  # one that fails must not leave the other waiting

    def rank(first):
        world = World("cpu", distributed=False)
        world.is_main, world.host_share = first, lambda: HostShare(first, meeting.wait, lambda part: tmp_path / part)
        pipe = Pipeline(checkpoints["ti2v"], Runtime(fp8=fp8, stream_blocks=2, world=world))
        models[first] = pipe.acquire("dit")
        read.append(pipe.placements["dit"].flats(whole=True)[0].home)

    ranks = [threading.Thread(target=rank, args=(first,)) for first in (True, False)]
    for t in ranks:
        t.start()
    for t in ranks:
        t.join()
    whole = load_wan(checkpoints["ti2v"], dtype=torch.float32, fp8=fp8)
    with torch.no_grad():
        want, (a, b) = whole(X, T, CONTEXT), (models[first](X, T, CONTEXT) for first in (True, False))
        assert torch.equal(a, want) and torch.equal(b, want) and not (tmp_path / "dit").exists()
        read[0].fill_(1)
        assert (read[1] == 1).all()


@pytest.mark.parametrize("shared", [False, True])
def test_what_is_pinned_is_unpinned_once(shared, tmp_path, monkeypatch):
    """A block of its own each, of a host copy that ranks share all of it; when nothing refers to it any more, and after
    the copies that are under way.
    """
    pinned, done = {}, []
    monkeypatch.setattr(host, "pin", lambda address, nbytes: pinned.setdefault(address, nbytes))
    monkeypatch.setattr(host, "unpin", lambda address: done.append(("unlocked", pinned.pop(address))))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append(("waited", device)))
    model, cuda = tiny.dit("ti2v").requires_grad_(False), torch.device("cuda:1")
    part = Placement(model, SimpleNamespace(device=cuda), 3)
    total = part.nbytes(whole=True)
    part.settle(shared, shared_buffer(tmp_path / "copy", total, cuda, create=True) if shared else None)
    assert list(pinned.values()) == ([total] if shared else [f.nbytes for f in part.streamed.values()]) and not done
    want = list(pinned.values())
    del model, part
    gc.collect()
    assert not pinned and done[::2] == [("waited", 1)] * len(want)
    assert sorted(done[1::2]) == sorted(("unlocked", n) for n in want)
