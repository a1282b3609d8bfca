"""Pictures from paths, bytes, PIL images and arrays, upright and in RGB."""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from vlmedge.errors import InputError

ImageSource = str | Path | bytes | PIL.Image.Image | NDArray[np.uint8]

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
SIZE_LIMIT_PIXELS = 178_956_970  # where PIL itself raises DecompressionBombError


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


def _from_path(path: str | bytes, finish: Finish) -> PIL.Image.Image:
    text = os.fsdecode(path)
    if not text:
        raise InputError("empty path: give the path of an image file")
    name = text if text.isprintable() and len(text) <= 200 else f"{text[:200]!r}"
    if text.startswith(("http://", "https://", "data:")):
        raise InputError(f"{name} is a web address: download the image and give its path or bytes")
    try:
        file = Path(text)
        if file.is_dir():
            raise InputError(f"{name} is a folder: give the path of one image file")
        if file.exists() and not file.is_file():  # a pipe or a device could block for ever
            raise InputError(f"{name} is no regular file: give the path of an image file")
        with file.open("rb") as stream:
            return _from_file(stream, f"image {name}", finish)
    except FileNotFoundError:
        raise InputError(f"no file {name}: give the path of an image file") from None
    except PermissionError:
        raise InputError(f"file {name} cannot be read: you have no read permission") from None
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
                f"{name} is in a format that Pillow cannot read: give JPEG, PNG, WebP, BMP, GIF "
                "or TIFF"
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
