"""What every Python of `python tests/fake_cuda` begins with."""

import os

import emulate
import torch
import torch.distributed as dist

torch.cuda.is_available = lambda: True  # PyTorch's own forbids forks to use the device


def on_cpu(talk):
    return lambda *args, device=None, **kwargs: talk(*args, **kwargs)


if os.environ["FAKE_CUDA"] == "emulate":
    emulate.Emulation().__enter__()
else:  # nothing is computed: the few numbers on which a script's way depends are given
    largest, finite = torch.Tensor.max, torch.Tensor.isfinite

    def length(t, *args, **kwargs):
        """The largest of some captions' lengths, or where a kernel should have written them, one that each has."""
        if not t.is_cuda or t.dtype != torch.int64 or args or kwargs:
            return largest(t, *args, **kwargs)
        n = emulate.host(t).max()
        return n if 0 < n <= 512 else torch.tensor(2)

    torch.Tensor.max = length
    torch.Tensor.isfinite = lambda t: torch.ones(1, dtype=torch.bool) if t.is_cuda else finite(t)
    # by which a pipeline's stages tell each other shapes, on the device if they are let
    dist.send_object_list, dist.recv_object_list = map(on_cpu, (dist.send_object_list, dist.recv_object_list))
