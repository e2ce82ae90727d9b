"""Functions that several commands of diag.py share."""

import json

from nano.world import prompts
from nanowan.devices import DTYPES, pick_device, pick_dtype
from nanowan.files import atomic
from nanowan.pipeline import Runtime
from nanowan.prompts import read_texts


def write_json(path, value):
    """Write `value` to the file `path` as JSON. If `path` is None, do nothing."""
    if path:
        with atomic(path) as tmp:
            tmp.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def runtime(args):
    """Return the pipeline.Runtime with the device and dtype that the flags --device and --dtype in `args` name."""
    device = pick_device(args.device)
    return Runtime(device, DTYPES[pick_dtype(args.dtype, device)])


def given_prompts(file, n):
    """Return the prompts in the text file `file`; if `file` is None, return n prompts of the nano world."""
    return read_texts(file, "--prompts") if file else [row["prompt"] for row in prompts(n, 0)]
