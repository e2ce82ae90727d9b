"""Account for models and changes.

    python diag.py inspect PATH... [--json FILE]          what is in checkpoint folders, weight files, LoRA files and mp4s; headers only
    python diag.py delta LORA --ckpt DIR                  how far a LoRA moves each weight: ||dW||/||W||, spectral norm, effective rank
    python diag.py delta LORA --ckpt DIR --cap 0.02 --out FILE      and write a copy held to that
"""
import argparse
import json
import math
import re
from collections import Counter
from pathlib import Path

import torch

from checkpoint import BadInput, atomic, clean_key, cli, count_blocks, read_header, read_headers, save, weight_files
from data import CLIPS
from lora import TARGETS, official_name, read_lora
from sample import checkpoint_dir
from wan import VARIANTS, read_config

BUDGETS = {"cross_attn.{k,v}": ("cross_attn.k", "cross_attn.v"), "cross_attn.{q,k,v,o}": TARGETS[4:8],
           "self_attn and cross_attn": TARGETS[:8], "self_attn, cross_attn and ffn": TARGETS}
RANKS = (4, 8, 16, 32, 64)
EXPERTS = ("high_noise_model", "low_noise_model")


def totals(entries):
    kinds = Counter()
    for e in entries.values():
        kinds[str(e.dtype).removeprefix("torch.")] += e.numel
    return {"parameters": sum(kinds.values()), "tensors": len(entries), "dtype": kinds.most_common(1)[0][0] if kinds else None,
            "dtypes": dict(kinds), "bytes": sum(e.nbytes for e in entries.values())}


def lora_budget(entries):
    """What adapters on this DiT would cost: rows of targets x rank."""
    rows = []
    for name, targets in BUDGETS.items():
        shapes = [e.shape for k, e in entries.items() if re.fullmatch(r"blocks\.\d+\.(" + "|".join(map(re.escape, targets)) + r")\.weight", k)]
        for rank in RANKS:
            params = sum(rank * (a + b) for a, b in shapes)
            rows.append({"targets": name, "rank": rank, "matrices": len(shapes), "parameters": params, "mib_bf16": round(params * 2 / 2 ** 20, 4)})
    return rows


def inspect_dit(path, entries):
    c = read_config(path, entries)
    size = (c.model_type, c.dim, c.num_layers, c.in_dim, c.out_dim)
    variant = next((n for n, v in VARIANTS.items() if (v["model_type"], v["dim"], v["num_layers"], v["in_dim"], v["out_dim"]) == size), None)
    blocks = {t: len({k.split(".")[1] for k in entries if re.fullmatch(rf"blocks\.\d+\.{re.escape(t)}\.weight", k)}) for t in TARGETS}
    image_keys = [k for k in entries if "img_emb" in k or "_img." in k]
    whole = all(n == c.num_layers for n in blocks.values())
    text = f"a {c.model_type.upper()} DiT {'of the released size ' + variant if variant else 'of no released size'}, " + (
        f"{len(image_keys)} image-conditioning keys" if image_keys else
        "no image-conditioning keys" + (" (the image comes in through its extra input channels)" if c.model_type == "i2v" else "")) + (
        "; every block has self- and cross-attention and a feed-forward net" if whole else "; some blocks lack projections")
    return {"kind": "dit", "variant": variant, "model_type": c.model_type, "width": c.dim, "layers": c.num_layers, "heads": c.num_heads,
            "head_dim": c.dim // c.num_heads, "ffn": c.ffn_dim, "in_channels": c.in_dim, "out_channels": c.out_dim, "text_dim": c.text_dim,
            "text_len": c.text_len, **totals(entries), "blocks_with": blocks, "image_conditioning_keys": bool(image_keys),
            "lora_budget": lora_budget(entries), "summary": text}


def inspect_lora(entries, metadata):
    places = {k: official_name(k) for k in entries}
    found = [n for n, kind in filter(None, places.values()) if kind == "A"]
    ranks = Counter(entries[k].shape[0] for k, p in places.items() if p and p[1] == "A")
    blocks = sorted({int(n.split(".")[1]) for n in found})
    targets = Counter(n.split(".", 2)[2] for n in found)
    text = f"a LoRA of rank {', '.join(map(str, ranks))} on {', '.join(targets)} of {len(blocks)} blocks ({blocks[0]} to {blocks[-1]})"
    if len(found) * 2 < len([k for k in entries if "alpha" not in k]):
        text += f"; {sum(p is None for p in places.values())} keys are not known here"
    return {"kind": "lora", "ranks": dict(ranks), "targets": dict(targets), "blocks": blocks, "matrices": len(found),
            "alpha_keys": sum(bool(p) and p[1] == "alpha" for p in places.values()), "metadata": metadata, **totals(entries), "summary": text}


def inspect_file(path):
    """One weight file, or the several of one model (a list of shards beside each other)."""
    files = weight_files(path)
    entries, metadata = {}, {}
    for file in files:
        part, meta = read_header(file)
        entries |= {clean_key(k): e for k, e in part.items()}
        metadata |= meta
    if any((official_name(k) or ("", ""))[1] == "A" for k in entries):
        return inspect_lora(entries, metadata)
    if {"patch_embedding.weight", "head.head.weight", "blocks.0.ffn.0.weight"} <= set(entries):
        return inspect_dit(path, entries)
    if {"token_embedding.weight", "blocks.0.ffn.fc1.weight", "blocks.0.pos_embedding.embedding.weight"} <= set(entries):
        vocab, width = entries["token_embedding.weight"].shape
        layers, heads = count_blocks(entries), entries["blocks.0.pos_embedding.embedding.weight"].shape[1]
        return {"kind": "text_encoder", "vocabulary": vocab, "width": width, "layers": layers, "heads": heads,
                "ffn": entries["blocks.0.ffn.fc1.weight"].shape[0], **totals(entries),
                "summary": f"a UMT5 encoder of {layers} layers, width {width}, {vocab:,} pieces; each layer has its own position table"}
    if {"encoder.conv1.weight", "conv2.weight", "decoder.head.2.weight"} <= set(entries):
        v22 = entries["encoder.conv1.weight"].shape[1] == 12
        z = entries["conv2.weight"].shape[0]
        return {"kind": "vae", "variant": "2.2" if v22 else "2.1", "z_channels": z, "encoder_width": entries["encoder.conv1.weight"].shape[0],
                "decoder_width": entries["decoder.head.2.weight"].shape[1], "stride": [4, 16, 16] if v22 else [4, 8, 8], **totals(entries),
                "summary": f"a Wan {'2.2' if v22 else '2.1'} VAE, {z} latent channels, stride {'4x16x16' if v22 else '4x8x8'}"}
    return {"kind": "unknown", **totals(entries), "summary": f"no model known here; its first keys are {', '.join(list(entries)[:3])}"}


def inspect_video(path):
    import av
    try:
        with av.open(str(path)) as f:
            v = f.streams.video[0]
            comment = f.metadata.get("comment", "")
            info = {"width": v.width, "height": v.height, "frames": v.frames or None, "fps": float(v.average_rate or 0), "codec": v.codec_context.name,
                    "bytes": path.stat().st_size}
    except (av.FFmpegError, IndexError, OSError) as e:
        raise BadInput(f"{path}: not a readable video ({e})") from None
    try:
        told = json.loads(comment)
    except ValueError:
        told = {}
    told = told if isinstance(told, dict) else {}
    text = f"{info['frames'] or 'an unknown number of'} frames of {info['width']}x{info['height']} at {info['fps']:g} fps" + (
        f", made from the prompt {told['prompt']!r} with seed {told.get('seed')}" if "prompt" in told else ", without generation settings")
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
        found.append({"path": str(folder), "experts": experts, **one, "summary": ("" if experts else "single-tower, ") + one["summary"] + which})
    files = [f for pattern in ("models_t5*", "*VAE*") for f in sorted(path.glob(pattern)) if f.suffix in (".pth", ".safetensors")]
    if not found and not files:
        files = sorted(path.glob("*.safetensors"))
    found += [{"path": str(f), **inspect_file(f)} for f in files]
    if not found:
        raise BadInput(f"{path}: holds no weights known here (diffusion_pytorch_model*, high_noise_model, models_t5*, *VAE*, *.safetensors)")
    return found


def show(one):
    print(f"{one['path']}\n  {one['summary']}")
    if one["kind"] == "dit":
        print("  width {width}, layers {layers}, heads {heads} x {head_dim}, ffn {ffn}, channels {in_channels} -> {out_channels}, text {text_len} x {text_dim}"
              .format(**one))
        print("  blocks with " + ", ".join(f"{t} {n}" for t, n in one["blocks_with"].items()))
    if one["kind"] in ("lora", "video"):
        print("  " + json.dumps(one["metadata" if one["kind"] == "lora" else "settings"], ensure_ascii=False))
    if "parameters" in one:
        print(f"  {one['parameters']:,} parameters in {one['tensors']} tensors, {one['bytes']:,} bytes, mostly {one['dtype']}")
    if one.get("lora_budget"):
        print(f"  {'LoRA on':30} {'rank':>5} {'matrices':>9} {'parameters':>12} {'MiB (bf16)':>11}")
        for r in one["lora_budget"]:
            print(f"  {r['targets']:30} {r['rank']:5} {r['matrices']:9} {r['parameters']:12,} {r['mib_bf16']:11.2f}")


# ---- delta -------------------------------------------------------------------------------------------------------
def factor_norms(a, b):
    """Of dW = B A, from its factors A (r,in) and B (out,r) alone: Frobenius norm, spectral norm, and effective rank, the exponential
    of the entropy of its normalised singular values (Roy and Vetterli, 2007). The singular values are those of the r x r matrix
    R_B R_A^T of the two QR decompositions."""
    values = torch.linalg.svdvals(torch.linalg.qr(b.double()).R @ torch.linalg.qr(a.double().t()).R.t())
    share = values / values.sum().clamp(min=1e-300)
    entropy = -(share * share.clamp(min=1e-300).log()).sum()
    return values.norm().item(), values[0].item(), entropy.exp().item() if values[0] > 0 else 0.0


def delta(lora, ckpt):
    """How far a LoRA file moves each weight of a DiT: a row {"name", "kind", "block", "norm", "base", "ratio", "spectral", "rank"} per
    matrix, where ratio is ||dW||_F / ||W||_F. One matrix of the base is read at a time; dW is never formed."""
    pairs, _ = read_lora(lora)
    entries = read_headers(weight_files(ckpt))
    rows = []
    for name, (a, b) in pairs.items():
        w = entries.get(f"{name}.weight")
        if w is None or w.shape != (len(b), a.shape[1]):
            raise BadInput(f"{lora}: {name} ({len(b)}x{a.shape[1]}) does not fit {ckpt} ({w.shape if w else 'no such weight'})")
        base = w.read().float().norm().item()
        norm, spectral, rank = factor_norms(a, b)
        _, block, kind = name.split(".", 2)
        rows.append({"name": name, "kind": kind, "block": int(block), "norm": norm, "base": base, "ratio": norm / base, "spectral": spectral, "rank": rank})
    return sorted(rows, key=lambda r: (r["block"], r["kind"]))


def together(rows):
    """||dW|| / ||W|| of several matrices taken as one."""
    return math.hypot(*(r["norm"] for r in rows)) / math.hypot(*(r["base"] for r in rows))


def show_delta(rows):
    kinds, blocks = sorted({r["kind"] for r in rows}), sorted({r["block"] for r in rows})
    print("||dW||/||W|| in percent" + "".join(f"{k:>14}" for k in kinds) + f"{'together':>14}")
    for block in blocks:
        here = {r["kind"]: r["ratio"] for r in rows if r["block"] == block}
        print(f"  block {block:<15}" + "".join(f"{100 * here[k]:14.3f}" if k in here else " " * 14 for k in kinds)
              + f"{100 * together([r for r in rows if r['block'] == block]):14.3f}")
    print(f"  {'together':<21}" + "".join(f"{100 * together([r for r in rows if r['kind'] == k]):14.3f}" for k in kinds) + f"{100 * together(rows):14.3f}")
    top = max(rows, key=lambda r: r["ratio"])
    print(f"  largest: {top['name']} {100 * top['ratio']:.3f} %; spectral norm up to {max(r['spectral'] for r in rows):.4g}; "
          f"effective rank {min(r['rank'] for r in rows):.1f} to {max(r['rank'] for r in rows):.1f}")


def cap_lora(lora, rows, cap, out):
    """Write a copy of a LoRA file in which every matrix with ||dW||/||W|| above `cap` is scaled down to it. Returns how many were."""
    pairs, metadata = read_lora(lora)
    scale = {r["name"]: min(1.0, cap / r["ratio"]) if r["ratio"] else 1.0 for r in rows}
    tensors = {}
    for name, (a, b) in pairs.items():
        tensors[f"diffusion_model.{name}.lora_A.weight"] = a
        tensors[f"diffusion_model.{name}.lora_B.weight"] = b * scale[name]
    save(out, tensors, {k: v for k, v in metadata.items() if k != "lora_adapter_metadata"} | {"alpha_folded": True, "delta_cap": cap})
    return sum(s < 1 for s in scale.values())


def run_delta(args):
    if (args.cap is None) != (args.out is None) or args.cap is not None and not args.cap > 0:
        raise BadInput(f"--cap {args.cap}, --out {args.out}: give both, with a cap above 0")
    rows = delta(args.lora, checkpoint_dir(args.ckpt))
    show_delta(rows)
    if args.json:
        with atomic(args.json) as tmp:
            tmp.write_text(json.dumps({"rows": rows, "together": together(rows)}, indent=1) + "\n")
    if args.out:
        print(f"{cap_lora(args.lora, rows, args.cap, args.out)} of {len(rows)} matrices scaled down to {args.cap}: {args.out}")


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
    c = commands.add_parser("inspect")
    c.add_argument("paths", nargs="+")
    c.add_argument("--json", help="also write what was found to this file")
    c.set_defaults(run=run_inspect)
    c = commands.add_parser("delta")
    c.add_argument("lora")
    c.add_argument("--ckpt", default="nano", help="the DiT: a model folder (of A14B one expert's) or file")
    c.add_argument("--cap", type=float, help="write a copy in which no matrix moves by more than this share of its norm")
    c.add_argument("--out", help="where to write that copy")
    c.add_argument("--json", help="also write every row to this file")
    c.set_defaults(run=run_delta)
    args = p.parse_args()
    args.run(args)


if __name__ == "__main__":
    cli(main)
