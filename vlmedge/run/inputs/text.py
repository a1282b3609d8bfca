"""Texts to input_ids and back, equal to the fast tokenizers of transformers."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlmedge.errors import BundleError, InputError
from vlmedge.spec import TextFrontEnd


class Tokenizer:
    """One tokenizer.json and the rules of the model that it belongs to."""

    def __init__(self, file: Path, front: TextFrontEnd) -> None:
        """Load `file`.

        Args:
            file: Where `front.tokenizer` lies on this disk.
            front: Padding and room.

        Raises:
            BundleError: The file is missing or is not a tokenizer.
        """
        from tokenizers import Tokenizer as Backend  # a bare environment imports this module
        from tokenizers.decoders import BPEDecoder, ByteLevel

        if not file.is_file():
            raise BundleError(f"no tokenizer {file}: export the bundle again")
        try:
            backend = Backend.from_file(str(file))
        except Exception as error:  # the Rust side raises nothing narrower
            cause = " ".join(str(error).split())
            raise BundleError(f"tokenizer {file} cannot be read: {cause}") from None
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._front = front
        decoder = backend.decoder
        # CLIP's file leaves "</w>" in its text; transformers' CLIPTokenizer takes it out.
        suffix = getattr(backend.model, "end_of_word_suffix", None)
        self._suffix = "" if isinstance(decoder, BPEDecoder) else suffix or ""
        # ByteLevel glues bytes: at a character's end, what follows depends on nothing before.
        self._is_bytes = isinstance(decoder, ByteLevel) and not self._suffix
        # These go back on their last word: "</w>" and spaces at the end, "it ' s" -> "it's".
        self._is_words = bool(self._suffix) or (
            decoder is not None and b'"WordPiece"' in decoder.__getstate__()
        )

    def ids(self, text: str, *, whole: bool = True) -> list[int]:
        """Return the ids of one text.

        Args:
            text: Any.
            whole: Whether it is all of the input, and so gets the model's special tokens around
                it; or goes on after another.

        Raises:
            InputError: `text` is no str, or no valid Unicode.
        """
        if not isinstance(text, str):
            raise InputError(f"text of type {type(text).__name__}: give a str")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"text with a lone surrogate at character {error.start}: give valid Unicode"
            ) from None
        return list(self._backend.encode(text, add_special_tokens=whole).ids)

    def encode(
        self, texts: Sequence[str], *, reserve: int = 0
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return padded rows of ids and which of them are text.

        Args:
            texts: At least one.
            reserve: Positions of the model that new tokens take.

        Returns:
            input_ids int64 [batch, tokens], and attention_mask int64 [batch, tokens], 0 or 1.

        Raises:
            InputError: A text has more tokens than the model has room for.
        """
        if isinstance(texts, str):
            raise InputError("texts is a single str: give a list of str")
        rows = [self.ids(text) for text in texts]
        if not rows:
            raise InputError("no texts: give at least one")
        pad_to = self._front.pad_to
        room = max(self._front.max_tokens - reserve, 0)
        room = room if pad_to is None else min(room, pad_to)
        longest = max(map(len, rows))
        if longest > room:
            beside = f" beside {reserve} new ones (max_tokens)" if reserve else ""
            raise InputError(f"prompt of {longest} tokens: the model has room for {room}{beside}")
        shape = len(rows), longest if pad_to is None else pad_to
        input_ids = np.full(shape, self._front.pad_id, np.int64)
        attention_mask = np.zeros(shape, np.int64)
        for row, ids in enumerate(rows):
            start = shape[1] - len(ids) if self._front.padding_side == "left" else 0
            input_ids[row, start : start + len(ids)] = ids
            attention_mask[row, start : start + len(ids)] = 1
        return input_ids, attention_mask

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Return the text of `ids`, as transformers' batch_decode does.

        Args:
            ids: Token ids.
            special: Whether special tokens are written too.
        """
        text = self._backend.decode([int(i) for i in ids], skip_special_tokens=not special)
        return text.replace(self._suffix, " ").strip() if self._suffix else text

    def text(self, ids: Iterable[int]) -> str:
        """Return the text of `ids` without special tokens, and without space around it."""
        return self.decode(ids).strip()

    def pieces(self, ids: Iterable[int]) -> Generator[str, None, None]:
        """Decode while the ids come in.

        Yields:
            Parts whose concatenation is `decode(ids)`; none ends inside a character, nor, for
            tokenizers that join words only when they know the next one, inside a word.
        """
        window: list[int] = []
        sent = 0  # characters of the window's text
        for i in ids:
            window.append(i)
            text = self.decode(window)
            settled = self._settled(text)
            if settled > sent:
                yield text[sent:settled]
                sent = settled
            if self._is_bytes and settled == len(text):
                window, sent = [], 0  # so a long text costs linear time
        rest = self.decode(window)[sent:]
        if rest:
            yield rest

    def _settled(self, text: str) -> int:
        """How many characters no later id can change."""
        if self._is_words:
            return max(text.rfind(" "), 0)
        return len(text.rstrip("\ufffd"))  # U+FFFD stands for a character's first bytes
