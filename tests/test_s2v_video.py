"""What S2V's clips are made of, in pixels, and whole runs, against the official code.

data/s2v_pipelines.safetensors holds the latents and the frames' means of runs of wan/speech2video.py (Wan-Video/Wan2.2
at 42bf4cfa) on tiny_s2v.checkpoint, in fp32 on a CPU, with flash attention replaced by PyTorch's, and with
tiny_s2v.prompts in place of a text encoder's output; data/s2v.safetensors, under fit_pose_*, what torchvision 0.28's
Resize and CenterCrop, which it prepares poses with, make of `frames`.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import flow
from benchmarks import tiny, tiny_s2v
from nanowan.errors import BadInput
from nanowan.formats.dit import load_wan
from nanowan.formats.vae import load_vae
from nanowan.variants.s2v.model import first_motion, fit_picture, fit_pose, fit_size, next_motion, pose_clip, pose_step
from nanowan.variants.s2v.wav2vec2 import count_clips, load_wav2vec2, read_audio, to_feature_rate, to_video_rate

DATA = Path(__file__).parent / "data"
FIGURES, PIPELINES = load_file(DATA / "s2v.safetensors"), load_file(DATA / "s2v_pipelines.safetensors")


# ---- pictures and clips ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "picture, area, size",
    [
        ((832, 480), 480 * 832, (832, 448)),
        ((1280, 720), 1024 * 704, (1088, 640)),
        ((1280, 720), 1280 * 720, (1280, 704)),
        ((1024, 1024), 1024 * 704, (832, 832)),
        ((640, 480), 1024 * 704, (640, 512)),
        ((500, 900), 1024 * 704, (512, 960)),
        ((4000, 3000), 1024 * 704, (960, 704)),
        ((190, 120), 1024 * 704, (192, 128)),
        ((3900, 70), 256 * 256, (1024, 64)),
        ((30, 20), 1024 * 704, (64, 64)),
        ((64, 64), 64 * 64, (64, 64)),
    ],
)
def test_size_of_the_video(picture, area, size):
    """As the official get_size_less_than_area gives it (also seen equal for 20,000 random sizes)."""
    assert fit_size(*picture, area) == size


@pytest.mark.parametrize("picture, area", [((500, 500), 64 * 63), ((11, 603), 6935)])
def test_sizes_with_a_side_under_64_are_refused(picture, area):
    with pytest.raises(BadInput, match=f"--size of {area} px for a picture of {picture[0]}x{picture[1]}"):
        fit_size(*picture, area)


def test_a_picture_that_is_too_short_gets_black_bars():
    from PIL import Image

    pixels = torch.tensor(list(fit_picture(Image.new("RGB", (500, 900), "white"), (512, 960)).tobytes()))
    rows = pixels.view(960, 512, 3).sum((1, 2))
    assert (rows[:19] == 0).all() and (rows[940:] == 0).all()  # 900 px become 921
    assert (rows[19:940] == 512 * 3 * 255).all()


@pytest.mark.parametrize("width, left", [(199, 36), (200, 36), (201, 36), (203, 38)])
def test_a_picture_that_is_too_long_is_cropped_in_the_middle(width, left):
    """To 128 px, of which torchvision's CenterCrop rounds a half to the even side: 35.5, 36, 36.5 and 37.5 px."""
    from PIL import Image

    picture = Image.fromarray(tiny_s2v.picture(width, 101))
    got = fit_picture(picture, (128, 101))
    assert got.tobytes() == picture.crop((left, 0, left + 128, 101)).tobytes()


@pytest.mark.parametrize("name, size", [("fit_pose_smaller", (8, 6)), ("fit_pose_barred", (16, 24))])
def test_pose_frames_equal_torchvisions(name, size, report):
    frames = torch.rand(2, 3, 9, 14, generator=torch.Generator().manual_seed(4)) * 2 - 1
    report("largest difference", (fit_pose(frames, size) - FIGURES[name]).abs().max().item(), 1e-6)


def test_pose_speed_and_clips():
    assert [pose_step(fps) for fps in (8, 16, 23.976, 24, 25, 29.97, 30, 40, 50, 60)] == [1, 1, 1, 2, 2, 2, 2, 2, 3, 4]
    frames = torch.rand(5, 3, 2, 2)
    clip = pose_clip(frames, 8)
    assert clip.shape == (1, 3, 9, 2, 2)
    assert torch.equal(clip[0, :, 0], frames[0]) and torch.equal(clip[0, :, 1:6], frames.transpose(0, 1))
    assert (clip[:, :, 6:] == -1).all()
    assert (pose_clip(frames[:0], 8) == -1).all()


def test_motion_is_the_last_73_frames():
    picture, video = torch.rand(1, 3, 1, 8, 16), torch.rand(1, 3, 77, 8, 16)
    last = first_motion(picture)
    assert last.shape == (1, 3, 73, 8, 16) and (last == 0).all()
    assert torch.equal(next_motion(last, video), video[:, :, 4:])
    short = next_motion(last, video[:, :, :13])
    assert (short[:, :, :60] == 0).all() and torch.equal(short[:, :, 60:], video[:, :, :13])
    start = first_motion(picture, start_from_picture=True)
    assert (start[:, :, :67] == 0).all() and (start[:, :, 67:] == picture).all()


# ---- whole pipelines -----------------------------------------------------------------------------------------------
def generate(folder, seconds, picture, area, frames, steps, scale, solver, seed, clips=None, pose=None, start=False):
    """Latents (C,T',h,w) of each clip and the video (1,3,T,H,W), put together from the parts."""
    from PIL import Image

    model, vae = load_wan(folder, dtype=torch.float32), load_vae(folder)
    encoder = load_wav2vec2(folder / "wav2vec2-large-xlsr-53-english")
    tiny_s2v.write_wav(folder / "sound.wav", tiny_s2v.sound(seconds)[None])
    features = to_feature_rate(encoder.features(read_audio(folder / "sound.wav")))
    clips = clips or count_clips(features.shape[1], frames)
    audio = to_video_rate(features, clips * frames)[None]

    image = Image.fromarray(tiny_s2v.picture(*picture))
    size = fit_size(*image.size, area)
    pixels = torch.from_numpy(np.array(fit_picture(image, size))).permute(2, 0, 1).float()[None, :, None] / 127.5 - 1
    ref, last, videos, found = vae.encode(pixels), first_motion(pixels, start), [], []
    for r in range(clips):
        motion = vae.encode(last)
        has_motion = r > 0 or start
        given = dict(ref=model.embed_reference(ref, motion if has_motion else None))
        if pose is not None:
            given["pose"] = vae.encode(pose_clip(fit_pose(pose[r * frames : (r + 1) * frames], size), frames))[:, :, 1:]
        sound = audio[..., r * frames : (r + 1) * frames]
        branches = [
            dict(given, context=text[None], audio=model.embed_audio(gain * sound))
            for text, gain in zip(tiny_s2v.prompts(), (1, 0))
        ]
        x = torch.randn(1, 16, frames // 4, *ref.shape[3:], generator=torch.Generator().manual_seed(seed + r))
        sampler = flow.solver(solver, steps, 3.0)
        for t in sampler.timesteps.tolist():
            cond, uncond = (model(x, torch.tensor([float(t)]), **b) for b in branches)
            x = sampler.step(uncond + scale * (cond - uncond), x)
        found.append(x[0])
        video = vae.decode(torch.cat([motion if has_motion else ref, x], 2))[:, :, -frames:]
        videos.append(video if has_motion else video[:, :, 3:])
        last = next_motion(last, videos[-1])
    return found, torch.cat(videos, 2)


RUNS = {
    "three_clips": (dict(seconds=2.5, picture=(90, 150), area=128 * 64, frames=16, steps=4, scale=4.5, seed=11), 45),
    "pose": (dict(seconds=2.5, picture=(90, 150), area=128 * 64, frames=16, steps=4, scale=4.5, seed=12, clips=2), 29),
    "start_from_ref": (
        dict(seconds=2.5, picture=(90, 150), area=8192, frames=16, steps=4, scale=1, seed=13, clips=2),
        32,
    ),
    "full_clips": (dict(seconds=5.0155, picture=(100, 100), area=64 * 64, frames=80, steps=2, scale=4.5, seed=14), 157),
}


@pytest.mark.parametrize("name", RUNS)
@torch.no_grad()
def test_pipelines_equal_official(tmp_path, name, report):
    """Three clips; a pose video of 30 frames a second, with DPM++; from the picture, unguided; two clips of full
    length, of which the second is all silent, since the sound's features fill the first exactly.
    """
    given, length = RUNS[name]
    if name == "pose":  # of 50 frames, of which every second is taken
        pictures = [tiny_s2v.picture(100, 140, 0.2 * i) for i in range(0, 50, pose_step(30))]
        given = dict(given, pose=torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1)
    solver = "dpm++" if name == "pose" else "unipc"
    folder = tiny_s2v.checkpoint(tmp_path)
    latents, video = generate(folder, solver=solver, start=name == "start_from_ref", **given)
    assert len(latents) == sum(key.startswith(f"{name}_latents") for key in PIPELINES) and video.shape[2] == length
    for r, x in enumerate(latents):
        report(f"latents of clip {r}", tiny.error(x, PIPELINES[f"{name}_latents_{r}"]), 1e-3)
    report("mean of each frame", (video[0].mean((0, 2, 3)) - PIPELINES[f"{name}_frame_means"]).abs().max().item(), 1e-3)
