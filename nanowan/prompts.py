"""Lists of prompts: text files, one prompt a line."""

from pathlib import Path

from nanowan.errors import BadInput


def read_prompts(file, flag="--prompts"):
    """The lines of a text file that are not empty. Raises BadInput."""
    try:
        prompts = [line.strip() for line in Path(file).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"{flag} {file}: {e}") from None
    if not prompts:
        raise BadInput(f"{flag} {file}: holds no prompts")
    return prompts
