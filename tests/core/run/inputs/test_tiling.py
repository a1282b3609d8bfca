"""Pictures cut into tiles, against transformers' Idefics3 and LLaVA-NeXT."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from vlmedge.errors import InputError
from vlmedge.run.inputs.tiling import cut, joined
from vlmedge.spec import AnyRes, Tiling


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("longest", [32, 96, 100])
@pytest.mark.parametrize("size", [(32, 32), (101, 57), (57, 101), (200, 7), (1, 90), (33, 34)])
def test_cut_is_transformers(size: tuple[int, int], longest: int, split: bool) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    processor = transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": longest},
        max_image_size={"longest_edge": 32},
        do_image_splitting=split,
        do_rescale=False,
        do_normalize=False,
        return_row_col_info=True,
    )
    theirs = processor(image, return_tensors="np")
    ours, grid = cut(image, Tiling(longest, 32, split), "lanczos")
    assert grid[:2] == (theirs["rows"][0][0], theirs["cols"][0][0])
    stacked = np.stack([np.asarray(tile) for tile in ours]).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(stacked, theirs["pixel_values"][0])


def test_cut_refuses_what_is_too_thin() -> None:
    with pytest.raises(InputError, match="at most 200 times the shorter"):
        cut(Image.new("RGB", (201, 1)), Tiling(64, 32), "lanczos")


SIZES = ((32, 64), (64, 32), (64, 64), (96, 32), (32, 96))
ODD = [(32, 32), (101, 57), (57, 101), (200, 7), (3, 90), (33, 34), (64, 65), (640, 480), (1, 200)]


@pytest.fixture(scope="module")
def next_config() -> Any:
    vision = SimpleNamespace(image_size=32, patch_size=8)
    pinpoints = [list(size) for size in SIZES]
    return SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints)


@pytest.mark.parametrize("size", ODD)
def test_any_size_is_cut_and_joined_as_llava_next_does(
    size: tuple[int, int], next_config: Any
) -> None:
    """The pixels of its processor, and what its model makes of rows that bear their own numbers."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    processor = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_grid_pinpoints=next_config.image_grid_pinpoints,
        do_rescale=False,
        do_normalize=False,
    )
    theirs = processor(Image.fromarray(noise), return_tensors="np")
    ours, grid = cut(Image.fromarray(noise), AnyRes(SIZES, 32, 32, 4), "bicubic")
    stacked = np.stack([np.asarray(tile) for tile in ours]).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(stacked, theirs["pixel_values"][0])
    numbers = torch.arange(len(ours) * 17).reshape(len(ours), 17, 1)
    rows, _ = transformers.LlavaNextModel.pack_image_features(
        SimpleNamespace(config=next_config),  # type: ignore[arg-type]
        [numbers[:, :16]],
        torch.tensor([[size[1], size[0]]]),
        "default",
        image_newline=numbers[0, 16],
    )
    np.testing.assert_array_equal(joined(grid), rows[0][:, 0])
