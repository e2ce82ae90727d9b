"""Media are read as a player shows them: when, which way up, in which colours; and what is written is what it says."""

import contextlib
import io
import math
import struct
import threading
import time
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from helpers import media
from helpers.media import number, numbered, patches, write_clip, write_timed, yuv_frame
from PIL import Image, ImageCms

from benchmarks import tiny
from nanowan import cache, video
from nanowan.training import report
from nanowan.training import scan as scanning
from nanowan.variants.s2v.conditioning import SpeechVideo
from nanowan.variants.s2v.wav2vec2 import read_audio
from nanowan.video import Skip, probe, read_frames, read_sound, read_windows, write_frames, write_mp4

COLORS = [(200, 40, 40), (40, 170, 60), (40, 60, 200), (128, 128, 128), (240, 240, 240)]
BT709, BT601, FCC, SMPTE240M, BT2020 = (0.2126, 0.0722), (0.299, 0.114), (0.3, 0.11), (0.212, 0.087), (0.2627, 0.0593)


def images(path):
    return [np.asarray(frame.image) for frame in read_frames(path)]


def shown(path):
    """The numbers that a clip's pictures say, at their times in seconds."""
    return [(round(frame.seconds, 3), number(np.asarray(frame.image))) for frame in read_frames(path)]


def off(got, want):
    return abs(np.array(got, int) - np.array(want, int)).max()


# ---- when pictures are shown -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("codec, how", [("libx264", {"bf": 3, "b-adapt": 0}), ("mpeg4", {"b_frames": 2, "qscale": 2})])
@pytest.mark.parametrize("suffix", [".avi", ".mp4", ".mkv"])
def test_reordered_pictures_are_shown_in_turn(tmp_path, codec, how, suffix):
    """AVI says when a picture is decoded, not when it is shown."""
    path = write_clip(tmp_path / f"a{suffix}", [numbered(k) for k in range(30)], codec, 24, **how)
    assert [n for _, n in shown(path)] == list(range(30))
    assert all(abs(t - k / 24) < 1e-3 for k, (t, _) in enumerate(shown(path)))
    assert len(probe(path).times) == 30 and "variable rate" not in probe(path).notes
    (at_16,) = read_windows(path, [[k / 16 for k in range(19)]], lambda frame: number(np.asarray(frame.image)))
    assert all(abs(n - k * 1.5) <= 0.5 for k, n in enumerate(at_16))


def pack(source, path):
    """An MPEG-4 clip with single B-frames as XviD packs it: each goes into the packet before its own, whose place a
    picture takes that says "as before".
    """
    with av.open(str(source)) as file:
        stream = file.streams.video[0]
        packets = [bytes(p) for p in file.demux(stream) if p.size]
        packets[0] = stream.codec_context.extradata + packets[0]
    at = packets[0].index(b"\0\0\1\xb6")
    packets[0] = packets[0][:at] + b"\0\0\1\xb2DivX503b1393p" + packets[0][at:]
    kinds = [p[p.rindex(b"\0\0\1\xb6") + 4] >> 6 for p in packets]  # 0: I, 1: P, 2: B
    as_before = b"\0\0\1\xb6" + bytes([0b01010000, 0b01011111])  # P, its time 0, not coded
    packed = []
    for kind, packet in zip(kinds, packets):
        if kind == 2:
            packed[-1] += packet
            packed.append(as_before)
        else:
            packed.append(packet)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for k, payload in enumerate(packed):
            packet = av.Packet(payload)
            packet.stream, packet.time_base, packet.pts, packet.dts = stream, Fraction(1, 25), k, k
            packet.is_keyframe = kinds[k] == 0
            file.mux(packet)
    return path


def test_packed_pictures_are_shown_in_turn(tmp_path):
    source = write_clip(
        tmp_path / "a.m4v", [numbered(k) for k in range(25)], "mpeg4", 25, b_frames=1, qscale=2, b_strategy=0
    )
    path = pack(source, tmp_path / "packed.avi")
    with av.open(str(path)) as file:  # what it is made for: times that step back
        own = [frame.time for frame in file.decode(video=0)]
    assert any(b <= a for a, b in zip(own, own[1:]))
    numbers = [n for _, n in shown(path)]
    assert numbers == list(range(len(numbers))) and len(numbers) >= 24
    assert all(abs(t - k / 25) < 1e-3 for k, (t, _) in enumerate(shown(path)))
    assert probe(path).changed == ["reordered"]
    for suffix in (".mp4", ".mkv"):  # copied as they are
        other = path.with_suffix(suffix)
        with av.open(str(path)) as source, av.open(str(other), "w") as file:
            stream = file.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream, packet.pts = stream, packet.dts
                    file.mux(packet)
        assert [n for _, n in shown(other)] == numbers
        assert all(abs(t - k / 25) < 1e-3 for k, (t, _) in enumerate(shown(other)))


@pytest.mark.parametrize("codec", ["mpeg4", "mpeg2video"])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_packets_that_say_when_they_are_decoded_are_shown_in_turn(tmp_path, codec, suffix):
    """As an AVI's do that were copied into another container: each in its place, none says when it is shown."""
    write_clip(tmp_path / "a.mkv", [numbered(k) for k in range(30)], codec, 24, b_frames=2, qscale=2)
    path = tmp_path / f"b{suffix}"
    with av.open(str(tmp_path / "a.mkv")) as source, av.open(str(path), "w") as file:
        stream = file.add_stream_from_template(source.streams.video[0])
        for k, packet in enumerate(p for p in source.demux(video=0) if p.size):
            packet.stream, packet.time_base, packet.pts, packet.dts = stream, Fraction(1, 24), k, k
            file.mux(packet)
    assert [n for _, n in shown(path)] == list(range(30)) and probe(path).changed == ["reordered"]
    assert all(abs(t - k / 24) < 1e-3 for k, (t, _) in enumerate(shown(path)))


def test_pictures_of_variable_rate_keep_their_times(tmp_path):
    times = [*(k / 30 for k in range(30)), *(1 + k / 10 for k in range(20))]
    path = write_timed(tmp_path / "a.mp4", [numbered(k) for k in range(50)], times)
    assert shown(path) == [(round(t, 3), k) for k, t in enumerate(times)]
    assert "variable rate" in probe(path).notes and not probe(path).changed
    wanted = [k / 16 for k in range(40)]
    (got,) = read_windows(path, [wanted], lambda frame: frame.seconds)
    assert max(abs(a - b) for a, b in zip(got, wanted)) <= 0.05 + 1e-6


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_looking_at_a_clip_decodes_its_first_picture_alone(tmp_path, monkeypatch, suffix):
    path = write_clip(tmp_path / f"a{suffix}", [numbered(k) for k in range(40)], rate=24, bf=2)
    monkeypatch.setattr(video, "decoded_times", None)
    assert len(probe(path).times) == 40 and abs(probe(path).times[-1] - 39 / 24) < 1e-3


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_pictures_that_need_what_was_cut_off_before_them_are_no_part_of_a_clip(tmp_path, suffix):
    """Of a clip that was cut without decoding it, at a picture that earlier ones follow in the file."""
    how = "open-gop=1:keyint=8:min-keyint=8:scenecut=0:b-adapt=0"
    write_clip(tmp_path / f"a{suffix}", [numbered(k) for k in range(32)], b_frames=3, **{"x264-params": how})
    keys, path = 0, tmp_path / f"cut{suffix}"
    with av.open(str(tmp_path / f"a{suffix}")) as whole, av.open(str(path), "w") as cut:
        stream = cut.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            keys += packet.is_keyframe and packet.size > 0
            if keys > 1 and packet.size:
                packet.stream = stream
                cut.mux(packet)
    assert shown(path) == [(k / 8, 8 + k) for k in range(24)]
    assert probe(path).times == [k / 8 for k in range(24)]


@pytest.mark.parametrize("share", [0.5, 0.67, 0.9])
def test_a_clip_that_breaks_off_is_refused(tmp_path, share):
    """As a download that was stopped: its index in front says what should follow."""
    write_mp4(tmp_path / "a.mp4", torch.rand(3, 40, 64, 64), 8)
    raw = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(raw[: round(len(raw) * share)])
    with pytest.raises(Skip, match="cannot be decoded"):
        probe(tmp_path / "a.mp4")


@pytest.mark.parametrize("where", [0.3, 0.6, 0.95])
def test_damage_is_found_wherever_it_is(tmp_path, where):
    """In the last pictures too."""
    write_mp4(tmp_path / "a.mp4", torch.rand(3, 20, 64, 64), 8)
    raw = bytearray((tmp_path / "a.mp4").read_bytes())
    begin, length = raw.index(b"mdat"), len(raw) - raw.index(b"mdat")
    for at in range(begin + round(length * where), begin + round(length * (where + 0.05)), 50):
        raw[at] ^= 0xFF
    (tmp_path / "a.mp4").write_bytes(raw)
    with pytest.raises(Skip, match="cannot be decoded"):
        list(read_frames(tmp_path / "a.mp4"))


# ---- which picture, which way up -------------------------------------------------------------------------------------
MATRICES = [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)] + [(0, b, c, 0) for b in (1, -1) for c in (1, -1)]


@pytest.mark.parametrize("matrix", MATRICES)
def test_pictures_are_turned_and_mirrored_as_their_file_says(tmp_path, matrix):
    """ISO/IEC 14496-12: a pixel at (x, y) is shown at (a x + c y, b x + d y), moved so that none is negative."""
    image = np.full((32, 64, 3), 20, np.uint8)
    image[:16, :32], image[:16, 32:], image[16:, :32] = (220, 20, 20), (20, 220, 20), (20, 20, 220)
    a, b, c, d = matrix
    ys, xs = np.mgrid[:32, :64]
    to_x, to_y = a * xs + c * ys, b * xs + d * ys
    want = np.zeros((64, 32, 3) if b else (32, 64, 3), int)
    want[to_y - to_y.min(), to_x - to_x.min()] = image
    path = write_clip(tmp_path / "a.mp4", [image] * 9, pixels="yuv444p", qp=1, matrix=matrix)
    (got, *_), found = images(path), probe(path)
    assert got.shape == want.shape and abs(got - want)[2:-2, 2:-2].mean() < 3
    assert (found.height, found.width) == want.shape[:2]
    assert found.changed == ["mirrored"] * (a * d - b * c < 0)
    assert ("rotated" in found.notes) == (a * d - b * c > 0 and matrix != (1, 0, 0, 1))


def test_an_angle_between_is_refused(tmp_path):
    path = write_clip(tmp_path / "a.mp4", [numbered(0)] * 9, matrix=(0.5, 0.5, -0.5, 0.5))
    with pytest.raises(Skip, match="not a multiple of 90 degrees"):
        probe(path)


def test_the_largest_track_is_read_and_a_cover_never(tmp_path):
    """As FFmpeg chooses; the default flag is worth five million pixels."""
    from av.stream import Disposition

    sizes, disposition = {"small": 32, "large": 96, "cover": 192}, {"cover": Disposition.attached_pic}
    for order in (("small", "large"), ("large", "small"), ("cover", "small", "large")):
        path = tmp_path / f"{'_'.join(order)}.mp4"
        with av.open(str(path), "w") as file:
            streams = {}
            for name in order:
                stream = streams[name] = file.add_stream("mjpeg" if name == "cover" else "libx264", rate=8)
                stream.width = stream.height = sizes[name]
                stream.pix_fmt = "yuvj420p" if name == "cover" else "yuv420p"
                stream.disposition = disposition.get(name, Disposition.default)
            for name, stream in streams.items():
                for k in range(1 if name == "cover" else 9):
                    image = numbered(k, sizes[name], sizes[name])
                    file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
                file.mux(stream.encode())
        assert probe(path)[:2] == (96, 96) and len(images(path)) == 9
        assert probe(path).changed == ["other track"] * (order[0] != "large")


def interlaced(codec, order, n, size=64):
    """A function from an encoder to the packets of n interlaced pictures, in which a bar moves by 1 px each field.
    order: "tff" or "bff", which field is shown first. And the pictures as they are stored (n,H,W,3) uint8.
    """
    fields = np.zeros((2 * n, size, size, 3), np.uint8)
    for k, field in enumerate(fields):
        field[:, k : k + 12] = 255
    upper = np.arange(size)[:, None, None] % 2 == 0
    stored = np.where(upper == (order == "tff"), fields[::2], fields[1::2])

    def encode(encoder):
        graph = av.filter.Graph()
        buffer = graph.add("buffer", f"video_size={size}x{size}:pix_fmt=rgb24:time_base=1/8")
        graph.link_nodes(buffer, graph.add("setfield", order), graph.add("buffersink")).configure()
        for k, image in enumerate(stored):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = k, Fraction(1, 8)
            graph.push(frame)
            frame = graph.pull()
            frame.pts = k
            yield from encoder.encode(frame)
        yield from encoder.encode()

    return encode, stored


def comb(image):
    """By how much rows differ from those between them, at most."""
    image = image.astype(int)
    return abs(2 * image[8:-8:2] - image[7:-9:2] - image[9:-7:2]).max() / 2


INTERLACED = [
    ("libx264", "yuv420p", ".mp4", {"qp": 1}),
    ("mpeg2video", "yuv422p", ".mkv", {"qscale": 2}),
    ("mpeg4", "yuv420p", ".avi", {"qscale": 2}),
    ("prores_ks", "yuv422p10le", ".mov", {}),
]


@pytest.mark.parametrize("codec, pixels, suffix, how", INTERLACED)
@pytest.mark.parametrize("order", ["tff", "bff"])
def test_interlaced_pictures_are_made_whole(tmp_path, order, codec, pixels, suffix, how):
    """A bar moves between the fields of a picture: a comb at its edges, which is gone, and the first field is shown."""
    path, (encode, stored) = tmp_path / f"a{suffix}", interlaced(codec, order, 17)
    with av.open(str(path), "w") as file:
        how = {k: str(v) for k, v in how.items()} | {"flags": "+ildct+ilme"}
        stream = file.add_stream(codec, rate=8, options=how)
        stream.width, stream.height, stream.pix_fmt = 64, 64, pixels
        for packet in encode(stream):
            file.mux(packet)
    got = images(path)
    assert comb(stored[8]) > 200 and max(map(comb, got[2:-2])) < 60 and len(got) == 17
    assert [round(f.seconds * 8) for f in read_frames(path)] == list(range(17))
    assert probe(path).changed == ["interlaced"]
    row = 30 + (order == "bff")  # of the first field
    left = [int((image[row].mean(-1) > 127).argmax()) for image in got]  # where the bar begins
    assert all(abs(x - 2 * k) <= 1 for k, x in enumerate(left))


@pytest.mark.parametrize("sizes", [(64, 32), (32, 64), (64, 256)])
def test_interlaced_pictures_may_change_their_size(tmp_path, sizes):
    packets = []
    for size in sizes:
        encoder = av.CodecContext.create("mpeg2video", "w")
        encoder.width = encoder.height = size
        encoder.pix_fmt, encoder.time_base, encoder.framerate = "yuv420p", Fraction(1, 25), 25
        encoder.options = {"flags": "+ildct+ilme", "bf": "0", "qscale": "2"}
        packets += map(bytes, interlaced(encoder, "tff", 8, size)[0](encoder))
    with av.open(str(tmp_path / "a.mkv"), "w") as file:
        stream = file.add_stream("mpeg2video", rate=25)
        stream.width, stream.height, stream.pix_fmt = sizes[0], sizes[0], "yuv420p"
        for k, raw in enumerate(packets):
            packet = av.Packet(raw)
            packet.stream, packet.time_base, packet.pts, packet.dts = stream, Fraction(1, 25), k, k
            file.mux(packet)
    frames = list(read_frames(tmp_path / "a.mkv"))
    assert {frame.size for frame in frames} == {(size, size) for size in sizes} and len(frames) >= 15
    for frame in frames:
        row = np.asarray(frame.image)[frame.size[1] // 2].mean(-1) > 127
        assert 10 <= row.sum() <= 14 and row.argmax() <= 18


ALPHA = [
    ("libvpx", "yuva420p", ".webm"),
    ("qtrle", "argb", ".mov"),
    ("png", "rgba", ".mov"),
    ("ffv1", "bgra", ".mkv"),
    ("utvideo", "gbrap", ".avi"),
    ("prores_ks", "yuva444p10le", ".mov"),
    ("libvpx-vp9", "yuva420p", ".webm"),
]


@pytest.mark.parametrize("codec, pixels, suffix", ALPHA)
def test_transparent_clips_are_on_white(tmp_path, codec, pixels, suffix):
    image = np.full((64, 64, 4), (200, 30, 30, 255), np.uint8)
    image[:32, :, 3], image[48:, :, 3] = 0, 128
    how = {"auto-alt-ref": 0} if codec == "libvpx" else {}
    path = write_clip(tmp_path / f"a{suffix}", [image] * 5, codec, pixels=pixels, **how)
    got = images(path)[2]
    assert (
        off(got[16, 32], 255) <= 6 and off(got[40, 32], (200, 30, 30)) <= 6 and off(got[58, 32], (227, 142, 142)) <= 6
    )
    assert "alpha" in probe(path).changed


RED, GREEN = (200, 40, 40), (40, 170, 60)
TRANSPARENT_PNGS = {  # bits, colour type, two pixels, the chunks before them; the second pixel is hidden, or half
    "grey 8": (8, 0, b"\x80\x40", {b"tRNS": b"\0\x40"}, [(128,) * 3, (255,) * 3]),
    "grey 16": (16, 0, b"\x80\0\x40\0", {b"tRNS": b"\x40\0"}, [(128,) * 3, (255,) * 3]),
    "grey 16, alpha": (16, 4, b"\x80\0\xff\xff\x40\0\0\0", {}, [(128,) * 3, (255,) * 3]),
    "colour 8": (8, 2, bytes(RED + GREEN), {b"tRNS": b"\0\x28\0\xaa\0\x3c"}, [RED, (255,) * 3]),
    "colour 16": (
        16,
        2,
        bytes(v for c in RED + GREEN for v in (c, 0)),
        {b"tRNS": b"\x28\0\xaa\0\x3c\0"},
        [RED, (255,) * 3],
    ),
    "palette": (8, 3, b"\0\1", {b"PLTE": bytes(RED + GREEN), b"tRNS": b"\xff\x80"}, [RED, (147, 212, 157)]),
}


def test_exif_of_a_clips_frames_does_not_stop_it(tmp_path):
    """It is side data of a kind that is newer than PyAV's list; FFmpeg makes a rotation of it."""
    exif, jpeg = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(np.array([RED, GREEN], np.uint8).repeat(32, 0)[None].repeat(64, 0)).save(jpeg, "JPEG", exif=exif)
    with av.open(str(tmp_path / "a.avi"), "w") as file:
        stream = file.add_stream("mjpeg", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p"
        for k in range(5):
            packet = av.Packet(jpeg.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, k, k, Fraction(1, 8)
            file.mux(packet)
    image = images(tmp_path / "a.avi")[4]
    assert off(image[8, 32], RED) <= 6 and off(image[56, 32], GREEN) <= 6


@pytest.mark.parametrize("kind", TRANSPARENT_PNGS)
def test_transparent_pngs_are_on_white(tmp_path, kind):
    bits, colour, pixels, chunks, want = TRANSPARENT_PNGS[kind]
    half = len(pixels) // 2
    row = b"\0" + pixels[:half] * 16 + pixels[half:] * 16
    chunks = {b"IHDR": struct.pack(">IIBBBBB", 32, 32, bits, colour, 0, 0, 0)} | chunks
    media.write_png(tmp_path / "a.png", row * 32, chunks)
    assert off(patches(video.open_photo(tmp_path / "a.png"), 2), want) <= 1 and probe(tmp_path / "a.png").notes == [
        "alpha"
    ]


@pytest.mark.parametrize("form, how", [("WEBP", {"lossless": True}), ("PNG", {}), ("GIF", {})])
def test_animated_images_are_clips(tmp_path, form, how):
    frames, path = [Image.fromarray(numbered(k)) for k in range(12)], tmp_path / f"a.{form.lower()}"
    frames[0].save(path, form, save_all=True, append_images=frames[1:], duration=[50] * 6 + [100] * 6, **how)
    assert shown(path) == [(round(0.05 * k if k < 6 else 0.3 + 0.1 * (k - 6), 3), k) for k in range(12)]
    assert {"animated", "variable rate"} <= {*probe(path).notes}
    path.with_suffix(".txt").write_text("bars")
    (item,), _ = scanning.scan(tmp_path, 64 * 64, 16, 9, 10)
    assert item.frames == 9 and [number(f) for f in next(cache.read_items([item]))[""]] == [0, 2, 4, 6, 7, 8, 9, 10, 11]
    Image.new("RGBA", (64, 64), (9, 9, 9, 0)).save(path, form, save_all=True, append_images=[frames[0]], duration=50)
    assert images(path)[0].min() == 255 and "alpha" in probe(path).notes


def test_a_picture_for_those_who_show_no_animations_is_not_in_the_clip(tmp_path):
    """As a PNG may begin with one."""
    frames, path = [Image.fromarray(numbered(k)) for k in range(5)], tmp_path / "a.png"
    frames[0].save(path, "PNG", save_all=True, append_images=frames[1:], duration=100, default_image=True)
    assert shown(path) == [(round(0.1 * k, 3), k + 1) for k in range(4)] and len(probe(path).times) == 4


def test_pixels_that_are_not_square_are_made_square(tmp_path):
    circle = np.hypot(*(np.mgrid[:64, :64] - 31.5)) < 20
    image = np.repeat(circle[..., None] * np.uint8(255), 3, 2)
    for aspect, size in ((Fraction(2), (128, 64)), (Fraction(1, 2), (32, 64))):
        with av.open(str(tmp_path / "a.mp4"), "w") as file:
            stream = file.add_stream("libx264", rate=8)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            stream.codec_context.sample_aspect_ratio = aspect
            for _ in range(5):
                file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            file.mux(stream.encode())
        frame = next(read_frames(tmp_path / "a.mp4"))
        inside = frame.shown().mean(-1) > 127
        assert frame.size == size and inside.shape == size[::-1]
        assert abs(inside.any(0).sum() - 40 * aspect) <= 2 and abs(inside.any(1).sum() - 40) <= 2


def test_s2v_follows_a_pose_video_by_time(tmp_path):
    """At a constant rate every second, third, ... frame as officially; else what is shown at 16 per second."""
    times = [*(k / 30 for k in range(30)), *(1 + k / 10 for k in range(20))]
    for name, shown_at in (("vary.mp4", times), ("even.mp4", [k / 48 for k in range(60)])):
        write_timed(tmp_path / name, [numbered(k, 64, 32) for k in range(len(shown_at))], shown_at, aspect=2)
        speech = object.__new__(SpeechVideo)
        vars(speech).update(pose=str(tmp_path / name), count=2, frames=20, size=(64, 64))
        speech.pose_times = speech._pose_times()
        poses = torch.cat([speech._read_pose(r) for r in range(2)])  # (T,3,64,64), of square pixels
        numbers = [number(((pose.permute(1, 2, 0) + 1) * 127.5).numpy()) for pose in poses]
        if name == "even.mp4":
            assert numbers == list(range(0, 60, 3))
        else:
            assert len(numbers) == 40 and max(abs(times[n] - k / 16) for k, n in enumerate(numbers)) <= 0.05 + 1e-6


# ---- colours of clips ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("code, matrix", [(1, BT709), (4, FCC), (5, BT601), (6, BT601), (7, SMPTE240M)])
def test_tagged_colours_are_what_their_tags_say(tmp_path, code, matrix, full):
    frames = [yuv_frame(COLORS, matrix, full=full)] * 5
    path = write_clip(tmp_path / "a.mkv", frames, pixels="yuv444p", qp=0, tags=(1, 1, code, 1 + full))
    assert off(patches(images(path)[0], 5), COLORS) <= 2 and not probe(path).changed and not probe(path).notes


@pytest.mark.parametrize("codec, suffix, how", [("libx264", ".mp4", {"qp": 1}), ("ffv1", ".mkv", {})])
@pytest.mark.parametrize("height, matrix", [(64, BT601), (576, BT601), (720, BT709), (1088, BT709)])
def test_untagged_colours_are_bt709_from_720_lines_on(tmp_path, codec, suffix, how, height, matrix):
    frames = [yuv_frame(COLORS, matrix, height)] * 5
    path = write_clip(tmp_path / f"a{suffix}", frames, codec, pixels="yuv444p", **how)
    assert off(patches(images(path)[0], 5), COLORS) <= 3
    assert "untagged" in probe(path).notes and probe(path).changed == ["untagged"] * (height >= 720)


@pytest.mark.parametrize("tags, matrix, notes", [((1, 1, 1, 1), BT709, []), ((9, 14, 9, 1), BT2020, ["wide gamut"])])
def test_colours_that_the_container_alone_names(tmp_path, tags, matrix, notes):
    """ProRes has tags of its own, which say nothing here."""
    colors = [255 * wide(c) ** (1 / 2.4) for c in COLORS] if matrix is BT2020 else COLORS
    frames = [yuv_frame(colors, matrix, bits=10).reformat(format="yuv422p10le") for _ in range(3)]
    path = write_clip(tmp_path / "a.mov", frames, "prores_ks", pixels="yuv422p10le", tags=tags)
    with av.open(str(path)) as file:
        assert next(file.decode(video=0)).colorspace == 2
    assert off(patches(images(path)[0], 5), COLORS) <= 4 and probe(path).changed == ["tagged outside", *notes]


TO_2020 = [[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]  # ITU-R BT.2087


def wide(color):
    """Linear BT.2020 of an SDR colour, 1 being white."""
    return np.array(TO_2020) @ (np.array(color) / 255) ** 2.4


def hlg(color):
    """An SDR colour in HLG by ITU-R BT.2408: white at 203 cd/m2 of a display of 1000."""
    light = wide(color) * 203 / 1000
    scene = light * (light @ [0.2627, 0.678, 0.0593]) ** (1 / 1.2 - 1)
    curve = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return 255 * np.where(scene <= 1 / 12, np.sqrt(3 * scene), curve)


def pq(color, white=203):
    power = (wide(color) * white / 10000) ** (2610 / 16384)
    return 255 * ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


# what zscale makes of HLG with its default, by which a display's gamma is applied to each channel
ZSCALED = [(220, 0, 27), (0, 174, 41), (0, 55, 239), (128, 128, 128), (241, 241, 241)]


@pytest.mark.parametrize("transfer, signal, want", [(18, hlg, ZSCALED), (16, pq, COLORS)])
def test_hdr_is_tone_mapped(tmp_path, transfer, signal, want):
    frames = [yuv_frame([signal(c) for c in COLORS], BT2020, bits=10)] * 5
    path = write_clip(tmp_path / "a.mp4", frames, pixels="yuv444p10le", qp=0, tags=(9, transfer, 9, 1))
    assert off(patches(images(path)[0], 5), want) <= 3
    assert probe(path).changed == ["HDR"]


def test_hdr_of_a_narrow_gamut(tmp_path):
    """As some cameras record HLG: with BT.709's primaries and matrix."""
    light = (np.array(COLORS) / 255) ** 2.4 * 203 / 1000
    scene = light ** (1 / 1.2)
    curve = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    signal = 255 * np.where(scene <= 1 / 12, np.sqrt(3 * scene), curve)
    frames = [yuv_frame(signal, BT709, bits=10)] * 5
    path = write_clip(tmp_path / "a.mp4", frames, pixels="yuv444p10le", qp=0, tags=(1, 18, 1, 1))
    assert off(patches(images(path)[0], 5), COLORS) <= 3 and probe(path).changed == ["HDR"]


def test_what_is_brighter_than_white_is_white(tmp_path):
    frames = [yuv_frame([pq((255, 255, 255), nits) for nits in (100, 203, 400, 1000, 4000)], BT2020, bits=10)] * 5
    path = write_clip(tmp_path / "a.mkv", frames, pixels="yuv444p10le", qp=0, tags=(9, 16, 9, 1))
    got = patches(images(path)[0], 5)
    assert off(got[0], 255 * (100 / 203) ** (1 / 2.4)) <= 2 and off(got[1:], 255) <= 2


def test_a_wide_gamut_is_converted(tmp_path):
    frames = [yuv_frame([255 * wide(c) ** (1 / 2.4) for c in COLORS], BT2020, bits=10)] * 5
    path = write_clip(tmp_path / "a.mp4", frames, pixels="yuv444p10le", qp=0, tags=(9, 14, 9, 1))
    assert off(patches(images(path)[0], 5), COLORS) <= 2 and probe(path).changed == ["wide gamut"]
    # Display P3: 709's red is (0.8225, 0.0332, 0.0171) of it, in linear light
    p3 = [255 * v ** (1 / 2.4) for v in (0.8225, 0.0332, 0.0171)]
    path = write_clip(tmp_path / "b.mov", [yuv_frame([p3], BT709)] * 5, pixels="yuv444p", qp=0, tags=(12, 1, 1, 1))
    assert off(patches(images(path)[0], 1), (255, 0, 0)) <= 8


@pytest.mark.parametrize(
    "tags, message",
    [
        ((1, 1, 8, 1), "matrix 8 of H.273"),
        ((9, 14, 10, 1), "matrix 10 of H.273"),
        ((1, 8, 1, 1), "linear light"),
        ((1, 9, 1, 1), "a logarithm"),
    ],
)
def test_colours_that_cannot_be_converted_are_refused(tmp_path, tags, message):
    path = write_clip(tmp_path / "a.mkv", [yuv_frame(COLORS, BT709)] * 5, pixels="yuv444p", tags=tags)
    with pytest.raises(Skip, match=message):
        probe(path)


# ---- colours of photographs ------------------------------------------------------------------------------------------
P3 = (0.68, 0.32), (0.265, 0.69), (0.15, 0.06)
ADOBE = (0.64, 0.33), (0.21, 0.71), (0.15, 0.06)
SRGB = (0.64, 0.33), (0.3, 0.6), (0.15, 0.06)
SKIN = [*COLORS[:3], (224, 172, 140)]


def stored(colors, primaries, gamma):
    """sRGB colours as pixels (n,3) uint8 for other primaries and a gamma, or sRGB's curve if that is None."""

    def to_xyz(points):
        columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in (*points, (0.3127, 0.329))]).T
        return columns[:, :3] * np.linalg.solve(columns[:, :3], columns[:, 3])

    v = np.array(colors) / 255
    light = np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)
    light = np.clip(light @ (np.linalg.inv(to_xyz(primaries)) @ to_xyz(SRGB)).T, 0, 1)
    srgb = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    return (255 * (light ** (1 / gamma) if gamma else srgb)).round()


def photo(path, pixels, **how):
    image = np.asarray(pixels, np.uint8).repeat(16, 0)[None].repeat(32, 0)
    Image.fromarray(image, **how.pop("mode", {})).save(path, **how)
    return path


@pytest.mark.parametrize("primaries, gamma", [(P3, 2.2), (ADOBE, 563 / 256)])
@pytest.mark.parametrize(
    "name, how", [("a.jpg", {"quality": 95, "subsampling": 0}), ("a.png", {}), ("a.webp", {"lossless": True})]
)
def test_profiles_are_converted_to_srgb(tmp_path, primaries, gamma, name, how):
    profile = media.matrix_profile(primaries, gamma)
    path = photo(tmp_path / name, stored(SKIN, primaries, gamma), icc_profile=profile, **how)
    assert off(patches(Image.open(path), 4), SKIN) > 10
    assert off(patches(video.open_photo(path), 4), SKIN) <= 4
    for given in (path, Image.open(path)):
        assert off(patches(video.open_image(given), 4), SKIN) <= 4
    assert probe(path).changed == ["colour profile"]


def chromaticities(primaries):
    return struct.pack(">8I", *(round(v * 1e5) for point in ((0.3127, 0.329), *primaries) for v in point))


def png(path, pixels, chunks, bits=8):
    """A PNG of patches (n,3) with chunks {name: bytes} before its pixels."""
    row = b"\0" + np.asarray(pixels).astype(f">u{bits // 8}").repeat(16, 0).tobytes()
    head = struct.pack(">IIBBBBB", 16 * len(pixels), 32, bits, 2, 0, 0, 0)
    media.write_png(path, row * 32, {b"IHDR": head} | chunks)
    return path


@pytest.mark.parametrize("primaries, gamma", [(None, 1.0), (P3, 2.2), (ADOBE, 1.8)])
def test_a_pngs_gamma_and_primaries_are_converted_to_srgb(tmp_path, primaries, gamma):
    chunks = {b"gAMA": struct.pack(">I", round(1e5 / gamma))}
    chunks |= {b"cHRM": chromaticities(primaries)} if primaries else {}
    path = png(tmp_path / "a.png", stored(SKIN, primaries or SRGB, gamma), chunks)
    assert off(patches(Image.open(path).convert("RGB"), 4), SKIN) > 10
    for given in (path, Image.open(path)):
        assert off(patches(video.open_image(given), 4), SKIN) <= 4
    assert probe(path).changed == ["colour profile"]


def test_a_pngs_gamma_gives_way_to_what_says_more(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3))
    plain = video.open_photo(png(tmp_path / "a.png", pixels, {}))
    linear, wide = {b"gAMA": struct.pack(">I", 100000)}, {b"cHRM": chromaticities(P3)}
    profile = b"P3\0\0" + zlib.compress(media.matrix_profile(P3, 2.2))
    for chunks, note in (
        ({b"gAMA": struct.pack(">I", 45455), b"cHRM": chromaticities(SRGB)}, []),
        (wide, []),  # which alone do not say how light is stored
        ({b"sRGB": b"\0"} | linear | wide, []),
        ({b"cICP": bytes([1, 13, 0, 1])} | linear, []),
        ({b"gAMA": bytes(4)}, ["unusable profile"]),
        (linear | {b"cHRM": bytes(32)}, ["unusable profile"]),
    ):
        path = png(tmp_path / "b.png", pixels, chunks)
        assert np.array_equal(video.open_photo(path), plain) and probe(path).changed == note, chunks
    path = png(tmp_path / "c.png", stored(SKIN, P3, 2.2), {b"iCCP": profile} | linear)
    assert off(patches(video.open_photo(path), 4), SKIN) <= 4


def test_a_pngs_codes_are_read_first(tmp_path):
    """Its cICP: Display P3; HDR by PQ, in 16 bits; on its side by EXIF, too."""
    linear = {b"gAMA": struct.pack(">I", 100000)}
    path = png(tmp_path / "a.png", stored(SKIN, P3, None), {b"cICP": bytes([12, 13, 0, 1])} | linear)
    assert off(patches(video.open_photo(path), 4), SKIN) <= 3 and probe(path).changed == ["wide gamut"]
    pixels = np.array([pq(c) for c in COLORS])
    path = png(tmp_path / "b.png", (pixels * 257).round(), {b"cICP": bytes([9, 16, 0, 1])}, bits=16)
    assert off(patches(video.open_photo(path), 5), COLORS) <= 3 and probe(path).changed == ["HDR"]
    turned = {b"eXIf": b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"}
    path = png(tmp_path / "c.png", [RED, GREEN], {b"cICP": bytes([1, 13, 0, 1])} | turned)
    upright = video.open_photo(path)
    assert (
        upright.size == (32, 32) and off(upright.getpixel((16, 4)), RED) == off(upright.getpixel((16, 28)), GREEN) == 0
    )
    with pytest.raises(Skip, match="linear light"):
        probe(png(tmp_path / "d.png", [RED, GREEN], {b"cICP": bytes([1, 8, 0, 1])}))


def test_a_grey_picture_and_a_transparent_one_have_profiles_too(tmp_path):
    grey = media.profile(b"GRAY", {b"wtpt": b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061),
                                   b"kTRC": struct.pack(">4sIIH", b"curv", 0, 1, 256)})  # fmt: skip
    path = photo(tmp_path / "a.png", [0, 55, 255], icc_profile=grey)  # linear: 0.216 is 128 in sRGB
    assert off(patches(video.open_photo(path), 3), [[0] * 3, [128] * 3, [255] * 3]) <= 2
    pixels = np.concatenate([stored(SKIN, P3, 2.2), [[255], [255], [0], [255]]], 1)
    path = photo(tmp_path / "b.png", pixels, icc_profile=media.matrix_profile(P3, 2.2))
    assert off(patches(video.open_photo(path), 4), [*SKIN[:2], (255, 255, 255), SKIN[3]]) <= 3


def test_printers_colours_are_converted_by_their_profile(tmp_path):
    """Whose cyan is a green here, and whose black falls evenly in lightness: half of it is L* 50, which is 119."""

    def lab(ink):
        rest = 1 - ink[3]
        return 100 * rest * (1 - 0.4 * ink[0]), -60 * ink[0] * rest, 50 * ink[0] * rest

    path = tmp_path / "a.jpg"
    inks = [(0, 0, 0, 0), (0, 0, 0, 127), (0, 0, 0, 255), (255, 0, 0, 0)]
    pixels = np.array(inks, np.uint8).repeat(16, 0)[None].repeat(32, 0)
    Image.fromarray(pixels, "CMYK").save(path, quality=100, icc_profile=media.cmyk_profile(lab))
    *greys, green = patches(video.open_photo(path), 4)
    assert off(greys, [[255] * 3, [119] * 3, [0] * 3]) <= 4
    assert green[1] > 60 + max(green[0], green[2]) and probe(path).changed == ["colour profile"]


def test_a_profile_that_says_nothing_new_changes_nothing(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3))
    plain = video.open_photo(photo(tmp_path / "a.png", pixels))
    for name, profile, note in (("b.png", srgb, []), ("c.png", b"no profile", ["unusable profile"])):
        path = photo(tmp_path / name, pixels, icc_profile=profile)
        assert np.array_equal(video.open_photo(path), plain)
        assert probe(path).changed == note


# ---- what is written -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("height, width", [(64, 160), (704, 1280)])
def test_what_is_written_is_bt709_and_says_so(tmp_path, height, width):
    image = np.array(COLORS, np.uint8).repeat(width // 5, 0)[None].repeat(height, 0)
    tensor = torch.from_numpy(image / 127.5 - 1).permute(2, 0, 1)[:, None].repeat(1, 3, 1, 1).float()
    write_mp4(tmp_path / "a.mp4", tensor, 8)
    with av.open(str(tmp_path / "a.mp4")) as file:
        frame = next(file.decode(video=0))
        context = file.streams.video[0].codec_context
        tags = context.color_primaries, context.color_trc, context.colorspace, context.color_range
        assert context.name == "h264" and context.pix_fmt == "yuv420p" and tags == (1, 1, 1, 1)
        y, cb, cr = (np.frombuffer(p, np.uint8).reshape(-1, p.line_size) for p in frame.planes)
    for i, color in enumerate(COLORS):  # by hand
        x = int((i + 0.5) * width / 5)
        stored = y[height // 2, x], cb[height // 4, x // 2], cr[height // 4, x // 2]
        assert off(stored, media.yuv(color, BT709)) <= 2
    assert off(patches(images(tmp_path / "a.mp4")[0], 5), COLORS) <= 3
    raw = (tmp_path / "a.mp4").read_bytes()
    assert raw.index(b"moov") < raw.index(b"mdat")


# ---- sound -----------------------------------------------------------------------------------------------------------
def write_clicks(path, at, seconds, left_out=(0, 0), codec="aac", rate=48000):
    """A sound of silence with clicks at these times, without the packets that begin within `left_out`, as when a
    recorder loses them.
    """
    samples = np.random.default_rng(0).normal(0, 0.001, round(seconds * rate)).astype(np.float32)
    for t in at:
        samples[round(t * rate) : round(t * rate) + rate // 200] = 0.8
    with av.open(str(path), "w") as file:
        stream, packets = file.add_stream(codec, rate=rate, layout="mono"), []
        for begin in range(0, len(samples), 1024):
            frame = av.AudioFrame.from_ndarray(samples[None, begin : begin + 1024], "fltp", "mono")
            if codec != "aac":
                frame = av.AudioFrame.from_ndarray(
                    (samples[None, begin : begin + 1024] * 32767).astype("i2"), "s16", "mono"
                )
            frame.sample_rate, frame.pts, frame.time_base = rate, begin, Fraction(1, rate)
            packets += stream.encode(frame)
        for packet in packets + stream.encode():
            if not left_out[0] <= packet.pts * packet.time_base < left_out[1]:
                file.mux(packet)
    return path


def clicks(samples, rate):
    """Seconds at which clicks begin in samples (N,)."""
    loud = np.flatnonzero(np.asarray(samples) > 0.4) / rate
    return [round(float(t), 3) for t, before in zip(loud, [-1, *loud]) if t - before > 0.1]


@pytest.mark.parametrize("codec, suffix", [("aac", ".mp4"), ("aac", ".mkv"), ("pcm_s16le", ".mkv")])
@pytest.mark.parametrize("gap", [(1.5, 2.2), (1.5, 1.52), (0, 0)])
def test_sounds_stay_where_their_times_put_them(tmp_path, codec, suffix, gap):
    path = write_clicks(tmp_path / f"a{suffix}", (1.0, 2.5, 3.4), 4, gap, codec)
    begin, samples = read_sound(path, 48000)
    assert np.allclose(clicks(samples[0], 48000), np.array([1, 2.5, 3.4]) - begin, atol=0.002)
    heard = clicks(read_audio(path), 16000)
    assert np.allclose(heard, np.array([1, 2.5, 3.4]) - begin, atol=0.002)
    assert video.is_sound_broken(path) == (gap[1] > 0)
    if gap == (1.5, 2.2):
        assert abs(samples[0, round(48000 * 1.6) : round(48000 * 2.1)]).max() == 0


def test_the_sound_that_is_written_keeps_its_gaps(tmp_path):
    source = write_clicks(tmp_path / "a.mkv", (0.5, 2.5), 3, (1.0, 1.8), "pcm_s16le")
    write_frames(tmp_path / "b.mp4", [np.zeros((48, 16, 16, 3), np.uint8)], 16, sound=source)
    begin, samples = media.read_sound(tmp_path / "b.mp4")
    assert np.allclose(clicks(samples, 48000), np.array([0.5, 2.5]) - begin, atol=0.003)


def test_where_pieces_of_sound_overlap_the_first_is_heard(tmp_path):
    path, rate = tmp_path / "a.mkv", 8000
    with av.open(str(path), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=rate, layout="mono")
        for begin, level in ((0, 8000), (6000, 16000)):
            frame = av.AudioFrame.from_ndarray(np.full((1, 8000), level, np.int16), "s16", "mono")
            frame.sample_rate, frame.pts, frame.time_base = rate, begin, Fraction(1, rate)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    _, samples = read_sound(path, rate)
    assert samples.shape == (1, 14000) and video.is_sound_broken(path)
    assert np.allclose(samples[0, :7990], 8000 / 32768, atol=1e-3) and np.allclose(samples[0, 8010:], 0.488, atol=1e-3)


def test_a_sound_with_a_damaged_clock_is_refused(tmp_path):
    path = write_clicks(tmp_path / "a.mkv", (), 200, (20, 190), "pcm_s16le", 8000)
    with pytest.raises(Skip, match=r"times jump from 20.* to 190.* s; 60 s at most"):
        read_sound(path, 16000)


# ---- decoded once, beside the encoding -------------------------------------------------------------------------------
@pytest.fixture
def decoded(monkeypatch):
    """The frames that are decoded and those that are converted, counted."""
    counts, real, image = {"decoded": 0, "converted": 0}, video.decode, video.upright_image

    def decode(*clip):
        for frame in real(*clip):
            counts["decoded"] += 1
            yield frame

    def upright_image(frame):
        counts["converted"] += 1
        return image(frame)

    monkeypatch.setattr(video, "decode", decode)
    monkeypatch.setattr(video, "upright_image", upright_image)
    return counts


def tiny_vae(folder, seed=7):
    vae = tiny.vae(False, seed=seed)
    torch.save(vae.state_dict(), folder / "VAE.pth")
    return vae


def test_a_clip_is_decoded_once_for_all_its_windows(tmp_path, decoded):
    write_clip(tmp_path / "a.mp4", [numbered(k) for k in range(200)], rate=24)
    (tmp_path / "a.txt").write_text("bars")
    items, _ = scanning.scan(tmp_path, 64 * 64, 16, 9, 16, "several")
    assert len(items) == 14 and decoded == {"decoded": 0, "converted": 0}
    vae = tiny_vae(tmp_path)
    assert not cache.cache_latents(items, tmp_path / "cache", tmp_path / "VAE.pth", lambda: vae)
    assert decoded["decoded"] <= 200 and decoded["converted"] == 14 * 9


def test_windows_are_what_each_is_by_itself(tmp_path):
    """Overlapping ones too."""
    write_clip(tmp_path / "a.mp4", [numbered(k) for k in range(60)], rate=24)
    windows = [[begin + k / 16 for k in range(9)] for begin in (0.0, 0.3, 0.31, 1.2)]
    draw = lambda frame: number(np.asarray(frame.image))  # noqa: E731
    together = list(read_windows(tmp_path / "a.mp4", windows, draw))
    assert together == [next(read_windows(tmp_path / "a.mp4", [w], draw)) for w in windows]
    assert all(abs(n / 24 - t) <= 0.5 / 24 + 1e-6 for w, ns in zip(windows, together) for t, n in zip(w, ns))


def clips(folder, n, frames=9):
    folder.mkdir(exist_ok=True)
    for i in range(n):
        write_clip(folder / f"{i:02d}.mp4", [numbered(k + i) for k in range(frames)])
        (folder / f"{i:02d}.txt").write_text("bars")
    return scanning.scan(folder, 64 * 64, 16, 9, 8)[0]


class StandIn(torch.nn.Module):
    """A VAE that costs nothing."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def encode(self, x):
        return x[:, :, :1, :8, :8].clone()


def wait_for(condition):
    for _ in range(600):
        if condition():
            return True
        time.sleep(0.1)
    return False


def test_no_more_samples_are_decoded_ahead_than_said(tmp_path, monkeypatch):
    """As many as can be while the first one is encoded, which waits for them, and no more."""
    items, read, waited = clips(tmp_path / "d", 24), [], []
    (tmp_path / "VAE.pth").write_bytes(b"weights")
    real, most = cache.read_items, 2 * cache.DECODERS + 1

    def read_items(*args):
        for sample in real(*args):
            read.append(sample)
            yield sample

    class Encoding(StandIn):
        def encode(self, x):
            if not waited:
                waited.append(wait_for(lambda: len(read) >= most))
                time.sleep(0.5)
                waited.append(len(read))
            return super().encode(x)

    monkeypatch.setattr(cache, "read_items", read_items)
    cache.cache_latents(items, tmp_path / "cache", tmp_path / "VAE.pth", Encoding)
    assert waited == [True, most] and len(read) == 24


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_an_interrupted_cache_keeps_what_it_has(tmp_path, error):
    items = clips(tmp_path / "d", 20)
    (tmp_path / "VAE.pth").write_bytes(b"weights")

    class Interrupted(StandIn):
        count = 0

        def encode(self, x):
            self.count += 1
            if self.count == 6:
                raise error
            return super().encode(x)

    with pytest.raises(error):
        cache.cache_latents(items, tmp_path / "cache", tmp_path / "VAE.pth", Interrupted)
    assert not [thread for thread in threading.enumerate() if thread.name == "decoder"]
    kept = list((tmp_path / "cache").glob("*.safetensors"))
    assert len(kept) == 5 and not list((tmp_path / "cache").glob(".tmp*"))
    calls = []
    cache.cache_latents(items, tmp_path / "cache", tmp_path / "VAE.pth", StandIn, seen=lambda *_: calls.append(1))
    assert len(calls) == 15


def test_an_error_while_saving_is_raised(tmp_path, monkeypatch):
    items = clips(tmp_path / "d", 4)
    (tmp_path / "VAE.pth").write_bytes(b"weights")

    def full(*_):
        raise OSError(28, "No space left on device", "cache")

    monkeypatch.setattr(cache, "save", full)
    with pytest.raises(OSError, match="No space left"):
        cache.cache_latents(items, tmp_path / "cache", tmp_path / "VAE.pth", StandIn)


def test_caches_of_what_was_read_rightly_before_are_still_hit(tmp_path):
    """Their names are what they were; those of what is read otherwise now are not."""
    write_mp4(tmp_path / "a.mp4", torch.zeros(3, 9, 64, 64), 8)
    frames = [yuv_frame([(9, 99, 99)] * 2, BT2020, bits=10)] * 9
    write_clip(tmp_path / "b.mp4", frames, pixels="yuv444p10le", tags=(9, 18, 9, 1))
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("x")
    (tmp_path / "VAE.pth").write_bytes(b"weights")
    items, _ = scanning.scan(tmp_path, 64 * 64, 16, 9, 8)
    for item, file in zip(items, cache.latent_files(items, tmp_path, tmp_path / "VAE.pth")):
        parts = dict(media=item.digest, size=item.bucket, start=0.0, fps=8, vae=cache.digest(tmp_path / "VAE.pth"))
        before = cache.cache_file(tmp_path, **parts, dtype="fp32", conditioning="")
        assert (file == before) == (item.path.name == "a.mp4")


# ---- what is said of it ----------------------------------------------------------------------------------------------
def test_the_report_says_what_was_done(tmp_path):
    frames = [numbered(k, 32, 64) for k in range(40)]
    write_clip(tmp_path / "a.mp4", frames, tags=(1, 1, 1, 1), matrix=(-1, 0, 0, 1))
    write_clip(tmp_path / "b.mp4", frames[:9])
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.txt").write_text("word " * 20)
    Image.new("RGBA", (64, 32)).save(tmp_path / "c.png")
    (tmp_path / "c.txt").write_text("nothing")
    (tmp_path / "d.mp4").write_bytes(b"x")

    class Words:
        def clean(self, text):
            return text

        def ids(self, text):
            return text.split() * 100

    items, skipped = scanning.scan(tmp_path, 96 * 48, 48, 9, 8)
    found = report.describe_items(items, skipped, Words())
    assert found["notes"] == {"untagged": 1, "mirrored": 1, "alpha": 1} and found["several captions"] == 1
    assert found["long captions"]["files"] == 1 and found["long captions"]["worst"] == 2001
    assert found["cut off"]["files"] == 1 and found["cut off"]["frames"] == 9
    assert abs(found["cut off"]["used"] - 9 / 40) < 1e-6
    assert items[0].bucket[:2] == (96, 48) and found["enlarged"]["files"] == 3
    assert found["enlarged"]["worst"] == 1.5 and found["cropped"]["worst"] < 0.01
    lines = report.text(found)
    wanted = (
        "3 files, 1 skipped",
        "mirrored, read mirrored: 1",
        "put on white: 1",
        "over 512 tokens",
        "22% of them used",
    )
    for line in (*wanted, "enlarged: 3, 1.5 times on average", "d.mp4: has no caption"):
        assert line in lines


def test_the_report_measures_what_is_cropped(tmp_path):
    Image.new("RGB", (128, 72)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("x")
    items, _ = scanning.scan(tmp_path, 64 * 64, 32, 9, 8)
    (w, h, _), found = items[0].bucket, report.describe_items(items, [])
    scale = max(w / 128, h / 72)
    assert (
        math.isclose(found["cropped"]["worst"], 1 - w * h / (128 * 72 * scale**2)) and found["cropped"]["worst"] > 0.3
    )


def test_the_sheet_shows_what_is_cached(tmp_path):
    items = clips(tmp_path / "d", 30, frames=13)
    (tmp_path / "VAE.pth").write_bytes(b"weights")
    sheets = [report.DataSheet(items) for _ in range(2)]
    cache.cache_latents(items, tmp_path / "cache", tmp_path / "VAE.pth", StandIn, seen=sheets[0].add)
    assert len(sheets[0].items) <= 24 and len(sheets[0].frames) == len(sheets[0].items)
    for sheet, name in zip(sheets, "ab"):  # from what was decoded for the cache, and decoded again
        sheet.write(tmp_path / f"{name}.png")
    a, b = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in "ab")
    assert np.array_equal(a, b) and a.std() > 10
    before = (tmp_path / "a.png").stat().st_mtime_ns
    sheets[1].write(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_mtime_ns == before
    report.DataSheet(items[1:]).write(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_mtime_ns != before


# ---- damaged files ---------------------------------------------------------------------------------------------------
def seeds(folder):
    """Small files of several kinds."""
    hdr = [yuv_frame([hlg(c) for c in COLORS], BT2020, bits=10)] * 9
    yield write_clip(folder / "a.mp4", hdr, pixels="yuv444p10le", tags=(9, 18, 9, 1))
    bars = [numbered(k) for k in range(12)]
    yield write_clip(folder / "b.avi", bars, bf=2)
    yield write_clip(folder / "c.mkv", bars, "mpeg4", b_frames=1)
    pictures = [Image.fromarray(bar) for bar in bars]
    for name in ("d.webp", "e.png"):
        pictures[0].save(folder / name, save_all=True, append_images=pictures[1:], duration=40)
        yield folder / name
    yield photo(folder / "f.jpg", stored(SKIN, P3, 2.2), icc_profile=media.matrix_profile(P3, 2.2))


def test_damaged_files_are_read_or_refused(tmp_path):
    """Nothing but a Skip, whatever is wrong, and no picture that is no picture."""
    rng = np.random.default_rng(0)
    files = [(path.suffix, path.read_bytes()) for path in seeds(tmp_path)]
    for trial in range(60):
        suffix, raw = files[trial % len(files)]
        raw = bytearray(raw[: rng.integers(1, len(raw))] if trial % 3 == 0 else raw)
        for at in rng.integers(0, len(raw), rng.integers(1, 9)):
            raw[at] = rng.integers(0, 256)
        path = tmp_path / f"damaged{suffix}"
        path.write_bytes(raw)
        with contextlib.suppress(Skip):
            for frame, _ in zip(read_frames(path), range(50)):
                assert frame.shown().dtype == np.uint8 and frame.seconds >= 0
