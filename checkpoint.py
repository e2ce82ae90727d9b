"""Weights on disk: headers, strict streaming loads, atomic saves.

A file is first only looked at: `read_header` lists names, shapes, dtypes and offsets without reading one tensor, for
safetensors, zip pickles (.pth) and GGUF alike. `load_into` then streams tensor after tensor into a model built on the
meta device, converting on the way, so that host memory holds the weights once.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gguf_file


class BadInput(ValueError):
    """Something the user gave cannot be used. One line: which file or flag, the value, and what would be right."""


def return_freed_blocks():
    """From now on give freed blocks above 1 MB back to the system at once. glibc keeps them in holes up to 32 MB wide:
    a training step on a 1 GB model took 0.9 GB of activations for 0.37.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD


def cli(main):
    """Run a script's `main`. A BadInput, or a file that cannot be read or written, becomes one line on stderr and exit
    code 1; Ctrl-C ends without a traceback.
    """
    return_freed_blocks()
    rank = int(os.environ.get("RANK", 0))
    try:
        main()
    except (BadInput, OSError) as e:
        if rank:  # what all ranks have to say, the first one says, and torchrun ends the others meanwhile
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
        time.sleep(3)  # the rank that failed first has the word
        sys.exit(f"error: rank {rank}: another rank has ended; the last saved state stands, go on with --resume")


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E8M0": torch.float8_e8m0fnu,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor in a file: `nbytes` bytes at `offset` hold `shape` elements of `dtype`, contiguous unless `stride` is
    given.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple
    offset: int
    stride: tuple | None = None

    @property
    def numel(self):
        return math.prod(self.shape)

    @property
    def nbytes(self):
        """Bytes from the first element to the last."""
        if self.stride is None or not self.numel:
            return self.numel * self.dtype.itemsize
        return (1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride))) * self.dtype.itemsize

    scratch_bytes = nbytes  # that `read` takes

    @property
    def format(self):
        """What a file holds, in words: "bfloat16", or of what is decoded while it is read its kind, such as "Q4_K"."""
        return str(self.dtype).removeprefix("torch.")

    def read(self, scratch=None):
        """Read this tensor, and nothing else, from its file; into the bytes of `scratch` where given."""
        flat = self.read_bytes(scratch)
        flat = flat.view(self.dtype)
        return flat.view(self.shape) if self.stride is None else flat.as_strided(self.shape, self.stride)

    def read_to(self, device, scratch=None):
        """The same on a device; on the meta device nothing is read."""
        if torch.device(device).type == "meta":
            return torch.empty(self.shape, dtype=self.dtype, device="meta")
        return self.read(scratch).to(device)

    def part(self, begin, end):
        """The Entry of the rows [begin, end)."""
        row = self.nbytes // self.shape[0] if self.stride is None else self.stride[0] * self.dtype.itemsize
        return replace(self, shape=(end - begin, *self.shape[1:]), offset=self.offset + begin * row)

    def read_bytes(self, scratch=None):
        """The tensor's bytes as they are in its file (n,) uint8."""
        flat = torch.empty(self.nbytes, dtype=torch.uint8) if scratch is None else scratch[: self.nbytes]
        if self.nbytes:
            with open(self.file, "rb", buffering=0) as f:
                f.seek(self.offset)
                view = memoryview(flat.numpy())
                while view:  # one read() returns at most 2 GiB
                    n = f.readinto(view)
                    if not n:
                        raise BadInput(
                            f"{self.file}: ended while reading a tensor of shape {self.shape}; the file is truncated"
                        )
                    view = view[n:]
        return flat


@dataclass(frozen=True)
class GgufEntry(Entry):
    """A tensor in blocks of a few bits per weight, of a `kind` such as "Q4_K", in a GGUF file; read as fp32."""

    kind: str = ""
    stored: int = 0

    @property
    def nbytes(self):
        return self.stored

    @property
    def scratch_bytes(self):
        return 4 * self.numel + self.stored

    @property
    def format(self):
        return self.kind

    def part(self, begin, end):
        row = self.stored // self.shape[0]
        return replace(super().part(begin, end), stored=(end - begin) * row)

    def read(self, scratch=None):
        out = torch.empty(self.numel) if scratch is None else scratch[: 4 * self.numel].view(torch.float32)
        data = self.read_bytes(None if scratch is None else scratch[4 * self.numel :])
        try:
            gguf_file.decode(data.numpy(), self.kind, out.numpy())
        except NotImplementedError:  # the gguf package, of a kind that it does not know
            raise BadInput(f"{self.file}: weights in {self.kind}, which the gguf package does not decode") from None
        return out.view(self.shape)


def read_header(path):
    """List a weight file without reading its tensors.

    Returns ({name: Entry}, metadata). Raises BadInput, in one line, for a file that is truncated, is not what its
    first bytes should be, or is a pickle holding anything but tensors.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            head = f.read(9)
            if head[:4] == b"PK\x03\x04":  # a zip; the first two bytes alone may be a header's length
                return _pickle_header(path), {}
            if head[:4] == gguf_file.MAGIC:
                return _gguf_header(path)
            n = int.from_bytes(head[:8], "little")
            if head[8:] != b"{" or n > 1 << 30:
                if head[:1] == b"\x80":
                    raise BadInput(
                        f"{path}: an old-style pickle; save it again with torch.save (zip format) or as .safetensors"
                    )
                web = head.lstrip()[:1] in (b"<", b"{")
                raise BadInput(
                    f"{path}: not a weight file, it begins with {head!r}"
                    + (" (a web page or text under this name?)" if web else "")
                )
            if size < 8 + n:
                raise BadInput(f"{path}: truncated, its header alone needs {8 + n:,} bytes and the file has {size:,}")
            f.seek(8)
            header = json.loads(f.read(n))
            metadata = header.pop("__metadata__", None) or {}
            entries = {
                name: Entry(path, DTYPES[v["dtype"]], tuple(v["shape"]), 8 + n + v["data_offsets"][0])
                for name, v in header.items()
            }
            wrong = [
                name
                for name, v in header.items()
                if v["data_offsets"][1] - v["data_offsets"][0] != entries[name].nbytes
            ]
            if wrong:
                raise BadInput(f"{path}: the header's offsets do not fit the shape of {wrong[0]}")
            end = max((8 + n + v["data_offsets"][1] for v in header.values()), default=8 + n)
    except OSError as e:
        raise BadInput(f"{path}: {e.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
        if isinstance(e, BadInput):
            raise
        raise BadInput(f"{path}: not a safetensors header ({type(e).__name__}: {e})") from None
    if size < end:
        raise BadInput(f"{path}: truncated, its header promises {end:,} bytes and the file has {size:,}")
    return entries, metadata


def _pickle_header(path):
    # In fake mode torch.load builds no storage, only notes where in the file each one lies.
    try:
        with FakeTensorMode():
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as e:
        found = re.search(r"(?:GLOBAL|global) `?([\w.]+)", str(e))
        raise BadInput(
            f"{path}: this pickle holds code or objects ({found.group(1) if found else 'not plain tensors'}), "
            "only tensors are accepted"
        ) from None
    except (RuntimeError, OSError, EOFError) as e:
        raise BadInput(f"{path}: not a readable torch file ({str(e).splitlines()[0]})") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) and v.layout == torch.strided for k, v in state.items()
    ):
        raise BadInput(f"{path}: expected a dictionary of tensors, found {type(state).__name__}")
    return {
        name: Entry(
            path,
            t.dtype,
            tuple(t.shape),
            t.untyped_storage()._checkpoint_offset + t.storage_offset() * t.itemsize,
            None if t.is_contiguous() else t.stride(),
        )
        for name, t in state.items()
    }


def _gguf_header(path):
    try:
        tensors, metadata = gguf_file.read(path)
    except ValueError as e:
        raise BadInput(f"{path}: {e}") from None
    return {
        name: Entry(path, DTYPES[t.kind], t.shape, t.offset)
        if t.kind in DTYPES
        else GgufEntry(path, torch.float32, t.shape, t.offset, kind=t.kind, stored=t.nbytes)
        for name, t in tensors.items()
    }, metadata


def count_blocks(entries):
    """1 + the highest N of the tensors named blocks.N."""
    return 1 + max((int(n.split(".")[1]) for n in entries if re.match(r"blocks\.\d+\.", n)), default=-1)


def put(owner, leaf, tensor):
    """Give a module its weight `leaf`, frozen; where parallel/ has sharded that, only this rank's part of it."""
    old = getattr(owner, leaf)
    if hasattr(old, "placements"):
        from torch.distributed.tensor import distribute_tensor

        old.to_local().copy_(distribute_tensor(tensor, old.device_mesh, old.placements, src_data_rank=None).to_local())
    else:
        setattr(owner, leaf, torch.nn.Parameter(tensor, requires_grad=False))


def load_into(model, entries, device, dtype, fp32=lambda name: False, on_model_built=lambda model: None):
    """Stream `entries` into `model`, which was built on the meta device.

    Every floating tensor becomes `dtype`, or float32 where `fp32(name)` says so. Strict: BadInput lists missing,
    unexpected and mis-shaped keys. Weights come out frozen and the model in eval mode; on the meta device nothing is
    read. on_model_built(model) may change the still empty model (adapters, fp8, shards); what it takes out is not read.
    """
    return_freed_blocks()  # what decoding a tensor, or rounding it to 8 bits, takes
    want = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    problems = {
        "missing": [n for n in want if n not in entries],
        "unexpected": [n for n in entries if n not in want],
        "mis-shaped": [
            f"{n} is {entries[n].shape}, should be {want[n]}"
            for n in want
            if n in entries and entries[n].shape != want[n]
        ],
    }
    if any(problems.values()):
        where = next(iter(entries.values())).file if entries else "an empty file"
        raise BadInput(
            f"{where}: keys do not fit: "
            + "; ".join(
                f"{len(v)} {kind} ({', '.join(v[:6])}{', ...' if len(v) > 6 else ''})"
                for kind, v in problems.items()
                if v
            )
        )
    for name, p in model.named_parameters():  # what on_model_built makes of them, such as shards, has the right dtype
        p.data = p.data.to(torch.float32 if fp32(name) else dtype)
    on_model_built(model)
    left = want.keys() & dict(model.named_parameters()).keys()
    # What is converted on the way passes through one buffer: freed between tensors that stay, it would leave holes in
    # the heap.
    scratch = torch.empty(max(e.scratch_bytes for e in entries.values()), dtype=torch.uint8)
    for name in sorted(left, key=lambda n: (str(entries[n].file), entries[n].offset)):
        owner, _, leaf = name.rpartition(".")
        owner, goal = model.get_submodule(owner), torch.float32 if fp32(name) else dtype
        if leaf == "weight" and hasattr(owner, "load"):  # fp8.Fp8Linear
            owner.load(entries[name], device, scratch)
            continue
        stays = entries[name].dtype == goal and torch.device(device).type == "cpu"
        put(owner, leaf, entries[name].read_to(device, None if stays else scratch).to(goal).contiguous())
    return model.eval()


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


def save(path, tensors, metadata=None):
    """Write tensors as safetensors, atomically. One of another file may be given as its Entry, which is read in its
    turn. Metadata values become strings. Equal contents give equal bytes, which safetensors' own writer does not: it
    shuffles the metadata.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # so that all are aligned
    tensors = {name: tensors[name] for name in order}
    header, end = {}, 0
    if metadata:
        header["__metadata__"] = {k: str(v) for k, v in sorted(metadata.items())}
    for name, t in tensors.items():
        begin, end = end, end + math.prod(t.shape) * t.dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    with atomic(path) as tmp, open(tmp, "wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        for t in tensors.values():
            t = t if isinstance(t, torch.Tensor) else t.read()
            f.write(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def save_pickle(path, values):
    """torch.save, atomically."""
    # by an open file: given a name, torch.save hides the system's reason when a write fails
    with atomic(path) as tmp, open(tmp, "wb") as f:
        torch.save(values, f)


def load(path):
    """Read every tensor of one small safetensors file: ({name: tensor}, metadata)."""
    entries, metadata = read_header(path)
    return {name: e.read() for name, e in entries.items()}, metadata
