"""Checkpoint in, verified bundle out; and bundle in, smaller verified bundle out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlmedge.bundle import Bundle
from vlmedge.bundle.writer import new_bundle, refuse_existing
from vlmedge.checkpoints.resolve import family_of, resolve
from vlmedge.errors import InputError
from vlmedge.lora.adapter import parse
from vlmedge.make.check import identities
from vlmedge.make.recipe import Recipe
from vlmedge.make.write import _gate, _recipe, _refuse_missed, _slotted, _Source, _write
from vlmedge.progress import SILENT, Progress, passing
from vlmedge.shelves.registry import FAMILIES

if TYPE_CHECKING:
    import onnx_ir as ir


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
    """Export a checkpoint to a bundle, quantized on the way if asked, and compare it with PyTorch.

    Args:
        checkpoint: Built-in name, folder, alias or hub id.
        out: Folder to make; default: <name>-<scheme>.
        recipe: How to quantize, or a scheme's name; none for float32.
        calibrate: A folder of pictures to calibrate with; default: drawn scenes.
        lora: Folders of adapters that are merged into the weights, DIR or DIR=WEIGHT.
        lora_slots: Take adapters up to this rank at run time; see `Model.set_adapter`.
        lora_modules: The Linears that get slots, by the ends of their paths; none: all in layers.
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
        raise InputError("lora_modules needs lora_slots: give their rank too")
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
