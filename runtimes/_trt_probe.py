"""What a freshly built engine is tried on: a drawn scene, then what the engines before it gave.

float16 ends at 65504, and what goes beyond shows in nan or inf at the outputs. Real pictures are
what makes activations large, so each component gets what it will get.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vlmedge.bundle import Bundle
from vlmedge.contracts import Array, Graph
from vlmedge.spec import GenerateTask, MatchTask, TensorSpec
from vlmedge.tasks._parts import Parts
from vlmedge.tasks.embed import fill

_TOKENS = 4  # of a sequence that nobody gave
_LABELS = ("a red circle", "a cat")


class Probe:
    """The tensors that are known so far, by name; each has one row."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._pool: dict[str, Array] | None = None

    def steps(self, graph: Graph) -> list[dict[str, Array]]:
        """Return what to feed: once, or a prompt and one token more for a graph with state."""
        pool = self._known()
        component = graph.component
        state = {into for _, into in component.state}
        specs = [spec for spec in component.inputs if spec.name not in state]
        prompt = self._prompt(pool)
        tokens = prompt.shape[1] if prompt is not None else _TOKENS
        first = {s.name: self._feed(s, pool, prompt, 0, tokens) for s in specs}
        if not component.state:
            return [first]
        return [first, {s.name: self._feed(s, pool, prompt, tokens, 1) for s in specs}]

    def learn(self, outputs: dict[str, Array]) -> None:
        """Keep what a component gave, for those that come after it."""
        self._known().update(outputs)

    def _known(self) -> dict[str, Array]:
        if self._pool is None:
            self._pool = self._front_ends()
        return self._pool

    def _front_ends(self) -> dict[str, Array]:
        from vlmedge.samples import drawn

        spec, parts = self._bundle.spec, Parts(self._bundle, {})
        pool: dict[str, Array] = {}
        if spec.image is not None:
            pool["pixel_values"] = parts.pixels(drawn(1, "calibration", labelled=False).images)
        matches = [t for t in spec.tasks.values() if isinstance(t, MatchTask)]
        if matches and spec.text is not None:
            ids, mask = parts.tokenizer.encode(fill(matches[0].template, _LABELS))
            pool["input_ids"], pool["attention_mask"] = ids[:1], mask[:1]
        return pool

    def _prompt(self, pool: dict[str, Array]) -> Array | None:
        tasks = self._bundle.spec.tasks.values()
        names = [t.soft_prompt for t in tasks if isinstance(t, GenerateTask)]
        return next((pool[name] for name in names if name in pool), None)

    def _feed(
        self, spec: TensorSpec, pool: dict[str, Array], prompt: Array | None, past: int, new: int
    ) -> Array:
        """Make one input: `new` positions after `past`."""
        if spec.name == "inputs_embeds" and prompt is not None:
            return np.ascontiguousarray(prompt[:1, -new:].astype(spec.dtype))
        sizes: dict[str, int] = {"batch": 1, "tokens": new, "past": past, "total": past + new}
        shape = tuple(s if isinstance(s, int) else sizes.get(s, 1) for s in spec.shape)
        given = pool.get(spec.name)
        if given is not None and past == 0 and _fits(given, spec):
            return np.ascontiguousarray(given[:1])
        if spec.name == "position_ids":
            return np.broadcast_to(np.arange(past, past + new, dtype=spec.dtype), shape).copy()
        dtype: np.dtype[Any] = np.dtype(spec.dtype)
        if dtype.kind == "f":
            return np.random.default_rng(0).standard_normal(shape).astype(dtype)
        return np.ones(shape, dtype)


def not_finite(graph: Graph, probe: Probe) -> str:
    """Run a graph on what the probe has; name an output that is nan or inf, or nothing."""
    graph.reset()
    outputs: dict[str, Array] = {}
    for feeds in probe.steps(graph):
        outputs = graph.run(feeds)
        for name, array in outputs.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                return name
    graph.reset()
    if not graph.component.state:
        probe.learn(outputs)
    return ""


def _fits(array: Array, spec: TensorSpec) -> bool:
    sizes = zip(array.shape, spec.shape, strict=False)
    same = all(isinstance(wanted, str) or got == wanted for got, wanted in sizes)
    return array.dtype == spec.dtype and array.ndim == len(spec.shape) and same
