"""Runs the project's scripts as `python SCRIPT FLAGS` does, in forks of one process that has imported what they need.

Importing PyTorch takes longer than most of these runs. What depends on the environment, on memory or on signals starts
a Python of its own instead.
"""

import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent
server = None


def run(script, *flags, code=None, check=False):
    """subprocess.run of a script with these flags -> returncode, stdout, stderr (text). code: what runs instead, as
    `python -c` has it, with the script and flags as its arguments. check: it must succeed.
    """
    global server
    if server is None:
        server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with tempfile.TemporaryDirectory() as folder:
        argv = [str(a) for a in (script, *flags)]
        server.stdin.write(json.dumps([folder, argv, code, os.getcwd()]) + "\n")
        server.stdin.flush()
        returncode = int(server.stdout.readline())
        stdout, stderr = ((Path(folder) / name).read_text() for name in ("stdout", "stderr"))
    assert not check or returncode == 0, stderr
    return SimpleNamespace(returncode=returncode, stdout=stdout, stderr=stderr)


def serve():
    """Fork for each line of stdin; the child's exit status is a line of stdout. Returns in the child, with its job."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            return json.loads(line)
        status = os.waitpid(child, 0)[1]
        print(os.waitstatus_to_exitcode(status), flush=True)
    os._exit(0)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    import torch._dynamo  # noqa: F401  optimizers and checkpointing import it
    import torch.utils.tensorboard  # noqa: F401

    import diag  # noqa: F401
    import nano  # noqa: F401
    import sample  # noqa: F401
    import train_lora  # noqa: F401
    import train_te  # noqa: F401

    folder, argv, code, cwd = serve()
    os.chdir(cwd)
    for name, number in (("stdout", 1), ("stderr", 2)):
        with open(f"{folder}/{name}", "wb") as file:
            os.dup2(file.fileno(), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = argv if code is None else ["-c", *argv]
    if code is None:
        runpy.run_path(argv[0], run_name="__main__")
    else:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
