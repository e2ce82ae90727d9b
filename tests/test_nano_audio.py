"""The nano world with sound: its measures on drawn clips, and that its files are training clips of S2V."""

import pytest
import torch

from nano import sound as world
from nanowan.pipeline import Pipeline
from nanowan.training import scan as scanning
from nanowan.variants.s2v import wav2vec2
from nanowan.video import has_sound, read_frames, to_tensor


@pytest.fixture(scope="module")
def examples():
    return [world.example(seed) for seed in range(12)]


def test_loudness_is_the_level_of_a_known_tone():
    """A sine of amplitude a has the root mean square a / sqrt(2) over whole periods: 480 Hz has 30 of them a frame."""
    level = torch.tensor([0.0, 0.5, 1.0, 0.25])
    tone = torch.sin(2 * torch.pi * 480 * torch.arange(4000) / 16000) * level.repeat_interleave(1000)
    assert torch.allclose(world.loudness(tone * 0.3), level, atol=1e-4)


@pytest.mark.parametrize("shape", world.SHAPES)
def test_pulse_is_the_size_that_was_drawn(shape):
    """Proportional to the radius for every shape; a circle's is its radius."""
    level = torch.tensor([0.0, 0.3, 1.0, 0.6])
    a = {"color": "red", "shape": shape, "motion": "left", "background": "grey"}
    pulse = world.pulse(world.paint(a, level))
    radius = 6 + 9 * level
    assert world.correlation(pulse, radius) > 0.995  # a square does not grow evenly on a grid of pixels
    if shape == "circle":
        assert (pulse - radius).abs().max() < 0.2


def test_pulse_of_nothing_is_finite():
    """A flat clip, as a model may make one, has no correlation with anything."""
    assert world.correlation(world.pulse(torch.zeros(3, 8, 64, 64)), torch.rand(8)) == 0


def test_clips_follow_their_own_sound_and_no_other(examples):
    pulses = [world.pulse(clip) for _, _, clip in examples]
    levels = [world.loudness(sound) for _, sound, _ in examples]
    n = len(examples)
    assert min(map(world.correlation, pulses, levels)) > 0.99
    others = [world.correlation(pulses[i], levels[j]) for i in range(n) for j in range(n) if i != j]
    assert abs(sum(others) / len(others)) < 0.1


def test_files_hold_picture_and_sound_and_are_accepted_for_training(tmp_path, examples):
    ckpt, clips = tmp_path / "ckpt", tmp_path / "clips"
    world.write_checkpoint(ckpt, 0)
    world.write_clips(clips, range(2))
    file = clips / "0001.mp4"
    assert has_sound(file) and not list(clips.glob("*.wav"))

    # the mp4's own track, lossy, and its lossy pictures, in step with each other
    level = world.loudness(wav2vec2.read_audio(file)[: world.FRAMES * world.SAMPLES])
    video = torch.stack([to_tensor(frame.image) for frame in read_frames(file)], 1)
    assert video.shape == (3, 32, 64, 64)
    assert world.correlation(level, world.loudness(examples[1][1])) > 0.99
    assert world.correlation(world.pulse(video), level) > 0.98

    models = Pipeline(ckpt)
    samples = models.settings.parts.samples(models)
    scan = clips, 64 * 64, models.settings.size_multiple, world.FRAMES, 16, "first", tmp_path / "cache", samples
    items, skipped = scanning.scan(*scan)
    assert not skipped and [(i.frames, i.width, i.height) for i in items] == [(32, 64, 64)] * 2
    assert all(i.captions[0] for i in items)


def test_a_new_checkpoint_draws_as_if_there_were_no_sound(tmp_path):
    """Its injectors add nothing before they are trained: two sounds give the same clip."""
    world.write_checkpoint(tmp_path, 0)
    model = Pipeline(tmp_path).acquire("dit")
    g = torch.Generator().manual_seed(0)
    x, ref = torch.randn(1, 48, 8, 4, 4, generator=g), torch.randn(1, 48, 1, 4, 4, generator=g)
    context, t = torch.randn(1, 5, 128, generator=g), torch.tensor([500.0])
    audio = [torch.randn(1, 25, 64, 32, generator=g) for _ in range(2)]
    with torch.no_grad():
        a, b = (model(x, t, context, ref=ref, audio=features) for features in audio)
    assert torch.equal(a, b) and a.std() > 0.1
