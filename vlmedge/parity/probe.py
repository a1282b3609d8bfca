"""What a freshly built engine is tried on: a drawn scene, then what the engines before it gave.

float16 ends at 65504, and what goes beyond shows in nan or inf at the outputs. Real pictures are
what makes activations large, so each component gets what it will get.
"""

from __future__ import annotations

from functools import cached_property

import msgspec
import numpy as np

from vlmedge.arrays import Array
from vlmedge.bundle import Bundle
from vlmedge.parity.feeds import Feeds, prefill
from vlmedge.parity.samples import drawn
from vlmedge.run.inputs.image import Grid
from vlmedge.run.tasks.context import TaskContext
from vlmedge.run.tasks.trial import Samples, Whole
from vlmedge.shelves.contracts import Graph
from vlmedge.spec import Component, TensorSpec

_TOKENS = 4  # of a sequence that nobody gave
_LABELS = ("a red circle", "a cat")
_QUESTION = "what color is the circle?"
_FIRST = ("media_index",)  # numbers of things, of which there is one: 0


class _OnePiece(Feeds):
    """Pictures without their tiles: an engine is tried on one row."""

    def grid(self, i: int) -> Grid:
        """Leave the picture whole."""
        return Grid()

    def picture(self, i: int) -> Array:
        """Make the pixel_values of the first piece of picture i."""
        return super().picture(i)[:1]


class Probe:
    """One sample's walk through a bundle, with numbers that stand for what is not known."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle

    @cached_property
    def _feeds(self) -> Feeds:
        [image] = drawn(1, "calibration", labelled=False).images
        samples = Samples((image,), (_QUESTION,), labels=_LABELS)
        return _OnePiece(TaskContext(self._bundle, {}), samples)

    def steps(self, graph: Graph, count: int = 1) -> list[dict[str, Array]]:
        """Return what to feed: once, or a prompt and `count` tokens more for a graph with state."""
        component = graph.component
        known = self._known(component)
        sizes = _sizes(component, known)
        tokens = sizes.setdefault("tokens", _TOKENS)
        first = _feeds(component, known, sizes | {"past": 0, "total": tokens})
        if not component.state:
            return [first]
        if "inputs_embeds" in known:
            known["inputs_embeds"] = known["inputs_embeds"][:, -1:]
        ends = range(tokens, tokens + count)
        each = [{"tokens": 1, "past": past, "total": past + 1} for past in ends]
        return [first, *(_feeds(component, known, sizes | one) for one in each)]

    def learn(self, outputs: dict[str, Array]) -> None:
        """Keep what a component gave, for those that come after it."""
        self._feeds.add({name: Whole(array, [len(array)]) for name, array in outputs.items()})

    def _known(self, component: Component) -> dict[str, Array]:
        """Return what is known of a component's inputs."""
        if not component.state:
            self._feeds.prepare(component)
            names = [spec.name for spec in component.inputs if spec.name in self._feeds]
            return {name: self._feeds.at(name, 0) for name in names}
        options = self._bundle.spec.generation
        if options is None or not self._feeds.writers(component):
            return {}
        options = msgspec.structs.replace(options, max_tokens=1, min_tokens=0)
        prompt = self._feeds.prompt(component, 0, options)
        return {} if prompt is None else prefill(component, prompt)


def _sizes(component: Component, pool: dict[str, Array]) -> dict[str, int]:
    """Return the sizes of the axes that are settled by what was given."""
    sizes = {"batch": 1}
    for spec in component.inputs:
        given = pool.get(spec.name)
        of_text = spec.name.endswith("input_ids") or np.dtype(spec.dtype).kind == "f"
        if given is None or given.ndim != len(spec.shape) or not of_text:
            continue
        for axis, size in zip(spec.shape, given.shape, strict=True):
            if isinstance(axis, str):
                sizes.setdefault(axis, size)
    return sizes


def _feeds(component: Component, pool: dict[str, Array], sizes: dict[str, int]) -> dict[str, Array]:
    state = {into for _, into in component.state}
    return {s.name: _feed(s, pool, sizes) for s in component.inputs if s.name not in state}


def _feed(spec: TensorSpec, pool: dict[str, Array], sizes: dict[str, int]) -> Array:
    """Return one input: the known tensor if it fits, else values made up in its place."""
    shape = tuple(s if isinstance(s, int) else sizes.get(s, 1) for s in spec.shape)
    given = pool.get(spec.name)
    if given is not None and given.dtype == spec.dtype and given[: sizes["batch"]].shape == shape:
        return np.ascontiguousarray(given[: sizes["batch"]])
    if spec.name == "position_ids":
        past, new = sizes["past"], sizes["tokens"]
        return np.broadcast_to(np.arange(past, past + new, dtype=spec.dtype), shape).copy()
    if np.dtype(spec.dtype).kind == "f":
        return np.random.default_rng(0).standard_normal(shape).astype(spec.dtype)
    return np.full(shape, spec.name not in _FIRST, spec.dtype)


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
