"""Block swap: frozen blocks stay on the host and are copied to the device to run. The device has room for two of them.

The tensors of a block lie in one flat buffer, so one copy moves them all. A block is copied while the previous block
computes. Blocks are copied in ascending order in the forward pass, and in descending order in the backward pass, where
activation checkpointing runs each block again before its gradient. The two blocks that are on the device when the order
turns are used in both passes. Weights are never copied back, since streamed weights are not trained. The input of each
block, which activation checkpointing keeps, lies on the host too: for a long clip the inputs take more memory than the
weights. On a CPU, the same code copies within host memory. --stream_blocks N uses this module, and so does a text
encoder that does not fit on a GPU. The idea is that of ZeRO-Infinity (Rajbhandari et al., 2021).
"""

import contextlib
import time
import weakref

import torch

from nanowan.formats.dit import keep_fp32
from nanowan.formats.header import count_blocks
from nanowan.memory.host import host_buffer

ALIGNED = 256  # tensors in a flat buffer begin at multiples of this many bytes: alignment decides which kernels run


def spread(count, total):
    """Return `count` of `total` block numbers, evenly spaced, so that about the same number of blocks is computed
    between one copy and the next.
    """
    return [i for i in range(total) if (i + 1) * count // total > i * count // total]


def device_bytes(entries, dtype, fp8, streamed):
    """Return the bytes that a DiT's weights take on the device if `streamed` of its blocks are streamed, including the
    two streamed blocks that are there at a time. entries: the headers {name: Entry} of its files. fp8: whether the
    matrices in its blocks are in 8 bits.
    """
    blocks, total = {n for n in entries if n.startswith("blocks.")}, count_blocks(entries)
    resident = 1 if not streamed else min(1, (total - streamed + 2) / total)  # two streamed blocks at a time

    def nbytes(name, entry):
        in_fp8 = fp8 and name in blocks and len(entry.shape) == 2
        return entry.numel * (4 if keep_fp32(name) else 1 if in_fp8 else dtype.itemsize)

    return round(sum(nbytes(n, e) * (resident if n in blocks else 1) for n, e in entries.items()))


def frozen(module):
    """Return [(dictionary, key)] for a module's frozen parameters and buffers, each of which is dictionary[key]."""
    return [
        (values, k)
        for m in module.modules()
        for values in (m._parameters, m._buffers)
        for k, t in values.items()
        if t is not None and not t.requires_grad
    ]


class Flat:
    """Tensors of a module that lie together in one buffer. After `settle` was called, they lie either in `home`, a
    buffer on the host, or in a copy of `home` on the device. entries: [(dictionary, key)] of the tensors, as `frozen`
    returns them.
    """

    home = None

    def __init__(self, entries):
        self.entries, self.slots, self.nbytes = entries, [], 0
        for values, k in entries:
            t = values[k]
            self.slots.append((self.nbytes, t.nbytes, t.dtype, t.shape, t.stride()))
            self.nbytes += -(-t.nbytes // ALIGNED) * ALIGNED

    def views(self, flat):
        """Return the tensors as views of `flat`, a buffer (nbytes,) uint8."""
        return [
            flat[begin : begin + n].view(dtype).as_strided(shape, stride)
            for begin, n, dtype, shape, stride in self.slots
        ]

    def tensors(self):
        return [values[k] for values, k in self.entries]

    def settle(self, home):
        """Move the tensors to the buffer `home`. Tensors on the meta device get their place in the buffer, but no
        values yet.
        """
        self.home = home
        for (values, k), view in zip(self.entries, self.views(home)):
            if not values[k].is_meta:
                values[k].data = view.copy_(values[k].data)
            elif isinstance(values[k], torch.nn.Parameter):
                values[k] = torch.nn.Parameter(view, requires_grad=False)
            else:
                values[k] = view

    def use(self, flat):
        """Make the module compute with the tensors in `flat`, which is `home` or a copy of `home`."""
        for t, view in zip(self.tensors(), self.views(flat)):
            t.data = view


class InputsOnHost:
    """A store on the host for the tensors that activation checkpointing saves, like torch.autograd.graph.save_on_cpu.
    There are two differences. A buffer is pinned once, at the size of the first tensor that it holds, and then reused.
    A Copier makes the copies while the device computes: in the backward pass, fetching a tensor also starts the copy of
    the tensor that was saved before it. `hooks()` returns the context manager in which tensors are stored like this.
    """

    def __init__(self, copier):
        self.copier, self.device = copier, copier.device
        self.free = []
        self.last, self.leaving = None, None  # weakref to the newest Kept; (copy, tensor) being copied to the host

    def hooks(self):
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, t):
        # older versions of torch's checkpoint also save an empty tensor on the CPU
        return Kept(self, t) if t.device.type == self.device.type and t.numel() else t

    def _unpack(self, kept):
        return kept.unpack() if isinstance(kept, Kept) else kept

    def take(self, nbytes):
        """Return a free buffer of at least `nbytes` bytes, or a new one, which replaces a smaller free one."""
        self.free.sort(key=len)
        for i, flat in enumerate(self.free):
            if len(flat) >= nbytes:
                return self.free.pop(i)
        if self.free:
            del self.free[-1]
        return host_buffer(nbytes, self.device)

    def let_go(self):
        """Drop the reference to the device tensor that was last copied to the host, so that the tensor's memory can be
        reused after the copy. With record_stream, the memory would become free only once the host sees that the copy
        is done, many blocks later.
        """
        if self.leaving is not None:
            self.copier.wait(self.leaving[0])
            self.leaving = None


class Kept:
    """A tensor that is kept on the host. Its buffer becomes free when nothing refers to this object any more."""

    def __init__(self, store, t):
        self.store, self.flat, self.back = store, None, None
        store.let_go()
        self.flat = store.take(t.nbytes)
        self.host = self.flat[: t.nbytes].view(t.dtype).view(t.shape)
        self.before, store.last = store.last, weakref.ref(self)
        store.leaving = store.copier.copy(self.host, t), t

    def __del__(self):
        if self.back is not None:
            self.store.copier.wait(self.back[1])
        if self.flat is not None:
            self.store.free.append(self.flat)

    def fetch(self):
        """Start to copy the tensor back to the device, unless this has begun already."""
        if self.back is None:
            t = torch.empty_like(self.host, device=self.store.device)
            self.back = t, self.store.copier.copy(t, self.host)

    def unpack(self):
        self.store.let_go()
        self.fetch()
        (t, copied), self.back = self.back, None
        self.store.copier.wait(copied)
        before = self.before and self.before()
        if before is not None:
            before.fetch()
        return t


class Stream:
    """The blocks of a model that are copied from the host while the model runs, and a record of these copies. flats:
    {block number: Flat} of the blocks on the host. copies: block numbers in the order in which they were copied. bytes:
    number of bytes copied.
    """

    def __init__(self, model, flats, copier):
        self.flats, self.numbers, self.copier, self.cuda = flats, sorted(flats), copier, copier.stream is not None
        self.phase, self.lowest = "forward", None  # the blocks' current pass; the lowest block that will run again
        self.copies, self.bytes, self.seconds, self.waits = [], 0, 0.0, []
        self.inputs, self.ring = InputsOnHost(copier), None
        for i in self.numbers:
            model.blocks[i].register_forward_pre_hook(lambda block, args, i=i: self._before(i))
        if hasattr(model, "surround_blocks"):  # a DiT, through which gradients may pass
            model.checkpointing, model.cache_text_kv = True, False
            model.surround_blocks(self.inputs.hooks, lambda: (self._in_phase("recorded"), self._in_phase("recompute")))

    @contextlib.contextmanager
    def _in_phase(self, phase):
        """Return a context manager that sets the phase: a forward pass without gradients ("forward"), a forward pass
        whose blocks will run again ("recorded"), or the second run of blocks, in the backward pass ("recompute").
        """
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def open(self):
        """Allocate memory for two blocks on the device."""
        self.close()
        largest, device = max(f.nbytes for f in self.flats.values()), self.copier.device
        self.ring = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(2)]

    def close(self):
        """Free the memory of the two blocks on the device. A pass's last block may have started a copy for a next pass
        that never came; `close` waits for this copy.
        """
        self.copier.synchronize()
        for flat in self.flats.values():
            flat.use(flat.home)
        self.ring, self.resident, self.copied, self.current, self.lowest = None, [None, None], [None, None], None, None
        self.inputs.free.clear()

    def __del__(self):
        self.copier.synchronize()

    def ring_bytes(self):
        """Return the total size, in bytes, of the two buffers on the device."""
        return sum(map(len, self.ring))

    def _fetch(self, i):
        """Copy block i to the device unless it is already there. Of the two blocks on the device, the one that is not
        computing is overwritten.
        """
        if i in self.resident:
            return
        slot = next(s for s in (0, 1) if self.resident[s] is None or self.resident[s] != self.current)
        if self.resident[slot] is not None:
            evicted = self.flats[self.resident[slot]]
            evicted.use(evicted.home)
        flat, began = self.flats[i], time.perf_counter()
        goal = self.ring[slot][: flat.nbytes]
        self.copied[slot] = self.copier.copy(goal, flat.home)
        if not self.cuda:
            self.seconds += time.perf_counter() - began
        flat.use(goal)
        self.resident[slot] = i
        self.copies.append(i)
        self.bytes += flat.nbytes

    def next_block(self, i, phase):
        """Return the block to copy while block i runs in this phase (see _in_phase), or None if the two blocks with
        which the backward pass begins are already on the device.
        """
        at, first = self.numbers.index(i), self.numbers[0]
        if phase == "recompute":
            return first if i == self.lowest else self.numbers[at - 1]  # the next forward pass follows the lowest block
        if at + 1 < len(self.numbers):
            return self.numbers[at + 1]
        return first if self.lowest is None else None

    def _before(self, i):
        """Wait for the weights of block i, which is about to run, and start the copy of the next block."""
        if self.phase != "recompute" and i == self.numbers[0]:
            self.lowest = None
        if self.phase == "recorded" and self.lowest is None:
            self.lowest = i
        self._fetch(i)
        self.current = i
        copied = self.copied[self.resident.index(i)]
        if self.cuda:
            now = torch.cuda.current_stream(self.copier.device)
            ends = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            ends[0].record(now)
            self.copier.wait(copied)
            ends[1].record(now)
            self.waits.append(ends)
            while self.waits[0][1].query() and len(self.waits) > 1:
                self.seconds += self.waits[0][0].elapsed_time(self.waits.pop(0)[1]) / 1000
        following = self.next_block(i, self.phase)
        if following is not None:
            self._fetch(following)

    def waited(self):
        """Return the total time, in seconds, for which computing has waited for copies so far."""
        if self.cuda:
            torch.cuda.synchronize(self.copier.device)
            self.seconds += sum(a.elapsed_time(b) for a, b in self.waits) / 1000
            self.waits = []
        return self.seconds

    def report(self):
        return (
            f"streaming: {len(self.copies)} copies, {self.bytes / 1e9:.2f} GB, "
            f"computing waited {self.waited():.2f} s for them"
        )
