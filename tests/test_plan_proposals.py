"""diag.py plan --gpus: the least intrusive flags that fit, on the device and on the host."""

import functools
import math

import pytest
import torch

from benchmarks import tiny
from diagnostics import plan
from diagnostics.logits import open_dataset
from diagnostics.plan import Job, Machine, candidates, parse_machine, planned, propose
from nanowan import memory_estimate
from nanowan.errors import BadInput
from nanowan.pipeline import Pipeline

SMALL = ["--size", "256x256", "--frames", "9"]


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A TI2V checkpoint whose DiT has 6 blocks and is most of it."""
    folder = tiny.checkpoint(tmp_path_factory.mktemp("deep") / "deep", "ti2v")
    tiny.write_dit(folder, tiny.dit("ti2v", dim=384, heads=3, layers=6))
    return folder


@pytest.mark.parametrize("script", [pytest.param("train_lora", marks=pytest.mark.slow), "sample"])
def test_nothing_less_intrusive_fits(script, deep, monkeypatch):
    """Against all candidates one after the other, for limits between the largest and the smallest of them."""
    size = ["--resolution", "128x128", "--batch", "8"] if script == "train_lora" else ["--size", "128x128"]
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
    nearest = " ".join(every[peaks.index(min(peaks))])
    with pytest.raises(BadInput, match=f"needs at least .* GB on each GPU, with {nearest}, and"):
        propose(script, flags, Machine(1, min(peaks) - 1))


@pytest.mark.slow
def test_the_host_decides_between_streaming_and_8_bits(monkeypatch):
    """bf16 where a machine has the memory for what is streamed; else half of it."""
    monkeypatch.setattr(memory_estimate, "resident", lambda *_: 500_000_000)  # that of this process grows as tests run
    flags = ["--ckpt", "t2v-A14B", *SMALL]
    roomy, need = propose("sample", flags, Machine(1, 20e9, 64e9))
    assert "--stream_blocks" in roomy and "--base_dtype" not in roomy and need.peak <= 20e9 and need.host_peak <= 64e9
    tight, less = propose("sample", flags, Machine(1, 20e9, need.host_peak - 1))
    assert "--base_dtype" in tight and less.peak <= 20e9 and less.host_peak < need.host_peak


def test_an_8_gb_card_streams_the_text_encoder():
    _, need = propose("sample", ["--ckpt", "ti2v-5B", *SMALL, "--base_dtype", "fp8"], Machine(1, 8e9))
    assert sum(need.phases["encode prompts"].values()) < 3e9 < 11e9 < need.host["encode prompts"]["encoder, read"]


@pytest.mark.slow
def test_experts_stay_where_they_fit_and_else_have_copies_on_the_host():
    flags = ["--ckpt", "t2v-A14B", "--resolution", "256x256", "--frames", "9", "--checkpointing", "--device", "cuda"]
    one, both, unknown = (planned("train_lora", flags, Machine(1, memory, 1e12)) for memory in (48e9, 141e9, None))
    expert = one.phases["training"]["DiT"]
    assert one.takes_turns and one.host["training"]["experts"] == pytest.approx(2 * expert, rel=1e-3)
    assert both.phases["training"]["DiT"] == 2 * expert and not both.takes_turns and not both.host["training"]
    assert unknown.takes_turns and unknown.phases["training"]["DiT"] == expert
    short = planned("train_lora", flags, Machine(1, 48e9, 40e9))  # the other one is read anew at each turn
    assert short.host["training"]["experts"] == pytest.approx(expert, rel=1e-3)


@pytest.mark.slow
def test_train_te_ends_with_the_embeddings_of_words():
    flags = ["--ckpt", "ti2v-5B", "--resolution", "256x256", "--frames", "9", "--keywords", "wedge"]
    found, need = propose("train_te", flags, Machine(1, 24e9))
    assert found[len(flags) :][:4] == ["--train_blocks", "0", "--save", "delta"] and need.peak <= 24e9
    found, _ = propose("train_te", flags, Machine(1, 80e9))
    assert "--train_blocks" not in found


def test_proposals_leave_the_users_flags():
    for script, given in (
        ("sample", {"--ulysses_size"}),
        ("sample", {"--guidance_parallel"}),
        ("train_lora", {"--fsdp"}),
        ("train_lora", {"--ulysses_size"}),
        ("train_te", {"--save"}),
    ):
        proposed = candidates(script, given, 4, 30, 24)
        assert proposed and not any(given & {*c.flags} for c in proposed), (script, given)


def test_what_a_machine_is_called():
    """A card of "24 GB" has 24 * 2^30 bytes, of which a twentieth is not counted on."""
    one = parse_machine("1x24:4090", None)
    assert (one.ranks, one.host, one.card) == (1, math.inf, "4090") and one.memory == pytest.approx(25769803776 * 0.95)
    eight = parse_machine("8x80", 512)
    assert (eight.ranks, eight.card) == (8, None) and eight.host / eight.memory == pytest.approx(6.4)
    for gpus in ("eight", "0x80", "8x", "1x0", "8x80GB"):
        with pytest.raises(BadInput, match=f"--gpus {gpus}: COUNTxGB or COUNTxGB:CARD, such as 8x80"):
            parse_machine(gpus, None)
    with pytest.raises(BadInput, match="--gpus 1x24:3090: times are known for H100"):
        parse_machine("1x24:3090", None)
    with pytest.raises(BadInput, match="--host 0"):
        parse_machine("1x24", 0)


def test_resolution_is_an_area_as_in_training():
    """272 is no multiple of 32, and no clip is refused for it."""
    need = planned("train_lora", ["--ckpt", "ti2v-5B", "--resolution", "480x272", "--frames", "9", "--checkpointing"])
    assert need.phases["training"]


# ---- sizes and times ---------------------------------------------------------------------------------------------
def test_the_sizes_of_data_are_planned(media, capsys):
    """As a run has them; of a released variant too, whose latents have 48 channels at a sixteenth of the size."""
    flags = ["--data", str(media), "--resolution", "64x64", "--frames", "9", "--device", "cpu"]
    want = open_dataset(Pipeline("nano"), data=str(media), resolution="64x64", frames=9).sizes()
    job = Job("train_lora", ["--ckpt", "nano", *flags])
    assert job.sizes == want and sum(job.plan().disk.values()) > sum(want["cache"]) == job.plan().disk["cache"]
    full = Job("train_lora", ["--ckpt", "ti2v-5B", *flags]).sizes  # two clips of 9 frames and a picture
    assert full["bucket"] == (64, 64, 9) and full["cache"][0] == 4 * 48 * 4 * 4 * (3 + 3 + 1)
    assert Job("train_lora", ["--data", "nowhere", "--ckpt", "ti2v-5B"]).sizes["bucket"] == (1280, 704, 121)


def test_the_time_of_a_sampling_step():
    """TI2V-5B at its own size: others count 237 TFLOP in linears and 274 in attention; two passes at the rates of
    CARDS, and 30 blocks of norms, rotations and gates over 27,280 tokens.
    """
    job = Job("sample", ["--ckpt", "ti2v-5B"])
    moved = 2 * 2 * 27280 * 30 * (21 * 3072 + 2 * 14336)
    want = 2 * (237e12 / 150e12 + 274e12 / 155e12) + moved / 0.9e12
    assert job.step_seconds("4090") == pytest.approx(want, rel=0.01)
    said = job.times("4090")
    assert (
        f"4090 {want:.2g} s a step, {50 * want / 60:.0f} min for a video" in said and "not measured (50 steps" in said
    )
    small = job.times(peak=25.8e9)  # 24 GiB is 25.77e9
    assert "4090 has 24 GB, which is too little; H100 " in small and "H100 has" not in small
    assert "4090 has" not in job.times(peak=25.7e9) and "H100 has 80 GB" in job.times(peak=86e9)
    shared = Job("sample", ["--ckpt", "ti2v-5B", "--ulysses_size", "2", "--guidance_parallel"])
    assert 4 * shared.step_seconds("4090") == pytest.approx(job.step_seconds("4090"))
    unguided = Job("sample", ["--ckpt", "ti2v-5B", "--guidance", "1"])
    assert 2 * unguided.step_seconds("H100") == pytest.approx(job.step_seconds("H100"))


def test_the_time_of_a_training_step():
    """In proportion to the samples; a pass more where all blocks recompute; streaming waits for PCIe, twice for each
    block's 8 d^2 + 2 d ffn weights of 2 bytes.
    """
    flags = ["--ckpt", "ti2v-5B", "--resolution", "256x256", "--frames", "9", "--no-checkpointing"]

    def seconds(script, *more):
        return Job(script, [*flags, *more]).step_seconds("4090")

    one = seconds("train_lora")
    assert seconds("train_lora", "--batch", "2", "--accumulate", "3") == pytest.approx(6 * one)
    assert 1.4 < seconds("train_lora", "--checkpointing") / one < 1.5  # a third forward pass; less of the attention
    assert 1.1 < seconds("train_lora", "--preserve", "2", "--trigger", "wedge") / one < 1.3  # measured on nano: 1.22
    streamed = 30 * 2 * 2 * (8 * 3072**2 + 2 * 3072 * 14336) / 25e9
    assert seconds("train_lora", "--checkpointing", "--stream_blocks", "30") == pytest.approx(streamed)
    rows, blocks = (seconds("train_te", "--anchor", "0", "--train_blocks", n) for n in ("0", "24"))
    learned = 2 * 24 * (4 * 4096**2 + 3 * 4096 * 10240 + 2 * 4096 + 32 * 64) * 64 / 150e12
    assert blocks - rows == pytest.approx(learned, rel=0.01)


def test_a_plan_prints_time_and_what_is_counted(capsys, media, monkeypatch):
    from test_diag import diag

    flags = ["train_lora", "--ckpt", "ti2v-5B", "--resolution", "64x64", "--frames", "9", "--data", media]
    diag("plan", "--gpus", "1x24", *flags)
    said = capsys.readouterr().out
    assert "a GPU of 24 GB has 25.8 GB of 10^9 bytes, and 24.5 of them are counted on" in said
    assert "4090 " in said and "; H100 " in said and "the largest clips are 64x64, 9 frames" in said
    assert "is assumed" not in said
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    diag("plan", *flags, "--checkpointing")
    assert "a GPU of 80 GB is assumed" in capsys.readouterr().out
