"""A folder of images and clips with captions -> buckets -> a cache of latents and text embeddings -> batches.

Captions lie beside the media as NAME.txt, one per line; where there are several, one is drawn at random. Or one JSONL
lists paths and captions. Media are resized and centre-cropped to the bucket whose aspect is nearest, clips resampled to
the model's frame rate and cut to 4k+1 frames. Cache entries are named by a hash of everything that decides their
contents, so nothing stale is ever used.
"""

import functools
import hashlib
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import BadInput, atomic, save

IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
CLIPS = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"}
MODES = {
    "first": "from its beginning",
    "middle": "around its middle",
    "uniform": "spread evenly over its whole length",
    "several": "one after the other, as many as it holds",
}  # which frames of a clip


@dataclass
class Item:
    """One sample: of a file, 4k+1 frames at fps from `start` seconds on (1 for an image), at its bucket's width and
    height in px.
    """

    path: Path
    captions: list
    width: int
    height: int
    frames: int
    fps: float
    start: float = 0.0
    digest: str = ""

    @property
    def bucket(self):
        return self.width, self.height, self.frames


class Skip(Exception):
    """Why a file cannot be trained on."""


def buckets(area, multiple):
    """Every (w, h) with sides multiples of `multiple` that fills `area` px best for its width, aspects from 1:4 to 4:1."""
    found = set()
    for w in range(multiple, int(2 * area**0.5) + multiple, multiple):
        h = max(multiple, round(area / w / multiple) * multiple)
        if w * h <= area * 1.1 and 0.25 <= w / h <= 4:
            found.add((w, h))
    return sorted(found) or [(multiple, multiple)]


def nearest_bucket(width, height, area, multiple):
    return min(buckets(area, multiple), key=lambda b: (abs(math.log(b[0] / b[1] * height / width)), -b[0] * b[1]))


def frames(path, images=True):
    """Yield (seconds since the first frame, PIL image or frame) of a clip, upright. Raises Skip where it cannot be
    decoded.
    """
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise Skip("has no video stream")
            stream, start = container.streams.video[0], None
            stream.codec_context.options = {"err_detect": "explode"}  # damaged frames are an error, not grey
            for frame in container.decode(stream):
                start = frame.time if start is None else start
                yield frame.time - start, frame.to_image().rotate(frame.rotation, expand=True) if images else frame
    except (av.FFmpegError, OSError, ValueError, TypeError) as e:
        raise Skip(f"cannot be decoded ({e})") from None


def open_photo(path):
    """A photograph as upright RGB, 16-bit scaled to 8, transparency on white. Raises Skip."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                image = image.convert("I").point(lambda v: v / 257).convert("L")
            if image.mode == "F":
                raise Skip("holds floating-point pixels, whose range is unknown")
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise Skip(f"cannot be read ({e})") from None


def probe(path):
    """[width, height, times of its frames in seconds, or None for an image] of a media file, by decoding it once.
    Raises Skip.
    """
    if path.suffix.lower() in IMAGES:
        return [*open_photo(path).size, None]
    times, size = [], None
    for at, frame in frames(path, images=False):
        times.append(at)
        size = (frame.height, frame.width) if frame.rotation % 180 else (frame.width, frame.height)
    if not times:
        raise Skip("has no frames")
    return [*size, times]


def remembered_probe(path, digest, cache):
    """`probe`, kept in the cache by the file's digest: a clip is decoded once, not at every start."""
    if cache is None:
        return probe(path)
    file = entry(cache, ".json", probe=digest, kind=path.suffix.lower())
    if file.exists():
        found = json.loads(file.read_text())
    else:
        found = probe(path)
        try:
            with atomic(file) as tmp:
                tmp.write_text(json.dumps(found))
        except OSError as e:  # not the clip's fault
            raise BadInput(f"--cache {cache}: cannot be written ({e.strerror})") from None
    return found


def read_captions(path):
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


def listed(file):
    """[(path, captions or why there are none)] of a JSONL: lines {"path": ..., "caption": text or list of texts}, paths
    relative to it.
    """
    rows = []
    try:
        for i, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n")):
            if line.strip():
                row = json.loads(line)
                path, told = row.get("path", row.get("file")), row.get("caption")
                captions = [c.strip() for c in ([told] if isinstance(told, str) else told or []) if c.strip()]
                rows.append((file.parent / path, captions or Skip(f"has no caption on line {i + 1} of {file.name}")))
    except (OSError, ValueError, AttributeError, TypeError) as e:
        where = f", line {i + 1}" if isinstance(e, (AttributeError, TypeError, json.JSONDecodeError)) else ""
        raise BadInput(f'--data {file}{where}: not lines of {{"path": ..., "caption": ...}} ({e})') from None
    return rows


def windows(times, most, fps, mode):
    """[(start in seconds, frames, fps)] to take of a clip whose frames are shown at `times`. Raises Skip where it is
    too short.
    """
    length = max(times)
    available = int(length * fps + 0.05) + 1  # frames at the model's rate; Matroska rounds times to milliseconds
    n = min(most, (available - 1) // 4 * 4 + 1)
    if min(available, len(times)) < 5 <= most:
        raise Skip(f"too short: {len(times)} frames, {available} at {fps:g} fps; at least 5 are needed")
    if mode == "uniform" and n > 1:
        return [(0.0, n, (n - 1) / length)]
    if mode == "several":
        return [(k * n / fps, n, fps) for k in range(available // n)]
    return [((available - n) // 2 / fps if mode == "middle" else 0.0, n, fps)]


def scan(source, area, multiple, most, fps, mode="first", cache=None):
    """Look through a folder, recursively, or a JSONL: ([Item], [(path, reason)] of what is skipped).

    area px, `most` frames per sample at fps, mode: one of MODES. Raises BadInput, with the reasons, where nothing is
    left."""
    source = Path(source)
    if source.is_dir():
        found = [
            (p, None)
            for p in sorted(source.rglob("*"))
            if p.suffix.lower() in IMAGES | CLIPS and not p.name.startswith(".")
        ]
    elif source.is_file():
        found = listed(source)
    else:
        raise BadInput(f"--data {source}: no such folder or JSONL file")
    items, skipped = [], []
    for path, captions in found:
        try:
            if not path.is_file():
                raise Skip("is not a file" if path.exists() or path.is_symlink() else "does not exist")
            if path.suffix.lower() not in IMAGES | CLIPS:
                raise Skip(f"is none of {', '.join(sorted(IMAGES | CLIPS))}")
            captions = read_captions(path) if captions is None else captions
            if isinstance(captions, Skip):
                raise captions
            if path.stat().st_size == 0:
                raise Skip("is empty")
            name = digest(path)
            width, height, times = remembered_probe(path, name, cache)
            if not 1 / 6 <= width / height <= 6:
                raise Skip(f"{width}x{height} is too long and thin; buckets go from 1:4 to 4:1")
            for start, n, rate in [(0.0, 1, fps)] if times is None else windows(times, most, fps, mode):
                items.append(Item(path, captions, *nearest_bucket(width, height, area, multiple), n, rate, start, name))
        except Skip as e:
            skipped.append((path, str(e)))
        except OSError as e:
            skipped.append((path, e.strerror or str(e)))
    if not items:
        raise BadInput(
            f"--data {source}: nothing to train on; "
            + (
                "; ".join(f"{p.name} {why}" for p, why in skipped[:20])
                or f"no {', '.join(sorted(IMAGES | CLIPS))} in it"
            )
        )
    return items, skipped


def report(items, skipped):
    """What will be trained on and what will not, as text."""
    counts = {}
    for item in items:
        counts[item.bucket] = counts.get(item.bucket, 0) + 1
    files = len({i.path for i in items})
    lines = [f"data: {files} files" + f" in {len(items)} samples" * (len(items) > files) + f", {len(skipped)} skipped"]
    lines += [f"  {w}x{h}, {f} frame{'s' * (f > 1)}: {n}" for (w, h, f), n in sorted(counts.items())]
    return "\n".join(lines + [f"  skipped {path}: {why}" for path, why in skipped])


def pixels(item):
    """(3,T,H,W) in [-1,1] of an item, resized to cover its bucket and centre-cropped; of a clip, the frames nearest to
    start + k/fps.
    """
    from PIL import Image

    def fit(image):
        scale = max(item.width / image.width, item.height / image.height)
        w, h = round(image.width * scale), round(image.height * scale)
        x, y = (w - item.width) // 2, (h - item.height) // 2
        image = image if image.size == (w, h) else image.resize((w, h), Image.LANCZOS)
        return np.array(image.crop((x, y, x + item.width, y + item.height)))

    if item.path.suffix.lower() in IMAGES:
        chosen = [fit(open_photo(item.path))]
    else:
        wanted, chosen, last = [item.start + k / item.fps for k in range(item.frames)], [], None
        for at, image in frames(item.path):
            while (
                last is not None
                and len(chosen) < item.frames
                and abs(at - wanted[len(chosen)]) > abs(last[0] - wanted[len(chosen)])
            ):
                chosen.append(fit(last[1]))  # the frame before was the nearer one
            if len(chosen) == item.frames:
                break
            last = at, image
        chosen += [fit(last[1])] * (item.frames - len(chosen))
    return torch.from_numpy(np.stack(chosen)).permute(3, 0, 1, 2).float() / 127.5 - 1


# ---- the cache ---------------------------------------------------------------------------------------------------
def digest(path):
    """A hash of a file's bytes, computed once for each state of the file."""
    stat = Path(path).stat()
    return _digest(str(path), stat.st_ino, stat.st_mtime_ns, stat.st_size)


@functools.cache
def _digest(path, *_):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "blake2b").hexdigest()


def entry(cache, suffix=".safetensors", **parts):
    """The cache file for something decided by `parts`."""
    return Path(cache) / (
        hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=20).hexdigest() + suffix
    )


def latent_bytes(items, vae22, image_condition=False):
    """Bytes that the latents of some items take in the cache, at 4 a number."""
    side, channels = (16, 48) if vae22 else (8, 16)
    return sum(
        4 * (channels + 20 * image_condition) * (1 + (i.frames - 1) // 4) * (i.width // side) * (i.height // side)
        for i in items
    )


def latent_files(items, cache, vae_file, extras):
    """The cache files of some items' latents."""
    weights = digest(vae_file)
    return [
        entry(
            cache, media=i.digest, size=i.bucket, start=i.start, fps=i.fps, vae=weights, dtype="fp32", y=image_condition
        )
        for i in items
    ]


def cache_latents(items, cache, vae_file, load_vae, extras):
    """Make sure every item's latents are cached; returns their files. `load_vae()` is called only if something is
    missing.

    Each file holds `latents` (C,T',h,w) fp32, and with `image_condition` (I2V) `y` (20,T',h,w), the conditioning on its
    first frame. Several processes may do this at once: a file appears whole or not at all, and what another one has
    done meanwhile is left out.
    """
    files = latent_files(items, cache, vae_file, extras)
    missing = [(i, f) for i, f in zip(items, files) if not f.exists()]
    vae = load_vae() if missing else None
    for item, file in tqdm(missing, desc="latents", unit="sample", disable=not missing):
        if file.exists():
            continue
        video = pixels(item)[None].to(next(vae.parameters()).device)
        save(file, {"latents": vae.encode(video)[0], **extras.cached(vae, video)})
    return files


def cache_texts(captions, cache, encoder_files, load_encoder, dtype):
    """Make sure every caption's embedding is cached; returns {caption: file}. `load_encoder()` is called only if one is
    missing. `encoder_files`: its weights and its tokenizer. Each cache file holds `embedding` (S,D) in the encoder's
    dtype.
    """
    weights = [digest(f) for f in encoder_files]
    files = {c: entry(cache, text=c, encoder=weights, dtype=str(dtype)) for c in dict.fromkeys(captions)}
    missing = [c for c, f in files.items() if not f.exists()]
    encoder = load_encoder() if missing else None
    for caption in tqdm(missing, desc="texts", unit="caption", disable=not missing):
        if not files[caption].exists():
            with torch.no_grad():
                save(files[caption], {"embedding": encoder.encode([caption])[0][0]})
    return files


# ---- batches -----------------------------------------------------------------------------------------------------
class Batches:
    """Which items each step sees: every epoch is reshuffled from the seed, a batch holds one bucket, and remainders
    make smaller batches, so that every file is seen once an epoch. `at(step)` needs no history: a resumed run just goes
    on.
    """

    def __init__(self, items, batch, seed):
        self.seed, self.batch = seed, batch
        self.groups = {}
        for i, item in enumerate(items):
            self.groups.setdefault(item.bucket, []).append(i)
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
