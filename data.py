"""A folder of images and clips with captions -> buckets -> a cache of latents and text embeddings -> batches.

Captions lie beside the media as NAME.txt, one per line; where there are several, one is drawn at random. Or a list
names files and captions: a JSONL, or a CSV with a header, by itself or as metadata.jsonl / metadata.csv in the folder.
Media are resized and centre-cropped to the bucket whose aspect is nearest, clips resampled to the model's frame rate
and cut to 4k+1 frames. Cache entries are named by a hash of everything that decides their contents, so nothing stale is
ever used.
"""

import csv
import functools
import hashlib
import json
import math
import os
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import BadInput, atomic, remove_leftovers, save
from media import Skip, cover, open_photo, read_frames, why

IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
CLIPS = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"}
# what is not read, but named where it lies, so that nobody believes it was
OTHER_MEDIA = set(
    ".3gp .apng .arw .avif .cr2 .cr3 .dng .exr .flv .gif .hdr .heic .heif .jfif .jp2 .jxl .m2ts .mpeg .mpg .mts .mxf "
    ".nef .ogv .psd .raw .svg .tga .tif .tiff .ts .vob .wmv .y4m".split()
)
MAX_ASPECT = 4  # of buckets: from 1:4 to 4:1
MAX_CROPPED_ASPECT = 6  # of media: what is longer or thinner would lose more than a third in its bucket
MAX_GAP = 60  # seconds between two frames: more is a damaged clock, and would fill hours with one picture
CLIP_MODES = {
    "first": "from its beginning",
    "middle": "around its middle",
    "uniform": "spread evenly over its whole length",
    "several": "one after the other, as many as it holds",
}  # which frames of a clip
PATH_COLUMNS = ("path", "file", "file_name", "video_path", "image_path", "video", "image")
CAPTION_COLUMNS = ("caption", "prompt", "text")
REPEAT_COLUMNS = ("repeat", "num_repeats")


@dataclass
class Item:
    """One sample: of a file, 4k+1 frames at fps from `start` seconds on (1 for an image), at its bucket's width and
    height in px; `frames_after` more of them are decoded too. An epoch sees it `repeat` times. `source_size`: (width,
    height) in px at which the file is shown. `companions`: {kind: (file, digest)} of what belongs to it.
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
    source_size: tuple = (0, 0)
    frames_after: int = 0
    companions: dict = field(default_factory=dict)

    @property
    def bucket(self):
        return self.width, self.height, self.frames


def is_image(path):
    return path.suffix.lower() in IMAGES


# ---- buckets and windows -----------------------------------------------------------------------------------------
def buckets(area, multiple):
    """Every (w, h) with sides multiples of `multiple` that fills `area` px best for its width, within MAX_ASPECT."""
    found = set()
    for w in range(multiple, int((MAX_ASPECT * area) ** 0.5) + multiple, multiple):
        h = max(multiple, round(area / w / multiple) * multiple)
        if w * h <= area * 1.1 and 1 / MAX_ASPECT <= w / h <= MAX_ASPECT:
            found.add((w, h))
    return sorted(found) or [(multiple, multiple)]


def nearest_bucket(width, height, area, multiple):
    if not 1 / MAX_CROPPED_ASPECT <= width / height <= MAX_CROPPED_ASPECT:
        raise Skip(f"{width}x{height} is too long and thin; buckets go from 1:{MAX_ASPECT} to {MAX_ASPECT}:1")
    return min(buckets(area, multiple), key=lambda b: (abs(math.log(b[0] / b[1] * height / width)), -b[0] * b[1]))


def clip_windows(times, max_frames, fps, mode, over=1):
    """[(start in seconds, frames, fps)] to take of a clip whose frames are shown at `times`, by one of CLIP_MODES.
    frames: a multiple of 4 and `over`. Raises Skip where the clip is too short.
    """
    ordered = sorted(times)
    if (gap := max((b - a for a, b in zip(ordered, ordered[1:])), default=0)) > MAX_GAP:
        raise Skip(f"has frames that are {gap:.0f} s apart; {MAX_GAP} at most")
    length, available = ordered[-1], frames_from(0.0, times, fps)
    n = min(max_frames, (available - over) // 4 * 4 + over)
    if min(available, len(times)) < 4 + over <= max_frames:
        raise Skip(f"too short: {len(times)} frames, {available} at {fps:g} fps; at least {4 + over} are needed")
    if mode == "uniform" and n > 1:
        return [(0.0, n, (n - 1) / length)]
    if mode == "several":
        return [(k * n / fps, n, fps) for k in range(available // n)]
    return [((available - n) // 2 / fps if mode == "middle" else 0.0, n, fps)]


def frames_from(start, times, fps):
    """How many frames at a model's rate a clip holds from `start` seconds on; Matroska rounds times to milliseconds."""
    return int((max(times) - start) * fps + 0.05) + 1


# ---- looking at files --------------------------------------------------------------------------------------------
def decode_bytes(items):
    """Host memory that decoding the largest of some items takes, beside the frames that are kept of it. Measured per
    pixel: of a photograph 4 bytes, 8 where it is turned, 9 where it is transparent; of a clip in 4K 32.
    """
    return max((math.prod(i.source_size) * (9 if is_image(i.path) else 32) for i in items), default=0)


def probe(path):
    """[width, height, times of its frames in seconds, or None for an image] of a media file as it is shown, by decoding
    it once. Raises Skip.
    """
    if is_image(path):
        return [*open_photo(path).size, None]
    frames = [(f.seconds, f.size) for f in read_frames(path, images=False)]
    if not frames:
        raise Skip("has no frames")
    return [*frames[-1][1], [seconds for seconds, _ in frames]]


def cached_probe(path, digest, cache):
    """`probe`, kept in the cache by the file's digest: a clip is decoded once, not at every start."""
    if cache is None:
        return probe(path)
    file = cache_file(cache, ".json", shown=digest, kind=path.suffix.lower())
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):  # not there, or damaged
        found = probe(path)
    try:
        with atomic(file) as tmp:
            tmp.write_text(json.dumps(found))
    except OSError as e:  # not the clip's fault
        raise BadInput(f"--cache {cache}: {e.filename} {e.strerror}") from None
    return found


def nearest_frames(path, wanted, width, height):
    """The frames (height,width,3) uint8 of a clip that are nearest to the times `wanted`, in seconds and ascending."""
    chosen, before = [], None
    for frame in read_frames(path):
        while before and len(chosen) < len(wanted):
            at = wanted[len(chosen)]
            if abs(frame.seconds - at) <= abs(before.seconds - at):
                break
            chosen.append(np.array(cover(before.image, width, height, before.size)))
        if len(chosen) == len(wanted):
            break
        before = frame
    if before is None:
        raise Skip("has no frames")
    last = np.array(cover(before.image, width, height, before.size))
    return chosen + [last] * (len(wanted) - len(chosen))


def companion_frames(item, kind=None, size=None):
    """The frames (H,W,3) uint8 of a clip, or of its companion of this kind at the same times, those after the sample
    included. size: (width, height), if it is not the bucket's.
    """
    wanted = [item.start + k / item.fps for k in range(item.frames + item.frames_after)]
    file = item.companions[kind][0] if kind else item.path
    return nearest_frames(file, wanted, *(size or (item.width, item.height)))


def pixels(item):
    """(3,T,H,W) in [-1,1] of an item. Raises Skip where its file is not what it was when it was looked at."""
    if is_image(item.path):
        frames = [np.array(cover(open_photo(item.path), item.width, item.height))]
    else:
        frames = companion_frames(item)
    return to_video(frames)


def to_video(frames):
    """A list of (H,W,3) uint8 -> (3,T,H,W) in [-1,1]."""
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).float() / 127.5 - 1


# ---- what there is -----------------------------------------------------------------------------------------------
def read_captions(path):
    """The lines of the text file beside a media file. Raises Skip."""
    file = path.with_suffix(".txt")
    try:
        captions = [line.strip() for line in file.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except UnicodeDecodeError:
        raise Skip(f"its caption {file.name} is not UTF-8") from None
    except OSError:
        raise Skip(f"has no caption: {file.name} is missing or unreadable") from None
    if not captions:
        raise Skip(f"its caption {file.name} is empty")
    return captions


def csv_rows(lines):
    """Yield (line number, {column: value}) of a CSV with a header. Raises ValueError."""
    reader = csv.DictReader(lines, strict=True)
    try:
        for row in reader:
            if None in row:
                raise csv.Error("more fields than the header has; texts with commas in them need quotes")
            yield reader.line_num, row
    except csv.Error as e:
        raise ValueError(f"line {reader.line_num}: {e}") from None


def json_rows(lines):
    """Yield (line number, {column: value}) of a JSONL. Raises ValueError."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as e:
                raise ValueError(f"line {number}: {e}") from None
            if not isinstance(row, dict):
                raise ValueError(f"line {number}: {line.strip()[:60]} is no object")
            yield number, row


def read_list(file):
    """[(path, captions or the Skip that says why there are none, repeat)] of a JSONL or CSV. A row names its file in
    one of PATH_COLUMNS, relative to the list, and its text, or list of texts, in one of CAPTION_COLUMNS. Raises
    BadInput.
    """
    is_csv = file.suffix.lower() == ".csv"
    try:
        with open(file, encoding="utf-8-sig", newline="" if is_csv else "\n") as f:
            rows = list(csv_rows(f) if is_csv else json_rows(f))
    except (OSError, ValueError) as e:
        form = "a CSV with a header" if is_csv else 'lines of {"path": ..., "caption": ...}'
        raise BadInput(f"--data {file}: not {form}: {why(e)}") from None
    return [list_entry(file, number, row) for number, row in rows]


def list_entry(file, number, row):
    """An entry of `read_list`."""
    where = f"--data {file}, line {number}"
    path, captions, repeat = (
        next((row[c] for c in columns if row.get(c) not in (None, "")), None)
        for columns in (PATH_COLUMNS, CAPTION_COLUMNS, REPEAT_COLUMNS)
    )
    if not isinstance(path, str):
        raise BadInput(
            f"{where}: names no file; of {', '.join(PATH_COLUMNS)} one should hold a path, "
            f"and its columns are {', '.join(row)[:200]}"
        )
    captions = [] if captions is None else captions if isinstance(captions, list) else [captions]
    if not all(isinstance(c, str) for c in captions):
        raise BadInput(f"{where}: its caption is neither a text nor a list of texts")
    repeat = "1" if repeat is None else str(repeat)
    if not repeat.isdecimal() or repeat == "0":
        raise BadInput(f"{where}: repeat {repeat}: should be a whole number from 1 on")
    captions = [c.strip() for c in captions if c.strip()]
    none = Skip(f"has no caption on line {number} of {file.name}, in {', '.join(CAPTION_COLUMNS)}")
    return file.parent / path, captions or none, int(repeat)


def walk(folder):
    """The paths of all that is in a folder, recursively, but for what is hidden, and [(folder, reason)] of those that
    cannot be opened. Links to folders are followed; a folder that was seen is not entered again.
    """
    found, unreadable, seen = [], [], set()
    for where, folders, files in os.walk(
        folder, followlinks=True, onerror=lambda e: unreadable.append((Path(e.filename), e.strerror))
    ):
        state = os.stat(where)
        if (state.st_dev, state.st_ino) in seen:
            folders.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        found += [Path(where, name) for name in (*folders, *files) if not name.startswith(".")]
    return sorted(found), unreadable


def find_media(source):
    """[(path, captions, repeat)] of everything in a list, or of a folder, that is media or looks like it. captions: a
    Skip where there can be none, None where they lie beside the file.
    """
    if source.is_file():
        return read_list(source)
    if not source.is_dir():
        raise BadInput(f"--data {source}: no such folder, JSONL or CSV file")
    listed = [
        e for name in ("metadata.jsonl", "metadata.csv") if (source / name).is_file() for e in read_list(source / name)
    ]
    listed_paths = {os.path.abspath(path) for path, _, _ in listed}
    paths, unreadable = walk(source)
    return (
        listed
        + [
            (p, None, 1)
            for p in paths
            if p.suffix.lower() in IMAGES | CLIPS | OTHER_MEDIA and os.path.abspath(p) not in listed_paths
        ]
        + [(p, Skip(f"cannot be opened ({reason})"), 1) for p, reason in unreadable]
    )


def check_usable(path, captions):
    """A file's captions. Raises Skip for what can be known without decoding it."""
    if isinstance(captions, Skip):
        raise captions
    if not path.is_file():
        raise Skip("is not a file" if path.exists() or path.is_symlink() else "does not exist")
    if path.suffix.lower() not in IMAGES | CLIPS:
        raise Skip(f"is none of {', '.join(sorted(IMAGES | CLIPS))}")
    captions = read_captions(path) if captions is None else captions
    if path.stat().st_size == 0:
        raise Skip("is empty")
    return captions


def scan(source, area, multiple, max_frames, fps, mode="first", cache=None, samples=None):
    """Look through a folder, recursively, or a list: ([Item], [(path, reason)] of what is skipped).

    area px, max_frames per sample at fps, mode: one of CLIP_MODES, samples: a conditions.Samples. Raises BadInput, with
    the reasons, where nothing is left."""
    if cache is not None:
        remove_leftovers(cache)
    items, skipped = [], []
    over, after = (samples.frames_over, samples.frames_after) if samples else (1, 0)
    for path, captions, repeat in find_media(Path(source)):
        if samples and captions is None and samples.is_companion(path):
            continue
        try:
            captions = check_usable(path, captions)
            name = digest(path)
            width, height, times = shown = cached_probe(path, name, cache)
            bucket = nearest_bucket(width, height, area, multiple)
            companions = samples.companions(path, shown, cache) if samples else {}
            windows = [(0.0, 1, fps)] if times is None else clip_windows(times, max_frames, fps, mode, over)
            for start, n, rate in windows:
                item = Item(path, captions, *bucket, n, rate, start, name, repeat, (width, height), 0, companions)
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


def report(items, skipped):
    """What will be trained on and what will not, as text."""
    counts = {}
    for item in items:
        counts[item.bucket] = counts.get(item.bucket, 0) + 1
    files, seen = len({i.path for i in items}), sum(i.repeat for i in items)
    lines = [
        f"data: {files} files"
        + f" in {len(items)} samples" * (len(items) > files)
        + f", seen {seen} times an epoch" * (seen > len(items))
        + f", {len(skipped)} skipped"
    ]
    lines += [f"  {w}x{h}, {f} frame{'s' * (f > 1)}: {n}" for (w, h, f), n in sorted(counts.items())]
    return "\n".join(lines + [f"  skipped {path}: {reason}" for path, reason in skipped])


# ---- the cache ---------------------------------------------------------------------------------------------------
def digest(path):
    """A hash of a file's bytes, computed once for each state of the file."""
    stat = Path(path).stat()
    return _digest(str(path), stat.st_ino, stat.st_mtime_ns, stat.st_size)


@functools.cache
def _digest(path, *_):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "blake2b").hexdigest()


def cache_file(cache, suffix=".safetensors", **parts):
    """The cache file for something decided by `parts`."""
    name = hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=20).hexdigest()
    return Path(cache) / (name + suffix)


def latent_files(items, cache, vae_file, conditioning=None):
    """The cache files of some items' latents, whether they exist yet or not."""
    weights = digest(vae_file)
    return [
        cache_file(
            cache,
            media=i.digest,
            size=i.bucket,
            start=i.start,
            fps=i.fps,
            vae=weights,
            dtype="fp32",
            conditioning=conditioning.cache_key(i) if conditioning else "",
        )
        for i in items
    ]


def cache_latents(items, cache, vae_file, load_vae, conditioning=None):
    """Cache the latents of every item that is not yet in the cache. `load_vae()` is called only if something is
    missing. Returns [(path, reason)] of the files that could not be encoded, such as those deleted since `scan`: what
    `latent_files` names for them does not exist.

    Each file holds `latents` (C,T',h,w) fp32, and what `conditioning`, a conditions.Samples, adds to them:
        conditioning.cache_key(item) -> what decides its tensors, for the file's name: plain values, such as digests
        conditioning.cached(vae, video (1,3,T,H,W), item) -> {name: tensor}, other latents too; may raise Skip
    Several processes may do this at once: a file appears whole or not at all, and what another one has done meanwhile
    is left out.
    """
    missing = [(i, f) for i, f in zip(items, latent_files(items, cache, vae_file, conditioning)) if not f.exists()]
    vae, failed = load_vae() if missing else None, []
    for item, file in tqdm(missing, desc="latents", unit="sample", disable=not missing):
        if file.exists():
            continue
        try:
            video = pixels(item)[None].to(next(vae.parameters()).device)
            if digest(item.path) != item.digest:
                raise Skip("has changed since it was looked at")
            tensors = conditioning.cached(vae, video, item) if conditioning else {}
            if "latents" not in tensors:
                tensors["latents"] = vae.encode(video)[0]
        except Skip as e:
            failed.append((item.path, str(e)))
        else:
            save(file, tensors)
    return failed


def text_files(captions, cache, encoder_files, dtype):
    """{caption: the cache file of its embedding}, whether it exists yet or not. encoder_files: weights, tokenizer."""
    weights = [digest(f) for f in encoder_files]
    return {c: cache_file(cache, text=c, encoder=weights, dtype=str(dtype)) for c in dict.fromkeys(captions)}


def cache_texts(captions, cache, encoder_files, load_encoder, dtype):
    """Make sure every caption's embedding is cached; returns text_files. `load_encoder()` is called only if one is
    missing. Each cache file holds `embedding` (S,D) in the encoder's dtype.
    """
    files = text_files(captions, cache, encoder_files, dtype)
    missing = [c for c, f in files.items() if not f.exists()]
    encoder = load_encoder() if missing else None
    for caption in tqdm(missing, desc="texts", unit="caption", disable=not missing):
        if not files[caption].exists():
            with torch.no_grad():
                save(files[caption], {"embedding": encoder.encode([caption])[0][0]})
    return files


# ---- batches -----------------------------------------------------------------------------------------------------
class Batches:
    """Which items each step sees: every epoch is reshuffled from the seed, a batch holds one bucket, or `group`, and
    remainders make smaller batches, so that every file is seen once an epoch, or as often as its `repeat` says.
    `at(step)` needs no history: a resumed run just goes on.
    """

    def __init__(self, items, batch, seed, group=lambda item: item.bucket):
        self.seed, self.batch = seed, batch
        self.groups = {}
        for i, item in enumerate(items):
            self.groups.setdefault(group(item), []).extend([i] * item.repeat)
        self.per_epoch = sum(-(-len(g) // batch) for g in self.groups.values())
        self._epoch = None

    def at(self, step):
        """Indices of the items of a step (0-based)."""
        epoch, position = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            rng, batches = random.Random(f"{self.seed} epoch {epoch}"), []
            for _, group in sorted(self.groups.items()):
                order = rng.sample(group, len(group))
                batches += [order[i : i + self.batch] for i in range(0, len(order), self.batch)]
            rng.shuffle(batches)
            self._epoch, self._batches = epoch, batches
        return self._batches[position]


def collate(embeddings):
    """list of (S,D) -> (B,S,D) zero-padded, lens (B,)."""
    return torch.nn.utils.rnn.pad_sequence(embeddings, batch_first=True), torch.tensor([len(e) for e in embeddings])
