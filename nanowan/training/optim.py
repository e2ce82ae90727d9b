"""Optimizers, the learning rate, moving averages, and the rule by which steps are skipped.

AdamW8bit takes 8 bytes per bf16 parameter in all: weight 2, gradient 2, Kahan compensation 2, both moments 2. It takes
10 bytes per fp32 parameter: weight 4, gradient 4, both moments 2. Each block of 256 parameters adds a 4-byte scale.
"""

import contextlib
import math
import statistics

import torch

from kernels import ops
from kernels.adamw8bit import max_ratio, new_state
from nanowan.errors import BadInput


def adamw(params, lr, weight_decay=0.01):
    """Return torch's AdamW (Loshchilov and Hutter, 2019) for these parameters, with betas (0.9, 0.99)."""
    # foreach, PyTorch's default on a GPU, is off: during a step it takes as much extra memory as the weights
    return torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)


def lr_at(step, steps, lr, warmup, schedule):
    """Return the learning rate of a step (0-based). After a linear warm-up, the schedule "constant" stays at `lr`, and
    "cosine" falls to a tenth of `lr`.
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule == "constant":
        return lr
    progress = (step - warmup) / max(1, steps - warmup)
    return lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with 8 bits per moment, for fp32 or Kahan-compensated bf16 weights (kernels/adamw8bit.py)."""

    def __init__(self, params, lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01):
        max_ratio(betas)  # raises ValueError if 8 bits cannot hold the moments
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def new_state(self, p):
        """Return the optimizer state of a parameter before its first step."""
        return {"step": 0, **dict(zip(("compensation", "codes", "scale"), new_state(p)))}

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p] = self.state[p] or self.new_state(p)
                state["step"] += 1
                tensors = p, state["compensation"], p.grad, state["codes"], state["scale"]
                settings = (group[k] for k in ("lr", "betas", "eps", "weight_decay"))
                ops.adamw8bit_step(*tensors, state["step"], *settings)

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        # torch casts a state to its parameter's dtype; codes and scales have other dtypes
        params = [p for group in self.param_groups for p in group["params"]]
        for i, state in state_dict["state"].items():
            self.state[params[i]] = {
                k: v.to(params[i].device, copy=True) if torch.is_tensor(v) else v for k, v in state.items()
            }

    def exact(self, p):
        """Return a parameter's exact value in fp32. The exact value of a bf16 weight is the weight, corrected by the
        compensation, which holds the rounding error.
        """
        weight = p.detach().float()
        compensated = weight.dtype != p.dtype and self.state.get(p)
        return weight.sub_(self.state[p]["compensation"]) if compensated else weight


class EMA:
    """A moving average of parameters in fp32 (after Polyak and Juditsky, 1992). Its decay grows with the number of
    steps, but not beyond `decay`. A parameter's average stays unchanged in steps in which the parameter has no
    gradient. So one expert's averages do not change while the other expert is trained.

    optimizer: if it is an AdamW8bit, the compensated weights are averaged.
    """

    def __init__(self, params, decay, optimizer=None):
        self.params, self.decay, self.steps = params, decay, [0] * len(params)
        self.optimizer = optimizer
        self.average = [self._weight(p).clone() for p in params]

    def _weight(self, p):
        return self.optimizer.exact(p) if isinstance(self.optimizer, AdamW8bit) else p.detach().float()

    @torch.no_grad()
    def update(self):
        for i, (average, p) in enumerate(zip(self.average, self.params)):
            if p.grad is not None:
                self.steps[i] += 1
                average.lerp_(self._weight(p), 1 - min(self.decay, self.steps[i] / (self.steps[i] + 10)))

    @contextlib.contextmanager
    def in_place(self):
        """Return a context manager; inside it, the parameters hold their averages."""
        kept = [p.data.clone() for p in self.params]
        for p, a in zip(self.params, self.average):
            p.data.copy_(a)
        try:
            yield
        finally:
            for p, k in zip(self.params, kept):
                p.data.copy_(k)

    def state_dict(self):
        return {"steps": self.steps, "average": self.average}

    def load_state_dict(self, state):
        self.steps = list(state["steps"])
        for a, b in zip(self.average, state["average"], strict=True):
            a.copy_(b)


class Guard:
    """A rule that decides which steps to skip: those whose loss or gradient is not finite, and those whose gradient
    norm is more than `grad_spike_factor` times the median of the last 100 norms (once there are 20). A norm does not
    enter this median if its step was skipped, if should_skip was called with typical=False, or if it is zero because no
    trained parameter took part in the step.

    skipped: how many of the latest steps, in a row, have been skipped.
    """

    def __init__(self, grad_spike_factor):
        self.grad_spike_factor, self.norms, self.skipped = grad_spike_factor, [], 0

    def should_skip(self, loss, norm, typical=True):
        """Return the reason to skip a step with this loss and gradient norm, or None. typical: False if other steps
        cannot be judged by this norm, as when all prompts of the step are ones to preserve.
        """
        reason = None
        median = statistics.median(self.norms) if len(self.norms) >= 20 else math.inf
        if not math.isfinite(loss) or not math.isfinite(norm):
            reason = f"the loss is {loss:.4g}, the gradient's norm {norm:.4g}"
        elif norm > self.grad_spike_factor * median:
            reason = f"the gradient's norm is {norm:.4g}, {norm / median:.0f} times the recent median"
        elif norm > 0 and typical:
            self.norms = [*self.norms[-99:], norm]
        self.skipped = self.skipped + 1 if reason else 0
        return reason

    def raise_if_stuck(self, max_skipped, reason, lr, out):
        """Raise BadInput if max_skipped steps in a row have been skipped. reason: why the last of them was skipped, as
        returned by should_skip. lr, out: the learning rate and the run's folder, for the message.
        """
        if self.skipped >= max_skipped:
            raise BadInput(
                f"{self.skipped} steps in a row skipped, the last because {reason}; the weights from before them are "
                f"saved in {out}. A lower --lr than {lr:g} may help, or a lower --grad_clip"
            )

    def state_dict(self):
        return {"norms": self.norms, "skipped": self.skipped}

    def load_state_dict(self, state):
        self.norms, self.skipped = list(state["norms"]), state["skipped"]
