"""The fused operations against their definitions: C++, and Triton in its interpreter and compiled for GPUs."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import kernel_checks
from helpers.kernel_checks import max_rel_error
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
import lora
from benchmarks import tiny
from kernels import backend, linear, ops, rope
from kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_ref

ROOT = Path(__file__).parent.parent
KERNELS = ("modulate", "qk_norm_rope", "attention")
SIZES = {
    "modulate": [dict(B=2, F=3, tokens=3, D=192), dict(B=1, F=1, tokens=5, D=48), dict(B=2, F=2, tokens=1, D=130)],
    "qk_norm_rope": [
        dict(B=2, grid=(3, 2, 3), heads=3, d=28),
        dict(B=1, grid=(1, 1, 1), heads=1, d=128),
        dict(B=1, grid=(2, 5, 3), heads=2, d=64),
    ],
    "attention": [
        dict(B=2, grid=(3, 5, 3), N=2, d=32, S=37),
        dict(B=1, grid=(1, 3, 1), N=3, d=24, S=1),
        dict(B=1, grid=(2, 4, 5), N=1, d=128, S=70),
    ],
}
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 2e-2}  # bf16: a few of its half-ulps, 2e-3 each


def python(code, **env):
    """What a fresh Python prints."""
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"} | env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


def test_the_extension_is_built():
    """`make` builds it wherever there is a compiler; the tests below would be empty without."""
    assert kernels.BUILT and backend.resolve("auto", "cpu") == "cpp"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["modulate", "qk_norm_rope", "gelu", "linear"])
def test_cpp_equals_the_reference(name, dtype, report, threads):
    """Values and gradients, odd sizes, strided inputs."""
    error = getattr(kernel_checks, f"{name}_error")
    for i, size in enumerate(SIZES.get(name, [{}])):
        report(f"size {i}, {dtype}", error("cpu", dtype, **size), LIMITS[dtype])


@pytest.mark.parametrize("name", KERNELS)
def test_triton_equals_the_reference(name, report):
    """The same of the Triton kernels, in its interpreter, in bf16 at one size only, where a second run gives the same
    bits.
    """
    out = python(
        f"import torch, kernels\nfrom helpers.kernel_checks import {name}_error\n"
        "assert kernels.INTERPRETED\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        f"    for size in {SIZES[name]!r}[: 3 if dtype == torch.float32 else 1]:\n"
        f"        error = {name}_error('cpu', dtype, **size)\n"
        f"        assert dtype != torch.bfloat16 or error == {name}_error('cpu', dtype, **size)\n"
        "        print(dtype, error)",
        TRITON_INTERPRET="1",
    )
    lines = out.split("\n")[:-1]
    assert len(lines) == 4
    for i, line in enumerate(lines):
        dtype, error = line.split()
        report(f"size {i % 3}, {dtype}", float(error), LIMITS[getattr(torch, dtype.removeprefix("torch."))])


def test_triton_rounds_rows_as_torch_does(report):
    """To e4m3, on every step and between two, the same bits."""
    out = python(
        "import torch, kernels.quantize as k\nfrom helpers.kernel_checks import quantize_error, quantized_gelu_error\n"
        "print([quantize_error('cpu', dtype) for dtype in (torch.float32, torch.bfloat16)])\n"
        "print(*(quantized_gelu_error('cpu', dtype) for dtype in (torch.float32, torch.bfloat16)), sep='\\n')\n"
        "for activated in (False, True): torch.library.opcheck(k._forward, (torch.randn(3, 5), activated))",
        TRITON_INTERPRET="1",
    )
    rounded, *activated = map(ast.literal_eval, out.splitlines())
    assert rounded == [0.0, 0.0]
    for dtype, (steps, scales) in zip(("fp32", "bf16"), activated):  # its GELU: within what e4m3 rounds away
        report(f"half steps, {dtype}", steps, 1.001)
        report(f"scales, {dtype}", scales, 1e-6)


@pytest.mark.parametrize("name", [*KERNELS, "gelu"])
def test_torch_checks_the_operator(name):
    """Schema, fake tensors and autograd registration, by PyTorch's own opcheck."""
    calls = {
        "modulate": lambda k: (
            torch.randn(2, 6, 8).requires_grad_(),
            torch.randn(2, 6, 8),
            torch.randn(2, 3, 8),
            torch.randn(2, 3, 8),
            torch.randn(2, 3, 8),
            torch.tensor([2, 0, 0, 1, 2, 1], dtype=torch.int32),
            1e-6,
            torch.float32,
        ),
        "qk_norm_rope": lambda k: (
            [torch.randn(2, 6, 8).requires_grad_(), torch.randn(2, 6, 8)],
            [torch.ones(8), torch.ones(8)],
            1e-6,
            2,
            torch.randn(3, 2, 2),
            torch.randint(-2, 3, (6, 3), dtype=torch.int32),
        ),
        "gelu": lambda k: (torch.randn(5, 7).requires_grad_(),),
    }
    if name == "attention":  # has no CPU kernel of its own: in the interpreter
        python(
            "import torch, kernels.attention as k\n"
            "q, k_, v = torch.randn(3, 1, 4, 2, 16).unbind(0)\n"
            "torch.library.opcheck(k._forward, (q.requires_grad_(), k_, v, torch.ones(32), 1e-6, None, None))",
            TRITON_INTERPRET="1",
        )
        return
    kernel = importlib.import_module(f"kernels.{name}")
    torch.library.opcheck(kernel._forward, calls[name](None))
    if name == "gelu":
        torch.library.opcheck(kernel._forward_, (torch.randn(5, 7),))


def complex_rotation(x, positions):
    """x (B,L,N,d) in fp64 turned by exp(i p w) for each pair, p a token's time, height or width: no table, no signs."""
    pairs = x.shape[3] // 2
    third = pairs // 3
    angle = torch.zeros(len(x[0]), pairs, dtype=torch.float64)
    for axis, (begin, n) in enumerate(((0, pairs - 2 * third), (pairs - 2 * third, third), (pairs - third, third))):
        for j in range(n):
            angle[:, begin + j] = positions[:, axis] / 10000 ** (j / n)
    turned = torch.view_as_complex(x.unflatten(3, (-1, 2)).contiguous()) * torch.exp(1j * angle)[:, None]
    return torch.view_as_real(turned).flatten(3)


@pytest.mark.parametrize("d", [16, 28, 128])
@pytest.mark.parametrize("kind", ["grid", "shuffled", "repeated", "negative"])
def test_rotation_equals_complex_numbers(kind, d, report):
    """The reference in fp64, and C++ in fp32, at the positions of a grid, of a grid in another order, of tokens that
    stand at the same place, and of tokens before the first frame.
    """
    g = torch.Generator().manual_seed(d)
    positions = rope.grid_positions((4, 3, 5), "cpu")
    if kind == "shuffled":
        positions = positions[torch.randperm(60, generator=g)]
    elif kind == "repeated":
        positions = positions[torch.randint(60, (60,), generator=g)]
    elif kind == "negative":
        positions = positions - torch.tensor([19, 0, 2], dtype=torch.int32)
    x = torch.randn(2, 60, 3, d, dtype=torch.float64, generator=g)
    want, ones = complex_rotation(x, positions.double()), [torch.ones(3 * d)]
    table = rope.rope_table(int(positions.abs().max()) + 1, d, "cpu")
    # the table is fp32: cosine and sine are each off by up to 6e-8
    report("reference, fp64", max_rel_error(rope.rotate(x, table.double(), positions), want), 2e-7)
    norm = x.flatten(2).square().mean(2).sqrt()[..., None, None]
    for name, op in (("reference", qk_norm_rope_ref), ("C++", qk_norm_rope)):
        (got,) = op([x.flatten(2).float()], ones, 0.0, 3, table, positions)
        report(f"{name}, fp32", max_rel_error(got * norm, want), 1e-6)


def test_positions_outside_of_the_table_are_named():
    x, w, table = [torch.randn(1, 2, 12)], [torch.ones(12)], rope.rope_table(5, 12, "cpu")
    with pytest.raises(RuntimeError, match="position 5 is outside of a table of 5"):
        qk_norm_rope(x, w, 1e-6, 1, table, torch.tensor([[0, 4, 1], [0, 0, -5]]))
    with pytest.raises(RuntimeError, match=r"positions int32 \(2,3\) are needed"):
        qk_norm_rope(x, w, 1e-6, 1, table, torch.tensor([[0, 4, 1]]))
    with pytest.raises(ValueError, match="1025 token positions"):
        rope.rope_table(1025, 12, "cpu")


@pytest.mark.parametrize("prefers", [True, False])
def test_which_products_onednn_makes(prefers, monkeypatch):
    """Large ones in fp32 on AMD's CPUs and no others; what it makes is the same product, in values and gradients."""
    monkeypatch.setattr(linear, "PREFERS_ONEDNN", prefers)
    x, weight = torch.randn(80, 520), torch.randn(512, 520)
    assert linear.uses_onednn(x, weight) == linear.uses_onednn(x[:8], weight) == prefers
    assert not linear.uses_onednn(x[:7], weight) and not linear.uses_onednn(x, weight[:511])
    assert not linear.uses_onednn(x.bfloat16(), weight.bfloat16())
    assert not linear.uses_onednn(x, torch.randn(520, 512).t())
    assert kernel_checks.linear_error("cpu", torch.float32) < 2e-6
    for u in (x, x.to("meta")):
        y = linear.linear(u, weight.to(u.device).requires_grad_(False), None)
        assert y.shape == (80, 512) and y.dtype == torch.float32


@pytest.mark.parametrize("choice, dim", [("cpp", 512), ("triton", 64)])
def test_a_model_with_fast_operations_equals_the_reference(choice, dim, report):
    """Outputs and gradients of an input and a whole block's weights, fp32, with t per latent frame."""
    code = (
        "import torch\nfrom benchmarks import tiny\nfrom kernels import backend\n"
        f"model, g = tiny.dit('ti2v', dim={dim}, heads=2, layers=2), torch.Generator().manual_seed(0)\n"
        "x, t = torch.randn(2, 48, 3, 8, 6, generator=g), torch.rand(2, 3, generator=g) * 1000\n"
        "c = torch.randn(2, 9, tiny.TEXT_DIM, generator=g)\n"
        "found, trained = [], list(model.blocks[1].requires_grad_(True).parameters())\n"
        f"for choice in ('ref', {choice!r}):\n"
        "    with backend.using(choice):\n"
        "        a = x.clone().requires_grad_()\n"
        "        y = model(a, t, c, torch.tensor([9, 4]))\n"
        "        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), [a, *trained])])\n"
        "print(max(tiny.error(b, a) for a, b in zip(*found)))"
    )
    report("relative error", float(python(code, TRITON_INTERPRET="1" if choice == "triton" else "0")), 5e-6)


@pytest.mark.parametrize(
    "choice, why", [("cuda", "no CUDA device"), ("triton", "TRITON_INTERPRET"), ("fast", "choose from auto")]
)
def test_a_choice_that_cannot_be_had_says_why(choice, why):
    run = subprocess.run(
        [sys.executable, "-c", "import kernels.ops"],
        cwd=ROOT,
        env=os.environ | {"NANOWAN_OPS": choice, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode and why in run.stderr.splitlines()[-1], run.stderr[-500:]


@pytest.mark.parametrize("choice", ["auto", "triton"])
def test_triton_without_a_compiler_is_not_chosen(choice, tmp_path):
    """It is installed everywhere, and compiles C when it first launches a kernel: on a machine with a GPU and without a
    compiler, PyTorch's operations are used, and a line says why and what helps.
    """
    code = "import torch\ntorch.cuda.is_available = lambda: True\n"
    code += "from kernels import backend\nprint(backend.implementation('cuda'), backend.implementation('cuda'))"
    paths = {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path), "TRITON_LIBCUDA_PATH": str(tmp_path)}
    env = paths | {"PATH": "", "HOME": str(tmp_path), "NANOWAN_OPS": choice}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    said = run.stderr.splitlines()[-1]
    assert "C compiler" in said and "apt install gcc python3-dev" in said
    if choice == "auto":
        assert run.stdout.split() == ["ref", "ref"] and run.stderr.count("\n") == 1
    else:
        assert run.returncode and said.startswith("ImportError: NANOWAN_OPS=triton: ")


COMPILE = """
import json, sys, torch, triton, kernels.adamw8bit as W, kernels.attention as A, kernels.causal_conv3d as C
import kernels.modulate as M, kernels.qk_norm_rope as Q, kernels.quantize as E
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHS, ELEMENTWISE = (80, 86, 89, 90, 100, 120), (80, 90, 120)
half, full, index = "*bf16", "*fp32", "*i32"
FLOATS = "eps scale lr keep b1 b2 correction1 correction2 ratio".split()
STRIDES = "gate_b gate_f weight_b weight_f shift_b shift_f row row0 row1 q_b q_l k_b k_l v_b v_l stride".split()
def all_of(names, kind):
    return dict.fromkeys(names.split(), kind)

def build(name, fn, num_warps=4, num_stages=3, types={}, archs=ELEMENTWISE, **const):
    kinds = {n: "constexpr" if n in const else types.get(n, "fp32" if n in FLOATS else "i32") for n in fn.arg_names}
    # what a launch sees of its arguments: addresses and strides are multiples of 16
    even = [i for i, n in enumerate(fn.arg_names) if kinds[n].startswith("*") or n in STRIDES and n not in const]
    source = ASTSource(fn, kinds, constexprs=const, attrs={(i,): [["tt.divisibility", 16]] for i in even})
    for arch in archs:
        done = triton.compile(source, GPUTarget("cuda", arch, 32), {"num_warps": num_warps, "num_stages": num_stages})
        open(f"{sys.argv[1]}/{name}_{arch}.cubin", "wb").write(done.asm["cubin"])
        open(f"{sys.argv[1]}/{name}_{arch}.json", "w").write(json.dumps({"shared": done.metadata.shared}))

for D in (3072, 5120):
    types = all_of("x gate weight shift new dnew dx sums", full) | all_of("y out dout dy", half) | {"index": index}
    how = dict(types=types, D=D, ADD=True, GATE=True, NORM=True, **M.launch_config(D))
    for name, given in {"": dict(INDEX=False, index=None), "_index": dict(INDEX=True)}.items():
        build(f"modulate{name}_{D}", M.forward_kernel, **how, **given)
        build(f"modulate_backward{name}_{D}", M.backward_kernel, **how, **given, SUMS=False, y=None, sums=None)
        build(f"modulate_sums{name}_{D}", M.backward_kernel, **how, **given, SUMS=True)
    types = all_of("x0 x1 out0 out1 dout0 dout1 dx0 dx1", half) | all_of("w0 w1 table dw", full) | {"positions": index}
    how = dict(types=types, D=D, HALF=64, ROPE=True, **Q.launch_config(D))
    build(f"norm_{D}", Q.forward_kernel, **how)
    build(f"norm_backward_{D}", Q.backward_kernel, **how, WEIGHTS=False, dw=None)
types = all_of("q k v out dout dk dv dq", half) | all_of("lse rstd weight table delta", full) | {"positions": index}
how = dict(types=types, archs=ARCHS)
build("attention", A.forward_kernel, **how, NORM=True, ROPE=True, **A.tiles(128, torch.bfloat16, "forward"))
build("attention_keys", A.keys_kernel, **how, **A.tiles(128, torch.bfloat16, "keys"))
build("attention_queries", A.queries_kernel, **how, **A.tiles(128, torch.bfloat16, "queries"))
for width, kind in ((96, half), (160, full), (1024, half)):
    types = all_of("x past bias gamma buffer last out residual", kind)
    how = dict(types=types, C=width, BIAS=True, **C.launch_config(width))
    build(f"fill_{width}", C.fill_kernel, **how, PAST=True, NORM=True)
    build(f"add_{width}", C.add_kernel, **how)
types = {"x": half, "out": "*fp8e4nv", "scales": full}
for M, activated in ((3072, False), (5120, False), (13824, True), (14336, True)):  # before Ada there is no e4m3
    build(f"quantize_{M}", E.quantize_kernel, types=types, archs=(89, 120), ACTIVATED=activated, **E.launch_config(M))
for name, kind in {"": half, "_fp32": full}.items():
    types = all_of("weight compensation grad", kind) | {"codes": "*i16", "scales": full}
    how = dict(BLOCK=W.BLOCK, LEVELS=W.ROOT_LEVELS, SHARES=W.RATIO_LEVELS, OCTAVES=W.OCTAVES, COMPENSATED=not name)
    build(f"adamw8bit{name}", W.step_kernel, types=types, **how)
"""
SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # what a program may have of a card's shared memory
# bytes of a thread that may be put aside: only where gradients of A14B's modulation are summed up, which nothing trains
SPILLS = {f"modulate_sums{kind}_5120_{arch}": 176 for kind in ("", "_index") for arch in SHARED_KB}


def test_triton_kernels_compile_for_gpus_within_their_memory(tmp_path, report):
    """For A100, RTX 30, 40 and 50 series, Hopper and Blackwell, at the widths of 5B and A14B, with the hints that
    launches have; needs no GPU. Shared memory is what the cards have, and registers hold everything.
    """
    tool = Path(importlib.import_module("triton").__file__).parent / "backends/nvidia/bin/cuobjdump"
    (tmp_path / "compile.py").write_text(COMPILE)
    run = subprocess.run(
        [sys.executable, tmp_path / "compile.py", tmp_path],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    cubins, spilled, most = sorted(tmp_path.glob("*.cubin")), {}, {}
    for file in cubins:
        usage = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
        stack, local = (int(re.search(rf"{w}:(\d+)", usage).group(1)) for w in ("STACK", "LOCAL"))
        arch = int(file.stem.rpartition("_")[2])
        most[arch] = max(most.get(arch, 0), json.loads(file.with_suffix(".json").read_text())["shared"] / 1024)
        if local or stack > SPILLS.get(file.stem, 0):
            spilled[file.stem] = (stack, local)
    assert not spilled
    for arch, limit in SHARED_KB.items():
        report(f"KB of shared memory, sm_{arch}", most[arch], limit)


@pytest.mark.parametrize("choice", ["ref", "cpp"])
def test_a_gelu_keeps_its_input_only_where_gradients_are(choice):
    """Else the largest tensor of a step would be there twice."""
    x = torch.randn(5, 7)
    with backend.using(choice):
        want = ops.GELU()(x)
        assert torch.equal(ops.GELU()(x), want) and not torch.equal(x, want)
        with torch.no_grad():
            assert ops.GELU()(x) is x and torch.equal(x, want)


@pytest.mark.parametrize(
    "dtype, gradients, adapted, capability, fused",
    [
        (torch.bfloat16, False, False, (9, 0), True),
        (torch.bfloat16, False, False, (10, 3), True),
        (torch.bfloat16, False, False, (8, 9), False),  # measured to be slower there
        (torch.bfloat16, False, False, (12, 0), False),
        (torch.float32, False, False, (9, 0), False),  # equal to the definition to fp32's rounding
        (torch.bfloat16, True, False, (9, 0), False),  # a backward pass needs what goes into the GELU
        (torch.bfloat16, False, True, (9, 0), False),  # an adapter is added in between
    ],
)
def test_where_a_gpu_computes_a_gelu_with_the_product(
    dtype, gradients, adapted, capability, fused, report, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    model = tiny.dit("ti2v").to(dtype)
    ffn, x = model.blocks[0].ffn, torch.randn(2, 5, model.config.dim, dtype=dtype)
    up, _, down = ffn
    if adapted:
        lora.inject(model, ("ffn.0",), rank=4, blocks=[0])
    want = F.linear(F.gelu(F.linear(x, up.weight, up.bias), approximate="tanh"), down.weight, down.bias)
    with backend.using("triton", pretend=True), torch.set_grad_enabled(gradients), Calls() as calls:
        report("feed-forward", tiny.error(ffn(x), want), 2e-2 if dtype == torch.bfloat16 else 2e-6)
    assert calls.names.count("aten._addmm_activation.default") == fused


class Calls(TorchDispatchMode):
    """The names of the operations within."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **kwargs or {})


def test_a_feed_forward_compiles_without_a_break(monkeypatch):
    """At three lengths, with the GELU in the product."""
    monkeypatch.setattr(ops, "capable", torch.compiler.assume_constant_result(ops.capable))
    ffn = tiny.dit("ti2v").blocks[0].ffn.bfloat16()
    compiled = torch.compile(ffn, fullgraph=True, backend="aot_eager")
    with backend.using("triton", pretend=True), torch.no_grad():
        for L in (5, 7, 11):
            x = torch.randn(1, L, ffn[0].in_features, dtype=torch.bfloat16)
            with Calls() as calls:
                want = ffn(x)
            assert "aten._addmm_activation.default" in calls.names
            assert torch.equal(compiled(x), want)
