"""Engines of ONNX Runtime on disk: lowered graphs, made once, whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from vlmedge.bundle import Bundle
from vlmedge.bundle.writer import refuse_full_disk
from vlmedge.errors import BundleError

GRAPHS = "graphs"  # the bundle's folder of portable graphs and their weights
ABANDONED_S = 3600  # an unfinished engine of this age has nobody working on it


def make(bundle: Bundle, component: str, folder: Path, write: Callable[[Path], None]) -> None:
    """Make an engine; stale ones of the same component are removed from the bundle.

    Args:
        bundle: The bundle that the engine belongs to.
        component: The component that it runs.
        folder: Folder of the engine, `<name of the runtime>-<key>`; if two processes make it, one
            of them puts it there.
        write: Writes all its files into the folder that it is given.

    Raises:
        BundleError: The folder cannot be made, or the disk is full.
    """
    prefix = f".{component}.partial-"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob(f"{prefix}*"):  # by a process that was killed
            if time.time() - left.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(left, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    except OSError as error:
        raise BundleError(
            f"{folder} cannot be made: {error.strerror}: set VLMEDGE_CACHE to a writable folder"
        ) from None
    try:
        write(partial)
        partial.chmod(0o755)  # mkdtemp's 0700 would hide it from other users of the bundle
        with contextlib.suppress(FileExistsError):
            os.replace(partial, folder)
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:  # another process was faster
            return
        refuse_full_disk(error, folder, "set VLMEDGE_CACHE")
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if folder.is_relative_to(bundle.path):  # elsewhere lie other bundles' engines
        runtime = folder.name.rpartition("-")[0]
        for stale in folder.parent.glob(f"{runtime}-*/{component}.onnx"):
            if stale.parent != folder:
                shutil.rmtree(stale.parent, ignore_errors=True)


def root(bundle: Bundle, folder: Path, component: str) -> Path:
    """Return the folder from which an engine names its weight files.

    ONNX Runtime refuses files outside of it, and links. So an engine that is not in the bundle
    and has weights of its own has them all.
    """
    apart = not folder.is_relative_to(bundle.path) and (folder / f"{component}.bin").is_file()
    return folder if apart else bundle.path
