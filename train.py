"""What both trainers share: flags, the samples of each step, the training loop, the held-out loss.

A step is drawn from the seed and the step's number alone (which samples, captions, times and noise), so a resumed run
sees what an uninterrupted one would have seen.
"""

import argparse
import math
import random
import time
from pathlib import Path

import torch

import data
import plan
from checkpoint import BadInput, load
from flow import eval_timesteps, make_noisy_batch, sample_timesteps
from lora import adapter_off
from models import DTYPES, check_frames, free_memory, parse_size, pick_dtype
from nanoworld.default_clips import default_clips
from optim import lr_at
from parallel import backward, clip_grad_norm
from recommended import RECOMMENDED, recommended_flags
from t5 import read_encoder, tokenizer_file

PRESERVED_SHARE = 0.5  # of samples, with train_lora.py --preserve


# ---- flags -------------------------------------------------------------------------------------------------------
def add_flags(p, script, out):
    """The flags of both trainers. script: of RECOMMENDED; out: the default of --out."""
    recommended = RECOMMENDED[script]
    add = p.add_argument_group("what").add_argument
    add("--ckpt", default="nano", help="checkpoint folder (default: nano, the one in the repository)")
    add("--expert", choices=("high", "low", "both"), help="which expert of an A14B to train (default: both, in turns)")
    add("--steps_per_expert", type=int, default=50, help="on one expert before the other's turn (default: %(default)s)")
    add("--text_encoder", help="start from this text encoder's file (default: the checkpoint's own)")
    add("--out", help="the run's folder (default: %(default)s)")
    add = p.add_argument_group("data").add_argument
    add(
        "--data",
        help="folder of images and clips with .txt captions, or a JSONL or csv of paths and captions (default: clips "
        "of the nano world)",
    )
    add("--cache", help="folder of the cache (default: cache/ beside the data)")
    add("--cache_only", action="store_true", help="fill the cache and leave")
    add("--resolution", help="WxH px: the area that buckets fill (default: the checkpoint's)")
    add("--frames", type=int, help="4k+1, at most, of each clip (default: the checkpoint's)")
    modes = "; ".join(f"{k}: {v}" for k, v in data.CLIP_MODES.items())
    add(
        "--clip_mode",
        choices=list(data.CLIP_MODES),
        default="first",
        help=f"which frames of a longer clip: {modes} (default: first)",
    )
    add(
        "--caption_dropout",
        type=float,
        default=0.1,
        help="share of samples trained without their caption, for guidance, and without their sound (S2V) or face "
        "(Animate) (default: %(default)s)",
    )
    add(
        "--i2v_prob",
        type=float,
        default=0.0,
        help="TI2V: share of clips trained with their first frame given (default: %(default)s)",
    )
    add(
        "--continuation",
        type=float,
        help="S2V, Animate: share of samples trained as a clip that goes on from the one before it, if long enough "
        "(default: 0.5)",
    )
    add(
        "--held_out",
        type=float,
        default=0.05,
        help="share of files kept for the held-out loss, 16 at most (default: %(default)s)",
    )
    add = p.add_argument_group("training").add_argument
    add("--steps", type=int, help=f"of the optimizer (default: the checkpoint's, or {recommended['steps']})")
    add(
        "--batch",
        type=int,
        help=f"samples of a step, per data-parallel rank (default: the checkpoint's, or {recommended['batch']})",
    )
    add("--accumulate", type=int, default=1, help="batches per step (default: %(default)s)")
    add("--lr", type=float, help=f"highest learning rate (default: the checkpoint's, or {recommended['lr']:g})")
    add("--weight_decay", type=float, help=f"of AdamW (default: the checkpoint's, or {recommended['weight_decay']:g})")
    add("--warmup", type=int, default=10, help="steps until the full learning rate (default: %(default)s)")
    add(
        "--schedule",
        choices=("constant", "cosine"),
        default="cosine",
        help="of the learning rate; cosine: down to a tenth (default: %(default)s)",
    )
    add("--grad_clip", type=float, default=1.0, help="largest norm of the gradient (default: %(default)s)")
    add(
        "--grad_spike_factor",
        type=float,
        default=100.0,
        help="skip a step whose gradient is this many times the recent median (default: %(default)s)",
    )
    add(
        "--max_skipped", type=int, default=10, help="stop after this many skipped steps in a row (default: %(default)s)"
    )
    add(
        "--ema",
        type=float,
        default=0.0,
        help="save a moving average of the weights with this decay (default: 0, the weights themselves)",
    )
    add("--shift", type=float, help="of the training times (default: the checkpoint's)")
    add(
        "--t_distribution",
        choices=("logit-normal", "uniform"),
        help="of the training times before the shift (default: the checkpoint's, or logit-normal)",
    )
    add(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        help="recompute the DiT's activations in the backward pass (default: where the plan does not fit without)",
    )
    add("--seed", type=int, default=0, help="of samples, captions, times, noise and dropout (default: %(default)s)")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--dtype", choices=list(DTYPES), help="of frozen weights and products (default: bf16 on cuda, fp32 on cpu)")
    add = p.add_argument_group(
        "several GPUs, under torchrun (parallel/); --batch is per rank that sees its own samples"
    ).add_argument
    add("--fsdp", action="store_true", help="shard the weights over the ranks")
    add("--ulysses_size", type=int, default=1, help="ranks that share the tokens of each clip (default: %(default)s)")
    add("--pipeline_stages", type=int, default=1, help="ranks that share the blocks (default: %(default)s)")
    add = p.add_argument_group("watching").add_argument
    add("--save_every", type=int, default=100, help="steps between saves (default: %(default)s)")
    add("--eval_every", type=int, default=100, help="steps between held-out losses (default: %(default)s)")
    add("--previews", help="a text file of prompts to sample, one per line, each always from the same seed")
    add("--preview_every", type=int, default=500, help="steps between previews (default: %(default)s)")
    add("--resume", action="store_true", help="go on from the last state in --out")
    p.set_defaults(out=out)


def resolve_flags(args, s, script):
    """Fill in what was not given from what is recommended for the checkpoint, and check what was."""
    for name, value in recommended_flags(s, script).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.dtype = pick_dtype(args.dtype, args.device)
    if args.expert and not s.is_moe:
        raise BadInput(f"--expert {args.expert}: {args.ckpt} has a single model")
    if s.is_moe:
        args.expert = args.expert or "both"
    if args.i2v_prob and not s.conditioning.trains_first_frame:
        raise BadInput(
            f"--i2v_prob {args.i2v_prob}: only TI2V is trained both ways; {args.ckpt} is {s.model_type.upper()}"
        )
    if args.previews and (s.conditioning.needs_image or s.conditioning.by_clips):
        raise BadInput(f"--previews {args.previews}: prompts alone; {args.ckpt} makes videos of more than a prompt")
    resolve_clip_flags(args, s)
    if min(parse_size(args.resolution, "--resolution")) < s.size_multiple:
        raise BadInput(f"--resolution {args.resolution}: each side at least {s.size_multiple}")
    check_frames(args.frames, s.conditioning.frames_over)
    at_least_1 = ("steps", "batch", "accumulate", "save_every", "eval_every", "preview_every", "max_skipped")
    check_ranges(args, **dict.fromkeys((*at_least_1, "steps_per_expert"), (1, math.inf)))
    check_ranges(args, **dict.fromkeys(("lr", "warmup", "weight_decay"), (0, math.inf)))
    check_ranges(args, **dict.fromkeys(("grad_clip", "shift"), (POSITIVE, math.inf)))
    check_ranges(args, **dict.fromkeys(("caption_dropout", "i2v_prob"), (0, 1)))
    check_ranges(args, grad_spike_factor=(2, math.inf), held_out=(0, 0.5), ema=(0, 0.99999), seed=(0, 2**63 - 1))


def resolve_clip_flags(args, s):
    """The same of what only matters to variants that go clip by clip."""
    if not s.conditioning.by_clips:
        if args.continuation is not None:
            raise BadInput(f"--continuation {args.continuation}: {args.ckpt} makes single clips")
        return
    args.continuation = 0.5 if args.continuation is None else args.continuation
    check_ranges(args, continuation=(0, 1))
    if args.pipeline_stages > 1:
        raise BadInput(f"--pipeline_stages {args.pipeline_stages}: not for {s.variant}; use --fsdp or --ulysses_size")
    if s.conditioning.fixed_speed and args.clip_mode == "uniform":
        raise BadInput("--clip_mode uniform: would play clips faster than their sound; use another mode")


POSITIVE = 1e-9  # as a lowest value


def check_ranges(args, **ranges):
    """Refuse numbers out of range; per flag the lowest and the highest value."""
    for flag, (low, high) in ranges.items():
        value = getattr(args, flag)
        if not low <= value <= high or value == math.inf:
            least = "positive" if low == POSITIVE else f"at least {low}"
            raise BadInput(f"--{flag} {value}: must be {least}" + (f" and at most {high}" if high < math.inf else ""))


def choose_checkpointing(args, world, predict, memory=None):
    """Where --checkpointing is not given: on, if the run would take more than nine tenths of the memory without.
    predict() -> its plan.Plan by the flags as they are; memory: bytes of a device (default: what is free on this one,
    of a CPU each rank's share of it). Returns the Plan.
    """
    chosen, args.checkpointing = args.checkpointing, bool(args.checkpointing)
    need = predict()
    memory = memory or free_memory(args.device) / (world.size if args.device == "cpu" else 1)
    if chosen is not None or world.all_ranks(need.peak <= 0.9 * memory):
        return need
    print(f"checkpointing: without it {plan.gb(need.peak)} would be needed of {plan.gb(memory)}")
    args.checkpointing = True
    return predict()


def expert_schedule(args, s):
    """{name of a DiT to train through: the range [low, high) of its times}, in the order of their turns."""
    if not args.expert:
        return {"dit": (0.0, 1.0)}
    ranges = {"high": (s.boundary, 1.0), "low": (0.0, s.boundary)}
    return ranges if args.expert == "both" else {args.expert: ranges[args.expert]}


# ---- data --------------------------------------------------------------------------------------------------------
def eval_batches(items, files, samples, shift, low, high):
    """(0..3, Batch of one) for each sample at four fixed times, under a noise that its file decides, with its first
    caption; half of those that can be are continuations.
    """
    for item, file in zip(items, files):
        g = torch.Generator().manual_seed(int(item.digest[:15], 16))
        entry = samples.entry(load(file)[0], *samples.draw([item], 0.5, random.Random(item.digest)), True)
        for i, t in enumerate(eval_timesteps(4, shift, low, high)):
            noise = torch.randn(1, *entry["latents"].shape, generator=g)
            yield i, make_noisy_batch([entry], item.captions[:1], t[None], noise, frame_weights(samples, noise))


def frame_weights(samples, noise):
    """The loss's weight (B,1,T',1,1) of each latent frame of noise (B,C,T',h,w), of mean 1; None where all count."""
    if not samples.loss_from:
        return None
    counts = (torch.arange(noise.shape[2]) >= samples.loss_from).float()
    return (counts / counts.mean()).view(1, 1, -1, 1, 1).repeat(len(noise), 1, 1, 1, 1)


class Dataset:
    """The samples of a run, cached, and what each step sees of them. `items` are trained on, `val_items` are not."""

    def __init__(self, args, models, limit=None, prompts=()):
        """Scan and report; nothing is computed yet. limit: take so many samples only, by their digests. prompts: that
        are needed beside the captions.
        """
        self.args, self.models, self.world, s = args, models, models.world, models.settings
        self.samples = s.conditioning.samples(models)
        if s.conditioning.by_clips and not args.data:
            raise BadInput(f"--data: needed, a folder of clips; there are none of the nano world for {args.ckpt}")
        source = Path(args.data) if args.data else self.world.broadcast_from_rank0(default_clips)
        self.cache = Path(args.cache or (source if source.is_dir() else source.parent) / "cache")
        area = math.prod(parse_size(args.resolution))
        scan_flags = source, area, s.size_multiple, args.frames, s.fps, args.clip_mode, self.cache, self.samples
        items, skipped = self.world.broadcast_from_rank0(lambda: data.scan(*scan_flags))
        items = items if limit is None else sorted(items, key=lambda i: i.digest)[:limit]
        digests = sorted({i.digest for i in items})
        held_out = set(digests[: min(16, int(args.held_out * len(digests)))])
        self.items = [i for i in items if i.digest not in held_out]
        self.val_items = [i for i in items if i.digest in held_out]
        self.captions = ["", *dict.fromkeys(c for i in items for c in i.captions)]
        self.texts = list(dict.fromkeys([*self.captions, *prompts]))
        self._choose_batches()
        width = read_encoder(models.files("text")).entries["token_embedding.weight"].shape[1]
        self.tokens = min(512, max(2 + len(c) // 3 for c in self.texts))  # of the longest caption, about
        shapes = [s.latent_shape((i.width, i.height), i.frames) for i in items]
        self.bytes = {
            "latents": sum(map(self.samples.cached_bytes, items, shapes)),
            "texts": sum(2 + len(c) // 3 for c in self.texts) * width * DTYPES[args.dtype].itemsize,
        }
        print(data.report(items, skipped))
        if self.samples.frames_after:
            long = sum(i.frames_after > 0 for i in items)
            print(
                f"  {long} of {len(items)} go on for {self.samples.frames_after} frames: trained as continuations too"
            )
        print(f"  {len(self.val_items)} samples held out; cache in {self.cache}")

    def summary(self):
        """What a run's record says of its data."""
        return {"samples": len(self.items), "held_out": len(self.val_items), **self.bytes}

    def plan_sizes(self, texts):
        """What plan.training asks about the data and the checkpoint; `texts`: whether these are cached too."""
        encode = not all(f.exists() for f in self.files + self.val_files)
        files = data.text_files(*self._texts_to_cache()).values() if texts else ()
        return {
            "bucket": max((i.bucket for i in self.items), key=math.prod),
            "text": self.tokens,
            "cache": (self.bytes["latents"], self.bytes["texts"] * texts),
            "encode": encode,
            "encode_texts": not all(f.exists() for f in files),
            "fp8_files": self.models.fp8,
        }

    def _latent_files(self, items):
        return data.latent_files(items, self.cache, self.models.files("vae")[0], self.samples)

    def cache_latents(self):
        """Fill the cache of latents, each rank a part of it; the VAE leaves memory afterwards."""
        mine = (self.items + self.val_items)[self.world.rank :: self.world.size]
        vae_file = self.models.files("vae")[0]
        failed = data.cache_latents(mine, self.cache, vae_file, lambda: self.models.acquire("vae"), self.samples)
        for path, reason in failed:
            print(f"  skipped {path}: {reason}", flush=True)
        self.models.drop("vae", *self.models.settings.conditioning.encoders)
        self.world.barrier()
        self._drop_uncached()

    def _drop_uncached(self):
        """Leave out, on all ranks alike, the samples that could not be encoded."""
        files = self.files + self.val_files
        cached = self.world.broadcast_from_rank0(lambda: {f for f in files if f.exists()})
        if len(cached) == len(set(files)):
            return
        self.items = [i for i, f in zip(self.items, self.files) if f in cached]
        self.val_items = [i for i, f in zip(self.val_items, self.val_files) if f in cached]
        if not self.items:
            raise BadInput(f"--data {self.args.data}: nothing is left to train on")
        self._choose_batches()

    def _choose_batches(self):
        self.batches = data.Batches(
            self.items, self.args.batch * self.world.dp_size, self.args.seed, self.samples.group
        )
        self.files, self.val_files = self._latent_files(self.items), self._latent_files(self.val_items)

    def cache_texts(self):
        """Fill the cache of text embeddings, each rank a part of it; returns {text: file}."""
        texts, cache, sources, dtype = self._texts_to_cache()
        how = cache, sources, lambda: self.models.acquire("text"), dtype
        data.cache_texts(texts[self.world.rank :: self.world.size], *how)
        self.world.barrier()
        return data.cache_texts(texts, *how)

    def _texts_to_cache(self):
        """The arguments of data.text_files."""
        sources = [*self.models.files("text"), *filter(None, [tokenizer_file(self.models.dir)])]
        return self.texts, self.cache, sources, DTYPES[self.args.dtype]

    def step(self, step, low, high, show_caption, preserved_prompts=()):
        """This rank's Batches of a step, one per accumulation, and the weight of each one's loss, which is its share of
        the step's samples. show_caption(captions, rng) -> what is shown of a sample's captions. preserved_prompts:
        where there are any, PRESERVED_SHARE of the samples are shown one of these, with the weight args.preserve. All
        that is drawn is drawn for the global batch, of which a rank takes its samples.
        """
        args = self.args
        indices_of = [self.batches.at(step * args.accumulate + i) for i in range(args.accumulate)]
        total = sum(map(len, indices_of))
        for i, indices in enumerate(indices_of):
            rng = random.Random(f"{args.seed} step {step} {i}")
            g = torch.Generator().manual_seed(rng.getrandbits(62))
            items = [self.items[j] for j in indices]
            preserved = [bool(preserved_prompts) and rng.random() < PRESERVED_SHARE for _ in items]
            captions = [
                ""
                if rng.random() < args.caption_dropout
                else rng.choice(preserved_prompts)
                if keep
                else show_caption(item.captions, rng)
                for item, keep in zip(items, preserved)
            ]
            first_frame_given = torch.tensor([rng.random() < args.i2v_prob and item.frames > 1 for item in items])
            t, loss_mask = sample_timesteps(len(items), args.shift, args.t_distribution, low, high, g), None
            if first_frame_given.any():  # it is clean
                t = t[:, None].repeat(1, 1 + (items[0].frames - 1) // 4)
                t[first_frame_given, 0] = 0
                loss_mask = ((t > 0) / (t > 0).float().mean())[:, None, :, None, None]
            local, fraction = self.world.local_indices(len(items))
            drawn = self.samples.draw(items, args.continuation, rng)
            entries = [self.samples.entry(load(self.files[indices[j]])[0], drawn[j], captions[j] != "") for j in local]
            noise = torch.stack([torch.randn(entries[0]["latents"].shape, generator=g) for _ in items])
            loss_mask = frame_weights(self.samples, noise) if loss_mask is None else loss_mask
            preserved = torch.tensor(preserved)
            if preserved.any():
                weight = torch.where(preserved, float(args.preserve), 1.0).view(-1, 1, 1, 1, 1)
                loss_mask = weight if loss_mask is None else weight * loss_mask
            mask = None if loss_mask is None else loss_mask[local]
            chosen = preserved[local] if preserved.any() else None
            batch = make_noisy_batch(entries, [captions[j] for j in local], t[local], noise[local], mask, chosen)
            yield batch, fraction * len(items) / total

    @torch.no_grad()
    def val_loss(self, schedule, embed):
        """{name: value} to log for each expert: `val_loss`, the mean loss of the held-out samples, and `val_loss_by_t`,
        that at each of four times. Comparable between runs on the same data, whatever their seeds. embed(captions) ->
        context (B,S,D), lens (B,).
        """
        metrics = {}
        for name, (low, high) in schedule.items():
            batches = eval_batches(self.val_items, self.val_files, self.samples, self.models.settings.shift, low, high)
            model, by_t, suffix = self.models.acquire(name).eval(), [0.0] * 4, "" if name == "dit" else f"_{name}"
            for i, batch in batches:
                by_t[i] += batch.loss(model, *embed(batch.captions)).item() / len(self.val_items)
            model = None  # so that it can make room for the other expert
            metrics |= {f"val_loss{suffix}": sum(by_t) / 4, f"val_loss_by_t{suffix}": by_t}
        return metrics


# ---- the loop ----------------------------------------------------------------------------------------------------
def evaluate(args, state, dataset, previews, schedule, embed, step, encoder=None):
    """The held-out loss and previews, where they are due, of the weights that would be saved. Returns what to log.
    encoder: the one that is being trained, if it is.
    """
    metrics, last = {}, step == args.steps
    with state.averaged():
        if dataset.val_items and (step % args.eval_every == 0 or last):
            metrics = dataset.val_loss(schedule, embed)
        if previews.prompts and (step % args.preview_every == 0 or last):
            previews.write(step, encoder)
    return metrics


def fit(
    args,
    run,
    models,
    dataset,
    state,
    schedule,
    params_of,
    embed,
    show_caption,
    evaluate,
    save,
    extra_loss=None,
    after_update=None,
    preserved_prompts=(),
):
    """The loop of both trainers, from state.step to args.steps; returns whether it came to the end.

    schedule: of expert_schedule. params_of {expert: parameters that a step on it gives gradients}. embed(captions) ->
    context (B,S,D), lens (B,). show_caption: as in Dataset.step. evaluate(step) -> metrics. save(step).
    extra_loss(step) back-propagates a further loss and returns its value, added over ranks. after_update(expert) ->
    metrics, after an optimizer step. preserved_prompts: for which the DiT is held to what it predicts without adapter.
    """
    world, opt, guard = models.world, state.opt, state.guard
    if not state.step and (metrics := evaluate(0)):
        run.log(0, **metrics)
    for step in range(state.step, args.steps):
        began, loss, extra, tokens, taught = time.monotonic(), 0.0, 0.0, 0, 0
        world.seed(args.seed, step)
        expert = list(schedule)[step // args.steps_per_expert % len(schedule)]
        model = models.acquire(expert).train()

        # gradients: the sum over ranks is that of the global batch
        opt.zero_grad(set_to_none=True)  # a step on one expert leaves the other's adapter alone
        for batch, weight in dataset.step(step, *schedule[expert], show_caption, preserved_prompts):
            context, lens = embed(batch.captions)
            taught += len(batch.x) if batch.preserved is None else int((~batch.preserved).sum())
            if preserved_prompts:
                with adapter_off(model):
                    batch = batch.with_base_targets(model, context, lens)
            loss += backward(world, model, batch, context, lens, weight)
            tokens += batch.x[:, 0].numel() // 4 * (weight > 0)
        if extra_loss:
            extra = extra_loss(step)
        tokens *= world.dp_size / world.size
        sums = world.all_reduce_grads(params_of[expert], loss, extra, tokens, taught, run.stop)
        loss, extra, tokens, taught, stop = sums

        # one update, unless the gradient is not to be trusted
        for group in opt.param_groups:
            group["lr"] = lr_at(step, args.steps, group["peak_lr"], args.warmup, args.schedule)
        grad_norm = clip_grad_norm(state.params, args.grad_clip)
        metrics = {"loss": loss, **({"anchor": extra} if extra_loss else {})}
        metrics |= {"lr": opt.param_groups[0]["lr"], "grad_norm": grad_norm}
        # samples that are only preserved have gradients far smaller than others
        if reason := guard.should_skip(loss, grad_norm, typical=taught > 0):
            print(f"step {step + 1} skipped: {reason}", flush=True)
            metrics["skipped"] = guard.skipped
        else:
            world.seed(args.seed, step, "optimizer", same=True)
            opt.step()
            if after_update:
                metrics |= after_update(expert)
            if state.ema:
                state.ema.update()

        # log, evaluate, save
        seconds, last = time.monotonic() - began, step + 1 == args.steps
        if len(schedule) > 1:
            metrics["expert"] = expert
        metrics |= {"ms": round(1000 * seconds), "tokens_per_s": round(tokens / seconds)}
        metrics["peak_gb"] = round(plan.used(args.device) / 1e9, 2)
        if mfu := plan.mfu(model, batch.x, dataset.tokens, seconds / args.accumulate, args.device):
            metrics["mfu"] = round(mfu, 3)
        model = None  # the other expert may be next
        run.log(step + 1, **metrics, **evaluate(step + 1))
        too_many = guard.skipped >= args.max_skipped
        if (step + 1) % args.save_every == 0 or last or stop or too_many:
            save(step + 1)
        guard.raise_if_stuck(args.max_skipped, reason, args.lr, run.out)
        if stop:
            return False
    return True
