"""The schemes: what they round, what they leave, and what they are for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from kit.bundles import bundle_of, exported
from kit.shelf import module
from kit.tiny import kinds, tiny
from PIL import Image
from safetensors.numpy import load_file, save_file

import vlmedge
from vlmedge.bundle import Bundle, graph_path
from vlmedge.checkpoints.scenes import draw_scene
from vlmedge.errors import BundleError, CheckpointError, InputError, UnknownNameError
from vlmedge.graphs.portable import load_graph
from vlmedge.make.export import export
from vlmedge.make.quantize import quantize
from vlmedge.make.recipe import Recipe, read_recipe
from vlmedge.parity.samples import calibration_folder
from vlmedge.shelves.contracts import Stats
from vlmedge.shelves.registry import SCHEMES
from vlmedge.spec import Component, TensorSpec


def operators(bundle: Bundle, component: str) -> list[str]:
    return [node.op_type for node in load_graph(bundle.path, component).graph]


def linear(weight: np.ndarray, *, state: bool = False) -> tuple[Component, ir.Model]:
    """Make x -> MatMul(weight) -> y -> Relu, so that the product is no output."""
    rows, columns = weight.shape
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", rows]))
    w = ir.Value(name="w", const_value=ir.tensor(weight.astype(np.float32), name="w"))
    w.type, w.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(list(weight.shape))
    product = ir.Node("", "MatMul", [x, w], name="product")
    last = ir.Node("", "Relu", [product.outputs[0]], name="last")
    for node, name in ((product, "z"), (last, "y")):
        node.outputs[0].name = name
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = ir.Shape(["batch", columns])
    graph = ir.Graph(
        [x], [last.outputs[0]], nodes=[product, last], initializers=[w], opset_imports={"": 20}
    )
    component = Component(
        "part",
        inputs=(TensorSpec("x", "float32", ("batch", rows)),),
        outputs=(TensorSpec("y", "float32", ("batch", columns)),),
        state=(("y", "x"),) if state else (),
    )
    return component, ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])
def test_weights_come_back_within_half_a_step(scheme: str) -> None:
    weight = np.random.default_rng(0).standard_normal((256, 24)).astype(np.float32)
    weight[:, 3] = 0
    component, model = linear(weight, state=True)
    assert SCHEMES[scheme].rewrite(component, model, {}) == []
    graph = model.graph
    restored = next(node for node in graph if node.op_type == "DequantizeLinear")
    values, scale = (v.const_value.numpy().astype(np.float32) for v in restored.inputs[:2])
    block = restored.attributes.get_int("block_size", 0)
    steps = np.repeat(scale, block, axis=0) if block else scale
    # E4M3 has 3 bits of mantissa; int4's ends may be clipped for finer steps within
    room = np.maximum(np.abs(weight) / 16, steps) if scheme == "fp8" else steps / 2 * 1.0001
    error = np.abs(values * steps - weight)
    inside = np.abs(weight) <= 7.5 * steps if scheme == "int4" else np.ones(weight.shape, bool)
    assert (error <= room)[inside].all()
    assert np.isfinite(steps).all()
    assert (values[:, 3] == 0).all()


def test_int4_takes_the_widest_block_that_divides() -> None:
    for rows, block in ((256, 128), (192, 64), (96, 32)):
        component, model = linear(np.ones((rows, 8), np.float32), state=True)
        model.graph.outputs[0].name = "other"
        SCHEMES["int4"].rewrite(component, model, {})
        node = next(n for n in model.graph if n.op_type == "DequantizeLinear")
        assert node.attributes.get_int("block_size", 0) == block
        assert model.opset_imports[""] == 21
    component, model = linear(np.ones((40, 8), np.float32), state=True)
    SCHEMES["int4"].rewrite(component, model, {})
    node = next(n for n in model.graph if n.op_type == "DequantizeLinear")
    assert node.inputs[0].dtype == ir.DataType.INT8


def test_options_choose_the_numbers_of_int4() -> None:
    """Of the weight that gives the logits, and of blocks."""

    def rounded(**options: object) -> ir.Node:
        component, model = linear(np.ones((256, 8), np.float32), state=True)
        model.graph.outputs[0] = model.graph.node("product").outputs[0]
        Recipe("int4", options=options).chosen().rewrite(component, model, {})
        return next(n for n in model.graph if n.op_type == "DequantizeLinear")

    assert rounded(awq=False).inputs[0].dtype == ir.DataType.INT8
    node = rounded(vocabulary="int4", blocks=[64])
    assert node.inputs[0].dtype == ir.DataType.INT4
    assert node.attributes.get_int("block_size", 0) == 64


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("int8", {"awq": False}, "scheme int8 has no options"),
        ("int4", {"block": [32]}, "options of int4: .*unknown field `block`"),
        ("int4", {"blocks": [48]}, r"options of int4: Invalid enum value 48 - at `\$.blocks"),
        ("int4", {"blocks": []}, "options of int4: .*length >= 1"),
    ],
)
def test_options_that_a_scheme_lacks_are_refused_before_any_work(
    tmp_path: Path, scheme: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        export("no such checkpoint", tmp_path / "b", Recipe(scheme, options=options))
    assert not (tmp_path / "b").exists()


def test_int4_weighs_the_channels_that_are_strong() -> None:
    """With one loud channel its rows come closer than without knowing of it."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((128, 64)).astype(np.float32)
    rows = rng.standard_normal((64, 128)).astype(np.float16)
    rows[:, 5] *= 50

    def error(stats: dict[str, Stats]) -> float:
        component, model = linear(weight, state=True)
        SCHEMES["int4"].rewrite(component, model, stats)
        node = next(n for n in model.graph if n.op_type == "DequantizeLinear")
        values, scale = (v.const_value.numpy().astype(np.float32) for v in node.inputs[:2])
        x = rows.astype(np.float32)
        return float(np.linalg.norm(x @ (values * np.repeat(scale, 128, axis=0) - weight)))

    seen = Stats(1.0, 1.0, np.abs(rows).max(0).astype(np.float32), rows)
    assert error({"x": seen}) < 0.9 * error({})


def test_activations_that_reach_too_far_stay_float() -> None:
    component, model = linear(np.eye(8, dtype=np.float32))
    rows = np.ones((4, 8), np.float16)
    kept = SCHEMES["int8"].rewrite(component, model, {"x": Stats(500.0, 1.0, rows[0], rows)})
    assert "500 times their rms" in kept[0].reason
    assert "QuantizeLinear" not in [node.op_type for node in model.graph]


def test_sum_of_squares_that_float16_cannot_hold_is_added_in_float32() -> None:
    """No tensor of the norm is near 65504, but the sum behind the mean is: 128 * 530."""
    float_ = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", type=float_, shape=ir.Shape(["batch", 128]))
    arrays = {
        "axes": np.array([-1], np.int64),
        "two": np.array(2, np.float32),
        "small": np.array(1e-5, np.float32),
        "weight": np.linspace(0.5, 2, 128, dtype=np.float32),
    }
    constants = []
    for name, array in arrays.items():
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=tensor.shape, const_value=tensor)
        value.type = ir.TensorType(tensor.dtype)
        constants.append(value)
    axes, two, small, weight = constants
    nodes: list[ir.Node] = []

    def add(name: str, op: str, *inputs: ir.Value) -> ir.Value:
        nodes.append(ir.Node("", op, inputs, name=name))
        out = nodes[-1].outputs[0]
        out.name, out.type, out.shape = name, float_, ir.Shape(["batch", 128])
        return out

    mean = add("mean", "ReduceMean", add("square", "Pow", x, two), axes)
    root = add("factor", "Reciprocal", add("root", "Sqrt", add("sum", "Add", mean, small)))
    y = add("y", "Mul", weight, add("scaled", "Mul", x, root))
    for node in nodes[1:5]:
        node.outputs[0].shape = ir.Shape(["batch", 1])
    graph = ir.Graph([x], [y], nodes=nodes, initializers=constants, opset_imports={"": 20})
    model = ir.Model(graph, ir_version=10)
    rows = np.random.default_rng(0).standard_normal((4, 128)).astype(np.float32)
    rows *= np.float32(23) / np.sqrt((rows**2).mean(1, keepdims=True))
    seen = {"square": float((rows**2).max()), "mean": 530.0, "sum": 530.0, "root": 23.1}
    spec = TensorSpec("x", "float32", ("batch", 128))
    component = Component("norm", inputs=(spec,), outputs=(TensorSpec("y", "float32", spec.shape),))
    stats = {name: Stats(amax, 1.0) for name, amax in seen.items()}
    kept = SCHEMES["fp16"].rewrite(component, model, stats)
    assert [layer.layer for layer in kept] == ["mean"]
    assert "values reach 6.78e+04" in kept[0].reason
    expected = rows * np.linspace(0.5, 2, 128) / np.sqrt((rows**2).mean(1, keepdims=True) + 1e-5)
    norms = module("runtimes", "_ort.rms_norm")
    assert norms.fuse_norms(model.graph) == 1
    session = onnxruntime.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    (found,) = session.run(None, {"x": rows})
    np.testing.assert_allclose(found, expected, rtol=4e-3, atol=4e-3)


def test_float16_keeps_what_overflows_in_float32() -> None:
    component, model = linear(np.eye(8, dtype=np.float32))
    stats = {"x": Stats(1.0, 0.0), "z": Stats(40_000.0, 0.0), "y": Stats(1.0, 0.0)}
    kept = SCHEMES["fp16"].rewrite(component, model, stats)
    assert {layer.layer for layer in kept} == {"product", "last"}
    assert "values reach 4e+04" in kept[0].reason
    component, model = linear(np.full((8, 8), -3e38, np.float32))
    stats = dict.fromkeys("xzy", Stats(1.0, 0.0))
    assert SCHEMES["fp16"].rewrite(component, model, stats) == []
    twin = model.graph.initializers["w.float16"].const_value.numpy()
    assert twin.dtype == np.float16
    assert np.isfinite(twin).all()
    assert model.graph.outputs[0].dtype == ir.DataType.FLOAT


def test_float16_changes_no_number_that_it_does_not_have() -> None:
    """A factor keeps its node in float32, a weight is refused; what fits is not rounded down."""
    component, model = linear(np.full((8, 8), 4e4, np.float32))
    first = next(iter(model.graph))
    factor = ir.Value(name="factor", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([]))
    factor.const_value = ir.tensor(np.array(1e6, np.float32))
    model.graph.register_initializer(factor)
    scaled = ir.Node("", "Mul", [first.outputs[0], factor], name="scaled")
    out = scaled.outputs[0]
    out.name, out.type, out.shape = "scaled", first.outputs[0].type, first.outputs[0].shape
    first.outputs[0].replace_all_uses_with(out)
    scaled.replace_input_with(0, first.outputs[0])
    model.graph.insert_after(first, scaled)
    stats = dict.fromkeys("xzy", Stats(1.0, 0.0))
    kept = SCHEMES["fp16"].rewrite(component, model, stats)
    assert [(layer.layer, layer.reason) for layer in kept] == [
        ("scaled", "values reach 1e+06, and float16 ends at 65504")
    ]
    assert "factor.float16" not in model.graph.initializers
    twin = model.graph.initializers["w.float16"].const_value.numpy()
    assert (twin == np.float16(4e4)).all()
    component, model = linear(np.full((8, 8), 1e5, np.float32))
    SCHEMES["fp16"].rewrite(component, model, dict.fromkeys("xzy", Stats(1.0, 0.0)))
    with pytest.raises(CheckpointError, match=r"w reaches 1e\+05, .*: leave it in float32"):
        model.graph.initializers["w.float16"].const_value.numpy()


def test_int4_is_lowered_to_the_kernel_with_the_same_numbers(
    blip2_bundle: Path, tmp_path: Path
) -> None:
    """ONNX Runtime's own reading of the portable graph is the other side."""
    import onnxruntime as ort

    bundle = quantize(blip2_bundle, Recipe("int4", keep_slower=True), tmp_path / "b", check=False)
    assert "MatMulNBits" not in operators(bundle, "decoder")
    spec = bundle.spec.component("decoder")
    width = spec.inputs[0].shape[-1]
    rng = np.random.default_rng(0)
    feeds = {
        "inputs_embeds": rng.standard_normal((2, 5, width)).astype(np.float32),
        "attention_mask": np.ones((2, 5), np.int64),
    }
    model = vlmedge.load(bundle.path)
    ours = model.graphs["decoder"].run(feeds)["logits"]
    lowered = next(bundle.path.glob("engines/ort-*/decoder.onnx"))
    kinds = [node.op_type for node in ir.load(lowered).graph]
    assert kinds.count("MatMulNBits") >= 17
    options = ort.SessionOptions()
    options.add_session_config_entry("session.enable_dq_matmulnbits_fusion", "0")
    plain = ort.InferenceSession(bundle.path / graph_path("decoder"), options)
    empty = {
        i.name: np.zeros([2, i.shape[1], 0, i.shape[3]], np.float32)
        for i in plain.get_inputs()
        if i.name.startswith("past")
    }
    theirs = plain.run(["logits"], {**feeds, **empty})[0]
    # the kernel rounds x to 8 bits a block
    assert np.linalg.norm(ours - theirs) < 0.03 * np.linalg.norm(theirs)


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a random CLIP the loud channels of real ViTs: some gains of its norms are 60 times."""
    folder = tmp_path_factory.mktemp("outliers") / "clip"
    tiny("clip", folder)
    weights = load_file(folder / "model.safetensors")
    for name, value in weights.items():
        if "layer_norm" in name and name.endswith("weight") and "layers" in name:
            value[3] *= 60
            value[11] *= 40
        elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "fc1.weight")):
            value[:, 3] /= 60  # so that the model is the same function as before
            value[:, 11] /= 40
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_smoothing_saves_a_model_with_outliers(outliers: Path, tmp_path: Path) -> None:
    """Per-tensor rounding fails on it; what was moved into the weights passes."""
    float32 = exported(outliers, tmp_path / "float32")
    recipe = Recipe("int8", keep_slower=True)
    bundle = quantize(float32, recipe, tmp_path / "smooth", against=str(outliers))
    parity = bundle.manifest.parity
    assert parity is not None
    smoothed = {result.component: result.cosine for result in parity.components}
    assert all(result.passed for result in parity.components), parity.components

    static = module("quantize", "_static")
    before = static.smooth
    static.smooth = lambda *args: None
    try:
        plain = quantize(float32, recipe, tmp_path / "plain", against=str(outliers))
    finally:
        static.smooth = before
    parity = plain.manifest.parity
    assert parity is not None
    rough = {result.component: result.cosine for result in parity.components}
    assert not any(result.passed for result in parity.components), parity.components
    assert 1 - rough["vision_encoder"] > 3 * (1 - smoothed["vision_encoder"])


def test_layers_are_kept_by_pattern(blip2_bundle: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text('{"scheme": "int4", "keep": {"*fc2*": "int8", "*layers.0.fc1*": "float32"}}')
    asked = msgspec.structs.replace(read_recipe(recipe), keep_slower=True)
    bundle = quantize(blip2_bundle, asked, tmp_path / "b", check=False)
    kept = [layer for layer in bundle.manifest.kept if layer.component == "decoder"]
    assert sum(layer.reason == "int8 instead" for layer in kept) == 4
    assert sum(layer.reason == "float32 instead" for layer in kept) == 1
    graph = load_graph(bundle.path, "decoder").graph
    names = set(graph.initializers)
    assert sum("fc2" in name and name.endswith(".int8") for name in names) == 4
    assert not any("layers.0.fc1" in name and name.endswith(".int4") for name in names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no recipe"),
        ('{"scheme": "int9"}', "no scheme 'int9'"),
        ('{"scheme": "int8", "keep": {"*": "int3"}}', "asks for 'int3': choose from"),
        ('{"scheme": "int8", "speed": 9}', "unknown field `speed`"),
        ('{"scheme": "int8", "target_drop": -1}', "must be finite and at least 0"),
        ('{"scheme": "int8", "budget_mib": 0}', "must be finite and above 0"),
        ('{"scheme": "int8", "budget_mib": 1, "target_drop": 1}', "give one of them"),
        ('{"options": {"awq": false}}', "scheme float32 has no options"),
    ],
)
def test_bad_recipes_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(text)
    with pytest.raises((InputError, UnknownNameError), match=message):
        read_recipe(file)
    with pytest.raises(InputError, match="No such file"):
        read_recipe(tmp_path / "none.json")


@pytest.mark.parametrize("figure", [float("nan"), float("inf"), -1.0])
def test_figures_that_are_none_are_refused(figure: float) -> None:
    with pytest.raises(InputError, match="target_drop is .*: it must be finite and at least 0"):
        Recipe("int8", target_drop=figure)
    with pytest.raises(InputError, match="budget_mib is .*: it must be finite and above 0"):
        Recipe("int8", budget_mib=figure)


def test_options_of_zero_are_given(vlmedge, clip_bundle: Path, tmp_path: Path) -> None:
    ran = vlmedge("quantize", clip_bundle, "--int8", "--budget-mib", 0, "--out", tmp_path / "b")
    assert ran.code == 1 and "--budget-mib is 0: it must be finite and above 0" in ran.err
    ran = vlmedge(
        "quantize", clip_bundle, "--int8", "--target-drop", 0, "--no-check", "--out", tmp_path / "b"
    )
    assert (
        ran.code == 1
        and "--target-drop is measured by comparing with PyTorch: leave out --no-check" in ran.err
    )
    assert not (tmp_path / "b").exists()


def test_pattern_that_catches_nothing_is_refused(clip_bundle: Path, tmp_path: Path) -> None:
    recipe = Recipe("int8", keep={"*fc1*": "float32", "*fc3*": "float32"}, keep_slower=True)
    with pytest.raises(
        InputError, match=r"keep '\*fc3\*' matches no layer: layers are named like .*weight"
    ):
        quantize(clip_bundle, recipe, tmp_path / "b", check=False)
    assert not (tmp_path / "b").exists()


def test_budget_is_filled_with_the_most_harmful_layers(blip2_bundle: Path, tmp_path: Path) -> None:
    def graphs_mib(bundle: Bundle) -> float:
        return sum(f.stat().st_size for f in (bundle.path / "graphs").iterdir()) / 2**20

    smallest = quantize(
        blip2_bundle, Recipe("int4", keep_slower=True), tmp_path / "int4", check=False
    )
    budget = graphs_mib(smallest) + 0.15
    recipe = Recipe("int4", budget_mib=budget, keep_slower=True)
    mixed = quantize(blip2_bundle, recipe, tmp_path / "mixed", check=False)
    back = [layer for layer in mixed.manifest.kept if "instead: alone" in layer.reason]
    assert back
    assert graphs_mib(smallest) < graphs_mib(mixed) <= budget
    report = json.loads((mixed.path / "reports" / "quantize.json").read_text())
    assert report["recipe"]["budget_mib"] == budget
    with pytest.raises(
        BundleError,
        match=r"budget_mib is .*, and the smallest mix of int4 takes .*: give at least that",
    ):
        quantize(
            blip2_bundle,
            Recipe("int4", budget_mib=0.5, keep_slower=True),
            tmp_path / "no",
            check=False,
        )
    assert not (tmp_path / "no").exists()


def test_target_drop_gives_layers_back_or_refuses(clip_bundle: Path, tmp_path: Path) -> None:
    """No mix of a random CLIP meets 0 points and every cosine but one that is float32 again."""
    recipe = Recipe("int8", target_drop=0.5, keep_slower=True)
    bundle = quantize(clip_bundle, recipe, tmp_path / "clip")
    assert bundle.verified
    report = json.loads((bundle.path / "reports" / "quantize.json").read_text())
    assert report["components"]["vision_encoder"]["harms"]


def test_a_target_out_of_reach_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("vlmedge.make.mixed_precision.drop", lambda parity: 9.0)
    monkeypatch.setattr("vlmedge.make.write.drop", lambda parity: 9.0)
    monkeypatch.setattr("vlmedge.make.check.LABELLED_SAMPLES", 16)  # the drop is given anyway
    recipe = Recipe("int8", target_drop=1.0, keep_slower=True)
    with pytest.raises(
        BundleError, match=r"best mix of int8 loses 9.00 points, and target_drop is 1: .*allow"
    ):
        export("tiny-clip", tmp_path / "clip", recipe)
    assert not (tmp_path / "clip").exists()
    bundle = export("tiny-clip", tmp_path / "clip", recipe, allow_unverified=True)
    assert any("float32 instead" in layer.reason for layer in bundle.manifest.kept)


def test_what_became_slower_stays_float(
    monkeypatch: pytest.MonkeyPatch, clip_bundle: Path, tmp_path: Path
) -> None:
    from vlmedge.make.calibrate import Calibration

    monkeypatch.setattr(Calibration, "race", lambda *_: (1.0, 3.0))
    bundle = quantize(clip_bundle, Recipe("int8"), tmp_path / "b", check=False)
    assert {layer.reason for layer in bundle.manifest.kept} == {
        "3.0 times slower here: 3.00 ms, 1.00 in float32"
    }
    assert "DequantizeLinear" not in operators(bundle, "vision_encoder")
    kept = quantize(clip_bundle, Recipe("int8", keep_slower=True), tmp_path / "c", check=False)
    assert "DequantizeLinear" in operators(kept, "vision_encoder")


def test_every_component_is_timed(clip_bundle: Path, tmp_path: Path) -> None:
    bundle = quantize(clip_bundle, Recipe("int8"), tmp_path / "b", check=False)
    report = json.loads((bundle.path / "reports" / "quantize.json").read_text())
    for found in report["components"].values():
        assert found["float32_ms"] > 0
        assert found["int8_ms"] > 0


@pytest.mark.parametrize("kind", kinds("llava", "blip2-flan-t5", "flamingo"))
def test_a_huge_decoder_is_watched_in_pieces(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What the prompts make of a decoder is the same, whole and in pieces."""
    from vlmedge.make import calibrate as calibrating

    bundle_of(kind, tmp_path / "float32")
    monkeypatch.setattr(calibrating, "NEW_TOKENS", 1)
    found = []
    observe = calibrating.Calibration.observe
    pieces = []
    write = calibrating.Calibration._write

    def noted(self: Any, component: Component, *given: Any) -> Any:
        found[-1] |= {component.name: observe(self, component, *given)}
        return found[-1][component.name]

    def counted(self: Any, component: Component, *given: Any) -> Any:
        pieces.append(component.name)
        return write(self, component, *given)

    monkeypatch.setattr(calibrating.Calibration, "observe", noted)
    monkeypatch.setattr(calibrating.Calibration, "_write", counted)
    for huge_bytes in (calibrating.HUGE_BYTES, 0):
        monkeypatch.setattr(calibrating, "HUGE_BYTES", huge_bytes)
        monkeypatch.setattr(calibrating, "PIECE_BYTES", 4096)
        found.append({})
        pieces.clear()
        recipe = Recipe("int4", keep_slower=True)
        quantize(tmp_path / "float32", recipe, tmp_path / f"{huge_bytes}", check=False)
    assert pieces.count("decoder") > 5
    whole, cut = (part["decoder"] for part in found)
    assert len(whole) > 5
    assert whole.keys() == cut.keys()
    for name, seen in whole.items():
        np.testing.assert_allclose(cut[name].rms, seen.rms, rtol=1e-4)
        np.testing.assert_allclose(cut[name].channels, seen.channels, rtol=1e-3, atol=1e-5)
        rows = (np.asarray(part.rows, np.float32) for part in (cut[name], seen))
        np.testing.assert_allclose(*rows, rtol=2e-3, atol=1e-3)


@pytest.fixture
def pictures_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(6):
        Image.fromarray(draw_scene(i, "calibration").image).save(folder / f"{i}.png")
    return folder


def test_picture_that_cannot_calibrate_is_named(clip_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (2000, 1)).save(tmp_path / "pictures" / "thin.png")
    with pytest.raises(InputError, match=r"pictures/thin\.png: image of 2000 x 1 pixels"):
        quantize(clip_bundle, "int8", tmp_path / "b", calibrate=tmp_path / "pictures", check=False)
    assert not (tmp_path / "b").exists()


def test_calibration_folder_is_used(
    pictures_folder: Path, blip2_bundle: Path, tmp_path: Path
) -> None:
    (pictures_folder / "broken.png").write_bytes(b"no picture")
    lines = [json.dumps({"image": f"{i}.png", "caption": "a red star"}) for i in range(3)]
    (pictures_folder / "captions.jsonl").write_text("\n".join(lines))
    notes: list[str] = []
    samples = calibration_folder(pictures_folder, notes.append)
    assert len(samples.images) == 6
    assert samples.captions == ("a red star",) * 3 + ("",) * 3
    assert "1 of 7 pictures cannot be read" in notes[0]
    assert "16 or more are advised" in notes[1]
    bundle = quantize(
        blip2_bundle,
        Recipe("int4", keep_slower=True),
        tmp_path / "b",
        calibrate=pictures_folder,
        check=False,
    )
    assert bundle.manifest.provenance["calibration"] == "6 pictures of pictures"
    assert not (bundle.path / ".calibration").exists()


def test_bad_calibration_folders_are_refused(
    pictures_folder: Path, clip_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="no such folder"):
        quantize(clip_bundle, "int8", out, calibrate=tmp_path / "none", check=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no pictures"):
        quantize(clip_bundle, "int8", out, calibrate=tmp_path / "empty", check=False)
    (pictures_folder / "captions.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="line 1: it must be"):
        quantize(clip_bundle, "int8", out, calibrate=pictures_folder, check=False)
    (pictures_folder / "captions.jsonl").unlink()
    for i in range(4):
        (pictures_folder / f"{i}.png").write_bytes(b"")
    with pytest.raises(InputError, match="4 of 6 pictures cannot be read"):
        quantize(clip_bundle, "int8", out, calibrate=pictures_folder, check=False)
    assert not out.exists()
    assert not list(tmp_path.glob(".out*"))


def test_quantizing_twice_is_refused(clip_int8: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is int8 already: quantize a float32 bundle"):
        quantize(clip_int8, "int4", tmp_path / "b")


def test_schemes_are_chosen_on_the_command_line(vlmedge, clip_bundle: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    ran = vlmedge("quantize", clip_bundle, "--int8", "--int4")
    assert ran.code == 2
    assert "int8 and int4 are different schemes: give one of them" in ran.err
    ran = vlmedge("quantize", clip_bundle)
    assert ran.code == 2
    assert "give --int8, --int4" in ran.err
    ran = vlmedge(
        "quantize", clip_bundle, "--fp16", "--out", tmp_path / "b", "--no-check", "--keep", "*fc2*"
    )
    assert ran.code == 0
    bundle = Bundle.load(tmp_path / "b")
    assert bundle.manifest.scheme == "fp16"
    assert "float32 instead" in {layer.reason for layer in bundle.manifest.kept}
