"""Videos of several segments (S2V, Animate) on ranks, with streamed blocks, in 8 bits, compiled: as on one device."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_animate_inputs import C
from test_parallel import run_jobs

import sample
from benchmarks import tiny, tiny_animate, tiny_animate2, tiny_s2v
from nanowan import memory_estimate
from nanowan.formats.header import load
from nanowan.long_video import SegmentFiles
from nanowan.pipeline import Pipeline, Runtime
from nanowan.variants.animate.conditioning import CharacterVideo
from nanowan.variants.s2v.conditioning import SpeechVideo
from nanowan.variants.s2v.model import WanS2V


@pytest.fixture(scope="module", params=["s2v", "animate", "animate2"])
def video(request, tmp_path_factory):
    """(checkpoint, what sample.generate is given): two segments, of a DiT whose four heads four ranks can share."""
    folder = tmp_path_factory.mktemp(request.param)
    how = dict(steps=2, guidance=3.0, seed=5)
    if request.param == "animate":
        source, ckpt = tiny_animate.source_folder(folder / "source"), tiny_animate.checkpoint(folder / "ckpt")
        tiny_animate.write_dit(ckpt, tiny_animate.animate(heads=4))
        return ckpt, how | dict(src_root_path=str(source), frames=C)
    tiny_s2v.write_picture(folder / "picture.png", 64, 64)
    if request.param == "animate2":
        tiny_animate.write_video(folder / "video.mp4", tiny_animate.frames(20, 32, 48, 1), 24)
        files = dict(image=str(folder / "picture.png"), video=str(folder / "video.mp4"))
        ckpt = tiny_animate2.checkpoint(folder / "ckpt", model=tiny_animate2.animate2(heads=4))
        return ckpt, how | files | dict(size=(48, 32), frames=C)
    tiny_s2v.write_wav(folder / "sound.wav", tiny_s2v.sound(6)[None])
    ckpt = tiny_s2v.checkpoint(folder / "ckpt")
    tiny_s2v.write_dit(ckpt, tiny_s2v.fill(WanS2V(replace(tiny_s2v.CONFIG, num_heads=4))))
    files = dict(image=str(folder / "picture.png"), audio=str(folder / "sound.wav"))
    return ckpt, how | files | dict(size=(64, 64), infer_frames=16, num_clip=2)


@pytest.fixture(scope="module")
def latents(video):
    """Of each segment, on one device."""
    return sampled(video)


def sampled(video, **runtime):
    ckpt, how = video
    pipe = Pipeline(ckpt, Runtime("cpu", torch.float32, **runtime))
    return sample.generate(pipe, "a prompt", progress=False, **how)[1]


def test_ranks_that_share_a_long_video(video, latents, tmp_path, report):
    """Two and four ranks, by tokens, by guidance's halves and by both."""
    ckpt, how = video
    cases = {
        2: {"ulysses": {"ulysses_size": 2}, "guidance": {"cfg_parallel": True}},
        4: {"four": {"ulysses_size": 4}, "both": {"ulysses_size": 2, "cfg_parallel": True}},
    }
    for n, jobs in cases.items():
        files = {name: str(tmp_path / f"{name}.safetensors") for name in jobs}
        argv = {name: [files[name], str(ckpt), how] for name in jobs}
        run_jobs(n, tmp_path, [{"script": "long_video", "argv": argv[k], "ranks": jobs[k]} for k in jobs])
        for name in jobs:
            found = load(files[name])[0]
            worst = max(tiny.error(found[f"latents_{r}"], z) for r, z in enumerate(latents))
            assert len(found) == len(latents) == 2
            report(name, worst, 1e-5)


def test_streamed_blocks_give_the_same_bits(video, latents):
    assert all(torch.equal(a, b) for a, b in zip(sampled(video, stream_blocks=3), latents, strict=True))


def test_eight_bits_change_little(video, latents, report):
    """The error of e4m3 in the blocks, and not none. The second segment begins from the first one's."""
    found = sampled(video, fp8=True)
    report("latents of the first segment", tiny.error(found[0], latents[0]), 0.06)
    assert all((a - b).norm() > 1e-3 * b.norm() for a, b in zip(found, latents, strict=True))


@pytest.mark.slow
def test_compiled_blocks_give_the_same(video, latents, report):
    found = sampled(video, compile="blocks")
    report("latents", max(tiny.error(a, b) for a, b in zip(found, latents, strict=True)), 2e-5)


@pytest.mark.parametrize("has_motion", [False, True])
def test_a_segment_keeps_no_more_than_it_hands_on(has_motion):
    """Neither the new frames nor what the next segment needs hold on to the frames that were decoded before them."""

    def decode(latents):
        return torch.randn(1, 3, 1 + 4 * (latents.shape[2] - 1), 16, 16)

    def held(t):
        return t.untyped_storage().nbytes() == t.nbytes

    z, before = torch.randn(1, 4, 4, 2, 2), {"ref": torch.randn(1, 4, 1, 2, 2), "motion": torch.randn(1, 4, 19, 2, 2)}
    speech = SimpleNamespace(**before, has_motion=has_motion, frames=16, count=1, last=torch.zeros(1, 3, 73, 16, 16))
    frames = SpeechVideo.decode(speech, 0, z, decode)
    assert frames.shape[1] == (16 if has_motion else 13) and held(frames)
    assert speech.last.shape[2] == 73 and held(speech.last)
    character = SimpleNamespace(overlap=5, n=33, spans=[(0, 13), (8, 21)])
    CharacterVideo.decode(character, int(has_motion), z, decode)
    assert character.known.shape[2] == 5 and held(character.known)


def test_more_segments_take_no_more_memory(tmp_path):
    """The most bytes of tensors at once, with sound and poses, while a video of two and of three segments is made."""
    tiny_s2v.write_picture(tmp_path / "picture.png", 64, 64)
    tiny_s2v.write_wav(tmp_path / "sound.wav", tiny_s2v.sound(6)[None])
    tiny_s2v.write_pose_video(tmp_path / "pose.mkv", 80, 64, 64, fps=16)
    files = dict(image=tmp_path / "picture.png", audio=tmp_path / "sound.wav", pose_video=tmp_path / "pose.mkv")
    pipe = Pipeline(tiny_s2v.checkpoint(tmp_path / "ckpt"), Runtime("cpu", torch.float32))
    s = pipe.settings.with_overrides(size=(64, 64), steps=1, guidance=1.0)

    def make(count):
        video = sample.open_video(pipe, s, infer_frames=16, num_clip=count, **files)
        segments = SegmentFiles(tmp_path / f"{count}.mp4", {}, resume=False)
        text = sample.encode_text(pipe, s, ["a prompt"])
        sample.sample_segments(pipe, s, video, text, 0, segments, progress=False)
        assert segments.count() == count

    make(1)  # loads the models
    assert memory_estimate.traced(lambda: make(3)) == memory_estimate.traced(lambda: make(2)) > 0
