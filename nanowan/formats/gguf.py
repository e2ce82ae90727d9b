"""GGUF, the file format of llama.cpp and ComfyUI-GGUF: read the header, and decode quantized weights.

Layout (little-endian): "GGUF", version, number of tensors, number of metadata entries, the metadata; for each tensor
its name, dimensions (the fastest first), type and offset; then the data. Source: the format's description in ggml's
docs/gguf.md. The quantization types, and the way to decode them, come from the `gguf` package.
"""

import math
import struct
from typing import NamedTuple

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
LONGEST = 1 << 24  # largest number of elements, of up to 8 bytes each, of one metadata value
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # key of the original shape of a tensor that ComfyUI-GGUF has reshaped


class Tensor(NamedTuple):
    """One tensor in a file. kind: its type ("F16", "Q4_K", ...). offset, nbytes: where its data begins in the file, and
    the length of the data.
    """

    kind: str
    shape: tuple
    offset: int
    nbytes: int


def package():
    """Return the `gguf` package. If it is missing, raise ValueError, which says what to install."""
    try:
        import gguf
    except ImportError:
        raise ValueError("a GGUF file, which the gguf package reads: pip install gguf") from None
    return gguf


class Reader:
    """A reader that takes one value after another from a file of `size` bytes. Raises ValueError if the file ends too
    early, or if a value is too long.
    """

    def __init__(self, file, size):
        self.file, self.size = file, size

    def take(self, n):
        if n > self.size - self.file.tell():
            raise ValueError("truncated in its header")
        if n > LONGEST * 8:
            raise ValueError(f"metadata of {n:,} bytes in one value")
        return self.file.read(n)

    def scalar(self, code):
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self):
        return self.take(self.scalar("Q")).decode("utf-8", "replace")

    def value(self, kind):
        """Read and return one metadata value. kind: the number of its type in GGUF. An array of strings, which only
        tokenizers have, is skipped; the result is then None.
        """
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise ValueError(f"metadata of the unknown type {kind}")
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind in SCALARS:
            width = struct.calcsize("<" + SCALARS[kind])
            return struct.unpack(f"<{count}{SCALARS[kind]}", self.take(width * min(count, self.size)))
        if kind != STRING:
            raise ValueError(f"metadata with an array of the type {kind}")
        for _ in range(count):  # if count is too large, `take` raises at the end of the file
            self.take(self.scalar("Q"))
        return None


def read(path):
    """Return ({name: Tensor}, metadata) from a file's header. Raises ValueError, with the reason, if the file is
    truncated, is not valid GGUF, or has an unsupported version or type.
    """
    constants = package().constants
    size = path.stat().st_size
    with open(path, "rb") as f:
        r = Reader(f, size)
        if r.take(4) != b"GGUF" or (version := r.scalar("I")) not in (2, 3):
            raise ValueError(f"GGUF of a version that is not read ({version}); 2 and 3 are")
        count, n_metadata = r.scalar("Q"), r.scalar("Q")
        metadata = {}
        for _ in range(n_metadata):
            key = r.string()
            metadata[key] = r.value(r.scalar("I"))
        infos = {}
        for _ in range(count):
            name, n_dims = r.string(), r.scalar("I")
            if n_dims > 8 or name in infos:
                raise ValueError(f"{name} has {n_dims} dimensions, or appears twice")
            dims = [r.scalar("Q") for _ in range(n_dims)]
            infos[name] = dims, r.scalar("I"), r.scalar("Q")
        begin = f.tell()
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
        raise ValueError(f"general.alignment is {alignment!r}")
    begin += -begin % alignment
    tensors = {}
    for name, (dims, code, offset) in infos.items():
        try:
            kind = constants.GGMLQuantizationType(code)
        except ValueError:
            raise ValueError(f"{name} is of the type {code}, which the gguf package does not know") from None
        block, width = constants.GGML_QUANT_SIZES[kind]
        if dims and dims[0] % block:
            raise ValueError(f"{name} has rows of {dims[0]} elements, and blocks of {kind.name} have {block}")
        nbytes = math.prod(dims) // block * width
        if offset + nbytes > size - begin:
            raise ValueError(f"truncated, {name} ends at byte {begin + offset + nbytes:,} and the file has {size:,}")
        tensors[name] = Tensor(kind.name, original_shape(name, dims, metadata), begin + offset, nbytes)
    return tensors, metadata


def original_shape(name, dims, metadata):
    """Return the shape, slowest dimension first, that a tensor had before ComfyUI-GGUF reshaped it. dims: the
    dimensions in the header, fastest first. Raises ValueError if this shape does not fit `dims`.
    """
    shape = metadata.get(ORIGINAL_SHAPE + name, tuple(reversed(dims)))
    sizes = isinstance(shape, tuple) and all(isinstance(n, int) and n >= 0 for n in shape)
    if not sizes or math.prod(shape) != math.prod(dims):
        raise ValueError(f"{ORIGINAL_SHAPE}{name} is {shape}, and the tensor has {math.prod(dims):,} elements")
    return shape


def decode(data, kind, out):
    """Decode the quantized weights in `data` (a numpy array of uint8 that holds complete blocks) into `out` (fp32, one
    element for each weight). Only some blocks are decoded at a time, because decoding takes several times the memory of
    its result.
    """
    gguf = package()
    kind = gguf.GGMLQuantizationType[kind]
    block, width = gguf.GGML_QUANT_SIZES[kind]
    blocks, step = data.reshape(-1, width), max(1, (1 << 20) // block)
    for i in range(0, len(blocks), step):
        out[i * block : (i + step) * block] = gguf.quants.dequantize(blocks[i : i + step], kind).reshape(-1)
