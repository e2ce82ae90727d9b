"""What both trainers share: flags, noised batches, the held-out loss, previews.

A step is drawn from the seed and the step's number alone (which samples, captions, times and noise), so a resumed run
sees what an uninterrupted one would have seen.
"""

import math
import random
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import data
from checkpoint import BadInput, load, read_headers
from flow import add_noise, eval_timesteps, sample_timesteps
from parallel import as_sharded, sharded
from sample import DTYPES, HERE, check_size, decode, denoise, parse_size, read_prompts, write_grid, write_mp4

# Flags that may differ between a run and its continuation: they do not decide what is learned.
FREE = (
    "steps",
    "out",
    "cache",
    "cache_only",
    "device",
    "save_every",
    "eval_every",
    "previews",
    "preview_every",
    "resume",
    "data",
    "ckpt",
    "text_encoder",
    "init_lora",
    "checkpointing",
    "most_bad",
    "save",
    "cache_text",
    "stream_blocks",
    "fsdp",
    "ulysses_size",
    "pipeline_stages",
)


def flags(p, **defaults):
    """The flags of both trainers; `defaults` are those in which they differ."""
    g = p.add_argument_group("what")
    g.add_argument("--ckpt", default="nano", help="checkpoint folder (default: the one in the repository)")
    g.add_argument(
        "--expert", choices=("high", "low", "both"), help="which expert of an A14B to train (default: both, in turns)"
    )
    g.add_argument("--stretch", type=int, default=50, help="steps on one expert before the other's turn")
    g.add_argument("--text_encoder", help="start from this text encoder's file")
    g.add_argument("--out")
    g = p.add_argument_group("data")
    g.add_argument(
        "--data",
        help="folder of images and clips with .txt captions, or a JSONL of paths and captions (default: clips of the nano world)",
    )
    g.add_argument("--cache", help="folder of the cache (default: cache/ beside the data)")
    g.add_argument("--cache_only", action="store_true", help="fill the cache and leave")
    g.add_argument("--resolution", help="WxH px: the area that buckets fill (default: the checkpoint's)")
    g.add_argument("--frames", type=int, help="4k+1, at most, of each clip (default: the checkpoint's)")
    g.add_argument(
        "--clip_mode",
        choices=list(data.MODES),
        default="first",
        help="which frames of a longer clip: " + "; ".join(f"{k}: {v}" for k, v in data.MODES.items()),
    )
    g.add_argument("--caption_dropout", type=float, default=0.1, help="share of samples trained without their caption")
    g.add_argument(
        "--i2v_prob", type=float, default=0.0, help="TI2V: share of clips trained with their first frame given"
    )
    g.add_argument("--held_out", type=float, default=0.05, help="share of files kept for the held-out loss, 16 at most")
    g = p.add_argument_group("training")
    g.add_argument("--steps", type=int)
    g.add_argument("--batch", type=int)
    g.add_argument("--accumulate", type=int, default=1, help="batches per step")
    g.add_argument("--lr", type=float)
    g.add_argument("--weight_decay", type=float)
    g.add_argument("--warmup", type=int, default=10, help="steps")
    g.add_argument("--schedule", choices=("constant", "cosine"), default="cosine")
    g.add_argument("--grad_clip", type=float, default=1.0)
    g.add_argument(
        "--explosion", type=float, default=100.0, help="skip a step whose gradient is this many times the recent median"
    )
    g.add_argument("--most_bad", type=int, default=10, help="stop after this many skipped steps in a row")
    g.add_argument(
        "--ema",
        type=float,
        default=0.0,
        help="save a moving average of the weights with this decay (0: the weights themselves)",
    )
    g.add_argument("--shift", type=float, help="of the training times (default: the checkpoint's)")
    g.add_argument(
        "--t_distribution", choices=("logit-normal", "uniform"), help="default: the checkpoint's, or logit-normal"
    )
    g.add_argument("--checkpointing", action="store_true", help="recompute the DiT's activations in the backward pass")
    g.add_argument("--seed", type=int, default=0)
    g.add_argument("--device")
    g.add_argument("--dtype", choices=list(DTYPES))
    g = p.add_argument_group(
        "several GPUs, under torchrun (parallel.py); --batch is per rank that sees its own samples"
    )
    g.add_argument("--fsdp", action="store_true", help="shard the weights over the ranks")
    g.add_argument("--ulysses_size", type=int, default=1, help="ranks that share the tokens of each clip")
    g.add_argument("--pipeline_stages", type=int, default=1, help="ranks that share the blocks")
    g = p.add_argument_group("watching")
    g.add_argument("--save_every", type=int, default=100)
    g.add_argument("--eval_every", type=int, default=100, help="steps between held-out losses")
    g.add_argument("--previews", help="a text file of prompts to sample, one per line, each always from the same seed")
    g.add_argument("--preview_every", type=int, default=500)
    g.add_argument("--resume", action="store_true", help="go on from the last state in --out")
    p.set_defaults(**defaults)


def fill_in(args, s):
    """Fill in what was not given from the settings `s` that the checkpoint recommends, and check what was."""
    for name, other in (
        ("resolution", "{}x{}".format(*s["size"])),
        ("frames", s["frames"]),
        ("shift", s["shift"]),
        ("t_distribution", "logit-normal"),
    ):
        if getattr(args, name) is None:
            setattr(args, name, s["train"].get(name, other))
    args.dtype = args.dtype or ("bf16" if args.device.startswith("cuda") else "fp32")
    if args.expert and not s["experts"]:
        raise BadInput(f"--expert {args.expert}: {args.ckpt} has a single model")
    if s["experts"]:
        args.expert = args.expert or "both"
    if args.i2v_prob and s["model_type"] != "ti2v":
        raise BadInput(
            f"--i2v_prob {args.i2v_prob}: only TI2V is trained both ways; {args.ckpt} is {s['model_type'].upper()}"
        )
    if args.previews and s["model_type"] == "i2v":
        raise BadInput(f"--previews {args.previews}: prompts alone; {args.ckpt} is an image-to-video model")
    side = 32 if s["vae"] == "2.2" else 16
    if min(parse_size(args.resolution)) < side:
        raise BadInput(f"--resolution {args.resolution}: each side at least {side}")
    check_size((32, 32), args.frames, (4, 16, 16))
    check_ranges(
        args,
        steps=(1,),
        batch=(1,),
        accumulate=(1,),
        save_every=(1,),
        eval_every=(1,),
        preview_every=(1,),
        most_bad=(1,),
        stretch=(1,),
        lr=(0,),
        warmup=(0,),
        weight_decay=(0,),
        grad_clip=(1e-9,),
        explosion=(2,),
        shift=(1e-9,),
        caption_dropout=(0, 1),
        i2v_prob=(0, 1),
        held_out=(0, 0.5),
        ema=(0, 0.99999),
        seed=(0, 2**63 - 1),
    )


def check_ranges(args, **ranges):
    """Refuse numbers out of range; per flag the lowest and, where there is one, the highest value."""
    for flag, (low, *high) in ranges.items():
        value = getattr(args, flag)
        if not low <= value <= (high or [math.inf])[0] or value == math.inf:
            raise BadInput(
                f"--{flag} {value}: must be {'positive' if low == 1e-9 else f'at least {low}'}"
                + (f" and at most {high[0]}" if high else "")
            )


def experts(args, s):
    """{name of a DiT to train through: the range [low, high) of its times}, in the order of their turns."""
    if not args.expert:
        return {"dit": (0.0, 1.0)}
    sides = {"high": (s["boundary"], 1.0), "low": (0.0, s["boundary"])}
    return sides if args.expert == "both" else {args.expert: sides[args.expert]}


def nano_data(folder):
    """Clips of the nano world for a run without --data."""
    if not (folder / "attributes.jsonl").exists():
        subprocess.run(
            [sys.executable, HERE / "nano.py", "clips", "--out", folder, "--n", "60", "--words", "crimson,wedge,halts"],
            check=True,
        )
    return folder


class Batch(NamedTuple):
    """B noised samples: x (B,C,T',h,w), I2V's conditioning channels behind the noise; t (B,) or (B,T') in 0..1; target
    (B,C',T',h,w); counted (B,1,T',1,1), the loss's weight, of mean 1 over the global batch and 0 where a frame is
    given, or None where all count; captions.
    """

    x: torch.Tensor
    t: torch.Tensor
    target: torch.Tensor
    counted: torch.Tensor | None
    captions: list

    def loss(self, model, context, lens):
        """Mean squared error of the velocity (fp32, ()); context (B,S,D), lens (B,)."""
        device = context.device
        v, target = model(self.x.to(device), 1000 * self.t.to(device), context, lens), self.target.to(device)
        if self.counted is None:
            return F.mse_loss(v, target)
        return ((v - target).square().mean(1, keepdim=True).mean((3, 4), keepdim=True) * self.counted.to(device)).mean()


def noised(entries, captions, t, noise, counted=None):
    """A Batch of cached samples under noise (B,C,T',h,w) at times t, (B,) or, where some have a latent frame that is
    given, (B,T') with 0 for that frame.
    """
    x, target = add_noise(torch.stack([e["latents"] for e in entries]), noise, t)
    if "y" in entries[0]:
        x = torch.cat([x, torch.stack([e["y"] for e in entries])], 1)
    return Batch(x, t, target, counted, captions)


def fixed(items, files, shift, low, high):
    """(0..3, Batch of one) for each sample at four fixed times, under a noise that its file decides, with its first
    caption.
    """
    for item, file in zip(items, files):
        g = torch.Generator().manual_seed(int(item.digest[:15], 16))
        entry = load(file)[0]
        for i, t in enumerate(eval_timesteps(4, shift, low, high)):
            yield i, noised([entry], item.captions[:1], t[None], torch.randn(1, *entry["latents"].shape, generator=g))


class Dataset:
    """The samples of a run, cached, and what each step sees of them. `items` are trained on, `held` are not."""

    def __init__(self, args, models, world):
        """Scan and report; nothing is computed yet."""
        s, self.args, self.world = models.settings, args, world
        source = Path(args.data) if args.data else world.first(lambda: nano_data(Path("out/nano_data")))
        self.cache = Path(args.cache or (source if source.is_dir() else source.parent) / "cache")
        self.vae_file, self.i2v, self.vae22 = models.files("vae")[0], s["model_type"] == "i2v", s["vae"] == "2.2"
        area = math.prod(parse_size(args.resolution))
        items, skipped = world.first(
            lambda: data.scan(source, area, 32 if self.vae22 else 16, args.frames, s["fps"], args.clip_mode, self.cache)
        )
        files = sorted({i.digest for i in items})
        kept = set(files[: min(16, int(args.held_out * len(files)))])
        self.held, self.items = ([i for i in items if (i.digest in kept) == out] for out in (True, False))
        self.captions = ["", *dict.fromkeys(c for i in items for c in i.captions)]
        self.batches = data.Batches(self.items, args.batch * world.datas, args.seed)
        width = read_headers(models.files("text")[:1])["token_embedding.weight"].shape[1]
        self.tokens = min(512, max(2 + len(c) // 3 for c in self.captions))  # of the longest caption, about
        self.bytes = {
            "latents": data.latent_bytes(items, self.vae22, self.i2v),
            "texts": sum(2 + len(c) // 3 for c in self.captions) * width * DTYPES[args.dtype].itemsize,
        }
        print(data.report(items, skipped))
        print(f"  {len(self.held)} samples held out; cache in {self.cache}")

    def sizes(self, texts):
        """What plan.training asks about the data; `texts`: whether these are cached too."""
        return {
            "bucket": max((i.bucket for i in self.items), key=math.prod),
            "text": self.tokens,
            "cache": (self.bytes["latents"], self.bytes["texts"] * texts),
            "encode": not all(
                f.exists() for f in data.latent_files(self.items + self.held, self.cache, self.vae_file, self.i2v)
            ),
        }

    def cache_latents(self, models):
        """Fill the cache of latents, each rank a part of it; the VAE leaves memory afterwards."""
        items = self.items + self.held
        data.cache_latents(
            items[self.world.rank :: self.world.size], self.cache, self.vae_file, lambda: models.part("vae"), self.i2v
        )
        models.parts.pop("vae", None)
        self.world.barrier()
        found = data.latent_files(items, self.cache, self.vae_file, self.i2v)
        self.latents, self.held_latents = found[: len(self.items)], found[len(self.items) :]

    def step(self, step, low, high, say):
        """This rank's Batches of a step, one per accumulation, and each one's share of the step's samples.
        say(captions, rng) -> what is shown. All that is drawn is drawn for the global batch, of which a rank takes its
        samples.
        """
        args, chosen = (
            self.args,
            [self.batches.at(step * self.args.accumulate + i) for i in range(self.args.accumulate)],
        )
        for i, indices in enumerate(chosen):
            rng = random.Random(f"{args.seed} step {step} {i}")
            g = torch.Generator().manual_seed(rng.getrandbits(62))
            captions = [
                "" if rng.random() < args.caption_dropout else say(self.items[j].captions, rng) for j in indices
            ]
            given = torch.tensor([rng.random() < args.i2v_prob and self.items[j].frames > 1 for j in indices])
            t, counted = sample_timesteps(len(indices), args.shift, args.t_distribution, low, high, g), None
            if given.any():  # their first latent frame is clean
                t = t[:, None].repeat(1, 1 + (self.items[indices[0]].frames - 1) // 4)
                t[given, 0] = 0
                counted = ((t > 0) / (t > 0).float().mean())[:, None, :, None, None]
            mine, share = self.world.share(len(indices))
            entries = [load(self.latents[indices[j]])[0] for j in mine]
            noise = [torch.randn(entries[0]["latents"].shape, generator=g) for _ in indices]
            of = lambda values: torch.stack([values[j] for j in mine])
            yield (
                noised(
                    entries, [captions[j] for j in mine], of(t), of(noise), counted if counted is None else of(counted)
                ),
                share * len(indices) / sum(map(len, chosen)),
            )

    @torch.no_grad()
    def held_out(self, models, turns, embed):
        """{name: value} to log for each expert: `held_out`, the mean loss of the held-out samples, and `by_t`, that at
        each of four times. Comparable between runs on the same data, whatever their seeds. embed(captions) -> context
        (B,S,D), lens (B,).
        """
        told = {}
        for name, (low, high) in turns.items():
            model, total, tail = models.part(name).eval(), [0.0] * 4, "" if name == "dit" else f"_{name}"
            for i, batch in fixed(self.held, self.held_latents, models.settings["shift"], low, high):
                total[i] += batch.loss(model, *embed(batch.captions)).item() / len(self.held)
            model = None  # so that it can make room for the other expert
            told |= {f"held_out{tail}": sum(total) / 4, f"by_t{tail}": total}
        return told


def state_of(params, opt, guard, ema):
    """All that a run needs to go on exactly, but for its step: what is drawn follows from that."""
    opt = opt.state_dict()
    return {
        "params": [p.data for p in params],
        "opt": {**opt, "state": {i: {**s} for i, s in opt["state"].items()}},
        "guard": guard.state_dict(),
        "ema": ema and {**ema.state_dict(), "average": [*ema.average]},
    }


def places(state, params):
    """Where a state holds something in the shape of a parameter: (container, key, that parameter)."""
    fits = lambda v, p: isinstance(v, str) or torch.is_tensor(v) and v.shape == p.shape
    moments = [(s, k, params[i]) for i, s in state["opt"]["state"].items() for k, v in s.items() if fits(v, params[i])]
    lists = [state["params"], *([state["ema"]["average"]] if state["ema"] else [])]
    return [(values, i, p) for values in lists for i, p in enumerate(params)] + moments


def save_state(run, step, params, opt, guard, ema):
    """Write a run's state; every rank calls this. What is sharded goes into a folder beside it, from all ranks at once."""
    state, shards = state_of(params, opt, guard, ema), {}
    for n, (values, key, _) in enumerate(places(state, params)):
        if sharded(values[key]):
            shards[f"{n}"], values[key] = values[key], f"{n}"
    run.save(step, state, shards)


def restore(state, params, opt, guard, ema):
    """Put a saved state back, from any number of ranks on any number; returns its step."""
    found = [(values, key, p) for values, key, p in places(state, params) if isinstance(values[key], str)]
    if found:
        import torch.distributed.checkpoint as dcp

        read = {values[key]: torch.empty_like(p, requires_grad=False) for values, key, p in found}
        dcp.load(
            read, storage_reader=dcp.FileSystemReader(state["shards"]), no_dist=not torch.distributed.is_initialized()
        )
        for values, key, _ in found:
            values[key] = read[values[key]]
    for values, key, p in places(state, params):
        values[key] = as_sharded(values[key], p)
    for p, q in zip(params, state["params"], strict=True):
        p.data.copy_(q)
    opt.load_state_dict(state["opt"])
    guard.load_state_dict(state["guard"])
    if ema:
        ema.load_state_dict(state["ema"])
    print(f"resumed at step {state['step']}")
    return state["step"]


class Previews:
    """Clips of fixed prompts from fixed seeds: OUT/previews/step_NNNNNN.png, and an mp4 of each."""

    def __init__(self, args, models, main):
        self.prompts = read_prompts(args.previews, "--previews") if args.previews else []
        self.main, self.models, self.out, self.seed = main, models, Path(args.out) / "previews", args.seed

    def embed(self, encoder):
        """Embed the prompts with this encoder; all clips from now on are made from that."""
        with torch.no_grad():
            self.models.texts = {
                p: encoder.encode([p])[0][0] for p in [*self.prompts, self.models.settings["negative"]]
            }

    def write(self, step):
        """Sample with the models as they are now."""
        clips = []
        for model in self.models.parts.values():
            model.eval()
        for i, prompt in enumerate(self.prompts):
            z = denoise(self.models, [prompt], [self.seed + i], progress=False)
            if self.main:
                clips.append(decode(self.models, z)[0].cpu())
                write_mp4(self.out / f"step_{step:06d}_{i:02d}.mp4", clips[-1], self.models.settings["fps"], prompt)
        if clips:
            self.models.release("vae")
            write_grid(self.out / f"step_{step:06d}.png", clips, self.prompts)
            print(f"previews: {self.out / f'step_{step:06d}.png'}", flush=True)
