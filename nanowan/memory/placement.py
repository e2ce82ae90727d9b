"""Place a model on the device or on the host, or stream some of its blocks from the host to the device."""

import torch

from nanowan.errors import BadInput
from nanowan.memory.host import host_buffer
from nanowan.memory.offload import Flat, Stream, frozen, spread


class Placement:
    """A model's place in memory: on the device while the model runs, on the host while other models need the room.
    `count` of its blocks always lie on the host and are streamed. Frozen weights do not change, so their copy on the
    host, once it exists, is kept, and nothing is copied back to it. Trained weights are not moved, since their
    optimizer states are on the device too.

    copier: a Copier. shared: whether all ranks of this machine share the copy on the host.
    """

    shared, stream = False, None

    def __init__(self, model, copier, count=0):
        self.model, self.copier = model, copier
        self.sharded = any(hasattr(p, "placements") for p in model.parameters())
        blocks = getattr(model, "blocks", [])
        if count > len(blocks):
            raise BadInput(f"--stream_blocks {count}: this model has {len(blocks)} blocks")
        self.streamed = {i: Flat(frozen(blocks[i])) for i in spread(count, len(blocks))}
        self.resident = []  # Flats of the tensors that are not streamed
        self._group()

    def _group(self):
        """Put all frozen tensors that are in no Flat yet into a new Flat: the tensors outside of streamed blocks, and
        tensors that were added to the model later.
        """
        if self.sharded:
            return
        known = {(id(values), k) for f in [*self.streamed.values(), *self.resident] for values, k in f.entries}
        if new := [(values, k) for values, k in frozen(self.model) if (id(values), k) not in known]:
            self.resident.append(Flat(new))

    def flats(self, whole):
        return [*self.streamed.values(), *(self.resident if whole else [])]

    def settle(self, whole=False, buffer=None):
        """Move the tensors of streamed blocks, or all frozen tensors if `whole`, to the host, into `buffer` or into new
        memory. Tensors on the meta device get a place there, but no values until the weights are loaded.
        """
        begin = 0
        for flat in self.flats(whole):
            if flat.home is None:
                end = begin + flat.nbytes
                flat.settle(host_buffer(flat.nbytes, self.copier.device) if buffer is None else buffer[begin:end])
                begin = end

    def nbytes(self, whole):
        """Return the bytes on the host that `settle` would still need. whole: as in `settle`. If nanowan/parallel has
        sharded the model, the bytes of this rank's shards are returned.
        """
        if self.sharded:
            return sum((p.to_local() if hasattr(p, "to_local") else p).nbytes for p in self.model.parameters())
        return sum(f.nbytes for f in self.flats(whole) if f.home is None)

    def start(self):
        """Make the model ready to run, after all its weights are loaded. Return this Placement."""
        self._group()
        if self.streamed:
            self.settle()
            self.stream = Stream(self.model, self.streamed, self.copier)
        self.to(self.copier.device)
        return self

    def is_on(self, device):
        return next(self.model.parameters()).device.type == device.type

    def to(self, device):
        """Move the model to `device`, which is either the device where the model runs or the host."""
        device = torch.device(device)
        if self.sharded:
            trained = [(p, p.data) for p in self.model.parameters() if p.requires_grad]
            self.model.to(device)
            for p, data in trained:
                p.data = data
        elif device.type != self.copier.device.type:
            if self.stream:
                self.stream.close()
            self.settle(whole=True)
            for flat in self.resident:
                flat.use(flat.home)
        else:
            for flat in self.resident:
                self._up(flat, device)
            if self.stream:
                self.stream.open()

    def _up(self, flat, device):
        if flat.home is None:
            for t in flat.tensors():
                t.data = t.data.to(device)
        elif device.type == "cpu":
            flat.use(flat.home)
        else:
            copy = torch.empty(flat.nbytes, dtype=torch.uint8, device=device)
            self.copier.wait(self.copier.copy(copy, flat.home))
            flat.use(copy)
