"""A conversation about pictures: each turn reads only what is new, the cache holds the rest."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmedge.errors import InputError, VlmEdgeError
from vlmedge.run.decode import loop, reader
from vlmedge.run.decode.prompt import Prompt
from vlmedge.run.decode.sampling import options as merge
from vlmedge.run.inputs.image import Pictures
from vlmedge.run.inputs.image_files import ImageSource
from vlmedge.run.tasks import encode as encoding
from vlmedge.run.tasks import prompt as prompting
from vlmedge.run.tasks.context import TaskContext
from vlmedge.run.tasks.turns import each_in_turn, in_turn
from vlmedge.spec import ChatTask, GenerateTask, Generation

REPLY_TOKENS = 256  # a bundle's own default is for captions


def reply_tokens(context: TaskContext) -> int:
    """Return how long a reply may be unless the caller says it: at most half of the positions."""
    defaults = context.bundle.spec.generation
    most = REPLY_TOKENS if defaults is None else max(defaults.max_tokens, REPLY_TOKENS)
    return min(most, context.text_front.max_tokens // 2)


class Chat:
    """One conversation; `Model.chat` makes one.

    A reply that is cut short (its iterator is closed, or max_tokens is reached) stays in the
    conversation as far as it was written. Other work with the model between two turns costs one
    read of the whole conversation, and changes no reply.

    Attributes:
        turns: (text, reply) of every turn so far, in order.

    Examples:
        >>> chat = model.chat()
        >>> chat.ask("What is in the picture?", "cat.jpg")
        'A cat on a sofa.'
    """

    def __init__(
        self,
        context: TaskContext,
        task: ChatTask,
        write: GenerateTask,
        options: Generation,
        system: str | None = None,
    ) -> None:
        """Begin an empty conversation.

        Args:
            context: The model.
            task: Templates that turns are put together from.
            write: The task that writes replies.
            options: Decode options of every reply.
            system: System text before the first turn, or None.

        Raises:
            InputError: The checkpoint's template has no place for a system text.
        """
        if system is not None and task.system is None:
            raise InputError("this checkpoint takes no system text: put it into the first turn")
        self._context, self._task, self._write, self._options = context, task, write, options
        told = None if task.system is None or system is None else (task.system, system)
        self._start = task.start if told is None else told[0].replace("{text}", told[1])
        self._ids: list[int] = []  # of all turns and replies; a picture's id for each of its rows
        self._vectors: list[NDArray[np.float32]] = []  # of each, float32 [width]
        self._prompt: Prompt | None = None  # what the decoder read last for this conversation
        self.turns: list[tuple[str, str]] = []

    @in_turn
    def ask(
        self,
        text: str,
        images: ImageSource | Sequence[ImageSource] = (),
        *,
        seed: int | None = None,
        **options: Any,
    ) -> str:
        """Say something, with or without pictures, and return the reply.

        Args:
            text: Text of the user's turn.
            images: Pictures that the turn shows, in order; they stay in the conversation.
            seed: Random seed for sampling.
            **options: Decode options of this reply, see `stream`.

        Returns:
            The whole reply.

        Raises:
            InputError: As `stream` does.
        """
        return "".join(self.stream(text, images, seed=seed, **options)).strip()

    @in_turn
    def stream(
        self,
        text: str,
        images: ImageSource | Sequence[ImageSource] = (),
        *,
        seed: int | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Say something, with or without pictures, and return the reply in pieces.

        Args:
            text: Text of the user's turn.
            images: Pictures that the turn shows, in order; they stay in the conversation.
            seed: Random seed for sampling.
            **options: Decode options of this reply, see `Model.caption`; no beams.

        Returns:
            An iterator of pieces of text, as they are written.

        Raises:
            InputError: The text is empty, a picture or an option cannot be used, or the
                conversation leaves no room for a reply. The conversation stays as it was.
        """
        if not text.strip():
            raise InputError("the turn is empty: write something")
        several = list(images) if isinstance(images, list | tuple) else [images]
        chosen = merge(self._options, **options)
        if chosen.num_beams > 1:
            raise InputError(f"num_beams is {chosen.num_beams}: it must be 1 in a conversation")
        history, vectors = self._turn(text, several)
        prompting.check_room(self._context, len(self._ids) + len(history), chosen)
        reply = self._reply(text, history, vectors, chosen, seed)
        return each_in_turn(self._context.turn, reply)

    def _turn(self, text: str, images: list[Any]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Make the ids and vectors of a turn; nothing of it stays."""
        task, context = self._task, self._context
        pictures = context.pictures(images) if images else None
        turn = self._fill(text, pictures)
        first = not self._ids
        ids = context.tokenizer.ids((self._start if first else task.reply_end) + turn, whole=first)
        soft: list[NDArray[np.float32]] = []
        if pictures is not None:
            encoded = encoding.encode(context, self._write, pictures.pixel_values)
            soft = [part for seen in encoding.rows(encoded, pictures.grids) for part in seen]
        return prompting.spliced(context, self._write, soft, ids)

    def _fill(self, text: str, pictures: Pictures | None) -> str:
        """Put a turn together; the user's words come last, so that they may hold any others."""
        if pictures is None:
            return self._task.user.replace("{text}", text)
        shown = "".join(
            self._task.image.replace("{image}", prompting.image_text(self._write, grid))
            for grid in pictures.grids
        )
        return self._task.user_images.replace("{images}", shown).replace("{text}", text)

    def _reply(
        self,
        text: str,
        history: NDArray[np.int64],
        vectors: NDArray[np.float32],
        options: Generation,
        seed: int | None,
    ) -> Generator[str, None, None]:
        """Read what the cache lacks, and write."""
        decoder = self._context.graphs[self._write.decoder]
        held = 0 if self._prompt is None else reader.cached(decoder, self._prompt)
        known, reply = len(self._ids), ""
        self._ids += history.tolist()
        self._vectors = [*self._vectors[:known], *vectors]
        ids = np.array(self._ids, np.int64)[None]
        self._prompt = Prompt(
            embeds=np.stack(self._vectors[held:])[None],
            attention_mask=np.ones_like(ids[:, held:]),
            history=ids[:, held:],
            before=ids[:, :held] if held else None,
        )
        try:
            made = loop.stream(decoder, self._context.embed, self._prompt, options, seed)
            for piece in self._context.tokenizer.pieces(self._kept(made)):
                reply += piece
                yield piece
        except VlmEdgeError:
            del self._ids[known:], self._vectors[known:]  # the turn never was
            raise
        finally:
            if len(self._ids) > known:
                self.turns.append((text, reply.strip()))

    def _kept(self, ids: Iterator[int]) -> Iterator[int]:
        """Keep every id that is written, also when nobody asks for the next one."""
        for token in ids:
            self._ids.append(token)
            self._vectors.append(self._context.embed(np.array([token], np.int64))[0])
            yield token
