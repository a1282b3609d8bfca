"""One picture asked several times: what does not depend on the question is computed once.

    picture -> soft prompt -> [ read ] -> | prefix of the prompt | question | answer
    '-------- kept ---------------------------------------------'

The prefix is found by comparing token ids, so it is exact whatever the template: it is what the new
prompt has in common with the one that the decoder read last, or with a copy of what an earlier one
left in the cache. Where the text decides what the decoder sees of the picture (a prefix LM, an
encoder or a Q-Former that reads the question) the encoded picture alone is kept.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmedge.arrays import Array
from vlmedge.run.decode import loop, reader
from vlmedge.run.decode.prompt import Prompt
from vlmedge.run.inputs.image_files import ImageSource
from vlmedge.run.tasks import encode as encoding
from vlmedge.run.tasks import generate as generating
from vlmedge.run.tasks import prompt as prompting
from vlmedge.run.tasks.cache import ByteBudgetCache
from vlmedge.run.tasks.context import TaskContext
from vlmedge.run.tasks.encode import Soft
from vlmedge.run.tasks.turns import each_in_turn, in_turn
from vlmedge.shelves.contracts import Graph
from vlmedge.spec import Component, GenerateTask, Generation, wiring

LOOKS_AHEAD = "token_type_ids"  # with it a prompt's tokens see later ones, so no prefix is final

_OWNERS = itertools.count()


@dataclass(frozen=True, slots=True)
class _Prefix:
    """A decoder's cache after the first tokens of a prompt.

    Attributes:
        ids: Ids of those tokens, int64 [tokens].
        state: State tensors of one row, by input name.
    """

    ids: NDArray[np.int64]
    state: dict[str, Array]


class Session:
    """Questions about one picture; `Model.session` makes one.

    Answers equal those of `Model.ask` and `Model.caption`. Other work with the model between two
    questions costs a copy of the prompt's prefix back into the decoder's cache, or one more read of
    the prompt if the copy did not fit into `session_mib`. A session is a context manager that
    closes itself.

    Examples:
        >>> with model.session("cat.jpg") as session:
        ...     answers = [session.ask(question) for question in questions]
    """

    def __init__(self, context: TaskContext, kept: ByteBudgetCache, image: ImageSource) -> None:
        """Decode the picture; it is encoded at the first question.

        Args:
            context: The model.
            kept: Cache of encoded pictures and prefixes, shared by all sessions of a model.
            image: The picture.
        """
        self._context, self._kept = context, kept
        self._pictures = context.pictures([image])
        self._owner = next(_OWNERS)
        self._last: tuple[Prompt, NDArray[np.int64]] | None = None  # what was read last; its ids
        self._forget = weakref.finalize(self, kept.drop, self._owner)

    @in_turn
    def caption(self, prompt: str = "", *, seed: int | None = None, **options: Any) -> str:
        """Describe the picture, as `Model.caption` does.

        Args:
            prompt: Beginning of the caption; the answer does not repeat it.
            seed: Random seed for sampling.
            **options: Decode options, see `Model.caption`.

        Returns:
            The caption.

        Raises:
            InputError: The prompt or an option cannot be used.
        """
        task = generating.caption_task(self._context, prompt)
        return self._write(task, prompt, self._context.options(options), seed)

    @in_turn
    def ask(
        self,
        question: str,
        *,
        first_token: str | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> str:
        """Answer a question about the picture, as `Model.ask` does.

        Args:
            question: The question in plain words.
            first_token: Token that replaces the first token of the question, see `Model.ask`.
            seed: Random seed for sampling.
            **options: Decode options, see `Model.caption`.

        Returns:
            The answer.

        Raises:
            InputError: The question or an option cannot be used.
        """
        task = generating.ask_task(self._context, question, first_token)
        return self._write(task, question, self._context.options(options), seed)

    @in_turn
    def stream(
        self,
        prompt: str = "",
        *,
        question: str | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Caption the picture, or answer a question, in pieces as they are written.

        Args:
            prompt: Beginning of the caption, if no question is given.
            question: Question to answer; None: caption the picture.
            seed: Random seed for sampling.
            **options: Decode options, see `Model.stream`; no beams.

        Returns:
            An iterator of pieces of text; joined and stripped they are what `caption` or `ask`
            returns.

        Raises:
            InputError: The prompt, the question or an option cannot be used.
        """
        if question is None:
            task, text = generating.caption_task(self._context, prompt), prompt
        else:
            task, text = generating.ask_task(self._context, question), question
        chosen = self._context.options_of_a_stream(options)
        loop.check_stream(chosen)  # errors are raised now
        ready = self._prompt(task, text, chosen)
        decoder = self._context.graphs[task.decoder]
        made = self._written(task, text, chosen, seed, ready, (decoder, decoder.reads))
        return each_in_turn(self._context.turn, self._context.tokenizer.pieces(made))

    @in_turn
    def close(self) -> None:
        """Free the cache of this picture; the next question encodes the picture again."""
        self._kept.drop(self._owner)
        self._last = None

    def __enter__(self) -> Session:
        """Return the session itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the session."""
        self.close()

    def _write(self, task: GenerateTask, text: str, chosen: Generation, seed: int | None) -> str:
        read, ids, fixed = self._prompt(task, text, chosen)
        decoder = self._context.graphs[task.decoder]
        [found] = loop.generate(decoder, self._context.embed, read, chosen, seed)
        self._keep(task, decoder, read, ids, fixed)
        return self._context.tokenizer.decode(found).strip()

    def _written(
        self,
        task: GenerateTask,
        text: str,
        chosen: Generation,
        seed: int | None,
        ready: tuple[Prompt, NDArray[np.int64], int],
        then: tuple[Graph, int],
    ) -> Iterator[int]:
        """Write, and keep the prefix as soon as the prompt has been read.

        Args:
            task: The wiring.
            text: The caller's.
            chosen: Options.
            seed: Random seed for sampling.
            ready: From `_prompt`.
            then: The decoder, and its reads, for which it was made.
        """
        decoder = self._context.graphs[task.decoder]
        if then != (decoder, decoder.reads):  # other work came between
            ready = self._prompt(task, text, chosen)
            decoder = self._context.graphs[task.decoder]  # low memory may have closed it
        read, ids, fixed = ready
        made = loop.stream(decoder, self._context.embed, read, chosen, seed)
        for number, token in enumerate(made):
            if number == 0:
                self._keep(task, decoder, read, ids, fixed)
            yield token

    def _prompt(
        self, task: GenerateTask, text: str, chosen: Generation
    ) -> tuple[Prompt, NDArray[np.int64], int]:
        """Make what is to be read.

        Returns:
            The prompt less what is in the cache, the ids of all of it, and how many of them do not
            depend on the text; 0 where nothing may be used again.
        """
        context, grids = self._context, self._pictures.grids
        soft, held = self._seen(task)
        whole = prompting.make_prompt(
            context, task, [soft], [prompting.fill(task, text, grids)], chosen, held
        )
        ids = whole.history[0]
        if not _has_prefix(context, task):
            return whole, ids, 0
        other = prompting.fill(task, "1" if text.startswith("0") else "0", grids)
        others, _ = prompting.row(context, task, soft, other, chosen)
        fixed = min(_common(ids, others), len(ids) - 1)
        decoder = context.graphs[task.decoder]
        live, state = 0, None
        if self._last is not None and reader.cached(decoder, self._last[0]):
            live = min(_common(ids, self._last[1]), len(ids) - 1)
        copied: _Prefix | None = self._kept.get((self._owner, f"prefix {task.prompt}"))
        stored = 0 if copied is None else min(_common(ids, copied.ids), len(ids) - 1)
        if stored > live and copied is not None:
            state = _cut(decoder.component, copied.state, stored)
        elif live:
            decoder.rewind(live)
        start = max(live, stored)
        return (whole.after(start, state) if start else whole), ids, fixed

    def _seen(self, task: GenerateTask) -> tuple[Soft, dict[str, Array] | None]:
        """Return the soft prompt, and what `read` makes of it where no text takes part."""
        context, key = self._context, (self._owner, f"picture {task.encode}")
        soft: Soft | None = self._kept.get(key)
        if soft is None:
            encoded = encoding.encode(context, task, self._pictures.pixel_values)
            [soft] = encoding.rows(encoded, self._pictures.grids)
            self._kept.put(key, soft, sum(part.nbytes for part in soft))
        if not task.read or wiring.reads_text(context.bundle.spec, task):
            return soft, None
        key = (self._owner, f"held {task.read}")
        held: dict[str, Array] | None = self._kept.get(key)
        if held is None:
            held = prompting.read(context, task, [soft], [""])
            self._kept.put(key, held, sum(array.nbytes for array in held.values()))
        return soft, held

    def _keep(
        self, task: GenerateTask, decoder: Graph, read: Prompt, ids: NDArray[np.int64], fixed: int
    ) -> None:
        """Remember what the decoder has read, and copy the prefix if there is room for it."""
        if not reader.cached(decoder, read) or not _has_prefix(self._context, task):
            return
        self._last = read, ids
        key = (self._owner, f"prefix {task.prompt}")
        known: _Prefix | None = self._kept.get(key)
        size_bytes = _size_bytes(decoder.component, fixed)
        if not fixed or not self._kept.fits(size_bytes):
            return
        if known is None or _common(known.ids, ids) < fixed:
            prefix = _Prefix(ids[:fixed].copy(), decoder.snapshot(fixed))
            self._kept.put(key, prefix, size_bytes)


def _has_prefix(context: TaskContext, task: GenerateTask) -> bool:
    """Return whether what the decoder makes of a token depends on nothing that comes later."""
    spec = context.bundle.spec
    looks_ahead = LOOKS_AHEAD in {tensor.name for tensor in spec.component(task.decoder).inputs}
    read_before = bool(task.instruct) or (task.read and wiring.reads_text(spec, task))
    return not looks_ahead and not read_before


def _common(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """Count the ids that two rows begin with alike."""
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length


def _state(component: Component) -> list[tuple[str, int, int]]:
    """List a decoder's state: input name, which axis is time, bytes a position of one row."""
    into = {name for _, name in component.state}
    found = []
    for spec in component.inputs:
        if spec.name in into:
            sizes = [size for size in spec.shape if isinstance(size, int)]
            size_bytes = int(np.prod(sizes)) * np.dtype(spec.dtype).itemsize
            found.append((spec.name, spec.shape.index("past"), size_bytes))
    return found


def _size_bytes(component: Component, tokens: int) -> int:
    """Return the size of a prefix of one row."""
    return tokens * sum(size_bytes for _, _, size_bytes in _state(component))


def _cut(component: Component, state: dict[str, Array], tokens: int) -> dict[str, Array]:
    """Take the first positions of a copied state."""
    return {
        name: state[name][(slice(None),) * time + (slice(tokens),)]
        for name, time, _ in _state(component)
    }
