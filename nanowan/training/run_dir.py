"""A training run's folder: its lock, its logs, and the states that are written to it and resumed from.

The folder OUT contains config.toml (the flags, for --config), flags.json (flags, versions, commit), log.jsonl,
tensorboard/, and the states, checkpoints/step_N.pt. A state is written completely or not at all. The last two states
are kept, in case the newest is damaged.
"""

import fcntl
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import torch

from nanowan.errors import BadInput
from nanowan.files import atomic, remove_leftovers, save_pickle, writing
from nanowan.flags import write_config
from nanowan.training.log import Log, held_out
from nanowan.training.optim import lr_at


def differences(before, now):
    """Return a list of short texts that say what differs between two resume fingerprints {name: value or list}. Only
    the names in `now` are compared.
    """
    lines = []
    for name, new in now.items():
        old = before.get(name)
        if old == new:
            continue
        if isinstance(old, list) and isinstance(new, list) and len(str(old)) + len(str(new)) > 100:
            seen = set(map(str, old))
            fresh = sum(str(v) not in seen for v in new)
            lines.append(f"{name} was {len(old)} entries, is {len(new)}, {fresh} of them others")
        else:
            lines.append(f"{name} was {str(old)[:60]}, is {str(new)[:60]}")
    return lines[:12] + [f"{len(lines) - 12} more"] * (len(lines) > 12)


def state_step(file):
    """Return the step in the name of a file such as step_000100.pt."""
    return int(file.stem.removeprefix("step_"))


def state_damage(file):
    """Return why a state cannot be read, or None if it can. This checks the checksums of the file, and whether its
    shards are as long as their index says.
    """
    try:
        with zipfile.ZipFile(file) as z:
            if bad := z.testzip():
                return f"the checksum of {bad} is wrong"
        if torch.load(file, weights_only=True, map_location="cpu", mmap=True)["shards"]:
            from torch.distributed.checkpoint import FileSystemReader

            folder = file.with_suffix(".shards")
            for part in FileSystemReader(folder).read_metadata().storage_data.values():
                if (folder / part.relative_path).stat().st_size < part.offset + part.length:
                    return f"{folder.name}/{part.relative_path} is cut off"
    except Exception as e:  # reading a damaged file may raise anything
        return str(e).splitlines()[0] if str(e) else type(e).__name__
    return None


class Run:
    """One training run in the folder OUT; a context manager. Only the main rank writes.

    While the context is open, it handles Ctrl-C and SIGTERM. A signal before the call of `restore` ends the process
    at once, since what is cached so far is on disk. A later signal sets `stop` to its number; the training loop then
    saves a state and calls `leave`. A second signal, more than a second after the first, ends the process at once.

    Raises BadInput in three cases: another process runs in OUT; OUT holds a state and `resume` is False, unless this
    job wrote the state before torchrun restarted its processes; or the run has done more than flags["steps"] steps.
    """

    def __init__(self, out, flags, resume, is_main=True, keep=2, defaults=None):
        self.out, self.keep, self.is_main, self.flags = Path(out), keep, is_main, flags
        self.defaults = {"draws": 1, **(defaults or {})}
        self.stop, self.asked_at, self.training = 0, 0.0, False
        self.states, self.logs, self.lock_file = self.out / "checkpoints", None, None
        self.handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        self.job = (
            f"{os.environ['TORCHELASTIC_RUN_ID']} {os.getppid()}" if "TORCHELASTIC_RUN_ID" in os.environ else None
        )
        try:
            if is_main:
                self._take_folder(resume)
            self.state_file = self._newest_state()
            self._compare_steps()
        except BaseException:
            self.close()
            raise
        if resume and is_main and self.state_file is None:
            print(f"--resume: {self.out} holds no state yet; beginning", flush=True)
        self.metadata = {
            "flags": flags,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "commit": self._commit(),
            "job": self.job,
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        self.date = self.metadata["started"][:10]  # `restore` replaces this with the date when the run began

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Release the folder's lock and restore the signal handlers."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        for file in (self.logs, self.lock_file):
            if file is not None:
                file.close()

    # ---- the lock and signals ------------------------------------------------------------------------------------
    def _take_folder(self, resume):
        with writing(self.states):
            self.states.mkdir(parents=True, exist_ok=True)
        self._lock()
        if self._saved() and not resume and (self.job is None or self._last_record().get("job") != self.job):
            raise BadInput(
                f"--out {self.out}: holds a run already; add --resume to continue it, or choose another folder"
            )
        self._remove_leftovers()

    def _lock(self):
        """Lock this folder against a second process. The system releases the lock however this process ends. Raises
        BadInput if another process holds the lock.
        """
        path = self.out / ".lock"
        with writing(path):
            self.lock_file = open(path, "a+")
        try:
            fcntl.flock(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock_file.seek(0)
            owner = self.lock_file.read().strip()
            raise BadInput(f"--out {self.out}: another run is writing there ({owner or 'just started'})") from None
        except OSError as e:
            print(f"{path}: this disk has no locks ({e.strerror}); do not start a second run on {self.out}", flush=True)
        with writing(path):
            self.lock_file.truncate(0)
            self.lock_file.write(f"process {os.getpid()} on {socket.gethostname()}")
            self.lock_file.flush()

    def _last_record(self):
        """Return the contents of flags.json, which the last process in this folder wrote; {} if it cannot be read."""
        try:
            return json.loads((self.out / "flags.json").read_text())
        except (OSError, ValueError):
            return {}

    @staticmethod
    def _commit():
        try:
            git = subprocess.run(
                ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"], capture_output=True, text=True
            )
        except OSError:  # git is not installed
            return None
        return git.stdout.strip() or None

    def _on_signal(self, number, _):
        # os.write is used because the signal may have interrupted print within a line, and print is not reentrant
        now = time.monotonic()
        # the terminal sends Ctrl-C to every process, and torchrun sends it again: within a second, it is the same one
        if self.stop and now - self.asked_at > 1:
            os._exit(128 + number)
        if self.stop:
            return
        self.stop, self.asked_at = number, now
        if not self.training:
            os.write(2, b"stopped before the first step; what is cached so far stays\n")
            sys.exit(128 + number)
        os.write(1, b"stopping after this step and saving the state; continue with --resume\n")

    # ---- states --------------------------------------------------------------------------------------------------
    def _saved(self):
        """Return the files of all states, oldest first."""
        return sorted((f for f in self.states.glob("step_*.pt") if re.fullmatch(r"step_\d+", f.stem)), key=state_step)

    def _remove_leftovers(self):
        """Remove the files that killed processes left: unfinished files, and shards whose state was never finished."""
        for folder in (self.out, self.states, self.out / "previews"):
            remove_leftovers(folder)
        for folder in self.states.glob("step_*.shards"):
            if not folder.with_suffix(".pt").exists():
                shutil.rmtree(folder, ignore_errors=True)

    def _newest_state(self):
        """Return the newest undamaged state, or None if there is no state. Damaged states are reported and renamed.
        Raises BadInput if all states are damaged.
        """
        damaged = {}
        for file in reversed(self._saved()):
            if not (why := state_damage(file)):
                for bad in damaged if self.is_main else ():
                    bad.rename(f"{bad}.damaged")
                return file
            damaged[file] = why
            if self.is_main:
                print(f"{file}: damaged ({why}); looking at the state before it", flush=True)
        if damaged:
            raise BadInput(f"{self.states}: none of the {len(damaged)} states can be read; choose another --out")
        return None

    def _compare_steps(self):
        steps, done = self.flags.get("steps"), state_step(self.state_file) if self.state_file else 0
        if steps and steps < done:
            raise BadInput(f"--steps {steps}: the run in {self.out} has done {done} already; give at least as many")
        if steps == done and self.is_main:
            print(f"the run in {self.out} has done all of its {done} steps; with more --steps it continues", flush=True)
        before = self._last_record().get("flags", {}).get("steps")
        if done and self.is_main and self.flags.get("schedule") == "cosine" and before not in (None, steps):
            old, new = (lr_at(done, n, self.flags["lr"], self.flags["warmup"], "cosine") for n in (before, steps))
            print(
                f"--steps {steps}, which was {before}: the cosine schedule is stretched, and the learning rate of step "
                f"{done + 1} is {new:.3g}, not {old:.3g}",
                flush=True,
            )

    def check(self, fingerprint):
        """Raise BadInput, which lists the differences, if the newest state comes from a run with another fingerprint.
        fingerprint: {name: value} of all that decides the result; entries that are not known yet may be missing. The
        state's tensors are not read.
        """
        if self.state_file is None:
            return
        saved = torch.load(self.state_file, weights_only=True, map_location="cpu", mmap=True)["fingerprint"]
        fingerprint = json.loads(json.dumps(fingerprint))
        saved = {name: saved.get(name, self.defaults.get(name)) for name in fingerprint}
        if saved.get("draws") != fingerprint.get("draws"):
            print(f"{self.state_file}: of an older version; from here on, steps draw other samples and noise")
            saved["draws"] = fingerprint["draws"]
        if changed := differences(saved, fingerprint):
            raise BadInput(
                f"--resume: {self.state_file} is of another run: {'; '.join(changed)}. A new --out begins another; "
                "--init_lora or --text_encoder starts it from this one's result"
            )

    def restore(self, fingerprint):
        """Return the newest state, checked with `check`, or None if there is no state. state["shards"]: the folder of
        the state's shards, or False. Log entries after the state are dropped, since these steps will be logged again.
        From now on, a signal no longer ends the process at once.
        """
        self.check(fingerprint)
        self.fingerprint = json.loads(json.dumps(fingerprint))
        state = torch.load(self.state_file, weights_only=True, map_location="cpu") if self.state_file else None
        if state and state["shards"]:
            state["shards"] = self.state_file.with_suffix(".shards")
        self.date = state.get("date", self.date) if state else self.date
        if self.is_main:
            self._begin_log(state["step"] if state else 0)
        self.training = True
        return state

    def save(self, step, state, shards=None):
        """Write a state. shards: {name: tensor that is sharded over all ranks}. The shards are written first. The file
        that makes the state valid is written last.
        """
        file = self.states / f"step_{step:06d}.pt"
        folder = file.with_suffix(".shards")
        if shards:
            import torch.distributed.checkpoint as dcp

            with writing(folder):
                try:
                    dcp.save(shards, checkpoint_id=folder)
                except dcp.CheckpointException as e:  # not a subclass of Exception
                    raise next(iter(e.failures.values()))[0] from None
        if self.is_main:
            about = {"step": step, "date": self.date, "fingerprint": self.fingerprint, "shards": bool(shards)}
            save_pickle(file, about | state)
            for old in self._saved()[: -self.keep]:
                old.unlink()
                shutil.rmtree(old.with_suffix(".shards"), ignore_errors=True)

    def leave(self):
        """Exit with a signal's status: 130 for Ctrl-C; 143 for SIGTERM, or if only another rank received a signal."""
        if self.is_main:
            step = self.logs.rows[-1]["step"]
            print(f"stopped after step {step} of {self.flags['steps']}: the results in {self.out} are of this step")
        sys.exit(128 + (self.stop or signal.SIGTERM))

    # ---- log -----------------------------------------------------------------------------------------------------
    def _begin_log(self, step):
        """Write config.toml and flags.json, and open the logs. Log entries after `step` are dropped."""
        write_config(self.out / "config.toml", self.flags)
        with atomic(self.out / "flags.json") as tmp:
            tmp.write_text(json.dumps(self.metadata, indent=1) + "\n")
        flags, record = self.flags, {"flags": self.flags, "began": self.date}
        self.logs = Log(self.out, step, flags.get("steps", 0), flags.get("log_every", 1), flags.get("wandb"), record)

    def log(self, step, **values):
        """Write a step's values to the logs with Log.write, on the main rank."""
        if self.is_main:
            self.logs.write(step, **values)

    def log_image(self, step, name, file):
        if self.is_main:
            self.logs.image(step, name, file)

    def is_best(self, values):
        """Return the result of Log.is_best on the main rank, and False on the other ranks."""
        return self.is_main and self.logs.is_best(values)

    def with_best(self, results, best):
        """Return the lines to print after a run: `results`, and a line for each existing file in `best`, the files of
        the step with the lowest held-out loss. Without held-out losses, only `results` are returned.
        """
        losses = {row["step"]: held_out(row) for row in self.logs.rows if row["step"]} if self.is_main else {}
        step = min((s for s, loss in losses.items() if loss is not None), key=losses.get, default=None)
        return [*results, *[f"{f}: after step {step}, the lowest held-out loss" for f in best if step and f.exists()]]


def adapter_file(out, name, expert):
    """Return the path of a run's adapter: OUT/NAME.safetensors, or for an expert of an A14B OUT/NAME_high.safetensors
    or OUT/NAME_low.safetensors. name: the value of --name, with nothing appended for the newest adapter, with _000250
    for the adapter of step 250, and with _best for the adapter with the lowest held-out loss.
    """
    return Path(out) / f"{name}{'' if expert == 'dit' else '_' + expert}.safetensors"


def remove_older_adapters(out, name, step, keep):
    """Of a run's step-numbered adapters up to `step`, delete all but those of the newest `keep` steps."""
    pattern = re.compile(re.escape(name) + r"_(\d{6,})(?:_high|_low)?\.safetensors")
    files = [(int(m.group(1)), f) for f in Path(out).iterdir() if (m := pattern.fullmatch(f.name))]
    kept = sorted({s for s, _ in files if s <= step})[-keep:]
    for s, file in files:
        if s < kept[0]:
            file.unlink()
