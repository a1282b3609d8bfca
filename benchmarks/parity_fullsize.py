"""The gate in float32 on a checkpoint of any size, on as many pictures as asked for.

    python benchmarks/make_checkpoint.py blip2-opt-2.7b /tmp/blip2
    python benchmarks/parity_fullsize.py /tmp/blip2 /tmp/blip2-float32 100

Every component, and greedy and 5-beam tokens of every picture, against PyTorch float32.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vlmedge.bundle import Bundle
from vlmedge.checkpoints.resolve import family_of
from vlmedge.make.export import export
from vlmedge.parity.gate import run_gate
from vlmedge.parity.samples import drawn
from vlmedge.shelves.registry import FAMILIES


class Log:
    """Print each step with its time."""

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Time one step."""
        began = time.perf_counter()
        yield lambda amount: None
        print(f"{title}: {time.perf_counter() - began:.1f} s", flush=True)

    def note(self, text: str) -> None:
        """Print one line."""
        print(text, flush=True)


def main() -> None:
    """Export if need be, then run the gate."""
    checkpoint, out, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if not out.exists():
        export(checkpoint, out, check=False, progress=Log())
    opened = FAMILIES[family_of(Path(checkpoint))].open(Path(checkpoint))
    samples = drawn(count, "heldout", labelled=False)
    parity = run_gate(Bundle.load(out), opened, samples, Log(), count)
    for result in (*parity.components, *parity.tasks):
        print(result)
    print("passed" if parity.passed else "FAILED")


if __name__ == "__main__":
    main()
