"""diag.py listen: compare how models follow prompts before and after training, by nano's grader, by CLIP or by eye.

The result has one column for each model: the base, the base with a trained text encoder, and the base with this encoder
and a translator (a LoRA). All models sample from the same seeds.
"""

import itertools
import math
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from diagnostics.common import runtime, write_json
from nano.evaluate import SUITE_NAMES, gradable, listen, word_suites
from nano.grader import proportion
from nano.world import NEW_WORDS, parse_words
from nanowan.errors import BadInput, check_at_least
from nanowan.pipeline import Pipeline
from nanowan.prompts import read_prompts
from nanowan.settings import parse_size
from nanowan.training.captions import has_keyword, replace_keyword
from nanowan.variants.animate.clip import load_clip
from nanowan.video import to_uint8, write_grid, write_mp4
from sample import decode, encode_text, sample_latents

TEMPLATES = ["a video of {}", "a close-up of {}", "{} in bright daylight", "{} in front of a plain wall"]
OTHER_PROMPTS = ["a red fox runs through fresh snow", "a paper boat drifts down a stream"]
FRAMES = 8  # CLIP sees this many frames of a clip
N_GRADED, N_JUDGED = 40, 8  # prompts per word: on nano, whose clips take little time; on other models


# ---- columns -----------------------------------------------------------------------------------------------------
def parse_strengths(files):
    """Return {strength: files} if the last of --text_encoder's files is given with several strengths, as in
    FILE:0,0.5,1. Each list of files then ends with FILE at one of these strengths. With a single strength or none,
    return {None: files}.
    """
    *before, last = files or [""]
    file, _, numbers = last.rpartition(":")
    if "," not in numbers or Path(last).exists():
        return {None: files}
    return {strength: [*before, f"{file}:{strength}"] for strength in numbers.split(",")}


def open_columns(args, how):
    """Return {column name: Pipeline}: the base; with --text_encoder, the base with this encoder; with --lora, the base
    with this encoder, if any, and the translator. With --skip_before, return only the last of these columns. If
    --text_encoder gives several strengths, return instead a column for each strength, with the translator, if any. how:
    a Runtime.
    """
    encoders = parse_strengths(args.text_encoder)
    if None not in encoders:
        translator = " + translator" if args.lora else ""
        return {
            f"encoder x {strength}{translator}": Pipeline(args.ckpt, how, args.lora, files)
            for strength, files in encoders.items()
        }
    columns, files = {"base": Pipeline(args.ckpt, how)}, encoders[None]
    if files:
        columns["+ encoder"] = Pipeline(args.ckpt, how, (), files)
    if args.lora:
        name = "+ encoder + translator" if files else "+ translator"
        columns[name] = Pipeline(args.ckpt, how, args.lora, files)
    return dict([*columns.items()][-1:]) if args.skip_before else columns


def sample_clips(pipe, prompts, seeds, **settings):
    """Sample prompts[i] from seeds[i], and yield the clips (3,T,H,W) on the host. The models leave memory after the
    last clip. settings: values that override the Pipeline's Settings.
    """
    s = pipe.settings.with_overrides(**settings)
    (embeddings, lens), negative = encode_text(pipe, s, prompts)
    negative = negative and tuple(t[:1] for t in negative)
    pipe.drop("text")
    for i, seed in enumerate(seeds):
        text = (embeddings[i : i + 1], lens[i : i + 1]), negative
        yield decode(pipe, sample_latents(pipe, text, [seed], **settings))[0].cpu()
    pipe.drop()


def some_frames(video, n):
    """Return n frames of a clip (3,T,H,W), evenly spaced from the first frame to the last."""
    return video[:, np.linspace(0, video.shape[1] - 1, n).round().astype(int)]


def draw_sheet(columns, prompts, seed, out, **settings):
    """Write a contact sheet to the file `out`: a row for each prompt, with the clip of each column in `columns` {name:
    Pipeline}. The clips are those that sample.py makes with this seed. Returns {"prompts", "seed", "sheet": the file}.
    settings: values that override the Settings.
    """
    seeds = [seed] * len(prompts)
    clips = [[some_frames(clip, 3) for clip in sample_clips(p, prompts, seeds, **settings)] for p in columns.values()]
    labels = [f"{name}: {prompt}" for prompt in prompts for name in columns]
    write_grid(out, [clip for row in zip(*clips) for clip in row], labels, columns=len(columns))
    return {"prompts": prompts, "seed": seed, "sheet": str(out)}


# ---- what is asked -----------------------------------------------------------------------------------------------
class Row(NamedTuple):
    """A prompt to sample. word: the word that the prompt tests, or None. texts: copies of the prompt, each with one of
    the word's alternatives (see parse_alternatives) in place of the word, the correct alternative first.
    """

    prompt: str
    word: str | None = None
    texts: tuple = ()


def parse_alternatives(items):
    """Return the --words of a test with CLIP as a dictionary: ["crimson=red,blue"] -> {"crimson": ["red", "blue"]}. The
    first alternative is what the word should look like; the others are wrong. Raises BadInput for an item that does not
    name a word and at least two alternatives, all different.
    """
    words = {}
    for item in items:
        word, _, looks = item.partition("=")
        words[word] = [look.strip() for look in looks.split(",") if look.strip()]
        if not word or len(set(words[word])) < max(2, len(words[word])):
            raise BadInput(
                f"--words {item}: with --clip give what the word should look like and then what not, as in "
                "crimson=red,blue,green"
            )
    return words


def rows_of(words, lines, n):
    """Return the Rows to sample: n for each word in `words` {word: alternatives}, and one for each prompt that tests no
    word.

    lines: the user's prompts. A prompt with {} is a template for every word; a prompt that contains a word tests that
    word; any other prompt tests no word, but shows whether training has changed anything else. A word without prompts
    gets TEMPLATES. If every prompt is a template or tests a word, OTHER_PROMPTS are added.
    """
    rows = []
    for word, alternatives in words.items():
        with_word = [line for line in lines if "{}" in line or has_keyword(line, [word])] or TEMPLATES
        for i in range(n):
            prompt = with_word[i % len(with_word)].replace("{}", word)
            rows.append(Row(prompt, word, tuple(replace_keyword(prompt, word, a) for a in alternatives)))
    others = [line for line in lines if "{}" not in line and not has_keyword(line, words)]
    return rows + [Row(line) for line in others or OTHER_PROMPTS]


# ---- scores ------------------------------------------------------------------------------------------------------
def average(values):
    """Return {"mean", "n", "low", "high"} of a list of values. low, high: the 95 % interval of the mean (1.96 standard
    errors), or None for a single value.
    """
    n, mean = len(values), sum(values) / len(values)
    error = 1.96 * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else None
    low, high = (mean - error, mean + error) if n > 1 else (None, None)
    return {"mean": mean, "n": n, "low": low, "high": high}


def cell(score):
    """Return the text of a table cell: a score, which is a proportion or an average, with its interval. score: what
    proportion or average returned, or None for an empty cell.
    """
    if score is None:
        return ""
    interval = "" if score["low"] is None else f" [{score['low']:.3f}, {score['high']:.3f}]"
    return f"{score.get('right', score.get('mean')):.3f}{interval}"


def show_scores(scores):
    """Print a table of `scores`, as returned by judge. Then print each score whose interval in the last column lies
    below its interval in the column before. The last column must have every suite.
    """
    wide = max(24, *(len(name) + 2 for name in scores))
    print(" " * 23 + "".join(f"{name:{wide}}" for name in scores).rstrip())
    for suite, kinds in [*scores.values()][-1].items():
        for kind, last in kinds.items():
            cells = [cell(suites.get(suite, {}).get(kind)) for suites in scores.values()]
            name = SUITE_NAMES.get(suite, suite)
            print(f"{name:14} {kind:8}" + "".join(f"{text:{wide}}" for text in cells) + f"n = {last['n']}")
    for (before, old), (after, new) in [*itertools.pairwise(scores.items())][-1:]:
        for suite, kind in ((suite, kind) for suite, kinds in new.items() for kind in kinds):
            limit = old.get(suite, {}).get(kind, {}).get("low")
            if limit is not None and new[suite][kind]["high"] < limit:
                print(f"{SUITE_NAMES.get(suite, suite)}, {kind}: lower with {after!r} than with {before!r}")


def run_grader(command, file, prompt):
    """Run `command FILE PROMPT`, where `file` is an mp4, and return the number that the command prints. Raises BadInput
    if the command fails or prints something else.
    """
    done = subprocess.run([*shlex.split(command), str(file), prompt], capture_output=True, text=True)
    try:
        if done.returncode == 0:
            return float(done.stdout)
    except ValueError:
        pass
    said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
    raise BadInput(f"--grader {command}: should print one number and exit with 0, not {done.returncode}; said {said!r}")


def sample_rows(pipe, rows, seed, grader, settings):
    """Sample the clip of each Row, row i from seed + i. Returns (frames, numbers): FRAMES frames (F,3,H,W) uint8 of
    each clip, and the number that run_grader returns for each clip, or [] without a grader. grader: a command, or None.
    """
    frames, numbers = [], []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip.mp4"
        prompts, seeds = [row.prompt for row in rows], range(seed, seed + len(rows))
        for i, video in enumerate(sample_clips(pipe, prompts, seeds, **settings)):
            print(f"  {i + 1} of {len(rows)}: {rows[i].prompt}", flush=True)
            frames.append(torch.from_numpy(to_uint8(some_frames(video, FRAMES))).permute(0, 3, 1, 2))
            if grader:
                write_mp4(file, video, pipe.settings.fps)
                numbers.append(run_grader(grader, file, rows[i].prompt))
    return frames, numbers


def psnr(a, b):
    """Return the PSNR in dB between two uint8 clips of the same shape."""
    return -10 * math.log10(max((a.float() - b.float()).div(255).square().mean().item(), 1e-9))


def judge(columns, rows, seed, load=None, grader=None, **settings):
    """Sample the Rows in every column. Return {column: {suite: {kind of score: statistics}}}. statistics: what
    `proportion` returns for "clip", and what `average` returns for the other kinds. A suite is a word,
    "all words" or "other prompts" (Rows that test no word). The kinds of score:

    "clip", for Rows that test a word: the share of clips for which CLIP finds the first of the Row's texts (the correct
    one) most probable. The probability of a text is its mean over the clip's frames. "psnr", for Rows that test no
    word: the mean PSNR in dB between a clip and the first column's clip of the same Row. "clip_i", for Rows that test
    no word: the mean cosine between CLIP's features of the frames of these two clips. The first column has neither
    "psnr" nor "clip_i". "grader", for all Rows: the mean of the numbers that the command `grader` prints.

    columns: {name: Pipeline}. load: a function that loads CLIP, called once all clips are sampled, or None. grader: a
    command, or None.
    """
    frames, numbers = {}, {}
    for name, pipe in columns.items():
        print(name)
        frames[name], numbers[name] = sample_rows(pipe, rows, seed, grader, settings)
    clip, first, scores = load and load(), next(iter(columns)), {}
    features = clip and {k: [clip.encode_images(x / 127.5 - 1) for x in side] for k, side in frames.items()}
    texts = clip and [row.word and clip.encode_texts(row.texts) for row in rows]
    for name in columns:
        values = {}
        for i, row in enumerate(rows):
            measured = {"grader": numbers[name][i]} if grader else {}
            if row.word and clip:
                measured["clip"] = clip.probabilities(features[name][i], texts[i]).mean(0).argmax().item() == 0
            if not row.word and name != first:
                measured["psnr"] = psnr(frames[name][i], frames[first][i])
                if clip:
                    measured["clip_i"] = (features[name][i] * features[first][i]).sum(1).mean().item()
            for suite in (row.word, "all words") if row.word else ("other prompts",):
                for what, value in measured.items():
                    values.setdefault(suite, {}).setdefault(what, []).append(value)
        order = [*dict.fromkeys(row.word for row in rows if row.word), "all words", "other prompts"]
        scores[name] = {
            suite: {k: proportion(sum(v), len(v)) if k == "clip" else average(v) for k, v in values[suite].items()}
            for suite in order
            if suite in values
        }
    return scores


def judge_words(args, columns, lines, how, settings):
    """Return what `judge` returns for the --words and for the prompts `lines`. The judges are CLIP (--clip), a command
    (--grader) or both. args: the flags. Raises BadInput for wrong flags, before any clip is sampled.
    """
    if args.grader and not shutil.which(shlex.split(args.grader)[0]):
        raise BadInput(f"--grader {args.grader}: no such command")
    if args.clip:
        load_clip(args.clip, "meta")
    words = parse_alternatives(args.words) if args.clip else {w.partition("=")[0]: () for w in args.words}
    if not words:
        raise BadInput("--words: say which words to ask for, as in --words crimson=red,blue,green")
    load = (lambda: load_clip(args.clip, how.device)) if args.clip else None
    return judge(columns, rows_of(words, lines, args.n or N_JUDGED), args.seed, load, args.grader, **settings)


def run(args):
    check_at_least(1, n=args.n)
    how, prompts = runtime(args), read_prompts(args.prompts) if args.prompts else []
    lines = [prompt.text for prompt in prompts]
    if any(p.settings or p.inputs or p.seed is not None for p in prompts):
        print(f"--prompts {args.prompts}: options of single prompts are left out; all clips are made by these flags")
    columns = open_columns(args, how)
    settings = {"size": args.size and parse_size(args.size), "frames": args.frames, "steps": args.steps}
    s = next(iter(columns.values())).settings.with_overrides(**settings)
    if args.clip or args.grader:
        result = judge_words(args, columns, lines, how, settings)
        show_scores(result)
    elif gradable(s) and not lines:
        words, n = parse_words(",".join(args.words)) or list(NEW_WORDS), args.n or N_GRADED
        word_suites(words, n, args.seed)  # raises BadInput before any work
        result = {}
        for name, pipe in columns.items():
            print(name)
            result[name] = listen(pipe, words, n, args.seed, progress=True, **settings)
        show_scores(result)
        shown = [rows[0]["prompt"] for rows in word_suites(words, 1, args.seed).values()]
        draw_sheet(columns, shown, args.seed, args.out, **settings)
        print(args.out)
    else:
        result = draw_sheet(columns, lines or OTHER_PROMPTS, args.seed, args.out, **settings)
        print(args.out)
    write_json(args.json, result)
