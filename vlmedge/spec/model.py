"""A model's components, tasks and front ends, as data free of any framework or engine.

These structs are the manifest: msgspec reads them from JSON, checks every type on the way, and
makes the published JSON Schema from them. A task's wiring is a list of components; each takes its
inputs from what the ones before it gave, by tensor name, so no wire needs naming twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from msgspec import field, structs

from vlmedge.errors import UnknownNameError
from vlmedge.spec.base import Data
from vlmedge.spec.front_ends import (
    INPUT_IDS,
    INSTRUCTION_IDS,
    PIXELS,
    FrontEnd,
    ImageFrontEnd,
    TextFrontEnd,
    VideoFrontEnd,
)
from vlmedge.spec.tasks import Generation, Task
from vlmedge.spec.tensors import Component

_T = TypeVar("_T")


class ModelSpec(Data, frozen=True):
    """All that the runtime must know of one checkpoint.

    Attributes:
        family: The file in export/ that made it.
        components: The graphs.
        tasks: Tasks by name: caption, ask, classify, embed_image, embed_text; caption_video,
            ask_video.
        front_ends: Front ends by the tensor that each makes: pixel_values, pixel_values_videos,
            input_ids; qformer_input_ids, for components that read a text before the language model
            does.
        generation: Defaults of the decode loop, or none.
    """

    family: str
    components: tuple[Component, ...]
    tasks: dict[str, Task]
    front_ends: dict[str, FrontEnd] = field(default_factory=dict)
    generation: Generation | None = None

    def __post_init__(self) -> None:
        """Refuse a table in which ids are made of anything but texts."""
        for name in (INPUT_IDS, INSTRUCTION_IDS):
            if not isinstance(self.front_ends.get(name), TextFrontEnd | None):
                raise ValueError(f"front end of {name!r}: its kind must be 'text'")

    @property
    def image(self) -> ImageFrontEnd | None:
        """The front end of pictures, or none."""
        return _first(ImageFrontEnd, self.front_ends.values())

    @property
    def video(self) -> VideoFrontEnd | None:
        """The front end of videos, or none."""
        return _first(VideoFrontEnd, self.front_ends.values())

    @property
    def text(self) -> TextFrontEnd | None:
        """The front end of texts, or none."""
        return _first(TextFrontEnd, [self.front_ends.get(INPUT_IDS)])

    @property
    def instruction(self) -> TextFrontEnd | None:
        """The front end of texts that are read before the language model reads, or none."""
        return _first(TextFrontEnd, [self.front_ends.get(INSTRUCTION_IDS)])

    @property
    def pixels(self) -> str:
        """The tensor that pictures become; frames too, where there are videos alone."""
        made = (name for name, front in self.front_ends.items() if isinstance(front, ImageFrontEnd))
        return next(made, PIXELS)

    def bare(self) -> tuple[Component, ...]:
        """Return the components without slots, as the checkpoint itself has them."""
        return tuple(structs.replace(component, slots=()) for component in self.components)

    def component(self, name: str) -> Component:
        """Return the component called `name`."""
        for component in self.components:
            if component.name == name:
                return component
        known = ", ".join(c.name for c in self.components)
        raise UnknownNameError(f"no component {name!r}: choose from {known}")


def _first(kind: type[_T], found: Iterable[object]) -> _T | None:
    """Return the first of `found` that is of one kind."""
    return next((one for one in found if isinstance(one, kind)), None)
