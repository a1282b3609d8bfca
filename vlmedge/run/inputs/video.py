"""Videos to frames: which ones a model looks at, and how they come out of what the user has."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from vlmedge.errors import InputError, MissingExtraError
from vlmedge.run.inputs.image_files import load_image, pictures_in
from vlmedge.spec import VideoFrontEnd

if TYPE_CHECKING:
    from av.container import InputContainer

VIDEO_ENDINGS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv")

Pick = Callable[[int, "float | None"], list[int]]
"""Number of frames and frames per second (None: unknown) -> numbers of those to look at."""


@dataclass(frozen=True, slots=True)
class Video:
    """A video, which stands in place of an image in `Model.caption`, `captions`, `ask`, `stream`.

    Files and bytes need PyAV (`pip install 'vlmedge[video]'`); folders and arrays need nothing.

    Attributes:
        source: Path of a file, its bytes, path of a folder whose pictures are the frames in the
            order of their names, or uint8 [frames, height, width, 3], RGB.
        frames: Number of frames that the model looks at, at least 1. None: the number that the
            checkpoint was trained with, which may depend on the video's length.

    Examples:
        >>> model.caption(vlmedge.Video("clip.mp4", frames=8))
        'a cat jumps onto a sofa'
    """

    source: str | Path | bytes | NDArray[np.uint8]
    frames: int | None = None


def is_video(path: str) -> bool:
    """Return whether a path is that of a video, by its ending, or of a folder of frames."""
    return path.lower().endswith(VIDEO_ENDINGS) or os.path.isdir(path)


def read_frames(video: Video, front: VideoFrontEnd) -> list[PIL.Image.Image]:
    """Read the frames of a video that a model looks at.

    Args:
        video: The video.
        front: The checkpoint's rule for choosing frames.

    Returns:
        RGB images in the order of time; no more than the video has.

    Raises:
        InputError: The video cannot be read, has no frames, or `frames` is out of range.
        MissingExtraError: The video is a file or its bytes, and PyAV is not installed.
    """
    if video.frames is not None and video.frames < 1:
        raise InputError(f"frames is {video.frames}: it must be at least 1")
    if video.frames is not None and front.limit is not None and video.frames > front.limit:
        raise InputError(f"frames is {video.frames}: this model takes {front.limit} at most")
    source = video.source

    def pick(total: int, fps: float | None) -> list[int]:
        return chosen(total, fps, front, video.frames)

    if isinstance(source, np.ndarray):
        return _from_array(source, pick)
    if isinstance(source, bytes):
        return _from_file(lambda: io.BytesIO(source), f"video of {len(source)} bytes", pick)
    if not isinstance(source, str | os.PathLike):
        raise InputError(
            f"video of type {type(source).__name__}: give a path, bytes or a uint8 array"
        )
    path = os.fspath(source)
    if path.startswith(("http://", "https://")):
        raise InputError(f"{path} is a web address: download the video and give its path or bytes")
    if os.path.isdir(path):
        files = sorted(pictures_in(Path(path)), key=_natural)
        return [load_image(files[i]) for i in pick(len(files), None)]
    if not os.path.isfile(path):
        raise InputError(f"no file {path}: give the path of a video, or of a folder of frames")
    return _from_file(lambda: path, f"video {path}", pick)


def chosen(
    total: int, fps: float | None, front: VideoFrontEnd, frames: int | None = None
) -> list[int]:
    """Choose the frames that a model looks at.

    Args:
        total: Number of frames of the video, at least 1.
        fps: Frames per second, or None if unknown.
        front: The checkpoint's rule.
        frames: Number of frames that the user wants; None leaves it to the rule.

    Returns:
        Numbers of frames from 0, never falling; at most `total` of them. The rule "middle" may
        choose a frame twice.
    """
    count = front.frames if frames is None else frames
    if frames is None and front.fps is not None:
        if fps is None:
            raise InputError(
                f"this model takes {front.fps:g} frames a second, and the video has no frame rate: "
                "give the number of frames"
            )
        count = min(count, max(1, int(total / fps * front.fps)))  # transformers' order
    count = min(count, total)
    steps = np.arange(count + 1)
    if front.rule == "floor":
        found = steps[:-1] * total // count
    elif front.rule == "ends":
        found = np.linspace(0, total - 1, count).astype(np.int64)
    else:
        edges = np.round((total - 1) / count * steps).astype(np.int64)
        found = (edges[:-1] + edges[1:]) // 2
    return [int(i) for i in found]


def _from_array(array: NDArray[Any], pick: Pick) -> list[PIL.Image.Image]:
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
        raise InputError(
            f"video array of {array.dtype} {list(array.shape)}: "
            "give uint8 [frames, height, width, 3]"
        )
    if not len(array):
        raise InputError("video array without frames: give at least one")
    return [load_image(array[i]) for i in pick(len(array), None)]


def _from_file(source: Callable[[], Any], name: str, pick: Pick) -> list[PIL.Image.Image]:
    """Decode up to the last frame that is looked at; a header's count of them may be wrong."""
    with _opened(source(), name) as container:
        stream = container.streams.video[0]
        total, rate = stream.frames, stream.average_rate
    fps = float(rate) if rate else None
    while True:
        wanted = pick(total, fps) if total else []
        found, seen = _decoded(source(), name, wanted)
        if wanted and len(found) == len(wanted):
            return found
        if not seen:
            raise InputError(f"{name} has no frames: give another video")
        total = seen  # there was no count, or too high a one


def _decoded(source: Any, name: str, wanted: Sequence[int]) -> tuple[list[PIL.Image.Image], int]:
    """Decode the frames of these numbers, and say how many were there to be seen."""
    found, seen = [], 0
    places = set(wanted)
    with _opened(source, name) as container:
        for frame in container.decode(video=0):
            if seen in places:
                found.append(load_image(np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)))
            seen += 1
            if wanted and seen > wanted[-1]:
                break
    return found, seen


@contextmanager
def _opened(source: Any, name: str) -> Iterator[InputContainer]:
    """Open a file with PyAV, and turn all that FFmpeg can say of a bad one into one error."""
    try:
        import av
    except ImportError:
        raise MissingExtraError(
            "video files need the package av: pip install 'vlmedge[video]', "
            "or give a folder of frames"
        ) from None
    try:
        with av.open(source) as container:
            if not container.streams.video:
                raise InputError(f"{name} has only sound: give a file with a video track")
            yield container
    except av.FFmpegError as error:
        line = " ".join(str(error.strerror).split())
        raise InputError(
            f"{name} is not a video that FFmpeg reads, or is cut short ({line}): give MP4, MKV, "
            "WebM, MOV or AVI"
        ) from None


def _natural(file: Path) -> list[tuple[int, str]]:
    """Order frame-2 before frame-10."""
    parts = re.findall(r"\d+|\D+", file.name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
