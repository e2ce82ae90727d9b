"""What only a GPU can show. Deselected where there is none; `make gpu` runs these."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import kernel_checks

import kernels
from benchmarks import tiny
from kernels import backend, causal_conv3d
from nanowan.formats.dit import keep_fp32
from sample import generate, load

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 5e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("name", ["modulate", "qk_norm_rope"])
def test_triton_equals_the_reference(name, dtype, limit, report):
    report(f"{dtype}", getattr(kernel_checks, f"{name}_error")("cuda", dtype), limit)


def test_8_bit_adamw(report):
    report("ten steps", kernel_checks.adamw8bit_error("cuda"), 0.06)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_in_8_bits(dtype, report):
    """A value that rounding has put on the other side of a half may be a step off. An A100 has no e4m3."""
    if torch.cuda.get_device_capability() >= (8, 9):
        report("error", kernel_checks.quantize_error("cuda", dtype), 0.08)
        report("of a GELU, in half steps", kernel_checks.quantized_gelu_error("cuda", dtype)[0], 1.001)


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 5e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(
    "size", [dict(), dict(B=1, grid=(5, 9, 13), N=3, d=128, S=512), dict(B=2, grid=(1, 7, 11), N=2, d=128, S=33)]
)
def test_attention_equals_the_reference(size, dtype, limit, report):
    report(f"{dtype}", kernel_checks.attention_error("cuda", dtype, **size), limit)


@pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="compute-sanitizer comes with the CUDA toolkit")
def test_the_vaes_kernel_stays_inside_its_tensors():
    """On odd sizes, in fp32 and bf16, each tensor in memory of its own."""
    code = "import torch\nfrom helpers.kernel_checks import fill_buffer_error as error\n"
    code += "fill = torch.ops.nanowan_csrc.fill_buffer\n"
    code += (
        "for dtype in (torch.float32, torch.bfloat16): error(fill, 'cuda', dtype, 70), error(fill, 'cuda', dtype, 264)"
    )
    command = ["compute-sanitizer", "--kernel-name", "regex=fill_buffer", "--report-api-errors", "no"]
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    how = dict(capture_output=True, text=True, cwd=ROOT, env=env, timeout=240)
    run = subprocess.run([*command, "--error-exitcode", "9", sys.executable, "-c", code], **how)
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 3e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("kernel", ["CUDA", "Triton"])
def test_convolution_equals_the_reference(kernel, dtype, limit, report, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    fill = torch.ops.nanowan_csrc.fill_buffer if kernel == "CUDA" else causal_conv3d._fill_buffer
    if kernel == "CUDA" and not (kernels.BUILT and torch.ops.nanowan_csrc.has_cuda()):
        return
    convolve = functools.partial(causal_conv3d.causal_conv3d, fill_buffer=fill)
    report(f"{dtype}", kernel_checks.causal_conv3d_error(convolve, "cuda", dtype), limit)
    for C in (70, 96, 264):
        report(f"{C} channels", kernel_checks.fill_buffer_error(fill, "cuda", dtype, C), limit)


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_dit_with_fast_operations(dtype, limit, report):
    """Values, with gradients and without, and the gradient by the text of a DiT with heads of 128, against the
    reference operations on that GPU.
    """
    model, found = tiny.dit("ti2v", dim=256, heads=2).cuda(), []
    for name, p in model.named_parameters():
        p.data = p.data.to(torch.float32 if keep_fp32(name) else dtype)
    x, t, c = (
        torch.randn(2, 48, 3, 6, 10, device="cuda"),
        torch.rand(2, 3, device="cuda") * 1000,
        torch.randn(2, 40, tiny.TEXT_DIM, device="cuda"),
    )
    for choice in ("ref", "auto"):
        with backend.using(choice):
            text = c.clone().requires_grad_()
            y = model(x, t, text, torch.tensor([40, 7]))
            y.square().sum().backward()
            with torch.no_grad():
                found.append((y.detach(), model(x, t, c, torch.tensor([40, 7])), text.grad))
    for name, a, b in zip(("output", "without gradients", "gradient"), found[1], found[0]):
        report(name, tiny.error(a, b), limit)


def test_vae_on_the_gpu_equals_the_cpu(report):
    model, z, video = tiny.vae(True), torch.randn(1, 48, 3, 4, 6) * 0.5, torch.rand(1, 3, 9, 64, 96) * 2 - 1
    want, encoded = model.decode(z), model.encode(video)
    model.cuda()
    report("encode, TF32", tiny.error(model.encode(video.cuda()).cpu(), encoded), 1e-2)
    report("decode in bf16", tiny.error(model.decode_in(torch.bfloat16).decode(z.cuda()).cpu(), want), 0.1)


def test_nano_draws_the_same_clip_in_fp32(report, monkeypatch):
    """From the CPU's noise, so only rounding differs."""
    pytest.importorskip("ftfy")
    noise, found = torch.randn(48, 3, 4, 4), []
    monkeypatch.setattr("nanowan.variants.conditioning.draw_noise", lambda shape, seed, device: noise.to(device))
    for device in ("cpu", "cuda"):
        pipe = load("nano", device, torch.float32)
        found.append(generate(pipe, "a red square moves left", progress=False)[1].cpu())
    report("latents", tiny.error(found[1], found[0]), 1e-2)


def test_what_is_drawn_here_is_graded():
    pytest.importorskip("ftfy")
    from nano.evaluate import sample_and_grade

    grades, clips = sample_and_grade(load("nano", "cuda"), [{"prompt": "a red square moves left"}])
    assert clips.device.type == "cpu" and (grades[0]["color"], grades[0]["shape"]) == ("red", "square")


@pytest.mark.parametrize(
    "flags",
    [
        ["sample.py", "--compile"],
        ["sample.py", "--cuda_graphs"],
        ["sample.py", "--cuda_graphs", "--guidance", "1"],
        ["sample.py", "--reuse", "0.1", "--vae_tile", "2"],
        ["train_lora.py", "--steps", "4", "--checkpointing"],
        ["train_te.py", "--steps", "4", "--optimizer", "adamw8bit"],
    ],
)
def test_scripts_run_in_bf16(flags, tmp_path):
    """They finish, and say what memory they planned and used."""
    pytest.importorskip("av")
    pytest.importorskip("ftfy")
    out = ["--out", tmp_path / ("s.mp4" if flags[0] == "sample.py" else "run")]
    run = subprocess.run(
        [sys.executable, ROOT / flags[0], *flags[1:], "--device", "cuda", "--dtype", "bf16", *out],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "planned" in run.stdout


def test_an_expert_comes_back_to_its_moments_and_averages(checkpoints, media, tmp_path):
    """An A14B's experts leave the GPU for each other; their adapters, and all that is kept about them, stay."""
    pytest.importorskip("ftfy")
    for flags in (["--steps", "3"], ["--steps", "6", "--resume"]):
        run = subprocess.run(
            [
                sys.executable,
                ROOT / "train_lora.py",
                "--ckpt",
                checkpoints["t2v"],
                "--data",
                media,
                "--cache",
                tmp_path / "cache",
                "--out",
                tmp_path / "run",
                "--resolution",
                "64x64",
                "--frames",
                "9",
                "--batch",
                "2",
                "--steps_per_expert",
                "1",
                "--ema",
                "0.5",
                "--device",
                "cuda",
                *flags,
            ],
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr[-2000:]


def test_8_bit_products(report):
    """The GPU's own fp8 matrix product, where it has one, against the weight made dense; and the gradient."""
    from kernels import fp8

    linear = torch.nn.Linear(512, 1024, dtype=torch.bfloat16, device="cuda")
    eight = fp8.Fp8Linear(linear)
    eight.weight.data = eight.quantize(linear.weight.data)
    x = torch.randn(3, 400, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    want = torch.nn.functional.linear(x, fp8.dense(eight.weight, eight.scales, x.dtype), linear.bias)
    (gradient,) = torch.autograd.grad(want.square().sum(), x)
    y = eight(x)
    report("product", tiny.error(y, want), 5e-2)
    report("gradient", tiny.error(torch.autograd.grad(y.square().sum(), x)[0], gradient), 5e-2)


@pytest.mark.parametrize("can_pin", [True, False])
def test_streaming_equals_resident_weights(can_pin, monkeypatch):
    """The same bits, with copies on their own stream, pinned or through a thread; the device holds two blocks of
    twelve.
    """
    import lora
    from nanowan.memory.host import Copier, HostPages
    from nanowan.memory.placement import Placement

    monkeypatch.setattr(HostPages, "can_pin", can_pin)
    x, t, context = (
        torch.randn(1, 48, 3, 16, 16, device="cuda"),
        torch.tensor([500.0], device="cuda"),
        torch.randn(1, 7, tiny.TEXT_DIM, device="cuda"),
    )
    found = []
    for streamed in (0, 12):
        torch.manual_seed(0)
        model = tiny.dit("ti2v", dim=512, heads=4, layers=12)
        params = lora.inject(model, rank=4, device="cuda")
        part = Placement(model, Copier("cuda"), streamed).start()
        for _ in range(3):
            y = model(x, t, context)
            grads = torch.autograd.grad(y.square().mean(), params)
        with torch.no_grad():
            found.append([y, *grads, model(x, t, context)])
    assert all(torch.equal(a, b) for a, b in zip(*found)) and part.stream.waited() >= 0
    assert part.stream.ring_bytes() < 0.2 * sum(f.nbytes for f in part.streamed.values())
    assert all(f.home.is_pinned() == can_pin for f in part.streamed.values())


def stream_every_way():
    """Trains and samples with all blocks streamed, at two sizes, gives a graph up halfway, moves the model, and lets it
    go, but not what it has on the host: that is returned.
    """
    import lora
    from nanowan.memory.host import Copier
    from nanowan.memory.placement import Placement

    model = tiny.dit("ti2v", dim=512, heads=4, layers=12)
    params = lora.inject(model, rank=4, device="cuda")
    part = Placement(model, Copier("cuda"), 12).start()
    t, context = torch.tensor([500.0], device="cuda"), torch.randn(1, 7, tiny.TEXT_DIM, device="cuda")
    for side, wanted in ((16, params), (16, params[-4:]), (24, params)):
        x = torch.randn(1, 48, 3, side, side, device="cuda")
        torch.autograd.grad(model(x, t, context).square().mean(), wanted)
    for device in ("cpu", "cuda", "cpu", "cuda"):
        part.to(device)
        if device == "cuda":
            with torch.no_grad():
                model(x, t, context)
    return [flat.home for flat in part.flats(whole=True)]


# where nothing can be pinned, with the thread's work done at once, since races.py follows one thread
UNPINNED = """
from concurrent.futures import Future
class Inline:
    def __init__(self, *args):
        pass
    def submit(self, f, *args):
        done = Future()
        done.set_result(f(*args))
        return done
host.HostPages.can_pin, host.RING_SLOT, host.concurrent.futures.ThreadPoolExecutor = False, 1 << 21, Inline
"""
WAITS = [None, "host.Copier.synchronize", "host.Copier.wait", "torch.cuda.Stream.wait_event"]


@pytest.mark.parametrize(
    "left_out, can_pin",
    [*((w, True) for w in WAITS), *((w, False) for w in (None, *WAITS[2:], "torch.cuda.Event.synchronize"))],
)
def test_streams_wait_for_each_other(left_out, can_pin):
    """No memory is in use on two streams, or on one and the host, that do not wait for each other; and where one of the
    waits is left out, that is found.
    """
    code = "import sys, test_gpu, torch\nfrom helpers import races\nfrom nanowan.memory import host\n"
    code += ("" if can_pin else UNPINNED) + (f"{left_out} = lambda *args: None\n" if left_out else "")
    code += "sys.exit(9 if races.watch(test_gpu.stream_every_way) else 0)"
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert run.returncode == (9 if left_out else 0), run.stderr[-3000:]


@pytest.mark.parametrize("script", ["sample.py", "train_lora.py"])
def test_streams_of_scripts_wait_for_each_other(script, checkpoints, media, tmp_path):
    pytest.importorskip("ftfy")
    flags = ["--ckpt", checkpoints["t2v"], "--device", "cuda", "--stream_blocks", "2", "--frames", "9", "--steps", "4"]
    flags += {
        "sample.py": ["--prompt", "a red square", "--size", "64x64", "--out", tmp_path / "s.mp4"],
        "train_lora.py": ["--data", media, "--cache", tmp_path / "cache", "--resolution", "64x64", "--out", tmp_path],
    }[script]
    command = [sys.executable, ROOT / "tests" / "helpers" / "races.py", ROOT / script, *flags]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
