"""Account for models and changes.

python diag.py inspect PATH... [--json FILE]          what is in checkpoint folders, weight files, LoRA files and mp4s;
headers only
python diag.py plan train_lora|train_te|sample FLAGS  memory and disk of a run; --ckpt may also be ti2v-5B, t2v-A14B or
i2v-A14B
python diag.py delta FILE --ckpt DIR                  how far a LoRA, or another checkpoint or encoder, moves each
weight
python diag.py delta LORA --ckpt DIR --cap 0.02 --out FILE      and write a copy held to that
python diag.py logits --ckpt DIR --lora FILE          attention logits per block and head, before and after; --ci fails
on drift
python diag.py drift OLD NEW --prompts FILE           how far a text encoder's embeddings moved, and what its words are
near
python diag.py listen --ckpt DIR --lora FILE          does the model follow its prompts better? nano: graded; others: a
contact sheet
python diag.py reuse --ckpt DIR --prompts FILE        what sample.py --reuse saves and costs, at several thresholds
python diag.py report RUN                             everything about a training run in one HTML file
"""

import argparse
import base64
import contextlib
import html
import io
import json
import math
import re
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F

import fp8
import nano
import ops
import plan
import sample
import train_lora
import train_te
from checkpoint import BadInput, atomic, clean_key, cli, count_blocks, load, read_header, read_headers, weight_files
from data import CLIPS
from denoising import EasyCache, decode
from lora import TARGETS, check_fit, write_changes
from lora_files import describe, read_lora
from media import write_grid
from models import DTYPES, Models, Runtime, checkpoint_dir, parse_size, pick_device, pick_dtype, released, settings
from sample import read_prompts, sample_latents
from t5 import encoder_files, load_t5
from train import Dataset, eval_batches, expert_schedule
from wan import VARIANTS, full_config, read_config

BUDGETS = {
    "cross_attn.{k,v}": ("cross_attn.k", "cross_attn.v"),
    "cross_attn.{q,k,v,o}": TARGETS[4:8],
    "self_attn and cross_attn": TARGETS[:8],
    "self_attn, cross_attn and ffn": TARGETS,
}
RANKS = (4, 8, 16, 32, 64)
EXPERTS = ("high_noise_model", "low_noise_model")


def totals(entries):
    kinds = Counter()
    for e in entries.values():
        kinds[str(e.dtype).removeprefix("torch.")] += e.numel
    return {
        "parameters": sum(kinds.values()),
        "tensors": len(entries),
        "dtype": kinds.most_common(1)[0][0] if kinds else None,
        "dtypes": dict(kinds),
        "bytes": sum(e.nbytes for e in entries.values()),
    }


def lora_budget(entries):
    """What adapters on this DiT would cost: rows of targets x rank."""
    rows = []
    for name, targets in BUDGETS.items():
        shapes = [
            e.shape
            for k, e in entries.items()
            if re.fullmatch(r"blocks\.\d+\.(" + "|".join(map(re.escape, targets)) + r")\.weight", k)
        ]
        for rank in RANKS:
            params = sum(rank * (a + b) for a, b in shapes)
            rows.append(
                {
                    "targets": name,
                    "rank": rank,
                    "matrices": len(shapes),
                    "parameters": params,
                    "mib_bf16": round(params * 2 / 2**20, 4),
                }
            )
    return rows


def inspect_dit(path, entries):
    c = read_config(path, entries)
    size = (c.model_type, c.dim, c.num_layers, c.in_dim, c.out_dim)
    variant = next(
        (
            n
            for n, v in VARIANTS.items()
            if (v["model_type"], v["dim"], v["num_layers"], v["in_dim"], v["out_dim"]) == size
        ),
        None,
    )
    blocks = {
        t: len({k.split(".")[1] for k in entries if re.fullmatch(rf"blocks\.\d+\.{re.escape(t)}\.weight", k)})
        for t in TARGETS
    }
    image_keys = [k for k in entries if "img_emb" in k or "_img." in k]
    whole = all(n == c.num_layers for n in blocks.values())
    text = (
        f"a {c.model_type.upper()} DiT {'of the released size ' + variant if variant else 'of no released size'}, "
        + (
            f"{len(image_keys)} image-conditioning keys"
            if image_keys
            else "no image-conditioning keys"
            + (" (the image comes in through its extra input channels)" if c.model_type == "i2v" else "")
        )
        + (
            "; every block has self- and cross-attention and a feed-forward net"
            if whole
            else "; some blocks lack projections"
        )
    )
    return {
        "kind": "dit",
        "variant": variant,
        "model_type": c.model_type,
        "width": c.dim,
        "layers": c.num_layers,
        "heads": c.num_heads,
        "head_dim": c.dim // c.num_heads,
        "ffn": c.ffn_dim,
        "in_channels": c.in_dim,
        "out_channels": c.out_dim,
        "text_dim": c.text_dim,
        "text_len": c.text_len,
        **totals(entries),
        "blocks_with": blocks,
        "image_conditioning_keys": bool(image_keys),
        "lora_budget": lora_budget(entries),
        "summary": text,
    }


def inspect_lora(entries, lora):
    """entries: {key: Entry} of the file; lora: what lora_files.describe says of it."""
    blocks = lora["blocks"]
    text = "a LoRA: " + ", ".join(f"{form} {n}" for form, n in lora["forms"].items())
    if lora["ranks"]:
        text += f", rank {', '.join(map(str, lora['ranks']))}"
    if blocks:
        text += f", on {', '.join(lora['targets'])} of {len(blocks)} blocks ({blocks[0]} to {blocks[-1]})"
    if lora["elsewhere"]:
        text += f", {len(lora['elsewhere'])} outside of blocks"
    if lora["expert"]:
        text += f"; for {lora['expert']} noise ({lora['expert_from']})"
    if lora["problem"]:
        text += f"; not read: {lora['problem']}"
    return {"kind": "lora", "matrices": sum(lora["forms"].values()), **lora, **totals(entries), "summary": text}


def inspect_file(path):
    """One weight file, or the several of one model (a list of shards beside each other)."""
    files = weight_files(path)
    entries, metadata = {}, {}
    for file in files:
        part, meta = read_header(file)
        entries |= {clean_key(k): e for k, e in part.items()}
        metadata |= meta
    if len(files) == 1 and (lora := describe(files[0])):
        return inspect_lora(entries, lora)
    if {"patch_embedding.weight", "head.head.weight", "blocks.0.ffn.0.weight"} <= set(entries):
        return inspect_dit(path, entries)
    if {"token_embedding.weight", "blocks.0.ffn.fc1.weight", "blocks.0.pos_embedding.embedding.weight"} <= set(entries):
        vocab, width = entries["token_embedding.weight"].shape
        layers, heads = count_blocks(entries), entries["blocks.0.pos_embedding.embedding.weight"].shape[1]
        return {
            "kind": "text_encoder",
            "vocabulary": vocab,
            "width": width,
            "layers": layers,
            "heads": heads,
            "ffn": entries["blocks.0.ffn.fc1.weight"].shape[0],
            **totals(entries),
            "summary": f"a UMT5 encoder of {layers} layers, width {width}, {vocab:,} pieces; each layer has its own position table",
        }
    if {"encoder.conv1.weight", "conv2.weight", "decoder.head.2.weight"} <= set(entries):
        v22 = entries["encoder.conv1.weight"].shape[1] == 12
        z = entries["conv2.weight"].shape[0]
        return {
            "kind": "vae",
            "variant": "2.2" if v22 else "2.1",
            "z_channels": z,
            "encoder_width": entries["encoder.conv1.weight"].shape[0],
            "decoder_width": entries["decoder.head.2.weight"].shape[1],
            "stride": [4, 16, 16] if v22 else [4, 8, 8],
            **totals(entries),
            "summary": f"a Wan {'2.2' if v22 else '2.1'} VAE, {z} latent channels, stride {'4x16x16' if v22 else '4x8x8'}",
        }
    return {
        "kind": "unknown",
        **totals(entries),
        "summary": f"no model known here; its first keys are {', '.join(list(entries)[:3])}",
    }


def inspect_video(path):
    import av

    try:
        with av.open(str(path)) as f:
            v = f.streams.video[0]
            comment = f.metadata.get("comment", "")
            info = {
                "width": v.width,
                "height": v.height,
                "frames": v.frames or None,
                "fps": float(v.average_rate or 0),
                "codec": v.codec_context.name,
                "bytes": path.stat().st_size,
            }
    except (av.FFmpegError, IndexError, OSError) as e:
        raise BadInput(f"{path}: not a readable video ({e})") from None
    try:
        told = json.loads(comment)
    except ValueError:
        told = {}
    told = told if isinstance(told, dict) else {}
    text = (
        f"{info['frames'] or 'an unknown number of'} frames of {info['width']}x{info['height']} at {info['fps']:g} fps"
        + (
            f", made from the prompt {told['prompt']!r} with seed {told.get('seed')}"
            if "prompt" in told
            else ", without generation settings"
        )
    )
    return {"kind": "video", **info, "settings": told, "summary": text}


def inspect(path):
    """Everything at a path: a list of dictionaries, one per model, LoRA or video. Reads headers, never a tensor."""
    path = Path(path)
    if path.is_file():
        one = inspect_video(path) if path.suffix.lower() in CLIPS else inspect_file(path)
        return [{"path": str(path), **one}]
    if not path.is_dir():
        raise BadInput(f"{path}: no such file or folder")
    experts = [d for d in EXPERTS if (path / d).is_dir()]
    missing = [d for d in EXPERTS if experts and d not in experts]
    found = []
    for folder in [path / d for d in experts] or ([path] if any(path.glob("diffusion_pytorch_model*")) else []):
        one = inspect_file(folder)
        which = f"; experts found: {', '.join(experts)}" if experts else ""
        which += f"; {missing[0]} is missing" if missing else ""
        found.append(
            {
                "path": str(folder),
                "experts": experts,
                **one,
                "summary": ("" if experts else "single-tower, ") + one["summary"] + which,
            }
        )
    files = [
        f
        for pattern in ("models_t5*", "*VAE*")
        for f in sorted(path.glob(pattern))
        if f.suffix in (".pth", ".safetensors")
    ]
    if not found and not files:
        files = sorted(path.glob("*.safetensors"))
    found += [{"path": str(f), **inspect_file(f)} for f in files]
    if not found:
        raise BadInput(
            f"{path}: holds no weights known here (diffusion_pytorch_model*, high_noise_model, models_t5*, *VAE*, *.safetensors)"
        )
    return found


def show(one):
    print(f"{one['path']}\n  {one['summary']}")
    if one["kind"] == "dit":
        print(
            "  width {width}, layers {layers}, heads {heads} x {head_dim}, ffn {ffn}, channels {in_channels} -> {out_channels}, text {text_len} x {text_dim}".format(
                **one
            )
        )
        print("  blocks with " + ", ".join(f"{t} {n}" for t, n in one["blocks_with"].items()))
    if one["kind"] in ("lora", "video"):
        print("  " + json.dumps(one["metadata" if one["kind"] == "lora" else "settings"], ensure_ascii=False))
    if "parameters" in one:
        print(
            f"  {one['parameters']:,} parameters in {one['tensors']} tensors, {one['bytes']:,} bytes, mostly {one['dtype']}"
        )
    if one.get("lora_budget"):
        print(f"  {'LoRA on':30} {'rank':>5} {'matrices':>9} {'parameters':>12} {'MiB (bf16)':>11}")
        for r in one["lora_budget"]:
            print(f"  {r['targets']:30} {r['rank']:5} {r['matrices']:9} {r['parameters']:12,} {r['mib_bf16']:11.2f}")


# ---- delta -------------------------------------------------------------------------------------------------------
def factor_norms(a, b):
    """Of dW = B A, from its factors A (r,in) and B (out,r) alone: Frobenius norm, spectral norm, and effective rank,
    the exponential of the entropy of its normalised singular values (Roy and Vetterli, 2007). The singular values are
    those of the r x r matrix R_B R_A^T of the two QR decompositions.
    """
    values = torch.linalg.svdvals(torch.linalg.qr(b.double()).R @ torch.linalg.qr(a.double().t()).R.t())
    share = values / values.sum().clamp(min=1e-300)
    entropy = -(share * share.clamp(min=1e-300).log()).sum()
    return values.norm().item(), values[0].item(), entropy.exp().item() if values[0] > 0 else 0.0


def delta(file, ckpt):
    """How far a LoRA file, or another checkpoint or encoder, moves each weight of `ckpt` (a DiT's folder or file, or an
    encoder's file).

    A row {"name", "kind", "block" (None outside the blocks), "norm", "base", "ratio", "spectral", "rank"} per matrix,
    where ratio is ||dW||_F / ||W||_F. One matrix of the base is read at a time. Of a LoRA dW is never formed; between
    two checkpoints the spectral norm comes from 50 power iterations, and there is no effective rank.
    """
    entries = read_headers(weight_files(ckpt))
    scales = fp8.take_scales(entries)
    read = lambda name: (
        entries[f"{name}.weight"].read().float() * (scales[name].read().float().reshape(-1, 1) if name in scales else 1)
    )
    new = read_headers(weight_files(file))
    rows = []

    def row(name, w, found):
        base = w.norm().item()
        block = re.match(r"blocks\.(\d+)\.(.+)", name)
        rows.append(
            {
                "name": name,
                "kind": block.group(2) if block else name,
                "block": int(block.group(1)) if block else None,
                "norm": found[0],
                "base": base,
                "ratio": found[0] / base if base else math.inf,
                "spectral": found[1],
                "rank": found[2],
            }
        )

    if Path(file).is_file() and describe(file):
        for parameter, change in check_fit(file, read_lora(file)[0], {n: e.shape for n, e in entries.items()}).items():
            pair = change.factors()
            found = factor_norms(*pair) if pair else dense_norms(change.dense().reshape(change.shape[0], -1))
            name = parameter.removesuffix(".weight")
            row(name, read(name) if name != parameter else entries[parameter].read().float(), found)
    else:
        ids, moved = new.pop("token_embedding.ids", None), new.pop("token_embedding.rows", None)
        stray = [k for k in new if k not in entries or entries[k].shape != new[k].shape]
        if stray:
            raise BadInput(
                f"{file}: {stray[0]} {new[stray[0]].shape} does not fit {ckpt} ({entries[stray[0]].shape if stray[0] in entries else 'no such weight'})"
            )
        for name, entry in new.items():
            if len(entry.shape) > 1:
                w = entries[name].read().float()
                row(name.removesuffix(".weight"), w, dense_norms(entry.read().float() - w))
        if ids:
            table = entries["token_embedding.weight"].read().float()
            row("token_embedding", table, dense_norms(moved.read().float() - table[ids.read()]))
    return sorted(rows, key=lambda r: (math.inf if r["block"] is None else r["block"], r["kind"]))


def dense_norms(d):
    """Frobenius and spectral norm of a matrix, convolutions flattened, and None for the rank that would need all
    singular values.
    """
    d = d.flatten(1)
    v = torch.randn(d.shape[1], generator=torch.Generator().manual_seed(0))
    for _ in range(50):
        v = F.normalize(d.t() @ (d @ v), dim=0)
    return d.norm().item(), (d @ v).norm().item(), None


def together(rows):
    """||dW|| / ||W|| of several matrices taken as one."""
    return math.hypot(*(r["norm"] for r in rows)) / math.hypot(*(r["base"] for r in rows))


def show_delta(rows):
    loose = [r for r in rows if r["block"] is None]
    for r in loose:
        print(f"||dW||/||W|| {100 * r['ratio']:.3f} % {r['name']}")
    rows = [r for r in rows if r["block"] is not None]
    if not rows:
        return
    kinds, blocks = sorted({r["kind"] for r in rows}), sorted({r["block"] for r in rows})
    print("||dW||/||W|| in percent" + "".join(f"{k:>14}" for k in kinds) + f"{'together':>14}")
    for block in blocks:
        here = {r["kind"]: r["ratio"] for r in rows if r["block"] == block}
        print(
            f"  block {block:<15}"
            + "".join(f"{100 * here[k]:14.3f}" if k in here else " " * 14 for k in kinds)
            + f"{100 * together([r for r in rows if r['block'] == block]):14.3f}"
        )
    print(
        f"  {'together':<21}"
        + "".join(f"{100 * together([r for r in rows if r['kind'] == k]):14.3f}" for k in kinds)
        + f"{100 * together(rows):14.3f}"
    )
    top = max(rows, key=lambda r: r["ratio"])
    ranks = [r["rank"] for r in rows if r["rank"] is not None]
    print(
        f"  largest: {top['name']} {100 * top['ratio']:.3f} %; spectral norm up to {max(r['spectral'] for r in rows):.4g}"
        + (f"; effective rank {min(ranks):.1f} to {max(ranks):.1f}" if ranks else "")
    )


def cap_lora(lora, rows, cap, out):
    """Write a copy of a LoRA file in which every matrix with ||dW||/||W|| above `cap` is scaled down to it. Returns how
    many were.
    """
    changes, metadata = read_lora(lora)
    scale = {r["name"]: min(1.0, cap / r["ratio"]) if r["ratio"] else 1.0 for r in rows}
    metadata = {k: v for k, v in metadata.items() if k != "lora_adapter_metadata"} | {
        "alpha_folded": True,
        "delta_cap": cap,
    }
    write_changes(out, changes, metadata, {name: scale.get(name.removesuffix(".weight"), 1.0) for name in changes})
    return sum(s < 1 for s in scale.values())


def run_delta(args):
    if (args.cap is None) != (args.out is None) or args.cap is not None and not args.cap > 0:
        raise BadInput(f"--cap {args.cap}, --out {args.out}: give both, with a cap above 0")
    base = checkpoint_dir(args.ckpt)
    if (
        base.is_dir()
        and inspect_file(args.lora)["kind"] == "text_encoder"
        or "token_embedding.ids" in read_header(args.lora)[0]
    ):
        base = encoder_files(base)[0]
    rows = delta(args.lora, base)
    show_delta(rows)
    if args.json:
        with atomic(args.json) as tmp:
            tmp.write_text(json.dumps({"rows": rows, "together": together(rows)}, indent=1) + "\n")
    if args.out:
        print(
            f"{cap_lora(args.lora, rows, args.cap, args.out)} of {len(rows)} matrices scaled down to {args.cap}: {args.out}"
        )


# ---- logits ------------------------------------------------------------------------------------------------------
@torch.no_grad()
def attention_stats(q, k, bias=None, chunk=512):
    """Per head of q (B,L,N,d), k (B,S,N,d), bias (B,1,1,S): standard deviation and maximum of the logits q k / sqrt(d),
    without keys that are masked or stand for padding, and the mean entropy, in nats, of the attention over all keys.
    Returns (N,3), fp32 arithmetic.
    """
    real = torch.ones(len(k), k.shape[1], dtype=torch.bool, device=k.device) if bias is None else bias[:, 0, 0] == 0
    n = total = square = entropy = 0
    top = torch.full((q.shape[2],), -math.inf, device=q.device)
    for part in q.float().split(chunk, 1):
        logits = torch.einsum("blnd,bsnd->bnls", part, k.float()) * q.shape[3] ** -0.5
        counted = torch.where(real[:, None, None], logits, 0).double()
        total, square = total + counted.sum((0, 2, 3)), square + counted.square().sum((0, 2, 3))
        n += part.shape[1] * int(real.sum())
        top = torch.maximum(top, logits.masked_fill(~real[:, None, None], -math.inf).amax((0, 2, 3)))
        logp = torch.log_softmax(logits if bias is None else logits + bias.float(), -1)
        entropy = entropy - torch.where(logp > -math.inf, logp.exp() * logp, 0).sum((0, 2, 3))
    std = (square / n - (total / n).square()).clamp(min=0).sqrt().float()
    return torch.stack([std, top, entropy / (q.shape[0] * q.shape[1])], 1).cpu()


@contextlib.contextmanager
def recorded(model):
    """Within, every attention of the model leaves its attention_stats in the dictionary {(block, kind): [(N,3), ...]}."""
    found, at, real = {}, [], ops.attention
    hooks = [
        getattr(b, kind).register_forward_pre_hook(lambda module, args, key=(i, kind): at.append(key))
        for i, b in enumerate(model.blocks)
        for kind in ("self_attn", "cross_attn")
    ]

    def attend(q, k, v, bias=None):
        found.setdefault(at.pop(), []).append(attention_stats(q, k, bias))
        return real(q, k, v, bias)

    try:
        with ops.using("ref"):  # whose self-attention is in two steps
            ops.attention = attend
            yield found
    finally:
        ops.attention = real
        for hook in hooks:
            hook.remove()


def logit_rows(before, after):
    """Rows {"block", "kind", "head", "std", "max", "entropy" (each [before, after]), "drift"}: drift is the largest of
    the three relative changes.
    """
    rows = []
    for key, stats in before.items():
        a, b = torch.stack(stats), torch.stack(after[key])
        a, b = (torch.stack([s[..., 0].mean(0), s[..., 1].amax(0), s[..., 2].mean(0)], 1) for s in (a, b))  # (N,3)
        change = (b - a).abs() / a.abs().clamp(min=0.1)
        for head in range(len(a)):
            pair = lambda i: [a[head, i].item(), b[head, i].item()]
            rows.append(
                {
                    "block": key[0],
                    "kind": key[1],
                    "head": head,
                    "std": pair(0),
                    "max": pair(1),
                    "entropy": pair(2),
                    "drift": change[head].max().item(),
                }
            )
    return rows


def logits(ckpt, loras=(), text_encoder=None, n=4, device="cpu", dtype=torch.float32, **where):
    """Attention logits of a checkpoint before and after an adapter or an encoder, on n samples of a dataset at four
    times under fixed noise: {expert: rows of logit_rows}. where: data, cache, resolution, frames, as the trainers take
    them.
    """
    given = [word for name, value in where.items() if value is not None for word in (f"--{name}", str(value))]
    flags, found = train_lora.arguments(["--ckpt", str(ckpt), "--held_out", "0", *given]), {}
    for changes in ({}, dict(loras=loras, text_encoder=text_encoder)):
        models = Models(ckpt, Runtime(device, dtype), **changes)
        flags.device, s = str(device), models.settings
        train_lora.resolve_flags(flags, s)
        dataset = Dataset(flags, models, limit=n)
        dataset.cache_latents()
        models.encode_prompts([i.captions[0] for i in dataset.items])
        for name, (low, high) in expert_schedule(flags, s).items():
            with torch.no_grad(), recorded(models.acquire(name)) as stats:
                for _, batch in eval_batches(dataset.items, dataset.files, s.shift, low, high):
                    batch.loss(models.acquire(name), *models.encode_prompts(batch.captions))
            found.setdefault(name, []).append(stats)
    return {name: logit_rows(*pair) for name, pair in found.items()}


def run_logits(args):
    if not args.lora and not args.text_encoder:
        raise BadInput("give --lora, --text_encoder, or both: what is to be compared with the checkpoint")
    device = pick_device(args.device)
    dtype = DTYPES[pick_dtype(args.dtype, device)]
    found = logits(
        args.ckpt,
        args.lora,
        args.text_encoder,
        args.n,
        device,
        dtype,
        data=args.data,
        cache=args.cache,
        resolution=args.resolution,
        frames=args.frames,
    )
    for name, rows in found.items():
        print(f"{name}: attention logits before -> after, mean over heads (drift: the largest of a head)")
        for block, kind in dict.fromkeys((r["block"], r["kind"]) for r in rows):
            here = [r for r in rows if (r["block"], r["kind"]) == (block, kind)]
            mean = lambda key, i: sum(r[key][i] for r in here) / len(here)
            worst = max(here, key=lambda r: r["drift"])
            print(
                f"  block {block:<3} {kind:<10} "
                + "  ".join(f"{key} {mean(key, 0):8.3f} -> {mean(key, 1):8.3f}" for key in ("std", "max", "entropy"))
                + f"  drift {worst['drift']:.3f} (head {worst['head']})"
                + ("  <-- drifts" if worst["drift"] > args.threshold else "")
            )
    if args.json:
        with atomic(args.json) as tmp:
            tmp.write_text(json.dumps(found, indent=1) + "\n")
    drifting = sum(r["drift"] > args.threshold for rows in found.values() for r in rows)
    print(f"{drifting} of {sum(map(len, found.values()))} heads drift by more than {args.threshold:g}")
    if args.ci and drifting:
        raise BadInput(f"{drifting} heads drift by more than --threshold {args.threshold:g}")


# ---- drift -------------------------------------------------------------------------------------------------------
@torch.no_grad()
def drift(old, new, prompts, keywords=(), nearest=5):
    """How far the embeddings of prompts moved between two TextEncoders with one tokenizer.

    {"prompts": [{"prompt", "cosine", "norm", "tokens": [{"token", "cosine", "norm"}]}], "keywords": {word: [(before),
    (after)]}}: cosine between before and after, of a prompt the mean over its tokens; norm: after / before; per keyword
    its `nearest` words of the prompts, each (word, cosine), by their embeddings alone, averaged over a word's tokens.
    """
    rows = []
    for prompt in prompts:
        a, b = (e.encode([prompt])[0][0].float() for e in (old, new))
        ids = old.tokenizer([prompt])[0][0].tolist()
        cosine, norm = F.cosine_similarity(a, b, dim=1).tolist(), (b.norm(dim=1) / a.norm(dim=1)).tolist()
        tokens = [
            {"token": old.tokenizer.pieces.id_to_piece(i), "cosine": c, "norm": n} for i, c, n in zip(ids, cosine, norm)
        ]
        rows.append(
            {
                "prompt": prompt,
                "cosine": sum(cosine) / len(cosine),
                "norm": (b.norm() / a.norm()).item(),
                "tokens": tokens,
            }
        )
    words = [w for w in dict.fromkeys(re.findall(r"\w+", " ".join(prompts).lower())) if w not in keywords]
    near = {}
    for word in keywords:
        near[word] = []
        for encoder in (old, new):
            mean = lambda w: encoder.encode([w])[0][0].float().mean(0)
            cosines = (
                F.cosine_similarity(torch.stack([mean(w) for w in words]), mean(word)[None]).tolist() if words else []
            )
            near[word].append(sorted(zip(words, cosines), key=lambda p: -p[1])[:nearest])
    return {"prompts": rows, "keywords": near}


def open_encoder(path, ckpt):
    """The encoder of a checkpoint folder, or a file of train_te.py over the one in `ckpt`, fp32 on the CPU."""
    path = checkpoint_dir(path)
    return (
        load_t5(path, dtype=torch.float32)
        if path.is_dir()
        else load_t5(checkpoint_dir(ckpt), dtype=torch.float32, weights=path)
    )


def run_drift(args):
    prompts = read_prompts(args.prompts) if args.prompts else [r["prompt"] for r in nano.prompts(20, 0)]
    keywords = [k.strip() for k in (args.keywords or "").split(",") if k.strip()]
    found = drift(open_encoder(args.old, args.ckpt), open_encoder(args.new, args.ckpt), prompts, keywords)
    for r in found["prompts"]:
        worst = min(r["tokens"], key=lambda t: t["cosine"])
        print(
            f"cosine {r['cosine']:.4f}  norm x {r['norm']:.3f}  {r['prompt']!r}; most moved: {worst['token']!r} {worst['cosine']:.4f}"
        )
    print(f"mean cosine {sum(r['cosine'] for r in found['prompts']) / len(prompts):.4f} over {len(prompts)} prompts")
    for word, (before, after) in found["keywords"].items():
        told = lambda near: ", ".join(f"{w} {c:.3f}" for w, c in near)
        print(f"nearest to {word!r}: before {told(before)}\n{' ' * (len(word) + 14)}after  {told(after)}")
    if args.json:
        with atomic(args.json) as tmp:
            tmp.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


# ---- reuse -------------------------------------------------------------------------------------------------------
def run_reuse(args):
    """What sample.py --reuse saves and costs at several thresholds, against the exact clips of the same seeds."""
    prompts = read_prompts(args.prompts) if args.prompts else [r["prompt"] for r in nano.prompts(4, 0)]
    device = pick_device(args.device)
    runtime = Runtime(device, DTYPES[pick_dtype(args.dtype, device)])
    models = Models(args.ckpt, runtime, args.lora, args.text_encoder)
    exact, rows = [], []
    for i, p in enumerate(prompts):
        z = sample_latents(models, [p], [i], progress=False)
        exact.append((z, decode(models, z)))
    for threshold in args.thresholds:
        computed, error, square = 0, 0.0, 0.0
        for i, (p, (z, video)) in enumerate(zip(prompts, exact)):
            reuse = EasyCache(threshold)
            other = sample_latents(models, [p], [i], progress=False, step_cache=reuse)
            computed += reuse.computed / len(prompts)
            error += ((other - z).norm() / z.norm()).item() / len(prompts)
            square += F.mse_loss(decode(models, other), video).item() / len(prompts)
        rows.append(
            {
                "threshold": threshold,
                "computed": computed,
                "steps": models.settings.steps,
                "latent_error": error,
                "psnr": -10 * math.log10(max(square, 1e-12) / 4),
            }
        )
        print(
            f"--reuse {threshold:g}: {computed:.1f} of {models.settings.steps} steps computed, latents off by {100 * error:.2f} %, video {rows[-1]['psnr']:.1f} dB",
            flush=True,
        )
    if args.json:
        with atomic(args.json) as tmp:
            tmp.write_text(json.dumps(rows, indent=1) + "\n")


# ---- listen ------------------------------------------------------------------------------------------------------
def listen(models, words, n, seed=0):
    """The grader's shares right of each new word (n prompts), of all of them pooled, and of old words' attributes (as
    many prompts as for all new words): {suite: {attribute: {"right", "n", "low", "high"}}}, with the 95 % interval.
    """
    found, pooled = {}, [0, 0]
    share = lambda right, n: {"right": right / n, "n": n, **dict(zip(("low", "high"), nano.wilson(right, n)))}
    for word in words:
        rows, kind = nano.prompts(n, seed, words=[word]), nano.NEW_WORDS[word][0]
        right = sum(g[kind] == r[kind] for g, r in zip(nano.listen(models, rows, seed)[0], rows))
        found[word], pooled = {kind: share(right, n)}, [pooled[0] + right, pooled[1] + n]
    if words:
        found["new words"] = {"pooled": share(*pooled)}
    rows = nano.prompts(n * max(1, len(words)), seed)
    graded, _ = nano.listen(models, rows, seed)
    found["old words"] = {
        kind: share(sum(g[kind] == r[kind] for g, r in zip(graded, rows)), len(rows)) for kind in nano.ATTRIBUTES
    }
    return found


def run_listen(args):
    device = pick_device(args.device)
    dtype = DTYPES[pick_dtype(args.dtype, device)]
    sides = {"before": Models(args.ckpt, Runtime(device, dtype))}
    if args.lora or args.text_encoder:
        sides["after"] = Models(args.ckpt, Runtime(device, dtype), args.lora, args.text_encoder)
        if args.skip_before:
            del sides["before"]
    if nano.gradable(next(iter(sides.values())).settings) and not args.prompts:
        words = nano.parse_words(args.words) if args.words else list(nano.NEW_WORDS)
        found = {side: listen(m, words, args.n, args.seed) for side, m in sides.items()}
        for suite, kinds in next(iter(found.values())).items():
            for kind in kinds:
                told = [
                    f"{side} {f[suite][kind]['right']:.3f} [{f[suite][kind]['low']:.3f}, {f[suite][kind]['high']:.3f}]"
                    for side, f in found.items()
                ]
                print(
                    f"{suite:10} {kind:7} "
                    + "   ".join(told)
                    + f"   n = {next(iter(found.values()))[suite][kind]['n']}"
                )
    else:
        prompts = (
            read_prompts(args.prompts)
            if args.prompts
            else ["a red fox runs through fresh snow", "a paper boat drifts down a stream"]
        )
        clips = {
            side: [decode(m, sample_latents(m, [p], [args.seed + i]))[0].cpu() for i, p in enumerate(prompts)]
            for side, m in sides.items()
        }
        order = [(side, i) for i in range(len(prompts)) for side in sides]
        write_grid(
            args.out,
            [clips[side][i] for side, i in order],
            [f"{side}: {prompts[i]}" for side, i in order],
            columns=len(sides),
        )
        found = {"prompts": prompts, "seed": args.seed, "sheet": str(args.out)}
        print(args.out)
    if args.json:
        with atomic(args.json) as tmp:
            tmp.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


# ---- plan --------------------------------------------------------------------------------------------------------
def planned(script, given, ranks=1):
    """The Plan of `script` with these flags on so many ranks. --ckpt may name a released variant, of which no file is
    needed.
    """
    args = {"train_lora": train_lora, "train_te": train_te, "sample": sample}[script].arguments(given)
    if args.ckpt in VARIANTS:
        s = released(args.ckpt)
        parts, args.device = plan.full_builders(s), args.device or "cuda"
    else:
        models = Models(args.ckpt, text_encoder=args.text_encoder)
        s, parts, args.device = models.settings, plan.builders(models), args.device or pick_device(None)
    if script == "sample":
        overrides = sample.sampling_overrides(args)
        if args.image is None and s.conditioning.needs_image:  # of the size's own aspect
            s = s.with_overrides(**overrides)
            request = sample.Request(s, None, s.size)
        else:
            request = sample.resolve(s, args.ckpt, args.image, **overrides)
        guided = "parallel" if args.guidance_parallel else "batched"
        mode, layout = guided if request.settings.guided else "none", plan.ParallelLayout.of(args, ranks)
        dtype = DTYPES[pick_dtype(args.dtype, args.device)]
        return plan.sampling(request, parts, args.device, dtype, mode, layout=layout, tile=args.vae_tile)
    with torch.device("meta"):
        blocks = len(next(iter(parts.values()))().blocks)
    previews = bool(args.previews)
    if script == "train_lora":
        train_lora.resolve(args, s, blocks)
        return train_lora.predict(args, s, parts, previews=previews, ranks=ranks)
    train_te.resolve(args, s)
    return train_te.predict(args, s, parts, previews=previews, ranks=ranks)


def ways(script, ranks, blocks):
    """Flags to try in turn, those first that cost the least time."""
    fp8, check, stream = ["--base_dtype", "fp8"], ["--checkpointing"], ["--stream_blocks", str(blocks)]
    shards = [["--fsdp"]] if ranks > 1 else []
    if script == "sample":
        fast = ["--guidance_parallel", "--ulysses_size", str(ranks // 2)] if ranks > 1 else []
        return [fast + more for more in ([], fp8, stream, fp8 + stream)]
    split = [["--fsdp", "--ulysses_size", str(u)] for u in (2, 4, 8) if u <= ranks and not ranks % u]
    if script == "train_te":
        return [[], check, *(check + f for f in shards), *(check + f for f in split)]
    return [
        [],
        check,
        *(check + f for f in shards),
        check + fp8,
        *(check + fp8 + f for f in shards),
        *(check + f for f in split),
        check + fp8 + stream,
    ]


def propose(script, given, gpus):
    """The first of `ways` that fits on GPUs given as COUNTxGB, with one sample per rank where --batch is not given:
    (flags, Plan), or BadInput.
    """
    found = re.fullmatch(r"(\d+)x(\d+)", gpus)
    if not found or not int(found[1]):
        raise BadInput(f"--gpus {gpus}: COUNTxGB, such as 8x80")
    ranks, limit = (
        int(found[1]),
        int(found[2]) * 1e9,
    )  # a card's GB are 2^30: the 7 % between are for CUDA itself and for holes
    given = given + (["--batch", "1"] if script != "sample" and "--batch" not in given else [])
    ckpt = {"train_lora": train_lora, "train_te": train_te, "sample": sample}[script].arguments(given).ckpt
    blocks = (
        full_config(ckpt).num_layers if ckpt in VARIANTS else count_blocks(next(iter(Models(ckpt).headers.values())))
    )
    least = None
    for flags in ways(script, ranks, blocks):
        need = planned(script, [*given, "--device", "cuda", *flags], ranks)
        if need.peak <= limit:
            return given + flags, need
        least = min(least or need.peak, need.peak)
    raise BadInput(
        f"--gpus {gpus}: {script}.py needs at least {least / 1e9:.1f} GB on each; a smaller --resolution, fewer --frames or a smaller --batch take less"
    )


def run_scale(args):
    """Seconds per sample of a LoRA step on 1 to 64 GPUs, by strategy."""
    if args.ckpt not in VARIANTS:
        raise BadInput(f"--ckpt {args.ckpt}: one of {', '.join(VARIANTS)}")
    c, s = full_config(args.ckpt), released(args.ckpt)
    size, frames = parse_size(args.size) if args.size else s.size, args.frames or s.frames
    grid = s.token_grid(size, frames)
    adapter = c.num_layers * 2 * 16 * 2 * c.dim * 4
    print(
        f"{args.ckpt}, {size[0]}x{size[1]}x{frames}: seconds per sample, if a GPU sustains {args.tflops:g} TFLOP/s, sends {args.inside:g} GB/s within a machine of "
        f"{args.per_machine} and {args.between:g} GB/s beyond; in brackets, GB of weights on each"
    )
    for ranks in (1, 2, 4, 8, 16, 32, 64):
        found = plan.step_times(
            c, grid, ranks, adapter, args.tflops * 1e12, args.inside * 1e9, args.between * 1e9, args.per_machine
        )
        best = min(found, key=lambda k: found[k][0])
        fits = {k: v for k, v in found.items() if v[1] <= 0.6 * args.gb * 1e9}  # the rest is for activations
        print(
            f"{ranks:3} GPUs  "
            + "  ".join(f"{k} {v[0]:.2f} ({v[1] / 1e9:.1f})" for k, v in found.items())
            + f"; fastest: {best}"
            + (
                f", and with {args.gb} GB: {min(fits, key=lambda k: fits[k][0])}"
                if fits and min(fits, key=lambda k: fits[k][0]) != best
                else f"; none has weights that fit {args.gb} GB"
                if not fits
                else ""
            )
        )


def run_plan(args):
    if args.gpus:
        flags, need = propose(args.script, args.flags, args.gpus)
        count = args.gpus.split("x")[0]
        print(
            f"{'python' if count == '1' else f'torchrun --nproc_per_node={count}'} {args.script}.py {' '.join(flags)}"
        )
    else:
        need = planned(args.script, args.flags)
    print(need)
    if args.json:
        with atomic(args.json) as tmp:
            tmp.write_text(
                json.dumps(
                    {
                        "peak": need.peak,
                        "process": need.process,
                        "phases": need.phases,
                        "disk": need.disk,
                        "host": need.host,
                    },
                    indent=1,
                )
                + "\n"
            )


# ---- report ------------------------------------------------------------------------------------------------------
def picture(draw, width=7.0, height=2.6):
    """An <img> of what draw(axes) draws, inside the page."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    draw(axes)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    pyplot.close(figure)
    return embedded(out.getvalue())


def embedded(png):
    return f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def heat(rows, value, label):
    """A picture of value(row) by block (across) and kind (down)."""
    kinds, blocks = sorted({r["kind"] for r in rows}), sorted({r["block"] for r in rows})
    grid = torch.full((len(kinds), len(blocks)), math.nan)
    for r in rows:
        i, j = kinds.index(r["kind"]), blocks.index(r["block"])
        grid[i, j] = value(r) if grid[i, j].isnan() else max(grid[i, j].item(), value(r))

    def draw(axes):
        shown = axes.imshow(grid, aspect="auto", cmap="YlOrRd", vmin=0)
        axes.set(
            xticks=range(len(blocks)), xticklabels=blocks, yticks=range(len(kinds)), yticklabels=kinds, xlabel="block"
        )
        axes.figure.colorbar(shown, label=label)

    return picture(draw, 7, 1.3 + 0.3 * len(kinds))


def html_table(head, rows):
    cell = lambda v: f"{v:.4g}" if isinstance(v, float) else html.escape(str(v))
    line = lambda cells, tag: "<tr>" + "".join(f"<{tag}>{cell(c)}</{tag}>" for c in cells) + "</tr>"
    return "<table>" + line(head, "th") + "".join(line(r, "td") for r in rows) + "</table>"


STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:860px;margin:2em auto;padding:0 1em;color:#222} h1{font-size:1.6em} h2{margin-top:2em;font-size:1.15em;
border-bottom:1px solid #ddd} img{max-width:100%;display:block;margin:.6em 0} table{border-collapse:collapse;font-size:13px} td,th{border:1px solid #ddd;padding:2px 9px;
text-align:left;overflow-wrap:anywhere} th{background:#f6f6f6} p.note{color:#666;font-size:13px}"""


def report(folder, n=20):
    """One self-contained HTML page about a training run: losses, learning rate, how far the weights, attention logits
    and embeddings moved, previews before and after, listening scores (nano, n prompts per suite), flags and versions.
    """
    folder = Path(folder)
    try:
        told, log = (
            json.loads((folder / "flags.json").read_text()),
            [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()],
        )
    except (OSError, ValueError) as e:
        raise BadInput(f"{folder}: not the --out of a training run ({e})") from None
    flags = told["flags"]
    adapters, encoder = sorted(folder.glob("adapter_model*.safetensors")), folder / "text_encoder.safetensors"
    encoder = encoder if encoder.exists() else None
    steps = [r for r in log if "loss" in r]
    parts = [
        f"<h1>{html.escape(folder.resolve().name)}</h1>",
        f"<p>{len(steps)} steps of {'train_lora.py' if adapters else 'train_te.py'}, started {told['started']}</p>",
    ]

    def losses(axes):
        x, y = [r["step"] for r in steps], [r["loss"] for r in steps]
        mean = [sum(y[max(0, i - 24) : i + 1]) / min(i + 1, 25) for i in range(len(y))]
        axes.plot(x, y, color="#ccc", linewidth=0.7, label="each step")
        axes.plot(x, mean, color="#c0392b", label="mean of 25")
        for key in sorted({k for r in log for k in r if k.startswith("val_loss")}):
            axes.plot(
                *zip(*[(r["step"], r[key]) for r in log if key in r]), "o-", markersize=3, label=key.replace("_", " ")
            )
        axes.set(xlabel="step", ylabel="loss", yscale="log")
        axes.legend(frameon=False, fontsize=8)

    parts += ["<h2>Loss</h2>", picture(losses)]
    parts += [
        "<h2>Learning rate and gradient</h2>",
        picture(
            lambda axes: (
                axes.plot([r["step"] for r in steps], [r["lr"] for r in steps])
                and axes.set(xlabel="step", ylabel="learning rate")
            ),
            height=1.8,
        ),
        picture(
            lambda axes: (
                axes.plot([r["step"] for r in steps], [r["grad_norm"] for r in steps], linewidth=0.7)
                and axes.set(xlabel="step", ylabel="gradient norm", yscale="log")
            ),
            height=1.8,
        ),
    ]
    for file in adapters:
        models = Models(flags["ckpt"])
        rows = delta(file, models.folder(load(file)[1].get("expert", "dit")))
        parts += [
            f"<h2>How far the weights moved: {file.name}</h2>",
            heat(rows, lambda r: 100 * r["ratio"], "||dW|| / ||W||, %"),
            f"<p>Together {100 * together(rows):.2f} %; spectral norm up to {max(r['spectral'] for r in rows):.3g}; effective rank "
            f"{min(r['rank'] for r in rows):.1f} to {max(r['rank'] for r in rows):.1f}.</p>",
        ]
    if encoder:
        base = encoder_files(checkpoint_dir(flags["ckpt"]))[0]
        rows = [r for r in delta(encoder, base) if r["block"] is not None]
        parts += (
            [
                "<h2>How far the encoder's weights moved</h2>",
                heat(rows, lambda r: 100 * r["ratio"], "||dW|| / ||W||, %"),
            ]
            if rows
            else []
        )
        prompts = nano.prompts(20, 0) if nano.gradable(settings(checkpoint_dir(flags["ckpt"]))) else []
        prompts = [r["prompt"] for r in prompts] or (read_prompts(flags["previews"]) if flags["previews"] else [])
        if prompts:
            found = drift(
                open_encoder(flags["ckpt"], flags["ckpt"]),
                open_encoder(encoder, flags["ckpt"]),
                prompts,
                flags["keywords"],
            )
            parts += [
                "<h2>How far the embeddings moved</h2>",
                html_table(
                    ("prompt", "cosine", "norm x"), [(r["prompt"], r["cosine"], r["norm"]) for r in found["prompts"]]
                ),
            ]
            near = lambda pairs: ", ".join(f"{w} {c:.2f}" for w, c in pairs)
            parts += (
                [
                    html_table(
                        ("keyword", "nearest before", "nearest after"),
                        [(w, near(a), near(b)) for w, (a, b) in found["keywords"].items()],
                    )
                ]
                if found["keywords"]
                else []
            )
    changes = dict(loras=[str(f) for f in adapters], text_encoder=str(encoder) if encoder else flags["text_encoder"])
    with contextlib.redirect_stdout(io.StringIO()):
        drifts = logits(
            flags["ckpt"], n=2, **{k: flags[k] for k in ("data", "cache", "resolution", "frames")}, **changes
        )
    for name, rows in drifts.items():
        parts += [
            f"<h2>Attention logits{'' if name == 'dit' else ', ' + name + '-noise expert'}: largest relative change of a head</h2>",
            heat(rows, lambda r: r["drift"], "drift"),
        ]
    previews = sorted((folder / "previews").glob("step_" + "[0-9]" * 6 + ".png"))
    if previews:
        shown = list(dict.fromkeys([previews[0], previews[-1]]))
        parts += [
            "<h2>Previews</h2>",
            *(f"<p class=note>{p.stem.replace('_', ' ')}</p>{embedded(p.read_bytes())}" for p in shown),
        ]
    if n and nano.gradable(settings(checkpoint_dir(flags["ckpt"]))):
        words = [w for w in (flags.get("keywords") or nano.NEW_WORDS) if w in nano.NEW_WORDS]
        before, after = (listen(Models(flags["ckpt"], **c), words, n) for c in ({}, changes))
        rows = [
            (
                suite,
                kind,
                f"{a['right']:.2f}",
                f"{after[suite][kind]['right']:.2f}",
                f"[{after[suite][kind]['low']:.2f}, {after[suite][kind]['high']:.2f}]",
            )
            for suite, kinds in before.items()
            for kind, a in kinds.items()
        ]
        parts += [
            "<h2>Listening</h2>",
            html_table(("suite", "attribute", "before", "after", "95 %"), rows),
            f"<p class=note>{n} prompts per suite</p>",
        ]
    parts += [
        "<h2>Flags</h2>",
        html_table(("flag", "value"), flags.items()),
        "<h2>Versions</h2>",
        html_table(("what", "which"), [(k, v) for k, v in told.items() if k != "flags"]),
    ]
    return f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(folder.resolve().name)}</title><style>{STYLE}</style><body>{"".join(parts)}</body></html>\n'


def run_report(args):
    page = report(args.folder, args.n)
    out = Path(args.out or Path(args.folder) / "report.html")
    with atomic(out) as tmp:
        tmp.write_text(page, encoding="utf-8")
    print(out)


def run_inspect(args):
    found, failed = [], []
    for path in args.paths:
        try:
            found += inspect(path)
        except BadInput as e:
            failed.append(str(e))
            found.append({"path": path, "kind": "unreadable", "summary": str(e)})
    for one in found:
        show(one)
    if args.json:
        with atomic(args.json) as tmp:
            tmp.write_text(json.dumps({"models": found}, indent=1, ensure_ascii=False) + "\n")
    if failed:
        raise BadInput(f"{len(failed)} of {len(args.paths)} paths cannot be inspected: {'; '.join(failed)}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)

    def changed(c):
        c.add_argument("--ckpt", default="nano")
        c.add_argument("--lora", action="append", default=[], help="FILE[:weight][:high|low|both]; may be repeated")
        c.add_argument("--text_encoder", help="an updated text encoder's file")
        c.add_argument("--device")
        c.add_argument("--dtype", choices=list(DTYPES))
        c.add_argument("--json")

    c = commands.add_parser("inspect")
    c.add_argument("paths", nargs="+")
    c.add_argument("--json", help="also write what was found to this file")
    c.set_defaults(run=run_inspect)
    c = commands.add_parser("delta")
    c.add_argument("lora")
    c.add_argument("--ckpt", default="nano", help="the DiT: a model folder (of A14B one expert's) or file")
    c.add_argument(
        "--cap", type=float, help="write a copy in which no matrix moves by more than this share of its norm"
    )
    c.add_argument("--out", help="where to write that copy")
    c.add_argument("--json", help="also write every row to this file")
    c.set_defaults(run=run_delta)
    c = commands.add_parser("logits")
    changed(c)
    c.add_argument("--data", help="a dataset, as in training (default: clips of the nano world)")
    c.add_argument("--cache")
    c.add_argument("--resolution", help="WxH px (default: the checkpoint's)")
    c.add_argument("--frames", type=int)
    c.add_argument("--n", type=int, default=4, help="samples, each at four times")
    c.add_argument("--threshold", type=float, default=0.25, help="a relative change above this is drift")
    c.add_argument("--ci", action="store_true", help="exit with 1 where a head drifts")
    c.set_defaults(run=run_logits)
    c = commands.add_parser("drift")
    c.add_argument("old", help="a checkpoint folder or an encoder's file")
    c.add_argument("new")
    c.add_argument("--ckpt", default="nano", help="the checkpoint whose tokenizer, and base of a delta, the files use")
    c.add_argument("--prompts", help="a text file (default: prompts of the nano world)")
    c.add_argument("--keywords", help="a,b,c: show which words they are near")
    c.add_argument("--json")
    c.set_defaults(run=run_drift)
    c = commands.add_parser("listen")
    changed(c)
    c.add_argument("--skip_before", action="store_true", help="only the changed model")
    c.add_argument("--words", help="nano: new words to ask for (default: all)")
    c.add_argument("--prompts", help="a text file: make a contact sheet of these instead of grading")
    c.add_argument("--n", type=int, default=40, help="nano: prompts per new word, and as many of old words")
    c.add_argument("--seed", type=int, default=0)
    c.add_argument("--out", default="out/listen.png", help="the contact sheet")
    c.set_defaults(run=run_listen)
    c = commands.add_parser("reuse")
    changed(c)
    c.add_argument("--prompts", help="a text file (default: four prompts of the nano world)")
    c.add_argument("--thresholds", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.2])
    c.set_defaults(run=run_reuse)
    c = commands.add_parser("plan")
    c.add_argument("--json")
    c.add_argument("--gpus", help="COUNTxGB, such as 8x80: propose flags that fit, per rank")
    c.add_argument("script", choices=("train_lora", "train_te", "sample"))
    c.add_argument("flags", nargs=argparse.REMAINDER, help="as that script takes them")
    c.set_defaults(run=run_plan)
    c = commands.add_parser("scale")
    c.add_argument("--ckpt", default="ti2v-5B", help="a released variant")
    c.add_argument("--size", help="WxH px")
    c.add_argument("--frames", type=int)
    c.add_argument("--tflops", type=float, default=400, help="that a GPU sustains in training")
    c.add_argument("--inside", type=float, default=200, help="GB/s that a GPU sends within its machine")
    c.add_argument("--between", type=float, default=25, help="GB/s that a GPU sends to another machine")
    c.add_argument("--per_machine", type=int, default=8, help="GPUs of a machine")
    c.add_argument("--gb", type=int, default=80, help="memory of a GPU")
    c.set_defaults(run=run_scale)
    c = commands.add_parser("report")
    c.add_argument("folder", help="--out of a training run")
    c.add_argument("--n", type=int, default=20, help="nano: prompts per suite of the listening score (0: none)")
    c.add_argument("--out", help="default: RUN/report.html")
    c.set_defaults(run=run_report)
    args = p.parse_args()
    args.run(args)


if __name__ == "__main__":
    cli(main)
