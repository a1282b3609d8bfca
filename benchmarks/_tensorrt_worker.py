"""TensorRT's column of benchmarks/gpu.py: `python _tensorrt_worker.py BUNDLE TOKENS ROUNDS LEVEL`.

TensorRT's bindings are often for another Python than PyTorch's, so this is a process of its own,
that needs neither PyTorch nor the other's packages. It prints one line of JSON: how far each engine
is from its portable graph (level 4), how long towers, the first token and a decode step take, with
its steps recorded (CUDA graphs) where the build found that faster, and without.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import vlmedge
from vlmedge.checkpoints.scenes import draw_scene
from vlmedge.progress import Advance
from vlmedge.shelves.build_options import BuildOptions, Built
from vlmedge.shelves.registry import ENGINES

WARM = 4
Column = dict[str, Any]
engine: Any = import_module(type(ENGINES["tensorrt"]).__module__)
probing: Any = import_module(f"{engine.__package__}._probe")


class Notes:
    """What the build says, which the bar has no place for; times on stderr."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextlib.contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Advance]:
        """Say how long a step took."""
        began = time.perf_counter()
        yield lambda amount: None
        print(f"{title}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Keep it."""
        self.lines.append(text)
        print(text, file=sys.stderr, flush=True)


def timed(work: Callable[[], Any], rounds: int) -> float:
    """Return the median ms; what is timed ends with its outputs on the host."""
    taken = []
    for turn in range(WARM + rounds):
        began = time.perf_counter()
        work()
        if turn >= WARM:
            taken.append(1000 * (time.perf_counter() - began))
    return round(median(taken), 3)


def judged(built: list[Built]) -> Column:
    """Return what the build says of each component."""
    found = {}
    for one in built:
        parity = one.parity
        found[one.component] = {
            "cosine": round(parity.cosine, 6) if parity else None,
            "passed": parity.passed if parity else None,
            "build s": round(one.seconds, 1),
            "MiB": round(one.bytes / 2**20, 1),
            "computed in": one.precision,
        }
    return found


def towers(model: vlmedge.Model, rounds: int) -> dict[str, float]:
    """Time each component without state on what the ones before it give."""
    found, probe = {}, probing.Probe(model.bundle)
    for spec in model.bundle.spec.components:
        if spec.state:
            continue
        graph = model.graphs[spec.name]
        (feeds,) = probe.steps(graph)
        probe.learn(graph.run(feeds))
        found[spec.name] = timed(lambda g=graph, f=feeds: g.run(f), rounds)
    return found


def captions(model: vlmedge.Model, tokens: int, rounds: int) -> Column:
    """Time captions of one token and of some; the rest of these takes a step each."""
    image, out = draw_scene(0, "heldout").image, {}
    for name, count in (("first token", 1), ("caption", tokens)):
        out[name] = timed(lambda n=count: model.caption(image, max_tokens=n, min_tokens=n), rounds)
    out["step"] = round((out["caption"] - out["first token"]) / (tokens - 1), 3)
    return out


def main(folder: Path, tokens: int, rounds: int, level: int | None) -> Column:
    """Build a bundle's engines and time them."""
    notes, compiler = Notes(), engine.ENGINE
    options = BuildOptions(level=level, keep_slower=True, record=True)
    built = compiler.build(vlmedge.load(folder).bundle, options, notes)
    model = vlmedge.load(folder, engine="tensorrt")
    out: Column = {
        "tensorrt": import_module("tensorrt").__version__,
        "level": level,
        "components": judged(built),
        "notes": notes.lines,
    }
    for name, ms in towers(model, rounds).items():
        out["components"][name]["ms"] = ms
    if "caption" not in model.bundle.spec.tasks:
        return out
    out |= captions(model, tokens, rounds)
    played = [g for g in map(model.graphs.__getitem__, out["components"]) if is_recorded(g)]
    if played:
        said = model.caption(draw_scene(0, "heldout").image, max_tokens=tokens, min_tokens=tokens)
        model.graphs.close()
        engine.RecordedGraph = engine.TrtGraph  # the same engine, its steps run and not played
        model = vlmedge.load(folder, engine="tensorrt")
        out["without recording"] = captions(model, tokens, rounds)
        again = model.caption(draw_scene(0, "heldout").image, max_tokens=tokens, min_tokens=tokens)
        out["same text"] = said == again
    return out


def is_recorded(graph: Any) -> bool:
    """Tell whether a graph plays its steps."""
    return isinstance(graph, engine.RecordedGraph)


if __name__ == "__main__":
    bundle, *numbers = sys.argv[1:]
    print(json.dumps(main(Path(bundle), *(int(n) if n else None for n in numbers))))
