"""Load weights from files into models: names and shapes must match; tensors are streamed and converted one by one."""

from dataclasses import dataclass

import torch

from kernels.fp8 import Fp8Linear
from lora import base_name
from nanowan.errors import BadInput, return_freed_blocks
from nanowan.formats.header import Entry
from nanowan.formats.scaled import FP8, ScaledEntry
from nanowan.memory.host import host_buffer


def put(owner, leaf, tensor, dtype):
    """Set the parameter `leaf` of the module `owner` to the values of a tensor. A parameter on the meta device is
    replaced by a frozen parameter of this dtype. Any other parameter is filled in place; if nanowan/parallel has
    sharded the parameter, only this rank's shard is filled.
    """
    old = getattr(owner, leaf)
    if hasattr(old, "placements"):
        from torch.distributed.tensor import distribute_tensor

        tensor = distribute_tensor(tensor.to(dtype), old.device_mesh, old.placements, src_data_rank=None)
        old.to_local().copy_(tensor.to_local())
    elif old.is_meta:
        setattr(owner, leaf, torch.nn.Parameter(tensor.to(dtype).contiguous(), requires_grad=False))
    else:
        old.data.copy_(tensor)


def check_keys(model, entries):
    """Raise BadInput unless the names and shapes of `entries` {name: Entry} match the model's parameters exactly. The
    message lists missing, unexpected and mis-shaped keys.
    """
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
    lists = [f"{len(v)} {k} ({', '.join(v[:6])}{', ...' * (len(v) > 6)})" for k, v in problems.items() if v]
    if lists:
        where = next(iter(entries.values())).file if entries else "an empty file"
        raise BadInput(f"{where}: keys do not fit: {'; '.join(lists)}")


def load_weights(model, entries, device, dtype, fp32=lambda name: False):
    """Read `entries` {name: Entry} into a model, one tensor at a time in the order of the file, so that memory never
    holds the weights twice. Return the model in eval mode. Names and shapes must have been checked (check_keys).

    Parameters on the meta device are created on `device`, frozen, in `dtype`, or in fp32 if `fp32(name)` is true.
    Parameters that already have memory, such as offloaded ones on the host, are filled in place and keep their dtype.
    The weights of 8-bit layers are rounded on `device`, unless the file stores them in fp8 with scales. Adapters keep
    their values. Entries of blocks that only other ranks hold are not read. Of a sharded parameter, only this rank's
    shard is filled.

    If `device` is the meta device, nothing is read.
    """
    return_freed_blocks()  # decoding a tensor, or rounding it to 8 bits, needs memory only briefly
    names = {base_name(name): name for name, _ in model.named_parameters()}
    # Tensors that are converted pass through one buffer. Buffers freed between tensors that stay would leave holes in
    # the heap. For a GPU the buffer is pinned, if that is possible.
    scratch = host_buffer(max(e.scratch_bytes for e in entries.values()), device, quiet=True)
    for name in sorted(names.keys() & entries.keys(), key=lambda n: (str(entries[n].file), entries[n].offset)):
        entry, goal = entries[name], torch.float32 if fp32(name) else dtype
        owner, _, leaf = names[name].rpartition(".")
        owner = model.get_submodule(owner)
        if leaf == "weight" and isinstance(owner, Fp8Linear):
            _load_fp8(owner, entry, device, scratch)
            continue
        place = getattr(owner, leaf)
        where = device if place.is_meta or hasattr(place, "placements") else place.device
        stays = place.is_meta and entry.dtype == goal and torch.device(device).type == "cpu"
        put(owner, leaf, entry.read_to(where, None if stays else scratch), goal)
    return model.eval()


def _load_fp8(linear, entry, device, scratch):
    """Set the weight and scales of an Fp8Linear to those in the file if the file stores the weight in fp8 with scales.
    Otherwise round the weight to e4m3 with new scales.
    """
    place = linear.scales  # linear.scales is another tensor below
    if not isinstance(entry, ScaledEntry) or entry.stored.dtype not in FP8:
        weight8 = linear.quantize(entry.read_to(device, scratch))
    else:
        weight8 = entry.stored.read_to(device, scratch).clone()
        linear.set_scales(weight8, entry.scale.read_to(device))
    put(linear, "weight", weight8, weight8.dtype)
    if not place.is_meta and not hasattr(linear.weight, "placements"):
        linear.scales = place.copy_(linear.scales)


def load_into(model, entries, device, dtype):
    """Check that `entries` fit the model (check_keys), load them (load_weights), and return the model."""
    check_keys(model, entries)
    return load_weights(model, entries, device, dtype)


SLICE = 4 << 20  # bytes that are converted at once


@dataclass(frozen=True)
class CastEntry(Entry):
    """A tensor in a file that is cast to another dtype while it is read. The cast is done slice by slice, so that host
    memory holds no second copy of the tensor. source: the Entry of the tensor in its stored dtype.
    """

    source: Entry | None = None

    @property
    def nbytes(self):
        return self.source.nbytes

    @property
    def scratch_bytes(self):
        return 0

    @property
    def format(self):
        return self.source.format

    def read(self, scratch=None):
        if self.stride is not None or not self.numel or not self.shape:
            return self.source.read().to(self.dtype)
        out, rows = torch.empty(self.shape, dtype=self.dtype), self.shape[0]
        step = max(1, SLICE * rows // self.source.scratch_bytes)
        scratch = torch.empty(self.source.part(0, min(step, rows)).scratch_bytes, dtype=torch.uint8)
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            out[begin:end] = self.source.part(begin, end).read(scratch)
        return out


def cast(entries, dtype=None):
    """Return {name: Entry} with entries that convert their tensors to this dtype when they are read. Without a dtype,
    tensors keep the dtype of their file, except that 8-bit and GGUF weights, which are decoded while they are read,
    become bf16.
    """
    converted = {}
    for name, entry in entries.items():
        goal = dtype or (entry.dtype if type(entry) is Entry else torch.bfloat16)
        plain = type(entry) is Entry and entry.dtype == goal
        converted[name] = (
            entry if plain else CastEntry(entry.file, goal, entry.shape, entry.offset, entry.stride, entry)
        )
    return converted
