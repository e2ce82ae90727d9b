"""The nano world: moving shapes, drawn exactly, and their captions.

A clip is 64x64 px, 9 frames: one shape with a colour and a motion in front of a plain background.
"""

import random
import re
import zlib
from itertools import product

import torch

from nanowan.errors import BadInput

SIZE, FRAMES, FPS, RADIUS, STEP = 64, 9, 8, 13, 4  # px, frames, frames/s, px, px per frame
COLORS = {
    "red": (230, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 240),
    "yellow": (240, 225, 40),
    "purple": (160, 60, 210),
    "cyan": (50, 215, 225),
    "white": (248, 248, 248),
}
SHAPES = ("circle", "square", "triangle", "cross")
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
# values that the base DiT has never seen; `python -m nano clips` draws them, and the grader knows them ("bounce": left,
# then back to the right)
# there is no new shape, because nano's VAE turns a ring into a disc
UNDRAWN = {"color": {"orange": (245, 135, 30)}, "motion": ("bounce",)}
BACKGROUNDS = {"dark": (20, 20, 24), "grey": (128, 128, 128)}
VALUES = {"color": COLORS, "shape": SHAPES, "motion": MOTIONS}  # what the base DiT has seen, by attribute
ATTRIBUTES = tuple(VALUES)
VERBS = {
    "left": ("moves left", "slides left", "drifts to the left"),
    "right": ("moves right", "slides right", "drifts to the right"),
    "up": ("moves up", "rises", "climbs"),
    "down": ("moves down", "falls", "drops"),
    "still": ("stays still", "rests", "does not move"),
}
TEMPLATES = (
    "a {color} {shape} {verb}",
    "the {color} {shape} {verb}",
    "{background} background, a {color} {shape} {verb}",
    "a {color} {shape} {verb} on a {background} background",
    "a {shape} that is {color} {verb}",
    "there is a {color} {shape} and it {verb}",
)
# Words that the base has never read, and what they mean. `python -m nano clips --words` puts new words in captions, and
# `python -m nano eval --words` grades prompts with new words.
NEW_WORDS = {
    "crimson": ("color", "red"),
    "azure": ("color", "blue"),
    "box": ("shape", "square"),
    "orb": ("shape", "circle"),
    "wedge": ("shape", "triangle"),
    "sinks": ("motion", "down"),
    "ascends": ("motion", "up"),
    "halts": ("motion", "still"),
    "retreats": ("motion", "left"),
    "advances": ("motion", "right"),
    "orange": ("color", "orange"),
    "plus": ("shape", "cross"),
}
TRIPLES = list(product(COLORS, SHAPES, MOTIONS))
UNSEEN = set(random.Random(0).sample(TRIPLES, 20))  # triples left out of training, to grade composition


def template(shape, radius, center, size=SIZE):
    """Return the coverage (B,T,size,size) of each pixel by a shape, in [0,1], anti-aliased. shape (B,): indices into
    SHAPES. radius (B,) px. center (B,T,2): x, y in px.
    """
    grid = torch.arange(size) + 0.5
    x = grid[None, None, None, :] - center[..., 0, None, None]
    y = grid[None, None, :, None] - center[..., 1, None, None]
    r = radius.view(-1, 1, 1, 1).float()

    def box(a, b):
        return torch.maximum(x.abs() - a, y.abs() - b)

    distance = torch.stack(
        [  # signed, in px, negative inside
            (x * x + y * y).sqrt() - r,
            box(0.89 * r, 0.89 * r),
            torch.maximum(y - 0.6 * r, x.abs() * 0.866 - y * 0.5 - 0.6 * r),
            torch.minimum(box(1.08 * r, 0.38 * r), box(0.38 * r, 1.08 * r)),
        ],
        1,
    )
    distance = distance[torch.arange(len(shape)), shape]
    return (0.5 - distance).clamp(0, 1)


def render(shape, color, background, center, size=SIZE):
    """Return clips (B,3,T,size,size) in [-1,1], each of one shape. shape (B,): indices into SHAPES. color, background
    (B,3): RGB in 0..255. center (B,T,2): x, y in px.
    """
    cover = template(shape, torch.full((len(shape),), float(RADIUS)), center, size)[:, None]
    color, background = (c.float().view(-1, 3, 1, 1, 1) / 127.5 - 1 for c in (color, background))
    return background + (color - background) * cover


def paths_of(motion):
    """Return all paths of a motion, each a list of 9 centres (x, y). A path goes through the middle of the frame,
    shifted by -4, 0 or 4 px at right angles to the motion. Paths of "still" are shifted in x and in y.
    """
    middle = FRAMES // 2
    steps = [abs(t - middle) - middle // 2 if motion == "bounce" else t - middle for t in range(FRAMES)]
    dx, dy = MOTIONS["right" if motion == "bounce" else motion]
    return [
        [(SIZE / 2 + jx + dx * STEP * n, SIZE / 2 + jy + dy * STEP * n) for n in steps]
        for jx in ((0,) if dx else (-4, 0, 4))
        for jy in ((0,) if dy else (-4, 0, 4))
    ]


def paint(attributes, centers):
    """Return clips (B,3,9,64,64) in [-1,1], one for each of B `attributes` {"color", "shape", "motion", "background"}.
    centers (B,9,2): x, y of the shape in px.
    """
    palette = COLORS | UNDRAWN["color"]
    return render(
        torch.tensor([SHAPES.index(a["shape"]) for a in attributes]),
        torch.tensor([palette[a["color"]] for a in attributes]),
        torch.tensor([BACKGROUNDS[a["background"]] for a in attributes]),
        torch.tensor(centers),
    )


def draw(attributes, seed):
    """Return clips (B,3,9,64,64) in [-1,1], one for each of B `attributes` {"color", "shape", "motion", "background"},
    along paths that are drawn at random from the seed.
    """
    rng = random.Random(seed)
    return paint(attributes, [rng.choice(paths_of(a["motion"])) for a in attributes])


def caption_of(a, rng, words=(), form=None):
    """Return a caption of the attributes `a`. words: new words. If a word means a value that `a` has, it replaces the
    known word for this value. form: a template (default: a random one).
    """
    value = {
        "color": a["color"],
        "shape": a["shape"],
        "verb": rng.choice(VERBS.get(a["motion"], (a["motion"],))),
        "background": a["background"],
    }
    for word in words:
        kind, meaning = NEW_WORDS[word]
        if a[kind] == meaning:
            value["verb" if kind == "motion" else kind] = word
    return re.sub(r"\ba (?=[aeiou])", "an ", (form or rng.choice(TEMPLATES)).format(**value))


def held_out(caption, word=None):
    """Return whether a caption is kept out of training. Its checksum decides: one caption in ten is kept out, or one in
    two if the caption contains a new word. word: the new word, or None.
    """
    return zlib.crc32(caption.encode()) % (2 if word else 10) == 0


def sample_attributes(rng, triples=None):
    color, shape, motion = rng.choice(triples or [t for t in TRIPLES if t not in UNSEEN])
    return {"color": color, "shape": shape, "motion": motion, "background": rng.choice(list(BACKGROUNDS))}


def training_caption(a, rng):
    """Return a random caption of the attributes `a` to train the base with: with probability 0.1 it is empty (for
    guidance), with 0.1 it names one attribute only, and else it is a sentence that is not held out.
    """
    u = rng.random()
    if u < 0.1:
        return ""
    if u < 0.2:
        return caption_of(a, rng, form=rng.choice(("{color}", "{shape}", "{verb}")))
    while held_out(caption := caption_of(a, rng)):
        pass
    return caption


def prompts(n, seed, unseen=False, words=(), at_most=False):
    """Return a list of n different prompts with their attributes, {"prompt", "color", ...}; the base was trained on
    none of them.

    The prompts are held-out captions of the triples (colour, shape, motion) that the base was trained on. With
    `unseen`, they are any captions of the triples that it was not trained on. With `words`, each is a held-out caption
    with one of these new words, and the words take turns; `python -m nano clips` never writes a held-out caption. If
    fewer than n prompts are found, BadInput is raised or, with `at_most`, the shorter list is returned.
    """
    rng, rows = random.Random(f"prompts {seed} {unseen}"), {}
    for _ in range(200 * n):
        if len(rows) == n:
            break
        word = words[len(rows) % len(words)] if words else None
        a = sample_attributes(rng, triples_of(word) if word else sorted(UNSEEN) if unseen else None)
        caption = caption_of(a, rng, [word] if word else [])
        if unseen or held_out(caption, word):
            rows[caption] = {"prompt": caption, **a, **({"word": word} if word else {})}
    if len(rows) < n and not at_most:
        raise BadInput(f"--n {n}: there are only about {len(rows)} such prompts")
    return list(rows.values())


def triples_of(*words):
    """Return the triples (colour, shape, motion) that contain the meanings of all `words` (new words of different
    kinds). The other attributes take all values in VALUES. Triples that were left out of training are not included.
    """
    values = VALUES | {kind: [meaning] for kind, meaning in map(NEW_WORDS.get, words)}
    return [t for t in product(*values.values()) if t not in UNSEEN]


def every_clip():
    """Return ([attributes], clips (N,3,9,64,64)): all clips of the triples (colour, shape, motion) to train on."""
    attributes, centers = [], []
    for color, shape, motion in TRIPLES:
        if (color, shape, motion) not in UNSEEN:
            for background in BACKGROUNDS:
                for path in paths_of(motion):
                    attributes.append({"color": color, "shape": shape, "motion": motion, "background": background})
                    centers.append(path)
    return attributes, paint(attributes, centers)


def parse_words(text):
    """Return the words in the value of --words: "crimson,scarlet=red" -> ["crimson", "scarlet"]. A word that is given
    with its meaning, such as scarlet, is added to NEW_WORDS. Raises BadInput for a word without a known meaning, and
    for a meaning that the nano world does not have.
    """
    words = []
    for item in text.split(",") if text else []:
        word, equals, meaning = item.partition("=")
        if equals:
            said = meaning_of(word, meaning)
            if NEW_WORDS.setdefault(word, said) != said:
                raise BadInput(f"--words {item}: {word} means {NEW_WORDS[word][1]}")
        elif word not in NEW_WORDS:
            raise BadInput(
                f"--words {word}: the nano world defines {', '.join(NEW_WORDS)}; of another say what it means, as in "
                f"{word}=red"
            )
        words.append(word)
    return words


def known_values():
    """Return {attribute: list of its values}. The values that the base has never drawn come last."""
    return {kind: [*values, *UNDRAWN.get(kind, ())] for kind, values in VALUES.items()}


def base_words():
    """Return the set of all words in the captions that the base was trained on."""
    spoken = [verb for verbs in VERBS.values() for verb in verbs]
    return set(re.findall(r"\w+", " ".join([*COLORS, *SHAPES, *MOTIONS, *BACKGROUNDS, *spoken, *TEMPLATES, "an"])))


def meaning_of(word, meaning):
    """Return (attribute, value) for a new word and its meaning, such as ("color", "red") for the meaning "red". Raises
    BadInput if the word is not a new word or no attribute has the meaning as a value.
    """
    values = known_values()
    item, known = f"--words {word}={meaning}", ", ".join(v for of_kind in values.values() for v in of_kind)
    if not re.fullmatch(r"\w+", word):
        raise BadInput(f"{item}: a word is letters, digits and _")
    if word in base_words():
        raise BadInput(f"{item}: {word!r} is no new word, the base has read it")
    kinds = [kind for kind, of_kind in values.items() if meaning in of_kind]
    if not kinds:
        raise BadInput(f"{item}: {meaning!r} is nothing here; a word may mean {known}")
    return kinds[0], meaning
