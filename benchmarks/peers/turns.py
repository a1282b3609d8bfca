"""The run: every side a process that stays open, all of them taking turns."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .cases import Case, Side
from .environments import python_of
from .errors import Unavailable, last_words
from .kit import WORKERS, Kit
from .limits import Work, limits

WARM_UPS = 2
REST_S = 0.05  # the idle side's threads stop spinning


@dataclass
class Row:
    """What one side did.

    Attributes:
        side: Which.
        reason: Why it has no figures, or none.
        opened: What its worker said once it was ready: seconds, variant, versions.
        samples: One for each run, in their order.
        peak_mib: Of its process's memory.
        weights_bytes: That it reads for a token, or none.
        worker: Its process, while the case runs.
    """

    side: Side
    reason: str | None = None
    opened: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, float]] = field(default_factory=list)
    peak_mib: float | None = None
    weights_bytes: int | None = None
    worker: Worker | None = None

    def report(self, work: Work, machine: dict[str, float]) -> dict[str, Any]:
        """Turn it into what is written as JSON."""
        metrics = sorted({name for sample in self.samples for name in sample})
        return {
            "name": self.side.name,
            "peer": self.side.peer,
            "ours": self.side.ours,
            "unit": self.side.unit,
            "reason": self.reason,
            "variant": self.opened.get("variant"),
            "versions": self.opened.get("versions", {}),
            "opened_s": self.opened.get("opened_s"),
            "peak_mib": self.peak_mib,
            "weights_bytes": self.weights_bytes,
            "samples": {name: [sample[name] for sample in self.samples] for name in metrics},
            "limits": limits(work, self.side.unit, self.weights_bytes, machine),
        }


class Worker:
    """A process that is asked over its stdin and stdout, a line of JSON each way."""

    def __init__(self, python: Path, script: str, threads: int, stack: ExitStack) -> None:
        self._log = stack.enter_context(
            tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        )
        # what OpenMP and BLAS are told, in whatever library; each peer is told in its own way too
        count = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
        self._process = stack.enter_context(
            subprocess.Popen(
                [str(python), str(WORKERS / script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env={**os.environ, **count},
                text=True,
                encoding="utf-8",
            )
        )
        stack.callback(self._process.kill)

    def ask(self, what: dict[str, Any]) -> dict[str, Any]:
        """Send a line and wait for the answer.

        Raises:
            Unavailable: The worker says that it failed, or has died.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            if code < 0:
                raise Unavailable(f"killed by signal {-code}: too little memory?")
            raise Unavailable(f"stopped: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Unavailable(answer["error"])
        return answer

    def _last_words(self) -> str:
        self._log.seek(0)
        return last_words(self._log.read())


def prepare(case: Case, kit: Kit, peers: Sequence[str], names: Sequence[str] = ()) -> list[Row]:
    """Make all that a case needs; who lacks something is a row with the reason.

    Args:
        case: Which.
        kit: Makes it.
        peers: Whose sides run beside our own.
        names: Of the sides that run; none: all of those.
    """
    rows = []
    for side in case.sides:
        if (side.peer not in peers and not side.ours) or (names and side.name not in names):
            continue
        row = Row(side)
        try:
            python_of(side.peer, kit.cache)
            row.weights_bytes = side.task(kit).get("weights_bytes")
        except Unavailable as error:
            row.reason = str(error)
            print(f"  {side.name}: {row.reason}", flush=True)
        rows.append(row)
    return rows


def run(case: Case, kit: Kit, rows: list[Row], rounds: int, starts: int = 1) -> None:
    """Let the sides take turns; their memory is free again when it returns.

    A process keeps the pages that it got, and on a virtual machine some are 20 % slower to read
    than others: only sides that are opened anew several times show what is theirs.
    """
    if case.cold:
        _start_anew(kit, rows, rounds)
        return
    for _ in range(starts):
        _take_turns(case, kit, rows, rounds)


def _take_turns(case: Case, kit: Kit, rows: list[Row], rounds: int) -> None:
    """Open every side, warm it up, and let it run once a round."""
    with ExitStack() as stack:
        for row in rows:
            if row.reason is None:
                _attempt(row, lambda row=row: _open(row, kit, stack))
        for row in rows:
            for _ in range(WARM_UPS):
                _attempt(row, lambda row=row: _sample(row, keep=False))
        for number in range(rounds):
            first = number % len(rows)  # nobody always follows the same neighbour's noise first
            for row in rows[first:] + rows[:first]:
                time.sleep(REST_S)
                for _ in range(case.runs_per_turn):
                    _attempt(row, lambda row=row: _sample(row))


def _open(row: Row, kit: Kit, stack: ExitStack) -> None:
    task = {**row.side.task(kit), "threads": kit.threads}
    python = python_of(row.side.peer, kit.cache)
    row.worker = Worker(python, row.side.worker, kit.threads, stack)
    row.opened = row.worker.ask(task)
    variant = f", {row.opened['variant']}" if row.opened["variant"] else ""
    print(f"  {row.side.name}: open in {row.opened['opened_s']:.1f} s{variant}", flush=True)


def _sample(row: Row, *, keep: bool = True) -> None:
    assert row.worker is not None
    answer = row.worker.ask({})
    row.peak_mib = answer["peak_mib"]
    if keep:
        row.samples.append(answer["sample"])


def _start_anew(kit: Kit, rows: list[Row], rounds: int) -> None:
    """Time whole processes; the first start of each fills the system's and the peer's caches."""
    for number in range(rounds + 1):
        for row in rows:
            _attempt(row, lambda row=row, keep=number > 0: _start(row, kit, keep))


def _start(row: Row, kit: Kit, keep: bool) -> None:
    task = {**row.side.task(kit), "threads": kit.threads}
    python = python_of(row.side.peer, kit.cache)
    with ExitStack() as stack:
        began = time.perf_counter()
        worker = Worker(python, row.side.worker, kit.threads, stack)
        row.opened = worker.ask(task)
        answer = worker.ask({})
        if keep:
            row.samples.append({"start_s": time.perf_counter() - began})
        row.peak_mib = answer["peak_mib"]


def _attempt(row: Row, work: Any) -> None:
    """Do something of a row's; a failure is its reason, and it is left alone from then on."""
    if row.reason is not None:
        return
    try:
        work()
    except Unavailable as error:
        row.reason, row.samples = str(error), []
        print(f"  {row.side.name}: {row.reason}", flush=True)
