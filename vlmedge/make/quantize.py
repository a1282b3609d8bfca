"""Quantize a bundle into another."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from vlmedge.bundle import Bundle
from vlmedge.bundle.writer import new_bundle
from vlmedge.checkpoints.resolve import family_of, resolve
from vlmedge.errors import BundleError
from vlmedge.graphs.portable import load_graph
from vlmedge.make.check import merged_like
from vlmedge.make.recipe import Recipe
from vlmedge.make.write import _gate, _recipe, _refuse_missed, _Source, _write
from vlmedge.progress import SILENT, Progress, passing
from vlmedge.shelves.registry import FAMILIES
from vlmedge.spec.manifest import FLOAT


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
    """Quantize a float32 bundle, and compare the result with PyTorch.

    Args:
        bundle: The bundle to quantize; it stays as it is.
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
