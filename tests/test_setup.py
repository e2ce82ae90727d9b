"""Set-up goes on without a C++ extension, and one that was built for another CPU is not loaded."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FAILS = """#!/bin/sh
case "$*" in *-E*) exec c++ "$@";; *" -c "*) echo "fatal error: omp.h: no such file"; exit 1;; *) exec c++ "$@";; esac
"""


def build(folder, cxx, **environment):
    """setup.py's build in a copy of what it needs, with this compiler."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copy(ROOT / "setup.py", folder)
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


@pytest.mark.parametrize(
    "content, said",
    [
        ("nanowan_csrc is built for: fma.avx9000", "was built for a CPU with avx9000"),  # must not even be opened
        ("nanowan_csrc is built for: ", "does not load"),
    ],
)
def test_an_extension_for_another_machine(tmp_path, content, said):
    file = tmp_path / f"nanowan_csrc{sysconfig.get_config_var('EXT_SUFFIX')}"
    file.write_text(content)
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import kernels; print(kernels.BUILT)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "NANOWAN_OPS": "auto"}
    )
    assert done.returncode == 0 and done.stdout.strip() == "False"
    assert done.stderr.count("\n") == 1 and f"{file} {said}" in done.stderr
