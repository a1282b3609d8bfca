"""Level 4 of the gate: what an engine gives on a machine, against its portable graph.

Levels 1 to 3 held the bundle against PyTorch where it was exported, on ONNX Runtime's CPU. A board
has no PyTorch, and its engine runs another graph, lowered for it; there the portable graph is what
the engine is held against. A compiled engine keeps the outcome in its engine.json, ONNX Runtime is
asked again; both end up in reports/parity.json of a bundle that can be written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import msgspec

from vlmedge.bundle import REPORT, Bundle, read_manifest
from vlmedge.files import digest
from vlmedge.progress import Progress
from vlmedge.shelves.contracts import Engine
from vlmedge.shelves.engine_store import engine_records
from vlmedge.spec.manifest import ComponentParity

_KEY = "level4"  # in the report, and in an engine's record


class Verdict(msgspec.Struct, frozen=True):
    """Result of level 4 for one component.

    Attributes:
        against: The reference that the engine was compared with; none: it could not be compared.
        parity: How far it is from that, the worst of all outputs, and whether that is allowed.
        latency_ms: Median time of one pass over the probe, copies included.
    """

    against: str | None
    parity: ComponentParity | None
    latency_ms: float


class OnDevice(msgspec.Struct, frozen=True):
    """One component on one engine of one machine.

    Attributes:
        component: Its name.
        engine: The engine that ran it, with its version.
        device: The GPU's name, or the processor's.
        verdict: Its result there.
    """

    component: str
    engine: str
    device: str
    verdict: Verdict

    @property
    def failed(self) -> bool:
        """Whether it was compared, and is not what its portable graph gives."""
        return self.verdict.parity is not None and not self.verdict.parity.passed


@runtime_checkable
class Judging(Engine, Protocol):
    """An engine that holds what it opens against the portable graphs, here and now."""

    def judge(self, bundle: Bundle, progress: Progress) -> list[OnDevice]:
        """Run each component of a bundle on both."""
        ...


def recorded(bundle: Bundle) -> list[OnDevice]:
    """Read what builds have found of a bundle's compiled engines, wherever these are kept."""
    graphs = {c.name: digest(bundle.graph_file(c.name)) for c in bundle.spec.components}
    found = []
    for record in engine_records(bundle):
        identity = record.get("identity") or {}
        name = identity.get("component")
        if _KEY in record and name in graphs and identity.get("graph") == graphs[name]:
            verdict = msgspec.convert(record[_KEY], Verdict)
            engine = f"TensorRT {identity['tensorrt']}, {record['computed_in']}"
            if record.get("dla_core") is not None:
                engine += " on the DLA (experimental)"
            found.append(OnDevice(name, engine, identity["gpu"], verdict))
    order = list(graphs)
    return sorted(found, key=lambda one: (one.device, one.engine, order.index(one.component)))


def reported(bundle: Path) -> list[OnDevice]:
    """Read what a bundle's report tells of devices; nothing where it has no report."""
    return msgspec.convert(_report(bundle).get(_KEY) or [], list[OnDevice])


def report(bundle: Bundle, found: Sequence[OnDevice]) -> bool:
    """Add to a bundle's report, in place of its entries for the same engines and machines.

    Returns:
        Whether it could be written; a bundle that cannot stays as it is.
    """
    if not os.access(bundle.path, os.W_OK):
        return False
    new = {(one.component, one.engine, one.device) for one in found}
    kept = [o for o in reported(bundle.path) if (o.component, o.engine, o.device) not in new]
    written = {
        "bundle_of": bundle.manifest.checkpoint.id,
        "scheme": bundle.manifest.scheme,
        **_report(bundle.path),
        _KEY: msgspec.to_builtins([*kept, *found]),
    }
    now = Bundle(bundle.path, read_manifest(bundle.path))  # it may have been checked since
    try:
        now.with_parity(now.manifest.parity, json.dumps(written, indent=2).encode() + b"\n")
    except OSError:
        return False
    return True


def _report(bundle: Path) -> dict[str, Any]:
    try:
        data = json.loads((bundle / REPORT).read_bytes())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
