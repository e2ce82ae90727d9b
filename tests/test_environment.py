"""What is set before PyTorch starts CUDA."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from nanowan.environment import grows_segments

ROOT = Path(__file__).parent.parent
LINUX, WSL = "6.8.0-45-generic", "5.15.167.4-microsoft-standard-WSL2"


@pytest.mark.parametrize(
    "argv, kernel, user, want",
    [
        ([], LINUX, {}, True),
        (["--compile"], LINUX, {}, True),
        (["--cuda_graphs"], LINUX, {}, False),
        ([], WSL, {}, False),
        ([], LINUX, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}, False),
        ([], LINUX, {"PYTORCH_ALLOC_CONF": ""}, False),
    ],
)
def test_where_segments_grow(argv, kernel, user, want, monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in user.items():
        monkeypatch.setenv(name, value)
    assert grows_segments(["sample.py", *argv], kernel) == want


@pytest.mark.parametrize("user", ["", "garbage_collection_threshold:0.8"])
def test_scripts_set_it_and_leave_a_users_own(user):
    code = "import os, sample; print(os.environ.get('PYTORCH_ALLOC_CONF'))"
    env = {k: v for k, v in os.environ.items() if not k.endswith("ALLOC_CONF")}
    env |= {"PYTORCH_ALLOC_CONF": user} if user else {}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    ours = None if "microsoft" in platform.release().lower() else "expandable_segments:True"
    assert run.stdout.strip() == str(user or ours)
