"""What the data are, what is done to them, what is left out: as text, as JSON, and as a sheet of what a model sees."""

import hashlib
import json
import math
import textwrap
from collections import Counter
from pathlib import Path
from statistics import mean

import numpy as np

from nanowan.cache import cached_probe, covering, wanted_times
from nanowan.errors import Skip
from nanowan.files import atomic
from nanowan.formats.t5 import load_tokenizer, read_encoder
from nanowan.video import read_windows

NOTES = {
    "HDR": "HDR (HLG or PQ), tone-mapped to BT.709",
    "wide gamut": "of a wide gamut, converted to BT.709",
    "tagged outside": "whose colours the container alone names",
    "untagged": "without colour tags, taken for BT.709 from 720 lines on, for BT.601 below",
    "interlaced": "interlaced, deinterlaced",
    "variable rate": "of variable frame rate, read by time",
    "reordered": "whose times step back, read by number",
    "mirrored": "to be shown mirrored, read so",
    "rotated": "to be shown turned, read so",
    "alpha": "with transparency, put on white",
    "animated": "animated images, read as clips",
    "colour profile": "with a colour profile, converted to sRGB",
    "unusable profile": "with a colour profile that cannot be used, taken for sRGB",
    "other track": "with several video tracks, of which the first is not the main one",
    "gaps": "with gaps in their sound, which are silence",
}
MAX_TOKENS = 512  # of a caption that the encoder reads, the end token included
SHOWN = 24  # samples on a sheet
CELL = 160, 96  # (width, height) in px of a frame on it
COLUMNS = 3


# ---- the report ------------------------------------------------------------------------------------------------------
def describe(dataset):
    """`describe_items` of a data.Dataset; its tokens are counted if a caption can have more than are read."""
    long = any(len(c) + 2 > MAX_TOKENS for c in dataset.captions)  # a token is a character, a space before, or the end
    tokenizer = long and load_tokenizer(dataset.pipe.dir, read_encoder(dataset.pipe.files("text")).spiece)
    return describe_items(dataset.items + dataset.val_items, dataset.skipped, tokenizer)


def describe_items(items, skipped, tokenizer=None):
    """What `text` says, as plain values: counts of files, except for "samples", "seen" an epoch and "buckets", and of
    what is done to them. items, skipped: of data.scan. tokenizer: without one, no tokens are counted.
    """
    files = list({item.path: item for item in items}.values())
    notes = Counter(note for i in files for note in {*i.notes, *i.changed.get("sound", [])})
    found = {
        "files": len(files),
        "samples": len(items),
        "seen": sum(item.repeat for item in items),
        "skipped": [[str(path), reason] for path, reason in skipped],
        "buckets": [[*bucket, n] for bucket, n in sorted(Counter(item.bucket for item in items).items())],
        "notes": {note: notes[note] for note in NOTES if notes[note]},
        "several captions": sum(len(i.captions) > 1 for i in files),
        "cut off": cut_off(items),
        "cropped": extremes((cropped(i), i.path) for i in files),
        "enlarged": extremes((scale(i), i.path) for i in files if scale(i) > 1),
    }
    if tokenizer:
        lengths = [(max(count_tokens(c, tokenizer) for c in i.captions), i.path) for i in files]
        found["long captions"] = extremes(pair for pair in lengths if pair[0] > MAX_TOKENS)
    return found


def count_tokens(caption, tokenizer):
    """Tokens of a caption before it is cut, the end token included."""
    return len(tokenizer.ids(tokenizer.clean(caption))) + 1


def extremes(values):
    """{"files", "mean", "worst", "of"} of some (value, path), the largest being the worst."""
    values = [*values]
    worst, of = max(values, key=lambda pair: pair[0], default=(0, ""))
    return {"files": len(values), "mean": mean(v for v, _ in values) if values else 0, "worst": worst, "of": str(of)}


def scale(item):
    """By how much a file's picture is enlarged for its bucket."""
    width, height = item.source_size
    return max(item.width / width, item.height / height)


def cropped(item):
    """The share of a file's picture that its bucket leaves out."""
    width, height = item.source_size
    return 1 - min(1, item.width * item.height / (width * height * scale(item) ** 2))


def cut_off(items):
    """{"files" of which not all is taken, "frames" of a sample, "used": the share of their length that is}."""
    used, length, frames = Counter(), {}, {}
    for item in items:
        used[item.path] += item.frames / item.fps
        length[item.path], frames[item.path] = item.seconds + 1 / item.fps, item.frames
    cut = [path for path in used if length[path] > used[path] + 0.5 * used[path] / frames[path]]
    share = sum(used[path] for path in cut) / sum(length[path] for path in cut) if cut else 1
    return {"files": len(cut), "frames": max((frames[path] for path in cut), default=0), "used": share}


def text(found):
    """What `describe` found, as lines."""
    lines = [
        f"data: {found['files']} files"
        + f" in {found['samples']} samples" * (found["samples"] > found["files"])
        + f", seen {found['seen']} times an epoch" * (found["seen"] > found["samples"])
        + f", {len(found['skipped'])} skipped"
    ]
    lines += [f"  {w}x{h}, {f} frame{'s' * (f > 1)}: {n}" for w, h, f, n in found["buckets"]]
    lines += [f"  {NOTES[note]}: {n}" for note, n in found["notes"].items()]
    if n := found["several captions"]:
        lines.append(f"  with several lines of caption, of which one is drawn each time: {n}")
    if (long := found.get("long captions", {"files": 0}))["files"]:
        lines.append(
            f"  with a caption over {MAX_TOKENS} tokens, the rest of which is not read: {long['files']} "
            f"({long['worst']} tokens: {Path(long['of']).name})"
        )
    if (cut := found["cut off"])["files"]:
        lines.append(f"  cut off after at most {cut['frames']} frames: {cut['files']}, {cut['used']:.0%} of them used")
    if (crop := found["cropped"])["worst"] >= 0.005:
        name = Path(crop["of"]).name
        lines.append(f"  cropped by {crop['mean']:.0%} of the picture on average, {crop['worst']:.0%} at most ({name})")
    if (large := found["enlarged"])["files"]:
        name = Path(large["of"]).name
        lines.append(
            f"  enlarged: {large['files']}, {large['mean']:.1f} times on average, {large['worst']:.1f} at most ({name})"
        )
    return "\n".join(lines + [f"  skipped {path}: {reason}" for path, reason in found["skipped"]])


def write_report(dataset):
    """Leave what `describe` finds in the cache folder of a data.Dataset, as data_report.json."""
    if dataset.world.is_main:
        with atomic(dataset.config.cache / "data_report.json") as tmp:
            tmp.write_text(json.dumps(describe(dataset), indent=1, ensure_ascii=False))


# ---- the sheet -------------------------------------------------------------------------------------------------------
class DataSheet:
    """A picture of SHOWN samples as the model sees them: their first, middle and last frame, and a caption."""

    def __init__(self, items):
        self.items = items[:: math.ceil(len(items) / SHOWN)] if items else []
        self.frames = {}

    def add(self, item, frames):
        """Keep what the sheet shows of an item that is decoded anyway."""
        if any(item is other for other in self.items):
            self.frames[id(item)] = [frames[k] for k in shown_frames(item)]

    def write(self, path):
        """Write the sheet, unless there is one of the same data already."""
        from PIL import Image, ImageDraw, PngImagePlugin

        data = [[i.digest, i.start, i.bucket, i.captions, i.changed] for i in self.items]
        key = hashlib.blake2b(json.dumps(data).encode(), digest_size=20).hexdigest()
        if not self.items or path.exists() and key_of(path) == key:
            return
        w, h = 3 * CELL[0] + 8, CELL[1] + 34
        sheet = Image.new("RGB", (COLUMNS * w, h * math.ceil(len(self.items) / COLUMNS)), "lightgrey")
        pen = ImageDraw.Draw(sheet)
        for n, item in enumerate(self.items):
            x, y = n % COLUMNS * w + 4, n // COLUMNS * h
            caption = textwrap.wrap(f"{item.path.name}: {item.captions[0]}", w // 6, max_lines=2, placeholder="...")
            pen.text((x, y + 2), "\n".join(caption), fill="black")
            for k, frame in enumerate(self.frames.get(id(item)) or read_shown(item)):
                thumbnail = Image.fromarray(frame)
                thumbnail.thumbnail((CELL[0] - 4, CELL[1]), Image.LANCZOS)
                sheet.paste(thumbnail, (x + k * CELL[0], y + 30))
        info = PngImagePlugin.PngInfo()
        info.add_text("data", key)
        with atomic(path) as tmp:
            sheet.save(tmp, format="PNG", pnginfo=info)


def shown_frames(item):
    """Which of an item's frames stand on the sheet."""
    return np.unique([0, item.frames // 2, item.frames - 1]).tolist()


def read_shown(item):
    """The frames (H,W,3) uint8 of an item that stand on the sheet; none where it cannot be read."""
    times = [wanted_times(item)[k] for k in shown_frames(item)]
    try:
        shown = cached_probe(item.path, item.digest, None)
        return next(read_windows(item.path, [times], covering(item.width, item.height), shown))
    except Skip:
        return []


def key_of(path):
    """What identifies the data of a sheet, None where it is none."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.info.get("data")
    except Exception:  # of PIL's many kinds: a damaged file
        return None
