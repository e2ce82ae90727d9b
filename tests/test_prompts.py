"""Lists of prompts: kohya's options behind a line, JSONL, and what is wrong in them."""

import json

import pytest

from nanowan.errors import BadInput
from nanowan.prompts import Prompt, parse_line, read_prompts, read_texts
from nanowan.sampling import requests_of
from nanowan.settings import released
from sample import arguments


def test_kohyas_options():
    line = "a -- b --w 832 --h 480 --f 81 --d 7 --s 20 --l 5 --fs 3 --n bad, worse"
    want = {"size": (832, 480), "frames": 81, "steps": 20, "guidance": (5.0,), "shift": 3.0, "negative": "bad, worse"}
    found = parse_line(line)
    assert found.text == "a -- b" and found.seed == 7 and found.settings == want
    assert parse_line("a --g 5") == parse_line("a --guidance 5")


def test_json_rows_say_the_same(tmp_path):
    rows = [{"prompt": "a", "seed": 7, "size": [832, 480], "negative": "bad"}, {"text": "b", "w": 64, "h": 32, "f": 5}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_prompts(tmp_path / "p.jsonl") == [
        parse_line("a --w 832 --h 480 --d 7 --n bad"),
        parse_line("b --size 64x32 --frames 5"),
    ]
    assert read_texts(tmp_path / "p.jsonl", "--x") == ["a", "b"]


def test_lines_end_where_editors_end_them(tmp_path):
    """And at nothing else that Unicode calls the end of a line."""
    texts = ["a cat\u2028sits", "a dog\x0bruns", "third\x85line", "a\x0cb\x1cc"]
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "p.txt").write_text(end.join(texts), encoding="utf-8-sig", newline="")
        assert read_texts(tmp_path / "p.txt", "--x") == texts
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": t}, ensure_ascii=False) for t in texts))
    assert read_texts(tmp_path / "p.jsonl", "--x") == texts


def test_files_are_found_beside_the_list(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "p.txt").write_text("a --i a.png --ei nowhere.png")
    assert read_prompts(tmp_path / "p.txt")[0].inputs == {"image": str(tmp_path / "a.png"), "last_image": "nowhere.png"}


@pytest.mark.parametrize(
    "text, said",
    [
        ("a\nb --x 3", "line 2: --x: no option of a prompt"),
        ("a --s many", "line 1: --steps many: not a number"),
        ("a --w 64", "line 1: --w and --h: give both"),
        ("a --size 64", "line 1: "),
        ("\n \n", "holds no prompts"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, text, said):
    (tmp_path / "p.txt").write_text(text)
    with pytest.raises(BadInput, match="--previews .*p.txt") as e:
        read_prompts(tmp_path / "p.txt", "--previews")
    assert said in str(e.value)


@pytest.mark.parametrize("row, said", [("[1]", "not a JSON object"), ('{"a": 1}', "no text in"), ("{", "Expecting")])
def test_a_wrong_row_is_named(tmp_path, row, said):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n' + row)
    with pytest.raises(BadInput, match="line 2: ") as e:
        read_prompts(tmp_path / "p.jsonl")
    assert said in str(e.value)


def test_each_prompt_and_seed_is_a_video():
    """A line's own seed, settings and inputs go before the flags'."""
    s, args = released("ti2v-5B"), arguments(["--steps", "9", "--image", "x.png", "--out", "o/v.mp4"])
    prompts = [Prompt("a"), Prompt("b", {"steps": 3}, {"image": "y.png"}, 5)]
    found = requests_of(args, prompts, s, [1, 2])
    want = [("a", 1, 9, "x.png"), ("a", 2, 9, "x.png"), ("b", 5, 3, "y.png")]
    assert [(r.prompt, r.seed, r.settings.steps, r.inputs["image"]) for r in found] == want
    assert [r.out.name for r in found] == ["v_000.mp4", "v_001.mp4", "v_002.mp4"]
    assert requests_of(args, prompts[:1], s, [1])[0].out.name == "v.mp4"
