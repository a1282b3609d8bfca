"""What a decoder reads before it writes, and how that is fed to its graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vlmedge.arrays import Array, Ids
from vlmedge.errors import InputError
from vlmedge.spec import Component

Embed = Callable[[Ids], NDArray[np.float32]]
"""Token ids int64 [rows] -> embeddings float32 [rows, width]."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Inputs that the decoder reads before it writes, padded on the left.

    Attributes:
        embeds: Soft prompt and text, float32 [batch, tokens, width].
        attention_mask: 0 where a row is padding, int64 [batch, tokens].
        history: Ids that penalties for repetition see, image placeholders included as in
            transformers, int64 [batch, tokens]; -1 hides a position.
        before: The history of what the decoder has read and written already and still has in its
            cache, int64 [batch, earlier]; none starts with an empty cache.
        held: Constant inputs, fed unchanged at every step, by name, each [batch, ...].
        media_index: Index of the picture that each token sees, int64 [batch, tokens], -1 none; or
            none where pictures stand among the text.
        state: Cache contents for the tokens of `before`, to be fed to the decoder again: by input
            name, of one row; none: the decoder still has it.
    """

    embeds: NDArray[np.float32]
    attention_mask: Ids
    history: Ids
    before: Ids | None = None
    held: Mapping[str, Array] = field(default_factory=dict)
    media_index: Ids | None = None
    state: Mapping[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse shapes that disagree and rows padded on the right."""
        shape = self.embeds.shape[:2]
        for name in ("attention_mask", "history"):
            got = getattr(self, name).shape
            if got != shape or 0 in shape:
                raise InputError(
                    f"prompt: {name} is {list(got)}: it must be the [batch, tokens] of embeds, "
                    f"{list(shape)}, none of them 0"
                )
        for name, array in self.held.items():
            if len(array) != shape[0]:
                raise InputError(f"prompt: {name} has {len(array)} rows, embeds has {shape[0]}")
        ragged = np.flatnonzero(self.attention_mask[:, -1] == 0)
        if len(ragged):
            raise InputError(f"prompt: row {ragged[0]} ends in padding: pad on the left")

    def seen(self, room: int) -> Ids:
        """Return int64 [batch, tokens + room]: the history without padding, room for new ids."""
        batch, tokens = self.history.shape
        ids = np.full((batch, tokens + room), -1, np.int64)
        started = np.maximum.accumulate(self.attention_mask != 0, axis=1)
        ids[:, :tokens][started] = self.history[started]
        return ids if self.before is None else np.concatenate([self.before, ids], axis=1)

    @property
    def tokens(self) -> int:
        """Count the tokens read before the first new one, those in the cache included."""
        earlier = 0 if self.before is None else int(self.before.shape[1])
        return int(self.history.shape[1]) + earlier

    def after(self, tokens: int, state: Mapping[str, Array] | None = None) -> Prompt:
        """Return the same prompt whose first `tokens` have been read and are in the cache.

        Args:
            tokens: Less than all, of a prompt that starts with an empty cache.
            state: As of the attribute.
        """
        media = self.media_index
        return Prompt(
            self.embeds[:, tokens:],
            self.attention_mask[:, tokens:],
            self.history[:, tokens:],
            before=self.history[:, :tokens],
            held=self.held,
            media_index=None if media is None else media[:, tokens:],
            state=state or {},
        )


def feeds(
    component: Component,
    embeds: NDArray[np.float32],
    mask: Ids,
    prompt_tokens: int,
    media_index: Ids | None = None,
    names: frozenset[str] | None = None,
) -> dict[str, Array]:
    """Make what one run of a decoder takes, as far as it takes it.

    Args:
        component: The decoder's.
        embeds: Embeddings of the new tokens, float32 [rows, tokens, width].
        mask: Attention mask of all tokens so far, int64 [rows, total].
        prompt_tokens: How many of them are the prompt, whose tokens a prefix LM lets see each
            other (token_type_ids 0; what is written after it has 1).
        media_index: As of `Prompt`; of it only the last columns are taken.
        names: From `input_names`, where they are known: there are hundreds.
    """
    rows, total = mask.shape
    new = slice(total - embeds.shape[1], total)
    given: dict[str, Array] = {
        "inputs_embeds": np.ascontiguousarray(embeds),
        "attention_mask": np.ascontiguousarray(mask),
    }
    names = input_names(component) if names is None else names
    if "position_ids" in names:
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, new]
        given["position_ids"] = np.ascontiguousarray(positions)
    if "token_type_ids" in names:
        written = np.arange(total) >= prompt_tokens
        given["token_type_ids"] = np.tile(written.astype(np.int64), (rows, 1))
    if media_index is not None:
        given["media_index"] = np.ascontiguousarray(media_index[:, -embeds.shape[1] :])
    return given


def input_names(component: Component) -> frozenset[str]:
    """Return the names of a component's inputs."""
    return frozenset(spec.name for spec in component.inputs)
