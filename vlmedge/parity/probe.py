"""What a freshly built engine is tried on: a drawn scene, then what the engines before it gave.

float16 ends at 65504, and what goes beyond shows in nan or inf at the outputs. Real pictures are
what makes activations large, so each component gets what it will get.
"""

from __future__ import annotations

import numpy as np

from vlmedge.arrays import Array
from vlmedge.bundle import Bundle
from vlmedge.run.tasks.context import TaskContext
from vlmedge.run.tasks.embed import fill
from vlmedge.shelves.contracts import Graph
from vlmedge.spec import Component, MatchTask, TensorSpec
from vlmedge.spec.wiring import writing

_TOKENS = 4  # of a sequence that nobody gave
_LABELS = ("a red circle", "a cat")
_QUESTION = "what color is the circle?"
_FIRST = ("media_index",)  # numbers of things, of which there is one: 0


class Probe:
    """The tensors that are known so far, by name; each has one row."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._context = TaskContext(bundle, {})
        self._pool: dict[str, Array] | None = None

    def steps(self, graph: Graph, count: int = 1) -> list[dict[str, Array]]:
        """Return what to feed: once, or a prompt and `count` tokens more for a graph with state."""
        component = graph.component
        pool = self._known() | self._looked_at(component)
        sizes = _sizes(component, pool)
        prompt = self._prompt(component, pool)
        if prompt is not None:
            pool["inputs_embeds"], sizes["tokens"] = prompt, prompt.shape[1]
        tokens = sizes.setdefault("tokens", _TOKENS)
        first = _feeds(component, pool, sizes | {"past": 0, "total": tokens})
        if not component.state:
            return [first]
        if prompt is not None:
            pool["inputs_embeds"] = prompt[:, -1:]
        ends = range(tokens, tokens + count)
        each = [{"tokens": 1, "past": past, "total": past + 1} for past in ends]
        return [first, *(_feeds(component, pool, sizes | one) for one in each)]

    def learn(self, outputs: dict[str, Array]) -> None:
        """Keep what a component gave, for those that come after it."""
        self._known().update(outputs)

    def _known(self) -> dict[str, Array]:
        if self._pool is None:
            self._pool = self._front_ends()
        return self._pool

    def _front_ends(self) -> dict[str, Array]:
        from vlmedge.parity.samples import drawn

        spec, context = self._bundle.spec, self._context
        pool: dict[str, Array] = {}
        if spec.image is not None:
            pool[spec.pixels] = context.pixels(drawn(1, "calibration", labelled=False).images)
        if any(tensor.name == "input_ids" for c in spec.components for tensor in c.inputs):
            matches = [t for t in spec.tasks.values() if isinstance(t, MatchTask)]
            texts = fill(matches[0].template, _LABELS) if matches else [_QUESTION]
            pool["input_ids"], pool["attention_mask"] = context.tokenizer.encode(texts)
        if spec.instruction is not None:
            ids, mask = context.instruction_tokenizer.encode([_QUESTION])
            pool |= {"qformer_input_ids": ids, "qformer_attention_mask": mask}
        return pool

    def _looked_at(self, component: Component) -> dict[str, Array]:
        """Return what a decoder looks at beside its text, under the decoder's own name for it."""
        tasks = [t for t in writing(self._bundle.spec) if t.decoder == component.name and t.media]
        pool = self._known()
        return {str(t.media): pool[t.soft_prompt] for t in tasks if t.soft_prompt in pool}

    def _prompt(self, component: Component, pool: dict[str, Array]) -> Array | None:
        """Return the embeddings that a component reads, float32 [1, tokens, width].

        They are the picture's rows, or what texts begin with where another reads the picture.
        """
        if "inputs_embeds" not in {spec.name for spec in component.inputs}:
            return None
        for task in writing(self._bundle.spec):
            if task.decoder == component.name and task.read:
                return self._context.embed(np.array([task.start_ids], np.int64))
            if task.media is None and task.soft_prompt in pool:
                return pool[task.soft_prompt][:1]
        return None


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
    """Give one input: what is known if it fits, else numbers that stand for it."""
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
