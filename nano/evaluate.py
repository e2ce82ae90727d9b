"""Measure how well a checkpoint follows its prompts, by grading clips of prompts with known attributes."""

import json
from pathlib import Path

import torch

from nano.grader import grade, proportion, wilson
from nano.world import ATTRIBUTES, FRAMES, NEW_WORDS, SIZE, known_values, prompts
from nanowan.errors import BadInput
from sample import decode, sample_latents

SUITE_NAMES = {"old words": "known words"}  # {a suite's key in JSON files: its printed name}


def gradable(settings):
    """Return whether a checkpoint with these Settings makes clips of the size and length that the grader reads."""
    return (tuple(settings.size), settings.frames) == ((SIZE, SIZE), FRAMES)


def read_graded_prompts(file):
    """Return the list of prompts in a JSONL file with lines {"prompt": ..., "color": ..., "shape": ..., "motion": ...}.
    A line may leave out attributes, which are then not graded. Raises BadInput for any other file.
    """
    known, rows = known_values(), []
    try:
        for i, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines()):
            if line.strip():
                row = json.loads(line)
                for kind in ATTRIBUTES:
                    if kind in row and row[kind] not in known[kind]:
                        raise BadInput(
                            f"{file}, line {i + 1}: {kind} {row[kind]!r} is none of {', '.join(known[kind])}"
                        )
                if not isinstance(row["prompt"], str):
                    raise BadInput(f"{file}, line {i + 1}: the prompt is not text")
                rows.append(row)
    except BadInput:
        raise
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise BadInput(f'{file}: not lines of {{"prompt": ..., "color": ...}} ({type(e).__name__}: {e})') from None
    if not rows:
        raise BadInput(f"{file}: holds no prompts")
    return rows


def word_attribute(row):
    """Return the attribute that the new word of a prompt names, and its value, such as {"color": "red"}. row: a prompt
    with its "word" and its attributes.
    """
    kind = NEW_WORDS[row["word"]][0]
    return {kind: row[kind]}


def sample_and_grade(models, rows, seed=0, batch=50, **overrides):
    """Sample a clip for each prompt (prompt i from seed + i), and grade the clips. Returns (grades, clips (N,3,9,64,64)
    on the host). rows: the prompts, each a dictionary with "prompt". batch: number of clips that are sampled at once.
    overrides: keyword arguments of sample.sample_latents.
    """
    clips = []
    for i in range(0, len(rows), batch):
        texts = [r["prompt"] for r in rows[i : i + batch]]
        seeds = [seed + i + j for j in range(len(texts))]
        clips.append(decode(models, sample_latents(models, texts, seeds, progress=False, **overrides)).cpu())
    clips = torch.cat(clips)
    return [grade(c) for c in clips], clips


def word_suites(words, n, seed):
    """Return {suite: prompts with attributes}. The suite of a new word has n prompts. The suite of the known words,
    "old words", has as many prompts as all new words together, or fewer if no more exist. Raises BadInput if a new word
    has fewer than n prompts.
    """
    suites = {word: prompts(n, seed, words=[word]) for word in words}
    return suites | {"old words": prompts(n * max(1, len(words)), seed, at_most=True)}


def listen(models, words, n, seed=0, progress=False, **overrides):
    """Return {suite: {attribute: what grader.proportion returns}}, the accuracy on the suites of word_suites. A prompt
    with a new word is graded for the attribute that this word names. The prompts of the suite "old words" contain only
    known words, and are graded for every attribute. One more suite, "new words", holds the accuracy on all prompts with
    new words together. n: prompts per new word, 1 or more. overrides: keyword arguments of sample.sample_latents.
    """
    scores, pooled = {}, 0
    for suite, rows in word_suites(words, n, seed).items():
        if progress:
            print(f"  {SUITE_NAMES.get(suite, suite)}: {len(rows)} prompts", flush=True)
        grades, _ = sample_and_grade(models, rows, seed, **overrides)
        kinds = [NEW_WORDS[suite][0]] if suite in words else ATTRIBUTES
        right = {kind: sum(grade[kind] == row[kind] for grade, row in zip(grades, rows)) for kind in kinds}
        if suite in words:
            pooled += right[kinds[0]]
        elif words:
            scores["new words"] = {"pooled": proportion(pooled, n * len(words))}
        scores[suite] = {kind: proportion(right[kind], len(rows)) for kind in kinds}
    return scores


def print_scores(name, rows, accuracy, grades):
    """Print the mean iou of a suite and, for each attribute, the accuracy with its 95 % interval. name: the suite's
    name. rows: the suite's prompts. accuracy: what grader.shares returns. grades: what grader.grade returned for each
    clip.
    """
    iou = sum(g["iou"] for g in grades) / len(grades)
    print(f"{name} (n = {len(rows)}, iou {iou:.3f})")
    for kind, share in accuracy.items():
        n = sum(kind in r for r in rows)
        low, high = wilson(round(share * n), n)
        print(f"  {kind:8} {share:.3f}   95 % [{low:.3f}, {high:.3f}]")
