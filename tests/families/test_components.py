"""Every family on its smallest random checkpoints: the graphs, against PyTorch and one another."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from kit.reference import Case, Record

from vlmedge.bench.worker import Side
from vlmedge.graphs.portable import load_graph
from vlmedge.shelves.registry import FAMILIES

OWN = ("query_tokens", "image_newline")  # parameters of the model itself


def test_gate_passes(case: Case, record_property: Record) -> None:
    parity = case.model.bundle.manifest.parity
    assert parity is not None
    assert parity.passed, parity
    assert {c.name for c in case.model.bundle.spec.components} == {
        c.component for c in parity.components
    }
    differences = {c.component: c.max_rel for c in parity.components}
    found = {"components": differences, "tasks": sorted(case.model.bundle.spec.tasks)}
    record_property("parity", json.dumps(found))  # for docs/families.md


def test_weights_are_stored_once(case: Case) -> None:
    """Of whatever two graphs of a family, or one, hold the same of."""
    bundle = case.model.bundle
    places: dict[bytes, tuple[Any, ...]] = {}
    for component in bundle.spec.components:
        for value in load_graph(bundle.path, component.name).graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                place = tensor.location, tensor.offset, tensor.length
                assert places.setdefault(tensor.tobytes(), place) == place, value.name
    files = bundle.path.glob("graphs/*.bin")
    assert sum(len(data) for data in places) == sum(file.stat().st_size for file in files)


def test_embedding_table_is_the_checkpoints(case: Case) -> None:
    """Of the bundle and of the gate's other side, both of which read it some rows at a time."""
    opened: Any = FAMILIES[case.model.bundle.spec.family].open(case.folder)
    if opened.embed_tokens is None:
        assert opened.rows() is None
        pytest.skip("reads no embeddings on the host")
    whole = opened.read(opened.embed_tokens) * np.float32(opened.embed_scale)
    ids = np.array([np.arange(len(whole)), np.arange(len(whole))[::-1]])
    np.testing.assert_array_equal(opened.rows()[ids], whole[ids])
    np.testing.assert_array_equal(case.model.bundle.embeddings()[ids], whole[ids])


def test_cached_step_is_the_full_pass(case: Case) -> None:
    for component in case.model.bundle.spec.components:
        if not component.state:
            continue
        graph, rng = case.model.graphs[component.name], np.random.default_rng(0)
        state = {into for _, into in component.state}
        sizes = {"batch": 2, "tokens": 6, "total": 6, "states": 4}
        feeds = {
            spec.name: np.ones([sizes.get(a, 1) if isinstance(a, str) else a for a in spec.shape],
                               spec.dtype)
            if spec.dtype == "int64"
            else rng.standard_normal(
                [sizes.get(a, 4) if isinstance(a, str) else a for a in spec.shape]
            ).astype(spec.dtype)
            for spec in component.inputs
            if spec.name not in state
        }  # fmt: skip
        graph.reset()
        full = graph.run(feeds)["logits"]
        graph.reset()
        alone = graph.run(feeds, last=True)["logits"]
        assert alone.shape == (2, 1, full.shape[2])  # the head is found in every family's decoder
        np.testing.assert_allclose(alone, full[:, -1:], rtol=1e-4, atol=2e-5)
        axes = {spec.name: spec.shape for spec in component.inputs}

        def cut(name: str, value: Any, start: int, end: int, axes: Any = axes) -> Any:
            for axis, label in enumerate(axes[name]):
                if label == "tokens":
                    value = np.take(value, range(start, end), axis)
                elif label == "total":
                    value = np.take(value, range(end), axis)
            return np.ascontiguousarray(value)

        graph.reset()
        first = graph.run({n: cut(n, v, 0, 4) for n, v in feeds.items()})["logits"]
        rest = [
            graph.run({n: cut(n, v, i, i + 1) for n, v in feeds.items()})["logits"] for i in (4, 5)
        ]
        np.testing.assert_allclose(np.concatenate([first, *rest], 1), full, rtol=1e-4, atol=2e-5)


def test_caches_are_in_place(case: Case) -> None:
    """No step copies a cache, but where a prompt's tokens look ahead, which no kernel does."""
    if case.model.bundle.spec.family == "t5gemma2":
        pytest.skip("its one attention reads the cache and the encoder's states, which none does")
    for component in case.model.bundle.spec.components:
        if not component.state or any(i.name == "token_type_ids" for i in component.inputs):
            continue
        graph: Any = case.model.graphs[component.name]
        (cached,) = [one for one in graph.fusions if one["kind"] == "cached attentions"]
        assert cached["done"] == cached["total"] == len(component.state) // 2, cached["left"]


def test_benchmark_runs_every_component(case: Case) -> None:
    found = Side(case.model.bundle, None, "ort").round()
    ran = {name.split()[0] for name in found["components_ms"]}
    assert ran == {component.name for component in case.model.bundle.spec.components}
    assert found["tasks_ms"].keys() <= case.model.bundle.spec.tasks.keys()
