"""From a folder of media to batches: what is found, skipped, cropped, cached, and in what order it is seen."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import av
import numpy as np
import pytest
import torch
from helpers import scripts
from PIL import Image

import data
from benchmarks import tiny
from nanowan import cache, video
from nanowan.errors import BadInput
from nanowan.formats.header import load, save
from nanowan.parallel import World
from nanowan.training import report
from nanowan.training import scan as scanning
from nanowan.training.captions import count_files
from nanowan.training.scan import Item, buckets, clip_windows, nearest_bucket
from nanowan.variants.samples import ImageChannelsSamples, Samples
from nanowan.variants.sidecars import ClipSamples
from nanowan.video import Skip, write_mp4
from t5 import Tokenizer

ROOT = Path(__file__).parent.parent


def clip(path, frames=9, w=64, h=48, fps=8, caption="a cat runs"):
    """A clip whose frame k has brightness k/frames, with its caption."""
    level = torch.linspace(-0.9, 0.9, frames)
    write_mp4(path, level[None, :, None, None].expand(3, frames, h, w), fps)
    path.with_suffix(".txt").write_text(caption + "\n")


def encode(path, images, fps=8, codec="libx264", aspect=None, container=None):
    """A clip of uint8 images (H,W,3). aspect: of its pixels, width to height. No caption."""
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=fps, options={"crf": "4"} if codec == "libx264" else {})
        stream.height, stream.width, stream.pix_fmt = *images[0].shape[:2], "yuv420p"
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for image in images:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(stream.encode())


def photo(path, w=90, h=60, caption="a photo"):
    x = np.tile(np.linspace(0, 255, w, dtype=np.uint8)[None, :, None], (h, 1, 3))
    Image.fromarray(x).save(path)
    path.with_suffix(".txt").write_text(caption + "\n")


def scan(folder, area=64 * 48, multiple=16, most=9, fps=8):
    return scanning.scan(folder, area, multiple, most, fps)


def test_images_and_clips_land_in_buckets(tmp_path):
    clip(tmp_path / "a.mp4")
    (tmp_path / "deep").mkdir()
    clip(tmp_path / "deep" / "b.mp4", w=48, h=64)
    photo(tmp_path / "c.png")
    items, skipped = scan(tmp_path)
    assert not skipped
    assert {i.path.name: i.bucket for i in items} == {"a.mp4": (64, 48, 9), "b.mp4": (48, 64, 9), "c.png": (64, 48, 1)}


@pytest.mark.parametrize(
    "frames, fps, want", [(9, 8, 9), (12, 8, 9), (30, 8, 9), (7, 8, 5), (9, 16, 5), (20, 16, 9), (5, 4, 9), (20, 10, 9)]
)
def test_clips_are_resampled_and_cut_to_4k_plus_1(tmp_path, frames, fps, want):
    """Item frames at 8 fps, and each the source frame nearest in time."""
    clip(tmp_path / "a.mp4", frames, fps=fps)
    (item,), _ = scan(tmp_path)
    assert item.frames == want
    got = cache.pixels(item).mean((0, 2, 3))
    source = torch.linspace(-0.9, 0.9, frames)
    nearest = [min(int(k * fps / 8 + 0.5), frames - 1) for k in range(want)]
    either = [
        min(abs(g - source[i]), abs(g - source[max(i - 1, 0)]) if (k * fps / 8) % 1 == 0.5 else 9)
        for k, (g, i) in enumerate(zip(got, nearest))
    ]
    assert max(either) < 0.02


def test_matroska_rounds_times_and_loses_no_frames(tmp_path):
    """80/24 s is stored as 3.333 s there."""
    encode(tmp_path / "a.mkv", [np.full((48, 64, 3), 7 * k, np.uint8) for k in range(33)], fps=24)
    (tmp_path / "a.txt").write_text("a cat\u2028runs\r\na dog\n", encoding="utf-8-sig", newline="")
    (item,), _ = scan(tmp_path, most=81, fps=24)
    assert item.frames == 33 and item.captions == ["a cat\u2028runs", "a dog"]


def test_a_failure_is_not_remembered_and_the_caches_is_not_the_clips(tmp_path, monkeypatch):
    clip(tmp_path / "a.mp4")
    with monkeypatch.context() as broken, pytest.raises(BadInput, match="no decoder"):
        broken.setattr(cache, "probe", mock.Mock(side_effect=Skip("no decoder")))
        scanning.scan(tmp_path, 64 * 48, 16, 9, 8, cache_dir=tmp_path / "cache")
    assert len(scanning.scan(tmp_path, 64 * 48, 16, 9, 8, cache_dir=tmp_path / "cache")[0]) == 1
    with pytest.raises(BadInput, match="--cache"):
        scanning.scan(tmp_path, 64 * 48, 16, 9, 8, cache_dir=tmp_path / "a.txt")


def test_pixels_are_resized_and_cropped_from_the_middle(tmp_path):
    photo(tmp_path / "a.png", w=160, h=48)
    (item,), _ = scan(tmp_path, area=96 * 96, multiple=48)
    x = cache.pixels(item)
    assert x.shape == (3, 1, 48, 144) and x.min() >= -1 and x.max() <= 1
    middle = x[0, 0, 0, 71:73].mean()
    assert abs(middle) < 0.02 and x[0, 0, 0, 0] > -1 + 0.05
    ramp = np.tile(np.linspace(0, 255, 240, dtype=np.uint8)[:, None, None], (1, 48, 3))
    Image.fromarray(ramp).save(tmp_path / "a.png")  # standing, a fifth too long
    (item,), _ = scan(tmp_path, area=96 * 96, multiple=48)
    x = cache.pixels(item)
    assert x.shape == (3, 1, 192, 48)
    assert abs(x[0, 0, 95:97, 0].mean()) < 0.02 and abs(x[0, 0, 0, 0] + 0.8) < 0.02 and abs(x[0, 0, -1, 0] - 0.8) < 0.02


def test_unusable_files_are_named_with_their_reason(tmp_path):
    clip(tmp_path / "good.mp4")
    clip(tmp_path / "short.mp4", frames=4)
    clip(tmp_path / "silent.mp4", caption="")
    clip(tmp_path / "alone.mp4")
    (tmp_path / "alone.txt").unlink()
    encode(tmp_path / "cut.mp4", [np.full((48, 64, 3), 4 * k, np.uint8) for k in range(60)])
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "cut.mp4").read_bytes()[:-400])
    (tmp_path / "cut.txt").write_text("x")
    for name in ("empty.mp4", "empty2.jpg"):
        (tmp_path / name).write_bytes(b"")
        (tmp_path / name).with_suffix(".txt").write_text("x")
    (tmp_path / "page.mp4").write_text("<html>")
    (tmp_path / "page.txt").write_text("x")
    (tmp_path / "latin.png").write_bytes(b"")
    photo(tmp_path / "latin.png")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "folder.mp4").mkdir()
    items, skipped = scan(tmp_path)
    assert [i.path.name for i in items] == ["good.mp4"]
    why = {p.name: reason for p, reason in skipped}
    assert (
        "too short: 4 frames, 4 at 8 fps" in why["short.mp4"]
        and "caption silent.txt is empty" in why["silent.mp4"]
        and "alone.txt is missing" in why["alone.mp4"]
    )
    assert (
        why["empty.mp4"] == why["empty2.jpg"] == "is empty"
        and "cannot be decoded" in why["page.mp4"]
        and why["cut.mp4"] == "has no frames"
    )
    assert "not UTF-8" in why["latin.png"] and why["folder.mp4"] == "is not a file"
    assert all(p.name in report.text(report.describe_items(items, skipped)) for p, _ in skipped)


@pytest.mark.parametrize(
    "raw, want",
    [
        ("a cät\r\n\r\n a dog \r".encode("utf-8-sig"), ["a cät", "a dog"]),
        ("a cät\na dog".encode("utf-16"), ["a cät", "a dog"]),
        (b"\xfe\xff" + "犬\r\n".encode("utf-16-be"), ["犬"]),
        ("a\u2028b\x85c\x0bd\x0ce\x1cf\n".encode(), ["a\u2028b\x85c\x0bd\x0ce\x1cf"]),
        ("a cat\n".encode("utf-16-le"), None),
        ("a cat\n".encode("utf-32"), None),
        ("a cät\n".encode("latin-1"), None),
    ],
)
def test_captions_are_text_of_any_editor(tmp_path, raw, want):
    """Lines end as on any system, and at nothing else; another coding is named and not guessed."""
    photo(tmp_path / "a.png")
    photo(tmp_path / "b.png")
    (tmp_path / "a.txt").write_bytes(raw)
    items, skipped = scan(tmp_path)
    assert [i.captions for i in items if i.path.name == "a.png"] == ([want] if want else [])
    assert [why for _, why in skipped] == ["its caption a.txt is not UTF-8, nor UTF-16 with a byte-order mark"] * (
        want is None
    )


# where EXIF's orientation 1 to 8 has the corners of a picture that is stored as 0 1 / 2 3
ORIENTATIONS = {1: "01 23", 2: "10 32", 3: "32 10", 4: "23 01", 5: "02 13", 6: "20 31", 7: "31 20", 8: "13 02"}


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("orientation, want", [*ORIENTATIONS.items(), (0, "01 23"), (9, "01 23")])
def test_orientations_of_photographs(tmp_path, suffix, orientation, want):
    image = np.array([[30, 90], [150, 210]], np.uint8).repeat(16, 0).repeat(32, 1)[..., None].repeat(3, 2)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(image).save(tmp_path / f"a{suffix}", exif=exif, **({"lossless": True} if suffix == ".webp" else {}))
    (tmp_path / "a.txt").write_text("x")
    got = np.asarray(video.open_photo(tmp_path / f"a{suffix}"))[..., 0]
    corners = [[got[y, x] // 60 for x in (4, -4)] for y in (4, -4)]
    assert " ".join("".join(map(str, row)) for row in corners) == want
    (item,), _ = scan(tmp_path)
    assert item.source_size == got.shape[::-1] == ((32, 64) if orientation in (5, 6, 7, 8) else (64, 32))


def test_photographs_are_read_upright_and_whole(tmp_path):
    """EXIF rotation, 16-bit depth and transparency."""

    def level(name):
        (tmp_path / name).with_suffix(".txt").write_text("x")
        return video.open_photo(tmp_path / name)

    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (96, 48)).save(tmp_path / "turned.jpg", exif=exif)
    assert level("turned.jpg").size == (48, 96)
    deep = np.linspace(0, 65535, 64, dtype=np.uint16)[None].repeat(64, 0)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert abs(np.array(level("deep.png")).astype(float)[0, :, 0] - np.linspace(0, 255, 64)).max() <= 1
    Image.new("RGBA", (64, 64), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.array(level("clear.png")).min() == 255


def test_rotated_and_damaged_clips(tmp_path):
    """What was on the left is on top after a quarter turn clockwise."""
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:, :32] = 255
    encode(tmp_path / "a.mp4", [picture] * 20)
    (tmp_path / "a.txt").write_text("x")
    raw = bytearray((tmp_path / "a.mp4").read_bytes())
    at = raw.find(b"tkhd") + 44  # the track's matrix: a quarter turn, x' = -y and y' = x
    raw[at : at + 36] = b"".join(v.to_bytes(4, "big", signed=True) for v in (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30))
    (tmp_path / "a.mp4").write_bytes(raw)
    (item,), _ = scan(tmp_path, area=64 * 64)
    with av.open(str(tmp_path / "a.mp4")) as f:
        assert next(f.decode(video=0)).rotation % 180 == 90
    x = cache.pixels(item)
    assert item.height > item.width and x.shape[2:] == (item.height, item.width)
    assert x[:, :, : item.height // 3].mean() > 0.9 and x[:, :, -(item.height // 3) :].mean() < -0.9
    noisy = torch.rand(3, 20, 64, 64) * 2 - 1
    write_mp4(tmp_path / "b.mp4", noisy, 8)
    (tmp_path / "b.txt").write_text("x")
    raw = bytearray((tmp_path / "b.mp4").read_bytes())
    for i in range(len(raw) // 4, len(raw) // 2, 50):
        raw[i] ^= 0xFF
    (tmp_path / "b.mp4").write_bytes(raw)
    items, _ = scan(tmp_path)
    vae = tiny.vae(False)
    torch.save(vae.state_dict(), tmp_path / "VAE.pth")
    failed = cache.cache_latents(items, tmp_path / "cache", tmp_path / "VAE.pth", lambda: vae)
    assert [(p.name, why[:17]) for p, why in failed] == [("b.mp4", "cannot be decoded")]


@pytest.mark.parametrize("area, multiple", [(832 * 480, 16), (1280 * 704, 32), (64 * 64, 16), (16 * 16, 16), (300, 16)])
def test_a_bucket_fills_the_area_as_well_as_its_width_allows(area, multiple):
    """For each width the height nearest to area / width, of aspects from 1:4 to 4:1, none much above the area; and
    each on its side.
    """
    found, sides = {*buckets(area, multiple)}, range(multiple, 5 * int(area**0.5) + multiple, multiple)
    assert found == {(h, w) for w, h in found}
    rest = {*found}
    for w in sides:
        h = min(sides, key=lambda h: abs(h - area / w))
        if abs(h - area / w) < multiple / 2 and max(w / h, h / w) <= 4 and w * h <= 1.1 * area:
            assert {(w, h), (h, w)} <= found
            rest -= {(w, h), (h, w)}
    ties = {(w, h) for w, h in rest if abs(h - area / w) == multiple / 2}
    assert rest == ties | {(h, w) for w, h in ties} or found == {(multiple, multiple)}


@pytest.mark.parametrize("area, multiple", [(832 * 480, 16), (1280 * 704, 32), (480 * 640, 32), (64 * 64, 16)])
def test_a_picture_on_its_side_has_its_bucket_on_its_side(area, multiple):
    for width, height in ((1920, 1080), (640, 480), (1000, 800), (2000, 1000), (1021, 1019)):
        w, h = nearest_bucket(width, height, area, multiple)
        assert nearest_bucket(height, width, area, multiple) == (h, w)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("aspect, shown", [(Fraction(2), (128, 48)), (Fraction(1, 2), (32, 48))])
def test_pixels_that_are_not_square_are_shown_as_a_player_would(tmp_path, suffix, aspect, shown):
    """Left black, right white, with grey in the top rows: all of it stays, in the aspect at which it is shown."""
    image = np.zeros((48, 64, 3), np.uint8)
    image[:, 32:], image[:24] = 255, 128
    encode(tmp_path / f"a{suffix}", [image] * 9, aspect=aspect)
    (tmp_path / "a.txt").write_text("x")
    (item,), _ = scan(tmp_path, area=shown[0] * shown[1])
    assert item.bucket == (*shown, 9) and item.source_size == shown
    x = cache.pixels(item)[0, 4]
    w = shown[0]
    assert x[30:, : w // 2 - 4].max() < -0.9 and x[30:, w // 2 + 4 :].min() > 0.9 and x[:20].abs().max() < 0.1


def test_a_stream_without_a_decoder_is_skipped(tmp_path):
    clip(tmp_path / "good.mp4")
    clip(tmp_path / "odd.mp4")
    raw = (tmp_path / "odd.mp4").read_bytes()
    assert raw.count(b"avc1") > 1  # its kind, and the codec
    head, _, tail = raw.rpartition(b"avc1")
    (tmp_path / "odd.mp4").write_bytes(head + b"zzzz" + tail)
    items, skipped = scan(tmp_path)
    assert [i.path.name for i in items] == ["good.mp4"]
    assert [(p.name, why) for p, why in skipped] == [("odd.mp4", "holds video for which there is no decoder here")]


def test_frames_far_apart_are_a_damaged_clock(tmp_path):
    """An hour between two frames would be an hour of one picture in every mode that counts windows."""
    with pytest.raises(Skip, match="3600 s apart"):
        clip_windows([0, 1, 2, 3, 4, 3604], 9, 8, "several")
    assert len(clip_windows([k * 30.0 for k in range(5)], 5, 8, "several")) == 192


def test_a_sidecar_that_is_not_used_is_listed(tmp_path):
    class Posed(ClipSamples):
        videos = ("pose",)

    clip(tmp_path / "a.mp4")
    clip(tmp_path / "a.pose.mp4")
    clip(tmp_path / "a.pose.mkv")
    photo(tmp_path / "a.pose.png")
    clip(tmp_path / "b.pose.mp4")
    for name in ("c.mp4", "c.pose.mp4"):  # as cameras name them
        clip(tmp_path / name)
        (tmp_path / name).rename((tmp_path / name).with_suffix(".MP4"))
    items, skipped = scanning.scan(tmp_path, 64 * 48, 16, 9, 8, samples=Posed(None))
    assert [(i.path.name, *i.sidecars) for i in items] == [("a.mp4", "pose"), ("c.MP4", "pose")]
    assert {path.name: why for path, why in skipped} == {
        "a.pose.mp4": "is left out for a.pose.mkv",
        "a.pose.png": "is left out for a.pose.mkv",
        "b.pose.mp4": "belongs to a clip b, which is not there",
    }


def test_whatever_looks_like_media_is_listed_and_links_are_followed(tmp_path):
    folder, other = tmp_path / "data", tmp_path / "other"
    (folder / "deep").mkdir(parents=True)
    (other / "sub").mkdir(parents=True)
    photo(folder / "a.png")
    photo(other / "b.png")
    photo(other / "sub" / "c.png")
    for name in ("d.avif", "e.HEIC", "deep/f.tiff", "g.mpg", "h.txt", "i.json", ".hidden.gif"):
        (folder / name).write_bytes(b"x")
    (folder / "deep" / "link").symlink_to(other, target_is_directory=True)
    (other / "sub" / "back").symlink_to(folder, target_is_directory=True)
    (other / "twice").symlink_to(other / "sub", target_is_directory=True)
    (folder / ".hidden").mkdir()
    photo(folder / ".hidden" / "j.png")
    items, skipped = scan(folder)
    assert sorted(i.path.name for i in items) == ["a.png", "b.png", "c.png"]
    assert sorted(p.name for p, _ in skipped) == ["d.avif", "e.HEIC", "f.tiff", "g.mpg"]
    assert all(why.startswith("is none of .apng, .avi, .bmp") for _, why in skipped)


def test_a_file_that_is_gone_or_another_when_it_is_encoded_is_named(tmp_path):
    """Its latents are not in the cache, under any name; the others' are."""
    for name in "abcd":
        photo(tmp_path / f"{name}.png", w=90 + ord(name))
    clip(tmp_path / "e.mp4")
    items, _ = scan(tmp_path)
    vae = tiny.vae(False)
    torch.save(vae.state_dict(), tmp_path / "VAE.pth")
    (tmp_path / "b.png").unlink()
    photo(tmp_path / "c.png", w=70)
    (tmp_path / "e.mp4").write_bytes((tmp_path / "e.mp4").read_bytes()[:-300])
    failed = cache.cache_latents(items, tmp_path / "cache", tmp_path / "VAE.pth", lambda: vae)
    assert [p.name for p, _ in failed] == ["b.png", "c.png", "e.mp4"]
    reasons = [why for _, why in failed]
    assert reasons == ["does not exist any more", *["has changed since it was looked at"] * 2]
    files = cache.latent_files(items, tmp_path / "cache", tmp_path / "VAE.pth")
    assert [f.exists() for f in files] == [True, False, False, True, False]
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2


PEAK = r"""
import re, sys
from pathlib import Path
import torch
from nanowan import cache
from nanowan.training.scan import Item
def peak():
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
item = Item(Path(sys.argv[1]), ["x"], 64, 64, 1, 8)
before = peak()
cache.pixels(item)
print((peak() - before) / (6000 * 5000))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_decoding_a_photograph_takes_two_copies_of_it(tmp_path):
    """Of 4 bytes a pixel, turned by its EXIF: as read, and upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6000, 5000)).save(tmp_path / "a.jpg", exif=exif)
    run = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "a.jpg"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert 5 < float(run.stdout) <= 9


def test_nothing_left_says_so(tmp_path):
    clip(tmp_path / "short.mp4", frames=3)
    with pytest.raises(BadInput, match="nothing to train on; short.mp4 too short: 3 frames"):
        scan(tmp_path)
    with pytest.raises(BadInput, match="no such folder"):
        scan(tmp_path / "nowhere")


def test_cached_latents_equal_a_direct_encode(tmp_path):
    clip(tmp_path / "a.mp4", w=64, h=64)
    photo(tmp_path / "b.png")
    items, _ = scan(tmp_path, area=64 * 64, multiple=16)
    vae = tiny.vae(False)
    torch.save(vae.state_dict(), tmp_path / "VAE.pth")
    how = tmp_path / "cache", tmp_path / "VAE.pth"
    assert cache.cache_latents(items, *how, lambda: vae, ImageChannelsSamples(None)) == []
    files = cache.latent_files(items, *how, ImageChannelsSamples(None))
    for item, file in zip(items, files):
        got, want = load(file)[0], vae.encode(cache.pixels(item)[None])[0]
        assert torch.equal(got["latents"], want)
        first = torch.zeros(3, *cache.pixels(item).shape[1:])
        first[:, 0] = cache.pixels(item)[:, 0]
        assert (
            torch.equal(got["y"][4:], vae.encode(first[None])[0])
            and got["y"][:4, 0].min() == 1
            and got["y"][:4, 1:].abs().sum() == 0
        )


def test_only_what_changed_is_computed_again(tmp_path):
    clip(tmp_path / "a.mp4")
    clip(tmp_path / "b.mp4", frames=13)
    vae = tiny.vae(False)
    torch.save(vae.state_dict(), tmp_path / "VAE.pth")
    calls = []

    def cached(**kwargs):
        calls.clear()

        def loader():
            calls.append("loaded")
            return vae

        items, how = scan(tmp_path, **kwargs)[0], (tmp_path / "cache", tmp_path / "VAE.pth")
        assert not cache.cache_latents(items, *how, loader)
        return cache.latent_files(items, *how)

    first = cached()
    assert calls == ["loaded"] and cached() == first and not calls
    clip(tmp_path / "b.mp4", frames=17)  # another file under the same name
    second = cached()
    assert calls and second[0] == first[0] and second[1] != first[1]
    assert not set(cached(area=32 * 32)) & set(second)  # another resolution
    assert not set(cached(fps=4)) & set(second)  # another frame rate
    assert cached(most=5)[0] != second[0]  # another length
    torch.save(tiny.vae(False, seed=8).state_dict(), tmp_path / "VAE.pth")
    assert not set(cached()) & set(second)  # another VAE


def test_windows_of_one_clip_have_latents_of_their_own(tmp_path):
    """Under --clip_mode several, and so have a clip's latents with and without what I2V adds."""
    clip(tmp_path / "a.mp4", 27, w=64, h=64)
    items, _ = scanning.scan(tmp_path, 64 * 64, 16, 9, 8, "several")
    vae = tiny.vae(False)
    torch.save(vae.state_dict(), tmp_path / "VAE.pth")
    how = tmp_path / "cache", tmp_path / "VAE.pth"
    assert len(items) == 3 and not cache.cache_latents(items, *how, lambda: vae)
    for item, file in zip(items, cache.latent_files(items, *how)):
        tensors = load(file)[0]
        assert tensors.keys() == {"latents"} and torch.equal(
            tensors["latents"], vae.encode(cache.pixels(item)[None])[0]
        )
    assert not cache.cache_latents(items, *how, lambda: vae, ImageChannelsSamples(None))
    assert all(
        load(f)[0].keys() == {"latents", "y"} for f in cache.latent_files(items, *how, ImageChannelsSamples(None))
    )


def test_a_conditioning_says_what_its_tensors_depend_on(tmp_path):
    """Its key is in the file's name; a sample that it cannot encode is named, and the rest is cached."""

    class Sound(Samples):
        def __init__(self, of):
            self.of = of

        def cache_key(self, item):
            return self.of[item.path.name]

        def cached(self, vae, video, item, sidecars):
            if item.path.name == "b.png":
                raise Skip("has no sound")
            return {"sound": torch.full((3,), self.of[item.path.name])}

    photo(tmp_path / "a.png")
    photo(tmp_path / "b.png", w=80)
    items, _ = scan(tmp_path)
    vae = tiny.vae(False)
    torch.save(vae.state_dict(), tmp_path / "VAE.pth")
    how = tmp_path / "cache", tmp_path / "VAE.pth"
    for of in ({"a.png": 1.0, "b.png": 2.0}, {"a.png": 3.0, "b.png": 2.0}):
        failed = cache.cache_latents(items, *how, lambda: vae, Sound(of))
        assert failed == [(tmp_path / "b.png", "has no sound")]
        file, missing = cache.latent_files(items, *how, Sound(of))
        assert load(file)[0]["sound"].tolist() == [of["a.png"]] * 3 and not missing.exists()


def test_texts_are_cached_by_caption_and_encoder(tmp_path, checkpoints):
    from nanowan.formats.t5 import load_t5

    encoder = load_t5(checkpoints["ti2v"], dtype=torch.float32)
    file = [
        checkpoints["ti2v"] / "models_t5_umt5-xxl-enc-bf16.pth",
        checkpoints["ti2v"] / "google" / "umt5-xxl" / "spiece.model",
    ]

    def cached(captions, encoder_files, dtype, load_encoder=lambda: encoder):
        files = cache.text_files(captions, tmp_path, [cache.digest(f) for f in encoder_files], dtype)
        cache.cache_texts(files, load_encoder)
        return files

    files = cached(["a cat", "", "a cat"], file, torch.float32)
    assert list(files) == ["a cat", ""]
    assert torch.equal(load(files["a cat"])[0]["embedding"], encoder.encode(["a cat"])[0][0])

    def never():
        raise AssertionError("everything is cached already")

    assert cached(["", "a cat"], file, torch.float32, never) == {"": files[""], "a cat": files["a cat"]}
    assert cached(["a cat"], file, torch.bfloat16)["a cat"] != files["a cat"]
    for i in range(2):  # other weights, another tokenizer
        other = [*file]
        other[i] = tmp_path / "other"
        other[i].write_bytes(file[i].read_bytes() + b"x")
        assert cached(["a cat"], other, torch.float32)["a cat"] != files["a cat"]


def test_trained_words_are_counted_by_files():
    """Not by captions, of which several files may have the same and one may have many; nor by windows."""
    captions = [["a red cat", "red"], ["a red cat"], ["a red cat"], ["a dog"]]
    items = [Item(Path(f"{i}.mp4"), c, 8, 8, 5, 8, start=s) for i, c in enumerate(captions) for s in (0.0, 1.0)]
    assert [count_files(items, word) for word in ("red", "dog", "cow")] == [3, 1, 0]
    long = "a dog " * 300 + "and a red cat"
    items.append(Item(Path("long.mp4"), [long], 8, 8, 5, 8))
    tokenizer = Tokenizer(tiny.spiece())
    assert [count_files(items, word, tokenizer) for word in ("red", "dog", "cow")] == [3, 2, 0]  # beyond token 512


def items_of(sizes):
    return [Item(Path(f"{w}_{i}"), [""], w, 8, 1, 8) for w, n in sizes.items() for i in range(n)]


def test_a_samples_loss_counts_as_its_data_sets_weight_says(tmp_path):
    """And that of a preserved one --preserve times."""
    dataset = object.__new__(data.Dataset)
    dataset.samples, dataset.config, draws = Samples(None), SimpleNamespace(preserve=3.0), []
    for i, (weight, preserved) in enumerate(((1.0, False), (0.5, False), (0.5, True))):
        file, item = tmp_path / f"{i}.safetensors", replace(items_of({16: 1})[0], weight=weight)
        save(file, {"latents": torch.randn(4, 2, 3, 3)})
        generator = torch.Generator().manual_seed(i)
        draws.append(data.Draw(item, file, "a", preserved, False, None, torch.tensor(0.5), generator))
    batch = dataset._batch(draws, True)
    loss = batch.loss(lambda *_: torch.zeros(3, 4, 2, 3, 3), torch.zeros(3, 1, 1), None)
    each = batch.target.square().mean((1, 2, 3, 4))
    assert loss.item() == pytest.approx(((each[0] + 0.5 * each[1] + 1.5 * each[2]) / 3).item())


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_each_sample_of_an_epoch_counts_alike(ranks, batch):
    """In the sum of gradients over all ranks and batches, whatever its bucket is: one share of a step's size."""
    items, size = items_of({16: 7, 32: 4, 48: 1}), batch * ranks
    weights = Counter()
    for rank in range(ranks):
        dataset = object.__new__(data.Dataset)
        world = World("cpu", distributed=False)
        world.dp_rank, world.dp_size = rank, ranks
        config = SimpleNamespace(batch=batch, seed=0, caption_dropout=0, i2v_prob=0, continuation=None, shift=1.0)
        config.t_distribution = "uniform"
        batches = data.Batches(items, size, seed=1)
        vars(dataset).update(config=config, items=items, files=items, samples=Samples(None), world=world)
        vars(dataset).update(batches=batches, _batch=lambda draws, preserves: draws)
        for step in range(batches.per_epoch):
            for draws, weight in dataset.step(step, 0.0, 1.0):
                for draw in draws:  # a batch's loss is the mean of its samples'
                    weights[draw.item.path] += weight / len(draws)
    assert len(weights) == 12 and all(abs(w * min(size, 12) - 1) < 1e-6 for w in weights.values())


def test_every_file_is_seen_once_an_epoch_in_a_new_order():
    """Steps of one bucket each, but for those of what is left over of all."""
    items = items_of({16: 7, 32: 4, 48: 1})
    batches = data.Batches(items, 3, seed=1)
    assert batches.per_epoch == 4
    epochs = [[batches.at(e * 4 + i) for i in range(4)] for e in range(3)]
    for epoch in epochs:
        assert Counter(i for b in epoch for i in b) == Counter(range(12))
        assert sorted(len({items[i].bucket for i in b}) for b in epoch) == [1, 1, 1, 3]
    assert epochs[0] != epochs[1] != epochs[2]
    again = data.Batches(items, 3, seed=1)
    assert again.at(9) == epochs[2][1] and data.Batches(items, 3, seed=2).at(9) != epochs[2][1]


def test_a_jsonl_lists_paths_and_captions(tmp_path):
    (tmp_path / "m").mkdir()
    clip(tmp_path / "m" / "a.mp4")
    photo(tmp_path / "m" / "b.png")
    lines = [
        '{"path": "m/a.mp4", "caption": "one"}',
        "",
        '{"file": "m/b.png", "caption": ["two", " three "]}',
        '{"path": "m/c.mp4", "caption": "x"}',
        '{"path": "m/a.mp4"}',
        '{"path": "list.jsonl", "caption": "x"}',
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    items, skipped = scan(tmp_path / "list.jsonl")
    assert [(i.path.name, i.captions) for i in items] == [("a.mp4", ["one"]), ("b.png", ["two", "three"])]
    assert [why.split()[0] for _, why in skipped] == ["does", "has", "is"] and "line 5 of list.jsonl" in skipped[1][1]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "not lines of .* line 2: "),
        ('["a"]', "not lines of .* line 2: "),
        ('{"caption": "x", "seed": 1}', "names no file; of path, file, .* columns are caption, seed"),
        ('{"path": 5, "caption": "x"}', "names no file"),
        ('{"path": "", "caption": "x"}', "names no file"),
        ('{"path": "a.png", "caption": 5}', "neither a text nor a list of texts"),
        ('{"path": "a.png", "caption": ["x", 5]}', "neither a text nor a list of texts"),
        ('{"path": "a.png", "caption": "x", "repeat": 0}', "repeat 0"),
        ('{"path": "a.png", "caption": "x", "repeat": "often"}', "repeat often"),
    ],
)
def test_a_line_that_fits_no_habit_is_named(tmp_path, line, message):
    photo(tmp_path / "a.png")
    (tmp_path / "list.jsonl").write_text('{"path": "a.png", "caption": "x"}\n' + line)
    with pytest.raises(
        BadInput, match=f"^--data {tmp_path}/list.jsonl.* line 2: .*{message}|^--data {tmp_path}/list.jsonl: {message}"
    ):
        scan(tmp_path / "list.jsonl")


COLUMNS = [
    ("path", "caption"),
    ("video_path", "caption"),
    ("image_path", "caption"),
    ("video", "prompt"),
    ("file_name", "text"),
]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("path, caption", COLUMNS)
def test_lists_of_every_habit(tmp_path, kind, path, caption):
    """musubi's, DiffSynth's and Hugging Face's columns, among others that mean nothing here; relative to the list."""
    (tmp_path / "m").mkdir()
    photo(tmp_path / "m" / "a.png")
    photo(tmp_path / "m" / "b.png")
    if kind == "jsonl":
        rows = [{"id": 7, path: "m/a.png", caption: "a cat, running"}, {path: "m/b.png", caption: "b", "repeat": 3}]
        text = "\n".join(map(json.dumps, rows))
    else:
        text = f'id,{path},{caption},repeat\n7,m/a.png,"a cat, running",\n8,m/b.png,"b",3\n'
    (tmp_path / f"list.{kind}").write_text(text, encoding="utf-8-sig")
    items, skipped = scan(tmp_path / f"list.{kind}")
    assert [(i.path.name, i.captions, i.repeat) for i in items] == [
        ("a.png", ["a cat, running"], 1),
        ("b.png", ["b"], 3),
    ]
    assert not skipped and "seen 4 times an epoch" in report.text(report.describe_items(items, skipped))


def test_a_csv_that_cannot_be_understood(tmp_path):
    photo(tmp_path / "a.png")
    for text, message in (
        ("path,caption\na.png,a cat, running\n", "line 2: .*commas in them need quotes"),
        ("name,words\na.png,x\n", "line 2: names no file; .*columns are name, words"),
        ('path,caption\na.png,"x\n', "list.csv: not a CSV with a header: line "),
        ("path,caption\n", "nothing to train on"),
    ):
        (tmp_path / "list.csv").write_text(text)
        with pytest.raises(BadInput, match=message):
            scan(tmp_path / "list.csv")
    (tmp_path / "list.csv").write_text("path,caption\na.png\n")
    with pytest.raises(BadInput, match="a.png has no caption on line 2 of list.csv"):
        scan(tmp_path / "list.csv")


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_folder_may_hold_its_list(tmp_path, kind):
    """What metadata.csv names has its caption from there; the rest has it beside itself, or is skipped by name."""
    (tmp_path / "m").mkdir()
    for name in ("a", "m/b", "c", "d"):
        photo(tmp_path / f"{name}.png", caption=f"beside {name}")
    (tmp_path / "d.txt").unlink()
    rows = [{"file_name": "a.png", "text": "one"}, {"file_name": "m/b.png", "text": "two"}]
    if kind == "csv":
        text = "file_name,text\n" + "".join(f"{r['file_name']},{r['text']}\n" for r in rows)
    else:
        text = "\n".join(map(json.dumps, rows))
    (tmp_path / f"metadata.{kind}").write_text(text)
    items, skipped = scan(tmp_path)
    assert [(i.path.name, i.captions) for i in items] == [
        ("a.png", ["one"]),
        ("b.png", ["two"]),
        ("c.png", ["beside c"]),
    ]
    assert [p.name for p, _ in skipped] == ["d.png"]


@pytest.mark.parametrize(
    "mode, want",
    [
        ("first", [range(9)]),
        ("middle", [range(6, 15)]),
        ("several", [range(9), range(9, 18)]),
        ("spaced", [[0, 2.5, 5, 7.5, 10, 12.5, 15, 17.5, 20]]),
    ],
)
def test_which_frames_of_a_longer_clip(tmp_path, mode, want):
    clip(tmp_path / "a.mp4", 21)
    items, _ = scanning.scan(tmp_path, 64 * 48, 16, 9, 8, mode)
    level = torch.linspace(-0.9, 0.9, 21)
    assert len(items) == len(want) and len({i.start for i in items}) == len(items)
    for item, frames in zip(items, want):
        got = cache.pixels(item).mean((0, 2, 3))
        assert item.frames == 9
        assert all(min(abs(g - level[int(f)]), abs(g - level[-int(-f // 1)])) < 0.02 for g, f in zip(got, frames))


def test_entries_that_repeat_are_seen_as_often(tmp_path):
    items = items_of({16: 3, 32: 2})
    items[1].repeat = 4
    batches = data.Batches(items, 2, seed=0)
    seen = Counter(i for step in range(batches.per_epoch) for i in batches.at(step))
    assert seen == {0: 1, 1: 4, 2: 1, 3: 1, 4: 1} and batches.per_epoch == 3 + 1


def test_a_data_sets_repeats_are_of_what_its_list_repeats(tmp_path):
    """And its weight is that of each of its samples."""
    for name in "ab":
        photo(tmp_path / f"{name}.png", 64, 48)
    rows = [{"path": "a.png", "caption": "a", "repeat": 3}, {"path": "b.png", "caption": "b"}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = SimpleNamespace(size_multiple=16, fps=8)
    source = data.DataSource(tmp_path / "list.jsonl", (64, 48), 9, repeats=2, weight=0.5)
    items, _ = scanning.scan_source(source, settings, None, None)
    assert [(i.path.name, i.repeat, i.weight) for i in items] == [("a.png", 6, 0.5), ("b.png", 2, 0.5)]


def test_a_clip_is_decoded_once_and_hashed_by_its_bytes(tmp_path, monkeypatch):
    clip(tmp_path / "a.mp4")
    clip(tmp_path / "b.mp4", frames=3)
    calls, real = [], video.probe
    monkeypatch.setattr(cache, "probe", lambda p: calls.append(p.name) or real(p))

    def look():
        return scanning.scan(tmp_path, 64 * 48, 16, 9, 8, cache_dir=tmp_path / "cache")

    first = look()
    assert (
        calls == ["a.mp4", "b.mp4"]
        and [i.bucket for i in look()[0]] == [i.bucket for i in first[0]]
        and look()[1] == first[1]
    )
    assert len(calls) == 2
    clip(tmp_path / "b.mp4", frames=13)
    assert len(look()[0]) == 2 and calls[2:] == ["b.mp4"]
    for file in (tmp_path / "cache").iterdir():  # such as a lost write
        file.write_text(file.read_text()[:5])
    assert len(look()[0]) == 2 and len(calls) == 5 and len(look()[0]) == 2 and len(calls) == 5


def test_two_processes_may_fill_one_cache_at_once(tmp_path, checkpoints):
    """Both start on an empty cache; what they leave equals what one alone computes, and nothing half-written."""
    (tmp_path / "d").mkdir()
    for i in range(6):
        clip(tmp_path / "d" / f"{i}.mp4", 30 + i, 64, 64, caption=f"clip {i}")
    flags = {
        "--ckpt": checkpoints["ti2v"],
        "--data": tmp_path / "d",
        "--resolution": "64x64",
        "--frames": 9,
        "--device": "cpu",
    }

    def command(out, cache):
        given = flags | {"--out": tmp_path / out, "--cache": tmp_path / cache}
        return [sys.executable, ROOT / "train_lora.py", "--cache_only", *(str(w) for kv in given.items() for w in kv)]

    both = [
        subprocess.Popen(command(out, "shared"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for out in ("a", "b")
    ]
    assert [p.wait() for p in both] == [0, 0], [p.stdout.read() for p in both]
    subprocess.run(command("c", "alone"), check=True, capture_output=True)
    shared, alone = ({f.name: f for f in (tmp_path / c).iterdir()} for c in ("shared", "alone"))
    # probes, latents, captions and the empty one, the report; and the digests of the checkpoint's files
    assert shared.keys() == alone.keys() and sum(not name.endswith(".digest") for name in alone) == 6 + 6 + 7 + 1
    for name in alone:
        if name.endswith(".safetensors"):
            a, b = load(shared[name])[0], load(alone[name])[0]
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_hostile_folder_trains_on_the_rest(tmp_path_factory, checkpoints):
    import os
    import tempfile

    folder = Path(tempfile.mkdtemp())
    try:
        clip(folder / "good.mp4", 9, 64, 64, caption="a good clip")
        photo(folder / "good.png", 64, 64)
        (folder / "zero.mp4").write_bytes(b"")
        clip(folder / "cut.mp4", 60, 128, 128)
        (folder / "cut.mp4").write_bytes((folder / "cut.mp4").read_bytes()[:2000])
        with av.open(str(folder / "sound.mp4"), "w") as f:
            stream = f.add_stream("aac", rate=16000)
            for _ in range(5):
                frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                frame.rate = 16000
                f.mux(stream.encode(frame))
            f.mux(stream.encode())
        clip(folder / "one.mp4", 1, 64, 64)
        Image.new("RGB", (10000, 40)).save(folder / "wide.png")
        photo(folder / "latin.png")
        (folder / "latin.txt").write_bytes(b"caf\xe9")
        (folder / "dir.mp4").mkdir()
        (folder / "loop.mp4").symlink_to(folder / "loop.mp4")
        (folder / "up").symlink_to(folder, target_is_directory=True)
        photo(folder / "locked.png")
        for name in ("zero", "cut", "sound", "wide", "loop"):
            (folder / f"{name}.txt").write_text("x")
        os.chmod(folder, 0o755)
        os.chmod(folder / "locked.png", 0)
        scanning.scan(folder, 64 * 64, 32, 9, 24)  # imports what it needs, which somebody else may not be able to
        if os.geteuid() == 0:  # whom no mode stops: look as somebody else
            os.seteuid(65534)
        try:
            items, skipped = scanning.scan(folder, 64 * 64, 32, 9, 24)
        finally:
            if os.getuid() == 0:
                os.seteuid(0)
        why = {p.name: reason for p, reason in skipped}
        assert [i.path.name for i in items] == ["good.mp4", "good.png"]
        expected = {
            "zero.mp4": "is empty",
            "cut.mp4": "cannot be decoded",
            "sound.mp4": "no video stream",
            "one.mp4": "too short: 1 frames",
            "wide.png": "10000x40 is too long and thin",
            "latin.png": "not UTF-8",
            "dir.mp4": "is not a file",
            "loop.mp4": "is not a file",
            "locked.png": "ermission denied",
        }
        assert why.keys() == expected.keys() and all(text in why[name] for name, text in expected.items()), why
        (folder / "locked.png").unlink()
        Image.new("RGB", (10000, 9000)).save(folder / "huge.png")
        (folder / "huge.txt").write_text("a very large photograph")
        run = scripts.run(
            ROOT / "train_lora.py",
            "--ckpt",
            checkpoints["ti2v"],
            "--data",
            folder,
            "--out",
            folder / "out",
            "--resolution",
            "64x64",
            "--frames",
            "9",
            "--steps",
            "3",
            "--batch",
            "2",
            "--device",
            "cpu",
        )
        assert run.returncode == 0 and (folder / "out" / "adapter_model.safetensors").exists(), run.stderr
        assert "data: 3 files, 8 skipped" in run.stdout and all(
            f"skipped {folder / name}" in run.stdout for name in expected if name != "locked.png"
        )
    finally:
        import shutil

        shutil.rmtree(folder)
