"""What a lowering did, and what it did not and why: data that an engine keeps beside its graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fusion:
    """How many patterns of one kind were replaced by something faster.

    Attributes:
        kind: The kind of pattern: "attentions".
        done: How many were replaced.
        total: How many there are.
        left: For each pattern that was not replaced its node and the reason; for many, their common
            reason.
    """

    kind: str
    done: int
    total: int
    left: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Say it as `24/24 attentions`."""
        return f"{self.done}/{self.total} {self.kind}"


def tally(kind: str, total: int, left: Sequence[str]) -> Fusion:
    """Count what was replaced; nodes that were left for one reason are named by the first."""
    reasons = [line.partition(": ") for line in left]
    counts = Counter(reason for _, _, reason in reasons)
    first = {reason: name for name, _, reason in reversed(reasons)}
    lines = [
        f"{first[reason]}: {reason}" + (f" (and {count - 1} more)" if count > 1 else "")
        for reason, count in counts.items()
    ]
    return Fusion(kind, total - len(left), total, tuple(lines))
