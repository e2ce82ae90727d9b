"""Where a part lies: on the device, on the host, or in frozen blocks streamed from there, two at a time on the device.

A streamed block is one flat buffer on the host, pinned for a GPU, and one copy, on a CUDA stream of its own, started a
block ahead, while the other computes: upwards in the forward pass, downwards in the backward pass, where checkpointing
runs each block again before its gradient. The two blocks that are on the device where the direction turns serve both
ways. Nothing is copied back, since nothing streamed is trained. What checkpointing keeps of each block, its input,
waits on the host as well: of a long clip that is more than the weights. On a CPU the same ring works without CUDA
streams. Used by --stream_blocks N of sample.py and train_lora.py; after the idea of ZeRO-Infinity (Rajbhandari et al.,
2021).
"""

import contextlib
import mmap
import os
import sys
import time
import weakref

import torch

from nanowan.errors import BadInput
from nanowan.formats.dit import keep_fp32
from nanowan.formats.header import count_blocks

ALIGNED = 256  # bytes, where each tensor of a flat buffer begins: kernels choose by alignment


def spread(count, total):
    """`count` block numbers of `total`, evenly apart: between two copies as much is computed everywhere."""
    return [i for i in range(total) if (i + 1) * count // total > i * count // total]


def device_bytes(entries, dtype, fp8, streamed):
    """What a DiT's weights take on the device, of which so many blocks wait on the host. entries: of its headers; fp8:
    whether the matrices in blocks are in 8 bits.
    """
    blocks = {n for n in entries if n.startswith("blocks.")}
    resident = 1 - min(1, streamed / max(1, count_blocks(blocks)))

    def nbytes(name, entry):
        in_fp8 = fp8 and name in blocks and len(entry.shape) == 2
        return entry.numel * (4 if keep_fp32(name) else 1 if in_fp8 else dtype.itemsize)

    return round(sum(nbytes(n, e) * (resident if n in blocks else 1) for n, e in entries.items()))


def frozen(module):
    """[(dictionary, key)] of a module's frozen parameters and its buffers."""
    return [
        (values, k)
        for m in module.modules()
        for values in (m._parameters, m._buffers)
        for k, t in values.items()
        if t is not None and not t.requires_grad
    ]


def flat_layout(tensors):
    """Where tensors lie in one buffer: ([(first byte, bytes, dtype, shape)], the buffer's size in bytes)."""
    slots, end = [], 0
    for t in tensors:
        slots.append((end, t.nbytes, t.dtype, t.shape))
        end += -(-t.nbytes // ALIGNED) * ALIGNED
    return slots, end


def views(flat, slots):
    """The tensors that lie in a buffer (bytes)."""
    return [flat[begin : begin + n].view(dtype).view(shape) for begin, n, dtype, shape in slots]


def pin(address, nbytes):
    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0))


def unpin(address):
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))


class HostPages(mmap.mmap):
    """Pages of host memory, which for a GPU are locked until nothing refers to them any more. PyTorch's own pinned
    memory comes in powers of two.
    """

    device = None  # the number of the GPU for which they are locked

    def tensor(self):
        """All of it, uint8. It lives as long as this tensor or a view of it."""
        return torch.frombuffer(self, dtype=torch.uint8)

    def lock(self, device):
        """For copies to `device`, if that is a GPU."""
        if device.type == "cuda":
            self.address = self.tensor().data_ptr()
            pin(self.address, len(self))
            self.device = torch.cuda.current_device() if device.index is None else device.index

    def __del__(self):
        if self.device is not None and not sys.is_finalizing():
            try:
                torch.cuda.synchronize(self.device)  # a copy may be under way
            finally:
                unpin(self.address)


def host_buffer(nbytes, device):
    """A buffer (nbytes,) uint8 in host memory, for copies to a device. Raises BadInput where there is no room."""
    try:
        pages = HostPages(-1, nbytes, flags=mmap.MAP_PRIVATE)
    except OSError as e:
        raise BadInput(f"--stream_blocks: {nbytes / 1e9:.2f} GB of host memory are needed ({e.strerror})") from None
    pages.lock(device)
    return pages.tensor()


def share_host_copy(model, file, is_first, barrier, device):
    """One host copy of a model's frozen tensors for all ranks of a machine, in the shared memory `file`: the first rank
    fills it, the others, whose model is empty, take theirs from it. Returns the buffer. The file has no name any more
    once all have it, and ends with the last of them. Raises BadInput where the machine has too little shared memory.
    """
    order = [entry for block in model.blocks for entry in frozen(block)]
    order += [entry for entry in frozen(model) if not any(entry[0] is values and entry[1] == k for values, k in order)]
    slots, end = flat_layout([values[k] for values, k in order])
    if is_first:
        file.unlink(missing_ok=True)  # of a job that was killed
        try:
            with open(file, "wb") as f:
                os.posix_fallocate(f.fileno(), 0, end)  # else writing to it would end the process, where room is short
        except OSError as e:
            raise BadInput(
                f"{file}: {end / 1e9:.1f} GB of shared memory are needed ({e.strerror}); in a container, raise its "
                "limit (docker: --shm-size)"
            ) from None
    barrier()
    with open(file, "r+b") as f:
        pages = HostPages(f.fileno(), end)
    flat = pages.tensor()
    for (values, k), view in zip(order, views(flat, slots)):
        if is_first:
            view.copy_(values[k])
        values[k] = torch.nn.Parameter(view, requires_grad=False) if isinstance(values[k], torch.nn.Parameter) else view
    barrier()
    if is_first:
        file.unlink()
    pages.lock(device)
    return flat


class Flat:
    """The frozen tensors of a block in one flat buffer (bytes) on the host; without a copy where they lie so already,
    in a shared one.
    """

    def __init__(self, block, device, shared=None):
        self.tensors = [values[k] for values, k in frozen(block)]
        self.slots, end = flat_layout(self.tensors)
        if shared is not None:
            begin = self.tensors[0].data_ptr() - shared.data_ptr()
            self.host = shared[begin : begin + end]
            return
        self.host = host_buffer(end, device)
        for t, view in zip(self.tensors, views(self.host, self.slots)):
            t.data = view.copy_(t.data)

    def use(self, flat):
        """Let the block compute with the tensors in this copy of the buffer."""
        for t, view in zip(self.tensors, views(flat, self.slots)):
            t.data = view


class InputsOnHost:
    """Where checkpointing keeps its tensors, as torch.autograd.graph.save_on_cpu does; but the buffers are pinned once,
    at their own size, and used again, and copies run on the stream `copier` while the device computes: in the backward
    pass the tensor that was kept before another comes back together with it. `hooks()` is the context manager.
    copier: None on a CPU.
    """

    def __init__(self, device, copier):
        self.device, self.copier = device, copier
        self.free = []
        self.last, self.leaving = None, None  # weakref of the newest Kept; (event, tensor) of a copy to the host

    def hooks(self):
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, t):
        # older versions of torch's checkpoint also save an empty tensor of the CPU
        return Kept(self, t) if t.device.type == self.device.type and t.numel() else t

    def _unpack(self, kept):
        return kept.unpack() if isinstance(kept, Kept) else kept

    def take(self, nbytes):
        """A buffer of so many bytes or more. Where all free ones are smaller, one of them makes room."""
        self.free.sort(key=len)
        for i, flat in enumerate(self.free):
            if len(flat) >= nbytes:
                return self.free.pop(i)
        if self.free:
            del self.free[-1]
        return host_buffer(nbytes, self.device)

    def copy(self, to, source):
        """Copy after what the device was given so far, and beside what comes -> an event; None on a CPU."""
        if self.copier is None:
            to.copy_(source)
            return None
        self.copier.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.copier):
            to.copy_(source, non_blocking=True)
            return self.copier.record_event()

    def wait(self, event):
        """What the device is given from now on comes after a copy."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def let_go(self):
        """Of the tensor that was copied to the host last, whose memory the device may use again after that. Not by
        record_stream: that memory would be free only once the host sees the copy done, many blocks later.
        """
        if self.leaving is not None:
            self.wait(self.leaving[0])
            self.leaving = None


class Kept:
    """A tensor on the host, in a buffer that is free again once nothing refers to this."""

    def __init__(self, store, t):
        self.store, self.flat, self.back = store, None, None
        store.let_go()
        self.flat = store.take(t.nbytes)
        self.host = self.flat[: t.nbytes].view(t.dtype).view(t.shape)
        self.before, store.last = store.last, weakref.ref(self)
        event = store.copy(self.host, t)
        store.leaving = None if event is None else (event, t)

    def __del__(self):
        if self.back is not None:
            self.store.wait(self.back[1])
        if self.flat is not None:
            self.store.free.append(self.flat)

    def fetch(self):
        """Begin to copy the tensor back."""
        if self.back is None:
            t = torch.empty_like(self.host, device=self.store.device)
            self.back = t, self.store.copy(t, self.host)

    def unpack(self):
        self.store.let_go()
        self.fetch()
        (t, copied), self.back = self.back, None
        self.store.wait(copied)
        before = self.before and self.before()
        if before is not None:
            before.fetch()
        return t


class Stream:
    """Streams `count` blocks of a frozen model (its adapters apart), which comes from the host. `copies`: block numbers
    in the order of their copies; `bytes` copied; `waited()`: seconds that computing waited for them. Switches the
    model's checkpointing on. shared: the buffer that `share_host_copy` has put the model into.
    """

    copier = None  # the CUDA stream that copies

    def __init__(self, model, count, device, shared=None):
        self.model, self.device = model, torch.device(device)
        if count > len(model.blocks):
            raise BadInput(f"--stream_blocks {count}: this model has {len(model.blocks)} blocks")
        self.numbers = spread(count, len(model.blocks))
        self.phase, self.lowest = "forward", None  # what the blocks run for; the lowest one that will run again
        self.cuda = self.device.type == "cuda"
        if self.cuda:
            self.copier = torch.cuda.Stream(self.device)
        self.flats = {i: Flat(model.blocks[i], self.device, shared) for i in self.numbers}
        self.copies, self.bytes, self.seconds, self.waits = [], 0, 0.0, []
        self.inputs = InputsOnHost(self.device, self.copier)
        model.checkpointing, model.cache_text_kv = True, False
        model.surround_blocks(self.inputs.hooks, lambda: (self._in_phase("recorded"), self._in_phase("recompute")))
        for i in self.numbers:
            model.blocks[i].register_forward_pre_hook(lambda block, args, i=i: self._before(i))
        self.to(device)

    @contextlib.contextmanager
    def _in_phase(self, phase):
        """Blocks run in a forward pass that keeps nothing ("forward"), in one whose blocks will run once more
        ("recorded"), or for the second time, in the backward pass ("recompute").
        """
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def to(self, device):
        """All that is neither streamed nor trained to a device, with a ring there if that is where the model runs; else
        the ring is given up.
        """
        self.wait_for_copy()
        streamed = {id(t) for flat in self.flats.values() for t in flat.tensors}
        for t in [*self.model.parameters(), *self.model.buffers()]:
            if id(t) not in streamed and not t.requires_grad:
                t.data = t.data.to(device)
        for flat in self.flats.values():
            flat.use(flat.host)
        here = torch.device(device).type == self.device.type
        self.ring = (
            [torch.empty(self.ring_bytes() // 2, dtype=torch.uint8, device=device) for _ in range(2)] if here else None
        )
        self.resident, self.copied, self.current, self.lowest = [None, None], [None, None], None, None
        if not here:
            self.inputs.free.clear()

    def wait_for_copy(self):
        """Before memory is given up: wait for the copy that the last block began ahead, for a pass that never came."""
        if self.copier is not None:
            self.copier.synchronize()

    def __del__(self):
        self.wait_for_copy()

    def ring_bytes(self):
        """Bytes of the two buffers on the device."""
        return 2 * max((f.host.numel() for f in self.flats.values()), default=0)

    def _fetch(self, i):
        """Copy block i over the one of the two blocks on the device that is not computing, unless it is there."""
        if i in self.resident:
            return
        slot = next(s for s in (0, 1) if self.resident[s] is None or self.resident[s] != self.current)
        if self.resident[slot] is not None:
            evicted = self.flats[self.resident[slot]]
            evicted.use(evicted.host)
        flat, began = self.flats[i], time.perf_counter()
        goal = self.ring[slot][: flat.host.numel()]
        if self.cuda:
            self.copier.wait_stream(torch.cuda.current_stream(self.device))  # its last block has computed
            with torch.cuda.stream(self.copier):
                goal.copy_(flat.host, non_blocking=True)
                self.copied[slot] = torch.cuda.Event()
                self.copied[slot].record()
        else:
            goal.copy_(flat.host)
            self.seconds += time.perf_counter() - began
        flat.use(goal)
        self.resident[slot] = i
        self.copies.append(i)
        self.bytes += flat.host.numel()

    def next_block(self, i, phase):
        """Which block is wanted after block i; None where both that the backward pass begins with are here."""
        at, first = self.numbers.index(i), self.numbers[0]
        if phase == "recompute":
            return first if i == self.lowest else self.numbers[at - 1]  # after the lowest comes the next pass
        if at + 1 < len(self.numbers):
            return self.numbers[at + 1]
        return first if self.lowest is None else None

    def _before(self, i):
        """Block i is about to run: have its weights here, and start the copy of the next."""
        if self.phase != "recompute" and i == self.numbers[0]:
            self.lowest = None
        if self.phase == "recorded" and self.lowest is None:
            self.lowest = i
        self._fetch(i)
        self.current = i
        if self.cuda:
            now = torch.cuda.current_stream(self.device)
            ends = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            ends[0].record(now)
            now.wait_event(self.copied[self.resident.index(i)])
            ends[1].record(now)
            self.waits.append(ends)
            while self.waits[0][1].query() and len(self.waits) > 1:
                self.seconds += self.waits[0][0].elapsed_time(self.waits.pop(0)[1]) / 1000
        following = self.next_block(i, self.phase)
        if following is not None:
            self._fetch(following)

    def waited(self):
        """Seconds so far that computing waited for copies."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
            self.seconds += sum(a.elapsed_time(b) for a, b in self.waits) / 1000
            self.waits = []
        return self.seconds

    def report(self):
        return (
            f"streaming: {len(self.copies)} copies, {self.bytes / 1e9:.2f} GB, "
            f"computing waited {self.waited():.2f} s for them"
        )


# ---- where a part lies -------------------------------------------------------------------------------------------
