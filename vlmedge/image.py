"""Pictures to pixel_values, equal to the PIL processors of transformers bit for bit."""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, NoReturn, TypeGuard

import numpy as np
import PIL.Image
import PIL.ImageOps
from numpy.typing import NDArray

from vlmedge.errors import CheckpointError, InputError
from vlmedge.spec import ImageFrontEnd
from vlmedge.square import squared

ImageSource = str | Path | bytes | PIL.Image.Image | NDArray[np.uint8]

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
SIZE_LIMIT_PIXELS = 178_956_970  # where PIL itself raises DecompressionBombError
SIDES_LIMIT_RATIO = 200  # a shortest_edge resize keeps the ratio, so this bounds its memory

_FILTERS: dict[int, Literal["nearest", "lanczos", "bilinear", "bicubic"]] = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
}
_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")


Finish = Callable[[PIL.Image.Image, str], PIL.Image.Image]
"""Decodes an opened image; takes what to call it in an error too."""


class _Hush:
    """Silences warnings while any thread decodes.

    warnings.catch_warnings swaps a process-wide list: two threads that do so each for itself may
    leave the other's list behind.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._filters.__exit__(None, None, None)


HUSH = _Hush()


class Grid(NamedTuple):
    """How a picture is cut; by default it is in one piece.

    Attributes:
        rows: Of tiles.
        columns: Of tiles.
        side: Patches along a tile, where all tiles make one soft prompt; 0: each makes its own.
        trim: Lines of patches that hold padding, on either side: (top and bottom, left and right).
    """

    rows: int = 0
    columns: int = 0
    side: int = 0
    trim: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Pictures:
    """Pictures as an encoder takes them.

    Attributes:
        pixel_values: float32 [pieces, 3, height, width]: of each picture its tiles, row by row,
            and the whole after them (spec.Tiling) or before (spec.AnyRes).
        grids: How each picture is cut.
    """

    pixel_values: NDArray[np.float32]
    grids: tuple[Grid, ...]


def pieces(grid: Grid) -> int:
    """Count what a picture becomes: its tiles, and the whole."""
    return grid.rows * grid.columns + 1


def is_images(source: object) -> TypeGuard[Sequence[Any]]:
    """Tell several images (a list or a tuple) from one."""
    return isinstance(source, list | tuple)


def load_image(source: ImageSource) -> PIL.Image.Image:
    """Open one picture as `transformers.image_utils.load_image` does, whatever it comes as.

    EXIF rotation is applied; then PIL converts to RGB, so alpha is dropped, not blended.

    Args:
        source: A path, a file's bytes, a PIL image, or uint8 [height, width] or
            [height, width, channels], 0..255, with 1, 3 (RGB) or 4 (RGBA) channels.

    Returns:
        A decoded RGB image; `source` itself where it is one already.

    Raises:
        InputError: `source` cannot be read, decoded or used.
    """
    return _load(source, _rgb)


def load_painting(source: ImageSource | NDArray[np.uint16]) -> PIL.Image.Image:
    """Open a picture whose numbers count: labels, colours or depths.

    Args:
        source: As of `load_image`, or uint16 [height, width].

    Returns:
        A decoded image of mode RGB, P (labels with a palette), L (labels or gray) or I;16; one of
        black and white, and gray with alpha, is gray.

    Raises:
        InputError: As of `load_image`.
    """
    return _load(source, _kept)


def _load(source: ImageSource | NDArray[np.uint16], finish: Finish) -> PIL.Image.Image:
    if isinstance(source, PIL.Image.Image):
        with _decoding("PIL image"):
            return finish(source, "PIL image")
    if isinstance(source, np.ndarray):
        return _from_array(source, finish)
    if isinstance(source, bytes):
        if not source:
            raise InputError("image of 0 bytes: give the whole file's bytes")
        return _from_file(io.BytesIO(source), f"image of {len(source)} bytes", finish)
    if isinstance(source, str | os.PathLike):
        return _from_path(os.fspath(source), finish)
    raise InputError(
        f"image of type {type(source).__name__}: give a path, bytes, a PIL image or a uint8 array"
    )


def pictures_in(folder: Path) -> list[Path]:
    """List the pictures of a folder by name, and refuse one without."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder: give one that holds pictures")
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in IMAGE_ENDINGS)
    if not files:
        raise InputError(f"{folder} has no pictures: {', '.join(IMAGE_ENDINGS)} are read")
    return files


def preprocess(images: Sequence[PIL.Image.Image], front: ImageFrontEnd) -> NDArray[np.float32]:
    """Resize, crop, rescale and normalise.

    Args:
        images: From `load_image`; at least one, in any sizes.
        front: What the checkpoint was trained with.

    Returns:
        pixel_values, float32 [batch, 3, height, width], RGB.
    """
    return normalize([fit(image, front) for image in images], front)


def fit(image: PIL.Image.Image, front: ImageFrontEnd) -> NDArray[np.uint8]:
    """Resize and crop one picture from `load_image`: uint8 [height, width, 3], RGB."""
    return np.asarray(_fit(image, front))


def normalize(rows: Sequence[NDArray[np.uint8]], front: ImageFrontEnd) -> NDArray[np.float32]:
    """Rescale and normalise what `fit` gave: float32 [batch, 3, height, width]."""
    if not rows:
        raise InputError("no images: give at least one")
    height, width, _ = rows[0].shape
    for row in rows:
        if row.shape != rows[0].shape:
            raise InputError(
                f"images of {width} x {height} and {row.shape[1]} x {row.shape[0]} pixels after "
                "the resize: without a crop a batch needs one shape; give them one by one"
            )
    # A byte has 256 values: with a table the reference's own formula, in its own precision
    # (transformers.image_transforms.rescale and normalize), costs one lookup a value.
    values = (np.arange(256, dtype=np.float64) * front.rescale_factor).astype(np.float32)
    mean = np.array(front.image_mean, np.float32)
    std = np.array(front.image_std, np.float32)
    table = (values[:, None] - mean) / std  # [256, 3]
    pixels = np.empty((len(rows), 3, height, width), np.float32)
    for row, planes in zip(rows, pixels, strict=True):
        for channel in range(3):
            np.take(table[:, channel], row[..., channel], out=planes[channel], mode="clip")
    return pixels


def front_end(config: Mapping[str, Any]) -> ImageFrontEnd:
    """Read what a preprocessor_config.json says, in any of its spellings.

    A lone int for `size` is a square if `default_to_square` says so; without that key it is the
    shorter edge where a centre crop follows (CLIP) and a square where none does (BLIP, ViT).
    Of the do_* switches only do_center_crop is off when it is left out.

    Args:
        config: The parsed file, with the family's own defaults filled in.

    Raises:
        CheckpointError: A field is missing or asks for something that no front end does.
    """
    for name, value in config.items():
        if name.startswith("do_") and value and name not in _STEPS:
            _refuse(config, name, f"the steps are {', '.join(_STEPS)}")
    if not config.get("do_resize", True):
        _refuse(config, "do_resize", "a graph takes one size, so it must be true")
    crop = _square(config, "crop_size") if config.get("do_center_crop") else None
    size = config.get("size")
    edges = _sides(size)
    if isinstance(size, int):
        square = config.get("default_to_square", crop is None)
        edges = {"height": size, "width": size} if square else {"shortest_edge": size}
    resize: Literal["exact", "shortest_edge"] = "exact"
    resize_size = (edges.get("height", 0), edges.get("width", 0))
    if edges.keys() == {"shortest_edge"}:
        if crop is None:
            _refuse(config, "size", "a shortest_edge needs do_center_crop, or shapes vary")
        resize, resize_size = "shortest_edge", (edges["shortest_edge"],) * 2
    elif edges.keys() != {"height", "width"}:
        _refuse(config, "size", "give height and width, or shortest_edge")
    if not (_is_side(resize_size[0]) and _is_side(resize_size[1])):
        _refuse(config, "size", "sides are whole pixels, at least 1")
    resample = config.get("resample")
    if not isinstance(resample, int) or isinstance(resample, bool) or resample not in _FILTERS:
        filters = ", ".join(f"{number} ({name})" for number, name in _FILTERS.items())
        _refuse(config, "resample", f"choose from {filters}")
    normalize = config.get("do_normalize", True)
    return ImageFrontEnd(
        resize=resize,
        resize_size=resize_size,
        resample=_FILTERS[resample],
        crop_size=crop,
        rescale_factor=_factor(config) if config.get("do_rescale", True) else 1.0,
        image_mean=_three(config, "image_mean") if normalize else (0.0, 0.0, 0.0),
        image_std=_three(config, "image_std") if normalize else (1.0, 1.0, 1.0),
    )


def _from_path(path: str | bytes, finish: Finish) -> PIL.Image.Image:
    text = os.fsdecode(path)
    if not text:
        raise InputError("empty path: give the path of an image file")
    name = text if text.isprintable() and len(text) <= 200 else f"{text[:200]!r}"
    if text.startswith(("http://", "https://", "data:")):
        raise InputError(f"address {name}: download the image and give its path or bytes")
    try:
        file = Path(text)
        if file.is_dir():
            raise InputError(f"folder {name}: give the path of one image file")
        if file.exists() and not file.is_file():  # a pipe or a device could block for ever
            raise InputError(f"{name} is no regular file: give the path of an image file")
        with file.open("rb") as stream:
            return _from_file(stream, f"image {name}", finish)
    except FileNotFoundError:
        raise InputError(f"no file {name}: give the path of an image file") from None
    except PermissionError:
        raise InputError(f"file {name} may not be read: ask for read permission") from None
    except InputError:
        raise
    except (OSError, ValueError) as error:  # too long, a null character, a disk's failure
        raise InputError(f"file {name} cannot be opened: {_line(error)}") from None


def _from_file(stream: BinaryIO, name: str, finish: Finish) -> PIL.Image.Image:
    with _decoding(name), PIL.Image.open(stream) as image:
        return finish(image, name)


def _from_array(array: NDArray[Any], finish: Finish) -> PIL.Image.Image:
    deep = finish is _kept and array.dtype == np.uint16 and array.ndim == 2
    if array.dtype != np.uint8 and not deep:
        raise InputError(f"image array of {array.dtype}: give uint8, 0..255")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in (3, 4)):
        raise InputError(
            f"image array of shape {list(array.shape)}: "
            "give [height, width] or [height, width, 1, 3 or 4]"
        )
    _check_size((array.shape[1], array.shape[0]), "image array")
    return finish(PIL.Image.fromarray(array), "image array")


def _upright(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    _check_size(image.size, name)
    image.load()
    return PIL.ImageOps.exif_transpose(image) if image.getexif().get(0x0112, 1) != 1 else image


def _kept(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    image = _upright(image, name)
    if image.mode in ("RGB", "P", "L", "I;16"):
        return image
    return image.convert("L") if image.mode in ("1", "LA", "La") else _rgb(image, name)


def _rgb(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    image = _upright(image, name)
    if image.mode == "RGB":
        return image
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, and PIL does not warn
    try:
        return image.convert("RGB")
    except ValueError:
        raise InputError(f"{name} has mode {image.mode}: convert it to RGB first") from None


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise InputError(f"{name} has {width} x {height} pixels: it needs at least 1 x 1")
    if width * height > SIZE_LIMIT_PIXELS:
        raise InputError(
            f"{name} has {width} x {height} pixels: at most {SIZE_LIMIT_PIXELS} are allowed"
        )


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Turn all that PIL can say about a bad file into one InputError."""
    with HUSH:
        try:
            yield
        except (InputError, MemoryError):
            raise
        except PIL.UnidentifiedImageError:
            raise InputError(
                f"{name} is in no format that Pillow reads: give JPEG, PNG, WebP, BMP, GIF or TIFF"
            ) from None
        except PIL.Image.DecompressionBombError:
            raise InputError(
                f"{name} has too many pixels: at most {SIZE_LIMIT_PIXELS} are allowed"
            ) from None
        except Exception as error:  # PIL's decoders raise whatever their parser ran into
            raise InputError(
                f"{name} is damaged or cut short ({_line(error)}): save or download it again"
            ) from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _fit(image: PIL.Image.Image, front: ImageFrontEnd) -> PIL.Image.Image:
    if image.mode != "RGB":
        raise InputError(f"image of mode {image.mode}: open it with load_image, which gives RGB")
    width, height = image.size
    _check_size(image.size, "image")
    if front.square is not None:
        side = max(image.size)
        _check_size((side, side), f"image of {width} x {height} pixels, in a square,")
        image = squared(image, front.square)
        width = height = side
    new_height, new_width = front.resize_size
    if front.resize == "shortest_edge":
        short, long = sorted(image.size)
        if long > SIDES_LIMIT_RATIO * short:
            raise InputError(
                f"sides of {width} x {height} pixels: the longer side may be at most "
                f"{SIDES_LIMIT_RATIO} times the shorter"
            )
        # transformers.image_transforms.get_resize_output_image_size: the long side is cut off,
        # not rounded, and the product comes before the division.
        edge = front.resize_size[0]
        new_long = int(edge * long / short)
        new_height, new_width = (new_long, edge) if width <= height else (edge, new_long)
    if front.resample == "floor":
        image = _picked(image, new_width, new_height)
    else:
        resample = PIL.Image.Resampling[front.resample.upper()]
        image = image.resize((new_width, new_height), resample)
    if front.crop_size is None:
        return image
    # Floors like transformers' center_crop; PIL fills what lies outside the picture with zeros.
    crop_height, crop_width = front.crop_size
    top, left = (new_height - crop_height) // 2, (new_width - crop_width) // 2
    return image.crop((left, top, left + crop_width, top + crop_height))


def _picked(image: PIL.Image.Image, width: int, height: int) -> PIL.Image.Image:
    """Resize as torch.nn.functional.interpolate does by default, whose scale is a float32."""
    rows, columns = (
        np.floor(np.arange(to, dtype=np.float32) * (np.float32(size) / np.float32(to)))
        for size, to in ((image.height, height), (image.width, width))
    )
    pixels = np.asarray(image)
    rows = np.minimum(rows, image.height - 1).astype(np.int64)
    columns = np.minimum(columns, image.width - 1).astype(np.int64)
    return PIL.Image.fromarray(pixels[rows[:, None], columns])


def _refuse(config: Mapping[str, Any], field: str, allowed: str) -> NoReturn:
    got = f"{config[field]!r}" if field in config else "is missing"
    raise CheckpointError(f"preprocessor_config.json: {field} {got}: {allowed}")


def _sides(size: object) -> dict[str, Any]:
    """The sides that a size names; transformers writes unused ones as null."""
    if not isinstance(size, Mapping):
        return {}
    return {name: side for name, side in size.items() if side is not None}


def _is_side(side: object) -> bool:
    return isinstance(side, int) and not isinstance(side, bool) and side >= 1


def _square(config: Mapping[str, Any], field: str) -> tuple[int, int]:
    size = config.get(field)
    sides = _sides(size) or {"height": size, "width": size}
    if sides.keys() != {"height", "width"} or not all(map(_is_side, sides.values())):
        _refuse(config, field, "give a side, or height and width, in whole pixels, at least 1")
    return sides["height"], sides["width"]


def _factor(config: Mapping[str, Any]) -> float:
    factor = config.get("rescale_factor", 1 / 255)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < np.inf:
        _refuse(config, "rescale_factor", "give a number above 0, as 1/255")
    return float(factor)


def _three(config: Mapping[str, Any], field: str) -> tuple[float, float, float]:
    value = config.get(field)
    figures = [value] * 3 if isinstance(value, int | float) else value
    if (
        not isinstance(figures, Sequence)
        or len(figures) != 3
        or not all(isinstance(x, int | float) and np.isfinite(x) for x in figures)
        or (field == "image_std" and not all(figures))
    ):
        _refuse(config, field, "give three figures, one for each of R, G and B, a std not 0")
    red, green, blue = figures
    return float(red), float(green), float(blue)
