"""Captioned images and clips: scanned, cached as latents and text embeddings, and drawn as the batches of each step.

Captions are next to the media in NAME.txt, one per line; each step that uses a file draws one of them. Or a list names
files and captions: a JSONL file, or a CSV file with a header, given as --data or found in the folder as metadata.jsonl
or metadata.csv. Media are resized and centre-cropped to the bucket of the nearest aspect ratio; clips are resampled to
the model's frame rate and cut to 4k+1 frames (S2V: 4k). The samples of a step follow from seed and step number.
"""

import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch

from flow import eval_timesteps, make_noisy_batch, sample_timesteps
from nanowan import cache
from nanowan.errors import BadInput
from nanowan.formats.header import load
from nanowan.formats.t5 import read_encoder, tokenizer_file
from nanowan.training import report
from nanowan.training.scan import Item, scan_source, sizes_of

DRAWS = 2  # version of a step's random draws; version 1 drew noise and timesteps per batch, not per sample
PRESERVED_SHARE = 0.5  # fraction of the samples that get a prompt to preserve, with train_lora.py --preserve


# ---- the samples of a step ---------------------------------------------------------------------------------------
class Batches:
    """Chooses the items of each step: `size` of them, or fewer in at most one step of an epoch. An epoch sees each item
    item.repeat times, in an order that follows from the seed. All items of a step have the same group(item), by default
    the bucket, except that items left over at the ends of groups share steps. A resumed run sees the same items.
    """

    def __init__(self, items, size, seed, group=lambda item: item.bucket):
        self.seed, self.groups = seed, {}
        for i, item in enumerate(items):
            self.groups.setdefault(group(item), []).extend([i] * item.repeat)
        total = sum(map(len, self.groups.values()))
        self.size, self._epoch = min(size, total), None
        self.per_epoch = -(-total // self.size)

    def at(self, step):
        """Return the indices of the items of a step; steps count from 0."""
        epoch, position = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            rng, steps, rest = random.Random(f"{self.seed} epoch {epoch}"), [], []
            for _, group in sorted(self.groups.items()):
                order = rng.sample(group, len(group))
                full = len(order) // self.size * self.size
                steps += [order[i : i + self.size] for i in range(0, full, self.size)]
                rest += order[full:]
            steps += [rest[i : i + self.size] for i in range(0, len(rest), self.size)]
            rng.shuffle(steps)
            self._epoch, self._steps = epoch, steps
        return self._steps[position]


@dataclass
class Draw:
    """One sample of a step, and everything that is drawn for it: the item and its cache file; the caption to train
    with, and whether the sample serves prior preservation; whether the model gets the clean first frame; the result of
    Samples.draw; the timestep; the random generator for the noise.
    """

    item: Item
    file: Path
    caption: str
    preserved: bool
    first_frame_given: bool
    variant: object
    t: torch.Tensor  # ()
    generator: torch.Generator


def collate(embeddings):
    """Stack embeddings, a list of (S,D), padded with zeros -> (B,S,D), and their lengths (B,)."""
    return torch.nn.utils.rnn.pad_sequence(embeddings, batch_first=True), torch.tensor([len(e) for e in embeddings])


def eval_batches(items, files, samples, shift, low, high):
    """Yield (i, Batch of one item with its first caption) for each item and each of four fixed timesteps, i = 0..3. The
    item's digest seeds the noise and Samples.draw, which may make the item a continuation segment (probability 0.5).
    """
    for item, file in zip(items, files):
        g = torch.Generator().manual_seed(int(item.digest[:15], 16))
        drawn = samples.draw(item, 0.5, random.Random(item.digest))
        entry = samples.entry(load(file)[0], drawn, True)
        for i, t in enumerate(eval_timesteps(4, shift, low, high)):
            noise = torch.randn(1, *entry["latents"].shape, generator=g)
            yield i, make_noisy_batch([entry], item.captions[:1], t[None], noise, frame_weights(samples, noise))


def frame_weights(samples, noise):
    """Return the latent frames' loss weights (B,1,T',1,1), 1 on average, or None if all are 1. noise sets B and T'."""
    if not samples.loss_from:
        return None
    counts = (torch.arange(noise.shape[2]) >= samples.loss_from).float()
    return (counts / counts.mean()).view(1, 1, -1, 1, 1).repeat(len(noise), 1, 1, 1, 1)


@dataclass(frozen=True)
class DataSource:
    """A folder or list of media, and how to take samples from it. The bucket of a sample has the area of `resolution`
    (width, height) in px. clip_mode, a key of CLIP_MODES, chooses at most `frames` frames of a clip for each sample. An
    epoch sees each sample `repeats` times; the loss of each sample is multiplied by `weight`.
    """

    source: Path
    resolution: tuple
    frames: int
    clip_mode: str = "first"
    repeats: int = 1
    weight: float = 1.0


@dataclass(frozen=True)
class DataConfig:
    """The arguments of a Dataset: DataSources, cache folder, and flags, named as in nanowan/training/flags.py."""

    sources: tuple
    cache: Path
    held_out: float
    batch: int
    accumulate: int
    seed: int
    shift: float
    t_distribution: str
    caption_dropout: float
    i2v_prob: float
    continuation: float | None = None
    preserve: float = 0.0


class Dataset:
    """The samples of a run, and the batches of each step. `items` are trained on; `val_items` are held out."""

    def __init__(self, config, pipe, limit=None, prompts=()):
        """Scan the sources and report what they contain; nothing is encoded yet. limit: maximum number of samples,
        chosen by their files' digests (default: all). prompts: texts to embed in addition to the captions.
        """
        self.config, self.pipe, self.world, s = config, pipe, pipe.world, pipe.settings
        self.samples = s.parts.samples(pipe)
        scans = self.world.broadcast_from_rank0(
            lambda: [scan_source(source, s, self.samples, config.cache) for source in config.sources]
        )
        items, skipped = (sum(lists, []) for lists in zip(*scans))
        items = items if limit is None else sorted(items, key=lambda i: i.digest)[:limit]
        digests = sorted({i.digest for i in items})
        held_out = set(digests[: min(16, int(config.held_out * len(digests)))])
        self.items = [i for i in items if i.digest not in held_out]
        self.val_items = [i for i in items if i.digest in held_out]
        self.captions = ["", *dict.fromkeys(c for i in items for c in i.captions)]
        self.texts = list(dict.fromkeys([*self.captions, *prompts]))
        self._choose_batches()
        self.skipped = skipped
        print(report.text(report.describe(self)))
        if self.samples.frames_after:
            long = sum(i.frames_after > 0 for i in items)
            print(
                f"  {long} of {len(items)} are followed by {self.samples.frames_after} frames: trained as continuation "
                "segments too"
            )
        print(f"  {len(self.val_items)} samples held out; cache in {config.cache}")

    # ---- the cache -----------------------------------------------------------------------------------------------
    def sizes(self):
        """Return the sizes that the memory estimate needs (scan.sizes_of); "bucket" is the largest among `items`."""
        width = read_encoder(self.pipe.files("text")).entries["token_embedding.weight"].shape[1]
        row_bytes, s = width * self.pipe.runtime.dtype.itemsize, self.pipe.settings
        sizes = sizes_of(self.items + self.val_items, self.texts, self.samples, s, row_bytes)
        return sizes | {"bucket": max((i.bucket for i in self.items), key=math.prod)}

    def summary(self, sizes):
        """Return what a run records of its data: numbers of samples, bytes of the cache. sizes: from self.sizes()."""
        latents, texts = sizes["cache"]
        return {"samples": len(self.items), "held_out": len(self.val_items), "latents": latents, "texts": texts}

    def _latent_files(self, items):
        return cache.latent_files(items, self.config.cache, self.pipe.files("vae")[0], self.samples)

    def text_files(self):
        """Return {text: the cache file of its embedding}, whether or not the file exists yet."""
        encoder, tokenizer = self.pipe.encoder_source().digests(self.digest), tokenizer_file(self.pipe.dir)
        encoder += [self.digest(tokenizer)] if tokenizer else []
        return cache.text_files(self.texts, self.config.cache, encoder, self.pipe.runtime.dtype)

    def digest(self, file):
        """Return a hash of a file's bytes, which the cache folder remembers for later runs."""
        return cache.digest(file, self.config.cache)

    def is_cached(self):
        """Return whether the latents of all samples are cached."""
        return all(f.exists() for f in self.files + self.val_files)

    def cache_latents(self):
        """Cache missing latents; each rank encodes its share of the files. Then drop the VAE from memory."""
        items, pipe, rank = self.items + self.val_items, self.pipe, self.world.rank
        files = {*[*dict.fromkeys(item.path for item in items)][rank :: self.world.size]}  # one rank per file
        mine = [item for item in items if item.path in files]
        self.sheet = report.DataSheet(items)
        where = self.config.cache, pipe.files("vae")[0]
        failed = cache.cache_latents(mine, *where, lambda: pipe.acquire("vae"), self.samples, self.sheet.add)
        pipe.drop("vae", *pipe.settings.conditioning.encoders)
        failed = self.world.gather_lists(failed)
        for path, reason in failed:
            print(f"  skipped {path}: {reason}", flush=True)
        self.skipped = self.skipped + failed
        self._drop_uncached()

    def _drop_uncached(self):
        """Remove the samples that could not be encoded, the same ones on all ranks."""
        files = self.files + self.val_files
        cached = self.world.broadcast_from_rank0(lambda: {f for f in files if f.exists()})
        if len(cached) == len(set(files)):
            return
        self.items = [i for i, f in zip(self.items, self.files) if f in cached]
        self.val_items = [i for i, f in zip(self.val_items, self.val_files) if f in cached]
        if not self.items:
            raise BadInput(f"--data {self.config.sources[0].source}: nothing is left to train on")
        self._choose_batches()

    def cache_texts(self):
        """Cache missing text embeddings; each rank encodes its share. Returns {text: cache file}."""
        files, pipe = self.text_files(), self.pipe
        mine = dict(list(files.items())[self.world.rank :: self.world.size])
        cache.cache_texts(mine, lambda: pipe.acquire("text"))
        self.world.barrier()
        return files

    # ---- steps ---------------------------------------------------------------------------------------------------
    def _choose_batches(self):
        c = self.config
        size = c.batch * c.accumulate * self.world.dp_size
        self.batches = Batches(self.items, size, c.seed, self.samples.group)
        if self.batches.size < size:
            print(f"  a step would see {size} samples, and there are {self.batches.size}: it sees each of them once")
        self.files, self.val_files = self._latent_files(self.items), self._latent_files(self.val_items)

    def draw(self, step, low, high, show_caption=None, preserved_prompts=()):
        """Return the Draws of a step, for all ranks. Each depends only on the seed, the step and its index in the step,
        so `--batch 4` draws the same as `--batch 2 --accumulate 2` or `--batch 1` on four ranks. Arguments: see `step`.
        """
        c, draws = self.config, []
        for k, i in enumerate(self.batches.at(step)):
            rng, item = random.Random(f"{c.seed} step {step} sample {k}"), self.items[i]
            generator = torch.Generator().manual_seed(rng.getrandbits(62))
            preserved, caption = bool(preserved_prompts) and rng.random() < PRESERVED_SHARE, ""
            if rng.random() >= c.caption_dropout:
                if preserved:
                    caption = rng.choice(preserved_prompts)
                else:
                    caption = show_caption(item.captions, rng) if show_caption else rng.choice(item.captions)
            first_frame_given = rng.random() < c.i2v_prob and item.frames > 1
            variant = self.samples.draw(item, c.continuation, rng)
            t = sample_timesteps(1, c.shift, c.t_distribution, low, high, generator)[0]
            draws.append(Draw(item, self.files[i], caption, preserved, first_frame_given, variant, t, generator))
        return draws

    def step(self, step, low, high, show_caption=None, preserved_prompts=()):
        """Yield (Batch, weight) for this rank's part of a step. weight: the Batch's number of samples, divided by that
        of a full step on all ranks; 0 if this rank has no sample. Timesteps are drawn from [low, high).

        show_caption(captions, rng) -> the caption to train a sample with (default: one of its captions, at random).
        preserved_prompts: if there are any, half of the samples, chosen at random, get one of these prompts instead of
        a caption, and their loss is multiplied by config.preserve.
        """
        groups = {}
        for draw in self.draw(step, low, high, show_caption, preserved_prompts):
            groups.setdefault(self.samples.shape(draw.item, draw.variant), []).append(draw)
        at_once = self.config.batch * self.world.dp_size
        for group in groups.values():
            for i in range(0, len(group), at_once):
                count = len(group[i : i + at_once])
                local, fraction = self.world.local_indices(count)
                batch = self._batch([group[i + j] for j in local], bool(preserved_prompts))
                yield batch, fraction * count / self.batches.size

    def _batch(self, draws, preserves):
        """Return the Batch of `draws`, read from the cache. Their latents must have equal shapes. preserves: whether
        the run preserves prompts; if so, Batch.preserved is always set, since all ranks run the base model together.
        """
        samples = self.samples
        entries = [samples.entry(load(d.file)[0], d.variant, d.caption != "") for d in draws]
        noise = torch.stack([torch.randn(e["latents"].shape, generator=d.generator) for d, e in zip(draws, entries)])
        t, loss_mask = torch.stack([d.t for d in draws]), frame_weights(samples, noise)
        first_given = torch.tensor([d.first_frame_given for d in draws])
        if first_given.any():  # the first latent frame is clean, and has no loss
            t = t[:, None].repeat(1, noise.shape[2])
            t[first_given, 0] = 0
            loss_mask = ((t > 0) / (t > 0).float().mean(1, keepdim=True))[:, None, :, None, None]
        preserved = torch.tensor([d.preserved for d in draws])
        weight = torch.tensor([d.item.weight * (self.config.preserve if d.preserved else 1.0) for d in draws])
        if (weight != 1).any():
            weight = weight.view(-1, 1, 1, 1, 1)
            loss_mask = weight if loss_mask is None else weight * loss_mask
        captions = [d.caption for d in draws]
        return make_noisy_batch(entries, captions, t, noise, loss_mask, preserved if preserves else None)
