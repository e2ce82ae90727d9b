"""Files that appear whole or not at all: written under a temporary name, synced and renamed; errors that name the disk."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch

from nanowan.errors import BadInput

TEMPORARY = ".tmp-"  # what the names of unfinished files begin with


def _write_error(error, path):
    """The errno of the failed write to `path`, or to its temporary file, behind an exception, or None: libraries wrap
    what the system says, and torch's writer of zip files, on another rank, leaves only its own name.
    """
    text = str(error)
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            file = Path(os.fsdecode(error.filename or path))
            own = file == path or file in path.parents or path in file.parents or file.name.startswith(TEMPORARY)
            return error.errno if own else None
        error = error.__cause__ or error.__context__
    return errno.EIO if "inline_container" in text else None


@contextlib.contextmanager
def writing(path):
    """Around a write to `path`: what goes wrong, in whatever form a library raises it, becomes an OSError that names
    the file and, where that may be the reason, its disk.
    """
    try:
        yield
    except Exception as e:
        path = Path(path)
        number = _write_error(e, path)
        if number is None:
            raise
        folder = next(p for p in path.absolute().parents if p.exists())
        disk = next(p for p in (folder, *folder.parents) if p.is_mount() or p == p.parent)
        reason = os.strerror(number)
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            reason += f"; the disk at {disk} has {shutil.disk_usage(folder).free / 1e9:.2f} GB free"
        elif number == errno.EFBIG:
            reason += f"; a limit on the size of files, of this process (ulimit -f) or of the disk at {disk}"
        raise OSError(number, f"cannot be written ({reason})", str(path)) from None


def _open_temporary(path):
    """(descriptor, name) of a new file beside `path`, locked for as long as this process is writing it."""
    while True:
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY, suffix=path.suffix)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return fd, name
        os.close(fd)  # remove_leftovers came between the two calls


def remove_leftovers(folder):
    """Remove the unfinished files that killed processes left in a folder. Those of living ones are locked."""
    for file in Path(folder).glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError), open(file, "rb") as f:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.unlink()


def _sync(path):
    """Have the disk hold what was written to a file, or what was renamed in a folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def atomic(path):
    """A temporary name beside `path`. When the block ends well, the disk holds what it wrote, under `path`; when it
    does not, whatever was there is untouched. A write that fails raises an OSError that names `path`.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, temporary = _open_temporary(path)
        try:
            yield Path(temporary)
            os.chmod(temporary, 0o644)
            _sync(temporary)
            os.replace(temporary, path)
            with contextlib.suppress(OSError):  # not every file system can sync a folder
                _sync(path.parent)
        finally:
            os.close(fd)
            Path(temporary).unlink(missing_ok=True)


def save_pickle(path, values):
    """torch.save, atomically."""
    # by an open file: given a name, torch.save hides the system's reason when a write fails
    with atomic(path) as tmp, open(tmp, "wb") as f:
        torch.save(values, f)


def read_json(file):
    """What a configuration's JSON file says. Raises BadInput where that is no dictionary."""
    try:
        found = json.loads(file.read_text())
    except ValueError as e:
        raise BadInput(f"{file}: not a model configuration ({e})") from None
    if not isinstance(found, dict):
        raise BadInput(f"{file}: not a model configuration, but a {type(found).__name__}")
    return found


def check_output(flag, path, suffix):
    """Raise BadInput for a path that cannot be written, before anything is computed for it."""
    parent = next((d for d in path.absolute().parents if d.exists()), Path("/"))
    if path.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise BadInput(f"{flag} {path}: a file is to be written there, and it is a folder or may not be written")
    if path.suffix != suffix:
        raise BadInput(f"{flag} {path}: should end in {suffix}")


def numbered(path, i, count):
    """PATH for one result, PATH_000 and so on for several."""
    path = Path(path)
    return path if count == 1 else path.with_stem(f"{path.stem}_{i:03d}")
