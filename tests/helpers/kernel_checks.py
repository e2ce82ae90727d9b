"""Compare kernels with their references in fp64, over odd sizes, strides and options.

Unless its docstring says otherwise, a function NAME_error returns the largest relative error (see max_rel_error) of
outputs and gradients. The functions run on a CPU, in Triton's interpreter (in a process with TRITON_INTERPRET=1) and on
a GPU.
"""

import math

import torch
import torch.nn.functional as F

from kernels import adamw8bit, attention, causal_conv3d, gelu, linear, modulate, qk_norm_rope, quantize
from kernels.rope import MAX_POSITIONS, grid_positions, rope_table


def seeded(device="cpu"):
    """Return (generator, random): a generator with a fixed seed, and a function random(*shape) that draws normal
    numbers from it and puts them on `device`.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device)

    return generator, random


def max_rel_error(got, want):
    """Return the largest difference between two trees of tensors, each divided by the largest absolute value of its
    tensor in `want`. Return infinity if any difference is not finite.
    """
    got, want = (torch.utils._pytree.tree_leaves(t) for t in (got, want))
    errors = [
        ((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-30)).item()
        for a, b in zip(got, want, strict=True)
    ]
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


def scattered_positions(count, generator):
    """Return positions (count,3) of no grid: in no order, some twice, some negative, some at the table's ends."""
    positions = torch.randint(-9, 40, (count, 3), dtype=torch.int32, generator=generator)
    positions[count // 2] = positions[0]
    positions[-1] = torch.tensor([1 - MAX_POSITIONS, MAX_POSITIONS - 1, -1])
    return positions


def modulate_error(device, dtype, B=2, F=3, tokens=5, D=192):
    """Return the error of modulate, gate and gate_modulate, with rows that each serve equally many tokens, and with an
    `index` that gives each token its row.
    """
    (generator, random), L = seeded(device), F * tokens
    x, y, rows = random(B, L, D), random(B, L, 2 * D).to(dtype)[..., :D], random(B, F, 3, D)
    index = torch.randint(F, (L,), generator=generator, dtype=torch.int32).to(device)
    ends, results = random(8, B, L, D), []
    fused = (modulate.modulate, modulate.gate, modulate.gate_modulate)
    references = (modulate.modulate_ref, modulate.gate_ref, modulate.gate_modulate_ref)
    for ops, kind in ((fused, torch.float32), (references, torch.float64)):
        low = dtype if kind == torch.float32 else kind
        a, b, r = (u.detach().to(v).requires_grad_() for u, v in ((x, kind), (y, low), (rows, kind)))
        weight, shift, row = r.unbind(2)
        h = [ops[1](a, b)]
        for i in (None, index):
            h += [ops[0](a, weight, shift, 1e-6, low, i), ops[1](a, b, row, i)]
            h += ops[2](a, b, row, weight, shift, 1e-6, low, i)
        loss = sum((u.to(kind) * end.to(kind)).sum() for u, end in zip(h, ends))
        # if the rows need no gradient, another code path runs
        frozen = ops[2](a, b, row.detach(), weight.detach(), shift.detach(), 1e-6, low, index)[1]
        (loss + (frozen.to(kind) * ends[7].to(kind)).sum()).backward()
        results.append([*h, a.grad, b.grad, r.grad])
    return max_rel_error(*results)


def qk_norm_rope_error(device, dtype, B=2, grid=(3, 2, 5), heads=3, d=28):
    """Return the error of qk_norm_rope, without rotation, with a grid's positions and with scattered positions."""
    (generator, random), L, D = seeded(device), math.prod(grid), heads * d
    x, w, table = random(B, L, 3 * D).to(dtype), 1 + 0.1 * random(2, D), rope_table(MAX_POSITIONS, d, device)
    ends, results = random(4, B, L, heads, d), []
    places = grid_positions(grid, device), scattered_positions(L, generator).to(device)
    for op, kind in ((qk_norm_rope.qk_norm_rope, None), (qk_norm_rope.qk_norm_rope_ref, torch.float64)):
        a, u = x.detach().to(kind or dtype).requires_grad_(), w.detach().to(kind or w.dtype).requires_grad_()
        q, k, _ = a.chunk(3, -1)
        h = [*op([q, k], list(u), 1e-6, heads, table.to(u.dtype), places[0])]
        h += [*op([q], [u[0]], 1e-6, heads, table.to(u.dtype), places[1]), *op([k], [u[1]], 1e-6, heads)]
        sum((v.to(u.dtype) * e.to(u.dtype)).sum() for v, e in zip(h, ends)).backward()
        results.append([*h, a.grad, u.grad])
    return max_rel_error(*results)


def attention_error(device, dtype, B=2, grid=(3, 5, 3), N=2, d=32, S=37):
    """Return the error of attention, with a bare q that is normed and rotated by a grid's or by scattered positions,
    with a bare q that is only normed, and with a q that is used as given.
    """
    (generator, random), L = seeded(device), math.prod(grid)
    qkv, text = random(B, L, 3, N, d).to(dtype), random(B, S, 2, N, d).to(dtype)
    weight, table = 1 + 0.1 * random(N * d), rope_table(MAX_POSITIONS, d, device)
    ends, results = random(4, B, L, N, d), []
    places = grid_positions(grid, device), scattered_positions(L, generator).to(device)
    for op, kind in ((attention.attention, None), (attention.attention_ref, torch.float64)):
        a, c, w = (u.detach().to(kind or u.dtype).requires_grad_() for u in (qkv, text, weight))
        q, k, v = a.unbind(2)
        h = [op(q, k, v, w, 1e-6, table.to(w.dtype), at) for at in places]
        h += [op(q, *c.unbind(2), w), op(q, k, v)]
        sum((u.to(w.dtype) * e.to(w.dtype)).sum() for u, e in zip(h, ends)).backward()
        results.append([*h, a.grad, c.grad, w.grad])
    return max_rel_error(*results)


def gelu_error(device, dtype):
    """Return the error of gelu and its gradient for inputs from -20 to 20, on a strided tensor."""
    x, results = torch.linspace(-20, 20, 3 * 1001, device=device).view(3, 1001).t().to(dtype), []
    for op, kind in ((gelu.gelu, dtype), (gelu.gelu_ref, torch.float64)):
        a = x.detach().to(kind).requires_grad_()
        y = op(a)
        y.sum().backward()
        results.append([y, a.grad])
    return max_rel_error(*results)


def linear_error(device, dtype):
    """Return the error of linear, with and without GELU, at one size for which oneDNN is used on AMD's CPUs and at one
    for which it is not.
    """
    (_, random), results = seeded(device), ([], [])
    for M, K, N in ((7, 24, 40), (100, 530, 520)):
        tensors = random(K, 2 * M).t()[::2], random(N, K) * K**-0.5, random(N), random(M, N)
        x, w, b, dy = (t.to(dtype) for t in tensors)
        for activated in (False, True):
            for (op, kind), out in zip(((linear.linear, dtype), (linear.linear_ref, torch.float64)), results):
                inputs = [t.detach().to(kind).requires_grad_() for t in (x, w, b)]
                y = op(inputs[0][None], *inputs[1:], activated)
                out += [y, *torch.autograd.grad(y, inputs, dy[None].to(kind))]
                if activated:  # with a frozen weight
                    y = op(inputs[0][None], inputs[1].detach(), inputs[2].detach(), True)
                    out += torch.autograd.grad(y, inputs[0], dy[None].to(kind))
    return max_rel_error(*results)


CONVOLUTIONS = ((16, 24, (3, 3, 3)), (17, 5, (3, 3, 3)), (48, 96, (3, 1, 1)), (33, 12, (1, 1, 1)))
CONVOLUTIONS += ((130, 100, (3, 3, 3)),)


def causal_conv3d_error(op, device, dtype, sizes=CONVOLUTIONS):
    """Return the error of `op`, which takes the arguments of causal_conv3d_ref: for several kernels, odd sizes and
    layouts, with and without past, biases, norm and residual. A clip is passed at once, and in chunks of one and two
    frames.
    """
    (_, random), results = seeded(), ([], [])
    for C, N, kernel in sizes:
        for normed in (False, True):
            weight, gamma = random(N, C, *kernel) * (C * 27) ** -0.5, 1 + 0.1 * random(C)
            tensors = random(2, C, 5, 7, 9), weight, random(N), gamma, random(C), random(2, N, 5, 9, 6)
            tensors = [t.to(dtype).to(device) for t in tensors]
            for run, kind, out in (
                (op, dtype, results[0]),
                (causal_conv3d.causal_conv3d_ref, torch.float64, results[1]),
            ):
                x, w, b, gamma, input_bias, residual = (t.to(kind) for t in tensors)
                x = x.transpose(3, 4)[..., 1:]  # strided
                gamma, input_bias = (gamma, input_bias) if normed else (None, None)
                whole, last = run(x, None, w, b, gamma, input_bias)
                first, past = run(x[:, :, :1], None, w, None, gamma)
                second, past = run(x[:, :, 1:2], past, w, b, gamma, input_bias, residual[:, :, :1])
                third, past = run(x[:, :, 2:4], past, w, None, gamma, None, residual[:, :, 1:3])
                out += [whole, first, second, third, *([] if last is None else [last, past])]
    return max_rel_error(*results)


def fill_buffer_error(fill, device, dtype, C):
    """Return the error of `fill`, which takes the arguments of kernels/causal_conv3d.py's _fill_buffer, on two clips of
    one and of three frames, with and without past, bias and norm. Raises AssertionError unless copied frames, and the
    frames that the next chunk needs, are bit-identical to the expected frames.
    """
    (_, random), error = seeded(), 0.0
    like = dict(dtype=dtype, device=device, memory_format=torch.channels_last_3d)
    past, bias, gamma = (t.to(device, dtype) for t in (random(2, C, 2, 3, 5), random(C), 1 + 0.1 * random(C)))
    past = past.contiguous(memory_format=torch.channels_last_3d)
    cases = (3, past, bias, gamma), (3, None, None, gamma), (1, past, None, None), (1, None, bias, gamma)
    for frames, before, shift, scale in cases:
        x = random(2, C, frames, 3, 5).to(device, dtype).contiguous(memory_format=torch.channels_last_3d)
        buffer, last = (torch.empty((2, C, n, 3, 5), **like).fill_(7) for n in (2 + frames, 2))
        fill(x, before, shift, scale, buffer, last)
        want = x.double()
        if scale is not None:
            want = want if shift is None else want + shift.double().view(-1, 1, 1, 1)
            want = F.silu(causal_conv3d.rms_norm(want, scale.double().view(-1, 1, 1, 1)))
        error = max(error, max_rel_error([buffer[:, :, 2:]], [want]))
        assert torch.equal(buffer[:, :, :2], torch.zeros_like(past) if before is None else past)
        assert torch.equal(last, buffer[:, :, -2:])
    return error


def adamw8bit_error(device, n=5 * adamw8bit.BLOCK + 77, steps=10, dtype=torch.bfloat16):
    """Return how far `steps` steps of adamw8bit move weights from where torch's AdamW moves them in fp32: the norm of
    the difference over the norm of torch's change. The gradients in a block differ by factors of up to a million.
    """
    g = torch.Generator().manual_seed(0)
    magnitude, direction = 10 ** (-6 * torch.rand(n, generator=g)), torch.randn(n, generator=g).sign()
    start = torch.randn(n, generator=g).to(dtype)
    ours, theirs = start.to(device).clone(), torch.nn.Parameter(start.float().to(device).clone())
    state, settings = adamw8bit.new_state(ours), dict(lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    peer = torch.optim.AdamW([theirs], **settings)
    for i in range(1, steps + 1):
        grad = (magnitude * (direction + torch.randn(n, generator=g))).to(device, dtype)
        adamw8bit.step(ours, state[0], grad, *state[1:], i, **settings)
        theirs.grad = grad.float()
        peer.step()
    exact = ours.float() - state[0].float() if dtype == torch.bfloat16 else ours
    a, b = (t - start.float().to(device) for t in (exact, theirs.detach()))
    return ((a - b).norm() / b.norm()).item()


def quantize_error(device, dtype):
    """Return the largest difference of values from the reference, as a share of the row's largest value, or the largest
    relative difference of scales, whichever is larger. The inputs have odd sizes, strides, rows of zeros, and values on
    every step of e4m3 and halfway between steps.
    """
    (_, random), error = seeded(device), 0.0
    steps = torch.arange(1, 127, dtype=torch.uint8).view(quantize.E4M3).float()
    halves = torch.cat([steps, (steps[1:] + steps[:-1]) / 2])[None].repeat(2, 1).to(device)
    for x in (random(5, 300), random(3, 2100)[:, ::2], torch.zeros(2, 7, device=device), halves, random(1, 1)):
        x = x.to(dtype)
        (got, scale), (want, want_scale) = quantize.quantize_rows(x), quantize.quantize_rows_ref(x)
        difference = (got.float() * scale - want.float() * want_scale).abs() / (x.float().abs().amax(1, True) + 1e-12)
        error = max(error, difference.max().item(), (scale / want_scale - 1).abs().max().item())
    for bad in (torch.nan, torch.inf):
        values, scale = quantize.quantize_rows(torch.tensor([[1, bad], [1, 2]], device=device, dtype=dtype))
        assert (values.float() * scale).isnan()[:, 1].tolist() == [True, False]
    return error


def quantized_gelu_error(device, dtype):
    """Return [error of the values, error of the scales] of quantize_rows with GELU, relative to a GELU in fp64. Errors
    of values are in units of half the step to which e4m3 rounds the value. Errors of scales are relative.
    """
    (_, random), results = seeded(device), []
    for x in (4 * random(5, 300), random(3, 2100)[:, ::2], torch.linspace(-60, 60, 4097, device=device)[None]):
        got, scale = quantize.quantize_rows(x.to(dtype), True)
        want = F.gelu(x.to(dtype).double(), approximate="tanh")
        want_scale = want.abs().amax(1, keepdim=True) / quantize.E4M3_MAX
        half_step = (want / want_scale).abs().clamp(min=2.0**-6).log2().floor().exp2() * 2.0**-4
        difference = (got.double() - want / want_scale).abs() / half_step
        results.append([difference.max(), (scale / want_scale - 1).abs().max()])
    return [max(values).item() for values in zip(*results)]
