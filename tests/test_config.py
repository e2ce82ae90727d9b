"""Command lines: config files give the same flags, errors are one line and name the nearest flag."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from helpers import scripts

import diag
import sample
import train_lora
import train_te
from data import DataSource
from nanowan.errors import BadInput
from nanowan.flags import ELSEWHERE, Parser, read_config, write_config
from nanowan.formats.header import load
from nanowan.settings import released
from nanowan.training.flags import data_source

ROOT = Path(__file__).parent.parent
SCRIPTS = {"sample": sample, "train_lora": train_lora, "train_te": train_te}
GENERATE_PY = {
    "ckpt_dir": "ckpt",
    "frame_num": "frames",
    "sample_steps": "steps",
    "sample_shift": "shift",
    "sample_guide_scale": "guidance",
    "sample_solver": "solver",
    "base_seed": "seed",
    "save_file": "out",
}

# flags that people's command lines have had since before config files; what is gone is told apart in the test
EARLIER_FLAGS = {
    "sample": (
        "audio base_dtype ckpt compile cuda_graphs device dtype frames grid guidance guidance_parallel image "
        "infer_frames lora negative num_clip out pose_video preview_every prompt prompts refert_num "
        "replace_flag resume reuse save_latents seed shift size solver src_root_path start_from_ref steps "
        "stream_blocks sync_sound text_encoder ulysses_size vae_tile"
    ),
    "train_lora": (
        "accumulate allow_self_attn alpha base_dtype batch blocks cache cache_only caption_dropout "
        "checkpointing ckpt clip_mode continuation data delta_cap device dropout dtype ema eval_every expert "
        "frames fsdp grad_clip grad_spike_factor held_out i2v_prob init_lora keep lr max_skipped name "
        "no-checkpointing out pipeline_stages preserve preserve_prompts preview_every previews rank resolution "
        "resume save_every schedule seed shift steps steps_per_expert stream_blocks t_distribution targets "
        "text_encoder trigger ulysses_size warmup weight_decay"
    ),
    "train_te": (
        "accumulate anchor batch cache cache_only cache_text caption_dropout caption_mode_probs checkpointing "
        "ckpt clip_mode continuation data device dtype ema eval_every expert frames fsdp grad_clip "
        "grad_spike_factor held_out i2v_prob keyword_init keyword_lr keywords lr max_skipped no-checkpointing "
        "optimizer out pipeline_stages preview_every previews resolution resume save save_every schedule seed "
        "shift steps steps_per_expert t_distribution text_encoder train_blocks trim_prob ulysses_size warmup "
        "weight_decay"
    ),
    "diag inspect": "json",
    "diag plan": "gpus json",
    "diag advise": "ckpt data device frames json keywords resolution",
    "diag scale": "between ckpt frames gb inside per_machine size tflops",
    "diag delta": "cap ckpt json out",
    "diag logits": "cache ci ckpt data device dtype frames json lora n resolution text_encoder threshold",
    "diag drift": "ckpt json keywords prompts",
    "diag listen": "ckpt device dtype json lora n out prompts seed skip_before text_encoder words",
    "diag reuse": "ckpt device dtype json lora prompts text_encoder thresholds",
    "diag convert": "part to tokenizer",
    "diag report": "n out",
}


def error_of(parse, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse()
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and not out and err.count("\n") == 1
    return err


@pytest.mark.parametrize("theirs, ours", GENERATE_PY.items())
def test_official_flags_name_their_counterpart(theirs, ours, capsys):
    err = error_of(lambda: sample.arguments([f"--{theirs}", "x"]), capsys)
    assert err == f"error: --{theirs}: there is no such flag; it is --{ours} here\n"


def test_each_name_of_other_tools_leads_to_a_flag(monkeypatch):
    parsers = []
    monkeypatch.setattr(Parser, "parse_args", lambda self, argv=None: parsers.append(self))
    for script in SCRIPTS.values():
        script.arguments([])
    flags = set().union(*(p.flags() for p in parsers))
    assert set(ELSEWHERE.values()) <= flags and not ELSEWHERE.keys() & flags


@pytest.mark.parametrize(
    "words, said",
    [
        (["--preview_size=9", "--promtp", "x"], "--promtp: there is no such flag; did you mean --prompt?"),
        (["--task", "t2v-A14B"], "--task: there is no such flag; the task follows from the checkpoint"),
        (["--zzzz"], "--zzzz: there is no such flag; --help lists all flags"),
        (["--seed", "a"], "argument --seed: a: whole numbers, one or a,b,c"),
    ],
)
def test_an_unknown_flag_is_one_line(words, said, capsys):
    assert said in error_of(lambda: sample.arguments(words[-2:] if "=" in words[0] else words), capsys)


@pytest.mark.parametrize(
    "script, words",
    [
        ("sample", "--prompt a --seed 1,2 --lora a.safetensors:0.5 --lora b:1:high --guidance 3,4 --compile"),
        ("train_lora", "--targets cross_attn.k,ffn.0 --trigger a,b --no-checkpointing --lr 1e-05 --init_lora x:high"),
        ("train_te", "--keywords maroon=red,blue --keyword_lr 0.5 --caption_mode_probs 1,2,3 --fsdp --checkpointing"),
    ],
)
@pytest.mark.parametrize("form", ["toml", "json"])
def test_flags_come_back_from_the_file_that_they_write(tmp_path, script, words, form):
    given = SCRIPTS[script].arguments(words.split())
    values = {k: v for k, v in vars(given).items() if v is not None}
    if form == "toml":
        write_config(tmp_path / "c.toml", values)
    else:
        (tmp_path / "c.json").write_text(json.dumps({k: v for k, v in values.items() if k != "resume"}))
    again = SCRIPTS[script].arguments(["--config", str(tmp_path / f"c.{form}")])
    assert vars(again) == vars(given) | {"config": str(tmp_path / f"c.{form}")}


def test_a_data_sets_own_settings_go_before_the_flags():
    flags = "--resolution 640x352 --frames 9 --clip_mode middle".split()
    args, s = train_lora.arguments(flags), released("ti2v-5B")
    assert data_source({"source": "a"}, args, s) == DataSource(Path("a"), (640, 352), 9, "middle", 1, 1.0)
    own = {"resolution": "320x320", "frames": 5, "clip_mode": "several", "repeats": 3, "weight": 0.25}
    want = DataSource(Path("b"), (320, 320), 5, "several", 3, 0.25)
    for size in ("320x320", [320, 320]):
        assert data_source({"source": "b"} | own | {"resolution": size}, args, s) == want


@pytest.mark.parametrize(
    "own, said",
    [
        ({"repeats": 0}, "--data a: repeats 0"),
        ({"repeats": 1.5}, "--data a: repeats 1.5"),
        ({"weight": 0}, "--data a: .*weight 0"),
        ({"weight": float("inf")}, "--data a: .*weight inf"),
        ({"clip_mode": "last"}, "--data a, --clip_mode last"),
        ({"resolution": "320x16"}, "--data a, --resolution 320x16"),
        ({"frames": 8}, "--frames 8"),
    ],
)
def test_settings_of_a_data_set_that_cannot_be_are_refused(own, said):
    with pytest.raises(BadInput, match=said):
        data_source(
            {"source": "a"} | own, train_lora.arguments(["--frames", "5", "--resolution", "64x64"]), released("ti2v-5B")
        )


def test_the_command_line_goes_before_the_file(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('lora = ["a", "b"]\nsteps = 3\nframes = 5\ncompile = true\n')
    args = sample.arguments(["--steps", "4", "--lora", "c", "--config", str(file)])
    assert (args.steps, args.frames, args.lora, args.compile) == (4, 5, ["c"], True)


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("c.toml", "step = 3", "c.toml: step: there is no such flag; did you mean --steps?"),
        ("c.toml", "base_seed = 3", "base_seed: there is no such flag; it is --seed here"),
        ("c.toml", "compile = 1", "compile = 1: should be true or false"),
        ("c.toml", "steps 3", "c.toml: not TOML"),
        ("c.json", "steps = 3", "c.json: not JSON"),
        ("c.json", "[3]", "c.json: should hold flags and their values"),
        ("none.toml", None, "none.toml: No such file"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, name, text, said):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(BadInput) as e:
        sample.arguments(["--config", str(tmp_path / name)])
    assert said in str(e.value) and "\n" not in str(e.value)


def test_texts_and_numbers_survive_toml(tmp_path):
    values = {"a": 'quote " and \\ and ü\n', "b": 1e-7, "c": [1, 2.5], "d": False, "e": None, "help": 1}
    tables = [{"source": "x", "frames": 5}, {"source": "y", "weight": None}]
    write_config(tmp_path / "c.toml", values | {"data": tables})
    want = {k: v for k, v in values.items() if k in "abcd"} | {"data": [tables[0], {"source": "y"}]}
    assert read_config(tmp_path / "c.toml") == want


def test_no_parser_takes_a_part_of_a_flags_name(capsys):
    assert "did you mean --prompt" in error_of(lambda: sample.arguments(["--promp", "x"]), capsys)
    assert issubclass(Parser, argparse.ArgumentParser)


@pytest.mark.parametrize("script", ["train_lora", "train_te"])
def test_a_run_from_its_own_config_file_is_the_same(checkpoints, media, tmp_path, script):
    """To the bit, with nothing else on the command line than where it goes."""
    flags = "--resolution 32x32 --frames 1 --steps 2 --batch 1 --lr 1e-2 --seed 5 --held_out 0 --device cpu".split()
    flags += ["--keywords", "dog", "--save", "delta"] if script == "train_te" else ["--rank", "3", "--trigger", "dog"]
    where = ["--ckpt", checkpoints["ti2v"], "--data", media, "--cache", tmp_path / "cache"]
    file, (one, two) = ROOT / f"{script}.py", (tmp_path / "one", tmp_path / "two")
    scripts.run(file, *where, *flags, "--out", one, check=True)
    scripts.run(file, "--config", one / "config.toml", "--out", two, check=True)
    (name,) = (f.name for f in one.glob("*.safetensors") if "_0" not in f.name and "best" not in f.name)
    a, b = (load(folder / name)[0] for folder in (one, two))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    configs = [{k: v for k, v in read_config(folder / "config.toml").items() if k != "out"} for folder in (one, two)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("command", EARLIER_FLAGS)
def test_flags_stay(command, monkeypatch):
    """All but train_te's --cache_text, whose place an encoder that is trained has no use for."""
    script, *words = command.split()
    found, real = set(), argparse.ArgumentParser.parse_known_args

    def parse(p, *args, **how):
        found.update(option.removeprefix("--") for action in p._actions for option in action.option_strings)
        return real(p, *args, **how)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
    with pytest.raises(SystemExit):
        (SCRIPTS | {"diag": diag})[script].arguments([*words, "--help"])
    assert {*EARLIER_FLAGS[command].split()} - found <= ({"cache_text"} if script == "train_te" else set())
