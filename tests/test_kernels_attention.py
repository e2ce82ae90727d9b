"""Which attention runs, PyTorch's (by which backend) or ours; and the gradients of masked attention."""

import argparse
import contextlib
import math
from unittest import mock

import pytest
import torch
from test_kernels import python
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend

from benchmarks import tiny
from kernels import attention_backends, ops
from kernels.qk_norm_rope import qk_norm_rope_ref
from kernels.rope import grid_positions, rope_table
from nanowan.training.optim import adamw


@pytest.mark.parametrize("masked", [False, True])
def test_a_mask_never_goes_to_cudnn(masked):
    """On a GPU; without one cuDNN comes first."""
    with FakeTensorMode(), mock.patch.object(ops, "sdpa_kernel", return_value=contextlib.nullcontext()) as kernel:
        q, bias = torch.empty(2, 6, 3, 16, device="cuda"), torch.empty(2, 1, 1, 6, device="cuda")
        assert ops.attention(q, q, q, bias if masked else None).shape == (2, 6, 48)
    ((backends,), how) = kernel.call_args
    assert how == {"set_priority": True} and SDPBackend.MATH == backends[-1]
    assert (SDPBackend.CUDNN_ATTENTION in backends) == (not masked) and (
        masked or backends[0] == attention_backends.BACKENDS[0]
    )


def test_every_attention_of_the_models_chooses_its_backend():
    """Nothing but ops.sdpa calls PyTorch's."""
    from test_layout import SOURCES

    calls = [f.name for f in SOURCES if "F.scaled_dot_product_attention(" in f.read_text()]
    assert sorted(calls) == ["attention.py", "ops.py"]  # the former the reference of ours


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("S", [42, 64, 65, 128, 192])
def test_gradients_of_masked_attention(S, device, report):
    """In bf16 against fp64, with one mask for all heads and queries; also where logits are so low that their
    exponentials fit no fp32.
    """
    g = torch.Generator().manual_seed(S)
    q, k, v, grad = (torch.randn(2, n, 3, 32, generator=g).bfloat16().to(device) for n in (70, S, S, 70))
    for low in (0, -120):
        bias = (torch.randn(2, 1, 1, S, generator=g) + low).bfloat16().to(device)
        bias[1, ..., S // 2 :] = -torch.inf
        results = []
        for dtype in (torch.float64, torch.bfloat16):
            leaves = [u.to(dtype).requires_grad_() for u in (q, k, v)]
            out = ops.attention(*leaves, bias.to(dtype))
            results.append([out.detach(), *torch.autograd.grad(out, leaves, grad.flatten(2).to(dtype))])
        for name, a, b in zip(("output", "q", "k", "v"), *results):
            report(f"{name}, logits about {low}", ((b.double() - a).norm() / a.norm()).item(), 2e-2)


RACE = """
import contextlib, torch, ops
from unittest import mock
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint
ops.RACE_GRID = (2, 2, 3)
device, times, ran, flash = torch.device("cpu"), iter({times}), [], "FlashAttention 2"

def milliseconds(run, repeats):
    run()
    return next(times)

def recorded(name, real):
    return lambda *a, **k: ran.append((name, torch.is_grad_enabled())) or real(*a, **k)

for name in ("fused_attention", "unfused_attention"):
    setattr(ops, name, recorded(name, getattr(ops, name)))
patches = [
    mock.patch.object(ops.kernels, "milliseconds", milliseconds),
    mock.patch.object(ops, "sdpa_backend", lambda q, k, v: SDPBackend.{backend}),
    mock.patch.object(ops, "flash_attention", lambda device: flash),
    mock.patch("torch.cuda.device", lambda device: contextlib.nullcontext()),
    mock.patch("torch.cuda.get_device_capability", lambda: (9, 0)),
    mock.patch("torch.cuda.get_device_name", lambda device: "Some GPU"),
]
state = torch.get_rng_state()
with contextlib.ExitStack() as stack:
    for p in patches:
        stack.enter_context(p)
"""


def race(*times, backend="CUDNN_ATTENTION"):
    """The beginning of a script in which ops.race times these."""
    return RACE.format(times=times, backend=backend)


@pytest.mark.parametrize(
    "device, grid",
    [
        ("cpu", (5, 6, 20)),
        pytest.param("cuda", (31, 22, 40), marks=pytest.mark.gpu),  # TI2V-5B's clip, 27,280 tokens
        pytest.param("cuda", (21, 45, 80), marks=pytest.mark.gpu),  # A14B's at 1280x720, 75,600
    ],
)
def test_attention_of_a_whole_clip(device, grid, report):
    """Values and gradients of two heads of 128 in bf16; on a GPU ours and PyTorch's, whose backend is named. Only 64
    queries count, so that fp64 can say what is right.
    """
    g, L = torch.Generator().manual_seed(0), math.prod(grid)
    q, k, v = (torch.randn(1, L, 256, generator=g).bfloat16().to(device) for _ in "qkv")
    weights = [(1 + 0.1 * torch.randn(256, generator=g)).to(device) for _ in "qk"]
    grad, rows = torch.randn(1, 64, 256, generator=g).bfloat16().to(device), torch.randperm(L, generator=g)[:64]
    table, positions = rope_table(max(grid), 128, device), grid_positions(grid, device)

    leaves = [u.double().requires_grad_() for u in (q, k, v)]
    queries = leaves[0][:, rows.to(device)]
    (normed_q,) = qk_norm_rope_ref([queries], [weights[0].double()], 1e-6, 2, table, positions[rows.to(device)])
    (normed_k,) = qk_norm_rope_ref([leaves[1]], [weights[1].double()], 1e-6, 2, table, positions)
    logits = torch.einsum("bqnd,bknd->bnqk", normed_q, normed_k) / 128**0.5
    out = torch.einsum("bnqk,bknd->bqnd", logits.softmax(-1), leaves[2].unflatten(2, (2, 128))).flatten(2)
    want = [out.detach(), *torch.autograd.grad(out, leaves, grad.double())]

    contenders = {"PyTorch's": attention_backends.unfused_attention}
    if device == "cuda":
        heads = [u.unflatten(2, (2, 128)).transpose(1, 2) for u in (q, k, v)]
        contenders = attention_backends.contenders()
        contenders[f"PyTorch's by {attention_backends.sdpa_backend(*heads).name}"] = contenders.pop("PyTorch's")
    for name, attend in contenders.items():
        leaves = [u.clone().requires_grad_() for u in (q, k, v)]
        out = attend(*leaves, weights, 1e-6, 2, table, positions)[:, rows.to(device)]
        got = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
        for what, a, b in zip(("output", "q", "k", "v"), got, want):
            report(f"{name}, {what}", tiny.error(a, b), 3e-2)


def test_the_fastest_attention_is_found_once():
    """With gradients on, their pass is timed too; a run's random numbers stay what they were."""
    out = python(
        race(1.0, 2.0, 3.0, 4.0, 3.0, 2.0) + "    with torch.no_grad():\n"
        "        assert ops.race(device, torch.float32, 2, 12, False) == 'ours'\n"
        "        assert ops.race(device, torch.float32, 2, 12, False) == 'ours'\n"  # from memory
        "    raced = lambda x: x.sin() * (1 if ops.race(device, torch.float32, 2, 12, True) == ops.FLASH else 2)\n"
        "    x = torch.ones(3, requires_grad=True)\n"
        "    checkpoint(raced, x, use_reentrant=False).sum().backward()\n"  # which runs it again, not without end
        "    assert torch.equal(x.grad, torch.ones(3).cos())\n"
        "assert torch.equal(state, torch.get_rng_state())\n"
        "print(ran)",
        TRITON_INTERPRET="1",
    )
    names = "fused_attention", "unfused_attention", "unfused_attention"
    assert eval(out) == [(name, learns) for learns in (False, True) for name in names]


def test_a_winner_that_is_not_installed_any_more_is_raced_anew():
    python(
        race(3.0, 2.0, 1.0, 1.0, 2.0, 3.0) + "    flash = 'FlashAttention 3'\n"
        "    assert ops.race(device, torch.float32, 2, 12, False) == 'FlashAttention 3'\n"
        "    flash = 'FlashAttention 2'\n"
        "    assert ops.race(device, torch.float32, 2, 12, False) == 'ours'\n",
        TRITON_INTERPRET="1",
    )


def test_flash_attention_races_only_where_pytorchs_is_another():
    python(
        race(3.0, 2.0, backend="FLASH_ATTENTION")
        + '    assert ops.race(device, torch.float32, 2, 12, False) == "PyTorch\'s"\n'
        "assert [name for name, _ in ran] == ['fused_attention', 'unfused_attention']",
        TRITON_INTERPRET="1",
    )


@pytest.mark.parametrize(
    "installed, generations, known, works, version",
    [
        (True, [9, 9], ["FA3", "FA4"], True, 3),
        (False, [9], ["FA3"], True, 2),
        (True, [9, 8], ["FA3"], True, 2),
        (True, [9], [], True, 2),
        (True, [9], ["FA3"], False, 2),
    ],
)
def test_flash_attention_3_is_taken_where_it_works(installed, generations, known, works, version, monkeypatch, capsys):
    """On Hoppers, from the package that it comes in, where PyTorch knows it."""
    calls = []

    def activate(name):
        calls.append(name)
        if not works:
            raise ImportError("undefined symbol")

    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda n: installed and n == "flash_attn_interface")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(generations))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (generations[i], 0))
    implementations = torch.nn.attention
    monkeypatch.setattr(implementations, "list_flash_attention_impls", lambda: known, raising=False)
    monkeypatch.setattr(implementations, "activate_flash_attention_impl", activate, raising=False)
    monkeypatch.setattr(implementations, "restore_flash_attention_impl", lambda: calls.append("2"), raising=False)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, device, **how: zeros(*a, **how))
    assert attention_backends.flash_attention.__wrapped__("cuda") == f"FlashAttention {version}"
    assert calls == (["FA3"] if version == 3 else [] if works else ["FA3", "2"])
    assert ("does not work here (ImportError: undefined symbol)" in capsys.readouterr().err) == (not works)


@pytest.mark.parametrize("first", ["CUDNN_ATTENTION", "FLASH_ATTENTION"])
def test_each_contender_tries_its_own_backend_first(first):
    with FakeTensorMode(), mock.patch.object(ops, "sdpa_kernel", return_value=contextlib.nullcontext()) as kernel:
        q, weight = torch.empty(1, 6, 32, device="cuda"), torch.empty(32, device="cuda")
        table, positions = torch.empty(8, 16, 2, device="cuda"), torch.empty(6, 3, dtype=torch.int32, device="cuda")
        name = attention_backends.FLASH if first == "FLASH_ATTENTION" else "PyTorch's"
        with mock.patch.object(ops, "qk_norm_rope", lambda xs, *a: [x.unflatten(2, (2, 16)) for x in xs]):
            attend = attention_backends.contenders()[name]
            assert attend(q, q, q, [weight, weight], 1e-6, 2, table, positions).shape == q.shape
    backends = kernel.call_args[0][0]
    assert backends[0].name == first and set(backends) == set(attention_backends.BACKENDS)


def test_ranks_do_not_race(monkeypatch):
    """Each would find its own winner, and their halves of a clip would differ by more than rounding."""
    q = torch.empty(1, 4, 8)
    monkeypatch.setattr(ops.kernels, "INTERPRETED", True)
    assert attention_backends.fastest(q, 2) == "ours"
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert attention_backends.fastest(q, 2) == "PyTorch's"


def test_a_resumed_run_does_not_race_anew(monkeypatch):
    """Another winner would give other bits."""
    from nanowan.training.state import TrainState

    p = torch.nn.Parameter(torch.zeros(3))
    args = argparse.Namespace(grad_spike_factor=10, ema=0)
    monkeypatch.setattr(ops, "RACED", {"torch.bfloat16, 24 heads of 128, trained": "ours"})
    state = TrainState([p], adamw([p], 1e-3), args).state_dict() | {"step": 4}
    monkeypatch.setattr(ops, "RACED", {})
    TrainState([p], adamw([p], 1e-3), args).restore(state)
    assert attention_backends.RACED == {"torch.bfloat16, 24 heads of 128, trained": "ours"}


def test_three_lengths_compile_without_a_break():
    """torch.compile keeps what the race said as a constant, whatever the number of tokens."""
    python(
        race(1.0, 2.0, 3.0) + "    ops.race = torch.compiler.assume_constant_result(ops.race)\n"
        "    def model(x):\n"
        "        won = ops.race(x.device, x.dtype, 2, x.shape[2] // 2, torch.is_grad_enabled())\n"
        "        return x + 1 if won == 'ours' else x\n"
        "    compiled = torch.compile(model, fullgraph=True, backend='eager')\n"
        "    with torch.no_grad():\n"
        "        for L in (5, 7, 11, 17):\n"
        "            x = torch.zeros(1, L, 24)\n"
        "            assert torch.equal(compiled(x), x + 1)\n"
        "assert len(ran) == 3",
        TRITON_INTERPRET="1",
    )
