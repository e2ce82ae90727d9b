"""Fine-tune the text encoder through the frozen DiT: teach it words, and keep it compatible with what the DiT
understands.

    python train_te.py --ckpt Wan2.2-TI2V-5B --data DIR --out DIR --keywords crimson,box --device cuda
    python train_te.py                                  on nano and clips it draws itself

The loss is the DiT's own flow-matching loss; its gradient goes through cross-attention to the encoder. An anchor keeps
the embeddings of prompts without keywords where they were. Text is never cached: a cached embedding bypasses the
encoder that is to learn. The result, OUT/text_encoder.safetensors, is used by every script's --text_encoder.
"""

import argparse
import contextlib
import json
import math
import random
import re
import time

import torch
import torch.nn as nn

import data
import ops
import plan
from checkpoint import BadInput, Run, cli, save
from optim import EMA, AdamW8bit, Guard, adamw, lr_at
from parallel import World, clip, full
from sample import DTYPES, Models, pick_device
from train import FREE, Dataset, Previews, check_ranges, experts, fill_in, flags, restore, save_state


def arguments(given=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("encoder")
    g.add_argument("--train_blocks", type=int, help="only the top N blocks (default: all; 0: none)")
    g.add_argument(
        "--keywords",
        help="a,b,c: also train the embedding rows of these words (default on nano's own data: its new words)",
    )
    g.add_argument("--keyword_lr", type=float, help="of the keywords' rows (default: --lr)")
    g.add_argument(
        "--anchor", type=float, default=0.01, help="weight of the penalty on moving prompts without keywords"
    )
    g.add_argument(
        "--save", choices=("full", "delta"), default="full", help="delta: only the tensors and rows that were trained"
    )
    g.add_argument(
        "--optimizer",
        choices=("adamw", "adamw8bit"),
        help="default: adamw8bit, whose bf16 weights are compensated, for --dtype bf16 without --fsdp; else adamw",
    )
    g.add_argument(
        "--mix",
        default="15,35,50",
        help="percent of captions with a keyword shown as the keyword alone, shortened, whole",
    )
    g.add_argument(
        "--trim_prob", type=float, default=0.2, help="chance that a whole caption loses a few words, never a keyword"
    )
    g.add_argument(
        "--cache_text", action="store_true", help="refused: a cached embedding bypasses the encoder that is to learn"
    )
    flags(p, out="out/te", steps=600, batch=32, lr=3e-3, weight_decay=0.0)
    return p.parse_args(given)


def resolve(args, s):
    """Fill in what the checkpoint recommends and check what was given; the keywords and the mix become lists."""
    if args.cache_text:
        raise BadInput("--cache_text: a cached embedding bypasses the encoder that is to learn; it would train nothing")
    fill_in(args, s)
    if args.data is None and args.keywords is None:
        args.keywords = "crimson,wedge,halts"
    args.keywords = [k.strip() for k in (args.keywords or "").split(",") if k.strip()]
    args.keyword_lr = args.lr if args.keyword_lr is None else args.keyword_lr
    try:
        mix = [float(v) for v in args.mix.split(",")]
    except ValueError:
        mix = []
    if len(mix) != 3 or min(mix) < 0 or not 0 < sum(mix) < math.inf:
        raise BadInput(f"--mix {args.mix}: three shares such as 15,35,50")
    args.mix = mix
    compensated = (
        args.dtype == "bf16" and not args.fsdp
    )  # else weights are fp32; plain AdamW's small steps would be lost in bf16's 8 bits
    args.optimizer = args.optimizer or ("adamw8bit" if compensated else "adamw")
    if (args.optimizer == "adamw8bit") != compensated:
        raise BadInput(
            f"--optimizer {args.optimizer} --dtype {args.dtype}{' --fsdp' * args.fsdp}: adamw8bit is for bf16 weights, whole on each rank, and they need it; adamw for fp32 or --fsdp"
        )
    if args.save == "delta" and args.text_encoder:
        raise BadInput(
            f"--save delta --text_encoder {args.text_encoder}: a delta is read on top of the checkpoint's own encoder and would lose this one's changes; use --save full"
        )
    check_ranges(args, keyword_lr=(0,), anchor=(0,), trim_prob=(0, 1))


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


def spans(caption, keyword):
    """[(begin, end)] of a word or phrase in a caption, in capitals or not. Within a longer word it does not count,
    unless the script puts no spaces between words, or glues endings to them (from Thai on in Unicode: Chinese,
    Japanese, Korean).
    """
    before, after = (
        "" if edge >= "\u0e00" else bound for edge, bound in ((keyword[0], r"(?<!\w)"), (keyword[-1], r"(?!\w)"))
    )
    return [m.span() for m in re.finditer(before + re.escape(keyword) + after, caption, re.IGNORECASE)]


def has_keyword(caption, keywords):
    return any(spans(caption, k) for k in keywords)


def calibrate(caption, keywords, mix, trim_prob, rng):
    """What a step shows of a caption: one with a keyword alone, shortened to a few words around it, or whole, in the
    shares `mix`; a whole caption loses up to a fifth of its words at the chance `trim_prob`, never a keyword.
    """
    found = [k for k in keywords if has_keyword(caption, [k])]
    u = rng.random() * sum(mix)
    if found and u < mix[0]:
        return rng.choice(found)
    matches = list(re.finditer(r"\S+", caption))
    words = [m.group() for m in matches]
    places = [
        [i for i, m in enumerate(matches) if m.start() < end and m.end() > begin]
        for k in found
        for begin, end in spans(caption, k)
    ]
    if found and u < mix[0] + mix[1]:
        at = rng.choice(sorted(places))
        return " ".join(words[max(0, at[0] - rng.randint(0, 2)) : at[-1] + 1 + rng.randint(0, 2)])
    if rng.random() < trim_prob:
        spare = [i for i in range(len(words)) if not any(i in place for place in places)]
        gone = set(rng.sample(spare, min(len(spare), rng.randint(0, len(words) // 5))))
        return " ".join(w for i, w in enumerate(words) if i not in gone)
    return caption


def unfreeze(encoder, args, ids):
    """Make the encoder's top blocks and the embedding rows `ids` trainable: ({name: parameter} outside the rows,
    optimizer groups).
    """
    layers = len(encoder.blocks)
    top = layers if args.train_blocks is None else args.train_blocks
    if not 0 <= top <= layers or not top and not ids:
        raise BadInput(f"--train_blocks {args.train_blocks}: from 0 to {layers}, and with 0 --keywords are needed")
    for part in [*encoder.blocks[layers - top :], encoder.norm] if top else []:
        part.requires_grad_(True)
    if ids:
        encoder.token_embedding = RowEmbedding(encoder.token_embedding, ids)
    return trainable(encoder, args)


def trainable(encoder, args):
    """What `unfreeze` returns, of an encoder that it has changed."""
    trained = {n: p for n, p in encoder.named_parameters() if p.requires_grad}
    rows = trained.pop("token_embedding.rows", None)
    groups = [{"params": list(trained.values()), "peak": args.lr}] if trained else []
    if rows is not None:
        groups.append({"params": [rows], "peak": args.keyword_lr})
    return trained, groups


def predict(args, s, parts, ids=(3,), **sizes):
    """The Plan of a run."""
    return plan.training(args, s, parts, lambda dit, encoder: unfreeze(encoder, args, ids)[1], **sizes)


def own_pieces(keywords, captions, tokenizer):
    """Ids of the pieces that spell the keywords, as they are given and as captions write them, and that no caption
    without a keyword uses; all of a spelling's where it has none of its own.
    """
    common = {i for c in captions if not has_keyword(c, keywords) for i in tokenizer.ids(tokenizer.clean(c))}
    spelled = {*keywords, *(c[begin:end] for c in captions for k in keywords for begin, end in spans(c, k))}
    return {i for word in spelled for i in (set(tokenizer.ids(word)) - common or tokenizer.ids(word))}


def main():
    args = arguments()
    world = World(pick_device(args.device), args.fsdp, args.ulysses_size, args.pipeline_stages)
    args.device = world.device
    models = Models(args.ckpt, args.device, torch.float32, text_encoder=args.text_encoder)
    s, models.machine, models.agree, args.base_dtype = (
        models.settings,
        world.machine(),
        world.agree,
        "fp8" if models.fp8 else None,
    )
    resolve(args, s)
    models.dtype = DTYPES[args.dtype]
    turns = experts(args, s)
    print(json.dumps(vars(args)), ops.chosen(args.device), sep="\n")
    run = Run(args.out, vars(args), args.resume, world.main)

    # data: latents cached, text never
    dataset, previews = Dataset(args, models, world), Previews(args, models, world.main)
    run.told["ops"] = ops.chosen(args.device)
    run.told["data"] = {"samples": len(dataset.items), "held_out": len(dataset.held), **dataset.bytes}
    need = predict(
        args, s, plan.builders(models), previews=bool(previews.prompts), ranks=world.size, **dataset.sizes(texts=False)
    )
    print(need)
    dataset.cache_latents(models)
    if args.cache_only:
        return

    # models: the encoder learns, the DiT is frozen
    def frozen(name, model):
        model.checkpointing = args.checkpointing
        world.parallelize(model)

    models.prepare = frozen
    encoder = models.part("text")
    models.parts.clear()  # from here on the encoder is this script's own: it must not make room for others
    anchors = [c for c in dataset.captions if not has_keyword(c, args.keywords)]
    ids = own_pieces(args.keywords, dataset.captions, encoder.tokenizer)
    with torch.no_grad():
        original = {c: encoder.encode([c])[0][0].cpu() for c in anchors} if args.anchor else {}
    trained, groups = unfreeze(encoder, args, ids)
    if world.fsdp:
        for p in encoder.parameters():  # shards are small enough for what is trained to be fp32
            p.data = p.data.float() if p.requires_grad else p.data
        for part in [*encoder.blocks, encoder]:
            world.shard(part, dtype=models.dtype)
        trained, groups = trainable(encoder, args)
    params = [p for g in groups for p in g["params"]]
    print(
        f"{sum(p.numel() for p in params):,} parameters: {len(trained)} tensors, {len(ids)} embedding rows; {len(anchors)} prompts anchored"
    )

    # optimizer and state
    opt, guard = (
        (adamw if args.optimizer == "adamw" else AdamW8bit)(groups, args.lr, weight_decay=args.weight_decay),
        Guard(args.explosion),
    )
    ema = EMA(params, args.ema, opt) if args.ema else None
    averaged = ema.in_place if ema else contextlib.nullcontext  # what is saved and watched
    same = {k: v for k, v in vars(args).items() if k not in FREE}
    same |= {
        "batch": args.batch * world.datas,
        "samples": [f.name for f in dataset.latents],
        "captions": data.entry("", "", captions=sorted(dataset.captions)).name,
        "rows": sorted(ids),
        "base": [f.stat().st_size for name in models.experts for f in models.files(name)],
        "encoder": world.first(lambda: [data.digest(f) for f in models.files("text")]),
    }
    start, state = 0, run.restore(same)
    if state:
        start = restore(state, params, opt, guard, ema)

    def save_all(step):
        with averaged():
            everything = {
                k.replace("token_embedding.table.", "token_embedding."): v
                for k, v in encoder.state_dict().items()
                if not k.endswith("token_embedding.rows")
            }
            tensors = {
                k: full(v).to(models.dtype) for k, v in (trained if args.save == "delta" else everything).items()
            }
            rows = full(encoder.token_embedding.rows.detach()).to(models.dtype) if ids else None
            if ids and args.save == "delta":
                tensors |= {"token_embedding.rows": rows, "token_embedding.ids": encoder.token_embedding.ids}
            elif ids:
                tensors["token_embedding.weight"] = tensors["token_embedding.weight"].clone()
                tensors["token_embedding.weight"][encoder.token_embedding.ids] = rows
            if world.main:
                save(
                    run.out / "text_encoder.safetensors",
                    tensors,
                    {"step": step, "keywords": ",".join(args.keywords), "delta": args.save == "delta"},
                )
        save_state(run, step, params, opt, guard, ema)

    def watch(step, last):
        """The held-out loss and previews, where they are due, of the weights that would be saved. Returns what to log."""
        told = {}
        with averaged():
            if dataset.held and (step % args.eval_every == 0 or last):
                told = dataset.held_out(models, turns, encoder.encode)
            if previews.prompts and (step % args.preview_every == 0 or last):
                previews.embed(encoder)
                previews.write(step)
        return told

    # training
    if not start and (told := watch(0, False)):
        run.log(0, **told)
    for step in range(start, args.steps):
        began, total, moved = time.time(), 0.0, 0.0
        world.seed(args.seed, step)
        name = list(turns)[step // args.stretch % len(turns)]
        dit = models.part(name)
        opt.zero_grad(set_to_none=True)
        for batch, share in dataset.step(
            step,
            *turns[name],
            lambda captions, rng: calibrate(rng.choice(captions), args.keywords, args.mix, args.trim_prob, rng),
        ):
            total += world.backward(dit, batch, *encoder.encode(batch.captions), share)
        dit = None  # so that it can make room for the other expert
        if args.anchor:
            prompts = random.Random(f"{args.seed} anchors {step}").choices(anchors, k=args.batch * world.datas)
            mine, share = world.share(len(prompts))
            now, _ = encoder.encode([prompts[i] for i in mine])
            before = data.collate([original[prompts[i]] for i in mine])[0].to(now)
            whole = sum(original[p].float().square().sum() for p in prompts).to(now) * (world.size // world.datas)
            held = (now.float() - before.float()).square().sum() / whole * (share > 0)
            (args.anchor * held).backward()
            moved = held.item()
        total, moved, stop = world.sum(params, total, moved, run.stop)
        for group in opt.param_groups:
            group["lr"] = lr_at(step, args.steps, group["peak"], args.warmup, args.schedule)
        norm = clip(params, args.grad_clip)
        line = {"loss": total, "anchor": moved, "lr": opt.param_groups[0]["lr"], "grad_norm": norm}
        if why := guard.should_skip(total, norm):
            print(f"step {step + 1} skipped: {why}", flush=True)
            line["skipped"] = guard.skipped
        else:
            world.seed(args.seed, step, "optimizer", same=True)
            opt.step()
            if ema:
                ema.update()
        if len(turns) > 1:
            line["expert"] = name
        line |= {"ms": round(1000 * (time.time() - began)), "peak_gb": round(plan.used(args.device) / 1e9, 2)}
        last = step + 1 == args.steps
        run.log(step + 1, **line, **watch(step + 1, last))
        if (step + 1) % args.save_every == 0 or last or stop or guard.skipped >= args.most_bad:
            save_all(step + 1)
        guard.raise_if_stuck(args.most_bad, why, args.lr, run.out)
        if stop:
            return world.close()
    print(f"{need.compare(args.device)}\n{run.out / 'text_encoder.safetensors'}")
    world.close()


if __name__ == "__main__":
    cli(main)
