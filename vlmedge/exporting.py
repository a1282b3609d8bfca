"""Checkpoint in, verified bundle out; and bundle in, smaller verified bundle out."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from vlmedge import __version__
from vlmedge.bundle import ENGINES as ENGINE_CACHE
from vlmedge.bundle import Bundle
from vlmedge.calibrating import calibrate, calibration_samples
from vlmedge.checking import run_gate, samples_for
from vlmedge.checkpoint import Checkpoint, family_of, resolve
from vlmedge.contracts import Export, Scheme
from vlmedge.errors import BundleError
from vlmedge.manifest import FORMAT, CheckpointId, KeptLayer, Manifest
from vlmedge.portable import load_graph, save_graph
from vlmedge.progress import SILENT, Progress
from vlmedge.registry import ENGINES, FAMILIES, SCHEMES
from vlmedge.spec import EmbeddingTable, ModelSpec
from vlmedge.writer import new_bundle, refuse_existing, stored_files, write_manifest

if TYPE_CHECKING:
    import onnx_ir as ir

FLOAT = "float32"
_LIBRARIES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")


def export(
    checkpoint: str,
    out: Path | None = None,
    scheme: str | None = None,
    *,
    overwrite: bool = False,
    check: bool = True,
    allow_pickle: bool = False,
    progress: Progress = SILENT,
) -> Bundle:
    """Export a checkpoint to a bundle, quantized on the way if asked, and put it to the gate.

    Args:
        checkpoint: Built-in name, folder, alias or hub id.
        out: Folder to make; default: <name>-<scheme>.
        scheme: A file name in quantize/, or none for float32.
        overwrite: Replace a bundle that is there.
        check: Compare with PyTorch; without it the bundle is unverified.
        allow_pickle: Read weights from .bin files too.
        progress: Watches.

    Returns:
        The bundle; `verified` tells whether it passed.
    """
    rewriter = None if scheme is None else SCHEMES[scheme]
    if out is not None:
        refuse_existing(out, overwrite=overwrite)
    found = resolve(checkpoint, progress, allow_pickle=allow_pickle)
    out = out or Path(f"{found.name}-{scheme or FLOAT}")
    refuse_existing(out, overwrite=overwrite)
    opened = FAMILIES[family_of(found.folder)].open(found.folder, allow_pickle=allow_pickle)
    with new_bundle(out, overwrite=overwrite) as folder:
        for name, write in opened.assets():
            (folder / name).parent.mkdir(exist_ok=True)
            write(folder / name)

        def trace(component: str) -> ir.Model:
            with progress.step(f"tracing {component}"):
                return opened.trace(component)

        source = _Source(opened.spec, found.identity(), opened.embeddings(), {}, trace)
        bundle = _write(folder, source, scheme, rewriter, progress)
        if check:
            run_gate(bundle, opened, samples_for(found.built_in), progress)
    return Bundle.load(out)


def quantize(
    bundle: Path,
    scheme: str,
    out: Path | None = None,
    *,
    against: str | None = None,
    overwrite: bool = False,
    check: bool = True,
    progress: Progress = SILENT,
) -> Bundle:
    """Quantize a float32 bundle, and put the result to the gate.

    Args:
        bundle: What to quantize; it stays as it is.
        scheme: A file name in quantize/.
        out: Folder to make; default: the bundle's name with the scheme's for float32.
        against: The checkpoint to check against; default: the one that the manifest names.
        overwrite: Replace a bundle that is there.
        check: Compare with PyTorch; without it the result is unverified.
        progress: Watches.
    """
    rewriter = SCHEMES[scheme]
    before = Bundle.load(bundle)
    if before.manifest.scheme != FLOAT:
        raise BundleError(
            f"{bundle} is {before.manifest.scheme} already: quantize a {FLOAT} bundle"
        )
    reference: tuple[Checkpoint, Export] | None = None
    if check:
        found = resolve(against or before.manifest.checkpoint.id, progress)
        reference = found, FAMILIES[family_of(found.folder)].open(found.folder)
    name = bundle.resolve().name.removesuffix(f"-{FLOAT}")
    out = out or bundle.resolve().parent / f"{name}-{scheme}"
    with new_bundle(out, overwrite=overwrite) as folder:
        shutil.copytree(before.path / "assets", folder / "assets")
        source = _Source(
            before.spec,
            before.manifest.checkpoint,
            before.manifest.embeddings,
            before.manifest.provenance,
            lambda component: load_graph(before.path, component),
        )
        after = _write(folder, source, scheme, rewriter, progress)
        if reference:
            run_gate(after, reference[1], samples_for(reference[0].built_in), progress)
    return Bundle.load(out)


class _Source(msgspec.Struct, frozen=True):
    """What a bundle is written from: a checkpoint, or another bundle."""

    spec: ModelSpec
    checkpoint: CheckpointId
    embeddings: EmbeddingTable | None
    provenance: dict[str, str]
    graph: Callable[[str], ir.Model]


def _write(
    folder: Path,
    source: _Source,
    scheme: str | None,
    rewriter: Scheme | None,
    progress: Progress,
) -> Bundle:
    """Write graphs, weights and manifest into a folder that holds the assets."""
    kept: list[KeptLayer] = []
    for component in source.spec.components:
        model = source.graph(component.name)
        if rewriter is not None:
            kept += rewriter.rewrite(component, model)
        _write_weights(model, folder, component.name, progress)
        _check_graph(folder, component.name)
    manifest = Manifest(
        format=FORMAT,
        vlmedge=__version__,
        checkpoint=source.checkpoint,
        scheme=scheme or FLOAT,
        spec=source.spec,
        kept=tuple(kept),
        files=stored_files(folder),
        provenance={**source.provenance, **_provenance(folder, source.spec)},
        embeddings=source.embeddings,
    )
    if rewriter is not None:
        samples = calibration_samples()
        bundle = Bundle(folder, manifest)
        kept += calibrate(bundle, rewriter, ENGINES["ort"], samples, progress)
        shutil.rmtree(folder / ENGINE_CACHE, ignore_errors=True)
        calibration = f"{len(samples.images) + len(samples.singles)} drawn scenes"
        manifest = msgspec.structs.replace(
            manifest,
            kept=tuple(kept),
            files=stored_files(folder),
            provenance={**manifest.provenance, "calibration": calibration},
        )
    return write_manifest(folder, manifest)


def _write_weights(model: ir.Model, folder: Path, component: str, progress: Progress) -> None:
    total = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
    done = 0
    with progress.step(f"writing {component}", total) as advance:

        def wrote(bytes_written: int, bytes_total: int) -> None:
            nonlocal done
            advance(bytes_written - done)
            done = bytes_written

        save_graph(model, folder, component, wrote)


def _check_graph(folder: Path, component: str) -> None:
    """Level 0: onnx's own checker reads the file by path, so weights of any size stay on disk."""
    import onnx

    from vlmedge.bundle import graph_path

    try:
        onnx.checker.check_model(str(folder / graph_path(component)))
    except onnx.checker.ValidationError as error:
        raise BundleError(f"{component}: the graph is not valid ONNX: {error}") from None


def _provenance(folder: Path, spec: ModelSpec) -> dict[str, str]:
    """Say what made the bundle."""
    opsets = {str(load_graph(folder, c.name).opset_imports.get("")) for c in spec.components}
    found = {"python": platform.python_version(), "opset": ", ".join(sorted(opsets))}
    for library in _LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found
