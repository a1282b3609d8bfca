"""Checkpoint in, verified bundle out; and bundle in, smaller verified bundle out."""

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
from vlmedge.bundle.writer import new_bundle, refuse_existing, stored_files, write_manifest
from vlmedge.checkpoints.resolve import Checkpoint, family_of, resolve
from vlmedge.errors import BundleError, InputError
from vlmedge.graphs.portable import load_graph
from vlmedge.graphs.shared_weights import store_once
from vlmedge.lora.adapter import parse
from vlmedge.lora.merge import identities, merged_like
from vlmedge.make.check import samples_for
from vlmedge.parity.gate import run_gate
from vlmedge.parity.samples import CALIBRATION_IMAGES, Samples, calibration_folder, drawn
from vlmedge.progress import SILENT, Progress, passing
from vlmedge.recipe import FLOAT, Recipe
from vlmedge.shelves.contracts import Export
from vlmedge.shelves.registry import FAMILIES, SLOTTERS
from vlmedge.shrinking import GateRun, Shrinker, drop, write_graph
from vlmedge.spec import EmbeddingTable, ModelSpec
from vlmedge.spec.manifest import FORMAT, AdapterId, CheckpointId, KeptLayer, Manifest
from vlmedge.version import __version__

if TYPE_CHECKING:
    import onnx_ir as ir

_LIBRARIES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")


def export(
    checkpoint: str,
    out: Path | None = None,
    recipe: Recipe | str | None = None,
    *,
    calibrate: Path | None = None,
    lora: Sequence[str] = (),
    lora_slots: int | None = None,
    lora_modules: Sequence[str] = (),
    overwrite: bool = False,
    check: bool = True,
    allow_unverified: bool = False,
    allow_pickle: bool = False,
    progress: Progress = SILENT,
) -> Bundle:
    """Export a checkpoint to a bundle, quantized on the way if asked, and put it to the gate.

    Args:
        checkpoint: Built-in name, folder, alias or hub id.
        out: Folder to make; default: <name>-<scheme>.
        recipe: How to quantize, or a scheme's name; none for float32.
        calibrate: A folder of pictures to calibrate with; default: drawn scenes.
        lora: Folders of adapters that are merged into the weights, DIR or DIR=WEIGHT.
        lora_slots: Take adapters up to this rank at run time; see `Model.set_adapter`.
        lora_modules: Which Linears get slots, by the ends of their paths; none: all in layers.
        overwrite: Replace a bundle that is there.
        check: Compare with PyTorch; without it the bundle is unverified.
        allow_unverified: Write the best mix also when it misses the recipe's target.
        allow_pickle: Read weights from .bin files too.
        progress: Watches.

    Returns:
        The bundle; `verified` tells whether it passed.
    """
    chosen = _recipe(recipe, check)
    if lora_modules and lora_slots is None:
        raise InputError("modules for slots, but no slots: give --lora-slots RANK too")
    adapters = [parse(text) for text in lora]
    if out is not None:
        refuse_existing(out, overwrite=overwrite)
    found = resolve(checkpoint, progress, allow_pickle=allow_pickle)
    out = out or Path(f"{found.name}-{chosen.scheme}")
    refuse_existing(out, overwrite=overwrite)
    family = family_of(found.folder)
    with passing(progress, f"opening {found.name}"):  # PyTorch is imported here: some seconds
        opened = FAMILIES[family].open(found.folder, allow_pickle=allow_pickle)
    if adapters:
        opened = opened.merged(adapters)
    with new_bundle(out, overwrite=overwrite) as folder:
        for name, write in opened.assets():
            (folder / name).parent.mkdir(exist_ok=True)
            write(folder / name)

        def trace(component: str) -> ir.Model:
            with progress.step(f"tracing {component}"):
                return opened.trace(component)

        source = _Source(
            opened.spec, found.identity(), opened.embeddings(), {}, trace, identities(adapters)
        )
        if lora_slots is not None:
            source = _slotted(source, lora_slots, lora_modules)
        gate = _gate(opened, found, progress) if check else None
        _refuse_missed(
            _write(folder, source, chosen, calibrate, gate, progress), chosen, allow_unverified
        )
    return Bundle.load(out)


def quantize(
    bundle: Path,
    recipe: Recipe | str,
    out: Path | None = None,
    *,
    against: str | None = None,
    calibrate: Path | None = None,
    lora: Sequence[str] = (),
    overwrite: bool = False,
    check: bool = True,
    allow_unverified: bool = False,
    progress: Progress = SILENT,
) -> Bundle:
    """Quantize a float32 bundle, and put the result to the gate.

    Args:
        bundle: What to quantize; it stays as it is.
        recipe: How, or a scheme's name.
        out: Folder to make; default: the bundle's name with the scheme's for float32.
        against: The checkpoint to check against; default: the one that the manifest names.
        calibrate: A folder of pictures to calibrate with; default: drawn scenes.
        lora: The adapters that were merged into the bundle, for the comparison.
        overwrite: Replace a bundle that is there.
        check: Compare with PyTorch; without it the result is unverified.
        allow_unverified: Write the best mix also when it misses the recipe's target.
        progress: Watches.
    """
    chosen = _recipe(recipe, check)
    before = Bundle.load(bundle)
    if before.manifest.scheme != FLOAT:
        raise BundleError(
            f"{bundle} is {before.manifest.scheme} already: quantize a {FLOAT} bundle"
        )
    gate = None
    if check:
        found = resolve(against or before.manifest.checkpoint.id, progress)
        family = family_of(found.folder)
        with passing(progress, f"opening {found.name}"):
            opened = FAMILIES[family].open(found.folder)
        gate = _gate(merged_like(before, opened, lora), found, progress)
    name = bundle.resolve().name.removesuffix(f"-{FLOAT}")
    out = out or bundle.resolve().parent / f"{name}-{chosen.scheme}"
    with new_bundle(out, overwrite=overwrite) as folder:
        if (before.path / "assets").is_dir():  # a painter has none
            shutil.copytree(before.path / "assets", folder / "assets")
        source = _Source(
            before.spec,
            before.manifest.checkpoint,
            before.manifest.embeddings,
            before.manifest.provenance,
            lambda component: load_graph(before.path, component),
            before.manifest.adapters,
        )
        _refuse_missed(
            _write(folder, source, chosen, calibrate, gate, progress), chosen, allow_unverified
        )
    return Bundle.load(out)


def _recipe(given: Recipe | str | None, check: bool) -> Recipe:
    chosen = given if isinstance(given, Recipe) else Recipe(given or FLOAT)
    if chosen.target_drop is not None and not check:
        raise InputError("a target drop is measured by the check: leave --no-check out")
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
            f"the best mix of {recipe.scheme} loses {lost:.2f}, the target is "
            f"{recipe.target_drop:g}: give a larger --target-drop, or --allow-unverified"
        )


class _Source(msgspec.Struct, frozen=True):
    """What a bundle is written from: a checkpoint, or another bundle."""

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
        raise InputError("slots: the model has no layers: name its Linears with --lora-modules")
    for end in modules:
        if not any(f".{module}".endswith(f".{end}") for module in found):
            raise InputError(f"slots: the model has no Linear {end!r}: choose others")
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
    shrinker = Shrinker(unsealed, recipe, samples, progress)
    for component in source.spec.components:
        shrinker.add(component, source.graph(component.name))
    shrinker.refuse_idle_patterns()
    if recipe.budget_mib is not None:
        shrinker.fit(recipe.budget_mib)

    def seal() -> Bundle:
        shrinker.finish()
        return _seal(unsealed, {"calibration": origin}, shrinker.kept)

    if gate is not None and recipe.target_drop is not None:
        shrinker.reach(recipe.target_drop, gate, seal)
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
    """Return what to calibrate with, and what to say of it."""
    if folder is None:
        samples = drawn(CALIBRATION_IMAGES, "calibration", labelled=False)
        return samples, f"{len(samples.images) + len(samples.singles)} drawn scenes"
    samples = calibration_folder(folder, progress.note)
    return samples, f"{len(samples.images)} pictures of {folder.name}"


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
