"""The logs of a run: log.jsonl, TensorBoard, Weights & Biases, and a line or a progress bar on the screen."""

import collections
import contextlib
import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from nanowan.errors import BadInput
from nanowan.files import atomic, writing

RECENT = 50  # the screen shows the mean loss of this many steps
QUIET = ("loss", "lr", "epoch", "grad_norm", "ms", "tokens_per_s", "peak_gb", "mfu")  # not appended to a line


class AppendedFile:
    """A file to which every write is appended at once, so that no data is lost in a buffer when the process dies."""

    def __init__(self, path):
        self.path = path
        with writing(path):
            self.file = open(path, "ab", buffering=0)

    def write(self, data):
        view = memoryview(data)
        with writing(self.path):
            while view:  # a nearly full disk may accept only a part
                view = view[self.file.write(view) :]

    def close(self):
        self.file.close()


def shown(value):
    """Format a number, or a list or dict of numbers, for the screen."""
    if isinstance(value, dict):
        return " ".join(f"{k} {shown(v)}" for k, v in value.items())
    if isinstance(value, list):
        return "/".join(map(shown, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def flat(values):
    """Return {name: number} without nesting: an entry of a list or dict becomes NAME/INDEX or NAME/KEY. Values that
    contain no numbers are left out.
    """
    numbers = {}
    for name, value in values.items():
        if isinstance(value, list | dict):
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            numbers |= flat({f"{name}/{k}": v for k, v in pairs})
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers[name] = value
    return numbers


def duration(seconds):
    """Format a duration in seconds as "40 s", "12 min" or "3 h 20 min"."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


class Log:
    """The logs of a run of `total` steps that begins or continues after `step`. Entries of later steps are dropped,
    since these steps run again. every: number of steps between lines on the screen. wandb: the name of a Weights &
    Biases project, or None.
    """

    def __init__(self, out, step, total, every=1, wandb=None, record=None):
        from torch.utils.tensorboard import SummaryWriter

        self.out, self.total, self.every, self.file = Path(out), total, every, Path(out) / "log.jsonl"
        self.rows = self._read(step)
        with atomic(self.file) as tmp:
            tmp.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        self.lines = AppendedFile(self.file)
        with writing(self.out / "tensorboard"):
            self.board = SummaryWriter(str(self.out / "tensorboard"), purge_step=step + 1)
        self.wandb = self._begin_wandb(wandb, record or {}) if wandb else None
        self.bar = tqdm(total=total, initial=step, unit="step") if sys.stdout.isatty() and sys.stderr.isatty() else None
        self.losses = collections.deque((row["loss"] for row in self.rows if "loss" in row), maxlen=RECENT)
        self.began, self.first = time.monotonic(), step

    def _read(self, step):
        rows = []
        for line in self.file.read_text().splitlines() if step and self.file.exists() else []:
            with contextlib.suppress(ValueError):  # the last line of a killed run may be cut
                rows.append(json.loads(line))
        return [row for row in rows if row["step"] <= step]

    def _begin_wandb(self, project, record):
        try:
            import wandb
        except ImportError:
            raise BadInput(f"--wandb {project}: needs the package wandb (pip install wandb)") from None
        run_id = hashlib.sha256(f"{self.out.resolve()} {record.get('began')}".encode()).hexdigest()[:16]
        config = record.get("flags")
        return wandb.init(project=project, name=self.out.name, id=run_id, resume="allow", dir=self.out, config=config)

    def write(self, step, **values):
        """Log a step's values, {name: number, text, or list or dict of numbers}, and show them on the screen if this
        step is due for a line.
        """
        self.rows.append({"step": step, **values})
        self.lines.write((json.dumps(self.rows[-1]) + "\n").encode())
        with writing(self.out / "tensorboard"):
            for name, value in flat(values).items():
                self.board.add_scalar(name, value, step)
            self.board.flush()
        if self.wandb:
            self.wandb.log(flat(values), step=step)
        if "loss" in values:
            self.losses.append(values["loss"])
        extras = {k: v for k, v in values.items() if k not in QUIET}
        if self.bar is not None:
            self._move_bar(step, values, extras)
        elif step <= self.first + 1 or step % self.every == 0 or step == self.total or "skipped" in values:
            print(self.line(step, values, extras), flush=True)
        elif any(k.startswith("val_loss") for k in extras):
            print(f"step {step}/{self.total}  " + "  ".join(f"{k} {shown(v)}" for k, v in extras.items()), flush=True)

    def line(self, step, values, extras):
        """Return the line that shows a step on the screen. extras: those of `values` to append as NAME VALUE."""
        parts = [f"step {step}/{self.total}"]
        if "loss" in values:
            parts += [f"epoch {values['epoch']:.2f}"] if "epoch" in values else []
            parts += [f"loss {sum(self.losses) / len(self.losses):.4f}", f"lr {values.get('lr', 0):.3g}"]
            seconds = (time.monotonic() - self.began) / max(1, step - self.first)
            parts += [f"{seconds:.3g} s/step", f"{duration(seconds * (self.total - step))} left"]
            parts += [f"peak {values['peak_gb']} GB"] if "peak_gb" in values else []
        return "  ".join(parts + [f"{k} {shown(v)}" for k, v in extras.items()])

    def _move_bar(self, step, values, extras):
        if "loss" in values:
            self.bar.set_postfix_str(f"loss {sum(self.losses) / len(self.losses):.4f}, lr {values.get('lr', 0):.3g}")
            self.bar.update(step - self.bar.n)
        if any(k.startswith("val_loss") or k == "skipped" for k in extras):
            self.bar.write(f"step {step}  " + "  ".join(f"{k} {shown(v)}" for k, v in extras.items()))

    def image(self, step, name, file):
        """Show the image in a PNG file in TensorBoard and Weights & Biases."""
        picture = np.asarray(Image.open(file).convert("RGB"))
        with writing(self.out / "tensorboard"):
            self.board.add_image(name, picture, step, dataformats="HWC")
            self.board.flush()
        if self.wandb:
            import wandb

            self.wandb.log({name: wandb.Image(picture)}, step=step)

    def is_best(self, values):
        """Return whether a step's held-out loss (the mean over experts) is lower than that of every step before; False
        if the step has no held-out loss. Call this before the values are written.
        """
        now, before = held_out(values), [held_out(row) for row in self.rows if row["step"]]
        return now is not None and all(v is None or now < v for v in before)

    def close(self):
        with contextlib.suppress(OSError):  # a failed write has been reported already
            self.lines.close()
            self.board.close()
        if self.bar is not None:
            self.bar.close()
        if self.wandb:
            self.wandb.finish()


def held_out(values):
    """Return a log row's held-out loss, the mean over the run's experts, or None if the row has no held-out loss."""
    losses = [v for k, v in values.items() if k.startswith("val_loss") and "by_t" not in k]
    return sum(losses) / len(losses) if losses else None
