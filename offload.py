"""Streaming frozen blocks: their weights stay in host memory and come to the device two at a time, each while the one
before it runs.

A streamed block is one flat buffer on the host, pinned for a GPU, and one copy, on a stream of its own, started a block
ahead: upwards in the forward pass, downwards in the backward pass, where checkpointing runs each block again before its
gradient. The two blocks that are on the device where the direction turns serve both ways. Nothing is copied back, since
nothing streamed is trained. What checkpointing keeps of each block, its input, waits on the host as well: of a long
clip that is more than the weights. On a CPU the same ring works without streams. Used by --stream_blocks N of sample.py
and train_lora.py; after the idea of ZeRO-Infinity (Rajbhandari et al., 2021).
"""

import os
import time

import torch

from checkpoint import BadInput

ALIGNED = 256  # bytes, where each tensor of a flat buffer begins: kernels choose by alignment


def spread(count, total):
    """`count` block numbers of `total`, evenly apart: between two copies as much is computed everywhere."""
    return [i for i in range(total) if (i + 1) * count // total > i * count // total]


def frozen(module):
    """[(dictionary, key)] of a module's frozen parameters and its buffers."""
    return [
        (values, k)
        for m in module.modules()
        for values in (m._parameters, m._buffers)
        for k, t in values.items()
        if t is not None and not t.requires_grad
    ]


def layout(tensors):
    """([(first byte, bytes, dtype, shape)] of tensors in one buffer, its size)."""
    places, end = [], 0
    for t in tensors:
        places.append((end, t.nbytes, t.dtype, t.shape))
        end += -(-t.nbytes // ALIGNED) * ALIGNED
    return places, end


def views(flat, places):
    return [flat[at : at + n].view(dtype).view(shape) for at, n, dtype, shape in places]


def pin(flat):
    """Lock a buffer in memory, for copies to a GPU; PyTorch's own pinned memory comes in powers of two."""
    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), flat.numel(), 0))


def unpin(flat):
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(flat.data_ptr()))


def share(model, file, first, barrier, cuda):
    """One host copy of a model's frozen tensors for all ranks of a machine, in the shared memory `file`: the first rank
    fills it, the others, whose model is empty, take theirs from it. Returns the buffer. Without a name once all have
    it, the file ends with the last of them.
    """
    order = [entry for block in model.blocks for entry in frozen(block)]
    order += [entry for entry in frozen(model) if not any(entry[0] is values and entry[1] == k for values, k in order)]
    places, end = layout([values[k] for values, k in order])
    if first:
        file.unlink(missing_ok=True)  # of a job that was killed
        try:
            with open(file, "wb") as f:
                os.posix_fallocate(f.fileno(), 0, end)  # else writing to it would end the process, where room is short
        except OSError as e:
            raise BadInput(
                f"{file}: {end / 1e9:.1f} GB of shared memory are needed ({e.strerror}); in a container, raise its limit (docker: --shm-size)"
            ) from None
        flat = torch.from_file(str(file), shared=True, size=end, dtype=torch.uint8)
    barrier()
    if not first:
        flat = torch.from_file(str(file), shared=True, size=end, dtype=torch.uint8)
    for (values, k), view in zip(order, views(flat, places)):
        if first:
            view.copy_(values[k])
        values[k] = torch.nn.Parameter(view, requires_grad=False) if isinstance(values[k], torch.nn.Parameter) else view
    barrier()
    if first:
        file.unlink()
    if cuda:
        pin(flat)
    return flat


class Flat:
    """The frozen tensors of a block in one flat buffer (bytes) on the host; without a copy where they lie so already,
    in a shared one.
    """

    def __init__(self, block, cuda, shared=None):
        self.tensors = [values[k] for values, k in frozen(block)]
        self.places, end = layout(self.tensors)
        if shared is not None:
            at = self.tensors[0].data_ptr() - shared.data_ptr()
            self.host = shared[at : at + end]
            return
        self.host = torch.empty(end, dtype=torch.uint8)
        if cuda:
            pin(self.host)
        for t, view in zip(self.tensors, views(self.host, self.places)):
            t.data = view.copy_(t.data)

    def place(self, flat):
        """Let the block compute with the tensors in this copy of the buffer."""
        for t, view in zip(self.tensors, views(flat, self.places)):
            t.data = view


class Stream:
    """Streams `count` blocks of a frozen model (its adapters apart), which comes from the host. `copies`: block numbers
    in the order of their copies; `bytes` copied; `waited()`: seconds that computing waited for them. Switches the
    model's checkpointing on. shared: the buffer that `share` has put the model into.
    """

    def __init__(self, model, count, device, shared=None):
        self.model, self.device = model, torch.device(device)
        if count > len(model.blocks):
            raise BadInput(f"--stream_blocks {count}: this model has {len(model.blocks)} blocks")
        self.numbers = spread(count, len(model.blocks))
        self.cuda = self.device.type == "cuda"
        self.flats = {i: Flat(model.blocks[i], self.cuda, shared) for i in self.numbers}
        self.copier = torch.cuda.Stream(self.device) if self.cuda else None
        self.copies, self.bytes, self.seconds, self.waits = [], 0, 0.0, []
        model.checkpointing, model.keeps_text = True, False
        run = model.run

        def kept_on_host(*args):
            with torch.autograd.graph.save_on_cpu(pin_memory=self.cuda):
                return run(*args)

        model.run = kept_on_host
        for i in self.numbers:
            model.blocks[i].register_forward_pre_hook(lambda block, args, i=i: self._before(i, args[0].requires_grad))
        self.to(device)

    def to(self, device):
        """All that is neither streamed nor trained to a device, with a ring there if that is where the model runs; else
        the ring is given up.
        """
        streamed = {id(t) for flat in self.flats.values() for t in flat.tensors}
        for t in [*self.model.parameters(), *self.model.buffers()]:
            if id(t) not in streamed and not t.requires_grad:
                t.data = t.data.to(device)
        for flat in self.flats.values():
            flat.place(flat.host)
        here = torch.device(device).type == self.device.type
        self.ring = (
            [torch.empty(self.ring_bytes() // 2, dtype=torch.uint8, device=device) for _ in range(2)] if here else None
        )
        self.held, self.copied, self.current, self.lowest = [None, None], [None, None], None, None

    def close(self):
        """Unlock the host's copies, before they are given up."""
        for flat in self.flats.values() if self.cuda else ():
            unpin(flat.host)

    def ring_bytes(self):
        """Bytes of the two buffers on the device."""
        return 2 * max((f.host.numel() for f in self.flats.values()), default=0)

    def _fetch(self, i):
        """Copy block i over the one of the two blocks on the device that is not computing, unless it is there."""
        if i in self.held:
            return
        slot = next(s for s in (0, 1) if self.held[s] is None or self.held[s] != self.current)
        if self.held[slot] is not None:
            self.flats[self.held[slot]].place(self.flats[self.held[slot]].host)
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
        flat.place(goal)
        self.held[slot] = i
        self.copies.append(i)
        self.bytes += flat.host.numel()

    def _before(self, i, needs_grad):
        """Block i is about to run: have its weights here, and start the copy of the next."""
        at, first = self.numbers.index(i), self.numbers[0]
        backward = torch._C._current_graph_task_id() != -1
        if not backward and i == first:
            self.lowest = None
        records = torch.is_grad_enabled() and (
            needs_grad or any(p.requires_grad for p in self.model.blocks[i].parameters())
        )
        if not backward and records and self.lowest is None:
            self.lowest = i
        self._fetch(i)
        self.current = i
        if self.cuda:
            now = torch.cuda.current_stream(self.device)
            ends = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            ends[0].record(now)
            now.wait_event(self.copied[self.held.index(i)])
            ends[1].record(now)
            self.waits.append(ends)
            while self.waits[0][1].query() and len(self.waits) > 1:
                self.seconds += self.waits[0][0].elapsed_time(self.waits.pop(0)[1]) / 1000
        if backward:
            self._fetch(first if i == self.lowest else self.numbers[at - 1])
        elif at + 1 < len(self.numbers):
            self._fetch(self.numbers[at + 1])
        elif self.lowest is None:  # the next pass begins at the first; a backward pass at the two that are here
            self._fetch(first)

    def waited(self):
        if self.cuda:
            torch.cuda.synchronize(self.device)
            self.seconds += sum(a.elapsed_time(b) for a, b in self.waits) / 1000
            self.waits = []
        return self.seconds

    def report(self):
        return f"streaming: {len(self.copies)} copies, {self.bytes / 1e9:.2f} GB, computing waited {self.waited():.2f} s for them"
