"""What graphs of a bundle have in common is stored once, and all that reads a bundle knows it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from kit.bundles import bundle_of, checkpoint_of
from kit.command import Run

import vlmedge as api
from vlmedge.arrays import Array
from vlmedge.bundle import Bundle, graph_path, weights_path
from vlmedge.bundle.writer import stored_files, write_manifest
from vlmedge.errors import BundleError
from vlmedge.graphs import shared_weights as sharing
from vlmedge.graphs.portable import load_graph, save_graph
from vlmedge.graphs.shared_weights import borrows, store_once
from vlmedge.make import quantize
from vlmedge.make import write as writing
from vlmedge.make.recipe import Recipe
from vlmedge.plan.bundle_shape import bundle_shape
from vlmedge.shelves.registry import ENGINES
from vlmedge.spec import Component, ModelSpec, TensorSpec
from vlmedge.spec.manifest import FORMAT, CheckpointId, Manifest, Parity

WIDTH = 32  # a weight of it has 4 KiB, so it lies in a file
NAMES = ("vision_encoder", "text_encoder", "fusion")


def drawn(seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal((WIDTH, WIDTH)).astype(np.float32)


def chain(weights: Mapping[str, Array]) -> ir.Model:
    """Make y = x W0 W1 ..."""
    kind, shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", WIDTH])
    x = value = ir.Value(name="x", type=kind, shape=shape)
    nodes, constants = [], []
    for name, weight in weights.items():
        constants.append(ir.Value(name=name, const_value=ir.tensor(weight, name=name)))
        nodes.append(ir.Node("", "MatMul", [value, constants[-1]], name=f"{name}.product"))
        value = nodes[-1].outputs[0]
        value.name, value.type, value.shape = f"{name}.out", kind, shape
    value.name = "y"
    graph = ir.Graph(
        [x], [value], nodes=nodes, initializers=constants, opset_imports={"": 20}, name="chain"
    )
    return ir.Model(graph, ir_version=10)


def seal(folder: Path) -> Bundle:
    """Write a manifest of what lies in a folder."""
    x, y = (TensorSpec(name, "float32", ("batch", WIDTH)) for name in "xy")
    found = [name for name in NAMES if (folder / graph_path(name)).is_file()]
    spec = ModelSpec("tiny", tuple(Component(name, (x,), (y,)) for name in found), {})
    source = CheckpointId("tiny", None, "")
    files = stored_files(folder)
    return write_manifest(folder, Manifest(FORMAT, "0", source, "float32", spec, (), files, {}))


def written(folder: Path, **graphs: Mapping[str, Array]) -> Bundle:
    """Write a bundle as it was before anything was shared."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, weights in graphs.items():
        save_graph(chain(weights), folder, name)
    return seal(folder)


def outputs(bundle: Bundle) -> dict[str, Array]:
    x = np.random.default_rng(9).standard_normal((2, WIDTH)).astype(np.float32)
    found = {}
    for component in bundle.spec.components:
        graph = ENGINES["ort"].open(bundle, component.name)
        found[component.name] = graph.run({"x": x})["y"]
        graph.close()
    return found


def size(folder: Path, component: str) -> int:
    file = folder / weights_path(component)
    return file.stat().st_size if file.is_file() else 0


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.fixture
def common() -> dict[str, dict[str, Array]]:
    """Two encoders with nothing in common, and a fusion that holds the text's weights too."""
    text = {"embed": drawn(2), "layer": drawn(3)}
    return {
        "vision_encoder": {"a": drawn(0), "b": drawn(1)},
        "text_encoder": text,
        "fusion": {"own": drawn(4), **text, "last": drawn(5)},
    }


def test_common_weights_are_stored_once(
    tmp_path: Path, common: dict[str, dict[str, Array]]
) -> None:
    before = outputs(written(tmp_path, **common))
    assert store_once(tmp_path, NAMES) == 2 * 4096
    assert [size(tmp_path, name) for name in NAMES] == [2 * 4096] * 3
    assert [borrows(tmp_path, name) for name in NAMES] == [False, False, True]
    for name in NAMES:
        onnx.checker.check_model(str(tmp_path / graph_path(name)))
        stored = load_graph(tmp_path, name).graph.initializers
        for weight, array in common[name].items():
            tensor = stored[weight].const_value
            assert tensor is not None
            np.testing.assert_array_equal(tensor.numpy(), array)
    after = outputs(seal(tmp_path))
    for name in NAMES:
        np.testing.assert_array_equal(after[name], before[name])


def test_storing_again_changes_nothing(tmp_path: Path, common: dict[str, dict[str, Array]]) -> None:
    written(tmp_path, **common)
    store_once(tmp_path, NAMES)
    files = stored_files(tmp_path)
    assert store_once(tmp_path, NAMES) == 0
    assert stored_files(tmp_path) == files


def test_graph_without_weights_of_its_own_has_no_file(tmp_path: Path) -> None:
    both = {"a": drawn(0), "b": drawn(1)}
    written(tmp_path, text_encoder=both, fusion={"b": both["b"], "a": both["a"]})
    store_once(tmp_path, NAMES[1:])
    assert not (tmp_path / weights_path("fusion")).exists()
    found = outputs(seal(tmp_path))
    assert not np.allclose(found["fusion"], found["text_encoder"])


def test_weights_are_told_apart_by_all_of_their_bytes(tmp_path: Path) -> None:
    """Neither a name nor how a weight begins makes it the same."""
    one = drawn(0)
    other = one.copy()
    other[-1, -1] += 1
    written(tmp_path, text_encoder={"w": one}, fusion={"w": other, "renamed": one})
    assert store_once(tmp_path, NAMES[1:]) == one.nbytes
    stored = load_graph(tmp_path, "fusion").graph.initializers
    for name, array in (("w", other), ("renamed", one)):
        tensor = stored[name].const_value
        assert tensor is not None
        np.testing.assert_array_equal(tensor.numpy(), array)


def test_sameness_within_a_graph_counts(tmp_path: Path) -> None:
    bundle = written(tmp_path, text_encoder={"a": drawn(0), "b": drawn(1), "again": drawn(0)})
    before = outputs(bundle)["text_encoder"]
    assert store_once(tmp_path, ["text_encoder"]) == 4096
    assert not borrows(tmp_path, "text_encoder")
    np.testing.assert_array_equal(outputs(seal(tmp_path))["text_encoder"], before)


@pytest.mark.parametrize(
    ("break_it", "problem"),
    [
        (Path.unlink, "is missing: copy the whole folder again"),
        (
            lambda file: file.write_bytes(file.read_bytes()[:-1]),
            "is not the file that was exported",
        ),
    ],
    ids=["missing", "truncated"],
)
def test_broken_shared_file_is_refused_by_whom_it_concerns(
    tmp_path: Path,
    common: dict[str, dict[str, Array]],
    break_it: Callable[[Path], object],
    problem: str,
) -> None:
    written(tmp_path, **common)
    store_once(tmp_path, NAMES)
    seal(tmp_path)
    break_it(tmp_path / weights_path("text_encoder"))
    words = rf"graphs/text_encoder\.bin \(weights of text_encoder, fusion\) {problem}"
    with pytest.raises(BundleError, match=words) as refused:
        Bundle.load(tmp_path)
    assert "\n" not in str(refused.value)


def test_weights_file_that_ends_too_early_is_refused_while_it_is_written(tmp_path: Path) -> None:
    written(tmp_path, text_encoder={"a": drawn(0)}, fusion={"a": drawn(0), "b": drawn(1)})
    shorten(tmp_path / weights_path("fusion"))
    with pytest.raises(BundleError, match=r"fusion\.bin ends too early: export the model again"):
        store_once(tmp_path, NAMES[1:])


def test_plan_counts_what_each_graph_holds(
    tmp_path: Path, common: dict[str, dict[str, Array]]
) -> None:
    before = bundle_shape(tmp_path, written(tmp_path, **common).manifest)
    store_once(tmp_path, NAMES)
    assert bundle_shape(tmp_path, seal(tmp_path).manifest) == before


def test_info_tells_what_is_shared(
    tmp_path: Path, common: dict[str, dict[str, Array]], vlmedge: Run
) -> None:
    written(tmp_path, **common)
    store_once(tmp_path, NAMES)
    seal(tmp_path)
    out = vlmedge("info", tmp_path).out
    assert "text_encoder holds weights of fusion too, stored once" in out
    assert out.count("stored once") == 1


# ---- a checkpoint whose text encoder and fusion are one BERT


@pytest.fixture(scope="module")
def matcher(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Export a random BLIP that matches, without the gate."""
    root = tmp_path_factory.mktemp("matcher")
    checkpoint_of("blip-itm", root / "checkpoint")
    return Bundle.load(bundle_of("blip-itm", root / "bundle"))


def scores(bundle: Bundle) -> list[float]:
    picture = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    return list(api.load(bundle.path).match(picture, ["a red star", "two boxes"]))


def graphs_mib(bundle: Bundle) -> float:
    return sum(file.stat().st_size for file in bundle.path.glob("graphs/*")) / 2**20


@pytest.mark.parametrize("scheme", ["float32", "int8", "int4"])
def test_exported_text_encoder_and_fusion_share(tmp_path: Path, scheme: str) -> None:
    bundle = Bundle.load(bundle_of("blip-itm", tmp_path / "b", scheme))
    assert borrows(bundle.path, "fusion")
    assert len(scores(bundle)) == 2


def test_budget_counts_what_is_shared_once(matcher: Bundle, tmp_path: Path) -> None:
    small = Bundle.load(bundle_of("blip-itm", tmp_path / "small", "int8"))
    budget = graphs_mib(small) + 0.03
    recipe = Recipe("int8", keep_slower=True, budget_mib=budget)
    mixed = quantize.quantize(matcher.path, recipe, tmp_path / "mixed", check=False)
    assert any("instead" in kept.reason for kept in mixed.manifest.kept)
    assert graphs_mib(small) < graphs_mib(mixed) <= budget
    np.testing.assert_allclose(scores(mixed), scores(matcher), atol=0.02)
    tight = Recipe("int8", keep_slower=True, budget_mib=graphs_mib(small) - 0.01)
    with pytest.raises(BundleError, match=f"takes {graphs_mib(small):.1f} MiB: give at least that"):
        quantize.quantize(matcher.path, tight, tmp_path / "none", check=False)


def test_layers_that_get_bits_back_leave_no_graph_behind(
    matcher: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text encoder that is written again moves what the fusion points to."""
    gate, seen = writing.run_gate, []

    def strict(bundle: Bundle, *rest: Any) -> Parity:
        """Find two mixes wanting, whatever they are, as the real gate might."""
        seen.append(scores(bundle))
        parity = gate(bundle, *rest)
        first, *others = parity.components
        first = msgspec.structs.replace(first, passed=len(seen) > 2)
        return msgspec.structs.replace(parity, components=(first, *others))

    monkeypatch.setattr(writing, "run_gate", strict)
    mixed = quantize.quantize(
        matcher.path,
        Recipe("int8", keep_slower=True, target_drop=100.0),
        tmp_path / "b",
        against=str(matcher.path.parent / "checkpoint"),
        allow_unverified=True,
    )
    given = [kept for kept in mixed.manifest.kept if "instead" in kept.reason]
    assert len(given) == 3  # one, then two more
    assert len(seen) == 3
    for found in seen:
        np.testing.assert_allclose(found, scores(matcher), atol=0.02)


def test_interrupted_sharing_leaves_nothing(
    matcher: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(file: Path, kept: object) -> None:
        file.with_name(f".{file.name}.partial").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(sharing, "_keep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize.quantize(
            matcher.path, Recipe("int8", keep_slower=True), tmp_path / "b", check=False
        )
    assert list(tmp_path.iterdir()) == []


def test_shared_bundle_moves_as_a_folder(matcher: Bundle, tmp_path: Path) -> None:
    shutil.copytree(matcher.path, tmp_path / "copy", ignore=shutil.ignore_patterns("engines"))
    assert scores(Bundle.load(tmp_path / "copy")) == scores(matcher)
