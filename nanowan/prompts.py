"""Read lists of prompts: text files, whose lines may end with options such as --w 832, or JSONL files."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from nanowan.errors import BadInput
from nanowan.settings import parse_guidance, parse_size

# {kohya's letter: the flag of sample.py}
LETTERS = {"d": "seed", "s": "steps", "f": "frames", "l": "guidance", "g": "guidance", "fs": "shift"}
LETTERS |= {"i": "image", "ei": "last_image", "n": "negative"}
SETTINGS = {
    "size": parse_size,
    "frames": int,
    "steps": int,
    "shift": float,
    "guidance": parse_guidance,
    "negative": str,
}
FILES = ("image", "last_image", "audio", "pose_video", "src_root_path", "video")
TEXT_KEYS = ("prompt", "text", "caption")


@dataclass(frozen=True)
class Prompt:
    """A prompt's text, and what its line gives in addition: settings (arguments of Settings.with_overrides), inputs
    {flag of sample.py, such as image or audio: value}, and a seed.
    """

    text: str
    settings: dict = field(default_factory=dict)
    inputs: dict = field(default_factory=dict)
    seed: int | None = None


def read_prompts(file, flag="--prompts"):
    """Read the Prompts of a text file or JSONL file. Raises BadInput, which names `flag`, if this fails."""
    file = Path(file)
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # Unicode's other line ends do not count
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"{flag} {file}: {getattr(e, 'strerror', None) or e}") from None
    parse = parse_row if file.suffix in (".jsonl", ".json") else parse_line
    prompts = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                prompts.append(parse(line.strip(), file.parent))
            except ValueError as e:
                raise BadInput(f"{flag} {file}, line {number}: {e}") from None
    if not prompts:
        raise BadInput(f"{flag} {file}: holds no prompts")
    return prompts


def read_texts(file, flag):
    """Return the texts of the Prompts that read_prompts reads with the same arguments."""
    return [prompt.text for prompt in read_prompts(file, flag)]


def parse_line(line, folder="."):
    """Parse "text --w 832 --h 480 --f 81 --d 1 --s 20 --l 5 --i a.png --n bad" into a Prompt. --w and --h give the
    size; LETTERS explains the other letters. Flags of sample.py, such as --frames, are allowed too. folder: the folder
    in which files are looked up. Raises ValueError for an unknown option or a wrong value.
    """
    text, *options = re.split(r"(?:^|\s)--(?=[A-Za-z])", line)
    values = {}
    for option in options:
        name, _, value = option.strip().partition(" ")
        values[LETTERS.get(name, name)] = value.strip()
    return build_prompt(text.strip(), values, folder)


def parse_row(line, folder="."):
    """Parse a line of JSON, an object that has the prompt's text under one of TEXT_KEYS, into a Prompt. The other keys
    are the options of parse_line, without dashes. folder: as in parse_line. Raises ValueError for any other line, an
    unknown option or a wrong value.
    """
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    text = next((row.pop(key) for key in TEXT_KEYS if key in row), None)
    if not isinstance(text, str):
        raise ValueError(f"no text in {', '.join(TEXT_KEYS)}")
    size = row.get("size")
    row |= {"size": "x".join(map(str, size))} if isinstance(size, list) else {}
    row = {{"width": "w", "height": "h"}.get(k, k): v for k, v in row.items()}
    return build_prompt(text, {LETTERS.get(k, k): v for k, v in row.items()}, folder)


def build_prompt(text, values, folder):
    """Build a Prompt from its text and {flag: value}, where "w" and "h" together give the size. Files may be relative
    to `folder`. Raises ValueError for an unknown flag or a wrong value.
    """
    if "w" in values or "h" in values:
        if not {"w", "h"} <= values.keys():
            raise ValueError("--w and --h: give both")
        values["size"] = f"{values.pop('w')}x{values.pop('h')}"
    settings, inputs, seed = {}, {}, None
    for name, value in values.items():
        try:
            if name == "seed":
                seed = int(value)
            elif name in SETTINGS:
                settings[name] = SETTINGS[name](value if SETTINGS[name] is str else str(value))
            elif name in FILES:
                beside = Path(folder) / str(value)
                inputs[name] = str(beside if beside.exists() and not Path(value).exists() else value)
            else:
                known = ", ".join(["w", "h", *LETTERS, "seed", *SETTINGS, *FILES])
                raise BadInput(f"--{name}: no option of a prompt; known are {known}")
        except BadInput:
            raise
        except ValueError:
            raise BadInput(f"--{name} {value}: not a number") from None
    return Prompt(text, settings, inputs, seed)
