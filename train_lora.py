"""Train a LoRA "translator": small changes to the DiT's cross-attention keys and values, so that it listens better.

python train_lora.py --ckpt Wan2.2-TI2V-5B --data DIR --out DIR --device cuda
python train_lora.py --ckpt Wan2.2-T2V-A14B --data DIR --out DIR --device cuda      both experts, two adapters
python train_lora.py                                   on nano and clips it draws itself

The base is frozen. Latents and text embeddings are computed once and cached; blocks below the first adapted one then
need no gradient, so none of their activations are kept. The result, OUT/adapter_model.safetensors (A14B:
adapter_model_high and _low), is read by ComfyUI, lightx2v and diffusers; beside it the adapter of every save is kept,
OUT/adapter_model_000100.safetensors and so on, for the best step to be chosen by eye.
"""

import argparse
import json
import math
from pathlib import Path

import torch

import data
import ops
import plan
from captions import has_keyword, without_keywords
from checkpoint import BadInput, cli, load
from lora import (
    ANIMATE_TARGETS,
    S2V_TARGETS,
    TARGETS,
    adapter,
    attach,
    changes_to_start_from,
    clamp_weight_norm,
    inject,
    parse_blocks,
    start_from,
    weight_norms,
    write_lora,
)
from lora_files import choose_experts, parse_lora_spec
from models import DTYPES, Models, Runtime, pick_device, pick_dtype
from nanoworld.default_clips import DEFAULT_KEYWORDS
from optim import adamw
from parallel import World, gather_state
from previews import Previews
from run import Run, TrainState, adapter_file, remove_older_adapters, resume_fingerprint
from sample import read_prompts
from train import (
    POSITIVE,
    Dataset,
    add_flags,
    check_ranges,
    choose_checkpointing,
    evaluate,
    expert_schedule,
    fit,
    resolve_flags,
)


def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument_group("adapter").add_argument
    add(
        "--targets",
        help=f"linears of a block, of {', '.join(TARGETS)}; Animate: {', '.join(ANIMATE_TARGETS)}; S2V, in the "
        f"injector behind a block: {', '.join(S2V_TARGETS)} (default: cross_attn.k,cross_attn.v, and for S2V "
        "audio_injector.k,audio_injector.v too)",
    )
    add("--allow_self_attn", action="store_true", help="permit self_attn targets, which change how the model draws")
    add("--blocks", help="such as 20-29 or 0,3,5-7 (default: all)")
    add("--rank", type=int, default=16, help="of each change B A (default: %(default)s)")
    add("--alpha", type=float, help="the change is scaled by alpha / rank (default: the rank)")
    add("--dropout", type=float, default=0.0, help="of the adapter's input (default: %(default)s)")
    add(
        "--init_lora",
        action="append",
        default=[],
        help="FILE[:high|low|both]: start from this LoRA; of an A14B one per expert, or one that holds both",
    )
    add(
        "--delta_cap",
        type=float,
        help="no matrix moves further than this share of its norm, ||dW||/||W|| (default: none)",
    )
    add("--name", default="adapter_model", help="of the files, NAME.safetensors and so on (default: %(default)s)")
    add("--keep", type=int, help="leave the adapters of the last N saves beside the result (default: all)")
    add(
        "--trigger",
        help="a,b,c: the words to prompt with, which LoRA managers show; --preserve is for captions without them",
    )
    add = p.add_argument_group("what must not change").add_argument
    add(
        "--preserve",
        type=float,
        default=0.0,
        help="weight of prior preservation: half of the samples are shown a prompt that must not change, and their "
        "target is what the base predicts without the adapter (default: 0, none)",
    )
    add(
        "--preserve_prompts",
        help="a text file of such prompts, one per line; with --trigger, captions without these words are such too",
    )
    add = p.add_argument_group("base").add_argument
    add("--base_dtype", choices=("fp8",), help="hold the linears of the DiT's blocks in 8 bits (default: --dtype)")
    add(
        "--stream_blocks",
        type=int,
        default=0,
        help="keep N of the DiT's blocks in host memory, on the device only while they run (default: 0)",
    )
    add_flags(p, "train_lora", out="out/lora")
    return p.parse_args(argv)


def resolve(args, s, num_blocks):
    """Fill in what the checkpoint recommends and check what was given; targets and blocks become lists."""
    resolve_flags(args, s, "train_lora")
    args.alpha = args.alpha if args.alpha is not None else args.rank
    if args.stream_blocks and not args.checkpointing:
        if args.checkpointing is False:
            raise BadInput(
                "--no-checkpointing: not with --stream_blocks, whose blocks are run again while they are here"
            )
        args.checkpointing = True
    check_ranges(
        args, stream_blocks=(0, num_blocks), rank=(1, math.inf), alpha=(POSITIVE, math.inf), dropout=(0, 0.999)
    )
    if args.delta_cap is not None:
        check_ranges(args, delta_cap=(POSITIVE, math.inf))
    if args.stream_blocks and (args.fsdp or args.pipeline_stages > 1):
        raise BadInput(
            f"--stream_blocks {args.stream_blocks}: not together with --fsdp or --pipeline_stages, which leave a rank "
            "only a part of the blocks"
        )
    args.targets = args.targets.split(",") if args.targets else list(s.conditioning.lora_targets)
    known = TARGETS + ANIMATE_TARGETS + S2V_TARGETS
    if len(set(args.targets)) < len(args.targets) or not set(args.targets) <= set(known):
        raise BadInput(f"--targets {','.join(args.targets)}: choose from {', '.join(known)}, each once")
    if any(t.startswith("self_attn") for t in args.targets) and not args.allow_self_attn:
        raise BadInput(
            f"--targets {','.join(args.targets)}: LoRA on self-attention has repeatedly caused artifacts (it changes "
            "how the model draws, not how it listens); add --allow_self_attn to do it all the same"
        )
    args.blocks = parse_blocks(args.blocks, num_blocks)
    if not args.name or Path(args.name).name != args.name or args.name.startswith("."):
        raise BadInput(f"--name {args.name}: a file's name without folder and ending, such as my_style")
    if args.keep is not None:
        check_ranges(args, keep=(1, math.inf))
    if args.data is None and args.trigger is None:
        args.trigger = DEFAULT_KEYWORDS
    args.trigger = [word.strip() for word in (args.trigger or "").split(",") if word.strip()]
    check_ranges(args, preserve=(0, math.inf))
    if args.preserve_prompts and not args.preserve:
        raise BadInput(f"--preserve_prompts {args.preserve_prompts}: needs --preserve WEIGHT, such as 1")
    if args.preserve and not args.trigger and not args.preserve_prompts:
        raise BadInput(
            f"--preserve {args.preserve}: of what? give --trigger WORD,WORD, and captions without them are preserved, "
            "or --preserve_prompts FILE"
        )


def predict(args, s, builders, **sizes):
    """The Plan of a run."""
    saves = math.ceil(args.steps / args.save_every)
    sizes["num_results"] = 1 + min(saves, args.keep or saves)

    def make_trainable(dit, encoder):
        return inject(dit, args.targets, args.rank, args.alpha, args.dropout, args.blocks)

    return plan.training(args, s, builders, make_trainable, len(expert_schedule(args, s)), **sizes)


def initial_loras(specs, schedule):
    """{expert: file} of --init_lora. A file that does not say for which expert it is, is for the only one trained."""
    files = {}
    for spec in specs:
        lora = parse_lora_spec(spec, "--init_lora")
        if lora.weight != 1:
            raise BadInput(f"--init_lora {spec}: a weight means nothing here; give FILE, FILE:high, :low or :both")
        for expert in choose_experts(lora, tuple(schedule), "--init_lora")[0]:
            if expert in files:
                raise BadInput(f"--init_lora {spec}: {files[expert]} is for the same expert; give one file for each")
            files[expert] = lora.file
    return files


def check_initial_loras(files, args, models):
    """Refuse, before anything is computed, a file of `initial_loras` that is no start for its expert's adapter."""
    for expert, file in files.items():
        with torch.device("meta"):
            model = plan.build_wan(models.config(expert))
            inject(model, args.targets, args.rank, blocks=args.blocks)
        changes_to_start_from(adapter(model), file, expert)


def prompts_to_preserve(args, captions, prompts):
    """Those of --preserve_prompts, and captions without any word of --trigger. Raises BadInput where there are none."""
    if not args.preserve:
        return []
    others = [c for c in without_keywords(captions, args.trigger) if c] if args.trigger else []
    if not prompts and not others:
        raise BadInput(
            f"--preserve {args.preserve}: every caption holds a word of --trigger {','.join(args.trigger)}; give "
            "--preserve_prompts FILE"
        )
    return list(dict.fromkeys([*prompts, *others]))


def main():
    args = arguments()
    with World(pick_device(args.device), args.fsdp, args.ulysses_size, args.pipeline_stages) as world:
        args.device = str(world.device)
        args.dtype = pick_dtype(args.dtype, args.device)
        train(args, world)


def train(args, world):
    # flags
    adapters, norms = (
        {},
        {},
    )  # of each expert: they stay, where the expert leaves the device, or memory, between its turns

    def add_adapter(name, model):
        """Into a DiT that has no weights yet; one that is loaded again takes the adapter that it had."""
        model.checkpointing = args.checkpointing
        if name in schedule:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(args.seed + (name == "low"))
                inject(model, args.targets, args.rank, args.alpha, args.dropout, args.blocks, args.device)
            attach(model, adapters.setdefault(name, adapter(model)))

    dtype, fp8 = DTYPES[args.dtype], args.base_dtype == "fp8"
    runtime = Runtime(args.device, dtype, fp8, args.stream_blocks, world=world, on_model_built=add_adapter)
    models = Models(args.ckpt, runtime, text_encoder=args.text_encoder)
    s, args.base_dtype = models.settings, "fp8" if models.fp8 else None
    resolve(args, s, models.config().num_layers)
    schedule = expert_schedule(args, s)
    init_loras = initial_loras(args.init_lora, schedule)
    check_initial_loras(init_loras, args, models)
    print(json.dumps(vars(args)), ops.chosen(args.device), sep="\n")
    run = Run(args.out, vars(args), args.resume, world.is_main)

    # data: latents and texts cached
    prompts = read_prompts(args.preserve_prompts, "--preserve_prompts") if args.preserve_prompts else []
    dataset, previews = Dataset(args, models, prompts=prompts), Previews(args, models)
    preserved = prompts_to_preserve(args, dataset.captions, prompts)
    if preserved:
        print(f"  {len(preserved)} prompts preserved")
    run.metadata |= {"ops": ops.chosen(args.device), "data": dataset.summary()}
    sizes = dataset.plan_sizes(texts=True) | {"previews": bool(previews.prompts), "ranks": world.size}
    need = choose_checkpointing(args, world, lambda: predict(args, s, plan.builders(models), **sizes))
    print(need)
    run.check(resume_fingerprint(args, models, dataset))
    dataset.cache_latents()
    texts = dataset.cache_texts()
    if args.cache_only:
        return
    if previews.prompts:
        previews.embed(models.acquire("text"))
    models.drop()  # the encoder is not needed any more

    # models and adapters
    scale = args.alpha / args.rank
    for name in schedule:
        model = models.acquire(name)
        norms[name] = gather_state(world, weight_norms(model)) if args.delta_cap else {}
        model = None  # so that it can make room for the other expert
    for name, file in init_loras.items():
        start_from(adapters[name], file, scale, name)
    params_of = {name: [p for pair in adapters[name].values() for p in pair] for name in schedule}
    params = sum(params_of.values(), [])
    print(f"{sum(p.numel() for p in params):,} parameters in {len(params) // 2} matrices")

    # optimizer and state
    state = TrainState(params, adamw(params, args.lr, args.weight_decay), args)
    triggers = {word: sum(has_keyword(c, [word]) for c in dataset.captions) for word in args.trigger}
    captions = sorted(f.name for f in texts.values())
    more = {"captions": captions} | ({"preserved": [texts[p].name for p in preserved]} if preserved else {})
    saved = run.restore(resume_fingerprint(args, models, dataset, **more))
    if saved:
        state.restore(saved)

    def embed(captions):
        context, lens = data.collate([load(texts[c])[0]["embedding"] for c in captions])
        return context.to(args.device), lens.to(args.device)

    def show_caption(captions, rng):
        return rng.choice(captions)

    def clamp(expert):
        return {"n_clamped": clamp_weight_norm(adapters[expert], scale, norms[expert], args.delta_cap)}

    def save(step):
        with state.averaged():
            for name in schedule if world.is_main else ():
                if state.ema and args.delta_cap:  # an average of factors may leave the budget that each of them kept
                    clamp(name)
                metadata = {"variant": s.variant, "date": run.date, "trained_words": triggers}
                for file in (adapter_file(run.out, args.name, name, n) for n in (step, None)):
                    write_lora(file, adapters[name], scale, step=step, expert=name, **metadata)
        state.save(run, step)
        if args.keep and world.is_main:
            remove_older_adapters(run.out, args.name, step, args.keep)

    # training
    finished = fit(
        args,
        run,
        models,
        dataset,
        state,
        schedule,
        params_of,
        embed,
        show_caption,
        evaluate=lambda step: evaluate(args, state, dataset, previews, schedule, embed, step),
        save=save,
        after_update=clamp if args.delta_cap else None,
        preserved_prompts=preserved,
    )
    if finished:
        for stream in models.streams():
            print(stream.report())
        results = [adapter_file(run.out, args.name, name) for name in schedule]
        print(need.compare(args.device), *results, sep="\n")


if __name__ == "__main__":
    cli(main)
