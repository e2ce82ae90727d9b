"""Properties that hold for every input of a family: captions, prompt lines, buckets, windows, names, files' weights."""

import json
import math
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import Batches
from flow import shift_t, unshift_t
from nanowan import video
from nanowan.errors import BadInput, Skip
from nanowan.flags import read_config, write_config
from nanowan.formats.layouts import DIFFUSERS_NAMES
from nanowan.formats.lora import Place, official_name, parse_lora_spec
from nanowan.memory.offload import spread
from nanowan.parallel.ulysses import Ulysses
from nanowan.prompts import Prompt, parse_line, parse_row
from nanowan.settings import check_frames, parse_size
from nanowan.training.captions import UNITS, augment_caption, has_keyword, join_units, replace_keyword, spans
from nanowan.training.scan import MAX_ASPECT, buckets, clip_windows, nearest_bucket

EXAMPLES = {False: 60, True: 3000}  # of each property, and in make test-slow
SLOW = pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)])

words = st.text("abcdé猫ไ'-", min_size=1, max_size=5)
captions = st.lists(
    st.sampled_from(["red", "a", "Red", "cat", "red-hot", "ready", "猫", "猫猫", "ไทย", ",", "x.y"]) | words
)
captions = captions.map(" ".join) | captions.map("".join)
keywords = st.sampled_from(["red", "a red", "猫", "x.y", "ไทย", "red-hot"])


def holds(property, slow, *strategies):
    """Whether property(*values) holds for values of all strategies: the same ones in every run, but for the slow."""
    how = settings(max_examples=EXAMPLES[slow], derandomize=not slow, deadline=None, database=None)
    given(*strategies)(how(property))()


# ---- captions and prompts --------------------------------------------------------------------------------------------
@SLOW
def test_a_keyword_stands_where_it_is_read_and_is_replaced_there(slow):
    def check(caption, keyword, word):
        found = spans(caption, keyword)
        assert all(caption[a:b].lower() == keyword.lower() for a, b in found)
        assert all(b <= c for (_, b), (c, _) in zip(found, found[1:]))
        assert has_keyword(caption, [keyword]) == bool(found)
        pieces, at = [], 0
        for a, b in found:
            pieces += [caption[at:a], word]
            at = b
        assert replace_keyword(caption, keyword, word) == "".join([*pieces, caption[at:]])

    holds(check, slow, captions, keywords, words)


@SLOW
def test_what_is_shown_of_a_caption_keeps_its_keywords_and_its_order(slow):
    def check(caption, chosen, mode, trim, rng):
        present = [k for k in chosen if has_keyword(caption, [k])]
        probs = [float(i == mode) for i in range(3)]
        shown = augment_caption(caption, chosen, probs, trim, rng)
        if not present:
            assert trim or shown == caption
        elif mode == 0:
            assert shown in present
        elif mode == 1:
            assert shown in caption and has_keyword(shown, present)
        else:
            assert all(has_keyword(shown, [k]) for k in present)
            left = iter("".join(caption.split()))
            assert all(letter in left for letter in "".join(shown.split()))

    chosen = st.lists(keywords, max_size=3, unique=True)
    holds(
        check, slow, captions, chosen, st.integers(0, 2), st.sampled_from([0.0, 1.0]), st.randoms(use_true_random=False)
    )


@SLOW
def test_all_units_of_a_caption_are_the_caption_but_for_spaces(slow):
    def check(caption):
        joined = join_units(caption, list(UNITS.finditer(caption)))
        assert joined.split() == caption.split() and join_units(joined, list(UNITS.finditer(joined))) == joined

    holds(check, slow, captions)


@SLOW
def test_a_prompts_line_and_row_say_the_same(slow):
    texts = (
        st.text("abc -,.'\"猫", max_size=20).map(str.strip).filter(lambda t: " --" not in t and not t.startswith("--"))
    )
    sides = st.integers(1, 4096)
    options = st.fixed_dictionaries(
        {},
        optional={
            "size": st.tuples(sides, sides),
            "seed": st.integers(-1, 2**40),
            "steps": st.integers(-3, 1000),
            "guidance": st.floats(0, 20),
            "negative": texts,
        },
    )

    def check(text, values):
        line, row = [text], {"prompt": text} | values
        letters = {"seed": "d", "steps": "s", "guidance": "g", "negative": "n"}
        for name, value in values.items():
            line.append(f"--w {value[0]} --h {value[1]}" if name == "size" else f"--{letters[name]} {value}")
        want = {k: v for k, v in values.items() if k != "seed"}
        want |= {"guidance": (want["guidance"],)} if "guidance" in want else {}
        assert parse_line(" ".join(line)) == Prompt(text, want, {}, values.get("seed"))
        assert parse_row(json.dumps(row)) == Prompt(text, want, {}, values.get("seed"))

    holds(check, slow, texts, options)


# ---- sizes, buckets, frames ------------------------------------------------------------------------------------------
@SLOW
def test_a_size_is_read_as_it_is_written_or_refused(slow):
    def check(w, h, sep, text):
        assert parse_size(f"{w}{sep}{h}") == (w, h)
        try:
            assert len(parse_size(text)) == 2
        except BadInput as e:
            assert text in str(e)

    holds(
        check,
        slow,
        st.integers(1, 9999),
        st.integers(1, 9999),
        st.sampled_from("xX*"),
        st.text("0189x*-.,a ", max_size=9),
    )


@SLOW
def test_a_bucket_is_the_one_that_cuts_least_and_has_its_mirror_image(slow):
    def check(width, height, area, multiple):
        found = buckets(area, multiple)
        assert found == sorted({*found, *((h, w) for w, h in found)})
        for w, h in found if len(found) > 1 else ():
            assert w % multiple == h % multiple == 0 and 1 / MAX_ASPECT <= w / h <= MAX_ASPECT and w * h <= 1.1 * area
        try:
            w, h = nearest_bucket(width, height, area, multiple)
        except Skip:
            assert not 1 / 6 <= width / height <= 6
            return
        distance = abs(math.log(w / h * height / width))
        assert all(distance <= abs(math.log(a / b * height / width)) + 1e-12 for a, b in found)
        turned = nearest_bucket(height, width, area, multiple)
        assert abs(math.log(turned[0] / turned[1] * width / height)) == pytest.approx(distance)

    side, area = st.integers(16, 5000), st.integers(64, 1400).map(lambda side: side * side)
    holds(check, slow, side, side, area, st.sampled_from([16, 32]))


@SLOW
def test_windows_lie_in_the_clip_and_hold_as_many_frames_as_they_say(slow):
    def check(steps, most, fps, mode, over):
        times = [0.0]
        for step in steps:
            times.append(times[-1] + step)
        length, most = times[-1], 4 * most + over
        try:
            windows = clip_windows(times, most, fps, mode, over)
        except Skip:
            assert min(len(times), math.floor(length * fps + 0.05) + 1) < 4 + over
            return
        for start, n, rate in windows:
            assert n % 4 == over and 0 < n <= most and start >= 0
            assert start + (n - 1) / rate <= length + 0.06 / rate
        if mode == "several":
            for (a, n, rate), (b, _, _) in zip(windows, windows[1:]):
                assert b == pytest.approx(a + n / rate)
            n, rate = windows[0][1:]
            assert windows[-1][0] + (2 * n - 1) / rate > length  # there is no room for one more
        elif mode == "middle" and windows[0][1] > over:
            (start, n, rate), *_ = windows
            assert abs(start - (length - start - (n - 1) / rate)) <= 2.1 / rate

    steps = st.lists(st.sampled_from([1 / 30, 1 / 24, 1 / 16, 1 / 10, 0.5]), min_size=1, max_size=120)
    modes = st.sampled_from(["first", "middle", "several", "spaced"])
    holds(check, slow, steps, st.integers(1, 12), st.sampled_from([8.0, 16.0, 24.0]), modes, st.sampled_from([0, 1]))


@SLOW
def test_frames_that_are_refused_name_the_nearest_that_is_not(slow):
    def check(frames, over):
        try:
            check_frames(frames, over)
            assert frames % 4 == over
        except BadInput as e:
            nearest = int(str(e).rsplit(" ", 1)[1])
            check_frames(nearest, over)
            assert abs(nearest - frames) <= 2 or frames < 3

    holds(check, slow, st.integers(-3, 10**6), st.sampled_from([0, 1]))


@SLOW
def test_each_wanted_time_gets_the_frame_that_is_shown_nearest_to_it(slow):
    def check(steps, starts, n, rate):
        times = [0.0]
        for step in steps:
            times.append(times[-1] + step)
        frames = [SimpleNamespace(seconds=t) for t in times]
        windows = [[start + k / rate for k in range(n)] for start in sorted(starts)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(video, "read_frames", lambda path, shown: iter(frames))
            chosen = list(video.read_windows("clip", windows, lambda frame: frame.seconds))
        for window, taken in zip(windows, chosen, strict=True):
            assert len(taken) == n
            for at, t in zip(window, taken):
                assert abs(t - at) == min(abs(other - at) for other in times)

    steps = st.lists(st.floats(0.001, 1), max_size=40)
    holds(check, slow, steps, st.lists(st.floats(0, 20), min_size=1, max_size=5), st.integers(1, 9), st.floats(1, 60))


# ---- what steps see --------------------------------------------------------------------------------------------------
@SLOW
def test_an_epoch_sees_every_item_as_often_as_it_says_in_any_order_of_asking(slow):
    def check(items, size, seed, epoch):
        items = [SimpleNamespace(bucket=bucket, repeat=repeat) for bucket, repeat in items]
        batches, again = Batches(items, size, seed), Batches(items, size, seed)
        steps = range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch)
        seen = [i for step in steps for i in batches.at(step)]
        assert sorted(seen) == sorted(i for i, item in enumerate(items) for _ in range(item.repeat))
        assert [i for step in reversed(steps) for i in reversed(again.at(step))] == seen[::-1]
        mixed = [step for step in steps if len({items[i].bucket for i in batches.at(step)}) > 1]
        assert len(mixed) <= len({item.bucket for item in items})  # of what is left over of each

    items = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), min_size=1, max_size=30)
    holds(check, slow, items, st.integers(1, 8), st.integers(0, 99), st.integers(0, 3))


@SLOW
def test_a_shift_of_times_has_its_inverse_and_keeps_order(slow):
    def check(a, b, shift):
        moved = shift_t(torch.tensor([a, b], dtype=torch.float64), shift)
        assert unshift_t(moved, shift).tolist() == pytest.approx([a, b], abs=1e-9)
        assert (moved[0] < moved[1]) == (a < b) or abs(a - b) < 1e-9

    holds(check, slow, st.floats(0, 1), st.floats(0, 1), st.floats(0.05, 20))


# ---- files and names -------------------------------------------------------------------------------------------------
def spellings(name, part):
    """A module's change as the programs in use name it."""
    kohya = {"A": "lora_down", "B": "lora_up"}[part]
    theirs = DIFFUSERS_NAMES[name.replace("blocks.7", "blocks.N")].replace("blocks.N", "blocks.7")
    yield f"diffusion_model.{name}.lora_{part}.weight"
    yield f"lora_unet_{name.replace('.', '_')}.{kohya}.weight"
    yield f"base_model.model.{name}.lora_{part}.default.weight"
    yield f"transformer.{theirs}.lora_{part}.weight"
    yield f"model.diffusion_model.{name}._orig_mod.lora_{part}.weight"
    yield f"{name}.lora.{kohya.removeprefix('lora_')}.weight"


@SLOW
def test_a_loras_key_means_the_same_in_every_spelling(slow):
    linear = sorted(n for n in DIFFUSERS_NAMES if n.startswith("blocks.N.") and "norm" not in n and "modul" not in n)

    def check(name, block, part):
        for key in spellings(name.replace("N", "7"), part):
            place = official_name(key.replace("7", str(block)))
            assert place[1:] == Place(None, f"{name.replace('N', str(block))}.weight", part)[1:], key

    holds(check, slow, st.sampled_from(linear), st.integers(0, 39), st.sampled_from("AB"))


@SLOW
def test_a_loras_weight_and_expert_are_read_behind_any_name(slow, tmp_path):
    def check(name, weight, expert):
        file = tmp_path / f"{name}.safetensors"
        file.touch()
        weight_text = [] if weight is None else [f"{weight}"]
        spec = parse_lora_spec(":".join([str(file), *weight_text, *([] if expert is None else [expert])]))
        assert spec == (str(file), 1.0 if weight is None else weight, expert)

    names = st.text("ab: _high.0-", min_size=1, max_size=12)
    weights = st.none() | st.floats(-4, 4, allow_nan=False).map(lambda w: round(w, 3))
    holds(check, slow, names, weights, st.sampled_from([None, "high", "low", "both"]))


@SLOW
def test_a_config_gives_back_what_was_written(slow, tmp_path):
    values = st.text(max_size=20) | st.integers(-(2**60), 2**60) | st.booleans()
    values |= st.floats(allow_nan=False) | st.lists(st.text(max_size=5), max_size=3)
    names = st.text("abcdefghijkl_", min_size=1, max_size=8)
    tables = st.lists(st.dictionaries(names, st.text(max_size=8) | st.floats(0, 9), min_size=1), min_size=1, max_size=3)

    def check(flags, data):
        file, written = tmp_path / "config.toml", flags | {"data": data}
        write_config(file, written)
        assert read_config(file) == written == tomllib.loads(Path(file).read_text(encoding="utf-8"))

    holds(check, slow, st.dictionaries(names, values), tables)


# ---- memory and ranks ------------------------------------------------------------------------------------------------
@SLOW
def test_streamed_blocks_are_spread_evenly(slow):
    def check(total, count):
        count = min(count, total)
        chosen = spread(count, total)
        assert len(chosen) == count and chosen == sorted({*chosen}) and all(0 <= i < total for i in chosen)
        gaps = [b - a for a, b in zip(chosen, chosen[1:])]
        assert not gaps or max(gaps) - min(gaps) <= 1

    holds(check, slow, st.integers(1, 60), st.integers(0, 60))


@SLOW
def test_tokens_shared_by_ranks_are_all_tokens(slow):
    def check(length, ranks):
        x = torch.arange(2 * length * 3.0).view(2, length, 3)
        slices = []
        for rank in range(ranks):
            share = object.__new__(Ulysses)
            share.rank, share.size = rank, ranks
            slices.append(share.own_slice(x, 1))
            assert slices[-1].shape == (2, -(-length // ranks), 3)
        whole = torch.cat(slices, 1)
        assert torch.equal(whole[:, :length], x) and not whole[:, length:].any()

    holds(check, slow, st.integers(1, 50), st.integers(1, 9))
