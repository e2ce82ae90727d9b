"""Scanning a folder or list of media: which files are usable, the bucket of each, the windows taken from clips."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

from nanowan import cache
from nanowan.errors import BadInput, Skip
from nanowan.files import remove_leftovers
from nanowan.training.sources import check_usable, find_media

MAX_ASPECT = 4  # buckets have aspect ratios from 1:4 to 4:1
MAX_CROPPED_ASPECT = 6  # limit for media: with a more extreme aspect ratio, cropping would remove more than a third
MAX_GAP = 60  # seconds between two frames: a longer gap is a damaged timestamp and would repeat one frame for hours


@dataclass
class Item:
    """One sample of a media file: `frames` frames at `fps`, which begin at `start` seconds and are resized and cropped
    to the width and height (px) of the bucket. frames is 4k+1, or 4k for S2V, or 1 for an image. The next
    `frames_after` frames are decoded too, for S2V's continuation segments. An epoch contains the sample `repeat` times,
    and its loss is multiplied by `weight`. source_size: (width, height) in px of the media file, upright and with
    square pixels. sidecars: {kind: (file, digest)} from Samples.sidecars, such as the pose video of a clip. seconds:
    the time of the media file's last frame (0 for an image). notes: remarks for the data report, from video.Shown.
    changed: {kind: notes} as returned by Samples.changed, without kinds that have no notes.
    """

    path: Path
    captions: list
    width: int
    height: int
    frames: int
    fps: float
    start: float = 0.0
    digest: str = ""
    repeat: int = 1
    weight: float = 1.0
    source_size: tuple = (0, 0)
    frames_after: int = 0
    sidecars: dict = field(default_factory=dict)
    seconds: float = 0.0
    notes: list = field(default_factory=list)
    changed: dict = field(default_factory=dict)

    @property
    def bucket(self):
        return self.width, self.height, self.frames


# ---- buckets and windows -----------------------------------------------------------------------------------------
def buckets(area, multiple):
    """Return every bucket (w, h) in px within MAX_ASPECT. Each width is paired with the height that brings the area
    closest to `area` px. Sides are multiples of `multiple`. Each bucket is also returned with width and height swapped.
    """
    sizes = set()
    for w in range(multiple, int((MAX_ASPECT * area) ** 0.5) + multiple, multiple):
        h = max(multiple, round(area / w / multiple) * multiple)
        if w * h <= area * 1.1 and 1 / MAX_ASPECT <= w / h <= MAX_ASPECT:
            sizes |= {(w, h), (h, w)}
    return sorted(sizes) or [(multiple, multiple)]


def nearest_bucket(width, height, area, multiple):
    if not 1 / MAX_CROPPED_ASPECT <= width / height <= MAX_CROPPED_ASPECT:
        raise Skip(f"{width}x{height} is too long and thin; buckets go from 1:{MAX_ASPECT} to {MAX_ASPECT}:1")
    return min(buckets(area, multiple), key=lambda b: (abs(math.log(b[0] / b[1] * height / width)), -b[0] * b[1]))


def clip_windows(times, max_frames, fps, mode, over=1):
    """Return the windows [(start in seconds, number of frames, fps)] to take from a clip whose frames are shown at
    `times`. Each number of frames is 4k + `over`. mode: one of CLIP_MODES. Raises Skip if the clip is too short, or if
    more than MAX_GAP seconds lie between two frames.
    """
    ordered = sorted(times)
    if (gap := max((b - a for a, b in zip(ordered, ordered[1:])), default=0)) > MAX_GAP:
        raise Skip(f"has frames that are {gap:.0f} s apart; {MAX_GAP} at most")
    length, available = ordered[-1], frames_from(0.0, times, fps)
    n = min(max_frames, (available - over) // 4 * 4 + over)
    if min(available, len(times)) < 4 + over <= max_frames:
        raise Skip(f"too short: {len(times)} frames, {available} at {fps:g} fps; at least {4 + over} are needed")
    if mode == "spaced" and n > 1:
        return [(0.0, n, (n - 1) / length)]
    if mode == "several":
        return [(k * n / fps, n, fps) for k in range(available // n)]
    return [((available - n) // 2 / fps if mode == "middle" else 0.0, n, fps)]


def frames_from(start, times, fps):
    """Return how many frames at rate `fps` a clip holds from `start` seconds on. times: when the clip's frames are
    shown. The count includes a tolerance of a twentieth of a frame, because Matroska rounds times to milliseconds.
    """
    return int((max(times) - start) * fps + 0.05) + 1


def scan(source, area, multiple, max_frames, fps, mode="first", cache_dir=None, samples=None):
    """Scan `source`, a folder (with its subfolders) or a list. Return ([Item], [(path, reason)] of the skipped files).

    area, multiple: as for `buckets`. max_frames, fps, mode: as for clip_windows. cache_dir: the folder that keeps what
    was found out about each file, or None. samples: a Samples (nanowan/variants/samples.py) or None. Raises BadInput,
    with the reasons, if no file is left.
    """
    if cache_dir is not None:
        remove_leftovers(cache_dir)
    items, skipped = [], []
    over, after = (samples.frames_over, samples.frames_after) if samples else (1, 0)
    for path, captions, repeat in find_media(Path(source)):
        try:
            if samples and captions is None and samples.is_sidecar(path):
                continue
            captions = check_usable(path, captions)
            name = cache.digest(path)
            width, height, times, notes, _ = shown = cache.cached_probe(path, name, cache_dir)
            bucket = nearest_bucket(width, height, area, multiple)
            sidecars = samples.sidecars(path, shown, cache_dir) if samples else {}
            changed = samples.changed(path, shown, sidecars, cache_dir) if samples else {"": shown.changed}
            changed = {kind: what for kind, what in changed.items() if what}
            windows = [(0.0, 1, fps)] if times is None else clip_windows(times, max_frames, fps, mode, over)
            about = dict(source_size=(width, height), seconds=times[-1] if times else 0.0, notes=notes, changed=changed)
            for start, n, rate in windows:
                item = Item(path, captions, *bucket, n, rate, start, name, repeat, sidecars=sidecars, **about)
                if after and frames_from(start, times, rate) >= n + after:
                    item.frames_after = after
                items.append(item)
        except Skip as e:
            skipped.append((path, str(e)))
        except OSError as e:
            skipped.append((path, e.strerror or str(e)))
    if not items:
        reasons = "; ".join(f"{p.name} {reason}" for p, reason in skipped[:20])
        raise BadInput(f"--data {source}: nothing to train on; {reasons or 'there are no images or clips in it'}")
    return items, skipped


def scan_source(source, s, samples, cache):
    """Scan a DataSource for a checkpoint with Settings s, and return the result of `scan`."""
    how = math.prod(source.resolution), s.size_multiple, source.frames, s.fps, source.clip_mode
    items, skipped = scan(source.source, *how, cache, samples)
    return [replace(i, repeat=i.repeat * source.repeats, weight=source.weight) for i in items], skipped


def sizes_of(items, texts, samples, s, row_bytes):
    """Return the sizes that the memory estimate needs: {"bucket": the largest (width, height, frames), "text":
    approximate number of tokens of the longest text, "cache": (bytes of the latents, bytes of the embedded texts)}.
    row_bytes: bytes of one token's embedding.
    """
    latents = sum(samples.cached_bytes(i, s.latent_shape(i.bucket[:2], i.frames)) for i in items)
    tokens = [2 + len(text) // 3 for text in texts]
    bucket = max((i.bucket for i in items), key=math.prod)
    return {"bucket": bucket, "text": min(512, max(tokens)), "cache": (latents, sum(tokens) * row_bytes)}
