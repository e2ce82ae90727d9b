"""sample.py for the variants that go segment by segment, S2V and Animate: latents of the official pipelines, sound.
With TEST_DEVICE=cuda on a GPU.
"""

import contextlib
import json
import shutil
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.media import read_sound
from helpers.scripts import DEVICE, NoPlan
from PIL import Image
from test_animate_inputs import LATENTS, C
from test_s2v_video import PIPELINES, RUNS

import sample
from benchmarks import tiny, tiny_animate, tiny_s2v
from nanowan import long_video, memory_estimate
from nanowan.errors import BadInput
from nanowan.formats.header import load as load_tensors
from nanowan.long_video import SegmentFiles, check_disk
from nanowan.pipeline import Pipeline
from nanowan.settings import released
from nanowan.variants.conditioning import Video
from nanowan.video import read_frames, write_frames

av = pytest.importorskip("av")  # a machine for `make gpu` may lack it
HOW = f"--device {DEVICE} --dtype fp32"


@pytest.fixture(autouse=True)
def as_the_official_runs_were(monkeypatch):
    """On a CPU: with its noise, and without TF32."""
    if DEVICE != "cpu":
        generator, randn = torch.Generator, torch.randn
        monkeypatch.setattr(torch, "Generator", lambda device=None: generator())
        monkeypatch.setattr(torch, "randn", lambda *size, device=None, **how: randn(*size, **how).to(device))
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def run(monkeypatch, *flags, main=sample.main):
    """A script's main with these flags (each a string that is split, or a path)."""
    words = [word for flag in flags for word in (flag.split() if isinstance(flag, str) else [str(flag)])]
    monkeypatch.setattr("sys.argv", ["script.py", *words])
    main()


# ---- S2V -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def s2v(tmp_path_factory):
    return tiny_s2v.checkpoint(tmp_path_factory.mktemp("s2v"))


@pytest.fixture
def official_prompts(monkeypatch):
    """The embeddings of the official runs in the prompts' place."""

    def encode(self, prompts, encoder=None):
        rows = tiny_s2v.prompts()[: len(prompts)]
        embeddings = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return embeddings.to(self.device), torch.tensor([len(r) for r in rows], device=self.device)

    monkeypatch.setattr(Pipeline, "encode_prompts", encode)


def speech(folder, ckpt, name, video="v"):
    """Flags of sample.py for one of test_s2v's runs, whose files are written into a folder."""
    given = RUNS[name][0]
    Image.fromarray(tiny_s2v.picture(*given["picture"])).save(folder / "picture.png")
    tiny_s2v.write_wav(folder / "sound.wav", tiny_s2v.sound(given["seconds"])[None])
    size = {128 * 64: "128x64", 64 * 64: "64x64"}[given["area"]]
    flags = [f"--size {size} --steps {given['steps']} --guidance {given['scale']} --seed {given['seed']}"]
    flags += [f"--infer_frames {given['frames']}"] if given["frames"] != 80 else []
    flags += [f"--num_clip {given['clips']}"] if "clips" in given else []
    flags += ["--start_from_ref"] if name == "start_from_ref" else []
    flags += ["--sync_sound"] if name != "pose" else []
    if name == "pose":
        tiny_s2v.write_pose_video(folder / "pose.mkv", 50, 100, 140, 30)
        flags += ["--solver dpm++ --pose_video", folder / "pose.mkv"]
    flags += ["--image", folder / "picture.png", "--audio", folder / "sound.wav"]
    return [f"--prompt any {HOW} --ckpt", ckpt, *flags, *outputs(folder, video)]


def outputs(folder, name):
    return ["--out", folder / f"{name}.mp4", "--save_latents", folder / f"{name}.safetensors"]


@pytest.mark.parametrize("name", RUNS)
def test_speech_equals_official(s2v, tmp_path, monkeypatch, official_prompts, name, report):
    """Latents, the number of frames, and the sound: AAC, as long as the video or the sound is, from the beginning, or
    with --sync_sound from where the first frame was made with it.
    """
    run(monkeypatch, *speech(tmp_path, s2v, name))
    latents = load_tensors(tmp_path / "v.safetensors")[0]
    assert sorted(latents) == [f"latents_{r}" for r in range(len(latents))]
    assert len(latents) == sum(key.startswith(f"{name}_latents") for key in PIPELINES)
    for r in range(len(latents)):
        off = tiny.error(latents[f"latents_{r}"], PIPELINES[f"{name}_latents_{r}"])
        report(f"latents of segment {r}", off, 1e-3)

    given, length = RUNS[name]
    frames = list(read_frames(tmp_path / "v.mp4"))
    assert len(frames) == length == len(latents) * given["frames"] - 3 * (name != "start_from_ref")
    assert all(abs(b.seconds - a.seconds - 1 / 16) < 1e-3 for a, b in pairwise(frames))
    means = np.stack([np.asarray(f.image).mean((0, 1)) for f in frames]) / 127.5 - 1
    report("mean of a frame", abs(means.mean(1) - PIPELINES[f"{name}_frame_means"].numpy()).max(), 0.03)  # through x264

    start, sound = read_sound(tmp_path / "v.mp4")
    dropped = given["frames"] * len(latents) - length
    assert dropped == (0 if name == "start_from_ref" else 3)
    left_out = dropped / 16 if name != "pose" else 0
    source = read_sound(tmp_path / "sound.wav")[1][round(48000 * left_out) :]
    with av.open(str(tmp_path / "v.mp4")) as file:
        assert file.streams.audio[0].codec_context.name == "aac"
    begin = round(48000 * -start)  # an encoder's first packet may come before what it was given
    assert abs(begin) <= 1100
    assert abs(len(sound) - begin - 48000 * min(given["seconds"] - left_out, length / 16)) <= 1024
    heard, source = sound[begin + 4000 - 50 : begin + 20000 + 50], source[4000:20000]  # to a millisecond
    norm = np.linalg.norm(source) * np.linalg.norm(heard)
    assert np.correlate(heard, source, "valid").max() > 0.97 * norm


def test_speech_in_python_equals_official(s2v, tmp_path, official_prompts, report):
    speech(tmp_path, s2v, "pose")  # writes the files
    pipe, settings = sample.load(s2v, DEVICE, torch.float32), RUNS["pose"][0]
    video, latents = sample.generate(
        pipe,
        "any",
        image=tmp_path / "picture.png",
        size=(128, 64),
        steps=settings["steps"],
        guidance=settings["scale"],
        solver="dpm++",
        seed=settings["seed"],
        progress=False,
        audio=tmp_path / "sound.wav",
        pose_video=tmp_path / "pose.mkv",
        infer_frames=settings["frames"],
        num_clip=settings["clips"],
    )
    assert len(latents) == 2 and video.shape[1] == RUNS["pose"][1]
    for r, z in enumerate(latents):
        report(f"latents of segment {r}", tiny.error(z.cpu(), PIPELINES[f"pose_latents_{r}"]), 1e-3)
    means = video.cpu().mean((0, 2, 3)) - PIPELINES["pose_frame_means"]
    report("mean of a frame", means.abs().max().item(), 1e-3)
    with pytest.raises(BadInput, match="src_root_path x: .* takes no such input"):
        sample.generate(pipe, "any", src_root_path="x")


@pytest.fixture
def no_plan(monkeypatch):
    """Without the plan, which takes longer than these videos."""
    monkeypatch.setattr(memory_estimate, "sampling", lambda *args, **kwargs: NoPlan())


def stop_after(monkeypatch, count):
    """Let the process end when so many segments are done; returns the list of those that were begun."""
    begun, real = [], sample.denoise

    def denoise(*args):
        if len(begun) == count:
            raise SystemExit("killed")
        begun.append(args)
        real(*args)

    monkeypatch.setattr(sample, "denoise", denoise)
    return begun


def check_resume(monkeypatch, folder, flags_of, changed, count):
    """A video that ends after its first segment and is continued has the bits of one made at once; not with `changed`
    flags.
    """
    run(monkeypatch, *flags_of("whole"))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_after(patch, 1)
        run(patch, *flags_of("cut"))
    assert not (folder / "cut.mp4").exists()
    for flags in changed:
        with pytest.raises(BadInput, match="--resume: .*other settings"):
            run(monkeypatch, *flags_of("cut"), *flags, "--resume")
    with monkeypatch.context() as patch:
        begun = stop_after(patch, None)
        run(patch, *flags_of("cut"), "--resume")
    assert len(begun) == count - 1  # the first was not made again
    whole, cut = (load_tensors(folder / f"{name}.safetensors")[0] for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and len(whole) == count
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert (folder / "whole.mp4").read_bytes() == (folder / "cut.mp4").read_bytes()
    assert not list(folder.glob("*.clips"))


def test_speech_that_was_killed_is_continued(s2v, tmp_path, monkeypatch, official_prompts, no_plan):
    def flags_of(name):
        return [*speech(tmp_path, s2v, "three_clips", name), "--num_clip 2"]

    check_resume(monkeypatch, tmp_path, flags_of, (["--seed 12"], ["--dtype bf16"]), 2)


# ---- Animate ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def animate(tmp_path_factory):
    """(checkpoint, source folder whose sound begins after a tenth of a second)."""
    pytest.importorskip("ftfy")
    folder = tmp_path_factory.mktemp("animate")
    source = tiny_animate.source_folder(folder / "source")
    poses = np.stack(tiny_animate.frames(20, 32, 48, 1))
    tiny_s2v.write_wav(folder / "sound.wav", tiny_s2v.sound(1.0)[None])
    write_frames(source / "src_pose.mp4", [poses], 25, sound=folder / "sound.wav", sound_offset=0.1, lossless=True)
    return tiny_animate.checkpoint(folder / "checkpoint"), source


def write_relighting(file, model):
    """The change of test_animate_source.relight, in a file like the official relighting_lora.ckpt."""
    generator, tensors = torch.Generator().manual_seed(30), {}
    linears = {n: m for n, m in model.blocks.named_modules(prefix="blocks") if isinstance(m, torch.nn.Linear)}
    for name in sorted(linears):
        out_features, in_features = linears[name].weight.shape
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, in_features, generator=generator) * 0.1
        tensors[f"{name}.lora_B.weight"] = torch.randn(out_features, 4, generator=generator) * 0.1
    torch.save(tensors, file)
    return file


def character(folder, animate, name, video="v"):
    """Flags of sample.py for one of test_animate_source's runs."""
    ckpt, source = animate
    mode, overlap, solver, guidance = name.split(".")
    flags = [f"--frames {C} --steps 3 --seed 7 {HOW} --solver {solver} --refert_num {overlap}"]
    flags += ["--replace_flag"] if mode == "replace" else []
    flags += [f"--guidance {guidance[1:]}"] if guidance != "relit" else []
    if guidance == "relit":
        flags += ["--lora", write_relighting(folder / "relighting_lora.ckpt", tiny_animate.animate())]
    return ["--ckpt", ckpt, "--src_root_path", source, *flags, *outputs(folder, video)]


@pytest.mark.parametrize("name", sorted({name.rsplit(".", 1)[0] for name in LATENTS}))
def test_character_equals_official(animate, tmp_path, monkeypatch, name, report):
    run(monkeypatch, *character(tmp_path, animate, name))
    latents = load_tensors(tmp_path / "v.safetensors")[0]
    assert sorted(latents) == ["latents_0", "latents_1"]
    for key, z in latents.items():
        report(key, tiny.error(z.cpu(), LATENTS[f"{name}.{key}"]), 1e-3)
    frames = list(read_frames(tmp_path / "v.mp4"))
    assert len(frames) == 20 and abs(frames[-1].seconds - 19 / 25) < 1e-3  # as many as the driving video has
    got = np.stack([np.asarray(f.image).mean((0, 1, 2)) for f in frames]) / 127.5 - 1
    want = LATENTS[f"{name}.video"].clamp(-1, 1).mean((0, 2, 3)).numpy()  # one pixel of 64
    assert np.corrcoef(got, want)[0, 1] > 0.8
    start, sound = read_sound(tmp_path / "v.mp4")
    source = read_sound(animate[1].parent / "sound.wav")[1][4000:20000]
    heard = sound[round(48000 * (0.1 - start)) + 4000 - 100 :][: len(source) + 200]  # to two milliseconds
    assert np.correlate(heard, source, "valid").max() > 0.95 * np.linalg.norm(source) * np.linalg.norm(heard)
    told = json.loads(av.open(str(tmp_path / "v.mp4")).metadata["comment"])
    assert told["seed"] == 7 and told["solver"] == name.split(".")[2]


def test_a_character_in_python_equals_official(animate, report):
    ckpt, source = animate
    how = dict(steps=3, guidance=3, solver="dpm++", seed=7, frames=C, progress=False)
    pipe = sample.load(ckpt, DEVICE, torch.float32)
    video, latents = sample.generate(pipe, pipe.settings.prompt, src_root_path=source, refert_num=5, **how)
    assert video.shape[1] == 20 and len(latents) == 2
    for r, z in enumerate(latents):
        report(f"latents of segment {r}", tiny.error(z.cpu(), LATENTS[f"animate.5.dpm++.g3.latents_{r}"]), 1e-3)


@pytest.mark.slow
def test_a_character_that_was_killed_is_continued(animate, tmp_path, monkeypatch, no_plan):
    changed = ["--replace_flag"], ["--base_dtype fp8"]

    def flags_of(name):
        return character(tmp_path, animate, "animate.5.dpm++.g3", name)

    check_resume(monkeypatch, tmp_path, flags_of, changed, 2)


# ---- the segments of a video -----------------------------------------------------------------------------------------
class Counting(Video):
    """Three segments, each of one more than the one before."""

    count = 3
    shape = (4, 1, 2, 2)

    def __init__(self):
        self.last = torch.zeros(1)

    def noise(self, r, seed):
        return torch.zeros(self.shape)

    def conditions(self, r):
        return None

    def decode(self, r, latents, decode):
        self.last = self.last + 1
        return self.last.view(1, 1, 1, 1).expand(3, 1, 4, 4)

    def output(self, latents):
        return latents + 10

    def state(self):
        return {"last": self.last}

    def restore(self, state):
        self.last = state["last"]


def test_a_video_is_continued_from_the_last_segment_that_is_done(tmp_path, monkeypatch):
    """Whichever it is; its latents are those that the Video gives out, and the step cache is the one asked for."""
    thresholds = []
    monkeypatch.setattr(sample, "denoise", lambda pipe, s, clip, expert: thresholds.append(clip.cache.threshold))
    pipe = SimpleNamespace(world=SimpleNamespace(is_writer=True, barrier=lambda: None))
    for done in (1, 2, 3):
        video = Counting()
        video.count = done  # as if it had been stopped there
        segments = SegmentFiles(tmp_path / "v.mp4", "seed 1", resume=done > 1)
        assert segments.count() == done - 1
        sample.sample_segments(pipe, released("s2v-14B"), video, (None, None), 0, segments, reuse=0.25)
        assert segments.state(done - 1)["last"].item() == done
        assert len(list((tmp_path / "v.clips").glob("after_*"))) == 1  # earlier ones take disk and serve nothing
    assert thresholds == [0.25] * 3 and (load_tensors(segments.file(2))[0]["latents"] == 10).all()


def test_a_new_video_takes_none_of_anothers_segments(tmp_path):
    """Those that a killed one left behind, with other settings or the same, unless it is to be continued."""
    out, tensor = tmp_path / "v.mp4", torch.zeros(3, 1, 4, 4)
    SegmentFiles(out, "seed 1", resume=False).save(0, tensor, tensor, {})
    assert SegmentFiles(out, "seed 1", resume=True).count() == 1
    with pytest.raises(BadInput, match="other settings"):
        SegmentFiles(out, "seed 2", resume=True)
    assert SegmentFiles(out, "seed 1", resume=False).count() == 0 and not (tmp_path / "v.clips").exists()


@pytest.mark.parametrize("writes", range(3))
def test_a_segment_counts_once_the_next_one_can_be_made_from_it(tmp_path, monkeypatch, writes):
    """Wherever a process dies while it is being written."""
    segments, tensor, done = SegmentFiles(tmp_path / "v.mp4", "seed 1", resume=False), torch.zeros(3, 1, 4, 4), []

    def save(*args, real=long_video.save):
        if len(done) == writes:
            raise KeyboardInterrupt
        done.append(real(*args))

    monkeypatch.setattr(long_video, "save", save)
    with contextlib.suppress(KeyboardInterrupt):
        segments.save(0, tensor, tensor, {"last": tensor + 7})
    assert segments.count() == (writes == 2)
    assert not segments.count() or (segments.state(0)["last"] == 7).all()


def test_segments_that_are_done_need_no_room_any_more(tmp_path, monkeypatch):
    """Of three of 12 frames of 64x64, the latents in fp32 and the mp4 a twentieth of the pixels at most."""
    video = SimpleNamespace(shape=(16, 3, 8, 8), size=(64, 64), count=3, state=lambda: {"last": torch.zeros(100)})
    pixels, latents, mp4 = 3 * 12 * 64 * 64, 4 * 16 * 3 * 8 * 8, 3 * (3 * 12 * 64 * 64 // 20)
    free, usage = [0], shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free[0]))
    for done in range(3):
        free[0] = (3 - done) * (pixels + latents) + mp4 + 2 * 400
        check_disk(tmp_path / "v.mp4", video, done)
        free[0] -= 1
        with pytest.raises(BadInput, match="3 clips of 64x64"):
            check_disk(tmp_path / "v.mp4", video, done)


def test_segments_that_the_disk_cannot_hold_are_refused_before_the_first(s2v, tmp_path, monkeypatch, no_plan):
    """Ten seconds of 64x64 at the default 80 frames: two segments of 0.98 MB and their latents, and what joins them."""
    usage, asked = shutil.disk_usage(tmp_path), []
    monkeypatch.setattr(sample, "denoise", lambda *a, **k: asked.append(1))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2_000_000))
    tiny_s2v.write_wav(tmp_path / "a.wav", tiny_s2v.sound(10)[None])
    tiny_s2v.write_picture(tmp_path / "p.png", 64, 64)
    flags = "--prompt", "a", "--image", tmp_path / "p.png", "--audio", tmp_path / "a.wav", "--size", "64x64"
    with pytest.raises(BadInput, match=r"2 clips of 64x64 need 0.0\d+ GB .* has 0.002 GB free"):
        run(monkeypatch, "--ckpt", s2v, *flags, "--out", tmp_path / "v.mp4")
    assert not asked


def test_a_pose_video_of_two_frames_is_refused(s2v, tmp_path, monkeypatch):
    """They have no frame rate to follow; nor has a file that is no video."""
    tiny_s2v.write_wav(tmp_path / "a.wav", tiny_s2v.sound(1)[None])
    tiny_s2v.write_picture(tmp_path / "p.png", 64, 64)
    tiny_s2v.write_pose_video(tmp_path / "two.mkv", 2, 64, 64, 16)
    (tmp_path / "text.mp4").write_text("no video")
    flags = "--prompt", "a", "--image", tmp_path / "p.png", "--audio", tmp_path / "a.wav", "--size", "64x64"
    for name, message in (
        ("two.mkv", "two.mkv: 2 frames; at least 3 are needed"),
        ("text.mp4", "--pose_video .*text.mp4"),
    ):
        with pytest.raises(BadInput, match=message):
            run(monkeypatch, "--ckpt", s2v, *flags, "--pose_video", tmp_path / name, "--out", tmp_path / "v.mp4")


# ---- what is refused -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "kind, flags, message",
    [
        ("s2v", "--image x.png", "--image and --audio are needed"),
        ("s2v", "--audio x.wav", "--image and --audio are needed"),
        ("s2v", "--image x.png --audio x.wav --infer_frames 18", "--infer_frames 18: must be a multiple of 4"),
        ("s2v", "--image x.png --audio x.wav --num_clip -1", "--num_clip -1: at least 1"),
        ("s2v", "--src_root_path x", "--src_root_path x: .* takes no such input"),
        ("s2v", "--refert_num 5", "--refert_num 5: .* takes no such input"),
        ("animate", "", "--src_root_path is needed"),
        ("animate", "--src_root_path x --image x.png", "--image x.png: .* takes its picture from"),
        ("animate", "--audio x.wav", "--audio x.wav: .* takes no such input"),
        ("animate", "--start_from_ref", "--start_from_ref True: .* takes no such input"),
        ("ti2v", "--audio x.wav", "--audio x.wav: .* takes no such input"),
        ("t2v", "--replace_flag", "--replace_flag True: .* takes no such input"),
        ("i2v", "--num_clip 2", "--num_clip 2: .* takes no such input"),
    ],
)
def test_flags_of_one_variant_are_refused_by_another(
    s2v, animate, checkpoints, tmp_path, monkeypatch, kind, flags, message
):
    folder = {"s2v": s2v, "animate": animate[0], **checkpoints}[kind]
    with pytest.raises(BadInput, match=message) as e:
        run(monkeypatch, f"{HOW} --ckpt", folder, "--out", tmp_path / "v.mp4", flags)
    assert "\n" not in str(e.value)
