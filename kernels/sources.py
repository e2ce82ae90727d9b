"""The digest of csrc's sources. setup.py runs this file alone, so it imports nothing from the project."""

import hashlib


def sources_digest(folder):
    """Return the SHA-256 of the C++ and CUDA sources in a folder, as a hexadecimal string."""
    files = sorted(f for f in folder.iterdir() if f.suffix in (".cpp", ".cu", ".h"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()
