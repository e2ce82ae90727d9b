"""Training on the variants that go segment by segment: what is read, cached and fed, and what is learned.

The oracle of what a step feeds the DiT is the sampler on the same clip: Conditioning.video, which equals the official
pipelines (test_long_video.py), and direct calls of the encoders.
"""

import hashlib
import importlib
import json
import random
import shutil
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from helpers.scripts import NoPlan
from PIL import Image
from test_animate import peer_run
from test_s2v import plain

import data
import train_lora
import train_te
from benchmarks import tiny, tiny_animate, tiny_s2v
from diagnostics.logits import open_dataset
from diagnostics.plan import planned
from lora import inject, lora_layers
from nanowan import cache, memory_estimate
from nanowan.errors import BadInput
from nanowan.formats.dit import full_config, keep_fp32, load_wan, new_dit
from nanowan.formats.header import load
from nanowan.formats.vae import load_vae
from nanowan.pipeline import Pipeline
from nanowan.training.flags import data_config, resolve
from nanowan.training.previews import HeldOutVideo
from nanowan.training.run_dir import Run
from nanowan.variants.animate import inputs
from nanowan.variants.animate.samples import CharacterSamples
from nanowan.variants.s2v import wav2vec2
from nanowan.video import Skip, open_image, read_frames, sound_delay

F = 16  # frames of a sample


# ---- files -------------------------------------------------------------------------------------------------------
def write_clip(path, pictures, fps=16, sound=None, caption="a person talks"):
    """Pictures (H,W,3) uint8, decoded to exactly these, with a sound (N,) at 16 kHz, and a caption."""
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as file:
        stream = file.add_stream("ffv1", rate=Fraction(fps))
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], "bgr0"
        if sound is not None:
            audio = file.add_stream("pcm_s16le", rate=16000, layout="mono")
        for picture in pictures:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode(None))
        if sound is not None:
            samples = (sound.numpy() * 32767).round().astype("<i2")[None]
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            frame.sample_rate = 16000
            file.mux(audio.encode(frame))
            file.mux(audio.encode(None))
    if caption:
        path.with_suffix(".txt").write_text(caption)


def pictures(n, shift=0.0, width=64, height=64):
    return [tiny_s2v.picture(width, height, shift + 0.2 * i) for i in range(n)]


def video(frames):
    """(1,3,T,H,W) in [-1,1]."""
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).float()[None] / 127.5 - 1


def flags_of(ckpt, folder, out, *flags):
    words = f"--ckpt {ckpt} --data {folder} --out {out} --cache {folder.parent}/cache --resolution 64x64 --frames {F}"
    words += " --steps 2 --batch 1 --held_out 0 --caption_dropout 0 --device cpu --dtype fp32"
    return [*words.split(), *(word for flag in flags for word in str(flag).split())]


def dataset_of(ckpt, folder, out, *flags):
    """(flags, Pipeline, Dataset) of train_lora.py, its latents cached."""
    args, pipe, dataset = uncached_dataset(ckpt, folder, out, *flags)
    dataset.cache_latents()
    return args, pipe, dataset


def uncached_dataset(ckpt, folder, out, *flags):
    args, pipe = train_lora.arguments(flags_of(ckpt, folder, out, *flags)), Pipeline(ckpt)
    resolve(args, pipe.settings, "train_lora")
    return args, pipe, data.Dataset(data_config(args, pipe.settings, None), pipe)


def first_batch(dataset, step=0):
    (batch, weight), *more = dataset.step(step, 0.0, 1.0)
    assert weight == 1 and not more
    return batch


def train(monkeypatch, script, ckpt, folder, out, *flags):
    """A run in this process, without the plan, which takes longer; returns its log."""
    monkeypatch.setattr(memory_estimate, "training", lambda *args, **kwargs: NoPlan())
    monkeypatch.setattr("sys.argv", [script, *flags_of(ckpt, folder, out, *flags)])
    module, runs = importlib.import_module(script), []
    monkeypatch.setattr(module, "Run", lambda *args, **how: runs.append(Run(*args, **how)) or runs[0])
    module.main()
    runs[0].close()
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# ---- S2V: what is fed --------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def s2v(tmp_path_factory):
    return tiny_s2v.checkpoint(tmp_path_factory.mktemp("s2v") / "ckpt")


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    """A clip of 100 frames with its sound, and the poses of a video beside it."""
    folder = tmp_path_factory.mktemp("talk")
    write_clip(folder / "a.mkv", pictures(100), sound=tiny_s2v.sound(6.4))
    write_clip(folder / "a.pose.mkv", pictures(100, 3.0), caption=None)
    return folder


def sampled(models, ckpt, folder, tmp_path, seconds=6.4):
    """What sampling makes of the clip's first picture, its sound and its poses."""
    Image.fromarray(pictures(1)[0]).save(tmp_path / "picture.png")
    tiny_s2v.write_wav(tmp_path / "sound.wav", tiny_s2v.sound(seconds)[None])
    s = models.settings.with_overrides(size=(64, 64))
    image, inputs = open_image(tmp_path / "picture.png"), {"audio": tmp_path / "sound.wav", "infer_frames": F}
    return s.conditioning.video(models, s, image, pose_video=folder / "a.pose.mkv", **inputs)


@torch.no_grad()
def test_a_first_clip_is_fed_what_sampling_feeds(s2v, talk, tmp_path):
    _, models, dataset = dataset_of(s2v, talk, tmp_path / "out", "--continuation 0")
    batch = first_batch(dataset)
    want = sampled(models, s2v, talk, tmp_path).conditions(0).inputs
    assert batch.inputs.keys() == want.keys() == {"ref", "audio", "pose"}
    assert all(torch.equal(batch.inputs[name], want[name]) for name in want)

    # the latents stand behind the reference's, as in decoding; x and target are those of flow matching
    x0 = load_vae(s2v).encode(video(pictures(1) + pictures(F)))[:, :, 1:]
    check_noising(batch, x0)
    assert batch.loss_mask is None and batch.x.shape == (1, 16, F // 4, 8, 8)


@torch.no_grad()
def test_a_continuation_is_fed_what_sampling_feeds(s2v, talk, tmp_path):
    """Frames 73 to 88, with frames 0 to 72 as motion, and their sound and poses."""
    _, models, dataset = dataset_of(s2v, talk, tmp_path / "out", "--continuation 1")
    batch, frames = first_batch(dataset), video(pictures(89))
    sequence = sampled(models, s2v, talk, tmp_path)
    sequence.restore({"last": frames[:, :, :73]})
    encoder = wav2vec2.load_wav2vec2(s2v / "wav2vec2-large-xlsr-53-english")
    features = wav2vec2.to_feature_rate(encoder.features(wav2vec2.read_audio(tmp_path / "sound.wav")))
    vae, poses = load_vae(s2v), video(pictures(89, 3.0)[73:])
    assert torch.equal(batch.inputs["ref"], sequence.ref) and torch.equal(batch.inputs["motion"], sequence.motion)
    assert torch.equal(batch.inputs["audio"][0], wav2vec2.to_video_rate(features, 89)[..., 73:])
    assert torch.equal(batch.inputs["pose"], vae.encode(torch.cat([poses[:, :, :1], poses], 2))[:, :, 1:])
    check_noising(batch, vae.encode(frames)[:, :, 19:])


def check_noising(batch, x0, frames=slice(None)):
    """x = (1-t) x0 + t eps and target = eps - x0, of one noise eps that looks like one."""
    t = batch.t.view(-1, 1, 1, 1, 1)
    eps = batch.target + x0
    assert 0 < t < 1 and tiny.error(batch.x[:, :16], (1 - t) * x0 + t * eps) < 1e-5
    assert abs(eps.mean()) < 0.2 and abs(eps.std() - 1) < 0.1


@torch.no_grad()
def test_windows_hear_their_own_time(s2v, talk, tmp_path):
    """Under --clip_mode several the second sample begins at frame 16, and so does its sound."""
    _, models, dataset = dataset_of(s2v, talk, tmp_path / "out", "--clip_mode several --continuation 0")
    assert [i.start for i in dataset.items] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert [i.frames_after for i in dataset.items] == [73, 0, 0, 0, 0, 0] and len(set(dataset.files)) == 6
    sequence = sampled(models, s2v, talk, tmp_path)
    for k, file in enumerate(dataset.files):
        assert torch.equal(load(file)[0]["audio"], sequence.conditions(k).inputs["audio"][0])


def test_sound_that_cannot_be_decoded_is_a_reason_to_skip(tmp_path):
    (tmp_path / "a.mkv").write_bytes(b"no clip at all")
    with pytest.raises(Skip, match="its video cannot be decoded"):
        sound_delay(tmp_path / "a.mkv")


@torch.no_grad()
@pytest.mark.parametrize("later", [0.5, -0.5])
def test_sound_is_heard_where_it_begins(s2v, tmp_path, later):
    """Half a second after the picture: what sampling makes of the same sound behind half a second of silence; before
    it: what it makes of the rest of the sound.
    """
    sound = tiny_s2v.sound(3.0)
    folder = tmp_path / "clips"
    folder.mkdir()
    with av.open(str(folder / "a.mkv"), "w") as file:
        stream = file.add_stream("ffv1", rate=16)
        stream.height = stream.width = 64
        stream.pix_fmt = "bgr0"
        audio = file.add_stream("pcm_s16le", rate=16000, layout="mono")
        for k, picture in enumerate(pictures(48)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = k + 8 * (later < 0), Fraction(1, 16)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        frame = av.AudioFrame.from_ndarray((sound.numpy() * 32767).round().astype("<i2")[None], "s16", "mono")
        frame.sample_rate, frame.pts, frame.time_base = 16000, 8000 * (later > 0), Fraction(1, 16000)
        file.mux(audio.encode(frame))
        file.mux(audio.encode(None))
    (folder / "a.txt").write_text("x")
    heard = torch.cat([torch.zeros(8000), sound]) if later > 0 else sound[8000:]
    tiny_s2v.write_wav(tmp_path / "late.wav", heard[None])
    _, models, dataset = dataset_of(s2v, folder, tmp_path / "out")
    features = models.acquire("audio").features(wav2vec2.read_audio(tmp_path / "late.wav"))
    want = wav2vec2.to_video_rate(wav2vec2.to_feature_rate(features), F)
    assert torch.equal(load(dataset.files[0])[0]["audio"], want)


def test_without_a_caption_there_is_no_sound(s2v, talk, tmp_path):
    """As in guidance's second half."""
    *_, dataset = dataset_of(s2v, talk, tmp_path / "out", "--caption_dropout 1")
    batch = first_batch(dataset)
    assert batch.captions == [""] and batch.inputs["audio"].abs().max() == 0 and batch.inputs["ref"].abs().max() > 0


def test_the_share_of_continuations(s2v, talk, tmp_path):
    *_, dataset = dataset_of(s2v, talk, tmp_path / "out", "--continuation 0.3")
    kinds = ["motion" in first_batch(dataset, step).inputs for step in range(200)]
    assert 40 <= sum(kinds) <= 80  # 60 expected, 6.5 the standard deviation


# ---- S2V: what is read -------------------------------------------------------------------------------------------
def test_clips_without_what_they_need_are_named(s2v, tmp_path, capsys):
    folder = tmp_path / "clips"
    folder.mkdir()
    sound = tiny_s2v.sound(1.5)
    write_clip(folder / "good.mkv", pictures(24))
    tiny_s2v.write_wav(folder / "good.wav", sound[None])
    write_clip(folder / "silent.mkv", pictures(24))
    write_clip(folder / "short.mkv", pictures(3), sound=sound)
    write_clip(folder / "click.mkv", pictures(24), sound=sound[:160])
    write_clip(folder / "other.mkv", pictures(24), sound=sound)
    write_clip(folder / "other.pose.mkv", pictures(20), caption=None)
    write_clip(folder / "wide.mkv", pictures(24), sound=sound)
    write_clip(folder / "wide.pose.mkv", pictures(24, width=96), caption=None)
    Image.fromarray(pictures(1)[0]).save(folder / "photo.png")
    (folder / "photo.txt").write_text("x")
    *_, dataset = dataset_of(s2v, folder, tmp_path / "out")
    assert [i.path.name for i in dataset.items] == ["good.mkv"]
    said = capsys.readouterr().out
    for reason in (
        "silent.mkv: has no sound track, and there is no silent.wav beside it",
        "short.mkv: too short: 3 frames, 3 at 16 fps; at least 4 are needed",
        "click.mkv: holds 0.010 s of sound; at least 0.045 s are needed",
        "other.mkv: its other.pose.mkv ends at 1.19 s, the clip at 1.44 s",
        "wide.mkv: its wide.pose.mkv is 96x64 px, should have the shape of the clip's 64x64",
        "photo.png: is an image; s2v-14B is trained on clips",
        "0 of 2 are followed by 73 frames: trained as continuation segments too",
    ):
        assert reason in said, said
    assert "other.pose.mkv: has" not in said  # a sidecar is no sample without a caption


def test_only_what_changed_is_encoded_again(s2v, talk, tmp_path, monkeypatch):
    """Another sound beside the clip, another speech encoder, another file of poses: other names in the cache."""
    folder = tmp_path / "clips"
    folder.mkdir()
    write_clip(folder / "a.mkv", pictures(20))
    tiny_s2v.write_wav(folder / "a.wav", tiny_s2v.sound(1.5)[None])
    ckpt = tmp_path / "ckpt"
    ckpt.mkdir()
    for file in s2v.iterdir():
        (ckpt / file.name).symlink_to(file)
    encoder = ckpt / "wav2vec2-large-xlsr-53-english"
    encoder.unlink()
    tiny_s2v.write_wav2vec2(encoder, tiny_s2v.wav2vec2())

    def cached(computed):
        with monkeypatch.context() as patch:
            calls, real = [], cache.read_items
            patch.setattr(cache, "read_items", lambda items, *how: calls.extend(items) or real(items, *how))
            *_, dataset = dataset_of(ckpt, folder, tmp_path / "out")
            assert bool(calls) == computed
        return dataset.files[0]

    names = [cached(True)]
    assert cached(False) == names[0]
    tiny_s2v.write_wav(folder / "a.wav", tiny_s2v.sound(1.4)[None])
    names.append(cached(True))
    write_clip(folder / "a.pose.mkv", pictures(20, 1.0), caption=None)
    names.append(cached(True))
    tiny_s2v.write_wav2vec2(encoder, tiny_s2v.fill(tiny_s2v.wav2vec2(), 9))
    names.append(cached(True))
    config = json.loads((encoder / "config.json").read_text())
    (encoder / "config.json").write_text(json.dumps(config | {"note": "the same weights read otherwise"}))
    names.append(cached(True))
    assert len(set(names)) == 5
    audio = [load(name)[0]["audio"] for name in names]
    assert not torch.equal(audio[0], audio[1]) and torch.equal(audio[1], audio[2])
    assert not torch.equal(audio[2], audio[3])


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--frames 17", "--frames 17: must be a multiple of 4; nearest 16"),
        ("--clip_mode spaced", "--clip_mode spaced: would play clips faster than their sound"),
        ("--pipeline_stages 2", "--pipeline_stages 2: not for s2v-14B"),
        ("--continuation 1.5", "--continuation 1.5: must be at least 0 and at most 1"),
        ("--resolution 48x64", "--resolution 48x64: each side at least 64"),
        ("--i2v_prob 0.5", "--i2v_prob 0.5: only TI2V"),
    ],
)
def test_flags_that_do_not_fit_are_refused(s2v, talk, tmp_path, flags, says):
    with pytest.raises(BadInput, match=says):
        dataset_of(s2v, talk, tmp_path / "out", flags)


def test_single_clips_have_no_continuations(checkpoints, talk, tmp_path):
    args = train_lora.arguments(["--ckpt", str(checkpoints["t2v"]), "--continuation", "0.5", "--device", "cpu"])
    with pytest.raises(BadInput, match="--continuation 0.5: .* makes single clips"):
        resolve(args, Pipeline(checkpoints["t2v"]).settings, "train_lora")


def test_there_are_no_clips_of_the_nano_world(s2v, tmp_path, monkeypatch):
    """Said before anything is written, by both trainers, and by diag.py logits."""
    for script in (train_lora, train_te):
        monkeypatch.setattr("sys.argv", [script.__name__, "--ckpt", str(s2v), "--out", str(tmp_path / "out")])
        with pytest.raises(BadInput, match="--data: needed"):
            script.main()
    with pytest.raises(BadInput, match="--data: needed"):
        open_dataset(Pipeline(s2v))
    assert not (tmp_path / "out").exists()


def test_a_lora_is_put_where_the_variant_listens(s2v):
    """Without --targets: on the text's keys and values, and on those of the sound."""
    args = train_lora.arguments(["--ckpt", str(s2v), "--device", "cpu"])
    train_lora.check(args, Pipeline(s2v).settings, 4)
    assert tuple(args.targets) == TARGETS


# ---- S2V: what is learned ------------------------------------------------------------------------------------------
TARGETS = ("cross_attn.k", "cross_attn.v", "audio_injector.k", "audio_injector.v")


@pytest.mark.parametrize("continuation", [0, 1])
def test_gradients_of_a_lora_equal_the_plain_models(s2v, talk, tmp_path, continuation, report):
    """Through the plain version of test_s2v.py, with W + scale B A in place of each weight, and the error by hand."""
    *_, dataset = dataset_of(s2v, talk, tmp_path / "out", f"--continuation {continuation}")
    batch, model = first_batch(dataset), load_wan(s2v, dtype=torch.float32)
    text, lens = torch.randn(1, 9, tiny.TEXT_DIM), torch.tensor([9])
    weights = dict(model.state_dict())
    inject(model, TARGETS, rank=3, alpha=6)
    layers = lora_layers(model)
    assert len(layers) == 2 * 4 + 2 * 3
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    batch.loss(model, text, lens).backward()
    leaves = {n: (m.lora_A.detach().requires_grad_(), m.lora_B.detach().requires_grad_()) for n, m in layers.items()}
    weights |= {f"{n}.weight": weights[f"{n}.weight"] + 2 * b @ a for n, (a, b) in leaves.items()}
    v = plain(weights, batch.x, 1000 * batch.t, text, lens, **batch.inputs)
    ((v - batch.target) ** 2).mean().backward()
    for name, layer in layers.items():
        for got, want in zip((layer.lora_A, layer.lora_B), leaves[name]):
            report(name, tiny.error(got.grad, want.grad), 1e-4)


def test_training_lowers_the_loss_and_resumes_bit_for_bit(s2v, talk, tmp_path, monkeypatch):
    """On two clips, one of them held out; stopped after three of six steps, and with what was cached before."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for i in range(2):
        write_clip(folder / f"{i}.mkv", pictures(90, 0.1 * i), sound=tiny_s2v.sound(5.6), caption=f"a person talks {i}")
        write_clip(folder / f"{i}.pose.mkv", pictures(90, i), caption=None)
    flags = "--held_out 0.5 --eval_every 6 --save_every 3 --schedule constant --warmup 0 --t_distribution uniform"
    flags = [flags, f"--targets {','.join(TARGETS)} --lr 0.02"]
    whole = train(monkeypatch, "train_lora", s2v, folder, tmp_path / "whole", *flags, "--steps 6")
    assert whole[-1]["val_loss"] < 0.95 * whole[0]["val_loss"]
    train(monkeypatch, "train_lora", s2v, folder, tmp_path / "cut", *flags, "--steps 3")
    with monkeypatch.context() as patch:
        patch.setattr(cache, "read_items", None)  # all is cached
        train(patch, "train_lora", s2v, folder, tmp_path / "cut", *flags, "--steps 6 --resume")
    a, b = (load(tmp_path / name / "adapter_model.safetensors")[0] for name in ("whole", "cut"))
    assert len(a) == 2 * 14 and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert all(v.abs().max() > 0 for v in a.values())


@pytest.mark.parametrize("variant", ["s2v", "animate"])
def test_the_text_encoder_learns_through_it(s2v, talk, animate, acts, tmp_path, monkeypatch, variant):
    ckpt, folder = (s2v, talk) if variant == "s2v" else (animate, acts[True])
    flags = () if variant == "s2v" else animate_flags()
    log = train(monkeypatch, "train_te", ckpt, folder, tmp_path / "out", "--keywords person --lr 0.01", *flags)
    before = torch.load(ckpt / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True)
    after = load(tmp_path / "out" / "text_encoder.safetensors")[0]
    assert log[-1]["grad_norm"] > 0 and any(not torch.equal(after[k], before[k]) for k in before)


# ---- Animate: what is fed ------------------------------------------------------------------------------------------
C, W, H = 13, 48, 32  # frames of a sample, and its size


@pytest.fixture(scope="module")
def animate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("animate") / "ckpt"
    folder.mkdir()
    return tiny_animate.checkpoint(folder)


def write_character(folder, name="a", n=20, scene=False, seed=0):
    """A clip and its sidecars, at 30 frames per second."""
    folder.mkdir(exist_ok=True)
    for i, kind in enumerate(["", ".pose", ".face", *([".bg", ".mask"] if scene else [])]):
        h, w = (tiny_animate.SIDE, tiny_animate.SIDE) if kind == ".face" else (H, W)
        tiny_animate.write_video(folder / f"{name}{kind}.mp4", tiny_animate.frames(n, h, w, 5 * seed + i + 1), 30)
    (folder / f"{name}.txt").write_text("a person acts")
    return folder


@pytest.fixture(scope="module")
def acts(tmp_path_factory):
    """{whether somebody is replaced: a folder with one clip}."""
    root = tmp_path_factory.mktemp("acts")
    return {scene: write_character(root / f"{scene}", scene=scene) for scene in (False, True)}


def animate_flags(*flags):
    return f"--resolution {W}x{H} --frames {C}", *flags


def driven(models, tmp_path, picture, scene):
    """What sampling makes of the same files as preprocessing writes them, with this picture (H,W,3)."""
    for i, kind in enumerate(["pose", "face", *(["bg", "mask"] if scene else [])]):
        h, w = (tiny_animate.SIDE, tiny_animate.SIDE) if kind == "face" else (H, W)
        tiny_animate.write_video(tmp_path / f"src_{kind}.mp4", tiny_animate.frames(20, h, w, i + 2), 30)
    Image.fromarray(picture).save(tmp_path / "src_ref.png")
    s = models.settings.with_overrides(frames=C)
    return s.conditioning.video(models, s, src_root_path=tmp_path, replace_flag=scene)


@pytest.mark.parametrize("scene", [False, True])
@torch.no_grad()
def test_a_character_is_fed_what_sampling_feeds(animate, acts, tmp_path, scene, report):
    """With no, one and five known frames. The motion of the faces stands in the place of their pixels."""
    _, models, dataset = dataset_of(animate, acts[scene], tmp_path / "out", *animate_flags())
    frames, cached = tiny_animate.frames(20, H, W, 1)[:C], load(dataset.files[0])[0]
    vae = load_vae(animate)
    stills = [vae.encode(video([frame]))[0] for frame in frames]
    at = [i for i, z in enumerate(stills) if torch.equal(z, cached["latents"][:, :1])]
    assert len(at) == 1  # the reference is a frame of the clip
    sequence = driven(models, tmp_path, frames[at[0]], scene)
    model = load_wan(animate, dtype=torch.float32)
    for known in (0, 1, 5):
        sequence.known = video(frames[:known]) if known else None
        want = sequence.conditions(0)
        dataset.samples.draw = lambda item, share, rng, known=known: known
        batch = first_batch(dataset)
        assert torch.equal(batch.x[:, 16:], want.channels)
        assert batch.inputs.keys() == want.inputs.keys()
        assert all(torch.equal(batch.inputs[k], want.inputs[k]) for k in ("pose", "clip"))
        report("motion", tiny.error(batch.inputs["face"], model.encode_motion(want.inputs["face"])), 1e-5)
        check_noising(batch, torch.cat([stills[at[0]][None], vae.encode(video(frames))], 2))
        assert batch.loss_mask.flatten().tolist() == pytest.approx([0, *[5 / 4] * 4])


def test_any_frame_of_a_clip_may_be_its_reference(monkeypatch):
    """Which one the clip's file decides: over many files all of them are seen, of one always the same."""
    shown, clip, nothing = [], torch.arange(5.0).view(1, 1, 5, 1, 1).expand(1, 3, 5, 2, 2), torch.zeros(1)
    models = {
        "clip": SimpleNamespace(encode=lambda picture: shown.append(picture.mean().item()) or nothing),
        "motion": SimpleNamespace(encode_clip=lambda face: torch.zeros(1, face.shape[2], 2)),
        "vae": SimpleNamespace(encode=lambda video: video[:, :, :1]),
    }
    monkeypatch.setattr(inputs, "encode_scene", lambda *args: nothing)
    samples, black = CharacterSamples(SimpleNamespace(acquire=models.get)), [np.zeros((2, 2, 3), np.uint8)] * 5
    files = [SimpleNamespace(digest=hashlib.sha256(bytes([i])).hexdigest(), frames=5) for i in range(60)]
    for file in files * 2:
        samples.cached(models["vae"], clip, file, {"face": black, "pose": black})
    assert shown[:60] == shown[60:] and {*shown} == {0, 1, 2, 3, 4}


def test_the_references_error_does_not_count(animate, acts, tmp_path, report):
    """The loss is the mean over the other latent frames."""
    *_, dataset = dataset_of(animate, acts[False], tmp_path / "out", *animate_flags())
    batch, model = first_batch(dataset), load_wan(animate, dtype=torch.float32)
    text, lens = torch.randn(1, 9, tiny.TEXT_DIM), torch.tensor([9])
    with torch.no_grad():
        v = model(batch.x, 1000 * batch.t, text, lens, **batch.inputs)
        want = (v - batch.target)[:, :, 1:].square().mean().item()
        report("loss", abs(batch.loss(model, text, lens).item() / want - 1), 1e-5)


@torch.no_grad()
def test_without_a_caption_the_face_is_blank(animate, acts, tmp_path, report):
    _, models, dataset = dataset_of(animate, acts[False], tmp_path / "out", *animate_flags("--caption_dropout 1"))
    batch = first_batch(dataset)
    model = load_wan(animate, dtype=torch.float32)
    blank = -torch.ones(1, 3, C, tiny_animate.SIDE, tiny_animate.SIDE)
    assert batch.captions == [""]
    report("motion", tiny.error(batch.inputs["face"], model.encode_motion(blank)), 1e-5)


def test_the_share_of_known_frames(animate, acts, tmp_path):
    *_, dataset = dataset_of(animate, acts[False], tmp_path / "out", *animate_flags())
    (item,), rng = dataset.items, random.Random(1)
    drawn = [dataset.samples.draw(item, 0.5, rng) for _ in range(400)]
    assert 160 <= drawn.count(0) <= 240 and 60 <= drawn.count(1) <= 140 and 60 <= drawn.count(5) <= 140
    short = replace(item, frames=9)  # five of nine would be more than half
    assert {dataset.samples.draw(short, 1.0, rng) for _ in range(20)} == {1}


def test_characters_without_what_they_need_are_named(animate, tmp_path, capsys):
    folder = write_character(tmp_path / "clips", "good")
    for name, kind in (("lost", "pose"), ("blind", "face")):
        write_character(folder, name)
        (folder / f"{name}.{kind}.mp4").unlink()
    write_character(folder, "half", scene=True)
    (folder / "half.mask.mp4").unlink()
    write_character(folder, "oblong")
    tiny_animate.write_video(folder / "oblong.face.mp4", tiny_animate.frames(20, 16, 32, 1), 30)
    write_character(folder, "late")
    tiny_animate.write_video(folder / "late.pose.mp4", tiny_animate.frames(12, H, W, 1), 30)
    write_character(folder, "short", n=4)
    write_character(folder, "torn")
    (folder / "torn.face.mp4").write_bytes(b"no video")
    *_, dataset = dataset_of(animate, folder, tmp_path / "out", *animate_flags())
    assert [i.path.name for i in dataset.items] == ["good.mp4"]
    said = capsys.readouterr().out
    for reason in (
        "lost.mp4: has no lost.pose.mp4 beside it",
        "blind.mp4: has no blind.face.mp4 beside it",
        "half.mp4: has no half.mask.mp4 beside it",
        "oblong.mp4: its oblong.face.mp4 is 32x16 px, should have the shape of a square",
        "late.mp4: its late.pose.mp4 ends at 0.37 s, the clip at 0.63 s",
        "short.mp4: too short: 4 frames, 4 at 30 fps; at least 5 are needed",
        "torn.mp4: its torn.face.mp4 cannot be decoded",
        "1 files, 7 skipped",
    ):
        assert reason in said, said


def test_only_what_changed_of_a_character_is_encoded_again(animate, tmp_path):
    """Other poses, another CLIP, another motion encoder: other names in the cache; another DiT else: the same."""
    folder, ckpt = write_character(tmp_path / "clips"), tmp_path / "ckpt"
    shutil.copytree(animate, ckpt)

    def name():
        return uncached_dataset(ckpt, folder, tmp_path / "out", *animate_flags())[-1].files[0]

    names = [name(), name()]
    assert names[0] == names[1]
    model = tiny_animate.animate()
    model.blocks[0].cross_attn.k.weight.data += 1
    tiny_animate.write_dit(ckpt, model)
    assert name() == names[0]
    model.motion_encoder.enc.fc[0].bias.data += 1
    tiny_animate.write_dit(ckpt, model)
    names.append(name())
    torch.save(tiny_animate.clip_state(5), ckpt / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    names.append(name())
    tiny_animate.write_video(folder / "a.pose.mp4", tiny_animate.frames(20, H, W, 9), 30)
    names.append(name())
    assert len(set(names)) == 4


# ---- Animate: what is learned --------------------------------------------------------------------------------------
IMAGE_TARGETS = ("cross_attn.k", "cross_attn.v", "cross_attn.k_img", "cross_attn.v_img")


def test_gradients_of_a_characters_lora_equal_diffusers(animate, acts, tmp_path, report):
    """From the gradients G of diffusers' weights W + s B A by the chain rule: s B'G for A, s GA' for B."""
    *_, dataset = dataset_of(animate, acts[False], tmp_path / "out", *animate_flags())
    batch, model = first_batch(dataset), load_wan(animate, dtype=torch.float32)
    text, lens = torch.randn(1, 9, tiny.TEXT_DIM), torch.tensor([9])
    inject(model, IMAGE_TARGETS, rank=3, alpha=6)
    layers, merged = lora_layers(model), load_wan(animate, dtype=torch.float32)
    assert len(layers) == 4 * len(model.blocks)
    for name, layer in layers.items():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
        merged.get_submodule(name).weight.data += 2 * (layer.lora_B @ layer.lora_A).detach()
    batch.loss(model, text, lens).backward()

    peer = tiny_animate.diffusers_animate(merged).requires_grad_(True)
    face = video(tiny_animate.frames(20, tiny_animate.SIDE, tiny_animate.SIDE, 3)[:C])
    inputs = {"pose": batch.inputs["pose"], "face": face, "clip": batch.inputs["clip"]}
    v = peer_run(peer, batch.x, 1000 * batch.t, text, **inputs)
    (v - batch.target)[:, :, 1:].square().mean().backward()
    names = {"k": "to_k", "v": "to_v", "k_img": "add_k_proj", "v_img": "add_v_proj"}
    for name, layer in layers.items():
        _, block, _, leaf = name.split(".")
        g = peer.get_submodule(f"blocks.{block}.attn2.{names[leaf]}").weight.grad
        report(name, tiny.error(layer.lora_A.grad, 2 * layer.lora_B.detach().t() @ g), 1e-4)
        report(name, tiny.error(layer.lora_B.grad, 2 * g @ layer.lora_A.detach().t()), 1e-4)


def test_a_characters_training_lowers_the_loss_and_resumes_bit_for_bit(animate, tmp_path, monkeypatch):
    """On two clips, one of them held out; stopped after three of six steps, and with what was cached before."""
    folder = write_character(write_character(tmp_path / "clips"), "b", scene=True, seed=1)
    flags = "--held_out 0.5 --eval_every 6 --save_every 3 --schedule constant --warmup 0 --t_distribution uniform"
    flags = animate_flags(flags, f"--targets {','.join(IMAGE_TARGETS)} --lr 0.02")
    whole = train(monkeypatch, "train_lora", animate, folder, tmp_path / "whole", *flags, "--steps 6")
    assert whole[-1]["val_loss"] < 0.95 * whole[0]["val_loss"]
    train(monkeypatch, "train_lora", animate, folder, tmp_path / "cut", *flags, "--steps 3")
    with monkeypatch.context() as patch:
        patch.setattr(cache, "read_items", None)  # all is cached
        train(patch, "train_lora", animate, folder, tmp_path / "cut", *flags, "--steps 6 --resume")
    a, b = (load(tmp_path / name / "adapter_model.safetensors")[0] for name in ("whole", "cut"))
    assert len(a) == 2 * 40 and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert all(v.abs().max() > 0 for v in a.values())


# ---- plans ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant, frames, matrices", [("s2v-14B", 16, 6), ("animate-14B", 13, 4)])
def test_a_released_size_is_planned(variant, frames, matrices):
    """Without files: its weights as they lie on the device; S2V has an injector behind block 39."""
    size = f"--resolution 128x128 --frames {frames} --batch 1 --checkpointing --blocks 38-39"
    need = planned("train_lora", ["--ckpt", variant, *size.split()])
    with torch.device("meta"):
        named = new_dit(full_config(variant)).named_parameters()
        weights = sum(p.numel() * (4 if keep_fp32(n) else 2) for n, p in named)
    assert need.phases["training"]["DiT"] == weights and 32.6e9 < weights < 36e9
    assert need.phases["training"]["trained"] == 4 * 16 * 2 * 5120 * matrices


def test_a_continuation_is_planned_with_its_motion(s2v):
    """Its tokens in the DiT, and the 73 frames before it in the VAE."""
    flags = f"--ckpt {s2v} --resolution 64x64 --frames 16 --batch 2 --device cpu --continuation "
    plans = [planned("train_lora", (flags + share).split()) for share in "01"]
    for phase, part in (("training", "states and activations"), ("cache latents", "activations and video")):
        one, more = (need.phases[phase][part] for need in plans)
        assert one < more


@pytest.mark.parametrize("script", ["sample --size 128x128", "train_lora --resolution 128x128 --batch 1"])
def test_ranks_that_share_a_clip_are_planned(s2v, script):
    """Each of three has a third of the blocks' activations, and all of the inputs: much, beside so small a model."""
    name, *flags = f"{script} --ckpt {s2v} --device cpu".split()
    phase = "training" if name == "train_lora" else "denoise"
    one, three = (planned(name, [*flags, "--ulysses_size", n]).phases[phase] for n in "13")
    alone, shared = ([v for k, v in p.items() if "activations" in k][0] for p in (one, three))
    assert 0.33 * alone < shared < 0.75 * alone


# ---- previews ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", ["s2v", "animate"])
def test_previews_are_sampled_under_a_clips_own_conditions(s2v, talk, animate, acts, tmp_path, monkeypatch, variant):
    """Those of its first segment in training; without the prompt, those of a sample that has lost its caption."""
    ckpt, folder = (s2v, talk) if variant == "s2v" else (animate, acts[True])
    flags = () if variant == "s2v" else animate_flags()
    _, pipe, dataset = dataset_of(ckpt, folder, tmp_path / "out", "--continuation 0", *flags)
    video, batch = HeldOutVideo(dataset, 0), first_batch(dataset)
    conditions = video.conditions(0)
    assert conditions.inputs.keys() == batch.inputs.keys()
    assert all(torch.equal(v, batch.inputs[k]) for k, v in conditions.inputs.items())
    changed = {k for k, v in conditions.uncond_inputs.items() if not torch.equal(v, conditions.inputs[k])}
    assert changed == {"audio"} if variant == "s2v" else changed == {"face"}
    z_dim = pipe.settings.z_dim
    if variant == "animate":
        assert torch.equal(conditions.channels, batch.x[:, z_dim:])
    assert video.shape == batch.target.shape[1:]
    (tmp_path / "p.txt").write_text("a person sings\n")
    more = f"--previews {tmp_path}/p.txt --preview_steps 2 --steps 1"
    train(monkeypatch, "train_lora", ckpt, folder, tmp_path / "run", more, *flags)
    shown = list(read_frames(tmp_path / "run" / "previews" / "step_000000_00.mp4"))
    assert len(shown) in ((F + 1,) if variant == "s2v" else (C,))
