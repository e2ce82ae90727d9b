"""Which attention runs, PyTorch's (by which backend) or ours; and the gradients of masked attention."""

import contextlib
import math
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers import scripts
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend

from benchmarks import tiny
from kernels import attention_backends, ops
from kernels.qk_norm_rope import qk_norm_rope_ref
from kernels.rope import grid_positions, rope_table


@pytest.mark.parametrize("masked", [False, True])
def test_a_mask_never_goes_to_cudnn(masked):
    """On a GPU; without one cuDNN comes first."""
    with (
        FakeTensorMode(),
        mock.patch.object(attention_backends, "sdpa_kernel", return_value=contextlib.nullcontext()) as kernel,
    ):
        q, bias = torch.empty(2, 6, 3, 16, device="cuda"), torch.empty(2, 1, 1, 6, device="cuda")
        assert ops.attention(q, q, q, bias if masked else None).shape == (2, 6, 48)
    ((backends,), how) = kernel.call_args
    assert how == {"set_priority": True} and SDPBackend.MATH == backends[-1]
    assert (SDPBackend.CUDNN_ATTENTION in backends) == (not masked)
    assert masked or backends[0] == SDPBackend.CUDNN_ATTENTION


def test_every_attention_of_the_models_chooses_its_backend():
    """Nothing but attention_backends.sdpa calls PyTorch's."""
    from test_layout import SOURCES

    calls = [f.name for f in SOURCES if "F.scaled_dot_product_attention(" in f.read_text()]
    # the reference of ours, what chooses, and what asks which is fastest
    assert sorted(calls) == ["attention.py", "attention_backends.py", "gpu_probe.py"]


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


@pytest.mark.parametrize(
    "device, grid",
    [
        ("cpu", (5, 6, 20)),
        pytest.param("cuda", (31, 22, 40), marks=pytest.mark.gpu),  # TI2V-5B's clip, 27,280 tokens
        pytest.param("cuda", (21, 45, 80), marks=pytest.mark.gpu),  # A14B's at 1280x720, 75,600
    ],
)
def test_attention_of_a_whole_clip(device, grid, report, monkeypatch):
    """Values and gradients of two heads of 128 in bf16; on a GPU by each choice. Only 64
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

    def by(name):
        def attend(*inputs):
            monkeypatch.setattr(attention_backends, "SELECTED", name)
            return attention_backends.self_attention(*inputs)

        return attend

    candidates = {"PyTorch's": attention_backends.unfused_attention, "auto": by("auto")}
    if device == "cuda":
        candidates = {name: by(name) for name in ("cudnn", "flash", "triton")}
    for name, attend in candidates.items():
        leaves = [u.clone().requires_grad_() for u in (q, k, v)]
        out = attend(*leaves, weights, 1e-6, 2, table, positions)[:, rows.to(device)]
        got = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
        for what, a, b in zip(("output", "q", "k", "v"), got, want):
            report(f"{name}, {what}", tiny.error(a, b), 3e-2)


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

    monkeypatch.setattr(
        attention_backends.importlib.util, "find_spec", lambda n: installed and n == "flash_attn_interface"
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(generations))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (generations[i], 0))
    implementations = torch.nn.attention
    monkeypatch.setattr(implementations, "list_flash_attention_impls", lambda: known, raising=False)
    monkeypatch.setattr(implementations, "activate_flash_attention_impl", activate, raising=False)
    monkeypatch.setattr(implementations, "restore_flash_attention_impl", lambda: calls.append("2"), raising=False)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, device, **how: zeros(*a, **how))
    assert attention_backends.flash_attention_3.__wrapped__("cuda") == (version == 3)
    assert calls == (["FA3"] if version == 3 else [] if works else ["FA3", "2"])
    assert ("does not work here (ImportError: undefined symbol)" in capsys.readouterr().err) == (not works)


@pytest.mark.parametrize("name", ["cudnn", "flash"])
def test_a_choice_is_tried_first_and_others_after_it(name, monkeypatch):
    monkeypatch.setattr(attention_backends, "SELECTED", name)
    normed = lambda xs, *_: [x.unflatten(2, (2, 16)) for x in xs]  # noqa: E731
    monkeypatch.setattr(attention_backends.norm_kernel, "qk_norm_rope_ref", normed)
    with (
        FakeTensorMode(),
        mock.patch.object(attention_backends, "sdpa_kernel", return_value=contextlib.nullcontext()) as kernel,
    ):
        q, weight = torch.empty(1, 6, 32, device="cuda"), torch.empty(32, device="cuda")
        table, positions = torch.empty(8, 8, 2, device="cuda"), torch.empty(6, 3, dtype=torch.int32, device="cuda")
        attend = attention_backends.unfused_attention
        assert attend(q, q, q, [weight, weight], 1e-6, 2, table, positions).shape == q.shape
    backends = kernel.call_args[0][0]
    assert backends[0].name == f"{name.upper()}_ATTENTION" and set(backends) == set(attention_backends.CUDNN_FIRST)


@pytest.mark.parametrize(
    "capability, name",
    [((8, 0), "flash"), ((8, 9), "flash"), ((9, 0), "cudnn")] + [((10, 3), "cudnn"), ((12, 0), "flash")],
)
def test_each_generation_of_gpus_has_its_own_fastest(capability, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(attention_backends, "flash_attention_3", lambda device: False)
    assert attention_backends.by_capability.__wrapped__(torch.device("cuda", 0)) == name


class OnGPU(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = property(lambda self: True)


def sage(q, k, v, tensor_layout):
    """Stands for the package's function: attention of what 8 bits leave of q and k."""
    assert tensor_layout == "NHD" and q.dtype == torch.bfloat16
    q, k, v = (torch.Tensor(u.float()).transpose(1, 2) for u in (q, k, v))
    q, k = ((u / (s := u.abs().amax() / 127)).round() * s for u in (q, k))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).bfloat16()


@pytest.fixture
def selectable(monkeypatch):
    """A device of type "cuda" whose tensors are on the CPU, and the package sageattention."""
    monkeypatch.setitem(sys.modules, "sageattention", SimpleNamespace(sageattn=sage))
    monkeypatch.setattr(attention_backends.importlib.util, "find_spec", lambda name: name == "sageattention")
    monkeypatch.setattr(attention_backends, "SELECTED", "auto")
    monkeypatch.setattr(attention_backends, "SAGE_ERROR", None)
    real = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *a, **k: real(t, *[x for x in a if str(x) != "cuda"], **k))
    return monkeypatch


def test_sage_attention_says_how_far_it_is_off(selectable):
    attention_backends.select("sage", "cuda")
    assert 1e-4 < attention_backends.SAGE_ERROR < 0.05
    error = f"{100 * attention_backends.SAGE_ERROR:.2f} %"
    assert attention_backends.describe(torch.device("cuda")) == f"SageAttention, off by {error} on random inputs"


@pytest.mark.parametrize(
    "name, device, how, why",
    [
        ("sage", "cuda", dict(gradients=True), "SageAttention has no gradients"),
        ("sage", "cuda", dict(lacks="sageattention"), "sageattention is not installed"),
        ("sage", "cuda", dict(dtype=torch.float32), r"does not run here \(AssertionError"),
        ("flash", "cpu", {}, "on GPUs only; this is cpu"),
        ("triton", "cuda", {}, "Triton's operations are not used here"),
        ("fast", "cuda", {}, "choose from auto, cudnn, flash, triton, sage"),
    ],
)
def test_a_choice_that_cannot_be_had_is_refused_with_the_reason(name, device, how, why, selectable):
    """And what was chosen before stays."""
    if how.pop("lacks", None):
        selectable.setattr(attention_backends.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=why):
        attention_backends.select(name, device, **how)
    assert attention_backends.SELECTED == "auto"


def test_sage_attention_is_used_where_there_is_no_mask_and_nothing_learns(selectable):
    attention_backends.select("sage", "cuda")
    q = torch.randn(1, 6, 3, 16, dtype=torch.bfloat16).as_subclass(OnGPU)
    with torch.no_grad():
        assert torch.equal(ops.attention(q, q, q), sage(q, q, q, "NHD").flatten(2))
    with pytest.raises(ValueError, match="no gradients"):
        ops.attention(q.clone().requires_grad_(), q, q)
    with mock.patch.object(attention_backends, "sdpa_kernel", return_value=contextlib.nullcontext()) as kernel:
        ops.attention(q, q, q, torch.zeros(1, 1, 1, 6))
    assert kernel.call_args[0][0] == attention_backends.MASKED_BACKENDS


@pytest.mark.parametrize("script", ["sample.py", "train_lora.py", "train_te.py"])
def test_scripts_refuse_an_attention_in_a_line(script):
    done = scripts.run(script, "--device", "cpu", "--attention", "flash")
    assert done.returncode and done.stderr.count("\n") == 1
    assert "--attention flash: attention is chosen on GPUs only" in done.stderr
