"""Solvers against diffusers' on the official grid; training draws against their definitions."""

import numpy as np
import pytest
import torch

from flow import SOLVERS, add_noise, eval_timesteps, make_noisy_batch, sample_timesteps, shift_t, solver, unshift_t


def peer(name, steps, shift):
    """diffusers' solver on the official grid: its sigmas, and timesteps truncated to integers."""
    from diffusers import DPMSolverMultistepScheduler, FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler

    grid = np.linspace(1, 0, steps + 1)[:-1]
    grid = shift * grid / (1 + (shift - 1) * grid)
    if name == "unipc":
        s = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
        s.set_timesteps(sigmas=np.linspace(float(np.float32(0.999)), 0, steps + 1)[:-1])
    elif name == "heun":
        s = FlowMatchHeunDiscreteScheduler(shift=shift)
        s.set_timesteps(steps)
        s.sigmas = torch.from_numpy(np.append(np.repeat(grid, 2)[1:], 0).astype(np.float32))
        s.timesteps = torch.from_numpy(np.repeat((grid * 1000).astype(np.int64), 2)[1:]).float()
    else:
        s = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
        s.set_timesteps(steps)
        s.sigmas = torch.from_numpy(np.append(grid, 0).astype(np.float32))
        s.timesteps = torch.from_numpy((grid * 1000).astype(np.int64))
    s.set_begin_index(0)  # where two timesteps round to the same integer, the search by value would start at the second
    return s


def velocity(x, t):
    return torch.sin(3 * x + t / 200) + 0.3 * x


@pytest.mark.parametrize("name", ["unipc", "dpm++", "heun"])
@pytest.mark.parametrize("shift", [1, 3, 5, 12])
def test_equals_diffusers(name, shift, report):
    worst = 0
    start = torch.randn(1, 4, 3, 4, 4)
    for steps in (*range(1, 21), 50, 100):
        ours, theirs = solver(name, steps, shift), peer(name, steps, shift)
        assert torch.equal(ours.timesteps, theirs.timesteps)
        a = b = start
        for t in theirs.timesteps:
            a, b = ours.step(velocity(a, t), a), theirs.step(velocity(b, t), t, b, return_dict=False)[0]
        assert a.isfinite().all()
        worst = max(worst, ((a - b).abs().max() / b.abs().max()).item())
    report("relative error over 1 to 100 steps", worst, 1e-6)


@pytest.mark.parametrize("name, order", [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("shift", [1, 5])
def test_convergence_to_the_exact_solution(name, order, shift, report):
    """dx/dsigma = 3 cos(3 sigma) x, whose solution is exp(sin(3 sigma)): twice the steps, 2^order times as exact."""
    errors = []
    for steps in (64, 128, 256):
        s = solver(name, steps, shift)
        x = torch.tensor(np.exp(np.sin(3.0)))
        for _ in s.timesteps:
            x = s.step(3 * torch.cos(3 * s.sigma.double()) * x, x)
        errors.append(abs(x.item() - 1))
    for coarse, fine in zip(errors, errors[1:]):
        report("order", abs(np.log2(coarse / fine) - order), 0.1)


def test_heun_computes_two_velocities_a_step_but_for_the_last():
    for steps in (1, 2, 7):
        s = solver("heun", steps, 3.0)
        euler = solver("euler", steps, 3.0)
        assert len(s.timesteps) == 2 * steps - 1
        assert s.timesteps.unique().flip(0).tolist() == euler.timesteps.tolist()
    assert torch.equal(solver("heun", 1, 3.0).step(torch.ones(2), torch.ones(2)), torch.zeros(2))


def test_euler_is_the_sum_of_its_steps():
    s = solver("euler", 7, 3.0)
    x = torch.zeros(3)
    for _ in s.timesteps:
        x = s.step(torch.ones(3), x)
    assert torch.allclose(x, torch.full((3,), -1.0), atol=1e-6)  # from sigma 1 to 0 along v = 1


@pytest.mark.parametrize("name", SOLVERS)
def test_an_exact_velocity_is_followed_to_the_data(name):
    x0, eps = torch.randn(2, 8), torch.randn(2, 8)
    s = solver(name, 9, 5.0)
    x = (1 - s.sigma) * x0 + s.sigma * eps
    for t in s.timesteps:
        assert 0 <= 1000 * s.sigma - t < 1  # of the same evaluation
        assert torch.allclose(x - s.sigma * (eps - x0), x0, atol=1e-5)  # so that a preview shows the clean estimate
        x = s.step(eps - x0, x)
    assert s.sigma == 0
    assert torch.allclose(x, x0, atol=1e-5)


def test_unknown_solver_and_no_steps():
    with pytest.raises(ValueError, match="solver 'ddim': one of unipc"):
        solver("ddim", 5, 1.0)
    with pytest.raises(ValueError, match="0 steps: at least 1"):
        solver("euler", 0, 1.0)


@pytest.mark.parametrize("kind, share", [("logit-normal", 0.705), ("uniform", 0.632)])
def test_share_of_draws_above_the_boundary(kind, share):
    t = sample_timesteps(200_000, 12.0, kind, generator=torch.Generator().manual_seed(0))
    assert abs((t >= 0.875).float().mean().item() - share) < 0.004  # 4 standard errors


@pytest.mark.parametrize("kind", ["logit-normal", "uniform"])
def test_a_range_keeps_the_density_inside_it(kind):
    g = torch.Generator().manual_seed(1)
    everything, inside = (
        sample_timesteps(400_000, 5.0, kind, generator=g),
        sample_timesteps(200_000, 5.0, kind, 0.6, 0.9, generator=g),
    )
    assert inside.min() >= 0.6 and inside.max() <= 0.9
    kept = everything[(everything >= 0.6) & (everything < 0.9)]
    q = torch.linspace(0.05, 0.95, 19)
    assert (kept.quantile(q) - inside.quantile(q)).abs().max() < 0.004


@pytest.mark.parametrize("kind", ["logit-normal", "uniform"])
def test_the_tails_are_drawn_as_often_as_the_distribution_has_them(kind):
    """Of 10^6 draws, 1000 lie below the 0.1 % quantile and 1000 above the 99.9 % one; none is cut off at either."""
    t = sample_timesteps(1_000_000, 3.0, kind, generator=torch.Generator().manual_seed(2)).double()
    base = unshift_t(t, 3.0)
    share = torch.special.ndtr(torch.logit(base)) if kind == "logit-normal" else base
    for q in (1e-3, 1e-2):
        for found in ((share < q).sum().item(), (share > 1 - q).sum().item()):
            assert abs(found - 1e6 * q) < 5 * (1e6 * q) ** 0.5  # 5 standard errors
    assert 0 < t.min() < t.max() < 1


def test_draws_are_those_of_the_generator():
    draws = [sample_timesteps(5, 3.0, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert draws[0].dtype == torch.float32
    with pytest.raises(ValueError, match="distribution 'normal': uniform or logit-normal"):
        sample_timesteps(5, 3.0, "normal")


def test_fixed_times_are_the_middles_of_equal_shares():
    assert torch.allclose(eval_timesteps(4, 1.0), torch.tensor([0.125, 0.375, 0.625, 0.875]))
    assert torch.allclose(eval_timesteps(2, 1.0, 0.5, 0.9), torch.tensor([0.6, 0.8]))
    t = eval_timesteps(4, 3.0, 0.6, 0.9)  # with a shift: the shares are equal before it
    edges = unshift_t(torch.tensor([0.6, 0.9]), 3.0)
    middles = edges[0] + (edges[1] - edges[0]) * torch.tensor([1, 3, 5, 7]) / 8
    assert torch.allclose(t, 3 * middles / (1 + 2 * middles), atol=1e-6) and t.dtype == torch.float32


def test_noising_and_target():
    x0, eps = torch.randn(2, 3, 4, 2, 2), torch.randn(2, 3, 4, 2, 2)
    t = torch.tensor([[0.0, 0.5, 0.5, 1.0], [0.0, 0.2, 0.2, 0.2]])
    xt, v = add_noise(x0, eps, t)
    assert torch.equal(xt[:, :, 0], x0[:, :, 0]) and torch.equal(xt[0, :, 3], eps[0, :, 3])
    assert torch.allclose(xt[1, :, 2] - 0.2 * v[1, :, 2], x0[1, :, 2], atol=1e-6)
    assert shift_t(torch.tensor(1.0), 12) == 1


def test_each_sample_of_a_batch_keeps_what_the_model_is_given_beside_it():
    entries = [
        {"latents": torch.randn(4, 3, 2, 2), "y": torch.randn(2, 3, 2, 2), "sound": torch.randn(5)} for _ in "ab"
    ]
    noise, t = torch.randn(2, 4, 3, 2, 2), torch.tensor([0.2, 0.7])
    batch = make_noisy_batch(entries, ["a", "b"], t, noise)
    for i, entry in enumerate(entries):
        assert torch.equal(batch.inputs["sound"][i], entry["sound"]) and torch.equal(batch.x[i, 4:], entry["y"])
        assert torch.equal(batch.target[i], noise[i] - entry["latents"])
