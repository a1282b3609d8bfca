"""The CUDA engine's graphs on the built-in checkpoints.

Lowering, the host's part, the cache in buffers and its reordering are the same on every provider;
without a GPU they run on the CPU's, which has the same kernels. What needs the device is marked.
"""

from __future__ import annotations

import re
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from kit.bundles import bundle_of

import vlmedge
from vlmedge.checkpoints.scenes import draw_scene
from vlmedge.errors import BundleError, InputError, MissingExtraError
from vlmedge.run.tasks.graphs import Graphs
from vlmedge.shelves.registry import ENGINES

cuda: Any = import_module(type(ENGINES["ort_cuda"]).__module__)
sessions: Any = import_module(f"{cuda.__package__}._ort_cuda.session")
IMAGES = [draw_scene(i, "heldout").image for i in range(3)]


@pytest.fixture(scope="module")
def scheme_bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Take tiny-blip2 in each scheme, without the gate, every layer quantized."""
    root = tmp_path_factory.mktemp("schemes")
    schemes = ("fp16", "int8", "int4", "float32")
    return {scheme: bundle_of("tiny-blip2", root / scheme, scheme) for scheme in schemes}


@pytest.fixture
def here() -> Any:
    """Return the engine on the provider that every machine has, which it falls back to."""
    return cuda.OrtCuda(sessions.Provider("CPUExecutionProvider", "cpu"), allow_fallback=True)


def opened(folder: Path, engine: Any) -> vlmedge.Model:
    model = vlmedge.load(folder)
    model.graphs = Graphs(model.bundle, engine)
    model._context = type(model._context)(model.bundle, model.graphs)
    return model


def kinds(folder: Path, component: str) -> Counter[str]:
    (file,) = folder.glob(f"engines/ort_cuda-*/{component}.onnx")
    return Counter(node.op_type for node in ir.load(file).graph)


@pytest.mark.parametrize("scheme", ["fp16", "int8", "int4", "float32"])
def test_texts_are_those_of_the_cpu_engine(
    scheme_bundles: dict[str, Path], scheme: str, here: Any
) -> None:
    """Greedy, beams that reorder the cache, and prompts of unequal length."""
    folder = scheme_bundles[scheme]
    ours, theirs = opened(folder, here), vlmedge.load(folder)
    assert ours.caption(IMAGES) == theirs.caption(IMAGES)
    assert ours.caption(IMAGES[0]) == theirs.caption(IMAGES[0])
    assert ours.caption(IMAGES, num_beams=3) == theirs.caption(IMAGES, num_beams=3)
    asked = [model.ask(IMAGES, "how many objects are there?") for model in (ours, theirs)]
    assert asked[0] == asked[1]
    decoder = kinds(folder, "decoder")
    assert (decoder["GroupQueryAttention"] > 0) == (scheme != "float32")
    assert decoder["Softmax"] == (0 if scheme != "float32" else 4)
    assert kinds(folder, "vision_encoder")["MultiHeadAttention"] == 5
    assert (decoder["MatMulNBits"] > 0) == (scheme in ("int8", "int4"))
    # what the length so far decides is gone from the device
    assert not {"Range", "CumSum", "Where", "LessOrEqual"} & set(decoder)


def test_vectors_are_those_of_the_cpu_engine(clip_int8: Path, here: Any) -> None:
    ours, theirs = opened(clip_int8, here), vlmedge.load(clip_int8)
    cosine = (ours.embed_image(IMAGES) * theirs.embed_image(IMAGES)).sum(1)
    assert cosine.min() > 0.999
    texts = ["a red circle", "two boxes, é"]
    assert (ours.embed_text(texts) * theirs.embed_text(texts)).sum(1).min() > 0.999


def test_steps_of_one_shape_use_the_same_buffers(
    scheme_bundles: dict[str, Path], here: Any
) -> None:
    """A step is bound once, although the text grows: a recording needs that."""
    model = opened(scheme_bundles["fp16"], here)
    first = model.caption(IMAGES[0], max_tokens=8, min_tokens=8)
    graph: Any = model.graphs["decoder"]
    calls = dict(graph._calls)
    assert len(calls) == 1
    assert model.caption(IMAGES[0], max_tokens=8, min_tokens=8) == first
    assert graph._calls == calls


def test_a_cache_of_other_rows_is_refused(scheme_bundles: dict[str, Path], here: Any) -> None:
    graph = opened(scheme_bundles["fp16"], here).graphs["decoder"]
    width = int(graph.component.inputs[0].shape[-1])

    def feeds(batch: int, tokens: int, total: int) -> dict[str, Any]:
        return {
            "inputs_embeds": np.ones((batch, tokens, width), np.float32),
            "attention_mask": np.ones((batch, total), np.int64),
        }

    graph.run(feeds(2, 3, 3))
    with pytest.raises(
        InputError, match="the feeds have 3 rows, the cache has 2: call reset first"
    ):
        graph.run(feeds(3, 1, 4))
    with pytest.raises(
        InputError, match="2 tokens for each of 2 rows with a filled cache: feed one row"
    ):
        graph.run(feeds(2, 2, 5))


def test_missing_provider_says_how_to_get_it(clip_bundle: Path) -> None:
    if sessions.CUDA.name in sessions.ort.get_available_providers():
        pytest.skip("it is there")
    with pytest.raises(MissingExtraError, match="has no CUDAExecutionProvider .*onnxruntime-gpu"):
        ENGINES["ort_cuda"].open(vlmedge.load(clip_bundle).bundle, "vision_encoder")


def test_a_node_on_the_cpu_is_named(
    scheme_bundles: dict[str, Path],
) -> None:
    """On the CPU's provider every node is one that fell back."""
    strict = cuda.OrtCuda(sessions.Provider("CPUExecutionProvider", "cpu"))
    expected = re.compile(r"qformer: CPUExecutionProvider left \w+ '.+' .*--allow-fallback")
    with pytest.raises(BundleError, match=expected):
        strict.open(vlmedge.load(scheme_bundles["fp16"]).bundle, "qformer")


def test_the_cpu_s_engine_has_nothing_to_fall_back_to(clip_bundle: Path) -> None:
    with pytest.raises(InputError, match="ort has nothing to fall back to: leave allow_fallback"):
        vlmedge.load(clip_bundle, allow_fallback=True)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["fp16", "int8", "int4", "float32"])
def test_texts_on_the_gpu_are_those_of_the_cpu(
    scheme_bundles: dict[str, Path], scheme: str
) -> None:
    if sessions.CUDA.name not in sessions.ort.get_available_providers():
        pytest.skip("no onnxruntime-gpu")
    folder = scheme_bundles[scheme]
    ours, theirs = vlmedge.load(folder, engine="ort_cuda"), vlmedge.load(folder)
    for beams in (1, 3):
        for _ in range(2):  # the second time from recordings
            assert ours.caption(IMAGES, num_beams=beams) == theirs.caption(IMAGES, num_beams=beams)
