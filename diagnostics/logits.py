"""diag.py logits: compare the attention logits of a checkpoint before and after a LoRA or an updated text encoder."""

import contextlib
import math
from pathlib import Path
from types import SimpleNamespace

import torch

from data import DataConfig, Dataset, eval_batches
from diagnostics.common import runtime, write_json
from kernels import ops
from nano.default_clips import default_clips
from nanowan.errors import BadInput, check_at_least
from nanowan.pipeline import Pipeline, Runtime
from nanowan.training.flags import check_data, data_source, expert_schedule, recommended_flags


@torch.no_grad()
def attention_stats(q, k, bias=None, chunk=512):
    """Return a tensor (N,3) with three numbers for each head: the standard deviation of the logits q k / sqrt(d), their
    maximum, and the mean entropy of the attention in nats. The entropy is that of the attention with the bias; the
    other two numbers leave out every key whose bias is not 0, such as a masked key. q (B,L,N,d), k (B,S,N,d), bias
    (B or 1,1,L or 1,S): added to the logits. The arithmetic is fp32. chunk: number of queries that are computed at
    once.
    """
    bias = torch.zeros(1, 1, 1, 1, device=q.device) if bias is None else bias.float()
    bias = bias.expand(len(q), 1, q.shape[1], k.shape[1])
    n = total = square = entropy = 0
    top = torch.full((q.shape[2],), -math.inf, device=q.device)
    for part, added in zip(q.float().split(chunk, 1), bias.split(chunk, 2)):
        logits, real = torch.einsum("blnd,bsnd->bnls", part, k.float()) * q.shape[3] ** -0.5, added == 0
        counted = torch.where(real, logits, 0).double()
        total, square = total + counted.sum((0, 2, 3)), square + counted.square().sum((0, 2, 3))
        n += int(real.sum())
        top = torch.maximum(top, logits.masked_fill(~real, -math.inf).amax((0, 2, 3)))
        logp = torch.log_softmax(logits + added, -1)
        entropy = entropy - torch.where(logp == -math.inf, 0, logp.exp() * logp).sum((0, 2, 3))
    std = (square / n - (total / n).square()).clamp(min=0).sqrt().float()
    return torch.stack([std, top, entropy / (q.shape[0] * q.shape[1])], 1).cpu()


@contextlib.contextmanager
def record_attention(model):
    """Return a context that gives a dictionary {(block, kind): [(N,3), ...]}. Within the context, every call of an
    attention in the model appends the attention's attention_stats to the dictionary. kind: "self_attn" or "cross_attn";
    in Animate also "image_attn", the attention to the picture; in S2V also "audio_attn", the audio injectors. The
    statistics are computed from an attention's inputs, whatever kernel the attention itself uses.
    """
    stats, hooks = {}, []

    def normed(module, projections, norms, rope=()):
        weights = [norm.weight for norm in norms]
        return ops.qk_norm_rope(projections, weights, module.eps, module.heads, *rope)

    def on_self_attention(block):
        def hook(module, args):
            x, rope = args[:2]
            norms = module.norm_q, module.norm_k
            q, k = normed(module, [module.q(x), module.k(x)], norms, (rope.table, rope.positions))
            as_dense = getattr(rope.attention, "as_dense", None)  # Animate-2 has further keys, those of a driving video
            k, bias = as_dense(k) if as_dense else (k, None)
            stats.setdefault((block, "self_attn"), []).append(attention_stats(q, k, bias))

        return hook

    def on_cross_attention(block, kind):
        def hook(module, args):
            x, (k, _, *image), bias = args[:3]
            (q,) = normed(module, [module.q(x)], [module.norm_q])
            stats.setdefault((block, kind), []).append(attention_stats(q, k, bias))
            if image:
                stats.setdefault((block, "image_attn"), []).append(attention_stats(q, image[0]))

        return hook

    for i, block in enumerate(model.blocks):
        hooks.append(block.self_attn.register_forward_pre_hook(on_self_attention(i)))
    for i, kind, attention in model.cross_attentions():
        hooks.append(attention.register_forward_pre_hook(on_cross_attention(i, kind)))
    try:
        yield stats
    finally:
        for hook in hooks:
            hook.remove()


def logit_rows(before, after):
    """Return a list of {"block", "kind", "head", "std", "max", "entropy", "drift"} that compares two dictionaries from
    record_attention. std, max and entropy are lists [before, after]. drift: the largest relative change of the three,
    |after - before| / max(|before|, 0.1); NaN if any of the three is NaN.
    """
    rows = []
    for (block, kind), stats in before.items():
        a, b = torch.stack(stats), torch.stack(after[block, kind])
        a, b = (torch.stack([s[..., 0].mean(0), s[..., 1].amax(0), s[..., 2].mean(0)], 1) for s in (a, b))  # (N,3)
        change = ((b - a).abs() / a.abs().clamp(min=0.1)).amax(1)
        for head, (old, new) in enumerate(zip(a.tolist(), b.tolist())):
            values = dict(zip(("std", "max", "entropy"), map(list, zip(old, new))))
            rows.append({"block": block, "kind": kind, "head": head, **values, "drift": change[head].item()})
    return rows


def open_dataset(pipe, limit=None, data=None, cache=None, resolution=None, frames=None):
    """Return the Dataset that train_lora.py would make of `data` with --batch 1, --held_out 0 and --caption_dropout 0.
    An argument that is None gets train_lora.py's default. limit: the largest number of samples, or None for all.
    """
    s = pipe.settings
    sizes = {"resolution": resolution, "frames": frames}
    values = recommended_flags(s, "train_lora") | {k: v for k, v in sizes.items() if v is not None}
    check_data(data, pipe)
    sets = [{"source": data}] if isinstance(data, str | Path) else data or [{"source": default_clips()}]
    source, flags = Path(sets[0]["source"]), SimpleNamespace(clip_mode="first", **values)
    config = DataConfig(
        sources=tuple(data_source(row, flags, s) for row in sets),
        cache=Path(cache or (source if source.is_dir() else source.parent) / "cache"),
        held_out=0.0,
        batch=1,
        accumulate=1,
        seed=0,
        shift=s.shift,
        t_distribution="logit-normal",
        caption_dropout=0.0,
        i2v_prob=0.0,
        continuation=0.5 if s.conditioning.by_segments else None,
    )
    return Dataset(config, pipe, limit)


def logits(ckpt, loras=(), text_encoder=None, n=4, device="cpu", dtype=torch.float32, base_encoder=None, **where):
    """Compare the attention logits of a checkpoint before and after LoRAs or another text encoder, on n samples of a
    dataset, at four timesteps with fixed noise. Returns {expert: what logit_rows returns}. base_encoder: the text
    encoder before the change (default: the checkpoint's own). where: keyword arguments of open_dataset.
    """
    # open both Pipelines first, so that a file that does not fit is refused before any work
    sides = [
        Pipeline(ckpt, Runtime(device, dtype), *changes) for changes in (((), base_encoder), (loras, text_encoder))
    ]
    stats = {}
    for pipe in sides:
        dataset = open_dataset(pipe, n, **where)
        dataset.cache_latents()
        texts = {item.captions[0]: pipe.encode_prompts([item.captions[0]]) for item in dataset.items}
        pipe.drop("text")
        schedule = expert_schedule("both" if pipe.settings.is_moe else None, pipe.settings)
        for name, (low, high) in schedule.items():
            model = pipe.acquire(name)
            with torch.no_grad(), record_attention(model) as recorded:
                shift = pipe.settings.shift
                for _, batch in eval_batches(dataset.items, dataset.files, dataset.samples, shift, low, high):
                    batch.loss(model, *texts[batch.captions[0]])
            stats.setdefault(name, []).append(recorded)
            model = None  # so that the model can be evicted for the other expert
        pipe.drop()
    return {name: logit_rows(before, after) for name, (before, after) in stats.items()}


def drifts(row, threshold):
    """Return whether a head's drift is larger than `threshold` or NaN. row: an element of what logit_rows returns."""
    return not row["drift"] <= threshold


def show_logits(name, rows, threshold):
    print(f"{name}: attention logits before -> after, mean over heads (drift: the largest of a head)")
    for block, kind in dict.fromkeys((r["block"], r["kind"]) for r in rows):
        here = [r for r in rows if (r["block"], r["kind"]) == (block, kind)]
        worst = max(here, key=lambda r: math.inf if math.isnan(r["drift"]) else r["drift"])
        columns = []
        for key in ("std", "max", "entropy"):
            before, after = (sum(r[key][i] for r in here) / len(here) for i in range(2))
            columns.append(f"{key} {before:8.3f} -> {after:8.3f}")
        print(
            f"  block {block:<3} {kind:<10} {'  '.join(columns)}  drift {worst['drift']:.3f} (head {worst['head']})"
            + "  <-- drifts" * drifts(worst, threshold)
        )


def run(args):
    if not args.lora and not args.text_encoder:
        raise BadInput("give --lora, --text_encoder, or both: what is to be compared with the checkpoint")
    check_at_least(1, n=args.n)
    check_at_least(0, threshold=args.threshold)
    how, where = runtime(args), {key: getattr(args, key) for key in ("data", "cache", "resolution", "frames")}
    rows_of = logits(args.ckpt, args.lora, args.text_encoder, args.n, how.device, how.dtype, **where)
    for name, rows in rows_of.items():
        show_logits(name, rows, args.threshold)
    write_json(args.json, rows_of)
    drifting = sum(drifts(r, args.threshold) for rows in rows_of.values() for r in rows)
    print(f"{drifting} of {sum(map(len, rows_of.values()))} heads drift by more than {args.threshold:g}")
    if args.ci and drifting:
        raise BadInput(f"{drifting} heads drift by more than --threshold {args.threshold:g}")
