"""diag.py listen: does a changed model follow its prompts better? Graded on nano, a contact sheet for other models."""

from diagnostics.common import runtime, write_json
from nano.evaluate import gradable, sample_and_grade
from nano.grader import wilson
from nano.world import ATTRIBUTES, NEW_WORDS, parse_words, prompts
from nanowan.errors import check_at_least
from nanowan.pipeline import Pipeline
from nanowan.prompts import read_texts
from nanowan.video import write_grid
from sample import decode, sample_latents

DEFAULT_PROMPTS = ["a red fox runs through fresh snow", "a paper boat drifts down a stream"]


def score(n_right, n):
    low, high = wilson(n_right, n)
    return {"right": n_right / n, "n": n, "low": low, "high": high}


def count_right(grades, rows, kind):
    return sum(grade[kind] == row[kind] for grade, row in zip(grades, rows))


def listen(models, words, n, seed=0, progress=False):
    """The grader's share right of each new word (n prompts), of all of them pooled, and of old words' attributes (as
    many prompts as for all new words): {suite: {attribute: {"right", "n", "low", "high"}}}, with the 95 % interval.
    n: 1 or more.
    """
    suites, pooled = {}, 0
    for word in words:
        if progress:
            print(f"  {word}: {n} prompts", flush=True)
        rows, kind = prompts(n, seed, words=[word]), NEW_WORDS[word][0]
        n_right = count_right(sample_and_grade(models, rows, seed)[0], rows, kind)
        suites[word] = {kind: score(n_right, n)}
        pooled += n_right
    if words:
        suites["new words"] = {"pooled": score(pooled, n * len(words))}
    rows = prompts(n * max(1, len(words)), seed)
    if progress:
        print(f"  old words: {len(rows)} prompts", flush=True)
    grades, _ = sample_and_grade(models, rows, seed)
    suites["old words"] = {kind: score(count_right(grades, rows, kind), len(rows)) for kind in ATTRIBUTES}
    return suites


def show_scores(scores):
    """scores: {"before" | "after": what `listen` returned}."""
    for suite, kinds in next(iter(scores.values())).items():
        for kind, first in kinds.items():
            cells = []
            for side, suites in scores.items():
                s = suites[suite][kind]
                cells.append(f"{side} {s['right']:.3f} [{s['low']:.3f}, {s['high']:.3f}]")
            print(f"{suite:10} {kind:7} {'   '.join(cells)}   n = {first['n']}")


def draw_sheet(sides, prompts, seed, out):
    """Clips of the prompts by each of the {name: Pipeline}, side by side."""
    clips, labels = [], []
    made = {
        name: [decode(models, sample_latents(models, [p], [seed + i]))[0].cpu() for i, p in enumerate(prompts)]
        for name, models in sides.items()
    }
    for i, prompt in enumerate(prompts):
        for name in sides:
            clips.append(made[name][i])
            labels.append(f"{name}: {prompt}")
    write_grid(out, clips, labels, columns=len(sides))
    return {"prompts": prompts, "seed": seed, "sheet": str(out)}


def run(args):
    check_at_least(1, n=args.n)
    changed = bool(args.lora or args.text_encoder)
    how, sides = runtime(args), {}
    if not changed or not args.skip_before:
        sides["before"] = Pipeline(args.ckpt, how)
    if changed:
        sides["after"] = Pipeline(args.ckpt, how, args.lora, args.text_encoder)
    if gradable(next(iter(sides.values())).settings) and not args.prompts:
        words = parse_words(args.words) or list(NEW_WORDS)
        result = {name: listen(models, words, args.n, args.seed) for name, models in sides.items()}
        show_scores(result)
    else:
        texts = read_texts(args.prompts, "--prompts") if args.prompts else DEFAULT_PROMPTS
        result = draw_sheet(sides, texts, args.seed, args.out)
        print(args.out)
    write_json(args.json, result)
