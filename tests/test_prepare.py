"""prepare.py: the rules of the official preprocessing, and the folder that comes out.

tests/data/prepare.safetensors was made by running the official wan/modules/animate/preprocess (commit 42bf4cfa) with
OpenCV 4.11 on the inputs that this file makes: utils' get_frame_indices, resize_by_area, get_face_bboxes (with
cv2.resize, one pixel of 32 by 32 kept), get_mask_body_img and get_aug_mask; draw_aapose_by_meta_new of keypoints
(bytes packed by zlib); and what Pose2d finds with the networks of `write_networks`.
"""

import json
import sys
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from helpers.media import read_sound, write_timed
from PIL import Image

from benchmarks.tiny_animate import frames, write_video
from nanowan.errors import BadInput
from nanowan.formats.header import load
from nanowan.variants.animate import prepare
from nanowan.variants.animate.inputs import (
    FACE_SIDE,
    area_size,
    face_crop,
    fit_frame,
    frame_indices,
    grow_mask,
    letterbox,
    letterbox_place,
    read_source,
    resize,
)
from nanowan.variants.animate.pose import Networks, draw_pose, largest_person, suppress
from nanowan.video import read_frames, sound_delay, write_frames

FILE = Path(__file__).parent / "data" / "prepare.safetensors"
FIGURES = load(FILE)[0] if FILE.exists() else {}
RATES = [(81, 16, 30), (81, 30, 30), (100, 29.97, 30), (113, 23.976, 30), (57, 60, 30), (91, 25, 25), (7, 30, 12)]
SIZES = [(96, 64, 48 * 32), (100, 60, 48 * 32), (48, 32, 96 * 64), (90, 61, 64 * 64), (30, 50, 1000)]
SIZE_FIGURES = [*SIZES, (832, 480, 832 * 480), (1280, 720, 832 * 480), (1024, 1024, 1280 * 720)]
GROWTHS = [(3, 7, 1, 1), (1, 3, 4, 5), (2, 5, 3, 2), (3, 7, 10, 20)]
CANVASES = [(200, 160), (620, 610)]


def landmarks(seed, width=320, height=200):
    """69 points of a face as shares of a picture, some outside of it."""
    generator = np.random.default_rng(seed)
    return (generator.random((69, 2)) * generator.uniform(0.2, 0.6, 2) + generator.uniform(-0.05, 0.6, 2)) * 0.95


def rough_mask(seed):
    generator = np.random.default_rng(seed)
    mask = (generator.random((64, 96)) < 0.002).astype(np.uint8)
    mask[20:30, 30:50] = generator.random((10, 20)) < 0.1
    return mask


def person(width, height, seed=0):
    """Keypoints (133,3) inside of a picture, one in four unsure."""
    generator = np.random.default_rng(seed)
    points = generator.random((133, 2)) * [width - 10, height - 10] + 5
    return np.concatenate([points, generator.random((133, 1)) * 0.6 + 0.35], 1)


def write_networks(folder, seed=0):
    """Stand-ins for yolov10m and vitpose with their inputs and outputs: 100 boxes, classes 0 to 2, that move with the
    colours of the picture's parts; Gaussians around points that move with its mean colour, and how sure they are.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    generator, consts = np.random.default_rng(seed), {}

    def model(file, shape, out, nodes):
        tensors = [numpy_helper.from_array(np.asarray(v), name) for name, v in consts.items()]
        ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("images", shape), ("out", out))]
        graph = helper.make_graph(
            [helper.make_node(op, i, [o], **kw) for op, i, o, kw in nodes], "g", *[[e] for e in ends]
        )
        graph.initializer.extend(tensors)
        file.parent.mkdir(parents=True)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), file)
        consts.clear()

    low, side = generator.uniform(0, 400, (100, 2)), generator.uniform(20, 240, (100, 2))
    scores, classes = generator.uniform(0, 0.9, (100, 1)), generator.integers(0, 3, (100, 1))
    consts["boxes"] = np.concatenate([low, low + side, scores, classes], 1).astype(np.float32)
    weights = generator.uniform(0, 1, (3, 6)) * [40, 40, 60, 60, 0.05, 0]
    consts["weights"], consts["shape"] = weights.astype(np.float32), np.array([1, 3, 100])
    model(
        folder / "det" / "yolov10m.onnx",
        (1, 3, 640, 640),
        (1, 100, 6),
        [
            ("AveragePool", ["images"], "pool", {"kernel_shape": [64, 64], "strides": [64, 64]}),
            ("Reshape", ["pool", "shape"], "flat", {}),
            ("Transpose", ["flat"], "rows", {"perm": [0, 2, 1]}),
            ("MatMul", ["rows", "weights"], "moved", {}),
            ("Add", ["moved", "boxes"], "out", {}),
        ],
    )
    for axis, n in (("x", 48), ("y", 64)):
        consts[axis] = np.arange(n, dtype=np.float32).reshape((1, 1, 1, n) if axis == "x" else (1, 1, n, 1))
        consts[f"{axis}w"] = generator.uniform(-4, 4, (3, 133)).astype(np.float32)
        consts[f"{axis}b"] = generator.uniform(0, n, 133).astype(np.float32)
    consts["shape"], consts["width"] = np.array([1, 133, 1, 1]), np.float32(-1 / 8)
    consts["flat"], consts["sure"] = np.array([1, 3]), generator.uniform(0.2, 1, (1, 133, 1, 1)).astype(np.float32)
    axes = [
        node
        for a in "xy"
        for node in (
            ("MatMul", ["color", f"{a}w"], f"{a}m", {}),
            ("Add", [f"{a}m", f"{a}b"], f"{a}c", {}),
            ("Reshape", [f"{a}c", "shape"], f"{a}r", {}),
            ("Sub", [a, f"{a}r"], f"{a}d", {}),
            ("Mul", [f"{a}d", f"{a}d"], f"{a}q", {}),
        )
    ]
    model(
        folder / "pose2d" / "vitpose_h_wholebody.onnx",
        (1, 3, 256, 192),
        (1, 133, 64, 48),
        [
            ("GlobalAveragePool", ["images"], "mean", {}),
            ("Reshape", ["mean", "flat"], "color", {}),
            *axes,
            ("Add", ["xq", "yq"], "q", {}),
            ("Mul", ["q", "width"], "e", {}),
            ("Exp", ["e"], "bell", {}),
            ("Mul", ["bell", "sure"], "out", {}),
        ],
    )
    return folder


def pictures(n=3, width=300, height=220):
    """Frames (H,W,3) of three colours that differ from frame to frame, so that the networks see something else."""
    y, x = np.mgrid[:height, :width]
    waves = [[np.sin((x * a + y * b) / 40 + i) for a, b in ((1, 0), (0, 1), (1, -1))] for i in range(n)]
    return [(np.stack(w, -1) * [60, 40, 20] + [150, 100, 60]).round().astype(np.uint8) for w in waves]


def run(monkeypatch, *flags):
    """prepare.py's main with these flags."""
    monkeypatch.setattr("sys.argv", ["prepare.py", *map(str, flags)])
    prepare.main()


# ---- the official rules ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rate", RATES)
def test_frames_are_the_official_ones(rate):
    count, old, new = rate
    indices = frame_indices([k / old for k in range(count)], old, new)
    assert indices == FIGURES["indices.{}.{}.{}".format(*rate)].tolist()
    assert all(abs(i / old - j / new) <= 0.5 / old + 1e-9 for j, i in enumerate(indices) if i < count - 1)


@pytest.mark.parametrize("size", SIZE_FIGURES)
def test_sizes_are_the_official_ones(size):
    assert list(area_size(*size)) == FIGURES["size.{}.{}.{}".format(*size)].tolist()


@pytest.mark.parametrize("size", SIZES)
def test_fitted_frames_equal_official(size):
    w, h, area = size
    off = fit_frame(frames(1, h, w, 7)[0], *area_size(*size)).astype(int) - FIGURES[f"fit.{w}.{h}.{area}"].numpy()
    assert abs(off).max() <= 1 and (off != 0).mean() < 0.2


@pytest.mark.parametrize("seed", range(6))
def test_face_crops_equal_official(seed):
    points = landmarks(seed)[1:] * (320, 200)
    crop = face_crop(frames(1, 200, 320, 3)[0], (*points.min(0), *points.max(0)))
    assert crop.shape == (FACE_SIDE, FACE_SIDE, 3)
    assert abs(crop[::32, ::32].astype(int) - FIGURES[f"face.{seed}"].numpy()).max() <= 1


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("seed", range(3))
def test_masks_equal_official(growth, seed):
    assert np.array_equal(grow_mask(rough_mask(seed), *growth), FIGURES["mask.{}.{}.{}.{}.{}".format(seed, *growth)])


@pytest.mark.parametrize("canvas", CANVASES)
def test_skeletons_equal_official(canvas):
    """Radius 1 and 2; to the pixel."""
    width, height = canvas
    packed = zlib.decompress(FIGURES[f"pose.{width}.{height}"].numpy().tobytes())
    want = np.frombuffer(packed, np.uint8).reshape(height, width, 3)
    got = draw_pose(person(width, height), width, height)
    assert (want > 0).any(-1).sum() > 2000 and (got != want).any(-1).sum() <= 5


def test_found_keypoints_equal_official(tmp_path, report):
    networks, want = Networks(write_networks(tmp_path)), FIGURES["keypoints"].numpy()
    for image, points in zip(pictures(), want):
        got = networks.keypoints(image)
        report("px", abs(got[:, :2] - points[:, :2]).max(), 0.02)
        report("score", abs(got[:, 2] - points[:, 2]).max(), 1e-4)
    assert abs(want[0] - want[1])[:, :2].max() > 1  # they see the pictures


# ---- the same without figures ----------------------------------------------------------------------------------------
def test_shrinking_takes_the_mean():
    image = frames(1, 24, 36, 3)[0]
    want = image.reshape(6, 4, 12, 3, 3).mean((1, 3))
    assert abs(resize(image, 12, 6, area=True) - want).max() <= 0.5 + 1e-4
    row = np.random.default_rng(0).random((1, 70)).astype(np.float32)
    want = row.repeat(2, 1).reshape(1, 20, 7).mean(2)  # three and a half pixels to one
    assert np.allclose(resize(row, 20, 1, area=True), want, atol=1e-6)


def test_points_and_pixels_are_letterboxed_alike():
    image = np.zeros((60, 90, 3), np.uint8)
    image[40:46, 20:26] = 255
    left, top, w, h = letterbox_place(90, 60, 64, 64)
    ys, xs = (letterbox(image, 64, 64)[..., 0] > 100).nonzero()
    assert abs(xs.mean() + 0.5 - (23 * w / 90 + left)) < 0.3 and abs(ys.mean() + 0.5 - (43 * h / 60 + top)) < 0.3


def test_a_crop_has_the_box_and_a_third_more():
    image = np.zeros((400, 400, 3), np.uint8)
    image[200:260, 100:180] = 255
    inner = face_crop(image, (100, 200, 180, 260))[..., 0] > 127
    assert abs(1 / inner.mean() - 1.3) < 0.05
    above, below = inner.any(1).argmax(), inner[::-1].any(1).argmax()
    assert abs(above / below - 3) < 0.6 and abs(inner.any(0).argmax() - inner[:, ::-1].any(0).argmax()) < 8


def test_a_mask_grows_by_the_reach_of_its_kernel():
    mask = np.zeros((40, 50), np.uint8)
    mask[20, 25] = 1
    grown = grow_mask(mask.copy(), 2, 5, 100, 100)
    want = np.zeros_like(mask)
    want[16:25, 21:30] = 1
    assert np.array_equal(grown, want)
    assert np.array_equal(grow_mask(mask.copy(), 0), mask) and not grow_mask(0 * mask).any()


def test_boxes_that_overlap_better_ones_are_suppressed():
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [8, 8, 18, 18], [0, 0, 10, 5]])
    assert suppress(boxes, np.array([0.5, 0.9, 0.1, 0.3])) == [1, 3, 2]  # 0 shares 9/11 with 1; 3 shares 45/105


@pytest.mark.parametrize("size", [(48, 64), (31, 37)])
def test_videos_are_kept_to_the_bit(tmp_path, size):
    noise = np.random.default_rng(0).integers(0, 256, (5, *size, 3), np.uint8)
    write_frames(tmp_path / "v.mp4", [noise[:2], noise[2:]], 30, lossless=True)
    assert np.array_equal(np.stack([np.array(f.image) for f in read_frames(tmp_path / "v.mp4")]), noise)


def test_a_person_is_followed_from_a_score_of_a_twentieth_on():
    """As by the official detector; else the whole picture is."""
    rows = np.float32([[64, 64, 320, 640, 0.04, 0], [0, 0, 10, 10, 0.9, 1]])
    assert largest_person(rows, 200, 100).tolist() == [0, 0, 200, 100]
    rows[0, 4] = 0.06
    assert largest_person(rows, 200, 100).tolist() == [20, 10, 100, 100]


# ---- the folder ------------------------------------------------------------------------------------------------------
N, W, H = 9, 96, 64


def write_with_sound(path, rate, start):
    """A lossless video of 24 frames whose sound, a second of dull noise, begins `start` seconds after its pictures;
    returns the noise.
    """
    noise = np.convolve(np.random.default_rng(1).random(48015) - 0.5, np.ones(16) / 4, "valid").astype(np.float32)
    with av.open(str(path), "w", format="matroska") as file:
        stream = file.add_stream("libx264rgb", rate=rate, options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = H, W, "rgb24"
        audio = file.add_stream("pcm_s16le", rate=48000, layout="mono")
        for shade in range(24):
            image = np.full((H, W, 3), shade, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(stream.encode())
        frame = av.AudioFrame.from_ndarray((noise[None] * 32767).astype(np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts = 48000, round(48000 * start)
        file.mux(audio.encode(frame))
        file.mux(audio.encode())
    return noise


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder of inputs that fit each other."""
    folder = tmp_path_factory.mktemp("given")
    write_video(folder / "v.mp4", frames(N, H, W, 1), rate=30)
    write_video(folder / "pose.mp4", frames(N, H, W, 2), rate=30)
    masks = np.zeros((N, H, W, 3), np.uint8)
    for i in range(N):
        masks[i, 20:40, 30 + i : 50 + i] = 255
    write_video(folder / "mask.mp4", list(masks), rate=30)
    Image.fromarray(frames(1, 70, 50, 5)[0]).save(folder / "i.jpg")
    (folder / "box.json").write_text("[30, 20, 50, 44]")
    points = [person(W, H, i).tolist() for i in range(N)]
    (folder / "points.json").write_text(json.dumps(points))
    write_networks(folder / "networks")
    return folder


def flags(given, out, **changes):
    """Flags of prepare.py that work, with others in their place (None: left out)."""
    values = {"video": given / "v.mp4", "image": given / "i.jpg", "out": out, "size": "64x48"}
    values |= {"pose_video": given / "pose.mp4", "faces": given / "box.json"} | changes
    return [word for name, value in values.items() if value is not None for word in (f"--{name}", Path(value))]


def stack(images):
    return np.stack(images).astype(int)


def test_makes_a_folder_to_animate(given, tmp_path, monkeypatch):
    run(monkeypatch, *flags(given, tmp_path / "out"))
    assert (tmp_path / "out" / "src_ref.png").read_bytes() == (given / "i.jpg").read_bytes()
    source = read_source(tmp_path / "out", False, FACE_SIDE)
    assert source.pose[0].shape == (64, 32, 3) and abs(source.fps - 30) < 1e-6  # the picture's aspect
    assert np.array_equal(stack(source.pose), stack([letterbox(f, 32, 64) for f in frames(N, H, W, 2)]))
    want = [face_crop(f, (30, 20, 50, 44)) for f in frames(N, H, W, 1)]
    assert np.array_equal(stack(source.face), stack(want))
    assert sorted(f.name for f in tmp_path.rglob("*") if f.is_file()) == ["src_face.mp4", "src_pose.mp4", "src_ref.png"]
    told = json.loads(av.open(str(tmp_path / "out" / "src_pose.mp4")).metadata["comment"])
    assert told["size"] == "64x48" and told["fps"] == 30


def test_makes_a_folder_to_replace(given, tmp_path, monkeypatch):
    """At half the size and rate, from keypoints."""
    changes = dict(pose_video=None, faces=None, keypoints=given / "points.json", mask_video=given / "mask.mp4")
    more = dict(fps="15", size="48x32", iterations="1", k="3")
    run(monkeypatch, *flags(given, tmp_path / "out", **changes, **more))
    source, taken = read_source(tmp_path / "out", True, FACE_SIDE), [0, 2, 4, 6]
    video = [fit_frame(frames(N, H, W, 1)[i], 48, 32) for i in taken]
    points = [person(W, H, i) * [0.5, 0.5, 1] for i in taken]
    assert np.array_equal(stack(source.pose), stack([draw_pose(p, 48, 32) for p in points]))
    boxes = [(*p[23:91, :2].min(0), *p[23:91, :2].max(0)) for p in points]
    assert np.array_equal(stack(source.face), stack([face_crop(f, box) for f, box in zip(video, boxes)]))
    for i, mask, background, image in zip(taken, source.mask, source.background, video):
        want = np.zeros((32, 48), int)
        want[9:21, 14 + i // 2 : 26 + i // 2] = 255  # one pixel more on each side
        assert np.array_equal(mask, want)
        assert np.array_equal(background, np.where(mask[..., None], 0, image))


def test_boxes_keypoints_and_masks_move_with_the_picture_between_its_bars(tmp_path):
    """Of a broad video: a white square in it, a box of that, landmarks that span it, and a mask with a codec's noise
    all stand where the fitted frames show it.
    """
    picture, noise = np.zeros((60, 200, 3), np.uint8), np.random.default_rng(0).integers(0, 60, (3, 60, 200, 1))
    picture[20:40, 120:160] = 255
    masks = [np.where(picture > 0, 255 - n, n).astype(np.uint8) for n in noise]
    write_video(tmp_path / "v.mp4", [picture] * 3, rate=30)
    write_video(tmp_path / "mask.mp4", masks, rate=30)
    points = person(200, 60)
    points[23:91, :2] = np.linspace((120, 20), (160, 40), 68)
    (tmp_path / "points.json").write_text(json.dumps([points.tolist()] * 3))
    (tmp_path / "box.json").write_text("[120, 20, 160, 40]")
    given = {"video": "v.mp4", "mask_video": "mask.mp4", "keypoints": "points.json"}
    given = [word for name, file in given.items() for word in (f"--{name}", str(tmp_path / file))]
    for more in ([], ["--faces", str(tmp_path / "box.json")]):
        work = prepare.gather(prepare.arguments([*given, "--size", "64x64", *more]), (50, 50))
        frame = next(work.frames("frames"))[..., 0] > 127
        rows, columns = frame.any(1).nonzero()[0], frame.any(0).nonzero()[0]
        inside = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        assert rows[0] > frame.shape[0] // 3 and len(rows) > 4  # between bars
        assert np.abs(work.faces - inside).max() <= 1
        assert np.abs(work.keypoints[:, 23, :2] - inside[:2]).max() <= 1
        assert np.abs(work.keypoints[:, 90, :2] - inside[2:]).max() <= 1
        assert all(np.array_equal(mask, frame) for mask in work.masks(iterations=0))


def test_networks_give_poses_and_faces(given, tmp_path, monkeypatch):
    write_video(tmp_path / "v.mp4", pictures(), rate=30)
    made = {"video": tmp_path / "v.mp4", "pose_video": None, "faces": None, "process_checkpoint": given / "networks"}
    run(monkeypatch, *flags(given, tmp_path / "out", **made))
    source, networks = read_source(tmp_path / "out", False, FACE_SIDE), Networks(given / "networks")
    for image, pose, face in zip(pictures(), source.pose, source.face):
        points = networks.keypoints(image)
        assert np.array_equal(pose, letterbox(draw_pose(points, 300, 220), 32, 64)) and pose.any()
        assert np.array_equal(face, face_crop(image, (*points[23:91, :2].min(0), *points[23:91, :2].max(0))))


def test_videos_of_variable_rate_are_followed_by_time(given, tmp_path, monkeypatch):
    """30 per second for half a second, then 10; the poses at 30 throughout. At each time stands what is shown then, the
    face too.
    """
    times = [*(k / 30 for k in range(15)), *(0.5 + k / 10 for k in range(10))]
    write_timed(tmp_path / "v.mp4", [np.full((H, W, 3), round(100 * t), np.uint8) for t in times], times)
    even = [k / 30 for k in range(44)]
    write_timed(tmp_path / "pose.mp4", [np.full((H, W, 3), round(100 * t), np.uint8) for t in even], even)
    both = {"video": tmp_path / "v.mp4", "pose_video": tmp_path / "pose.mp4", "fps": "20"}
    run(monkeypatch, *flags(given, tmp_path / "out", **both))
    source = read_source(tmp_path / "out", False, FACE_SIDE)
    assert len(source.pose) == len(source.face) and 27 <= len(source.pose) <= 29
    for k, (pose, face) in enumerate(zip(source.pose, source.face)):
        assert abs(face.mean() / 100 - k / 20) <= 0.05 + 0.006
        assert abs(pose.max() / 100 - face.mean() / 100) <= 1 / 60 + 0.01


def test_pixels_that_are_not_square_are_made_square(given, tmp_path, monkeypatch):
    """A circle in both videos, which are stored at half of its width."""
    circle = np.hypot(*(np.mgrid[:64, :64] - 31.5)) < 24
    image = np.repeat(circle[:, ::2, None] * np.uint8(255), 3, 2)
    write_timed(tmp_path / "v.mp4", [image] * 4, [k / 30 for k in range(4)], aspect=2)
    Image.new("RGB", (64, 64)).save(tmp_path / "i.png")
    (tmp_path / "box.json").write_text("[8, 8, 56, 56]")
    both = {"video": tmp_path / "v.mp4", "pose_video": tmp_path / "v.mp4", "image": tmp_path / "i.png", "size": "64x64"}
    run(monkeypatch, *flags(given, tmp_path / "out", faces=tmp_path / "box.json", **both))
    source = read_source(tmp_path / "out", False, FACE_SIDE)
    for inside in (source.pose[0][..., 0] > 127, source.face[0][..., 0] > 127):
        assert abs(inside.any(0).sum() / inside.any(1).sum() - 1) < 0.05 and inside.any(0).sum() > 40


@pytest.mark.parametrize("start", [0, 0.1])
def test_sound_stays_where_it_is(given, tmp_path, monkeypatch, start):
    """Also in what is made of the folder, by where it begins there."""
    noise = write_with_sound(tmp_path / "v.mkv", 30, start)
    both = {"video": tmp_path / "v.mkv", "pose_video": tmp_path / "v.mkv"}
    run(monkeypatch, *flags(given, tmp_path / "out", **both))
    first, second = tmp_path / "out" / "src_pose.mp4", tmp_path / "again.mp4"
    write_frames(second, [np.zeros((24, 16, 16, 3), np.uint8)], 30, sound=first, sound_offset=sound_delay(first))
    for file in (first, second):
        begin, sound = read_sound(file)
        at = round(48000 * (start + 0.2 - begin))
        heard, want = sound[at - 150 : at + 12150], noise[9600:21600]
        where = np.correlate(heard, want, "valid")
        assert abs(where.argmax() - 150) <= 96  # two milliseconds: an mp4 begins its streams at whole ones
        assert where.max() > 0.95 * np.linalg.norm(want) ** 2
        assert abs(begin + len(sound) / 48000 - 24 / 30) < 0.03


def test_sound_before_the_pictures_is_left_out(tmp_path):
    noise = write_with_sound(tmp_path / "v.mkv", 30, 0)
    write_frames(
        tmp_path / "cut.mp4", [np.zeros((20, 16, 16, 3), np.uint8)], 30, sound=tmp_path / "v.mkv", sound_offset=-0.25
    )
    begin, sound = read_sound(tmp_path / "cut.mp4")
    heard, want = sound[round(48000 * (0.1 - begin)) :][:12000], noise[16800:28800]
    assert heard @ want > 0.95 * np.linalg.norm(want) * np.linalg.norm(heard)


@pytest.mark.parametrize(
    "text, want",
    [
        ("[1,2,11,22]", [[1, 2, 11, 22]] * 5),
        ("[[1,2,11,22],[2,2,12,22],[3,2,13,22],[4,2,14,22],[5,2,15,22]]", [[1 + i, 2, 11 + i, 22] for i in range(5)]),
        ("[[1,22],[11,2],[5,5]]", [[1, 2, 11, 22]] * 5),
        ("[[1,22,0.3],[11,2,0.4]]", [[1, 2, 11, 22]] * 5),
        (str([[[i, 22], [11, 2], [8, 8]] for i in range(5)]), [[i, 2, 11, 22] for i in range(5)]),
        ('{"1": [0,2,11,22], "3": [4,2,13,22]}', [[i, 2, 11 + i / 2, 22] for i in (0, 0, 2, 4, 4)]),
    ],
)
def test_faces_are_read(tmp_path, text, want):
    (tmp_path / "f.json").write_text(text)
    got = prepare.read_faces(
        tmp_path / "f.json", prepare.Clip("v.mp4", "--video", [k / 30 for k in range(5)], 40, 30, 30.0)
    )
    want = np.array(want, float)
    want[:, 2] = [11, 11, 12, 13, 13] if text[0] == "{" else want[:, 2]
    assert np.array_equal(got, want)


# ---- what is refused -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(video=None), "--video is needed"),
        (dict(out=None), "--out is needed"),
        (dict(video="none.mp4"), "--video none.mp4: does not exist"),
        (dict(video="box.json"), "--video .*box.json: has no video stream"),
        (dict(video="cut.mp4"), "--video .*cut.mp4: cannot be decoded"),
        (dict(video="sound.wav"), "--video .*sound.wav: has no video stream"),
        (dict(video="still.mp4", pose_video="still.mp4"), "still.mp4: 1 frames at 30 per second, should be at least 2"),
        (dict(image="none.png"), "--image none.png: does not exist"),
        (dict(image="v.mp4"), "--image .*v.mp4: cannot be read"),
        (dict(pose_video=None), "the poses are missing: give --pose_video, --keypoints or --process_checkpoint"),
        (dict(faces=None), "the faces are missing: give --faces, --keypoints or --process_checkpoint"),
        (dict(keypoints="points.json"), "--keypoints is not used beside --pose_video and --faces"),
        (dict(process_checkpoint="networks"), "--process_checkpoint is not used beside"),
        (dict(faces=None, keypoints="points.json", process_checkpoint="networks"), "both give keypoints"),
        (dict(pose_video="short.mp4"), "--pose_video .*short.mp4: 8 frames, should be 9 as in .*v.mp4"),
        (dict(mask_video="short.mp4"), "--mask_video .*short.mp4: 8 frames, should be 9"),
        (dict(mask_video="wide.mp4"), "--mask_video .*wide.mp4: 64x96 px, should be 96x64 as in .*v.mp4"),
        (dict(mask_video="none.mp4"), "--mask_video none.mp4: does not exist"),
        (dict(mask_video="cut.mp4"), "--mask_video .*cut.mp4: cannot be decoded"),
        (dict(faces="none.json"), "--faces none.json: cannot be read .No such file"),
        (dict(faces="v.mp4"), "--faces .*v.mp4: cannot be read"),
        (dict(faces="[[1,2,3,4],[1,2]]"), "should hold lists of equal lengths of numbers"),
        (dict(faces="[NaN,1,2,3]"), "should hold lists of equal lengths of numbers"),
        (dict(faces="[1,2,3]"), "should hold boxes .x1,y1,x2,y2. or points"),
        (dict(faces="5"), "should hold boxes"),
        (dict(faces=str([[1, 2, 3, 4]] * 8)), "8 entries, should be 9, one per frame of .*v.mp4"),
        (dict(faces="[-1,2,30,40]"), "box .-1.0, 2.0, 30.0, 40.0. of frame 0, should have x1 < x2 .* within 96x64 px"),
        (dict(faces=str([[1, 2, 30, 40]] * 8 + [[1, 2, 97, 40]])), "of frame 8"),
        (dict(faces="[30,2,20,40]"), "box .30.0, 2.0, 20.0, 40.0. of frame 0"),
        (dict(faces='{"9": [1,2,30,40]}'), "frame 9, should be 0 to 8"),
        (dict(faces='{"0": [[1,2],[30,40]]}'), "by frame number there should be boxes"),
        (
            dict(faces="[[-50,-50],[-20,-10]]"),
            "frame 0: the face at -50,-50 to -20,-10 px is not in the picture; --faces",
        ),
        (dict(faces=None, keypoints="[[1,2,3]]"), "--keypoints .*: 1x3 numbers, should be 9 frames of 133 points"),
        (dict(fps="0"), "--fps 0.0: should be above 0, or -1"),
        (dict(fps="nan"), "--fps nan: should be above 0"),
        (dict(fps="2"), "0 frames at 2 per second"),
        (dict(size="64"), "--size 64: give WIDTHxHEIGHT"),
        (dict(size="0x5"), "--size 0x5: should be above 0"),
        (dict(size="8x8"), "--size of 64 px is too small for 50x70: a side would be under 16"),
        (dict(k="4"), "--k 4: should be odd"),
        (dict(w_len="0"), "--w_len 0: at least 1"),
        (dict(out="."), "--out .*: is there already, should be a new or an empty folder"),
        (dict(pose_video=None, process_checkpoint="."), "--process_checkpoint .*: has no det/yolov10m.onnx"),
        (dict(pose_video=None, process_checkpoint="bad"), "yolov10m.onnx: cannot be read"),
        (dict(pose_video=None, process_checkpoint="swapped"), "--process_checkpoint .*swapped: "),
    ],
)
def test_what_does_not_fit_is_refused(given, tmp_path, monkeypatch, changes, message):
    folder = tmp_path / "files"
    folder.mkdir()
    write_video(folder / "still.mp4", frames(1, H, W, 1), rate=30)
    write_video(folder / "short.mp4", frames(N - 1, H, W, 1), rate=30)
    write_video(folder / "wide.mp4", frames(N, W, H, 1), rate=30)
    (folder / "cut.mp4").write_bytes((given / "mask.mp4").read_bytes()[:900])
    with av.open(str(folder / "sound.wav"), "w") as file:
        audio = file.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        file.mux(audio.encode(frame))
    for name, files in (("bad", ("v.mp4", "v.mp4")), ("swapped", ("pose2d", "det"))):
        for part, file in zip(("det/yolov10m.onnx", "pose2d/vitpose_h_wholebody.onnx"), files):
            (folder / name / part).parent.mkdir(parents=True)
            source = given / file if name == "bad" else next((given / "networks" / file).iterdir())
            (folder / name / part).write_bytes(source.read_bytes())
    for flag, value in changes.items():
        if flag in ("faces", "keypoints") and value and value[0] in "[{5":
            (folder / "f.json").write_text(value)
            changes = changes | {flag: folder / "f.json"}
        elif value and flag not in ("size", "fps"):
            found = [f for f in (folder / value, given / value) if f.exists() and not (flag == "out")]
            changes = changes | {flag: found[0] if found else given if value == "." else value}
    with pytest.raises(BadInput, match=message) as e:
        run(monkeypatch, *flags(given, **{"out": tmp_path / "out"} | changes))
    assert "\n" not in str(e.value) and not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_without_onnxruntime_says_what_to_install(given, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BadInput, match="needs onnxruntime: pip install onnxruntime"):
        Networks(given / "networks")


def test_a_killed_run_leaves_nothing_half(given, tmp_path, monkeypatch):
    """An exception leaves nothing at all; what a kill leaves has another name, and the next run removes it."""
    real, out = prepare.write_frames, tmp_path / "out"

    def die(path, *args, **kwargs):
        real(path, *args, **kwargs)
        assert path.parent != out and not out.exists()
        if path.name == "src_face.mp4":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare, "write_frames", die)
        run(patch, *flags(given, out))
    assert not list(tmp_path.iterdir())
    left = tmp_path / ".out.partial"
    left.mkdir()
    (left / "src_bg.mp4").write_text("half")
    run(monkeypatch, *flags(given, out))
    assert [f.name for f in tmp_path.iterdir()] == ["out"] and not (out / "src_bg.mp4").exists()
