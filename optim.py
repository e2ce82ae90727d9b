"""The optimizer and its learning rate."""
import math

import torch


def adamw(params, lr, weight_decay=0.01):
    """AdamW (Loshchilov and Hutter, 2019) with betas (0.9, 0.99)."""
    return torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)


def lr_at(step, steps, lr, warmup, schedule):
    """Learning rate of a step (0-based): linear warm-up, then "constant", or "cosine" down to a tenth."""
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule == "constant":
        return lr
    done = (step - warmup) / max(1, steps - warmup)
    return lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))
