"""The decode loop: one for every engine and every family.

The prompt runs once for each image; beams come into being when the cache is reordered after it.
Beam search is transformers 5.23's `GenerationMixin._beam_search`, row by row: there too no row's
result depends on another's, so a row leaves the batch as soon as it is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from vlmedge.arrays import Array, Ids, Scores
from vlmedge.errors import InputError, VlmEdgeError
from vlmedge.sampling import draw, log_softmax, process, top, warp
from vlmedge.shelves.contracts import Graph
from vlmedge.spec import Component, Generation

FED = ("inputs_embeds", "attention_mask", "position_ids", "token_type_ids")
"""What the loop makes for a decoder."""

Embed = Callable[[Ids], NDArray[np.float32]]
"""Token ids int64 [rows] -> embeddings float32 [rows, width]."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the decoder reads before it writes, padded on the left.

    Attributes:
        embeds: Soft prompt and text, float32 [batch, tokens, width].
        attention_mask: 0 where a row is padding, int64 [batch, tokens].
        history: Ids that penalties for repetition see, image placeholders included as in
            transformers, int64 [batch, tokens]; -1 hides a position.
        before: The history of what the decoder has read and written already and still has in its
            cache, int64 [batch, earlier]; none starts with an empty cache.
        held: What the decoder is fed unchanged at every step, by name, each [batch, ...].
        media_index: Which picture each token sees, int64 [batch, tokens], -1 none; or none where
            pictures stand among the text.
        state: What `before` left in the cache, for the decoder to be fed again: by input name, of
            one row; none: the decoder still has it.
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
        """Count what is read before the first new token, what is in the cache included."""
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


def generate(
    decoder: Graph,
    embed: Embed,
    prompt: Prompt,
    options: Generation,
    seed: int | None = None,
    places: Sequence[int] | None = None,
) -> list[list[int]]:
    """Write on after each row of the prompt.

    Args:
        decoder: The component of the decode loop; its state is reset first.
        embed: Looks up the embeddings of token ids.
        prompt: The rows.
        options: From `vlmedge.sampling.options`, which validates them.
        seed: Of the draw, at least 0; the same seed gives the same text. Each place has its own
            stream of it, so a row is drawn the same whatever stands beside it.
        places: Of the rows among all that are drawn with this seed; default: 0, 1, ...

    Returns:
        The new ids of each row, without the end token.

    Raises:
        VlmEdgeError: The decoder gave nan or inf.
    """
    loop = _Loop(decoder, embed, prompt, options)
    if options.num_beams > 1:
        return _beam_search(loop, prompt, options)
    written: list[list[int]] = [[] for _ in prompt.embeds]
    generators = _generators(seed, range(len(written)) if places is None else places)
    for rows, ids in _steps(loop, prompt, options, generators):
        for row, token in zip(rows.tolist(), ids.tolist(), strict=True):
            written[row].append(token)
    return written


def check_stream(options: Generation) -> None:
    """Refuse beams, which cannot stream."""
    if options.num_beams > 1:
        raise InputError(f"num_beams is {options.num_beams}: it must be 1 to stream")


def stream(
    decoder: Graph, embed: Embed, prompt: Prompt, options: Generation, seed: int | None = None
) -> Iterator[int]:
    """Yield the new ids of a prompt of one row as they come, without the end token.

    Args and errors are those of `generate`; beams cannot stream, their text is known at the end.
    Whoever runs the decoder in between takes its cache away: the next id is then an InputError.
    """
    check_stream(options)
    if len(prompt.embeds) != 1:
        raise InputError(f"prompt: it has {len(prompt.embeds)} rows: give 1 to stream")
    loop = _Loop(decoder, embed, prompt, options)
    steps = _steps(loop, prompt, options, _generators(seed, [0]))
    return (int(token) for _, ids in steps for token in ids)


def _generators(seed: int | None, places: Sequence[int]) -> list[np.random.Generator]:
    """Make one independent generator a place; each is the same whatever others there are."""
    if seed is not None and not isinstance(seed, int | np.integer):
        raise InputError(f"seed is {seed!r}: it must be a whole number")
    if seed is not None and seed < 0:
        raise InputError(f"seed is {seed}: it must be at least 0")
    root = np.random.SeedSequence(seed)
    return [
        np.random.default_rng(np.random.SeedSequence(root.entropy, spawn_key=(place,)))
        for place in places
    ]


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
        embeds: Of the tokens that are new, float32 [rows, tokens, width].
        mask: Of all tokens so far, int64 [rows, total].
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
    """Name what a component takes."""
    return frozenset(spec.name for spec in component.inputs)


@dataclass(slots=True)
class _Reading:
    """What a decoder has in its cache."""

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


def _steps(
    loop: _Loop, prompt: Prompt, options: Generation, generators: list[np.random.Generator]
) -> Iterator[tuple[Ids, Ids]]:
    """Yield (prompt rows that go on, their new ids), both int64 [rows], greedy or drawn."""
    tokens = prompt.tokens
    rows = np.arange(len(prompt.embeds))
    seen = prompt.seen(options.max_tokens) if options.looks_back else None
    logits = loop.read(prompt.embeds)
    for made in range(options.max_tokens):
        known = None if seen is None else seen[:, : tokens + made]
        scores = process(logits, known, made, options)
        if options.do_sample:
            ids = draw(warp(scores, options), [generators[row] for row in rows])
        else:
            ids = scores.argmax(axis=-1)
        ended = [id_ in options.eos_ids for id_ in ids.tolist()]
        if any(ended):
            alive = np.flatnonzero(~np.array(ended))
            if not len(alive):
                return
            rows, ids = rows[alive], ids[alive]
            seen = None if seen is None else seen[alive]
        yield rows, ids
        if made + 1 < options.max_tokens:
            if any(ended):
                loop.reorder(alive)
            if seen is not None:
                seen[:, tokens + made] = ids
            logits = loop.write(ids)


class _Beams:
    """The beams of one row of the prompt: those that run and those that have finished."""

    def __init__(self, history: Ids, tokens: int, options: Generation) -> None:
        self._options = options
        self._tokens = tokens
        self._ids = history[None]  # [beams, tokens + max_tokens]: prompt, then new ids
        self._sums = np.zeros(1, np.float32)  # [beams]: sum of log-probabilities
        self._finished: list[tuple[float, list[int]]] = []  # best first

    def advance(self, logits: Scores, made: int) -> tuple[Ids, Ids] | None:
        """Take one step.

        Args:
            logits: float32 [beams, vocabulary]; one row at the first step.
            made: New tokens so far.

        Returns:
            (beam that each new beam continues, its new id), or None when the row is done.
        """
        options, end = self._options, self._tokens + made
        scores = process(log_softmax(logits), self._ids[:, :end], made, options)
        scores = scores + self._sums[:, None]
        # (end tokens + 1) a beam: enough, should all the best candidates end
        count = max(2, 1 + len(options.eos_ids)) * options.num_beams
        best = top(scores.ravel(), min(count, scores.size))
        sums = scores.ravel()[best]
        parents, ids = np.divmod(best.astype(np.int64), logits.shape[-1])
        divisor = (made + 1) ** options.length_penalty  # new tokens only, the end one included
        lengthwise = (sums / divisor).tolist()
        last = made + 1 == options.max_tokens
        ends = np.isin(ids, options.eos_ids)
        # a token that was ruled out may stand among the best when few are left: it ends no text
        over = (ends & (sums > -np.inf)) | last
        for i in np.flatnonzero(over[: options.num_beams]).tolist():
            text = self._ids[parents[i], self._tokens : end].tolist()
            text += [] if ends[i] else [int(ids[i])]
            self._finished.append((lengthwise[i], text))
        self._finished.sort(key=lambda scored: -scored[0])  # stable: the older one wins a tie
        del self._finished[options.num_beams :]
        if last:
            return None

        going = np.flatnonzero(~ends)[: options.num_beams]
        if len(self._finished) == options.num_beams:
            hope = lengthwise[going[0]]  # the best running beam's score, were it to end here
            if options.early_stopping or hope <= self._finished[-1][0]:
                return None
        parents, ids, self._sums = parents[going], ids[going], sums[going]
        self._ids = self._ids[parents]
        self._ids[:, end] = ids
        return parents, ids

    def __len__(self) -> int:
        """Return how many beams run."""
        return len(self._sums)

    def text(self) -> list[int]:
        """Return the best finished ids."""
        return self._finished[0][1]


def _beam_search(loop: _Loop, prompt: Prompt, options: Generation) -> list[list[int]]:
    """Search every row of the prompt; rows that are done leave the batch."""
    tokens = prompt.tokens
    found = [_Beams(history, tokens, options) for history in prompt.seen(options.max_tokens)]
    running = found
    logits = loop.read(prompt.embeds)
    for made in range(options.max_tokens):
        going, parents, ids, start = [], [], [], 0
        for row in running:
            beams = len(row)
            step = row.advance(logits[start : start + beams], made)
            if step is not None:
                going.append(row)
                parents.append(start + step[0])
                ids.append(step[1])
            start += beams
        if not going:
            break
        running = going
        loop.reorder(np.concatenate(parents))
        logits = loop.write(np.concatenate(ids))
    return [row.text() for row in found]
