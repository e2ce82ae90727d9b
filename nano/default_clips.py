"""The clips that the trainers use if --data is not given: clips of the nano world, half of them with a new word."""

import os
import subprocess
import sys
from pathlib import Path

from nanowan.errors import BadInput

DEFAULT_KEYWORDS = "crimson,wedge,halts"


def default_clips(folder=Path("out/nano_data")):
    """Return `folder`, the folder of the default clips. The clips are drawn first if the folder has none. Raises
    BadInput if drawing fails.
    """
    if not (folder / "attributes.jsonl").exists():
        flags = ["--out", folder, "--n", "60", "--words", DEFAULT_KEYWORDS]
        env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
        done = subprocess.run(
            [sys.executable, "-m", "nano", "clips", *flags], stderr=subprocess.PIPE, text=True, env=env
        )
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise BadInput(f"{folder}: the nano world's clips could not be drawn there: {said[-1]}")
    return folder
