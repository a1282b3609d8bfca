"""Pictures cut into tiles, against transformers' Idefics3ImageProcessorPil."""

from __future__ import annotations

import numpy as np
import pytest
import transformers
from PIL import Image

from vlmedge.errors import InputError
from vlmedge.spec import Tiling
from vlmedge.tiling import cut


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
    assert grid == (theirs["rows"][0][0], theirs["cols"][0][0])
    stacked = np.stack([np.asarray(tile) for tile in ours]).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(stacked, theirs["pixel_values"][0])


def test_cut_refuses_what_is_too_thin() -> None:
    with pytest.raises(InputError, match="at most 200 times the shorter"):
        cut(Image.new("RGB", (201, 1)), Tiling(64, 32), "lanczos")
