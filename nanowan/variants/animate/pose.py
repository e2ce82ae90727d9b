"""Whole-body keypoints of a person: drawing them as the skeleton that Animate follows, and finding them in pictures.

Keypoints are COCO's 133 whole-body points, each with x, y (px) and a score: 17 points of the body, 6 of the feet, 68 of
the face, and 21 of each hand. The official networks, yolov10m and vitpose, find them.
Source: official wan/modules/animate/preprocess/{human_visualization,pose2d,pose2d_utils}.py.
"""

import math
from colorsys import hsv_to_rgb
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from nanowan.errors import BadInput
from nanowan.variants.animate.inputs import resize

KEYPOINTS, FACE, HANDS = 133, slice(23, 91), (slice(91, 112), slice(112, 133))

# ---- the skeleton ----------------------------------------------------------------------------------------------------
# The skeleton's 20 joints are nose, neck; right and left shoulder, elbow, wrist; right and left hip, knee, ankle; eyes,
# ears, toes. Joint i is the mean of points JOINTS[i] and JOINTS_TOO[i]. The two points are equal except for the neck,
# which lies between the shoulders, and the toes, which lie between the big and the small toe.
JOINTS = [0, 6, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3, 17, 20]
JOINTS_TOO = [0, 5, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3, 18, 21]
LIMBS = [(1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13)]
LIMBS += [(1, 0), (0, 14), (14, 16), (0, 15), (15, 17), (13, 18), (10, 19)]
# Colours of the joints and, times 0.6, of the limbs: eighteen steps around the colour circle, then the feet.
COLORS = [(255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0)]
COLORS += [(0, 255, 0), (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255)]
COLORS += [(0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85)]
COLORS += [(200, 200, 0), (100, 100, 0)]
FINGERS = [(0 if i % 4 == 0 else i, i + 1) for i in range(20)]
MIN_SCORE = 0.5  # points with a lower score are not drawn


def draw_pose(points, width, height):
    """Return an image (height,width,3) uint8 of a skeleton, drawn as in the model's training data. points (133,3): x y
    px and score of the whole-body keypoints. Body and hands are drawn, the face is not. Pixels equal those that OpenCV
    draws, except that the edges of fingers may differ if both sides of the image have 1000 px or more.
    """
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (width, height))
    pen = ImageDraw.Draw(image)
    body = (points[JOINTS] + points[JOINTS_TOO]) / 2
    radius = max(min(width, height) // 200 - 1, 1)
    for (a, b), color in zip(LIMBS, COLORS):
        if min(body[a, 2], body[b, 2]) >= MIN_SCORE:
            fill_convex(pen, limb(body[a], body[b], radius), tuple(int(c * 0.6) for c in color))
    for joint, color in zip(body, COLORS):
        if joint[2] >= MIN_SCORE:
            pen.point(disk(joint, radius), fill=color)
    for hand in HANDS:
        draw_hand(pen, points[hand], max(radius // 2, 1))
    return np.array(image)


def limb(a, b, radius):
    """Return the corners [(x, y)] of a polygon that approximates an ellipse. The ellipse reaches from point a to point
    b and is 2 * radius px wide.
    """
    x, y = (int(v) for v in (a[:2] + b[:2]) / 2)
    dx, dy = a[:2] - b[:2]
    angle = math.radians(int(math.degrees(math.atan2(dy, dx))))
    t = np.radians(np.arange(361))
    along, across = int(math.hypot(dx, dy) / 2) * np.cos(t), radius * np.sin(t)
    xs, ys = (
        x + along * math.cos(angle) - across * math.sin(angle),
        y + along * math.sin(angle) + across * math.cos(angle),
    )
    return list(zip(xs.round().astype(int).tolist(), ys.round().astype(int).tolist()))


def fill_convex(pen, corners, color):
    """Fill a convex polygon, including its edges, with the pixels that OpenCV would fill. ImageDraw.polygon leaves some
    of these pixels out.
    """
    spans = {}
    for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1]):
        pen.line(sorted(((x1, y1), (x2, y2)), reverse=True), fill=color)
        for y in range(min(y1, y2), max(y1, y2) + 1):
            x = math.floor(x1 + (x2 - x1) * (y - y1) / (y2 - y1) + 0.5) if y1 != y2 else x1
            spans[y] = min(spans.get(y, (x, x))[0], x), max(spans.get(y, (x, x))[1], x)
    for y, (left, right) in spans.items():
        pen.line((left, y, right, y), fill=color)


def disk(point, radius):
    """Return the pixels [(x, y)] within `radius` of a point."""
    x, y, steps = int(point[0]), int(point[1]), range(-radius, radius + 1)
    return [(x + i, y + j) for i in steps for j in steps if i * i + j * j <= radius * radius]


def draw_hand(pen, points, radius):
    """Draw a hand with `pen`. points (21,3): the wrist, then four points of each finger, beginning with the thumb."""
    seen = (points[:, 2] >= MIN_SCORE) & (points[:, :2].astype(int) > 0).all(1)
    ends = [(int(x), int(y)) for x, y, _ in points]
    width = radius if radius == 1 else (radius + 1) // 2 * 2 + 1  # OpenCV's width for lines thicker than 1
    for i, (a, b) in enumerate(FINGERS):
        if seen[a] and seen[b]:
            color = tuple(round(255 * c) for c in hsv_to_rgb(i / len(FINGERS), 1, 1))
            pen.line(sorted((ends[a], ends[b]), reverse=True), fill=color, width=width)
    for i in seen.nonzero()[0]:
        pen.point(disk(points[i], radius), fill=(0, 0, 255))


# ---- the official networks -------------------------------------------------------------------------------------------
PERSON_SIDE = 640  # side in px of yolov10m's input
PERSON_SCORE = 0.05  # detections with a lower score are ignored
POSE_SIZE = 192, 256  # (width, height) px of vitpose's input
HEATMAP_BLUR = 11, 2.0  # taps and sigma of the Gaussian that the heatmaps were trained with


class Networks:
    """The networks yolov10m and vitpose in a process_checkpoint folder. Together they find a person's keypoints in a
    picture.
    """

    def __init__(self, folder):
        try:
            import onnxruntime
        except ImportError:
            raise BadInput("--process_checkpoint needs onnxruntime: pip install onnxruntime") from None
        self.folder, self.sessions = Path(folder), []
        for name in ("det/yolov10m.onnx", "pose2d/vitpose_h_wholebody.onnx"):
            file = self.folder / name
            file = file / "end2end.onnx" if file.is_dir() else file  # the weights are many files next to this one
            if not file.is_file():
                raise BadInput(f"--process_checkpoint {folder}: has no {name}")
            usable = onnxruntime.get_available_providers()
            providers = [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in usable]
            try:
                self.sessions.append(onnxruntime.InferenceSession(str(file), providers=providers))
            except Exception as e:  # onnxruntime raises many classes of its own
                raise BadInput(f"{file}: cannot be read ({str(e).splitlines()[0]})") from None

    def run(self, index, x, shape):
        """Return the first output of a network for one x (3,H,W), without the batch axis. index: 0 for yolov10m, 1 for
        vitpose. shape: the shape that the output must have, with None for a length that may be any number.
        """
        session = self.sessions[index]
        try:
            y = session.run(None, {session.get_inputs()[0].name: x[None].astype(np.float32)})[0][0]
        except Exception as e:  # onnxruntime, as in __init__
            raise BadInput(f"--process_checkpoint {self.folder}: {str(e).splitlines()[0]}") from None
        if len(y.shape) != len(shape) or any(want not in (None, n) for n, want in zip(y.shape, shape)):
            raise BadInput(f"--process_checkpoint {self.folder}: a network gave {y.shape}, should be {shape}")
        return y

    def keypoints(self, image):
        """Return the keypoints (133,3), x and y in px and a score, of the person in an image (H,W,3) uint8 whom
        largest_person chooses.
        """
        height, width = image.shape[:2]
        x = resize(image, PERSON_SIDE, PERSON_SIDE).transpose(2, 0, 1) / 255
        box = largest_person(self.run(0, x, (None, 6)), width, height)
        (left, top, w, h), x = pose_input(image, box)
        points = heatmap_points(self.run(1, x, (KEYPOINTS, None, None)))
        return points * [w, h, 1] + [left, top, 0]


def largest_person(rows, width, height):
    """Return the box (4,), x1 y1 x2 y2, of the person to follow in a picture of width x height px. If no person is
    detected, or if a side of the box is under 10 px, return the box of the full picture. rows (n,6): detections, each
    x1 y1 x2 y2 score class. Boxes in `rows` are in px of the picture resized to a square of side PERSON_SIDE.
    """
    rows = rows[rows[:, 4] > PERSON_SCORE]
    x1, y1, x2, y2 = (rows[:, :4] * np.float32([width, height, width, height]) / PERSON_SIDE).T
    boxes = np.stack([x1, y1, x2 - x1, y2 - y1], 1).astype(int)
    boxes[:, 2:] += boxes[:, :2]
    kept = suppress(boxes, rows[:, 4])
    boxes = boxes[[i for i in kept if rows[i, 5] == 0]]  # class 0 is a person
    sides = boxes[:, 2:] - boxes[:, :2]
    longest, best, area = sides.max(initial=-1), None, -math.inf
    for box, (w, h) in zip(boxes, sides):
        if w * h > area and max(w, h) >= 0.4 * longest:  # a larger area does not count if the sides are much shorter
            best, area, longest = box, w * h, max(w, h)
    return np.array([0, 0, width, height]) if best is None or min(best[2:] - best[:2]) < 10 else best


def suppress(boxes, scores, overlap=0.5):
    """Return the indices, best score first, of the boxes (n,4) to keep. A box is dropped if the area that it shares
    with a kept box of a better score is more than `overlap` times the area of the two boxes' union.
    """
    kept = []
    for i in np.argsort(-scores, kind="stable"):
        for j in kept:
            w, h = (np.minimum(boxes[i, 2:], boxes[j, 2:]) - np.maximum(boxes[i, :2], boxes[j, :2])).clip(0)
            areas = sum(np.prod(boxes[k, 2:] - boxes[k, :2]) for k in (i, j))
            if areas <= 0 or w * h / (areas - w * h) > overlap:
                break
        else:
            kept.append(i)
    return kept


def pose_input(image, box):
    """Return ((left, top, width, height), x (3,256,192)) for an image (H,W,3) and a person's box (4,). The first is an
    area, in px of the image; x, vitpose's input, is this area, resized and normalised. The area is the box, scaled by
    1.25 and made wider or higher, to an aspect ratio of 3:4. The part of the area outside the image is black. As in the
    official code, channels are in the order blue, green, red, but are normalised with the mean and deviation of red,
    green, blue.
    """
    w, h = POSE_SIZE
    center, sides = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
    size = 1.25 * max(sides[0] * h / w, sides[1]) * np.array([w / h, 1])
    (x1, y1), (x2, y2) = ((center + sign * size / 2).round().astype(int) for sign in (-1, 1))
    crop = np.zeros((y2 - y1, x2 - x1, 3), np.float32)
    top, bottom, left, right = max(y1, 0), min(y2, image.shape[0]), max(x1, 0), min(x2, image.shape[1])
    crop[top - y1 : bottom - y1, left - x1 : right - x1] = image[top:bottom, left:right, ::-1]
    x = (resize(crop, w, h) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return (*(center - size / 2), *size), x.transpose(2, 0, 1)


def heatmap_points(maps):
    """Return (K,3) for heatmaps (K,h,w): for each map, the x and y of its maximum, as fractions of the map's width and
    height, and the value of the maximum. One Newton step on the logarithm of the blurred map places x and y between
    pixels (Zhang et al. 2020, arXiv:1910.06278).
    """
    K, h, w = maps.shape
    scores, at = maps.reshape(K, -1).max(1), maps.reshape(K, -1).argmax(1)
    points = np.stack([at % w, at // w], 1).astype(float)
    taps, sigma = HEATMAP_BLUR
    g = torch.exp(-((torch.arange(taps).double() - taps // 2) ** 2) / (2 * sigma**2))
    g = (g / g.sum()).float()
    blurred = F.conv2d(torch.from_numpy(maps)[:, None], (g[:, None] * g)[None, None], padding=taps // 2)[:, 0].numpy()
    peaks = blurred.reshape(K, -1).max(1)
    logs = np.log(np.maximum(blurred * (scores / np.where(peaks > 0, peaks, 1))[:, None, None], 1e-10).astype(float))
    for k, (x, y) in enumerate(points.astype(int)):
        if scores[k] > 0 and 1 < x < w - 2 and 1 < y < h - 2:
            m = logs[k, y - 2 : y + 3, x - 2 : x + 3]
            slope = np.array([m[2, 3] - m[2, 1], m[3, 2] - m[1, 2]]) / 2
            xx, yy = (m[2, 4] - 2 * m[2, 2] + m[2, 0]) / 4, (m[4, 2] - 2 * m[2, 2] + m[0, 2]) / 4
            xy = (m[3, 3] - m[1, 3] - m[3, 1] + m[1, 1]) / 4
            if xx * yy - xy * xy:
                points[k] -= np.linalg.solve([[xx, xy], [xy, yy]], slope)
    points[scores <= 0] = -1
    return np.concatenate([points / [w, h], scores[:, None]], 1)
