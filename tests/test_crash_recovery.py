"""What the world does to a run: full disks, kills, signals, clocks that jump, a second run, and damaged files."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import av
import numpy as np
import pytest
import torch
from helpers.media import write_clip
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_data import clip, encode, photo

from nanowan.errors import BadInput
from nanowan.files import remove_leftovers
from nanowan.formats.header import load, save
from nanowan.training.log import AppendedFile
from nanowan.training.run_dir import Run, differences

ROOT = Path(__file__).parent.parent


def python(code, *argv, timeout=600):
    """Run code in another process, from the repository, on one thread."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, argv)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


# ---- disks that fill ---------------------------------------------------------------------------------------------
WRITERS = r"""
import json, os, resource, sys
from pathlib import Path
import torch
from nanowan.training import scan as scanning
from nano.default_clips import default_clips
from nanowan import cache, errors, files, video
from nanowan.formats import header
from nanowan.training import run_dir
how, folder, source = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])

class Encoder(torch.nn.Linear):
    def encode(self, x):
        return (torch.zeros(1, 200, 200), [200]) if isinstance(x, list) else torch.zeros(1, 16, 3, 80, 80)

big, encoder = torch.randn(300, 300), Encoder(1, 1)
items, _ = scanning.scan(source, 64 * 64, 16, 9, 8)
texts = cache.text_files(["a"], folder / "texts", [cache.digest(source / "a.txt")], torch.float32)
log = run_dir.Run(folder / "out", {"words": ["word"] * 20000}, False)
log.restore({})
log.save(1, {"w": big})
(folder / "a.safetensors").write_text("old")

def fill_log():
    lines = log.logs.lines
    if how == "ENOSPC":
        lines.file = open("/dev/full", "ab", buffering=0)
    for _ in range(2000):
        lines.write(b"x" * 100)

writers = {
    "a.safetensors": lambda: header.save(folder / "a.safetensors", {"w": big}),
    "step_000002.pt": lambda: log.save(2, {"w": big}),
    "config.toml": lambda: log.restore({}),
    "log.jsonl": fill_log,
    "clip.mp4": lambda: video.write_mp4(folder / "clip.mp4", torch.rand(3, 60, 128, 128) * 2 - 1, 8),
    "grid.png": lambda: video.write_grid(folder / "grid.png", [torch.rand(3, 9, 64, 64)] * 5, ["x"] * 5),
    "latents/": lambda: cache.cache_latents(items, folder / "latents", source / "a.txt", lambda: encoder),
    "texts/": lambda: cache.cache_texts(texts, lambda: encoder),
    "--cache": lambda: scanning.scan(source, 64 * 64, 16, 9, 8, cache_dir=folder / "probes"),
}
if how == "EFBIG":
    writers["step_000003.shards"] = lambda: log.save(3, {}, {"w": big})
    writers["nano"] = lambda: default_clips(folder / "nano")  # by another process
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, resource.RLIM_INFINITY))
else:
    def full(path, real=files._open_temporary):
        fd, name = real(path)
        os.unlink(name)
        os.symlink("/dev/full", name)
        return fd, name
    files._open_temporary = full
found = {}
for name, write in writers.items():
    try:
        errors.cli(write)
        found[name] = "no error"
    except SystemExit as e:
        found[name] = e.code
os.write(1, json.dumps(found).encode())
"""


@pytest.mark.parametrize("how, words", [("EFBIG", "File too large"), ("ENOSPC", "No space left on device")])
def test_a_full_disk_is_one_line_at_every_write(tmp_path, how, words):
    """Under a limit on the size of files, and on the device that is always full."""
    (tmp_path / "source").mkdir()
    clip(tmp_path / "source" / "a.mp4")
    done = python(WRITERS, how, tmp_path, tmp_path / "source")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == (11 if how == "EFBIG" else 9)
    for name, line in found.items():
        assert line.startswith("error: ") and name in line and words in line and "\n" not in line, (name, line)
        assert "the disk at /" in line and str(tmp_path) in line, (name, line)
    assert (tmp_path / "a.safetensors").read_text() == "old" and json.loads((tmp_path / "out/flags.json").read_text())
    with Run(tmp_path / "out", {}, True) as run:
        assert run.restore({})["step"] == 1
    left = sorted(f.name for f in tmp_path.rglob("*") if f.is_file() and not f.name.startswith("events"))
    assert left == [
        ".lock",
        "a.mp4",
        "a.safetensors",
        "a.txt",
        "config.toml",
        "flags.json",
        "log.jsonl",
        "step_000001.pt",
    ]


def test_a_cache_that_may_only_be_read(tmp_path):
    """It serves what it holds; what is missing is one line that names it."""
    from nanowan.training import scan as scanning

    folder = Path(os.path.realpath(tmp_path))
    photo(folder / "a.png")
    full, empty = folder / "full", folder / "empty"

    def look(cache):
        return scanning.scan(folder, 64 * 64, 16, 9, 8, cache_dir=cache)

    look(full)
    empty.mkdir()
    for path in (folder, *folder.parents):  # so that somebody else may look
        if path.stat().st_uid == os.geteuid() and path != Path("/"):
            os.chmod(path, 0o755)
    for path in (full, empty):
        os.chmod(path, 0o555)
    if os.geteuid() == 0:  # whom no mode stops
        os.seteuid(65534)
    try:
        assert len(look(full)[0]) == 1
        with pytest.raises(BadInput, match=f"--cache {empty}: .*Permission denied"):
            look(empty)
    finally:
        if os.getuid() == 0:
            os.seteuid(0)


# ---- a run's folder ----------------------------------------------------------------------------------------------
def state_files(out):
    return sorted(f.name for f in (out / "checkpoints").iterdir())


def saved_run(out, steps, keep=2, **state):
    with Run(out, {}, False, keep=keep) as run:
        run.restore({"lr": 1, "samples": [f"s{i}" for i in range(5000)]})
        for step in steps:
            run.save(step, {"w": torch.full((50,), float(step)), **state})


def test_as_many_states_stay_as_are_kept_and_the_newest_is_found(tmp_path):
    """By their number, not their name: a million comes after 999,999."""
    saved_run(tmp_path, (9, 100, 999_999, 1_000_000))
    assert state_files(tmp_path) == ["step_1000000.pt", "step_999999.pt"]
    with Run(tmp_path, {}, True) as run:
        state = run.restore({})
        assert state["step"] == 1_000_000 and state["w"][0] == 1_000_000 and state["shards"] is False


def damage(file, how):
    raw = bytearray(file.read_bytes())
    if how == "bit":
        at = raw.index(np.full(50, 3.0, np.float32).tobytes())
        raw[at + 100] ^= 1
    elif how == "cut":
        raw = raw[: len(raw) // 2]
    elif how == "zeros":
        raw = bytes(len(raw))
    elif how == "empty":
        raw = b""
    file.write_bytes(raw)


@pytest.mark.parametrize("how", ["bit", "cut", "zeros", "empty"])
def test_a_damaged_state_is_named_and_the_one_before_it_used(tmp_path, capsys, how):
    saved_run(tmp_path, (1, 2, 3))
    damage(tmp_path / "checkpoints" / "step_000003.pt", how)
    with Run(tmp_path, {}, True) as run:
        assert run.restore({})["w"][0] == 2
        assert "step_000003.pt: damaged" in capsys.readouterr().out
        run.save(4, {})
    assert state_files(tmp_path) == ["step_000002.pt", "step_000003.pt.damaged", "step_000004.pt"]
    for file in (tmp_path / "checkpoints").glob("*.pt"):
        damage(file, "cut")
    with pytest.raises(BadInput, match="none of the 2 states can be read"):
        Run(tmp_path, {}, True)
    assert len(state_files(tmp_path)) == 3


def test_a_state_with_damaged_shards_is_not_used(tmp_path):
    saved_run(tmp_path, (1,))
    with Run(tmp_path, {}, True, keep=5) as run:
        run.restore({})
        run.save(2, {}, {"w": torch.ones(1000)})
        run.save(3, {}, {"w": torch.ones(1000)})
    with Run(tmp_path, {}, True) as run:
        assert run.restore({})["shards"] == tmp_path / "checkpoints" / "step_000003.shards"
    part = next((tmp_path / "checkpoints" / "step_000003.shards").glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:100])
    shutil.rmtree(tmp_path / "checkpoints" / "step_000002.shards")
    with Run(tmp_path, {}, True) as run:
        assert run.restore({})["step"] == 1


def test_shards_go_with_their_state(tmp_path):
    with Run(tmp_path, {}, False, keep=2) as run:
        run.restore({})
        for step in (1, 2, 3):
            run.save(step, {}, {"w": torch.ones(10)})
    assert state_files(tmp_path) == [f"step_00000{n}.{end}" for n in (2, 3) for end in ("pt", "shards")]


def test_what_resume_says(tmp_path, capsys):
    with Run(tmp_path, {"steps": 5}, True) as run:
        assert run.restore({}) is None
    assert "--resume" in capsys.readouterr().out
    saved_run(tmp_path, (5,))
    with pytest.raises(BadInput, match="--steps 4: .* has done 5 already"):
        Run(tmp_path, {"steps": 4}, True)
    with Run(tmp_path, {"steps": 5}, True):
        assert "has done all of its 5 steps" in capsys.readouterr().out
    with Run(tmp_path, {"steps": 6}, True) as run:
        assert "done" not in capsys.readouterr().out
        run.check({"lr": 1})
        now = {"lr": 2, "name": "x" * 5000, "samples": [f"s{i}" for i in range(3, 4990)] + ["new"]}
        with pytest.raises(BadInput) as e:
            run.check(now)
        text = str(e.value)
        assert "lr was 1, is 2" in text and "samples was 5000 entries, is 4988, 1 of them others" in text
        assert len(text) < 600 and "\n" not in text
        with pytest.raises(BadInput, match="samples"):
            run.restore(now)
    assert differences({"a": [1, 2], "b": None}, {"a": [1, 3], "b": None}) == ["a was [1, 2], is [1, 3]"]
    assert len(differences({}, {str(i): i for i in range(100)})) == 13
    names = [f"s{i}" for i in range(5000)]
    assert differences({"s": names}, {"s": [*names[:-1], "t"]}) == ["s was 5000 entries, is 5000, 1 of them others"]
    assert differences({"s": names}, {"s": names[::-1]}) == ["s was 5000 entries, is 5000, 0 of them others"]


def test_the_log_goes_on_behind_the_state(tmp_path):
    """Steps logged after the last state, and a line that a kill has cut, are not in it twice."""
    with Run(tmp_path, {"steps": 3}, False) as run:
        run.restore({})
        for step in (1, 2, 3):
            run.log(step, loss=0.5, by_t=[1.0, 2.0], expert="low")
            if step == 2:
                run.save(2, {})
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"step": 4, "lo')
    with Run(tmp_path, {}, True) as run:
        run.restore({})
        run.log(3, loss=0.25)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in lines] == [(1, 0.5), (2, 0.5), (3, 0.25)]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(1, 0.5), (2, 0.5), (3, 0.25)]
    assert board.Tags()["scalars"] == ["loss", "by_t/0", "by_t/1"]


def test_a_disk_that_takes_a_part_of_a_line_is_asked_again(tmp_path):
    """A write to a nearly full disk may return early; the rest is written, or said not to be."""
    file = AppendedFile(tmp_path / "log")
    real, file.file = file.file, mock.Mock()
    file.file.write.side_effect = lambda data: real.write(data[:7])
    file.write(b"twenty bytes of a line")
    file.file.write.side_effect = [7, OSError(errno.ENOSPC, "No space left on device")]
    with pytest.raises(OSError, match="log"):
        file.write(b"twenty bytes of a line")
    real.close()
    assert (tmp_path / "log").read_bytes() == b"twenty bytes of a line"


HOLD = """
import sys, time
from nanowan.training.run_dir import Run
run = Run(sys.argv[1], {}, False)
print("here", flush=True)
time.sleep(600)
"""


def test_a_second_run_in_one_folder_is_refused_until_the_first_is_dead(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "here\n"
        for resume in (False, True):
            with pytest.raises(BadInput, match=f"another run is writing there .process {holder.pid} on"):
                Run(tmp_path, {}, resume)
    finally:
        holder.kill()
        holder.wait()
    Run(tmp_path, {}, False).close()
    saved_run(tmp_path, (1,))  # and a refusal lets go of it
    with pytest.raises(BadInput, match="holds a run already"):
        Run(tmp_path, {}, False)
    Run(tmp_path, {}, True).close()


def test_handlers_of_signals_are_given_back(tmp_path, monkeypatch):
    exits = mock.Mock()
    monkeypatch.setattr(os, "_exit", exits)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Run(tmp_path, {}, False) as run:
        assert signal.getsignal(signal.SIGINT) != before[0]
        with pytest.raises(SystemExit) as e:
            os.kill(os.getpid(), signal.SIGTERM)
        assert e.value.code == 128 + signal.SIGTERM
        run.stop = False
        run.restore({})
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # as torchrun does, which passes on what the terminal has sent to all
        assert run.stop and not exits.called
        run.asked_at -= 2  # somebody has no patience
        os.kill(os.getpid(), signal.SIGINT)
        exits.assert_called_once_with(128 + signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_leftovers_go_and_what_is_being_written_stays(tmp_path):
    from nanowan.files import atomic

    (tmp_path / ".tmp-dead.pt").write_text("half")
    with atomic(tmp_path / "living.pt") as tmp:
        tmp.write_text("half")
        remove_leftovers(tmp_path)
        assert tmp.exists() and not (tmp_path / ".tmp-dead.pt").exists()
        tmp.write_text("whole")
    assert [f.name for f in tmp_path.iterdir()] == ["living.pt"]
    out = tmp_path / "run"
    saved_run(out, (1,))
    for name in (".tmp-a", "checkpoints/.tmp-b.pt", "previews/.tmp-c.mp4", "checkpoints/step_000002.shards/x.distcp"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("half")
    Run(out, {}, True).close()
    assert not list(out.rglob(".tmp-*")) and state_files(out) == ["step_000001.pt"]


KILLED = r"""
import os, random, signal, sys, time
import torch
from nanowan.formats.header import save
from nanowan.training.run_dir import Run
out, kills, rng = sys.argv[1], int(sys.argv[2]), random.Random(5)
value = lambda step: torch.arange(300_000) + step

def life(pipe):
    with Run(out, {}, True) as r:
        assert not list(r.out.rglob(".tmp-*"))
        state = r.restore({})
        step = state["step"] if state else 0
        assert not state or torch.equal(state["w"], value(step)), "a state holds another step's numbers"
        os.write(pipe, f"{step}\n".encode())
        while True:
            step += 1
            save(r.out / "adapter.safetensors", {"w": value(step)}, {"step": step})
            r.log(step, loss=1.0)
            r.save(step, {"w": value(step)})
            os.write(pipe, f"{step}\n".encode())

last, took = 0, None  # the seconds that a step takes here, of which the first life does two
for _ in range(kills):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            sys.stdout = open(os.devnull, "w")
            life(write)
        except BaseException as e:
            os.write(2, repr(e).encode())
        os._exit(1)
    os.close(write)
    lines = os.fdopen(read)
    began = int(lines.readline() or -1)
    assert began >= last, f"saved {last}, found {began}"
    if took is None:
        start = time.monotonic()
        last = [int(lines.readline()) for _ in range(2)][-1]
        took = (time.monotonic() - start) / 2
    time.sleep(rng.uniform(0, 4 * took))
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    last = max([last, began, *(int(line) for line in lines if line.endswith("\n"))])
print(last)
"""


@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_kills_in_saving_lose_no_state(tmp_path, kills):
    """Each life finds whole what the one before it has finished, and nothing half-written."""
    done = python(KILLED, tmp_path / "out", kills)
    assert done.returncode == 0 and not done.stderr, done.stderr
    with Run(tmp_path / "out", {}, True) as run:
        step = run.restore({})["step"]
    assert step >= int(done.stdout) > 0
    tensors, metadata = load(tmp_path / "out" / "adapter.safetensors")
    assert torch.equal(tensors["w"], torch.arange(300_000) + int(metadata["step"])) and int(metadata["step"]) >= step


# ---- damaged media -----------------------------------------------------------------------------------------------
MUTATIONS = r"""
import random, sys
from pathlib import Path
from nanowan.cache import pixels
from nanowan.training import scan as scanning
from nanowan.errors import BadInput
from nanowan.training.sources import CLIP_MODES
from nanowan.video import Skip
sources, work, count = sorted(Path(sys.argv[1]).iterdir()), Path(sys.argv[2]), int(sys.argv[3])

def mutate(raw, rng):
    raw, how = bytearray(raw), rng.choice(["bytes", "bytes", "word", "cut", "zeros", "repeat", "swap", "header"])
    a, b = sorted(rng.randrange(len(raw)) for _ in range(2))
    if how == "bytes":
        for _ in range(rng.choice([1, 3, 30])):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
    elif how == "word":
        raw[a : a + 4] = rng.choice([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000]).to_bytes(4, "big")
    elif how == "cut":
        raw = raw[:a]
    elif how == "zeros":
        raw[a:b] = bytes(b - a)
    elif how == "repeat":
        raw[a:a] = raw[a:b]
    elif how == "swap":
        raw = raw[b:] + raw[a:b] + raw[:a]
    elif how == "header":
        for _ in range(5):
            raw[rng.randrange(min(400, len(raw)))] = rng.choice([0, 0x7F, 0xFF, rng.randrange(256)])
    return bytes(raw)

used = 0
for i in range(count):
    rng, source, folder = random.Random(i), sources[i % len(sources)], work / f"{i}"
    folder.mkdir(parents=True)
    (folder / f"m{source.suffix}").write_bytes(mutate(source.read_bytes(), rng))
    (folder / "m.txt").write_text("a caption")
    print(folder, flush=True)
    try:
        items, _ = scanning.scan(folder, 32 * 32, 16, 5, 8, rng.choice(list(CLIP_MODES)))
        for item in items[:3]:
            x = pixels(item)
            assert x.shape == (3, item.frames, item.height, item.width) and x.abs().max() <= 1, x.shape
        used += 1
    except BadInput as e:
        assert "nothing to train on" in str(e) and len(str(e)) < 1000, e
    except Skip as e:
        assert str(e)
print("used", used)
"""


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_media_are_skipped_whatever_is_wrong(tmp_path, count):
    """Bytes, words and stretches changed in many kinds of files: each is used or skipped, without an error or hang."""
    sources = tmp_path / "sources"
    sources.mkdir()
    texture = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    for suffix, codec, container in (
        (".mp4", "libx264", None),
        (".mov", "mpeg4", None),
        (".mkv", "libx264", None),
        (".webm", "libvpx", None),
        (".avi", "mpeg4", None),
        (".m4v", "libx265", "mp4"),
    ):
        encode(
            sources / f"clip{suffix}", [np.roll(texture, 5 * k, 1) for k in range(9)], codec=codec, container=container
        )
    rolled = [np.roll(texture, 5 * k, 1) for k in range(9)]
    hdr = [av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p10le") for image in rolled]
    write_clip(sources / "hdr.mp4", hdr, pixels="yuv420p10le", tags=(9, 18, 9, 1))
    write_clip(sources / "reordered.avi", rolled, bf=2, **{"b-adapt": 0})
    write_clip(sources / "interlaced.mkv", rolled, **{"x264-params": "interlaced=1:tff=1"})
    write_clip(sources / "alpha.mov", [np.dstack([i, i[..., :1]]) for i in rolled], "png", pixels="rgba")
    for suffix in (".jpg", ".png", ".webp", ".bmp"):
        Image.fromarray(texture).save(sources / f"photo{suffix}")
    pictures = [Image.fromarray(image) for image in rolled]
    for name in ("animated.webp", "animated.png", "animated.gif"):
        pictures[0].save(sources / name, save_all=True, append_images=pictures[1:], duration=125)
    for name, colors in (("linear", b"\0\1\x86\xa0"), ("coded", bytes([9, 16, 0, 1]))):
        chunks = PngInfo()
        chunks.add(b"gAMA" if name == "linear" else b"cICP", colors)
        pictures[0].save(sources / f"{name}.png", pnginfo=chunks)
    assert len(list(sources.iterdir())) == 19
    done = python(MUTATIONS, sources, tmp_path / "work", count, timeout=60 + count)
    assert done.returncode == 0 and "Traceback" not in done.stderr, (done.stdout[-200:], done.stderr[-2000:])
    used = int(done.stdout.split()[-1])
    assert count // 10 < used < count


# ---- whole trainings ---------------------------------------------------------------------------------------------
LIVES = r"""
import json, os, random, resource, signal, sys, threading, time, traceback
import torch
import data, t5, train_lora
from nanowan import cache
from nanowan.errors import cli
from nanowan.training import previews, run_dir
torch.set_num_threads(1)

from tests.helpers.scripts import NoPlan  # planning takes as long as all the rest

train_lora.predict = lambda *args, **kwargs: NoPlan()

def at(place, number, kind, delay=None):
    # in the call of this number of a function: the signal, at once or some seconds later
    *owner, name = place.split(".")
    owner = eval(".".join(owner))
    real, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(name)
        if len(calls) == number and delay is None:
            os.kill(os.getpid(), kind)
        elif len(calls) == number:
            threading.Timer(delay, os.kill, (os.getpid(), kind)).start()
        return real(*args, **kwargs)

    setattr(owner, name, wrapped)

found = []
for argv, patch in json.load(open(sys.argv[1])):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(write, 1)
        os.dup2(write, 2)
        sys.argv, code = ["train_lora.py", *argv], 0
        try:
            exec(patch)
            cli(train_lora.main)
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 1
            os.write(2, f"{'' if isinstance(e.code, int) else e.code}\n".encode())
        except BaseException:
            code = 99
            os.write(2, traceback.format_exc().encode())
        sys.stdout.flush()
        os._exit(code)
    os.close(write)
    output = os.fdopen(read, errors="replace").read()
    found.append((os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), output))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def lives(tmp_path_factory, checkpoints):
    """lives(out, [(patch, *flags)], cache) -> [(exit code, output)] of trainings one after the other, with 4 steps and
    previews, in forks of one process; and what an undisturbed one leaves.
    """
    folder = tmp_path_factory.mktemp("lives")
    media, ckpt = folder / "media", folder / "ckpt"
    media.mkdir()
    for i in range(3):
        clip(media / f"{i}.mp4", 9 + i, 32, 32, caption=f"clip {i}")
    shutil.copytree(checkpoints["ti2v"], ckpt)
    for file in ckpt.glob("*.pth"):  # whose headers are read faster in this format
        save(file.with_suffix(".safetensors"), torch.load(file))
        file.unlink()
    config = json.loads((ckpt / "config.json").read_text())
    (ckpt / "config.json").write_text(json.dumps(config | {"sample": {"size": [32, 32], "frames": 1, "steps": 1}}))
    (folder / "prompts.txt").write_text("a clip\n")
    flags = {"--ckpt": ckpt, "--data": media, "--resolution": "32x32", "--frames": 9, "--batch": 1, "--rank": 4}
    flags |= {"--steps": 4, "--save_every": 1, "--previews": folder / "prompts.txt", "--preview_every": 2}
    flags |= {"--device": "cpu", "--dtype": "fp32", "--held_out": 0, "--ema": 0.5}

    def run(out, jobs, cache):
        given = flags | {"--out": out, "--cache": cache}
        argv = [str(word) for pair in given.items() for word in pair]
        (folder / "jobs.json").write_text(json.dumps([([*argv, *more], patch) for patch, *more in jobs]))
        done = python(LIVES, folder / "jobs.json", timeout=120 + 60 * len(jobs))
        assert done.returncode == 0, done.stderr
        return [tuple(found) for found in json.loads(done.stdout)]

    (found,) = run(folder / "whole", [("",)], folder / "cache")
    assert found[0] == 0, found[1][-3000:]
    return run, folder / "whole"


def results(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    files = {f.name: load(f) for f in out.glob("adapter_model*.safetensors")}
    weights = {
        name: ({key: t.tolist() for key, t in tensors.items()}, metadata | {"modelspec.date": "of this run"})
        for name, (tensors, metadata) in files.items()
    }
    previews = sorted((f.name, f.read_bytes()) for f in (out / "previews").iterdir() if f.name != "step_000000.png")
    return [(r["step"], r.get("loss"), r.get("grad_norm")) for r in lines], weights, previews


SIGNALS = {"INT": signal.SIGINT, "TERM": signal.SIGTERM, "KILL": signal.SIGKILL}
BEFORE, TRAINING = (
    {
        "looking": "cache.probe",
        "latents": "cache.read_items",
        "texts": "t5.TextEncoder.encode",
        "building": "train_lora.adamw",
    },
    {
        "first preview": "previews.Previews.write",
        "step": "train_lora.backward",
        "saving": "run_dir.save_pickle",
        "writing": "torch.save",  # its file lies under a temporary name, and is empty
        "renaming": "os.replace",
    },
)


def phase(name, kind, number=1, delay=None):
    """A life that gets a signal in a phase, and the exit code that it should have."""
    patch = f"at({(BEFORE | TRAINING)[name]!r}, {number}, {int(SIGNALS[kind])}, {delay})"
    return (patch, "--resume"), -signal.SIGKILL if kind == "KILL" else 128 + SIGNALS[kind]


def check_lives(lives, tmp_path, chain):
    """The lives end as they should, without a traceback, and the last leaves what an undisturbed run does."""
    run, whole = lives
    found = run(tmp_path / "out", [life for life, _ in chain], tmp_path / "cache")
    for (life, wanted), (code, output) in zip(chain, found, strict=True):
        assert code == wanted and "Traceback" not in output, (life, code, output[-2000:])
        if code > 128:
            early = any(place in life[0] for place in BEFORE.values())
            if early:
                assert "stopped before the first step; what is cached so far stays" in output, output
                continue
            assert "stopping after this step and saving the state; continue with --resume" in output, output
            last = re.findall(r"^step (\d+)/", output, re.M)[-1:]
            said = re.search(rf"stopped after step (\d+) of \d+: the results in {tmp_path / 'out'} are of", output)[1]
            assert not last or said >= last[0], output
        if code == 1:
            last = output.strip().splitlines()[-1]
            assert last.startswith("error: ") and "cannot be written" in last and str(tmp_path) in last, output
    assert results(tmp_path / "out") == results(whole)
    assert not list(tmp_path.rglob(".tmp-*"))


END = (("", "--resume"), 0)


def test_signals_and_kills_in_every_phase_change_nothing(lives, tmp_path):
    chain = [phase("looking", "TERM", 2), phase("latents", "INT", 2), phase("latents", "KILL", 2)]
    chain += [phase("texts", "TERM"), phase("building", "INT"), phase("writing", "KILL")]
    chain += [phase("first preview", "TERM"), phase("step", "INT"), phase("renaming", "KILL", 3)]
    check_lives(lives, tmp_path, [*chain, phase("saving", "TERM"), END])


def test_a_signal_saves_what_there_is(lives, tmp_path):
    """The step that it came in is done and saved, long before a state is due."""
    patch, _ = phase("step", "TERM", 2)[0]
    ((code, output),) = lives[0](tmp_path / "out", [(patch, "--save_every", "100")], tmp_path / "cache")
    assert code == 143 and "Traceback" not in output
    assert [f.name for f in (tmp_path / "out" / "checkpoints").glob("step_*.pt")] == ["step_000002.pt"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["latents", "texts", "first preview", "step", "saving"])
def test_twenty_kills_in_a_phase(lives, tmp_path, name):
    rng = random.Random(name)
    chain = [phase(name, "KILL", rng.randint(1, 2), rng.uniform(0, 0.05)) for _ in range(20)]
    run, whole = lives
    run(tmp_path / "out", [life for life, _ in chain], tmp_path / "cache")  # the later ones may have nothing left to do
    check_lives(lives, tmp_path, [END])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["INT", "TERM"])
@pytest.mark.parametrize("name", [*BEFORE, *TRAINING])
def test_a_signal_in_each_phase(lives, tmp_path, name, kind):
    check_lives(lives, tmp_path, [phase(name, kind), END])


LIMIT = "resource.setrlimit(resource.RLIMIT_FSIZE, ({}, resource.RLIM_INFINITY))"


def test_a_full_disk_in_training_loses_nothing(lives, tmp_path):
    """In caching, and in saving the first and a later state."""
    later = "real = run_dir.Run.save\n"
    later += "def save(self, step, *a):\n    step == 3 and {}\n    real(self, step, *a)\n"
    later += "run_dir.Run.save = save"
    chain = [((LIMIT.format(n), "--resume"), 1) for n in (100, 2000)]
    check_lives(lives, tmp_path, [*chain, ((later.format(LIMIT.format(3000)), "--resume"), 1), END])


@pytest.mark.slow
def test_disks_of_many_sizes(lives, tmp_path):
    check_lives(lives, tmp_path, [*[((LIMIT.format(200 * 2**k), "--resume"), 1) for k in range(6)], END])


JUMPS = "clock = random.Random(0)\ntime.time = lambda: clock.uniform(-1e9, 4e9)"


def test_a_clock_that_jumps_changes_nothing(lives, tmp_path):
    """The system's time goes back and forth by decades with every look at it; durations do not come from it."""
    check_lives(lives, tmp_path, [((JUMPS,), 0)])
    for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()[1:]:
        assert 0 < json.loads(line)["ms"] < 600_000


CUT = """
whole = cache.read_items
def read_items(items, *how):
    if items and items[0].path.name == "1.mp4":
        raise cache.Skip("cannot be decoded to its end")
    return whole(items, *how)
cache.read_items = read_items
"""


def test_a_clip_that_turns_out_not_to_be_usable_is_left_out_for_good(lives, tmp_path):
    """The run goes on without it, as often as it is stopped; and not with it, if it can be decoded later."""
    patch, _ = phase("step", "TERM", 2)[0]
    chain = [(CUT + patch, "--resume"), (CUT, "--resume"), ("", "--resume", "--steps", "6")]
    (first, second, third) = lives[0](tmp_path / "out", chain, tmp_path / "cache")
    assert (first[0], second[0]) == (143, 0) and "resumed at step 2" in second[1], second[1]
    assert first[1].count("1.mp4: cannot be decoded") == second[1].count("1.mp4: cannot be decoded") == 1
    assert [line["step"] for line in map(json.loads, open(tmp_path / "out" / "log.jsonl"))] == [1, 2, 3, 4]
    assert third[0] == 1 and "samples was 2 entries, is 3, 1 of them others" in third[1]


def test_a_changed_run_is_refused_before_anything_is_computed(lives, tmp_path):
    """Other data, and other flags: said in one short line, without a look at the VAE."""
    run, whole = lives
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    shutil.copytree(whole.parent / "media", tmp_path / "fewer")
    (tmp_path / "fewer" / "1.mp4").unlink()
    other = "--data", str(tmp_path / "fewer")
    changes = [("--frames", "5"), ("--seed", "5"), other]
    found = run(out, [("cache.read_items = None", "--resume", *flags) for flags in changes], whole.parent / "cache")
    told = "frames was 9, is 5", "seed was 0, is 5", "samples was 3 entries, is 5, 0 of them others"
    for (code, output), words in zip(found, told, strict=True):
        last = output.strip().splitlines()[-1]
        assert code == 1 and last.startswith("error: --resume: ") and words in last and len(last) < 600, output
    assert results(out) == results(whole)
