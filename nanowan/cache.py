"""Keep latents, text embeddings and facts about media between runs, in files named by a hash of their inputs."""

import contextlib
import functools
import hashlib
import json
import os
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from nanowan.errors import BadInput, Skip
from nanowan.files import atomic
from nanowan.formats.header import save
from nanowan.video import Shown, cover, is_sound_broken, probe, read_windows, to_video

DECODERS = min(4, max(2, os.cpu_count() or 2))  # threads that decode samples while other samples are encoded


# ---- facts about media files -----------------------------------------------------------------------------------------
def remembered(cache, answer, **question):
    """Return the result of answer(), a function that inspects a media file. The result is kept in the cache folder, in
    a JSON file named by a hash of the keyword arguments `question`. answer() is called only if this JSON file is
    missing or damaged. If cache is None, nothing is kept. Raises BadInput if the JSON file cannot be written.
    """
    if cache is None:
        return answer()
    file = cache_file(cache, ".json", **question)
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):  # the file is missing or damaged
        value = answer()
    try:
        with atomic(file) as tmp:
            tmp.write_text(json.dumps(value))
    except OSError as e:  # the cache failed, which is no reason to skip the clip
        raise BadInput(f"--cache {cache}: {e.filename} {e.strerror}") from None
    return value


def cached_probe(path, digest, cache):
    """Return video.probe(path). The result is kept in the cache under the file's digest."""
    return Shown(*remembered(cache, lambda: list(probe(path)), shown=digest, kind=path.suffix.lower(), version=3))


def cached_is_sound_broken(path, digest, cache):
    return remembered(cache, lambda: is_sound_broken(path), sound=digest)


# ---- samples, decoded ------------------------------------------------------------------------------------------------
def wanted_times(item):
    """Return the times, in seconds, of an Item's `frames` frames and of the `frames_after` frames that follow them
    (training/scan.py).
    """
    return [item.start + k / item.fps for k in range(item.frames + item.frames_after)]


def covering(width, height):
    """Return a function that takes a video.Frame and returns its picture as (height,width,3) uint8, resized and cropped
    to width x height px.
    """
    return lambda frame: np.array(cover(frame.image, width, height, frame.size))


def read_items(items, sizes=None, cache=None):
    """Yield {kind: list of frames (H,W,3) uint8} for each of `items`: Items of one media file, sorted by their start.
    Kind "" is the media file, at the items' width and height. The other kinds are its sidecars, such as a pose video,
    read at the same times. sizes: {kind: (width, height)} of the sidecars to read. Each file is decoded once, and about
    one sample of each file is in memory at a time. Raises Skip if a file cannot be read.
    """
    windows, readers = [wanted_times(item) for item in items], {}
    for item in items[:1]:
        files = {"": (item.path, item.digest)} | item.sidecars
        for kind, size in ({"": (item.width, item.height)} | (sizes or {})).items():
            readers[kind] = read_file(*files[kind], windows, size, cache, f"its {files[kind][0].name} " if kind else "")
    for parts in zip(*readers.values()):
        yield dict(zip(readers, parts))


def read_file(path, name, windows, size, cache, called):
    """Yield one list of frames for each list of times in `windows` (video.read_windows). Frames are resized and cropped
    to `size` (width, height). name: the file's digest, for cached_probe. called: the beginning of a Skip's message.
    """
    try:
        yield from read_windows(path, windows, covering(*size), cached_probe(path, name, cache))
    except Skip as e:
        raise Skip(f"{called}{e}") from None


def check_unchanged(item):
    """Raise Skip if an item's media file or one of its sidecars was changed or removed after `scan`."""
    for path, name in ((item.path, item.digest), *item.sidecars.values()):
        subject = "" if path == item.path else f"its {path.name} "
        if not path.exists():
            raise Skip(f"{subject}does not exist any more")
        if digest(path) != name:
            raise Skip(f"{subject}has changed since it was looked at")


def pixels(item):
    """Return the video (3,T,H,W) in [-1,1] of an item. Raises Skip if its file cannot be read."""
    return to_video(next(read_items([item]))[""])


def in_threads(jobs, run):
    """Run the generators run(job) of all jobs in DECODERS threads, and yield their results in the order in which they
    arrive. At most DECODERS results wait to be yielded; in addition, each thread holds one result. If a thread raises
    an exception, this generator raises it too. Closing this generator ends the threads.
    """
    results, stopped, lock, todo = queue.Queue(DECODERS), threading.Event(), threading.Lock(), iter(jobs)

    def put(result):
        placed = False
        while not placed and not stopped.is_set():
            with contextlib.suppress(queue.Full):
                results.put(result, timeout=0.1)
                placed = True

    def next_job():
        with lock:
            return None if stopped.is_set() else next(todo, None)

    def work():
        try:
            while (job := next_job()) is not None:
                for result in run(job):
                    put(result)
                    if stopped.is_set():
                        return
        except BaseException as e:
            put(e)
        finally:
            put(None)

    threads = [threading.Thread(target=work, name="decoder", daemon=True) for _ in range(DECODERS)]
    try:
        for thread in threads:
            thread.start()
        for _ in threads:
            while (result := results.get()) is not None:
                if isinstance(result, BaseException):
                    raise result
                yield result
    finally:
        stopped.set()
        for thread in threads:
            thread.join()


# ---- the files -------------------------------------------------------------------------------------------------------
def digest(path, cache=None):
    """Return a hash of a file's bytes. The hash is kept in memory and, if `cache` is a folder, there. It is computed
    again only if the file's inode, time of modification or size has changed.
    """
    path, stat = Path(path).absolute(), Path(path).stat()
    return _digest(path, cache, stat.st_ino, stat.st_mtime_ns, stat.st_size)


@functools.cache
def _digest(path, cache, *state):
    kept = cache and cache_file(cache, ".digest", file=str(path), state=state)
    if kept and kept.exists():
        return kept.read_text()
    with open(path, "rb") as f:
        digest = hashlib.file_digest(f, "blake2b").hexdigest()
    if kept:
        with atomic(kept) as tmp:
            tmp.write_text(digest)
    return digest


def cache_file(cache, suffix=".safetensors", **parts):
    """Return the path of a cache file. parts: all values that decide the contents of the file."""
    name = hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=20).hexdigest()
    return Path(cache) / (name + suffix)


def latent_files(items, cache, vae_file, samples=None):
    """Return the path of the cache file for each item's latents, whether the file exists or not. vae_file: the weights
    of the VAE. samples: the Samples of the variant (variants/samples.py), or None.
    """
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
            **({"reading": i.changed} if i.changed else {}),
        )
        for i in items
    ]


def cache_latents(items, cache, vae_file, load_vae, samples=None, seen=None):
    """Cache the latents of every item that has none in the cache. load_vae() returns the VAE; it is called only if
    latents are missing. Returns [(media file, reason)] with an entry for each item that could not be encoded, for
    example because its media file was deleted after `scan`. Such items get no cache file. seen(item, list of frames
    (H,W,3) uint8) is called for each item that is decoded. vae_file, samples: as in latent_files.

    A cache file holds `latents` (C,T',h,w) fp32, and the tensors that `samples` adds. Several processes may fill a
    cache at once: a cache file appears complete or not at all, and a process skips the items that another process has
    encoded meanwhile.

    Media files are decoded in threads while the calling thread encodes and another thread saves. A file is decoded once
    per size (width, height) of its items. At most 2 * DECODERS + 1 decoded samples are in memory, as uint8.
    """
    missing = [(i, f) for i, f in zip(items, latent_files(items, cache, vae_file, samples)) if not f.exists()]
    by_file = {}
    for item, file in sorted(missing, key=lambda pair: pair[0].start):
        by_file.setdefault((item.path, item.width, item.height), {})[file] = item

    def read(group):
        """Yield (item, cache file, {kind: frames}) for each item whose cache file does not exist yet. group:
        {cache file: item}, with items of one media file and one size. For an item that cannot be read, a Skip takes the
        place of {kind: frames}.
        """
        left = [(item, file) for file, item in group.items() if not file.exists()]
        try:
            for item, _ in left[:1]:
                check_unchanged(item)
            sizes = samples.sidecar_sizes(left[0][0]) if samples and left else {}
            for frames in read_items([item for item, _ in left], sizes, cache):
                check_unchanged(left[0][0])
                yield *left.pop(0), frames
        except (Skip, OSError) as e:
            for item, file in left:
                yield item, file, Skip(str(e))

    vae, failed, saving = None, [], None
    groups = [by_file[key] for key in dict.fromkeys((i.path, i.width, i.height) for i, _ in missing)]
    with (
        ThreadPoolExecutor(1) as saver,
        contextlib.closing(in_threads(groups, read)) as decoded,
        tqdm(total=len(missing), desc="latents", unit="sample", disable=None if missing else True) as bar,
    ):
        for item, file, frames in decoded:
            bar.update()
            if isinstance(frames, Skip):
                failed.append((item.path, str(frames)))
                continue
            if seen:
                seen(item, frames[""])
            if file.exists():
                continue
            vae = vae or load_vae()
            video = to_video(frames.pop(""), next(vae.parameters()).device)[None]
            try:
                tensors = samples.cached(vae, video, item, frames) if samples else {}
            except Skip as e:
                failed.append((item.path, str(e)))
                continue
            if "latents" not in tensors:
                tensors["latents"] = vae.encode(video)[0]
            tensors = {name: t.cpu() for name, t in tensors.items()}
            if saving:
                saving.result()
            saving = saver.submit(save, file, tensors)
        if saving:
            saving.result()
    order = {item.path: k for k, (item, _) in enumerate(missing)}
    return sorted(failed, key=lambda entry: order[entry[0]])


def text_files(captions, cache, encoder, dtype):
    """Return {caption: path of the cache file for the caption's embedding}, whether the file exists or not. encoder:
    the digests of the text encoder's weights and tokenizer. dtype: the encoder's dtype.
    """
    return {c: cache_file(cache, text=c, encoder=encoder, dtype=str(dtype)) for c in dict.fromkeys(captions)}


def cache_texts(files, load_encoder):
    """Cache the embedding of every text that is not cached yet. files: {text: cache file}, as returned by text_files.
    load_encoder() returns the text encoder; it is called only if an embedding is missing. A cache file holds
    `embedding` (S,D) in the encoder's dtype.
    """
    missing = [text for text, file in files.items() if not file.exists()]
    encoder = load_encoder() if missing else None
    for text in tqdm(missing, desc="texts", unit="caption", disable=None if missing else True):
        if not files[text].exists():
            with torch.no_grad():
                save(files[text], {"embedding": encoder.encode([text])[0][0]})
