"""The clips on which the trainers run without --data: of the nano world, half of them with a new word."""

import subprocess
import sys
from pathlib import Path

from checkpoint import BadInput

DEFAULT_KEYWORDS = "crimson,wedge,halts"


def default_clips(folder=Path("out/nano_data")):
    """The folder of clips, drawn if it is not there. Raises BadInput where it cannot be."""
    if not (folder / "attributes.jsonl").exists():
        script = Path(__file__).parent.parent / "nano.py"
        flags = ["--out", folder, "--n", "60", "--words", DEFAULT_KEYWORDS]
        done = subprocess.run([sys.executable, script, "clips", *flags], stderr=subprocess.PIPE, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise BadInput(f"{folder}: the nano world's clips could not be drawn there: {said[-1]}")
    return folder
