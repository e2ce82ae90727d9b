"""Optimizers, the learning rate, moving averages, and which steps are not taken.

AdamW8bit holds 8 bytes per parameter in all: bf16 weight 2, bf16 gradient 2, Kahan compensation 2, both moments 2
(and one fp32 scale per 256 parameters).
"""

import contextlib
import math
import statistics

import torch

from checkpoint import BadInput

BLOCK = 256  # parameters that share a scale
ROOT_LEVELS, RATIO_LEVELS = 511, 63  # of sqrt(v), in 9 bits, and of |m| / sqrt(v), in 7 bits with its sign
OCTAVES = 24  # of sqrt(v) below a block's largest; with clipped gradients (norm <= 1) that reaches down to AdamW's eps
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
    progress = (step - warmup) / max(1, steps - warmup)
    return lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def max_ratio(betas):
    """The largest |m| / sqrt(v) that any sequence of gradients can lead to (Cauchy-Schwarz); betas (b1, b2)."""
    b1, b2 = betas
    if not b1 * b1 < b2 < 1:
        raise ValueError(f"betas {betas}: 8-bit moments need b1^2 < b2 < 1, or m is not bounded by sqrt(v)")
    return (1 - b1) / math.sqrt((1 - b2) * (1 - b1 * b1 / b2))


def round_randomly(x):
    """Each element up or down to an integer, at random, so that its expectation is x: a moment that changes by less
    than a level per step moves all the same.
    """
    return (x + torch.rand_like(x)).floor()


def pack(level, share):
    """A level 0..ROOT_LEVELS and a share -RATIO_LEVELS..RATIO_LEVELS as one 16-bit integer."""
    return (level - 256) * 128 + share + 64


def unpack(codes):
    return (codes >> 7) + 256, (codes & 127) - 64


def round_to_bf16(x):
    """fp32 -> bf16, up or down at random, so that its expectation is x."""
    bits = x.view(torch.int32)
    return ((bits + torch.randint_like(bits, 1 << 16)) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


def decode_root(level, scale):
    """Levels 0..ROOT_LEVELS (n, BLOCK) and scales (n,1) -> sqrt(v) (n, BLOCK) fp32."""
    return torch.where(level > 0, torch.exp2((level - ROOT_LEVELS) * (OCTAVES / (ROOT_LEVELS - 1))), 0) * scale


def encode_moments(m, v, betas):
    """Moments m, v (n, BLOCK) fp32 -> codes (n, BLOCK) int16 and scales (n,1) fp32.

    sqrt(v) is coded logarithmically below its block's largest, and m as a share of it, linearly: a parameter whose
    gradients are a million times smaller than its neighbour's is as precise as that one. After Dettmers et al., 2022.
    """
    root = v.sqrt()
    scale = root.amax(1, keepdim=True)
    level = ROOT_LEVELS + (ROOT_LEVELS - 1) / OCTAVES * torch.log2(root / scale.clamp(min=1e-38))
    level = torch.where(root > 0, round_randomly(level).clamp(1, ROOT_LEVELS), 0)
    share = m / (max_ratio(betas) * decode_root(level, scale))
    share = round_randomly(share * RATIO_LEVELS).clamp(-RATIO_LEVELS, RATIO_LEVELS)
    share = torch.where(level > 0, share, 0)
    return pack(level, share).to(torch.int16), scale


def decode_moments(codes, scale, betas):
    """The inverse of encode_moments: m, v (n, BLOCK) fp32."""
    level, share = unpack(codes)
    root = decode_root(level, scale)
    return share * (max_ratio(betas) / RATIO_LEVELS) * root, root.square()


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with 8 bits per moment and Kahan-compensated bf16 weights, in plain torch.

    The weight proper is weight - compensation, to 16 bits of mantissa, the last of them rounded at random; decay and
    update act on that sum, in fp32. Parameters must be bf16. Compensation: Kahan, 1965, and Zamirai et al., 2020.
    """

    def __init__(self, params, lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01):
        max_ratio(betas)  # raises where the moments could not be coded
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def new_state(self, p):
        """The state of a parameter before its first step."""
        blocks = -(-p.numel() // BLOCK)
        return {
            "step": 0,
            "compensation": torch.zeros_like(p),
            "codes": torch.full((blocks, BLOCK), pack(0, 0), dtype=torch.int16, device=p.device),
            "scale": torch.zeros(blocks, 1, device=p.device),
        }

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p] = self.state[p] or self.new_state(p)
                state["step"] += 1
                # a GPU has no such cache, and starts some 80 kernels for each chunk
                chunk = CHUNK * (16 if p.is_cuda else 1)
                for start in range(0, len(state["codes"]), chunk):
                    self._update(group, state, p.view(-1), p.grad.view(-1), slice(start, start + chunk))

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        # torch casts a state to its parameter's dtype; codes and scales have their own
        params = [p for group in self.param_groups for p in group["params"]]
        for i, state in state_dict["state"].items():
            self.state[params[i]] = {
                k: v.to(params[i].device, copy=True) if torch.is_tensor(v) else v for k, v in state.items()
            }

    def exact(self, p):
        """A parameter's weight proper, in fp32: what bf16 rounds away is in its compensation."""
        weight = p.detach().float()
        return weight.sub_(self.state[p]["compensation"]) if self.state.get(p) else weight

    def _update(self, group, state, weight, grad, blocks):
        """One step for some blocks (a slice) of a parameter."""
        b1, b2 = betas = group["betas"]
        part = slice(blocks.start * BLOCK, blocks.stop * BLOCK)
        weight, compensation, grad = weight[part], state["compensation"].view(-1)[part], grad[part].float()
        codes, scale = state["codes"][blocks], state["scale"][blocks]
        g = torch.nn.functional.pad(grad, (0, codes.numel() - len(grad))).view(-1, BLOCK)
        m, v = decode_moments(codes, scale, betas)
        m, v = torch.lerp(g, m, b1), torch.lerp(g * g, v, b2)
        for old, new in zip((codes, scale), encode_moments(m, v, betas)):
            old.copy_(new)
        update = m / (1 - b1 ** state["step"]) / ((v / (1 - b2 ** state["step"])).sqrt() + group["eps"])
        exact = (weight.float() - compensation.float()) * (1 - group["lr"] * group["weight_decay"])
        exact -= group["lr"] * update.view(-1)[: len(grad)]
        weight.copy_(exact)
        compensation.copy_(round_to_bf16(weight.float() - exact))


class EMA:
    """A moving average of parameters (after Polyak and Juditsky, 1992), in fp32; its decay grows with the steps up to
    the one asked for. What has no gradient, an expert's adapter while the other one is trained, keeps its average.

    optimizer: the AdamW8bit that compensates the parameters, if one does: the compensated weights are averaged.
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
    more than `grad_spike_factor` times the median of the last 100 that were taken (once 20 were). Norms of zero, of
    steps in which nothing that is trained took part, say nothing about the others and are left out of the median; so
    are those that are not `typical`.

    skipped: how many steps were skipped in a row up to now.
    """

    def __init__(self, grad_spike_factor):
        self.grad_spike_factor, self.norms, self.skipped = grad_spike_factor, [], 0

    def should_skip(self, loss, norm, typical=True):
        """Why the step with this loss and gradient norm must be skipped, or None."""
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
        """Raises BadInput after max_skipped skipped steps in a row, the last for this reason (from should_skip)."""
        if self.skipped >= max_skipped:
            raise BadInput(
                f"{self.skipped} steps in a row skipped, the last because {reason}; the weights from before them are "
                f"saved in {out}. A lower --lr than {lr:g} may help, or a lower --grad_clip"
            )

    def state_dict(self):
        return {"norms": self.norms, "skipped": self.skipped}

    def load_state_dict(self, state):
        self.norms, self.skipped = list(state["norms"]), state["skipped"]
