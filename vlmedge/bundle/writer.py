"""Write a bundle whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from vlmedge.bundle.folder import ENGINES, MANIFEST, Bundle, encode
from vlmedge.errors import BundleError
from vlmedge.files import digest
from vlmedge.spec.manifest import Manifest, StoredFile
from vlmedge.units import GIB


@contextlib.contextmanager
def new_bundle(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a folder to fill; it becomes `out` when the block ends well, and vanishes otherwise.

    Ctrl-C, SIGTERM and a full disk leave nothing behind, and `out` as it was.

    Raises:
        BundleError: `out` exists, cannot be made, or the disk is full.
    """
    refuse_existing(out, overwrite=overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise BundleError(
            f"{out} cannot be made ({error.strerror}): give another folder with --out"
        ) from None
    with terminate_as_interrupt():
        try:
            yield partial
            partial.chmod(0o755)  # mkdtemp's 0700 would hide the bundle from its users
            _publish(partial, out, overwrite=overwrite)
        except OSError as error:
            refuse_full_disk(error, out, "give another --out")
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def refuse_full_disk(error: OSError, folder: Path, instead: str) -> None:
    """Raise a one-line error if `error` means that the disk is full.

    Args:
        error: The exception from writing; numpy's tofile only reports "N requested and M written".
        folder: The folder that was being written.
        instead: Advice beside freeing some space.
    """
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if error.errno not in full and not (error.errno is None and "requested and" in str(error)):
        return
    free_gib = shutil.disk_usage(folder.parent).free / GIB
    raise BundleError(
        f"{folder}: the disk is full ({free_gib:.1f} GiB free, nothing was kept): "
        f"free some space or {instead}"
    ) from None


def refuse_existing(out: Path, *, overwrite: bool) -> None:
    """Refuse to write over what is there, before any work is done."""
    if out.exists() and not overwrite:
        raise BundleError(f"{out} exists: give --overwrite, or another folder with --out")
    if out.exists() and not (out / MANIFEST).is_file():
        raise BundleError(f"{out} exists and is no bundle: give another folder with --out")


def stored_files(folder: Path) -> tuple[StoredFile, ...]:
    """List every file of a bundle that the manifest must name, with its digest."""
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    named = [(f.relative_to(folder).as_posix(), f) for f in files]
    return tuple(
        StoredFile(name, digest(file), file.stat().st_size)
        for name, file in named
        if name != MANIFEST and not name.startswith(f"{ENGINES}/")
    )


def write_manifest(folder: Path, manifest: Manifest) -> Bundle:
    """Write manifest.json of a folder that `new_bundle` gave."""
    (folder / MANIFEST).write_bytes(encode(manifest))
    return Bundle(folder, manifest)


def _publish(partial: Path, out: Path, *, overwrite: bool) -> None:
    """Put the finished folder in place of what may be there."""
    refuse_existing(out, overwrite=overwrite)  # again: somebody else may have made it meanwhile
    aside = None
    if out.exists():
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
        os.replace(out, aside / out.name)
    os.replace(partial, out)
    if aside:
        shutil.rmtree(aside)


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Turn SIGTERM into KeyboardInterrupt, so that a killed export cleans up too."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: nothing to catch there
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
