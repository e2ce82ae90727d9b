"""Host memory that a GPU copies from and to, and those copies, which run beside what the GPU computes.

The memory is pinned. Where that fails (WSL allows about 1 GB in all), a thread takes each copy through a small pinned
ring instead: copies and computation keep their order, and no copy holds up the launch of a block.
"""

import concurrent.futures
import contextlib
import mmap
import os
import sys

import torch

from nanowan.errors import BadInput

RING_SLOT = 256 << 20  # bytes of each of the ring's two buffers; half as many, and so on, where that cannot be pinned


def pin(address, nbytes):
    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0))


def unpin(address):
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))


# ---- memory ------------------------------------------------------------------------------------------------------
class HostPages(mmap.mmap):
    """Pages of host memory, which for a GPU are pinned until nothing refers to them any more. PyTorch's own pinned
    memory comes in powers of two.
    """

    can_pin = True  # until it has failed once in this process
    device = None  # the number of the GPU for which they are pinned

    def tensor(self):
        """All of it, uint8. It lives as long as this tensor or a view of it."""
        return torch.frombuffer(self, dtype=torch.uint8)

    def pin(self, device):
        """Pin them for copies to `device`, if that is a GPU; False where that fails."""
        if device.type != "cuda":
            return True
        self.address = self.tensor().data_ptr()
        try:
            pin(self.address, len(self))
        except RuntimeError:
            with contextlib.suppress(RuntimeError):
                torch.ones(1, device=device)  # the next launch, whatever it computes, raises the same error once more
            return False
        self.device = torch.cuda.current_device() if device.index is None else device.index
        return True

    def __del__(self):
        if self.device is not None and not sys.is_finalizing():
            try:
                torch.cuda.synchronize(self.device)  # a copy may be under way
            finally:
                unpin(self.address)


def new_pages(nbytes, file=-1, flags=mmap.MAP_PRIVATE):
    """HostPages of `nbytes` bytes, of an open file if its number is given. Raises BadInput where there is no room."""
    try:
        pages = HostPages(file, max(1, nbytes), flags=flags)
    except OSError as e:
        raise BadInput(f"{nbytes / 1e9:.2f} GB of host memory are needed ({e.strerror})") from None
    with contextlib.suppress(OSError, AttributeError):
        pages.madvise(mmap.MADV_HUGEPAGE)  # filled four times as fast
    return pages


def pinned(pages, device, quiet=False):
    """All of these HostPages (n,) uint8, pinned for copies to a device unless pinning has failed before."""
    if HostPages.can_pin and not pages.pin(torch.device(device)) and not quiet:
        HostPages.can_pin = False
        print(f"host memory: {len(pages) / 1e9:.2f} GB cannot be pinned; a thread copies in pieces", flush=True)
    return pages.tensor()


def host_buffer(nbytes, device, quiet=False):
    """New host memory (nbytes,) uint8 for copies to and from a device. quiet: whether it is pinned matters little."""
    return pinned(new_pages(nbytes), device, quiet)[:nbytes]


def shared_buffer(file, nbytes, device, create):
    """Host memory (nbytes,) uint8 that the ranks of a machine share, as a file: one creates it, then the others map it.
    Raises BadInput where the machine has too little shared memory.
    """
    if create:
        file.unlink(missing_ok=True)  # of a job that was killed
        try:
            with open(file, "wb") as f:
                os.posix_fallocate(f.fileno(), 0, nbytes)  # where room is short, writing would end the process
        except OSError as e:
            raise BadInput(
                f"{file}: {nbytes / 1e9:.1f} GB of shared memory are needed ({e.strerror}); in a container, raise its "
                "limit (docker: --shm-size)"
            ) from None
    with open(file, "r+b") as f:
        return pinned(new_pages(nbytes, f.fileno(), mmap.MAP_SHARED), device)


# ---- copies ------------------------------------------------------------------------------------------------------
class Copier:
    """Copies between host memory and a device, on a CUDA stream of their own; on a CPU at once."""

    def __init__(self, device):
        self.device = torch.device(device)
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.thread, self.ring, self.last = None, None, None  # for memory that is not pinned; its newest copy

    def copy(self, to, source):
        """Copy after what the device was given so far, and beside what comes. Returns what `wait` takes; until then
        neither tensor may be changed.
        """
        if self.stream is None:
            to.copy_(source)
            return None
        given = torch.cuda.current_stream(self.device).record_event()
        up = source.device.type == "cpu"
        if (source if up else to).is_pinned():
            with torch.cuda.stream(self.stream):
                self.stream.wait_event(given)
                to.copy_(source, non_blocking=True)
                return self.stream.record_event()
        self.thread = self.thread or concurrent.futures.ThreadPoolExecutor(1, "copies")
        self.last = self.thread.submit(self._copy_in_pieces, given, up, [to, source.contiguous()])
        return self.last

    @torch.no_grad()
    def _copy_in_pieces(self, given, up, pair):
        """In the thread: host to device if `up`. The list `pair` is emptied, so that this copy keeps no memory once it
        is waited for.
        """
        source, to = (pair.pop().flatten().view(torch.uint8) for _ in range(2))
        if self.ring is None:
            self.ring = [(slot, torch.cuda.Event()) for slot in pinned_slots(self.device)]
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(given)
            size = len(self.ring[0][0])
            for i, (there, here) in enumerate(zip(to.split(size), source.split(size))):
                slot, copied = self.ring[i % 2][0][: len(here)], self.ring[i % 2][1]
                copied.synchronize()  # the piece that was in this slot
                if up:
                    slot.copy_(here)
                    there.copy_(slot, non_blocking=True)
                    copied.record(self.stream)
                else:
                    slot.copy_(here, non_blocking=True)
                    copied.record(self.stream)
                    copied.synchronize()
                    there.copy_(slot)
            return self.stream.record_event()

    def wait(self, copied):
        """What the device is given from now on comes after this copy."""
        if isinstance(copied, concurrent.futures.Future):
            copied = copied.result()
        if copied is not None:
            torch.cuda.current_stream(self.device).wait_event(copied)

    def synchronize(self):
        """Wait until all copies are done."""
        if self.last is not None:
            concurrent.futures.wait([self.last])  # one thread: all before it are done too
        if self.stream is not None:
            self.stream.synchronize()


def pinned_slots(device):
    """Two buffers of RING_SLOT bytes, or of as many as can be pinned; where none can, the driver copies twice."""
    size = RING_SLOT
    while True:
        pages = new_pages(2 * size)
        if pages.pin(device) or size <= 1 << 20:
            return pages.tensor().chunk(2)
        size //= 2
