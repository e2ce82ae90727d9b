"""The learning rate, and 8-bit AdamW with compensated bf16 weights against torch's AdamW in fp32."""

import math

import pytest
import torch

from optim import EMA, AdamW8bit, dequantize, lr_at, quantize


def test_an_average_rests_while_its_parameter_has_no_gradient():
    a, b = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    ema = EMA([a, b], 0.5)
    for step in range(20):
        a.grad, b.grad = (torch.ones(3), None) if step < 10 else (None, torch.ones(3))
        with torch.no_grad():
            (a if step < 10 else b).add_(1)
        ema.update()
    assert torch.equal(ema.average[0], ema.average[1]) and 8 < ema.average[0][0] < 10 and ema.steps == [10, 10]


def test_learning_rate():
    assert [lr_at(i, 100, 1.0, 4, "constant") for i in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    assert (
        lr_at(4, 104, 1.0, 4, "cosine") == 1.0
        and math.isclose(lr_at(54, 104, 1.0, 4, "cosine"), 0.55)
        and lr_at(103, 104, 1.0, 4, "cosine") < 0.101
    )


@pytest.mark.parametrize("levels", [127, 255])
def test_codes_are_unbiased_and_within_a_step(levels):
    x = torch.exp(torch.randn(64, 256) * 2)
    x[0, :9] = 0
    step = 2 ** (16 / (levels - 1)) - 1
    mean = torch.zeros_like(x)
    for _ in range(200):
        code, scale = quantize(x, levels, torch.rand_like(x))
        y = dequantize(code, scale, levels)
        assert (y[0, :9] == 0).all()
        reached = x > x.amax(1, keepdim=True) * 2.0**-15.9
        assert ((y / x - 1).abs()[reached & (x > 0)] <= step * 1.01).all()
        mean += y / 200
    assert (mean / x - 1).abs()[x > 0].mean() < 0.02


def test_bytes_per_parameter():
    p = torch.nn.Parameter(torch.randn(1024, 1024).bfloat16())
    p.grad = torch.randn_like(p)
    opt = AdamW8bit([p], lr=1e-3)
    opt.step()
    total = p.nbytes + p.grad.nbytes + sum(v.nbytes for v in opt.state[p].values() if torch.is_tensor(v))
    assert total / p.numel() <= 8 + 2 * 4 / 256


def test_weight_decay_alone_shrinks_the_weights_as_the_formula_says(report):
    """1000 steps of a factor 1 - 1e-4: each is far below bf16's resolution, so that plain bf16 weights would not move
    at all.
    """
    p = torch.nn.Parameter(torch.randn(10_000).bfloat16())
    start = p.detach().double()
    p.grad = torch.zeros_like(p)
    opt = AdamW8bit([p], lr=1e-3, weight_decay=0.1)
    for _ in range(1000):
        opt.step()
    exact = p.detach().double() - opt.state[p]["compensation"].double()
    report("relative error", ((exact / start)[start != 0] / (1 - 1e-4) ** 1000 - 1).abs().max().item(), 5e-3)


def regression(kind, d, steps=150):
    """A linear regression of d x d parameters in minibatches; the loss of the exact weights at the end."""
    g = torch.Generator().manual_seed(0)
    truth = torch.randn(d, d, generator=g) / d**0.5
    w = torch.nn.Parameter(torch.zeros(d, d, dtype=torch.float32 if kind == "fp32" else torch.bfloat16))
    w.data.add_(torch.randn(d, d, generator=g) / d**0.5)
    opt = AdamW8bit([w], lr=1.0) if kind == "8bit" else torch.optim.AdamW([w], lr=1.0, betas=(0.9, 0.999))
    for step in range(steps):
        for group in opt.param_groups:
            group["lr"] = lr_at(step, steps, 1e-3, 10, "cosine")
        x = torch.randn(64, d, generator=torch.Generator().manual_seed(step))
        error = x @ (w.float() - truth).detach()
        w.grad = (x.t() @ error / 64).to(w.dtype)
        opt.step()
    return ((w.detach().float() - truth) ** 2).sum().item() / d


@pytest.mark.parametrize("d", [800, pytest.param(3200, marks=pytest.mark.slow)])  # 640,000 parameters, 10M
def test_regression_ends_where_fp32_does_and_plain_bf16_does_not(d, report):
    fp32, ours, plain = (regression(k, d) for k in ("fp32", "8bit", "bf16"))
    report("8-bit loss over fp32's, beyond 1", ours / fp32 - 1, 0.02)
    assert plain / fp32 - 1 > 0.02, (
        f"plain bf16 does as well ({plain:.4f} against {fp32:.4f}): the problem shows nothing"
    )


def test_it_resumes_bit_for_bit():
    def run(cut):
        torch.manual_seed(3)
        p = torch.nn.Parameter(torch.randn(1000).bfloat16())
        opt = AdamW8bit([p], lr=1e-2)
        for i in range(10):
            if cut and i == 5:
                saved, rng, held = opt.state_dict(), torch.get_rng_state(), p.detach().clone()
                p = torch.nn.Parameter(held)
                opt = AdamW8bit([p], lr=1e-2)
                opt.load_state_dict(saved)
                torch.set_rng_state(rng)
            p.grad = torch.randn(1000, generator=torch.Generator().manual_seed(i)).bfloat16()
            opt.step()
        return p.detach()

    assert torch.equal(run(False), run(True))
