"""diag.py plan --gpus: the least intrusive flags that fit, on the device and on the host."""

import functools
import math

import pytest

from benchmarks import tiny
from diagnostics import plan
from diagnostics.plan import Machine, candidates, parse_machine, planned, propose
from nanowan.errors import BadInput

SMALL = ["--size", "256x256", "--frames", "9"]


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A TI2V checkpoint whose DiT has 6 blocks and is most of it."""
    folder = tiny.checkpoint(tmp_path_factory.mktemp("deep") / "deep", "ti2v")
    tiny.write_dit(folder, tiny.dit("ti2v", dim=384, heads=3, layers=6))
    return folder


@pytest.mark.parametrize("script", ["train_lora", "sample"])
def test_nothing_less_intrusive_fits(script, deep, monkeypatch):
    """Against all candidates one after the other, for limits between the largest and the smallest of them."""
    size = ["--resolution", "256x256"] if script == "train_lora" else ["--size", "256x256"]
    flags = ["--ckpt", str(deep), *size, "--frames", "5"]
    cached = functools.cache(lambda argv, mode: planned(script, [*argv], Machine(1, 1e9, math.inf), mode))
    monkeypatch.setattr(plan, "planned", lambda script, argv, machine, mode: cached(tuple(argv), mode))
    groups = candidates(script, {"--ckpt"}, 1, 6, 3, guided=script == "sample")
    every = [g.with_number(script, n) for g in groups for n in range(g.fewest, g.most + 1)]

    def peak(found):
        mode = "sequential" if script == "sample" else None
        return cached((*flags, "--device", "cuda", *found), mode).peak

    peaks = [peak(found) for found in every]
    assert len(every) == (26 if script == "train_lora" else 14) and max(peaks) > 1.02 * min(peaks)
    for share in (0.999, 0.9, 0.7, 0.5, 0.35, 0.2, 0.1, 0.0):
        limit = min(peaks) + share * (max(peaks) - min(peaks))
        first = next(i for i, p in enumerate(peaks) if p <= limit)
        found, need = propose(script, flags, Machine(1, limit))
        assert found == flags + every[first] and need.peak <= limit, share
    with pytest.raises(BadInput, match="needs at least"):
        propose(script, flags, Machine(1, min(peaks) - 1))


def test_the_host_decides_between_streaming_and_8_bits():
    """bf16 where a machine has the memory for what is streamed; else half of it."""
    flags = ["--ckpt", "ti2v-5B", *SMALL]
    roomy, need = propose("sample", flags, Machine(1, 8e9, 32e9))
    assert "--stream_blocks" in roomy and "--base_dtype" not in roomy and need.peak <= 8e9 and need.host_peak <= 32e9
    tight, less = propose("sample", flags, Machine(1, 8e9, need.host_peak - 1))
    assert "--base_dtype" in tight and less.peak <= 8e9 and less.host_peak < need.host_peak


def test_an_8_gb_card_streams_the_text_encoder():
    _, need = propose("sample", ["--ckpt", "ti2v-5B", *SMALL, "--base_dtype", "fp8"], Machine(1, 8e9))
    assert sum(need.phases["encode prompts"].values()) < 3e9 < 11e9 < need.host["encode prompts"]["encoder, read"]


def test_experts_stay_where_they_fit_and_else_have_copies_on_the_host():
    flags = ["--ckpt", "t2v-A14B", "--resolution", "256x256", "--frames", "9", "--checkpointing", "--device", "cuda"]
    one, both, unknown = (planned("train_lora", flags, Machine(1, memory, 1e12)) for memory in (48e9, 141e9, None))
    expert = one.phases["training"]["DiT"]
    assert one.takes_turns and one.host["training"]["experts"] == pytest.approx(2 * expert, rel=1e-3)
    assert both.phases["training"]["DiT"] == 2 * expert and not both.takes_turns and not both.host["training"]
    assert unknown.takes_turns and unknown.phases["training"]["DiT"] == expert
    short = planned("train_lora", flags, Machine(1, 48e9, 40e9))  # the other one is read anew at each turn
    assert short.host["training"]["experts"] == pytest.approx(expert, rel=1e-3)


def test_train_te_ends_with_the_embeddings_of_words():
    flags = ["--ckpt", "ti2v-5B", "--resolution", "256x256", "--frames", "9", "--keywords", "wedge"]
    found, need = propose("train_te", flags, Machine(1, 24e9))
    assert found[len(flags) :][:4] == ["--train_blocks", "0", "--save", "delta"] and need.peak <= 24e9
    found, _ = propose("train_te", flags, Machine(1, 80e9))
    assert "--train_blocks" not in found


def test_what_a_machine_is_called():
    assert parse_machine("1x25.8", None) == Machine(1, 25.8e9, math.inf) and parse_machine("8x80", 512) == Machine(
        8, 80e9, 512e9
    )
    for gpus in ("eight", "0x80", "8x", "1x0", "8x80GB"):
        with pytest.raises(BadInput, match=f"--gpus {gpus}: COUNTxGB, such as 8x80"):
            parse_machine(gpus, None)
    with pytest.raises(BadInput, match="--host 0"):
        parse_machine("1x24", 0)


def test_resolution_is_an_area_as_in_training():
    """272 is no multiple of 32, and no clip is refused for it."""
    need = planned("train_lora", ["--ckpt", "ti2v-5B", "--resolution", "480x272", "--frames", "9", "--checkpointing"])
    assert need.phases["training"]
