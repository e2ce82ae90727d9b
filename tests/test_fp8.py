"""Frozen linears in 8 bits."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import lora
from benchmarks import tiny, tiny_animate, tiny_s2v
from diagnostics.delta import delta
from kernels import fp8, ops
from nanowan import memory_estimate
from nanowan.errors import BadInput
from nanowan.formats.dit import load_wan
from nanowan.formats.layouts import read_weights
from nanowan.formats.lora import merge_file, write_lora
from sample import load

X, T, CONTEXT = torch.randn(2, 48, 3, 4, 6), torch.tensor([300.0, 700.0]), torch.randn(2, 7, tiny.TEXT_DIM)


def relative(a, b):
    """How far a is from b."""
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8")
    tiny.write_dit(folder, tiny.dit("ti2v", dim=256))
    return folder


def test_weights_and_their_reported_error(folder):
    eight, whole = load_wan(folder, dtype=torch.float32, fp8=True), load_wan(folder, dtype=torch.float32)
    line = fp8.report(eight)
    for kind in lora.TARGETS:
        pairs = [(b.get_submodule(kind), w.get_submodule(kind).weight) for b, w in zip(eight.blocks, whole.blocks)]
        for m, w in pairs:
            step = m.weight.float().abs().clamp(min=2.0**-6) * 2.0**-4 * m.scales  # half of what e4m3's 3 bits resolve
            assert m.weight.dtype == torch.float8_e4m3fn
            assert ((m.weight.float() * m.scales - w).abs() <= 1.001 * step).all()
            assert (m.weight.float().abs().amax(1) == 448).all()  # each row uses all of the range
            assert torch.equal(m.norm, w.norm())
        error = sum((m.weight.float() * m.scales - w).square().sum() for m, w in pairs)
        error = error / sum(w.square().sum() for _, w in pairs)
        assert f"{kind} {100 * error.sqrt():.2f} %" in line
    assert relative(eight(X, T, CONTEXT), whole(X, T, CONTEXT)) < 5e-2


def test_a_wide_block_in_bf16(tmp_path, report):
    """Half the bytes of bf16 and an output that is close, at a width of 1024 in heads of 128."""
    tiny.write_dit(tmp_path, tiny.dit("ti2v", dim=1024, heads=8, layers=1).bfloat16())
    x, t, context = torch.randn(1, 48, 2, 8, 8), torch.tensor([500.0]), torch.randn(1, 20, tiny.TEXT_DIM)
    eight, sixteen = load_wan(tmp_path, fp8=True), load_wan(tmp_path)
    sizes = [sum(p.nbytes for p in [*m.blocks.parameters(), *m.blocks.buffers()]) for m in (eight, sixteen)]
    with torch.no_grad():
        report("8 bits against 16, relative error", relative(eight(x, t, context), sixteen(x, t, context)), 5e-2)
    assert sizes[0] <= 0.55 * sizes[1]


def test_gradients_pass_through_and_adapters_stay_whole(folder):
    eight = load_wan(folder, dtype=torch.float32, fp8=True)
    dense = load_wan(folder, dtype=torch.float32)
    for m, d in zip(eight.modules(), dense.modules()):
        if isinstance(m, fp8.Fp8Linear):
            d.weight.data = fp8.dense(m.weight, m.scales, torch.float32)
    found = []
    for model in (eight, dense):
        torch.manual_seed(0)
        params = lora.inject(model, rank=4)
        for p in params:
            torch.nn.init.normal_(p, std=0.1)
        y = model(X, T, CONTEXT)
        y.square().mean().backward()
        found.append([y, *(p.grad for p in params)])
    for a, b in zip(*found):
        assert torch.equal(a, b)


def test_loras_stay_beside(folder, tmp_path, report):
    for i in range(2):
        model = tiny.dit("ti2v", dim=256)
        torch.manual_seed(i)
        for p in lora.inject(model, rank=4 + i, blocks=[i, 2]):
            torch.nn.init.normal_(p, std=0.05)
        write_lora(tmp_path / f"{i}.safetensors", lora.adapter(model), scale=16 / (4 + i))
    eight, dense = load_wan(folder, dtype=torch.float32, fp8=True), load_wan(folder, dtype=torch.float32)
    for m, d in zip(eight.modules(), dense.modules()):
        if isinstance(m, fp8.Fp8Linear):
            d.weight.data = fp8.dense(m.weight, m.scales, torch.float32)
    before = eight(X, T, CONTEXT)
    for model in (eight, dense):
        merge_file(model, tmp_path / "0.safetensors", 0.7)
        merge_file(model, tmp_path / "1.safetensors")
    assert relative(before, dense(X, T, CONTEXT)) > 1e-2
    report("beside against merged", relative(eight(X, T, CONTEXT), dense(X, T, CONTEXT)), 2e-6)


@pytest.mark.parametrize(
    "names,shape",
    [
        ((".scale_weight", ".scale_input"), ()),
        ((".weight_scale", ".input_scale"), (1,)),
        ((".weight_scale", ".comfy_quant"), None),
    ],
)
def test_comfyui_files(folder, tmp_path, names, shape):
    """fp8_scaled files of both kinds, a scale per tensor or per channel."""
    tensors, want = {"scaled_fp8": torch.empty(2, dtype=fp8.E4M3)}, load_wan(folder, dtype=torch.float32)
    for name, w in want.state_dict().items():
        if name.startswith("blocks.1.") and name.endswith((".q.weight", "ffn.2.weight")):
            scale = w.abs().amax(1, keepdim=True) / 448 if shape is None else (w.abs().max() / 448).reshape(shape)
            tensors[name] = (w / scale).to(fp8.E4M3)
            base = name.removesuffix(".weight")
            tensors[base + names[0]] = scale
            tensors[base + names[1]] = (
                torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
                if "quant" in names[1]
                else torch.ones(())
            )
            want.get_submodule(base).weight.data = tensors[name].float() * scale
        else:
            tensors[name] = w.clone()
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(
        {f"model.diffusion_model.{k}" if k != "scaled_fp8" else k: v for k, v in tensors.items()},
        tmp_path / "model_fp8_scaled.safetensors",
    )
    got = load_wan(tmp_path, dtype=torch.float32)
    assert sum(isinstance(m, fp8.Fp8Linear) for m in got.modules()) == 3
    assert torch.equal(got(X, T, CONTEXT), want(X, T, CONTEXT)) and fp8.report(got) is None
    for name, m in got.named_modules():
        if isinstance(m, fp8.Fp8Linear):  # the norm that a cap on adapters is a share of
            assert torch.isclose(m.norm, want.get_submodule(name).weight.norm(), rtol=1e-5)
    assert load(tmp_path).fp8 and not load(folder).fp8  # and is planned as such
    model = tiny.dit("ti2v", dim=256)
    for p in lora.inject(model, ("cross_attn.q",), rank=2):
        p.data.normal_()
    (tmp_path / "lora").mkdir()
    write_lora(tmp_path / "lora" / "l.safetensors", lora.adapter(model), scale=8)
    save_file(want.state_dict(), tmp_path / "lora" / "dense.safetensors")
    (tmp_path / "lora" / "config.json").write_text((folder / "config.json").read_text())
    eight, dense = (
        [r["ratio"] for r in delta(tmp_path / "lora" / "l.safetensors", base)]
        for base in (tmp_path, tmp_path / "lora" / "dense.safetensors")
    )
    assert eight == dense


def test_rows_of_zeros_and_of_very_small_numbers(report):
    """A row of zeros stays one, and a row's precision does not depend on its size or on the other rows."""
    w = torch.randn(5, 64)
    linear = torch.nn.Linear(64, 5)
    linear.weight.data = w * torch.tensor([0.0, 1.0, 1e-9, 1e9, 1e-3])[:, None]
    eight = fp8.Fp8Linear(linear)
    eight.weight.data = eight.quantize(linear.weight.data)
    x = torch.randn(3, 64)
    y = eight(x) - eight.bias
    assert (y[:, 0] == 0).all() and torch.isfinite(eight.scales).all()
    for i, magnitude in ((1, 1.0), (2, 1e-9), (3, 1e9), (4, 1e-3)):
        restored = eight.weight[i].float() * eight.scales[i]
        report(f"weights of {magnitude:g}", relative(restored, w[i] * magnitude), 0.04)
    assert torch.isfinite(eight.norm) and torch.isfinite(eight.error)


def test_the_norm_of_several_tensors_is_that_of_all_their_elements():
    parts = torch.randn(7), torch.randn(50) * 10, torch.randn(3) * 0.1
    assert abs(fp8.total_norm(p.norm() for p in parts) / torch.cat(parts).norm().item() - 1) < 1e-6


def read(path):
    return read_weights([path])


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"a.weight_scale": torch.ones(3)}, r"a has scales \(3,\) in float32 and a weight \(5, 8\) in float8_e4m3fn"),
        ({"a.weight_scale": torch.ones(5, 2)}, r"a has scales \(5, 2\)"),
        ({"a.weight_scale": torch.ones(5, dtype=torch.uint8)}, "in uint8 and a weight"),
        ({"b.scale_weight": torch.ones(())}, r"b has scales \(\) in float32 and no such weight"),
        ({"b.weight": torch.ones(5, 8).to(torch.int8)}, "b.weight is in int8 and has no scale"),
        ({"a.weight_scale_2": torch.ones(())}, "weights in nvfp4"),
        ({"a.weight_global_scale": torch.ones(())}, "weights in nvfp4"),
    ],
)
def test_what_is_refused(tmp_path, tensors, message):
    save_file({"a.weight": torch.ones(5, 8).to(fp8.E4M3), **tensors}, tmp_path / "m.safetensors")
    with pytest.raises(BadInput, match=f"m.safetensors: .*{message}"):
        read(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    "layer, message",
    [
        ({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}, "ConvRot, which rotates them"),
        ({"format": "convrot_w4a4"}, "ConvRot"),
        ({"format": "mxfp8"}, "weights in mxfp8"),
        ({"format": "nvfp4"}, "weights in nvfp4"),
    ],
)
@pytest.mark.parametrize("inside", [True, False])
def test_formats_that_comfyui_names(tmp_path, layer, message, inside):
    """In a tensor beside the weight, or in the file's metadata."""
    tensors = {"a.weight": torch.ones(5, 8).to(torch.int8), "a.weight_scale": torch.ones(5, 1)}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": {"a": layer}})}
    if inside:
        tensors["a.comfy_quant"], metadata = torch.tensor(list(json.dumps(layer).encode()), dtype=torch.uint8), None
    save_file(tensors, tmp_path / "m.safetensors", metadata)
    with pytest.raises(BadInput, match=f"m.safetensors: .*{message}"):
        read(tmp_path / "m.safetensors")


def scaled(w, dtype, rows):
    """(8-bit weight, scale) of an fp32 weight."""
    most = 127 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = (w.abs().flatten(1).amax(1) if rows else w.abs().max()).div(most)
    q = w / scale.reshape(-1, *[1] * (w.dim() - 1))
    return (q.round() if dtype == torch.int8 else q).to(dtype), scale[:, None] if rows else scale


OUTSIDE = ("patch_embedding", "text_embedding.2", "time_embedding.0", "time_projection.1", "head.head")


@pytest.mark.parametrize(
    "dtype, rows, limit", [(fp8.E4M3, False, 0.1), (torch.float8_e5m2, True, 0.2), (torch.int8, True, 0.02)]
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_scales_outside_of_blocks_and_of_other_dtypes(folder, tmp_path, dtype, rows, limit, suffix, report):
    """The weights are the products, to the bit; what is in fp8 in blocks stays in 8 bits, all else becomes dense."""
    tensors, want = {}, load_wan(folder, dtype=torch.float32)
    true = want(X, T, CONTEXT)
    for name, w in want.state_dict().items():
        base = name.removesuffix(".weight")
        tensors[name] = w.clone()
        if base in OUTSIDE or name.endswith((".q.weight", "ffn.2.weight")):
            tensors[name], tensors[f"{base}.weight_scale"] = scaled(w, dtype, rows)
            by_row = tensors[f"{base}.weight_scale"].reshape(-1, *[1] * (w.dim() - 1))
            want.get_submodule(base).weight.data = tensors[name].float() * by_row
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    if suffix == ".pth":
        torch.save(tensors, tmp_path / "m.pth")
    else:
        save_file(tensors, tmp_path / "m.safetensors")
    got = load_wan(tmp_path / f"m{suffix}", dtype=torch.float32)
    eights = {n: m for n, m in got.named_modules() if isinstance(m, fp8.Fp8Linear)}
    assert len(eights) == (0 if dtype == torch.int8 else 3 * 3) and all(
        m.weight.dtype == dtype for m in eights.values()
    )
    state = got.state_dict() | {f"{n}.weight": m.weight.float() * m.scales for n, m in eights.items()}
    assert all(torch.equal(state[name], w) for name, w in want.state_dict().items())
    assert torch.equal(got(X, T, CONTEXT), want(X, T, CONTEXT))
    report("the format's own error", relative(want(X, T, CONTEXT), true), limit)
    rounded = load_wan(tmp_path / f"m{suffix}", dtype=torch.float32, fp8=True)
    if dtype == torch.int8:
        assert all(isinstance(m, fp8.Fp8Linear) for n, m in rounded.named_modules() if n.endswith("ffn.2"))
        assert relative(rounded(X, T, CONTEXT), want(X, T, CONTEXT)) < 0.05


@pytest.mark.parametrize(
    "variant, parts", [("s2v", ("audio_injector.", "cond_encoder")), ("animate", ("face_adapter.",))]
)
def test_scales_in_what_a_variant_adds(tmp_path, variant, parts):
    """S2V's injectors and Animate's face_adapter become dense: the products, to the bit."""
    model, helper = (tiny_s2v.dit(), tiny_s2v) if variant == "s2v" else (tiny_animate.animate(layers=5), tiny_animate)
    helper.write_dit(tmp_path / "official", model)
    tensors, products = {}, {}
    for file in (tmp_path / "official").glob("*.safetensors"):
        tensors |= load_file(file)
    for name in [n for n, w in tensors.items() if n.startswith(parts) and n.endswith(".weight") and w.dim() > 1]:
        tensors[name], scale = scaled(tensors[name], fp8.E4M3, False)
        tensors[name.removesuffix(".weight") + ".scale_weight"] = scale
        products[name] = tensors[name].float() * scale
    assert len(products) >= 3
    (tmp_path / "m").mkdir()
    save_file(tensors, tmp_path / "m" / "m.safetensors")
    (tmp_path / "m" / "config.json").write_text((tmp_path / "official" / "config.json").read_text())
    got = load_wan(tmp_path / "m", dtype=torch.float32).state_dict()
    assert all(torch.equal(got[name], products.get(name, w)) for name, w in model.state_dict().items())


@pytest.fixture
def gpus_product(monkeypatch):
    """A GPU's product of 8-bit matrices, by its definition; a list of what was rounded for it: (shape, whether its
    GELU).
    """

    def scaled_mm(rows, weight, scale_a, scale_b, bias, out_dtype, use_fast_accum):
        return ((rows.float() * scale_a) @ (weight.float() * scale_b) + bias.float()).to(out_dtype)

    def quantize_rows(x, activated=False, real=ops.quantize_rows):
        rounded.append((x.shape[1], activated))
        return real(x, activated)

    rounded = []
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(fp8, "has_fp8_matmul", lambda x, weight: weight.dtype == fp8.E4M3)
    monkeypatch.setattr(ops, "quantize_rows", quantize_rows)
    return rounded


@pytest.mark.parametrize("adapted", [(), ("self_attn.k", "ffn.2")])
def test_products_in_8_bits(tmp_path, gpus_product, adapted, report):
    """x is rounded once for q, k and v, and a GELU as it is computed, unless an adapter wants it too. Values and
    gradients are near those of dense weights.
    """
    tiny.write_dit(tmp_path, tiny.dit("ti2v", dim=256, layers=1))
    eight, dense = load_wan(tmp_path, dtype=torch.float32, fp8=True), load_wan(tmp_path, dtype=torch.float32)
    found, width = [], eight.blocks[0].ffn[0].out_features
    for model in (eight, dense):
        torch.manual_seed(0)
        if adapted:
            lora.inject(model, adapted, rank=4)
            for p in model.parameters():
                if p.requires_grad:
                    torch.nn.init.normal_(p, std=0.05)
        text = CONTEXT.clone().requires_grad_()
        y = model(X, T, text)
        found.append([y, *torch.autograd.grad(y.square().mean(), text)])
    qkv, others, down = (256, False), (256, False), (width, not adapted)
    assert gpus_product == [qkv, others, *[others] * 4, others, down]
    for name, limit, a, b in zip(("values", "gradient"), (0.05, 0.2), *found):
        report(name, relative(a, b), limit)


def test_a_gelus_gradient_in_8_bits(gpus_product, report):
    linear = fp8.Fp8Linear(torch.nn.Linear(64, 48))
    linear.weight.data = linear.quantize(torch.randn(48, 64))
    x = torch.randn(2, 9, 64, requires_grad=True)
    y = linear(x, activated=True)
    want = F.linear(F.gelu(x, approximate="tanh"), fp8.dense(linear.weight, linear.scales, x.dtype), linear.bias)
    dy = torch.randn(y.shape)
    (got,), (exact,) = (torch.autograd.grad(out, x, dy) for out in (y, want))
    report("gradient", relative(got, exact), 1e-6)
    report("value", relative(y, want), 0.05)
    assert gpus_product == [(64, True)]


def test_a_plan_asks_a_gpu_before_a_checkpoint_begins(monkeypatch):
    """PyTorch refuses a device that is initialized within one's forward pass."""
    began = []
    monkeypatch.setattr(torch.cuda, "init", lambda: began.append("init"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: began.append("asked") or (9, 0))
    with memory_estimate.pretending(True):
        linear = fp8.Fp8Linear(torch.nn.Linear(64, 96, dtype=torch.bfloat16))
        linear(torch.empty(1, 512, 64, dtype=torch.bfloat16))
    assert began == ["init", "asked"]


@pytest.mark.parametrize("activated", [False, True])
def test_a_gpus_product_is_planned(activated):
    """x in 8 bits with its scales, and what comes out: no second x in fp32, no GELU of it, and no dense weight."""
    with memory_estimate.pretending(True):
        linear = fp8.Fp8Linear(torch.nn.Linear(512, 96, dtype=torch.bfloat16))
        x = torch.empty(1, 1000, 512, dtype=torch.bfloat16)
        peak = memory_estimate.traced(lambda: linear(x, activated))
    assert 1000 * (512 + 4 + 2 * 96) <= peak < 1.01 * 1000 * (512 + 4 + 2 * 96)


class OnGPU(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = property(lambda self: True)


@pytest.mark.parametrize("works", [True, False])
def test_a_gpu_that_refuses_a_product_gets_dense_weights(works, monkeypatch, capsys):
    """Said once, in a line with the reason. Fewer than 512 rows are multiplied by dense weights anyway."""
    products = []

    def scaled_mm(rows, weight, scale_a, scale_b, bias=None, out_dtype=None, use_fast_accum=True):
        products.append(len(rows))
        if not works:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED\nmore")
        y = (rows.float() * scale_a) @ (weight.float() * scale_b)
        return (y if bias is None else y + bias).to(out_dtype)

    fp8.multiplies.cache_clear()
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(ops, "capable", lambda *a, **k: True)
    linear = fp8.Fp8Linear(torch.nn.Linear(64, 96, dtype=torch.bfloat16))
    linear.weight.data = linear.quantize(torch.randn(96, 64))
    for rows in (511, 512, 600):
        x = torch.randn(1, rows, 64, dtype=torch.bfloat16).as_subclass(OnGPU)
        want = F.linear(x, fp8.dense(linear.weight, linear.scales, x.dtype), linear.bias)
        assert relative(linear(x).float(), want.float()) < 0.05
    fp8.multiplies.cache_clear()
    assert products == ([512, 512, 600] if works else [512])  # the first is the trial
    said = capsys.readouterr().err.splitlines()
    assert len(said) == (not works)
    assert works or "CUBLAS_STATUS_NOT_SUPPORTED); weights are dequantised" in said[0]


@pytest.mark.parametrize("eight", [False, True])
def test_an_adapter_adds_the_same_where_nothing_learns(eight, folder, report):
    """In the place of what the base computed, and not to its input."""
    model = load_wan(folder, dtype=torch.float32, fp8=eight)
    for p in lora.inject(model, lora.TARGETS, rank=4):
        torch.nn.init.normal_(p, std=0.1)
    layer, x = model.blocks[0].self_attn.q, torch.randn(2, 7, 256)
    before, want = x.clone(), layer(x)
    assert want.requires_grad
    video = model(X, T, CONTEXT)
    with torch.no_grad():
        report("a linear", relative(layer(x), want), 1e-6)
        report("a model", relative(model(X, T, CONTEXT), video), 1e-6)
    assert torch.equal(x, before)
