"""What a kind of task brings to those who try a bundle without a user.

The gate, calibration, the probe of a new engine and the benchmark know no kind of task. Each kind
has a `Trial` in its own file, found because it names the struct that it is of: which components
run, what they are fed that no front end makes, one answer, and what of its answers is compared.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np

from vlmedge.arrays import Array
from vlmedge.checkpoints.scenes import CLASSES
from vlmedge.run.decode.prompt import Prompt
from vlmedge.run.inputs.image import Grid
from vlmedge.run.inputs.image_files import ImageSource
from vlmedge.run.tasks.context import TaskContext
from vlmedge.spec import Component, Generation

if TYPE_CHECKING:
    from vlmedge.run.tasks.encode import Soft

Facts = dict[str, Any]
"""Of a task that writes: first_token_ms, tokens_per_s, prompt_tokens, new_tokens; else nothing."""

T = TypeVar("T")

_HOLDS = re.compile(r"^class \w+\(.*\bof=\w+\):$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Samples:
    """Pictures, and what is asked and known about them.

    Attributes:
        images: Pictures for captions and questions.
        questions: One for each picture.
        captions: The right caption of each picture, or none when nobody knows.
        answers: The right answer to each question, or none.
        singles: Pictures to classify.
        labels: Labels to choose from.
        classes: The right label of each single, or none.
        said: A text for each of the first pictures, read with it by tasks without a question.
    """

    images: tuple[ImageSource, ...]
    questions: tuple[str, ...]
    captions: tuple[str, ...] | None = None
    answers: tuple[str, ...] | None = None
    singles: tuple[ImageSource, ...] = ()
    labels: tuple[str, ...] = field(default=CLASSES)
    classes: tuple[int, ...] | None = None
    said: tuple[str, ...] = ()


class Column(Protocol):
    """One tensor of every sample."""

    def __len__(self) -> int:
        """Count the samples."""
        ...

    def at(self, i: int) -> Array:
        """Return sample i's, with a leading axis: 1, or how many pieces its picture has."""
        ...


class Made:
    """A column whose rows are made when they are asked for."""

    def __init__(self, count: int, make: Callable[[int], Array]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        """Count the samples."""
        return self._count

    def at(self, i: int) -> Array:
        """Make sample i's."""
        return self._make(i)


class Whole:
    """A column in memory."""

    def __init__(self, array: Array, sizes: Sequence[int] | None = None) -> None:
        """Keep an array.

        Args:
            array: The rows of all samples, one sample after the other.
            sizes: How many rows each sample has; default: one.
        """
        self.array = array
        self.sizes = [1] * len(array) if sizes is None else list(sizes)
        self._ends = np.cumsum([0, *self.sizes])

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.sizes)

    def at(self, i: int) -> Array:
        """Return sample i's rows."""
        return self.array[self._ends[i] : self._ends[i + 1]]


class Pool(Protocol):
    """The tensors of every sample that are known so far."""

    samples: Samples

    def __contains__(self, name: str) -> bool:
        """Return whether a tensor is known."""
        ...

    def at(self, name: str, i: int) -> Array:
        """Return a tensor of sample i; fewer rows than samples begin again."""
        ...

    def clip(self, name: str, i: int) -> Array:
        """Return a tensor of a short video that begins with sample i, [frames, ...]."""
        ...

    def grid(self, i: int) -> Grid:
        """Return how picture i is cut."""
        ...

    def whole(self, name: str) -> Array:
        """Return a tensor of all samples, one after the other."""
        ...


@dataclass(frozen=True, slots=True)
class Choices:
    """The answers of one side, to be compared with the other's.

    Attributes:
        title: Name of the comparison; of several with one title the first counts.
        answers: One for each sample.
        right: The right ones, or none when nobody knows.
    """

    title: str
    answers: Sequence[object]
    right: Sequence[object] | None = None


class Trial(ABC, Generic[T]):
    """One task of a bundle, on samples in place of what a user gives."""

    kinds: ClassVar[dict[type, type[Trial[Any]]]] = {}

    def __init_subclass__(cls, of: type | None = None) -> None:
        """Become the trial of one kind of task."""
        if of is not None:
            Trial.kinds[of] = cls

    def __init__(self, context: TaskContext, name: str, task: T) -> None:
        self.context, self.name, self.task = context, name, task

    @property
    @abstractmethod
    def components(self) -> tuple[str, ...]:
        """The components that it runs; a task of its kind with the same ones is no other trial."""

    def inputs(self, component: Component, samples: Samples) -> dict[str, Column]:
        """Make what a component takes from the samples alone, where no front end makes it so."""
        return {}

    def mixed(self, component: Component, pool: Pool) -> dict[str, Column]:
        """Make inputs of a component from outputs of earlier ones and from other tensors."""
        return {}

    @abstractmethod
    def answer(self, samples: Samples, tokens: int) -> Facts:
        """Give one answer about the first sample, of `tokens` tokens where it writes."""

    def choices(self, pool: Pool) -> Choices | None:
        """Return what was chosen for each sample, when all components without state have run."""
        return None


@dataclass(frozen=True, slots=True)
class Shown:
    """Inputs of a decoder for some samples.

    Attributes:
        soft: The soft prompts made of each sample's pictures.
        texts: The full prompt of each.
        held: Constant inputs of the decoder, by name, each [samples, ...]; none: it has none.
    """

    soft: Sequence[Soft]
    texts: Sequence[str]
    held: dict[str, Array] | None = None

    def some(self, rows: slice) -> Shown:
        """Take some of the samples."""
        held = self.held and {name: array[rows] for name, array in self.held.items()}
        return Shown(self.soft[rows], self.texts[rows], held)


@dataclass(frozen=True, slots=True)
class Run:
    """One way to write about the samples.

    Attributes:
        title: Its name in a report.
        num_beams: As of `Generation`.
        count: How many samples are written about, the first ones; none: all.
        right: The right text for each sample, or none when nobody knows.
    """

    title: str
    num_beams: int
    count: int | None
    right: Sequence[str] | None


class Writer(Trial[T]):
    """The trial of a task that writes with a decoder, from what the pool has."""

    @property
    @abstractmethod
    def decoder(self) -> str:
        """The component of the decode loop."""

    @abstractmethod
    def runs(self, samples: Samples, beam_samples: int) -> Iterator[Run]:
        """List the ways to write that are compared."""

    @abstractmethod
    def shown(self, pool: Pool) -> Shown:
        """Make what the decoder is shown of every sample; components are run where it takes some.

        A text that components read is the task's own then, and not what the pool was made of.
        """

    @abstractmethod
    def known(self, pool: Pool, i: int) -> Shown | None:
        """Take what the decoder is shown of sample i from the pool; none where it is not there."""

    @abstractmethod
    def prompt(self, shown: Shown, options: Generation) -> Prompt:
        """Make what the decoder reads before it writes."""


def trials(context: TaskContext) -> list[Trial[Any]]:
    """Return the trials of a bundle's tasks, in their order; a chat is tried by what writes it."""
    _import_kinds()
    tasks = context.bundle.spec.tasks.items()
    known = [(name, task, Trial.kinds.get(type(task))) for name, task in tasks]
    return [kind(context, name, task) for name, task, kind in known if kind is not None]


@cache
def _import_kinds() -> None:
    """Import the files of this folder that hold a trial: the others would cost start-up time."""
    for file in sorted(Path(__file__).parent.glob("[!_]*.py")):
        if _HOLDS.search(file.read_text(encoding="utf-8")):
            import_module(f"{__package__}.{file.stem}")
