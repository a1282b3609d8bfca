"""A picture and a text together: do they belong to each other, and which word fills a gap."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vlmedge.arrays import Array, Ids
from vlmedge.errors import InputError
from vlmedge.run.inputs.image_files import ImageSource
from vlmedge.run.tasks.context import TaskContext, activate
from vlmedge.run.tasks.trial import Choices, Facts, Pool, Samples, Trial
from vlmedge.spec import InfillTask, ScoreTask

TEXTS_PER_BATCH = 8  # each looks at its own copy of the picture

Candidates = list[tuple[str, float]]


def score(
    context: TaskContext, task: ScoreTask, images: Sequence[ImageSource], texts: Sequence[str]
) -> NDArray[np.float32]:
    """Return the probability that each image and each text match, float32 [images, texts]."""
    if not texts:
        raise InputError("no texts: give at least one")
    ids, mask = context.tokenizer.encode(texts)
    found = np.empty((len(images), len(texts)), np.float32)
    row = 0
    for pixels in context.batches(images):
        seen = context.chain(task.image, {context.bundle.spec.pixels: pixels})
        for i in range(len(pixels)):
            for start in range(0, len(texts), TEXTS_PER_BATCH):
                some = slice(start, start + TEXTS_PER_BATCH)
                logits = _together(context, task, seen, i, ids[some], mask[some])
                found[row, some] = activate(logits, "softmax")[:, 1]
            row += 1
    return found


def infill(
    context: TaskContext, task: InfillTask, image: ImageSource, text: str, count: int
) -> list[Candidates]:
    """Rank what may stand in each gap of a text.

    Returns:
        For each gap its (token, probability) pairs, best first.
    """
    if count < 1:
        raise InputError(f"top is {count}: it must be at least 1")
    ids, mask = context.tokenizer.encode([text])
    gaps = np.flatnonzero(ids[0] == task.mask_id)
    if not len(gaps):
        raise InputError(
            f"text {text!r} has no gap: write {task.mask_text} where a word is missing"
        )
    seen = context.chain(task.image, {context.bundle.spec.pixels: context.pixels([image])})
    logits = _together(context, task, seen, 0, ids, mask)[0, gaps]
    return [
        [
            (context.tokenizer.decode([int(i)]).strip(), float(row[i]))
            for i in np.argsort(-row)[:count]
        ]
        for row in activate(logits, "softmax")
    ]


def _together(
    context: TaskContext,
    task: ScoreTask | InfillTask,
    seen: dict[str, Array],
    i: int,
    ids: Ids,
    mask: Ids,
) -> Array:
    """Run the text's components on some texts, each with its own copy of picture i."""
    components = [context.bundle.spec.component(name) for name in task.text]
    wanted = {spec.name for component in components for spec in component.inputs}
    copies = {
        name: np.repeat(array[i : i + 1], len(ids), axis=0)
        for name, array in seen.items()
        if name in wanted
    }
    known = context.chain(task.text, copies | {"input_ids": ids, "attention_mask": mask})
    return known[task.output]


class ScoreTrial(Trial[ScoreTask], of=ScoreTask):
    """The verdict about pairs, on samples."""

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components that encode the picture and those that read the text with it."""
        return (*self.task.image, *self.task.text)

    def answer(self, samples: Samples, tokens: int) -> Facts:
        """Score one picture with one text."""
        score(self.context, self.task, samples.images[:1], samples.labels[:1])
        return {}

    def choices(self, pool: Pool) -> Choices:
        """Return whether each picture and its text belong together."""
        verdicts = pool.whole(self.task.output).argmax(axis=1).tolist()
        return Choices(f"{self.name}, yes or no", verdicts)


class InfillTrial(Trial[InfillTask], of=InfillTask):
    """Words for gaps, on samples."""

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components that encode the picture and those that read the text with it."""
        return (*self.task.image, *self.task.text)

    def answer(self, samples: Samples, tokens: int) -> Facts:
        """Fill one gap."""
        text = f"a photo of a {self.task.mask_text}"
        infill(self.context, self.task, samples.images[0], text, 1)
        return {}

    def choices(self, pool: Pool) -> Choices:
        """Return the likeliest word in the place of each text's last one."""
        scores = pool.whole(self.task.output)
        count = len(scores)
        last = pool.whole("attention_mask")[:count].sum(axis=1) - 2  # before the end token
        words = scores[np.arange(count), last].argmax(axis=1).tolist()
        return Choices(f"{self.name}, last word", words)
