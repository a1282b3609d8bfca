"""Beam search as transformers does it."""

from __future__ import annotations

import numpy as np

from vlmedge.arrays import Ids, Scores
from vlmedge.run.decode.prompt import Prompt
from vlmedge.run.decode.reader import _Loop
from vlmedge.run.decode.sampling import log_softmax, process, top
from vlmedge.spec import Generation


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
