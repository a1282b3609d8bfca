"""TensorRT itself on a GPU: what the stand-ins cannot show. Skipped where either is not there.

Where TensorRT's Python has no torch, $VLMEDGE_TEST_BUNDLES is a folder with tiny-clip-float32 and
tiny-blip2-float32, exported elsewhere.
"""

from __future__ import annotations

import shutil
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import vlmedge
from vlmedge import exporting
from vlmedge.building import BuildOptions, Precision
from vlmedge.bundle import Bundle
from vlmedge.errors import BundleError, VlmEdgeError
from vlmedge.progress import SILENT
from vlmedge.recipe import Recipe
from vlmedge.registry import ENGINES
from vlmedge.scenes import draw_scene

engine: Any = import_module(type(ENGINES["tensorrt"]).__module__)
api, cuda, graphs = (
    import_module(f"{engine.__package__}._trt_{name}") for name in ("api", "cuda", "graph")
)
IMAGES = [draw_scene(i, "heldout").image for i in range(3)]
LABELS = ["a red circle", "a blue square", "a green triangle"]
SCHEMES: dict[str, Precision] = {"float32": "float32", "fp16": "float16", "int8": "float16"}
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


@pytest.fixture(scope="module")
def blip2(blip2_bundle: Path, scheme: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return at(scheme, blip2_bundle, tmp_path_factory.mktemp("blip2"))


def at(scheme: str, source: Path, folder: Path) -> Path:
    """Quantize a bundle without the gate, every layer, and build its engines."""
    if scheme == "float32":
        path = Path(shutil.copytree(source, folder / scheme))
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            recipe = Recipe(scheme, keep_slower=True)
            path = exporting.quantize(source, recipe, folder / scheme, check=False).path
    compiler: Any = ENGINES["tensorrt"]
    options = BuildOptions(precision=SCHEMES[scheme], level=QUICK)
    built = compiler.build(Bundle.load(path), options, SILENT)
    assert [one.precision for one in built] == [SCHEMES[scheme]] * len(built)
    return path


def test_scores_are_those_of_the_cpu_engine(clip: Path, scheme: str) -> None:
    ours, theirs = vlmedge.load(clip, engine="tensorrt"), vlmedge.load(clip)
    least = 0.99 if scheme == "int8" else 0.999  # ORT rounds activations call by call
    assert (ours.embed_image(IMAGES) * theirs.embed_image(IMAGES)).sum(1).min() > least
    assert (ours.embed_text(LABELS) * theirs.embed_text(LABELS)).sum(1).min() > least
    for image in IMAGES:
        found, expected = dict(ours.classify(image, LABELS)), dict(theirs.classify(image, LABELS))
        assert max(found, key=found.__getitem__) == max(expected, key=expected.__getitem__)
        assert all(abs(found[label] - expected[label]) < 0.05 for label in LABELS)


def test_texts_are_those_of_the_cpu_engine(blip2: Path) -> None:
    """Greedy one by one and together, beams that reorder the cache, prompts."""
    ours, theirs = vlmedge.load(blip2, engine="tensorrt"), vlmedge.load(blip2)
    assert ours.caption(IMAGES[0]) == theirs.caption(IMAGES[0])
    assert ours.caption(IMAGES) == theirs.caption(IMAGES)
    assert ours.caption(IMAGES, num_beams=3) == theirs.caption(IMAGES, num_beams=3)
    question = "how many objects are there?"
    assert ours.ask(IMAGES, question) == theirs.ask(IMAGES, question)


def test_second_start_builds_nothing(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = vlmedge.load(clip, engine="tensorrt").embed_image(IMAGES[:1])

    def forbidden(*args: object) -> None:
        raise AssertionError("it was built again")

    monkeypatch.setattr(engine, "compile_component", forbidden)
    assert (vlmedge.load(clip, engine="tensorrt").embed_image(IMAGES[:1]) == first).all()


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
    vlmedge.load(clip, engine="tensorrt").embed_image(IMAGES[:1])
    assert plan.stat().st_size > len(half)
