"""Speed and memory of a bundle, beside PyTorch's of the same components in the same run.

Every side is a process of its own (vlmedge/bench_worker.py), so its peak of memory is its own. The
sides take turns, round by round, where all of them fit into memory at once; a machine that is
slower for a while is then slower for all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlmedge.bundle import Bundle
from vlmedge.checkpoint import family_of, resolve
from vlmedge.errors import BundleError, VlmEdgeError
from vlmedge.machine import Machine, free_bytes, this_machine
from vlmedge.progress import Advance, Progress

ENGINE = "ort"
WARM_UPS = 2
ROUNDS_MIN, ROUNDS_MAX = 3, 25
SIDE_BUDGET_S = 8.0  # no new round after it, once ROUNDS_MIN are done
REST_S = 0.02  # the idle side's threads stop spinning


@dataclass(frozen=True, slots=True)
class Latency:
    """Times of one thing, over `samples` runs."""

    p50_ms: float
    p90_ms: float
    samples: int


@dataclass(frozen=True, slots=True)
class Side:
    """One engine or PyTorch.

    Attributes:
        name: "ort int8", "torch float32", ...
        components: Batch 1; a decoder has two, the prompt's run and one token's.
        first_token: From a decoded picture to the first token, or none.
        tokens_per_s: After the first token, greedy; or none.
        peak_memory_mib: Of the whole process, or none where the system does not tell.
        error: Why there are no figures, or none.
    """

    name: str
    components: dict[str, Latency]
    first_token: Latency | None = None
    tokens_per_s: float | None = None
    peak_memory_mib: float | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class BenchResult:
    """What `bench` found; the bundle's own side is the first.

    Attributes:
        bundle: Its folder.
        rounds: How often each side ran, after the warm-up.
        alternated: Whether the sides took turns; otherwise one ran after the other.
        prompt_tokens: Length of the decoder's prompt, soft prompt included, or none.
        new_tokens: How many it wrote in each round, or none.
        machine: What it ran on.
        sides: One for each engine.
    """

    bundle: str
    rounds: int
    alternated: bool
    prompt_tokens: int | None
    new_tokens: int | None
    machine: Machine
    sides: tuple[Side, ...]


def bench(bundle: Bundle, against: str | None, progress: Progress) -> BenchResult:
    """Measure a bundle, and PyTorch in float32 and bfloat16 beside it if asked.

    Args:
        bundle: What to measure.
        against: The checkpoint that it came from, or none.
        progress: Watches.
    """
    folder = None if against is None else resolve(against, progress).folder
    if folder is not None and family_of(folder) != bundle.spec.family:
        raise BundleError(
            f"{bundle.path} is of family {bundle.spec.family}, {against} of {family_of(folder)}: "
            "compare it with the checkpoint that it came from"
        )
    libraries = ("onnxruntime", "numpy") if folder is None else ("onnxruntime", "torch", "numpy")
    machine = this_machine(libraries)
    sides = [
        _Worker(f"{ENGINE} {bundle.manifest.scheme}", bundle.path, None, ENGINE, machine.threads)
    ]
    if folder is not None:
        for dtype in ("float32", "bfloat16"):
            sides.append(_Worker(f"torch {dtype}", bundle.path, folder, dtype, machine.threads))
    together = folder is None or _fit_at_once(folder)
    for turn in [sides] if together else [[side] for side in sides]:
        with ExitStack() as stack:
            for side in turn:
                stack.enter_context(side.running())
            title = f"running {', '.join(side.name for side in turn)}"
            with progress.step(title, ROUNDS_MAX + 1) as advance:
                _take_turns(turn, advance)
    ours = sides[0].rounds[0]
    return BenchResult(
        bundle=str(bundle.path),
        rounds=len(sides[0].rounds),
        alternated=together,
        prompt_tokens=ours["prompt_tokens"],
        new_tokens=ours["new_tokens"],
        machine=machine,
        sides=tuple(side.result() for side in sides),
    )


class _Worker:
    """One side's process, and what it has measured."""

    def __init__(
        self, name: str, bundle: Path, checkpoint: Path | None, how: str, threads: int
    ) -> None:
        self.name = name
        self.rounds: list[dict[str, Any]] = []
        self.error: str | None = None
        self._ours = checkpoint is None
        self._peak_mib: float | None = None
        task = {
            "bundle": str(bundle),
            "checkpoint": None if checkpoint is None else str(checkpoint),
            "how": how,
        }
        self._command = [sys.executable, "-m", "vlmedge.bench_worker", json.dumps(task)]
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Start the process, and end it whatever happens."""
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as self._log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=self._environment,
                text=True,
                encoding="utf-8",
            )
            with self._process:
                try:
                    yield
                finally:
                    self._process.kill()

    def round(self) -> dict[str, Any]:
        """Run every component once, and one text; empty when the process has died."""
        found = {} if self.error else self._ask()
        self._peak_mib = found.get("peak_memory_mib", self._peak_mib)
        return found

    def result(self) -> Side:
        """Sum up."""
        if self.error is not None:
            return Side(self.name, {}, error=self.error)
        spans: dict[str, list[float]] = {}
        for found in self.rounds:
            for name, times in found["components_ms"].items():
                spans.setdefault(name, []).extend(times)
        writes = self.rounds[0]["first_token_ms"] is not None
        return Side(
            self.name,
            {name: _latency(times) for name, times in spans.items()},
            _latency([found["first_token_ms"] for found in self.rounds]) if writes else None,
            float(np.median([r["tokens_per_s"] for r in self.rounds])) if writes else None,
            self._peak_mib,
        )

    def _ask(self) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write("round\n")
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
        if self._ours:
            raise VlmEdgeError(f"{self.name} was {self.error}")
        return {}


def _take_turns(sides: Sequence[_Worker], advance: Advance) -> None:
    """Warm every side up, then run them round by round."""
    for side in sides:
        for _ in range(WARM_UPS):
            side.round()
    advance(1)
    start = time.perf_counter()
    for done in range(ROUNDS_MAX):
        spent_s = time.perf_counter() - start
        if done >= ROUNDS_MIN and spent_s > SIDE_BUDGET_S * len(sides):
            return
        for side in sides:
            time.sleep(REST_S)
            found = side.round()
            if found:
                side.rounds.append(found)
        advance(1)


def _latency(times_ms: Sequence[float]) -> Latency:
    p50, p90 = np.percentile(times_ms, [50, 90])
    return Latency(float(p50), float(p90), len(times_ms))


def _fit_at_once(checkpoint: Path) -> bool:
    """Whether float32, bfloat16 and ours fit into half of the memory that is free."""
    files = [*checkpoint.glob("*.safetensors"), *checkpoint.glob("*.bin")]
    needed = 4 * sum(file.stat().st_size for file in files)  # float16 on disk: 2 + 1 + 1 times
    return needed < free_bytes() / 2
