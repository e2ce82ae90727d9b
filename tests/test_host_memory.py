"""Host memory: what lies there, how it is copied where nothing can be pinned, what there is, what a plan says of it."""

import contextlib
import hashlib
import math
import re
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers.streaming import CONTEXT, T, X, check_same_bits, streamed

from diagnostics.plan import SCRIPTS, Machine, planned
from kernels.fp8 import Fp8Linear, convert
from nanowan import cache, devices, memory_estimate
from nanowan.errors import BadInput
from nanowan.formats.dit import build_dit, keep_fp32, read_dit
from nanowan.formats.header import Entry
from nanowan.formats.load import load_weights
from nanowan.memory import host
from nanowan.memory.host import Copier, HostPages, host_buffer
from nanowan.memory.offload import frozen
from nanowan.memory.placement import Placement
from nanowan.pipeline import Pipeline


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


@pytest.mark.parametrize("count,blocks", [(6, None), (4, [4, 5]), (2, None)])
def test_without_pinned_memory_the_bits_are_the_same(count, blocks, unpinned):
    (a, pa, _), (b, pb, part) = streamed(Copier("cpu"), 0, blocks), streamed(unpinned, count, blocks)
    check_same_bits(a, b, pa, pb)
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


# ---- loading -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fp8", [False, True])
def test_what_lies_on_the_host_is_loaded_there_but_rounded_on_the_device(fp8, checkpoints, monkeypatch):
    """The device is called cpu:0 here, to tell it from the host. All of a model has the same bits wherever it lies."""
    read, real = {}, Entry.read_to

    def read_to(entry, device, scratch=None):
        read[entry] = torch.device(device)
        return real(entry, device, scratch)

    monkeypatch.setattr(Entry, "read_to", read_to)
    entries = read_dit(checkpoints["ti2v"])
    models = {}
    for place in ("device", "host"):
        models[place] = build_dit(entries, checkpoints["ti2v"], torch.float32)
        if fp8:
            convert(models[place])
        part = Placement(models[place], Copier("cpu"), 2 * (place == "host"))
        part.settle(whole=place == "host")
        load_weights(models[place], entries, "cpu:0", torch.float32, keep_fp32)
        if place == "device":
            assert {str(d) for d in read.values()} == {"cpu:0"}
    rounded = {f"{n}.weight" for n, m in models["host"].named_modules() if isinstance(m, Fp8Linear)}
    assert bool(rounded) == fp8
    assert all(str(read[e]) == ("cpu:0" if name in rounded else "cpu") for name, e in entries.items())
    for a, b in zip(frozen(models["device"]), frozen(models["host"]), strict=True):
        assert torch.equal(a[0][a[1]], b[0][b[1]])
    homes = [f.home for f in part.flats(whole=True)]
    assert all(
        any(h.data_ptr() <= t.data_ptr() < h.data_ptr() + len(h) for h in homes) for t in tensors(models["host"])
    )


def tensors(model):
    return [values[k] for values, k in frozen(model)]


def test_large_pages_are_asked_for():
    """Where Linux has them."""
    buffer = host_buffer(1 << 24, "cpu")
    if Path("/sys/kernel/mm/transparent_hugepage").exists():
        inside, flags = False, []
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                inside = int(match[1], 16) <= buffer.data_ptr() < int(match[2], 16)
            elif inside and line.startswith("VmFlags"):
                flags = line.split()
        assert "hg" in flags


def test_a_checkpoint_is_hashed_once(tmp_path, monkeypatch):
    """Not at every start, but whenever it has changed."""
    read, real = [], hashlib.file_digest
    monkeypatch.setattr(cache.hashlib, "file_digest", lambda f, name: read.append(f.name) or real(f, name))
    file, folder = tmp_path / "weights.safetensors", tmp_path / "cache"
    file.write_bytes(b"a" * 1000)
    found = []
    for _ in range(3):
        cache._digest.cache_clear()  # as in another process
        found.append(cache.digest(file, folder))
    assert len(read) == 1 and set(found) == {hashlib.blake2b(b"a" * 1000).hexdigest()}
    file.write_bytes(b"b" * 1000)
    assert cache.digest(file, folder) == hashlib.blake2b(b"b" * 1000).hexdigest() and len(read) == 2
    assert cache.digest(file) == cache.digest(file, folder) and len(read) == 3


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
        ("0::/job/step\n", {"job": (8 * GB, 2 * GB, 0), "job/step": (3 * GB, GB, 0)}, 2 * GB),
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


# ---- what a plan says --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("script", ["sample", "train_lora", "train_te"])
def test_what_the_host_has_no_room_for_is_refused_before_anything_is_loaded(
    script, checkpoints, media, tmp_path, monkeypatch
):
    """Here on a CPU, whose memory a container limits to less than PyTorch itself takes."""

    def load(*args):
        pytest.fail("a model was loaded")

    monkeypatch.setattr(Pipeline, "_load", load)
    monkeypatch.setattr(devices, "cgroup_memory", lambda: 50 << 20)
    monkeypatch.setattr(memory_estimate, "resident", lambda field="VmRSS": 300 << 20)
    flags = ["--ckpt", str(checkpoints["ti2v"]), "--device", "cpu", "--frames", "5"]
    out = ["--out", str(tmp_path / ("out.mp4" if script == "sample" else "out"))]
    size = ["--size", "256x256"] if script == "sample" else ["--data", str(media), "--resolution", "256x256"]
    words = ["--keywords", "square"] if script == "train_te" else []
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags, *size, *words, *out])
    with pytest.raises(BadInput, match="--device cpu: .* of host memory are needed, 367.* MB are free; use a smaller"):
        SCRIPTS[script].main()


def test_ranks_on_a_cpu_take_its_memory_each():
    """Of the machine's memory, which all of them share."""
    phases = {"cache latents": {"VAE": 3 << 30}, "training": {"DiT": 4 << 30, "activations": 2 << 30}}
    one, three = (memory_estimate.Plan("cpu", phases, {}, {}, memory_estimate.ParallelLayout(ranks=n)) for n in (1, 3))
    assert one.host_peak == one.peak == one.process + (6 << 30)
    assert three.host_peak == 3 * three.peak
    three.check_host(3 * three.peak)
    with pytest.raises(BadInput, match="of host memory are needed"):
        three.check_host(3 * three.peak - 1)


@pytest.mark.parametrize(
    "flags, advice",
    [
        ("--stream_blocks 3", "--stream_blocks 3: .*streamed.* are free; --base_dtype fp8 halves the weights"),
        ("--stream_blocks 3 --base_dtype fp8", "--stream_blocks 3: .* are free; fewer blocks, or a smaller size"),
        ("--expert both", "--device cuda: .*experts .* are free; --base_dtype fp8 halves the weights"),
    ],
)
def test_the_flag_that_needs_less_is_named(flags, advice, checkpoints):
    argv = ["--ckpt", str(checkpoints["t2v"]), *"--device cuda --resolution 64x64 --frames 5 --checkpointing".split()]
    need = planned("train_lora", argv + flags.split(), Machine(1, 1e6, math.inf))  # too little for both experts
    need.check_host(need.host_peak)
    with pytest.raises(BadInput, match=advice):
        need.check_host(need.host_peak - 1)


def test_ranks_of_a_machine_share_what_they_stream(checkpoints, monkeypatch):
    """Of one copy; all else, each has for itself."""
    argv = ["--ckpt", str(checkpoints["t2v"]), *"--device cuda --resolution 64x64 --frames 5 --stream_blocks 3".split()]
    one, four, eight = (planned("train_lora", argv, Machine(n, 1e9, math.inf)) for n in (1, 4, 8))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # on two machines
    halves = planned("train_lora", argv, Machine(8, 1e9, math.inf))
    for plan, ranks in ((four, 4), (eight, 8), (halves, 4)):
        assert plan.host["training"]["streamed blocks"] == one.host["training"]["streamed blocks"] > 0
        assert plan.host["training"]["inputs of blocks"] == ranks * one.host["training"]["inputs of blocks"] > 0
        assert plan.host_process == pytest.approx(ranks * one.host_process, rel=0.1)
