"""Files that are kept between runs, named by a hash of everything that decides their contents."""

import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from nanowan.errors import BadInput
from nanowan.files import atomic
from nanowan.formats.header import save
from nanowan.video import Skip, cover, is_image, nearest_frames, open_photo, probe, to_video


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


def sidecar_frames(item, kind=None, size=None):
    """The frames (H,W,3) uint8 of a clip, or of its sidecar of this kind at the same times, those after the sample
    included. size: (width, height), if it is not the bucket's.
    """
    wanted = [item.start + k / item.fps for k in range(item.frames + item.frames_after)]
    file = item.sidecars[kind][0] if kind else item.path
    return nearest_frames(file, wanted, *(size or (item.width, item.height)))


def pixels(item):
    """(3,T,H,W) in [-1,1] of an item. Raises Skip where its file is not what it was when it was looked at."""
    if is_image(item.path):
        frames = [np.array(cover(open_photo(item.path), item.width, item.height))]
    else:
        frames = sidecar_frames(item)
    return to_video(frames)


def digest(path, cache=None):
    """A hash of a file's bytes, computed once for each state of the file (its inode, time and size), by this process or,
    with a cache folder, by any: a checkpoint is not read whole at every start.
    """
    path, stat = Path(path).absolute(), Path(path).stat()
    return _digest(path, cache, stat.st_ino, stat.st_mtime_ns, stat.st_size)


@functools.cache
def _digest(path, cache, *state):
    kept = cache and cache_file(cache, ".digest", file=str(path), state=state)
    if kept and kept.exists():
        return kept.read_text()
    with open(path, "rb") as f:
        found = hashlib.file_digest(f, "blake2b").hexdigest()
    if kept:
        with atomic(kept) as tmp:
            tmp.write_text(found)
    return found


def cache_file(cache, suffix=".safetensors", **parts):
    """The cache file for something decided by `parts`."""
    name = hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=20).hexdigest()
    return Path(cache) / (name + suffix)


def latent_files(items, cache, vae_file, samples=None):
    """The cache files of some items' latents, whether they exist yet or not."""
    weights = digest(vae_file, cache)
    return [
        cache_file(
            cache,
            media=i.digest,
            size=i.bucket,
            start=i.start,
            fps=i.fps,
            vae=weights,
            dtype="fp32",
            conditioning=samples.cache_key(i) if samples else "",
        )
        for i in items
    ]


def cache_latents(items, cache, vae_file, load_vae, samples=None):
    """Cache the latents of every item that is not cached yet. `load_vae()` is called only if something is missing.
    Returns [(path, reason)] of the files that could not be encoded, such as those deleted since `scan`: what
    `latent_files` names for them does not exist.

    Each file holds `latents` (C,T',h,w) fp32, and what `samples` (variants/samples.py) adds to them. Several processes
    may do this at once: a file appears whole or not at all, and what another one has done meanwhile is left out.
    """
    missing = [(i, f) for i, f in zip(items, latent_files(items, cache, vae_file, samples)) if not f.exists()]
    vae, failed = load_vae() if missing else None, []
    for item, file in tqdm(missing, desc="latents", unit="sample", disable=not missing):
        if file.exists():
            continue
        try:
            video = pixels(item)[None].to(next(vae.parameters()).device)
            if digest(item.path) != item.digest:
                raise Skip("has changed since it was looked at")
            tensors = samples.cached(vae, video, item) if samples else {}
            if "latents" not in tensors:
                tensors["latents"] = vae.encode(video)[0]
        except Skip as e:
            failed.append((item.path, str(e)))
        else:
            save(file, tensors)
    return failed


def text_files(captions, cache, encoder, dtype):
    """{caption: the cache file of its embedding}, whether it exists yet or not. encoder: digests of its weights and
    tokenizer.
    """
    return {c: cache_file(cache, text=c, encoder=encoder, dtype=str(dtype)) for c in dict.fromkeys(captions)}


def cache_texts(files, load_encoder):
    """Make sure that the embeddings {text: cache file} of text_files are cached. `load_encoder()` is called only if one
    is missing. Each file holds `embedding` (S,D) in the encoder's dtype.
    """
    missing = [text for text, file in files.items() if not file.exists()]
    encoder = load_encoder() if missing else None
    for text in tqdm(missing, desc="texts", unit="caption", disable=not missing):
        if not files[text].exists():
            with torch.no_grad():
                save(files[text], {"embedding": encoder.encode([text])[0][0]})
