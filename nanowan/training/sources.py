"""Sources of training data: a JSONL or CSV list, or a folder of media files, each with a caption file next to it."""

import codecs
import csv
import json
import os
import re
from pathlib import Path

from nanowan.errors import BadInput
from nanowan.video import CLIPS, IMAGES, OTHER_MEDIA, Skip, why

CLIP_MODES = {
    "first": "its first frames",
    "middle": "the frames around its middle",
    "spaced": "frames spread evenly over its whole length",
    "several": "as many samples as fit into it, one after the other",
}  # {mode: the frames of a clip that it takes}
PATH_COLUMNS = ("path", "file", "file_name", "video_path", "image_path", "video", "image")
CAPTION_COLUMNS = ("caption", "prompt", "text")
REPEAT_COLUMNS = ("repeat", "num_repeats")


def read_captions(path):
    """Return the captions in the text file next to a media file, one from each line. Raises Skip if there are none, or
    if they cannot be read.
    """
    file = path.with_suffix(".txt")
    try:
        raw = file.read_bytes()
        text = raw.decode("utf-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")
        if "\0" in text:  # UTF-16 without a byte-order mark, or UTF-32
            raise UnicodeError
    except UnicodeError:
        raise Skip(f"its caption {file.name} is not UTF-8, nor UTF-16 with a byte-order mark") from None
    except OSError:
        raise Skip(f"has no caption: {file.name} is missing or unreadable") from None
    # lines do not end at the other characters that Unicode counts as line ends
    captions = [line.strip() for line in re.split("[\r\n]+", text) if line.strip()]
    if not captions:
        raise Skip(f"its caption {file.name} is empty")
    return captions


def csv_rows(lines):
    """Yield (line number, {column: value}) for each row of a CSV with a header. Raises ValueError for a
    malformed CSV.
    """
    reader = csv.DictReader(lines, strict=True)
    try:
        for row in reader:
            if None in row:
                raise csv.Error("more fields than the header has; texts with commas in them need quotes")
            yield reader.line_num, row
    except csv.Error as e:
        raise ValueError(f"line {reader.line_num}: {e}") from None


def json_rows(lines):
    """Yield (line number, {column: value}) for each line of a JSONL. Raises ValueError for a malformed line."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as e:
                raise ValueError(f"line {number}: {e}") from None
            if not isinstance(row, dict):
                raise ValueError(f"line {number}: {line.strip()[:60]} is no object")
            yield number, row


def read_list(file):
    """Return [(path, captions, repeat)] of a JSONL or CSV. captions: a list, or the Skip that says why there are none.
    In each row, one of PATH_COLUMNS holds the media file's path, relative to the JSONL or CSV, and one of
    CAPTION_COLUMNS holds a caption or a list of captions. One of REPEAT_COLUMNS may hold how often an epoch contains
    the file (default: 1). Raises BadInput.
    """
    is_csv = file.suffix.lower() == ".csv"
    try:
        with open(file, encoding="utf-8-sig", newline="" if is_csv else "\n") as f:
            rows = list(csv_rows(f) if is_csv else json_rows(f))
    except (OSError, ValueError) as e:
        form = "a CSV with a header" if is_csv else 'lines of {"path": ..., "caption": ...}'
        raise BadInput(f"--data {file}: not {form}: {why(e)}") from None
    return [list_entry(file, number, row) for number, row in rows]


def list_entry(file, number, row):
    """Return (path, captions, repeat) for the row on line `number` of a JSONL or CSV, as read_list does. Raises
    BadInput.
    """
    where = f"--data {file}, line {number}"
    path, captions, repeat = (
        next((row[c] for c in columns if row.get(c) not in (None, "")), None)
        for columns in (PATH_COLUMNS, CAPTION_COLUMNS, REPEAT_COLUMNS)
    )
    if not isinstance(path, str):
        raise BadInput(
            f"{where}: names no file; of {', '.join(PATH_COLUMNS)} one should hold a path, "
            f"and its columns are {', '.join(row)[:200]}"
        )
    captions = [] if captions is None else captions if isinstance(captions, list) else [captions]
    if not all(isinstance(c, str) for c in captions):
        raise BadInput(f"{where}: its caption is neither a text nor a list of texts")
    repeat = "1" if repeat is None else str(repeat)
    if not repeat.isdecimal() or repeat == "0":
        raise BadInput(f"{where}: repeat {repeat}: should be a whole number from 1 on")
    captions = [c.strip() for c in captions if c.strip()]
    none = Skip(f"has no caption on line {number} of {file.name}, in {', '.join(CAPTION_COLUMNS)}")
    return file.parent / path, captions or none, int(repeat)


def walk(folder):
    """Return ([path], [(folder, reason)]). The first list contains every file and folder in a folder, recursively,
    except hidden ones. The second contains the folders that cannot be opened. Links to folders are followed; no folder
    is entered twice.
    """
    paths, unreadable, seen = [], [], set()
    for where, folders, files in os.walk(
        folder, followlinks=True, onerror=lambda e: unreadable.append((Path(e.filename), e.strerror))
    ):
        state = os.stat(where)
        if (state.st_dev, state.st_ino) in seen:
            folders.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        paths += [Path(where, name) for name in (*folders, *files) if not name.startswith(".")]
    return sorted(paths), unreadable


def find_media(source):
    """Return [(path, captions, repeat)]. If `source` is a JSONL or CSV, these are its entries. If it is a folder, they
    are the entries of its metadata.jsonl and metadata.csv, all other files in it with the suffix of a media format
    (readable or not), and all subfolders that cannot be opened. captions: a list; a Skip that says why there are none;
    or None if they are in the .txt file next to the media file. Raises BadInput.
    """
    if source.is_file():
        return read_list(source)
    if not source.is_dir():
        raise BadInput(f"--data {source}: no such folder, JSONL or CSV file")
    listed = [
        e for name in ("metadata.jsonl", "metadata.csv") if (source / name).is_file() for e in read_list(source / name)
    ]
    listed_paths = {os.path.abspath(path) for path, _, _ in listed}
    paths, unreadable = walk(source)
    return (
        listed
        + [
            (p, None, 1)
            for p in paths
            if p.suffix.lower() in IMAGES | CLIPS | OTHER_MEDIA and os.path.abspath(p) not in listed_paths
        ]
        + [(p, Skip(f"cannot be opened ({reason})"), 1) for p, reason in unreadable]
    )


def check_usable(path, captions):
    """Return the captions of a media file, read from the text file next to it if `captions` is None. Raises Skip if it
    is clear, without decoding the media file, that the file cannot be used.
    """
    if isinstance(captions, Skip):
        raise captions
    if not path.is_file():
        raise Skip("is not a file" if path.exists() or path.is_symlink() else "does not exist")
    if path.suffix.lower() not in IMAGES | CLIPS:
        raise Skip(f"is none of {', '.join(sorted(IMAGES | CLIPS))}")
    captions = read_captions(path) if captions is None else captions
    if path.stat().st_size == 0:
        raise Skip("is empty")
    return captions
