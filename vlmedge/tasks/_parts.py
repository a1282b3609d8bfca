"""What every task works with: a model's graphs and its front ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vlmedge.bundle import Bundle
from vlmedge.contracts import Array, Arrays, Graph
from vlmedge.errors import InputError
from vlmedge.image import Grid, ImageSource, Pictures, load_image, preprocess
from vlmedge.sampling import Ids
from vlmedge.spec import ImageFrontEnd, TextFrontEnd
from vlmedge.text import Tokenizer
from vlmedge.tiling import cut
from vlmedge.video import Video, read_frames

IMAGES_PER_BATCH = 8  # more gain little on a CPU, and memory grows with them


@dataclass(frozen=True)
class Parts:
    """A bundle's graphs, opened by whoever made this (an engine, or PyTorch as the reference)."""

    bundle: Bundle
    graphs: Mapping[str, Graph]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The text front end."""
        return Tokenizer(self.bundle.path / self.text_front.tokenizer, self.text_front)

    @cached_property
    def _table(self) -> Array:
        return self.bundle.embeddings()

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

    def pixels(self, images: Sequence[ImageSource]) -> NDArray[np.float32]:
        """Make pixel_values, float32 [pieces, 3, height, width]: one piece a picture, or tiles."""
        return self.pictures(images).pixel_values

    def pictures(self, images: Sequence[ImageSource]) -> Pictures:
        """Make pixel_values, and say how each picture was cut."""
        front = self.image_front
        opened = [load_image(image) for image in images]
        if front.tiling is None:
            return Pictures(preprocess(opened, front), (Grid(),) * len(opened))
        made = [cut(image, front.tiling, front.resample) for image in opened]
        pieces = [piece for found, _ in made for piece in found]
        return Pictures(preprocess(pieces, front), tuple(grid for _, grid in made))

    def frames(self, video: Video) -> NDArray[np.float32]:
        """Make pixel_values of the frames that count, float32 [frames, 3, height, width]."""
        front = self.bundle.spec.video
        if front is None:
            raise InputError(f"{self.bundle.path} takes no videos: give it images")
        return preprocess(read_frames(video, front), front.frame)

    def batches(self, images: Sequence[ImageSource]) -> Iterator[NDArray[np.float32]]:
        """Make pixel_values in batches of at most IMAGES_PER_BATCH."""
        if not images:
            raise InputError("no images: give at least one")
        for start in range(0, len(images), IMAGES_PER_BATCH):
            yield self.pixels(images[start : start + IMAGES_PER_BATCH])

    def embed(self, ids: Ids) -> NDArray[np.float32]:
        """Look up token embeddings: int64 [...] to float32 [..., width]."""
        return np.asarray(self._table[ids], dtype=np.float32)

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
