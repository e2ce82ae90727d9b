"""The DiT against diffusers' WanTransformer3DModel on equal weights, fp32 on CPU."""

import pytest
import torch
from helpers import scattered

from benchmarks import tiny
from kernels import backend
from nanowan.formats.dit import full_config
from nanowan.variants import registry
from nanowan.variants.registry import parts_of
from wan import VARIANTS, Wan, build


def per_token(t, grid):
    """Our t (B,T') as diffusers wants it: one number per token."""
    return t.repeat_interleave(grid[1] * grid[2], 1)


def inputs(kind, frames=3, h=6, w=10, S=40, B=2):
    x = torch.randn(B, tiny.IN_OUT[kind][0], frames, h, w)
    return x, torch.rand(B) * 1000, torch.randn(B, S, tiny.TEXT_DIM)


def padded(context, lens, length=512):
    out = torch.zeros(len(context), length, context.shape[2])
    for i, n in enumerate(lens):
        out[i, :n] = context[i, :n]
    return out


@pytest.mark.parametrize("kind", ["ti2v", "t2v", "i2v"])
@pytest.mark.parametrize("lens", [(1, 1), (40, 7), (512, 511)])
def test_equals_diffusers(kind, lens, report):
    model = tiny.dit(kind)
    peer = tiny.diffusers_dit(model)
    x, t, context = inputs(kind, S=max(lens))
    with torch.no_grad():
        want = peer(x, t, padded(context, lens), return_dict=False)[0]
        got = model(x, t, context, torch.tensor(lens))
    report("relative error", tiny.error(got, want), 2e-5)


@pytest.mark.parametrize("size", [(1, 2, 2), (1, 8, 6), (5, 14, 2)])
def test_per_frame_t_equals_diffusers(size, report):
    model = tiny.dit("ti2v")
    peer = tiny.diffusers_dit(model)
    x, _, context = inputs("ti2v", *size)
    t = torch.rand(2, size[0]) * 1000
    t[:, 0] = 0
    grid = (size[0], size[1] // 2, size[2] // 2)
    with torch.no_grad():
        want = peer(x, per_token(t, grid), padded(context, (40, 40)), return_dict=False)[0]
        got = model(x, t, context)
    report("relative error", tiny.error(got, want), 2e-5)


@pytest.mark.parametrize("kind", ["ti2v", "t2v", "i2v"])
def test_gradients_equal_diffusers(kind, report):
    model = tiny.dit(kind)
    peer = tiny.diffusers_dit(model)
    x, t, context = inputs(kind)
    grads = []
    for run in (lambda a, c: peer(a, t, padded(c, (40, 40)), return_dict=False)[0], lambda a, c: model(a, t, c)):
        a, c = x.clone().requires_grad_(), context.clone().requires_grad_()
        out = run(a, c)
        weight = torch.sin(torch.arange(out.numel()).view(out.shape))
        grads.append(torch.autograd.grad((out * weight).sum(), (a, c)))
    report("input gradient", tiny.error(grads[1][0], grads[0][0]), 1e-4)
    report("context gradient", tiny.error(grads[1][1], grads[0][1]), 1e-4)


@pytest.mark.parametrize("lens", [(1, 1), (40, 7), (39, 40)])
def test_padding_fold_is_exact(lens, report):
    """One padding key with a log-count equals the 512-n zero rows it stands for."""
    model = tiny.dit("t2v")
    x, t, context = inputs("t2v")
    with torch.no_grad():
        folded = model(x, t, context, torch.tensor(lens))
        full = model(x, t, padded(context, lens))
    report("relative error", tiny.error(folded, full), 2e-6)


def test_padding_fold_counts_right_in_bf16():
    """The weights of the two padding keys, rounded to bf16 as attention sees them, add up to what they stand for."""
    model = tiny.dit("t2v")
    for S in range(1, 512):
        bias = model.embed_text(torch.zeros(1, S, tiny.TEXT_DIM)).bias[0, 0, 0, -2:]
        assert abs(bias.bfloat16().double().exp().sum() / (512 - S) - 1) < 5e-4, S


def test_text_prepared_once_is_the_same():
    model = tiny.dit("t2v")
    x, t, context = inputs("t2v")
    with torch.no_grad():
        text = model.embed_text(context, torch.tensor([40, 7]), cache=True)
        assert torch.equal(model(x, t, text), model(x, t, context, torch.tensor([40, 7])))


def test_what_lies_beyond_a_prompts_length_does_not_matter():
    model = tiny.dit("t2v")
    x, t, context = inputs("t2v")
    with torch.no_grad():
        a = model(x, t, context, torch.tensor([40, 7]))
        context[1, 7:], context[1, 8:] = 9.0, torch.inf
        assert torch.equal(a, model(x, t, context, torch.tensor([40, 7])))


def test_checkpointing_changes_no_gradient():
    model = tiny.dit("t2v")
    x, t, context = inputs("t2v")
    grads = []
    for on in (False, True):
        model.checkpointing = on
        c = context.clone().requires_grad_()
        grads.append(torch.autograd.grad(model(x, t, c).square().mean(), c)[0])
    assert torch.equal(*grads)


@pytest.mark.parametrize("choice", ["ref", "cpp"])
def test_a_variant_with_tokens_of_its_own_equals_its_formulas(choice, report):
    """Tokens on no grid, two rows of modulation, something after a block: values and gradients, against the plain
    formulas in fp64.
    """
    model, (given, extra), grads = scattered.model(), scattered.inputs(), []
    with backend.using(choice):
        for run in (lambda *a: scattered.plain(model, *a), lambda *a: model(*a[:3], extra=a[3])):
            leaves = [v.clone().requires_grad_() for v in (given[0], given[2], extra["extra"])]
            out = run(leaves[0], given[1], *leaves[1:])
            weight = torch.sin(torch.arange(out.numel()).view(out.shape))
            grads.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    for name, want, got in zip(("output", "by x", "by context", "by further tokens"), *grads):
        report(name, tiny.error(got, want), 2e-5)


def test_checkpointing_a_variant_changes_no_gradient():
    model, (given, extra), grads = scattered.model(), scattered.inputs(), []
    for on in (False, True):
        model.checkpointing = on
        leaves = [given[2].clone().requires_grad_(), extra["extra"].clone().requires_grad_()]
        out = model(*given[:2], leaves[0], extra=leaves[1])
        grads.append(torch.autograd.grad(out.square().mean(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize(
    "variant, params, tensors",
    [("ti2v-5B", 4_999_787_712, 825), ("t2v-A14B", 14_288_491_584, 1095), ("i2v-A14B", 14_288_901_184, 1095)],
)
def test_full_size_counts(variant, params, tensors):
    with torch.device("meta"):
        model = build(variant)
    state = model.state_dict()
    assert model.config == full_config(variant)
    assert (sum(t.numel() for t in state.values()), len(state)) == (params, tensors)


def test_variants_hold_only_what_differs():
    """One kind of model each, and only the kinds that wan.Wan is the class of stand beside it."""
    kinds = ["ti2v", "t2v", "i2v", "s2v", "animate", "animate2"]
    assert [row["model_type"] for row in registry.VARIANTS.values()] == kinds
    own = {name: row for name, row in registry.VARIANTS.items() if parts_of(row["model_type"]).model is Wan}
    assert own == VARIANTS


@pytest.mark.parametrize(
    "shape, t",
    [((1, 16, 1, 3, 4), (1,)), ((1, 16, 1, 4, 3), (1,)), ((1, 15, 1, 4, 4), (1,)), ((2, 16, 3, 4, 4), (2, 2))],
)
def test_wrong_inputs_are_named(shape, t):
    with pytest.raises(ValueError, match=r"this model takes x \(B,16"):
        tiny.dit("t2v")(torch.zeros(shape), torch.zeros(t), torch.zeros(shape[0], 1, tiny.TEXT_DIM))


def test_too_long_text_is_refused():
    with pytest.raises(ValueError, match="513 tokens"):
        tiny.dit("t2v")(torch.zeros(1, 16, 1, 4, 4), torch.zeros(1), torch.zeros(1, 513, tiny.TEXT_DIM))


def test_a_prompt_longer_than_its_batch_is_refused():
    with pytest.raises(ValueError, match="text of 4 tokens in a batch 3 wide"):
        tiny.dit("t2v").embed_text(torch.zeros(2, 3, tiny.TEXT_DIM), torch.tensor([2, 4]))


def test_bf16_stays_near_fp32(report):
    """bf16 linears and attention, the rest fp32 (the official default mode)."""
    import copy

    from nanowan.formats.dit import keep_fp32

    model = tiny.dit("ti2v")
    low = copy.deepcopy(model)
    for name, p in low.named_parameters():
        p.data = p.data if keep_fp32(name) else p.data.bfloat16()
    x, t, context = inputs("ti2v")
    with torch.no_grad():
        report("relative error", tiny.error(low(x, t, context), model(x, t, context)), 1e-2)
