"""A run's state: parameters, optimizer, averages; and what must not change when a run is resumed from it."""

import contextlib

import torch

from data import DRAWS
from nanowan.parallel import is_sharded, shard_like
from nanowan.training.optim import EMA, Guard

# Flags that may differ between a run and its continuation: they do not decide what is learned.
RESUME_MAY_CHANGE = (
    "steps out cache cache_only device save_every eval_every previews preview_every resume data ckpt text_encoder "
    "init_lora checkpointing max_skipped save attention stream_blocks fsdp ulysses_size pipeline_stages "
    "keep name trigger preserve_prompts keyword_init config preview_size preview_frames preview_steps log_every wandb"
).split()


class TrainState:
    """Everything that a run needs to be resumed exactly: parameters, optimizer, averages, and the Guard that skips bad
    steps. Random numbers are not part of it, because they depend only on the seed and the step.
    """

    def __init__(self, params, opt, grad_spike_factor, ema=0.0):
        """ema: the decay of a moving average, or 0 for no average."""
        self.params, self.opt, self.guard, self.step = params, opt, Guard(grad_spike_factor), 0
        self.ema = EMA(params, ema, opt) if ema else None
        for group in opt.param_groups:
            group.setdefault("peak_lr", group["lr"])

    def averaged(self):
        """Return a context manager for saving and evaluating; inside it, the parameters hold their moving averages, if
        there are any.
        """
        return self.ema.in_place() if self.ema else contextlib.nullcontext()

    def state_dict(self):
        opt = self.opt.state_dict()
        return {
            "params": [p.data for p in self.params],
            "opt": {**opt, "state": {i: {**s} for i, s in opt["state"].items()}},
            "guard": self.guard.state_dict(),
            "ema": self.ema and {**self.ema.state_dict(), "average": [*self.ema.average]},
        }

    def param_slots(self, state):
        """Return [(container, key, parameter)] for each entry container[key] of a state that belongs to a
        parameter and is a tensor of its shape, or the string by which `save` replaces such a tensor.
        """
        slots = [(values, i, p) for values in lists_of(state) for i, p in enumerate(self.params)]
        for i, moments in state["opt"]["state"].items():
            p = self.params[i]
            keys = [k for k, v in moments.items() if isinstance(v, str) or torch.is_tensor(v) and v.shape == p.shape]
            slots += [(moments, k, p) for k in keys]
        return slots

    def save(self, run, step):
        """Write a run's state; every rank calls this. The ranks together write the sharded tensors into a folder next
        to the state's file. Each of these tensors has a name in the folder: its index in param_slots, as a string. In
        the state's file, this name stands in place of the tensor.
        """
        state, shards = self.state_dict(), {}
        for n, (values, key, _) in enumerate(self.param_slots(state)):
            if is_sharded(values[key]):
                shards[f"{n}"], values[key] = values[key], f"{n}"
        run.save(step, state, shards)

    def restore(self, state):
        """Restore the parameters, optimizer, guard and averages from a state, which may come from a run with another
        number of ranks.
        """
        slots = [(values, key, p) for values, key, p in self.param_slots(state) if isinstance(values[key], str)]
        if slots:
            import torch.distributed.checkpoint as dcp

            tensors = {values[key]: torch.empty_like(p, requires_grad=False) for values, key, p in slots}
            reader = dcp.FileSystemReader(state["shards"])
            dcp.load(tensors, storage_reader=reader, no_dist=not torch.distributed.is_initialized())
            for values, key, _ in slots:
                values[key] = tensors[values[key]]
        for values, key, p in self.param_slots(state):
            values[key] = shard_like(values[key], p)
        for p, saved in zip(self.params, state["params"], strict=True):
            p.data.copy_(saved)
        for group, current in zip(state["opt"]["param_groups"], self.opt.param_groups, strict=True):
            if "fused" in current:  # keep the current way to compute a step; older versions saved another
                group["fused"] = current["fused"]
        self.opt.load_state_dict(state["opt"])
        self.guard.load_state_dict(state["guard"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        self.step = state["step"]
        print(f"resumed at step {self.step}")


def lists_of(state):
    """Return the lists in a state that hold one tensor for each parameter."""
    return [state["params"], *([state["ema"]["average"]] if state["ema"] else [])]


def resume_fingerprint(args, pipe, dataset):
    """Return {name: value} of what must not change between a run and its continuation: all flags except
    RESUME_MAY_CHANGE, the global batch, the base's weights, and the samples. The samples are included only once all of
    them are cached, since until then some may turn out to be unusable. args: resolved flags.
    """
    flags = {k: v for k, v in vars(args).items() if k not in RESUME_MAY_CHANGE}
    files = [f for name in pipe.settings.expert_names for f in pipe.files(name)]
    base = pipe.world.broadcast_from_rank0(lambda: [dataset.digest(f) for f in files])
    fingerprint = flags | {"batch": args.batch * pipe.world.dp_size, "base": base, "draws": DRAWS}
    if dataset.is_cached():
        fingerprint["samples"] = [f.name for f, i in zip(dataset.files, dataset.items) for _ in range(i.repeat)]
        weights = [i.weight for i in dataset.items]
        # None if no weight is set, for states of versions that had no weights
        fingerprint["weights"] = weights if {*weights} != {1.0} else None
    return fingerprint
