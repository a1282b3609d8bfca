"""Digests of files, and replacing a file atomically."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path


def replace_file(file: Path, data: bytes) -> None:
    """Write a file so that it is there whole or as it was."""
    if not file.name:  # "." has none
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
    partial = file.with_name(f".{file.name}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, file)
    except OSError:  # a file more than the manifest names makes a bundle unreadable
        partial.unlink(missing_ok=True)
        raise


def digest(file: Path) -> str:
    """Return the sha256 of a file, read in pieces."""
    total = hashlib.sha256()
    with file.open("rb", buffering=0) as stream:
        while piece := stream.read(1 << 22):
            total.update(piece)
    return total.hexdigest()
