"""Where a model lies: on the accelerator, on the host, or with some of its blocks streamed from there."""

import torch

from nanowan.memory.offload import Stream


class Placement:
    """A part in memory: on the accelerator while it runs, on the host while it makes room for others."""

    shared = False  # with the other ranks of this machine

    def __init__(self, model):
        self.model = model

    def is_on(self, device):
        return next(self.model.parameters()).device.type == device.type

    def to(self, device):
        """Move all but what is trained: adapters stay where their optimizer's states are."""
        trained = [(p, p.data) for p in self.model.parameters() if p.requires_grad]
        self.model.to(device)
        for p, data in trained:
            p.data = data


class SharedPlacement(Placement):
    """A part whose host copy is that of all ranks of a machine: since nothing in it changes, it is only returned to."""

    shared = True

    def __init__(self, model):
        super().__init__(model)
        self.host = [(t, t.data) for t in [*model.parameters(), *model.buffers()] if not t.requires_grad]

    def to(self, device):
        if torch.device(device).type != "cpu":
            super().to(device)
            return
        for t, data in self.host:
            t.data = data


class StreamedPlacement(Placement):
    """A DiT of which some blocks stay on the host (offload.Stream); the rest moves as any part does."""

    def __init__(self, model, count, device, buffer=None):
        super().__init__(model)
        self.shared = buffer is not None
        self.stream = Stream(model, count, device, buffer)

    def to(self, device):
        self.stream.to(device)
