"""What the two training loops share: batches prepared ahead, held-out loss, one update of the weights, a step's log."""

import concurrent.futures
import time

import torch

from data import eval_batches
from nanowan import memory_estimate
from nanowan.parallel import clip_grad_norm
from nanowan.training.log import held_out
from nanowan.training.optim import lr_at


def due(step, every, last):
    """Return whether a task is due after this step. A task is due after every `every` steps and after step `last`."""
    return step % every == 0 or step == last


def ahead(prepare, steps):
    """Yield (step, prepare(step)) for each step in `steps`. A thread prepares the next step while the caller uses this
    one.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        coming = pool.submit(prepare, steps[0]) if steps else None
        for step in steps:
            prepared = coming.result()
            coming = pool.submit(prepare, step + 1) if step + 1 in steps else None
            yield step, prepared


@torch.no_grad()
def held_out_loss(dataset, schedule, embed):
    """Return {name: value} to log for each expert: `val_loss`, the mean loss of the held-out samples, and
    `val_loss_by_t`, the mean loss at each of four timesteps. These losses do not depend on the run's seed, so runs on
    the same data can be compared. embed(captions) -> (context (B,S,D), lens (B,)).
    """
    metrics, pipe = {}, dataset.pipe
    for name, (low, high) in schedule.items():
        shift = pipe.settings.shift
        batches = eval_batches(dataset.val_items, dataset.val_files, dataset.samples, shift, low, high)
        model, by_t, suffix = pipe.acquire(name).eval(), [0.0] * 4, "" if name == "dit" else f"_{name}"
        for i, batch in batches:
            by_t[i] += batch.loss(model, *embed(batch.captions)).item() / len(dataset.val_items)
        model = None  # so that this model can be evicted for the other expert
        metrics |= {f"val_loss{suffix}": sum(by_t) / 4, f"val_loss_by_t{suffix}": by_t}
    return metrics


def say_if_foreign(metrics, usual):
    """Print a line if the held-out loss before the first step is more than three times `usual`, the loss that the
    checkpoint has on data like its own training data, or None if that is unknown.
    """
    loss = held_out(metrics)
    if usual and loss is not None and loss > 3 * usual:
        print(
            f"val_loss {loss:.2g} at the start; this checkpoint's own data have about {usual:g}: the model does not "
            "know such clips, and samples may get worse before they get better; see docs/training.md",
            flush=True,
        )


class Stopwatch:
    """A measurement of the time and tokens of one step, for its log line."""

    def __init__(self):
        self.began, self.tokens = time.monotonic(), 0

    def count(self, batch, weight):
        """Count the tokens of a Batch. weight: its weight in the loss. A batch of weight 0 is not counted: a rank that
        has no samples of its own computes it only because the other ranks wait for this rank.
        """
        self.tokens += batch.x[:, 0].numel() // 4 * (weight > 0)

    def metrics(self, model, batch, text, accumulate, device):
        """Return {"ms", "tokens_per_s", "peak_gb"}, and "mfu" if the device's peak rate is known. tokens_per_s: the
        tokens counted by `count`, on this rank, per second. text: number of text tokens of a sample. accumulate: number
        of batches in the step.
        """
        seconds = time.monotonic() - self.began
        values = {"ms": round(1000 * seconds), "tokens_per_s": round(self.tokens / seconds)}
        values["peak_gb"] = round(memory_estimate.used(device) / 1e9, 2)
        if mfu := memory_estimate.mfu(model, batch.x, text, seconds / accumulate, device):
            values["mfu"] = round(mfu, 3)
        return values


def update(state, world, step, args, loss, typical=True):
    """Take one optimizer step, unless the guard skips it. Return ({name: value} to log, the reason for skipping the
    step or None). args: the run's flags; steps, warmup, schedule, grad_clip and seed are used. typical: as for
    Guard.should_skip.
    """
    for group in state.opt.param_groups:
        group["lr"] = lr_at(step, args.steps, group["peak_lr"], args.warmup, args.schedule)
    grad_norm = clip_grad_norm(state.params, args.grad_clip)
    metrics = {"lr": state.opt.param_groups[0]["lr"], "grad_norm": grad_norm}
    if reason := state.guard.should_skip(loss, grad_norm, typical=typical):
        print(f"step {step + 1} skipped: {reason}", flush=True)
        return metrics | {"skipped": state.guard.skipped}, reason
    world.seed(args.seed, step, "optimizer", same=True)
    state.opt.step()
    return metrics, None
