"""What Animate is given, against figures of the official WanAnimate.generate.

tests/data/animate_source.safetensors was made by running the official wan/animate.py (commit 42bf4cfa) on a CPU, with
its bfloat16 replaced by float32 and autocast off, OpenCV 4.11, the frames and the stand-in for the VAE below, a DiT
that only notes what it is given, 20 frames, clips of 13 and one step. It holds, per mode and --refert_num and per clip,
y, the pose latents and one pixel of the face crops, and one pixel of the joined videos; then what padding_resize
(letterbox), inputs_padding (padding) and get_valid_len give by themselves.
"""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import flow
from benchmarks import tiny, tiny_animate
from benchmarks.tiny_animate import frames, write_video
from nanowan.errors import BadInput
from nanowan.formats.dit import load_wan
from nanowan.formats.header import load
from nanowan.formats.t5 import load_t5
from nanowan.formats.vae import load_vae
from nanowan.settings import NEGATIVE
from nanowan.variants.animate import inputs
from nanowan.variants.animate.clip import load_vision
from nanowan.variants.animate.inputs import (
    Source,
    clip_ranges,
    encode_clip,
    encode_reference,
    letterbox,
    ping_pong,
    read_source,
)
from nanowan.variants.registry import VARIANTS

FIGURES = load(Path(__file__).parent / "data" / "animate_source.safetensors")[0]
H, W, S, N, C = 32, 48, 16, 20, 13  # sides of the video and of the crops, real frames, frames of a clip


def join_clips(videos, overlap, n):
    """Decoded clips (1,3,c,H,W) -> the video (1,3,n,H,W), in which the frames that two clips share stand once."""
    return torch.cat([videos[0], *(video[:, :, overlap:] for video in videos[1:])], 2)[:, :, :n]


class StandIn:
    """Encodes and decodes by a formula, causally: 8x8 pixels to one, four frames to one, each with half of the one
    before it.
    """

    calls = 0
    encoder = SimpleNamespace(downsamples=(), middle=())  # the layers that encode_still looks at

    def encode(self, video):
        x = F.avg_pool2d(video[0].double().transpose(0, 1), 8).transpose(0, 1)  # (3,T,h,w)
        channels = torch.sin(1 + torch.arange(16).double()[:, None] + 2.3 * torch.arange(3).double())
        weights, state, z = torch.tensor([0.1, 0.2, 0.3, 0.4]).double()[:, None, None], 0, []
        for k in range(1 + (x.shape[1] - 1) // 4):
            state = 0.5 * state + (x[:, 0] if k == 0 else (x[:, 4 * k - 3 : 4 * k + 1] * weights).sum(1))
            z.append(torch.einsum("oc,chw->ohw", channels, state))
        return torch.stack(z, 1).float()[None]

    def decode(self, frames):
        c, i, y, x = torch.meshgrid(*(torch.arange(n) for n in (3, frames, H, W)), indexing="ij")
        self.calls += 1
        return (((self.calls - 1) * 29 + i * 13 + y * 5 + x * 3 + c * 7) % 200)[None].float() / 100 - 1


class StandInClip:
    def encode(self, image):
        return image.flatten(2)


def source(replace):
    reference, background, mask = frames(1, H, W, 5)[0], frames(N, H, W, 3), frames(N, H, W, 4)
    mask = [frame[..., 0] for frame in mask]
    extra = (background, mask) if replace else (None, None)
    return Source(frames(N, H, W, 1), frames(N, S, S, 2), reference, *extra, 30.0)


@pytest.mark.parametrize("overlap", [1, 5])
@pytest.mark.parametrize("mode", ["animate", "replace"])
def test_equals_official(mode, overlap, report):
    src, vae, videos = source(mode == "replace"), StandIn(), []
    reference, tokens = encode_reference(vae, StandInClip(), src, "cpu")
    want = torch.from_numpy(src.reference / 127.5 - 1).permute(2, 0, 1).float()[None]
    report("what CLIP sees", tiny.error(tokens, want.flatten(2)), 1e-6)
    spans = clip_ranges(N, C, overlap)
    for i, span in enumerate(spans):
        got = encode_clip(vae, src, span, reference, videos[-1][:, :, -overlap:] if videos else None)
        figure = {name: FIGURES[f"{mode}.{overlap}.{i}.{name}"] for name in ("y", "pose", "face")}
        report("y's mask", tiny.error(got.y[0, :4], figure["y"][:4]), 1e-6)
        report("y", tiny.error(got.y[0, 4:], figure["y"][4:]), 1e-6)
        report("pose", tiny.error(got.pose[0], figure["pose"]), 1e-6)
        report("face", tiny.error(got.face[0, :, :, 3, 5], figure["face"]), 1e-6)
        assert got.face.shape == (1, 3, C, S, S)
        videos.append(vae.decode(C))
    assert f"{mode}.{overlap}.{len(spans)}.y" not in FIGURES and len(spans) == 2
    assert torch.equal(join_clips(videos, overlap, N)[0, :, :, 0, 0], FIGURES[f"{mode}.{overlap}.video"])


@pytest.mark.parametrize("name", [name for name in FIGURES if name.startswith("letterbox")])
def test_letterbox_equals_official(name):
    h, w = map(int, re.findall(r"\d+", name))
    off = letterbox(frames(1, h, w, 6)[0], W, H).astype(int) - FIGURES[name].numpy()
    assert abs(off).max() <= 1 and (off != 0).mean() < 0.2


@pytest.mark.parametrize("name", [name for name in FIGURES if name.startswith("padding")])
def test_ping_pong_equals_official(name):
    n, total = map(int, re.findall(r"\d+", name))
    assert ping_pong(list(range(n)), (0, total)) == FIGURES[name].tolist()
    assert ping_pong(list(range(n)), (2, total)) == FIGURES[name].tolist()[2:]


def test_clips_end_where_the_official_lists_do():
    for n, length, overlap, end in FIGURES["valid_len"].tolist():
        if n > overlap:
            spans = clip_ranges(n, length, overlap)
            assert spans[0][0] == 0 and spans[-1][1] == end
            assert all(b[0] == a[1] - overlap for a, b in zip(spans, spans[1:]))


# ---- files -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path):
    """A whole source folder of 7 frames; the reference is a JPEG under the name that preprocessing gives it."""
    for i, name in enumerate(("pose", "bg", "mask")):
        write_video(tmp_path / f"src_{name}.mp4", frames(7, H, W, i + 1))
    write_video(tmp_path / "src_face.mp4", frames(7, S, S, 9))
    Image.fromarray(frames(1, 60, 40, 5)[0]).save(tmp_path / "src_ref.png", "JPEG")
    return tmp_path


def test_reads_a_folder(folder):
    src = read_source(folder, True, S)
    for got, (h, w, kind) in zip((src.pose, src.background, src.face), ((H, W, 1), (H, W, 2), (S, S, 9))):
        assert np.array_equal(np.stack(got), np.stack(frames(7, h, w, kind)))
    assert np.array_equal(np.stack(src.mask), np.stack(frames(7, H, W, 3))[..., 0])
    reference = np.array(Image.open(folder / "src_ref.png").convert("RGB"))
    assert np.array_equal(src.reference, letterbox(reference, W, H)) and abs(src.fps - 25) < 1e-6
    for name in ("bg", "mask"):
        (folder / f"src_{name}.mp4").unlink()
    src = read_source(folder, False, S)
    assert src.background is None and src.mask is None and len(src.pose) == 7


def break_a_file(folder, name, action):
    file = folder / name
    if action == "remove":
        file.unlink()
    elif action == "cut":
        file.write_bytes(file.read_bytes()[:700])
    elif action == "garble":
        data = bytearray(file.read_bytes())
        data[len(data) // 3 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 3)
        file.write_bytes(data)
    else:
        write_video(file, frames(*action, 1))


@pytest.mark.parametrize(
    "name, action, message",
    [
        ("src_pose.mp4", "remove", "--src_root_path .*: has no src_pose.mp4; it should be the folder"),
        ("src_mask.mp4", "remove", "has no src_mask.mp4; .* with its --replace_flag"),
        ("src_ref.png", "remove", "has no src_ref.png"),
        ("src_face.mp4", "cut", "src_face.mp4: cannot be decoded"),
        ("src_bg.mp4", "garble", "src_bg.mp4: cannot be decoded"),
        ("src_ref.png", "cut", "src_ref.png: cannot be read"),
        ("src_pose.mp4", (7, H, W - 8), "src_pose.mp4: 40x32 px; both sides should be multiples of 16"),
        ("src_face.mp4", (7, S, S + 2), "src_face.mp4: 18x16 px, should be 16x16 .ffmpeg -vf scale=16:16"),
        ("src_bg.mp4", (7, W, H), "src_bg.mp4: 32x48 px, should be 48x32"),
        ("src_mask.mp4", (7, H // 2, W), "src_mask.mp4: 48x16 px, should be 48x32"),
        ("src_face.mp4", (6, S, S), "src_face.mp4: 6 frames, should be 7 as in src_pose.mp4"),
        ("src_bg.mp4", (8, H, W), "src_bg.mp4: 8 frames, should be 7"),
        ("src_mask.mp4", (6, H, W), "src_mask.mp4: 6 frames, should be 7"),
        ("src_pose.mp4", "garble", "src_pose.mp4: cannot be decoded"),
        ("src_mask.mp4", "cut", "src_mask.mp4: cannot be decoded"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(folder, name, action, message):
    break_a_file(folder, name, action)
    with pytest.raises(BadInput, match=message) as e:
        read_source(folder, True, S)
    assert "\n" not in str(e.value)


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(
        BadInput, match="--src_root_path .*none: has no src_pose.mp4, src_face.mp4, src_ref.png; it should"
    ):
        read_source(tmp_path / "none", False, S)


@pytest.mark.parametrize(
    "n, length, overlap, message",
    [
        (20, 77, 3, "--refert_num 3: should be 1 or 5"),
        (20, 76, 1, r"--frames 76: should be 4k\+1"),
        (20, 9, 5, r"--frames 9: .* at least 10 with --refert_num 5"),
        (20, 1, 1, "--frames 1: .* at least 2"),
        (5, 77, 5, "src_pose.mp4: 5 frames, should be more than --refert_num 5"),
        (1, 77, 1, "src_pose.mp4: 1 frames"),
    ],
)
def test_clips_that_cannot_be_are_refused(n, length, overlap, message):
    with pytest.raises(BadInput, match=message):
        clip_ranges(n, length, overlap)


def test_a_reference_too_narrow_is_refused():
    with pytest.raises(BadInput, match="1x100 px is too narrow for a video of 48x32"):
        inputs.letterbox(np.zeros((100, 1, 3), np.uint8), W, H)


# ---- all parts together ----------------------------------------------------------------------------------------------
LATENTS = load(Path(__file__).parent / "data" / "animate_latents.safetensors")[0]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(DiT, VAE, CLIP, text encoder, source folder), all tiny."""
    folder = tmp_path_factory.mktemp("animate")
    tiny_animate.checkpoint(folder / "checkpoint")
    loaded = (f(folder / "checkpoint", dtype=torch.float32) for f in (load_wan, load_vae, load_vision, load_t5))
    return *loaded, tiny_animate.source_folder(folder / "source")


def relight(model):
    """Merge a LoRA of rank 4 into every linear of the blocks; returns what undoes it."""
    generator, linears = torch.Generator().manual_seed(30), dict(model.blocks.named_modules(prefix="blocks"))
    before = {}
    for name in sorted(name for name, m in linears.items() if isinstance(m, torch.nn.Linear)):
        weight = linears[name].weight
        a = torch.randn(4, weight.shape[1], generator=generator) * 0.1
        b = torch.randn(weight.shape[0], 4, generator=generator) * 0.1
        before[name], weight.data = weight.data, weight + b @ a
    return lambda: [setattr(linears[name].weight, "data", weight) for name, weight in before.items()]


@pytest.mark.parametrize("name", sorted({name.rsplit(".", 1)[0] for name in LATENTS}))
def test_latents_equal_official(name, parts, report):
    """tests/data/animate_latents.safetensors: what the official WanAnimate.generate made on a CPU in fp32 from
    tiny_animate's checkpoint and source folder, with the official DiT, CLIP and VAE at these sizes (constants in its
    code changed to them), in 3 steps from seed 7; "relit": with the weights that `relight` makes.
    """
    dit, vae, clip, text, folder = parts
    mode, overlap, solver, guidance = name.replace("relit", "g1").split(".")
    undo = relight(dit) if name.endswith("relit") else None
    overlap, g = int(overlap), float(guidance[1:])
    src, videos, generator = read_source(folder, mode == "replace", S), [], torch.Generator().manual_seed(7)
    with torch.no_grad():
        prompts = [dit.embed_text(*text.encode([p]), cache=True) for p in (VARIANTS["animate-14B"]["prompt"], NEGATIVE)]
        reference, tokens = encode_reference(vae, clip, src, "cpu")
        image = dit.embed_image(tokens, cache=True)
        for i, span in enumerate(clip_ranges(N, C, overlap)):
            given = encode_clip(vae, src, span, reference, videos[-1][:, :, -overlap:] if videos else None)
            crops = given.face, torch.full_like(given.face, -1)
            faces = [dit.embed_motion(dit.encode_motion(face), cache=True) for face in crops]
            x = torch.randn(16, *given.y.shape[2:], generator=generator)[None]
            method = flow.solver(solver, 3, 5.0)
            for t in method.timesteps.tolist():
                inputs, t = torch.cat([x, given.y], 1), torch.tensor([float(t)])
                v, null = (
                    dit(inputs, t, prompt, pose=given.pose, face=face, clip=image)
                    for prompt, face in zip(prompts, faces)
                )
                x = method.step(v if g == 1 else null + g * (v - null), x)
            report(f"latents of clip {i}", tiny.error(x[0, :, 1:], LATENTS[f"{name}.latents_{i}"]), 1e-3)
            videos.append(vae.decode(x[:, :, 1:]))
    video = join_clips(videos, overlap, N)[0, :, :, ::8, ::8]
    report("video", tiny.error(video, LATENTS[f"{name}.video"]), 1e-3)
    if undo:
        undo()
