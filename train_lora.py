"""Train a LoRA "translator": small changes to the DiT's cross-attention keys and values, so that it listens better.

    python train_lora.py --ckpt Wan2.2-TI2V-5B --data DIR --out DIR --device cuda
    python train_lora.py --ckpt Wan2.2-T2V-A14B --expert high --data DIR --out DIR --device cuda
    python train_lora.py                                   on nano and clips it draws itself

The base is frozen. Latents and text embeddings are computed once and cached; blocks below the first adapted one then need no
gradient, so none of their activations are kept. The result, OUT/adapter_model.safetensors, is read by ComfyUI, lightx2v and diffusers.
"""
import argparse
import json
import math
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import data
from checkpoint import BadInput, Run, cli, load, read_headers, weight_files
from flow import add_noise, draw_t
from lora import TARGETS, inject, parse_blocks, save_lora
from optim import adamw, lr_at
from sample import DTYPES, HERE, Models, check_size, parse_size, pick_device
from wan import read_config

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12}  # dense bf16 of the data sheets


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("what")
    g.add_argument("--ckpt", default="nano", help="checkpoint folder (default: the one in the repository)")
    g.add_argument("--expert", choices=("high", "low"), help="which expert of an A14B to train")
    g.add_argument("--text_encoder", help="an updated text encoder's file")
    g.add_argument("--data", help="folder of images and clips with .txt captions (default: clips of the nano world)")
    g.add_argument("--out", default="out/lora")
    g.add_argument("--cache", help="folder of the cache (default: DATA/cache)")
    g = p.add_argument_group("data")
    g.add_argument("--resolution", help="WxH px: the area that buckets fill (default: the checkpoint's)")
    g.add_argument("--frames", type=int, help="4k+1, at most, of each clip (default: the checkpoint's)")
    g.add_argument("--caption_dropout", type=float, default=0.1, help="share of samples trained without their caption")
    g = p.add_argument_group("adapter")
    g.add_argument("--targets", default="cross_attn.k,cross_attn.v")
    g.add_argument("--allow_self_attn", action="store_true", help="permit self_attn targets")
    g.add_argument("--blocks", help="such as 20-29 or 0,3,5-7 (default: all)")
    g.add_argument("--rank", type=int, default=16)
    g.add_argument("--alpha", type=float, help="default: the rank")
    g.add_argument("--dropout", type=float, default=0.0)
    g = p.add_argument_group("training")
    g.add_argument("--steps", type=int, default=200)
    g.add_argument("--batch", type=int, default=8)
    g.add_argument("--lr", type=float, default=1e-3)
    g.add_argument("--weight_decay", type=float, default=0.01)
    g.add_argument("--warmup", type=int, default=10, help="steps")
    g.add_argument("--schedule", choices=("constant", "cosine"), default="cosine")
    g.add_argument("--grad_clip", type=float, default=1.0)
    g.add_argument("--shift", type=float, help="of the training times (default: the checkpoint's)")
    g.add_argument("--t_distribution", choices=("logit-normal", "uniform"), help="default: the checkpoint's, or logit-normal")
    g.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    g.add_argument("--seed", type=int, default=0)
    g.add_argument("--device")
    g.add_argument("--dtype", choices=list(DTYPES))
    g.add_argument("--save_every", type=int, default=100)
    g.add_argument("--resume", action="store_true", help="go on from the last state in --out")
    return p.parse_args()


def fill_in(args, s):
    """The data and time settings that were not given: the checkpoint's recommended ones."""
    for name, other in (("resolution", "{}x{}".format(*s["size"])), ("frames", s["frames"]), ("shift", s["shift"]), ("t_distribution", "logit-normal")):
        if getattr(args, name) is None:
            setattr(args, name, s["train"].get(name, other))
    args.dtype = args.dtype or ("bf16" if args.device.startswith("cuda") else "fp32")


def check_ranges(args, **more):
    """Refuse numbers out of range, (lowest, highest) per flag: those of every trainer, and `more`."""
    check_size((32, 32), args.frames, (4, 16, 16))
    some, positive, count = (0, math.inf), (1e-9, math.inf), (1, math.inf)
    for flag, (low, high) in {"steps": count, "batch": count, "save_every": count, "lr": some, "warmup": some, "grad_clip": positive,
                              "shift": positive, "caption_dropout": (0, 1), "seed": (0, 2 ** 63 - 1), **more}.items():
        value = getattr(args, flag)
        if not low <= value <= high or value == math.inf:
            raise BadInput(f"--{flag} {value}: must be {'positive' if low == 1e-9 else f'at least {low}'}" + (f" and at most {high}" if high < math.inf else ""))


def resolve(args, s, layers):
    """Fill in what the checkpoint recommends and check what was given."""
    fill_in(args, s)
    args.alpha = args.alpha if args.alpha is not None else args.rank
    side = 32 if s["vae"] == "2.2" else 16
    if min(parse_size(args.resolution)) < side:
        raise BadInput(f"--resolution {args.resolution}: each side at least {side}")
    check_ranges(args, weight_decay=(0, math.inf), rank=(1, math.inf), alpha=(1e-9, math.inf), dropout=(0, 0.999))
    args.targets = args.targets.split(",")
    if len(set(args.targets)) < len(args.targets) or not set(args.targets) <= set(TARGETS):
        raise BadInput(f"--targets {','.join(args.targets)}: choose from {', '.join(TARGETS)}, each once")
    if any(t.startswith("self_attn") for t in args.targets) and not args.allow_self_attn:
        raise BadInput(f"--targets {','.join(args.targets)}: LoRA on self-attention has repeatedly caused artifacts (it changes how the model draws, "
                       "not how it listens); add --allow_self_attn to do it all the same")
    args.blocks = parse_blocks(args.blocks, layers)


def nano_data(folder):
    """Clips of the nano world for a run without --data."""
    if not (folder / "attributes.jsonl").exists():
        subprocess.run([sys.executable, HERE / "nano.py", "clips", "--out", folder, "--n", "60", "--words", "crimson,box,sinks"], check=True)
    return folder


def forward_flops(model, latents, text):
    """Multiply-adds x 2 of one DiT forward: linears, attention, and cross-attention over the folded text."""
    c, (B, _, T, h, w) = model.config, latents.shape
    L = T * h * w // 4
    linear = c.num_layers * (6 * c.dim ** 2 + 2 * c.dim * c.ffn_dim)
    return 2 * B * (L * linear + c.num_layers * 2 * c.dim * (L * L + L * text + text * c.dim))


def main():
    args = arguments()
    args.device = pick_device(args.device)
    models = Models(args.ckpt, args.device, torch.float32, text_encoder=args.text_encoder)
    s, expert = models.settings, args.expert or models.experts[0]
    if s["experts"] and not args.expert:
        raise BadInput("--expert: this checkpoint has two experts; choose high or low")
    if args.expert and not s["experts"]:
        raise BadInput(f"--expert {args.expert}: {args.ckpt} has a single model")
    base = weight_files(models.folder(expert))
    resolve(args, s, read_config(models.folder(expert), read_headers(base)).num_layers)
    dtype = models.dtype = DTYPES[args.dtype]
    print(json.dumps(vars(args)))
    run = Run(args.out, vars(args), args.resume)

    # data
    folder = Path(args.data) if args.data else nano_data(Path("out/nano_data"))
    stride, patch = (16 if s["vae"] == "2.2" else 8), 2
    area = parse_size(args.resolution)
    items, skipped = data.scan(folder, area[0] * area[1], stride * patch, args.frames, s["fps"])
    print(data.report(items, skipped))
    cache = Path(args.cache or folder / "cache")
    latents = data.cache_latents(items, cache, models.files("vae")[0], lambda: models.part("vae"), s["model_type"] == "i2v")
    captions = ["", *(c for item in items for c in item.captions)]
    texts = data.cache_texts(captions, cache, [*models.files("text"), models.dir / "google" / "umt5-xxl" / "spiece.model"], lambda: models.part("text"), dtype)
    models.parts.clear()  # the encoder and the VAE are not needed any more

    # model and adapter
    model = models.part(expert).train()
    model.checkpointing = args.checkpointing
    low, high = (0.0, 1.0) if not args.expert else (s["boundary"], 1.0) if expert == "high" else (0.0, s["boundary"])
    torch.manual_seed(args.seed)
    params = inject(model, args.targets, args.rank, args.alpha, args.dropout, args.blocks)
    print(f"{sum(p.numel() for p in params):,} parameters in {len(params) // 2} matrices")
    opt = adamw(params, args.lr, args.weight_decay)
    batches = data.Batches(items, args.batch, args.seed)
    same = {k: v for k, v in vars(args).items() if k not in ("steps", "out", "cache", "device", "save_every", "resume", "data", "ckpt", "text_encoder", "checkpointing")}
    same |= {"samples": [f.name for f in latents], "captions": sorted(f.name for f in texts.values()), "base": [str(f.stat().st_size) for f in base]}
    start, state = 0, run.restore(same)
    if state:
        start = state["step"]
        for p, q in zip(params, state["params"], strict=True):
            p.data.copy_(q)
        opt.load_state_dict(state["opt"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"]:
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        print(f"resumed at step {start}")
    result = run.out / ("adapter_model.safetensors" if expert == "dit" else f"adapter_model_{expert}.safetensors")
    peak = next((f for k, f in PEAK_FLOPS.items() if args.device.startswith("cuda") and k in torch.cuda.get_device_name()), None)

    def save_all(step):
        save_lora(result, model, variant=s["variant"], step=step, expert=expert)
        run.save(step, {"params": [p.data for p in params], "opt": opt.state_dict(), "rng": torch.get_rng_state(),
                        "cuda_rng": torch.cuda.get_rng_state_all() if args.device.startswith("cuda") else []})

    for step in range(start, args.steps):
        began = time.time()
        chosen = batches.at(step)
        rng = random.Random(f"{args.seed} step {step}")  # every draw of a step depends on the seed and the step alone
        g = torch.Generator().manual_seed(rng.getrandbits(62))
        entries = [load(latents[i])[0] for i in chosen]
        x0 = torch.stack([e["latents"] for e in entries])
        said = ["" if rng.random() < args.caption_dropout else rng.choice(items[i].captions) for i in chosen]
        context, lens = data.collate([load(texts[c])[0]["embedding"] for c in said])
        t = draw_t(len(x0), args.shift, args.t_distribution, low, high, g)
        xt, target = (u.to(args.device) for u in add_noise(x0, torch.randn(x0.shape, generator=g), t))
        if "y" in entries[0]:  # I2V: the conditioning channels stand behind the noise
            xt = torch.cat([xt, torch.stack([e["y"] for e in entries]).to(args.device)], 1)

        for group in opt.param_groups:
            group["lr"] = lr_at(step, args.steps, args.lr, args.warmup, args.schedule)
        loss = F.mse_loss(model(xt, 1000 * t.to(args.device), context.to(args.device), lens.to(args.device)), target)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(params, args.grad_clip)
        opt.step()

        seconds = time.time() - began
        tokens = x0[:, 0].numel() // patch ** 2
        memory = torch.cuda.max_memory_allocated() if args.device.startswith("cuda") else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        line = {"loss": loss.item(), "lr": group["lr"], "grad_norm": norm.item(), "ms": round(1000 * seconds),
                "tokens_per_s": round(tokens / seconds), "peak_gb": round(memory / 1e9, 2)}
        if peak:
            line["mfu"] = round(2 * forward_flops(model, x0, context.shape[1]) / seconds / peak, 3)
        run.log(step + 1, **line)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps or run.stop:
            save_all(step + 1)
        if run.stop:
            return
    print(result)


if __name__ == "__main__":
    cli(main)
