"""One side of a benchmark: `python -m vlmedge.bench.worker TASK` answers each line of stdin.

TASK is {"bundle": folder, "checkpoint": folder or null, "how": engine, or PyTorch's dtype}. Each
line is a command, and its answer one line of JSON on stdout:

    first   run the first task up to its first token, and say no more than that
    item    run it to its end; its name
    round   run every task; times of tasks and components, and the peak of memory so far
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmedge.arrays import Array, Arrays
from vlmedge.bench.items import NEW_TOKENS, items
from vlmedge.bundle import Bundle
from vlmedge.errors import BundleError, VlmEdgeError
from vlmedge.run.tasks.context import TaskContext
from vlmedge.shelves.contracts import Graph
from vlmedge.shelves.registry import ENGINES, FAMILIES
from vlmedge.spec import Component

WRITING = ("first_token_ms", "tokens_per_s", "prompt_tokens", "new_tokens")


class _Timed:
    """A graph that notes how long each run took."""

    def __init__(self, graph: Graph, spans_ms: dict[str, list[float]]) -> None:
        self._graph = graph
        self._spans_ms = spans_ms
        self._empty = True  # its state

    @property
    def component(self) -> Component:
        return self._graph.component

    @property
    def reads(self) -> int:
        return self._graph.reads

    def run(self, feeds: Arrays, *, last: bool = False) -> dict[str, Array]:
        start = time.perf_counter()
        outputs = self._graph.run(feeds, last=last)
        taken_ms = 1000 * (time.perf_counter() - start)
        name = self.component.name
        if self.component.state:
            name += " prefill" if self._empty else " step"
            self._empty = False
        self._spans_ms.setdefault(name, []).append(taken_ms)
        return outputs

    def reset(self) -> None:
        self._empty = True
        self._graph.reset()

    def reorder(self, rows: NDArray[np.int64]) -> None:
        self._graph.reorder(rows)

    def rewind(self, tokens: int) -> None:
        self._graph.rewind(tokens)

    def snapshot(self, tokens: int) -> dict[str, Array]:
        return self._graph.snapshot(tokens)

    def close(self) -> None:
        self._graph.close()


class _Graphs(Mapping[str, Graph]):
    """The components of a bundle, timed; each is opened when it is first asked for."""

    def __init__(self, bundle: Bundle, open_: Callable[[str], Graph]) -> None:
        self._names = [component.name for component in bundle.spec.components]
        self._open_one = open_
        self._open: dict[str, _Timed] = {}
        self.spans_ms: dict[str, list[float]] = {}

    def __getitem__(self, name: str) -> Graph:
        if name not in self._open:
            self._open[name] = _Timed(self._open_one(name), self.spans_ms)
        return self._open[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Side:
    """A bundle's tasks, with an engine's graphs or PyTorch's."""

    def __init__(self, bundle: Bundle, checkpoint: str | None, how: str) -> None:
        if checkpoint is None:
            engine = ENGINES[how]
            self._graphs = _Graphs(bundle, lambda name: engine.open(bundle, name))
        else:
            self._graphs = _Graphs(bundle, _torch(bundle, checkpoint, how))
        self._items = items(TaskContext(bundle, self._graphs))
        self._main = next(iter(self._items))

    def first(self) -> dict[str, Any]:
        """Give the first token, or the first answer."""
        self._items[self._main](1)
        return {"task": self._main}

    def item(self) -> dict[str, Any]:
        """Give one answer of the first task."""
        self._items[self._main](NEW_TOKENS)
        return {"task": self._main}

    def round(self) -> dict[str, Any]:
        """Give one answer of each task."""
        self._graphs.spans_ms.clear()
        found: dict[str, Any] = dict.fromkeys(WRITING)
        tasks_ms = {}
        for name, item in self._items.items():
            start = time.perf_counter()
            facts = item(NEW_TOKENS)
            tasks_ms[name] = [1000 * (time.perf_counter() - start)]
            if found["new_tokens"] is None:
                found |= facts
        spans = {name: list(times) for name, times in self._graphs.spans_ms.items()}
        memory = peak_memory_mib()
        return {**found, "tasks_ms": tasks_ms, "components_ms": spans, "peak_memory_mib": memory}


def peak_memory_mib() -> float | None:
    """Return the most memory that this process has had.

    Not getrusage: its value begins with that of the process that started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return found[0] / 1024 if found else None


def _torch(bundle: Bundle, checkpoint: str, dtype: str) -> Callable[[str], Graph]:
    """Return what opens a component in PyTorch, through the family."""
    export = FAMILIES[bundle.spec.family].open(Path(checkpoint))
    if export.spec.components != bundle.spec.bare():
        raise BundleError(
            f"{bundle.path} has other shapes than {checkpoint}: they do not belong together"
        )
    return lambda name: export.open(name, dtype)


def main() -> None:
    """Answer until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to the log
    task = json.loads(sys.argv[1])
    side = None
    for line in sys.stdin:
        try:
            if side is None:
                side = Side(Bundle.load(task["bundle"]), task["checkpoint"], task["how"])
            answer = {"first": side.first, "item": side.item, "round": side.round}[line.strip()]()
        except VlmEdgeError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
