"""Headers of weight files: names, shapes, dtypes and offsets of safetensors, zip pickles (.pth) and GGUF.

A tensor is read from its file only when its Entry's `read` is called. `save` writes all tensors of a file, and `load`
reads all tensors of a small file.
"""

import functools
import hashlib
import json
import math
import pickle
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nanowan.errors import BadInput
from nanowan.files import atomic

GGUF_MAGIC = b"GGUF"
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
    """One tensor in a file: a tensor of this `shape` and `dtype` is stored in `nbytes` bytes, beginning at `offset`.
    The tensor is contiguous unless `stride` is given.
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
        """The number of bytes from the beginning of the first element to the end of the last one."""
        if self.stride is None or not self.numel:
            return self.numel * self.dtype.itemsize
        return (1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride))) * self.dtype.itemsize

    scratch_bytes = nbytes  # the size in bytes of the buffer that `read` needs as `scratch`

    @property
    def format(self):
        """The name of the type in which the file stores the tensor: a dtype such as "bfloat16", or a kind such as
        "Q4_K".
        """
        return str(self.dtype).removeprefix("torch.")

    def read(self, scratch=None):
        """Read this tensor from its file and return it. scratch: a buffer (n,) uint8 to read into, with at least
        `scratch_bytes` bytes, or None.
        """
        flat = self.read_bytes(scratch)
        flat = flat.view(self.dtype)
        return flat.view(self.shape) if self.stride is None else flat.as_strided(self.shape, self.stride)

    def read_to(self, device, scratch=None):
        """Return this tensor on a device. On the meta device, an empty tensor is returned and nothing is read."""
        if torch.device(device).type == "meta":
            return torch.empty(self.shape, dtype=self.dtype, device="meta")
        return self.read(scratch).to(device)

    def part(self, begin, end):
        """Return an Entry for the rows [begin, end) of this tensor, along its first axis."""
        row = self.nbytes // self.shape[0] if self.stride is None else self.stride[0] * self.dtype.itemsize
        return replace(self, shape=(end - begin, *self.shape[1:]), offset=self.offset + begin * row)

    def read_bytes(self, scratch=None):
        """Return the tensor's bytes as the file stores them, (n,) uint8. scratch: as in `read`."""
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
    """A quantized tensor in a GGUF file. kind: its quantization type, such as "Q4_K". stored: the number of bytes that
    it takes in the file. `read` returns it dequantized, in fp32.
    """

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
        import nanowan.formats.gguf as gguf

        try:
            gguf.decode(data.numpy(), self.kind, out.numpy())
        except NotImplementedError:  # raised by the gguf package for a type that it cannot decode
            raise BadInput(f"{self.file}: weights in {self.kind}, which the gguf package does not decode") from None
        return out.view(self.shape)


def read_header(path):
    """Return ({name: Entry}, metadata) of a weight file without reading its tensors. Headers are cached until their
    files change.

    Raises BadInput, with a message of one line, for a file that is truncated, does not begin like a weight file, or is
    a pickle that holds anything but tensors.
    """
    path = Path(path)
    try:
        state = path.stat()
    except OSError as e:
        raise BadInput(f"{path}: {e.strerror}") from None
    # The header of a file that was just written is not cached: if the file is written again within one tick of its
    # modification time, the change would go unnoticed.
    settled = time.time() - state.st_mtime > 2
    known = state.st_ino, state.st_size, state.st_mtime_ns
    entries, metadata = _read_settled_header(path, known) if settled else _read_header(path)
    return {**entries}, {**metadata}


@functools.lru_cache(32)
def _read_settled_header(path, state):
    return _read_header(path)


def _read_header(path):
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            head = f.read(9)
            if head[:4] == b"PK\x03\x04":  # a zip; "PK" alone could be the length of a safetensors header
                return _pickle_header(path), {}
            if head[:4] == GGUF_MAGIC:
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
    # In fake mode, torch.load builds no storages; it only records the offset of each one in the file.
    try:
        with FakeTensorMode():
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as e:
        match = re.search(r"(?:GLOBAL|global) `?([\w.]+)", str(e))
        raise BadInput(
            f"{path}: this pickle holds code or objects ({match.group(1) if match else 'not plain tensors'}), "
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
    import nanowan.formats.gguf as gguf

    try:
        tensors, metadata = gguf.read(path)
    except ValueError as e:
        raise BadInput(f"{path}: {e}") from None
    return {
        name: Entry(path, DTYPES[t.kind], t.shape, t.offset)
        if t.kind in DTYPES
        else GgufEntry(path, torch.float32, t.shape, t.offset, kind=t.kind, stored=t.nbytes)
        for name, t in tensors.items()
    }, metadata


def count_blocks(entries):
    """Return the number of blocks of a model: 1 + the highest N among the tensors named blocks.N, or 0 if there are
    none.
    """
    return 1 + max((int(n.split(".")[1]) for n in entries if re.match(r"blocks\.\d+\.", n)), default=-1)


def in_file_order(tensors):
    """Return {name: tensor} in the order in which `save` writes the tensors. In this order, every tensor begins at a
    multiple of the size of its elements.
    """
    return {name: tensors[name] for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))}


def raw_bytes(tensor):
    """Return the bytes of a tensor as a numpy array, (n,) uint8. For an Entry, the tensor is read first."""
    tensor = tensor if isinstance(tensor, torch.Tensor) else tensor.read()
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def hash_of(tensors):
    """Return the SHA-256, in hex, of the tensors' data as `save` writes it after the header. Metadata does not change
    this hash.
    """
    digest = hashlib.sha256()
    for tensor in in_file_order(tensors).values():
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def save(path, tensors, metadata=None):
    """Write {name: tensor} as safetensors, atomically. In place of a tensor, the Entry of a tensor in another file may
    be given; that tensor is read only when it is written. Metadata values become strings. Equal tensors with equal
    metadata give equal bytes, which safetensors' own writer does not guarantee, because it shuffles the metadata.
    """
    tensors = in_file_order(tensors)
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
            f.write(raw_bytes(t))


def load(path):
    """Return ({name: tensor}, metadata) of a small file, with all tensors read."""
    entries, metadata = read_header(path)
    return {name: e.read() for name, e in entries.items()}, metadata
