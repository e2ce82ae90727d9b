"""Train the text encoder through the frozen DiT: teach it words, so that the DiT understands them.

python train_te.py --ckpt Wan2.2-TI2V-5B --data DIR --out DIR --keywords crimson,box --device cuda
python train_te.py                                  on nano and clips that it draws itself

The loss is the DiT's own flow-matching loss; its gradient goes through cross-attention to the encoder. An anchor keeps
the embeddings of prompts without keywords where they were. Text is never cached here, since a cached embedding would
bypass the encoder. The result, OUT/text_encoder.safetensors, is used by every script's --text_encoder.
"""

import argparse
import json
import math
import random
from pathlib import Path

import torch

from data import DataConfig, Dataset, collate
from kernels import ops
from nano.default_clips import DEFAULT_KEYWORDS, default_clips
from nanowan import cache, memory_estimate
from nanowan.devices import DTYPES, pick_device, pick_dtype, select_attention
from nanowan.errors import BadInput, cli
from nanowan.formats.header import save as save_tensors
from nanowan.formats.t5 import in_layout, load_tokenizer, read_encoder, tokenizer_bytes, tokenizer_file
from nanowan.parallel import World, backward, full_tensor, shard
from nanowan.pipeline import Pipeline, Runtime
from nanowan.prompts import read_prompts
from nanowan.settings import parse_size
from nanowan.training.captions import augment_caption, without_keywords
from nanowan.training.flags import (
    RECOMMENDED,
    add_flags,
    check_ranges,
    choose_checkpointing,
    comma_list,
    expert_schedule,
    parallel_layout,
    pick,
    resolve,
    training_spec,
)
from nanowan.training.keywords import (
    RowEmbedding,
    check_keywords,
    initialize_rows,
    keyword_token_ids,
    search_initial_words,
    shared_token_ids,
)
from nanowan.training.optim import AdamW8bit, adamw
from nanowan.training.previews import Previews
from nanowan.training.run_dir import Run
from nanowan.training.state import TrainState, resume_fingerprint
from nanowan.training.step import Stopwatch, due, held_out_loss, update
from sample import decode, sample_latents


def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    recommended = RECOMMENDED["train_te"]
    add = p.add_argument_group("encoder").add_argument
    add("--train_blocks", type=int, help="train only the top N blocks (default: all; 0: none)")
    add(
        "--keywords",
        type=comma_list,
        help="words a,b,c whose token embeddings are trained too (default on nano's own data: its new words)",
    )
    add(
        "--keyword_init",
        choices=("own", "search"),
        help="initial embeddings of the keywords. own: as they are; search: each as the word of other captions in whose "
        "place its clips have the lowest loss, if that is lower than its own (default: the checkpoint's, or "
        f"{recommended['keyword_init']})",
    )
    add(
        "--keyword_lr",
        type=float,
        help="learning rate of the keywords' embeddings (default: the checkpoint's, or --lr)",
    )
    add(
        "--anchor",
        type=float,
        default=0.01,
        help="weight of the penalty on moving the embeddings of prompts without keywords (default: %(default)s)",
    )
    add(
        "--save",
        choices=("full", "delta", "comfyui"),
        default="full",
        help="form of the result. full: official names; delta: only the trained tensors and embeddings; comfyui: for its "
        "CLIPLoader, transformers' names and the tokenizer inside (default: %(default)s)",
    )
    add(
        "--optimizer",
        choices=("adamw", "adamw8bit"),
        help="optimizer of the encoder (default: adamw8bit, whose bf16 weights are compensated, for --dtype bf16 without "
        "--fsdp; else adamw)",
    )
    add(
        "--caption_mode_probs",
        help="percentages of captions with a keyword that are shown as the keyword alone, shortened, whole (default: "
        f"the checkpoint's, or {recommended['caption_mode_probs']})",
    )
    add(
        "--trim_prob",
        type=float,
        help="probability that a whole caption loses a few words, never a keyword (default: the checkpoint's, or "
        f"{recommended['trim_prob']})",
    )
    add_flags(p, "train_te", out="out/te")
    return p.parse_args(argv)


def check(args, s):
    """Resolve the flags for a checkpoint with Settings s, and check those of this script."""
    resolve(args, s, "train_te")
    if args.data is None and args.keywords is None:
        args.keywords = comma_list(DEFAULT_KEYWORDS)
    args.keywords = args.keywords or []
    args.keyword_lr = args.lr if args.keyword_lr is None else args.keyword_lr
    args.caption_mode_probs = parse_probs(args.caption_mode_probs)
    # else weights are fp32; plain AdamW's small steps would be lost in bf16's 8 bits
    compensated = args.dtype == "bf16" and not args.fsdp
    args.optimizer = args.optimizer or ("adamw8bit" if compensated else "adamw")
    if (args.optimizer == "adamw8bit") != compensated:
        raise BadInput(
            f"--optimizer {args.optimizer} --dtype {args.dtype}{' --fsdp' * args.fsdp}: adamw8bit is for bf16 weights, "
            "whole on each rank, and they need it; adamw for fp32 or --fsdp"
        )
    if args.save == "delta" and args.text_encoder:
        raise BadInput(
            f"--save delta --text_encoder {args.text_encoder}: a delta is read on top of the checkpoint's own encoder "
            "and would lose this one's changes; use --save full"
        )
    check_ranges(args, keyword_lr=(0, math.inf), anchor=(0, math.inf), trim_prob=(0, 1))


def parse_probs(text):
    try:
        probs = [float(v) for v in text.split(",")]
    except ValueError:
        probs = []
    if len(probs) != 3 or min(probs) < 0 or not 0 < sum(probs) < math.inf:
        raise BadInput(f"--caption_mode_probs {text}: three shares such as 15,35,50")
    return probs


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
    groups = [{"params": list(trained.values()), "lr": args.lr}] if trained else []
    if rows is not None:
        groups.append({"params": [rows], "lr": args.keyword_lr})
    return trained, groups


def predict(args, s, builders, ids=(3,), **more):
    """The Plan of a run; ids: of the trained embeddings; more: fields of TrainingSpec."""
    spec = training_spec(
        args, s, optimizer=args.optimizer, anchor=args.anchor > 0, save_delta=args.save == "delta", **more
    )
    return memory_estimate.training(spec, builders, lambda dit, encoder: unfreeze(encoder, args, ids)[1])


def encoder_tensors(encoder, trained, ids, how, dtype, is_main):
    """What is saved of an encoder: all of it, or as a "delta" what was trained. Every rank calls this; the one that
    writes has it whole, on the host, since a GPU may not have room for it beside the training.
    """

    def gather(t):
        t = full_tensor(t).to(dtype)
        return t.cpu() if is_main else None

    table = encoder.token_embedding
    rows, row_ids = (gather(table.rows.detach()), table.ids.cpu()) if ids else (None, None)
    if how == "delta":
        tensors = {k: gather(v) for k, v in trained.items()}
        return tensors | ({"token_embedding.rows": rows, "token_embedding.ids": row_ids} if ids else {})
    state = {k.replace("token_embedding.table.", "token_embedding."): v for k, v in encoder.state_dict().items()}
    tensors = {k: gather(v) for k, v in state.items() if k != "token_embedding.rows"}
    if ids and is_main:
        tensors["token_embedding.weight"] = tensors["token_embedding.weight"].index_copy(0, row_ids, rows)
    return tensors


def main():
    args = arguments()
    with World(pick_device(args.device), args.fsdp, args.ulysses_size, args.pipeline_stages) as world:
        train(args, world)


def train(args, world):
    # checkpoint and flags
    args.device = str(world.device)
    dtype = DTYPES[pick_dtype(args.dtype, args.device)]
    select_attention(args.attention, args.device, dtype, gradients=True)
    pipe = Pipeline(args.ckpt, Runtime(args.device, dtype, world=world), text_encoder=args.text_encoder)
    s = pipe.settings
    check(args, s)
    schedule = expert_schedule(args.expert, s)
    print(json.dumps(vars(args)), ops.describe(args.device), sep="\n")
    run = Run(args.out, vars(args), args.resume, world.is_main)

    # data, and the memory that the run will need
    source = Path(args.data) if args.data else world.broadcast_from_rank0(default_clips)
    preview_prompts = read_prompts(args.previews, "--previews") if args.previews else []
    cache_dir = Path(args.cache or (source if source.is_dir() else source.parent) / "cache")
    size = parse_size(args.resolution, "--resolution")
    dataset = Dataset(pick(DataConfig, args, source=source, cache=cache_dir, resolution=size), pipe)
    spiece = read_encoder(pipe.files("text")).spiece
    tokenizer, file = load_tokenizer(pipe.dir, spiece), tokenizer_file(pipe.dir)
    spiece = tokenizer_bytes(file) if file else spiece.read()
    check_keywords(args.keywords, dataset.captions, tokenizer, args.train_blocks != 0)
    sizes = dataset.sizes()
    sizes["cache"] = sizes["cache"][0], 0
    how = sizes | dict(encode=not dataset.is_cached(), layout=parallel_layout(args, world.size, pipe.fp8))

    def plan(checkpointing):
        builders = memory_estimate.builders(pipe)
        return predict(args, s, builders, checkpointing=checkpointing, previews=bool(preview_prompts), **how)

    args.checkpointing, need = choose_checkpointing(args.checkpointing, world, args.device, plan)
    pipe.checkpointing = args.checkpointing
    print(need)
    run.metadata |= {"ops": ops.describe(args.device), "data": dataset.summary(sizes)}
    fingerprint = resume_fingerprint(args, pipe, dataset)
    run.check(fingerprint)
    dataset.cache_latents()
    if args.cache_only:
        return

    # the encoder learns, the DiT is frozen
    encoder = pipe.acquire("text")
    pipe.drop()  # from here on the encoder is this script's own: it must not be evicted for others
    anchors = without_keywords(dataset.captions, args.keywords)
    ids_of = keyword_token_ids(args.keywords, dataset.captions, encoder.tokenizer)
    ids = set().union(*ids_of.values())
    with torch.no_grad():
        anchor_embeds = {c: encoder.encode([c])[0][0].cpu() for c in anchors} if args.anchor else {}
    initial_words = {}
    if args.keyword_init == "search" and run.state_file is None:
        first, (low, high) = next(iter(schedule.items()))
        initial_words = search_initial_words(args.keywords, encoder, dataset, first, low, high)
        initial_words = world.broadcast_from_rank0(lambda: initial_words)  # ranks may round otherwise
        for keyword, word in initial_words.items():
            print(f"keyword {keyword!r}: starts as {word!r}")
        run.metadata["initial_words"] = initial_words
    trained, groups = unfreeze(encoder, args, ids)
    shared = shared_token_ids(args.keywords, dataset.captions, encoder.tokenizer)
    initialize_rows(initial_words, ids_of, shared, encoder)
    if world.fsdp:
        for p in encoder.parameters():  # shards are small enough for what is trained to be fp32
            p.data = p.data.float() if p.requires_grad else p.data
        for module in [*encoder.blocks, encoder]:
            shard(module, world, dtype=dtype)
        trained, groups = trainable(encoder, args)
    params = [p for g in groups for p in g["params"]]
    print(
        f"{sum(p.numel() for p in params):,} parameters: {len(trained)} tensors, {len(ids)} embedding rows; "
        f"{len(anchors)} prompts anchored"
    )

    # optimizer, state, previews
    optimizer = adamw if args.optimizer == "adamw" else AdamW8bit
    opt = optimizer(groups, args.lr, weight_decay=args.weight_decay)
    state = TrainState(params, opt, args.grad_spike_factor, args.ema)
    fingerprint["captions"] = cache.cache_file("", "", captions=sorted(dataset.captions)).name
    fingerprint["rows"] = sorted(ids)
    fingerprint["encoder"] = world.broadcast_from_rank0(lambda: [cache.digest(f) for f in pipe.files("text")])
    if saved := run.restore(fingerprint):
        state.restore(saved)
    previews = Previews(pipe, preview_prompts, args.out, args.seed, sample_latents, decode)

    def show_caption(captions, rng):
        return augment_caption(rng.choice(captions), args.keywords, args.caption_mode_probs, args.trim_prob, rng)

    def anchor_loss(step):
        """Back-propagate how far prompts without keywords have moved, relative to their size; a part on each rank."""
        prompts = random.Random(f"{args.seed} anchors {step}").choices(anchors, k=args.batch * world.dp_size)
        local, fraction = world.local_indices(len(prompts))
        now, _ = encoder.encode([prompts[i] for i in local])
        before = collate([anchor_embeds[prompts[i]] for i in local])[0].to(now)
        size = sum(anchor_embeds[p].float().square().sum() for p in prompts).to(now) * (world.size // world.dp_size)
        moved = (now.float() - before.float()).square().sum() / size * (fraction > 0)
        (args.anchor * moved).backward()
        return moved.item()

    def evaluate(step):
        """What is due of held-out loss and previews after a step, with the weights that would be saved."""
        metrics = {}
        with state.averaged():
            if dataset.val_items and due(step, args.eval_every, args.steps):
                metrics = held_out_loss(dataset, schedule, encoder.encode)
            if preview_prompts and due(step, args.preview_every, args.steps):
                previews.embed(encoder)
                previews.write(step)
        return metrics

    def save(step):
        with state.averaged():
            tensors = encoder_tensors(encoder, trained, ids, args.save, dtype, world.is_main)
            if world.is_main:
                tensors = in_layout(tensors, "comfyui", spiece) if args.save == "comfyui" else tensors
                metadata = {"step": step, "keywords": ",".join(args.keywords), "delta": args.save == "delta"}
                save_tensors(run.out / "text_encoder.safetensors", tensors, metadata | {"format": "pt"})
        state.save(run, step)

    # training
    if not state.step and (metrics := evaluate(0)):
        run.log(0, **metrics)
    for step in range(state.step, args.steps):
        watch, loss, moved = Stopwatch(), 0.0, 0.0
        world.seed(args.seed, step)
        expert = list(schedule)[step // args.steps_per_expert % len(schedule)]
        dit = pipe.acquire(expert).train()

        # gradients: the sum over ranks is that of the global batch
        state.opt.zero_grad(set_to_none=True)
        for batch, weight in dataset.step(step, *schedule[expert], show_caption):
            context, lens = encoder.encode(batch.captions)
            loss += backward(world, dit, batch, context, lens, weight)
            watch.count(batch, weight)
        if args.anchor:
            moved = anchor_loss(step)
        tokens = watch.tokens * world.dp_size / world.size
        loss, moved, watch.tokens, stop = world.all_reduce_grads(params, loss, moved, tokens, run.stop)

        # one update
        metrics, skipped = update(state, world, step, args, loss)
        if not skipped and state.ema:
            state.ema.update()

        # log, evaluate, save
        if args.anchor:
            metrics["anchor"] = moved
        if len(schedule) > 1:
            metrics["expert"] = expert
        metrics |= watch.metrics(dit, batch, sizes["text"], args.accumulate, args.device)
        dit = None  # the other expert may be next
        run.log(step + 1, loss=loss, **metrics, **evaluate(step + 1))
        too_many = state.guard.skipped >= args.max_skipped
        if due(step + 1, args.save_every, args.steps) or stop or too_many:
            save(step + 1)
        state.guard.raise_if_stuck(args.max_skipped, skipped, args.lr, run.out)
        if stop:
            return

    print(need.compare(args.device), run.out / "text_encoder.safetensors", sep="\n")


if __name__ == "__main__":
    cli(main)
