"""The words that train_te.py teaches: their token embeddings, what these start from, which captions contain them."""

import re
from collections import Counter
from dataclasses import replace
from statistics import geometric_mean
from typing import NamedTuple

import torch

from data import eval_batches
from nanowan.errors import BadInput
from nanowan.training.captions import UNITS, has_keyword, is_cut_off, replace_keyword, spans, without_keywords
from t5 import EOS, PAD, UNK

INIT_SAMPLES, INIT_CANDIDATES = 12, 40  # of --keyword_init search: samples per keyword, and words to try
PUNCTUATION = ".,;:!?\"'()[]"


class Keyword(NamedTuple):
    """One value of --keywords: NAME, NAME=WORD or NAME=placeholder:N. NAME is the keyword. With WORD, the keyword's
    embeddings start as those of WORD. With placeholder:N, the keyword gets N rows of the embedding table that no text
    uses. If NAME stands alone, --keyword_init decides how its embeddings start.
    """

    name: str
    initial: str | None = None
    placeholders: int = 0


def parse_keyword(text):
    """Parse one value of --keywords into a Keyword. Raises BadInput if the value has another form."""
    name, _, value = text.partition("=")
    match = re.fullmatch(r"placeholder:([1-9]\d?)", value)
    if not name or (value.startswith("placeholder") and not match):
        raise BadInput(f"--keywords {text}: give NAME, NAME=WORD, or NAME=placeholder:N with N from 1 to 99")
    return Keyword(name, None if match else value or None, int(match[1]) if match else 0)


def placeholder_tokens(tokenizer, rows, count, taken=()):
    """Return [(id, text)] for `count` token ids that no ordinary text uses and that are not in `taken`. rows: the
    number of rows of the embedding table. text: what a prompt has to contain to get this id, or None if only this
    project's tokenizer can produce the id. Sentencepiece's <extra_id_N> come first, since other software can produce
    them too. Raises BadInput if fewer than `count` such ids are left.
    """
    size, unused = tokenizer.pieces.get_piece_size(), []
    for i in reversed(range(size)):
        if match := re.fullmatch("\u2581?(<extra_id_\\d+>)", tokenizer.pieces.id_to_piece(i)):
            unused.append((i, match[1] if tokenizer.pieces.encode(match[1])[-1:] == [i] else None))
    known = {i for i in tokenizer.special.values() if isinstance(i, int)}
    unused += [(i, None) for i in range(size, rows) if i not in known]
    unused = sorted((f for f in unused if f[0] not in taken), key=lambda f: f[1] is None)
    if len(unused) < count:
        raise BadInput(f"--keywords: {count} placeholders are asked for, and the table has {len(unused)} unused rows")
    return unused[:count]


def add_placeholders(keywords, tokenizer, rows):
    """Give each Keyword with placeholders its own token ids, add these keywords to the tokenizer, and return {name:
    ids}. rows: the number of rows of the embedding table. Prints how to prompt for the keywords in other software.
    """
    taken, ids_of = set(), {}
    for keyword in keywords:
        if not keyword.placeholders:
            continue
        tokens = placeholder_tokens(tokenizer, rows, keyword.placeholders, taken)
        ids_of[keyword.name] = [i for i, _ in tokens]
        taken |= {*ids_of[keyword.name]}
        texts = [text for _, text in tokens]
        how = "only with this project's tokenizer" if None in texts else f"elsewhere as {''.join(texts)}"
        print(f"keyword {keyword.name!r}: {len(tokens)} placeholder rows; prompted {how}")
    tokenizer.add_words(ids_of)
    return ids_of


def keyword_token_ids(keywords, captions, tokenizer):
    """Return {keyword: ids of its tokens}, for all spellings of the keyword: as it is given, and as captions write it.
    Tokens that also occur in captions that contain none of the keywords are left out, unless a spelling has no other
    tokens. The unknown token, the end token and a bare space are always left out.
    """
    shared = shared_token_ids(keywords, captions, tokenizer)
    ids = {}
    for keyword in keywords:
        spellings = {keyword, *(c[begin:end] for c in captions for begin, end in spans(c, keyword))}
        pieces = [{i for i in tokenizer.ids(spelling) if is_own_piece(i, tokenizer)} for spelling in spellings]
        ids[keyword] = {i for ids_of_piece in pieces for i in (ids_of_piece - shared or ids_of_piece)}
    return ids


def own_pieces(word, tokenizer):
    """Return the ids of a word's tokens, except those that is_own_piece excludes."""
    return [i for i in tokenizer.ids(word) if is_own_piece(i, tokenizer)]


def is_own_piece(i, tokenizer):
    """Return whether token i stands for part of a text, or is a placeholder. Padding, the unknown token, the end token
    and a bare space are neither.
    """
    beyond = i >= tokenizer.pieces.get_piece_size()  # a placeholder
    return beyond or i not in (PAD, EOS, UNK) and tokenizer.pieces.id_to_piece(i) != "\u2581"


def shared_token_ids(keywords, captions, tokenizer):
    """Return the set of ids of all tokens in the captions that contain none of the keywords."""
    return {i for c in without_keywords(captions, keywords) for i in tokenizer.ids(tokenizer.clean(c))}


def initial_words(keywords, search, encoder, dataset, schedule):
    """Return {keyword: its initial word}, from which initialize_rows computes the keyword's embeddings. A Keyword's own
    `initial` comes first. If `search` is true, search_initial_words looks for words for the other keywords, at the
    timesteps of the first expert of `schedule` {name: (low, high)}. Keywords without an initial word are left out. The
    result is the same on all ranks.
    """
    initial = {k.name: k.initial for k in keywords if k.initial}
    if search:
        first, (low, high) = next(iter(schedule.items()))
        searched = [k.name for k in keywords if k.name not in initial]
        initial |= search_initial_words(searched, encoder, dataset, first, low, high)
    initial = dataset.world.broadcast_from_rank0(lambda: initial)  # the ranks' results may differ by rounding
    for keyword, word in initial.items():
        print(f"keyword {keyword!r}: starts as {word!r}")
    return initial


@torch.no_grad()
def search_initial_words(keywords, encoder, dataset, name, low, high):
    """Return {keyword: the known word to start from}. The search takes the most common words of all captions, except
    the keywords, puts each of them in the keyword's place in the keyword's captions, and chooses the word with the
    lowest loss. A keyword is left out if its captions have a still lower loss with the keyword itself. In Textual
    Inversion (Gal et al., 2022) the user names this word, the initializer token. Prints the best words with their
    losses.

    A loss is the geometric mean over at most INIT_SAMPLES training samples, one per file, at three timesteps in
    [low, high) under fixed noise, computed with the DiT `name`. An arithmetic mean would follow the highest timestep,
    whose losses are the largest and vary most between samples.
    """
    counts = Counter(m.group().strip(PUNCTUATION).lower() for c in dataset.captions for m in UNITS.finditer(c))
    words = without_keywords([word for word, _ in counts.most_common()], keywords)
    candidates = [word for word in words if own_pieces(word, encoder.tokenizer)][:INIT_CANDIDATES]
    if not candidates:
        return {}
    model, chosen = dataset.pipe.acquire(name).eval(), {}
    for keyword in keywords:
        shown = {}  # one sample of each file that has a caption with the keyword
        for item, file in zip(dataset.items, dataset.files):
            if captions := [c for c in item.captions if has_keyword(c, [keyword])]:
                shown.setdefault(item.path, (replace(item, captions=captions[:1]), file))
        if not shown:
            continue
        shown = list(shown.values())[:INIT_SAMPLES]
        held = eval_batches(*zip(*shown), dataset.samples, dataset.pipe.settings.shift, low, high)
        batches, losses = [batch for i, batch in held if i], {}  # the lowest timestep says least about the word
        captions = {caption for batch in batches for caption in batch.captions}
        for word in [keyword, *candidates]:
            texts = {c: encoder.encode([replace_keyword(c, keyword, word)]) for c in captions}
            losses[word] = geometric_mean(batch.loss(model, *texts[batch.captions[0]]).item() for batch in batches)
        best = sorted(losses, key=losses.get)
        ranked = [*[word for word in best[:4] if word != keyword], keyword]
        shown_losses = ", ".join(f"{word} {losses[word]:.4f}" for word in ranked)
        print(f"keyword {keyword!r}: geometric mean loss with other words in its place and with itself: {shown_losses}")
        if best[0] != keyword:
            chosen[keyword] = best[0]
    return chosen


@torch.no_grad()
def initialize_rows(words, ids_of, shared, encoder):
    """Set the trained embeddings of each keyword to the mean embedding of the tokens of its initial word. Embeddings
    whose ids are in `shared`, which captions without keywords use too, stay unchanged. So do embeddings that keywords
    with different initial words have in common: no start would suit both keywords. words: {keyword: word}, as returned
    by initial_words. ids_of: as returned by keyword_token_ids.
    """
    embedding, starts = encoder.token_embedding, {}
    for keyword, word in words.items():
        for i in ids_of[keyword] - shared:
            starts.setdefault(i, set()).add(word)
    for i, initial in starts.items():
        if len(initial) == 1:
            start = embedding.table.weight[own_pieces(*initial, encoder.tokenizer)].float().mean(0)
            embedding.rows[embedding.slot[i]] = start.to(embedding.rows)


def check_keywords(keywords, captions, tokenizer, trains_blocks):
    """Print how many captions contain each keyword, and return {keyword: number of captions in which the encoder reads
    it}. Raises BadInput for a keyword that has no token or that the encoder reads in no caption. If no blocks are
    trained, it also raises BadInput for a keyword whose tokens all occur in captions without keywords.
    """
    ids, shared = (keyword_token_ids(keywords, captions, tokenizer), shared_token_ids(keywords, captions, tokenizer))
    counts = {}
    for keyword in keywords:
        holding = [c for c in captions if has_keyword(c, [keyword])]
        cut_off = sum(is_cut_off(c, keyword, tokenizer) for c in holding)
        counts[keyword] = len(holding) - cut_off
        print(
            f"keyword {keyword!r}: in {len(holding)} different captions, {len(ids[keyword])} embedding rows"
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


def keyword_norms(encoder, ids_of):
    """Return, for each keyword in the order of ids_of, the mean norm of its trained embeddings, divided by the median
    norm of the embedding table's rows.
    """
    embedding = encoder.token_embedding
    norms = embedding.norms()
    return [norms[embedding.slot[sorted(ids)]].mean().item() for ids in ids_of.values() if ids]
