"""The grader: tell what a clip of the nano world shows from its pixels alone, and compute accuracy over clips."""

import math

import torch

from nano.world import ATTRIBUTES, BACKGROUNDS, COLORS, RADIUS, SHAPES, STEP, UNDRAWN, template


def nearest(rgb, palette):
    return min(palette, key=lambda name: sum((float(a) - b) ** 2 for a, b in zip(rgb, palette[name])))


def grade(clip):
    """Return {"color", "shape", "motion", "background", "iou"} of what a clip (3,T,64,64) in [-1,1] shows, from its
    pixels alone. iou: the overlap of the drawn shape with the best-fitting shape template (0..1, soft, mean over
    frames). If nothing is drawn, color, shape and motion are None and iou is 0.
    """
    x = (clip.float().nan_to_num() + 1) * 127.5
    border = torch.cat([x[..., 0, :], x[..., -1, :], x[..., 0], x[..., -1]], -1).flatten(1)
    ground = border.median(1).values
    distance = (x - ground[:, None, None, None]).norm(dim=0)  # (T,H,W)
    background = nearest(ground, BACKGROUNDS)
    core = distance > 0.75 * distance.flatten().quantile(0.98)
    nothing = {"color": None, "shape": None, "motion": None, "background": background, "iou": 0.0}
    if not distance.flatten().quantile(0.98) >= 25:
        return nothing
    rgb = x[:, core].median(1).values
    axis = (rgb - ground)[:, None, None, None]
    mask = (((x - ground[:, None, None, None]) * axis).sum(0) / (axis * axis).sum()).clamp(0, 1)
    solid = (mask > 0.5).float()
    area = solid.flatten(1).sum(1).clamp(min=1)  # (T,)
    grid = torch.arange(clip.shape[-1]) + 0.5
    center = (
        torch.stack([(solid * grid).flatten(1).sum(1), (solid * grid[:, None]).flatten(1).sum(1)], 1) / area[:, None]
    )
    scores = []
    for i in range(len(SHAPES)):
        index, full = torch.full((len(area),), i), torch.full((len(area),), float(RADIUS))
        unit = template(index, full, center[:, None])[:, 0].flatten(1).sum(1)
        shape = template(index, full * (mask.flatten(1).sum(1) / unit).sqrt(), center[:, None])[:, 0]
        scores.append(
            (torch.minimum(shape, mask).flatten(1).sum(1) / torch.maximum(shape, mask).flatten(1).sum(1)).mean().item()
        )
    if max(scores) < 0.5:  # what is drawn is not a solid shape
        return nothing
    first, last = center[:3].mean(0), center[-3:].mean(0)
    dx, dy = (last - first).tolist()
    far = STEP * (len(area) - 3) / 2
    if max(abs(dx), abs(dy)) < far:
        left_of_ends = ((first + last) / 2 - center[3:-3].mean(0))[0]  # 9.3 px in a clip of "bounce" as it is drawn
        motion = "bounce" if left_of_ends > far / 2 else "still"
    elif abs(dx) > abs(dy):
        motion = "left" if dx < 0 else "right"
    else:
        motion = "up" if dy < 0 else "down"
    return {
        "color": nearest(rgb, COLORS | UNDRAWN["color"]),
        "shape": SHAPES[scores.index(max(scores))],
        "motion": motion,
        "background": background,
        "iou": max(scores),
    }


def wilson(right, n):
    """Return (low, high), the 95 % interval of the proportion right / n (Wilson, 1927)."""
    if not n:
        return 0.0, 1.0
    z, p = 1.96, right / n
    mid, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, mid - half) / (1 + z * z / n), (mid + half) / (1 + z * z / n)


def proportion(n_right, n):
    """Return {"right", "n", "low", "high"}. right: the accuracy n_right / n; low, high: its 95 % interval."""
    low, high = wilson(n_right, n)
    return {"right": n_right / n, "n": n, "low": low, "high": high}


def shares(grades, rows):
    """Return {attribute: accuracy}: among the prompts that ask for an attribute, the share whose clip shows the value
    that the prompt asks for. grades: what `grade` returned for each clip. rows: the attributes that each prompt asks
    for.
    """
    accuracy = {}
    for kind in ATTRIBUTES:
        pairs = [(g[kind], w[kind]) for g, w in zip(grades, rows) if kind in w]
        if pairs:
            accuracy[kind] = sum(a == b for a, b in pairs) / len(pairs)
    return accuracy
