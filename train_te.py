"""Fine-tune the text encoder through the frozen DiT: teach it words, and keep it compatible with what the DiT understands.

    python train_te.py --ckpt Wan2.2-TI2V-5B --data DIR --out DIR --keywords crimson,box --device cuda
    python train_te.py                                  on nano and clips it draws itself

The loss is the DiT's own flow-matching loss; its gradient goes through cross-attention to the encoder. An anchor keeps the embeddings
of prompts without keywords where they were. Text is never cached: a cached embedding bypasses the encoder that is to learn.
The result, OUT/text_encoder.safetensors, is used by every script's --text_encoder.
"""
import argparse
import json
import math
import random
import re
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
from checkpoint import BadInput, Run, cli, load, save
from flow import add_noise, draw_t
from optim import AdamW8bit, adamw, lr_at
from sample import DTYPES, Models, parse_size, pick_device
from train_lora import check_ranges, fill_in, nano_data


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("what")
    g.add_argument("--ckpt", default="nano", help="checkpoint folder (default: the one in the repository)")
    g.add_argument("--expert", choices=("high", "low"), help="which expert of an A14B to learn through")
    g.add_argument("--text_encoder", help="start from this encoder's file")
    g.add_argument("--data", help="folder of images and clips with .txt captions (default: clips of the nano world)")
    g.add_argument("--out", default="out/te")
    g.add_argument("--cache", help="folder of the latents' cache (default: DATA/cache)")
    g.add_argument("--resolution", help="WxH px: the area that buckets fill (default: the checkpoint's)")
    g.add_argument("--frames", type=int, help="4k+1, at most, of each clip (default: the checkpoint's)")
    g = p.add_argument_group("what is trained")
    g.add_argument("--train_blocks", type=int, help="only the top N blocks (default: all; 0: none)")
    g.add_argument("--keywords", help="a,b,c: also train the embedding rows of these words (default on nano's own data: its new words)")
    g.add_argument("--anchor", type=float, default=1.0, help="weight of the penalty on moving prompts without keywords")
    g.add_argument("--save", choices=("full", "delta"), default="full", help="delta: only the tensors and rows that were trained")
    g = p.add_argument_group("captions")
    g.add_argument("--mix", default="15,35,50", help="percent of captions with a keyword shown as the keyword alone, shortened, whole")
    g.add_argument("--trim_prob", type=float, default=0.2, help="chance that a whole caption loses a few words, never a keyword")
    g.add_argument("--caption_dropout", type=float, default=0.1)
    g = p.add_argument_group("training")
    g.add_argument("--steps", type=int, default=250)
    g.add_argument("--batch", type=int, default=16)
    g.add_argument("--lr", type=float, default=3e-4)
    g.add_argument("--keyword_lr", type=float, help="of the keywords' rows (default: 15 x lr)")
    g.add_argument("--optimizer", choices=("adamw", "adamw8bit"), default="adamw", help="adamw8bit needs --dtype bf16")
    g.add_argument("--weight_decay", type=float, default=0.0)
    g.add_argument("--warmup", type=int, default=10, help="steps")
    g.add_argument("--schedule", choices=("constant", "cosine"), default="cosine")
    g.add_argument("--grad_clip", type=float, default=1.0)
    g.add_argument("--shift", type=float, help="of the training times (default: the checkpoint's)")
    g.add_argument("--t_distribution", choices=("logit-normal", "uniform"), help="default: the checkpoint's, or logit-normal")
    g.add_argument("--seed", type=int, default=0)
    g.add_argument("--device")
    g.add_argument("--dtype", choices=list(DTYPES))
    g.add_argument("--save_every", type=int, default=100)
    g.add_argument("--resume", action="store_true", help="go on from the last state in --out")
    return p.parse_args()


class RowEmbedding(nn.Module):
    """An embedding table, frozen but for the rows `ids`: only those get gradients and optimizer states."""

    def __init__(self, table, ids):
        super().__init__()
        self.table, self.ids = table, torch.tensor(sorted(ids), device=table.weight.device)
        self.rows = nn.Parameter(table.weight[self.ids].detach().clone())
        self.slot = torch.full((len(table.weight),), -1, device=table.weight.device)
        self.slot[self.ids] = torch.arange(len(self.ids), device=table.weight.device)

    def forward(self, ids):
        slot = self.slot[ids]
        return torch.where((slot >= 0)[..., None], self.rows[slot.clamp(min=0)], self.table(ids))


def has_keyword(caption, keywords):
    return any(re.search(rf"(?<!\w){re.escape(k)}(?!\w)", caption, re.IGNORECASE) for k in keywords)


def calibrate(caption, keywords, mix, trim_prob, rng):
    """What a step shows of a caption: one with a keyword alone, shortened to a few words around it, or whole, in the shares `mix`;
    a whole caption loses up to a fifth of its words at the chance `trim_prob`, never a keyword."""
    found = [k for k in keywords if has_keyword(caption, [k])]
    u = rng.random() * sum(mix)
    if found and u < mix[0]:
        return rng.choice(found)
    words = caption.split()
    keep = [has_keyword(w, found) for w in words]
    if found and u < mix[0] + mix[1] and any(keep):
        at = rng.choice([i for i, k in enumerate(keep) if k])
        return " ".join(words[max(0, at - rng.randint(0, 2)):at + 1 + rng.randint(0, 2)])
    if rng.random() < trim_prob:
        spare = [i for i, k in enumerate(keep) if not k]
        gone = set(rng.sample(spare, min(len(spare), rng.randint(0, len(words) // 5))))
        return " ".join(w for i, w in enumerate(words) if i not in gone)
    return caption


def main():
    args = arguments()
    args.device = pick_device(args.device)
    models = Models(args.ckpt, args.device, torch.float32, text_encoder=args.text_encoder)
    s = models.settings
    if s["experts"] and not args.expert or args.expert and not s["experts"]:
        raise BadInput(f"--expert {args.expert}: {args.ckpt} has " + ("two experts; choose high or low" if s["experts"] else "a single model"))
    fill_in(args, s)
    models.dtype = DTYPES[args.dtype]
    if args.data is None and args.keywords is None:
        args.keywords = "crimson,box,sinks"
    keywords = [k.strip() for k in (args.keywords or "").split(",") if k.strip()]
    args.keyword_lr = 15 * args.lr if args.keyword_lr is None else args.keyword_lr
    try:
        mix = [float(v) for v in args.mix.split(",")]
    except ValueError:
        mix = []
    if len(mix) != 3 or min(mix) < 0 or not 0 < sum(mix) < math.inf:
        raise BadInput(f"--mix {args.mix}: three shares such as 15,35,50")
    if args.optimizer == "adamw8bit" and args.dtype != "bf16":
        raise BadInput(f"--optimizer adamw8bit --dtype {args.dtype}: its compensated weights are bf16")
    check_ranges(args, weight_decay=(0, math.inf), keyword_lr=(0, math.inf), anchor=(0, math.inf), trim_prob=(0, 1))
    print(json.dumps(vars(args)))
    run = Run(args.out, vars(args), args.resume)

    # data: latents cached, text never
    folder = Path(args.data) if args.data else nano_data(Path("out/nano_data"))
    width, height = parse_size(args.resolution)
    items, skipped = data.scan(folder, width * height, 32 if s["vae"] == "2.2" else 16, args.frames, s["fps"])
    print(data.report(items, skipped))
    latents = data.cache_latents(items, Path(args.cache or folder / "cache"), models.files("vae")[0], lambda: models.part("vae"), s["model_type"] == "i2v")
    models.parts.clear()

    # models: the encoder learns, the DiT is frozen
    expert = args.expert or "dit"
    low, high = (0.0, 1.0) if not args.expert else (s["boundary"], 1.0) if expert == "high" else (0.0, s["boundary"])
    encoder, dit = models.part("text"), models._load(expert)
    layers = len(encoder.blocks)
    top = layers if args.train_blocks is None else args.train_blocks
    if not 0 <= top <= layers or not top and not keywords:
        raise BadInput(f"--train_blocks {args.train_blocks}: from 0 to {layers}, and with 0 --keywords are needed")
    anchors = list(dict.fromkeys(["", *(c for i in items for c in i.captions if not has_keyword(c, keywords))]))
    with torch.no_grad():
        original = {c: encoder.encode([c])[0][0].cpu() for c in anchors} if args.anchor else {}
    trained = {f"blocks.{i}.{n}": p for i in range(layers - top, layers) for n, p in encoder.blocks[i].named_parameters()}
    if top:
        trained["norm.weight"] = encoder.norm.weight
    for p in trained.values():
        p.requires_grad_(True)
    groups = [{"params": list(trained.values()), "scale": 1.0}] if trained else []
    ids = {i for k in keywords for i in encoder.tokenizer.ids(k)}
    if ids:
        encoder.token_embedding = RowEmbedding(encoder.token_embedding, ids)
        groups.append({"params": [encoder.token_embedding.rows], "scale": args.keyword_lr / args.lr if args.lr else 0.0})
    params = [p for g in groups for p in g["params"]]
    opt = (adamw if args.optimizer == "adamw" else AdamW8bit)(groups, args.lr, weight_decay=args.weight_decay)
    print(f"{sum(p.numel() for p in params):,} parameters: {top} of {layers} blocks, {len(ids)} embedding rows; {len(anchors)} prompts anchored")
    batches = data.Batches(items, args.batch, args.seed)
    same = {k: v for k, v in vars(args).items() if k not in ("steps", "out", "cache", "device", "save_every", "resume", "data", "ckpt", "text_encoder", "save")}
    start, state = 0, run.restore(same | {"samples": [f.name for f in latents]})
    if state:
        start = state["step"]
        for p, q in zip(params, state["params"], strict=True):
            p.data.copy_(q)
        opt.load_state_dict(state["opt"])
        torch.set_rng_state(state["rng"])
        print(f"resumed at step {start}")
    else:
        torch.manual_seed(args.seed)

    def save_all(step):
        tensors = dict(trained) if args.save == "delta" else {
            k.replace("token_embedding.table.", "token_embedding."): v for k, v in encoder.state_dict().items() if not k.endswith("token_embedding.rows")}
        if ids and args.save == "delta":
            tensors |= {"token_embedding.rows": encoder.token_embedding.rows, "token_embedding.ids": encoder.token_embedding.ids}
        elif ids:
            tensors["token_embedding.weight"] = tensors["token_embedding.weight"].clone()
            tensors["token_embedding.weight"][encoder.token_embedding.ids] = encoder.token_embedding.rows.detach()
        save(run.out / "text_encoder.safetensors", tensors, {"step": step, "keywords": ",".join(keywords), "delta": args.save == "delta"})
        run.save(step, {"params": [p.data for p in params], "opt": opt.state_dict(), "rng": torch.get_rng_state()})

    for step in range(start, args.steps):
        began = time.time()
        chosen = batches.at(step)
        rng = random.Random(f"{args.seed} te step {step}")  # every draw of a step depends on the seed and the step alone
        g = torch.Generator().manual_seed(rng.getrandbits(62))
        entries = [load(latents[i])[0] for i in chosen]
        x0 = torch.stack([e["latents"] for e in entries])
        said = ["" if rng.random() < args.caption_dropout else calibrate(rng.choice(items[i].captions), keywords, mix, args.trim_prob, rng) for i in chosen]
        t = draw_t(len(x0), args.shift, args.t_distribution, low, high, g)
        xt, target = (u.to(args.device) for u in add_noise(x0, torch.randn(x0.shape, generator=g), t))
        if "y" in entries[0]:
            xt = torch.cat([xt, torch.stack([e["y"] for e in entries]).to(args.device)], 1)

        for group in opt.param_groups:
            group["lr"] = lr_at(step, args.steps, args.lr, args.warmup, args.schedule) * group["scale"]
        loss = F.mse_loss(dit(xt, 1000 * t.to(args.device), *encoder.encode(said)), target)
        held = torch.zeros((), device=args.device)
        if args.anchor:
            prompts = rng.choices(anchors, k=args.batch)
            now, lens = encoder.encode(prompts)
            before = data.collate([original[p] for p in prompts])[0].to(now)
            held = (now.float() - before.float()).square().sum() / before.float().square().sum()
        opt.zero_grad(set_to_none=True)
        (loss + args.anchor * held).backward()
        norm = torch.nn.utils.clip_grad_norm_(params, args.grad_clip)
        opt.step()
        run.log(step + 1, loss=loss.item(), anchor=held.item(), lr=opt.param_groups[0]["lr"], grad_norm=norm.item(), ms=round(1000 * (time.time() - began)))
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps or run.stop:
            save_all(step + 1)
        if run.stop:
            return
    print(run.out / "text_encoder.safetensors")


if __name__ == "__main__":
    cli(main)
