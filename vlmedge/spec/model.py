"""What a model is made of, as data that no framework or engine has seen.

These structs are the manifest: msgspec reads them from JSON, checks every type on the way, and
makes the published JSON Schema from them. A task's wiring is a list of components; each takes its
inputs from what the ones before it gave, by tensor name, so no wire needs naming twice.
"""

from __future__ import annotations

from msgspec import structs

from vlmedge.errors import UnknownNameError
from vlmedge.spec.base import Data
from vlmedge.spec.front_ends import ImageFrontEnd, TextFrontEnd, VideoFrontEnd
from vlmedge.spec.tasks import Generation, Task
from vlmedge.spec.tensors import Component


class ModelSpec(Data, frozen=True):
    """All that the runtime must know of one checkpoint.

    Attributes:
        family: The file in export/ that made it.
        components: The graphs.
        tasks: By name: caption, ask, classify, embed_image, embed_text; caption_video, ask_video.
        image: The image front end, or none.
        video: The video front end, or none.
        text: The text front end, or none.
        instruction: That of components which read a text before the language model does, or none.
        generation: Defaults of the decode loop, or none.
    """

    family: str
    components: tuple[Component, ...]
    tasks: dict[str, Task]
    image: ImageFrontEnd | None = None
    video: VideoFrontEnd | None = None
    text: TextFrontEnd | None = None
    instruction: TextFrontEnd | None = None
    generation: Generation | None = None

    def bare(self) -> tuple[Component, ...]:
        """Return the components without slots: what the checkpoint itself has."""
        return tuple(structs.replace(component, slots=()) for component in self.components)

    def component(self, name: str) -> Component:
        """Return the component called `name`."""
        for component in self.components:
            if component.name == name:
                return component
        known = ", ".join(c.name for c in self.components)
        raise UnknownNameError(f"no component {name!r}: choose from {known}")
