"""Optimizers and the learning rate.

AdamW8bit holds 8 bytes per parameter in all: bf16 weight 2, bf16 gradient 2, Kahan compensation 2, two 8-bit moments 2 (and two
fp32 scales per 256 parameters).
"""
import math

import torch

BLOCK = 256   # parameters that share a scale
OCTAVES = 16  # of dynamic range below a block's largest value, in both moments


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
    """Magnitudes (n, BLOCK) fp32 >= 0 -> (codes 0..levels uint8, scale (n, 1)): logarithmic below each block's maximum, 0 for zero.

    Rounded up or down at random, in proportion, so that a moment whose change per step is far below a code's width still moves.
    """
    scale = x.amax(1, keepdim=True)
    code = levels + (levels - 1) / OCTAVES * torch.log2(x / scale.clamp(min=1e-38))
    return torch.where(x > 0, (code + noise).floor().clamp(1, levels), 0).to(torch.uint8), scale


def dequantize(code, scale, levels):
    return torch.where(code > 0, torch.exp2((code.float() - levels) * (OCTAVES / (levels - 1))), 0) * scale


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with blockwise 8-bit moments and Kahan-compensated bf16 weights, in plain torch.

    The weight proper is weight - compensation, to 16 bits of mantissa; decay and update act on that sum, in fp32. Parameters must be
    bf16. 8-bit moments: Dettmers et al., 2022; compensation: Kahan, 1965, and Zamirai et al., 2020.
    """

    def __init__(self, params, lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def _new(self, p):
        blocks = -(-p.numel() // BLOCK)
        like = dict(device=p.device)
        return {"step": 0, "compensation": torch.zeros_like(p), "sign_m": torch.zeros(blocks, BLOCK, dtype=torch.int8, **like),
                "code_v": torch.zeros(blocks, BLOCK, dtype=torch.uint8, **like), "scale_m": torch.zeros(blocks, 1, **like),
                "scale_v": torch.zeros(blocks, 1, **like)}

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                s = self.state[p] = self.state[p] or self._new(p)
                s["step"] += 1
                pad = s["code_v"].numel() - p.numel()
                g = torch.nn.functional.pad(p.grad.flatten().float(), (0, pad)).view(-1, BLOCK)
                noise = torch.rand_like(g)
                m = dequantize(s["sign_m"].abs(), s["scale_m"], 127) * s["sign_m"].sign()
                m = b1 * m + (1 - b1) * g
                v = b2 * dequantize(s["code_v"], s["scale_v"], 255) + (1 - b2) * g * g
                code, s["scale_m"] = quantize(m.abs(), 127, noise)
                s["sign_m"] = code.to(torch.int8) * m.sign().to(torch.int8)
                s["code_v"], s["scale_v"] = quantize(v, 255, 1 - noise)
                update = m / (1 - b1 ** s["step"]) / ((v / (1 - b2 ** s["step"])).sqrt() + group["eps"])
                update = update.flatten()[:p.numel()].view_as(p)
                exact = (p.float() - s["compensation"].float()) * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * update
                p.copy_(exact)
                s["compensation"].copy_(p.float() - exact)
