"""Speed and memory compared with diffusers, transformers and peft, in one run.

    python -m benchmarks                     on this CPU, fp32 (about ten minutes)
    python -m benchmarks dit vae_decode      only these benchmarks
    python -m benchmarks --gpu --json FILE   full-size blocks and kernels on a GPU, random weights
    python -m benchmarks --gpu_run --json FILE   the scripts on random checkpoints of released size (60 GB of disk)
    python -m benchmarks s2v-14B --gpu_run --json FILE   only the scripts of this variant
    python -m benchmarks --json FILE         also write FILE, with all measurements, the machine and the libraries'
                                             versions, and FILE.png, which shows how time grows with tokens and frames

Each benchmark compares contenders, which get equal weights and inputs and run alternately: nanoWan ("ours"), nanoWan
with the plain PyTorch definition of every op ("ref"), and the peer, in most benchmarks another library. Median times
and the ratio ours / peer of these times are printed. On a CPU, peak memory is measured by running a contender twice in
a process of its own; it is the peak of the second run, less what the process held before this run.
"""

import nanowan.environment  # noqa: F401  # isort: skip

import argparse
import importlib.util
import json
import tempfile
from pathlib import Path

import torch

from benchmarks import full_size
from benchmarks.common import machine, print_memory
from benchmarks.cpu import WORKS, growth, on_cpu, plot
from benchmarks.gpu import JOBS, on_gpu
from diagnostics.common import write_json


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "works",
        nargs="*",
        metavar="NAME",
        help=f"benchmarks to run: {', '.join(WORKS)}; with --gpu_run: variants such as s2v-14B (default: all)",
    )
    p.add_argument(
        "--rounds",
        type=int,
        default=7,
        help="number of runs of each contender; medians are printed (default: %(default)s)",
    )
    p.add_argument(
        "--gpu",
        action="store_true",
        help="measure full-size blocks and kernels on a GPU instead of the benchmarks on the CPU",
    )
    p.add_argument(
        "--gpu_run",
        action="store_true",
        help="measure the scripts on random full-size checkpoints, instead of the benchmarks on the CPU",
    )
    p.add_argument(
        "--json", help="also write everything that was measured to this file; on a CPU, also write a plot, FILE.png"
    )
    p.add_argument("--memory_of", help=argparse.SUPPRESS)
    p.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)  # one job of --gpu, in its own process
    args = p.parse_args()
    names = sorted({name.split(":")[0] for name in full_size.RUNS}) if args.gpu_run else [*WORKS]
    if wrong := [w for w in args.works if w not in names]:
        p.error(f"{wrong[0]}: choose from {', '.join(names)}")
    torch.manual_seed(0)
    if args.memory_of:
        print_memory(WORKS[args.works[0]][0], args.memory_of)
        return
    gpu = "--gpu" if args.gpu else "--gpu_run" if args.gpu_run else None
    if gpu and not torch.cuda.is_available():
        p.error(f"{gpu}: there is no CUDA device")
    if gpu and not args.json:
        p.error(f"{gpu}: needs --json FILE, into which each result is written as soon as it is there")
    if lacking := [name for name in ("av", "ftfy") if args.gpu_run and not importlib.util.find_spec(name)]:
        p.error(f"--gpu_run: the scripts need {' and '.join(lacking)}")
    if args.job:
        write_json(args.json, JOBS[args.job]())
        return
    about = machine()
    print(json.dumps(about))
    if gpu:
        about["gpu"] = torch.cuda.get_device_name()
    if args.gpu:
        on_gpu(about, args.json)
        return
    if args.gpu_run:
        with tempfile.TemporaryDirectory() as folder:
            full_size.write_inputs(Path(folder))
            runs = {k: v for k, v in full_size.RUNS.items() if not args.works or k.split(":")[0] in args.works}
            full_size.run_scripts(full_size.Checkpoints(Path(folder)), folder, about, args.json, runs=runs)
        return
    result = on_cpu(args.works or WORKS, args.rounds)
    if args.json:
        result["growth"] = growth()
        plot(f"{args.json}.png", result["growth"])
        write_json(args.json, about | result)


if __name__ == "__main__":
    main()
