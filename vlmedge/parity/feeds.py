"""The walk of the wiring: the inputs of each component, from the outputs of those before it.

    front ends, tasks --> Feeds --feed--> component --its outputs--> Feeds --feed--> next component

The gate, calibration and the probe of a new engine walk with it and bring what they do with a
component: compare it, watch it, try it. Kinds of task are known to their own files (`Trial`), and
kinds of front end to the table FRONT_ENDS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlmedge.arrays import Array
from vlmedge.errors import InputError
from vlmedge.run.decode import prompt as prompts
from vlmedge.run.decode.prompt import Prompt
from vlmedge.run.inputs.image import Grid
from vlmedge.run.inputs.text import Tokenizer
from vlmedge.run.tasks.context import IMAGES_PER_BATCH, TaskContext
from vlmedge.run.tasks.trial import Column, Made, Samples, Whole, Writer, trials
from vlmedge.spec import (
    Component,
    FrontEnd,
    Generation,
    ImageFrontEnd,
    TextFrontEnd,
    VideoFrontEnd,
)
from vlmedge.spec.wiring import front_ends_by_input


class Feeds:
    """The tensors of every sample that are known so far; a `vlmedge.run.tasks.trial.Pool`.

    Attributes:
        context: The bundle, and its graphs where a task's own components are to be run.
        samples: The samples that are fed.
        trials: The bundle's tasks.
    """

    def __init__(self, context: TaskContext, samples: Samples, frames: int | None = None) -> None:
        """Begin before the first component.

        Args:
            context: The bundle.
            samples: The samples to feed.
            frames: How many pictures in a row a video is made of, the first piece of each; none:
                a video is one picture, whose pieces are its frames.
        """
        self.context, self.samples, self._frames = context, samples, frames
        self.trials = trials(context)
        self._given: dict[str, Column] = {}  # by components, or with what they gave
        self._made: dict[str, Column] = {}  # from the samples alone
        self._grids: dict[int, Grid] = {}

    def beside(self, context: TaskContext) -> Feeds:
        """Return the same samples for another side, sharing the tensors made from samples alone."""
        other = Feeds(context, self.samples, self._frames)
        other._made, other._grids = self._made, self._grids
        return other

    def __contains__(self, name: str) -> bool:
        """Return whether a tensor is known."""
        return name in self._given or name in self._made

    def column(self, name: str) -> Column:
        """Return a tensor of every sample."""
        return self._given[name] if name in self._given else self._made[name]

    def at(self, name: str, i: int) -> Array:
        """Return a tensor of sample i; fewer rows than samples begin again."""
        column = self.column(name)
        return column.at(i % len(column))

    def clip(self, name: str, i: int) -> Array:
        """Return a tensor of a short video that begins with sample i, [frames, ...]."""
        if self._frames is None:
            return self.at(name, i)
        count = min(self._frames, len(self.column(name)))
        return np.concatenate([self.at(name, i + k)[:1] for k in range(count)])

    def grid(self, i: int) -> Grid:
        """Return how picture i is cut."""
        if i not in self._grids:
            self.picture(i)
        return self._grids[i]

    def picture(self, i: int) -> Array:
        """Make the pixel_values of picture i; an error names its file."""
        image = self.samples.images[i]
        try:
            made = self.context.pictures([image])
        except InputError as error:
            name = str(image) if isinstance(image, Path) else ""
            raise error if name in str(error) else InputError(f"{name}: {error}") from None
        [self._grids[i]] = made.grids
        return made.pixel_values

    def whole(self, name: str) -> Array:
        """Return a tensor of all samples, one after the other; it stays in memory."""
        return self._settle([name])[name]

    def prepare(self, component: Component) -> bool:
        """Make the inputs that no component before it gave; return whether it can be fed now.

        Tasks come first, the last one before the others, and then the front ends. A decoder is not
        fed from here but shown a prompt.
        """
        if component.state:
            return False
        for trial in reversed(self.trials):
            if self._lacks(component):
                self._given |= trial.mixed(component, self)
            if self._lacks(component):
                self._made |= self._new(trial.inputs(component, self.samples))
        for name, front in front_ends_by_input(self.context.bundle.spec).items():
            if name in self._lacks(component):
                self._made |= self._new(FRONT_ENDS[type(front)](self, name, front))
        return not self._lacks(component)

    def count(self, component: Component) -> int:
        """Count the samples that a component can be fed: of pictures and texts, as many as both."""
        return min(len(self.column(spec.name)) for spec in component.inputs)

    def feed(self, component: Component, i: int) -> dict[str, Array]:
        """Return the feeds of a component without state for sample i, after `prepare` was true."""
        take = self.clip if component.takes_clips else self.at
        return {spec.name: take(spec.name, i) for spec in component.inputs}

    def batches(self, component: Component) -> Iterator[dict[str, Array]]:
        """Yield what a component is fed of all samples, some rows at a time, or one clip."""
        arrays = self._settle([spec.name for spec in component.inputs])
        if component.takes_clips:
            yield from (self.feed(component, i) for i in range(self.count(component)))
            return
        yield from cut(arrays)

    def learn(self, component: Component, outputs: Mapping[str, Array]) -> None:
        """Keep what a component gave for all that `batches` yielded."""
        shortest = min((self.column(spec.name) for spec in component.inputs), key=_rows)
        sizes = None if component.takes_clips else getattr(shortest, "sizes", None)
        self.add({name: Whole(array, sizes) for name, array in outputs.items()})

    def add(self, columns: Mapping[str, Column]) -> None:
        """Keep what a component gave."""
        self._given |= columns

    def prompt(self, component: Component, i: int, options: Generation) -> Prompt | None:
        """Make what a decoder reads about sample i; the tasks that write with it take turns.

        Returns:
            The prompt; none where what it is made of is not known.
        """
        trial = (found := self.writers(component))[i % len(found)]
        shown = trial.known(self, i)
        return None if shown is None else trial.prompt(shown, options)

    def writers(self, component: Component) -> list[Writer[Any]]:
        """Return the trials that write with a decoder."""
        writers = [trial for trial in self.trials if isinstance(trial, Writer)]
        return [trial for trial in writers if trial.decoder == component.name]

    def _lacks(self, component: Component) -> set[str]:
        return {spec.name for spec in component.inputs if spec.name not in self}

    def _new(self, columns: Mapping[str, Column]) -> dict[str, Column]:
        return {name: column for name, column in columns.items() if name not in self}

    def _settle(self, names: list[str]) -> dict[str, Array]:
        """Bring columns into memory, one sample after the other as `Trial.inputs` likes it."""
        lazy = {n: c for n in names if not isinstance(c := self.column(n), Whole)}
        rows: dict[str, list[Array]] = {name: [] for name in lazy}
        for i in range(max(map(len, lazy.values()), default=0)):
            for name, column in lazy.items():
                if i < len(column):
                    rows[name].append(column.at(i))
        for name, found in rows.items():
            into = self._given if name in self._given else self._made
            into[name] = Whole(np.concatenate(found), [len(row) for row in found])
        columns = {name: self.column(name) for name in names}
        return {name: c.array for name, c in columns.items() if isinstance(c, Whole)}


def cut(arrays: Mapping[str, Array], rows: int = IMAGES_PER_BATCH) -> Iterator[dict[str, Array]]:
    """Yield some rows at a time of arrays, as many as all of them have."""
    for start in range(0, min(map(len, arrays.values())), rows):
        end = min(start + rows, *map(len, arrays.values()))
        yield {name: array[start:end] for name, array in arrays.items()}


def prefill(component: Component, prompt: Prompt) -> dict[str, Array]:
    """Make what a decoder is fed of a prompt, its state aside."""
    mask, tokens = prompt.attention_mask, prompt.embeds.shape[1]
    given = prompts.feeds(component, prompt.embeds, mask, tokens, prompt.media_index)
    return {**given, **prompt.held}


def step(component: Component, prompt: Prompt) -> dict[str, Array]:
    """Make what a decoder is fed of one token more: the prompt's last one again."""
    mask = np.concatenate([prompt.attention_mask, np.ones_like(prompt.attention_mask[:, :1])], 1)
    last, tokens = prompt.embeds[:, -1:], prompt.embeds.shape[1]
    return {**prompts.feeds(component, last, mask, tokens, prompt.media_index), **prompt.held}


def _pictures(feeds: Feeds, name: str, front: FrontEnd) -> dict[str, Column]:
    """Show each picture, or a video of it."""
    return {name: Made(len(feeds.samples.images), feeds.picture)}


def _labels(feeds: Feeds, name: str, front: FrontEnd) -> dict[str, Column]:
    """Read the labels, where no task has anything else to read."""
    assert isinstance(front, TextFrontEnd)
    tokenizer = Tokenizer(feeds.context.bundle.path / front.tokenizer, front)
    ids, mask = tokenizer.encode(feeds.samples.labels)
    return {name: Whole(ids), name.replace("input_ids", "attention_mask"): Whole(mask)}


FRONT_ENDS: dict[type, Callable[[Feeds, str, Any], dict[str, Column]]] = {
    ImageFrontEnd: _pictures,
    VideoFrontEnd: _pictures,
    TextFrontEnd: _labels,
}
"""What each kind of front end makes of the samples."""


def _rows(column: Column) -> int:
    return sum(column.sizes) if isinstance(column, Whole) else len(column)
