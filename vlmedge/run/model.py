"""A bundle, opened: the page that a user of the Python runtime reads.

The signatures and what they mean are here; the work is in answering.py and tasks/.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from vlmedge.bundle import Bundle
from vlmedge.errors import InputError
from vlmedge.lora.slots import Factors
from vlmedge.run import answering
from vlmedge.run.answering import Images, Request, Stream
from vlmedge.run.inputs.image_files import ImageSource, is_images
from vlmedge.run.inputs.video import Video
from vlmedge.run.opening import Adapter, choose_engine, read_factors
from vlmedge.run.tasks import detect as detecting
from vlmedge.run.tasks import embed as embedding
from vlmedge.run.tasks import generate as generating
from vlmedge.run.tasks import match as matching
from vlmedge.run.tasks import paint as painting
from vlmedge.run.tasks import retrieve as retrieving
from vlmedge.run.tasks.boxes import Box
from vlmedge.run.tasks.cache import ByteBudgetCache
from vlmedge.run.tasks.chat import Chat, reply_tokens
from vlmedge.run.tasks.classify import Labels, LabelVectors, Ranking, Template, ranker
from vlmedge.run.tasks.context import Opened, TaskContext
from vlmedge.run.tasks.graphs import Graphs
from vlmedge.run.tasks.paint import Painting
from vlmedge.run.tasks.prompt import Example
from vlmedge.run.tasks.regions import Region
from vlmedge.run.tasks.session import Session
from vlmedge.run.tasks.streaming import OnError
from vlmedge.run.tasks.turns import in_turn
from vlmedge.spec import ChatTask, EmbedTask, GenerateTask, InfillTask, PaintTask, ScoreTask

if TYPE_CHECKING:
    from typing_extensions import Unpack  # a type checker brings it along; Python has it from 3.11

    from vlmedge.run.answering import AskOptions, CaptionOptions, DetectOptions

Vectors = NDArray[np.float32]
Examples = Sequence[painting.Example]

SESSION_MIB = 256.0  # a prefix of BLIP-2 OPT-2.7b is 23 MiB, one of LLaVA-7B 600


class Model:
    """A bundle that is open and ready to run; `vlmedge.load` makes one.

    The tasks of the bundle, which `repr(model)` lists, decide which methods work. A method raises
    `UnknownNameError` if the bundle lacks its task, and `InputError` if an image, a text or an
    option cannot be used; its own docstring adds only what else it raises.

    An image is a path, a file's bytes, a PIL image, or a uint8 array [height, width] or
    [height, width, channels], RGB. `caption`, `captions`, `ask` and `stream` take a `Video` too,
    where the bundle takes videos.

    Most methods take one image and return one answer, or take a list or tuple of images and return
    a list of answers. `caption`, `classify` and `embed_image` also take an iterator (or any other
    iterable) and return an iterator: the next images are decoded while these are answered, and
    memory does not grow with their number.

    Threads may share a model: their calls take turns. A model is a context manager that closes
    itself. A pickled or copied model opens the same bundle anew, with the same adapters.

    Attributes:
        bundle: The bundle on disk; `bundle.spec` describes its components and tasks.
        graphs: Its components by name, each opened when it is first needed.

    Examples:
        >>> model = vlmedge.load("blip2-opt-2.7b-int8")
        >>> model.caption("cat.jpg")
        'a cat sitting on a sofa'
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
        """Open no graph yet; see `vlmedge.load`, which takes the bundle's folder."""
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
        chosen = choose_engine(engine, allow_fallback=allow_fallback, spin=spin)
        self.graphs = Graphs(bundle, chosen, low_memory=low_memory)
        self._context = TaskContext(bundle, self.graphs)
        self._kept = ByteBudgetCache(int(session_mib * 2**20))
        self._labels = LabelVectors()

    def __enter__(self) -> Model:
        """Return the model itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the model."""
        self.close()

    def __repr__(self) -> str:
        """Name the bundle, the engine and the tasks."""
        tasks = ", ".join(sorted(self.bundle.spec.tasks))
        return f"<Model {str(self.bundle.path)!r}, {self._opened_with['engine']}: {tasks}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """Say how to open the model again, in another process for example."""
        opened = partial(load, **self._opened_with)
        return opened, (str(self.bundle.path.resolve()),), self.graphs.factors

    def __setstate__(self, factors: Factors) -> None:
        """Set the adapters again."""
        self.graphs.adapt(factors)

    @in_turn
    def set_adapter(
        self, adapter: Adapter | Sequence[Adapter | None] | None, weight: float = 1.0
    ) -> None:
        """Change the LoRA adapter of a bundle that was exported with adapter slots.

        Args:
            adapter: A PEFT folder, for all calls that follow; a list with one folder for each
                image of the calls that follow, where None is the base model; or None, which takes
                the adapter away.
            weight: Factor of the adapter's own scale.

        Raises:
            AdapterError: The bundle has no slots, or an adapter does not fit. The adapters stay as
                they were.
            InputError: The list is empty or longer than a batch.

        Examples:
            >>> model.set_adapter("adapters/medical")
            >>> model.set_adapter(None)  # the base model again
        """
        self.graphs.adapt(read_factors(self.bundle.spec, adapter, weight))
        self._labels.forget()  # the text encoder may have changed
        self._kept.clear()  # and all else

    @overload
    def caption(
        self, images: Images, prompt: str = "", **options: Unpack[CaptionOptions]
    ) -> list[str]: ...
    @overload
    def caption(
        self, images: ImageSource | Video, prompt: str = "", **options: Unpack[CaptionOptions]
    ) -> str: ...
    @overload
    def caption(
        self,
        images: Stream,
        prompt: str = "",
        *,
        on_error: None = None,
        **options: Unpack[CaptionOptions],
    ) -> Iterator[str]: ...
    @overload
    def caption(
        self,
        images: Stream,
        prompt: str = "",
        *,
        on_error: OnError,
        **options: Unpack[CaptionOptions],
    ) -> Iterator[str | None]: ...
    def caption(
        self,
        images: ImageSource | Video | Images | Stream,
        prompt: str = "",
        *,
        task: str = "caption",
        examples: Sequence[Example] = (),
        seed: int | None = None,
        on_error: OnError | None = None,
        **options: Any,
    ) -> Any:
        """Describe an image or a video.

        Args:
            images: One image or `Video`, a list or tuple of either kind, or an iterator of images.
            prompt: Beginning of the caption, such as "a photo of"; the answer does not repeat it.
            task: Another captioning task of the bundle, such as "detailed_caption".
            examples: Images with correct captions, each a `vlmedge.Example`, that the model reads
                first (few-shot).
            seed: Random seed for sampling. Each item of a list draws from its own random stream;
                the first item draws what it would draw alone.
            on_error: Streams only. Called with (image, error) for each image that cannot be used;
                its caption is None. If omitted, the error is raised after the captions of the
                images before it.
            **options: Decode options that replace the bundle's defaults: max_tokens, min_tokens,
                num_beams, do_sample, temperature, top_k, top_p, repetition_penalty,
                length_penalty, early_stopping, no_repeat_ngram_size. A temperature, top_k or
                top_p turns sampling on.

        Returns:
            A caption, a list of captions, or an iterator of captions.

        Examples:
            >>> model.caption(["cat.jpg", "dog.jpg"], max_tokens=20)
            ['a cat sitting on a sofa', 'a dog in the snow']
        """
        wiring = generating.caption_task(self._context, prompt, self._about(task, images))
        chosen = self._context.options(options)
        request = Request(wiring, prompt, chosen, seed, examples)
        return answering.write(self._context, request, images, on_error)

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
            image: An image or a `Video`.
            count: Number of captions.
            prompt: Beginning of every caption, see `caption`.
            task: Another captioning task of the bundle.
            seed: Random seed; the first caption is the one that `caption` draws with this seed.
            **options: Decode options, see `caption`. More than one caption needs sampling
                (temperature, top_k or top_p).

        Returns:
            `count` captions; some may be the same.

        Examples:
            >>> model.captions("cat.jpg", 2, top_p=0.9, seed=0)
            ['a cat sitting on a sofa', 'a grey cat looks at the camera']
        """
        wiring = generating.caption_task(self._context, prompt, self._about(task, image))
        request = Request(wiring, prompt, self._context.options(options), seed)
        return answering.write_several(self._context, request, image, count)

    @overload
    def ask(self, images: Images, question: str, **options: Unpack[AskOptions]) -> list[str]: ...
    @overload
    def ask(
        self, images: ImageSource | Video, question: str, **options: Unpack[AskOptions]
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
        """Answer a question about an image or a video.

        Args:
            images: One image or `Video`, or a list or tuple of either kind.
            question: The question in plain words; the model's template is put around it.
            regions: Boxes (left, top, right, bottom) or points (x, y), in pixels of the image as
                it was given. Each replaces one `{region}` of the question, in order.
            examples: Images with questions and correct answers, each a `vlmedge.Example`, that the
                model reads first (few-shot).
            first_token: Token that replaces the first token of the question, for models with a
                question encoder: BLIP's own code has "[ENC]" there, transformers has not.
            seed: Random seed for sampling, see `caption`.
            **options: Decode options, see `caption`.

        Returns:
            An answer, or a list of answers.

        Examples:
            >>> model.ask("cat.jpg", "What is the animal doing?")
            'sleeping'
        """
        name = self._about("ask", images)
        wiring = generating.ask_task(self._context, question, first_token, name)
        chosen = self._context.options(options)
        request = Request(wiring, question, chosen, seed, examples, regions)
        return answering.write(self._context, request, images)

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
        """Caption one image, or answer a question about it, in pieces as they are written.

        The pieces, joined and stripped, are what `caption` or `ask` returns.

        Args:
            image: An image or a `Video`.
            prompt: Beginning of the caption, see `caption`.
            question: Question to answer, see `ask`; None: caption the image.
            regions: Boxes or points that the question refers to, see `ask`.
            task: Captioning task of the bundle, where no question is given.
            seed: Random seed for sampling, see `caption`.
            **options: Decode options, see `caption`, except beams, whose text is known only at the
                end: if the bundle's default is beam search, a stream is greedy.

        Returns:
            An iterator of pieces of text. If another call uses the model in between, the next piece
            raises `VlmEdgeError`, unless that call left the decoder's cache alone.

        Examples:
            >>> for piece in model.stream("cat.jpg"):
            ...     print(piece, end="", flush=True)
        """
        name = self._about(task if question is None else "ask", image)
        chosen = self._context.options_of_a_stream(options)
        if question is None:
            wiring, text = generating.caption_task(self._context, prompt, name), prompt
        else:
            wiring, text = generating.ask_task(self._context, question, name=name), question
        request = Request(wiring, text, chosen, seed, regions=regions)
        return answering.write_in_pieces(self._context, request, image)

    @in_turn
    def session(self, image: ImageSource) -> Session:
        """Open one image for several questions: it is encoded once, its prompt prefix read once.

        Answers do not depend on what is kept; the `session_mib` of `vlmedge.load` bounds it.

        Args:
            image: An image; sessions take no videos.

        Returns:
            A `Session` with the methods `ask`, `caption` and `stream`.

        Examples:
            >>> with model.session("cat.jpg") as session:
            ...     answers = [session.ask(question) for question in questions]
        """
        return Session(self._context, self._kept, image)

    @in_turn
    def chat(self, system: str | None = None, **options: Any) -> Chat:
        """Begin a conversation about images, whose cache is kept between turns.

        Args:
            system: System text before the first turn; None: the checkpoint's own.
            **options: Decode options of every reply, see `caption`; no beams. By default a reply
                has at most 256 tokens, or the checkpoint's own maximum if that is greater.

        Returns:
            A `Chat` with the methods `ask` and `stream`.

        Raises:
            InputError: An option cannot be used, or the checkpoint takes no system text.

        Examples:
            >>> chat = model.chat()
            >>> chat.ask("What is in the picture?", "cat.jpg")
            'A cat on a sofa.'
        """
        task = self._context.task("chat", ChatTask)
        write = self._context.task(task.write, GenerateTask)
        if options.get("max_tokens") is None:
            options["max_tokens"] = reply_tokens(self._context)
        return Chat(self._context, task, write, self._context.options_of_a_stream(options), system)

    @overload
    def detect(
        self, images: Images, what: str | None = None, **options: Unpack[DetectOptions]
    ) -> list[list[Box]]: ...
    @overload
    def detect(
        self, images: ImageSource, what: str | None = None, **options: Unpack[DetectOptions]
    ) -> list[Box]: ...
    def detect(
        self,
        images: ImageSource | Images,
        what: str | None = None,
        *,
        task: str | None = None,
        **options: Any,
    ) -> Any:
        """Find things in an image.

        Args:
            images: One image, or a list or tuple of images.
            what: Things to look for: "cat", or several as "cat; dog". None: everything that the
                model knows, if it was trained for that.
            task: Another detection task of the bundle; "segment" returns masks too.
            **options: Decode options, see `caption`.

        Returns:
            A list of `Box`, or one list for each image, in the order in which the model names them.

        Examples:
            >>> [(box.label, box.pixels(640, 480)) for box in model.detect("cat.jpg", "cat")]
            [('cat', (64.0, 48.0, 320.0, 432.0))]
        """
        name = detecting.usual(self.bundle, what) if task is None else task
        return answering.detect(self._context, images, what, name, options)

    @overload
    def classify(
        self, images: Images, labels: Labels = None, template: Template = None
    ) -> list[Ranking]: ...
    @overload
    def classify(
        self, images: ImageSource, labels: Labels = None, template: Template = None
    ) -> Ranking: ...
    @overload
    def classify(
        self,
        images: Stream,
        labels: Labels = None,
        template: Template = None,
        *,
        on_error: None = None,
    ) -> Iterator[Ranking]: ...
    @overload
    def classify(
        self, images: Stream, labels: Labels = None, template: Template = None, *, on_error: OnError
    ) -> Iterator[Ranking | None]: ...
    def classify(
        self,
        images: ImageSource | Images | Stream,
        labels: Labels = None,
        template: Template = None,
        *,
        on_error: OnError | None = None,
    ) -> Any:
        """Rank labels for an image.

        A model that reads texts ranks `labels` without training (zero-shot). A model with a closed
        head ranks the labels that it was trained on, and takes no others.

        Args:
            images: One image, a list or tuple of images, or an iterator of images.
            labels: Labels to choose from, each once; None for a closed head.
            template: Text around a label, with `{}` for the label; None: the bundle's own. The
                vectors of several templates are averaged. "imagenet" stands for CLIP's 80.
            on_error: Streams only, see `caption`; the ranking of an image that cannot be used is
                None.

        Returns:
            (label, probability) pairs, best first; a list or an iterator of such lists for several
            images. Probabilities add up to 1 (softmax), or each stands alone where the model was
            trained so (SigLIP's sigmoid).

        Examples:
            >>> model.classify("cat.jpg", ["cat", "dog"])
            [('cat', 0.98), ('dog', 0.02)]
        """
        with self._context.turn:
            rank = ranker(self._context, self._labels, labels, template)

        def answer(opened: Sequence[Opened], places: Sequence[int]) -> list[Ranking]:
            return rank(self._context.ready(opened).pixel_values)

        return answering.answer_each(self._context, images, answer, on_error)

    @in_turn
    def match(self, images: ImageSource | Images, texts: str | Sequence[str]) -> Any:
        """Return the probability that an image and a text belong together, 0..1.

        The model looks at both at once, which is slower and more accurate than comparing the
        vectors of `embed_image` and `embed_text`.

        Args:
            images: One image, or a list or tuple of images.
            texts: One text, or several.

        Returns:
            A float for one image and one text; a list of floats for one image and several texts,
            or for several images and one text; a list of lists [images][texts] for several of both.

        Examples:
            >>> model.match("cat.jpg", ["a cat", "a dog"])
            [0.97, 0.01]
        """
        task = self._context.task("match", ScoreTask)
        several = [texts] if isinstance(texts, str) else texts
        images_ = answering.several(images)
        shares = matching.score(self._context, task, images_, several).tolist()
        rows = [row[0] for row in shares] if isinstance(texts, str) else shares
        return rows if is_images(images) else rows[0]

    @in_turn
    def infill(self, image: ImageSource, text: str, top: int = 5) -> list[Ranking]:
        """Rank the words that may fill the gaps of a text about an image.

        Args:
            image: One image.
            text: Text with the model's mask token, such as "[MASK]", where a word is missing.
            top: Number of words for each gap.

        Returns:
            For each gap its (word, probability) pairs, best first.

        Examples:
            >>> model.infill("cat.jpg", "a [MASK] on a sofa", top=2)
            [[('cat', 0.91), ('dog', 0.03)]]
        """
        task = self._context.task("infill", InfillTask)
        return matching.infill(self._context, task, image, text, top)

    @overload
    def paint(
        self, images: Images, examples: Examples, *, task: str = "paint", labels: int | None = None
    ) -> list[Painting]: ...
    @overload
    def paint(
        self,
        images: ImageSource,
        examples: Examples,
        *,
        task: str = "paint",
        labels: int | None = None,
    ) -> Painting: ...
    @in_turn
    def paint(
        self,
        images: ImageSource | Images,
        examples: Examples,
        *,
        task: str = "paint",
        labels: int | None = None,
    ) -> Painting | list[Painting]:
        """Do to an image what was done to the images of the examples.

        Args:
            images: One image, or a list or tuple of images.
            examples: (image, painting) pairs; the model looks at all of them together. A painting
                is an RGB image, or a gray or indexed one whose values are labels if `labels` is
                given. A depth map may be uint16 [height, width], in millimetres.
            task: Another painting task of the bundle, such as "depth"; it decides what the pixels
                of a painting mean.
            labels: Number of labels beside the background, which is 0; at most 255.

        Returns:
            A `Painting`, or a list of them.

        Examples:
            >>> model.paint("cat.jpg", [("dog.jpg", "dog_mask.png")], labels=1).values.shape
            (480, 640)
        """
        wiring = self._context.task(task, PaintTask)
        images_ = answering.several(images)
        found = painting.paint(self._context, wiring, images_, examples, labels)
        return found if is_images(images) else found[0]

    @overload
    def embed_image(self, images: ImageSource | Images) -> Vectors: ...
    @overload
    def embed_image(self, images: Stream, *, on_error: None = None) -> Iterator[Vectors]: ...
    @overload
    def embed_image(self, images: Stream, *, on_error: OnError) -> Iterator[Vectors | None]: ...
    def embed_image(
        self, images: ImageSource | Images | Stream, *, on_error: OnError | None = None
    ) -> Any:
        """Return the unit vector of an image.

        Args:
            images: One image, a list or tuple of images, or an iterator of images.
            on_error: Streams only, see `caption`; the vector of an image that cannot be used is
                None.

        Returns:
            float32 [width] of length 1; [images, width] for a list; an iterator of [width] for a
            stream. Where the model gives an image several vectors (BLIP-2's queries), [width]
            becomes [vectors, width], and the vector nearest to a text counts.

        Examples:
            >>> model.embed_image("cat.jpg") @ model.embed_text("a cat")  # their cosine
            0.29
        """
        task = self._context.task("embed_image", EmbedTask)

        def answer(opened: Sequence[Opened], places: Sequence[int]) -> list[Vectors]:
            pixels = self._context.ready(opened).pixel_values
            return [*embedding.embed_pixels(self._context, task.encode, task.output, pixels)]

        found = answering.answer_each(self._context, images, answer, on_error)
        return np.stack(found) if isinstance(found, list) else found

    @in_turn
    def embed_text(self, texts: str | Sequence[str]) -> Vectors:
        """Return the unit vector of a text.

        Args:
            texts: One text, or several.

        Returns:
            float32 [width] of length 1, or [texts, width] for several texts.
        """
        task = self._context.task("embed_text", EmbedTask)
        several = [texts] if isinstance(texts, str) else texts
        found = embedding.embed_texts(self._context, task.encode, task.output, several)
        return found[0] if isinstance(texts, str) else found

    def index(
        self, folder: str | Path, note: Callable[[str], None] = lambda _: None
    ) -> retrieving.Index:
        """Embed every picture of a folder and of its subfolders, for `search`.

        Args:
            folder: Folder of pictures.
            note: Called with a line for each picture that cannot be read and is left out.

        Returns:
            An `Index`. Its `save` writes it to a file, and `vlmedge.load_index` reads that.

        Raises:
            InputError: The folder has no picture that can be read.

        Examples:
            >>> model.index("photos").save("photos.npz")
            >>> model.search(vlmedge.load_index("photos.npz"), "a cat on a sofa")
            [('2024/cat.jpg', 0.31), ('2023/sofa.jpg', 0.27)]
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
        """Find the pictures of an index that fit a text, or that resemble an image.

        Args:
            index: Index that `index` has made with the same checkpoint.
            text: Text to search for; give either this or `image`.
            image: Image to search for.
            top: Number of pictures.

        Returns:
            (path, cosine) pairs, best first; paths are relative to the indexed folder.

        Raises:
            InputError: Both or neither of text and image are given, `top` is less than 1, or the
                index was made with another checkpoint.
        """
        if (text is None) == (image is None):
            raise InputError("search: give a text or an image, one of them")
        if index.checkpoint != self.bundle.manifest.checkpoint.sha256:
            raise InputError(
                f"the index of {index.folder} was made with another checkpoint: index it again"
            )
        if text is not None:
            return index.search(self.embed_text(text), top)
        assert image is not None
        return index.search(self.embed_image(image), top)

    @in_turn
    def close(self) -> None:
        """Free the memory of every open graph; graphs open again when they are needed."""
        self.graphs.close()

    def _about(self, task: str, images: object) -> str:
        return answering.task_about(self._context, task, images)


def load(
    path: str | Path,
    engine: str = "ort",
    *,
    session_mib: float = SESSION_MIB,
    low_memory: bool = False,
    allow_fallback: bool = False,
    spin: bool | None = None,
) -> Model:
    """Open a bundle; each of its graphs opens when it is first needed.

    Args:
        path: Folder that `vlmedge export` or `vlmedge quantize` made.
        engine: Software that runs the graphs, a name of `vlmedge list`: "ort" for CPUs, "ort_cuda"
            or "tensorrt" for NVIDIA GPUs.
        session_mib: Memory for what sessions keep (encoded images and prompt prefixes), in MiB.
            The least recently used goes first.
        low_memory: Whether to close each component before the next one opens. Peak memory is then
            that of the largest component instead of all; every call pays for opening them.
        allow_fallback: Whether an engine of a GPU may run on the CPU what it cannot run on the
            GPU. By default that is an error, which names the node or the component.
        spin: Whether the CPU engine's threads spin between operators, which is faster and takes
            more power. None: spin unless the machine runs on battery; see `vlmedge doctor`.

    Returns:
        A `Model`.

    Raises:
        BundleError: The folder is no bundle, or a file of it is missing or altered.
        InputError: An option cannot be used with this engine.
        UnknownNameError: There is no such engine.
        MissingExtraError: The engine's package is not installed.

    Examples:
        >>> model = vlmedge.load("blip2-opt-2.7b-int8")
        >>> model.ask("cat.jpg", "What colour is the cat?")
        'black'
    """
    return Model(
        Bundle.load(path),
        engine,
        session_mib=session_mib,
        low_memory=low_memory,
        allow_fallback=allow_fallback,
        spin=spin,
    )


load.__module__ = (
    "vlmedge"  # where users find it: a pickled model names it, and no move breaks that
)
