"""bench.py --gpu keeps what it has, whatever a job does."""

import json
import subprocess

import pytest

from benchmarks import gpu


@pytest.mark.parametrize("how, said", [("crash", "failed: exit status -11"), ("hang", "failed: not done after")])
def test_a_job_that_fails_costs_no_other_figure(how, said, tmp_path, monkeypatch):
    real = subprocess.run

    def run(command, timeout):
        """A process that does what a job's can, instead of it: only a GPU runs those."""
        *_, name, _, file = map(str, command)
        do = {"crash": "kill -SEGV $$", "hang": "sleep 60", "work": f"echo '{{\"ms\": 1}}' > {file}"}[name]
        return real(["bash", "-c", do], timeout=min(timeout, 2))

    monkeypatch.setattr(gpu.subprocess, "run", run)
    found = gpu.on_gpu({"gpu": "none"}, tmp_path / "gpu.json", jobs=(how, "work"))
    assert found == json.loads((tmp_path / "gpu.json").read_text())
    assert found.pop(how).startswith(said) and found == {"gpu": "none", "work": {"ms": 1}}


def test_what_begins_too_late_is_named(tmp_path):
    found = gpu.on_gpu({}, tmp_path / "gpu.json", seconds=0, jobs=("ceilings",))
    assert found == {"ceilings": "left out: no time"} == json.loads((tmp_path / "gpu.json").read_text())
