"""ONNX Runtime on tiny graphs: what is lowered, what is cached, where the state stays."""

from __future__ import annotations

import errno
import os
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from kit.bundles import bundle_of
from kit.graphs import FLOAT, Writer
from onnx_ir.passes.common import ShapeInferencePass

from vlmedge.arrays import Array
from vlmedge.bundle import Bundle, read_manifest
from vlmedge.bundle.writer import stored_files, write_manifest
from vlmedge.cli.info import show_fusions
from vlmedge.errors import BundleError, InputError
from vlmedge.graphs.portable import save_graph
from vlmedge.make.quantize import quantize
from vlmedge.make.recipe import Recipe
from vlmedge.shelves.contracts import Graph
from vlmedge.shelves.engine_store import stored_engines
from vlmedge.shelves.registry import ENGINES
from vlmedge.spec import Component, ModelSpec, TensorSpec
from vlmedge.spec.manifest import FORMAT, CheckpointId, Manifest

ort: Any = import_module(type(ENGINES["ort"]).__module__)
OVERFLOWS = ort._overflows()  # on this processor
Feeds = dict[str, Array]


def network(*, activations: bool, width: int = 256) -> ir.Model:
    """Four linears, two of which share x; one has no bias, one a bias that cannot be folded."""
    made = Writer(("x", FLOAT, ["batch", "tokens", width]))
    x = made.inputs["x"]

    def quantized(value: ir.Value) -> ir.Value:
        return made.rounded(value) if activations else value

    shared = quantized(x)
    first = made.linear(shared, width, 96, bias=True, zero=False)
    second = made.linear(shared, width, 96, bias=False, zero=True)
    hidden = made.add("Tanh", made.add("Add", first, second))
    third = made.linear(quantized(hidden), 96, 48, bias=True, zero=True)
    middle = made.add("Tanh", third)
    fourth = made.linear(quantized(middle), 48, 40, bias=False, zero=False)
    shifted = made.add("Add", fourth, made.constant(np.ones((1, 40), np.float32)))
    return made.model(y=(shifted, FLOAT))


def written(folder: Path, model: ir.Model, component: Component) -> Bundle:
    folder.mkdir(exist_ok=True)
    save_graph(model, folder, component.name)
    manifest = Manifest(
        format=FORMAT,
        vlmedge="0",
        checkpoint=CheckpointId("tiny", None, ""),
        scheme="int8",
        spec=ModelSpec("tiny", (component,), {}),
        kept=(),
        files=stored_files(folder),
        provenance={},
    )
    return write_manifest(folder, manifest)


def encoder(width: int = 256) -> Component:
    x = TensorSpec("x", "float32", ("batch", "tokens", width))
    return Component("encoder", (x,), (TensorSpec("y", "float32", ("batch", "tokens", 40)),))


def tiny(folder: Path, *, activations: bool = True, width: int = 256) -> Bundle:
    return written(folder, network(activations=activations, width=width), encoder(width))


def engine_files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("engines/ort-*/*"))


def lowered(folder: Path) -> Counter[str]:
    (file,) = folder.glob("engines/ort-*/*.onnx")
    return Counter(node.op_type for node in ir.load(file).graph)


def stored(folder: Path) -> dict[str, int]:
    """Count the weights of an engine by their kind."""
    (file,) = folder.glob("engines/ort-*/*.onnx")
    initializers = ir.load(file).graph.initializers.values()
    kinds = [v.const_value.dtype.name for v in initializers if v.const_value.size > 1]
    return {kind: kinds.count(kind) for kind in ("INT8", "UINT8")}


def feed(width: int = 256) -> dict[str, Array]:
    x = np.random.default_rng(1).standard_normal((2, 5, width)).astype(np.float32)
    return {"x": x.clip(-4, 4)}


def portable(bundle: Bundle, feeds: dict[str, Array]) -> Array:
    """Run the portable graph as it is, nothing fused."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(bundle.graph_file("encoder")), options)
    result: Array = session.run(None, feeds)[0]
    return result


def open_encoder(bundle: Bundle) -> Graph:
    return ENGINES["ort"].open(bundle, "encoder")


@pytest.mark.parametrize("activations", [True, False])
@pytest.mark.parametrize("width", [256, 100, 48, 5])
def test_lowered_equals_portable(tmp_path: Path, activations: bool, width: int) -> None:
    bundle, feeds = tiny(tmp_path, activations=activations, width=width), feed(width)
    expected, found = portable(bundle, feeds), open_encoder(bundle).run(feeds)["y"]
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected - expected.mean())
    assert found.shape == expected.shape
    assert error < 0.02  # two roundings to 8 bits, of four layers


# two linears share x, which is quantized once for both
INTEGER = {"DynamicQuantizeLinear": 1, "MatMulIntegerToFloat": 2, "DynamicQuantizeMatMul": 2}


@pytest.mark.parametrize(("activations", "kernels"), [(True, INTEGER), (False, {"MatMulNBits": 4})])
def test_every_quantized_matmul_is_lowered(
    tmp_path: Path, activations: bool, kernels: dict[str, int]
) -> None:
    open_encoder(tiny(tmp_path, activations=activations))
    # of the Adds stay the sum of two linears, and the bias that is no vector
    assert lowered(tmp_path) == {**kernels, "Add": 2, "Tanh": 2}


def test_dynamic_engine_points_to_the_weights_of_the_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "_overflows", lambda: False)
    open_encoder(tiny(tmp_path))
    assert engine_files(tmp_path) == ["encoder.onnx", "engine.json"]


def test_float_graph_has_no_engine(tmp_path: Path) -> None:
    made = Writer(("x", FLOAT, ["batch", "tokens", 256]))
    weight = made.constant(made.random.standard_normal((256, 40)).astype(np.float32))
    model = made.model(y=(made.add("MatMul", made.inputs["x"], weight), FLOAT))
    bundle = written(tmp_path, model, encoder())
    found = open_encoder(bundle).run(feed())["y"]
    np.testing.assert_allclose(found, portable(bundle, feed()), rtol=1e-4, atol=1e-4)
    assert not (tmp_path / "engines").exists()


def test_memory_of_a_run_is_not_there_twice(clip_bundle: Path) -> None:
    graph: Any = ENGINES["ort"].open(Bundle.load(clip_bundle), "vision_encoder")
    assert graph._session.get_session_options().enable_mem_pattern is False


@pytest.mark.parametrize("activations", [True, False])
def test_engine_is_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, activations: bool
) -> None:
    bundle = tiny(tmp_path, activations=activations)
    first = open_encoder(bundle).run(feed())["y"]
    monkeypatch.setattr(ort, "make", forbidden)
    np.testing.assert_array_equal(open_encoder(bundle).run(feed())["y"], first)


def forbidden(*args: object) -> None:
    raise AssertionError("it was built again")


@pytest.mark.parametrize("activations", [True, False])
def test_cached_engine_opens_without_onnx_ir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, activations: bool
) -> None:
    bundle = tiny(tmp_path, activations=activations)
    open_encoder(bundle)
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    assert open_encoder(bundle).run(feed())["y"].shape == (2, 5, 40)


def test_cpu_without_vnni_multiplies_in_uint8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tiny(tmp_path)
    expected = portable(bundle, feed())
    monkeypatch.setattr(ort, "_overflows", lambda: True)
    found = open_encoder(bundle).run(feed())["y"]
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)
    assert lowered(tmp_path) == {**INTEGER, "Add": 2, "Tanh": 2}
    assert stored(tmp_path) == {"INT8": 0, "UINT8": 4}
    assert engine_files(tmp_path) == ["encoder.bin", "encoder.onnx", "engine.json"]


def test_engine_is_not_opened_as_that_of_the_other_sort_of_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tiny(tmp_path)
    for overflows, kinds in ((True, {"INT8": 0, "UINT8": 4}), (False, {"INT8": 4, "UINT8": 0})):
        monkeypatch.setattr(ort, "_overflows", lambda told=overflows: told)
        open_encoder(bundle)
        assert stored(tmp_path) == kinds


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("overflows", [True, False])
def test_weight_of_two_linears_is_stored_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overflows: bool, together: bool
) -> None:
    """Both kernels have it: those that quantize x, and those that share what is quantized."""
    monkeypatch.setattr(ort, "_overflows", lambda: overflows)
    made = Writer(("x", FLOAT, ["batch", "tokens", 256]))
    x = made.inputs["x"]
    first = made.linear(made.rounded(x), 256, 40, bias=True, zero=False)
    x = x if together else made.add("Neg", x)
    scale, weight = made.constants[3], made.constants[2]
    again = made.add("DequantizeLinear", weight, scale, axis=1)
    second = made.add("MatMul", made.rounded(x), again)
    bundle = written(tmp_path, made.model(y=(made.add("Add", first, second), FLOAT)), encoder())
    found, expected = open_encoder(bundle).run(feed())["y"], portable(bundle, feed())
    assert stored(tmp_path) == ({"INT8": 0, "UINT8": 1} if overflows else {"INT8": 1, "UINT8": 0})
    if not overflows and OVERFLOWS:
        return  # its sums are wrong there, which is why it is not what such a processor gets
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)


@pytest.mark.parametrize("activations", [True, False])
def test_cached_engine_moves_with_its_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, activations: bool
) -> None:
    first = open_encoder(tiny(tmp_path / "a", activations=activations)).run(feed())["y"]
    (tmp_path / "a").rename(tmp_path / "b")
    monkeypatch.setattr(ort, "make", forbidden)
    moved = Bundle.load(tmp_path / "b")
    np.testing.assert_array_equal(open_encoder(moved).run(feed())["y"], first)


def test_changed_weights_make_a_new_engine_and_remove_the_old(tmp_path: Path) -> None:
    open_encoder(tiny(tmp_path, activations=False))
    (before,) = tmp_path.glob("engines/ort-*")
    weights = tmp_path / "graphs/encoder.bin"
    data = bytearray(weights.read_bytes())
    data[:4096] = bytes(4096)
    weights.write_bytes(data)
    manifest = read_manifest(tmp_path)
    bundle = write_manifest(
        tmp_path, msgspec.structs.replace(manifest, files=stored_files(tmp_path))
    )
    found = open_encoder(bundle).run(feed())["y"]
    (after,) = tmp_path.glob("engines/ort-*")
    assert before != after
    expected = portable(bundle, feed())
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)


@pytest.mark.parametrize("broken", ["encoder.onnx", "encoder.bin"])
def test_broken_engine_is_built_again(tmp_path: Path, broken: str) -> None:
    bundle = tiny(tmp_path, activations=False)
    first = open_encoder(bundle).run(feed())["y"]
    (file,) = tmp_path.glob(f"engines/ort-*/{broken}")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    np.testing.assert_array_equal(open_encoder(bundle).run(feed())["y"], first)


@pytest.mark.parametrize("activations", [True, False])
def test_read_only_bundle_has_its_engine_in_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, activations: bool
) -> None:
    bundle = tiny(tmp_path / "bundle", activations=activations)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # chmod does not bind root
    monkeypatch.setenv("VLMEDGE_CACHE", str(tmp_path / "cache"))
    first = open_encoder(bundle).run(feed())["y"]
    assert not (tmp_path / "bundle/engines").exists()
    assert len(list(tmp_path.glob("cache/ort-*/encoder.onnx"))) == 1
    monkeypatch.setattr(ort, "make", forbidden)
    np.testing.assert_array_equal(open_encoder(bundle).run(feed())["y"], first)


def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tiny(tmp_path, activations=False)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(ir, "save", full)
    with pytest.raises(BundleError, match=r"the disk is full .*VLMEDGE_CACHE"):
        open_encoder(bundle)
    assert list((tmp_path / "engines").iterdir()) == []


def test_graph_that_cannot_be_opened_is_refused_in_one_line(tmp_path: Path) -> None:
    bundle = tiny(tmp_path)
    bundle.graph_file("encoder").write_bytes(b"no graph")
    with pytest.raises(BundleError, match=r"encoder\.onnx cannot be opened by ONNX Runtime") as got:
        open_encoder(bundle)
    assert "\n" not in str(got.value)


MASKS: dict[str, list[int | str] | None] = {
    "none": None,
    "square": ["batch", 1, 5, 5],
    "row": ["batch", 1, 1, 5],
    "column": ["batch", 1, 5, 1],
}


def tower(
    *,
    int8: bool,
    mask: str = "none",
    whole: bool = True,
    packed: bool = False,
    divides: bool = False,
) -> ir.Model:
    """One layer of an image tower: attention of 2 heads, then two Linears around a gate.

    Args:
        int8: Its Linears' weights and activations are.
        mask: Of `MASKS`.
        whole: Queries are as they come, not changed after their heads are split.
        packed: One Linear makes queries, keys and values.
        divides: Scores are divided, by 4, where they are multiplied by 1/4 else.
    """
    shape = MASKS[mask]
    masks = [] if shape is None else [("mask", FLOAT, shape)]
    made = Writer(("x", FLOAT, ["batch", 5, 32]), *masks)

    def linear(x: ir.Value, rows: int, columns: int) -> ir.Value:
        if int8:
            return made.linear(x, rows, columns, bias=True, zero=False)
        weight = made.random.standard_normal((rows, columns)) / np.sqrt(rows)
        bias = made.random.standard_normal(columns)
        product = made.add("MatMul", x, made.constant(weight.astype(np.float32)))
        return made.add("Add", product, made.constant(bias.astype(np.float32)))

    def heads(value: ir.Value, *order: int) -> ir.Value:
        split = made.add("Reshape", value, made.constant(np.array([0, 5, 2, 16])))
        return made.add("Transpose", split, perm=list(order))

    quantized = made.rounded if int8 else lambda value: value
    shared = quantized(made.inputs["x"])
    if packed:
        thirds = made.constant(np.array([0, 5, 3, 2, 16]))
        parts = made.add("Reshape", linear(shared, 32, 96), thirds)
        parts = made.add("Transpose", parts, perm=[2, 0, 3, 1, 4])
        query, key, value = (
            made.add("Gather", parts, made.constant(np.array(i)), axis=0) for i in range(3)
        )
        key = made.add("Transpose", key, perm=[0, 1, 3, 2])
    else:
        query, key, value = (
            heads(linear(shared, 32, 32), *order)
            for order in ((0, 2, 1, 3), (0, 2, 3, 1), (0, 2, 1, 3))
        )
    if not whole:
        query = made.add("Tanh", query)
    scores = made.add("MatMul", query, key)
    operator, number = ("Div", 4) if divides else ("Mul", 0.25)
    scores = made.add(operator, scores, made.constant(np.array(number, np.float32)))
    if masks:
        scores = made.add("Add", scores, made.inputs["mask"])
    mixed = made.add("MatMul", made.add("Softmax", scores, axis=-1), value)
    joined = made.add("Transpose", mixed, perm=[0, 2, 1, 3])
    flat = made.add("Reshape", joined, made.constant(np.array([0, 5, 32])))
    hidden = linear(quantized(flat), 32, 64)
    factor = made.constant(np.array(1.702, np.float32))
    gate = made.add("Mul", hidden, made.add("Sigmoid", made.add("Mul", hidden, factor)))
    return ShapeInferencePass()(made.model(y=(linear(quantized(gate), 64, 40), FLOAT))).model


def tower_bundle(folder: Path, model: ir.Model, mask: str = "none") -> tuple[Bundle, Feeds]:
    shape, random = MASKS[mask], np.random.default_rng(2)
    inputs = [TensorSpec("x", "float32", ("batch", 5, 32))]
    feeds = {"x": random.standard_normal((3, 5, 32)).astype(np.float32).clip(-4, 4)}
    if shape is not None:
        inputs.append(TensorSpec("mask", "float32", tuple(shape)))
        seen = random.random([3 if size == "batch" else int(size) for size in shape]) > 0.3
        feeds["mask"] = np.where(seen, 0, np.finfo(np.float32).min).astype(np.float32)
    outputs = (TensorSpec("y", "float32", ("batch", 5, 40)),)
    return written(folder, model, Component("encoder", tuple(inputs), outputs)), feeds


def fusions(graph: Graph) -> dict[str, str]:
    """Return how many of each kind were fused, as `1/1`."""
    found: Any = graph
    return {one["kind"]: f"{one['done']}/{one['total']}" for one in found.fusions}


@pytest.mark.parametrize("int8", [True, False])
def test_queries_keys_and_values_of_one_linear_are_parted_once(tmp_path: Path, int8: bool) -> None:
    bundle, feeds = tower_bundle(tmp_path, tower(int8=int8, packed=True))
    graph, expected = open_encoder(bundle), portable(bundle, feeds)
    assert fusions(graph)["attentions"] == "1/1"
    kernels = lowered(tmp_path)
    assert (kernels["Split"], kernels["Gather"], kernels["Transpose"]) == (1, 0, 0)
    error = np.linalg.norm(graph.run(feeds)["y"] - expected)
    assert error < (0.03 if int8 else 1e-6) * np.linalg.norm(expected)


@pytest.mark.parametrize("mask", ["none", "square", "row"])
@pytest.mark.parametrize("int8", [True, False])
def test_towers_attention_and_gate_are_fused(tmp_path: Path, int8: bool, mask: str) -> None:
    bundle, feeds = tower_bundle(tmp_path, tower(int8=int8, mask=mask), mask)
    graph, expected = open_encoder(bundle), portable(bundle, feeds)
    found = graph.run(feeds)["y"]
    kinds = {"attentions": "1/1", "gates": "1/1"}
    assert fusions(graph) == (kinds if int8 else {**kinds, "float linears": "5/5"})
    kernels = lowered(tmp_path)
    assert kernels["Attention"] == kernels["QuickGelu"] == 1
    assert not kernels.keys() & {"Softmax", "Sigmoid", "MatMul", "Transpose"}
    allowed = 0.03 if int8 else 1e-6
    assert np.linalg.norm(found - expected) < allowed * np.linalg.norm(expected)


@pytest.mark.parametrize("packed", [True, False])
def test_long_rows_go_to_another_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    shelf = type(ENGINES["ort"]).__module__.rpartition(".")[0]
    monkeypatch.setattr(import_module(f"{shelf}._ort.encoder_attention"), "LONG", 5)
    bundle, feeds = tower_bundle(tmp_path, tower(int8=False, packed=packed))
    graph, expected = open_encoder(bundle), portable(bundle, feeds)
    assert lowered(tmp_path)["MultiHeadAttention"] == 1
    np.testing.assert_allclose(graph.run(feeds)["y"], expected, rtol=1e-4, atol=1e-5)


def test_queries_keys_and_values_are_quantized_once(tmp_path: Path) -> None:
    open_encoder(tower_bundle(tmp_path, tower(int8=True))[0])
    kernels = lowered(tmp_path)
    assert (kernels["DynamicQuantizeLinear"], kernels["MatMulIntegerToFloat"]) == (1, 3)
    assert kernels["DynamicQuantizeMatMul"] == 2


def test_scores_may_be_divided_by_a_number(tmp_path: Path) -> None:
    bundle, feeds = tower_bundle(tmp_path, tower(int8=False, divides=True))
    graph, expected = open_encoder(bundle), portable(bundle, feeds)
    assert fusions(graph)["attentions"] == "1/1"
    np.testing.assert_allclose(graph.run(feeds)["y"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("mask", "whole", "reason"),
    [
        ("column", True, "not of its queries and keys"),
        ("none", False, "changed after their heads are split"),
    ],
)
def test_attention_that_is_left_is_named_with_its_reason(
    tmp_path: Path, mask: str, whole: bool, reason: str
) -> None:
    bundle, feeds = tower_bundle(tmp_path, tower(int8=False, mask=mask, whole=whole), mask)
    graph: Any = open_encoder(bundle)
    (attentions,) = [one for one in graph.fusions if one["kind"] == "attentions"]
    assert (attentions["done"], attentions["total"]) == (0, 1)
    assert reason in attentions["left"][0]
    expected = portable(bundle, feeds)
    assert np.allclose(graph.run(feeds)["y"], expected, rtol=1e-4, atol=1e-5)


def test_gate_with_a_second_reader_is_left(tmp_path: Path) -> None:
    made = tower(int8=False)
    (sigmoid,) = [node for node in made.graph if node.op_type == "Sigmoid"]
    hidden = sigmoid.inputs[0].producer().inputs[0]
    last = made.graph.outputs[0].producer()
    sums = ir.Node("", "ReduceSum", [hidden], [ir.AttrInt64("keepdims", 1)], name="sum")
    sums.outputs[0].name = "sum.out"
    spread = ir.Node("", "Add", [last.outputs[0], sums.outputs[0]], name="spread")
    spread.outputs[0].name, spread.outputs[0].type = "y2", ir.TensorType(FLOAT)
    made.graph.extend([sums, spread])
    made.graph.outputs[0] = spread.outputs[0]
    last.outputs[0].name, spread.outputs[0].name = "y1", "y"
    bundle, feeds = tower_bundle(tmp_path, made)
    graph = open_encoder(bundle)
    assert "gates" not in fusions(graph)
    np.testing.assert_allclose(graph.run(feeds)["y"], portable(bundle, feeds), rtol=1e-4)


@pytest.mark.parametrize("change", ["cpu_features", "LOWERING"])
def test_engine_is_made_for_a_processor_and_a_lowering(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    bundle = tiny(tmp_path)
    open_encoder(bundle)
    (before,) = tmp_path.glob("engines/ort-*")
    monkeypatch.setattr(ort, change, 0 if change.isupper() else lambda: ("avx2",))
    open_encoder(bundle)
    (after,) = tmp_path.glob("engines/ort-*")
    assert before != after


def test_engines_tell_what_was_fused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tower(int8=False, whole=False)
    bundle, _ = tower_bundle(tmp_path, model)
    open_encoder(bundle)
    show_fusions(bundle)
    printed = capsys.readouterr().out
    assert "0/1 attentions, 5/5 float linears, 1/1 gates" in printed
    assert "changed after their heads are split" in printed
    (engine,) = stored_engines(tmp_path)
    assert engine.identity["component"] == "encoder"
    assert engine.identity["onnxruntime"] == onnxruntime.__version__
    assert {one["kind"] for one in engine.fusions} == {"attentions", "float linears", "gates"}


HEADS, WIDTH = 2, 4


@pytest.fixture
def decoder(tmp_path: Path) -> Graph:
    """A cache of one tensor; logits are the sum over it."""
    made = Writer(
        ("inputs_embeds", FLOAT, ["batch", "tokens", WIDTH]),
        ("past_key_values.0.key", FLOAT, ["batch", HEADS, "past", WIDTH]),
    )
    axis = made.constant(np.array([1]))
    new = made.add("Unsqueeze", made.inputs["inputs_embeds"], axis)
    both = made.add("Concat", new, new, axis=1)
    present = made.add("Concat", made.inputs["past_key_values.0.key"], both, axis=2)
    logits = made.add("ReduceSum", present, made.constant(np.array([1, 2])), keepdims=0)
    model = made.model(logits=(logits, FLOAT), present__0__key=(present, FLOAT))
    cache = ("batch", HEADS, "past", WIDTH)
    component = Component(
        "decoder",
        (
            TensorSpec("inputs_embeds", "float32", ("batch", "tokens", WIDTH)),
            TensorSpec("past_key_values.0.key", "float32", cache),
        ),
        (
            TensorSpec("logits", "float32", ("batch", WIDTH)),
            TensorSpec("present.0.key", "float32", ("batch", HEADS, "total", WIDTH)),
        ),
        (("present.0.key", "past_key_values.0.key"),),
    )
    return ENGINES["ort"].open(written(tmp_path, model, component), "decoder")


def step(graph: Graph, *rows: float) -> list[float]:
    """Feed one token to each row; return the sums that come back."""
    embeds = np.broadcast_to(np.array(rows, np.float32)[:, None, None], (len(rows), 1, WIDTH))
    logits: list[float] = graph.run({"inputs_embeds": embeds})["logits"][:, 0].tolist()
    return logits


def test_state_is_kept_and_reset(decoder: Graph) -> None:
    assert step(decoder, 1, 10) == [2, 20]
    assert step(decoder, 2, 20) == [6, 60]
    decoder.reset()
    assert step(decoder, 3) == [6]


def test_state_is_no_output(decoder: Graph) -> None:
    feeds = {"inputs_embeds": np.ones((1, 2, WIDTH), np.float32)}
    assert list(decoder.run(feeds)) == ["logits"]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [([0, 1], [2, 20]), ([1, 0], [20, 2]), ([1, 1, 0], [20, 20, 2]), ([1], [20])],
)
def test_state_is_reordered(decoder: Graph, rows: list[int], expected: list[float]) -> None:
    step(decoder, 1, 10)
    decoder.reorder(np.array(rows))
    decoder.reorder(np.arange(len(rows)))
    assert step(decoder, *[0] * len(rows)) == expected


def test_past_can_be_fed(decoder: Graph) -> None:
    step(decoder, 1)
    past = np.full((1, HEADS, 3, WIDTH), 5, np.float32)
    embeds = np.zeros((1, 1, WIDTH), np.float32)
    fed = decoder.run({"inputs_embeds": embeds, "past_key_values.0.key": past})
    assert fed["logits"][0, 0] == 30
    assert step(decoder, 1) == [32]


def test_outputs_survive_the_next_run(decoder: Graph) -> None:
    embeds = np.ones((1, 1, WIDTH), np.float32)
    first = decoder.run({"inputs_embeds": embeds})["logits"]
    copy = first.copy()
    for _ in range(5):
        decoder.run({"inputs_embeds": embeds})
    np.testing.assert_array_equal(first, copy)


def test_closed_graph_does_not_run(decoder: Graph) -> None:
    step(decoder, 1)
    decoder.close()
    decoder.close()
    with pytest.raises(RuntimeError, match="decoder is closed"):
        step(decoder, 1)


def test_cache_in_place_is_the_cache_that_is_copied(blip2_bundle: Path) -> None:
    """Grown past its first buffers, repeated for beams, swapped, and shrunk to fewer rows."""
    bundle = Bundle.load(blip2_bundle)
    spec = bundle.spec.component("decoder")
    ours = ort.ENGINE.open(bundle, "decoder")
    assert type(ours).__name__ == "InPlaceGraph"
    portable = bundle.graph_file("decoder")
    plain = ort.OrtGraph(spec, ort._session(portable, portable.parent))
    rng = np.random.default_rng(0)
    width = int(spec.inputs[0].shape[-1])

    def both(mask: Array, tokens: int) -> None:
        total = mask.shape[1]
        embeds = rng.standard_normal((len(mask), tokens, width)).astype(np.float32)
        feeds = {"inputs_embeds": embeds, "attention_mask": mask}
        a, b = ours.run(feeds)["logits"], plain.run(feeds)["logits"]
        keep = mask[:, total - tokens :] == 1
        np.testing.assert_allclose(a[keep], b[keep], rtol=1e-4, atol=1e-4)

    for _ in range(2):  # the buffers are used again
        for graph in (ours, plain):
            graph.reset()
        mask = np.ones((2, 60), np.int64)
        mask[1, :3] = 0  # a shorter prompt, padded on the left
        both(mask, 60)
        for rows in (
            [0, 0, 0, 1, 1, 1],
            [2, 0, 1, 4, 3, 5],
            [0, 0, 2, 3, 5, 5],
            [3, 1, 2, 0, 4, 5],
            [1, 0],
        ):
            for graph in (ours, plain):
                graph.reorder(np.array(rows))
            mask = np.pad(mask[rows], ((0, 0), (0, 1)), constant_values=1)
            both(mask, 1)
    with pytest.raises(
        InputError, match="the feeds have 1 rows, the cache has 2: call reset first"
    ):
        ours.run(
            {
                "inputs_embeds": np.zeros((1, 1, width), np.float32),
                "attention_mask": np.ones((1, 66), np.int64),
            }
        )


@pytest.fixture(scope="module", params=["llava", "llava-mistral", "llava-qwen2", "smolvlm"])
def turning(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose decoder has rotary positions, and fewer heads of keys than of queries."""
    return bundle_of(request.param, tmp_path_factory.mktemp(request.param) / "bundle")


def decoder_operators(folder: Path) -> tuple[Counter[str], list[ir.Node]]:
    """Count the operators of the lowered decoder; return its attentions too."""
    (file,) = folder.glob("engines/ort-*/decoder.onnx")
    nodes = list(ir.load(file).graph)
    return Counter(n.op_type for n in nodes), [n for n in nodes if n.op_type == ort.KERNEL]


def test_decoder_with_rotary_is_one_kernel_a_layer(turning: Path) -> None:
    bundle = Bundle.load(turning)
    spec = bundle.spec.component("decoder")
    layers = len(spec.state) // 2
    ours = ort.ENGINE.open(bundle, "decoder")
    operators, attentions = decoder_operators(turning)
    assert len(attentions) == layers
    turns = int(spec.inputs[-1].shape[-1]) % 16 == 0  # else the graph turns, and the kernel not
    assert all(n.attributes.get_int("do_rotary", 0) == turns for n in attentions)
    assert operators["SimplifiedLayerNormalization"] == 2 * layers + 1
    assert operators["Softmax"] == operators["ReduceMean"] == 0
    assert operators["Neg"] == (0 if turns else 2 * layers)
    portable = bundle.graph_file("decoder")
    plain = ort.OrtGraph(spec, ort._session(portable, portable.parent))
    rng = np.random.default_rng(0)
    mask = np.ones((2, 20), np.int64)
    mask[1, :7] = 0  # a row of its own length, whose positions the kernel counts from elsewhere
    for tokens in (20, 1, 1):
        if tokens == 1:
            mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
        embeds = rng.standard_normal((2, tokens, int(spec.inputs[0].shape[-1])))
        feeds = {"inputs_embeds": embeds.astype(np.float32), "attention_mask": mask}
        found, expected = (graph.run(feeds)["logits"] for graph in (ours, plain))
        keep = mask[:, -tokens:] == 1
        np.testing.assert_allclose(found[keep], expected[keep], rtol=1e-4, atol=1e-4)
    if turns:
        mask[0, 3] = 0
        mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
        with pytest.raises(InputError, match="decoder: attention_mask has a gap"):
            ours.run({**feeds, "attention_mask": mask})


def test_heads_with_masks_of_their_own_are_one_kernel_a_layer(tmp_path: Path) -> None:
    """MPT's fade with distance, each at its slope."""
    path = bundle_of("openflamingo-mpt", tmp_path / "bundle")
    bundle = Bundle.load(path)
    spec = bundle.spec.component("decoder")
    ours = ort.ENGINE.open(bundle, "decoder")
    _, attentions = decoder_operators(path)
    assert len(attentions) == len(spec.state) // 2
    portable = bundle.graph_file("decoder")
    plain = ort.OrtGraph(spec, ort._session(portable, portable.parent))
    rng = np.random.default_rng(0)
    widths = {t.name: int(t.shape[-1]) for t in spec.inputs if isinstance(t.shape[-1], int)}
    media = rng.standard_normal((2, 4, widths["media"])).astype(np.float32)
    mask = np.ones((2, 20), np.int64)
    mask[1, :7] = 0
    for tokens in (20, 1, 1):
        if tokens == 1:
            mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
        embeds = rng.standard_normal((2, tokens, widths["inputs_embeds"])).astype(np.float32)
        feeds = {
            "inputs_embeds": embeds,
            "attention_mask": mask,
            "media_index": np.ones((2, tokens), np.int64),
            "media": media,
        }
        found, expected = (graph.run(feeds)["logits"] for graph in (ours, plain))
        keep = mask[:, -tokens:] == 1
        np.testing.assert_allclose(found[keep], expected[keep], rtol=1e-4, atol=1e-5)


def test_linears_that_share_x_multiply_once(turning: Path, tmp_path: Path) -> None:
    small = quantize(turning, Recipe("int4", keep_slower=True), tmp_path / "int4", check=False)
    spec = small.spec.component("decoder")
    layers = len(spec.state) // 2
    ort.ENGINE.open(small, "decoder")
    operators, attentions = decoder_operators(small.path)
    assert operators["MatMulNBits"] == 4 * layers + 1  # qkv, out, gate and up, down; the head
    turns = attentions[0].attributes.get_int("do_rotary", 0)
    # of gate and up; of q, k and v only where the graph turns, else the kernel takes them as one
    assert operators["Split"] == (layers if turns else 2 * layers)
    assert all((n.inputs[1] is None) == bool(turns) for n in attentions)
