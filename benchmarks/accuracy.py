"""Accuracy, size and speed of the built-in checkpoints on held-out scenes.

    python benchmarks/accuracy.py tiny-clip [count]
    python benchmarks/accuracy.py tiny-blip2 [count]

Exports float32 and int8 bundles into a temporary folder and holds both against PyTorch float32 on
the same scenes, with the gate's own code on more samples than an export takes.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import vlmedge
from vlmedge.bundle import Bundle
from vlmedge.checking import run_gate
from vlmedge.checkpoint import BUILT_INS, family_of
from vlmedge.exporting import export
from vlmedge.progress import SILENT
from vlmedge.registry import FAMILIES
from vlmedge.samples import drawn


def speed_ms(bundle: Bundle, count: int = 100) -> float:
    """Time one picture at a time, front end included; milliseconds, the median."""
    model = vlmedge.load(bundle.path)
    samples = drawn(count, "heldout", labelled=True)
    times = []
    for image in samples.images:
        began = time.perf_counter()
        if "caption" in bundle.spec.tasks:
            model.caption(image)
        else:
            model.classify(image, samples.labels)
        times.append(1000 * (time.perf_counter() - began))
    return sorted(times)[count // 2]


def main() -> None:
    """Print one row a task and bundle."""
    name, count = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 500
    opened = FAMILIES[family_of(BUILT_INS / name)].open(BUILT_INS / name)
    with tempfile.TemporaryDirectory() as folder:
        for scheme in (None, "int8"):
            bundle = export(name, Path(folder) / (scheme or "float32"), scheme, check=False)
            weights = sum(f.bytes for f in bundle.manifest.files if f.path.endswith(".bin"))
            parity = run_gate(bundle, opened, drawn(count, "heldout", labelled=True), SILENT, count)
            print(
                f"{name} {scheme or 'float32'}: weights {weights / 2**20:.2f} MiB, "
                f"{speed_ms(Bundle.load(bundle.path)):.1f} ms a picture, "
                f"{'passed' if parity.passed else 'FAILED'}"
            )
            for task in parity.tasks:
                print(
                    f"  {task.task}: {task.samples} scenes, agreement {task.agreement:.2%}, "
                    f"right {task.accuracy:.2%} (PyTorch {task.reference_accuracy:.2%})"
                )


if __name__ == "__main__":
    main()
