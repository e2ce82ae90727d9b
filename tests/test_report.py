"""diag.py report: what a page says of a run, from a folder made by hand."""

import json
import shlex

import pytest
import torch

import train_lora
import train_te
from diagnostics import report
from diagnostics.plan import Job
from nanowan.formats.header import save
from nanowan.formats.t5 import read_encoder
from nanowan.pipeline import Pipeline
from nanowan.settings import NANO, read_settings
from nanowan.training.step import say_if_foreign

SCRIPTS = {"train_lora": train_lora, "train_te": train_te}


def run_folder(folder, script, argv, rows):
    """A TrainingRun of a script with these flags that has logged rows."""
    flags = vars(Job(script, [*argv, "--device", "cpu"]).args)
    folder.mkdir()
    (folder / "flags.json").write_text(json.dumps({"flags": flags, "started": "2026-01-02 03:04:05"}))
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = "adapter_model" if script == "train_lora" else "text_encoder"
    save(folder / f"{name}.safetensors", {})
    return report.TrainingRun(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A file of train_te.py --save delta for nano: one embedding."""
    file = tmp_path_factory.mktemp("encoder") / "te.safetensors"
    width = read_encoder(Pipeline("nano").files("text")).entries["token_embedding.weight"].shape[1]
    save(
        file, {"token_embedding.rows": torch.zeros(1, width), "token_embedding.ids": torch.tensor([5])}, {"delta": True}
    )
    return str(file)


def step(n, loss=0.1, **more):
    return {"step": n, "loss": loss, "lr": 1e-3, "grad_norm": 1.0, "ms": 1500, **more}


@pytest.mark.parametrize(
    "script,argv",
    [
        ("train_lora", "--data a --data b --rank 8 --trigger red,blue --preserve 2 --text_encoder TE --checkpointing"),
        ("train_te", "--data a --keywords maroon=red,teal --train_blocks 0 --keyword_lr 0.02 --held_out 0"),
    ],
)
def test_the_command_makes_the_same_run(tmp_path, encoder, script, argv):
    """Its flags resolve to the run's own, and those that are the default are not in it."""
    argv = argv.replace("TE", encoder)
    run = run_folder(tmp_path / "run", script, argv.split(), [step(1)])
    words = shlex.split(run.command())
    assert words[:4] == ["python", f"{script}.py", "--ckpt", "nano"] and "--steps" not in words
    assert vars(Job(script, [*words[2:], "--device", "cpu"]).args) == run.flags
    expected = {word[2:] for word in argv.split() if word.startswith("--")}
    assert expected <= run.changed_flags().keys() and len(run.changed_flags()) <= len(expected) + 1  # alpha, of rank


def test_data_sets_with_settings_and_older_runs(tmp_path):
    text = json.dumps({"source": "a", "weight": 0.5})
    assert report.words_of_flag("data", [{"source": "b"}, json.loads(text)]) == ["--data", "b", "--data", text]
    assert report.words_of_flag("data", "a") == ["--data", "a"] and report.words_of_flag("resume", False) == []


def test_how_long_a_run_took(tmp_path):
    """40 steps of 1.5 s, and one of 61.5 s."""
    rows = [step(n) for n in range(1, 41)] + [step(41, ms=61500)]
    said = report.run_section(run_folder(tmp_path / "run", "train_lora", ["--data", "a"], rows))[0]
    assert said == "<p>41 steps of train_lora.py, 2 min of steps (1.5 s in the median), started 2026-01-02 03:04:05</p>"


def test_the_axis_shows_the_mean_and_the_held_out_loss():
    """Not a step of preserved samples alone, of 1e-6."""
    low, high = report.shown_range([[0.2, 0.1, 0.12], [0.3, 0.25], [0.0]])
    assert (low, high) == (pytest.approx(0.08), pytest.approx(0.375))


def test_the_plotted_axis_leaves_tiny_losses_out(tmp_path, monkeypatch):
    rows = [step(n, 1e-6 if n % 50 == 0 else 0.2, **({"val_loss": 0.15} if n % 20 == 0 else {})) for n in range(1, 101)]
    limits, real = [], report.figure

    def figure(draw, *size, **more):
        def draw_and_look(axes):
            draw(axes)
            limits.append(axes.get_ylim())

        return real(draw_and_look, *size, **more)

    monkeypatch.setattr(report, "figure", figure)
    report.loss_section(run_folder(tmp_path / "run", "train_lora", ["--data", "a"], rows))
    (low, high), (low_held, high_held) = limits[:2]
    assert 0.1 < low < 0.15 < 0.2 < high < 0.3 and low_held <= 0.15 <= high_held


@pytest.mark.parametrize(
    "script,argv,columns",
    [
        ("train_te", "--keywords crimson", ["base", "+ encoder"]),
        ("train_lora", "", ["base", "+ translator"]),
        ("train_lora", "--text_encoder TE", ["base", "+ encoder", "+ encoder + translator"]),
    ],
)
def test_columns_add_one_change_after_the_other(tmp_path, monkeypatch, encoder, script, argv, columns):
    """A translator is compared with the base behind the text encoder that it was trained behind, in logits too."""
    run = run_folder(tmp_path / "run", script, ["--data", "a", *argv.replace("TE", encoder).split()], [step(1)])
    assert list(run.columns()) == columns
    last = run.columns()[columns[-1]]
    assert last["loras"] == ([str(run.folder / "adapter_model.safetensors")] if script == "train_lora" else [])
    if len(columns) == 3:
        assert run.columns()["+ encoder"] == {"text_encoder": [encoder]} and last["text_encoder"]
    seen = []
    monkeypatch.setattr(report, "logits", lambda ckpt, **how: seen.append(how) or {})
    report.logits_section(run)
    assert seen[0]["base_encoder"] == ([encoder] if len(columns) == 3 else None)


def test_words_of_ones_own_are_asked_for(tmp_path, media, monkeypatch):
    """Those of --keywords and --trigger; what nobody can grade is shown, by a caption that has it."""
    argv = ["--data", str(media), "--resolution", "64x64", "--trigger", "dog,crimson"]
    run = run_folder(tmp_path / "run", "train_lora", argv, [step(1)])
    assert report.graded_words(run) == ["crimson"]
    drawn = []

    def draw_sheet(columns, prompts, seed, out):
        drawn.append((list(columns), prompts))
        out.write_bytes(b"png")

    monkeypatch.setattr(report, "draw_sheet", draw_sheet)
    monkeypatch.setattr(report, "Pipeline", lambda *a, **k: real(a[0]))
    real = report.open_dataset.__globals__["Pipeline"]
    page = "".join(report.words_section(run))
    assert drawn == [(["base", "+ translator"], ["a dog runs"])] and "own words: dog" in page


def test_data_that_a_checkpoint_has_not_seen_are_said(capsys):
    """Where the held-out loss, of two experts their mean, begins above three times the usual one."""
    usual = read_settings(NANO).usual_loss
    for metrics in ({"val_loss": 0.2, "val_loss_by_t": [1.0]}, {}, {"val_loss_high": 0.4, "val_loss_low": 0.05}):
        say_if_foreign(metrics, usual)
        say_if_foreign({"val_loss": 5.0}, None)
    assert not capsys.readouterr().out
    say_if_foreign({"val_loss": 0.79}, usual)
    assert capsys.readouterr().out.startswith(
        "val_loss 0.79 at the start; this checkpoint's own data have about 0.08: "
    )
