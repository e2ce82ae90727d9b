"""Keywords in captions: where they occur, and how captions are shortened for training."""

import math
import re

from nanowan.errors import BadInput


def spans(caption, keyword):
    """Return [(begin, end)] for each occurrence of a keyword (a word or phrase) in a caption, ignoring case. An
    occurrence within a longer word does not count, except in scripts that put no spaces between words or attach endings
    to words, such as Thai, Chinese, Japanese and Korean. All characters from U+0E00 on are taken to be in such scripts.
    """
    before, after = (
        "" if edge >= "\u0e00" else bound for edge, bound in ((keyword[0], r"(?<!\w)"), (keyword[-1], r"(?!\w)"))
    )
    return [m.span() for m in re.finditer(before + re.escape(keyword) + after, caption, re.IGNORECASE)]


def has_keyword(caption, keywords):
    return any(spans(caption, k) for k in keywords)


def is_cut_off(caption, keyword, tokenizer):
    """Return whether the first occurrence of the keyword in a caption comes after the last token that the encoder
    reads. The caption must contain the keyword.
    """
    begin = spans(caption, keyword)[0][0]
    return len(tokenizer.ids(tokenizer.clean(caption[:begin]))) >= tokenizer.length - 1


def count_files(items, keyword, tokenizer=None):
    """Return the number of media files with a caption that contains the keyword. items: the scan.Items of the files.
    With a tokenizer, a caption counts only if the keyword begins among the tokens that the encoder reads.
    """
    holding = {(item.path, c) for item in items for c in item.captions if has_keyword(c, [keyword])}
    return len({path for path, c in holding if tokenizer is None or not is_cut_off(c, keyword, tokenizer)})


def without_keywords(captions, keywords):
    """Return the captions that contain none of the keywords."""
    return [c for c in captions if not has_keyword(c, keywords)]


def replace_keyword(caption, keyword, word):
    """Return a caption with `word` in place of every occurrence of the keyword."""
    for begin, end in reversed(spans(caption, keyword)):
        caption = caption[:begin] + word + caption[end:]
    return caption


# The units by which captions are shortened: words, or, in scripts without spaces between words (Thai to Tibetan,
# Burmese, Khmer, Chinese, Japanese), single characters with the marks on them.
UNSPACED = "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
MARKS = "\u0300-\u036f\u0e31\u0e34-\u0e3a\u0e47-\u0e4e"
UNITS = re.compile(rf"[{UNSPACED}][{MARKS}]*|[^\s{UNSPACED}]+")


def augment_caption(caption, keywords, mode_probs, trim_prob, rng):
    """Return the text that replaces a caption in one training step. A caption with keywords becomes a keyword alone, a
    few words around a keyword, or the full caption; `mode_probs` gives the three probabilities, up to a common factor.
    With probability `trim_prob`, a full caption, with or without keywords, loses up to a fifth of its words, but never
    a keyword. rng: a random.Random.
    """
    present = [k for k in keywords if has_keyword(caption, [k])]
    u = rng.random() * sum(mode_probs)
    if present and u < mode_probs[0]:
        return rng.choice(present)
    units = list(UNITS.finditer(caption))
    keyword_units = [
        [i for i, m in enumerate(units) if m.start() < end and m.end() > begin]
        for k in present
        for begin, end in spans(caption, k)
    ]
    if present and u < mode_probs[0] + mode_probs[1]:
        kept = rng.choice(sorted(keyword_units))
        first, last = max(0, kept[0] - rng.randint(0, 2)), min(len(units) - 1, kept[-1] + rng.randint(0, 2))
        return caption[units[first].start() : units[last].end()]
    if rng.random() < trim_prob:
        spare = [i for i in range(len(units)) if not any(i in kept for kept in keyword_units)]
        gone = set(rng.sample(spare, min(len(spare), rng.randint(0, len(units) // 5))))
        return join_units(caption, [m for i, m in enumerate(units) if i not in gone])
    return caption


def join_units(caption, units):
    """Return the text of `units`, joined. units: matches of UNITS in the caption, each a word or a single character.
    Two units get a space between them if the caption has whitespace anywhere between them.
    """
    text, end = "", 0
    for m in units:
        spaced = any(c.isspace() for c in caption[end : m.start()])
        text, end = text + (" " if text and spaced else "") + m.group(), m.end()
    return text


def parse_probs(text):
    """Parse --caption_mode_probs into three numbers: of the captions with a keyword, the shares that become the keyword
    alone, that become a few words around it, and that stay in full. Raises BadInput for any other text.
    """
    try:
        probs = [float(v) for v in text.split(",")]
    except ValueError:
        probs = []
    if len(probs) != 3 or min(probs) < 0 or not 0 < sum(probs) < math.inf:
        raise BadInput(f"--caption_mode_probs {text}: three shares such as 15,35,50")
    return probs
