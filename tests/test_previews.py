"""Previews: what sample.py makes of the same prompts, at the training's own size, of held-out clips where need be."""

import pytest
import torch
from helpers.scripts import NoPlan

import sample
import train_lora
import train_te
from benchmarks import tiny_s2v
from nanowan.errors import BadInput
from nanowan.pipeline import Pipeline
from nanowan.prompts import Prompt
from nanowan.training import previews
from nanowan.training.flags import resolve
from nanowan.training.previews import preview_requests, preview_settings
from nanowan.video import write_mp4


@pytest.fixture
def shown(monkeypatch):
    """{file name: the clip (3,T,H,W) of each preview that is written}."""
    clips = {}

    def write(file, clip, *rest):
        clips[file.name] = clip.clone()
        write_mp4(file, clip, *rest)

    monkeypatch.setattr(previews, "write_mp4", write)
    return clips


def resolved(script, pipe, *flags):
    args = script.arguments(["--device", "cpu", "--previews", "p.txt", *flags])
    resolve(args, pipe.settings, script.__name__)
    return args


def test_previews_are_of_the_trainings_size_and_frames(checkpoints):
    pipe = Pipeline(checkpoints["ti2v"])
    args = resolved(train_lora, pipe, "--resolution", "64x96", "--frames", "9")
    s = preview_settings(args, pipe.settings)
    assert (s.size, s.frames, s.steps) == ((64, 96), 9, min(20, pipe.settings.steps))
    args = resolved(train_lora, pipe, "--preview_size", "32x32", "--preview_frames", "5", "--preview_steps", "3")
    found = preview_requests(args, pipe.settings, [Prompt("a"), Prompt("b", {"steps": 2, "frames": 1}, {}, 9)])
    assert [(r.settings.size, r.settings.frames, r.settings.steps, r.seed) for r in found] == [
        ((32, 32), 5, 3, 0),
        ((32, 32), 1, 2, 9),
    ]


@pytest.mark.parametrize("script", [train_lora, train_te])
def test_the_first_preview_is_what_sample_makes_of_the_base(checkpoints, media, tmp_path, shown, monkeypatch, script):
    """To the bit; with train_te.py also where a keyword begins as another word."""
    (tmp_path / "p.txt").write_text("a fox that is red --d 4\na red square --i x.png --s 2\n")
    from PIL import Image

    Image.new("RGB", (64, 64), "green").save(tmp_path / "x.png")
    flags = f"--ckpt {checkpoints['ti2v']} --data {media} --cache {tmp_path}/cache --out {tmp_path}/out --device cpu"
    flags += f" --previews {tmp_path}/p.txt --preview_steps 3 --steps 1 --batch 1 --resolution 64x64 --frames 5"
    flags += " --keywords red=blue" if script is train_te else " --rank 4"
    monkeypatch.setattr("sys.argv", [script.__name__, *flags.split()])
    script.main()
    pipe = sample.load(checkpoints["ti2v"])
    how = dict(size=(64, 64), frames=5)
    first = sample.generate(pipe, "a fox that is red", seed=4, steps=3, **how)[0]
    second = sample.generate(pipe, "a red square", image=tmp_path / "x.png", steps=2, **how)[0]
    assert torch.equal(shown["step_000000_00.mp4"], first) and torch.equal(shown["step_000000_01.mp4"], second)
    if script is train_te:
        assert not torch.equal(shown["step_000001_00.mp4"], first)


@pytest.mark.parametrize("script", [train_lora, train_te])
def test_a_later_preview_is_what_sample_makes_of_the_result(
    checkpoints, media, tmp_path, shown, monkeypatch, report, script
):
    """Without the dropout of training, and with the encoder as it is then."""
    (tmp_path / "p.txt").write_text("a dog that is red --d 4\n")
    flags = f"--ckpt {checkpoints['ti2v']} --data {media} --cache {tmp_path}/cache --out {tmp_path}/out --device cpu"
    flags += f" --previews {tmp_path}/p.txt --preview_steps 2 --preview_every 1 --steps 2 --batch 1 --held_out 0"
    flags += " --resolution 64x64 --frames 5 --lr 3e-2 --warmup 0"
    flags += " --dtype fp32 --keywords dog" if script is train_te else " --rank 4 --dropout 0.9"
    monkeypatch.setattr(script, "predict", lambda *_, **__: NoPlan())
    monkeypatch.setattr("sys.argv", [script.__name__, *flags.split()])
    script.main()
    result = {"text_encoder": f"{tmp_path}/out/text_encoder.safetensors"}
    if script is train_lora:
        result = {"lora": [f"{tmp_path}/out/adapter_model.safetensors"]}
    pipe = sample.load(checkpoints["ti2v"], **result)
    want = sample.generate(pipe, "a dog that is red", seed=4, steps=2, size=(64, 64), frames=5)[0]
    before, after = shown["step_000000_00.mp4"], shown["step_000002_00.mp4"]
    assert (before - want).abs().max() > 0.05
    report("of the change", ((after - want).norm() / (before - want).norm()).item(), 1e-2)


def test_inputs_of_ones_own_are_refused_where_held_out_clips_give_them(tmp_path):
    pipe = Pipeline(tiny_s2v.checkpoint(tmp_path / "s2v"))
    args = resolved(train_lora, pipe, "--data", str(tmp_path))
    with pytest.raises(BadInput, match="--previews: --image is not taken"):
        preview_requests(args, pipe.settings, [Prompt("a", inputs={"image": "x.png"})])
