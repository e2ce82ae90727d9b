"""diag.py delta: measure how much a LoRA, another checkpoint or another text encoder changes each weight of a base."""

import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from diagnostics.common import write_json
from diagnostics.inspect import kind_of
from nanowan.errors import BadInput, check_at_least
from nanowan.formats.layouts import expert_folders, read_weights, vae_files, weight_files
from nanowan.formats.lora import check_fit, choose_experts, parse_lora_spec, read_lora, write_changes
from nanowan.formats.t5 import EncoderSource, EncoderSpec, check_encoder_changes, own_encoder, read_encoder
from nanowan.settings import checkpoint_dir


class Weights:
    """The tensors of one model on disk, under their official names. Tensors stored in 8 or fewer bits are dequantized
    when they are read.
    """

    def __init__(self, files, is_encoder=False):
        """Open the files of a model. is_encoder: whether the model is a full text encoder (in any layout)."""
        self.entries = read_encoder(files).entries if is_encoder else read_weights(files)

    def read(self, name):
        """Return the tensor `name` in fp32."""
        return self.entries[name].read().float()

    def shape(self, name):
        return self.entries[name].shape if name in self.entries else None


# ---- norms -------------------------------------------------------------------------------------------------------
class Norms(NamedTuple):
    frobenius: float
    spectral: float
    rank: float | None  # effective rank


def factor_norms(a, b):
    """Return the Norms of the product B A, computed from the factors A (r,in) and B (out,r) alone. The effective rank
    is the exponential of the entropy of the product's normalised singular values (Roy and Vetterli, 2007). The product
    has the same singular values as the r x r matrix R_B R_A^T, where R_B and R_A come from the QR decompositions of B
    and A^T.
    """
    small = torch.linalg.qr(b.double()).R @ torch.linalg.qr(a.double().t()).R.t()
    if not small.isfinite().all():
        return Norms(math.nan, math.nan, math.nan)
    values = torch.linalg.svdvals(small)
    p = values / values.sum().clamp(min=1e-300)
    entropy = -(p * p.clamp(min=1e-300).log()).sum()
    return Norms(values.norm().item(), values[0].item(), entropy.exp().item() if values[0] > 0 else 0.0)


def dense_norms(difference):
    """Return the Norms of the tensor `difference`, reshaped to a matrix (out, everything else). The spectral norm comes
    from 50 power iterations; the effective rank is None.
    """
    d = difference.reshape(len(difference), -1) if difference.dim() else difference.view(1, 1)
    v = torch.randn(d.shape[1], generator=torch.Generator().manual_seed(0))
    for _ in range(50):
        v = F.normalize(d.t() @ (d @ v), dim=0)
    return Norms(d.norm().item(), (d @ v).norm().item(), None)


def relative_norm(rows):
    """Return ||dW|| / ||W|| of several matrices together: the Frobenius norm of all their changes, divided by the
    Frobenius norm of all their base weights. rows: the list that `delta` returns.
    """
    moved, base = math.hypot(*(r["norm"] for r in rows)), math.hypot(*(r["base"] for r in rows))
    return moved / base if base else math.inf


# ---- the comparison ----------------------------------------------------------------------------------------------
def lora_moves(path, base, expert, kind):
    """Yield (parameter name, base weight, Norms of the change) for each weight that a LoRA file changes. path: the LoRA
    file. base: the Weights of the base. expert: "high" or "low" for a file that holds both experts, else None. kind:
    kind_of(path). The product of low-rank factors is never formed.
    """
    if kind == "lora":
        shapes = {name: entry.shape for name, entry in base.entries.items()}
        changes = check_fit(path, read_lora(path, expert)[0], shapes)
    else:
        files = sorted({entry.file for entry in base.entries.values()})
        ((changes, _),) = check_encoder_changes(EncoderSource(files, [EncoderSpec(Path(path))]), base.entries)
    for name, change in changes.items():
        factors, weight = change.factors(), base.read(name)
        yield name, weight, factor_norms(*factors) if factors else dense_norms(change.of(weight))


def weight_moves(path, base):
    """Yield (parameter name, base weight, Norms of the change) for each matrix and convolution in `path`. `path` is the
    file or folder of another checkpoint or encoder, or a file from train_te.py --save delta, with trained tensors and
    embedding rows. base: the Weights of the base. Raises BadInput if a tensor does not fit the base.
    """
    new = Weights(weight_files(path), kind_of(path) == "text_encoder")
    ids, rows = (new.entries.pop(f"token_embedding.{key}", None) for key in ("ids", "rows"))
    strays = [name for name in new.entries if base.shape(name) != new.shape(name)]
    if ids and base.shape("token_embedding.weight") is None:
        strays.append("token_embedding.rows")
    if strays:
        name = strays[0]
        raise BadInput(
            f"{path}: {name} {new.shape(name)} does not fit the base ({base.shape(name) or 'which has no such weight'})"
        )
    for name, entry in new.entries.items():
        if len(entry.shape) > 1:
            weight = base.read(name)
            yield name, weight, dense_norms(new.read(name) - weight)
    if ids:
        table = base.read("token_embedding.weight")
        yield "token_embedding.weight", table, dense_norms(rows.read().float() - table[ids.read()])


def delta(path, base, expert=None):
    """Return how far the LoRA or the model at `path` moves each weight of a base. base: the DiT, VAE or text encoder to
    compare with, as a file or, for a DiT, a folder; for a text encoder also a checkpoint folder that contains it.
    expert: the expert whose LoRA is measured, "high" or "low", if the LoRA file holds both.

    The result is a list of {"name", "kind", "block" (None outside the blocks), "norm", "base", "ratio", "spectral",
    "rank"}, one for each matrix. kind: the matrix's name within its block. norm: ||dW||_F. base: ||W||_F. ratio: norm /
    base. spectral: the spectral norm of dW. rank: the effective rank of dW, or None if dW has no low-rank factors. One
    matrix of the base is in memory at a time. Raises BadInput if `path` does not fit the base, or if nothing can be
    compared.
    """
    kind = kind_of(path)
    is_encoder = kind.startswith("text_encoder")
    files = own_encoder(base) if is_encoder and Path(base).is_dir() else weight_files(base)
    weights, rows = Weights(files, is_encoder), []
    for parameter, weight, norms in (
        lora_moves(path, weights, expert, kind) if kind.endswith("lora") else weight_moves(path, weights)
    ):
        name, size = parameter.removesuffix(".weight"), weight.norm().item()
        in_block = re.match(r"blocks\.(\d+)\.(.+)", name)
        rows.append(
            {
                "name": name,
                "kind": in_block[2] if in_block else name,
                "block": int(in_block[1]) if in_block else None,
                "norm": norms.frobenius,
                "base": size,
                "ratio": norms.frobenius / size if size else math.inf,
                "spectral": norms.spectral,
                "rank": norms.rank,
            }
        )
    if not rows:
        raise BadInput(f"{path}: holds no weights that could be compared with {base}")
    return sorted(rows, key=lambda r: (math.inf if r["block"] is None else r["block"], r["kind"]))


# ---- which files belong together ---------------------------------------------------------------------------------
class Pair(NamedTuple):
    """A file or folder (`path`), and the base to compare it with. expert: "high" or "low" if the base is an expert of
    an A14B, else None.
    """

    expert: str | None
    path: Path
    base: Path


def experts_of(path):
    """Return {"high": folder, "low": folder} if `path` is the folder of an A14B. For any other path, return {None:
    folder or file of the model}.
    """
    folders = expert_folders(path)
    return {None: folders["dit"]} if "dit" in folders else folders


def pair_up(text, ckpt):
    """Return the Pairs that the command `diag.py delta TEXT --ckpt CKPT` compares. text: a file or folder, or FILE:high
    or FILE:low of a LoRA. Raises BadInput if what `text` names cannot be compared with the checkpoint.
    """
    base = checkpoint_dir(ckpt)
    bases = experts_of(base)
    spec = parse_lora_spec(text, "delta")
    path = checkpoint_dir(text if Path(text).exists() or text == "nano" else spec.file)
    halves = experts_of(path)
    if None not in halves:
        if None in bases:
            raise BadInput(f"{path}: holds experts of an A14B, and --ckpt {ckpt} is a single model")
        return [Pair(name, folder, bases[name]) for name, folder in halves.items() if name in bases]
    path, kind = halves[None], kind_of(halves[None])
    if kind.startswith("text_encoder"):
        return [Pair(None, path, base)]
    if kind == "vae":
        return [Pair(None, path, vae_files(base)[0])]
    if kind != "lora":
        if None not in bases:
            raise BadInput(
                f"--ckpt {ckpt}: holds two experts; give the one that {path} is to be compared with, such as "
                f"{bases['low' if 'low' in bases else 'high']}"
            )
        return [Pair(None, path, bases[None])]
    file = weight_files(path)[0]
    if spec.weight != 1 and path != Path(text):
        raise BadInput(f"delta {text}: a weight means nothing here; give FILE, FILE:high or FILE:low")
    names, source = choose_experts(spec._replace(file=str(file)), ("dit",) if None in bases else tuple(bases), "delta")
    if source:
        print(f"{file}: for {' and '.join(sorted(names))} noise, as {source} says")
    return [Pair(None, file, bases[None]) if name == "dit" else Pair(name, file, bases[name]) for name in sorted(names)]


# ---- the command -------------------------------------------------------------------------------------------------
def show_delta(rows):
    for r in rows:
        if r["block"] is None:
            print(f"||dW||/||W|| {100 * r['ratio']:.3f} % {r['name']}")
    rows = [r for r in rows if r["block"] is not None]
    if not rows:
        return
    kinds, blocks = sorted({r["kind"] for r in rows}), sorted({r["block"] for r in rows})
    print("||dW||/||W|| in percent" + "".join(f"{kind:>14}" for kind in [*kinds, "all"]))
    for block in blocks:
        here = {r["kind"]: r for r in rows if r["block"] == block}
        cells = [f"{100 * here[kind]['ratio']:14.3f}" if kind in here else " " * 14 for kind in kinds]
        print(f"  block {block:<15}" + "".join(cells) + f"{100 * relative_norm(here.values()):14.3f}")
    totals = [relative_norm([r for r in rows if r["kind"] == kind]) for kind in kinds]
    print(f"  {'all':<21}" + "".join(f"{100 * total:14.3f}" for total in [*totals, relative_norm(rows)]))
    largest = max(rows, key=lambda r: math.inf if math.isnan(r["ratio"]) else r["ratio"])
    ranks = [r["rank"] for r in rows if r["rank"] is not None]
    print(
        f"  largest: {largest['name']} {100 * largest['ratio']:.3f} %; spectral norm up to "
        f"{max(r['spectral'] for r in rows):.4g}"
        + (f"; effective rank {min(ranks):.1f} to {max(ranks):.1f}" if ranks else "")
    )


def cap_lora(file, rows, cap, out, expert=None):
    """Write a copy of a LoRA file to `out`, in which every change with ||dW||/||W|| above `cap` is scaled down to
    `cap`. Returns the number of changes that were scaled down. rows: what `delta` returns for the file. expert: "high"
    or "low", the expert to write if the file holds both. Raises BadInput for changes that are not finite.
    """
    if broken := [r["name"] for r in rows if math.isnan(r["ratio"])]:
        raise BadInput(f"{file}: {broken[0]} and {len(broken) - 1} more are not finite; nothing is written")
    changes, metadata = read_lora(file, expert)
    factors = {r["name"]: min(1.0, cap / r["ratio"]) if r["ratio"] else 1.0 for r in rows}
    metadata = metadata | {"delta_cap": cap, **({"expert": expert} if expert else {})}
    write_changes(out, changes, metadata, {name: factors.get(name.removesuffix(".weight"), 1.0) for name in changes})
    return sum(factor < 1 for factor in factors.values())


def run(args):
    if (args.cap is None) != (args.out is None):
        raise BadInput(f"--cap {args.cap}, --out {args.out}: give both")
    check_at_least(1e-9, cap=args.cap)
    pairs = pair_up(str(args.changed), args.ckpt)
    if args.out and len(pairs) > 1:
        raise BadInput(f"--out {args.out}: one expert's at a time; give {args.changed}:high or :low")
    if args.out and kind_of(pairs[0].path) != "lora":
        raise BadInput(f"--out {args.out}: only a LoRA file of a DiT can be held to a cap")
    all_rows = []
    for pair in pairs:
        rows = delta(pair.path, pair.base, pair.expert)
        if len(pairs) > 1:
            print(f"{pair.expert} noise: {pair.path} on {pair.base}")
        show_delta(rows)
        all_rows += [{"expert": pair.expert, **r} for r in rows]
    write_json(args.json, {"rows": all_rows, "relative_norm": relative_norm(all_rows)})
    if args.out:
        count = cap_lora(pairs[0].path, all_rows, args.cap, args.out, pairs[0].expert)
        print(f"{count} of {len(all_rows)} matrices scaled down to {args.cap}: {args.out}")
