"""diag.py listen: columns from the same seeds, forced choice by CLIP, a grader of one's own, an encoder's strengths."""

import json
import random
import re
import shutil
import sys

import pytest
import torch
from test_clip import both_towers

from benchmarks import tiny
from diag import arguments
from diagnostics import listen
from diagnostics.listen import (
    Row,
    average,
    judge,
    open_columns,
    parse_alternatives,
    parse_strengths,
    psnr,
    rows_of,
    sample_clips,
    show_scores,
)
from nano import evaluate
from nano.evaluate import sample_and_grade, word_suites
from nano.world import COLORS, NEW_WORDS, draw, held_out
from nanowan.errors import BadInput
from nanowan.formats.header import save
from nanowan.formats.lora import write_lora
from nanowan.formats.t5 import load_t5
from nanowan.pipeline import Runtime
from nanowan.variants.animate.clip import load_clip


def diag(*argv):
    args = arguments([str(a) for a in argv])
    args.run(args)


@pytest.fixture(scope="module")
def files(tmp_path_factory, checkpoints):
    """A folder: "ckpt", whose clips are small, "te.safetensors", another encoder, "same.safetensors", its own encoder,
    "lora.safetensors", and "clip", both towers of a small CLIP.
    """
    folder = tmp_path_factory.mktemp("listen")
    shutil.copytree(checkpoints["ti2v"], folder / "ckpt")
    config = json.loads((folder / "ckpt" / "config.json").read_text())
    config["sample"] = {"size": [64, 32], "frames": 5, "steps": 2}
    (folder / "ckpt" / "config.json").write_text(json.dumps(config))
    save(folder / "same.safetensors", tiny.text_encoder().state_dict())
    save(folder / "te.safetensors", tiny.text_encoder(seed=8).state_dict())
    pairs = {f"blocks.{i}.cross_attn.v": (torch.randn(4, 48), torch.randn(48, 4)) for i in range(3)}
    write_lora(folder / "lora.safetensors", pairs)
    (folder / "clip").mkdir()
    both_towers(folder / "clip")
    return folder


def columns_of(files, *flags):
    args = arguments(["listen", "--ckpt", str(files / "ckpt"), *map(str, flags)])
    return open_columns(args, Runtime())


# ---- columns -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "flags, names",
    [
        ([], ["base"]),
        (["--lora"], ["base", "+ translator"]),
        (["--text_encoder"], ["base", "+ encoder"]),
        (["--text_encoder", "--lora"], ["base", "+ encoder", "+ encoder + translator"]),
        (["--text_encoder", "--lora", "--skip_before"], ["+ encoder + translator"]),
    ],
)
def test_each_column_adds_one_change(files, flags, names):
    given = {"--lora": [files / "lora.safetensors"], "--text_encoder": [files / "te.safetensors"]}
    columns = columns_of(files, *(word for flag in flags for word in (flag, *given.get(flag, []))))
    assert list(columns) == names
    for name, pipe in columns.items():
        assert bool(pipe.loras) == ("translator" in name) and bool(pipe.text_encoder) == ("encoder" in name)


def test_every_column_begins_from_the_same_noise(files, tmp_path, monkeypatch):
    """--seed's, for each prompt, as in sample.py; and models leave memory before the next column's come."""
    drawn, columns = [], columns_of(files, "--lora", files / "lora.safetensors")

    def sample_latents(pipe, text, seeds):
        assert not [other for other in columns.values() if other is not pipe and other.placements]
        drawn.append((text[0][1].item(), seeds))
        return torch.zeros(1, 48, 1, 2, 2)

    monkeypatch.setattr(listen, "sample_latents", sample_latents)
    listen.draw_sheet(columns, ["a", "a fox"], 3, tmp_path / "sheet.png")
    assert [seeds for _, seeds in drawn] == [[3]] * 4 and drawn[:2] == drawn[2:]
    assert drawn[0][0] < drawn[1][0]  # a prompt of more tokens


@pytest.mark.parametrize("text", ["te.safetensors", "a:b.safetensors", "te.safetensors:", "te.safetensors:0.5"])
def test_only_several_strengths_make_columns(text):
    assert parse_strengths([text]) == {None: [text]} and parse_strengths(None) == {None: None}


def test_an_encoder_at_a_strength_lies_on_the_line_between_both(files):
    """Strength 0 is the base, and 1 the file, to the bit."""
    assert parse_strengths(["x", "a:b:0,0.5"]) == {"0": ["x", "a:b:0"], "0.5": ["x", "a:b:0.5"]}
    columns = columns_of(files, "--text_encoder", f"{files / 'te.safetensors'}:0,0.25,1")
    assert list(columns) == ["encoder x 0", "encoder x 0.25", "encoder x 1"]
    base, end = load_t5(files / "ckpt", dtype=torch.float32), tiny.text_encoder(seed=8)
    for pipe, s in zip(columns.values(), (0, 0.25, 1)):
        for w, w0, w1 in zip(pipe.acquire("text").parameters(), base.parameters(), end.parameters()):
            want = (w0.double() + s * (w1.double() - w0.double())).float()
            assert torch.equal(w, want) if s in (0, 1) else torch.allclose(w, want, atol=1e-6)


def test_a_sheet_has_a_column_for_each_strength(files, tmp_path):
    """The first of them, of strength 0, is the base's."""
    from PIL import Image

    (tmp_path / "p.txt").write_text("a fox\na dog\n")
    flags = "--ckpt", files / "ckpt", "--prompts", tmp_path / "p.txt", "--device", "cpu"
    diag("listen", *flags, "--out", tmp_path / "base.png")
    diag("listen", *flags, "--out", tmp_path / "s.png", "--text_encoder", f"{files / 'te.safetensors'}:0,0.5,1")
    base, sheet = Image.open(tmp_path / "base.png"), Image.open(tmp_path / "s.png")
    w, h = base.width, base.height // 2
    assert sheet.size == (3 * w, 2 * h)
    for row in range(2):
        top, bottom = h * row + 20, h * row + h  # without the label
        zero, half, one = (sheet.crop((w * i, top, w * i + w, bottom)).tobytes() for i in range(3))
        assert zero == base.crop((0, top, w, bottom)).tobytes() and len({zero, half, one}) == 3


# ---- forced choice -----------------------------------------------------------------------------------------------
PALETTE = ["red", "green", "blue", "yellow"]


@pytest.fixture
def pictures(monkeypatch):
    """In the place of what the models make: for each prompt a clip of the nano world, whose colour is its last word."""

    def sample_clips(pipe, prompts, seeds, **settings):
        rng = random.Random(seeds[0])
        for prompt, seed in zip(prompts, seeds):
            shown = {"color": prompt.split()[-1], "shape": "circle", "motion": "left", "background": "dark"}
            yield draw([shown | {"motion": rng.choice(["left", "up", "still"])}], seed)[0]

    monkeypatch.setattr(listen, "sample_clips", sample_clips)


def asked(n):
    """Rows whose prompts end in a colour, which the fixture shows: the right answer, then three others."""
    rng, rows = random.Random(0), []
    for i in range(n):
        right = PALETTE[i % 4]
        others = rng.sample([c for c in PALETTE if c != right], 3)
        noise = " ".join(rng.sample(["fox", "dog", "quick", "lazy", "over", "jumps", "the", "moves"], 4))
        rows.append(
            Row(f"a thing of {right}", "zorp", tuple(f"{noise} {rng.random():.3f} {c}" for c in (right, *others)))
        )
    return rows


def test_a_random_tower_is_at_chance(files, pictures):
    """One of four texts is right; the interval of 200 clips holds a quarter."""
    result = judge({"base": None}, asked(200), 0, lambda: load_clip(files / "clip"))
    score = result["base"]["zorp"]["clip"]
    assert score["n"] == 200 and score["low"] < 0.25 < score["high"] and score == result["base"]["all words"]["clip"]


def test_a_tower_that_knows_the_colours_is_above_chance(files, pictures):
    """Texts stand where pictures of their colour are, on average; other clips than those that are judged."""
    clip = load_clip(files / "clip")
    place = {}
    for color in PALETTE:
        clips = draw([{"color": color, "shape": "circle", "motion": "left", "background": "dark"}] * 4, 99)
        place[color] = clip.encode_images(clips.transpose(1, 2).flatten(0, 1)).mean(0)
    center = torch.stack([*place.values()]).mean(0)
    encode_images = clip.encode_images
    clip.encode_images = lambda x: encode_images(x) - center
    clip.encode_texts = lambda texts: torch.stack([place[t.split()[-1]] - center for t in texts])
    score = judge({"base": None}, asked(40), 0, lambda: clip)["base"]["zorp"]["clip"]
    assert score["right"] > 0.9 and score["low"] > 0.25 and score["high"] <= 1


def test_frames_vote_by_their_mean_probability(files, pictures):
    """Neither by how many of them prefer a text, nor by the mean of their logits."""
    clip = load_clip(files / "clip")
    votes = torch.tensor([[0, 0.2]] * 4 + [[5, 0]] * 3 + [[0, 20.0]])  # 4 x (.45, .55), 3 x (.99, .01), (0, 1)
    clip.log_scale.fill_(0)
    clip.encode_images, clip.encode_texts = lambda x: votes, lambda texts: torch.eye(2)
    (row,) = asked(1)
    score = judge({"base": None}, [row._replace(texts=row.texts[:2])], 0, lambda: clip)["base"]["zorp"]["clip"]
    assert score["right"] == 1.0


def test_what_else_changed_is_measured_on_prompts_without_words(files, tmp_path, capsys):
    """Of an encoder that is the base's own: nothing; behind it a LoRA changes something."""
    (tmp_path / "p.txt").write_text("a {} one\nzorp runs\na fox\na dog\n")
    flags = ["--ckpt", files / "ckpt", "--prompts", tmp_path / "p.txt", "--device", "cpu", "--n", "3"]
    flags += ["--text_encoder", files / "same.safetensors", "--lora", files / "lora.safetensors"]
    flags += ["--clip", files / "clip", "--words", "zorp=red,blue", "blip=a dog,a fox,a cat"]
    diag("listen", *flags, "--json", tmp_path / "l.json", "--steps", "1")
    found, out = json.loads((tmp_path / "l.json").read_text()), capsys.readouterr().out
    assert list(found) == ["base", "+ encoder", "+ encoder + translator"]
    base, same, changed = found.values()
    assert list(base) == ["zorp", "blip", "all words"] and list(same) == [*base, "other prompts"]
    assert [base[word]["clip"]["n"] for word in base] == [3, 3, 6]
    assert {word: same[word] for word in base} == base  # the same seeds, the same clips
    assert same["other prompts"]["psnr"]["mean"] == 90 and abs(same["other prompts"]["clip_i"]["mean"] - 1) < 1e-5
    assert changed["other prompts"]["psnr"]["mean"] < 60 and changed["other prompts"]["clip_i"]["mean"] < 1
    assert changed["other prompts"]["psnr"]["n"] == 2
    for text in ("a zorp one", "zorp runs", "a blip one"):
        assert text in out
    assert "blip runs" not in out and re.search(r"other prompts +psnr +90\.000 \[90\.000, 90\.000\]", out)


def test_psnr_and_averages():
    a = torch.zeros(8, 3, 4, 4, dtype=torch.uint8)
    assert abs(psnr(a, a + 51) - 13.9794) < 1e-3 and psnr(a, a) == 90  # a fifth of the range: 10 log10(25)
    found = average([1.0, 2.0, 3.0, 6.0])
    assert found["mean"] == 3 and abs(found["high"] - 3 - 1.96 * (14 / 3 / 4) ** 0.5) < 1e-9 and found["n"] == 4
    assert average([2.0]) == {"mean": 2.0, "n": 1, "low": None, "high": None}


def test_what_is_asked_of_a_word():
    words = parse_alternatives(["zorp=red,blue , green", "my dog=a terrier,a cat"])
    assert words == {"zorp": ["red", "blue", "green"], "my dog": ["a terrier", "a cat"]}
    rows = rows_of(words, ["a {} runs", "Zorp, at night", "a fox"], 3)
    assert [row.prompt for row in rows] == ["a zorp runs", "Zorp, at night", "a zorp runs"] + 3 * ["a my dog runs"] + [
        "a fox"
    ]
    assert rows[1].texts == ("red, at night", "blue, at night", "green, at night") and rows[1].word == "zorp"
    assert rows[-1] == Row("a fox") and rows[3].texts == ("a a terrier runs", "a a cat runs")
    built_in = rows_of(words, [], 5)
    assert len(built_in) == 10 + len(listen.OTHER_PROMPTS) and all("{}" not in row.prompt for row in built_in)
    for item in ("zorp", "zorp=", "zorp=red", "zorp=red,red", "=red,blue"):
        with pytest.raises(BadInput, match=f"--words {item}: with --clip"):
            parse_alternatives([item])


# ---- a grader of one's own ---------------------------------------------------------------------------------------
def test_a_grader_is_given_the_clip_and_its_prompt(files, tmp_path, capsys):
    """This one prints how many frames the mp4 has times the length of the prompt."""
    (tmp_path / "grade.py").write_text(
        "import av, sys\n_, file, prompt = sys.argv\n"
        "print(sum(1 for _ in av.open(file).decode(video=0)) * len(prompt))\n"
    )
    (tmp_path / "p.txt").write_text("a {}\nthe old {}\na fox\n")
    flags = ["--ckpt", files / "ckpt", "--prompts", tmp_path / "p.txt", "--device", "cpu", "--steps", "1", "--n", "2"]
    flags += ["--grader", f"{sys.executable} '{tmp_path}/grade.py'", "--words", "zorp", "--json", tmp_path / "l.json"]
    diag("listen", *flags)
    (found,) = json.loads((tmp_path / "l.json").read_text()).values()
    assert found["zorp"]["grader"]["mean"] == 5 * (len("a zorp") + len("the old zorp")) / 2
    assert found["other prompts"]["grader"] == {"mean": 25.0, "n": 1, "low": None, "high": None}
    assert "clip" not in found["zorp"] and "25.000" in capsys.readouterr().out
    (tmp_path / "grade.py").write_text("print('very good')")
    with pytest.raises(BadInput, match="should print one number .* said 'very good'"):
        diag("listen", *flags)
    (tmp_path / "grade.py").write_text("raise SystemExit('no weights')")
    with pytest.raises(BadInput, match="exit with 0, not 1; said 'no weights'"):
        diag("listen", *flags)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--grader no_such_command --words zorp", "--grader no_such_command: no such command"),
        ("--clip {files}/ckpt --words zorp=red,blue", "should hold CLIP"),
        ("--clip {files}/clip --words zorp", "--words zorp: with --clip"),
        ("--clip {files}/clip", "--words: say which words"),
        ("--frames 6", "--frames 6: must be 4k"),
        ("--size 65x32", "--size 65x32"),
        ("--steps 0", "--steps 0"),
        ("--lora {files}/te.safetensors", "te.safetensors"),
    ],
)
def test_what_cannot_be_done_is_said_before_any_work(flags, message, files, monkeypatch):
    monkeypatch.setattr(listen, "sample_clips", lambda *_, **__: pytest.fail("sampled"))
    with pytest.raises(BadInput, match=message):
        diag("listen", "--ckpt", files / "ckpt", "--device", "cpu", *flags.format(files=files).split())


# ---- nano --------------------------------------------------------------------------------------------------------
def test_old_words_are_asked_as_often_as_there_are_prompts(monkeypatch):
    """By default flags: 12 words and 40 prompts for each, and only 286 held-out prompts of known words."""
    suites = word_suites(list(NEW_WORDS), 40, 0)
    assert list(suites) == [*NEW_WORDS, "old words"] and {len(suites[word]) for word in NEW_WORDS} == {40}
    old = {row["prompt"] for row in suites["old words"]}
    assert 250 < len(old) == len(suites["old words"]) < 300 and all(map(held_out, old))
    assert len(word_suites(["crimson", "box"], 20, 0)["old words"]) == 40
    assert len(word_suites([], 20, 0)["old words"]) == 20
    monkeypatch.setattr(evaluate, "sample_and_grade", lambda *_, **__: pytest.fail("sampled"))
    with pytest.raises(BadInput, match="--n 100: there are only about"):
        diag("listen", "--words", "crimson,ascends", "--n", "100", "--device", "cpu")


def test_a_clip_is_made_from_its_own_seed_in_later_batches_too(monkeypatch):
    """Row i from seed + i, whatever the batch."""
    drawn = []

    def sample_latents(models, prompts, seeds, progress):
        drawn.append(dict(zip(prompts, seeds)))
        return draw([{"color": c, "shape": "cross", "motion": "up", "background": "dark"} for c in prompts], 0)

    monkeypatch.setattr(evaluate, "sample_latents", sample_latents)
    monkeypatch.setattr(evaluate, "decode", lambda models, z: z)
    rows = [{"prompt": color} for color in COLORS]
    grades, clips = sample_and_grade(None, rows, seed=7, batch=3)
    assert [len(batch) for batch in drawn] == [3, 3, 1] and len(clips) == 7
    assert {k: v for batch in drawn for k, v in batch.items()} == {color: 7 + i for i, color in enumerate(COLORS)}
    assert [grade["color"] for grade in grades] == list(COLORS)


def test_nano_is_graded_in_columns(tmp_path, capsys):
    """Columns whose change is none: of the encoder's own weights, at two strengths."""
    save(tmp_path / "te.safetensors", load_t5("nano/checkpoint", dtype=torch.float32).state_dict())
    flags = ["--words", "crimson,scarlet=red", "--n", "2", "--steps", "2", "--device", "cpu"]
    diag("listen", *flags, "--text_encoder", tmp_path / "te.safetensors", "--json", tmp_path / "l.json")
    found = json.loads((tmp_path / "l.json").read_text())
    assert list(found) == ["base", "+ encoder"] and found["base"] == found["+ encoder"]
    assert list(found["base"]) == ["crimson", "scarlet", "new words", "old words"]
    out = capsys.readouterr().out
    assert re.search(r"^ +base +\+ encoder *$", out, re.M) and re.search(r"^known words +motion .* n = 4$", out, re.M)


def test_what_a_later_column_lowers_is_said(capsys):
    """Where the intervals do not meet; an average without one, and the first column, are not judged."""

    def column(right, low, high):
        return {
            "zorp": {
                "color": {"right": right, "low": low, "high": high, "n": 9},
                "psnr": {"mean": 1, "low": None, "n": 9},
            }
        }

    scores = {"base": {}, "+ encoder": column(0.9, 0.8, 0.95), "+ encoder + translator": column(0.6, 0.4, 0.79)}
    show_scores(scores)
    said = capsys.readouterr().out
    assert said.endswith("zorp, color: lower with '+ encoder + translator' than with '+ encoder'\n")
    assert said.count("lower") == 1
    for other in (column(0.6, 0.4, 0.81), column(1.0, 0.96, 1.0)):
        show_scores(scores | {"+ encoder + translator": other})
        assert "lower" not in capsys.readouterr().out
    show_scores({"+ encoder": scores["+ encoder"]})
    assert "lower" not in capsys.readouterr().out


def test_clips_leave_memory_when_they_are_made(files):
    (pipe,) = columns_of(files).values()
    clips = list(sample_clips(pipe, ["a fox", "a dog"], [0, 1]))
    assert [c.shape for c in clips] == [(3, 5, 32, 64)] * 2 and not pipe.placements
    again = next(sample_clips(pipe, ["a dog"], [1]))
    assert torch.equal(again, clips[1])  # whatever came before it
