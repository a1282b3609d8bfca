"""A decoder that remembers what it has read: a known beginning is not read again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from vlmedge.arrays import Array, Ids, Scores
from vlmedge.errors import InputError, VlmEdgeError
from vlmedge.run.decode.prompt import Embed, Prompt, feeds, input_names
from vlmedge.shelves.contracts import Graph
from vlmedge.spec import Generation


@dataclass(slots=True)
class _Reading:
    """Contents of a decoder's cache."""

    prompt: Prompt
    tokens: int
    reads: int  # of the decoder, when it was there


_READINGS: WeakKeyDictionary[Graph, _Reading] = WeakKeyDictionary()


def cached(decoder: Graph, prompt: Prompt) -> int:
    """Count the tokens that a decoder still holds of `prompt` and what was written after it.

    It is 0 when the decoder has read something else since, whoever ran it, or has failed.
    """
    found = _READINGS.get(decoder)
    if found is None or found.prompt is not prompt or found.reads != decoder.reads:
        return 0
    return found.tokens


def forget(decoder: Graph) -> None:
    """Let nothing that a decoder has read count as cached: its weights have changed."""
    _READINGS.pop(decoder, None)


class _Loop:
    """The decoder with what it is fed at every step: attention mask, positions, embeddings."""

    def __init__(self, decoder: Graph, embed: Embed, prompt: Prompt, options: Generation) -> None:
        self._decoder = decoder
        self._reads = decoder.reads  # when its cache was last what this text needs
        self._names = input_names(decoder.component)
        self._embed = embed
        self._prompt_tokens = self._total = prompt.tokens
        self._prompt = prompt
        self._media = prompt.media_index  # new tokens see what the last one sees
        self._given, self._held = prompt.held, dict(prompt.held)
        self._rows = np.arange(len(prompt.embeds))  # of the prompt, that each row came from
        # of the whole text that may come, so that a step only takes a slice
        new = np.ones((len(prompt.embeds), options.max_tokens), np.int64)
        old = new[:, :0] if prompt.before is None else np.ones_like(prompt.before)
        self._mask = np.concatenate([old, prompt.attention_mask, new], axis=1)

    def read(self, embeds: NDArray[np.float32]) -> Scores:
        """Run the prompt; return the logits after its last token, float32 [rows, vocabulary]."""
        if self._prompt.before is None or self._prompt.state:
            self._decoder.reset()
            self._reads = self._decoder.reads
        return self._run(embeds, self._prompt.state)

    def write(self, ids: Ids) -> Scores:
        """Run one token a row; return the logits after it, float32 [rows, vocabulary]."""
        self._total += 1
        return self._run(self._embed(ids)[:, None, :])

    def reorder(self, rows: Ids) -> None:
        """Make row i the row `rows[i]` of now, in the cache and in what is fed."""
        if not np.array_equal(rows, np.arange(len(self._mask))):
            self._decoder.reorder(rows)
            self._mask = self._mask[rows]
            self._media = None if self._media is None else self._media[rows]
            # beams of one picture take turns, which changes nothing of what they look at
            if not np.array_equal(self._rows[rows], self._rows):
                self._rows = self._rows[rows]
                self._held = {name: array[self._rows] for name, array in self._given.items()}

    def _run(self, embeds: NDArray[np.float32], state: Mapping[str, Array] | None = None) -> Scores:
        if self._decoder.reads != self._reads:
            raise InputError(
                f"{self._decoder.component.name} was closed or has read something else since this "
                "text began: take a stream to its end before the next call, or load the bundle "
                "once more"
            )
        mask = self._mask[:, : self._total]
        component, tokens = self._decoder.component, self._prompt_tokens
        given = feeds(component, embeds, mask, tokens, self._media, self._names) | self._held
        given |= state or {}
        _READINGS.pop(self._decoder, None)
        logits: Scores = self._decoder.run(given, last=True)["logits"][:, -1]
        self._reads = self._decoder.reads
        _READINGS[self._decoder] = _Reading(self._prompt, self._total, self._reads)
        if not np.isfinite(logits.max(axis=-1)).all():
            step = self._total - self._prompt_tokens + 1
            raise VlmEdgeError(
                f"{self._decoder.component.name}: logits of new token {step} are nan or inf: "
                "run it in float32, or check the bundle's parity"
            )
        return logits
