"""The folder that export writes, quantize rewrites and a runtime reads.

    manifest.json  graphs/<component>.onnx + .bin  assets/*  reports/*  engines/ (a cache)

Weights lie beside their graph because ONNX forbids external data outside the graph's folder. What
two components have in common lies in the first one's file alone (graphs/shared_weights.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import msgspec

from vlmedge.bundle.embedding_table import EmbeddingRows, open_rows
from vlmedge.errors import BundleError
from vlmedge.files import digest, replace_file
from vlmedge.spec import LabelTask, ModelSpec, TextFrontEnd
from vlmedge.spec.manifest import FORMAT, Manifest, Parity, StoredFile
from vlmedge.spec.manifest_v1 import upgraded

MANIFEST = "manifest.json"
ENGINES = "engines"
REPORT = "reports/parity.json"
STAMP = "verified.json"  # in engines/: size and time of the files whose digest was right


@dataclass(frozen=True, slots=True)
class Bundle:
    """One deployable model on disk."""

    path: Path
    manifest: Manifest

    @classmethod
    def load(cls, path: str | Path, *, thorough: bool = False) -> Bundle:
        """Read and verify the bundle at `path`.

        Args:
            path: Its folder.
            thorough: Digest every byte again. Otherwise a file whose digest was right once and
                whose size and time are the same since is not read again.

        Raises:
            BundleError: It is no bundle, of another format, or a file is missing, altered,
                added or outside the folder.
        """
        path = Path(path)
        manifest = read_manifest(path)
        _verify(path, manifest, thorough)
        return cls(path, manifest)

    @property
    def spec(self) -> ModelSpec:
        """The model's spec, from the manifest."""
        return self.manifest.spec

    @property
    def verified(self) -> bool:
        """Whether the gate has passed."""
        return self.manifest.parity is not None and self.manifest.parity.passed

    def graph_file(self, component: str) -> Path:
        """Return the path of a component's portable graph."""
        return self.path / graph_path(self.spec.component(component).name)

    def embeddings(self) -> EmbeddingRows:
        """Open the token embedding table, [vocabulary, width]; rows are read when used."""
        table = self.manifest.embeddings
        if table is None:
            raise BundleError(f"{self.path} has no embedding table: export the model again")
        return open_rows(self.path, table)

    def with_parity(self, parity: Parity | None, report: bytes) -> Bundle:
        """Write what the gate found into reports/parity.json and the manifest."""
        file = self.path / REPORT
        try:
            file.parent.mkdir(exist_ok=True)
            replace_file(file, report)
        except OSError as error:
            raise BundleError(
                f"{self.path} cannot be written ({error.strerror}), and `check` writes its "
                "report into the bundle: check a copy of it"
            ) from None
        others = [f for f in self.manifest.files if f.path != REPORT]
        files = (*others, StoredFile(REPORT, hashlib.sha256(report).hexdigest(), len(report)))
        manifest = msgspec.structs.replace(self.manifest, parity=parity, files=files)
        replace_file(self.path / MANIFEST, encode(manifest))
        return Bundle(self.path, manifest)


def graph_path(component: str) -> str:
    """Return the path of a component's graph inside its bundle."""
    return f"graphs/{component}.onnx"


def weights_path(component: str) -> str:
    """Return the path of a component's weights inside its bundle."""
    return f"graphs/{component}.bin"


def read_manifest(path: Path) -> Manifest:
    """Read manifest.json of the folder `path` and check its types, not yet its files."""
    if not path.exists():
        raise BundleError(f"{path}: no such folder: `vlmedge export` makes one")
    file = path / MANIFEST
    if not file.is_file():
        raise BundleError(f"{path} is no bundle: it has no {MANIFEST}")
    try:
        data = json.loads(file.read_bytes())
        found = data["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BundleError(f"{file} cannot be read: export the model again") from None
    if found == 1:
        data = upgraded(data)
    elif found != FORMAT:
        newer = isinstance(found, int) and found > FORMAT
        cure = "update vlmedge" if newer else "export the model again"
        raise BundleError(f"{file} is of format {found}, this vlmedge reads 1 to {FORMAT}: {cure}")
    try:
        return msgspec.convert(data, Manifest)
    except msgspec.ValidationError as error:
        raise BundleError(f"{file} is broken: {error}: export the model again") from None


def encode(manifest: Manifest) -> bytes:
    """Write the manifest as JSON that people can read."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


def _verify(path: Path, manifest: Manifest, thorough: bool) -> None:
    """Refuse a missing, altered, added or escaping file by name."""
    stamp_file = path / ENGINES / STAMP
    stamps = {} if thorough else _read_stamps(stamp_file)
    fresh = {}
    for stored in manifest.files:
        file = path / _inside(path, stored.path)
        if not file.is_file():
            what = stored.path + _readers(path, manifest, stored.path)
            raise BundleError(f"{path}: {what} is missing: copy the whole folder again")
        status = file.stat()
        stamp = [status.st_size, status.st_mtime_ns, stored.sha256]
        if status.st_size != stored.bytes or (
            stamps.get(stored.path) != stamp and digest(file) != stored.sha256
        ):
            what = stored.path + _readers(path, manifest, stored.path)
            raise BundleError(f"{path}: {what} is not the file that was exported: copy it again")
        fresh[stored.path] = stamp
    known = {stored.path for stored in manifest.files} | {MANIFEST}
    for name in _used(manifest):
        if name not in known:
            raise BundleError(
                f"{path}: {name!r} is used but not listed in the manifest: do not use this bundle"
            )
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if file.is_file() and name not in known and not name.startswith(f"{ENGINES}/"):
            raise BundleError(f"{path}: {name} is not in the manifest: remove it")
    if fresh != stamps:
        _write_stamps(stamp_file, fresh)


def _used(manifest: Manifest) -> Iterator[str]:
    """Name the files that the spec points at."""
    spec = manifest.spec
    yield from (graph_path(component.name) for component in spec.components)
    fronts = spec.front_ends.values()
    yield from (front.tokenizer for front in fronts if isinstance(front, TextFrontEnd))
    yield from (task.labels for task in spec.tasks.values() if isinstance(task, LabelTask))
    if manifest.embeddings is not None:
        yield manifest.embeddings.file


def readers(path: Path, manifest: Manifest, file: str) -> list[str]:
    """Name the components whose graphs point to a weight file of the bundle at `path`."""
    name = PurePosixPath(file).name.encode()
    entry = b"\x12" + bytes([len(name)]) + name  # how ONNX spells it: field 2 of an entry
    graphs = [(c.name, path / graph_path(c.name)) for c in manifest.spec.components]
    return [name for name, graph in graphs if graph.is_file() and entry in graph.read_bytes()]


def _readers(path: Path, manifest: Manifest, file: str) -> str:
    """Return a note of the components that a broken file concerns, if more than one."""
    found = readers(path, manifest, file) if file.endswith(".bin") else []
    return f" (weights of {', '.join(found)})" if len(found) > 1 else ""


def _inside(path: Path, name: str) -> str:
    """Refuse a path that leaves the bundle."""
    pure = PurePosixPath(name)
    bad = pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name
    if bad or not (path / name).resolve().is_relative_to(path.resolve()):
        raise BundleError(f"{path}: the manifest names {name!r}, outside the bundle: do not use it")
    return name


def _read_stamps(file: Path) -> dict[str, list[object]]:
    try:
        stamps = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return stamps if isinstance(stamps, dict) else {}


def _write_stamps(file: Path, stamps: dict[str, list[object]]) -> None:
    """Remember what was verified; a read-only bundle is verified anew each time."""
    try:
        file.parent.mkdir(exist_ok=True)
        replace_file(file, json.dumps(stamps).encode())
    except OSError:
        return
