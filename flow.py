"""Flow matching: timesteps, noised batches and their loss, for training; sigma grids and ODE solvers, for sampling.

x_t = (1-t) x0 + t eps and v = eps - x0, for clean latents x0 and noise eps; t = 1 is pure noise. The DiT gets 1000 t.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F


# ---- training ----------------------------------------------------------------------------------------------------
def shift_t(t, shift):
    """Move timesteps t in 0..1 towards noise (for shift > 1): shift t / (1 + (shift-1) t)."""
    return shift * t / (1 + (shift - 1) * t)


def unshift_t(t, shift):
    """Invert shift_t: return the timesteps that shift_t moves to t."""
    return t / (shift - (shift - 1) * t)


def sample_timesteps(n, shift, distribution="logit-normal", low=0.0, high=1.0, generator=None):
    """Draw n training timesteps (n,) fp32, moved by shift_t, in [low, high). For an A14B, this is an expert's range.

    distribution, before the shift: "uniform", or "logit-normal" = sigmoid(N(0,1)); raises ValueError for another name.
    The distribution is truncated to the timesteps that shift_t moves into [low, high), so no draw is rejected.
    """
    u = torch.rand(n, generator=generator, dtype=torch.float64)
    edges = unshift_t(torch.tensor([low, high], dtype=torch.float64), shift)
    if distribution == "logit-normal":
        a, b = torch.special.ndtr(torch.logit(edges))
        base = torch.sigmoid(torch.special.ndtri((a + (b - a) * u).clamp(1e-9, 1 - 1e-9)))
    elif distribution == "uniform":
        base = edges[0] + (edges[1] - edges[0]) * u
    else:
        raise ValueError(f"distribution {distribution!r}: uniform or logit-normal")
    return shift_t(base, shift).float()


def eval_timesteps(n, shift, low=0.0, high=1.0):
    """Split [low, high), unshifted, into n equal parts and return their midpoints, shifted: timesteps (n,) fp32."""
    a, b = unshift_t(torch.tensor([low, high], dtype=torch.float64), shift)
    return shift_t(a + (b - a) * (torch.arange(n, dtype=torch.float64) + 0.5) / n, shift).float()


def add_noise(x0, eps, t):
    """Return x_t and the velocity eps - x0, the target. x0, eps (B,C,T',h,w); t (B,) or, per latent frame, (B,T')."""
    t = t.view(len(x0), 1, -1, 1, 1)
    return (1 - t) * x0 + t * eps, eps - x0


class Batch(NamedTuple):
    """B noised samples. x (B,C,T',h,w): C' channels of latents, then any conditioning channels; t (B,) or (B,T') in
    0..1; target (B,C',T',h,w): the velocity; loss_mask (B,1,T',1,1) or (B,1,1,1,1): loss weights, or None if all are 1;
    captions: list of B str; inputs: further keyword arguments of the model's forward; preserved (B,) bool: True for
    samples whose target is to be the base model's own prediction, or None if no prompts are preserved.
    """

    x: torch.Tensor
    t: torch.Tensor
    target: torch.Tensor
    loss_mask: torch.Tensor | None
    captions: list
    inputs: dict = {}
    preserved: torch.Tensor | None = None

    def velocity(self, model, context, lens):
        """Return the model's prediction (B,C',T',h,w). context (B,S,D): embedded captions of lens (B,) tokens."""
        device = context.device
        inputs = {k: v.to(device) if torch.is_tensor(v) else v for k, v in self.inputs.items()}
        return model(self.x.to(device), 1000 * self.t.to(device), context, lens, **inputs)

    def loss(self, model, context, lens):
        """Return the mean squared error () fp32 of the velocity, weighted by loss_mask. Arguments: as in `velocity`."""
        v = self.velocity(model, context, lens)
        target = self.target.to(v.device)
        if self.loss_mask is None:
            return F.mse_loss(v, target)
        per_frame = (v - target).square().mean(1, keepdim=True).mean((3, 4), keepdim=True)
        return (per_frame * self.loss_mask.to(v.device)).mean()


def make_noisy_batch(entries, captions, t, noise, loss_mask=None, preserved=None):
    """Make a Batch from cached samples and noise (B,C,T',h,w). t: timesteps (B,), or (B,T') with 0 for latent frames
    that the model is to get clean. entries: one dictionary per sample, with "latents" (C,T',h,w), any conditioning
    channels as "y" (c,T',h,w), and any further inputs of the model's forward.
    """
    x, target = add_noise(torch.stack([e["latents"] for e in entries]), noise, t)
    if "y" in entries[0]:
        x = torch.cat([x, torch.stack([e["y"] for e in entries])], 1)
    inputs = {k: torch.stack([e[k] for e in entries]) for k in entries[0] if k not in ("latents", "y")}
    return Batch(x, t, target, loss_mask, captions, inputs, preserved)


# ---- sampling ----------------------------------------------------------------------------------------------------
class Solver:
    """An ODE solver that takes latents x from noise to clean. `timesteps`: what the DiT gets, truncated to integers as
    in the official code. The solver itself uses the fp32 noise levels `sigmas`, the last of which is 0. Call `step(v,
    x)` once per timestep, in order, with the DiT's velocity v at x and that timestep; it returns the x at which to
    compute the next velocity. Before each call, `sigma` is the noise level of x, so x - sigma v estimates the clean
    latents.
    """

    start = 1.0

    def __init__(self, steps, shift):
        if steps < 1:
            raise ValueError(f"{steps} steps: at least 1")
        grid = torch.arange(steps, dtype=torch.float64) * (-self.start / steps) + self.start
        sigmas = shift_t(grid, shift)
        self.timesteps = (sigmas * 1000).long()
        self.sigmas = F.pad(sigmas, (0, 1)).float()
        # lambda = log(alpha/sigma), in fp32 as in the official solvers, whose results depend on its rounding near
        # sigma = 1
        self.lambdas = torch.log(1 - self.sigmas) - torch.log(self.sigmas)
        self.i = 0

    @property
    def sigma(self):
        return self.sigmas[self.i]


class Euler(Solver):
    def step(self, v, x):
        x = x + (self.sigmas[self.i + 1] - self.sigma) * v
        self.i += 1
        return x


class Heun(Solver):
    """Heun's method (as in Karras et al., 2022, without churn): an Euler step, then the same step with the mean of the
    velocities at its two ends. N steps compute 2N - 1 velocities: the last step, which ends at sigma 0, is Euler's.
    """

    def __init__(self, steps, shift):
        super().__init__(steps, shift)
        # the first entry once, then each later one twice: at the end of one step, and at the beginning of the next
        self.timesteps = self.timesteps.repeat_interleave(2)[1:]
        self.sigmas = self.sigmas.repeat_interleave(2)[1:-1]

    def step(self, v, x):
        i = self.i
        self.i += 1
        if i % 2 == 0:
            self.first_v, self.first_x = v, x
            return x + (self.sigmas[i + 1] - self.sigmas[i]) * v
        return self.first_x + (self.sigmas[i] - self.sigmas[i - 1]) * (self.first_v + v) / 2


class DPMpp(Solver):
    """DPM-Solver++(2M), midpoint (Lu et al., 2022). Its first and last steps are of first order."""

    def step(self, v, x):
        i, (lambda0, lambda1) = self.i, self.lambdas[self.i : self.i + 2]
        x0 = x - self.sigma * v
        h = lambda1 - lambda0
        step = (1 - self.sigmas[i + 1]) * (torch.exp(-h) - 1)
        y = self.sigmas[i + 1] / self.sigma * x - step * x0
        if 0 < i < len(self.timesteps) - 1:
            r = (lambda0 - self.lambdas[i - 1]) / h  # infinite if the previous sigma was 1: no correction then
            y = y - 0.5 * step * ((1 / r) * (x0 - self.previous))
        self.previous, self.i = x0, i + 1
        return y


class UniPC(Solver):
    """UniPC of order 2, B(h) = e^h - 1, predicting x0 (Zhao et al., 2023). Its first and last steps are of order 1."""

    start = torch.tensor(0.999).item()  # the official grid starts at 0.999 in fp32

    def _update(self, i, x, x0, order, final=None):
        """Step x to sigmas[i + 1]: by the predictor or, given the x0 predicted there (`final`), by the corrector."""
        h = self.lambdas[i] - self.lambdas[i + 1]  # the paper's -h
        phi = torch.expm1(h)
        difference, r = [], []
        if order == 2:
            r = [(self.lambdas[i - 1] - self.lambdas[i]) / -h]
            difference = [(self.history[-2] - x0) / r[0]]
        if final is None:
            rho = [0.5] * len(difference)
        else:
            difference.append(final - x0)
            rho = [0.5]
            if order == 2:  # solve [[1, 1], [r, 1]] rho = b
                b1 = phi / h - 1
                b2 = (b1 / h - 0.5) * 2 / phi
                rho = torch.linalg.solve(torch.tensor([[1.0, 1.0], [r[0], 1.0]]), torch.stack([b1 / phi, b2]))
        alpha = 1 - self.sigmas[i + 1]
        y = self.sigmas[i + 1] / self.sigmas[i] * x - alpha * phi * x0
        if difference:
            y = y - alpha * phi * sum(c * d for c, d in zip(rho, difference))
        return y

    def step(self, v, x):
        i = self.i
        x0 = x - self.sigma * v
        if i:
            x = self._update(i - 1, self.last, self.history[-1], self.order, x0)
        self.history = [*(self.history[-1:] if i else []), x0]
        self.order = min(2, len(self.timesteps) - i, i + 1)
        self.last = x
        self.i += 1
        return self._update(i, x, x0, self.order)


SOLVERS = {"unipc": UniPC, "dpm++": DPMpp, "euler": Euler, "heun": Heun}


def solver(name, steps, shift):
    """Return a Solver; name: "unipc", "dpm++", "euler" or "heun". Raises ValueError for another name or steps < 1."""
    if name not in SOLVERS:
        raise ValueError(f"solver {name!r}: one of {', '.join(SOLVERS)}")
    return SOLVERS[name](steps, shift)
