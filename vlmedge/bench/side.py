"""One side of a benchmark as its parent sees it: a process that is asked and answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlmedge.bench.result import Energy, Latency, Side
from vlmedge.errors import VlmEdgeError
from vlmedge.host.energy import Meter

ENERGY_S = 3.0  # enough of RAPL's milliseconds, and of a rail's samples


@dataclass(slots=True)
class Worker:
    """One side's process, and what it has measured.

    Attributes:
        name: "ort int8", "torch float32", ...
        bundle: The bundle that it runs.
        checkpoint: Where PyTorch reads weights, or none: an engine runs the bundle.
        how: The engine, or PyTorch's dtype.
        threads: How many threads it may use.
        command: Starts the process; its task is the last word.
    """

    name: str
    bundle: Path
    checkpoint: Path | None
    how: str
    threads: int
    command: tuple[str, ...] = (sys.executable, "-m", "vlmedge.bench.worker")
    rounds: list[dict[str, Any]] = field(default_factory=list)
    cold_ms: list[float] = field(default_factory=list)
    warm_ms: list[float] = field(default_factory=list)
    energy: Energy | None = None
    error: str | None = None
    _peak_mib: float | None = None
    _process: Any = None
    _log: Any = None

    @contextmanager
    def running(self, bundle: Path | None = None) -> Iterator[None]:
        """Start the process, and end it whatever happens.

        Args:
            bundle: Another folder with the same bundle.
        """
        task = {
            "bundle": str(bundle or self.bundle),
            "checkpoint": None if self.checkpoint is None else str(self.checkpoint),
            "how": self.how,
        }
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as self._log:
            self._process = subprocess.Popen(
                [*self.command, json.dumps(task)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env={**os.environ, "OMP_NUM_THREADS": str(self.threads)},
                text=True,
                encoding="utf-8",
            )
            with self._process:
                try:
                    yield
                finally:
                    self._process.kill()

    def round(self) -> dict[str, Any]:
        """Run every task once; empty when the process has died."""
        found = self._ask("round")
        self._peak_mib = found.get("peak_memory_mib", self._peak_mib)
        return found

    def first(self) -> bool:
        """Give the first token, or the first answer; false when the process has died."""
        return bool(self._ask("first"))

    def start_ms(self, bundle: Path | None = None) -> list[float]:
        """Time a fresh process up to its first answer; nothing when it has died."""
        start = time.perf_counter()
        with self.running(bundle):
            return [1000 * (time.perf_counter() - start)] if self.first() else []

    def measure_energy(self, meter: Meter) -> None:
        """Give answers of the first task for some seconds."""
        items, task = 0, ""
        with meter.measure() as reading:
            start = time.perf_counter()
            while items == 0 or time.perf_counter() - start < ENERGY_S:
                found = self._ask("item")
                if not found:
                    return
                items, task = items + 1, found["task"]
        self.energy = Energy(task, reading.joules / items, reading.watts, items)

    def result(self) -> Side:
        """Sum up."""
        if self.error is not None:
            return Side(self.name, {}, {}, error=self.error)
        writes = self.rounds[0]["first_token_ms"] is not None
        return Side(
            self.name,
            self._latencies("components_ms"),
            self._latencies("tasks_ms"),
            Latency.of([found["first_token_ms"] for found in self.rounds]) if writes else None,
            float(np.median([r["tokens_per_s"] for r in self.rounds])) if writes else None,
            Latency.of(self.cold_ms) if self.cold_ms else None,
            Latency.of(self.warm_ms) if self.warm_ms else None,
            self._peak_mib,
            self.energy,
        )

    def _latencies(self, kind: str) -> dict[str, Latency]:
        spans: dict[str, list[float]] = {}
        for found in self.rounds:
            for name, times in found[kind].items():
                spans.setdefault(name, []).extend(times)
        return {name: Latency.of(times) for name, times in spans.items()}

    def _ask(self, command: str) -> dict[str, Any]:
        if self.error is not None:
            return {}
        try:
            self._process.stdin.write(f"{command}\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        found: dict[str, Any] = json.loads(line) if line else {}
        if "error" in found:
            raise VlmEdgeError(f"{self.name}: {found['error']}")
        if found:
            return found
        code = self._process.wait()
        if code >= 0:  # a bug, with its traceback
            self._log.seek(0)
            raise RuntimeError(f"{self.name} has stopped:\n{self._log.read()}")
        self.error = f"killed by signal {-code}: it may need more memory than there is"
        if self.checkpoint is None:
            raise VlmEdgeError(f"{self.name} was {self.error}")
        return {}
