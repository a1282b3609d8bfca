"""How every worker talks: JSON lines, one side of one case, only one worker computing at a time.

    the task             -> {"opened_s": ..., "variant": ..., "versions": {...}}
    any line             -> {"sample": {metric: figure, ...}, "peak_mib": ...}
    either may be        -> {"error": one line}, and the worker ends

A worker runs in its peer's own environment: this file imports the standard library alone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

Task = dict[str, Any]
Sample = dict[str, float]


@dataclass(frozen=True)
class Opened:
    """One side, ready to run.

    Attributes:
        run: Does the work once; returns a figure for each metric of the case.
        variant: What was chosen where there was a choice.
    """

    run: Callable[[], Sample]
    variant: str | None = None


def serve(openers: dict[str, Callable[[Task], Opened]], libraries: Sequence[str]) -> None:
    """Answer until stdin ends.

    Args:
        openers: For each kind of work what opens it.
        libraries: Whose versions are told.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to the log

    def answer(found: dict[str, Any]) -> None:
        print(json.dumps(found), file=answers, flush=True)

    try:
        task = json.loads(sys.stdin.readline())
        began = time.perf_counter()
        opened = openers[task["kind"]](task)
        answer(
            {
                "opened_s": time.perf_counter() - began,
                "variant": opened.variant,
                "versions": {name: metadata.version(name) for name in libraries},
            }
        )
        for _ in sys.stdin:
            answer({"sample": opened.run(), "peak_mib": peak_mib()})
    except Exception as error:  # a peer that fails is a row with its reason
        traceback.print_exc()
        answer({"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]})


def timed(work: Callable[[], object]) -> Callable[[], Sample]:
    """Make a run of work that is measured whole: a picture through a tower."""

    def run() -> Sample:
        began = time.perf_counter()
        work()
        return {"image_ms": 1000 * (time.perf_counter() - began)}

    return run


def decoded(read: Callable[[list[int]], int], write: Callable[[int], int], task: Task) -> Opened:
    """Open a decoder: the prompt is read, then tokens are written greedily, one at a time.

    Args:
        read: Empties the cache, reads a prompt, returns the likeliest next token.
        write: Reads one token, returns the likeliest next one.
        task: Has the prompt and the number of tokens written after the first.
    """

    def run() -> Sample:
        began = time.perf_counter()
        token = read(task["prompt"])
        first = time.perf_counter()
        for _ in range(task["new_tokens"]):
            token = write(token)
        return rates(task, first - began, time.perf_counter() - first)

    return Opened(run)


def rates(task: Task, read_s: float, written_s: float) -> Sample:
    """Turn times into tokens a second."""
    return {
        "prefill_tok_s": len(task["prompt"]) / read_s,
        "decode_tok_s": task["new_tokens"] / max(written_s, 1e-9),
    }


def fastest(candidates: dict[str, Callable[[], object]], trials: int = 5) -> str:
    """Return the name of the quickest, each at its best of some trials."""
    best_s: dict[str, float] = {}
    for name, work in candidates.items():
        times = []
        for _ in range(trials):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        best_s[name] = min(times)
    return min(best_s, key=lambda name: best_s[name])


def peak_mib() -> float | None:
    """Return the most memory that this process has had, or none where the system is silent."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return found[0] / 1024 if found else None
