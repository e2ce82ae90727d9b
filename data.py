"""Captioned images and clips: scanned, cached as latents and text embeddings, and drawn as the batches of each step.

Captions are next to the media in NAME.txt, one per line; if there are several, one is drawn at random. Or a list names
files and captions: a JSONL or a CSV with a header, given as --data or found in the folder as metadata.jsonl or .csv.
Media are resized and centre-cropped to the bucket of the nearest aspect ratio; clips are resampled to the model's frame
rate and cut to 4k+1 frames. What a step sees depends only on the seed and its number: resuming a run changes nothing.
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

DRAWS = 2  # the version of what steps draw; version 1 drew noise and timesteps per batch, not per sample
PRESERVED_SHARE = 0.5  # the share of samples that train_lora.py --preserve gives a preserved prompt


# ---- what a step sees --------------------------------------------------------------------------------------------
class Batches:
    """Which items each step sees: `size` of them, or fewer in an epoch's last step. An epoch sees each item once, or as
    often as its `repeat` says, in an order that follows from the seed. The items of a step share a bucket (or a value
    of `group`) as long as enough of them are left. `at(step)` needs no history, so resuming changes nothing.
    """

    def __init__(self, items, size, seed, group=lambda item: item.bucket):
        self.seed, self.groups = seed, {}
        for i, item in enumerate(items):
            self.groups.setdefault(group(item), []).extend([i] * item.repeat)
        total = sum(map(len, self.groups.values()))
        self.size, self._epoch = min(size, total), None
        self.per_epoch = -(-total // self.size)

    def at(self, step):
        """The indices of a step's items; steps count from 0."""
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
    """One sample of a step, and everything that is drawn for it: the item and its cache file, the caption to train
    with, whether the caption is a preserved prompt, whether the first frame is given, what Samples.draw returned, the
    timestep, and the generator of the noise.
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
    """Embeddings, a list of (S,D) -> (B,S,D), zero-padded, and their lengths (B,)."""
    return torch.nn.utils.rnn.pad_sequence(embeddings, batch_first=True), torch.tensor([len(e) for e in embeddings])


def eval_batches(items, files, samples, shift, low, high):
    """Yield (0..3, a Batch of one sample) for each sample at four fixed timesteps, with its first caption and a noise
    that follows from its file. Half of the samples that can be continuation segments are.
    """
    for item, file in zip(items, files):
        g = torch.Generator().manual_seed(int(item.digest[:15], 16))
        drawn = samples.draw(item, 0.5, random.Random(item.digest))
        entry = samples.entry(load(file)[0], drawn, True)
        for i, t in enumerate(eval_timesteps(4, shift, low, high)):
            noise = torch.randn(1, *entry["latents"].shape, generator=g)
            yield i, make_noisy_batch([entry], item.captions[:1], t[None], noise, frame_weights(samples, noise))


def frame_weights(samples, noise):
    """The loss's weight (B,1,T',1,1) for each latent frame of noise (B,C,T',h,w), 1 on average; None if all are 1."""
    if not samples.loss_from:
        return None
    counts = (torch.arange(noise.shape[2]) >= samples.loss_from).float()
    return (counts / counts.mean()).view(1, 1, -1, 1, 1).repeat(len(noise), 1, 1, 1, 1)


@dataclass(frozen=True)
class DataSource:
    """A folder or list of media, and how samples are taken from it: in buckets with the area of `resolution` (width,
    height) in px, with at most `frames` frames, by one of CLIP_MODES. An epoch sees each sample `repeats` times; its
    loss is multiplied by `weight`.
    """

    source: Path
    resolution: tuple
    frames: int
    clip_mode: str = "first"
    repeats: int = 1
    weight: float = 1.0


@dataclass(frozen=True)
class DataConfig:
    """What a Dataset is made from: DataSources, a cache folder, and flags (named as in nanowan/training/flags.py)."""

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
    """The samples of a run, and what each step sees of them. `items` are trained on, `val_items` are held out."""

    def __init__(self, config, pipe, limit=None, prompts=()):
        """Scan the sources and report what they contain; nothing is encoded yet. limit: use only so many samples, the
        first by their digests. prompts: texts that are needed in addition to the captions.
        """
        self.config, self.pipe, self.world, s = config, pipe, pipe.world, pipe.settings
        self.samples = s.parts.samples(pipe)
        found = self.world.broadcast_from_rank0(
            lambda: [scan_source(source, s, self.samples, config.cache) for source in config.sources]
        )
        items, skipped = (sum(lists, []) for lists in zip(*found))
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
        """`sizes_of` all samples; "bucket" is the largest bucket among those that are trained on."""
        width = read_encoder(self.pipe.files("text")).entries["token_embedding.weight"].shape[1]
        row_bytes, s = width * self.pipe.runtime.dtype.itemsize, self.pipe.settings
        sizes = sizes_of(self.items + self.val_items, self.texts, self.samples, s, row_bytes)
        return sizes | {"bucket": max((i.bucket for i in self.items), key=math.prod)}

    def summary(self, sizes):
        """What the record of a run says about its data."""
        latents, texts = sizes["cache"]
        return {"samples": len(self.items), "held_out": len(self.val_items), "latents": latents, "texts": texts}

    def _latent_files(self, items):
        return cache.latent_files(items, self.config.cache, self.pipe.files("vae")[0], self.samples)

    def text_files(self):
        """{text: the cache file of its embedding}, whether or not the file exists yet."""
        encoder, tokenizer = self.pipe.encoder_source().digests(self.digest), tokenizer_file(self.pipe.dir)
        encoder += [self.digest(tokenizer)] if tokenizer else []
        return cache.text_files(self.texts, self.config.cache, encoder, self.pipe.runtime.dtype)

    def digest(self, file):
        """A hash of a file's bytes, remembered in the cache from run to run."""
        return cache.digest(file, self.config.cache)

    def is_cached(self):
        """Whether the latents of all samples are cached."""
        return all(f.exists() for f in self.files + self.val_files)

    def cache_latents(self):
        """Fill the cache of latents, each rank for its share of the files. The VAE leaves memory afterwards."""
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
        """Remove, on all ranks alike, the samples that could not be encoded."""
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
        """Fill the cache of text embeddings, each rank for its share of the texts. Returns {text: file}."""
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
        """The Draws of a step, for all ranks. Each depends only on the seed, the step and its place in the step:
        `--batch 4` trains as `--batch 2 --accumulate 2` does, or `--batch 1` on four ranks. Arguments: as in `step`.
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
            given = rng.random() < c.i2v_prob and item.frames > 1
            variant = self.samples.draw(item, c.continuation, rng)
            t = sample_timesteps(1, c.shift, c.t_distribution, low, high, generator)[0]
            draws.append(Draw(item, self.files[i], caption, preserved, given, variant, t, generator))
        return draws

    def step(self, step, low, high, show_caption=None, preserved_prompts=()):
        """Yield this rank's Batches of a step, each with the weight of its loss: its fraction of the step's samples.
        Timesteps are in [low, high).

        show_caption(captions, rng) -> the caption to train a sample with (default: one of its captions).
        preserved_prompts: if any, PRESERVED_SHARE of the samples get one of them instead, with the loss weight
        config.preserve.
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
        """The Batch of Draws of one shape, read from the cache. preserves: whether the run preserves prompts; then
        `preserved` is set even if no sample here is preserved, since ranks compute the base's predictions together.
        """
        samples = self.samples
        entries = [samples.entry(load(d.file)[0], d.variant, d.caption != "") for d in draws]
        noise = torch.stack([torch.randn(e["latents"].shape, generator=d.generator) for d, e in zip(draws, entries)])
        t, loss_mask = torch.stack([d.t for d in draws]), frame_weights(samples, noise)
        given = torch.tensor([d.first_frame_given for d in draws])
        if given.any():  # the first latent frame is clean, and its error is not counted
            t = t[:, None].repeat(1, noise.shape[2])
            t[given, 0] = 0
            loss_mask = ((t > 0) / (t > 0).float().mean(1, keepdim=True))[:, None, :, None, None]
        preserved = torch.tensor([d.preserved for d in draws])
        weight = torch.tensor([d.item.weight * (self.config.preserve if d.preserved else 1.0) for d in draws])
        if (weight != 1).any():
            weight = weight.view(-1, 1, 1, 1, 1)
            loss_mask = weight if loss_mask is None else weight * loss_mask
        captions = [d.caption for d in draws]
        return make_noisy_batch(entries, captions, t, noise, loss_mask, preserved if preserves else None)
