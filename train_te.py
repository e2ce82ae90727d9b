"""Train the text encoder through the frozen DiT, to teach it words that the DiT then understands.

python train_te.py --ckpt Wan2.2-TI2V-5B --data DIR --out DIR --keywords crimson,box --device cuda
python train_te.py                                  on nano, the toy model, with clips that the script draws itself

The loss is the DiT's flow-matching loss; its gradient flows through cross-attention into the encoder. A penalty, the
anchor, holds the embeddings of prompts without keywords near their original values. Text embeddings are not cached,
since the encoder must run at each step. Every script takes the result, OUT/text_encoder.safetensors, as --text_encoder.
"""

import nanowan.environment  # noqa: F401  # isort: skip

import json
import math

import sample
from data import Dataset
from kernels import ops
from nano.default_clips import DEFAULT_KEYWORDS, default_clips
from nanowan import cache, memory_estimate
from nanowan.devices import DTYPES, pick_device, pick_dtype, select_attention
from nanowan.errors import BadInput, cli
from nanowan.flags import Parser, in_force, parallel_layout
from nanowan.formats import t5 as encoder_files
from nanowan.formats.header import save as save_tensors
from nanowan.parallel import World, backward
from nanowan.pipeline import Pipeline, Runtime
from nanowan.prompts import read_prompts
from nanowan.training import flags, keywords, text_encoder
from nanowan.training.anchor import Anchor
from nanowan.training.captions import augment_caption, parse_probs, without_keywords
from nanowan.training.optim import AdamW8bit, adamw
from nanowan.training.previews import Previews, preview_requests
from nanowan.training.report import write_report
from nanowan.training.run_dir import Run
from nanowan.training.state import TrainState, resume_fingerprint
from nanowan.training.step import Stopwatch, ahead, due, held_out_loss, say_if_foreign, update


def arguments(argv=None):
    p = Parser(__doc__)
    recommended = flags.RECOMMENDED["train_te"]
    add = p.add_argument_group("encoder").add_argument
    add("--train_blocks", type=int, help="number of the encoder's last blocks to train (default: all; 0: none)")
    add("--rank", type=int, help="rank of LoRAs to train instead of the encoder blocks' weights (default: none)")
    names = "words a,b,c whose token embeddings are trained; NAME=WORD initializes NAME from WORD; NAME=placeholder"
    names += ":N gives NAME N unused rows of the embedding table (default: none; without --data, nano's new words)"
    add("--keywords", type=flags.comma_list, help=names)
    config = "(default: from the checkpoint's config.json, else"
    start = "initial embeddings of the keywords. own: the encoder's own; search: those of the common word that gives "
    start += "the lowest loss in the keyword's place, or the encoder's own if the keyword itself gives a lower loss "
    add("--keyword_init", choices=("own", "search"), help=f"{start}{config} {recommended['keyword_init']})")
    add("--keyword_lr", type=float, help=f"learning rate of keyword embeddings {config} --lr)")
    norm = "norm of each keyword embedding. free: not limited; fixed: as at the start of training; clamp: at most the "
    norm += "99th percentile of the norms in the embedding table (default: %(default)s)"
    add("--keyword_norm", choices=("free", "fixed", "clamp"), default="free", help=norm)
    drift = "weight of the penalty for changing the embeddings of prompts without keywords (default: %(default)s)"
    add("--anchor", type=float, default=0.01, help=drift)
    forms = "format of the result. full: all tensors, official names; delta: only the trained weights; comfyui: for "
    forms += "ComfyUI's CLIPLoader, with transformers' names and the tokenizer inside; lora: for ComfyUI's LoraLoader, "
    forms += "needs --rank or --train_blocks 0 (default: lora with --rank, else full)"
    add("--save", choices=("full", "delta", "comfyui", "lora"), help=forms)
    chosen = "optimizer of the encoder; adamw8bit corrects the rounding of bf16 weights by Kahan summation (default: "
    add("--optimizer", choices=("adamw", "adamw8bit"), help=chosen + "adamw8bit for bf16 without --fsdp, else adamw)")
    shown = "percentages A,B,C for captions with a keyword. A: keyword only; B: a few words around it; C: full caption "
    add("--caption_mode_probs", help=f"{shown}{config} {recommended['caption_mode_probs']})")
    trim = "probability that a full caption loses up to a fifth of its words, but no keyword "
    add("--trim_prob", type=float, help=f"{trim}{config} {recommended['trim_prob']})")
    add = p.add_argument_group("base model").add_argument
    add("--base_dtype", choices=("fp8",), help="dtype of linear layers in the DiT's blocks (default: that of --dtype)")
    kept = "number of DiT blocks that are kept in host memory until they run (default: 0)"
    add("--stream_blocks", type=int, default=0, help=kept)
    flags.add_flags(p, "train_te", out="out/te")
    return p.parse_args(argv)


def check(args, s, num_blocks):
    """Fill in and check the flags for a checkpoint with Settings s and a DiT of num_blocks blocks."""
    if args.rank is not None:
        flags.check_ranges(args, rank=(1, math.inf))
        args.lr = args.lr or flags.encoder_lora_lr(s)
    flags.resolve(args, s, "train_te")
    flags.check_blocks(args, num_blocks)
    if args.data is None and args.keywords is None:
        args.keywords = flags.comma_list(DEFAULT_KEYWORDS)
    args.keywords = args.keywords or []
    args.keyword_lr = args.lr if args.keyword_lr is None else args.keyword_lr
    args.caption_mode_probs = parse_probs(args.caption_mode_probs)
    args.optimizer = args.optimizer or ("adamw8bit" if args.dtype == "bf16" and not args.fsdp else "adamw")
    if args.optimizer == "adamw8bit" and args.fsdp:
        raise BadInput("--optimizer adamw8bit --fsdp: sharded weights need adamw")
    if args.optimizer == "adamw" and args.dtype == "bf16" and not args.fsdp and not args.rank:
        raise BadInput("--optimizer adamw --dtype bf16: would lose its small steps to rounding; use adamw8bit or fp32")
    args.save = args.save or ("lora" if args.rank else "full")
    if args.save == "lora" and not args.rank and args.train_blocks != 0:
        raise BadInput("--save lora: full blocks are trained; give --rank N, or --train_blocks 0 for embeddings alone")
    if args.save in ("delta", "lora") and args.text_encoder:
        raise BadInput(
            f"--save {args.save} --text_encoder {' '.join(args.text_encoder)}: its result is read on top of the "
            "checkpoint's own encoder and would lose this one's changes; use --save full"
        )
    flags.check_ranges(args, keyword_lr=(0, math.inf), anchor=(0, math.inf), trim_prob=(0, 1))


def predict(args, s, builders, ids=(3,), **more):
    """Return the memory_estimate.Plan of a run. ids: the trained token ids; more: further fields of TrainingSpec."""

    def make_trainable(dit, encoder):
        text_encoder.unfreeze(encoder, ids, args.train_blocks, args.rank)
        return text_encoder.optimizer_groups(encoder, args.lr, args.keyword_lr)

    more |= {"save_delta": args.save in ("delta", "lora"), "num_results": 1 + (args.held_out > 0)}
    spec = flags.training_spec(args, s, optimizer=args.optimizer, anchor=args.anchor > 0, **more)
    return memory_estimate.training(spec, builders, make_trainable)


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
    check(args, s, pipe.config().num_layers)
    flags.check_data(args.data, pipe)
    schedule = flags.expert_schedule(args.expert, s, args.min_t, args.max_t)
    defaults = arguments([])
    print(in_force(args, defaults), ops.describe(args.device), sep="\n")
    run = Run(args.out, vars(args), args.resume, world.is_main, defaults=vars(defaults))

    # the data, and the memory that the run will need
    preview_prompts = read_prompts(args.previews, "--previews") if args.previews else []
    previews = Previews(pipe, preview_requests(args, s, preview_prompts), sample)
    config = flags.data_config(args, s, lambda: world.broadcast_from_rank0(default_clips))
    dataset = Dataset(config, pipe)
    source = encoder_files.read_encoder(pipe.files("text"))
    tokenizer, spiece = encoder_files.load_tokenizer(pipe.dir, source.spiece), encoder_files.tokenizer_file(pipe.dir)
    words = [keywords.parse_keyword(text) for text in args.keywords]
    names = [w.name for w in words]
    vocab = source.entries["token_embedding.weight"].shape[0]
    placeholders = keywords.add_placeholders(words, tokenizer, vocab)
    keywords.check_keywords(names, dataset.captions, tokenizer, args.train_blocks != 0)
    sizes = dataset.sizes()
    sizes["cache"] = sizes["cache"][0], 0
    how = sizes | dict(encode=not dataset.is_cached(), layout=parallel_layout(args, world.size, pipe.fp8))

    def plan(checkpointing):
        builders = memory_estimate.builders(pipe)
        return predict(args, s, builders, checkpointing=checkpointing, previews=previews.shape(), **how)

    need = flags.fit(args, pipe, plan)
    run.metadata |= {"ops": ops.describe(args.device), "data": dataset.summary(sizes)}
    run.check(resume_fingerprint(args, pipe, dataset))
    dataset.cache_latents()
    if world.is_main:
        dataset.sheet.write(run.out / "data.png")
    if args.cache_only:
        write_report(dataset)
        return
    previews.open(dataset)

    # the encoder is trained, the DiT is frozen
    pipe.trains_text = True
    encoder = pipe.acquire("text")
    pipe.drop()  # the Pipeline forgets the encoder, which stays in memory: no other model can evict it
    if preview_prompts:
        previews.embed(encoder)
    encoder.tokenizer.add_words(placeholders)
    anchors = without_keywords(dataset.captions, names)
    ids_of = keywords.keyword_token_ids(names, dataset.captions, encoder.tokenizer)
    ids = set().union(*ids_of.values())
    anchor = Anchor(encoder, anchors, args.anchor, args.seed) if args.anchor else None
    initial = {}
    if run.state_file is None:
        initial = keywords.initial_words(words, args.keyword_init == "search", encoder, dataset, schedule)
        run.metadata["initial_words"] = initial
    base_rows = encoder.token_embedding.weight[sorted(ids)].clone()
    text_encoder.unfreeze(encoder, ids, args.train_blocks, args.rank, args.keyword_norm)
    shared = keywords.shared_token_ids(names, dataset.captions, encoder.tokenizer)
    keywords.initialize_rows(initial, ids_of, shared, encoder)
    if world.fsdp:
        text_encoder.shard_among(encoder, world, dtype, whole=args.rank is not None)
    groups = text_encoder.optimizer_groups(encoder, args.lr, args.keyword_lr)
    params = [p for g in groups for p in g["params"]]
    print(
        f"{sum(p.numel() for p in params):,} parameters: {len(params) - bool(ids)} tensors, {len(ids)} embeddings of "
        f"words; {len(anchors)} prompts anchored"
    )
    if ids:
        encoder.token_embedding.hold_norms()

    # optimizer, state, previews
    optimizer = adamw if args.optimizer == "adamw" else AdamW8bit
    opt = optimizer(groups, args.lr, weight_decay=args.weight_decay)
    state = TrainState(params, opt, args.grad_spike_factor, args.ema)
    fingerprint = resume_fingerprint(args, pipe, dataset)
    fingerprint["captions"] = cache.cache_file("", "", captions=sorted(dataset.captions)).name
    fingerprint["rows"] = sorted(ids)
    fingerprint["encoder"] = world.broadcast_from_rank0(lambda: pipe.encoder_source().digests(dataset.digest))
    if saved := run.restore(fingerprint):
        state.restore(saved)
    result, best = run.out / "text_encoder.safetensors", run.out / "text_encoder_best.safetensors"

    def show_caption(captions, rng):
        return augment_caption(rng.choice(captions), names, args.caption_mode_probs, args.trim_prob, rng)

    def expert_of(step):
        return list(schedule)[step // args.steps_per_expert % len(schedule)]

    def prepare(step):
        return list(dataset.step(step, *schedule[expert_of(step)], show_caption))

    def evaluate(step):
        """Return the held-out loss and write previews, if due after this step; with --ema, for averaged weights."""
        metrics = {}
        with state.averaged():
            if dataset.val_items and due(step, args.eval_every, args.steps):
                metrics = held_out_loss(dataset, schedule, encoder.encode)
                if step and world.broadcast_from_rank0(lambda: run.is_best(metrics)):
                    write_encoder(step, best)
            if preview_prompts and due(step, args.preview_every, args.steps):
                if step:  # at step 0, previews use the embeddings of the untrained encoder
                    previews.embed(encoder)
                run.log_image(step, "previews", previews.write(step))
        if world.fsdp:
            encoder.reshard()  # no backward pass has done this: weights outside of the blocks are still unsharded
        return metrics

    def write_encoder(step, file):
        metadata = {"step": step, "keywords": ",".join(names), "delta": args.save == "delta"}
        if placeholders:
            metadata["placeholders"] = json.dumps(placeholders)
        if args.save == "lora":
            changes = text_encoder.encoder_changes(encoder, base_rows)
            if world.is_main:
                encoder_files.write_encoder_lora(file, *changes, metadata, vocab=vocab)
            return
        tensors = text_encoder.encoder_tensors(encoder, args.save, dtype, world.is_main)
        if world.is_main:
            if args.save == "comfyui":
                model = encoder_files.tokenizer_bytes(spiece) if spiece else source.spiece.read()
                tensors = encoder_files.in_layout(tensors, "comfyui", model)
            save_tensors(file, tensors, metadata | {"format": "pt"})

    def save(step):
        with state.averaged():
            write_encoder(step, result)
        state.save(run, step)

    # training
    if not state.step and (metrics := evaluate(0)):
        run.log(0, **metrics)
        say_if_foreign(metrics, s.usual_loss)
    for step, batches in ahead(prepare, range(state.step, args.steps)):
        watch, loss, moved, expert = Stopwatch(), 0.0, 0.0, expert_of(step)
        world.seed(args.seed, step)
        dit = pipe.acquire(expert).train()

        # gradients: their sum over the ranks is the gradient of the global batch
        state.opt.zero_grad(set_to_none=True)
        for batch, weight in batches:
            context, lens = encoder.encode(batch.captions)
            loss += backward(world, dit, batch, context, lens, weight)
            watch.count(batch, weight)
        if anchor:
            moved = anchor.back_propagate(step, dataset.batches.size, args.batch, world)
        tokens = watch.tokens * world.dp_size / world.size
        loss, moved, watch.tokens, stop = world.all_reduce_grads(params, loss, moved, tokens, run.stop)

        # one update
        metrics, skipped = update(state, world, step, args, loss)
        if not skipped and ids:
            encoder.token_embedding.hold_norms()
            metrics["keyword_norms"] = keywords.keyword_norms(encoder, ids_of)
        if not skipped and state.ema:
            state.ema.update()

        # log, evaluate, save
        if anchor:
            metrics["anchor"] = moved
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

    with state.averaged():
        moved = text_encoder.relative_changes(encoder, base_rows, source.entries, dtype, world.is_main)
    shares = ", ".join(f"{part} {share:.2g}" for part, share in moved.items())
    print(f"dW/W of {shares} against {pipe.files('text')[0]}")
    if args.save in ("full", "delta"):
        print("note: for ComfyUI use --save comfyui; its CLIPLoader takes this form without an error, as a random CLIP")
    print(need.compare(args.device), *run.with_best([result], [best]), sep="\n")


if __name__ == "__main__":
    cli(main)
