"""The own int8 and int4 beside NNCF's, on the same graphs and the same calibration scenes.

    pip install -e '.[export,nncf]'
    python benchmarks/nncf_compare.py [--case NAME]... [--scenes 500] [--json FILE]

The built-in checkpoints are held against PyTorch float32 with the gate's own code; ViT-B/16's
image tower and four layers of OPT-2.7b (random weights, see make_checkpoint.py) against their own
float32 graphs. Each method works in a process of its own, whose peak memory is given. Every
resulting graph is timed in two ways: `engine` is what vlmedge runs, the graph lowered to ONNX
Runtime's integer kernels, and `plain` a session on the graph as it was written. All graphs that
are compared take turns in one run, and the least of several times counts.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from _nncf_worker import COST, FEEDS, METHODS, load_feeds, session
from make_checkpoint import write

from vlmedge.arrays import Array, Arrays
from vlmedge.bundle import Bundle
from vlmedge.bundle.writer import stored_files, write_manifest
from vlmedge.checkpoints.resolve import BUILT_INS, family_of
from vlmedge.host.hardware import this_machine
from vlmedge.make.export import export
from vlmedge.parity.gate import run_gate
from vlmedge.parity.samples import drawn
from vlmedge.parity.tolerances import compare, divergence
from vlmedge.progress import SILENT
from vlmedge.shelves.contracts import Export, Graph
from vlmedge.shelves.registry import ENGINES, FAMILIES
from vlmedge.spec import Component

WORKER = Path(__file__).with_name("_nncf_worker.py")
ROUNDS = (5, 60)  # at least, at most
ROUNDS_S = 60.0  # no component's graphs take turns for longer, once they had the least
LIBRARIES = ("onnxruntime", "nncf", "onnx", "numpy", "torch")

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One model to compare on.

    Attributes:
        title: Of the table.
        checkpoint: A built-in, or what make_checkpoint.py knows.
        component: The only one that is quantized and measured; none for all.
        methods: Names in METHODS.
    """

    title: str
    checkpoint: str
    component: str | None
    methods: tuple[str, ...]


INT8 = ("int8", "nncf int8 mixed", "nncf int8 performance")
INT4 = ("int4", "nncf int4")
CASES = {
    "tiny-clip": Case("tiny-clip", "tiny-clip", None, (*INT8, "nncf int4")),  # own int4 == int8
    "tiny-blip2": Case(
        "tiny-blip2", "tiny-blip2", None, (*INT8, *INT4, "nncf int4 in the decoder")
    ),
    "vit": Case("CLIP ViT-B/16 image tower", "clip-vit-b-16", "vision_encoder", INT8),
    "opt": Case("OPT-2.7b, 4 layers", "blip2-opt-cut", "decoder", (*INT8[:2], *INT4)),
}


def run_case(case: Case, folder: Path, scenes: int) -> list[Row]:
    """Make every method's bundle and measure it."""
    given = case.checkpoint
    if case.component is not None:
        given = str(folder / "checkpoint")
        write(case.checkpoint, Path(given))
    float32 = export(given, folder / "source", check=False)
    if case.component is not None:
        shutil.rmtree(given)
    methods = [m for m in case.methods if have_nncf() or "nncf" not in m]
    rows = [work(case, float32, folder, method) for method in ("float32", *methods)]
    measure(case, float32, folder, rows)
    if case.component is None:
        checkpoint = BUILT_INS / case.checkpoint
        exact = Remembered(FAMILIES[family_of(checkpoint)].open(checkpoint))
    for row in rows[1:]:
        if case.component is None:
            row |= judged(folder, row["method"], scenes, exact)
        print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def have_nncf() -> bool:
    """Tell whether NNCF is installed; without it the own schemes are measured alone."""
    return importlib.util.find_spec("nncf") is not None


def work(case: Case, float32: Bundle, folder: Path, method: str) -> Row:
    """Let a process of its own quantize; return its cost."""
    out = place(folder, method)
    command = [sys.executable, str(WORKER), str(float32.path), str(out), method]
    command += [case.component] if case.component else []
    ran = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if ran.returncode:
        raise SystemExit(f"{case.title}: {method} ended with {ran.returncode}:\n{ran.stderr}")
    cost = json.loads((out / COST).read_text())
    (out / COST).unlink()
    size = sum(file.stat().st_size for file in (out / "graphs").iterdir())
    print(f"{case.title}, {method}: {cost}", file=sys.stderr, flush=True)
    return {
        "case": case.title,
        "method": method,
        "seconds": sum(cost["seconds"].values()),
        "peak_mib": cost["peak_mib"],
        "size_mib": size / 2**20,
    }


def place(folder: Path, method: str) -> Path:
    """Return a method's folder."""
    return folder / method.replace(" ", "-")


def measure(case: Case, float32: Bundle, folder: Path, rows: list[Row]) -> None:
    """Time all graphs and compare what they give; add the figures to the rows."""
    for row in rows:
        row |= {f"{how}_{what}": 0.0 for how in HOW for what in ("ms", "step_ms")}
        row |= {f"{how}_cosine": 1.0 for how in HOW}
    for component in float32.spec.components:
        if case.component in (None, component.name):
            measure_component(component, float32, folder, rows)


def measure_component(component: Component, float32: Bundle, folder: Path, rows: list[Row]) -> None:
    """Measure one component; int8 and int4 one after the other, so that they fit into memory."""
    files = sorted((place(folder, "float32") / FEEDS / component.name).iterdir())
    feeds = [load_feeds(file) for file in files]
    exact = Plain(float32, component)
    expected = exact.all(feeds)
    timed = {"ms": 0, "step_ms": 1} if component.state else {"ms": 0}
    took_exact = {}
    for scheme in ("int8", "int4"):
        group = [row for row in rows[1:] if METHODS[row["method"]].scheme == scheme]
        if not group:
            continue
        graphs: dict[tuple[int, str], Plain | Lowered] = {(-1, "plain"): exact}
        for i, row in enumerate(group):
            bundle = Bundle(place(folder, row["method"]), float32.manifest)
            for how, kind in (("engine", Lowered), ("plain", Plain)):
                graphs[i, how] = kind(bundle, component)
                found = graphs[i, how].all(feeds)
                row |= closeness(component, scheme, how, expected, found, row)
        for what, call in timed.items():
            for (i, how), ms in turns(graphs, feeds, call).items():
                if i < 0:
                    took_exact[what] = min(ms, took_exact.get(what, ms))
                else:
                    group[i][f"{how}_{what}"] += ms
        del graphs
        gc.collect()
    for what, ms in took_exact.items():
        rows[0][f"plain_{what}"] += ms


HOW = ("engine", "plain")


class Plain:
    """A graph as it was written, in a session of its own."""

    def __init__(self, bundle: Bundle, component: Component) -> None:
        self._session = session(bundle.graph_file(component.name))
        self._names = [spec.name for spec in component.outputs]

    def run(self, feeds: list[dict[str, Array]], call: int) -> tuple[float, dict[str, Array]]:
        """Run one call of a series; return milliseconds and outputs."""
        began = time.perf_counter()
        found = self._session.run(self._names, feeds[call])
        return 1000 * (time.perf_counter() - began), dict(zip(self._names, found, strict=True))

    def all(self, feeds: list[dict[str, Array]]) -> list[dict[str, Array]]:
        """Run every call."""
        return [self.run(feeds, call)[1] for call in range(len(feeds))]


class Lowered:
    """A graph as the engine runs it; it keeps a decoder's cache, so calls come in their order."""

    def __init__(self, bundle: Bundle, component: Component) -> None:
        self._graph = ENGINES["ort"].open(bundle, component.name)
        self._state = {into for _, into in component.state}

    def run(self, feeds: list[dict[str, Array]], call: int) -> tuple[float, dict[str, Array]]:
        """Run one call of a series, and before it untimed those that it stands on."""
        first = call
        while first and self._continues(feeds[first]):
            first -= 1
        self._graph.reset()
        for before in range(first, call):
            self._one(feeds[before])
        began = time.perf_counter()
        found = self._one(feeds[call])
        return 1000 * (time.perf_counter() - began), found

    def all(self, feeds: list[dict[str, Array]]) -> list[dict[str, Array]]:
        """Run every call; each one that begins with an empty cache begins a text."""
        found = []
        for feed in feeds:
            if not self._continues(feed):
                self._graph.reset()
            found.append(self._one(feed))
        return found

    def _continues(self, feed: dict[str, Array]) -> bool:
        return any(feed[name].size for name in self._state)

    def _one(self, feed: dict[str, Array]) -> dict[str, Array]:
        return self._graph.run({n: v for n, v in feed.items() if n not in self._state})


def closeness(
    component: Component,
    scheme: str,
    how: str,
    expected: list[dict[str, Array]],
    found: list[dict[str, Array]],
    row: Row,
) -> Row:
    """Return the worst cosine of all calls and outputs, as the gate takes it, and the divergence.

    Args:
        component: Its spec.
        scheme: Which tolerances name the comparison.
        how: engine or plain.
        expected: Outputs of the float32 graph, a call each.
        found: The other graph's.
        row: What is known of the method's other components.
    """
    state = {name for name, _ in component.state}
    names = [spec.name for spec in component.outputs if spec.name not in state]
    pairs = [(a[n], b[n]) for a, b in zip(expected, found, strict=True) for n in names]
    cosine = min(compare(component.name, scheme, a, b).cosine for a, b in pairs)
    result: Row = {f"{how}_cosine": min(cosine, row[f"{how}_cosine"])}
    if component.state:
        last = [np.concatenate([side[i][:, -1] for side in pairs]) for i in (0, 1)]
        result[f"{how}_kl"] = divergence(last[0], last[1])
    return result


def turns(
    graphs: dict[tuple[int, str], Plain | Lowered], feeds: list[dict[str, Array]], call: int
) -> dict[tuple[int, str], float]:
    """Return the least milliseconds of each for one call; they take turns."""
    best = dict.fromkeys(graphs, float("inf"))
    began = time.perf_counter()
    for number in range(ROUNDS[1]):
        for name, graph in graphs.items():
            best[name] = min(best[name], graph.run(feeds, call)[0])
        if number + 1 >= ROUNDS[0] and time.perf_counter() - began > ROUNDS_S:
            break
    return best


class Remembered:
    """A checkpoint whose PyTorch side runs once: the gate asks it the same for every bundle."""

    def __init__(self, export: Export) -> None:
        self._export = export
        self._tapes: dict[str, list[dict[str, Array]]] = {}
        self.spec = export.spec

    def open(self, component: str) -> Graph:
        """Open a component, or what it answered before."""
        if component in self._tapes:
            return _Taped(self.spec.component(component), None, self._tapes[component])
        tape = self._tapes.setdefault(component, [])
        return _Taped(self.spec.component(component), self._export.open(component), tape)


class _Taped:
    """Writes a graph's answers down, or without one gives them again, in their order."""

    def __init__(
        self, component: Component, graph: Graph | None, tape: list[dict[str, Array]]
    ) -> None:
        self.component, self._graph, self._tape, self._next = component, graph, tape, 0

    @property
    def reads(self) -> int:
        """How often it has answered."""
        return self._next

    def run(self, feeds: Arrays, *, last: bool = False) -> dict[str, Array]:
        """Answer."""
        if self._graph is not None:
            self._tape.append(self._graph.run(feeds))
        self._next += 1
        return self._tape[self._next - 1]

    def reset(self) -> None:
        """Forget the state."""
        if self._graph is not None:
            self._graph.reset()

    def reorder(self, rows: Any) -> None:
        """Choose rows of the state."""
        if self._graph is not None:
            self._graph.reorder(rows)

    def close(self) -> None:
        """Close."""
        if self._graph is not None:
            self._graph.close()


def judged(folder: Path, method: str, scenes: int, exact: Remembered) -> Row:
    """Put a bundle with these graphs to the gate; return what it found."""
    source = Bundle.load(folder / "source").manifest
    path = place(folder, method)
    manifest = msgspec.structs.replace(source, scheme=METHODS[method].scheme, parity=None)
    shutil.rmtree(path / FEEDS, ignore_errors=True)
    shutil.rmtree(path / "engines", ignore_errors=True)
    write_manifest(path, msgspec.structs.replace(manifest, files=stored_files(path)))
    samples = drawn(scenes, "heldout", labelled=True)
    parity = run_gate(Bundle.load(path), exact, samples, SILENT)  # type: ignore[arg-type]
    return {
        "passed": parity.passed,
        "tasks": {t.task: msgspec.to_builtins(t) for t in parity.tasks},
        "gate_cosine": min(c.cosine for c in parity.components),
        "gate_kl": next((c.kl for c in parity.components if c.kl is not None), None),
    }


def table(rows: list[Row]) -> str:
    """Write all rows as Markdown."""
    lines = [
        "| model | method | right, % (PyTorch) | worst cosine engine / plain | KL engine / plain "
        "| ms engine / plain | ms a token engine / plain | quantized in CPU s | peak GiB | MiB |",
        "| --- " * 10 + "|",
    ]
    for row in rows:
        tasks = [
            f"{name.split(',')[0]}{' (beams)' if 'beams' in name else ''} "
            f"{100 * t['accuracy']:.1f} ({100 * t['reference_accuracy']:.1f})"
            for name, t in row.get("tasks", {}).items()
        ]
        if "passed" in row and not row["passed"]:
            tasks.append("**gate fails**")
        exact = row["method"] == "float32"
        cells = [
            row["case"],
            row["method"],
            ", ".join(tasks),
            "" if exact else both(row, "cosine", ".5f"),
            both(row, "kl", ".1e"),
            f"{row['plain_ms']:.2f}" if exact else both(row, "ms", ".2f"),
            f"{row['plain_step_ms']:.2f}" if exact and row["plain_step_ms"] else
            "" if exact else both(row, "step_ms", ".2f"),
            "" if exact else f"{row['seconds']:.1f}",
            "" if exact else f"{row['peak_mib'] / 1024:.2f}",
            f"{row['size_mib']:.1f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def both(row: Row, what: str, form: str) -> str:
    """Write a figure of both ways to run, or nothing where there is none."""
    found = [row.get(f"{how}_{what}") for how in HOW]
    return " / ".join(format(f, form) for f in found) if all(found) else ""


def main() -> None:
    """Run the cases, print one table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", choices=CASES, help="default: all")
    parser.add_argument("--scenes", type=int, default=500, help="held out, for the built-ins")
    parser.add_argument("--json", type=Path, default=Path("nncf_compare.json"))
    given = parser.parse_args()
    if not have_nncf():
        print("nncf is not installed, its rows are left out: pip install 'vlmedge[nncf]'")
    machine = this_machine(LIBRARIES)
    rows: list[Row] = []
    for name in given.case or CASES:
        with tempfile.TemporaryDirectory() as folder:
            found = run_case(CASES[name], Path(folder), given.scenes)
        known = json.loads(given.json.read_text())["rows"] if given.json.is_file() else []
        titles = [case.title for case in CASES.values()]
        others = [row for row in known if row["case"] != CASES[name].title]
        rows = sorted([*others, *found], key=lambda row: titles.index(row["case"]))
        report = {"machine": msgspec.to_builtins(machine), "scenes": given.scenes, "rows": rows}
        given.json.write_text(json.dumps(report, indent=2) + "\n")
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    cores = len(os.sched_getaffinity(0))
    print(f"\n{machine.cpu}, {cores} of {machine.cores} cores, load {machine.load}; {versions}\n")
    print(table(rows))


if __name__ == "__main__":
    main()
