"""A training in most of whose steps nothing that is trained takes part."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_data import photo

from nanowan.formats.header import load

WITHOUT_PLAN = """
import sys
import train_te
from nanowan.errors import cli
from tests.helpers.scripts import NoPlan
train_te.predict = lambda *_, **__: NoPlan()  # it takes longer than the rest
cli(train_te.main)
"""


def test_steps_without_a_keyword_are_taken_and_do_not_count(checkpoints, tmp_path):
    """Of six captions one holds the keyword, and only its rows are trained: five gradients of six are zero. No step is
    skipped, and the median that spikes are judged by is of the others.
    """
    (tmp_path / "data").mkdir()
    for i in range(6):
        photo(tmp_path / "data" / f"{i}.png", 32, 32, caption="a zebra" if i == 3 else f"a cat of {i}")
    flags = {"--ckpt": checkpoints["ti2v"], "--data": tmp_path / "data", "--out": tmp_path / "out", "--frames": 1}
    flags |= {"--keywords": "zebra", "--train_blocks": 0, "--resolution": "32x32", "--batch": 1, "--device": "cpu"}
    flags |= {"--dtype": "fp32", "--held_out": 0, "--caption_dropout": 0, "--schedule": "constant", "--save": "delta"}
    argv = [str(word) for pair in (flags | {"--steps": 30}).items() for word in pair]
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", WITHOUT_PLAN, *argv], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 30 and not any("skipped" in r for r in lines)
    counted = [r for r in lines if r["grad_norm"] > 0]
    assert [(r["step"] - 1) // 6 for r in counted] == [0, 1, 2, 3, 4]  # one in each epoch
    norms = torch.load(tmp_path / "out" / "checkpoints" / "step_000030.pt", weights_only=True)["guard"]["norms"]
    assert norms == pytest.approx([r["grad_norm"] for r in counted])
    stored = load(tmp_path / "out" / "text_encoder.safetensors")[0]
    assert set(stored) == {"token_embedding.ids", "token_embedding.rows"}
