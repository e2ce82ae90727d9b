"""Set-up goes on without a C++ extension, and one that was built for another CPU is not loaded."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import kernels

ROOT = Path(__file__).parent.parent
FAILS = """#!/bin/sh
case "$*" in *-E*) exec c++ "$@";; *" -c "*) echo "fatal error: omp.h: no such file"; exit 1;; *) exec c++ "$@";; esac
"""


def build(folder, cxx, **environment):
    """setup.py's build in a copy of what it needs, with this compiler."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / "kernels").mkdir()
    for name in ("setup.py", "pyproject.toml", "kernels/sources.py"):
        shutil.copy(ROOT / name, folder / name)
    (folder / f"nanowan_csrc{sysconfig.get_config_var('EXT_SUFFIX')}").write_text("of older sources")
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=folder,
        env={**os.environ, "NANOWAN_CSRC": "1", "NANOWAN_CUDA": "0", "CXX": str(cxx), **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("broken", ["absent", "always", "at the sources"])
def test_a_broken_compiler_does_not_stop_set_up(tmp_path, broken):
    cxx = {"absent": "no-such-compiler", "always": shutil.which("false"), "at the sources": tmp_path / "cxx"}[broken]
    if broken == "at the sources":
        cxx.write_text(FAILS)
        cxx.chmod(0o755)
    (tmp_path / "copy").mkdir()
    done = build(tmp_path / "copy", cxx)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "PyTorch's operations are used instead" in line]
    assert len(said) == 1 and "Traceback" not in done.stderr + done.stdout
    assert not list((tmp_path / "copy").glob("*.so"))  # what older sources made would be called as these are


def test_cuda_that_was_asked_for_is_an_error(tmp_path):
    done = build(tmp_path, shutil.which("false"), NANOWAN_CUDA="1")
    assert done.returncode != 0


SOURCES, TORCH = kernels.sources_digest(ROOT / "csrc"), torch.__version__
OTHERS = {
    "cpu": (f"fma.avx9000 from: {SOURCES} with torch: {TORCH}", "was built for a CPU with avx9000"),
    "sources": (f" from: {SOURCES[::-1]} with torch: {TORCH}", f"was built from other sources than {ROOT}/csrc"),
    "older": ("", f"was built from other sources than {ROOT}/csrc"),  # before it said from which
    "torch": (f" from: {SOURCES} with torch: 2.9.1+cu1", f"was built with torch 2.9.1+cu1, and this is {TORCH}"),
    "none": (f" from: {SOURCES} with torch: {TORCH}", ""),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_the_extension_says_of_itself_is_compared(tmp_path, name):
    built_for, said = OTHERS[name]
    file = tmp_path / "nanowan_csrc.so"
    file.write_text(f"...nanowan_csrc is built for: {built_for}\0...")
    assert kernels.mismatch(file) == said


@pytest.mark.parametrize("name, said", [("sources", "was built from other sources"), ("none", "does not load")])
def test_an_extension_that_cannot_be_used_is_one_line(tmp_path, name, said):
    """That names it and what rebuilds it; where it is not this checkout's, it is not even opened."""
    file = tmp_path / f"nanowan_csrc{sysconfig.get_config_var('EXT_SUFFIX')}"
    file.write_text(f"nanowan_csrc is built for: {OTHERS[name][0]}\0")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import kernels; print(kernels.BUILT)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "NANOWAN_OPS": "auto"}
    )
    assert done.returncode == 0 and done.stdout.strip() == "False"
    assert done.stderr.count("\n") == 1 and f"nanowan: {file} {said}" in done.stderr
    assert f"cd {ROOT} && {sys.executable} setup.py build_ext --inplace" in done.stderr


@pytest.fixture
def set_up(monkeypatch):
    """setup.py as a module, of which nothing is built."""
    monkeypatch.setenv("NANOWAN_CSRC", "0")
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("nanowan_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_digest_is_of_every_source(tmp_path):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    for file in (tmp_path / "csrc").iterdir():
        before = file.read_bytes()
        file.write_bytes(before + b"\n")
        assert kernels.sources_digest(tmp_path / "csrc") != SOURCES
        file.write_bytes(before)


def test_the_extension_here_is_of_these_sources():
    file = Path(sys.modules["nanowan_csrc"].__file__)
    assert f" from: {SOURCES} with torch: {TORCH}\0".encode() in file.read_bytes()
    assert not kernels.mismatch(file)


@pytest.mark.parametrize(
    "release, torch_cuda, said",
    [
        ("13.0", "12.8", "nvcc is of CUDA 13, torch of CUDA 12.8"),
        ("12.4", "12.8", ""),
        (None, "12.8", "there is no nvcc"),
        ("12.8", None, "this torch was built without CUDA"),
    ],
)
def test_an_nvcc_of_another_cuda_is_left_out(set_up, tmp_path, release, torch_cuda, said):
    """And the rest built, as where there is none."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {release}, V{release}.1")
    nvcc.chmod(0o755)
    assert set_up.cuda_lack(torch_cuda, tmp_path if release else None) == said


def test_an_interpreter_that_does_not_go_with_numpy():
    with pytest.raises(ImportError, match="Triton 3.6.0 does not work with NumPy 2.4.6"):
        kernels.check_interpreter("3.6.0", "2.4.6")
    for versions in (("3.7.0", "2.4.6"), ("3.10.1", "2.10.0"), ("3.6.0", "2.3.5")):
        kernels.check_interpreter(*versions)
