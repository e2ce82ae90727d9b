"""Train a translator, a LoRA on the DiT's cross-attention keys and values, so that the DiT follows prompts better.

python train_lora.py --ckpt Wan2.2-TI2V-5B --data DIR --out DIR --device cuda
python train_lora.py --ckpt Wan2.2-T2V-A14B --data DIR --out DIR --device cuda      both experts, one adapter each
python train_lora.py                                   on nano, the toy model, with clips that the script draws itself

The base model is frozen. Latents and text embeddings are computed once and cached. Blocks before the first adapted
block need no gradient, so none of their activations are kept. ComfyUI, lightx2v and diffusers read the result,
OUT/adapter_model.safetensors (for an A14B, adapter_model_high and _low). Each save also writes a copy whose name
contains the step, such as OUT/adapter_model_000100.safetensors, so that the best adapter can be chosen by eye.
"""

import nanowan.environment  # noqa: F401  # isort: skip

import math
from pathlib import Path

import sample
from data import Dataset, collate
from kernels import ops
from lora import TARGETS, clamp_weight_norm, weight_norms
from nano.default_clips import DEFAULT_KEYWORDS, default_clips
from nanowan import memory_estimate
from nanowan.devices import DTYPES, pick_device, pick_dtype, select_attention
from nanowan.errors import BadInput, cli
from nanowan.flags import Parser, in_force, parallel_layout
from nanowan.formats.header import load
from nanowan.formats.lora import AdapterInfo, start_from, write_lora
from nanowan.formats.t5 import load_tokenizer, read_encoder
from nanowan.parallel import World, backward, gather_state
from nanowan.pipeline import Adapter, Pipeline, Runtime
from nanowan.prompts import read_prompts, read_texts
from nanowan.training import flags
from nanowan.training.adapters import initial_loras, relative_change
from nanowan.training.captions import count_files
from nanowan.training.optim import adamw
from nanowan.training.preservation import prompts_to_preserve, with_base_targets
from nanowan.training.previews import Previews, preview_requests
from nanowan.training.report import write_report
from nanowan.training.run_dir import Run, adapter_file, remove_older_adapters
from nanowan.training.state import TrainState, resume_fingerprint
from nanowan.training.step import Stopwatch, ahead, due, held_out_loss, say_if_foreign, update


def arguments(argv=None):
    p = Parser(__doc__)
    add = p.add_argument_group("adapter").add_argument
    linears = f"linear layers to adapt, out of {', '.join(TARGETS)}; Animate and Animate-2 also have cross_attn.k_img "
    linears += "and cross_attn.v_img, S2V also has audio_injector.q, .k, .v, .o (default: cross_attn.k,cross_attn.v; "
    add("--targets", type=flags.comma_list, help=linears + "for S2V also audio_injector.k,audio_injector.v)")
    add("--allow_self_attn", action="store_true", help="allow self_attn in --targets; training it changes the style")
    add("--blocks", help="DiT blocks to adapt, such as 20-29 or 0,3,5-7 (default: all)")
    add("--rank", type=int, default=16, help="rank of each LoRA, dW = alpha / rank * B A (default: %(default)s)")
    add("--alpha", type=float, help="alpha of each LoRA, dW = alpha / rank * B A (default: the rank)")
    add("--dropout", type=float, default=0.0, help="dropout probability at each LoRA's input (default: %(default)s)")
    add("--init_lora", action="append", default=[], help="LoRA to start from, FILE[:high|low|both]; one per expert")
    add("--delta_cap", type=float, help="maximum change ||dW||/||W|| of each weight matrix W (default: no limit)")
    add("--name", default="adapter_model", help="base name of the saved adapter files (default: %(default)s)")
    add("--keep", type=int, help="number of newest saves to keep as step-numbered files (default: all)")
    words = "trigger words a,b,c to store in the adapter's file; --preserve preserves the captions without these words"
    add("--trigger", type=flags.comma_list, help=words + " (default: none; without --data, nano's new words)")
    add = p.add_argument_group("prior preservation").add_argument
    half = "give half of the samples captions without a word of --trigger, and train them towards the base model's own "
    add("--preserve", type=float, default=0.0, help=half + "prediction, with this loss weight (default: 0, no samples)")
    prompts = "text file of prompts to preserve, one per line, in addition to the captions without a word of --trigger"
    add("--preserve_prompts", help=prompts)
    add = p.add_argument_group("base model").add_argument
    add("--base_dtype", choices=("fp8",), help="dtype of linear layers in the DiT's blocks (default: that of --dtype)")
    kept = "number of DiT blocks that are kept in host memory until they run (default: 0)"
    add("--stream_blocks", type=int, default=0, help=kept)
    flags.add_flags(p, "train_lora", out="out/lora")
    return p.parse_args(argv)


def check(args, s, num_blocks):
    """Fill in and check the flags for a checkpoint with Settings s. Returns the numbers of the DiT blocks to adapt."""
    flags.resolve(args, s, "train_lora")
    args.alpha = args.rank if args.alpha is None else args.alpha
    flags.check_blocks(args, num_blocks)
    flags.check_ranges(args, rank=(1, math.inf), alpha=(flags.POSITIVE, math.inf))
    flags.check_ranges(args, dropout=(0, 0.999), preserve=(0, math.inf))
    for flag, least in (("delta_cap", flags.POSITIVE), ("keep", 1)):
        if getattr(args, flag) is not None:
            flags.check_ranges(args, **{flag: (least, math.inf)})
    args.targets = args.targets or list(s.parts.samples.lora_targets)
    known = (*TARGETS, *s.parts.samples.extra_lora_targets)
    if len(set(args.targets)) < len(args.targets) or not set(args.targets) <= set(known):
        raise BadInput(f"--targets {','.join(args.targets)}: choose from {', '.join(known)}, each once")
    if any(t.startswith("self_attn") for t in args.targets) and not args.allow_self_attn:
        raise BadInput(
            f"--targets {','.join(args.targets)}: LoRA on self-attention has repeatedly caused artifacts (it changes "
            "the drawing style, not prompt adherence); add --allow_self_attn to do it all the same"
        )
    if not args.name or Path(args.name).name != args.name or args.name.startswith("."):
        raise BadInput(f"--name {args.name}: a file's name without folder and ending, such as my_style")
    if args.data is None and args.trigger is None:
        args.trigger = flags.comma_list(DEFAULT_KEYWORDS)
    args.trigger = args.trigger or []
    if args.preserve_prompts and not args.preserve:
        raise BadInput(f"--preserve_prompts {args.preserve_prompts}: needs --preserve WEIGHT, such as 1")
    if args.preserve and not args.trigger and not args.preserve_prompts:
        raise BadInput(
            f"--preserve {args.preserve}: of what? give --trigger WORD,WORD, and captions without them are preserved, "
            "or --preserve_prompts FILE"
        )
    return flags.parse_blocks(args.blocks, num_blocks)


def predict(args, s, builders, blocks, **more):
    """Return the memory_estimate.Plan of a run. blocks: the adapted blocks; more: further fields of TrainingSpec."""
    saves = math.ceil(args.steps / args.save_every)
    spec = flags.training_spec(args, s, num_results=1 + min(saves, args.keep or saves) + (args.held_out > 0), **more)
    make_trainable = Adapter((), args.targets, args.rank, args.alpha, args.dropout, blocks, args.seed).inject
    return memory_estimate.training(spec, builders, lambda dit, encoder: make_trainable(dit, None))


def main():
    args = arguments()
    with World(pick_device(args.device), args.fsdp, args.ulysses_size, args.pipeline_stages) as world:
        train(args, world)


def train(args, world):
    # checkpoint and flags
    args.device = str(world.device)
    dtype = DTYPES[pick_dtype(args.dtype, args.device)]
    select_attention(args.attention, args.device, dtype, gradients=True)
    runtime = Runtime(args.device, dtype, args.base_dtype == "fp8", args.stream_blocks, world=world)
    pipe = Pipeline(args.ckpt, runtime, text_encoder=args.text_encoder)
    s, args.base_dtype = pipe.settings, "fp8" if pipe.fp8 else None
    blocks = check(args, s, pipe.config().num_layers)
    flags.check_data(args.data, pipe)
    schedule = flags.expert_schedule(args.expert, s, args.min_t, args.max_t)
    pipe.adapter = Adapter(tuple(schedule), args.targets, args.rank, args.alpha, args.dropout, blocks, args.seed)
    init_files = initial_loras(args.init_lora, pipe, schedule, pipe.adapter)
    defaults = arguments([])
    print(in_force(args, defaults), ops.describe(args.device), sep="\n")
    run = Run(args.out, vars(args), args.resume, world.is_main, defaults=vars(defaults))

    # the data, and the memory that the run will need
    preserve_prompts = read_texts(args.preserve_prompts, "--preserve_prompts") if args.preserve_prompts else []
    preview_prompts = read_prompts(args.previews, "--previews") if args.previews else []
    previews = Previews(pipe, preview_requests(args, s, preview_prompts), sample)
    config = flags.data_config(args, s, lambda: world.broadcast_from_rank0(default_clips))
    dataset = Dataset(config, pipe, prompts=preserve_prompts)
    preserved = prompts_to_preserve(args, dataset.captions, preserve_prompts)
    if preserved:
        print(f"  {len(preserved)} prompts preserved")
    sizes = dataset.sizes()
    missing = dict(
        encode=not dataset.is_cached(), encode_texts=not all(f.exists() for f in dataset.text_files().values())
    )
    layout = parallel_layout(args, world.size, pipe.fp8)
    how = sizes | missing | dict(layout=layout, previews=previews.shape())

    def plan(checkpointing):
        return predict(args, s, memory_estimate.builders(pipe), blocks, checkpointing=checkpointing, **how)

    need = flags.fit(args, pipe, plan)
    run.metadata |= {"ops": ops.describe(args.device), "data": dataset.summary(sizes)}
    run.check(resume_fingerprint(args, pipe, dataset) | {"blocks": blocks})

    # cache the latents and the text embeddings
    dataset.cache_latents()
    texts = dataset.cache_texts()
    if world.is_main:
        dataset.sheet.write(run.out / "data.png")
    if args.cache_only:
        write_report(dataset)
        return
    previews.open(dataset)
    if preview_prompts:
        previews.embed(pipe.acquire("text"))
    pipe.drop()  # the text encoder is not needed any more

    def embed(captions):
        context, lens = collate([load(texts[c])[0]["embedding"] for c in captions])
        return context.to(args.device), lens.to(args.device)

    def expert_of(step):
        return list(schedule)[step // args.steps_per_expert % len(schedule)]

    def prepare(step):
        return list(dataset.step(step, *schedule[expert_of(step)], preserved_prompts=preserved))

    # adapters, optimizer, state
    adapters, norms, scale = pipe.adapters, {}, args.alpha / args.rank
    for name in schedule:
        dit = pipe.acquire(name)
        norms[name] = gather_state(world, weight_norms(dit))
        dit = None  # so that it can be evicted for the other expert
    for name, file in init_files.items():
        start_from(adapters[name], file, scale, name)
    params_of = {name: [p for pair in adapters[name].values() for p in pair] for name in schedule}
    params = sum(params_of.values(), [])
    print(f"{sum(p.numel() for p in params):,} parameters in {len(params) // 2} matrices")
    state = TrainState(params, adamw(params, args.lr, args.weight_decay), args.grad_spike_factor, args.ema)
    fingerprint = resume_fingerprint(args, pipe, dataset) | {"blocks": blocks}
    fingerprint["captions"] = sorted(f.name for f in texts.values())
    if preserved:
        fingerprint["preserved"] = [texts[p].name for p in preserved]
    if saved := run.restore(fingerprint):
        state.restore(saved)

    def evaluate(step):
        """Return the held-out loss and write previews, if due after this step; with --ema, for averaged weights."""
        metrics = {}
        with state.averaged():
            if dataset.val_items and due(step, args.eval_every, args.steps):
                metrics = held_out_loss(dataset, schedule, embed)
            if preview_prompts and due(step, args.preview_every, args.steps):
                run.log_image(step, "previews", previews.write(step))
            if step and metrics and run.is_best(metrics):
                write_adapters(step, f"{args.name}_best")
        return metrics

    tokenizer = load_tokenizer(pipe.dir, read_encoder(pipe.files("text")).spiece) if args.trigger else None
    triggers = {word: count_files(dataset.items, word, tokenizer) for word in args.trigger}

    def write_adapters(step, *names):
        total_batch = args.batch * args.accumulate * world.dp_size
        info = AdapterInfo(
            s.variant, run.date, triggers, config.sources[0].resolution, args.steps, args.lr, args.batch, total_batch
        )
        for expert in schedule if world.is_main else ():
            if state.ema and args.delta_cap:  # the average of A and B can exceed the cap even if no step did
                clamp_weight_norm(adapters[expert], scale, norms[expert], args.delta_cap)
            for name in names:
                write_lora(adapter_file(run.out, name, expert), adapters[expert], scale, info, step=step, expert=expert)

    def save(step):
        with state.averaged():
            write_adapters(step, f"{args.name}_{step:06d}", args.name)
        state.save(run, step)
        if args.keep and world.is_main:
            remove_older_adapters(run.out, args.name, step, args.keep)

    # training
    if not state.step and (metrics := evaluate(0)):
        run.log(0, **metrics)
        say_if_foreign(metrics, s.usual_loss)
    for step, batches in ahead(prepare, range(state.step, args.steps)):
        watch, loss, taught, expert = Stopwatch(), 0.0, 0, expert_of(step)
        world.seed(args.seed, step)
        dit = pipe.acquire(expert).train()

        # gradients: their sum over the ranks is the gradient of the global batch
        state.opt.zero_grad(set_to_none=True)  # without a gradient, the other expert's adapter stays as it is
        for batch, weight in batches:
            context, lens = embed(batch.captions)
            taught += len(batch.x) if batch.preserved is None else int((~batch.preserved).sum())
            batch = with_base_targets(batch, dit, context, lens) if preserved else batch
            loss += backward(world, dit, batch, context, lens, weight)
            watch.count(batch, weight)
        tokens = watch.tokens * world.dp_size / world.size
        loss, watch.tokens, taught, stop = world.all_reduce_grads(params_of[expert], loss, tokens, taught, run.stop)

        # one update; steps of nothing but prompts to preserve have far smaller gradients: the guard leaves these out
        metrics, skipped = update(state, world, step, args, loss, typical=taught > 0)
        if not skipped and args.delta_cap:
            metrics["n_clamped"] = clamp_weight_norm(adapters[expert], scale, norms[expert], args.delta_cap)
        if not skipped and state.ema:
            state.ema.update()

        # log, evaluate, save
        metrics |= {"expert": expert} if len(schedule) > 1 else {}
        metrics |= watch.metrics(dit, batch, sizes["text"], args.accumulate, args.device)
        metrics["epoch"] = round((step + 1) / dataset.batches.per_epoch, 3)
        dit = None  # the next step may need the other expert
        run.log(step + 1, loss=loss, **metrics, **evaluate(step + 1))
        too_many = state.guard.skipped >= args.max_skipped
        if due(step + 1, args.save_every, args.steps) or stop or too_many:
            save(step + 1)
        state.guard.raise_if_stuck(args.max_skipped, skipped, args.lr, run.out)
        if stop:
            run.leave()

    for stream in pipe.streams():
        print(stream.report())
    with state.averaged():
        for name in schedule:
            moved = relative_change(adapters[name], scale, norms[name])
            print(f"dW/W {moved:.2g}" + f" of expert {name}" * (len(schedule) > 1))
    results, best = ([adapter_file(run.out, n, name) for name in schedule] for n in (args.name, f"{args.name}_best"))
    print(need.compare(args.device), *run.with_best(results, best), sep="\n")


if __name__ == "__main__":
    cli(main)
