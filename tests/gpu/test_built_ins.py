"""TensorRT on a real GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from kit.tensorrt import build, copied, cuda

import vlmedge
from vlmedge.bundle import Bundle
from vlmedge.errors import VlmEdgeError
from vlmedge.run.model import Model
from vlmedge.shelves.build_options import BuildOptions


@pytest.fixture
def real() -> None:
    """Skip where TensorRT or a GPU is missing."""
    pytest.importorskip("tensorrt")
    try:
        cuda.connect()
    except VlmEdgeError as error:
        pytest.skip(str(error))


@pytest.fixture
def clip(clip_int8: Path, tmp_path: Path) -> Bundle:
    return copied(clip_int8, tmp_path)


@pytest.fixture
def blip2(blip2_bundle: Path, tmp_path: Path) -> Bundle:
    return copied(blip2_bundle, tmp_path)


@pytest.mark.gpu
def test_real_vectors_are_those_of_onnx_runtime(
    real: None, clip: Bundle, pictures: list[Path]
) -> None:
    for precision in ("float32", "float16"):
        build(clip, BuildOptions(precision=precision))  # type: ignore[arg-type]
        model, reference = vlmedge.load(clip.path, engine="tensorrt"), Model(clip)
        for picture in map(str, pictures):
            assert float(model.embed_image(picture) @ reference.embed_image(picture)) > 0.99


@pytest.mark.gpu
def test_real_captions_are_those_of_onnx_runtime(
    real: None, blip2: Bundle, pictures: list[Path]
) -> None:
    build(blip2, BuildOptions(precision="float32"))
    there, here, paths = Model(blip2), Model(blip2, "tensorrt"), [str(p) for p in pictures]
    assert here.caption(paths) == there.caption(paths)
    assert here.caption(paths, num_beams=3) == there.caption(paths, num_beams=3)
