"""What came out of a build, as engine.json keeps it beside the plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from vlmedge.parity.on_device import Verdict
from vlmedge.shelves.build_options import Precision


class Restored(msgspec.Struct, frozen=True):
    """One node that computes in float32 in a float16 engine.

    Attributes:
        node: Its name, or its output's if it has none.
        operator: Its kind.
        output: The name of its first output, which no other node has.
        largest: The largest absolute value that it reads, writes or adds up.
    """

    node: str
    operator: str
    output: str
    largest: float


class Outcome(msgspec.Struct, frozen=True):
    """Result of a build.

    Attributes:
        computed_in: Number format that its float layers compute in.
        restored: Nodes of a float16 engine that compute in float32, since they overflowed.
        level4: What it gives on this device, against its portable graph.
        dropped: Variants that were built too and are not used, with their ms: "int8", "GPU" beside
            a DLA.
        records: Whether steps are recorded and played, which was equal and faster here.
        dla_core: Number of the deep-learning accelerator that it is for, or none: the GPU.
    """

    computed_in: Precision
    restored: tuple[Restored, ...]
    level4: Verdict
    dropped: dict[str, float] = {}
    records: bool = False
    dla_core: int | None = None


def read_outcome(record: Mapping[str, Any]) -> Outcome:
    """Read it from an engine's record."""
    return msgspec.convert({name: record[name] for name in Outcome.__struct_fields__}, Outcome)
