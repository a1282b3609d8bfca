"""Write a bundle atomically: components, assets, provenance and the gate's result."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from vlmedge.bundle import ENGINES as ENGINE_CACHE
from vlmedge.bundle import Bundle
from vlmedge.bundle.embedding_table import TABLE, round_rows
from vlmedge.bundle.writer import stored_files, write_manifest
from vlmedge.checkpoints.resolve import Checkpoint
from vlmedge.errors import BundleError, InputError
from vlmedge.graphs.portable import load_graph
from vlmedge.graphs.shared_weights import store_once
from vlmedge.make.check import samples_for
from vlmedge.make.mixed_precision import GateRun, MixedPrecision, drop, write_graph
from vlmedge.make.recipe import Recipe
from vlmedge.parity.gate import run_gate
from vlmedge.parity.samples import CALIBRATION_IMAGES, calibration_folder, drawn
from vlmedge.progress import Progress
from vlmedge.run.tasks.trial import Samples
from vlmedge.shelves.contracts import Export
from vlmedge.shelves.registry import SLOTTERS
from vlmedge.spec import EmbeddingTable, ModelSpec
from vlmedge.spec.manifest import FLOAT, FORMAT, AdapterId, CheckpointId, KeptLayer, Manifest
from vlmedge.version import __version__

if TYPE_CHECKING:
    import onnx_ir as ir


_LIBRARIES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")


def _recipe(given: Recipe | str | None, check: bool) -> Recipe:
    chosen = given if isinstance(given, Recipe) else Recipe(given or FLOAT)
    if chosen.target_drop is not None and not check:
        raise InputError("target_drop is measured by comparing with PyTorch: leave out --no-check")
    if chosen.options:
        chosen.chosen()  # before any work
    return chosen


def _gate(opened: Export, checkpoint: Checkpoint, progress: Progress) -> GateRun:
    samples = samples_for(checkpoint.built_in)
    return lambda bundle: run_gate(bundle, opened, samples, progress)


def _refuse_missed(bundle: Bundle, recipe: Recipe, allow_unverified: bool) -> None:
    """Refuse a mix that misses its target; nothing is written then."""
    parity = bundle.manifest.parity
    if recipe.target_drop is None or parity is None or allow_unverified:
        return
    lost = drop(parity)
    if lost > recipe.target_drop or not parity.passed:
        raise BundleError(
            f"the best mix of {recipe.scheme} loses {lost:.2f} points, and target_drop is "
            f"{recipe.target_drop:g}: give a larger one, or allow_unverified"
        )


class _Source(msgspec.Struct, frozen=True):
    """Source that a bundle is written from: a checkpoint, or another bundle."""

    spec: ModelSpec
    checkpoint: CheckpointId
    embeddings: EmbeddingTable | None
    provenance: dict[str, str]
    graph: Callable[[str], ir.Model]
    adapters: tuple[AdapterId, ...]


def _slotted(source: _Source, rank: int, modules: Sequence[str]) -> _Source:
    """Give the graphs slots; all are traced now, for the spec must name their inputs."""
    graphs: dict[str, ir.Model] = {}
    components = []
    for component in source.spec.components:
        graphs[component.name] = model = source.graph(component.name)
        slots = SLOTTERS["lora"].add(component, model, rank, modules)
        components.append(msgspec.structs.replace(component, slots=slots))
    found = [slot.module for component in components for slot in component.slots]
    if not found and not modules:
        raise InputError(
            "lora_slots finds no layers in the model: name its Linears in lora_modules"
        )
    for end in modules:
        if not any(f".{module}".endswith(f".{end}") for module in found):
            raise InputError(f"lora_modules: the model has no Linear {end!r}: choose others")
    spec = msgspec.structs.replace(source.spec, components=tuple(components))
    return msgspec.structs.replace(source, spec=spec, graph=graphs.__getitem__)


def _write(
    folder: Path,
    source: _Source,
    recipe: Recipe,
    calibrate: Path | None,
    gate: GateRun | None,
    progress: Progress,
) -> Bundle:
    """Write graphs, weights and manifest into a folder that holds the assets, and run the gate."""
    manifest = Manifest(
        format=FORMAT,
        vlmedge=__version__,
        checkpoint=source.checkpoint,
        scheme=recipe.scheme,
        spec=source.spec,
        kept=(),
        files=(),
        provenance=source.provenance,
        embeddings=source.embeddings,
        adapters=source.adapters,
    )
    unsealed = Bundle(folder, manifest)
    if recipe.scheme == FLOAT:
        for component in source.spec.components:
            write_graph(source.graph(component.name), folder, component.name, progress)
        bundle = _seal(unsealed, {}, ())
        if gate is not None:
            gate(bundle)
        return Bundle.load(folder)
    if source.embeddings is not None and recipe.precision(TABLE) != FLOAT:
        precision = recipe.precision(TABLE) or recipe.chosen().table
        rounded = round_rows(folder, source.embeddings, precision)
        unsealed = Bundle(folder, msgspec.structs.replace(manifest, embeddings=rounded))
    samples, origin = _calibration_samples(calibrate, progress)
    mixed = MixedPrecision(unsealed, recipe, samples, progress)
    for component in source.spec.components:
        mixed.add(component, source.graph(component.name))
    mixed.refuse_idle_patterns()
    if recipe.budget_mib is not None:
        mixed.to_budget(recipe.budget_mib)

    def seal() -> Bundle:
        mixed.finish()
        return _seal(unsealed, {"calibration": origin}, mixed.kept)

    if gate is not None and recipe.target_drop is not None:
        mixed.to_target(recipe.target_drop, gate, seal)
    elif gate is not None:
        gate(seal())
    else:
        seal()
    return Bundle.load(folder)


def _seal(unsealed: Bundle, provenance: dict[str, str], kept: Sequence[KeptLayer]) -> Bundle:
    """Store common weights once, and write the manifest of what lies in the folder then."""
    folder, manifest = unsealed.path, unsealed.manifest
    shutil.rmtree(folder / ENGINE_CACHE, ignore_errors=True)
    store_once(folder, [component.name for component in manifest.spec.components])
    return write_manifest(
        folder,
        msgspec.structs.replace(
            manifest,
            kept=tuple(kept),
            files=stored_files(folder),
            provenance={
                **manifest.provenance,
                **_provenance(folder, manifest.spec),
                **provenance,
            },
        ),
    )


def _calibration_samples(folder: Path | None, progress: Progress) -> tuple[Samples, str]:
    """Return the samples to calibrate with, and a description of them."""
    if folder is None:
        samples = drawn(CALIBRATION_IMAGES, "calibration", labelled=False)
        return samples, f"{len(samples.images) + len(samples.singles)} drawn scenes"
    samples = calibration_folder(folder, progress.note)
    return samples, f"{len(samples.images)} pictures of {folder.name}"


def _provenance(folder: Path, spec: ModelSpec) -> dict[str, str]:
    """Return the versions and data that the bundle was made with."""
    opsets = {str(load_graph(folder, c.name).opset_imports.get("")) for c in spec.components}
    found = {"python": platform.python_version(), "opset": ", ".join(sorted(opsets))}
    for library in _LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found
