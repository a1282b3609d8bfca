"""Image in, text out: captions and answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from vlmedge import generate as loop
from vlmedge.generate import Prompt
from vlmedge.spec import GenerateTask, Generation

from ._parts import Parts


def write(
    parts: Parts,
    task: GenerateTask,
    soft: NDArray[np.float32],
    texts: Sequence[str],
    options: Generation,
    seed: int | None = None,
) -> list[list[int]]:
    """Write on after a soft prompt and a text, for each row.

    Args:
        parts: The model.
        task: Its wiring.
        soft: What `encode` gave, float32 [batch, n, width].
        texts: The full prompt of each row, template applied.
        options: Of the decode loop.
        seed: Of the draw.

    Returns:
        New token ids of each row, without the end token.
    """
    prompt = make_prompt(parts, task, soft, texts, options)
    return loop.generate(parts.graphs[task.decoder], parts.embed, prompt, options, seed)


def stream(
    parts: Parts,
    task: GenerateTask,
    soft: NDArray[np.float32],
    text: str,
    options: Generation,
    seed: int | None = None,
) -> Iterator[str]:
    """Yield the text of one row in pieces, as it comes; see `write`."""
    prompt = make_prompt(parts, task, soft, [text], options)
    ids = loop.stream(parts.graphs[task.decoder], parts.embed, prompt, options, seed)
    return parts.tokenizer.pieces(ids)


def encode(
    parts: Parts, task: GenerateTask, pixel_values: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Turn pixel_values into the soft prompt, float32 [batch, n, width]."""
    return parts.chain(task.encode, {"pixel_values": pixel_values})[task.soft_prompt]


def make_prompt(
    parts: Parts,
    task: GenerateTask,
    soft: NDArray[np.float32],
    texts: Sequence[str],
    options: Generation,
) -> Prompt:
    """Put each row's soft prompt before its text: [padding | soft prompt | text]."""
    tokenizer = parts.tokenizer
    tokenizer.encode(texts, reserve=options.max_tokens)  # refuses what is too long
    start = [] if options.bos_id is None else [options.bos_id]
    rows = [tokenizer.ids(text) or start for text in texts]
    count, width = soft.shape[1:]
    longest = count + max(len(row) for row in rows)
    embeds = np.zeros((len(rows), longest, width), np.float32)
    mask = np.zeros((len(rows), longest), np.int64)
    history = np.full((len(rows), longest), -1, np.int64)
    for i, row in enumerate(rows):
        begin = longest - count - len(row)
        mask[i, begin:] = 1
        embeds[i, begin : begin + count] = soft[i]
        if task.image_token_id is not None:
            history[i, begin : begin + count] = task.image_token_id
        if row:
            embeds[i, begin + count :] = parts.embed(np.array(row, np.int64))
            history[i, begin + count :] = row
    return Prompt(embeds, mask, history)
