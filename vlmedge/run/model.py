"""A bundle, opened: the Python runtime."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from vlmedge.bundle import Bundle
from vlmedge.errors import InputError
from vlmedge.lora.adapter import open_adapter
from vlmedge.lora.slots import Factors, fill
from vlmedge.run.inputs.image import Grid
from vlmedge.run.inputs.image_files import ImageSource, is_images
from vlmedge.run.inputs.video import Video
from vlmedge.run.tasks import detect as detecting
from vlmedge.run.tasks import embed as embedding
from vlmedge.run.tasks import encode as encoding
from vlmedge.run.tasks import generate as generating
from vlmedge.run.tasks import label as labelling
from vlmedge.run.tasks import match as matching
from vlmedge.run.tasks import paint as painting
from vlmedge.run.tasks import prompt as prompting
from vlmedge.run.tasks import regions as pointing
from vlmedge.run.tasks import retrieve as retrieving
from vlmedge.run.tasks.boxes import Box
from vlmedge.run.tasks.cache import ByteBudgetCache
from vlmedge.run.tasks.chat import Chat, reply_tokens
from vlmedge.run.tasks.context import IMAGES_PER_BATCH, Opened, T, TaskContext
from vlmedge.run.tasks.graphs import Graphs
from vlmedge.run.tasks.paint import Painting
from vlmedge.run.tasks.prompt import Example
from vlmedge.run.tasks.regions import Region
from vlmedge.run.tasks.session import Session
from vlmedge.run.tasks.streaming import Answers, OnError, is_stream, respond
from vlmedge.run.tasks.turns import each_in_turn, in_turn
from vlmedge.shelves.contracts import FallsBack, Spins
from vlmedge.shelves.registry import ENGINES
from vlmedge.spec import (
    ChatTask,
    EmbedTask,
    GenerateTask,
    Generation,
    InfillTask,
    LabelTask,
    MatchTask,
    PaintTask,
    ScoreTask,
)

Images = list[Any] | tuple[ImageSource | Video, ...]
Ranking = list[tuple[str, float]]

SESSION_MIB = 256.0  # a prefix of BLIP-2 OPT-2.7b is 23 MiB, one of LLaVA-7B 600


class Model:
    """One deployable model, ready to run.

    A method given one image answers for one; given a list or tuple it answers with a list; and
    `caption`, `classify` and `embed_image` given an iterator, or anything else to iterate over,
    give an iterator: the next images are decoded while these are answered, and memory does not grow
    with their number. Calls from several threads take turns.
    An image is a path, bytes, a PIL image or a uint8 array [height, width(, channels)]; where a
    text is written, a `Video` may stand in its place.

    A model is a context manager that closes itself, and can be pickled: what is read back opens
    the same bundle anew, with the adapters that are set.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: str = "ort",
        *,
        session_mib: float = SESSION_MIB,
        low_memory: bool = False,
        allow_fallback: bool = False,
        spin: bool | None = None,
    ) -> None:
        if not 0 <= session_mib < math.inf:
            raise InputError(f"session_mib is {session_mib}: it must be finite and at least 0")
        self.bundle = bundle
        self._opened_with: dict[str, Any] = {
            "engine": engine,
            "session_mib": session_mib,
            "low_memory": low_memory,
            "allow_fallback": allow_fallback,
            "spin": spin,
        }
        chosen = ENGINES[engine]
        if allow_fallback:
            if not isinstance(chosen, FallsBack):
                raise InputError(
                    f"{engine} has nothing to fall back to: leave allow_fallback "
                    "(--allow-fallback) out"
                )
            chosen = chosen.falling_back()
        if isinstance(chosen, Spins):
            chosen = chosen.spinning(spin)
        elif spin is not None:
            raise InputError(f"{engine} has no threads that spin: leave spin out")
        self.graphs = Graphs(bundle, chosen, low_memory=low_memory)
        self._context = TaskContext(bundle, self.graphs)
        self._kept = ByteBudgetCache(int(session_mib * 2**20))
        self._labels: tuple[list[list[str]], NDArray[np.float32]] | None = None

    def __enter__(self) -> Model:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def __repr__(self) -> str:
        """Name the bundle, the engine and the tasks."""
        tasks = ", ".join(sorted(self.bundle.spec.tasks))
        return f"<Model {str(self.bundle.path)!r}, {self._opened_with['engine']}: {tasks}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """Say how to open it again, in another process for example."""
        opened = partial(load, **self._opened_with)
        return opened, (self.bundle.path.resolve(),), self.graphs.factors

    def __setstate__(self, factors: Factors) -> None:
        """Set the adapters again."""
        self.graphs.adapt(factors)

    @in_turn
    def set_adapter(
        self, adapter: str | Path | Sequence[str | Path | None] | None, weight: float = 1.0
    ) -> None:
        """Change the LoRA adapter of a bundle that was exported with slots.

        Args:
            adapter: A PEFT folder, for all that follows; several, one for each image of the calls
                that follow, where none is the base model; or none: the base model.
            weight: Multiplies the adapters' scale.

        Raises:
            AdapterError: There are no slots, or an adapter does not fit; all stays as it was.
        """
        if adapter is None:
            factors: Factors = {}
        else:
            folders: list[str | Path | None]
            folders = [adapter] if isinstance(adapter, str | Path) else list(adapter)
            if not 1 <= len(folders) <= IMAGES_PER_BATCH:
                raise InputError(
                    f"{len(folders)} adapters: give 1 to {IMAGES_PER_BATCH}, what one batch has"
                )
            opened = {
                folder: open_adapter(Path(folder)) for folder in folders if folder is not None
            }
            rows = [None if folder is None else opened[folder] for folder in folders]
            factors = fill(self.bundle.spec, rows, weight)
        self.graphs.adapt(factors)
        self._labels = None  # the text encoder may have changed
        self._kept.clear()  # and all else

    @overload
    def caption(
        self,
        images: Images,
        prompt: str = "",
        *,
        task: str = "caption",
        examples: Sequence[Example] = (),
        seed: int | None = None,
        **options: Any,
    ) -> list[str]: ...

    @overload
    def caption(
        self,
        images: ImageSource | Video,
        prompt: str = "",
        *,
        task: str = "caption",
        examples: Sequence[Example] = (),
        seed: int | None = None,
        **options: Any,
    ) -> str: ...

    @overload
    def caption(
        self,
        images: Iterator[ImageSource],
        prompt: str = "",
        *,
        task: str = "caption",
        examples: Sequence[Example] = (),
        seed: int | None = None,
        on_error: None = None,
        **options: Any,
    ) -> Iterator[str]: ...

    @overload
    def caption(
        self,
        images: Iterator[ImageSource],
        prompt: str = "",
        *,
        task: str = "caption",
        examples: Sequence[Example] = (),
        seed: int | None = None,
        on_error: OnError,
        **options: Any,
    ) -> Iterator[str | None]: ...

    def caption(
        self,
        images: ImageSource | Video | Images | Iterator[ImageSource],
        prompt: str = "",
        *,
        task: str = "caption",
        examples: Sequence[Example] = (),
        seed: int | None = None,
        on_error: OnError | None = None,
        **options: Any,
    ) -> Any:
        """Describe one image, or each of several.

        Args:
            images: What to look at.
            prompt: How the caption begins ("a photo of"); not repeated in the answer.
            task: Another one of the bundle's, such as "detailed_caption".
            examples: Pictures with their right captions, read first (few-shot).
            seed: Of the draw, when sampling; each place in a list has draws of its own, the first
                those of an image alone.
            on_error: Of a stream: is told (image, error) of one that cannot be used, whose caption
                is then none. Without it that error is raised, after the captions before it.
            **options: max_tokens, min_tokens, num_beams, temperature, top_k, top_p,
                repetition_penalty, length_penalty, early_stopping, do_sample.
        """
        wiring = generating.caption_task(self._context, prompt, self._about(task, images))
        return self._write(wiring, images, prompt, seed, options, examples, on_error)

    @in_turn
    def captions(
        self,
        image: ImageSource | Video,
        count: int,
        prompt: str = "",
        *,
        task: str = "caption",
        seed: int | None = None,
        **options: Any,
    ) -> list[str]:
        """Draw several captions of one image, which is encoded once.

        Args:
            image: What to look at.
            count: How many captions.
            prompt: As of `caption`.
            task: As of `caption`.
            seed: Of the draws; the first caption is the one that `caption` gives for it.
            **options: As of `caption`; without sampling there is but one caption to give.
        """
        wiring = generating.caption_task(self._context, prompt, self._about(task, image))
        chosen = self._options(options)
        generating.check_draws(count, chosen)
        [soft], grids = encoding.seen(self._context, wiring, [self._context.open(image)])
        text = prompting.fill(wiring, prompt, grids)
        ids = generating.draws(self._context, wiring, soft, text, count, chosen, seed)
        return [self._context.tokenizer.text(row) for row in ids]

    @overload
    def ask(
        self,
        images: Images,
        question: str,
        *,
        regions: Sequence[Region] = (),
        examples: Sequence[Example] = (),
        first_token: str | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> list[str]: ...

    @overload
    def ask(
        self,
        images: ImageSource | Video,
        question: str,
        *,
        regions: Sequence[Region] = (),
        examples: Sequence[Example] = (),
        first_token: str | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> str: ...

    def ask(
        self,
        images: ImageSource | Video | Images,
        question: str,
        *,
        regions: Sequence[Region] = (),
        examples: Sequence[Example] = (),
        first_token: str | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> Any:
        """Answer a question about one image, or about each of several.

        Args:
            images: What to look at.
            question: In plain words; the model's template is put around it.
            regions: What the question points at, where it has `{region}`, in this order: a box
                (left, top, right, bottom) or a point (x, y), pixels of the picture.
            examples: Pictures with questions and right answers, read first (few-shot).
            first_token: Takes the place of the question's first token, where the model has an
                encoder for questions: BLIP's own code has "[ENC]" there, transformers has not.
            seed: Of the draw, when sampling.
            **options: As of `caption`.
        """
        name = self._about("ask", images)
        task = generating.ask_task(self._context, question, first_token, name)
        return self._write(task, images, question, seed, options, examples, regions=regions)

    @in_turn
    def stream(
        self,
        image: ImageSource | Video,
        prompt: str = "",
        *,
        question: str | None = None,
        regions: Sequence[Region] = (),
        task: str = "caption",
        seed: int | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Caption one image by `task`, or answer `question`, in pieces as they come.

        The pieces joined and stripped are what `caption` or `ask` return. Options are theirs too,
        except beams, whose text is known only at the end: where a checkpoint has them by default,
        a stream is greedy.
        """
        name = self._about(task if question is None else "ask", image)
        chosen = self._context.options_of_a_stream(options)
        if question is None:
            wiring = generating.caption_task(self._context, prompt, name)
        else:
            wiring = generating.ask_task(self._context, question, name=name)
        said = prompt if question is None else question
        pointing.check_regions(wiring, said, regions)
        opened = [self._context.open(image)]
        [said] = self._pointed(said, regions, opened)
        soft, grids = encoding.seen(self._context, wiring, opened)
        text = prompting.fill(wiring, said, grids)
        written = generating.stream(self._context, wiring, soft, text, chosen, seed)
        return each_in_turn(self._context.turn, written)

    @in_turn
    def session(self, image: ImageSource) -> Session:
        """Open one picture to be asked several times: it is encoded and its prefix read once.

        What sessions keep is bounded by `session_mib` of `load`; answers are the same whatever is
        kept.
        """
        return Session(self._context, self._kept, image)

    @overload
    def detect(
        self, images: Images, what: str | None = None, *, task: str | None = None, **options: Any
    ) -> list[list[Box]]: ...

    @overload
    def detect(
        self,
        images: ImageSource,
        what: str | None = None,
        *,
        task: str | None = None,
        **options: Any,
    ) -> list[Box]: ...

    def detect(
        self,
        images: ImageSource | Images,
        what: str | None = None,
        *,
        task: str | None = None,
        **options: Any,
    ) -> Any:
        """Find things on one picture, or on each of several.

        Args:
            images: Where to look.
            what: What to look for: "cat", or several things as "cat; dog"; none: all that the
                model knows, where it has been trained for that.
            task: Another one of the bundle's: "segment" asks for masks too.
            **options: As of `caption`.

        Returns:
            Boxes in parts of the picture's sides, in the model's order; `mask` of each gives the
            pixels that belong to it, where the task tells outlines.
        """
        name = detecting.usual(self.bundle, what) if task is None else task
        wiring = detecting.detect_task(self._context, name)
        found: list[list[Box]] = []
        for text in detecting.requests(wiring, name, what):
            read = partial(detecting.boxes, self._context, wiring, text)
            answers = self._write(wiring, images, text, None, options, read=read)
            rows = answers if is_images(images) else [answers]
            found = [a + b for a, b in zip(found, rows, strict=True)] if found else rows
        return found if is_images(images) else found[0]

    @in_turn
    def chat(self, system: str | None = None, **options: Any) -> Chat:
        """Begin a conversation: turns, pictures in any of them, and the cache kept between them.

        Args:
            system: What the model is told before the first turn; default: the checkpoint's own.
            **options: As of `caption`, for every reply; one reply's can be given with it. A reply
                has 256 tokens at most, or as many as the checkpoint says if that is more.
        """
        task = self._task("chat", ChatTask)
        write = self._task(task.write, GenerateTask)
        if options.get("max_tokens") is None:
            options["max_tokens"] = reply_tokens(self._context)
        return Chat(self._context, task, write, self._context.options_of_a_stream(options), system)

    @overload
    def classify(
        self,
        images: Images,
        labels: Sequence[str] | None = None,
        template: str | Sequence[str] | None = None,
    ) -> list[Ranking]: ...

    @overload
    def classify(
        self,
        images: ImageSource,
        labels: Sequence[str] | None = None,
        template: str | Sequence[str] | None = None,
    ) -> Ranking: ...

    @overload
    def classify(
        self,
        images: Iterator[ImageSource],
        labels: Sequence[str] | None = None,
        template: str | Sequence[str] | None = None,
        *,
        on_error: None = None,
    ) -> Iterator[Ranking]: ...

    @overload
    def classify(
        self,
        images: Iterator[ImageSource],
        labels: Sequence[str] | None = None,
        template: str | Sequence[str] | None = None,
        *,
        on_error: OnError,
    ) -> Iterator[Ranking | None]: ...

    def classify(
        self,
        images: ImageSource | Images | Iterator[ImageSource],
        labels: Sequence[str] | None = None,
        template: str | Sequence[str] | None = None,
        *,
        on_error: OnError | None = None,
    ) -> Any:
        """Say which label fits one image, or each of several.

        A model that reads texts chooses from `labels` without training (zero-shot); one with a
        closed head chooses from its own, and takes none.

        Args:
            images: What to look at.
            labels: What to choose from, each once.
            template: Text around a label, `{}` is the label; default: the bundle's. Several are
                averaged, and "imagenet" is CLIP's 80.
            on_error: As of `caption`.

        Returns:
            (label, probability) pairs, best first; the probabilities add up to 1, or each stands
            alone where the model was trained so (SigLIP's sigmoid).
        """
        names, shares = self._choices(_listed(labels), template)

        def answer(opened: Sequence[Opened], places: Sequence[int]) -> list[Ranking]:
            rows = shares(self._context.ready(opened).pixel_values)
            return [
                [(names[i], float(row[i])) for i in np.argsort(-row, kind="stable")] for row in rows
            ]

        return self._answer(images, answer, on_error)

    @in_turn
    def _choices(
        self, labels: Sequence[str] | None, template: str | Sequence[str] | None
    ) -> tuple[Sequence[str], Callable[[NDArray[np.float32]], NDArray[np.float32]]]:
        """Name what is chosen from, and say how pixel_values become [images, labels]."""
        context = self._context
        if labelling.is_closed(self.bundle, labels, template):
            closed = self._task("classify", LabelTask)
            names = labelling.read_labels(self.bundle, closed)
            return names, lambda pixels: labelling.probabilities(context, closed, pixels)
        task = self._task("classify", MatchTask)
        assert labels is not None
        vectors = self._label_vectors(task, labels, template)

        def shares(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
            seen = embedding.embed_pixels(context, task.image, task.image_output, pixels)
            return embedding.probabilities(task, seen, vectors)

        return labels, shares

    def _label_vectors(
        self, task: MatchTask, labels: Sequence[str], template: str | Sequence[str] | None
    ) -> NDArray[np.float32]:
        """Embed labels, and keep them for the next call, which mostly has the same ones."""
        texts = embedding.sentences(task.template if template is None else template, labels)
        if self._labels is None or self._labels[0] != texts:
            vectors = embedding.embed_ensemble(self._context, task, texts)
            self._labels = (texts, vectors)
        return self._labels[1]

    @in_turn
    def match(self, images: ImageSource | Images, texts: str | Sequence[str]) -> Any:
        """Say how likely it is that an image and a text belong together, 0..1.

        The model looks at both at once: slower than comparing vectors, and more careful.

        Returns:
            A float; a list of one for each text if there are several; and for several images a
            list of what each of them would give.
        """
        task = self._task("match", ScoreTask)
        several = [texts] if isinstance(texts, str) else texts
        shares = matching.score(self._context, task, _several(images), several).tolist()
        rows = [row[0] for row in shares] if isinstance(texts, str) else shares
        return rows if is_images(images) else rows[0]

    @in_turn
    def infill(self, image: ImageSource, text: str, top: int = 5) -> list[Ranking]:
        """Say which words may stand in the gaps of a text about an image.

        Args:
            image: What to look at.
            text: With the model's mask token, such as "[MASK]", where a word is missing.
            top: How many words a gap.

        Returns:
            For each gap its (word, probability) pairs, best first.
        """
        return matching.infill(self._context, self._task("infill", InfillTask), image, text, top)

    @overload
    def paint(
        self,
        images: Images,
        examples: Sequence[painting.Example],
        *,
        task: str = "paint",
        labels: int | None = None,
    ) -> list[Painting]: ...

    @overload
    def paint(
        self,
        images: ImageSource,
        examples: Sequence[painting.Example],
        *,
        task: str = "paint",
        labels: int | None = None,
    ) -> Painting: ...

    @in_turn
    def paint(
        self,
        images: ImageSource | Images,
        examples: Sequence[painting.Example],
        *,
        task: str = "paint",
        labels: int | None = None,
    ) -> Painting | list[Painting]:
        """Do to one image, or to each of several, what was done to the examples' pictures.

        Args:
            images: What to paint.
            examples: Pictures with their paintings; several are looked at together. A painting
                is RGB, or gray or indexed: then its numbers are labels if `labels` is given. A
                depth may have 16 bits, in millimetres.
            task: Another of the model's tasks, such as "depth": it says what pixels mean.
            labels: How many there are beside the background, 0.
        """
        wiring = self._task(task, PaintTask)
        found = painting.paint(self._context, wiring, _several(images), examples, labels)
        return found if is_images(images) else found[0]

    def index(
        self, folder: str | Path, note: Callable[[str], None] = lambda _: None
    ) -> retrieving.Index:
        """Embed every picture of a folder, to be searched again and again.

        Args:
            folder: Of pictures, and of folders of them.
            note: Is told which ones could not be read and are left out.

        Returns:
            An index; its `save` writes it, `vlmedge.run.tasks.retrieve.load` reads it.
        """
        sha256 = self.bundle.manifest.checkpoint.sha256
        return retrieving.build(Path(folder), lambda some: self.embed_image([*some]), sha256, note)

    def search(
        self,
        index: retrieving.Index,
        text: str | None = None,
        *,
        image: ImageSource | None = None,
        top: int = 5,
    ) -> Ranking:
        """Find the pictures of an index that fit a text, or that look like an image.

        Returns:
            (path below the indexed folder, cosine) pairs, best first.
        """
        if (text is None) == (image is None):
            raise InputError("search: give a text or an image, one of them")
        if index.checkpoint != self.bundle.manifest.checkpoint.sha256:
            raise InputError(
                f"the index of {index.folder} was made with another checkpoint: index it again"
            )
        query = self.embed_text(text) if text is not None else self.embed_image(_one(image))
        return index.search(query, top)

    @overload
    def embed_image(self, images: ImageSource | Images) -> NDArray[np.float32]: ...

    @overload
    def embed_image(
        self, images: Iterator[ImageSource], *, on_error: None = None
    ) -> Iterator[NDArray[np.float32]]: ...

    @overload
    def embed_image(
        self, images: Iterator[ImageSource], *, on_error: OnError
    ) -> Iterator[NDArray[np.float32] | None]: ...

    def embed_image(
        self,
        images: ImageSource | Images | Iterator[ImageSource],
        *,
        on_error: OnError | None = None,
    ) -> Any:
        """Return the unit vector of one image [width], or of several [images, width].

        Where an image has several vectors (BLIP-2's queries) they are [vectors, width], and
        [images, vectors, width]; the nearest to a text counts.

        A stream gives a stream of vectors [width]; `on_error` is that of `caption`.
        """
        task = self._task("embed_image", EmbedTask)

        def answer(opened: Sequence[Opened], places: Sequence[int]) -> list[NDArray[np.float32]]:
            pixels = self._context.ready(opened).pixel_values
            return [*embedding.embed_pixels(self._context, task.encode, task.output, pixels)]

        found = self._answer(images, answer, on_error)
        return np.stack(found) if isinstance(found, list) else found

    @in_turn
    def embed_text(self, texts: str | Sequence[str]) -> NDArray[np.float32]:
        """Return the unit vector of one text [width], or of several [texts, width]."""
        task = self._task("embed_text", EmbedTask)
        several = [texts] if isinstance(texts, str) else texts
        found = embedding.embed_texts(self._context, task.encode, task.output, several)
        return found[0] if isinstance(texts, str) else found

    @in_turn
    def close(self) -> None:
        """Give the memory of every open graph back; they open again when needed."""
        self.graphs.close()

    def _task(self, name: str, kind: type[T]) -> T:
        return self._context.task(name, kind)

    def _about(
        self, task: str, images: ImageSource | Video | Images | Iterator[ImageSource]
    ) -> str:
        """Name the task that does with videos what `task` does with images."""
        if is_stream(images):
            return task  # of images; who knows what comes
        kinds = {isinstance(source, Video) for source in _several(images)}
        if len(kinds) > 1:
            raise InputError(f"images and videos in one call{_videos(images)}: give them apart")
        name, other = (f"{task}_video", task) if True in kinds else (task, f"{task}_video")
        known = self.bundle.spec.tasks
        if name not in known and other in known:
            if other != task:
                raise InputError(f"{self.bundle.path} takes videos alone: give it a Video")
            raise InputError(f"{self.bundle.path} takes images, no videos{_videos(images)}")
        return name

    def _options(self, given: dict[str, Any]) -> Generation:
        return self._context.options(given)

    @in_turn
    def _shown(
        self, task: GenerateTask, examples: Sequence[Example]
    ) -> tuple[list[tuple[Example, Grid]], list[NDArray[np.float32]]]:
        """Encode the pictures of examples: for each placeholder float32 [n, width]."""
        if not examples or task.example is None:  # the latter is refused where it is filled in
            return [(example, Grid()) for example in examples], []
        opened = [self._context.open(example.image) for example in examples]
        found, grids = encoding.seen(self._context, task, opened)
        return list(zip(examples, grids, strict=True)), [part for seen in found for part in seen]

    def _pointed(self, text: str, regions: Sequence[Region], opened: Sequence[Opened]) -> list[str]:
        """Write the regions of a question, for each picture by its own size."""
        front = self._context.image_front
        return [pointing.placed(text, regions, picture.size, front) for picture in opened]

    def _write(
        self,
        task: GenerateTask,
        images: ImageSource | Video | Images | Iterator[ImageSource],
        text: str,
        seed: int | None,
        given: dict[str, Any],
        examples: Sequence[Example] = (),
        on_error: OnError | None = None,
        read: Callable[[list[int], Opened], Any] | None = None,
        regions: Sequence[Region] = (),
    ) -> Any:
        """Write about one image, several, or a stream of them; `read` makes sense of the ids."""
        chosen = self._options(given)
        before, shown = self._shown(task, examples)
        pointing.check_regions(task, text, regions)

        def answer(opened: Sequence[Opened], places: Sequence[int]) -> list[Any]:
            texts = self._pointed(text, regions, opened)
            seen, grids = encoding.seen(self._context, task, opened)
            soft = [[*shown, *each] for each in seen]
            prompts = [
                prompting.fill(task, text, [grid], before)
                for text, grid in zip(texts, grids, strict=True)
            ]
            ids = generating.write(self._context, task, soft, prompts, chosen, seed, places=places)
            if read is None:
                return [self._context.tokenizer.text(row) for row in ids]
            return [read(row, picture) for row, picture in zip(ids, opened, strict=True)]

        return self._answer(images, answer, on_error)

    def _answer(
        self,
        images: Any,
        answer: Answers[Opened],
        on_error: OnError | None = None,
    ) -> Any:
        """Answer for one image, for a list of them, or for a stream as its answers are taken."""

        def one_at_a_time(opened: Sequence[Opened], places: Sequence[int]) -> Iterable[Any]:
            with self._context.turn:
                return answer(opened, places)

        return respond(self._context.open, images, one_at_a_time, on_error)


def load(
    path: str | Path,
    engine: str = "ort",
    *,
    session_mib: float = SESSION_MIB,
    low_memory: bool = False,
    allow_fallback: bool = False,
    spin: bool | None = None,
) -> Model:
    """Open a bundle; its graphs open when they are first needed.

    Args:
        path: The folder that `vlmedge export` made.
        engine: What runs the graphs: a file name in runtimes/.
        session_mib: How much the sessions of the model may keep of encoded pictures and of prefixes
            that the decoder has read, in MiB; what was used longest ago goes first.
        low_memory: Whether a component is closed before the next one opens: the peak is then that
            of the largest, not of all together, and each picture or list costs their opening.
        allow_fallback: Whether an engine of a GPU may leave to the CPU what it cannot run there;
            without it, that is an error which names the node or the component.
        spin: Whether the CPU engine's threads wait awake between operators, which is faster and
            takes more power; none: unless the machine runs on its battery (`vlmedge doctor`).
    """
    return Model(
        Bundle.load(path),
        engine,
        session_mib=session_mib,
        low_memory=low_memory,
        allow_fallback=allow_fallback,
        spin=spin,
    )


def _one(image: ImageSource | None) -> ImageSource:
    assert image is not None
    return image


def _listed(labels: Sequence[str] | None) -> Sequence[str] | None:
    """Take labels of any kind that can be iterated over, once."""
    return labels if labels is None or isinstance(labels, str) else list(labels)


def _videos(images: object) -> str:
    """Name the videos among what was given, in brackets, as far as they have names."""
    clips = [each.source for each in _several(images) if isinstance(each, Video)]
    names = [
        f"{clip} is a folder, of a video's frames: give its files"
        if Path(clip).is_dir()
        else f"{clip}"
        for clip in clips
        if isinstance(clip, str | Path)
    ]
    return f" ({', '.join(names)})" if names else ""


def _several(images: object) -> list[Any] | tuple[Any, ...]:
    return images if isinstance(images, list | tuple) else [images]
