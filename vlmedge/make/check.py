"""Compare a bundle with the checkpoint that it came from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vlmedge.bundle import Bundle
from vlmedge.checkpoints.resolve import family_of, resolve
from vlmedge.errors import AdapterError, BundleError
from vlmedge.lora.adapter import Weighted, parse
from vlmedge.parity.gate import run_gate
from vlmedge.parity.samples import drawn, from_folder
from vlmedge.progress import SILENT, Progress, passing
from vlmedge.run.tasks.trial import Samples
from vlmedge.shelves.contracts import Export
from vlmedge.shelves.registry import FAMILIES
from vlmedge.spec.manifest import AdapterId, Parity

LABELLED_SAMPLES = 200  # built-ins: one wrong answer is half a point
SAMPLES = 16  # real checkpoints: their PyTorch side takes seconds a picture


def check(
    bundle: Path,
    against: str,
    images: Path | None = None,
    *,
    lora: Sequence[str] = (),
    progress: Progress = SILENT,
) -> Parity:
    """Compare a bundle with the checkpoint that it came from, and write the result into it.

    Args:
        bundle: The folder.
        against: The checkpoint, as for export.
        images: A folder of pictures to compare on; default: drawn scenes.
        lora: The adapters that were merged into the bundle, DIR or DIR=WEIGHT.
        progress: Watches.
    """
    opened = Bundle.load(bundle, thorough=True)
    if not os.access(bundle, os.W_OK):  # before minutes of work
        raise BundleError(
            f"{bundle} is read-only, and `check` writes its report into the bundle: "
            "check a copy of it"
        )
    checkpoint = resolve(against, progress)
    family = family_of(checkpoint.folder)
    if family != opened.spec.family:
        raise BundleError(
            f"{bundle} is of family {opened.spec.family}, {against} of {family}: "
            "give the checkpoint that it was exported from"
        )
    with passing(progress, f"opening {checkpoint.name}"):
        export = FAMILIES[family].open(checkpoint.folder)
    if export.spec.components != opened.spec.bare():
        raise BundleError(
            f"{bundle} has other shapes than {against}: "
            "give the checkpoint that it was exported from"
        )
    if checkpoint.identity().sha256 != opened.manifest.checkpoint.sha256:
        progress.note(f"{bundle} was not exported from {against} as it is now")
    export = merged_like(opened, export, lora)
    if images is not None:
        samples = from_folder(images, SAMPLES)
    else:
        samples = samples_for(checkpoint.built_in)
    return run_gate(opened, export, samples, progress)


def samples_for(built_in: bool) -> Samples:
    """Draw the scenes that the gate compares on when the user has given no pictures."""
    return drawn(LABELLED_SAMPLES if built_in else SAMPLES, "heldout", labelled=built_in)


def identities(adapters: Sequence[Weighted]) -> tuple[AdapterId, ...]:
    """Return the ids of merged adapters, for the manifest."""
    return tuple(
        AdapterId(chosen.adapter.folder.resolve().name, chosen.adapter.digest(), chosen.weight)
        for chosen in adapters
    )


def merged_like(bundle: Bundle, opened: Export, lora: Sequence[str]) -> Export:
    """Merge the adapters into a checkpoint that were merged into the bundle to be compared.

    Args:
        bundle: Its manifest names the adapters.
        opened: The checkpoint.
        lora: Where they lie, DIR or DIR=WEIGHT.

    Raises:
        AdapterError: They are not the bundle's.
    """
    adapters = [parse(text) for text in lora]
    found = [(a.sha256, a.weight) for a in identities(adapters)]
    if found != [(a.sha256, a.weight) for a in bundle.manifest.adapters]:
        has = ", ".join(f"{a.name}={a.weight:g}" for a in bundle.manifest.adapters) or "none"
        gave = ", ".join(lora) or "none"
        raise AdapterError(
            f"{bundle.path} was made with the adapters {has}, not {gave}: "
            "give the same ones with --lora, so that PyTorch has them too"
        )
    return opened.merged(adapters) if adapters else opened
