"""What every task works with: a model's graphs and its front ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from threading import RLock
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from vlmedge.arrays import Array, Arrays, Ids
from vlmedge.bundle import Bundle
from vlmedge.bundle.embedding_table import EmbeddingRows
from vlmedge.errors import InputError
from vlmedge.run.decode.sampling import options as merge
from vlmedge.run.inputs.image import Grid, Pictures, fit, normalize
from vlmedge.run.inputs.image_files import ImageSource, load_image
from vlmedge.run.inputs.text import Tokenizer
from vlmedge.run.inputs.tiling import cut
from vlmedge.run.inputs.video import Video, read_frames
from vlmedge.shelves.contracts import Graph
from vlmedge.shelves.registry import unknown
from vlmedge.spec import Generation, ImageFrontEnd, TextFrontEnd, VideoFrontEnd

T = TypeVar("T")

IMAGES_PER_BATCH = 8  # more gain little on a CPU, and memory grows with them


@dataclass(frozen=True, slots=True)
class Opened:
    """A picture, decoded and resized; it waits as bytes, a quarter of what an encoder takes.

    Attributes:
        pieces: Each uint8 [height, width, 3]: its tiles and the whole, or the frames of a video.
        grid: How it is cut.
        size: (width, height) of the picture, or of a video's frames, as they came, pixels.
    """

    pieces: tuple[NDArray[np.uint8], ...]
    grid: Grid
    size: tuple[int, int]


@dataclass(frozen=True)
class TaskContext:
    """A bundle's graphs, opened by whoever made this (an engine, or PyTorch as the reference)."""

    bundle: Bundle
    graphs: Mapping[str, Graph]
    rows: EmbeddingRows | None = None
    """The token embedding table, where it is not to be the bundle's."""
    turn: AbstractContextManager[bool] = field(default_factory=RLock, repr=False, compare=False)
    """Held by the call that works with the graphs."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The text front end."""
        return Tokenizer(self.bundle.path / self.text_front.tokenizer, self.text_front)

    @cached_property
    def instruction_tokenizer(self) -> Tokenizer:
        """The text front end of what reads a text before the language model does."""
        front = self.bundle.spec.instruction
        if front is None:
            raise InputError(
                f"{self.bundle.path} has no text front end for instructions: export it again"
            )
        return Tokenizer(self.bundle.path / front.tokenizer, front)

    @cached_property
    def _table(self) -> EmbeddingRows:
        return self.bundle.embeddings() if self.rows is None else self.rows

    @property
    def text_front(self) -> TextFrontEnd:
        """How texts become ids."""
        if self.bundle.spec.text is None:
            raise InputError(f"{self.bundle.path} takes no text: it has no text front end")
        return self.bundle.spec.text

    @property
    def image_front(self) -> ImageFrontEnd:
        """How pictures become pixels; as frames do where there are videos alone."""
        spec = self.bundle.spec
        if spec.image is not None:
            return spec.image
        if spec.video is not None:
            return spec.video.frame
        raise InputError(f"{self.bundle.path} takes no images: it has no image front end")

    def task(self, name: str, kind: type[T]) -> T:
        """Return the wiring of a task that must be of one kind."""
        task = self.bundle.spec.tasks.get(name)
        if not isinstance(task, kind):
            raise unknown("task", name, sorted(self.bundle.spec.tasks))
        return task

    def options(self, given: Mapping[str, Any]) -> Generation:
        """Put a call's options over the bundle's."""
        defaults = self.bundle.spec.generation
        if defaults is None:
            raise InputError(f"{self.bundle.path} writes no text: it has no generation defaults")
        return merge(defaults, **given)

    def options_of_a_stream(self, given: Mapping[str, Any]) -> Generation:
        """Put a call's options over the bundle's, but for its beams, which cannot stream."""
        beams = given.get("num_beams")
        return self.options({**given, "num_beams": 1 if beams is None else beams})

    def pixels(self, images: Sequence[ImageSource]) -> NDArray[np.float32]:
        """Make pixel_values, float32 [pieces, 3, height, width]: one piece a picture, or tiles."""
        return self.pictures(images).pixel_values

    def pictures(self, images: Sequence[ImageSource]) -> Pictures:
        """Make pixel_values, and say how each picture was cut."""
        return self.ready([self.open(image) for image in images])

    def open(self, image: ImageSource | Video) -> Opened:
        """Decode and resize one picture or video; threads may do it at the same time."""
        if isinstance(image, Video):
            clips = self._video_front
            frames = read_frames(image, clips)
            seen = tuple(fit(frame, clips.frame) for frame in frames)
            return Opened(seen, Grid(), frames[0].size)
        front = self.image_front
        picture = load_image(image)
        if front.tiling is None:
            return Opened((fit(picture, front),), Grid(), picture.size)
        pieces, grid = cut(picture, front.tiling, front.resample)
        return Opened(tuple(fit(piece, front) for piece in pieces), grid, picture.size)

    def ready(self, opened: Sequence[Opened]) -> Pictures:
        """Make pixel_values of pictures that are open."""
        pieces = [piece for one in opened for piece in one.pieces]
        return Pictures(normalize(pieces, self.image_front), tuple(one.grid for one in opened))

    def frames(self, video: Opened) -> NDArray[np.float32]:
        """Make pixel_values of a video that is open, float32 [frames, 3, height, width]."""
        return normalize(video.pieces, self._video_front.frame)

    @property
    def _video_front(self) -> VideoFrontEnd:
        if self.bundle.spec.video is None:
            raise InputError(f"{self.bundle.path} takes no videos: give it images")
        return self.bundle.spec.video

    def batches(self, images: Sequence[ImageSource]) -> Iterator[NDArray[np.float32]]:
        """Make pixel_values in batches of at most IMAGES_PER_BATCH."""
        if not images:
            raise InputError("no images: give at least one")
        for start in range(0, len(images), IMAGES_PER_BATCH):
            yield self.pixels(images[start : start + IMAGES_PER_BATCH])

    def embed(self, ids: Ids) -> NDArray[np.float32]:
        """Look up token embeddings: int64 [...] to float32 [..., width]."""
        return self._table[ids]

    def chain(self, components: Sequence[str], tensors: Arrays) -> dict[str, Array]:
        """Run components in order; each takes its inputs from what came before, by name."""
        known = dict(tensors)
        for name in components:
            graph = self.graphs[name]
            known |= graph.run({spec.name: known[spec.name] for spec in graph.component.inputs})
        return known


def activate(
    logits: NDArray[np.float32], activation: Literal["softmax", "sigmoid"]
) -> NDArray[np.float32]:
    """Turn logits [rows, choices] into probabilities, a row at a time or each on its own."""
    if activation == "sigmoid":
        alone: NDArray[np.float32] = np.exp(-np.logaddexp(np.float32(0), -logits))
        return alone
    exponents = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares: NDArray[np.float32] = exponents / exponents.sum(axis=-1, keepdims=True)
    return shares
