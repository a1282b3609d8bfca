"""What a benchmark asks of a bundle: one answer of each task, from a decoded picture on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from vlmedge.checkpoints.scenes import CLASSES, draw_scene
from vlmedge.run.inputs.image_files import load_image
from vlmedge.run.tasks.context import TaskContext
from vlmedge.run.tasks.trial import Facts, Samples, trials

NEW_TOKENS = 20
TEXT = f"a photo of a {CLASSES[0]}"
PICTURE = load_image(draw_scene(0, "heldout").image)

Item = Callable[[int], Facts]
"""Gives one answer; one that is written has so many tokens, or what the model can at most."""


def items(context: TaskContext) -> dict[str, Item]:
    """Return each task by its name; of tasks that would run the same, the first."""
    samples = Samples((PICTURE,), ("what is it?",), labels=(TEXT,))
    found: dict[str, Item] = {}
    seen: set[tuple[type, tuple[str, ...]]] = set()
    for trial in trials(context):
        runs = type(trial), trial.components
        if runs not in seen:
            seen.add(runs)
            found[trial.name] = partial(trial.answer, samples)
    return found
