"""Errors a user can do something about: one line, no traceback."""

import contextlib
import ctypes
import os
import signal
import sys
import time


class BadInput(ValueError):
    """An error about a file or flag that the user gave and that cannot be used. The message is one line: the file or
    flag, its value, and what would be right.
    """


class Skip(Exception):
    """An error about a media file that cannot be used, with the reason as its message. The run continues with the other
    files.
    """


def return_freed_blocks():
    """Make glibc return freed blocks above 1 MB to the system at once. By default, glibc keeps freed blocks of up to
    32 MB, which leaves holes: in a training step on a 1 GB model, the activations took 0.9 GB with the default, and
    0.37 GB with this setting.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD


def cli(main):
    """Run a script's `main`. A BadInput, or a file that cannot be read or written, ends the script with one line on
    stderr and exit code 1. Ctrl-C, or closing the pipe that reads the output, ends the script without a traceback.
    """
    return_freed_blocks()
    rank = int(os.environ.get("RANK", 0))
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(128 + signal.SIGPIPE)
    except (BadInput, OSError) as e:
        if rank:  # rank 0 prints an error that all ranks have, and torchrun ends the other ranks meanwhile
            time.sleep(3)
        sys.exit(
            f"error: {f'rank {rank}: ' * (rank > 0)}"
            + (f"{e.filename}: {e.strerror}" if getattr(e, "filename", None) else str(e))
        )
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except RuntimeError as e:
        if "RANK" not in os.environ or not any(
            sign in str(e) for sign in ("closed by peer", "reset by peer", "NCCL", "Broken pipe")
        ):
            raise
        time.sleep(3)  # let the rank that failed first print its error first
        sys.exit(f"error: rank {rank}: another rank has ended; the last saved state is intact, continue with --resume")


def check_at_least(least, **flags):
    """Raise BadInput if the value of a flag is below `least`. flags: {flag: number, or None if it was not given}."""
    for flag, value in flags.items():
        if value is not None and not value >= least:
            raise BadInput(f"--{flag} {value}: at least {least}")
