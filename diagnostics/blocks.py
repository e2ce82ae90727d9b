"""diag.py blocks: measure which of the DiT's blocks read a word, by hiding the word from one block at a time.

The more a prediction changes when a block cannot see the word's tokens, the more that block reads the word. This is a
measured basis for choosing --blocks. DiT-BlockSkip (Das et al., 2026, arXiv 2603.20755) also masks cross-attention to
choose the blocks to train.
"""

import contextlib
import math
import statistics
from dataclasses import replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import eval_batches
from diagnostics.common import runtime, write_json
from diagnostics.logits import open_dataset
from nanowan import cache
from nanowan.errors import BadInput, check_at_least
from nanowan.pipeline import Pipeline
from nanowan.training.captions import has_keyword, spans
from nanowan.training.flags import comma_list, expert_schedule

SHARE = 0.8  # the proposed blocks hold at least this share of the summed effects of all blocks


def keyword_tokens(caption, keyword, tokenizer):
    """Return a mask (L,) bool over the tokens of a caption: True for each token that contains at least one character of
    the keyword. The encoder cuts off long captions; for a keyword in the part cut off, the mask is False everywhere.
    """
    mask = []
    for part in filter(None, tokenizer.split.split(tokenizer.clean(caption))):
        ids = tokenizer.ids(part)
        if part in tokenizer.special:
            mask += [bool(spans(part, keyword))] * len(ids)
            continue
        pieces = [tokenizer.pieces.id_to_piece(i).replace("\u2581", " ") for i in ids]
        at = spans("".join(pieces), keyword)
        mask += [
            any(end > a and end - len(p) < b for a, b in at) for p, end in zip(pieces, accumulate(map(len, pieces)))
        ]
    return torch.tensor([*mask[: tokenizer.length - 1], False])  # the last is the end token


@contextlib.contextmanager
def hide_tokens(attention, hidden):
    """Return a context within which the CrossAttention `attention` ignores the text tokens that are True in `hidden`
    (S,) bool. Information that the text encoder has carried from the hidden tokens into other tokens stays visible.
    """

    def hook(module, args):
        x, kv, bias = args
        mask = F.pad(hidden, (0, bias.shape[3] - len(hidden))).to(bias.device)  # the last keys replace padding tokens
        return x, kv, bias.masked_fill(mask, -math.inf)

    handle = attention.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def samples_with(dataset, keyword, n, tokenizer):
    """Return at most n pairs (Item, mask), each from a different file. The Item's only caption contains the keyword;
    the mask is keyword_tokens of this caption. Raises BadInput if no caption has the keyword in the part that the
    encoder reads.
    """
    samples = {}
    for item in sorted(dataset.items, key=lambda item: item.digest):
        for caption in item.captions:
            if has_keyword(caption, [keyword]) and (tokens := keyword_tokens(caption, keyword, tokenizer)).any():
                samples.setdefault(item.path, (replace(item, captions=[caption]), tokens))
    if not samples:
        raise BadInput(f"--keywords {keyword}: no caption of --data holds it where it is read")
    return list(samples.values())[:n]


def loss_of(batch, velocity, text):
    """Return the loss of a Batch with `velocity` as the model's prediction. text: the embeddings and their lengths."""
    return batch.loss(lambda *_, **__: velocity, *text).item()


@torch.no_grad()
def sample_effects(model, batches, text, hidden):
    """Return a tensor (blocks,2): for each block, the relative change of the velocity and the rise of the loss when the
    text tokens marked in `hidden` are hidden from this block. Both are means over the Batches. text: the embeddings of
    the caption and their lengths.
    """
    rows = []
    for batch in batches:
        inputs = {k: v.to(text[0].device) for k, v in batch.inputs.items()}
        batch = batch._replace(inputs=model.prepare_inputs(**inputs))  # the prompt of a driving video stays visible
        whole = batch.velocity(model, *text)
        for block in model.blocks:
            with hide_tokens(block.cross_attn, hidden):
                v = batch.velocity(model, *text)
            change = ((v - whole).norm() / whole.norm()).item()
            rows.append((change, loss_of(batch, v, text) - loss_of(batch, whole, text)))
    return torch.tensor(rows).view(-1, len(model.blocks), 2).mean(0)


def block_effects(pipe, keywords, n=4, **where):
    """Measure how a Pipeline's predictions change when a keyword is hidden from one block. Each keyword is measured on
    at most n samples whose captions contain the keyword, at four timesteps with fixed noise.

    Returns {expert: [{"keyword", "block", "n", "change", "change_sd", "loss", "loss_sd"}]}, where "n" is the number of
    samples. change: ||v' - v|| / ||v||, with the velocity v' when the keyword is hidden and v when it is not. loss: the
    rise of the loss. Both are means over the timesteps of each sample, and then over the samples. change_sd, loss_sd:
    the standard deviations between samples, or None for a single sample. where: keyword arguments of open_dataset.
    Raises BadInput for a keyword that no caption has in the part that the encoder reads.
    """
    dataset, tokenizer, s = open_dataset(pipe, **where), pipe.acquire("text").tokenizer, pipe.settings
    shown = {keyword: samples_with(dataset, keyword, n, tokenizer) for keyword in keywords}
    items = [item for samples in shown.values() for item, _ in samples]
    texts = {item.captions[0]: pipe.encode_prompts(item.captions) for item in items}
    pipe.drop("text")
    kept = dataset.config.cache, pipe.files("vae")[0]
    for path, reason in cache.cache_latents(items, *kept, lambda: pipe.acquire("vae"), dataset.samples):
        raise BadInput(f"--data {path}: {reason}")
    pipe.drop("vae", *s.conditioning.encoders)

    effects = {}
    for expert, (low, high) in expert_schedule("both" if s.is_moe else None, s).items():
        effects[expert], model = [], pipe.acquire(expert)
        for keyword, samples in shown.items():
            changes = []
            for item, hidden in tqdm(samples, desc=f"{expert} {keyword}", unit="sample"):
                files = cache.latent_files([item], *kept, dataset.samples)
                batches = [batch for _, batch in eval_batches([item], files, dataset.samples, s.shift, low, high)]
                changes.append(sample_effects(model, batches, texts[item.captions[0]], hidden))
            for block, (change, loss) in enumerate(torch.stack(changes).permute(1, 2, 0).tolist()):
                row = {"keyword": keyword, "block": block, "n": len(changes)}
                for what, values in (("change", change), ("loss", loss)):
                    sd = statistics.stdev(values) if len(values) > 1 else None
                    row |= {what: statistics.fmean(values), f"{what}_sd": sd}
                effects[expert].append(row)
        model = None  # so that the model can be evicted for the other expert
    return effects


def shortest_run(effects, share=SHARE):
    """Return (first, last, share) of the shortest range of consecutive blocks whose effects sum to at least `share` of
    the sum over all blocks. Among ranges of that length, return the one with the largest sum. The returned share is
    that sum, divided by the sum over all blocks. Return None if the sum over all blocks is not positive. effects: a
    number for each block.
    """
    count, total = len(effects), sum(effects)
    if not total > 0:
        return None
    runs = [(n, -sum(effects[i : i + n]), i) for n in range(1, count + 1) for i in range(count - n + 1)]
    length, held, first = min(run for run in runs if -run[1] >= share * total)
    return first, first + length - 1, -held / total


def mean_change(effects):
    """Return a list with the mean change of each block over all experts and keywords. effects: what block_effects
    returns.
    """
    rows = [row for expert in effects.values() for row in expert]
    blocks = range(1 + max(row["block"] for row in rows))
    return [statistics.fmean(row["change"] for row in rows if row["block"] == block) for block in blocks]


def show_effects(effects):
    for expert, rows in effects.items():
        for keyword in dict.fromkeys(row["keyword"] for row in rows):
            here = [row for row in rows if row["keyword"] == keyword]
            print(
                f"{expert}, {keyword!r} hidden from one block, {here[0]['n']} samples: change of velocity, rise of loss"
            )
            for row in here:
                cells = []
                for what, digits in (("change", 4), ("loss", 5)):
                    sd = row[f"{what}_sd"]
                    cells.append(f"{row[what]:+.{digits}f}" + (f" +- {sd:.{digits}f}" if sd is not None else ""))
                print(f"  block {row['block']:<3} {'   '.join(cells)}")


def run(args):
    check_at_least(1, n=args.n)
    keywords = comma_list(args.keywords)
    if not keywords:
        raise BadInput(f"--keywords {args.keywords}: give the words to look for, such as crimson,wedge")
    where = {key: getattr(args, key) for key in ("data", "cache", "resolution", "frames")}
    effects = block_effects(Pipeline(args.ckpt, runtime(args), args.lora, args.text_encoder), keywords, args.n, **where)
    show_effects(effects)
    shortest = shortest_run(mean_change(effects))
    if shortest:
        first, last, held = shortest
        print(f"--blocks {first}-{last}: the shortest range that holds {SHARE:.0%} of the change; it holds {held:.0%}")
    else:
        print("no prediction depends on these words")
    write_json(args.json, {"effects": effects, "blocks": shortest and [*shortest[:2]]})
