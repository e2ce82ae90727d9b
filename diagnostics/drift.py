"""diag.py drift: how far a text encoder's embeddings moved, and which words are nearest to the keywords."""

import re

import torch
import torch.nn.functional as F

from diagnostics.common import given_prompts, write_json
from nanowan.errors import BadInput
from nanowan.formats.t5 import load_t5
from nanowan.settings import checkpoint_dir


@torch.no_grad()
def drift(old, new, prompts, keywords=(), nearest=5):
    """Return how far the embeddings of prompts moved from the TextEncoder `old` to the TextEncoder `new`, which has the
    same tokenizer.

    The result is {"prompts": [{"prompt", "cosine", "norm", "tokens": [{"token", "cosine", "norm"}]}], "keywords":
    {keyword: [before, after]}}. cosine: the cosine between the embeddings before and after; for a prompt, the mean over
    its tokens. norm: the norm after, divided by the norm before; for a prompt, the norms of its whole matrix of
    embeddings. before, after: what nearest_words returns for the old and for the new encoder: at most `nearest` words
    of the prompts, none of them a keyword. Raises BadInput if the widths of the two encoders differ.
    """
    if old.norm.weight.shape != new.norm.weight.shape:
        raise BadInput(f"encoders of width {len(old.norm.weight)} and {len(new.norm.weight)} cannot be compared")
    rows = [compare_prompt(old, new, prompt) for prompt in prompts]
    words = [w for w in dict.fromkeys(re.findall(r"\w+", " ".join(prompts).lower())) if w not in keywords]
    neighbours = {k: [nearest_words(encoder, k, words, nearest) for encoder in (old, new)] for k in keywords}
    return {"prompts": rows, "keywords": neighbours}


def compare_prompt(old, new, prompt):
    before, after = (encoder.encode([prompt])[0][0].float() for encoder in (old, new))  # (L,D)
    ids = old.tokenizer([prompt])[0][0].tolist()
    cosines = F.cosine_similarity(before, after, dim=1).tolist()
    norms = (after.norm(dim=1) / before.norm(dim=1)).tolist()
    pieces = [old.tokenizer.pieces.id_to_piece(i) for i in ids]
    return {
        "prompt": prompt,
        "cosine": sum(cosines) / len(cosines),
        "norm": (after.norm() / before.norm()).item(),
        "tokens": [{"token": p, "cosine": c, "norm": n} for p, c, n in zip(pieces, cosines, norms)],
    }


def nearest_words(encoder, keyword, words, count):
    """Return [(word, cosine)] of those `words` whose embeddings are nearest to the embedding of the keyword, at most
    `count` of them. Every word is encoded alone; its embedding is the mean over its tokens.
    """
    if not words:
        return []
    embeds = torch.stack([encoder.encode([w])[0][0].float().mean(0) for w in [keyword, *words]])
    cosines = F.cosine_similarity(embeds[1:], embeds[:1]).tolist()
    return sorted(zip(words, cosines), key=lambda pair: -pair[1])[:count]


def open_encoder(path, ckpt):
    """Return a TextEncoder in fp32 on the CPU. path: a checkpoint folder, or a file of train_te.py. Such a file is
    loaded over the text encoder of the checkpoint `ckpt`, with the tokenizer of that checkpoint.
    """
    path = checkpoint_dir(path)
    if path.is_dir():
        return load_t5(path, dtype=torch.float32)
    return load_t5(checkpoint_dir(ckpt), dtype=torch.float32, weights=path)


def run(args):
    ckpt = args.ckpt or (args.old if checkpoint_dir(args.old).is_dir() else None)
    if ckpt is None:
        raise BadInput(f"{args.old}: a file, which has no tokenizer; give the checkpoint that it belongs to as --ckpt")
    prompts = given_prompts(args.prompts, 20)
    keywords = [k.strip() for k in (args.keywords or "").split(",") if k.strip()]
    moved = drift(open_encoder(args.old, ckpt), open_encoder(args.new, ckpt), prompts, keywords)
    for row in moved["prompts"]:
        worst = min(row["tokens"], key=lambda token: token["cosine"])
        print(
            f"cosine {row['cosine']:.4f}  norm x {row['norm']:.3f}  {row['prompt']!r}; most moved: {worst['token']!r} "
            f"{worst['cosine']:.4f}"
        )
    mean = sum(row["cosine"] for row in moved["prompts"]) / len(prompts)
    print(f"mean cosine {mean:.4f} over {len(prompts)} prompts")
    for word, neighbours in moved["keywords"].items():
        before, after = (", ".join(f"{w} {cosine:.3f}" for w, cosine in side) for side in neighbours)
        print(f"nearest to {word!r}: before {before}\n{' ' * (len(word) + 14)}after  {after}")
    write_json(args.json, moved)
