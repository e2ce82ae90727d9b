"""The learning rate, 8-bit AdamW with compensated bf16 weights against torch's AdamW in fp32, averages, the guard."""

import math

import pytest
import torch
from test_kernels import python

from kernels.adamw8bit import BLOCK, decode_moments, encode_moments, max_ratio
from nanowan.errors import BadInput
from nanowan.training.optim import EMA, AdamW8bit, Guard, adamw, lr_at

BETAS = (0.9, 0.99)


def test_learning_rate():
    assert [lr_at(i, 100, 1.0, 4, "constant") for i in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    cosine = [lr_at(i, 104, 1.0, 4, "cosine") for i in (3, 4, 54, 103)]
    assert cosine[:2] == [1.0, 1.0] and math.isclose(cosine[2], 0.55) and 0.1 < cosine[3] < 0.101


# ---- 8-bit moments -----------------------------------------------------------------------------------------------
def moments(n=64):
    """Moments of n blocks whose elements lie up to a factor of a million below the largest in sqrt(v); a few are 0."""
    root = 10 ** (-6 * torch.rand(n, BLOCK))
    root[:, 0] = 1
    root[0, 1:9] = 0
    return (2 * torch.rand(n, BLOCK) - 1) * max_ratio(BETAS) * root, root.square()


def test_moments_are_coded_without_bias_and_as_precisely_far_below_the_largest_as_near_it(report):
    m, v = moments()
    root, total, n = v.sqrt(), torch.zeros_like(m), 400
    for _ in range(n):
        m2, v2 = decode_moments(*encode_moments(m, v, BETAS), BETAS)
        assert (m2[root == 0] == 0).all() and (v2[root == 0] == 0).all()
        error = (v2.sqrt() / root - 1).abs()[root > 0].max().item()
        assert error <= 2 ** (24 / 510) - 1 + 1e-5, f"sqrt(v) is off by {error:.3f}: more than one of 510 levels"
        total += m2 / n
    bias = ((total - m) / root)[root > 0]
    for low, high in ((-2, 0.1), (-4, -2), (-6.1, -4)):  # per range of magnitudes
        inside = ((root > 10.0**low) & (root <= 10.0**high))[root > 0]
        report(f"m, rms over sqrt(v), 1e{low:g}", bias[inside].square().mean().sqrt().item(), 0.04 / n**0.5)


def test_a_second_moment_never_becomes_zero_however_small():
    v = torch.full((1, BLOCK), 1e-28)
    v[0, 0] = 1.0
    m = 0.5 * v.sqrt()
    m2, v2 = decode_moments(*encode_moments(m, v, BETAS), BETAS)
    assert (v2 > 0).all()
    assert (m2 / v2.sqrt()).abs().max() < 1.1 * max_ratio(BETAS)  # and no update becomes larger than AdamW's can be


def test_no_gradients_lead_beyond_what_a_ratio_can_hold():
    """The worst sequence grows by b1/b2 in reverse: g_t ~ (b2/b1)^t, where Cauchy and Schwarz are met with equality."""
    b1, b2 = BETAS
    m = v = 0.0
    for t in range(300):
        g = (b2 / b1) ** (t - 300)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    assert 0.99 < m / math.sqrt(v) / max_ratio(BETAS) <= 1 + 1e-9
    with pytest.raises(ValueError, match=r"betas \(0.9, 0.8\)"):
        AdamW8bit([torch.nn.Parameter(torch.zeros(3).bfloat16())], 1e-3, betas=(0.9, 0.8))


# ---- 8-bit AdamW -------------------------------------------------------------------------------------------------
def gradient(magnitude, direction, step):
    """A gradient (n,) of given magnitudes that keeps its direction under noise as large as itself."""
    g = torch.Generator().manual_seed(step)
    return (magnitude * (direction + torch.randn(len(magnitude), generator=g))).bfloat16()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_steps_and_walks_follow_torch_with_a_range_of_a_million_in_every_block(dtype, report):
    """Steps 1, 2, 10 and 200, and the way up to them, per range of magnitudes. A step's error is that of its moments,
    which were rounded at random in each step before it: the first has none.
    """
    n = 40 * BLOCK + 77  # the last block is not full
    g = torch.Generator().manual_seed(0)
    magnitude, direction = 10 ** (-6 * torch.rand(n, generator=g)), torch.randn(n, generator=g).sign()
    magnitude[::BLOCK] = 1
    torch.manual_seed(1000)  # of the rounding: not one of the gradients' seeds
    ours, theirs = torch.nn.Parameter(torch.zeros(n, dtype=dtype)), torch.nn.Parameter(torch.zeros(n))
    opt = AdamW8bit([ours], lr=1e-3, betas=BETAS, eps=1e-8)
    peer = torch.optim.AdamW([theirs], lr=1e-3, betas=BETAS, eps=1e-8)
    for step in range(1, 201):
        before = opt.exact(ours).clone(), theirs.detach().clone()
        theirs.grad = gradient(magnitude, direction, step).float()
        ours.grad = theirs.grad.to(dtype)
        opt.step()
        peer.step()
        if step not in (1, 2, 10, 200):
            continue
        for kind, a, b, limit in (
            ("step", opt.exact(ours) - before[0], theirs.detach() - before[1], 0.12),
            ("way", opt.exact(ours), theirs.detach(), 0.06),
        ):
            for low, high in ((-2, 0), (-4, -2), (-6, -4)):
                inside = (magnitude > 10.0**low) & (magnitude <= 10.0**high)
                x, y = a[inside], b[inside]
                label = f"{kind} {step}, gradients of 1e{low} to 1e{high}"
                report(f"{label}, error", ((x - y).norm() / y.norm()).item(), 2e-5 if step == 1 else limit)
                report(f"{label}, shrinkage", abs((x * y).sum() / y.square().sum() - 1).item(), 0.005)


KERNEL = """
import torch, kernels.adamw8bit as k
from helpers.kernel_checks import adamw8bit_error

g = torch.Generator().manual_seed(0)
grad, start = (10 ** (-6 * torch.rand(700, generator=g))).bfloat16(), torch.randn(700, generator=g).bfloat16()
rest, mean, n = (1, 0.0, (0.9, 0.99), 1e-8, 0.1), 0.0, 100
for seed in range(n):
    torch.manual_seed(seed)
    weight, (compensation, codes, scale) = start.clone(), k.new_state(start)
    k.step(weight, compensation, grad, codes, scale, *rest)
    m, v = (t.view(-1)[:700] for t in k.decode_moments(codes, scale, (0.9, 0.99)))
    mean = mean + m / n
assert torch.equal(weight, start) and (compensation == 0).all()  # at a rate of 0
assert (codes.view(-1)[700:] == k.pack(0, 0)).all()  # beyond the parameters
_, other, want = k.new_state(start)
k.step_ref(weight, compensation, grad, other, want, *rest)
torch.testing.assert_close(scale, want, rtol=2e-6, atol=0)
root = grad.float() * 0.1
levels = (v.sqrt() / root).log2().abs().max().item() * (k.ROOT_LEVELS - 1) / k.OCTAVES
bias = ((mean - 0.1 * grad.float()) / root).square().mean().sqrt().item()
torch.library.opcheck(k._step, (weight, compensation, grad, codes, scale, 1, 0.1, 0.9, 0.99, 1e-8, 0.0))
n = 20 * k.BLOCK
weight, grad = torch.randn(n, generator=g).bfloat16(), torch.randn(n, generator=g).bfloat16()
exact = weight.double() - 1e-3 * grad.double() / (grad.double().abs() + 1e-8)  # of a first step
k.step(weight, (state := k.new_state(weight))[0], grad, *state[1:], 1, 1e-3, (0.9, 0.99), 1e-8, 0.0)
rest = weight.double() - exact  # bf16, up or down by less than a unit of its last place
off = (state[0].double().abs() - rest.abs()) / 2 ** (rest.abs().log2().floor() - 7)
assert off.abs().max() < 1.1 and off.std() > 0.3
walks = [adamw8bit_error("cpu", steps=n, dtype=t) for t in (torch.bfloat16, torch.float32) for n in (1, 10)]
print(levels, bias, off.mean().abs().item(), *walks)
"""


def test_the_kernel_of_a_gpu(report):
    """In Triton's interpreter: moments coded without a bias, and a walk as of AdamW in fp32."""
    levels, bias, rounding, step, walk, step32, walk32 = map(float, python(KERNEL, TRITON_INTERPRET="1").split())
    report("sqrt(v), levels", levels, 1.01)
    report("the compensation's rounding, mean over its last place", rounding, 0.03)
    report("m, rms of the mean over sqrt(v)", bias, 0.04 / 100**0.5)
    report("the first step", step, 0.02)  # what 16 bits of a weight of 1 keep of an update of 1e-3
    report("ten steps", walk, 0.06)
    report("the first step in fp32", step32, 2e-4)  # fp32 keeps 2^-24 of a weight of 1, and the step is 1e-3
    report("ten steps in fp32", walk32, 0.06)


def test_both_optimizers_have_the_same_settings_and_heed_their_groups():
    """betas, eps and decay are equal; a group's learning rate and decay are its own; what has no gradient rests."""
    a, b, c = (torch.nn.Parameter(torch.ones(300).bfloat16()) for _ in range(3))
    groups = [{"params": [a], "lr": 1e-2, "weight_decay": 0.0}, {"params": [b], "lr": 3e-2, "weight_decay": 0.5}]
    opt, peer = AdamW8bit([a], 1e-3), adamw([torch.nn.Parameter(torch.ones(3))], 1e-3)
    for defaults in (opt.defaults, peer.defaults):
        assert [defaults[k] for k in ("lr", "betas", "eps", "weight_decay")] == [1e-3, BETAS, 1e-8, 0.01]
    opt = AdamW8bit([*groups, {"params": [c], "weight_decay": 0.5}], 1e-3)
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    opt.step()
    assert torch.allclose(opt.exact(a), torch.tensor(1 - 1e-2), rtol=1e-5)
    assert torch.allclose(opt.exact(b), torch.tensor(1 - 3e-2 * 0.5 - 3e-2), rtol=1e-5)
    assert torch.equal(opt.exact(c), torch.ones(300))


@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 8), (torch.float32, 10)])
def test_bytes_per_parameter(dtype, limit):
    p = torch.nn.Parameter(torch.randn(1024, 1024, dtype=dtype))
    p.grad = torch.randn_like(p)
    opt = AdamW8bit([p], lr=1e-3)
    opt.step()
    total = p.nbytes + p.grad.nbytes + sum(v.nbytes for v in opt.state[p].values() if torch.is_tensor(v))
    assert total / p.numel() <= limit + 4 / 256


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
    exact = opt.exact(p).double()
    assert torch.equal(exact, p.detach().double() - opt.state[p]["compensation"].double())
    report("relative error", ((exact / start)[start != 0] / (1 - 1e-4) ** 1000 - 1).abs().max().item(), 5e-3)


def regression(kind, d, steps=150):
    """A linear regression of d x d parameters in minibatches; the loss of the exact weights at the end."""
    g = torch.Generator().manual_seed(0)
    truth = torch.randn(d, d, generator=g) / d**0.5
    w = torch.nn.Parameter(torch.zeros(d, d, dtype=torch.float32 if kind == "fp32" else torch.bfloat16))
    w.data.add_(torch.randn(d, d, generator=g) / d**0.5)
    opt = AdamW8bit([w], lr=1.0) if kind == "8bit" else adamw([w], lr=1.0)
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
    report("8-bit loss over fp32's, off 1", abs(ours / fp32 - 1), 0.01)
    assert plain / fp32 - 1 > 0.02, (
        f"plain bf16 does as well ({plain:.4f} against {fp32:.4f}): the problem shows nothing"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_resumes_bit_for_bit(dtype):
    def run(cut):
        torch.manual_seed(3)
        p = torch.nn.Parameter(torch.randn(1000, dtype=dtype))
        opt = AdamW8bit([p], lr=1e-2)
        for i in range(10):
            if cut and i == 5:
                saved, rng, weights = opt.state_dict(), torch.get_rng_state(), p.detach().clone()
                p = torch.nn.Parameter(weights)
                opt = AdamW8bit([p], lr=1e-2)
                opt.load_state_dict(saved)
                torch.set_rng_state(rng)
            p.grad = torch.randn(1000, generator=torch.Generator().manual_seed(i)).to(dtype)
            opt.step()
        return p.detach()

    assert torch.equal(run(False), run(True))


# ---- averages ----------------------------------------------------------------------------------------------------
def test_the_moving_average():
    p = torch.nn.Parameter(torch.zeros(3))
    ema, want = EMA([p], 0.9), 0.0
    for i in range(1, 100):
        p.data.fill_(float(i))
        p.grad = torch.ones(3)
        ema.update()
        want += (i - want) * (1 - min(0.9, i / (i + 10)))
    with ema.in_place():
        assert abs(p[0].item() - want) < 1e-4
    assert p[0].item() == 99
    other = EMA([torch.nn.Parameter(torch.zeros(3))], 0.9)
    other.load_state_dict(ema.state_dict())
    assert torch.equal(other.average[0], ema.average[0]) and other.steps == [99]


def test_an_average_rests_while_its_parameter_has_no_gradient():
    a, b = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    ema = EMA([a, b], 0.5)
    for step in range(20):
        a.grad, b.grad = (torch.ones(3), None) if step < 10 else (None, torch.ones(3))
        with torch.no_grad():
            (a if step < 10 else b).add_(1)
        ema.update()
    assert torch.equal(ema.average[0], ema.average[1]) and 8 < ema.average[0][0] < 10 and ema.steps == [10, 10]


def test_the_average_is_of_the_compensated_weights(report):
    """Steps of 1e-5 on weights of 1: bf16, whose resolution there is 4e-3, would show none of them."""
    p = torch.nn.Parameter(torch.ones(5000).bfloat16())
    opt = AdamW8bit([p], lr=1e-5, weight_decay=0.0)
    ema, average = EMA([p], 0.9, opt), 1.0
    for i in range(1, 101):
        p.grad = torch.ones_like(p)
        opt.step()
        ema.update()
        average += (1 - 1e-5 * i - average) * (1 - min(0.9, i / (i + 10)))
    assert torch.equal(p.detach(), torch.ones_like(p))
    report("distance from the start", abs((1 - ema.average[0].double()).mean().item() / (1 - average) - 1), 2e-3)


# ---- the guard ---------------------------------------------------------------------------------------------------
def test_the_guard_skips_spikes_and_what_is_not_finite():
    guard = Guard(10)
    assert not any(guard.should_skip(1.0, 1.0 + 0.1 * (i % 3)) for i in range(25))
    assert "11 times the recent median" in guard.should_skip(1.0, 12.0)
    assert "the loss is nan" in guard.should_skip(float("nan"), 1.0)
    assert "norm inf" in guard.should_skip(1.0, float("inf")) and guard.skipped == 3
    assert guard.should_skip(1.0, 9.0) is None and guard.skipped == 0


@pytest.mark.parametrize("seen, judged", [(1, False), (19, False), (20, True)])
def test_the_guard_judges_once_it_has_seen_twenty_norms(seen, judged):
    guard = Guard(10)
    for _ in range(seen):
        assert guard.should_skip(1.0, 1.0) is None
    assert bool(guard.should_skip(1.0, 1000.0)) == judged


def test_the_guard_judges_by_the_last_hundred_norms():
    guard = Guard(10)
    for norm in [100.0] * 100 + [20.0] * 100:
        assert guard.should_skip(1.0, norm) is None
    assert guard.should_skip(1.0, 201.0)
    guard = Guard(10)
    for norm in [100.0] * 100 + [20.0] * 49:
        guard.should_skip(1.0, norm)
    assert guard.should_skip(1.0, 999.0) is None  # 51 of the hundred are 100


def test_norms_of_skipped_steps_do_not_move_the_median():
    guard = Guard(10)
    for _ in range(20):
        guard.should_skip(1.0, 1.0)
    assert all(guard.should_skip(1.0, 1e3) for _ in range(200))  # else these would soon be the usual ones
    assert guard.should_skip(1.0, 1.0) is None and guard.should_skip(1.0, 11.0)


def test_steps_without_any_gradient_are_taken_and_do_not_count():
    """A run that trains a few embedding rows only, whose captions seldom hold them: most norms are 0."""
    guard = Guard(10)
    for step in range(400):
        assert guard.should_skip(1.0, 0.0 if step % 10 else 1.0) is None
    assert guard.should_skip(1.0, 11.0) and guard.should_skip(1.0, 0.0) is None


def test_the_guard_resumes():
    """Norms and the number of steps skipped in a row are part of its state."""
    guard, other = Guard(10), Guard(10)
    for norm in [1.0] * 20 + [50.0, 50.0]:
        reason = guard.should_skip(1.0, norm)
    other.load_state_dict(guard.state_dict())
    assert other.skipped == 2 and other.state_dict() == guard.state_dict()
    for g in (guard, other):
        g.raise_if_stuck(3, reason, 1e-3, "out")
        reason = g.should_skip(1.0, 50.0)
        with pytest.raises(
            BadInput, match="3 steps in a row skipped, .*50 times the recent median.*out.*--lr than 0.001"
        ):
            g.raise_if_stuck(3, reason, 1e-3, "out")
