"""Optimizers, the learning rate, moving averages, and which steps are not taken.

AdamW8bit holds 8 bytes per parameter in all: bf16 weight 2, bf16 gradient 2, Kahan compensation 2, two 8-bit moments 2
(and two fp32 scales per 256 parameters).
"""

import contextlib
import math
import statistics

import torch

from checkpoint import BadInput

BLOCK = 256  # parameters that share a scale
OCTAVES = 16  # of dynamic range below a block's largest value, in both moments
CHUNK = 1024  # blocks worked on at a time: the fp32 temporaries stay in the cache, and small


def adamw(params, lr, weight_decay=0.01):
    """torch's AdamW (Loshchilov and Hutter, 2019) with betas (0.9, 0.99)."""
    return torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)


def lr_at(step, steps, lr, warmup, schedule):
    """Learning rate of a step (0-based): linear warm-up, then "constant", or "cosine" down to a tenth."""
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule == "constant":
        return lr
    done = (step - warmup) / max(1, steps - warmup)
    return lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


def quantize(x, levels, noise):
    """Magnitudes (n, BLOCK) fp32 >= 0 -> (codes 0..levels uint8, scale (n, 1)): logarithmic below each block's maximum,
    0 for zero.

    Rounded up or down at random, in proportion, so that a moment whose change per step is far below a code's width
    still moves.
    """
    scale = x.amax(1, keepdim=True)
    code = levels + (levels - 1) / OCTAVES * torch.log2(x / scale.clamp(min=1e-38))
    return torch.where(x > 0, (code + noise).floor().clamp(1, levels), 0).to(torch.uint8), scale


def dequantize(code, scale, levels):
    return torch.where(code > 0, torch.exp2((code.float() - levels) * (OCTAVES / (levels - 1))), 0) * scale


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with blockwise 8-bit moments and Kahan-compensated bf16 weights, in plain torch.

    The weight proper is weight - compensation, to 16 bits of mantissa; decay and update act on that sum, in fp32.
    Parameters must be bf16. 8-bit moments: Dettmers et al., 2022; compensation: Kahan, 1965, and Zamirai et al., 2020.
    """

    def __init__(self, params, lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def _new(self, p):
        blocks = -(-p.numel() // BLOCK)
        zeros = lambda *shape, dtype: torch.zeros(shape, dtype=dtype, device=p.device)
        return {
            "step": 0,
            "compensation": torch.zeros_like(p),
            "code_m": zeros(blocks, BLOCK, dtype=torch.int8),
            "code_v": zeros(blocks, BLOCK, dtype=torch.uint8),
            "scale_m": zeros(blocks, 1, dtype=torch.float32),
            "scale_v": zeros(blocks, 1, dtype=torch.float32),
        }

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    s = self.state[p] = self.state[p] or self._new(p)
                    s["step"] += 1
                    chunk = CHUNK * (
                        16 if p.is_cuda else 1
                    )  # a GPU has no such cache, and starts some 80 kernels for each
                    for at in range(0, len(s["code_m"]), chunk):
                        self._update(group, s, p.view(-1), p.grad.view(-1), slice(at, at + chunk))

    def load_state_dict(self, state):
        super().load_state_dict(state)
        params = [p for group in self.param_groups for p in group["params"]]
        for i, s in state[
            "state"
        ].items():  # torch casts a state to its parameter's dtype; codes and scales have their own
            self.state[params[i]] = {
                k: v.to(params[i].device, copy=True) if torch.is_tensor(v) else v for k, v in s.items()
            }

    def _update(self, group, s, weight, grad, rows):
        """One step for the blocks `rows` of a parameter."""
        b1, b2 = group["betas"]
        here = slice(rows.start * BLOCK, rows.stop * BLOCK)
        weight, comp, grad = weight[here], s["compensation"].view(-1)[here], grad[here].float()
        code_m, code_v, scale_m, scale_v = (s[k][rows] for k in ("code_m", "code_v", "scale_m", "scale_v"))
        g = torch.nn.functional.pad(grad, (0, code_m.numel() - len(grad))).view(-1, BLOCK)
        m = torch.lerp(g, dequantize(code_m.abs(), scale_m, 127) * code_m.sign(), b1)
        v = torch.lerp(g * g, dequantize(code_v, scale_v, 255), b2)
        noise = torch.rand_like(g)
        code, scale = quantize(m.abs(), 127, noise)
        code_m.copy_(code.to(torch.int8) * m.sign().to(torch.int8))
        scale_m.copy_(scale)
        code, scale = quantize(v, 255, 1 - noise)
        code_v.copy_(code)
        scale_v.copy_(scale)
        update = m / (1 - b1 ** s["step"]) / ((v / (1 - b2 ** s["step"])).sqrt() + group["eps"])
        exact = (weight.float() - comp.float()) * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * update.view(
            -1
        )[: len(grad)]
        weight.copy_(exact)
        comp.copy_(weight.float() - exact)


class EMA:
    """A moving average of parameters (after Polyak and Juditsky, 1992), in fp32; its decay grows with the steps up to
    the one asked for. What has no gradient, an expert's adapter in the other one's turns, keeps its average.
    """

    def __init__(self, params, decay, optimizer=None):
        self.params, self.decay, self.steps = params, decay, [0] * len(params)
        self.average = [p.detach().float().clone() for p in params]

    @torch.no_grad()
    def update(self):
        for i, (average, p) in enumerate(zip(self.average, self.params)):
            if p.grad is not None:
                self.steps[i] += 1
                average.lerp_(p.detach().float(), 1 - min(self.decay, self.steps[i] / (self.steps[i] + 10)))

    @contextlib.contextmanager
    def in_place(self):
        """The average stands in the parameters' place until the block ends."""
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
    """Tells steps to take from steps to skip: those whose loss or gradient is not finite, or whose gradient's norm is
    more than `explosion` times the median of the last 100 that were taken (once 20 were). Counts the skipped ones in a
    row.
    """

    def __init__(self, explosion):
        self.explosion, self.norms, self.skipped = explosion, [], 0

    def should_skip(self, loss, norm):
        """Why this step must be skipped, or None."""
        why = None
        if not math.isfinite(loss) or not math.isfinite(norm):
            why = f"the loss is {loss:.4g}, the gradient's norm {norm:.4g}"
        elif len(self.norms) >= 20 and norm > self.explosion * statistics.median(self.norms):
            why = (
                f"the gradient's norm is {norm:.4g}, {norm / statistics.median(self.norms):.0f} times the recent median"
            )
        if why is None:
            self.norms = [*self.norms[-99:], norm]
        self.skipped = 0 if why is None else self.skipped + 1
        return why

    def state_dict(self):
        return {"norms": self.norms, "skipped": self.skipped}

    def load_state_dict(self, state):
        self.norms, self.skipped = list(state["norms"]), state["skipped"]

    def raise_if_stuck(self, max_skipped, reason, lr, out):
        if self.skipped >= max_skipped:
            raise BadInput(
                f"{self.skipped} steps in a row skipped, the last because {reason}; the weights from before them are "
                f"saved in {out}. A lower --lr than {lr:g} may help, or a lower --grad_clip"
            )
