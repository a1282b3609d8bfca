"""How pictures are made where a checkpoint does not say it: the defaults of transformers' classes.

A family hands one to `read_image_front_end`, which takes from it what old files leave out.
"""

from __future__ import annotations

from typing import Any, Literal

from vlmedge.spec import ImageFrontEnd

# CLIP's statistics (Radford et al. 2021), which most of its descendants keep
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)

Size = int | tuple[int, int]
"""Of a picture, pixels: (height, width), or the side of a square."""


def clip(size: Size) -> ImageFrontEnd:
    """Resize until the shorter side fits, cut the middle out, and take CLIP's statistics."""
    height, width = _pair(size)
    return ImageFrontEnd(
        resize="shortest_edge",
        resize_size=(height, width),
        resample="bicubic",
        crop_size=(height, width),
        rescale_factor=1 / 255,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    )


def clip_fields(side: int) -> dict[str, Any]:
    """Return `clip` of a square as preprocessor_config.json writes it, for files that lack some."""
    return {
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "resample": 3,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }


def clip_stretched(size: Size) -> ImageFrontEnd:
    """Stretch to one size, and take CLIP's statistics, as BLIP does."""
    return _stretched(size, CLIP_MEAN, CLIP_STD)


def imagenet(size: Size) -> ImageFrontEnd:
    """Stretch to one size, and take ImageNet's statistics."""
    return _stretched(size, IMAGENET_MEAN, IMAGENET_STD)


def half(size: Size, resample: Literal["bilinear", "bicubic"] = "bicubic") -> ImageFrontEnd:
    """Stretch to one size, and bring the values from 0..1 to -1..1, as ViT and SigLIP do."""
    return _stretched(size, HALF, HALF, resample)


def _stretched(
    size: Size,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    resample: Literal["bilinear", "bicubic"] = "bicubic",
) -> ImageFrontEnd:
    return ImageFrontEnd(
        resize="exact",
        resize_size=_pair(size),
        resample=resample,
        crop_size=None,
        rescale_factor=1 / 255,
        image_mean=mean,
        image_std=std,
    )


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size
