"""Runs of the gate on published weights, one JSON object a run: what the family table quotes."""

from __future__ import annotations

from pathlib import Path

import msgspec

from vlmedge.bundle import Bundle
from vlmedge.errors import InputError
from vlmedge.files import replace_file


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One verified run.

    Attributes:
        family: File name in export/.
        checkpoint: Hub id.
        revision: Commit on the hub, or none for a folder.
        sha256: Of the weights.
        scheme: How it was quantized.
        passed: Whether the gate passed.
        max_rel: Largest relative difference of any component.
        vlmedge: The version that ran it.
    """

    family: str
    checkpoint: str
    revision: str | None
    sha256: str
    scheme: str
    passed: bool
    max_rel: float
    vlmedge: str


def read_records(file: Path) -> list[Record]:
    """Read what was recorded; a file that is not there holds nothing."""
    if not file.exists():
        return []
    try:
        return msgspec.json.decode(file.read_bytes(), type=list[Record])
    except (OSError, msgspec.DecodeError) as error:
        raise InputError(f"{file} holds no records: {error}: name another file") from None


def record(bundle: Bundle, file: Path) -> Record:
    """Add a checked bundle to a file of records; the same weights and scheme are replaced.

    Raises:
        InputError: The bundle has not been to the gate, or the file holds something else.
    """
    manifest = bundle.manifest
    if manifest.parity is None:
        raise InputError(
            f"{bundle.path} has not been compared with PyTorch: run vlmedge check first"
        )
    source = manifest.checkpoint
    made = Record(
        family=manifest.spec.family,
        checkpoint=source.id,
        revision=source.revision,
        sha256=source.sha256,
        scheme=manifest.scheme,
        passed=manifest.parity.passed,
        max_rel=max(c.max_rel for c in manifest.parity.components),
        vlmedge=manifest.vlmedge,
    )
    others = [
        old for old in read_records(file) if (old.sha256, old.scheme) != (made.sha256, made.scheme)
    ]
    data = msgspec.json.format(msgspec.json.encode([*others, made]), indent=2)
    try:
        replace_file(file, data + b"\n")
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror}") from None
    return made
