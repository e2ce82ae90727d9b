"""What bench.py does on a GPU: it keeps what it has, whatever a job does; its runs of the scripts, at a small size."""

import json
import subprocess

import pytest

from benchmarks import full_size, gpu


@pytest.mark.parametrize("how, said", [("crash", "failed: exit status -11"), ("hang", "failed: not done after")])
def test_a_job_that_fails_costs_no_other_figure(how, said, tmp_path, monkeypatch):
    real = subprocess.run

    def run(command, timeout):
        """A process that does what a job's can, instead of it: only a GPU runs those."""
        *_, name, _, file = map(str, command)
        do = {"crash": "kill -SEGV $$", "hang": "sleep 60", "work": f"echo '{{\"ms\": 1}}' > {file}"}[name]
        return real(["bash", "-c", do], timeout=min(timeout, 2))

    monkeypatch.setattr(gpu.subprocess, "run", run)
    results = gpu.on_gpu({"gpu": "none"}, tmp_path / "gpu.json", jobs=(how, "work"))
    assert results == json.loads((tmp_path / "gpu.json").read_text())
    assert results.pop(how).startswith(said) and results == {"gpu": "none", "work": {"ms": 1}}


def test_what_begins_too_late_is_named(tmp_path):
    results = gpu.on_gpu({}, tmp_path / "gpu.json", seconds=0, jobs=("ceilings",))
    assert results == {"ceilings": "left out: no time"} == json.loads((tmp_path / "gpu.json").read_text())


def test_runs_of_the_scripts_say_what_they_planned_and_used(checkpoints, tmp_path):
    """Those of the full size with other numbers: their lines are flags that the scripts have, and a failed one is
    named.
    """
    full_size.write_clips(tmp_path / "clips", size=(64, 64), frames=9)
    small = {"1280x704": "64x64", "832x480": "64x64", "--frames 121": "--frames 9", "--frames 49": "--frames 9"}
    runs = {name: full_size.RUNS[name] for name in ("sample", "train_te, rows")}
    for old, new in small.items():
        runs = {name: line.replace(old, new) for name, line in runs.items()}
    runs = {name: f"{line} --device cpu" for name, line in runs.items()} | {"other": "sample.py --no_such_flag"}
    results = full_size.run_scripts(checkpoints["ti2v"], tmp_path, {}, tmp_path / "run.json", runs=runs)
    assert results == json.loads((tmp_path / "run.json").read_text())
    assert "no_such_flag" in results.pop("other")
    for result in results.values():
        assert 0 < result["used_gb"] and 0 < result["planned_gb"] < 2, result
