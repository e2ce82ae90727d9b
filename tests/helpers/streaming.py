"""Small DiTs with streamed blocks, and a check that streaming changes no bit of outputs and gradients."""

import torch

import lora
from benchmarks import tiny
from nanowan.memory.placement import Placement

X, T, CONTEXT = torch.randn(2, 48, 3, 4, 6), torch.tensor([300.0, 700.0]), torch.randn(2, 7, tiny.TEXT_DIM)


def streamed(copier, count, blocks=None):
    """Return (a DiT with a LoRA and `count` of its 6 blocks streamed, its trained parameters, its Placement)."""
    dit = tiny.dit("ti2v", layers=6)
    torch.manual_seed(0)
    params = lora.inject(dit, rank=4, blocks=blocks)
    for p in params:
        torch.nn.init.normal_(p, std=0.1)
    return dit, params, Placement(dit, copier, count).start()


def check_same_bits(a, b, params_of_a, params_of_b):
    """Assert that two DiTs have bit-identical outputs and gradients, in two runs with gradients and two without."""
    for _ in range(2):
        ya, yb = a(X, T, CONTEXT), b(X, T, CONTEXT)
        assert torch.equal(ya, yb)
        ya.square().mean().backward()
        yb.square().mean().backward()
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(params_of_a, params_of_b, strict=True))
    with torch.no_grad():
        assert all(torch.equal(a(X, T, CONTEXT), b(X, T, CONTEXT)) for _ in range(2))
