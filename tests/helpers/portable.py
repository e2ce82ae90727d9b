"""Run test files with the arithmetic of other CPUs, with other numbers of threads, and with PyTorch's operations alone:
`portable.py FILE...`, or make test-portable. For each setting, print pytest's summary and the largest error as a share
of its tolerance.
"""

import os
import re
import subprocess
import sys

SETTINGS = (
    "ATEN_CPU_CAPABILITY=default",  # the kernels of PyTorch itself
    "ATEN_CPU_CAPABILITY=avx2",
    "ATEN_CPU_CAPABILITY=avx512",
    "ONEDNN_MAX_CPU_ISA=AVX2",  # convolutions, and products in bf16
    "MKL_ENABLE_INSTRUCTIONS=AVX2",  # products in fp32
    "MKL_CBWR=COMPATIBLE",
    "OMP_NUM_THREADS=1",
    "OMP_NUM_THREADS=2",
    "OMP_NUM_THREADS=3",
    "NANOWAN_OPS=ref",
)


def main(files):
    failed = 0
    for setting in SETTINGS:
        name, value = setting.split("=")
        env = {"OMP_NUM_THREADS": "1", **os.environ, name: value, "OMP_WAIT_POLICY": "passive"}
        workers = max(1, min(4, os.cpu_count() // int(env["OMP_NUM_THREADS"])))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-n", str(workers), "--dist", "loadfile", *files],
            env=env,
            capture_output=True,
            text=True,
        )
        failed += done.returncode != 0
        shares = re.findall(r"^(.*= (\d+)% of .*)$", done.stdout, re.M)
        worst = max(shares, key=lambda found: int(found[1]), default=("none reported",))[0]
        ends = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        said = (done.stdout or done.stderr or f"exit status {done.returncode}").splitlines()
        print(f"{setting}: {said[-1]}\n  worst: {worst}", *ends, sep="\n  ", flush=True)
    return f"{failed} of {len(SETTINGS)} settings fail" if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
