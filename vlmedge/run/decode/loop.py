"""The decode loop: one for every engine and every family.

The prompt runs once for each image; beams come into being when the cache is reordered after it.
Beam search is transformers 5.23's `GenerationMixin._beam_search`, row by row: there too no row's
result depends on another's, so a row leaves the batch as soon as it is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from vlmedge.arrays import Ids
from vlmedge.errors import InputError
from vlmedge.run.decode.beams import _beam_search
from vlmedge.run.decode.prompt import Embed, Prompt
from vlmedge.run.decode.reader import _Loop
from vlmedge.run.decode.sampling import draw, process, warp
from vlmedge.shelves.contracts import Graph
from vlmedge.spec import Generation


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
        options: From `vlmedge.run.decode.sampling.options`, which validates them.
        seed: Random seed for sampling, at least 0; the same seed gives the same text. Each index
            has its own random stream, so a row is drawn the same whatever stands beside it.
        places: Index of each row among all that are drawn with this seed; default: 0, 1, ...

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
