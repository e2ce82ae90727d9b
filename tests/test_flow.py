"""Solvers against diffusers' on the official grid; training draws against their definitions."""

import numpy as np
import pytest
import torch

from checkpoint import BadInput
from flow import SOLVERS, add_noise, sample_timesteps, shift_t, solver


def peer(name, steps, shift):
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    if name == "unipc":
        s = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
        s.set_timesteps(sigmas=np.linspace(float(np.float32(0.999)), 0, steps + 1)[:-1])
    else:
        grid = np.linspace(1, 0, steps + 1)[:-1]
        grid = shift * grid / (1 + (shift - 1) * grid)
        s = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
        s.set_timesteps(steps)
        s.sigmas = torch.from_numpy(np.append(grid, 0).astype(np.float32))
        s.timesteps = torch.from_numpy((grid * 1000).astype(np.int64))
    s.set_begin_index(0)  # where two timesteps round to the same integer, the search by value would start at the second
    return s


def velocity(x, t):
    return torch.sin(3 * x + t / 200) + 0.3 * x


@pytest.mark.parametrize("name", ["unipc", "dpm++"])
@pytest.mark.parametrize("shift", [1, 3, 5, 12])
def test_equals_diffusers(name, shift, report):
    worst = 0
    start = torch.randn(1, 4, 3, 4, 4)
    for steps in range(1, 101):
        ours, theirs = solver(name, steps, shift), peer(name, steps, shift)
        assert torch.equal(ours.timesteps, theirs.timesteps)
        a = b = start
        for t in ours.timesteps:
            a, b = ours.step(velocity(a, t), a), theirs.step(velocity(b, t), t, b, return_dict=False)[0]
        assert a.isfinite().all()
        worst = max(worst, ((a - b).abs().max() / b.abs().max()).item())
    report("relative error over 1..100 steps", worst, 1e-6)


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
    for _ in s.timesteps:
        x = s.step(eps - x0, x)
    assert torch.allclose(x, x0, atol=1e-5)


def test_unknown_solver_and_no_steps():
    with pytest.raises(BadInput, match="--solver ddim: one of unipc"):
        solver("ddim", 5, 1.0)
    with pytest.raises(BadInput, match="--steps 0"):
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


def test_noising_and_target():
    x0, eps = torch.randn(2, 3, 4, 2, 2), torch.randn(2, 3, 4, 2, 2)
    t = torch.tensor([[0.0, 0.5, 0.5, 1.0], [0.0, 0.2, 0.2, 0.2]])
    xt, v = add_noise(x0, eps, t)
    assert torch.equal(xt[:, :, 0], x0[:, :, 0]) and torch.equal(xt[0, :, 3], eps[0, :, 3])
    assert torch.allclose(xt[1, :, 2] - 0.2 * v[1, :, 2], x0[1, :, 2], atol=1e-6)
    assert shift_t(torch.tensor(1.0), 12) == 1
