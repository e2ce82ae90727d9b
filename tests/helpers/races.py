"""Find memory that two CUDA streams, or a stream and the host, use without waiting for each other.

    python tests/helpers/races.py SCRIPT FLAGS

runs a script, prints the conflicts that it finds, and exits with status 9 if there are any. Which operations come
before which others is tracked by the clocks of torch.cuda._sanitizer. The sanitizer itself compares only the first
addresses of tensors. This file compares all their bytes. It also checks host memory that nanowan/memory/host.py has
pinned, and memory that is freed or allocated while another stream uses it. It covers one GPU and PyTorch's own
operations, and does not know record_stream.
"""

import functools
import gc
import runpy
import sys
import traceback
from bisect import bisect_right, insort
from pathlib import Path
from typing import NamedTuple

import torch
from torch.cuda import _gpu_trace as trace
from torch.cuda._sanitizer import StreamSynchronizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# how the names begin of operations that do not access the memory of a tensor
UNREAD = ("record_stream", "is_pinned", "_pin_memory", "set_", "empty", "new_empty")


class Access(NamedTuple):
    begin: int  # address of the first byte
    end: int  # address after the last byte
    writes: bool
    stream: int
    number: int  # of the operation, counted over all streams
    what: str


def extent(t):
    """Return (begin, end), the addresses between which a tensor's elements lie."""
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride()))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def where():
    """Return the line of this project that is running, as FILE:LINE."""
    other = str(Path(torch.__file__).parent), __file__
    ours = [f for f in traceback.extract_stack() if not f.filename.startswith(other)]
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"


class Races(TorchDispatchMode):
    """A context that records operations and collects `conflicts`, a line of text for each. A process can use it only
    once, because PyTorch's trace cannot be switched off.
    """

    def __init__(self):
        super().__init__()
        self.clocks, self.number, self.conflicts = StreamSynchronizations(), 0, []
        self.begins, self.blocks = [], {}  # device memory in use: addresses; {address: (stream, accesses)}
        self.host, self.pinned = [], {}  # accesses of streams to pinned host memory; {its begin: its end}
        clocks = self.clocks
        self.callback_error = None  # an exception in a callback; PyTorch would only log it
        torch._C._activate_gpu_trace()
        trace.register_callback_for_event_creation(clocks.create_event)
        trace.register_callback_for_event_deletion(clocks.delete_event)
        trace.register_callback_for_event_record(clocks.record_state)
        trace.register_callback_for_event_wait(lambda event, stream: clocks.stream_wait_for_event(stream, event))
        trace.register_callback_for_stream_creation(clocks.create_stream)
        trace.register_callback_for_device_synchronization(clocks.sync_all_streams)
        trace.register_callback_for_stream_synchronization(clocks.all_streams_wait_for_stream)
        trace.register_callback_for_event_synchronization(clocks.all_streams_wait_for_event)
        trace.register_callback_for_memory_allocation(functools.partial(self.call, self.allocated))
        trace.register_callback_for_memory_deallocation(functools.partial(self.call, self.freed))

    def call(self, f, address):
        try:
            f(address)
        except Exception as e:
            self.callback_error = e

    def say(self, what, access):
        self.conflicts.append(f"{where()}: {what}, while stream {access.stream} runs {access.what}")

    def done(self, access, stream):
        """Return whether everything that `stream` (None: the host) does from now on comes after an access."""
        seen = self.clocks.host_sync_state if stream is None else self.clocks.current_sync_states.get(stream, {})
        return access.stream == stream or access.number <= seen.get(access.stream, -1)

    def compare(self, new, earlier, stream):
        """Record an access, and a conflict for each earlier access to the same memory that it does not wait for.
        earlier: the earlier accesses, a list to which this one is added. stream: the stream of the access, or None for
        the host, whose accesses are compared but not added.
        """
        for old in earlier:
            same = old.begin < new.end and new.begin < old.end
            if same and (old.writes or new.writes) and not self.done(old, stream):
                self.say(f"{'host' if stream is None else f'stream {stream}'} runs {new.what}", old)
        # what comes after the new access also comes after the accesses that it covers
        covered = [a for a in earlier if new.begin <= a.begin and a.end <= new.end]
        for a in covered:
            if new.writes or a.stream == stream and not a.writes:
                earlier.remove(a)
        if stream is not None:
            earlier.append(new)

    def allocated(self, address):
        """Record an allocation as a write by the current stream, whose earlier operations may still use this memory for
        a freed tensor.
        """
        insort(self.begins, address)
        stream = torch.cuda.current_stream().cuda_stream
        self.number += 1
        self.clocks.update_seq_num(stream, self.number)
        taken = Access(address, sys.maxsize, True, stream, self.number, f"what this memory was before ({where()})")
        self.blocks[address] = stream, [taken]

    def freed(self, address):
        """Check that no other stream still uses the memory at `address`: the stream that allocated it may reuse it at
        once.
        """
        stream, accesses = self.blocks.pop(address, (None, []))
        if address in self.begins:
            self.begins.remove(address)
        for a in accesses:
            if not self.done(a, stream):
                self.say("memory is freed", a)

    def unlocked(self, begin):
        """Check that no stream still uses the pinned memory at `begin`: the host may reuse it once it is unpinned."""
        end = self.pinned.pop(begin)
        for a in self.host:
            if begin <= a.begin < end and not self.done(a, None):
                self.say("pinned memory is unlocked", a)

    def is_pinned(self, access):
        return any(begin <= access.begin < end for begin, end in self.pinned.items())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.__name__
        self.number += 1
        number = self.number  # taken first, so that a wait of the host within `func` includes this operation
        if any(isinstance(t, torch.Tensor) and t.is_cuda for t in tree_leaves((args, kwargs))):
            self.clocks.update_seq_num(torch.cuda.current_stream().cuda_stream, number)
        out = func(*args, **kwargs)
        if name.startswith(UNREAD):
            return out
        schema = func._schema
        named = list(zip(schema.arguments, args))
        named += [(a, kwargs[a.name]) for a in schema.arguments if a.name in kwargs]
        used = [(t, bool(a.alias_info and a.alias_info.is_write)) for a, value in named for t in tree_leaves(value)]
        used = [(t, writes) for t, writes in used if isinstance(t, torch.Tensor) and t.numel()]
        results = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.numel()]
        inputs = {t.untyped_storage().data_ptr() for t, _ in used}
        new = [t for t in results if t.untyped_storage().data_ptr() not in inputs]
        if not new and not any(writes for _, writes in used) and results:
            return out  # views
        used += [(t, True) for t in new]
        stream = torch.cuda.current_stream().cuda_stream if any(t.is_cuda for t, _ in used) else None
        for t, writes in used:
            access = Access(*extent(t), writes, stream, number, f"{name} ({where()})")
            if t.is_cuda:
                i = bisect_right(self.begins, access.begin) - 1
                if i >= 0:
                    self.compare(access, self.blocks[self.begins[i]][1], stream)
            elif self.is_pinned(access):
                self.compare(access, self.host, stream)
        return out


def watch(run):
    """Call `run`, print the conflicts that were found, and return them."""
    from nanowan.memory import host

    races, (pin, unpin) = Races(), (host.pin, host.unpin)
    host.pin = lambda address, nbytes: (pin(address, nbytes), races.pinned.update({address: address + nbytes}))
    host.unpin = lambda address: (races.unlocked(address), unpin(address))
    kept = None
    try:
        with races:
            kept = run()
            gc.collect()
            del kept
    finally:
        print(*dict.fromkeys(races.conflicts), sep="\n", file=sys.stderr)
    if races.callback_error:
        raise races.callback_error
    return races.conflicts


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    sys.exit(9 if watch(lambda: runpy.run_path(sys.argv[0], run_name="__main__")) else 0)
