"""The speech encoder against transformers' Wav2Vec2Model on equal weights, and the way from a file to video frames."""

import json

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

from benchmarks import tiny
from benchmarks.tiny_s2v import sound, write_wav
from nanowan.errors import BadInput
from nanowan.variants.s2v.wav2vec2 import (
    UNUSED,
    Wav2Vec2,
    Wav2Vec2Sizes,
    count_clips,
    load_wav2vec2,
    read_audio,
    rename,
    to_feature_rate,
    to_video_rate,
)


def peer(seed=5, hidden=32):
    config = Wav2Vec2Config(
        hidden_size=hidden,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=40,
        conv_dim=(16,) * 7,
        conv_bias=True,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        vocab_size=33,
    )
    return tiny.randomize(Wav2Vec2ForCTC(config), seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny wav2vec2 folder as transformers writes it, with the head for letters that speech recognition has."""
    path = tmp_path_factory.mktemp("wav2vec2")
    peer().save_pretrained(path)
    return path


@pytest.mark.parametrize("seconds", [0.045, 0.1, 1.0, 5.0155, 30.0])
def test_hidden_states_equal_transformers(folder, seconds, report):
    """The longest is encoded in two chunks."""
    samples = 3 * sound(seconds) + 0.2  # neither centred nor normalised
    x = (samples - samples.mean()) / torch.sqrt(samples.var(correction=0) + 1e-7)
    with torch.no_grad():
        out = Wav2Vec2ForCTC.from_pretrained(folder).eval().wav2vec2(x[None], output_hidden_states=True)
    want = torch.cat([*out.hidden_states[:-1], out.last_hidden_state])
    got = load_wav2vec2(folder).features(samples)
    report("relative error", tiny.error(got, want), 2e-5)
    # every state for itself: the last one, after the final norm, is the smallest
    report("worst state", max(tiny.error(g, w) for g, w in zip(got, want)), 2e-5)


def test_both_spellings_of_the_weight_norm(folder, tmp_path):
    state = load_file(folder / "model.safetensors")
    names = {"original0": "weight_g", "original1": "weight_v"}
    old = {}
    for key, value in state.items():
        for new, name in names.items():
            key = key.replace(f"parametrizations.weight.{new}", name)
        old[key] = value
    assert old.keys() != state.keys()
    save_file(old, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    a, b = (load_wav2vec2(f).features(sound(0.5)) for f in (folder, tmp_path))
    assert torch.equal(a, b)


def test_one_file_alone_gives_what_its_folder_does(tmp_path):
    """Heads of 64 and the strides of the released encoder, which no shape tells, are taken where there is no
    config.json.
    """
    peer(hidden=128).save_pretrained(tmp_path)
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "speech.safetensors").hardlink_to(tmp_path / "model.safetensors")
    a, b = (load_wav2vec2(f).features(sound(0.5)) for f in (tmp_path, tmp_path / "alone" / "speech.safetensors"))
    assert torch.equal(a, b)


def test_full_size_names_and_counts():
    """The released encoder: 424 tensors, of which three are of speech recognition only."""
    config = Wav2Vec2Config(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        conv_bias=True,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        vocab_size=33,
    )
    with torch.device("meta"):
        theirs = Wav2Vec2ForCTC(config).state_dict()
        kernels, strides = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)
        ours = Wav2Vec2(Wav2Vec2Sizes(512, kernels, strides, 1024, 4096, 16, 24, 16, 128))
    want = {rename(k): tuple(v.shape) for k, v in theirs.items() if k not in UNUSED}
    assert {k: tuple(v.shape) for k, v in ours.state_dict().items()} == want
    assert len(theirs) == 424 and sum(v.numel() for v in theirs.values()) == 315_472_545
    assert len(want) == 421


@pytest.mark.parametrize(
    "change, says",
    [
        ({"feat_extract_norm": "group"}, "feat_extract_norm is 'group'"),  # wav2vec2-base
        ({"model_type": "hubert"}, "model_type is 'hubert'"),
        ({"do_stable_layer_norm": False}, "do_stable_layer_norm is False"),
        ({"conv_stride": [5, 2]}, "2 strides"),
    ],
)
def test_another_model_is_refused(folder, tmp_path, change, says):
    config = json.loads((folder / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match=says):
        load_wav2vec2(tmp_path)


def test_stray_and_missing_tensors_are_named(folder, tmp_path):
    """Such as the pretrained xlsr-53, which is not the one that S2V was trained with."""
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    state = load_file(folder / "model.safetensors")
    state["quantizer.codevectors"] = torch.zeros(3)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match="unexpected .quantizer.codevectors"):
        load_wav2vec2(tmp_path / "model.safetensors")
    del state["quantizer.codevectors"], state["wav2vec2.encoder.layer_norm.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match="missing .encoder.layer_norm.weight"):
        load_wav2vec2(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "encoder_frames, features, clips",
    [(248, 148, 1), (249, 149, 1), (250, 150, 2), (251, 150, 2), (252, 151, 2), (500, 300, 3)],
)
def test_rates_and_clip_counts(encoder_frames, features, clips):
    """A of 149, 150 and 151: an exact multiple of 150 gives one more clip, which is all silent."""
    states = torch.arange(encoder_frames, dtype=torch.float32)[None, :, None]
    got = to_feature_rate(states)[0, :, 0]
    assert len(got) == features and count_clips(features) == clips
    # straight lines stay straight, and both ends are kept
    torch.testing.assert_close(got, torch.linspace(0, encoder_frames - 1, features), rtol=1e-6, atol=1e-4)


def test_frames_take_the_nearest_feature_and_zeros_behind_the_end():
    features = 1 + torch.arange(20.0)[None, :, None].repeat(2, 1, 3)
    got = to_video_rate(features, 12)
    assert got.shape == (2, 3, 12)
    # round half to even of 1.875 j, by hand
    index = [0, 2, 4, 6, 8, 9, 11, 13, 15, 17, 19, 21]
    assert got[0, 0].tolist() == [1 + i if i < 20 else 0 for i in index]
    assert (to_video_rate(1 + torch.arange(40.0)[None, :, None], 13)[0, 0, 12] - 1).item() == 22  # 22.5


def test_infer_frames_other_than_80():
    assert [count_clips(a, 48) for a in (89, 90, 91)] == [1, 2, 2]
    assert [count_clips(a, 16) for a in (29, 30)] == [1, 2]


def test_a_16_khz_mono_wav_is_read_exactly(tmp_path):
    samples = sound(0.3)
    write_wav(tmp_path / "a.wav", samples[None])
    assert torch.equal(read_audio(tmp_path / "a.wav"), (samples * 32767).round() / 32768)


def test_channels_are_averaged(tmp_path):
    left, right = sound(0.3), 0.2 * sound(0.3).flip(0)
    write_wav(tmp_path / "a.wav", torch.stack([left, right]))
    torch.testing.assert_close(read_audio(tmp_path / "a.wav"), (left + right) / 2, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rate", [8000, 44100, 48000])
def test_other_rates_are_resampled(tmp_path, rate):
    """Within 2 % of the sound sampled at 16 kHz, over the largest value: what different resampling filters differ by.
    8 kHz holds the tone's 700 Hz too.
    """
    write_wav(tmp_path / "a.wav", sound(1.0, rate).expand(2, -1), rate)
    got, want = read_audio(tmp_path / "a.wav"), sound(1.0)
    assert abs(len(got) - len(want)) <= 2
    n = min(len(got), len(want))
    inner = slice(200, n - 200)  # a filter sees silence beyond the ends
    assert tiny.error(got[:n][inner], want[:n][inner]) < 0.02


def write_mp4(path, samples, rate=44100, frames=8):
    """A small H.264 clip with the samples (channels,N) as its AAC track, or without one."""
    with av.open(str(path), "w") as file:
        video = file.add_stream("libx264", rate=16)
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        audio = None if samples is None else file.add_stream("aac", rate=rate, layout="stereo")
        for _ in range(frames):
            file.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        file.mux(video.encode(None))
        if audio is not None:
            for i, part in enumerate(samples.split(1024, 1)):
                frame = av.AudioFrame.from_ndarray(part.contiguous().numpy(), format="fltp", layout="stereo")
                frame.sample_rate, frame.pts = rate, 1024 * i  # without pts the encoder's delay would stay in the file
                file.mux(audio.encode(frame))
            file.mux(audio.encode(None))


def test_the_sound_of_an_mp4(tmp_path):
    write_mp4(tmp_path / "a.mp4", sound(1.0, 44100).expand(2, -1))
    got, want = read_audio(tmp_path / "a.mp4"), sound(1.0)
    assert abs(len(got) - len(want)) <= 1024  # AAC comes in blocks
    inner = slice(2000, 14000)
    assert tiny.error(got[inner], want[inner]) < 0.1  # AAC is lossy


def test_bad_input_is_one_line(tmp_path):
    write_mp4(tmp_path / "mute.mp4", None)
    with pytest.raises(BadInput, match=r"mute.mp4: has no sound track"):
        read_audio(tmp_path / "mute.mp4")
    write_wav(tmp_path / "empty.wav", torch.zeros(1, 0))
    with pytest.raises(BadInput, match=r"empty.wav: holds 0.000 s of sound"):
        read_audio(tmp_path / "empty.wav")
    write_wav(tmp_path / "short.wav", sound(0.01)[None])
    with pytest.raises(BadInput, match=r"short.wav: holds 0.010 s of sound; at least 0.045 s"):
        read_audio(tmp_path / "short.wav")
    (tmp_path / "text.wav").write_text("not a sound")
    with pytest.raises(BadInput, match=r"text.wav: its sound cannot be decoded"):
        read_audio(tmp_path / "text.wav")
    with pytest.raises(BadInput, match=r"none.wav: does not exist"):
        read_audio(tmp_path / "none.wav")
