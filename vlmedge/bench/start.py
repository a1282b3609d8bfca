"""How long a process takes from its start to its first answer, cold and warm."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlmedge.bench.side import Worker
from vlmedge.bundle import ENGINES, MANIFEST, Bundle
from vlmedge.errors import VlmEdgeError

STARTS = 3
BUDGET_S = 20.0  # no further start of a side after it


def measure_starts(side: Worker, bundle: Bundle) -> str | None:
    """Start a side's process again and again.

    Cold is a bundle as it comes to a machine: nothing in engines/, no digest known. It is a copy,
    so that the bundle keeps its engines, whoever uses them meanwhile.

    Returns:
        Why an engine has no cold start, or none.
    """
    if side.checkpoint is None:
        try:
            with copied(bundle) as copy:
                for _ in _turns():
                    shutil.rmtree(copy / ENGINES, ignore_errors=True)
                    for times_ms in (side.cold_ms, side.warm_ms):
                        times_ms.extend(side.start_ms(copy))
                return None
        except OSError as error:
            reason = f"{bundle.path} cannot be copied: {error.strerror}"
        except VlmEdgeError as error:
            reason = str(error)
        side.cold_ms.clear()
    else:
        reason = None
    for _ in _turns():
        side.warm_ms.extend(side.start_ms())
    return reason


def _turns() -> Iterator[None]:
    began = time.perf_counter()
    for _ in range(STARTS):
        yield
        if time.perf_counter() - began > BUDGET_S:
            return


@contextmanager
def copied(bundle: Bundle) -> Iterator[Path]:
    """Lend a copy of a bundle without engines.

    It is in engines/, on the same disk, where nothing of a bundle's own lies. No links, which
    onnx_ir and ONNX Runtime refuse.
    """
    engines = bundle.path / ENGINES
    engines.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".start-", dir=engines) as name:
        for file in (MANIFEST, *(stored.path for stored in bundle.manifest.files)):
            target = Path(name) / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path / file, target)
        if hasattr(os, "sync"):  # or writing the copy would slow the first start
            os.sync()
        yield Path(name)
