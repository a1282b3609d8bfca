"""One image in, a probability for each label of a closed head out."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vlmedge.bundle import Bundle
from vlmedge.errors import BundleError, InputError
from vlmedge.run.tasks.context import TaskContext, activate
from vlmedge.run.tasks.trial import Choices, Facts, Pool, Samples, Trial
from vlmedge.spec import LabelTask, MatchTask


def is_closed(
    bundle: Bundle, labels: Sequence[str] | None, template: str | Sequence[str] | None
) -> bool:
    """Return whether a bundle chooses from its own labels; else it must be given some."""
    task = bundle.spec.tasks.get("classify")
    if isinstance(task, LabelTask) and (labels is not None or template is not None):
        raise InputError(
            f"{bundle.path} has a closed head with labels of its own: leave labels out"
        )
    if isinstance(task, MatchTask) and labels is None:
        raise InputError(f"{bundle.path} has no labels of its own: give labels")
    return isinstance(task, LabelTask)


def read_labels(bundle: Bundle, task: LabelTask) -> list[str]:
    """Read the names that the head was trained on, in the order of its logits."""
    file = bundle.path / task.labels
    try:
        labels = json.loads(file.read_bytes())
    except (OSError, ValueError):
        raise BundleError(f"{file} cannot be read as JSON: export the bundle again") from None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise BundleError(f"{file} is not a list of names: export the bundle again")
    return labels


def probabilities(
    context: TaskContext, task: LabelTask, pixel_values: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return the probability of each label, float32 [images, labels]."""
    found = context.chain(task.encode, {context.bundle.spec.pixels: pixel_values})
    return activate(found[task.output], task.activation)


class LabelTrial(Trial[LabelTask], of=LabelTask):
    """A closed head, on samples."""

    @property
    def components(self) -> tuple[str, ...]:
        """The encoder with its head."""
        return self.task.encode

    def answer(self, samples: Samples, tokens: int) -> Facts:
        """Classify one picture."""
        probabilities(self.context, self.task, self.context.pixels(samples.images[:1]))
        return {}

    def choices(self, pool: Pool) -> Choices:
        """Return the label that each picture gets."""
        logits = pool.whole(self.task.output)
        title = f"{self.name}, {logits.shape[1]} labels of its own"
        return Choices(title, logits.argmax(axis=1).tolist())
