"""Write files that appear complete or not at all: they are written under a temporary name, synced and then renamed.

If a write fails, the error names the file and, if the disk may be the reason, the disk.
"""

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

TEMPORARY = ".tmp-"  # the names of unfinished files begin with this


def _write_error(error, path):
    """Return the errno of the OSError that caused the exception `error`, if the OSError names `path`, a folder above
    it, a file in it, any temporary file, or no file. Return None if there is no such OSError. Libraries often raise
    their own exception in place of the system's error, so the causes of `error` are searched. If a write failed in
    torch's writer of zip files on another rank, `error` contains the writer's name but no errno; then EIO is returned.
    """
    text = str(error)
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            file = Path(os.fsdecode(error.filename or path))
            about_this = file == path or file in path.parents or path in file.parents or file.name.startswith(TEMPORARY)
            return error.errno if about_this else None
        error = error.__cause__ or error.__context__
    return errno.EIO if "inline_container" in text else None


@contextlib.contextmanager
def writing(path):
    """Return a context manager for code that writes to `path`. If a write fails, the exception that the code raises is
    replaced by an OSError. The OSError names the file and, if the disk may be the reason, the disk.
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
    """Return (descriptor, name) of a new file in the folder of `path`. The file is locked until the descriptor is
    closed.
    """
    while True:
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY, suffix=path.suffix)
        with contextlib.suppress(OSError):  # the file system has no locks
            fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return fd, name
        os.close(fd)  # another process's remove_leftovers deleted it before it was locked


def remove_leftovers(folder):
    """Remove the unfinished files that killed processes left in a folder. The unfinished files of live processes are
    locked; they are not removed.
    """
    for file in Path(folder).glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError), open(file, "rb") as f:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.unlink()


def _sync(path):
    """Wait until the contents of a file, or the list of the names in a folder, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def atomic(path):
    """Return a context manager that yields the Path of an empty temporary file, which lies in the folder of `path`. If
    the `with` block succeeds, the temporary file is synced to the disk and renamed to `path`. If the block fails, an
    earlier file at `path` is untouched. A failed write raises an OSError that names `path`.
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
    """Save `values` with torch.save, atomically."""
    # torch.save gets an open file, because with a name it hides the system's reason for a failed write
    with atomic(path) as tmp, open(tmp, "wb") as f:
        torch.save(values, f)


def read_json(file):
    """Return the dictionary that a JSON configuration file holds. Raises BadInput if the file holds no dictionary."""
    try:
        value = json.loads(file.read_text())
    except ValueError as e:
        raise BadInput(f"{file}: not a model configuration ({e})") from None
    if not isinstance(value, dict):
        raise BadInput(f"{file}: not a model configuration, but a {type(value).__name__}")
    return value


def check_output(flag, path, suffix):
    """Raise BadInput if the output file `path` of a flag cannot be written or does not end in `suffix`. Called before
    anything is computed for the file.
    """
    parent = next((d for d in path.absolute().parents if d.exists()), Path("/"))
    if path.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise BadInput(f"{flag} {path}: cannot be written as a file: it is a folder, or its folder is not writable")
    if path.suffix != suffix:
        raise BadInput(f"{flag} {path}: should end in {suffix}")


def numbered(path, i, count):
    """Return the path of result `i`: `path` itself if `count` is 1, else `path` with _000, _001 and so on before its
    suffix.
    """
    path = Path(path)
    return path if count == 1 else path.with_stem(f"{path.stem}_{i:03d}")
