"""The lint and the lowering for TensorRT: what a version would refuse, and what becomes of it."""

from __future__ import annotations

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from kit import ROOT
from kit.graphs import FLOAT, HALF, INT8, V10_3, V11, Draft
from kit.shelf import module
from kit.tiny import KINDS
from numpy.typing import NDArray

from vlmedge.arrays import Array
from vlmedge.bundle import Bundle
from vlmedge.errors import BundleError, InputError

lint, lower = module("runtimes", "_tensorrt.lint"), module("runtimes", "_tensorrt.lower")
tables = module("runtimes", "_tensorrt.operators")
VERSIONS = ("8.6", "10.3", "10.13", "10.16", "11.x")


def problems(model: ir.Model, version: tuple[int, int] = V10_3, *, cached: bool = False) -> str:
    found = lint.lint("part", model, version, cached=cached)
    return "; ".join(f"{f.operator}: {f.problem}" for f in found)


def run(model: ir.Model, **feeds: Array) -> list[NDArray[Any]]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    found: list[NDArray[Any]] = session.run(None, feeds)
    return found


# ---- every family, every version


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["clip_bundle", "clip_int8", "blip2_bundle", "blip2_int8"])
def test_built_in_bundles_pass(
    name: str, version: str, vlmedge: Any, request: pytest.FixtureRequest
) -> None:
    bundle = request.getfixturevalue(name)
    for precision in ("float32", "float16"):
        how = ("--check-only", "--tensorrt", version, "--precision", precision)
        ran = vlmedge("build", bundle, *how)
        assert ran.code == 0, ran.err
        assert ran.out == f"{bundle}: tensorrt {version} takes it\n"
        assert json.loads(vlmedge("build", bundle, *how, "--json").out) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_passes_in_every_scheme(kind: str, tmp_path: Path) -> None:
    """8.6 has neither INT4 nor FP8; all that later versions lack is in the lowering."""
    _, found = table().refusals(kind, tmp_path)
    assert {scheme for scheme, _ in found.pop("8.6")} <= {"int4", "fp8"}
    assert found == {version: set() for version in VERSIONS if version != "8.6"}


def table() -> Any:
    """Return benchmarks/lint_table.py, which makes docs/tensorrt_lint.md."""
    file = ROOT / "benchmarks" / "lint_table.py"
    spec = spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_portable_decoder_has_what_the_lowering_is_for(blip2_bundle: Path) -> None:
    """The lint would be worth nothing if it took the graph as it is."""
    model = ir.load(Bundle.load(blip2_bundle).graph_file("decoder"))
    shape = "Shape: start and end are not supported: it gives all axes"
    sums = "CumSum: it does not take int64: it takes bfloat16, float16, float32"
    clips = "Clip: it does not take int64: it takes bfloat16, float16, float32"
    assert set(problems(model).split("; ")) == {sums, clips, shape}
    vision = ir.load(Bundle.load(blip2_bundle).graph_file("vision_encoder"))
    assert set(problems(vision).split("; ")) == {"Gelu: its parser has no such operator", shape}
    assert set(problems(vision, (10, 6)).split("; ")) == {shape}
    assert problems(vision, (8, 6)).startswith(": the graph is of opset 20, its parser reads up to")


def test_findings_are_printed_and_counted(clip_int8: Path, vlmedge: Any, monkeypatch: Any) -> None:
    engine = module("runtimes", "tensorrt")
    draft = Draft()
    finding = lint.lint("part", draft.model(draft.add("Det", draft.x)), V10_3, cached=False)
    monkeypatch.setattr(engine, "lowered", lambda *a, **k: (None, False, finding))
    ran = vlmedge("build", clip_int8, "--check-only", "--tensorrt", "10.3")
    assert ran.code == 1
    for word in ("part", "Det", "n0", "its parser has no such operator"):
        assert word in ran.out
    assert ran.err.endswith("tensorrt 10.3 would refuse 2 nodes\n")  # one a component


# ---- versions


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("10.3", (10, 3)),
        ("10.13.3.9", (10, 13)),
        ("11.x", (11, 0)),
        ("11", (11, 0)),
        ("8.x", (8, 6)),
    ],
)
def test_version_is_read(text: str, version: tuple[int, int]) -> None:
    assert tables.version_of(text) == version


@pytest.mark.parametrize("text", ["ten", "", "10,3", "v10"])
def test_what_is_no_version_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"is not a version: give one like 8\.6, 10\.3"):
        tables.version_of(text)


def test_too_old_version_is_refused() -> None:
    with pytest.raises(InputError, match=r"TensorRT 8\.5 is too old: 8\.6"):
        tables.version_of("8.5")


@pytest.mark.parametrize(
    ("operator", "since"),
    [
        ("Gelu", (10, 6)),
        ("STFT", (10, 5)),
        ("Attention", (10, 14)),
        ("TensorScatter", (10, 15)),
        ("Swish", (11, 0)),
        ("LayerNormalization", (8, 6)),
        ("Hardmax", (9, 2)),
    ],
)
def test_operator_is_there_since(operator: str, since: tuple[int, int]) -> None:
    assert operator in tables.operators(since).types
    if since > tables.OLDEST:
        before = (since[0], since[1] - 1) if since[1] else (since[0] - 1, 99)
        assert operator not in tables.operators(before).types


def test_opsets_are_those_of_the_tables() -> None:
    opsets = [tables.operators(tables.version_of(v)).opset for v in VERSIONS]
    assert opsets == [17, 20, 22, 24, 24]


# ---- single rules


def test_unknown_operator_and_domain_are_named() -> None:
    draft = Draft()
    y = draft.add(
        "MatMulNBits", draft.add("DynamicQuantizeLinear", draft.x), domain="com.microsoft"
    )
    assert problems(draft.model(y)) == (
        "DynamicQuantizeLinear: its parser has no such operator; "
        "MatMulNBits: domain 'com.microsoft' is not standard ONNX"
    )


def test_types_are_those_of_the_table() -> None:
    draft = Draft(dtype=ir.DataType.DOUBLE)
    assert "Add: it does not take double" in problems(
        draft.model(draft.add("Add", draft.x, draft.x, dtype=ir.DataType.DOUBLE))
    )
    draft = Draft(dtype=ir.DataType.BOOL)
    found = problems(draft.model(draft.add("Equal", draft.x, draft.x, dtype=ir.DataType.BOOL)))
    assert found.startswith("Equal: it does not take bool")


def test_pow_of_integers_came_with_10_12() -> None:
    draft = Draft(dtype=ir.DataType.INT64)
    model = draft.model(draft.add("Pow", draft.x, draft.x, dtype=ir.DataType.INT64))
    assert "Pow: it does not take int64" in problems(model, (10, 11))
    assert problems(model, (10, 12)) == ""


@pytest.mark.parametrize(
    ("kind", "index", "fine"),
    [("ReduceSum", 1, None), ("Unsqueeze", 1, (10, 7)), ("CumSum", 1, (10, 8))],
)
def test_axes_must_be_constant(kind: str, index: int, fine: tuple[int, int] | None) -> None:
    draft = Draft()
    axes = draft.add("Shape", draft.x, dtype=ir.DataType.INT64)
    model = draft.model(draft.add(kind, draft.x, axes))
    assert "must be constant" in problems(model)
    if fine is None:
        assert "must be constant" in problems(model, V11)
    else:
        assert problems(model, fine) == ""


def test_second_output_of_layer_norm_is_refused() -> None:
    draft = Draft()
    scale = draft.constant(np.ones(8, np.float32))
    node = ir.node("LayerNormalization", [draft.x, scale], num_outputs=2, name="n")
    for value in node.outputs:
        value.type = ir.TensorType(FLOAT)
    draft.nodes.append(node)
    model = draft.model(draft.add("Add", node.outputs[0], node.outputs[1]))
    assert "only its first output is supported" in problems(model)


def test_resize_and_top_k_have_limits() -> None:
    draft = Draft()
    y = draft.add("Resize", draft.x, None, draft.constant([1.0, 2.0], np.float32), mode="cubic")
    assert "mode 'cubic' is not supported" in problems(draft.model(y))
    draft = Draft()
    y = draft.add("TopK", draft.x, draft.constant([4000], np.int64))
    assert "K is 4000" in problems(draft.model(y))


def test_causal_attention_with_a_cache_is_a_trap_before_11() -> None:
    draft = Draft(opset=23)
    draft.x.shape = ir.Shape([1, 2, 4, 8])
    model = draft.model(draft.add("Attention", draft.x, draft.x, draft.x, is_causal=1))
    assert "would hide the newest keys" in problems(model, (10, 15), cached=True)
    assert problems(model, (10, 15)) == ""
    assert problems(model, V11, cached=True) == ""
    assert "no such operator" in problems(model, (10, 13))


def test_attention_with_past_is_refused() -> None:
    draft = Draft(opset=23)
    draft.x.shape = ir.Shape([1, 2, 4, 8])
    inputs = [draft.x, draft.x, draft.x, None, draft.x, draft.x]
    assert "past, present" in problems(draft.model(draft.add("Attention", *inputs)), V11)


# ---- rules of Q/DQ


def quantized(
    zero: Any = 0,
    scale: Any = 0.5,
    dtype: Any = np.int8,
    scale_dtype: Any = np.float32,
    last: str = "Relu",
) -> ir.Model:
    """X -> QuantizeLinear -> DequantizeLinear -> Relu."""
    draft = Draft()
    step, point = draft.constant(scale, scale_dtype), draft.constant(zero, dtype)
    stored = INT8 if dtype is np.int8 else ir.DataType.UINT8
    q = draft.add("QuantizeLinear", draft.x, step, point, dtype=stored)
    y = draft.add("DequantizeLinear", q, step, point)
    return draft.model(draft.add(last, y))


def weighted(
    values: Any = ((1,) * 4,) * 8, scale: Any = (1.0,) * 4, axis: int = 1, dtype: Any = np.int8
) -> ir.Model:
    """W int8 -> DequantizeLinear -> MatMul <- x."""
    draft = Draft()
    w = draft.add(
        "DequantizeLinear",
        draft.constant(values, dtype),
        draft.constant(scale, np.float32),
        axis=axis,
    )
    return draft.model(draft.add("MatMul", draft.x, w))


def test_symmetric_int8_passes() -> None:
    for version in (V10_3, V11):
        assert problems(quantized(), version) == ""
        assert problems(weighted(), version) == ""


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: quantized(zero=3), "its zero point is not 0"),
        (lambda: quantized(zero=128, dtype=np.uint8), "it is of UINT8, not INT8"),
        (lambda: quantized(scale=0.0), "not above 0"),
        (lambda: quantized(scale=np.nan), "not above 0"),
        (lambda: quantized(scale=[0.5] * 8, zero=[0] * 8), "scaled per channel"),
        (lambda: quantized(scale_dtype=np.float16), "types differ: FLOAT16 scale, FLOAT tensor"),
        (lambda: weighted(scale=np.ones(3, np.float32)), "3 scales for 4 channels"),
        (lambda: weighted(axis=0), "4 scales for 8 channels"),
        (lambda: weighted(axis=2), "axis 2 is outside"),
        (lambda: weighted(dtype=np.int32), "it is of INT32, not INT8"),
    ],
)
def test_rules_of_quantization(model: Any, words: str) -> None:
    assert words in problems(model())


def test_scale_that_is_computed_is_refused() -> None:
    draft = Draft()
    step = draft.add("ReduceMax", draft.x, keepdims=0)
    assert "its scale is not a constant" in problems(
        draft.model(draft.add("QuantizeLinear", draft.x, step, dtype=INT8))
    )


def test_integers_that_go_elsewhere_are_refused() -> None:
    draft = Draft()
    step, zero = draft.constant(0.5, np.float32), draft.constant(0, np.int8)
    q = draft.add("QuantizeLinear", draft.x, step, zero, dtype=INT8)
    found = problems(draft.model(draft.add("Transpose", q, dtype=INT8)))
    assert "QuantizeLinear: Transpose reads its integers" in found
    assert "Transpose: it does not take int8" in found


def test_int4_came_with_10_3() -> None:
    draft = Draft(opset=21)
    w = draft.constant(np.ones((8, 4), np.int8))
    w.const_value = ir.tensor(np.ones((8, 4), np.int8), dtype=ir.DataType.INT4, name=w.name)
    w.type = ir.TensorType(ir.DataType.INT4)
    scale = draft.constant(np.ones((2, 4), np.float32))
    y = draft.add("DequantizeLinear", w, scale, axis=0, block_size=4)
    model = draft.model(draft.add("MatMul", draft.x, y))
    assert "it is of INT4" in problems(model, (10, 2))
    assert problems(model, V10_3) == ""
    model.opset_imports[""] = 22
    assert "the graph is of opset 22" in problems(model, V10_3)


def test_graph_that_a_scheme_has_typed_keeps_its_types() -> None:
    """The scheme fp16 leaves layers in float32 that would overflow."""
    draft = Draft()
    half = draft.add("Cast", draft.x, dtype=HALF, to=int(HALF))
    h = draft.add("Relu", half, dtype=HALF)
    full = draft.add("Cast", h, to=int(FLOAT))
    model = draft.model(draft.add("MatMul", full, draft.constant(np.full((8, 8), 1e5, "f4"))))
    assert not lower.lower(model, V10_3, "float16")
    assert half_types(model) == {"Relu": "FLOAT16", "MatMul": "FLOAT"}


# ---- the lowering gives the same numbers


@pytest.mark.parametrize("how", ["none", "tanh"])
def test_gelu_is_written_out_exactly(how: str) -> None:
    draft = Draft()
    model = draft.model(draft.add("Gelu", draft.x, approximate=how))
    x = np.linspace(-6, 6, 16, dtype=np.float32).reshape(2, 8)
    (expected,) = run(model, x=x)
    assert lower.lower(model, V10_3, "float32")
    assert "Gelu" not in {node.op_type for node in model.graph}
    assert model.graph.outputs[0].name == "y"
    np.testing.assert_allclose(run(model, x=x)[0], expected, atol=2e-6)


def test_sum_of_integers_is_exact() -> None:
    draft = Draft(dtype=ir.DataType.INT64)
    axis = draft.constant(1, np.int64)
    model = draft.model(draft.add("CumSum", draft.x, axis, dtype=ir.DataType.INT64))
    x = np.random.default_rng(0).integers(0, 2**20, (2, 8))
    assert lower.lower(model, V11, "float32")
    (found,) = run(model, x=x)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, x.cumsum(axis=1))
    assert problems(model, V11) == ""


@pytest.mark.parametrize(
    ("axis", "dtype", "attributes"),
    [
        (1, np.int64, {}),
        (-1, np.int32, {}),
        (0, np.int64, {}),
        (1, np.int64, {"exclusive": 1}),
        (1, np.int64, {"reverse": 1}),
    ],
)
@pytest.mark.parametrize("version", [(8, 6), V10_3])
@pytest.mark.parametrize("record", [True, False])
def test_sum_over_the_last_axis_is_no_loop_where_it_is_recorded(
    axis: int, dtype: Any, attributes: dict[str, int], version: tuple[int, int], record: bool
) -> None:
    kind = ir.DataType.from_numpy(np.dtype(dtype))
    draft = Draft(dtype=kind)
    where = draft.constant(axis, np.int64)
    model = draft.model(draft.add("CumSum", draft.x, where, dtype=kind, **attributes))
    x = np.random.default_rng(0).integers(0, 2**20, (2, 8)).astype(dtype)
    (expected,) = run(model, x=x)
    assert lower.lower(model, version, "float16", record=record)
    (found,) = run(model, x=x)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, expected)
    assert problems(model, version) == ""
    loops = "CumSum" in {node.op_type for node in model.graph}
    assert loops == (not record or axis == 0 or bool(attributes))  # no family has the latter two


@pytest.mark.parametrize("bounds", [(-3, 5), (-3, None), (None, 5), (5, -3), (None, None)])
def test_integers_are_clipped_exactly(bounds: tuple[int | None, int | None]) -> None:
    draft = Draft(dtype=ir.DataType.INT64)
    ends = [None if b is None else draft.constant(b, np.int64) for b in bounds]
    model = draft.model(draft.add("Clip", draft.x, *ends, dtype=ir.DataType.INT64))
    assert "Clip: it does not take int64" in problems(model, V11)
    x = np.arange(-8, 8).reshape(2, 8) + 2**40  # a float would round them
    x[0] -= 2**40
    (expected,) = run(model, x=x)
    assert lower.lower(model, V11, "float32")
    np.testing.assert_array_equal(run(model, x=x)[0], expected)
    assert problems(model, V11) == ""


@pytest.mark.parametrize(
    "bounds", [{"end": 1}, {"start": 1}, {"start": -1}, {"start": 0, "end": 2}]
)
def test_part_of_a_shape_is_sliced_from_the_whole(bounds: dict[str, int]) -> None:
    """The parser of 8.6 gives the whole shape instead; seen on a GPU."""
    draft = Draft()
    model = draft.model(draft.add("Shape", draft.x, dtype=ir.DataType.INT64, **bounds), rank=1)
    assert "Shape: start and end are not supported" in problems(model, (8, 6))
    x = np.zeros((2, 8), np.float32)
    (expected,) = run(model, x=x)
    assert lower.lower(model, (8, 6), "float32")
    assert problems(model, (8, 6)) == ""
    assert run(model, x=x)[0].tolist() == expected.tolist()


def test_opset_17_has_axes_as_attributes() -> None:
    draft = Draft()
    axes = draft.constant([1], np.int64)
    model = draft.model(draft.add("ReduceMean", draft.x, axes, keepdims=0), rank=1)
    x = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)
    (expected,) = run(model, x=x)
    assert lower.lower(model, (8, 6), "float16")
    assert model.opset_imports[""] == 17
    assert problems(model, (8, 6)) == ""
    np.testing.assert_allclose(run(model, x=x)[0], expected, rtol=1e-6)


def test_what_is_fit_is_left_alone() -> None:
    model = weighted()
    assert not lower.lower(model, V11, "float32")


def half_types(model: ir.Model) -> dict[str, str]:
    return {n.op_type: n.outputs[0].dtype.name for n in model.graph if n.op_type != "Cast"}


def test_products_are_half_and_squares_are_not() -> None:
    """RMSNorm written out: the mean of squares and the product with its root stay float32."""
    draft = Draft()
    h = draft.add("MatMul", draft.x, draft.constant(np.eye(8, dtype=np.float32) * 300))
    mean = draft.add("ReduceMean", draft.add("Pow", h, draft.constant(2.0, np.float32)), keepdims=1)
    root = draft.add("Sqrt", draft.add("Add", mean, draft.constant(1e-6, np.float32)))
    normal = draft.add("Div", h, root)
    y = draft.add("Relu", normal)
    model = draft.model(y)
    x = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)
    (expected,) = run(model, x=x)
    lower.lower(model, V10_3, "float16")
    assert half_types(model) == {
        "MatMul": "FLOAT16",
        "Pow": "FLOAT",
        "ReduceMean": "FLOAT",
        "Add": "FLOAT",
        "Sqrt": "FLOAT",
        "Div": "FLOAT",
        "Relu": "FLOAT16",
    }
    (found,) = run(model, x=x)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)


def test_mask_of_the_least_float_stays_finite() -> None:
    draft = Draft()
    least = draft.constant(np.finfo(np.float32).min, np.float32)
    y = draft.add("Softmax", draft.add("Add", draft.add("Relu", draft.x), least), axis=-1)
    model = draft.model(y)
    lower.lower(model, V10_3, "float16")
    (found,) = run(model, x=np.ones((2, 8), np.float32))
    np.testing.assert_allclose(found, 1 / 8, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "number"),
    [("Mul", 1e6), ("Div", -1e6), ("Add", 7e4), ("Max", -3.4e38), ("Min", 3.4e38)],
)
def test_number_that_float16_does_not_have_keeps_its_node_in_float32(
    kind: str, number: float
) -> None:
    """A mask's -3.4e38 may become -3e4; a factor may not, and neither may a bound that is none."""
    draft = Draft()
    small = draft.add("MatMul", draft.x, draft.constant(np.eye(8, dtype=np.float32) * 4e4))
    factor = draft.add(kind, small, draft.constant(number, np.float32))
    y = draft.add("Mul", factor, draft.constant(1e-6, np.float32))
    model = draft.model(y)
    x = np.array([[1, -1, 1e-3, 0.5, -0.25, 0.75, 0, 1]], np.float32)
    (expected,) = run(model, x=x)
    lower.lower(model, V10_3, "float16")
    assert half_types(model)[kind] == "FLOAT"
    (found,) = run(model, x=x)
    np.testing.assert_allclose(found, expected, rtol=2e-3)


def test_mask_among_many_numbers_is_masked() -> None:
    draft = Draft()
    rows = np.zeros((2, 8), np.float32)
    rows[0, 3:] = np.finfo(np.float32).min
    scores = draft.add("Add", draft.add("Relu", draft.x), draft.constant(rows))
    model = draft.model(draft.add("Softmax", scores, axis=-1))
    lower.lower(model, V10_3, "float16")
    assert half_types(model)["Add"] == "FLOAT16"
    (found,) = run(model, x=np.ones((2, 8), np.float32))
    np.testing.assert_allclose(found[0], [1 / 3] * 3 + [0] * 5, atol=1e-3)


def test_weight_beyond_float16_is_refused() -> None:
    draft = Draft()
    model = draft.model(draft.add("MatMul", draft.x, draft.constant(np.full((8, 8), 1e5, "f4"))))
    lower.lower(model, V10_3, "float16")
    value = model.graph.initializers["c0.float16"].const_value
    assert value is not None
    with pytest.raises(BundleError, match=r"c0 reaches 1.0e\+05, beyond float16"):
        value.numpy()


def test_scale_too_small_for_float16_keeps_its_node_in_float32() -> None:
    model = weighted(scale=np.full(4, 1e-6, np.float32))
    lower.lower(model, V10_3, "float16")
    assert half_types(model) == {"DequantizeLinear": "FLOAT", "MatMul": "FLOAT16"}
    assert problems(model) == ""
    model = weighted(scale=np.full(4, 1e-2, np.float32))
    lower.lower(model, V10_3, "float16")
    assert half_types(model) == {"DequantizeLinear": "FLOAT16", "MatMul": "FLOAT16"}
    assert problems(model) == ""


def test_state_is_float16_and_the_rest_keeps_its_type(blip2_bundle: Path) -> None:
    bundle = Bundle.load(blip2_bundle)
    model = ir.load(bundle.graph_file("decoder"))
    pairs = bundle.spec.component("decoder").state
    state = {name for pair in pairs for name in pair}
    lower.lower(model, V10_3, "float16", pairs)
    for value in (*model.graph.inputs, *model.graph.outputs):
        expected = HALF if value.name in state else FLOAT
        assert value.dtype in (expected, ir.DataType.INT64)


@pytest.mark.parametrize("version", [(8, 6), V10_3, V11])
def test_state_of_a_graph_that_a_scheme_has_typed_is_float16(version: tuple[int, int]) -> None:
    draft = Draft(dtype=FLOAT)
    narrow = draft.add("Cast", draft.x, dtype=HALF, to=int(HALF))
    longer = draft.add("Concat", narrow, narrow, dtype=HALF, axis=0)
    model = draft.model(draft.add("Cast", longer, to=int(FLOAT)))
    x = np.random.default_rng(0).standard_normal((2, 8), np.float32)
    (expected,) = run(model, x=x)
    assert lower.lower(model, version, "float16", [("y", "x")])
    assert [node.op_type for node in model.graph] == ["Concat"]
    assert (model.graph.inputs[0].dtype, model.graph.outputs[0].dtype) == (HALF, HALF)
    (found,) = run(model, x=x.astype(np.float16))
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("full", ["past", "present"])
def test_state_that_a_scheme_keeps_in_float32_stays(full: str) -> None:
    """It may hold what float16 does not have."""
    draft = Draft(dtype=FLOAT)
    narrow = draft.add("Cast", draft.x, dtype=HALF, to=int(HALF))
    if full == "past":
        longer = draft.add("Concat", draft.x, draft.x, axis=0)
        read = draft.add("Relu", narrow, dtype=HALF)
        y = draft.add("Add", longer, draft.add("Cast", read, to=int(FLOAT)))
    else:
        y = draft.add(
            "Relu", draft.add("Cast", draft.add("Relu", narrow, dtype=HALF), to=int(FLOAT))
        )
    model = draft.model(y)
    assert not lower.lower(model, V11, "float16", [("y", "x")])
    assert (model.graph.inputs[0].dtype, model.graph.outputs[0].dtype) == (FLOAT, FLOAT)


@pytest.mark.parametrize("version", [(8, 6), V10_3])
def test_softmax_of_a_decoder_is_kept_apart_in_8_6(
    version: tuple[int, int], blip2_bundle: Path
) -> None:
    bundle = Bundle.load(blip2_bundle)
    for name in ("decoder", "qformer"):
        model = ir.load(bundle.graph_file(name))
        pairs = bundle.spec.component(name).state
        lower.lower(model, version, "float32", pairs)
        behind = [
            {use.node.op_type for use in node.outputs[0].uses()}
            for node in model.graph
            if node.op_type == "Softmax"
        ]
        apart = bool(pairs) and version == (8, 6)
        assert behind and behind == [{"Relu" if apart else "MatMul"}] * len(behind)
        assert problems(model, version) == ""
