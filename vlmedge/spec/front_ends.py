"""How a picture, a video or a text becomes tensors."""

from __future__ import annotations

from typing import Literal

from vlmedge.spec.base import Data


class Tiling(Data, frozen=True, tag="tiles", tag_field="kind"):
    """How a picture is cut into squares that the encoder takes one by one, and the whole.

    Attributes:
        longest_edge: The picture is first resized to this longer side, pixels.
        tile_size: Side of a tile, pixels; the picture is stretched to whole tiles.
        split: Whether there are tiles, or the whole alone.
    """

    longest_edge: int
    tile_size: int
    split: bool = True


class AnyRes(Data, frozen=True, tag="anyres", tag_field="kind"):
    """How a picture is cut so that its tiles become one soft prompt, as LLaVA-NeXT has it.

    The whole comes first and alone; then the tiles side by side, line by line of patches, without
    those that hold nothing but padding. An encoder's last row of each piece ends such a line.

    Attributes:
        sizes: Allowed sizes (height, width), pixels, in whole tiles: the one that shows most of a
            picture is taken.
        whole_size: Side of the square that the whole is stretched to, pixels.
        tile_size: Side of a tile, pixels.
        patches: Number of patches along the side of each piece.
    """

    sizes: tuple[tuple[int, int], ...]
    whole_size: int
    tile_size: int
    patches: int


class ImageFrontEnd(Data, frozen=True, tag="image", tag_field="kind"):
    """How a picture becomes pixel_values, float32 [batch, 3, height, width].

    Attributes:
        resize: Rule of the resize: "exact" to resize_size; "shortest_edge" until the shorter side
            is resize_size[0].
        resize_size: (height, width), pixels.
        resample: PIL's filter, lower case; or "floor": the pixel at floor(index * from / to).
        crop_size: Centre crop (height, width) after the resize, or none.
        rescale_factor: Multiplies the 0..255 values before mean and std.
        image_mean: One value a channel, RGB.
        image_std: One value a channel, RGB.
        tiling: How it is cut before all this, or none.
        square: The colour that fills a picture up to a square before the resize, RGB, 0..255; the
            picture stays in the middle. None leaves it as it is.
    """

    resize: Literal["exact", "shortest_edge"]
    resize_size: tuple[int, int]
    resample: Literal["nearest", "bilinear", "bicubic", "lanczos", "floor"]
    crop_size: tuple[int, int] | None
    rescale_factor: float
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    tiling: Tiling | AnyRes | None = None
    square: tuple[int, int, int] | None = None


class VideoFrontEnd(Data, frozen=True, tag="video", tag_field="kind"):
    """Choice of the video frames that a model looks at; each becomes pixel_values like a picture.

    The table of front ends has it under pixel_values_videos, which is transformers' name. No graph
    has an input of that name: an encoder takes frames at the input where it takes pictures
    (`ModelSpec.pixels`), as rows of a batch, or as one clip where the first axis is `frames`.

    Attributes:
        frame: How a frame becomes pixels.
        frames: How many frames, at most.
        rule: How they are chosen. "floor": frame i * total // frames, transformers' own; "ends":
            evenly from the first to the last; "middle": the middle of as many equal parts.
        fps: As many frames a second instead, up to `frames`; or none.
        limit: The most that the user may ask for, or none.
    """

    frame: ImageFrontEnd
    frames: int
    rule: Literal["floor", "ends", "middle"] = "floor"
    fps: float | None = None
    limit: int | None = None


class TextFrontEnd(Data, frozen=True, tag="text", tag_field="kind"):
    """How a text becomes input_ids and attention_mask, int64 [batch, tokens].

    The mask's name goes with that of the ids: qformer_attention_mask with qformer_input_ids.

    Special tokens are tokenizer.json's own business (its post-processor).

    Attributes:
        tokenizer: Path of tokenizer.json inside the bundle.
        max_tokens: The most positions that the model has for text.
        pad_id: The id that fills up short rows.
        padding_side: "right" for encoders, "left" for decoders that go on writing.
        pad_to: Fixed row length, or none: as long as the longest.
    """

    tokenizer: str
    max_tokens: int
    pad_id: int
    padding_side: Literal["left", "right"]
    pad_to: int | None = None


FrontEnd = ImageFrontEnd | VideoFrontEnd | TextFrontEnd
"""Turns what a user has into one tensor; a modality is one class more, in this file."""

PIXELS = "pixel_values"
INPUT_IDS, INSTRUCTION_IDS = "input_ids", "qformer_input_ids"
