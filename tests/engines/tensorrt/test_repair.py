"""Overflow in float16: found in the portable graph, and put back to float32 node by node."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from kit.graphs import FLOAT, HALF, V10_3, Draft
from kit.overflow import COMPONENT, overflowing
from kit.shelf import module
from kit.standins import rounding

from vlmedge.arrays import Array
from vlmedge.bundle import Bundle
from vlmedge.parity import probe as probes
from vlmedge.parity.tolerances import compare
from vlmedge.spec import Component, TensorSpec

build, plain = module("runtimes", "_tensorrt.compile"), module("runtimes", "_tensorrt.unquantize")
repair = module("runtimes", "_tensorrt.half_repair")


@pytest.fixture
def bundle(clip_bundle: Path, tmp_path: Path) -> Bundle:
    return overflowing(clip_bundle, tmp_path)


def run(model: ir.Model, feeds: dict[str, Array]) -> Array:
    """Run on ONNX Runtime, with each float16 rounded to one."""
    found: Array = rounding.session(ir.to_proto(model)).run(None, feeds)[0]
    return found


def find(bundle: Bundle, name: str, folder: Path) -> dict[str, float]:
    component = bundle.spec.component(name)
    model = build.lowered(bundle, component, V10_3, "float32")[0]
    found: dict[str, float] = repair.largest(component, model, probes.Probe(bundle), folder)
    return found


def test_repaired_graph_is_within_the_tolerance_where_float16_is_not_finite(
    bundle: Bundle, tmp_path: Path
) -> None:
    component = bundle.spec.component(COMPONENT)
    (feeds,) = probes.Probe(bundle).steps(SimpleNamespace(component=component))
    plain, changed, _ = build.lowered(bundle, component, V10_3, "float32")
    assert changed  # Gelu is written out
    expected = run(plain, feeds)
    half = build.lowered(bundle, component, V10_3, "float16")[0]
    assert not np.isfinite(run(half, feeds)).all()

    nodes = repair.beyond_half(plain, find(bundle, COMPONENT, tmp_path), 0.5)
    assert 0 < len(nodes) < sum(1 for _ in plain.graph) / 10
    assert max(node.largest for node in nodes) > 65504
    exact = {node.output for node in nodes}
    repaired, _, findings = build.lowered(bundle, component, V10_3, "float16", exact)
    assert findings == []
    types = {str(n.outputs[0].name): n.outputs[0].dtype for n in repaired.graph}
    assert {types[name] for name in exact} == {FLOAT}
    assert sum(dtype == HALF for dtype in types.values()) > len(types) / 2
    found = run(repaired, feeds)
    verdict = compare(COMPONENT, "fp16", expected, found)
    assert verdict.passed, verdict


def test_search_leaves_no_file(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "partial"
    folder.mkdir()
    find(bundle, COMPONENT, folder)
    assert list(folder.iterdir()) == []


def test_nothing_is_found_where_nothing_overflows(clip_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.load(clip_bundle)
    component = bundle.spec.component(COMPONENT)
    plain = build.lowered(bundle, component, V10_3, "float32")[0]
    assert repair.beyond_half(plain, find(bundle, COMPONENT, tmp_path), 0.5) == ()


class _Fed:
    """A probe that feeds x."""

    def __init__(self, x: Array) -> None:
        self._x = x

    def steps(self, graph: Any) -> list[dict[str, Array]]:
        return [{"x": self._x}]


def part() -> Component:
    x, y = (TensorSpec(name, "float32", ("batch", 8)) for name in "xy")
    return Component("part", (x,), (y,))


def beyond(draft: Draft, y: ir.Value, x: Array, folder: Path) -> dict[str, float]:
    """Return the nodes of a draft that go beyond, by operator, and how far."""
    model = draft.model(y)
    nodes = list(model.graph)
    found = repair.largest(part(), model, _Fed(x), folder)
    return {
        n.operator: n.largest for n in repair.beyond_half(SimpleNamespace(graph=nodes), found, 0.5)
    }


def test_sum_of_squares_inside_of_a_norm_counts(tmp_path: Path) -> None:
    draft = Draft()
    scale = draft.constant(np.ones(8, np.float32))
    y = draft.add("Relu", draft.add("LayerNormalization", draft.x, scale, axis=-1))
    found = beyond(draft, y, np.full((2, 8), 200, np.float32), tmp_path)
    assert found == {"LayerNormalization": 8 * 200.0**2}


def test_reader_and_writer_of_a_value_count_and_the_rest_does_not(tmp_path: Path) -> None:
    draft = Draft()
    big = draft.add("Mul", draft.add("Relu", draft.x), draft.constant(6e4, np.float32))
    y = draft.add("Neg", draft.add("Tanh", big))
    found = beyond(draft, y, np.full((2, 8), 2, np.float32), tmp_path)
    assert found == {"Mul": 1.2e5, "Tanh": 1.2e5}


def test_mask_is_no_overflow(tmp_path: Path) -> None:
    draft = Draft()
    least = draft.constant(np.finfo(np.float32).min, np.float32)
    y = draft.add("Softmax", draft.add("Add", draft.add("Relu", draft.x), least), axis=-1)
    assert beyond(draft, y, np.ones((2, 8), np.float32), tmp_path) == {}


def test_nan_counts_as_overflow(tmp_path: Path) -> None:
    draft = Draft()
    y = draft.add("Neg", draft.add("Log", draft.x))
    found = beyond(draft, y, np.full((2, 8), -1, np.float32), tmp_path)
    assert set(found) == {"Log", "Neg"}


def test_cache_beyond_float16_is_float32_on_its_way(blip2_bundle: Path) -> None:
    bundle = Bundle.load(blip2_bundle)
    component = bundle.spec.component("decoder")
    (out, into), *others = component.state
    model = build.lowered(bundle, component, V10_3, "float16", {out})[0]
    types = {str(v.name): v.dtype for v in (*model.graph.inputs, *model.graph.outputs)}
    assert (types[out], types[into]) == (FLOAT, FLOAT)
    assert {types[name] for pair in others for name in pair} == {HALF}


def test_decoder_is_searched_with_its_cache(blip2_bundle: Path, tmp_path: Path) -> None:
    """Prefill begins with an empty cache, whose largest value is none."""
    bundle = Bundle.load(blip2_bundle)
    found = find(bundle, "decoder", tmp_path)
    (out, into) = bundle.spec.component("decoder").state[0]
    assert found[out] >= found[into] > 0


@pytest.mark.parametrize("kind", ["whole", "axis", "block"])
def test_weight_without_its_rounding_is_what_the_graph_computes(kind: str) -> None:
    random = np.random.default_rng(0)
    draft = Draft(opset=21)
    weight = draft.constant(random.integers(-127, 128, (8, 4)), np.int8)
    shape, attributes = {
        "whole": ((), {}),
        "axis": ((4,), {"axis": 1}),
        "block": ((2, 4), {"axis": 0, "block_size": 4}),
    }[kind]
    scale = draft.constant(random.random(shape) / 100, np.float32)
    restored = draft.add("DequantizeLinear", weight, scale, **attributes)
    step = draft.constant(1 / 4096, np.float32)
    zero = draft.constant(0, np.int16)
    rounded = draft.add("QuantizeLinear", draft.x, step, zero, dtype=ir.DataType.INT16)
    x = draft.add("DequantizeLinear", rounded, step, zero)
    model = draft.model(draft.add("MatMul", x, restored))
    feeds = {"x": random.standard_normal((2, 8)).astype(np.float32)}
    options = onnxruntime.SessionOptions()  # its kernels for Q/DQ round what the graph does not
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = ir.to_proto(model).SerializeToString()
    (expected,) = onnxruntime.InferenceSession(data, options).run(None, feeds)
    assert plain.is_rounded(model)
    plain.unround(model)
    assert [node.op_type for node in model.graph] == ["MatMul"]
    np.testing.assert_allclose(run(model, feeds), expected, atol=5e-3)
