"""csrc/causal_conv3d: on the CPU against its definition, in torch.compile, and its CUDA source run without a GPU."""

import contextlib
import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers.kernel_checks import causal_conv3d_error, fill_buffer_error, max_rel_error
from test_kernels import python

from kernels import causal_conv3d as conv
from kernels import ops

CSRC = Path(__file__).parent.parent / "csrc"
EMULATION = Path(__file__).parent / "fake_cuda"


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 3e-6), (torch.bfloat16, 1e-2)])
def test_cpu_equals_the_reference(dtype, limit, report, threads):
    report(f"{dtype}", causal_conv3d_error(conv.causal_conv3d_on_cpu, "cpu", dtype), limit)


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 3e-6), (torch.bfloat16, 1e-2)])
def test_pixels_of_zeros_stay_zeros_under_the_norm(dtype, limit, report):
    """Black borders after a convolution without bias; none of them becomes NaN, nor do its neighbours."""
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 16, 3, 6, 7, generator=random), torch.randn(8, 16, 3, 3, 3, generator=random) / 20
    x[:, :, 1], x[:, :, :, 2:4, 3:] = 0, 0
    x, weight, gamma = x.to(dtype), weight.to(dtype), torch.ones(16, dtype=dtype)
    found, want = (
        run(x.to(kind), None, weight.to(kind), None, gamma.to(kind))
        for run, kind in ((conv.causal_conv3d_on_cpu, dtype), (conv.causal_conv3d_ref, torch.float64))
    )
    assert want[0].isfinite().all() and found[1][:, :, 0].abs().max() == 0
    report("relative error", max_rel_error(found, want), limit)


@pytest.mark.parametrize("T", [1, 3])
def test_large_maps_go_in_strips(T, report, threads):
    """Winograd's algorithm for more rows and columns than one of its products has, in a thread that is told of
    inference_mode while the others are not.
    """
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 96, T, 41, 75, generator=random)
    weight = torch.randn(140, 96, 3, 3, 3, generator=random) * (96 * 27) ** -0.5
    with torch.inference_mode():
        out, past = conv.causal_conv3d_on_cpu(x, None, weight)
    exact, last = conv.causal_conv3d_ref(x.double(), None, weight.double())
    report("strips", max_rel_error([out], [exact]), 1e-6)
    assert torch.equal(past, last.float())


def test_fake_tensors_and_compile():
    x, past, w, gamma = (
        torch.randn(1, 8, 2, 4, 4),
        torch.randn(1, 8, 2, 4, 4),
        torch.randn(6, 8, 3, 3, 3),
        torch.rand(8),
    )
    out, last = torch.ops.nanowan_csrc.causal_conv3d(
        x.to("meta"), past.to("meta"), w.to("meta"), None, gamma.to("meta"), None, None
    )
    assert out.shape == (1, 6, 2, 4, 4) and last.shape == past.shape
    convolve = conv.causal_conv3d_on_cpu
    compiled = torch.compile(lambda *a: [2 * y for y in convolve(*a)], backend="aot_eager", fullgraph=True)
    for a, b in zip(compiled(x, past, w, None, gamma), convolve(x, past, w, None, gamma)):
        assert torch.equal(a, 2 * b)


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(past=torch.zeros(1, 8, 1, 4, 4)), r"past should be two frames.*it is \[1, 8, 1, 4, 4\]"),
        (dict(w=torch.zeros(6, 7, 3, 3, 3)), "weight \\[6, 7"),
        (dict(w=torch.zeros(6, 8, 5, 5, 5)), "3x3x3"),
        (dict(gamma=torch.zeros(3)), "8 values and has 3"),
        (dict(x=torch.zeros(8, 2, 4, 4)), "x is \\[8, 2"),
        (dict(input_bias=torch.zeros(8)), "there is no gamma"),
        (dict(residual=torch.zeros(1, 8, 2, 4, 4)), r"residual should be \[1, 6, 2, 4, 4\] and is \[1, 8"),
    ],
)
def test_wrong_sizes_are_named(change, said):
    given = dict(x=torch.zeros(1, 8, 2, 4, 4), past=None, w=torch.zeros(6, 8, 3, 3, 3), bias=None, gamma=None)
    given |= dict(input_bias=None, residual=None) | change
    with pytest.raises(RuntimeError, match=said):
        torch.ops.nanowan_csrc.causal_conv3d(*given.values())


needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="compiles CUDA, for which most machines have no nvcc")


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
def test_cuda_compiles_without_spills(arch, tmp_path):
    run = subprocess.run(
        [
            "nvcc",
            "-c",
            "-std=c++17",
            "-O3",
            f"-arch={arch}",
            "-Xptxas",
            "-v",
            CSRC / "causal_conv3d_kernel.cu",
            "-o",
            tmp_path / "out.o",
        ],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", run.stderr)
    assert len(used) == 4 and all(u == ("0", "0", "0") for u in used), run.stderr


def test_no_two_sources_have_one_name():
    """Their object files lie side by side."""
    names = [f.stem for f in CSRC.iterdir() if f.suffix in (".cpp", ".cu")]
    assert len(set(names)) == len(names)


@needs_nvcc
def test_what_launches_the_kernels_compiles(tmp_path):
    """Against PyTorch's CUDA headers."""
    from torch.utils.cpp_extension import include_paths

    macros = tmp_path / "c10/cuda/impl/cuda_cmake_macros.h"  # which a torch without CUDA lacks
    macros.parent.mkdir(parents=True)
    macros.write_text("#pragma once\n")
    toolkit = re.search(
        r"TOP=(\S+)",
        subprocess.run(
            ["nvcc", "--dryrun", "-c", CSRC / "causal_conv3d_kernel.cu"], capture_output=True, text=True
        ).stderr,
    ).group(1)
    run = subprocess.run(
        [
            "g++",
            "-std=c++20",
            "-fsyntax-only",
            "-DNANOWAN_CUDA",
            *(f"-I{p}" for p in [*include_paths(), f"{toolkit}/include", tmp_path]),
            CSRC / "causal_conv3d.cpp",
        ],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The CUDA source as a C++ library: its launches, which are no C++, become calls; everything else is compiled as it
    is.
    """
    folder = tmp_path_factory.mktemp("emulated")
    for header in ("cuda_bf16.h", "cuda_runtime.h"):
        (folder / header).write_text('#include "emulation.h"\n')
    source, launches = re.subn(
        r"(\w+(?:<[^<>]*>)?)<<<([^,]+), ([^,]+), 0, stream>>>",
        r"emulation::launch(\1, \2, \3)",
        (CSRC / "causal_conv3d_kernel.cu").read_text(),
    )
    assert launches == 1
    (folder / "conv.cpp").write_text(source)
    subprocess.run(
        [
            "g++",
            "-std=c++20",
            "-O2",
            "-shared",
            "-fPIC",
            "-pthread",
            "-D__CUDACC__",
            f"-I{folder}",
            f"-I{EMULATION}",
            f"-I{CSRC}",
            folder / "conv.cpp",
            "-o",
            folder / "conv.so",
        ],
        check=True,
        capture_output=True,
    )
    return ctypes.CDLL(str(folder / "conv.so"))


class Clips(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int64) for n in ("B", "pixels", "C", "before")]


WIDTHS = (70, 96, 264)  # with and without whole 16 bytes


@pytest.mark.parametrize(
    "kernel, dtype, limit",
    [
        ("CUDA", torch.float32, 1e-6),
        ("CUDA", torch.bfloat16, 5e-3),
        ("Triton", torch.float32, 1e-6),
        ("Triton", torch.bfloat16, 1e-2),  # the interpreter's casts cut off
    ],
)
def test_kernels_fill_the_buffer_that_is_convolved(kernel, dtype, limit, report, request):
    """csrc's CUDA source, every thread of which runs as a CPU thread, and Triton in its interpreter, against the same
    reference.
    """
    if kernel == "Triton":
        code = "import torch\nfrom helpers.kernel_checks import fill_buffer_error as error\n"
        code += "from kernels.causal_conv3d import _fill_buffer\n"
        code += f"print(*(error(_fill_buffer, 'cpu', {dtype}, C) for C in {WIDTHS}))"
        errors = map(float, python(code, TRITON_INTERPRET="1").split())
    else:
        library = request.getfixturevalue("emulated")

        def fill(x, past, bias, gamma, buffer, last):
            floats = [t if t is None else t.float() for t in (bias, gamma)]
            tensors = x, past, *floats, buffer, last
            pointers = (ctypes.c_void_p(t if t is None else t.data_ptr()) for t in tensors)
            B, C, T, H, W = x.shape
            clips, half = Clips(B, T * H * W, C, 2 * H * W), ctypes.c_bool(dtype == torch.bfloat16)
            assert library.nanowan_fill_buffer(*pointers, clips, half, None) == 0

        errors = [fill_buffer_error(fill, "cpu", dtype, C) for C in WIDTHS]
    for C, error in zip(WIDTHS, errors, strict=True):
        report(f"{C} channels", error, limit)


def test_triton_around_a_convolution_equals_the_reference(report):
    """Norm, bias and residual, by the GPU's path, in the interpreter; two sizes."""
    code = "import torch\nfrom helpers.kernel_checks import CONVOLUTIONS, causal_conv3d_error\n"
    code += "from kernels import causal_conv3d as conv\n"
    code += "error = lambda dtype: causal_conv3d_error(conv.causal_conv3d, 'cpu', dtype, CONVOLUTIONS[1:4])\n"
    code += "print(error(torch.float32), error(torch.bfloat16))\n"
    code += "x, last = (torch.randn(1, 8, n, 3, 3).to(memory_format=torch.channels_last_3d) for n in (3, 2))\n"
    code += "torch.library.opcheck(conv._fill_buffer, (x, None, None, torch.ones(8), torch.cat([last, x], 2), last))\n"
    code += "torch.library.opcheck(conv._add_residual, (x, x.clone(), torch.ones(8)))"
    single, half = map(float, python(code, TRITON_INTERPRET="1").split())
    report("fp32", single, 3e-6)
    report("bf16", half, 1e-2)


def test_a_gpu_without_code_here_is_noticed(monkeypatch, capsys):
    """Once, in a line that says what builds it."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    assert not ops.csrc_runs_on("cuda:7") and not ops.csrc_runs_on("cuda:7")  # this one was built without CUDA
    said = capsys.readouterr().err
    assert said.count("not built for Some GPU") == 1 and "build_ext --inplace" in said
