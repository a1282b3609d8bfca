"""Pictures of any size, in tiles that are put together again: LLaVA-NeXT's front end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers

from vlmedge.errors import CheckpointError
from vlmedge.spec import AnyRes, ImageFrontEnd, TensorSpec

from .._checkpoint import presets
from .._checkpoint.folder import read_image_processor
from .._checkpoint.preprocessor import front_end
from .llava import Projector, save_tiny, seen_patches

SIZES = [[32, 64], [64, 32], [64, 64], [32, 96]]  # of the tests' pictures


class LineProjector(Projector):
    """LLaVA's projector, and after the rows of a piece the one that ends a line of patches."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.image_newline = torch.nn.Parameter(torch.empty(config.text_config.hidden_size))

    def forward(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """Map [batch, patches, width] to soft_prompt [batch, patches + 1, width of the LM]."""
        soft = self.project(image_embeds)
        end = self.image_newline.expand(soft.shape[0], 1, -1)
        return torch.cat([soft, end], dim=1)


def line_prompt(config: Any) -> TensorSpec:
    """Describe what `LineProjector` gives for a piece."""
    shape = "batch", seen_patches(config) + 1, config.text_config.hidden_size
    return TensorSpec("soft_prompt", "float32", shape)


def save_tiny_anyres(model: Any, folder: Path, **given: Any) -> None:
    """Write a tiny model whose pictures are cut into `SIZES`; see `save_tiny`."""
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_grid_pinpoints=SIZES,
    )
    save_tiny(model, folder, images, transformers.LlavaNextProcessor, **given)


def check_patches(folder: Path, config: Any) -> None:
    """Refuse a tower whose rows make no square, which tiles could not be put together from."""
    vision = config.vision_config
    if seen_patches(config) != (vision.image_size // vision.patch_size) ** 2:
        raise CheckpointError(
            f"{folder}: vision_feature_select_strategy "
            f"{config.vision_feature_select_strategy!r} keeps the tower's class token, which no "
            "tile has a place for: it must be 'default'"
        )


def read_anyres_front_end(folder: Path, config: Any) -> ImageFrontEnd:
    """Read how pictures are cut; what the file leaves out is transformers' default."""
    found = read_image_processor(folder) or {}
    vision = config.vision_config
    side = vision.image_size
    plain = {name: value for name, value in found.items() if name != "do_pad"}
    front = front_end({**presets.clip_fields(side), **plain})
    pixels = front.crop_size or front.resize_size
    if pixels != (side, side):
        raise CheckpointError(
            f"{folder}: its tiles are {pixels[1]} x {pixels[0]} pixels, its vision tower takes "
            f"{side} x {side}: download preprocessor_config.json and config.json of one model"
        )
    sizes = found.get("image_grid_pinpoints", config.image_grid_pinpoints)
    if sizes != config.image_grid_pinpoints:
        raise CheckpointError(
            f"{folder}: image_grid_pinpoints are {sizes} in preprocessor_config.json and "
            f"{config.image_grid_pinpoints} in config.json: they must be the same"
        )
    for size in sizes:
        if len(size) != 2 or any(length < side or length % side for length in size):
            raise CheckpointError(
                f"{folder}: image_grid_pinpoints has {size}: "
                f"it must be a height and a width in whole tiles of {side} pixels"
            )
    tiling = AnyRes(
        sizes=tuple((height, width) for height, width in sizes),
        whole_size=front.resize_size[0],
        tile_size=side,
        patches=side // vision.patch_size,
    )
    return msgspec.structs.replace(front, tiling=tiling)
