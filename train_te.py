"""Fine-tune the text encoder through the frozen DiT: teach it words that the DiT then understands.

python train_te.py --ckpt Wan2.2-TI2V-5B --data DIR --out DIR --keywords crimson,box --device cuda
python train_te.py                                  on nano and clips it draws itself

The loss is the DiT's own flow-matching loss; its gradient goes through cross-attention to the encoder. An anchor keeps
the embeddings of prompts without keywords where they were. Text is never cached: a cached embedding bypasses the
encoder that is to learn. The result, OUT/text_encoder.safetensors, is used by every script's --text_encoder.
"""

import argparse
import json
import math
import random
from collections import Counter
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import ops
import plan
from captions import UNITS, augment_caption, has_keyword, replace_keyword, spans, without_keywords
from checkpoint import BadInput, cli, save
from models import DTYPES, Models, Runtime, pick_device, pick_dtype
from nanoworld.default_clips import DEFAULT_KEYWORDS
from optim import AdamW8bit, adamw
from parallel import World, full_tensor, shard
from previews import Previews
from recommended import RECOMMENDED
from run import Run, TrainState, resume_fingerprint
from t5 import EOS, PAD, UNK, in_layout, load_tokenizer, read_encoder, tokenizer_bytes, tokenizer_file
from train import (
    Dataset,
    add_flags,
    check_ranges,
    choose_checkpointing,
    eval_batches,
    evaluate,
    expert_schedule,
    fit,
    resolve_flags,
)

INIT_SAMPLES, INIT_CANDIDATES = 8, 32  # of --keyword_init search, for each keyword
PUNCTUATION = ".,;:!?\"'()[]"


def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument_group("encoder").add_argument
    add("--train_blocks", type=int, help="only the top N blocks (default: all; 0: none)")
    add(
        "--keywords",
        help="a,b,c: also train the embedding rows of these words (default on nano's own data: its new words)",
    )
    add(
        "--keyword_init",
        choices=("own", "search"),
        help="from where the keywords' rows start. own: as they are; search: each as the word of other captions in "
        "whose place its clips have the lowest loss, where that is lower than its own (default: the checkpoint's, or "
        f"{RECOMMENDED['train_te']['keyword_init']})",
    )
    add("--keyword_lr", type=float, help="of the keywords' rows (default: the checkpoint's, or --lr)")
    add(
        "--anchor",
        type=float,
        default=0.01,
        help="weight of the penalty on moving prompts without keywords (default: %(default)s)",
    )
    add(
        "--save",
        choices=("full", "delta", "comfyui"),
        default="full",
        help="full: official names; delta: only the tensors and rows that were trained; comfyui: for its CLIPLoader, "
        "transformers' names and the tokenizer inside (default: %(default)s)",
    )
    add(
        "--optimizer",
        choices=("adamw", "adamw8bit"),
        help="of the encoder (default: adamw8bit, whose bf16 weights are compensated, for --dtype bf16 without --fsdp; "
        "else adamw)",
    )
    add(
        "--caption_mode_probs",
        help="percent of captions with a keyword shown as the keyword alone, shortened, whole (default: the "
        f"checkpoint's, or {RECOMMENDED['train_te']['caption_mode_probs']})",
    )
    add(
        "--trim_prob",
        type=float,
        help="chance that a whole caption loses a few words, never a keyword (default: the checkpoint's, or "
        f"{RECOMMENDED['train_te']['trim_prob']})",
    )
    add("--cache_text", action="store_true", help="refused: a cached embedding bypasses the encoder that is to learn")
    add_flags(p, "train_te", out="out/te")
    return p.parse_args(argv)


def resolve(args, s):
    """Fill in what the checkpoint recommends and check what was given; keywords and probabilities become lists."""
    if args.cache_text:
        raise BadInput("--cache_text: a cached embedding bypasses the encoder that is to learn; it would train nothing")
    resolve_flags(args, s, "train_te")
    if args.data is None and args.keywords is None:
        args.keywords = DEFAULT_KEYWORDS
    args.keywords = [k.strip() for k in (args.keywords or "").split(",") if k.strip()]
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
        # not rows[slot]: the gradient of indexing is added up by several threads in any order
        return torch.where((slot >= 0)[..., None], F.embedding(slot.clamp(min=0), self.rows), self.table(ids))


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


def predict(args, s, builders, ids=(3,), **sizes):
    """The Plan of a run."""

    def make_trainable(dit, encoder):
        return unfreeze(encoder, args, ids)[1]

    return plan.training(args, s, builders, make_trainable, len(expert_schedule(args, s)), **sizes)


def keyword_token_ids(keywords, captions, tokenizer):
    """{keyword: ids of the pieces that spell it}, as it is given and as captions write it, but for those that a caption
    without a keyword uses; all of a spelling's where it has none of its own. Never the unknown, the end, a bare space.
    """
    shared = shared_token_ids(keywords, captions, tokenizer)
    ids = {}
    for keyword in keywords:
        spellings = {keyword, *(c[begin:end] for c in captions for begin, end in spans(c, keyword))}
        pieces = [{i for i in tokenizer.ids(spelling) if is_own_piece(i, tokenizer)} for spelling in spellings]
        ids[keyword] = {i for found in pieces for i in (found - shared or found)}
    return ids


def own_pieces(word, tokenizer):
    """The ids of a word that stand for letters."""
    return [i for i in tokenizer.ids(word) if is_own_piece(i, tokenizer)]


def is_own_piece(i, tokenizer):
    """Whether a token stands for letters of its own: not the unknown, the end, or a bare space."""
    return i not in (PAD, EOS, UNK) and tokenizer.pieces.id_to_piece(i) != "\u2581"


def shared_token_ids(keywords, captions, tokenizer):
    """Ids of the pieces of all captions without a keyword."""
    return {i for c in without_keywords(captions, keywords) for i in tokenizer.ids(tokenizer.clean(c))}


@torch.no_grad()
def search_initial_words(keywords, encoder, dataset, name, low, high):
    """{keyword: the known word to start from}: the words of captions without keywords take a keyword's place in its own
    captions, and the one with the lowest loss is it; keywords whose own loss is lower are left out. It is what textual
    inversion (Gal et al., 2022) has its user give as an initializer token.

    Losses are of at most INIT_SAMPLES training samples, one of a file, at two times in [low, high) under fixed noise,
    through the DiT `name`.
    """
    others = without_keywords(dataset.captions, keywords)
    counts = Counter(m.group().strip(PUNCTUATION).lower() for c in others for m in UNITS.finditer(c))
    readable = [w for w, _ in counts.most_common() if own_pieces(w, encoder.tokenizer)]
    candidates = readable[:INIT_CANDIDATES]
    if not candidates:
        return {}
    model, chosen = dataset.models.acquire(name).eval(), {}
    for keyword in keywords:
        shown = {}  # one sample of each file whose caption has the word
        for item, file in zip(dataset.items, dataset.files):
            if captions := [c for c in item.captions if has_keyword(c, [keyword])]:
                shown.setdefault(item.path, (replace(item, captions=captions[:1]), file))
        if not shown:
            continue
        shown = list(shown.values())[:INIT_SAMPLES]
        held = eval_batches(*zip(*shown), dataset.samples, dataset.models.settings.shift, low, high)
        batches, losses = [batch for i, batch in held if i % 2], {}
        captions = {caption for batch in batches for caption in batch.captions}
        for word in [keyword, *candidates]:
            texts = {c: encoder.encode([replace_keyword(c, keyword, word)]) for c in captions}
            losses[word] = sum(batch.loss(model, *texts[batch.captions[0]]).item() for batch in batches)
        if (best := min(losses, key=losses.get)) != keyword:
            chosen[keyword] = best
    return chosen


@torch.no_grad()
def initialize_rows(words, ids_of, shared, encoder):
    """Set each keyword's trained rows, but for those in `shared`, which other captions use too, to the mean of its
    word's; a row of several keywords to the mean of theirs. words: of search_initial_words; ids_of: of
    keyword_token_ids.
    """
    embedding, starts = encoder.token_embedding, {}
    for keyword, word in words.items():
        start = embedding.table.weight[own_pieces(word, encoder.tokenizer)].float().mean(0)
        for i in ids_of[keyword] - shared:
            starts.setdefault(i, []).append(start)
    for i, rows in starts.items():
        embedding.rows[embedding.slot[i]] = torch.stack(rows).mean(0).to(embedding.rows)


def check_keywords(keywords, captions, tokenizer, trains_blocks):
    """Say how many captions hold each keyword; returns {keyword: count}. Raises BadInput for one that none holds, or of
    which nothing can be trained: it has no piece, or, where no blocks are trained, none that other captions do not use
    too.
    """
    ids, shared = (keyword_token_ids(keywords, captions, tokenizer), shared_token_ids(keywords, captions, tokenizer))
    counts = {}
    for keyword in keywords:
        holding = [c for c in captions if has_keyword(c, [keyword])]
        cut_off = sum(is_cut_off(c, keyword, tokenizer) for c in holding)
        counts[keyword] = len(holding) - cut_off
        print(
            f"keyword {keyword!r}: in {len(holding)} captions, {len(ids[keyword])} embedding rows"
            + f"; in {cut_off} of them beyond the {tokenizer.length} tokens that are read" * (cut_off > 0)
        )
        if len(holding) == cut_off:
            raise BadInput(f"--keywords {keyword}: no caption of --data holds it where it is read")
        if not ids[keyword]:
            raise BadInput(f"--keywords {keyword}: the tokenizer has no piece for it, so nothing of it can be trained")
        if not trains_blocks and not ids[keyword] - shared:
            raise BadInput(
                f"--keywords {keyword}: with --train_blocks 0 only its own pieces are trained, and all of them are in "
                "captions without it too; train blocks as well"
            )
    return counts


def is_cut_off(caption, keyword, tokenizer):
    """Whether a caption is so long that no token of the keyword's first place in it is read."""
    begin = spans(caption, keyword)[0][0]
    return len(tokenizer.ids(tokenizer.clean(caption[:begin]))) >= tokenizer.length - 1


def main():
    args = arguments()
    with World(pick_device(args.device), args.fsdp, args.ulysses_size, args.pipeline_stages) as world:
        args.device = str(world.device)
        args.dtype = pick_dtype(args.dtype, args.device)
        train(args, world)


def train(args, world):
    # flags
    def set_checkpointing(name, model):
        model.checkpointing = args.checkpointing

    runtime = Runtime(args.device, DTYPES[args.dtype], world=world, on_model_built=set_checkpointing)
    models = Models(args.ckpt, runtime, text_encoder=args.text_encoder)
    s = models.settings
    resolve(args, s)
    schedule = expert_schedule(args, s)
    print(json.dumps(vars(args)), ops.chosen(args.device), sep="\n")
    run = Run(args.out, vars(args), args.resume, world.is_main)

    # data: latents cached, text never
    dataset, previews = Dataset(args, models), Previews(args, models)
    run.metadata |= {"ops": ops.chosen(args.device), "data": dataset.summary()}
    spiece = read_encoder(models.files("text")).spiece
    tokenizer = load_tokenizer(models.dir, spiece)
    file = tokenizer_file(models.dir)
    spiece = tokenizer_bytes(file) if file else spiece.read()
    check_keywords(args.keywords, dataset.captions, tokenizer, args.train_blocks != 0)
    sizes = dataset.plan_sizes(texts=False) | {"previews": bool(previews.prompts), "ranks": world.size}
    need = choose_checkpointing(args, world, lambda: predict(args, s, plan.builders(models), **sizes))
    print(need)
    run.check(resume_fingerprint(args, models, dataset))
    dataset.cache_latents()
    if args.cache_only:
        return

    # models: the encoder learns, the DiT is frozen
    encoder = models.acquire("text")
    models.drop()  # from here on the encoder is this script's own: it must not make room for others
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
        for part in [*encoder.blocks, encoder]:
            shard(part, world, dtype=runtime.dtype)
        trained, groups = trainable(encoder, args)
    params = [p for g in groups for p in g["params"]]
    print(
        f"{sum(p.numel() for p in params):,} parameters: {len(trained)} tensors, {len(ids)} embedding rows; "
        f"{len(anchors)} prompts anchored"
    )

    # optimizer and state
    optimizer = adamw if args.optimizer == "adamw" else AdamW8bit
    state = TrainState(params, optimizer(groups, args.lr, weight_decay=args.weight_decay), args)
    encoder_digest = world.broadcast_from_rank0(lambda: [data.digest(f) for f in models.files("text")])
    captions = data.cache_file("", "", captions=sorted(dataset.captions)).name
    saved = run.restore(
        resume_fingerprint(args, models, dataset, captions=captions, rows=sorted(ids), encoder=encoder_digest)
    )
    if saved:
        state.restore(saved)

    def show_caption(captions, rng):
        return augment_caption(rng.choice(captions), args.keywords, args.caption_mode_probs, args.trim_prob, rng)

    def anchor_loss(step):
        """How far prompts without keywords have moved, relative to their size; a part of it on each rank."""
        prompts = random.Random(f"{args.seed} anchors {step}").choices(anchors, k=args.batch * world.dp_size)
        local, fraction = world.local_indices(len(prompts))
        now, _ = encoder.encode([prompts[i] for i in local])
        before = data.collate([anchor_embeds[prompts[i]] for i in local])[0].to(now)
        size = sum(anchor_embeds[p].float().square().sum() for p in prompts).to(now) * (world.size // world.dp_size)
        moved = (now.float() - before.float()).square().sum() / size * (fraction > 0)
        (args.anchor * moved).backward()
        return moved.item()

    def save_all(step):
        with state.averaged():
            tensors = encoder_tensors(encoder, trained, ids, args.save, runtime.dtype, world.is_main)
            if args.save == "comfyui" and world.is_main:
                tensors = in_layout(tensors, "comfyui", spiece)
            metadata = {
                "step": step,
                "keywords": ",".join(args.keywords),
                "delta": args.save == "delta",
                "format": "pt",
            }
            if world.is_main:
                save(run.out / "text_encoder.safetensors", tensors, metadata)
        state.save(run, step)

    # training
    finished = fit(
        args,
        run,
        models,
        dataset,
        state,
        schedule,
        dict.fromkeys(schedule, params),
        encoder.encode,
        show_caption,
        evaluate=lambda step: evaluate(args, state, dataset, previews, schedule, encoder.encode, step, encoder),
        save=save_all,
        extra_loss=anchor_loss if args.anchor else None,
    )
    if finished:
        print(need.compare(args.device), run.out / "text_encoder.safetensors", sep="\n")


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


if __name__ == "__main__":
    cli(main)
