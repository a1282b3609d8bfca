"""Engines on disk: what each was made from and for, one builder at a time, whole or not at all.

    engines/trt-<key>/engine.plan    what TensorRT deserializes
                      engine.json    what it was made from and for, and the plan's digest
    engines/trt-<gpu>-<version>.timing    how long kernels took, so that the next build is quicker
    engines/.trt-<component>.lock         held while one process builds

The key is the digest of the identity, so engines of several machines may lie side by side; only one
whose every field is this machine's is ever deserialized.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from vlmedge.bundle import Bundle
from vlmedge.errors import BundleError
from vlmedge.files import digest, replace_file
from vlmedge.shelves.build_options import AxisRange, BuildOptions
from vlmedge.shelves.engine_store import SIDECAR, engines_folder, read_sidecar

from .outcome import Outcome
from .worker import PLAN

FORMAT = 2  # of engine.json
LOWERING = 6  # count it up when lower.py writes something else: engines are rebuilt
_POLL_S = 0.2


class Identity(msgspec.Struct, frozen=True):
    """All that an engine is made from and for; another value of any field is another engine.

    Attributes:
        component: Its name.
        graph: Digest of the portable graph.
        weights: Digest of the digests of its weight files.
        lowering: Version of the lowering.
        tensorrt: TensorRT's whole version.
        gpu: The GPU's name.
        compute_capability: Its compute capability.
        platform: Operating system and processor.
        precision: Number format that its float layers were asked to compute in.
        profiles: Ranges of the named axes, as MIN:OPT:MAX.
        level: The builder's optimization level, or its default.
        workspace_mib: The workspace that was asked for, or the default.
        keep_slower: Whether quantized layers stay where float16 would be faster.
        record: Whether a decoder's steps were to be recorded.
        dla: Whether a deep-learning accelerator was to be tried.
    """

    component: str
    graph: str
    weights: str
    lowering: int
    tensorrt: str
    gpu: str
    compute_capability: str
    platform: str
    precision: str
    profiles: tuple[dict[str, str], ...]
    level: int | None
    workspace_mib: int | None
    keep_slower: bool
    record: bool
    dla: str

    @property
    def key(self) -> str:
        """Return the name of the engine's folder."""
        text = json.dumps(msgspec.to_builtins(self), sort_keys=True)
        return f"trt-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def identify(
    bundle: Bundle,
    component: str,
    machine: tuple[str, str, str],
    profiles: tuple[Mapping[str, AxisRange], ...],
    options: BuildOptions,
) -> Identity:
    """Return the identity of a component's engine, built here and now.

    Args:
        bundle: Its bundle.
        component: Its name.
        machine: TensorRT's version, the GPU's name and compute capability.
        profiles: Shapes that it is built for.
        options: How.
    """
    graph = bundle.graph_file(component).read_bytes()
    weights = [f for f in bundle.manifest.files if f.path.endswith(".bin")]
    used = sorted(f.sha256 for f in weights if Path(f.path).name.encode() in graph)
    return Identity(
        component,
        hashlib.sha256(graph).hexdigest(),
        hashlib.sha256(" ".join(used).encode()).hexdigest(),
        LOWERING,
        *machine,
        f"{sys.platform}-{platform.machine()}",
        options.precision,
        tuple({axis: str(r) for axis, r in profile.items()} for profile in profiles),
        options.level,
        options.workspace_mib,
        options.keep_slower,
        options.record,
        options.dla,
    )


def find(bundle: Bundle, identity: Identity) -> tuple[Path | None, str]:
    """Look for an engine; return its folder, and why there is none in words.

    A plan whose size or digest is not the recorded one is removed: it is broken or from elsewhere.
    """
    folder = engines_folder(bundle, identity.key) / identity.key
    wanted = json.loads(msgspec.json.encode(identity))  # as it comes back from a record
    if folder.is_dir():
        record = read_sidecar(folder)
        plan, file = record.get("plan") or {}, folder / PLAN
        same = record.get("identity") == wanted and file.is_file()
        if same and file.stat().st_size == plan.get("bytes") and digest(file) == plan.get("sha256"):
            return folder, ""
        shutil.rmtree(folder, ignore_errors=True)
        return None, f"{PLAN} is not the file that was built"
    return None, _difference(folder.parent, wanted)


def _difference(engines: Path, wanted: Mapping[str, Any]) -> str:
    """Name the fields in which the most similar engine of this component differs."""
    best: list[str] = []
    for folder in engines.glob("trt-*"):
        found = read_sidecar(folder).get("identity") or {}
        if found.get("component") != wanted["component"]:
            continue
        names = [name for name in wanted if found.get(name) != wanted[name]]
        words = [_change(name, found.get(name), wanted[name]) for name in names]
        if words and (not best or len(words) < len(best)):
            best = words
    return ", ".join(best)


def _change(name: str, old: object, new: object) -> str:
    if name in ("graph", "weights", "profiles", "lowering"):
        return f"{name} changed"
    return f"{name} was {old} and is {new}"


def last_options(bundle: Bundle, component: str, gpu: str) -> BuildOptions:
    """Return how a component was last built for this GPU, so that building again keeps to it."""
    engines = engines_folder(bundle, "")
    graph = digest(bundle.graph_file(component))
    for folder in sorted(engines.glob("trt-*/"), key=lambda f: f.stat().st_mtime, reverse=True):
        record = read_sidecar(folder)
        identity, options = record.get("identity") or {}, record.get("options") or {}
        if identity.get("component") != component or identity.get("gpu") != gpu or not options:
            continue
        if identity.get("graph") != graph and not folder.is_relative_to(bundle.path):
            continue  # another bundle's, in the cache that all share
        axes = {axis: AxisRange.parse(text) for axis, text in options["axes"].items()}
        return BuildOptions(
            options["precision"],
            axes,
            options["level"],
            options["workspace_mib"],
            keep_slower=options.get("keep_slower", False),
            record=options.get("record", False),
            dla=options.get("dla", "off"),
        )
    return BuildOptions()


def store(
    partial: Path,
    bundle: Bundle,
    identity: Identity,
    options: BuildOptions,
    outcome: Outcome,
) -> Path:
    """Turn a folder with a plan into the engine, and remove those that it replaces.

    These are engines of the same component for the same GPU; another machine's stay.

    Args:
        partial: The folder.
        bundle: The bundle that the engine belongs to.
        identity: The inputs and the device that it was built for.
        options: How it was asked for.
        outcome: Result of the build.
    """
    plan = partial / PLAN
    record = {
        "format": FORMAT,
        "identity": msgspec.to_builtins(identity),
        "options": {
            "precision": options.precision,
            "axes": {axis: str(r) for axis, r in options.axes.items()},
            "level": options.level,
            "workspace_mib": options.workspace_mib,
            "keep_slower": options.keep_slower,
            "record": options.record,
            "dla": options.dla,
        },
        **msgspec.to_builtins(outcome),
        "plan": {"sha256": digest(plan), "bytes": plan.stat().st_size},
    }
    for file in partial.iterdir():
        if file != plan:
            file.unlink()
    (partial / SIDECAR).write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2))
    partial.chmod(0o755)  # mkdtemp's 0700 would hide it from other users of the bundle
    folder = engines_folder(bundle, identity.key) / identity.key
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    if not folder.is_relative_to(bundle.path):  # elsewhere lie other bundles' engines
        return folder
    for other in folder.parent.glob("trt-*"):
        found = read_sidecar(other).get("identity") or {}
        same = ("component", "gpu", "compute_capability", "platform")
        if other != folder and all(found.get(f) == getattr(identity, f) for f in same):
            shutil.rmtree(other, ignore_errors=True)
    return folder


@contextlib.contextmanager
def workshop(engines: Path, component: str, waiting: Callable[[], None]) -> Iterator[Path]:
    """Give a folder to build in, alone; it vanishes when the block ends, whatever happens.

    Args:
        engines: Where engines are.
        component: The component to build.
        waiting: Called once when another process builds it just now.

    Raises:
        BundleError: The folder cannot be made.
    """
    prefix = f".trt-{component}.partial-"
    try:
        engines.mkdir(parents=True, exist_ok=True)
        with _lock(engines / f".trt-{component}.lock", waiting):
            for left in engines.glob(f"{prefix}*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            partial = Path(tempfile.mkdtemp(prefix=prefix, dir=engines))
            try:
                yield partial
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except PermissionError as error:
        raise BundleError(
            f"{engines} cannot be written: {error.strerror}: set VLMEDGE_CACHE to a writable folder"
        ) from None


@contextlib.contextmanager
def _lock(file: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold a lock that the system frees when its process ends, however that is."""
    try:
        import fcntl
    except ImportError:  # Windows: two builds at once do the work twice
        yield
        return
    told = False
    while True:
        handle = os.open(file, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            if not told:
                told = True
                waiting()
            time.sleep(_POLL_S)
            continue
        if _is_file(file, handle):
            break
        os.close(handle)  # its holder has just removed it: it locks nothing any more
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(handle)


def _is_file(file: Path, handle: int) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def timing_file(engines: Path, identity: Identity) -> Path:
    """Return where the timings of a GPU and a version are kept."""
    name = re.sub(r"[^a-z0-9.]+", "-", f"{identity.gpu}-{identity.tensorrt}".lower())
    return engines / f"trt-{name}.timing"


def keep_timing(partial: Path, file: Path) -> None:
    """Keep what the build has timed; to lose it costs time and nothing else."""
    with contextlib.suppress(OSError):
        replace_file(file, partial.read_bytes())
