"""Host memory: what lies there, how it is copied where nothing can be pinned, what there is, what a plan says of it."""

import contextlib
import threading

import pytest
import torch

import lora
from benchmarks import tiny
from nanowan import devices
from nanowan.memory import host
from nanowan.memory.host import Copier, HostPages, host_buffer
from nanowan.memory.placement import Placement

X, T, CONTEXT = torch.randn(2, 48, 3, 4, 6), torch.tensor([300.0, 700.0]), torch.randn(2, 7, tiny.TEXT_DIM)


class Nothing:
    """A stream, or an event, of a device that computes at once."""

    def __init__(self, enable_timing=False):
        pass

    def record(self, stream):
        pass

    def query(self):
        return True

    def elapsed_time(self, end):
        return 0.0

    def record_event(self):
        return Nothing()

    def wait_event(self, event):
        assert isinstance(event, Nothing)

    def synchronize(self):
        pass


@pytest.fixture
def unpinned(monkeypatch):
    """A Copier on the CPU that works as a GPU's does where nothing can be pinned: through its thread and ring, here of
    so few bytes that each copy takes many pieces.
    """
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Nothing())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Event", Nothing)
    monkeypatch.setattr(host, "RING_SLOT", 5000)
    copier = Copier("cpu")
    copier.stream = Nothing()
    return copier


def streamed(copier, count, blocks=None):
    """A DiT with a LoRA, `count` of its 6 blocks streamed; its trained parameters; its Placement."""
    dit = tiny.dit("ti2v", layers=6)
    torch.manual_seed(0)
    params = lora.inject(dit, rank=4, blocks=blocks)
    for p in params:
        torch.nn.init.normal_(p, std=0.1)
    return dit, params, Placement(dit, copier, count).start()


@pytest.mark.parametrize("count,blocks", [(6, None), (4, [4, 5]), (2, None)])
def test_without_pinned_memory_the_bits_are_the_same(count, blocks, unpinned):
    (a, pa, _), (b, pb, part) = streamed(Copier("cpu"), 0, blocks), streamed(unpinned, count, blocks)
    for _ in range(2):
        ya, yb = a(X, T, CONTEXT), b(X, T, CONTEXT)
        assert torch.equal(ya, yb)
        ya.square().mean().backward()
        yb.square().mean().backward()
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(pa, pb, strict=True))
    with torch.no_grad():
        assert all(torch.equal(a(X, T, CONTEXT), b(X, T, CONTEXT)) for _ in range(2))
    assert part.stream.copies and [len(slot) for slot, _ in unpinned.ring] == [5000, 5000]


def test_a_copy_does_not_hold_up_the_block_before_it(unpinned, monkeypatch):
    """Each copy, of weights and of inputs, here waits until the block that is to compute meanwhile was launched. Only
    the input of the block that the backward pass begins with has none before it.
    """
    dit, _, part = streamed(unpinned, 6)
    state, wanted, launched, real_copy, real_pieces = threading.Condition(), [], [], Copier.copy, Copier._copy_in_pieces
    gated = [True]

    def launch():
        with state:
            launched.append(1)
            gated[0] = True
            state.notify_all()

    def copy(self, to, source):
        wanted.append(len(launched) if gated[0] else -1)
        return real_copy(self, to, source)

    def pieces(self, *args):
        number = wanted.pop(0)
        with state:
            assert state.wait_for(lambda: len(launched) > number, timeout=60), f"launch {number} waits for a copy"
        return real_pieces(self, *args)

    with torch.no_grad():
        dit(X, T, CONTEXT)  # the first block of the next pass is here, or on its way
    monkeypatch.setattr(Copier, "copy", copy)
    monkeypatch.setattr(Copier, "_copy_in_pieces", pieces)
    for block in dit.blocks:
        block.self_attn.register_forward_pre_hook(lambda module, args: launch())
    with torch.no_grad():
        dit(X, T, CONTEXT)
    for _ in range(2):
        loss = dit(X, T, CONTEXT).square().mean()
        gated[0] = False
        loss.backward()
    unpinned.synchronize()
    assert not wanted and len(launched) == 6 * (1 + 2 * 2)


def test_pinning_that_fails_is_said_once_and_leaves_no_error(monkeypatch, capsys):
    """As where 1 MB can be pinned: a launch takes the error that cudaHostRegister left behind."""
    limit, launches = [1 << 20], []

    def pin(address, nbytes):
        limit[0] -= nbytes
        if limit[0] < 0:
            raise RuntimeError("out of memory")

    def ones(*args, device, real=torch.ones):
        launches.append(device.type)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(HostPages, "can_pin", True)
    monkeypatch.setattr(host, "pin", pin)
    monkeypatch.setattr(host, "unpin", lambda address: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch, "ones", ones)
    device = torch.device("cuda:0")
    buffers = [host_buffer(1 << 19, device) for _ in range(5)]
    assert launches == ["cuda"] and capsys.readouterr().out.count("cannot be pinned") == 1
    for i, buffer in enumerate(buffers):
        assert len(buffer) == 1 << 19 and buffer.fill_(i).sum() == i << 19
    host_buffer(1 << 19, device, quiet=True)
    assert not capsys.readouterr().out


# ---- what there is -----------------------------------------------------------------------------------------------
GB = 1 << 30


@pytest.mark.parametrize(
    "groups, files, want",
    [
        ("0::/job\n", {}, 20 * GB),
        ("0::/job\n", {"job": ("max", 5 * GB, 0)}, 20 * GB),
        ("0::/job\n", {"job": (8 * GB, 5 * GB, 0)}, 3 * GB),
        ("0::/job\n", {"job": (8 * GB, 7 * GB, 2 * GB)}, 3 * GB),  # page cache gives way
        ("0::/job/step\n", {"job": (8 * GB, 5 * GB, 0), "job/step": ("max", GB, 0)}, 3 * GB),
        ("0::/outside/of/this/container\n", {"": (6 * GB, 2 * GB, 0)}, 4 * GB),
        ("9:cpu:/x\n4:memory:/job\n0::/\n", {"memory/job": (8 * GB, 6 * GB, GB)}, 3 * GB),
        ("4:memory,hugetlb:/job\n", {"memory": (2**63 - 4096, GB, 0), "memory/job": (30 * GB, GB, 0)}, 20 * GB),
    ],
)
def test_a_control_groups_limit_counts_as_memory(groups, files, want, tmp_path, monkeypatch):
    """The machine has 20 GB available. Of each group: its limit, what it uses, how much of that is page cache."""
    (tmp_path / "self").mkdir()
    (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {20 * GB // 1024} kB\n")
    (tmp_path / "self" / "cgroup").write_text(groups)
    for name, (limit, used, cached) in files.items():
        folder, v1 = tmp_path / "cgroups" / name, name.startswith("memory")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(f"{limit}\n")
        (folder / ("memory.usage_in_bytes" if v1 else "memory.current")).write_text(f"{used}\n")
        stat = {"anon": 1, "inactive_file": cached // 2, "active_file": cached - cached // 2}
        (folder / "memory.stat").write_text("".join(f"{'total_' * v1}{k} {n}\n" for k, n in stat.items()))
    monkeypatch.setattr(devices, "PROC", tmp_path)
    monkeypatch.setattr(devices, "CGROUPS", tmp_path / "cgroups")
    assert devices.free_memory("cpu") == want
