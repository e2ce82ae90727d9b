"""What a run tells: log.jsonl, TensorBoard, Weights & Biases, lines on the screen, the best held-out loss."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from nanowan.errors import BadInput
from nanowan.training.log import Log, duration, flat, held_out
from nanowan.training.run_dir import Run


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_lines_on_the_screen(tmp_path, capsys):
    """The first, every fifth and the last step, and any that was skipped or evaluated; the loss is a running mean."""
    log = Log(tmp_path, 0, 12, every=5)
    for step in range(1, 13):
        log.write(step, loss=float(step), lr=1e-4, epoch=step / 4, **({"skipped": 1} if step == 7 else {}))
        if step == 8:
            log.write(8, val_loss=0.25)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"step {n}/12" for n in (1, 5, 7, 8, 10, 12)]
    assert "epoch 1.25  loss 3.0000  lr 0.0001  " in lines[1] and lines[1].endswith(" left")
    assert lines[3] == "step 8/12  val_loss 0.25" and lines[2].endswith("skipped 1")
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12]


def test_every_number_and_picture_is_in_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = Log(tmp_path, 0, 2)
    Image.fromarray(np.full((4, 6, 3), 7, np.uint8)).save(tmp_path / "a.png")
    log.write(1, loss=0.5, val_loss_by_t=[1.0, 2.0], norms={"red": 3.0}, expert="low", done=True)
    log.image(1, "previews", tmp_path / "a.png")
    log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    tags = board.Tags()
    assert tags["scalars"] == ["loss", "val_loss_by_t/0", "val_loss_by_t/1", "norms/red"] and tags["images"] == [
        "previews"
    ]
    assert board.Images("previews")[0].width == 6 and board.Scalars("norms/red")[0].value == 3


def test_the_best_is_the_lowest_after_a_step(tmp_path):
    """Also among the steps before a resume; of two experts their mean counts."""
    log = Log(tmp_path, 0, 9)
    assert not log.is_best({"loss": 0.1})
    log.write(0, val_loss_high=0.1, val_loss_low=0.1, val_loss_by_t_high=[0.0])
    assert log.is_best({"val_loss_high": 0.5, "val_loss_low": 0.3})  # the base is not among what is saved
    log.write(2, loss=1.0, val_loss_high=0.5, val_loss_low=0.3)
    log.write(4, loss=1.0, val_loss_high=0.1, val_loss_low=0.1)
    log.close()
    log = Log(tmp_path, 2, 9)
    assert log.is_best({"val_loss_high": 0.39, "val_loss_low": 0.4}) and not log.is_best({"val_loss_high": 0.41})
    assert [row["step"] for row in rows(tmp_path)] == [0, 2] and held_out({"val_loss": 1.0, "val_loss_by_t": 2}) == 1


def test_the_best_results_are_named_with_their_step(tmp_path):
    """Where they are there: of two experts, both."""
    result, best, other = (tmp_path / name for name in ("a", "a_best", "b_best"))
    best.touch()
    told = [(0, {"val_loss": 0.1}), (2, {"val_loss": 0.3}), (3, {}), (4, {"val_loss": 0.2}), (6, {"val_loss": 0.25})]
    logs = SimpleNamespace(rows=[{"step": step, **values} for step, values in told])
    named = Run.with_best(SimpleNamespace(is_main=True, logs=logs), [result], [best, other])
    assert named == [result, f"{best}: after step 4, the lowest held-out loss"]
    logs.rows = logs.rows[:1] + logs.rows[2:3]  # nothing held out but before the first step
    assert Run.with_best(SimpleNamespace(is_main=True, logs=logs), [result], [best]) == [result]
    assert Run.with_best(SimpleNamespace(is_main=False), [result], [best]) == [result]


def test_weights_and_biases_gets_the_same(tmp_path, monkeypatch):
    sent, began = [], []
    fake = SimpleNamespace(
        init=lambda **how: (
            began.append(how) or SimpleNamespace(log=lambda v, step: sent.append((step, v)), finish=dict)
        ),
        Image=lambda picture: picture.shape,
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "a.png")
    for first in (0, 1):
        log = Log(tmp_path, first, 9, wandb="words", record={"flags": {"lr": 1}, "began": "today"})
        log.write(first + 1, loss=0.5, expert="low", by_t=[1.0])
        log.image(first + 1, "previews", tmp_path / "a.png")
        log.close()
    assert sent[:2] == [(1, {"loss": 0.5, "by_t/0": 1.0}), (1, {"previews": (4, 6, 3)})] and len(sent) == 4
    assert began[0] == began[1] and began[0]["project"] == "words" and began[0]["resume"] == "allow"
    assert began[0]["config"] == {"lr": 1} and began[0]["name"] == tmp_path.name


def test_weights_and_biases_is_asked_for_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(BadInput, match="--wandb words: needs the package wandb"):
        Log(tmp_path, 0, 9, wandb="words")


def test_durations():
    assert [duration(s) for s in (9, 99, 100, 3600, 12000)] == ["9 s", "99 s", "2 min", "60 min", "3 h 20 min"]
    assert flat({"a": 1, "b": {"c": [1, 2.5]}, "d": "x", "e": None, "f": True}) == {"a": 1, "b/c/0": 1, "b/c/1": 2.5}
