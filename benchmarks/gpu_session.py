"""`make gpu SECONDS=570 OUT=DIR`: tests and benchmarks on one GPU, the most informative first, as many as time allows.

    python -m benchmarks.gpu_session SECONDS OUT
    python -m benchmarks.gpu_session SECONDS OUT --dry    only print the jobs

Each job has its own process, time limit and log. OUT/table.json and OUT/logs.tgz are updated after each job. Jobs that
have run, even without success, are recorded in build/gpu. A second call runs the others; remove that folder to start
over. The random checkpoint (24 GB) is in /dev/shm if there is room, else in build/gpu.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common import ROOT, machine
from diagnostics.common import write_json

STATE = ROOT / "build" / "gpu"
SAID = ("peak memory", " passed", " failed", "Error", "error:", "TFLOP", "GB/s", " ms", "chosen", "s/step")


@dataclass(frozen=True)
class Job:
    """A shell command. limit: seconds after which the command is ended. expected: predicted seconds on an H100."""

    command: str
    limit: int
    expected: int
    beside: bool = False  # later jobs begin without waiting for this one ...
    after: str = ""  # ... but the job that names it here waits


def jobs(state=STATE):
    """Return {name: Job} in the order in which the jobs begin. state: the folder for what they measure, and for the
    checkpoint if /dev/shm has too little room.
    """
    python, shared = sys.executable, Path("/dev/shm")
    roomy = shared.exists() and shutil.disk_usage(shared).free > 40e9
    folder = shared / "nanowan" if roomy else state / "checkpoint"
    model = f"--ckpt {folder}/ti2v-5B"
    clip = f"{python} sample.py {model} --prompt 'a wedge' --steps 4"
    large = "--size 1280x704 --frames 121"
    data = f"{model} --data {folder}/clips --resolution 832x480 --frames 49 --steps 6 --batch 1 --checkpointing auto"
    tests = f"{python} -m pytest -q -p no:cacheprovider --durations=8 -m gpu tests/test_gpu.py"
    fast = "reference or adamw or rows_in or fast_operations or vae_on or products or resident"

    def measure(job):
        return f"{python} -m benchmarks --gpu --job '{job}' --json {state}/{slug(job)}.json"

    kernels = ("attention", "modulate", "qk_norm_rope", "quantize", "causal_conv3d", "adamw8bit", "gelu", "ceilings")
    return {
        "machine": Job("nvidia-smi; nvcc --version | tail -1; df -h / /dev/shm; free -g", 30, 5),
        "build": Job(f"NANOWAN_CUDA=1 MAX_JOBS=12 {python} setup.py -q build_ext --inplace", 200, 60, beside=True),
        "probe": Job(f"{python} -m benchmarks.gpu_probe {state}/probe.json", 90, 40),
        "checkpoint": Job(f"{python} -m benchmarks.full_size {folder}", 200, 75, beside=True, after="build"),
        "kernels' tests": Job(f"{tests} -k '{fast}'", 150, 80),
        "a clip's attention": Job(
            f"{python} -m pytest -q -p no:cacheprovider -m gpu tests/test_kernels_attention.py", 60, 25
        ),
        "guided step": Job(measure("guided step"), 90, 45, after="checkpoint"),
        "vae": Job(measure("vae"), 130, 75),
        "sample 5B": Job(f"{clip} {large} --out {folder}/o.mp4", 150, 80),
        "train_lora 5B": Job(f"{python} train_lora.py {data} --out {folder}/lora", 110, 55),
        "A14B, 4 blocks": Job(measure("t2v-A14B 832x480, 81 frames"), 80, 40),
        "sample 5B, fp8": Job(f"{clip} {large} --base_dtype fp8 --out {folder}/f.mp4", 120, 70),
        "expert swap": Job(measure("expert swap"), 60, 30),
        "sample 5B, streamed": Job(
            f"{clip} --size 832x480 --frames 49 --stream_blocks 30 --out {folder}/s.mp4", 80, 45
        ),
        "5B, 4 blocks": Job(measure("ti2v-5B 1280x704, 121 frames"), 80, 40),
        "train_te 5B, rows": Job(
            f"{python} train_te.py {data} --train_blocks 0 --keywords wedge --save delta --out {folder}/te", 110, 60
        ),
        "kernels": Job("; ".join(map(measure, kernels)), 150, 90),
        "scripts' tests": Job(f"{tests} -k 'scripts_run or expert or draws or graded'", 300, 200),
        "official pipelines": Job(
            f"TEST_DEVICE=cuda {python} -m pytest -q tests/test_long_video.py -k official", 200, 120
        ),
        "races, sanitizer": Job(f"{tests} -k 'wait_for or inside_its'", 300, 200),
        "14B": Job(
            f"{python} -m benchmarks --gpu_run t2v-A14B s2v-14B animate-14B --json {state}/gpu_run.json", 1200, 400
        ),
    }


def slug(name):
    return re.sub(r"\W+", "_", name)


class Session:
    def __init__(self, seconds, out, state=STATE):
        self.ends, self.out, self.state = time.monotonic() + seconds, Path(out), Path(state)
        for folder in (self.out, self.state):
            folder.mkdir(parents=True, exist_ok=True)
        self.running = {}  # name: (process, its Job, when it began)

    def left(self):
        return self.ends - time.monotonic()

    def done(self, name):
        return (self.state / f"{slug(name)}.done").exists()

    def log(self, name):
        return self.state / f"{slug(name)}.log"

    def run(self, jobs):
        """Run each job in `jobs` {name: Job} that is not done yet, as long as time is left. Returns the table that
        `collect` writes.
        """
        for name, job in jobs.items():
            if self.done(name):
                continue
            if job.after in self.running:
                self.finish(job.after)
            if self.left() < min(job.expected, 25):
                print(f"{name}: left out, {max(0, self.left()):.0f} s left", flush=True)
                continue
            # `timeout` ends the job's children too
            command = ["timeout", f"{max(1, min(job.limit, self.left() - 4)):.0f}", "bash", "-c", job.command]
            env = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
            with open(self.log(name), "w") as log:
                process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
            self.running[name] = process, job, time.monotonic()
            if not job.beside:
                self.finish(name)
        for name in list(self.running):
            self.finish(name)
        return self.collect()

    def finish(self, name):
        """Wait until the running job `name` ends, and record its result."""
        process, job, began = self.running.pop(name)
        code, seconds = process.wait(), time.monotonic() - began
        lines = self.log(name).read_text(errors="replace").splitlines()
        said = [line.strip()[:220] for line in lines if any(word in line for word in SAID)][-5:]
        result = {"status": code, "seconds": round(seconds, 1), "expected": job.expected, "said": said}
        if code == 124:
            result["status"] = f"ended after {seconds:.0f} s"
        write_json(self.state / f"{slug(name)}.done", {"job": name, **result})
        print(f"{name}: {result['status']} in {seconds:.0f} s (about {job.expected}) | " + " | ".join(said), flush=True)
        self.collect()

    def collect(self):
        """Write all results so far to OUT/table.json and the logs to OUT/logs.tgz, and return the table."""
        table = {"machine": machine()}
        for file in sorted(self.state.glob("*.done")):
            entry = json.loads(file.read_text())
            table[entry.pop("job")] = entry
        for file in self.state.glob("*.json"):
            table.setdefault("measured", {})[file.stem] = json.loads(file.read_text())
        write_json(self.out / "table.json", table)
        with tarfile.open(self.out / "logs.tgz", "w:gz") as tar:
            for log in sorted(self.state.glob("*.log")):
                tar.add(log, log.name)
        return table


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("seconds", type=float, help="seconds for all jobs; a job that still runs after them is ended")
    p.add_argument("out", help="folder for table.json and logs.tgz")
    p.add_argument("--dry", action="store_true", help="only print the jobs, with limits and expected times")
    args = p.parse_args()
    if args.dry:
        for name, job in jobs().items():
            print(f"{name}{' (next to later jobs)' * job.beside}: at most {job.limit} s, about {job.expected} s")
            print(f"    {job.command}")
        return
    if not torch.cuda.is_available():
        p.error("there is no CUDA device; --dry prints the jobs")
    Session(args.seconds, args.out).run(jobs())


if __name__ == "__main__":
    main()
