"""One picture in, texts out, by the steps of a composition: several bundles, one after the other.

    picture -> [ caption ] -> texts -> [ match ] -> texts, scores -> [ filter ] -> texts, scores
               a bundle                another

Pictures go through one at a time, the next one being decoded meanwhile, so two are in memory and
none has a say in another's answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from vlmedge.compositions.composition import Composition, read_composition
from vlmedge.compositions.steps import HostStep, ModelStep, Step, Texts
from vlmedge.errors import InputError, VlmEdgeError
from vlmedge.run.inputs.image_files import ImageSource, load_image
from vlmedge.run.model import Model, load
from vlmedge.run.tasks.context import TaskContext
from vlmedge.run.tasks.streaming import OnError, respond
from vlmedge.shelves.registry import unknown


class Composed:
    """A composition with its bundles, ready to run; `vlmedge.compose` makes one.

    Attributes:
        composition: The steps and the names of their bundles.
        models: The open model of each bundle, by the composition's names.
    """

    def __init__(
        self, composition: Composition, models: Mapping[str, Model], *, low_memory: bool = False
    ) -> None:
        """Refuse a bundle that does not fit its steps; no graph is opened.

        Args:
            composition: The steps to run.
            models: Models by their names in the composition.
            low_memory: Whether a bundle's components are closed after each of its steps.
        """
        self.composition = composition
        self.models = models
        self._low_memory = low_memory
        for step in composition.steps:
            if isinstance(step, ModelStep):
                model = models[step.bundle]
                try:
                    step.fits(TaskContext(model.bundle, model.graphs))
                except VlmEdgeError as error:
                    raise _of(step, error) from None

    @overload
    def run(self, images: list[Any] | tuple[ImageSource, ...]) -> list[Texts]: ...

    @overload
    def run(self, images: ImageSource) -> Texts: ...

    @overload
    def run(self, images: Iterator[ImageSource], *, on_error: None = None) -> Iterator[Texts]: ...

    @overload
    def run(
        self, images: Iterator[ImageSource], *, on_error: OnError
    ) -> Iterator[Texts | None]: ...

    def run(self, images: Any, *, on_error: OnError | None = None) -> Any:
        """Run all steps for an image.

        Args:
            images: One image, a list or tuple of images, or an iterator of images; no videos.
            on_error: Streams only. Called with (image, error) for each image that cannot be used;
                its texts are None. If omitted, the error is raised after the texts of the images
                before it.

        Returns:
            (text, score) pairs of the last step, in its order; a list or an iterator of such lists
            for several images. A score is None if no step has given one.

        Raises:
            VlmEdgeError: A step cannot use the image or a text; the message names the step.
        """
        return respond(load_image, images, self._answer, on_error, per_batch=1)

    def close(self) -> None:
        """Free the memory of every open graph; graphs open again when they are needed."""
        for model in self.models.values():
            model.close()

    def _answer(
        self, pictures: Sequence[ImageSource], places: Sequence[int]
    ) -> list[Texts | InputError]:
        found: list[Texts | InputError] = []
        for picture in pictures:
            try:
                found.append(self._steps(picture))
            except InputError as error:  # of this picture, or of what was written about it
                found.append(error)
        return found

    def _steps(self, picture: ImageSource) -> Texts:
        made: dict[str, Texts] = {}
        for step in self.composition.steps:
            given = [pair for name in step.inputs for pair in made[name]]
            try:
                made[step.name] = self._step(step, picture, given)
            except InputError as error:
                raise _of(step, error) from None
        return made[step.name]

    def _step(self, step: Step, picture: ImageSource, texts: Texts) -> Texts:
        if isinstance(step, HostStep):
            return step.run(texts)
        assert isinstance(step, ModelStep)
        model = self.models[step.bundle]
        try:
            return step.run(model, picture, texts)
        finally:
            if self._low_memory:
                model.close()


def compose(
    composition: str | Path | Mapping[str, Any],
    bundles: Mapping[str, str | Path | Model] | None = None,
    changes: Mapping[str, Any] | None = None,
    *,
    engine: str = "ort",
    low_memory: bool = False,
    allow_fallback: bool = False,
) -> Composed:
    """Chain tasks of several bundles; each graph opens when it is first needed.

    Args:
        composition: Name of a built-in composition, path of a JSON file, or the content of one as
            a dict (its JSON Schema is composition.schema.json in the package).
        bundles: Folders or open models by the composition's names, in place of its own.
        changes: Other values for fields of its steps, such as {"kept.at_least": 0.3}.
        engine: Engine that runs the folders' graphs, see `vlmedge.load`.
        low_memory: See `vlmedge.load`; a bundle is also closed before the next one opens.
        allow_fallback: See `vlmedge.load`.

    Returns:
        A `Composed`, whose `run` takes images.

    Raises:
        InputError: The composition is not valid (found before any bundle is read), a bundle is
            not given, or a bundle cannot do what its step needs.
        BundleError: A folder is no bundle.
        UnknownNameError: No composition, bundle of it, or engine has this name.

    Examples:
        >>> bundles = {"captioner": "blip-int8", "matcher": "blip-itm-int8"}
        >>> vlmedge.compose("capfilt", bundles).run("cat.jpg")
        [('a cat on a sofa', 0.93), ('a cat', 0.71)]
    """
    read = read_composition(composition, changes)
    given = bundles or {}
    for name in given:
        if name not in read.bundles:
            raise unknown("bundle", name, list(read.bundles))
    chosen = {name: given.get(name, folder) for name, folder in read.bundles.items()}
    missing = [name for name, source in chosen.items() if source is None]
    if missing:
        raise InputError(f"no bundle for {' and '.join(missing)}: give --bundle {missing[0]}=DIR")
    models: dict[str, Model] = {}
    opened: dict[Path, Model] = {}
    for name, source in chosen.items():
        assert source is not None
        if isinstance(source, Model):
            models[name] = source
            continue
        path = Path(source).resolve()
        if path not in opened:  # one bundle may have two names
            opened[path] = load(
                source, engine, low_memory=low_memory, allow_fallback=allow_fallback
            )
        models[name] = opened[path]
    return Composed(read, models, low_memory=low_memory)


def _of(step: Step, error: VlmEdgeError) -> VlmEdgeError:
    """Return the error with the step's name."""
    return type(error)(f"step {step.name!r}: {error}")
