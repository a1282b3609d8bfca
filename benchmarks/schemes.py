"""Every scheme on the built-in checkpoints: size, accuracy, divergence and speed, in one table.

    python benchmarks/schemes.py [count] [out.json]

Each bundle is held against PyTorch float32 on `count` held-out scenes (default 2000), by the
gate's own code. Components are timed in turns with the float32 bundle's, least of the runs.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import vlmedge
from vlmedge.bundle import Bundle
from vlmedge.checkpoints.resolve import BUILT_INS, family_of
from vlmedge.host.hardware import this_machine
from vlmedge.make.export import export
from vlmedge.make.recipe import Recipe
from vlmedge.parity.gate import run_gate
from vlmedge.parity.samples import drawn
from vlmedge.progress import SILENT
from vlmedge.shelves.registry import FAMILIES, SCHEMES
from vlmedge.spec import Component
from vlmedge.spec.manifest import FLOAT

ROUNDS = 40
NEW_TOKENS = 16


def graphs_mib(bundle: Bundle) -> float:
    """Return the size of a bundle's graphs and weights."""
    return sum(f.bytes for f in bundle.manifest.files if f.path.startswith("graphs/")) / 2**20


def work(model: vlmedge.Model, component: Component) -> Callable[[], object]:
    """Make one run of a component at batch 1: a decoder's is one token after 40."""
    graph, rng = model.graphs[component.name], np.random.default_rng(0)

    def feeds(tokens: int, total: int) -> dict[str, Any]:
        sizes = {"batch": 1, "tokens": tokens, "total": total}
        state = {into for _, into in component.state}
        found: dict[str, Any] = {}
        for spec in component.inputs:
            if spec.name in state:
                continue
            shape = [sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape]
            floats = rng.standard_normal(shape).astype(np.float32)
            found[spec.name] = np.ones(shape, np.int64) if spec.dtype == "int64" else floats
        return found

    if not component.state:
        fixed = feeds(16, 16)
        return lambda: graph.run(fixed)
    prompt, step = feeds(40, 40), feeds(1, 41)

    def run() -> None:
        graph.reset()
        graph.run(prompt)
        graph.run(step)

    return run


def race(works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the least milliseconds of each work, run in turns."""
    best = dict.fromkeys(works, float("inf"))
    for _ in range(ROUNDS):
        for name, run in works.items():
            began = time.perf_counter()
            run()
            best[name] = min(best[name], 1000 * (time.perf_counter() - began))
    return best


def tokens_per_s(models: dict[str, vlmedge.Model]) -> dict[str, float]:
    """Return how many tokens a second each model writes after its first, greedy."""
    image = drawn(1, "heldout", labelled=True).images[0]

    def writes(model: vlmedge.Model, count: int) -> Callable[[], object]:
        return lambda: model.caption(image, max_tokens=count, min_tokens=count)

    one = race({name: writes(model, 1) for name, model in models.items()})
    many = race({name: writes(model, NEW_TOKENS) for name, model in models.items()})
    return {name: 1000 * (NEW_TOKENS - 1) / (many[name] - one[name]) for name in models}


def main() -> None:
    """Print the table, and write it as JSON if asked."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("tiny-clip", "tiny-blip2"):
            opened = FAMILIES[family_of(BUILT_INS / name)].open(BUILT_INS / name)
            samples = drawn(count, "heldout", labelled=True)
            bundles, models = {}, {}
            for scheme in (FLOAT, *SCHEMES.names()):
                path = Path(folder) / f"{name}-{scheme}"
                made = export(name, path, Recipe(scheme, keep_slower=True), check=False)
                parity = run_gate(made, opened, samples, SILENT, min(count, 200))
                bundles[scheme] = Bundle.load(path)
                models[scheme] = vlmedge.load(path)
                kls = [c.kl for c in parity.components if c.kl is not None]
                rows.append(
                    {
                        "checkpoint": name,
                        "scheme": scheme,
                        "mib": round(graphs_mib(bundles[scheme]), 2),
                        "passed": parity.passed,
                        "kl_first_token": kls[0] if kls else None,
                        "tasks": {
                            task.task: [
                                round(100 * float(task.accuracy or 0), 2),
                                round(100 * float(task.reference_accuracy or 0), 2),
                            ]
                            for task in parity.tasks
                        },
                    }
                )
            for component in bundles[FLOAT].spec.components:
                works = {scheme: work(model, component) for scheme, model in models.items()}
                for run in works.values():
                    run()
                times = race(works)
                for row in rows:
                    if row["checkpoint"] == name:
                        row.setdefault("ms", {})[component.name] = round(times[row["scheme"]], 2)
            if "caption" in bundles[FLOAT].spec.tasks:
                rates = tokens_per_s(models)
                for row in rows:
                    if row["checkpoint"] == name:
                        row["tokens_per_s"] = round(rates[row["scheme"]])
    for row in rows:
        print(json.dumps(row), flush=True)
    if len(sys.argv) > 2:
        machine = this_machine(("onnxruntime", "torch", "numpy"))
        report = {"count": count, "machine": vars_of(machine), "rows": rows}
        Path(sys.argv[2]).write_text(json.dumps(report, indent=2) + "\n")


def vars_of(machine: object) -> dict[str, Any]:
    """Return a dataclass with slots as a dict."""
    return {name: getattr(machine, name) for name in machine.__dataclass_fields__}  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
