"""sample.py on tiny checkpoints against a plain loop of diffusers' and transformers' parts, fp32 on CPU."""

import gc
import itertools
import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import scripts
from helpers.adapters import save_lora
from helpers.scripts import NoPlan
from PIL import Image
from test_flow import peer as peer_solver
from test_wan import padded, per_token

import flow
import sample
from benchmarks import tiny
from diagnostics import reuse
from lora import inject
from nanowan import memory_estimate, pipeline
from nanowan.errors import BadInput
from nanowan.formats.dit import load_wan
from nanowan.formats.header import load as load_tensors
from nanowan.formats.lora import merge_file
from nanowan.formats.t5 import load_tokenizer
from nanowan.pipeline import Pipeline
from nanowan.prompts import Prompt, read_prompts
from nanowan.sampling import given_settings, requests_of
from nanowan.settings import NEGATIVE
from nanowan.step_cache import EasyCache
from nanowan.variants.image import best_size, image_channels
from nanowan.video import (
    cover,
    latent_to_rgb,
    open_image,
    preview_writer,
    to_tensor,
    to_uint8,
    write_frames,
    write_grid,
    write_mp4,
)
from sample import GuidedModel, arguments, encode_text, generate, load, open_video, sample_latents

SCRIPT = Path(__file__).parent.parent / "sample.py"


def image():
    y, x = np.mgrid[:90, :150]
    return Image.fromarray(np.stack([x * 1.7, y * 2.8, (x + y) % 256], -1).astype(np.uint8))


def reference(folder, kind, prompt, frames, size, steps, shift, guidance, solver, seed, picture=None):
    """The official pipelines written out with peers: models, solver and encoder are diffusers' and transformers'."""
    from vae import LATENT_STATS

    models = {"high": tiny.dit(kind, 10), "low": tiny.dit(kind, 11)} if kind != "ti2v" else {"high": tiny.dit(kind)}
    models = {k: tiny.diffusers_dit(m) for k, m in models.items()}
    vae = tiny.diffusers_vae(tiny.vae(kind == "ti2v"))
    stride = 16 if kind == "ti2v" else 8
    mean, std = (torch.tensor(s).view(1, -1, 1, 1, 1) for s in LATENT_STATS[48 if kind == "ti2v" else 16])
    tokenizer, encoder = load_tokenizer(folder), tiny.transformers_t5(tiny.text_encoder())

    def text(p):
        ids, lens = tokenizer([p])
        return padded(encoder(ids).last_hidden_state, lens.tolist())

    cond, null = text(prompt), text(NEGATIVE)
    z = y = None
    w, h = size
    if kind == "ti2v" and picture:
        w, h = 96, 64
        scale = max(w / picture.width, h / picture.height)
        p = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.LANCZOS)
        a, b = (p.width - w) // 2, (p.height - h) // 2
        pixels = torch.from_numpy(np.array(p.crop((a, b, a + w, b + h)))).permute(2, 0, 1).float() / 255 * 2 - 1
        z = (vae.encode(pixels[None, :, None]).latent_dist.mode() - mean) / std
    elif kind == "i2v":
        ratio, area = picture.height / picture.width, w * h
        h = round(np.sqrt(area * ratio) // 8 // 2 * 2) * 8
        w = round(np.sqrt(area / ratio) // 8 // 2 * 2) * 8
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255 * 2 - 1
        video = torch.zeros(1, 3, frames, h, w)
        video[:, :, 0] = F.interpolate(pixels[None], size=(h, w), mode="bicubic")[0]
        mask = torch.zeros(1, 4, 1 + frames // 4, h // 8, w // 8)
        mask[:, :, 0] = 1
        y = torch.cat([mask, (vae.encode(video).latent_dist.mode() - mean) / std], 1)
    shape = (48 if kind == "ti2v" else 16, 1 + frames // 4, h // stride, w // stride)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))[None]
    if z is not None:
        x[:, :, :1] = z
    s = peer_solver(solver, steps, shift)
    boundary = {"ti2v": 0, "t2v": 875, "i2v": 900}[kind]
    for t in s.timesteps:
        high = t >= boundary
        model, g = models["high" if high else "low"], guidance[1 if high else 0]
        time = t.float()[None]
        if z is not None:
            rows = torch.full((1, shape[1]), float(t))
            rows[:, 0] = 0
            time = per_token(rows, (shape[1], shape[2] // 2, shape[3] // 2))
        inputs = x if y is None else torch.cat([x, y], 1)
        c, u = (model(inputs, time, e, return_dict=False)[0] for e in (cond, null))
        x = s.step(u + g * (c - u), t, x, return_dict=False)[0]
        if z is not None:
            x[:, :, :1] = z
    return x[0], vae.decode(x * std + mean).sample[0].clamp(-1, 1)


@torch.no_grad()
@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
@pytest.mark.parametrize("kind, picture", [("ti2v", False), ("ti2v", True), ("t2v", False), ("i2v", True)])
def test_equals_a_plain_loop_of_peers(checkpoints, kind, picture, solver, report):
    folder, picture = checkpoints[kind], image() if picture else None
    shift, guidance = {"ti2v": (5, (5.0, 5.0)), "t2v": (12, (3.0, 4.0)), "i2v": (5, (3.5, 3.5))}[kind]
    size = (96, 64) if kind == "ti2v" else (64, 48)
    want, want_video = reference(folder, kind, "a naïve cat runs", 9, size, 6, shift, guidance, solver, 7, picture)
    pipe = load(folder)
    video, latents = generate(
        pipe, "a naïve cat runs", image=picture, size=size, frames=9, steps=6, solver=solver, seed=7, progress=False
    )
    report("latents", tiny.error(latents, want), 2e-5)
    report("video", (video - want_video).abs().max().item(), 1e-4)
    again = generate(
        pipe, "a naïve cat runs", image=picture, size=size, frames=9, steps=6, solver=solver, seed=7, progress=False
    )[1]
    other = generate(
        pipe, "a naïve cat runs", image=picture, size=size, frames=9, steps=6, solver=solver, seed=8, progress=False
    )[1]
    assert torch.equal(latents, again) and not torch.equal(latents, other)


def test_command_line_end_to_end(checkpoints, tmp_path):
    """mp4 with its settings inside, latents, contact sheet, many prompts in one load."""
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog runs\n")
    run = scripts.run(
        SCRIPT,
        "--ckpt",
        checkpoints["ti2v"],
        "--prompts",
        tmp_path / "prompts.txt",
        "--size",
        "64x32",
        "--frames",
        "5",
        "--steps",
        "2",
        "--guidance",
        "3",
        "--seed",
        "5",
        "--device",
        "cpu",
        "--dtype",
        "fp32",
        "--out",
        tmp_path / "v.mp4",
        "--reuse",
        "0.01",
        "--save_latents",
        tmp_path / "z.safetensors",
        "--grid",
        tmp_path / "g.png",
    )
    assert run.returncode == 0, run.stderr
    import av

    with av.open(str(tmp_path / "v_001.mp4")) as f:
        stream = f.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in f.decode(stream)]
        assert (
            stream.codec_context.name == "h264"
            and stream.codec_context.pix_fmt == "yuv420p"
            and stream.average_rate == 24
        )
        assert (len(frames), frames[0].shape) == (5, (32, 64, 3))
        told = json.loads(f.metadata["comment"])
    assert (told["prompt"], told["seed"], told["steps"], told["guidance"], told["reuse"]) == (
        "a dog runs",
        5,
        2,
        [3.0, 3.0],
        0.01,
    )
    z = load_tensors(tmp_path / "z_001.safetensors")[0]["latents"]
    _, latents = generate(
        load(checkpoints["ti2v"]), "a dog runs", size=(64, 32), frames=5, steps=2, guidance=3.0, seed=5, progress=False
    )
    assert z.dtype == torch.float32 and z.shape == (48, 2, 2, 4)
    assert torch.equal(z, latents)
    assert Image.open(tmp_path / "g.png").size[1] > 2 * 32 and "base_dtype" not in told


def test_a_clip_written_again_is_the_same_file(tmp_path):
    """What is trained on, cached and held out goes by these bytes."""
    import random

    from nano.world import draw, sample_attributes

    rng = random.Random(0)
    for _ in range(60):
        video = draw([sample_attributes(rng)], rng.random())[0]
        for name in "ab":
            write_mp4(tmp_path / f"{name}.mp4", video, 8)
        assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_mp4_holds_the_pixels(tmp_path):
    """Crf 10 keeps smooth pictures, and textures of every other pixel, within a grey level or two; single clips and
    those of several segments.
    """
    import av

    from nanowan.video import to_uint8

    ramp = torch.linspace(-0.8, 0.8, 64)
    smooth = (ramp[:, None] + ramp[None])[None, None].expand(3, 5, 64, 64) / 2
    texture = F.interpolate(torch.rand(1, 1, 5, 32, 32), scale_factor=(1, 2, 2), mode="trilinear")[0] * 1.6 - 0.8
    writers = write_mp4, lambda path, video, fps: write_frames(path, [to_uint8(video)], fps)
    for video, write in itertools.product((smooth, texture.expand(3, -1, -1, -1)), writers):
        write(tmp_path / "v.mp4", video, 16)
        with av.open(str(tmp_path / "v.mp4")) as f:
            back = np.stack([frame.to_ndarray(format="rgb24") for frame in f.decode(video=0)])
        assert np.abs(back.astype(int) - to_uint8(video)).mean() < 2
    assert not list(tmp_path.glob(".tmp*"))


@pytest.mark.parametrize(
    "size, frames, message",
    [
        ((100, 64), 9, "nearest 96x64"),
        ((120, 79), 9, "nearest 128x64"),
        ((96, 64), 6, "nearest 5"),
        ((96, 64), 8, "nearest 9"),
        ((96, 64), 0, "nearest 1"),
        ((0, 64), 9, "nearest 32x64"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_nearest_that_does(checkpoints, size, frames, message):
    with pytest.raises(BadInput, match=message):
        generate(load(checkpoints["ti2v"]), "a", size=size, frames=frames, steps=1)


def test_image_needed_or_not_taken(checkpoints):
    with pytest.raises(BadInput, match="--image is needed"):
        generate(load(checkpoints["i2v"]), "a", size=(64, 48), frames=5, steps=1)
    with pytest.raises(BadInput, match="takes none"):
        generate(load(checkpoints["t2v"]), "a", image=image(), size=(64, 48), frames=5, steps=1)


def test_another_picture_is_encoded_anew(checkpoints):
    """Also one in the place of the last one; the estimates on the way begin with it."""
    pipe, picture = load(checkpoints["ti2v"]), image()
    given = dict(image=picture, size=(96, 64), steps=1, guidance=1.0, progress=False)

    def first():
        return generate(pipe, "a", frames=1, **given)[1]

    before = first()
    assert torch.equal(before, first())
    picture.paste((255, 0, 0), (0, 0, picture.width, picture.height))
    assert not torch.equal(before, after := first())
    seen = []
    sample_latents(
        pipe,
        ["a"],
        [0],
        image=picture,
        size=(96, 64),
        frames=5,
        steps=2,
        guidance=1.0,
        progress=False,
        on_step=lambda step, x0: seen.append(x0[0]),
    )
    assert len(seen) == 2 and all(torch.equal(x0[:, :1], after[:, :1]) for x0 in seen)


def test_conditions_are_of_the_frames_and_size_asked(checkpoints):
    """Not those that were encoded last for another clip with the same picture."""
    pipe, shapes = load(checkpoints["i2v"]), []
    for size, frames in (((64, 48), 5), ((64, 48), 9), ((32, 48), 9)):
        video = open_video(pipe, pipe.settings.with_overrides(size=size, frames=frames), image=image())
        shapes.append(tuple(video.conditions(0).channels.shape))
    # the picture's aspect is 5:3, so that the areas become 64x32 and 48x16 px
    assert shapes == [(1, 20, 2, 4, 8), (1, 20, 3, 4, 8), (1, 20, 3, 2, 6)]


def test_a_photo_is_upright(tmp_path):
    turned = Image.new("RGB", (40, 20), "red")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (20, 40)


@torch.no_grad()
def test_first_and_last_images_of_ti2v_are_clean_from_the_first_step_to_the_last(checkpoints):
    """The first latent frame is that of the first image, the last one that of a clip which stands still on the last
    image. At every step both are given as they are, at time 0, and the frames between are not.
    """
    pipe, first, last = load(checkpoints["ti2v"]), image(), image().transpose(Image.Transpose.ROTATE_180)
    how = dict(size=(96, 64), frames=13, steps=3, guidance=1.0)
    video = open_video(pipe, pipe.settings.with_overrides(**how), image=first, last_image=last)
    known = video.conditions(0).known
    still = to_tensor(cover(last, *video.size))[None, :, None]
    vae = pipe.acquire("vae")
    assert torch.equal(known[0], vae.encode(to_tensor(cover(first, *video.size))[None, :, None]))
    assert torch.equal(known[-1], vae.encode(still.expand(-1, -1, 5, -1, -1))[:, :, -1:])
    seen, dit = [], pipe.acquire("dit")
    dit.register_forward_pre_hook(lambda module, given: seen.append((given[0].clone(), given[1].clone())))
    latents = generate(pipe, "a", image=first, last_image=last, progress=False, **how)[1]
    for x, t in [*seen, (latents[None], None)]:
        assert torch.equal(x[:, :, :1], known[0]) and torch.equal(x[:, :, -1:], known[-1])
        assert t is None or (t[0, [0, -1]] == 0).all() and (t[0, 1:-1] > 0).all()
    assert len(seen) >= 3 and latents.shape[1] == 4
    with pytest.raises(BadInput, match="--frames 1: with --last_image at least 5"):
        generate(pipe, "a", image=first, last_image=last, progress=False, **how | {"frames": 1})


@torch.no_grad()
def test_first_and_last_images_of_i2v_stand_where_the_official_mask_says():
    """A one for each known frame, the first frame four times, in fours; what is encoded is grey between them."""
    vae, frames, (first, last) = tiny.vae(False), 9, torch.rand(2, 1, 3, 1, 16, 24) * 2 - 1
    known = torch.tensor([1.0, *[0] * (frames - 2), 1])
    mask = torch.cat([known[:1].repeat(3), known]).view(-1, 4).t()
    video = torch.cat([first, torch.zeros(1, 3, frames - 2, 16, 24), last], 2)
    channels = image_channels(vae, first, frames, last)
    assert torch.equal(channels[0, :4], mask[:, :, None, None].expand(-1, -1, 2, 3))
    assert torch.equal(channels[:, 4:], vae.encode(video))


@pytest.mark.parametrize(
    "w, h, want",
    [
        (1280, 704, (1280, 704)),
        (1280, 720, (1248, 704)),
        (720, 1280, (704, 1248)),
        (1000, 1000, (960, 928)),
        (3000, 1000, (1632, 544)),
    ],
)
def test_size_from_an_images_aspect(w, h, want):
    ow, oh = best_size(w, h, 704 * 1280, 32)
    assert ow % 32 == oh % 32 == 0 and ow * oh <= 704 * 1280
    assert (ow, oh) == want


def test_guidance_one_needs_no_negative_prompt(checkpoints, monkeypatch, report):
    pipe = load(checkpoints["ti2v"])
    seen = []
    encode = pipe.encode_prompts
    monkeypatch.setattr(pipe, "encode_prompts", lambda p, e=None: seen.extend(p) or encode(p, e))
    one = generate(pipe, "a cat", size=(32, 32), frames=1, steps=2, guidance=1.0, progress=False)[1]
    assert seen == ["a cat"]
    near = generate(pipe, "a cat", size=(32, 32), frames=1, steps=2, guidance=1.0 + 1e-7, progress=False)[1]
    report("against the guided formula", tiny.error(one, near), 1e-5)


def test_what_is_not_read_of_a_long_prompt_is_said(checkpoints, capsys):
    pipe = load(checkpoints["ti2v"])
    long = "a dog " * 600
    embeddings, _ = pipe.encode_prompts([long, "a cat"])
    count = len(pipe.acquire("text").tokenizer.ids(long.strip())) + 1
    said = f"prompt 'a dog a dog a dog a dog a dog a dog a do'...: {count} tokens, of which the first 511 are read"
    assert count > 1200 and embeddings.shape[1] == 512 and capsys.readouterr().out.splitlines() == [said]


def test_a_clip_does_not_depend_on_its_batch(checkpoints, report):
    from sample import sample_latents

    pipe = load(checkpoints["t2v"])
    both = sample_latents(
        pipe, ["a cat", "a quick brown fox jumps"], [3, 4], size=(32, 32), frames=5, steps=3, progress=False
    )
    alone = sample_latents(pipe, ["a quick brown fox jumps"], [4], size=(32, 32), frames=5, steps=3, progress=False)
    report("relative error", tiny.error(both[1:], alone), 2e-5)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--size", "64by32"], "WIDTHxHEIGHT"),
        (["--shift", "0"], "--shift 0"),
        (["--guidance", "nan"], "finite"),
        (["--device", "mps"], "--device mps"),
        (["--seed", "99999999999999999999"], "--seed"),
        (["--out", "/"], "--out /"),
        (["--out", "clip.gif"], ".mp4"),
        (["--out", f"{__file__}/clip.mp4"], "folder is not writable"),
        (["--size", ""], "WIDTHxHEIGHT"),
        (["--steps", "0"], "--steps 0"),
        (["--guidance", "high"], "LOW,HIGH"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--ckpt", "nowhere"], "nowhere"),
        (["--lora", "nowhere.safetensors:0.5"], "nowhere.safetensors"),
        (["--image", "nowhere.png"], "nowhere.png"),
    ],
)
def test_bad_flags_are_one_clear_line(flags, message, checkpoints):
    how = "--size 32x32 --frames 1 --steps 1 --device cpu".split()
    run = scripts.run(SCRIPT, "--ckpt", checkpoints["ti2v"], *how, *flags)
    assert run.returncode == 1 and run.stderr.strip().splitlines()[-1].startswith("error: ") and message in run.stderr
    assert "Traceback" not in run.stderr


def small(pipe, **kwargs):
    return generate(pipe, "a cat runs", size=(32, 32), frames=5, steps=4, progress=False, **kwargs)[1]


@pytest.mark.parametrize("kind", ["ti2v", "t2v"])
def test_short_memory_changes_nothing_but_what_is_held(checkpoints, monkeypatch, kind):
    """With no room to spare, one part at a time is in memory: when one is loaded, no other is alive."""
    plenty = small(load(checkpoints[kind]))  # both halves of guidance in one batch, which rounds a little differently
    held, alive = [], weakref.WeakValueDictionary()
    monkeypatch.setattr(pipeline, "free_memory", lambda device: 0)
    real = pipeline.Pipeline._load

    def watched(self, name, need):
        gc.collect()
        held.append((name, sorted(alive)))
        part = real(self, name, need)
        alive[name] = part.model
        return part

    monkeypatch.setattr(pipeline.Pipeline, "_load", watched)
    pipe = load(checkpoints[kind])
    assert tiny.error(small(pipe), plenty) < 2e-6
    assert held == [
        (name, []) for name in (["text", "dit", "vae"] if kind == "ti2v" else ["text", "high", "low", "vae"])
    ]
    assert list(pipe.placements) == ["vae"]


def test_an_updated_text_encoder(checkpoints, tmp_path):
    file = tmp_path / "text_encoder.safetensors"
    from safetensors.torch import save_file

    save_file(tiny.text_encoder().state_dict(), file)
    plain = small(load(checkpoints["ti2v"]))
    assert torch.equal(small(load(checkpoints["ti2v"], text_encoder=file)), plain)
    save_file(tiny.text_encoder(seed=77).state_dict(), file)
    assert not torch.equal(small(load(checkpoints["ti2v"], text_encoder=file)), plain)


def test_several_weighted_loras_each_for_its_expert(checkpoints, tmp_path):
    """Merged LoRAs change exactly the expert they are for: by the file's metadata, or by :high and :low."""
    for name, seed in (("a", 1), ("b", 2)):
        model = tiny.dit("t2v")
        torch.manual_seed(seed)
        for p in inject(model, rank=2)[1::2]:
            p.data.normal_(0, 0.2)
        save_lora(tmp_path / f"{name}.safetensors", model, **({"expert": "low"} if name == "a" else {}))
    a, b = (str(tmp_path / f"{n}.safetensors") for n in "ab")
    pipe = load(checkpoints["t2v"], lora=[f"{a}:0.5", f"{b}:-1.5:high", f"{b}:both"])
    for expert, applied in (("high", [(b, -1.5), (b, 1.0)]), ("low", [(a, 0.5), (b, 1.0)])):
        want = load_wan(checkpoints["t2v"] / f"{expert}_noise_model", dtype=torch.float32)
        for file, weight in applied:
            merge_file(want, file, weight)
        got = pipe.acquire(expert)
        assert all(torch.equal(p, q) for p, q in zip(got.parameters(), want.parameters()))
    with pytest.raises(BadInput, match="single model"):
        load(checkpoints["ti2v"], lora=[a])
    with pytest.raises(BadInput, match="nowhere"):  # at once, not when that expert comes
        load(checkpoints["t2v"], lora=["nowhere.safetensors:low"])
    save_lora(tmp_path / "wide.safetensors", (wide := tiny.dit("t2v", dim=96), inject(wide, rank=2))[0])
    for spec in ("wide.safetensors:both", "wide.safetensors:low"):
        with pytest.raises(BadInput, match="does not fit"):
            load(checkpoints["t2v"], lora=[str(tmp_path / spec)])


def test_what_is_trained_stays_where_its_optimizer_is(checkpoints):
    """While its expert makes room for the other one."""
    pipe = Pipeline(checkpoints["t2v"])
    pipe.adapter = pipeline.Adapter(("high", "low"), ("cross_attn.k",), 2, 2.0, 0.0, (0, 1), seed=0)
    model = pipe.acquire("high")
    before = {p: p.data_ptr() for p in model.parameters()}

    pipe.placements["high"].to("cuda")  # away from where it runs, which is this CPU
    assert all((p.data_ptr() == at) == p.requires_grad for p, at in before.items()) and any(
        p.requires_grad for p in before
    )


def test_bytes_of_a_part_are_those_that_it_takes(checkpoints, tmp_path):
    """Whatever its files' prefixes are, with blocks on the host and in 8 bits."""
    from safetensors.torch import save_file

    for file in checkpoints["ti2v"].iterdir():
        if "diffusion_pytorch_model" not in file.name:
            (tmp_path / file.name).symlink_to(file)
    dit = load_wan(checkpoints["ti2v"], dtype=torch.float32)
    save_file({f"model.diffusion_model.{k}": v for k, v in dit.state_dict().items()}, tmp_path / "one.safetensors")

    def size(module):
        return sum(p.nbytes for p in module.parameters())

    block, eight = size(dit.blocks) // len(dit.blocks), load_wan(checkpoints["ti2v"], dtype=torch.float32, fp8=True)
    sixteen = load_wan(checkpoints["ti2v"], dtype=torch.bfloat16)
    for folder in (tmp_path, checkpoints["ti2v"]):
        assert load(folder)._bytes("dit") == size(dit)
        assert load(folder, stream_blocks=3)._bytes("dit") == size(dit) - block  # two of three are there at a time
        assert load(folder, fp8=True)._bytes("dit") == size(eight)
        assert load(folder, dtype=torch.bfloat16)._bytes("dit") == size(sixteen)


def test_reuse_off_is_exact_and_on_saves_steps(checkpoints):
    """A threshold of nothing changes no bit; a large one skips steps at a bounded error; the first two steps and the
    last are always computed.
    """
    pipe = load(checkpoints["ti2v"])
    given = dict(size=(64, 32), frames=5, steps=8, guidance=2.0, progress=False)

    def run(threshold, callback=None):
        cache = EasyCache(threshold)
        return cache, sample_latents(pipe, ["a cat"], [3], cache=cache, on_step=callback, **given)

    plain = sample_latents(pipe, ["a cat"], [3], size=(64, 32), frames=5, steps=8, guidance=2.0, progress=False)
    off, exact = run(0.0)
    assert torch.equal(exact, plain) and off.computed == 8
    on, rough = run(0.99)
    assert 3 <= on.computed < 8 and 0 < tiny.error(rough, plain) < 1
    seen = []
    run(0.0, lambda i, x0: seen.append((i, x0)))
    assert [i for i, _ in seen] == list(range(8))
    assert tiny.error(seen[-1][1], plain) < 0.2, "the last estimate is nearly the result"


def test_what_reuse_costs_is_measured_in_dB_of_the_whole_range(monkeypatch):
    """Pixels that are off by a tenth of it: 20 dB, as a mean over the prompts' squares; latents off by a half."""
    off = iter([0.2 * 2**0.5, 0.0])
    monkeypatch.setattr(reuse, "sample_latents", lambda *a, **k: torch.full((1, 4), 1.5))
    monkeypatch.setattr(reuse, "decode", lambda pipe, z: torch.full((1, 3, 1, 8, 8), next(off)))
    exact = [(torch.ones(1, 4), torch.zeros(1, 3, 1, 8, 8))] * 2
    found = reuse.reuse(SimpleNamespace(settings=SimpleNamespace(steps=9)), ["a", "b"], 0.1, exact)
    assert found["psnr"] == pytest.approx(20, abs=1e-4) and found["latent_error"] == pytest.approx(0.5)
    assert (found["threshold"], found["steps"], found["computed"]) == (0.1, 9, 0)


def test_the_step_cache_adds_up_what_is_expected_to_have_changed():
    """By hand: after velocities 10 at x = 0 and 12 at x = 4 the rate is 1/2, so each move by 6 is expected to change
    the velocity by 3, a quarter of 12. Served is the offset v - x of the last one computed.
    """

    def at(value):
        return torch.tensor([float(value)])

    cache = EasyCache(0.59)
    for x, v in ((0, 10), (4, 12)):
        assert cache.predict(at(x)) is None
        cache.update(at(x), at(v))
    assert cache.predict(at(10)).item() == 18  # a quarter
    assert cache.predict(at(16)).item() == 24  # a half
    assert cache.predict(at(22)) is None  # three quarters
    cache.update(at(22), at(30))  # from where it was computed before: (30 - 12) / (22 - 4) = 1
    assert cache.predict(at(31)).item() == 39  # .3
    assert cache.predict(at(40)) is None  # .6
    assert cache.computed == 3


@pytest.mark.parametrize("name", flow.SOLVERS)
def test_each_step_shows_the_clip_that_its_velocity_leads_to(checkpoints, monkeypatch, name):
    """Of velocities that all lead to one clip each estimate is that clip."""
    pipe, clean = load(checkpoints["t2v"]), torch.rand(1, 16, 1, 4, 4)
    like = flow.solver(name, 4, pipe.settings.shift)
    sigmas, shown = iter(like.sigmas), []
    monkeypatch.setattr(GuidedModel, "velocity", lambda self, x, t, scale: (x - clean) / next(sigmas))
    given = dict(size=(32, 32), frames=1, steps=4, guidance=1.0, solver=name, progress=False)
    sample_latents(pipe, ["a cat"], [0], on_step=lambda i, x0: shown.append((i, x0.clone())), **given)
    assert [i for i, _ in shown] == list(range(len(like.timesteps)))
    assert all(tiny.error(x0, clean) < 1e-5 for _, x0 in shown)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_latents_that_are_no_numbers_are_refused(checkpoints, monkeypatch, wrong):
    """Instead of a black video."""
    pipe = load(checkpoints["t2v"])
    monkeypatch.setattr(GuidedModel, "velocity", lambda self, x, t, scale: torch.where(x > 2, wrong, 0.0))
    with pytest.raises(BadInput, match="t2v: the latents are not finite"):
        sample_latents(pipe, ["a cat"], [0], size=(32, 32), frames=1, steps=2, solver="euler", progress=False)


class Stubborn(EasyCache):
    """Serves the last velocity for ever, until it is told to forget."""

    def predict(self, x):
        return self.v


def test_the_model_is_asked_for_the_first_step_of_each_expert_and_the_last_of_all(checkpoints, monkeypatch):
    """Whatever the step cache would serve."""
    asked, real = [], GuidedModel.velocity

    def velocity(self, x, t, scale):
        asked.append(t)
        return real(self, x, t, scale)

    monkeypatch.setattr(GuidedModel, "velocity", velocity)
    pipe, given = load(checkpoints["t2v"]), dict(size=(32, 32), frames=1, steps=8, guidance=1.0, progress=False)
    sample_latents(pipe, ["a cat"], [0], cache=Stubborn(0.5), **given)
    timesteps = flow.solver("unipc", 8, pipe.settings.shift).timesteps.tolist()
    assert asked == [timesteps[0], next(t for t in timesteps if t < 875), timesteps[-1]]


def test_pixels_are_rounded_to_the_nearest():
    values = torch.tensor([-7.0, -1.0, -0.99, -0.988, 0.01, 0.5, 0.996, 1.0, 7.0])
    pixels = to_uint8(values.view(1, 1, 1, -1).expand(3, 1, 1, -1))
    assert pixels.shape == (1, 1, 9, 3) and pixels[0, 0, :, 2].tolist() == [0, 0, 1, 2, 129, 191, 254, 255, 255]


def test_guidance_in_one_batch_and_in_two(checkpoints, monkeypatch, report):
    """Both halves in one forward pass, or, where memory is short, in two."""
    pipe, found, sizes = load(checkpoints["ti2v"]), [], []
    given = dict(size=(64, 32), frames=5, steps=3, guidance=4.0, progress=False)
    text = encode_text(pipe, pipe.settings.with_overrides(guidance=4.0), ["a cat"])
    pipe.acquire("dit").register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
    for memory in (1 << 50, 0):
        monkeypatch.setattr(pipeline, "free_memory", lambda device, memory=memory: memory)
        found.append(sample_latents(pipe, text, [1], **given))
    assert sizes == [2] * 3 + [1] * 6
    report("latents", tiny.error(*found), 2e-6)


def test_compiled_blocks_give_the_same(checkpoints, report, monkeypatch):
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)  # as "default", Inductor's C++ does not compile
    pipe = load(checkpoints["ti2v"])
    compiled = pipeline.Pipeline(checkpoints["ti2v"], pipeline.Runtime(compile="blocks"))
    assert all(b._compiled_call_impl is not None for b in compiled.acquire("dit").blocks)
    given = dict(size=(64, 32), frames=5, steps=2, guidance=2.0, progress=False)
    report(
        "latents",
        tiny.error(sample_latents(compiled, ["a cat"], [1], **given), sample_latents(pipe, ["a cat"], [1], **given)),
        2e-5,
    )


def test_preview_shows_what_the_clip_will_be(tmp_path):
    """On nano: the linear colours of the finished latents are near the decoded clip's, and the last
    preview is on disk.
    """
    pipe = load("nano")
    colors = latent_to_rgb(pipe.acquire("vae"))
    z = sample_latents(
        pipe,
        ["a red square moves left"],
        [0],
        progress=False,
        on_step=preview_writer(colors, tmp_path / "p.png", 4, "a red square"),
    )
    rough = torch.einsum("cthw,cd->dthw", torch.cat([z[0], torch.ones_like(z[0, :1])]), colors)
    video = pipe.acquire("vae").decode(z)[0]
    want = F.avg_pool2d(video[:, ::4].transpose(0, 1), 16).transpose(0, 1)
    assert (rough - want).square().mean().sqrt() < 0.3 and torch.corrcoef(
        torch.stack([rough.flatten(), want.flatten()])
    )[0, 1] > 0.5
    assert Image.open(tmp_path / "p.png").width > 100


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--cuda_graphs"], "--cuda_graphs"),
        (["--compile", "--cuda_graphs"], "--cuda_graphs"),
        (["--reuse", "1.5"], "--reuse 1.5"),
        (["--preview_every", "-1"], "--preview_every -1"),
    ],
)
def test_wrong_speed_flags_are_named(flags, said):
    run = scripts.run(SCRIPT, "--device", "cpu", *flags)
    assert (
        run.returncode == 1
        and run.stderr.startswith("error: ")
        and said in run.stderr
        and len(run.stderr.splitlines()) == 1
    )


# ---- what its flags promise ------------------------------------------------------------------------------------------
def test_every_flag_of_the_settings_reaches_them():
    flags = "--size 64x32 --frames 5 --steps 3 --shift 7 --guidance 2,3 --solver euler"
    given = given_settings(arguments([*flags.split(), "--negative", "blurred"]))
    wanted = dict(size=(64, 32), frames=5, steps=3, shift=7.0, guidance=(2.0, 3.0), solver="euler", negative="blurred")
    assert given == wanted and set(given_settings(arguments([])).values()) == {None}
    assert given_settings(arguments(["--negative", ""]))["negative"] == ""  # an empty one is one too


def run_script(monkeypatch, words, *more):
    monkeypatch.setattr("sys.argv", ["sample.py", *words.split(), *more])
    sample.main()


def note_denoise(monkeypatch, note):
    """Call note(pipe, clip, expert) before each call of denoise."""
    real = sample.denoise

    def denoise(pipe, settings, clip, expert):
        note(pipe, clip, expert)
        real(pipe, settings, clip, expert)

    monkeypatch.setattr(sample, "denoise", denoise)


def test_what_a_run_asks_of_models_and_decoder(checkpoints, tmp_path, monkeypatch):
    """Weights in 8 bits, blocks on the host, tiles, an encoder of another file; one seed for all prompts."""
    made, tiles, noises, videos = [], [], [], [torch.zeros(3, 1, 32, 32)]

    def keep_models(ckpt, runtime, loras, text_encoder=None):
        made.append((runtime, text_encoder))
        return Pipeline(ckpt, runtime, loras, None)

    monkeypatch.setattr(sample, "Pipeline", keep_models)
    monkeypatch.setattr(sample, "decode", lambda pipe, z, tile=0: tiles.append(tile) or videos)
    monkeypatch.setattr(sample, "tile_report", lambda *_: "")
    note_denoise(monkeypatch, lambda pipe, clip, expert: noises.append(clip.x.clone()))
    monkeypatch.setattr(memory_estimate, "sampling", lambda *_, **__: NoPlan())
    (tmp_path / "p.txt").write_text("a cat\na dog\n", encoding="utf-8-sig")
    words = f"--ckpt {checkpoints['ti2v']} --prompts {tmp_path}/p.txt --out {tmp_path}/v.mp4 --device cpu --seed 3"
    words += " --size 32x32 --frames 1 --steps 1 --guidance 1 --base_dtype fp8 --stream_blocks 1 --vae_tile 4"
    run_script(monkeypatch, words, "--text_encoder", "other.safetensors")
    ((runtime, encoder),) = made
    assert runtime.fp8 and runtime.stream_blocks == 1 and encoder == ["other.safetensors"]
    assert tiles == [4, 4] and (tmp_path / "v_000.mp4").exists()
    noise = torch.randn(1, 48, 1, 2, 2, generator=torch.Generator().manual_seed(3))
    assert len(noises) == 2 and all(torch.equal(x, noise) for x in noises)


def test_one_expert_serves_all_prompts_before_the_other_comes(checkpoints, tmp_path, monkeypatch):
    """An A14B's experts are loaded once each, and every clip is the one that its prompt gives alone."""
    loaded, served, real = [], [], Pipeline._load
    monkeypatch.setattr(Pipeline, "_load", lambda self, name, need: loaded.append(name) or real(self, name, need))
    note_denoise(monkeypatch, lambda pipe, clip, expert: served.append(expert))
    (tmp_path / "p.txt").write_text("a\nb\na\n")
    words = f"--ckpt {checkpoints['t2v']} --prompts {tmp_path}/p.txt --out {tmp_path}/v.mp4 --device cpu --seed 3"
    words += f" --size 32x32 --frames 1 --steps 4 --save_latents {tmp_path}/z.safetensors"
    run_script(monkeypatch, words)
    assert served == ["high"] * 3 + ["low"] * 3 and sorted(loaded) == ["high", "low", "text", "vae"]
    pipe = load(checkpoints["t2v"])
    for i, prompt in enumerate("aba"):
        alone = generate(pipe, prompt, size=(32, 32), frames=1, steps=4, seed=3, progress=False)[1]
        assert torch.equal(load_tensors(tmp_path / f"z_{i:03d}.safetensors")[0]["latents"], alone)


def test_a_stopped_list_of_prompts_goes_on_where_it_was(checkpoints, tmp_path, monkeypatch):
    """Each video is written as it is done; --resume makes those that are missing, to the bit, and leaves the others."""
    (tmp_path / "p.txt").write_text("a\nb\nc\nd\ne\n")
    served = []

    def words(folder):
        how = f"--ckpt {checkpoints['ti2v']} --prompts {tmp_path}/p.txt --out {tmp_path}/{folder}/v.mp4 --device cpu"
        return f"{how} --size 32x32 --frames 1 --steps 2"

    def note(pipe, clip, expert):
        if len(served) == 3:
            raise KeyboardInterrupt
        served.append(clip)

    run_script(monkeypatch, words("whole"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        note_denoise(patch, note)
        run_script(patch, words("cut"))
    done = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "cut").glob("*.mp4")}
    assert sorted(done) == ["v_000.mp4", "v_001.mp4", "v_002.mp4"]
    again = []
    note_denoise(monkeypatch, lambda pipe, clip, expert: again.append(clip))
    run_script(monkeypatch, words("cut"), "--resume")
    assert len(again) == 2 and all((tmp_path / "cut" / name).stat().st_mtime_ns == t for name, t in done.items())
    for i in range(5):
        a, b = ((tmp_path / folder / f"v_{i:03d}.mp4").read_bytes() for folder in ("whole", "cut"))
        assert a == b


def test_latents_of_a_stopped_list_keep_their_numbers(checkpoints, tmp_path, monkeypatch):
    """Those of videos that are done are left, and those of the others get the numbers of their videos."""
    (tmp_path / "p.txt").write_text("a\nb\n")
    monkeypatch.setattr(memory_estimate, "sampling", lambda *_, **__: NoPlan())
    words = f"--ckpt {checkpoints['ti2v']} --prompts {tmp_path}/p.txt --out {tmp_path}/v.mp4 --device cpu"
    words += f" --size 32x32 --frames 1 --steps 1 --guidance 1 --save_latents {tmp_path}/z.safetensors"
    run_script(monkeypatch, words)
    files = [tmp_path / f"z_{i:03d}.safetensors" for i in range(2)]
    before = [file.read_bytes() for file in files]
    assert before[0] != before[1]
    (tmp_path / "v_001.mp4").unlink()
    files[1].unlink()
    run_script(monkeypatch, words, "--resume")
    assert [file.read_bytes() for file in files] == before


def test_a_video_says_how_it_was_made(checkpoints):
    """All that another one like it needs; what was not asked for is not mentioned."""
    pipe, video = load(checkpoints["ti2v"]), SimpleNamespace(size=(64, 32), fps=24)
    plain = "--ckpt X --prompt P --seed 7 --steps 3 --shift 2 --guidance 4 --solver heun --negative N".split()
    more = {"lora": ["a.safetensors:0.5"], "text_encoder": ["b.safetensors"], "reuse": 0.1, "vae_tile": 16}
    for given in ({}, more):
        args = SimpleNamespace(**vars(arguments(plain)) | given | ({"attention": "sage"} if given else {}))
        (request,) = requests_of(args, [Prompt("P")], pipe.settings, args.seed)
        want = {"prompt": "P", "seed": 7, "steps": 3, "shift": 2.0, "guidance": (4.0, 4.0), "solver": "heun"}
        want |= {"negative": "N", "size": (64, 32), "fps": 24, "frames": pipe.settings.frames, "variant": "ti2v-5B"}
        want |= {"ckpt": str(pipe.dir), "dtype": "float32"} | given | ({"attention": "sage"} if given else {})
        assert request.record(args, pipe, video) == want


FREE = """config out prompt prompts seed num_videos grid save_latents resume preview_every device attention compile
cuda_graphs stream_blocks ulysses_size guidance_parallel""".split()


def test_a_stopped_video_goes_on_only_under_the_flags_that_it_began_with(checkpoints):
    """Under every one of them, also one that was never heard of, but for those that decide where a video goes, how it
    is computed and what else is written. Its own prompt, seed and settings, which --prompts may give, are there too.
    """
    args, pipe = arguments(["--ckpt", str(checkpoints["ti2v"])]), load(checkpoints["ti2v"])
    (request,) = requests_of(args, [Prompt("a")], pipe.settings, [0])
    key, changed = request.key(args, pipe), vars(args) | {"a_new_flag": None}
    assert {*FREE} < {*changed} and request.key(arguments(["--ckpt", str(checkpoints["ti2v"])]), pipe) == key
    for name in changed:
        other = SimpleNamespace(**vars(args) | {name: "other"})
        assert (request.key(other, pipe) != key) == (name not in FREE), name
    exact, inexact = (SimpleNamespace(**vars(args) | {"attention": name}) for name in ("sdpa", "sage"))
    assert request.key(exact, pipe) == key != request.key(inexact, pipe)
    settings = {"negative": "x", "shift": 2.5, "steps": 7, "guidance": (1.5, 2.5), "solver": "dpm++", "frames": 5}
    others = [replace(request, settings=pipe.settings.with_overrides(**{k: v})) for k, v in settings.items()]
    others += [replace(request, prompt="b"), replace(request, seed=1), replace(request, inputs={"image": "x.png"})]
    assert len({key, *(r.key(args, pipe) for r in others)}) == 1 + len(others)


def test_a_stopped_video_goes_on_only_with_the_files_that_it_began_with(checkpoints, tmp_path):
    """Told by what they hold: the checkpoint's own, those of LoRAs and pictures, and of another encoder."""
    folder = shutil.copytree(checkpoints["ti2v"], tmp_path / "ckpt")
    beside = [tmp_path / name for name in ("a.png", "b.safetensors")]
    for file in beside:
        file.write_bytes(b"1")
    args, pipe = arguments(["--ckpt", str(folder)]), load(folder)
    pipe.loras.append((beside[1], 1.0, ("dit",)))
    (request,) = requests_of(args, [Prompt("a", inputs={"image": str(beside[0])})], pipe.settings, [0])
    files = [*beside, *(f for f in folder.rglob("*") if f.is_file())]
    keys = [request.key(args, pipe)]
    for file in files:
        with open(file, "ab") as f:
            f.write(b" ")  # which JSON may end with
        keys.append(request.key(args, pipe))
    assert len(set(keys)) == 1 + len(files) >= 8


def test_prompts_of_a_file(tmp_path):
    """Without the mark that some editors begin a file with, and without empty lines."""
    (tmp_path / "p.txt").write_text("\n a cat \n\na dog", encoding="utf-8-sig")
    assert read_prompts(tmp_path / "p.txt") == [Prompt("a cat"), Prompt("a dog")]


def test_parts_that_are_done_are_given_up(tmp_path, monkeypatch):
    """The encoder before the DiT comes, the DiT before the VAE: also where there is room for all, as the plan says."""
    there, decoding = [], sample.decode
    note_denoise(monkeypatch, lambda pipe, clip, expert: there.append(list(pipe.placements)))
    monkeypatch.setattr(sample, "decode", lambda p, *a, **k: there.append(list(p.placements)) or decoding(p, *a, **k))
    run_script(monkeypatch, f"--device cpu --prompt x --size 32x32 --frames 5 --steps 1 --out {tmp_path / 'a.mp4'}")
    assert there == [[], []]


def test_a_preview_comes_every_so_many_steps(tmp_path):
    """After the second step and the fourth, and shows that step's estimate."""
    file = tmp_path / "p.png"
    write, written = preview_writer(torch.eye(4, 3), file, 2, "a cat"), []
    for step in range(5):
        write(step, torch.full((1, 3, 2, 2, 2), 0.2 * step - 0.5))
        if file.exists():
            written.append((step, Image.open(file).getpixel((10, 60))[0]))
            file.unlink()
    assert [step for step, _ in written] == [1, 3]
    assert written[0][1] < written[1][1]


def test_a_contact_sheet_shows_a_clip_from_its_first_frame_to_its_last(tmp_path):
    video = torch.linspace(-1, 1, 9)[None, :, None, None].expand(3, 9, 8, 8)
    write_grid(tmp_path / "g.png", [video], ["x"], shown=3, scale=1)
    row = np.asarray(Image.open(tmp_path / "g.png"))[24, 6:38, 0]
    assert row[4] == 0 and row[16] in (127, 128) and row[28] == 255 and row[9] == row[21] == 255  # white between them
