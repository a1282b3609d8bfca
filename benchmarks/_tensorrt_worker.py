"""TensorRT's column of benchmarks/gpu.py: `python _tensorrt_worker.py BUNDLE TOKENS ROUNDS LEVEL`.

TensorRT's bindings are often for another Python than PyTorch's, so this is a process of its own,
that needs neither PyTorch nor the other's packages. It prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import vlmedge
from vlmedge.building import BuildOptions
from vlmedge.progress import SILENT
from vlmedge.registry import ENGINES
from vlmedge.scenes import draw_scene

WARM = 4
Column = dict[str, Any]


def timed(work: Callable[[], Any], rounds: int) -> float:
    """Return the median ms; what is timed ends with its outputs on the host."""
    taken = []
    for turn in range(WARM + rounds):
        began = time.perf_counter()
        work()
        if turn >= WARM:
            taken.append(1000 * (time.perf_counter() - began))
    return round(median(taken), 3)


def cosine(a: Any, b: Any) -> float:
    """Return the cosine of two arrays."""
    a, b = (np.asarray(x, np.float64).ravel() for x in (a, b))
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def components(model: vlmedge.Model, exact: vlmedge.Model, probe: Any, rounds: int) -> Column:
    """Compare each component with the CPU engine's, and time those without state."""
    found: Column = {}
    for spec in model.bundle.spec.components:
        ours, theirs = model.graphs[spec.name], exact.graphs[spec.name]
        feeds = probe.steps(theirs)
        worst, expected = 1.0, {}
        for step in feeds:
            expected, got = theirs.run(step), ours.run(step)
            worst = min([worst, *(cosine(got[n], expected[n]) for n in expected)])
        found[spec.name] = {"cosine": round(worst, 6)}
        if not spec.state:
            probe.learn(expected)
            found[spec.name]["ms"] = timed(lambda g=ours, f=feeds[0]: g.run(f), rounds)
        for graph in (ours, theirs):
            graph.reset()
    return found


def main(folder: Path, tokens: int, rounds: int, level: int | None) -> Column:
    """Build a bundle's engines, compare and time them."""
    engine: Any = ENGINES["tensorrt"]
    probes: Any = import_module(f"{import_module(type(engine).__module__).__package__}._probe")
    exact = vlmedge.load(folder)
    built = engine.build(exact.bundle, BuildOptions(level=level), SILENT)
    model = vlmedge.load(folder, engine="tensorrt")
    out: Column = {
        "tensorrt": import_module("tensorrt").__version__,
        "level": level,
        "components": components(model, exact, probes.Probe(exact.bundle), rounds),
    }
    for one in built:
        out["components"][one.component] |= {
            "build s": round(one.seconds, 1),
            "MiB": round(one.bytes / 2**20, 1),
            "computed in": one.precision,
        }
    if "caption" in model.bundle.spec.tasks:
        image = draw_scene(0, "heldout").image
        for name, count in (("first token", 1), ("caption", tokens)):
            out[name] = timed(
                lambda n=count: model.caption(image, max_tokens=n, min_tokens=n), rounds
            )
        out["step"] = round((out["caption"] - out["first token"]) / (tokens - 1), 3)
    return out


if __name__ == "__main__":
    bundle, *numbers = sys.argv[1:]
    print(json.dumps(main(Path(bundle), *(int(n) if n else None for n in numbers))))
