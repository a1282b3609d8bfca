"""TensorRT itself on a GPU: what the stand-ins cannot show. Skipped where either is not there.

Where TensorRT's Python has no torch, $VLMEDGE_TEST_BUNDLES is a folder with tiny-clip-float32 and
the bundles of WRITERS, exported elsewhere.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from kit.bundles import bundle_of
from kit.command import Run
from kit.shelf import module

import vlmedge as toolkit
from vlmedge.bundle import Bundle
from vlmedge.checkpoints.scenes import draw_scene
from vlmedge.errors import BundleError, VlmEdgeError
from vlmedge.make import quantize
from vlmedge.make.recipe import Recipe
from vlmedge.parity import on_device as level4
from vlmedge.progress import SILENT
from vlmedge.shelves.build_options import BuildOptions, Precision
from vlmedge.shelves.registry import ENGINES

api, cuda = module("runtimes", "_tensorrt.versions"), module("runtimes", "_cuda")
graphs, engine = module("runtimes", "_tensorrt.graph"), module("runtimes", "tensorrt")
IMAGES = [draw_scene(i, "heldout").image for i in range(3)]
LABELS = ["a red circle", "a blue square", "a green triangle"]
SCHEMES: dict[str, Precision] = {"float32": "float32", "fp16": "float16", "int8": "float16"}
WRITERS = ("tiny-blip2", "tiny-blip", "tiny-llava")
QUICK = 2  # the builder's level

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def there() -> tuple[Any, Any]:
    """Return TensorRT and the GPU."""
    try:
        return api.load(), cuda.connect()
    except VlmEdgeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def clip(clip_bundle: Path, scheme: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return at(scheme, clip_bundle, tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module", params=WRITERS)
def writer(
    request: pytest.FixtureRequest, scheme: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return at(scheme, bundle_of(request.param, folder / request.param), folder)


def at(scheme: str, source: Path, folder: Path) -> Path:
    """Quantize a bundle without the gate, every layer, and build its engines."""
    if scheme == "float32":
        path = Path(shutil.copytree(source, folder / scheme))
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            recipe = Recipe(scheme, keep_slower=True)
            path = quantize.quantize(source, recipe, folder / scheme, check=False).path
    compiler: Any = ENGINES["tensorrt"]
    options = BuildOptions(precision=SCHEMES[scheme], level=QUICK, keep_slower=True)
    built = compiler.build(Bundle.load(path), options, SILENT)
    assert [one.precision for one in built] == [SCHEMES[scheme]] * len(built)
    assert {one.component for one in built if one.parity and not one.parity.passed} == set()
    return path


def test_scores_are_those_of_the_cpu_engine(clip: Path, scheme: str) -> None:
    ours, theirs = toolkit.load(clip, engine="tensorrt"), toolkit.load(clip)
    least = 0.99 if scheme == "int8" else 0.999  # ORT rounds activations call by call
    assert (ours.embed_image(IMAGES) * theirs.embed_image(IMAGES)).sum(1).min() > least
    assert (ours.embed_text(LABELS) * theirs.embed_text(LABELS)).sum(1).min() > least
    for image in IMAGES:
        found, expected = dict(ours.classify(image, LABELS)), dict(theirs.classify(image, LABELS))
        assert max(found, key=found.__getitem__) == max(expected, key=expected.__getitem__)
        assert all(abs(found[label] - expected[label]) < 0.05 for label in LABELS)


def test_texts_are_those_of_the_cpu_engine(writer: Path) -> None:
    """Greedy one by one and together, beams that reorder the cache, prompts."""
    ours, theirs = toolkit.load(writer, engine="tensorrt"), toolkit.load(writer)
    assert texts(ours) == texts(theirs)


def texts(model: toolkit.Model) -> list[Any]:
    """Return what a model says of the scenes, by every task that it has."""
    found: list[Any] = []
    if "caption" in model.bundle.spec.tasks:
        found += [model.caption(IMAGES[0]), model.caption(IMAGES)]
        found += [model.caption(IMAGES, num_beams=3)]
    if "ask" in model.bundle.spec.tasks:
        found += [model.ask(IMAGES, "how many objects are there?")]
    assert found
    return found


def test_recorded_steps_are_those_that_are_run(
    writer: Path, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether they are faster is the build's to find out; here they are recorded anyway."""
    monkeypatch.setattr(engine, "SLOWER", 0.0)
    compiler: Any = ENGINES["tensorrt"]
    options = BuildOptions(
        precision=SCHEMES[scheme],
        level=QUICK,
        components=("decoder",),
        keep_slower=True,
        record=True,
    )
    plain = texts(toolkit.load(writer, engine="tensorrt"))
    compiler.build(Bundle.load(writer), options, SILENT)
    model = toolkit.load(writer, engine="tensorrt")
    if type(model.graphs["decoder"]) is not engine.RecordedGraph:
        pytest.skip("TensorRT says that this engine cannot be recorded")
    assert texts(model) == plain
    graph: Any = model.graphs["decoder"]
    for pictures in (IMAGES[:1], IMAGES):
        model.caption(pictures, max_tokens=12, min_tokens=12)
        assert graph.recorded
        assert dict(graph._recorded_for[:1])["inputs_embeds"][0] == len(pictures)


def test_rows_are_what_they_are_alone(writer: Path, scheme: str) -> None:
    """8.6.0 has a kernel that got rows wrong, by what others had left in its memory."""
    bundle = Bundle.load(writer)
    probe = engine.Probe(bundle)
    graph: Any = ENGINES["tensorrt"].open(bundle, "decoder")
    for _ in range(2):
        alone, _ = engine.walked(graph, probe)
        beside, rows = engine.together(graph, probe)
        assert rows == 3
        expected = [engine.repeated(graph.component, step, rows) for step in alone]
        parity = engine.proven(scheme, expected, beside)
        assert parity.passed, parity
    graph.close()


def test_level_4_is_reported(writer: Path, vlmedge: Run) -> None:
    bundle = Bundle.load(writer)
    assert vlmedge("check", writer, "--engine", "tensorrt").code == 0
    names = {component.name for component in bundle.spec.components}
    found = [one for one in level4.reported(writer) if one.engine.startswith("TensorRT")]
    assert {one.component for one in found} == names
    assert all(one.verdict.parity and one.verdict.parity.passed for one in found)


def test_second_start_builds_nothing(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = toolkit.load(clip, engine="tensorrt").embed_image(IMAGES[:1])

    def forbidden(*args: object) -> None:
        raise AssertionError("it was built again")

    monkeypatch.setattr(engine, "compile_component", forbidden)
    assert (toolkit.load(clip, engine="tensorrt").embed_image(IMAGES[:1]) == first).all()


def test_a_truncated_plan_is_refused(clip: Path, there: tuple[Any, Any]) -> None:
    """By TensorRT, should one ever get there; before it by the digest, and it is built again."""
    bundle = Bundle.load(clip)
    component = bundle.spec.component("vision_encoder")
    (folder,) = (
        file.parent
        for file in clip.glob("engines/trt-*/engine.plan")
        if '"vision_encoder"' in (file.parent / "engine.json").read_text()
    )
    plan = folder / "engine.plan"
    whole = plan.read_bytes()
    half = whole[: len(whole) // 2]
    with pytest.raises(BundleError, match=r"engine.plan cannot be opened by TensorRT .*: remove"):
        graphs.TrtGraph(*there, component, half, (), plan)
    plan.write_bytes(half)
    toolkit.load(clip, engine="tensorrt").embed_image(IMAGES[:1])
    assert plan.stat().st_size > len(half)
