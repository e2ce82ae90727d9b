"""Measure the time and memory of contenders that run alternately, and describe the machine."""

import ctypes
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

from diagnostics.common import write_json
from kernels import backend
from nanowan import memory_estimate

ROOT = Path(__file__).parent.parent


def interleaved(contenders, rounds, synchronize=lambda: None):
    """Run the contenders {name: function} alternately, and return {name: seconds of each round}. Before the rounds,
    each contender runs once untimed. Every second round runs the contenders in reverse order. synchronize: a function
    that waits for the device, called before and after each timed run.
    """
    for run in contenders.values():
        run()
    seconds = {name: [] for name in contenders}
    for i in range(rounds):
        for name, run in list(contenders.items())[:: -1 if i % 2 else 1]:
            synchronize()
            began = time.perf_counter()
            run()
            synchronize()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def keep_results(jobs, run, about, path, seconds):
    """Call run(name, left) for each name in `jobs`, add what it returns to the dict `about` {name: result}, and write
    `about` to the JSON file `path` after each call. All jobs together get `seconds`; left: the seconds that remain.
    Once none remain, the jobs not run yet are left out, and `about` says so. Returns `about`.
    """
    began = time.monotonic()
    for name in jobs:
        left = seconds - (time.monotonic() - began)
        about[name] = run(name, left) if left > 0 else "left out: no time"
        if isinstance(about[name], str):
            print(f"{name}: {about[name]}", flush=True)
        write_json(path, about)
    return about


def seconds_of(run, rounds):
    """Return the median seconds that run() takes, over `rounds` calls."""
    return median(interleaved({"run": run}, rounds)["run"])


def print_memory(make, name):
    """Run a contender twice. Print the bytes of peak memory in the second run, less those that the process held before
    this run. make: a function that returns (contenders, FLOPs), as those in cpu.py do. name: the contender's name.
    """
    contenders, _ = make()
    contenders[name]()  # the first run imports and sets things up
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = memory_estimate.resident()
    contenders[name]()
    print(memory_estimate.resident("VmHWM") - before)


def peak_memory(work, name):
    """Run print_memory for a contender in a new process, where glibc returns the memory of freed tensors to the
    system. Return the bytes that it prints. work: the benchmark's name in cpu.WORKS; name: the contender's name.
    """
    out = subprocess.run(
        [sys.executable, "-m", "benchmarks", work, "--memory_of", name],
        cwd=ROOT,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(out.stdout.splitlines()[-1])


def add_reference(contenders):
    """Return the contenders with one more, "ref", in second place. "ref" runs "ours" with the plain PyTorch definition
    of every op.
    """

    def ref():
        with backend.using("ref"):
            return contenders["ours"]()

    return {"ours": contenders["ours"], "ref": ref, **{k: v for k, v in contenders.items() if k != "ours"}}


def add_peer_adapter(peer):
    """Use peft to add a translator to diffusers' DiT: a LoRA of rank 16 on k and v of cross-attention."""
    from peft import LoraConfig

    peer.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=["attn2.to_k", "attn2.to_v"]))


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def machine():
    name = next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    versions = {
        p: importlib.metadata.version(p)
        for p in ("torch", "diffusers", "transformers", "peft")
        if importlib.util.find_spec(p)
    }
    return {
        "cpu": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **versions,
        "date": datetime.date.today().isoformat(),
        "commit": commit,
    }
