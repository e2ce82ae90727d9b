"""The data report: what the data are, how they are changed, what is skipped; as text, as JSON, and as a picture."""

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
    "wide gamut": "with a wide colour gamut, converted to BT.709",
    "tagged outside": "with colour tags in the container only",
    "untagged": "without colour tags, read as BT.709 from 720 lines on, as BT.601 below",
    "interlaced": "interlaced, deinterlaced",
    "variable rate": "with a variable frame rate, read by timestamps",
    "reordered": "with timestamps that go backwards, read by frame number",
    "mirrored": "tagged to be shown mirrored, read mirrored",
    "rotated": "tagged to be shown rotated, read rotated",
    "alpha": "with transparency, put on white",
    "animated": "animated images, read as clips",
    "colour profile": "with a colour profile, converted to sRGB",
    "unusable profile": "with a colour profile that cannot be used, read as sRGB",
    "other track": "with several video tracks, the first of which is not the main one",
    "gaps": "with gaps in their sound, filled with silence",
}
MAX_TOKENS = 512  # the encoder reads at most this many tokens of a caption, the end token included
SHOWN = 24  # samples on a sheet
CELL = 160, 96  # (width, height) in px of a frame on a sheet
COLUMNS = 3


# ---- the report ------------------------------------------------------------------------------------------------------
def describe(dataset):
    """Return the data report of a data.Dataset, as describe_items does. Tokens are counted only if a caption is so long
    that it may have more tokens than the encoder reads.
    """
    # all tokens but two take at least one character each: a space before the text and the end token take none
    long = any(len(c) + 2 > MAX_TOKENS for c in dataset.captions)
    tokenizer = long and load_tokenizer(dataset.pipe.dir, read_encoder(dataset.pipe.files("text")).spiece)
    return describe_items(dataset.items + dataset.val_items, dataset.skipped, tokenizer)


def describe_items(items, skipped, tokenizer=None):
    """Return the data report as a dict, which `text` formats. Its counts are numbers of files; "samples", "seen" (per
    epoch) and "buckets" count samples. items, skipped: as returned by scan.scan. tokenizer: if None, tokens are not
    counted.
    """
    files = list({item.path: item for item in items}.values())
    notes = Counter(note for i in files for note in {*i.notes, *i.changed.get("sound", [])})
    facts = {
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
        facts["long captions"] = extremes(pair for pair in lengths if pair[0] > MAX_TOKENS)
    return facts


def count_tokens(caption, tokenizer):
    """Return the number of tokens of the full caption, before the encoder cuts it off, the end token included."""
    return len(tokenizer.ids(tokenizer.clean(caption))) + 1


def extremes(values):
    """Return {"files": number of pairs, "mean": mean value, "worst": largest value, "of": the path of the largest
    value} for pairs (value, path).
    """
    values = [*values]
    worst, of = max(values, key=lambda pair: pair[0], default=(0, ""))
    return {"files": len(values), "mean": mean(v for v, _ in values) if values else 0, "worst": worst, "of": str(of)}


def scale(item):
    """Return the factor by which a file's picture is enlarged for its bucket."""
    width, height = item.source_size
    return max(item.width / width, item.height / height)


def cropped(item):
    """Return the share of a file's picture that is cropped away for its bucket."""
    width, height = item.source_size
    return 1 - min(1, item.width * item.height / (width * height * scale(item) ** 2))


def cut_off(items):
    """Return {"files": number of files that their samples do not cover completely, "frames": number of frames of the
    longest sample from these files, "used": the share of these files' total length that the samples cover}.
    """
    used, length, frames = Counter(), {}, {}
    for item in items:
        used[item.path] += item.frames / item.fps
        length[item.path], frames[item.path] = item.seconds + 1 / item.fps, item.frames
    cut = [path for path in used if length[path] > used[path] + 0.5 * used[path] / frames[path]]
    share = sum(used[path] for path in cut) / sum(length[path] for path in cut) if cut else 1
    return {"files": len(cut), "frames": max((frames[path] for path in cut), default=0), "used": share}


def text(facts):
    """Format a data report, as returned by `describe`, as lines."""
    lines = [
        f"data: {facts['files']} files"
        + f" in {facts['samples']} samples" * (facts["samples"] > facts["files"])
        + f", seen {facts['seen']} times an epoch" * (facts["seen"] > facts["samples"])
        + f", {len(facts['skipped'])} skipped"
    ]
    lines += [f"  {w}x{h}, {f} frame{'s' * (f > 1)}: {n}" for w, h, f, n in facts["buckets"]]
    lines += [f"  {NOTES[note]}: {n}" for note, n in facts["notes"].items()]
    if n := facts["several captions"]:
        lines.append(f"  with several lines of caption, of which one is drawn each time: {n}")
    if (long := facts.get("long captions", {"files": 0}))["files"]:
        lines.append(
            f"  with a caption over {MAX_TOKENS} tokens, the rest of which is not read: {long['files']} "
            f"({long['worst']} tokens: {Path(long['of']).name})"
        )
    if (cut := facts["cut off"])["files"]:
        lines.append(f"  cut off after at most {cut['frames']} frames: {cut['files']}, {cut['used']:.0%} of them used")
    if (crop := facts["cropped"])["worst"] >= 0.005:
        name = Path(crop["of"]).name
        lines.append(f"  cropped by {crop['mean']:.0%} of the picture on average, {crop['worst']:.0%} at most ({name})")
    if (large := facts["enlarged"])["files"]:
        name = Path(large["of"]).name
        lines.append(
            f"  enlarged: {large['files']}, {large['mean']:.1f} times on average, {large['worst']:.1f} at most ({name})"
        )
    return "\n".join(lines + [f"  skipped {path}: {reason}" for path, reason in facts["skipped"]])


def write_report(dataset):
    """Write the data report of a data.Dataset to data_report.json in its cache folder."""
    if dataset.world.is_main:
        with atomic(dataset.config.cache / "data_report.json") as tmp:
            tmp.write_text(json.dumps(describe(dataset), indent=1, ensure_ascii=False))


# ---- the sheet -------------------------------------------------------------------------------------------------------
class DataSheet:
    """A picture of at most SHOWN samples as the model sees them: the first, middle and last frame and the first caption
    of each sample.
    """

    def __init__(self, items):
        self.items = items[:: math.ceil(len(items) / SHOWN)] if items else []
        self.frames = {}

    def add(self, item, frames):
        """If the sheet shows this item, keep those of its frames that the sheet needs, so that `write` need not decode
        the file again. frames: all frames of the item.
        """
        if any(item is other for other in self.items):
            self.frames[id(item)] = [frames[k] for k in shown_frames(item)]

    def write(self, path):
        """Write the sheet to `path`, unless this file already shows the same data."""
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
    """Return the indices, within an item, of the frames that the sheet shows."""
    return np.unique([0, item.frames // 2, item.frames - 1]).tolist()


def read_shown(item):
    """Read from an item's file the frames that the sheet shows. Return a list of frames (H,W,3) uint8, or [] if the
    file cannot be read.
    """
    times = [wanted_times(item)[k] for k in shown_frames(item)]
    try:
        shown = cached_probe(item.path, item.digest, None)
        return next(read_windows(item.path, [times], covering(item.width, item.height), shown))
    except Skip:
        return []


def key_of(path):
    """Return the key, stored in a sheet's file, that identifies the data shown; None if the file is not a sheet."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.info.get("data")
    except Exception:  # PIL raises many kinds of exceptions for a damaged file
        return None
