"""Allocate host memory for copies from and to a GPU, and run these copies while the GPU computes.

The memory is pinned. Where pinning fails (WSL allows about 1 GB in all), a thread moves the data of each copy through a
small pinned ring buffer. Copies and computation still run in the order in which they were launched, and Copier.copy
still returns at once, but Copier.wait blocks until the thread is done with the copy.
"""

import concurrent.futures
import contextlib
import mmap
import os
import sys

import torch

from nanowan.errors import BadInput

RING_SLOT = 256 << 20  # bytes of each of the ring's two buffers; halved until they can be pinned


def pin(address, nbytes):
    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0))


def unpin(address):
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))


# ---- memory ------------------------------------------------------------------------------------------------------
class HostPages(mmap.mmap):
    """Pages of host memory that can be pinned for a GPU. They stay allocated as long as something refers to them.
    PyTorch's own pinned memory is not used, because its sizes are rounded up to powers of two.
    """

    can_pin = True  # false after a call of `pinned` has reported a failure
    device = None  # the number of the GPU for which the pages are pinned

    def tensor(self):
        """Return all of the memory as a uint8 tensor. This tensor and its views keep the memory allocated."""
        return torch.frombuffer(self, dtype=torch.uint8)

    def pin(self, device):
        """Pin the pages for copies to a GPU. Return False if that fails. If `device` is a CPU, return True."""
        if device.type != "cuda":
            return True
        self.address = self.tensor().data_ptr()
        try:
            pin(self.address, len(self))
        except RuntimeError:
            with contextlib.suppress(RuntimeError):
                torch.ones(1, device=device)  # the next kernel launch, whichever it is, raises the same error again
            return False
        self.device = torch.cuda.current_device() if device.index is None else device.index
        return True

    def __del__(self):
        if self.device is not None and not sys.is_finalizing():
            try:
                torch.cuda.synchronize(self.device)  # a copy may still run
            finally:
                unpin(self.address)


def new_pages(nbytes, file=-1, flags=mmap.MAP_PRIVATE):
    """Return HostPages of `nbytes` bytes. file: the descriptor of an open file to map. Raises BadInput if there is not
    enough memory.
    """
    try:
        pages = HostPages(file, max(1, nbytes), flags=flags)
    except OSError as e:
        raise BadInput(f"{nbytes / 1e9:.2f} GB of host memory are needed ({e.strerror})") from None
    with contextlib.suppress(OSError, AttributeError):
        pages.madvise(mmap.MADV_HUGEPAGE)  # huge pages are filled four times as fast
    return pages


def pinned(pages, device, quiet=False):
    """Return these HostPages as a tensor (n,) uint8, pinned for copies to a device. If pinning fails, the tensor is not
    pinned, a line is printed, and later calls do not try to pin. quiet: if pinning fails, print nothing, and let later
    calls try again.
    """
    if HostPages.can_pin and not pages.pin(torch.device(device)) and not quiet:
        HostPages.can_pin = False
        print(f"host memory: {len(pages) / 1e9:.2f} GB cannot be pinned; a thread copies in pieces", flush=True)
    return pages.tensor()


def host_buffer(nbytes, device, quiet=False):
    """Return new host memory (nbytes,) uint8 for copies to and from a device. quiet: as in `pinned`."""
    return pinned(new_pages(nbytes), device, quiet)[:nbytes]


def shared_buffer(file, nbytes, device, create):
    """Return host memory (nbytes,) uint8 that the ranks of a machine share through a file. create: true on the one rank
    that creates the file before the other ranks map it. Raises BadInput if the machine has too little shared memory.
    """
    if create:
        file.unlink(missing_ok=True)  # a killed job may have left the file
        try:
            with open(file, "wb") as f:
                os.posix_fallocate(f.fileno(), 0, nbytes)  # without this check for room, writing could kill the process
        except OSError as e:
            raise BadInput(
                f"{file}: {nbytes / 1e9:.1f} GB of shared memory are needed ({e.strerror}); in a container, raise its "
                "limit (docker: --shm-size)"
            ) from None
    with open(file, "r+b") as f:
        return pinned(new_pages(nbytes, f.fileno(), mmap.MAP_SHARED), device)


# ---- copies ------------------------------------------------------------------------------------------------------
class Copier:
    """A queue of copies between host memory and a device, on a separate CUDA stream. On a CPU there is no queue: `copy`
    returns when the copy is done.
    """

    def __init__(self, device):
        self.device = torch.device(device)
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.thread, self.ring, self.last = None, None, None  # used if memory is not pinned; last: the newest copy

    def copy(self, to, source):
        """Start a copy from `source` to `to`, and return a handle for `wait`. The copy runs after all work that was
        launched before it, and in parallel with later work. Neither tensor may be changed before `wait` is called.
        """
        if self.stream is None:
            to.copy_(source)
            return None
        ready = torch.cuda.current_stream(self.device).record_event()
        up = source.device.type == "cpu"
        if (source if up else to).is_pinned():
            with torch.cuda.stream(self.stream):
                self.stream.wait_event(ready)
                to.copy_(source, non_blocking=True)
                return self.stream.record_event()
        self.thread = self.thread or concurrent.futures.ThreadPoolExecutor(1, "copies")
        self.last = self.thread.submit(self._copy_in_pieces, ready, up, [to, source.contiguous()])
        return self.last

    @torch.no_grad()
    def _copy_in_pieces(self, ready, up, pair):
        """Copy piece by piece through the ring buffer, from host to device if `up` is true, else from device to host.
        This runs in the Copier's thread. ready: the CUDA event after which the copy starts. pair: the list [to,
        source]; it is emptied, so that a finished copy keeps no memory.
        """
        source, to = (pair.pop().flatten().view(torch.uint8) for _ in range(2))
        if self.ring is None:
            self.ring = [(slot, torch.cuda.Event()) for slot in pinned_slots(self.device)]
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(ready)
            size = len(self.ring[0][0])
            for i, (there, here) in enumerate(zip(to.split(size), source.split(size))):
                slot, copied = self.ring[i % 2][0][: len(here)], self.ring[i % 2][1]
                copied.synchronize()  # wait for the piece that was in this slot
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
        """Make all work that is launched from now on run after a copy. copied: the handle that `copy` returned."""
        if isinstance(copied, concurrent.futures.Future):
            copied = copied.result()
        if copied is not None:
            torch.cuda.current_stream(self.device).wait_event(copied)

    def synchronize(self):
        """Wait until all copies are done."""
        if self.last is not None:
            concurrent.futures.wait([self.last])  # there is one thread, so all earlier copies are done too
        if self.stream is not None:
            self.stream.synchronize()


def pinned_slots(device):
    """Return two pinned buffers of RING_SLOT bytes, or of a smaller size if only that can be pinned. If no size can be
    pinned, the buffers are not pinned, and the driver copies the data once more, through pinned memory of its own.
    """
    size = RING_SLOT
    while True:
        pages = new_pages(2 * size)
        if pages.pin(device) or size <= 1 << 20:
            return pages.tensor().chunk(2)
        size //= 2
