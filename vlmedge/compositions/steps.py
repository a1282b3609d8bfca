"""The steps of a composition: one class, one kind of step; its fields are its words in the file.

A step gives texts, each with a score where a step has given it one. Steps of a bundle look at the
picture; the others work on texts alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import msgspec
from msgspec import Meta

from vlmedge.errors import UnknownNameError
from vlmedge.run.decode.sampling import options as merge
from vlmedge.run.inputs.image_files import ImageSource
from vlmedge.run.tasks.context import TaskContext
from vlmedge.run.tasks.embed import cosines
from vlmedge.run.tasks.generate import caption_task, check_draws
from vlmedge.run.tasks.label import is_closed
from vlmedge.shelves.registry import unknown
from vlmedge.spec import Generation

if TYPE_CHECKING:
    from vlmedge.run.model import Model

Texts = list[tuple[str, float | None]]
"""(text, score) pairs; a score is none until a step gives one."""

Positive = Annotated[int, Meta(ge=1)]
Seed = Annotated[int, Meta(ge=0)]

Options = Annotated[
    dict[str, Any],
    Meta(extra_json_schema={"propertyNames": {"enum": [*Generation.__struct_fields__]}}),
]
"""Of the decode loop: `Generation`'s words."""

TEXT = "{text}"
_ANY = Generation(eos_ids=(), pad_id=0, max_tokens=2**31)  # stands for a bundle's own defaults


class Step(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="task"):
    """One step.

    Attributes:
        name: Name that other steps refer to it by.
        inputs: Steps whose texts it takes, one after the other.
    """

    name: Annotated[str, Meta(pattern=r"^[^.]+$")]
    inputs: tuple[str, ...] = ()

    needs_scores: ClassVar[bool] = False

    @property
    def takes_texts(self) -> bool:
        """Whether it has inputs; a step has some or must have none."""
        return True

    def scores(self, given: Sequence[bool]) -> bool:
        """Return whether its texts have scores, given whether those of each input have."""
        return all(given)


class HostStep(Step, frozen=True):
    """A step that works on texts alone."""

    def run(self, texts: Texts) -> Texts:
        """Run the step."""
        raise NotImplementedError


class ModelStep(Step, frozen=True, kw_only=True):
    """A step that looks at the picture with a bundle.

    Attributes:
        bundle: Name of its bundle in the composition.
    """

    bundle: str

    @property
    def needs(self) -> Sequence[str]:
        """Name the tasks that the bundle must have."""
        return [str(self.__struct_config__.tag)]

    def fits(self, context: TaskContext) -> None:
        """Refuse a bundle with which it would fail at the first picture; no graph is opened."""
        known = context.bundle.spec.tasks
        for name in self.needs:
            if name not in known:
                error = unknown("task", name, sorted(known))
                raise UnknownNameError(f"{context.bundle.path}: {error}")

    def run(self, model: Model, picture: ImageSource, texts: Texts) -> Texts:
        """Run the step."""
        raise NotImplementedError


class _Writes(ModelStep, frozen=True, kw_only=True):
    """A step that writes.

    Attributes:
        seed: Random seed for sampling; the same one for every picture.
        options: Options of the decode loop, as in `Model.caption`.
    """

    seed: Seed | None = None
    options: Options = {}

    def __post_init__(self) -> None:
        """Refuse an option that is unknown or out of range."""
        merge(_ANY, **self.options)

    def fits(self, context: TaskContext) -> None:
        """Refuse also options that disagree with the bundle's own."""
        super().fits(context)
        context.options(self.options)

    def scores(self, given: Sequence[bool]) -> bool:
        """Whether texts have scores: a text that was written has none."""
        return False


class Caption(_Writes, frozen=True, kw_only=True, tag="caption"):
    """Write captions of the picture.

    Attributes:
        prompt: Text that they begin with.
        count: How many captions are drawn.
        bundle_task: Another task of the bundle that captions, such as "detailed_caption".
    """

    prompt: str = ""
    count: Positive = 1
    bundle_task: str = "caption"

    @property
    def takes_texts(self) -> bool:
        """No texts: it takes only the picture."""
        return False

    @property
    def needs(self) -> Sequence[str]:
        """Return the name of the bundle's captioning task."""
        return [self.bundle_task]

    def fits(self, context: TaskContext) -> None:
        """Refuse also a prompt that has no place, and several captions that would be the same."""
        super().fits(context)
        caption_task(context, self.prompt, self.bundle_task)
        check_draws(self.count, context.options(self.options))

    def run(self, model: Model, picture: ImageSource, texts: Texts) -> Texts:
        """Caption the picture."""
        found = model.captions(
            picture, self.count, self.prompt, task=self.bundle_task, seed=self.seed, **self.options
        )
        return [(text, None) for text in found]


class Ask(_Writes, frozen=True, kw_only=True, tag="ask"):
    """Answer a question about the picture, or one about each text.

    Attributes:
        question: In plain words; where it has `{text}` it is asked of each text.
    """

    question: Annotated[str, Meta(min_length=1)]

    @property
    def takes_texts(self) -> bool:
        """Texts are needed where the question has `{text}`."""
        return TEXT in self.question

    def run(self, model: Model, picture: ImageSource, texts: Texts) -> Texts:
        """Ask the question."""
        about = [text for text, _ in texts] if self.takes_texts else [""]
        with model.session(picture) as session:  # it is encoded once
            return [
                (session.ask(self.question.replace(TEXT, t), seed=self.seed, **self.options), None)
                for t in about
            ]


class Classify(ModelStep, frozen=True, kw_only=True, tag="classify"):
    """Choose labels that fit the picture.

    Attributes:
        labels: Labels to choose from; none for a closed head's own.
        template: Text around a label; none is the bundle's.
        top: How many labels to give, the best first.
    """

    labels: tuple[str, ...] | None = None
    template: str | None = None
    top: Positive = 5

    @property
    def takes_texts(self) -> bool:
        """No texts: it takes only the picture."""
        return False

    def scores(self, given: Sequence[bool]) -> bool:
        """Labels have scores, their probabilities."""
        return True

    def fits(self, context: TaskContext) -> None:
        """Refuse also labels where there are some, or none where there are none."""
        super().fits(context)
        is_closed(context.bundle, self.labels, self.template)

    def run(self, model: Model, picture: ImageSource, texts: Texts) -> Texts:
        """Choose the labels."""
        return [*model.classify(picture, self.labels, self.template)[: self.top]]


class Match(ModelStep, frozen=True, kw_only=True, tag="match"):
    """Give each text the probability that it belongs to the picture."""

    def fits(self, context: TaskContext) -> None:
        """Point at the other way to score, where a bundle has that one alone."""
        try:
            super().fits(context)
        except UnknownNameError as error:
            if {"embed_image", "embed_text"} <= context.bundle.spec.tasks.keys():
                way = f"--set {self.name}.task=cosine"
                raise UnknownNameError(f"{error} (to compare vectors instead: {way})") from None
            raise

    def scores(self, given: Sequence[bool]) -> bool:
        """Its texts always have scores."""
        return True

    def run(self, model: Model, picture: ImageSource, texts: Texts) -> Texts:
        """Score the picture and each text together."""
        if not texts:
            return []
        several = [text for text, _ in texts]
        return [*zip(several, model.match(picture, several), strict=True)]


class Cosine(ModelStep, frozen=True, kw_only=True, tag="cosine"):
    """Give each text the cosine of its vector and the picture's."""

    @property
    def needs(self) -> Sequence[str]:
        """Return the names of both embedding tasks."""
        return ["embed_image", "embed_text"]

    def scores(self, given: Sequence[bool]) -> bool:
        """Its texts always have scores."""
        return True

    def run(self, model: Model, picture: ImageSource, texts: Texts) -> Texts:
        """Score each text by the cosine of the vectors."""
        if not texts:
            return []
        several = [text for text, _ in texts]
        [row] = cosines(model.embed_image([picture]), model.embed_text(several)).tolist()
        return [*zip(several, row, strict=True)]


class Unique(HostStep, frozen=True, tag="unique"):
    """Leave out texts that were there before."""

    def run(self, texts: Texts) -> Texts:
        """Keep the first of each, in order."""
        found: dict[str, float | None] = {}
        for text, score in texts:
            found.setdefault(text, score)
        return list(found.items())


class Filter(HostStep, frozen=True, kw_only=True, tag="filter"):
    """Leave out texts with a low score.

    Attributes:
        at_least: The lowest score that stays.
    """

    at_least: float

    needs_scores: ClassVar[bool] = True

    def run(self, texts: Texts) -> Texts:
        """Keep the texts with a high score, in order."""
        return [(text, s) for text, s in texts if s is not None and s >= self.at_least]


class Best(HostStep, frozen=True, kw_only=True, tag="best"):
    """Put the texts with the best scores first.

    Attributes:
        count: How many stay; none: all.
    """

    count: Positive | None = None

    needs_scores: ClassVar[bool] = True

    def run(self, texts: Texts) -> Texts:
        """Sort by score; of equal ones the earlier comes first."""
        return sorted(texts, key=lambda pair: -(pair[1] or 0.0))[: self.count]


KINDS: dict[str, type[Step]] = {
    str(kind.__struct_config__.tag): kind
    for kind in (Caption, Ask, Classify, Match, Cosine, Unique, Filter, Best)
}
"""Every kind of step by its `task`."""
