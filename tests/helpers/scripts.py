"""Run the project's scripts as `python SCRIPT FLAGS` does, but in forks of one process that has imported their modules.

Importing PyTorch takes longer than most of these runs. Tests that depend on the environment, on memory or on signals
start a Python process of their own instead.
"""

import atexit
import gc
import itertools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent.parent
# the device for test_long_video.py and for tests on several ranks, which need four GPUs on cuda
DEVICE = os.environ.get("TEST_DEVICE", "cpu")
server = None


class NoPlan:
    """Stands in for a memory_estimate.Plan, whose computation takes longer than the small runs that it is made for."""

    peak, takes_turns = 0, False

    def check_host(self):
        pass

    def compare(self, device):
        return ""


def run(script, *flags, code=None, check=False, ranks=1, plan=False):
    """Run a script with these flags, as subprocess.run does, and return its returncode, stdout and stderr (text). code:
    Python source to run instead, as with `python -c`; the script and flags are its arguments. check: assert that the
    run succeeds. ranks: number of processes to run together, each on one thread and with the environment that torchrun
    gives; their outputs follow one another in stdout and stderr, and if one fails, the others are ended. plan: also
    plan the memory, which takes as long as the rest.
    """
    global server
    if server is None:
        env = os.environ | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}  # else an import keeps forks from using the GPU
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        server = subprocess.Popen([sys.executable, __file__], env=env, **pipes)
    with tempfile.TemporaryDirectory() as folder:
        argv = [str(a) for a in (script, *flags)]
        server.stdin.write(json.dumps([folder, argv, code, os.getcwd(), plan, ranks]) + "\n")
        server.stdin.flush()
        returncode = int(server.stdout.readline())
        files = [[Path(folder) / f"{name}{rank}" for rank in range(ranks)] for name in ("stdout", "stderr")]
        stdout, stderr = ("".join(f.read_text() for f in kind) for kind in files)
    assert not check or returncode == 0, stderr
    return SimpleNamespace(returncode=returncode, stdout=stdout, stderr=stderr)


def serve():
    """Read a job from each line of stdin, and fork a child for each of its ranks. When the children have ended, print
    the first of their exit statuses that is not 0, or else 0. The parent never returns; a child returns its job and its
    rank.
    """
    numbers = itertools.count()
    for line in sys.stdin:
        job, children, number = json.loads(line), set(), next(numbers)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(job[-1]):
            child = os.fork()
            if child == 0:
                if job[-1] > 1:
                    torch.set_num_threads(1)
                    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "TORCHELASTIC_RUN_ID": f"{number}"}
                    os.environ |= {"WORLD_SIZE": f"{job[-1]}", "LOCAL_WORLD_SIZE": f"{job[-1]}"}
                    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
                signal.alarm(600)  # ends a child that hangs, such as a rank that waits for a dead rank
                return *job, rank
            children.add(child)
        returncode = 0
        while children:
            child, status = os.wait()
            children.remove(child)
            returncode = returncode or os.waitstatus_to_exitcode(status)
            if status:
                for other in children:
                    os.kill(other, signal.SIGKILL)
        print(returncode, flush=True)
    os._exit(0)


if __name__ == "__main__":
    sys.path[:1] = [str(ROOT), str(ROOT / "tests")]
    import av.subtitles.stream  # noqa: F401  some of these are imported by runs only when they need them
    import ftfy  # noqa: F401
    import torch
    import torch._dynamo  # noqa: F401  imported by optimizers and checkpointing
    import torch.distributed.fsdp  # noqa: F401
    import torch.utils.serialization.config  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    from PIL import Image, ImageDraw, ImageFont  # noqa: F401

    import diag  # noqa: F401
    import kernels.causal_conv3d  # noqa: F401
    import sample  # noqa: F401
    import train_lora  # noqa: F401
    import train_te  # noqa: F401
    from nano import __main__ as nano  # noqa: F401
    from nanowan import memory_estimate
    from nanowan.formats.header import read_header
    from nanowan.variants import registry

    Image.preinit()
    for kind in registry.PARTS:
        registry.parts_of(kind)
    for file in sorted((ROOT / "nano" / "checkpoint").rglob("*.pth")):  # in each fork, the first read would take 0.2 s
        read_header(file)
    os.fsync = lambda fd: None  # tests need not survive a power failure
    gc.collect()
    gc.freeze()  # so that a fork's garbage collection visits only its own objects
    folder, argv, code, cwd, plan, _, rank = serve()
    os.chdir(cwd)
    if not plan:
        memory_estimate.training = memory_estimate.sampling = lambda *_, **__: NoPlan()
    for name, number in (("stdout", 1), ("stderr", 2)):
        with open(f"{folder}/{name}{rank}", "wb") as file:
            os.dup2(file.fileno(), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = argv if code is None else ["-c", *argv]
    status = 0
    try:
        if code is None and argv[0] == "-m":
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        elif code is None:
            sys.path.insert(0, str(Path(argv[0]).parent))
            runpy.run_path(argv[0], run_name="__main__")
        else:
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as e:
        status = e.code or 0
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except Exception:
        sys.excepthook(*sys.exc_info())
        status = 1
    # do what Python does at exit, except to free memory object by object, which takes a second
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
