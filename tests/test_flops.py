"""FLOPs that are counted ahead against PyTorch's counter on real runs, and the times that they predict."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import lora
from benchmarks import tiny, tiny_animate, tiny_s2v
from diagnostics import scaling
from kernels import backend
from nanowan import flops, memory_estimate
from nanowan.formats.dit import full_config
from nanowan.variants.registry import parts_of
from wan import Wan

DITS = {kind: lambda kind=kind: tiny.dit(kind) for kind in ("ti2v", "t2v", "i2v")}
DITS |= {"s2v": tiny_s2v.dit, "animate": tiny_animate.animate}
LATENTS, TEXT, BATCH = (3, 8, 12), 9, 2
aten = torch.ops.aten


def attention(q, k, *_, out_shape=None, **__):
    """Two products of (L,d) and (S,d) for each head."""
    B, N, L, d = q
    return 2 * 2 * B * N * L * k[2] * d


ON_CPU = {  # which PyTorch's counter leaves out; backward, five products
    aten._scaled_dot_product_flash_attention_for_cpu: attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda dy, *a, **k: 5 * attention(*a, **k) // 2,
}


def example(kind):
    """(A small DiT, its arguments, its further inputs), of real tensors."""
    dit = DITS[kind]().requires_grad_(False)
    c = dit.config
    x, context = torch.randn(BATCH, c.in_dim, *LATENTS), torch.randn(BATCH, TEXT, c.text_dim)
    inputs = parts_of(c.model_type).examples.inputs(c, (c.out_dim, *LATENTS))
    inputs = {k: torch.randn(BATCH, *v.shape[1:]).clamp(-1, 1) for k, v in inputs.items()}
    return dit, (x, torch.full((BATCH,), 500.0), context), inputs


@pytest.mark.parametrize("kind", DITS)
def test_a_forward_pass(kind, report):
    """Attention by plain products, whose count needs no formula for it."""
    dit, (x, t, context), inputs = example(kind)
    with torch.no_grad(), backend.using("ref"), sdpa_kernel(SDPBackend.MATH):
        text, inputs = dit.embed_text(context, cache=True), dit.prepare_inputs(**inputs)
        with FlopCounterMode(display=False) as counter:
            dit(x, t, text, **inputs)
    counted = flops.forward(dit.config, LATENTS, TEXT, BATCH)
    report("FLOPs", abs(counted.total / counter.get_total_flops() - 1), 0.01)
    assert counted.linear > 0 < counted.attention and counted.attention_backward == 0


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("trained", ["all blocks", "the last block", "the text"])
@pytest.mark.parametrize("kind", DITS)
def test_a_training_step(kind, trained, checkpointing, report):
    dit, (x, t, context), inputs = example(kind)
    names = ()
    if trained == "the text":
        context.requires_grad_()
    else:
        lora.inject(dit, rank=4, blocks=None if trained == "all blocks" else [len(dit.blocks) - 1])
        names = tuple(lora.lora_layers(dit))
    dit.checkpointing = checkpointing
    with backend.using("ref"), FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
        dit(x, t, context, **inputs).square().sum().backward()
    counted = flops.training_step(dit.config, LATENTS, TEXT, BATCH, names, 4, checkpointing)
    report("FLOPs", abs(counted.total / counter.get_total_flops() - 1), 0.01)
    if checkpointing and trained == "all blocks":
        # 2.5 of one of two forward passes, but for the first block's self-attention, before anything that is trained
        assert 0 < counted.attention_backward < 1.25 * counted.attention


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["t2v", "ti2v"])
def test_what_few_blocks_tell_of_many(kind, checkpointing, monkeypatch, report):
    """The same as counting all five blocks."""
    config = replace(example(kind)[0].config, num_layers=5)
    for parts in (("cross_attn.k", "ffn.2"), ()):
        names = tuple(f"blocks.{i}.{part}" for i in range(5) for part in parts)
        given = config, LATENTS, TEXT, BATCH, names, 4, checkpointing
        with monkeypatch.context() as patch:
            found = flops.training_step(*given), flops.forward(*given[:4])
            patch.setattr(flops, "ALIKE", ())
            want = flops.training_step(*given), flops.forward(*given[:4])
        for a, b in zip(found, want):
            report("FLOPs", max(abs(x - y) / max(y, 1) for x, y in zip(a, b)), 1e-9)


@pytest.mark.parametrize("n", [0, 1, 2, 4, 5])
def test_some_of_the_blocks_recompute(n, report):
    """Counted as they run, on a DiT of five blocks."""
    config = replace(example("ti2v")[0].config, num_layers=5)
    dit = Wan(config).requires_grad_(False)
    lora.inject(dit, rank=4)
    dit.checkpointing = n
    x, context = torch.randn(BATCH, config.in_dim, *LATENTS), torch.randn(BATCH, TEXT, config.text_dim)
    with backend.using("ref"), FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
        dit(x, torch.full((BATCH,), 500.0), context).square().sum().backward()
    counted = flops.training_step(config, LATENTS, TEXT, BATCH, tuple(lora.lora_layers(dit)), 4, n)
    report("FLOPs", abs(counted.total / counter.get_total_flops() - 1), 1e-9)


def test_released_sizes(report):
    """As published for TI2V-5B at 1280x704x121, by others' count: 237 TFLOP in linears, 274 in attention."""
    counted = flops.forward(full_config("ti2v-5B"), (31, 44, 80))
    report("linears", abs(counted.linear / 237e12 - 1), 0.01)
    report("attention", abs(counted.attention / 274e12 - 1), 0.01)


def test_the_share_of_a_gpus_peak(monkeypatch, report):
    """Without what checkpointing computes again; other sizes in proportion, and each sample of a batch alike."""
    dit, _, _ = example("t2v")
    lora.inject(dit, rank=4)
    dit.checkpointing = True
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(flops, "COUNTED", {})
    names = tuple(lora.lora_layers(dit))
    for latents in ((3, 8, 12), (5, 16, 24)):
        x = torch.empty(BATCH, 16, *latents)
        want = flops.training_step(dit.config, latents, TEXT, BATCH, names, 4).total / 0.5 / 989e12
        report(f"{latents}", abs(memory_estimate.mfu(dit, x, TEXT, 0.5, "cuda") / want - 1), 0.1)
    assert len(flops.COUNTED) == 1
    assert memory_estimate.mfu(dit, x, TEXT, 0.5, "cpu") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another")
    assert memory_estimate.mfu(dit, x, TEXT, 0.5, "cuda") is None


def test_predicted_times():
    """Each kind of work at its own rate."""
    work = flops.Flops(linear=700 * 10**12, attention=300 * 10**12, attention_backward=86 * 10**12)
    assert flops.predict_seconds(work, "NVIDIA H100 80GB HBM3") == pytest.approx(1 + 0.5 + 0.2)
    assert flops.predict_seconds(work, "NVIDIA H100 80GB HBM3", fp8=True) == pytest.approx(700 / 1150 + 0.7)
    assert flops.predict_seconds(flops.Flops(), "NVIDIA GeForce RTX 4090", nbytes=1.8e12) == pytest.approx(2)
    assert flops.predict_seconds(work, "NVIDIA A100-SXM4-80GB", fp8=True) is None  # it has none
    assert flops.predict_seconds(work, "another") is None


def test_an_all_reduce_sends_all_but_a_share_twice():
    """Figures by hand: n ranks send 2 (n-1)/n of 8 GB at 1 GB/s, 16 of two machines at a tenth of that, and share
    the time among their n samples.
    """
    cluster = scaling.Cluster(inside=1e9, between=1e8)
    for ranks, seconds in ((1, 0), (2, 8 / 2), (4, 12 / 4), (8, 14 / 8), (16, 150 / 16)):
        times = scaling.step_times(full_config("ti2v-5B"), (3, 4, 5), ranks, 8e9, 0.0, cluster)
        assert times["data parallel"][0] == pytest.approx(seconds)
