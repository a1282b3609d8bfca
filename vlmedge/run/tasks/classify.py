"""Image in, a ranking of labels out: of labels that the caller gives, or of a closed head's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from vlmedge.run.tasks import embed as embedding
from vlmedge.run.tasks import label as labelling
from vlmedge.run.tasks.context import TaskContext
from vlmedge.spec import LabelTask, MatchTask

Labels = Sequence[str] | None
Template = str | Sequence[str] | None
Ranking = list[tuple[str, float]]
"""(label, probability) pairs, best first."""
Rank = Callable[[NDArray[np.float32]], list[Ranking]]
"""pixel_values, float32 [images, 3, height, width] -> a ranking for each image."""


class LabelVectors:
    """The vectors of the labels that were last chosen from; the next call mostly has the same."""

    def __init__(self) -> None:
        self._kept: tuple[list[list[str]], NDArray[np.float32]] | None = None

    def of(
        self, context: TaskContext, task: MatchTask, labels: Sequence[str], template: Template
    ) -> NDArray[np.float32]:
        """Return one unit vector for each label, float32 [labels, width]."""
        texts = embedding.sentences(task.template if template is None else template, labels)
        if self._kept is None or self._kept[0] != texts:
            self._kept = (texts, embedding.embed_ensemble(context, task, texts))
        return self._kept[1]

    def forget(self) -> None:
        """Forget the vectors: the text encoder may have changed."""
        self._kept = None


def ranker(context: TaskContext, vectors: LabelVectors, labels: Labels, template: Template) -> Rank:
    """Return what ranks labels for images.

    Args:
        context: The model.
        vectors: Where the vectors of labels are kept.
        labels: Labels to choose from, any iterable, which is read once; None: the model's own.
        template: Text around a label, see `Model.classify`.

    Raises:
        InputError: The bundle needs labels, or has its own and takes none.
    """
    given = labels if labels is None or isinstance(labels, str) else list(labels)
    names: Sequence[str]
    if labelling.is_closed(context.bundle, given, template):
        closed = context.task("classify", LabelTask)
        names = labelling.read_labels(context.bundle, closed)
        return lambda pixels: _ranked(names, labelling.probabilities(context, closed, pixels))
    task = context.task("classify", MatchTask)
    assert given is not None
    names, texts = given, vectors.of(context, task, given, template)

    def rank(pixels: NDArray[np.float32]) -> list[Ranking]:
        seen = embedding.embed_pixels(context, task.image, task.image_output, pixels)
        return _ranked(names, embedding.probabilities(task, seen, texts))

    return rank


def _ranked(names: Sequence[str], shares: NDArray[np.float32]) -> list[Ranking]:
    """Sort each row of [images, labels], best first; labels that draw keep their order."""
    return [[(names[i], float(row[i])) for i in np.argsort(-row, kind="stable")] for row in shares]
