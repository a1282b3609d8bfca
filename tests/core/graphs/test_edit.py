"""What patterns ask of a graph, the edits that follow, and float16 written into one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from vlmedge.arrays import Array
from vlmedge.errors import CheckpointError
from vlmedge.graphs import edit, half, heads

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


def graph_of(**inputs: list[int | str]) -> ir.Graph:
    """Make a graph of float inputs without nodes."""
    values = [
        ir.Value(name=name, type=ir.TensorType(FLOAT), shape=ir.Shape(shape))
        for name, shape in inputs.items()
    ]
    return ir.Graph(values, [], nodes=[], opset_imports={"": 20}, name="g")


def put(graph: ir.Graph, op_type: str, *inputs: ir.Value, shape: Any = None, **more: Any) -> Any:
    """Append a float node that is called by its operator and its place."""
    known = inputs[0].shape if shape is None else shape
    name = f"{op_type}.{len(list(graph))}"
    return edit.append(graph, op_type, inputs, FLOAT, known, name, **more)


def refuse(name: str, largest: float) -> CheckpointError:
    return CheckpointError(f"{name} reaches {largest:g}")


def halved(graph: ir.Graph, wide: tuple[str, ...] = (), state: tuple[str, ...] = ()) -> None:
    half.halve(graph, lambda node: node.op_type in wide, refuse, state)


def run(graph: ir.Graph, feeds: Mapping[str, Array]) -> list[Array]:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = ir.Model(graph, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    data = ir.serde.serialize_model(model).SerializeToString()
    return list(onnxruntime.InferenceSession(data, options).run(None, feeds))


def test_reader_is_the_only_one() -> None:
    graph = graph_of(x=["batch", 4])
    y = put(graph, "Abs", graph.inputs[0])
    z = put(graph, "Neg", y)
    assert edit.reader(y) is edit.reader(y, "Neg") is z.producer()
    assert edit.reader(y, "Abs") is None and edit.reader(z) is None
    edit.append(graph, "Shape", [y], ir.DataType.INT64, [2])
    assert edit.reader(y) is None
    assert edit.reader(y, besides_shape=True) is z.producer()
    graph.outputs.append(y)
    assert edit.reader(y, besides_shape=True) is None
    assert edit.reader(y, besides_shape=True, output_too=True) is z.producer()


def test_replace_keeps_names_readers_and_outputs() -> None:
    graph = graph_of(x=["batch", 4])
    y = put(graph, "Abs", graph.inputs[0])
    z = put(graph, "Neg", y)
    graph.outputs.append(y)
    new = [ir.Node("", "Relu", [graph.inputs[0]])]
    new.append(ir.Node("", "Sigmoid", new[0].outputs))
    edit.replace([y.producer()], new)
    assert [node.op_type for node in graph] == ["Relu", "Sigmoid", "Neg"]
    made = new[-1].outputs[0]
    assert graph.outputs[0] is z.producer().inputs[0] is made
    assert (made.name, made.dtype, list(made.shape or ())) == ("Abs.0.out", FLOAT, ["batch", 4])


def test_new_value_is_given_by_the_old_ones_name() -> None:
    graph = graph_of(x=["batch", 4])
    y = put(graph, "Abs", graph.inputs[0])
    z, new = put(graph, "Neg", y), put(graph, "Relu", y)
    edit.give_instead(graph, y, new, "inner")
    assert y.name == "Abs.0.out" and not graph.outputs
    graph.outputs.append(y)
    edit.give_instead(graph, y, new, "inner")
    assert graph.outputs[0] is new and (new.name, y.name) == ("Abs.0.out", "inner")
    assert z.producer().inputs[0] is y


def test_constants_know_their_type_and_shape() -> None:
    graph = graph_of(x=[4])
    one = edit.constant(graph, "one", np.ones((2, 3), np.float32))
    assert (one.name, one.dtype, one.shape) == ("one", FLOAT, ir.Shape([2, 3]))
    with pytest.raises(ValueError, match="one"):
        edit.constant(graph, "one", np.ones(1, np.float32))
    made: list[int] = []

    def make() -> ir.TensorProtocol:
        made.append(1)
        return ir.tensor(np.zeros(2, np.float32))

    late = edit.promise(graph, "late", FLOAT, [2], make)
    assert edit.promise(graph, "late", FLOAT, [2], make) is late and not made
    assert late.const_value is not None and not late.const_value.numpy().any() and made
    edit.drop_unread(graph)
    assert not graph.initializers


def test_bias_is_a_constant_vector_behind_a_product() -> None:
    graph = graph_of(x=["batch", 4], y=[4])
    weight = edit.constant(graph, "weight", np.ones((4, 4), np.float32))
    bias = edit.constant(graph, "bias", np.ones(4, np.float32))
    first, second = (put(graph, "MatMul", graph.inputs[0], weight) for _ in range(2))
    total = put(graph, "Add", bias, first)
    put(graph, "Add", second, graph.inputs[1])
    assert edit.biased(first.producer()) == (total.producer(), bias)
    assert edit.biased(second.producer()) is None  # of an input


@pytest.mark.parametrize("logit", [-5000.0, -16.0, 0.0, 5000.0])
def test_two_masks_and_a_logit_are_finite_in_float16(logit: float) -> None:
    """Of 32752, the largest number that can be added twice, nothing is left for a logit."""
    mask = half.to_half(np.array([np.finfo(np.float32).min], np.float32), "mask", refuse)
    assert mask.dtype == np.float16 and mask == [-half.MASKED]
    assert np.isfinite(mask + mask + np.float16(logit)).all()
    most = np.float16(half.HALF_MAX / 2)
    with np.errstate(over="ignore"):
        assert np.isinf(-most - most + np.float16(-16.0))
    assert half.MASKED + 2000 < half.HALF_MAX / 2  # where a repair looks for overflow


def test_weights_that_float16_lacks_are_refused_by_whoever_asks() -> None:
    graph = graph_of(x=["batch", 4])
    weight = edit.constant(graph, "weight", np.full(4, 7e4, np.float32))
    graph.outputs.append(put(graph, "Mul", graph.inputs[0], weight))
    halved(graph)
    (twin,) = graph.initializers.values()
    assert twin.dtype == HALF and twin.const_value is not None
    with pytest.raises(CheckpointError, match="weight reaches 70000"):
        twin.const_value.numpy()


def test_values_are_cast_once_and_outputs_come_back() -> None:
    graph = graph_of(x=["batch", 4])
    x = graph.inputs[0]
    exact = put(graph, "Exp", x)
    graph.outputs.append(put(graph, "Add", put(graph, "Mul", exact, exact), x))
    given = str(graph.outputs[0].name)
    rows = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)
    (before,) = run(graph, {"x": rows})
    halved(graph, wide=("Exp",))
    kinds = sorted(node.op_type for node in graph)
    assert kinds == ["Add", "Cast", "Cast", "Cast", "Exp", "Mul"]
    assert (exact.dtype, graph.outputs[0].dtype, graph.outputs[0].name) == (FLOAT, FLOAT, given)
    (after,) = run(graph, {"x": rows})
    np.testing.assert_allclose(after, before, rtol=2e-3)


def test_scales_of_resize_stay_float32() -> None:
    graph = graph_of(x=[1, 1, 2, 2])
    scales = edit.constant(graph, "scales", np.array([1, 1, 2, 2], np.float32))
    none: Any = None
    out = edit.append(graph, "Resize", [graph.inputs[0], none, scales], FLOAT, [1, 1, 4, 4], "up")
    graph.outputs.append(out)
    halved(graph)
    assert out.dtype == HALF and list(graph.initializers) == ["scales"]
    assert run(graph, {"x": np.ones((1, 1, 2, 2), np.float32)})[0].shape == (1, 1, 4, 4)


def test_state_becomes_float16_whether_halved_or_typed() -> None:
    def cache() -> ir.Graph:
        graph = graph_of(past=["batch", 2, "past", 4], new=["batch", 2, "tokens", 4])
        joined = put(graph, "Concat", *graph.inputs, axis=2)
        edit.append(graph, "Shape", [graph.inputs[0]], ir.DataType.INT64, [4])
        joined.name = "present"
        graph.outputs.append(joined)
        return graph

    told = cache()
    halved(told, state=("past", "present"))
    typed = cache()
    halved(typed)
    assert half.halve_state(ir.Model(typed, ir_version=10), [("present", "past")])
    for graph in (told, typed):
        past, new = graph.inputs
        assert (past.dtype, new.dtype, graph.outputs[0].dtype) == (HALF, FLOAT, HALF)
        assert graph.outputs[0].name == "present"
    assert not half.halve_state(ir.Model(cache(), ir_version=10), [("present", "past")])


def heads_of(graph: ir.Graph, x: ir.Value, count: int, width: int) -> Any:
    target = edit.constant(graph, f"{x.name}.target", np.array([0, 0, count, width]))
    split = put(graph, "Reshape", x, target, shape=["batch", "tokens", count, width])
    shape = ["batch", count, "tokens", width]
    return put(graph, "Transpose", split, shape=shape, perm=heads.OUTSIDE)


def test_heads_are_joined_where_they_were_split() -> None:
    graph = graph_of(x=["batch", "tokens", 6], y=["batch", 2, "tokens", 3])
    x, y = graph.inputs
    assert heads.flat(graph, heads_of(graph, x, 2, 3), 2, 3, "x") is x
    flat = heads.flat(graph, y, 2, 3, "y")
    assert edit.sizes(flat) == ["batch", "tokens", 6]


def test_heads_leave_where_they_are_joined_again_or_apart() -> None:
    """The kernel's output goes to whoever read the spelt-out one, in the shape that they read."""
    graph = graph_of(x=["batch", 2, "tokens", 3], new=["batch", "tokens", 6])
    old, new = put(graph, "Abs", graph.inputs[0]), graph.inputs[1]
    back = put(graph, "Transpose", old, shape=["batch", "tokens", 2, 3], perm=heads.OUTSIDE)
    target = edit.constant(graph, "target", np.array([0, 0, 6]))
    end = put(graph, "Neg", put(graph, "Reshape", back, target, shape=["batch", "tokens", 6]))
    heads.leave(graph, old, new, 2, 3, "joined")
    assert end.producer().inputs[0] is new
    other = put(graph, "Abs", graph.inputs[0])
    reads = put(graph, "Relu", other)
    heads.leave(graph, other, new, 2, 3, "apart")
    apart = reads.producer().inputs[0]
    assert edit.sizes(apart) == ["batch", 2, "tokens", 3]
    assert edit.producer(apart, "Transpose") is not None


def test_third_of_one_linear_is_found() -> None:
    graph = graph_of(x=["batch", "tokens", 18])
    target = edit.constant(graph, "target", np.array([0, 0, 3, 2, 3]))
    shape = ["batch", "tokens", 3, 2, 3]
    split = put(graph, "Reshape", graph.inputs[0], target, shape=shape)
    shape = [3, "batch", 2, "tokens", 3]
    turned = put(graph, "Transpose", split, shape=shape, perm=heads.THIRDS)
    for number in range(3):
        index = edit.constant(graph, f"index.{number}", np.array(number))
        part = put(graph, "Gather", turned, index, shape=shape[1:])
        assert heads.third(part) == heads.Third(graph.inputs[0], number, 2, 3)
    assert heads.third(turned) is None


@pytest.mark.parametrize(
    ("start", "end", "length", "more"), [(0, 2, 0, 0), (2, 3, 0, 1), (2, 4, 1, 1)]
)
def test_questions_for_the_past_are_seen(start: int, end: int, length: bool, more: bool) -> None:
    graph = graph_of(past=["batch", 2, "past", 4])
    edit.append(graph, "Shape", graph.inputs[:1], ir.DataType.INT64, [1], start=start, end=end)
    assert heads.asks_for_past(graph, {"past"}, but_length=True) is bool(length)
    assert heads.asks_for_past(graph, {"past"}, but_length=False) is bool(more)
    put(graph, "Neg", graph.inputs[0])
    assert heads.asks_for_past(graph, {"past"}, but_length=True)
