"""Checkpoints and bundles that many tests want: each is made once, for all workers and all runs.

They lie in pytest's cache (`pytest --cache-clear` is a cold start) under a key of all sources that
could change a byte of them, so that no test sees a graph of older code. Bundles are unverified:
the gate is what tests are about, and is never cached. Tests get copies, which they may break.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path

from filelock import FileLock

from kit.tiny import KINDS, tiny

ROOT = Path(__file__).parents[2]
# The whole core, for tracing reads specs and a manifest names its makers; less what stands above
# the exporter in the house and is edited most: test_kit.py holds that no export imports it.
ABOVE = ("bench", "cli", "doctor")
SOURCES = {"float32": ("export", "vlmedge"), "other": ("quantize", "runtimes")}
LIBRARIES = (
    *("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "numpy", "safetensors", "peft"),
)
ENGINES = ("onnxruntime",)  # calibration runs graphs
FLOAT = "float32"

_cache: Path | None = None


def keep_in(folder: Path, *, alone: bool) -> None:
    """Say where bundles are kept.

    Args:
        folder: Of pytest's cache.
        alone: No worker, which is the time to delete what older code has made.
    """
    global _cache
    _cache = folder
    if alone:
        for old in folder.iterdir():
            if old.name not in (key(FLOAT), key("")):
                shutil.rmtree(old, ignore_errors=True)


def checkpoint_of(kind: str, folder: Path) -> Path:
    """Copy the smallest random checkpoint of a kind to `folder`."""
    return Path(shutil.copytree(_checkpoint(kind), folder))


def bundle_of(kind: str, folder: Path, scheme: str = FLOAT) -> Path:
    """Copy the unverified bundle of a kind, or of a built-in checkpoint, to `folder`.

    $VLMEDGE_TEST_BUNDLES has those of the built-in ones where torch is not: an engine may be there
    for a Python that has none, TensorRT's bindings often are.
    """
    if made := os.environ.get("VLMEDGE_TEST_BUNDLES"):
        return Path(shutil.copytree(Path(made) / f"{kind}-{scheme}", folder))
    return Path(shutil.copytree(_bundle(kind, scheme), folder))


def exported(checkpoint: Path, folder: Path) -> Path:
    """Copy the unverified bundle of a checkpoint that a test has changed to `folder`."""
    from vlmedge.make.export import export

    total = hashlib.sha256(checkpoint.name.encode())
    for file in sorted(file for file in checkpoint.rglob("*") if file.is_file()):
        total.update(f"\n{file.relative_to(checkpoint).as_posix()}\n".encode())
        total.update(file.read_bytes())
    place = _place(FLOAT, "changed") / total.hexdigest()[:16]
    once(place, lambda half: export(str(checkpoint), half, check=False))
    return Path(shutil.copytree(place, folder))


def kept(name: str, by: str, folder: Path, make: Callable[[Path], object]) -> Path:
    """Copy to `folder` what `make` writes: what a test file traces for itself.

    Args:
        name: Of no other test file's.
        by: The test file, `__file__`: if it changes, all is made again.
        folder: Where to; it must not be there yet.
        make: Writes a folder that is not there yet.
    """
    mark = hashlib.sha256(Path(by).read_bytes()).hexdigest()[:16]
    place = _place(FLOAT, "kept") / f"{name}-{mark}"
    if not place.exists():
        for old in place.parent.glob(f"{name}-{'?' * len(mark)}"):
            shutil.rmtree(old, ignore_errors=True)
    return Path(shutil.copytree(once(place, make), folder))


def once(place: Path, make: Callable[[Path], object]) -> Path:
    """Make a folder unless it is there; of several processes one does, and the others wait."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        if not place.exists():
            half = place.with_name(f"{place.name}.half")  # left by who was killed
            shutil.rmtree(half, ignore_errors=True)
            make(half)
            half.rename(place)
    return place


@cache
def key(scheme: str) -> str:
    """Digest what decides on the bytes of a bundle: sources, versions of libraries, the machine."""
    plain = scheme == FLOAT
    folders = SOURCES[FLOAT] if plain else (*SOURCES[FLOAT], *SOURCES["other"])
    files = [file for name in folders for file in sources(ROOT / name)]
    total = hashlib.sha256(f"{platform.python_version()} {platform.machine()}".encode())
    for library in LIBRARIES if plain else (*LIBRARIES, *ENGINES):
        total.update(f"\n{library} {_version(library)}".encode())
    for file in [*files, Path(__file__), Path(__file__).with_name("tiny.py")]:
        total.update(f"\n{file.relative_to(ROOT).as_posix()}\n".encode())
        total.update(file.read_bytes())
    return total.hexdigest()[:16]


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def sources(folder: Path) -> list[Path]:
    """List the files of a folder that an export may read; checkpoints are among them."""
    inside = sorted(file for file in folder.rglob("*") if file.is_file())
    return [
        file
        for file in inside
        if "__pycache__" not in file.parts
        and not (folder.name == "vlmedge" and file.relative_to(folder).as_posix().startswith(ABOVE))
    ]


def _checkpoint(kind: str) -> Path:
    return once(_place(FLOAT, kind) / "checkpoint", lambda folder: tiny(kind, folder))


def _bundle(kind: str, scheme: str) -> Path:
    from vlmedge.make.export import export
    from vlmedge.make.quantize import quantize
    from vlmedge.make.recipe import Recipe

    def make(folder: Path) -> None:
        if scheme == FLOAT:
            source = str(_checkpoint(kind)) if kind in KINDS else kind
            export(source, folder, check=False)
        else:  # times of a busy machine decide nothing
            recipe = Recipe(scheme, keep_slower=True)
            quantize(_bundle(kind, FLOAT), recipe, folder, check=False)

    return once(_place(scheme, kind) / scheme, make)


def _place(scheme: str, kind: str) -> Path:
    assert _cache is not None, "conftest.py says where"
    return _cache / key(scheme) / kind
