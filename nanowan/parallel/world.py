"""The ranks of a run and how they communicate: device mesh, all-reduces, broadcasts, and a count of the bytes sent."""

import contextlib
import datetime
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from nanowan.errors import BadInput

# A long time, since ranks wait while others compute their share of the cache. If a rank dies, torchrun ends the job.
TIMEOUT = datetime.timedelta(hours=4)
BUCKET = 1 << 25  # approximate count of numbers that are summed over ranks at once
DIMS = ("dp", "cfg", "pp", "sp")  # dimensions of the mesh, slowest first, so that adjacent ranks exchange the most


class HostShare(NamedTuple):
    """The file through which the ranks of a machine share one host copy of a model's weights. The first rank fills the
    file, and the other ranks map it. path_of(model): the path of the file.
    """

    is_first: bool
    barrier: Callable[[], None]
    path_of: Callable[[str], Path]


class World:
    """This process among the `size` processes that torchrun started; a context manager. Without torchrun, or with
    distributed=False, it is a single rank, whose methods work without communication.

        with World(device, fsdp=args.fsdp, ulysses_size=args.ulysses_size) as world: ...

    rank, size          this process's number, and the number of all processes
    is_main             whether this is rank 0, the only rank that prints
    device              the device of this rank
    Of each of the next four pairs, the first is this rank's number in a group of ranks, the second the group's size:
    dp_rank, dp_size    the ranks that see different samples
    cfg_rank, cfg_size  the ranks that compute the two halves of guidance
    pp_rank, pp_size    the stages of a pipeline of blocks
    sp_rank, sp_size    the ranks that split a clip's tokens (Ulysses)
    clip_group_size     the number of ranks that sample the same clip; the one that writes its files has `is_writer` set
    split_tiles         the `ranks` argument of decode_tiled if several ranks share a clip, else None
    sent                {kind: bytes} that this rank has sent in collectives and to neighbouring stages

    Raises BadInput if the number of processes does not fit the flags.
    """

    def __init__(self, device, fsdp=False, ulysses_size=1, pipeline_stages=1, cfg_parallel=False, distributed=None):
        distributed = "RANK" in os.environ if distributed is None else distributed
        self.distributed, self.device, self.fsdp, self.sent = distributed, device, fsdp, {}
        self.rank, self.size = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if distributed else (0, 1)
        self.cfg_size, self.pp_size, self.sp_size = 2 if cfg_parallel else 1, pipeline_stages, ulysses_size
        model_size = self.cfg_size * self.pp_size * self.sp_size  # ranks that share a model, or a clip
        if min(ulysses_size, pipeline_stages) < 1 or self.size % model_size:
            raise BadInput(
                f"--ulysses_size {ulysses_size}, --pipeline_stages {pipeline_stages}"
                f"{', --guidance_parallel' * cfg_parallel}: {self.size} processes are not a multiple of {model_size}; "
                f"start torchrun with --nproc_per_node {model_size} or a multiple"
            )
        if fsdp and not distributed:
            raise BadInput("--fsdp: shards weights over several processes; start it with torchrun")
        if fsdp and pipeline_stages > 1 or ulysses_size > 1 and pipeline_stages > 1:
            raise BadInput("--pipeline_stages: not together with --fsdp or --ulysses_size")
        self.dp_rank, self.dp_size = 0, self.size // model_size
        self.cfg_rank = self.pp_rank = self.sp_rank = 0
        self.mesh = self._init_process_group() if distributed else None
        if distributed:
            self.dp_rank, self.cfg_rank, self.pp_rank, self.sp_rank = self.mesh.get_coordinate()
        self.is_main, self.is_writer = self.rank == 0, self.cfg_rank == self.sp_rank == 0
        self.clip_group_size, self.split_tiles = self.cfg_size * self.sp_size, None
        if self.clip_group_size > 1:
            self.split_tiles = self.cfg_rank * self.sp_size + self.sp_rank, self.clip_group_size, self._add_up_tiles

    def _init_process_group(self):
        """Initialize torch.distributed and return the mesh of all ranks, with the dimensions DIMS."""
        device_type = torch.device(self.device).type
        if device_type == "cuda":
            self.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(self.device)
        store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
        # torchrun's own store still holds the addresses of ranks that it has restarted
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=rank, world_size=size)
        sizes = (self.dp_size, self.cfg_size, self.pp_size, self.sp_size)
        return dist.init_device_mesh(device_type, sizes, mesh_dim_names=DIMS)

    def __enter__(self):
        self._silence = contextlib.ExitStack()
        if not self.is_main:  # only rank 0 prints
            self._silence.enter_context(contextlib.redirect_stdout(self._silence.enter_context(open(os.devnull, "w"))))
        return self

    def __exit__(self, kind, error, traceback):
        self._silence.close()
        if self.distributed and error is None:  # after an error, other ranks may wait in a collective
            dist.destroy_process_group()

    def group(self, *dims):
        """Return the process group along one dimension of the mesh, or along several dimensions flattened into one."""
        mesh = self.mesh[dims] if len(dims) == 1 else self.mesh[dims]._flatten("_".join(dims))
        return mesh.get_group()

    def barrier(self):
        if self.distributed:
            dist.all_reduce(torch.zeros(1))

    def host_share(self):
        """Return the HostShare of this machine's ranks, or None if there is only one rank or if ranks hold different
        weights.
        """
        if not self.distributed or self.fsdp or self.pp_size > 1 or int(os.environ["LOCAL_WORLD_SIZE"]) == 1:
            return None
        folder = Path("/dev/shm" if Path("/dev/shm").is_dir() else tempfile.gettempdir())
        prefix = f"nanowan-{os.getuid()}-{os.environ['MASTER_PORT']}"
        return HostShare(os.environ["LOCAL_RANK"] == "0", self.barrier, lambda part: folder / f"{prefix}-{part}")

    def count(self, kind, nbytes):
        """Add `nbytes` to `sent`[kind], after this rank has sent that many bytes to other ranks."""
        self.sent[kind] = self.sent.get(kind, 0) + int(nbytes)

    def seed(self, *what, same=False):
        """Seed torch's generator from the values in `what` and, unless `same`, from this rank's dp_rank."""
        torch.manual_seed(random.Random(" ".join(map(str, [*what, 0 if same else self.dp_rank]))).getrandbits(62))

    def all_ranks(self, yes, dim=None):
        """Return whether `yes` is true on all ranks, or on all ranks along the dimension `dim` of the mesh. Ranks may
        disagree, because they measure different things, such as their free memory.
        """
        return bool(self.least(yes, dim))

    def least(self, value, dim=None):
        """Return the smallest `value` on any rank, or on any rank along the dimension `dim` of the mesh."""
        if not self.distributed:
            return value
        smallest = torch.tensor(float(value), dtype=torch.float64, device=self.device)
        dist.all_reduce(smallest, dist.ReduceOp.MIN, group=self.group(dim) if dim else None)
        return smallest.item()

    def broadcast_from_rank0(self, f):
        """Return, on every rank, the result of f() on rank 0. Files are thus read once, and all ranks get the same
        values.
        """
        value = [f() if self.is_main else None]
        if self.distributed:
            dist.broadcast_object_list(value, 0)
        return value[0]

    def gather_lists(self, values):
        """Return, on every rank, one list that joins the lists `values` of all ranks."""
        if not self.distributed:
            return values
        lists = [None] * self.size
        dist.all_gather_object(lists, values)
        return sum(lists, [])

    # ---- data and gradients --------------------------------------------------------------------------------------
    def local_indices(self, n):
        """Return (the indices of this rank's samples in a global batch of n samples, the number of these samples
        divided by n). A rank without samples gets sample 0 and the fraction 0. It must compute something, since the
        other ranks wait for it in every layer.
        """
        indices = list(range(self.dp_rank, n, self.dp_size))
        return indices or [0], len(indices) / n

    def all_reduce_grads(self, params, *numbers):
        """Sum the gradients of replicated parameters, and `numbers`, over all ranks. Return the summed numbers. All
        ranks get bit-identical results. Sharded parameters are left unchanged, because fully_shard has summed their
        gradients.
        """
        if not self.distributed:
            return numbers
        replicated = [p for p in params if not hasattr(p, "placements")]
        for p in replicated:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        sums = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(sums)
        for bucket in buckets(replicated):
            flat = torch.cat([p.grad.float().flatten() for p in bucket])
            dist.all_reduce(flat)
            self.count("gradients", flat.nbytes)
            for p, g in zip(bucket, flat.split([p.numel() for p in bucket])):
                p.grad.copy_(g.view_as(p))
        return sums.tolist()

    # ---- sampling ------------------------------------------------------------------------------------------------
    def exchange_cfg(self, v):
        """Exchange v, this rank's half of guidance, with the rank that computes the other half. Return [conditional,
        unconditional].
        """
        halves = [torch.empty_like(v) for _ in range(2)]
        dist.all_gather(halves, v.contiguous(), self.group("cfg"))
        self.count("halves", v.nbytes)
        return halves

    def _add_up_tiles(self, t):
        dist.all_reduce(t, group=self.group("cfg", "sp"))
        self.count("pixels", t.nbytes)
        return t


def buckets(params):
    """Yield lists of parameters; the tensors of each list have about BUCKET elements in total. Gradients are summed one
    list at a time, because the gradients of a full text encoder take 23 GB in fp32.
    """
    bucket, numbers = [], 0
    for p in params:
        bucket.append(p)
        numbers += p.numel()
        if numbers >= BUCKET:
            yield bucket
            bucket, numbers = [], 0
    if bucket:
        yield bucket
