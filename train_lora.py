"""Train a LoRA "translator": small changes to the DiT's cross-attention keys and values, so that it listens better.

    python train_lora.py --ckpt Wan2.2-TI2V-5B --data DIR --out DIR --device cuda
    python train_lora.py --ckpt Wan2.2-T2V-A14B --data DIR --out DIR --device cuda      both experts, two adapters
    python train_lora.py                                   on nano and clips it draws itself

The base is frozen. Latents and text embeddings are computed once and cached; blocks below the first adapted one then
need no gradient, so none of their activations are kept. The result, OUT/adapter_model.safetensors (A14B:
adapter_model_high and _low), is read by ComfyUI, lightx2v and diffusers.
"""

import argparse
import contextlib
import json
import time

import torch

import data
import ops
import plan
from checkpoint import BadInput, Run, cli, load
from lora import (
    ANIMATE_TARGETS,
    S2V_TARGETS,
    TARGETS,
    adapter,
    attach,
    clamp_weight_norm,
    inject,
    parse_blocks,
    start_from,
    weight_norms,
    write_lora,
)
from lora_files import choose_experts, parse_lora_spec
from optim import EMA, Guard, adamw, lr_at
from parallel import World, clip
from sample import DTYPES, Models, pick_device
from train import FREE, Dataset, Previews, check_ranges, experts, fill_in, flags, restore, save_state
from wan import read_config


def arguments(given=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("adapter")
    g.add_argument("--targets", default="cross_attn.k,cross_attn.v")
    g.add_argument("--allow_self_attn", action="store_true", help="permit self_attn targets")
    g.add_argument("--blocks", help="such as 20-29 or 0,3,5-7 (default: all)")
    g.add_argument("--rank", type=int, default=16)
    g.add_argument("--alpha", type=float, help="default: the rank")
    g.add_argument("--dropout", type=float, default=0.0)
    g.add_argument(
        "--init_lora",
        action="append",
        default=[],
        help="FILE[:high|low]: start from this LoRA; for A14B one per expert, which the file's metadata may name",
    )
    g.add_argument("--delta_cap", type=float, help="no matrix moves further than this share of its norm, ||dW||/||W||")
    g = p.add_argument_group("base")
    g.add_argument(
        "--base_dtype", choices=("fp8",), help="hold the linears of the DiT's blocks in 8 bits (default: --dtype)"
    )
    g.add_argument(
        "--stream_blocks",
        type=int,
        default=0,
        help="keep N of the DiT's blocks in host memory, on the device only while they run",
    )
    flags(p, out="out/lora", steps=200, batch=8, lr=1e-3, weight_decay=0.01)
    return p.parse_args(given)


def resolve(args, s, blocks):
    """Fill in what the checkpoint recommends and check what was given."""
    fill_in(args, s)
    args.alpha = args.alpha if args.alpha is not None else args.rank
    args.checkpointing = (
        args.checkpointing or args.stream_blocks > 0
    )  # a streamed block is run again, while it is here, for its gradient
    check_ranges(
        args,
        stream_blocks=(0, blocks),
        rank=(1,),
        alpha=(1e-9,),
        dropout=(0, 0.999),
        **({} if args.delta_cap is None else {"delta_cap": (1e-9,)}),
    )
    if args.stream_blocks and (args.fsdp or args.pipeline_stages > 1):
        raise BadInput(
            f"--stream_blocks {args.stream_blocks}: not together with --fsdp or --pipeline_stages, which leave a rank only a part of the blocks"
        )
    args.targets = args.targets.split(",")
    known = TARGETS + ANIMATE_TARGETS + S2V_TARGETS
    if len(set(args.targets)) < len(args.targets) or not set(args.targets) <= set(known):
        raise BadInput(f"--targets {','.join(args.targets)}: choose from {', '.join(known)}, each once")
    if any(t.startswith("self_attn") for t in args.targets) and not args.allow_self_attn:
        raise BadInput(
            f"--targets {','.join(args.targets)}: LoRA on self-attention has repeatedly caused artifacts (it changes how the model draws, "
            "not how it listens); add --allow_self_attn to do it all the same"
        )
    args.blocks = parse_blocks(args.blocks, blocks)


def predict(args, s, parts, **sizes):
    """The Plan of a run."""
    return plan.training(
        args,
        s,
        parts,
        lambda dit, encoder: inject(dit, args.targets, args.rank, args.alpha, args.dropout, args.blocks),
        **sizes,
    )


def starts(specs, turns):
    """{expert: file} of --init_lora. A file that does not say for which expert it is, is for the only one that is
    trained.
    """
    found = {}
    for spec in specs:
        lora = parse_lora_spec(spec, "--init_lora")
        for expert in choose_experts(lora, tuple(turns), "--init_lora")[0]:
            if expert in found:
                raise BadInput(f"--init_lora {spec}: {found[expert]} is for the same expert; give one file for each")
            found[expert] = lora.file
    return found


def main():
    args = arguments()
    world = World(pick_device(args.device), args.fsdp, args.ulysses_size, args.pipeline_stages)
    args.device = world.device
    models = Models(
        args.ckpt, args.device, torch.float32, (), args.text_encoder, args.base_dtype == "fp8", args.stream_blocks
    )
    s, models.machine, models.agree, args.base_dtype = (
        models.settings,
        world.machine(),
        world.agree,
        "fp8" if models.fp8 else None,
    )
    base = [f for name in models.experts for f in models.files(name)]
    resolve(args, s, read_config(models.folder(models.experts[0]), models.headers[models.experts[0]]).num_layers)
    dtype = models.dtype = DTYPES[args.dtype]
    turns = experts(args, s)
    print(json.dumps(vars(args)), ops.chosen(args.device), sep="\n")
    run = Run(args.out, vars(args), args.resume, world.main)

    # data: latents and texts cached
    dataset, previews = Dataset(args, models, world), Previews(args, models, world.main)
    run.told["ops"] = ops.chosen(args.device)
    run.told["data"] = {"samples": len(dataset.items), "held_out": len(dataset.held), **dataset.bytes}
    need = predict(
        args, s, plan.builders(models), previews=bool(previews.prompts), ranks=world.size, **dataset.sizes(texts=True)
    )
    print(need)
    dataset.cache_latents(models)
    encoder = [*models.files("text"), models.dir / "google" / "umt5-xxl" / "spiece.model"]
    data.cache_texts(
        dataset.captions[world.rank :: world.size], dataset.cache, encoder, lambda: models.part("text"), dtype
    )
    world.barrier()
    texts = data.cache_texts(dataset.captions, dataset.cache, encoder, lambda: models.part("text"), dtype)
    if args.cache_only:
        return
    if previews.prompts:
        previews.embed(models.part("text"))
    models.parts.clear()  # the encoder is not needed any more

    # models and adapters: an expert may leave the device, or memory, between its turns; its adapter stays
    scale, adapters, norms = args.alpha / args.rank, {}, {}

    def adapt(name, model):
        if name in turns:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(args.seed + (name == "low"))
                inject(model, args.targets, args.rank, args.alpha, args.dropout, args.blocks, models.device)
            if name not in adapters:
                adapters[name] = adapter(model)
            attach(model, adapters[name])
        model.checkpointing = args.checkpointing
        world.parallelize(model)

    models.prepare = adapt
    for name in turns:
        model = models.part(name)
        norms[name] = world.together(weight_norms(model)) if args.delta_cap else {}
        model = None  # so that it can make room for the other expert
    for name, file in starts(args.init_lora, turns).items():
        start_from(adapters[name], file, scale, name)
    params = [p for name in turns for pair in adapters[name].values() for p in pair]
    print(f"{sum(p.numel() for p in params):,} parameters in {len(params) // 2} matrices")

    # optimizer and state
    opt, guard = adamw(params, args.lr, args.weight_decay), Guard(args.explosion)
    ema = EMA(params, args.ema) if args.ema else None
    averaged = ema.in_place if ema else contextlib.nullcontext  # what is saved and watched
    same = {k: v for k, v in vars(args).items() if k not in FREE}
    same |= {
        "batch": args.batch * world.datas,
        "samples": [f.name for f in dataset.latents],
        "captions": sorted(f.name for f in texts.values()),
        "base": [str(f.stat().st_size) for f in base],
    }
    start, state = 0, run.restore(same)
    if state:
        start = restore(state, params, opt, guard, ema)

    def embed(captions):
        context, lens = data.collate([load(texts[c])[0]["embedding"] for c in captions])
        return context.to(args.device), lens.to(args.device)

    def save_all(step):
        with averaged():
            for name in turns if world.main else ():
                if ema and args.delta_cap:  # an average of factors may leave the budget that each of them kept
                    clamp_weight_norm(adapters[name], scale, norms[name], args.delta_cap)
                file = run.out / f"adapter_model{'' if name == 'dit' else '_' + name}.safetensors"
                write_lora(file, adapters[name], scale, variant=s["variant"], step=step, expert=name)
        save_state(run, step, params, opt, guard, ema)

    def watch(step, last):
        """The held-out loss and previews, where they are due, of the weights that would be saved. Returns what to log."""
        told = {}
        with averaged():
            if dataset.held and (step % args.eval_every == 0 or last):
                told = dataset.held_out(models, turns, embed)
            if previews.prompts and (step % args.preview_every == 0 or last):
                previews.write(step)
        return told

    # training
    if not start and (told := watch(0, False)):
        run.log(0, **told)
    for step in range(start, args.steps):
        began, total, tokens = time.time(), 0.0, 0
        world.seed(args.seed, step)
        name = list(turns)[step // args.stretch % len(turns)]
        model = models.part(name).train()
        opt.zero_grad(set_to_none=True)  # a step on one expert leaves the other's adapter alone
        for batch, share in dataset.step(step, *turns[name], lambda captions, rng: rng.choice(captions)):
            total += world.backward(model, batch, *embed(batch.captions), share)
            tokens += batch.x[:, 0].numel() // 4 * (share > 0)
        total, tokens, stop = world.sum(
            [p for pair in adapters[name].values() for p in pair], total, tokens * world.datas / world.size, run.stop
        )
        for group in opt.param_groups:
            group["lr"] = lr_at(step, args.steps, args.lr, args.warmup, args.schedule)
        norm = clip(params, args.grad_clip)
        line = {"loss": total, "lr": group["lr"], "grad_norm": norm}
        if why := guard.trips(total, norm):
            print(f"step {step + 1} skipped: {why}", flush=True)
            line["skipped"] = guard.bad
        else:
            opt.step()
            if args.delta_cap:
                line["capped"] = clamp_weight_norm(adapters[name], scale, norms[name], args.delta_cap)
            if ema:
                ema.update()
        seconds = time.time() - began
        if len(turns) > 1:
            line["expert"] = name
        line |= {
            "ms": round(1000 * seconds),
            "tokens_per_s": round(tokens / seconds),
            "peak_gb": round(plan.used(args.device) / 1e9, 2),
        }
        if mfu := plan.mfu(model, batch.x, dataset.tokens, seconds / args.accumulate, args.device):
            line["mfu"] = round(mfu, 3)
        model = None  # the other expert may be next
        last = step + 1 == args.steps
        run.log(step + 1, **line, **watch(step + 1, last))
        if (step + 1) % args.save_every == 0 or last or stop or guard.bad >= args.most_bad:
            save_all(step + 1)
        guard.check(args, why, run.out)
        if stop:
            return world.close()
    for stream in models.streams.values():
        print(stream.report())
    print(
        f"{need.compare(args.device)}\n" + "\n".join(str(f) for f in sorted(run.out.glob("adapter_model*.safetensors")))
    )
    world.close()


if __name__ == "__main__":
    cli(main)
