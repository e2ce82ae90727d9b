"""Looks for memory that two CUDA streams, or a stream and the host, use without waiting for each other.

    python tests/helpers/races.py SCRIPT FLAGS

runs a script; ends with status 9 where it has found some, and says what. After CUDA's order of events, as
torch.cuda._sanitizer has it (of which the clocks are). That one compares only where tensors begin; here every byte of
them counts, host memory that nanowan/memory/host.py has pinned, and memory that is given back, or taken, while
another stream uses it. For one GPU, PyTorch's own operations, and without record_stream.
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

# beginnings of operations' names that use no tensor's memory
UNREAD = ("record_stream", "is_pinned", "_pin_memory", "set_", "empty", "new_empty")


class Access(NamedTuple):
    begin: int  # addresses
    end: int
    writes: bool
    stream: int
    number: int  # of all operations
    what: str


def extent(t):
    """The addresses (begin, end) between which a tensor's elements lie."""
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride()))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def where():
    """The line of this project that is being run."""
    other = str(Path(torch.__file__).parent), __file__
    ours = [f for f in traceback.extract_stack() if not f.filename.startswith(other)]
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"


class Races(TorchDispatchMode):
    """While it lasts, operations are recorded; `conflicts`: a line for each. One per process: PyTorch's trace has no
    end.
    """

    def __init__(self):
        super().__init__()
        self.clocks, self.number, self.conflicts = StreamSynchronizations(), 0, []
        self.begins, self.blocks = [], {}  # of device memory in use: {address: (stream, accesses)}
        self.host, self.pinned = [], {}  # accesses of streams to pinned host memory; {its first address: the last}
        clocks = self.clocks
        self.callback_error = None  # an exception of a callback, which PyTorch only logs
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
        """Whether what a stream (None: the host) does next comes after an access."""
        seen = self.clocks.host_sync_state if stream is None else self.clocks.current_sync_states.get(stream, {})
        return access.stream == stream or access.number <= seen.get(access.stream, -1)

    def compare(self, new, earlier, stream):
        """Record an access beside the earlier ones in the same memory."""
        for old in earlier:
            same = old.begin < new.end and new.begin < old.end
            if same and (old.writes or new.writes) and not self.done(old, stream):
                self.say(f"{'host' if stream is None else f'stream {stream}'} runs {new.what}", old)
        # who comes after this one comes after what it covers
        covered = [a for a in earlier if new.begin <= a.begin and a.end <= new.end]
        for a in covered:
            if new.writes or a.stream == stream and not a.writes:
                earlier.remove(a)
        if stream is not None:
            earlier.append(new)

    def allocated(self, address):
        """The stream that it belongs to may still use it as what it was before."""
        insort(self.begins, address)
        stream = torch.cuda.current_stream().cuda_stream
        self.number += 1
        self.clocks.update_seq_num(stream, self.number)
        taken = Access(address, sys.maxsize, True, stream, self.number, f"what this memory was before ({where()})")
        self.blocks[address] = stream, [taken]

    def freed(self, address):
        """The stream that allocated it may use it again at once."""
        stream, accesses = self.blocks.pop(address, (None, []))
        if address in self.begins:
            self.begins.remove(address)
        for a in accesses:
            if not self.done(a, stream):
                self.say("memory is given back", a)

    def unlocked(self, begin):
        """The host may use pinned memory otherwise."""
        end = self.pinned.pop(begin)
        for a in self.host:
            if begin <= a.begin < end and not self.done(a, None):
                self.say("pinned memory is unlocked", a)

    def is_pinned(self, access):
        return any(begin <= access.begin < end for begin, end in self.pinned.items())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.__name__
        self.number += 1
        number = self.number  # what the host waits for in `func` includes it
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
    """Call `run`; print what was found, and return it."""
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
