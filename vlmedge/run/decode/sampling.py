"""From one step's logits to the next token, in numpy, as transformers 5.23 does it.

The order is that of `GenerationMixin._get_logits_processor`: repetition penalty, runs of tokens
that were seen, end tokens held back, forced tokens, then (for sampling) temperature, top-k, top-p.
Scores are float32 [rows, vocabulary].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from vlmedge.arrays import Ids, Scores
from vlmedge.errors import InputError
from vlmedge.spec import Generation

COLD, TINY = 1e-6, np.finfo(np.float32).tiny  # temperatures

_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_tokens": (lambda n: n >= 1, "at least 1"),
    "min_tokens": (lambda n: n >= 0, "at least 0"),
    "num_beams": (lambda n: n >= 1, "at least 1"),
    "temperature": (
        lambda x: 0 < x < math.inf,
        "finite and above 0 (without sampling, leave it out)",
    ),
    "top_k": (lambda n: n >= 0, "at least 0 (0 keeps all)"),
    "top_p": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "repetition_penalty": (lambda x: 0 < x < math.inf, "finite and above 0 (1 is none)"),
    "length_penalty": (math.isfinite, "finite (0 is none)"),
    "no_repeat_ngram_size": (lambda n: n >= 0, "at least 0 (0 allows all)"),
}


def options(defaults: Generation, **given: Any) -> Generation:
    """Put a call's options over a bundle's defaults and refuse what cannot be.

    A temperature, top_k or top_p that the caller gives implies do_sample=True, unless do_sample
    is given too: nobody sets them to be ignored. A least length of the bundle's gives way to the
    caller's greatest.

    Args:
        defaults: The bundle's.
        **given: Fields of `Generation`; None counts as not given.

    Raises:
        InputError: An option is unknown, of the wrong type or out of range, or two disagree.
    """
    given = {
        name: value.item() if isinstance(value, np.generic) else value
        for name, value in given.items()
        if value is not None
    }
    known = msgspec.structs.asdict(defaults)
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise InputError(
                f"no option {name!r}: did you mean {near!r}? Choose from {', '.join(known)}"
            )
    most = given.get("max_tokens")
    if isinstance(most, int):
        known["min_tokens"] = min(defaults.min_tokens, most)
    if given.keys() & {"temperature", "top_k", "top_p"}:
        given.setdefault("do_sample", True)
    for name, value in given.items():  # one by one, so that the message can name it
        try:
            msgspec.convert({**known, name: value}, Generation)
        except msgspec.ValidationError as error:
            wanted = str(error).split(" - at ")[0]
            raise InputError(f"{name} is {value!r}: {wanted[0].lower()}{wanted[1:]}") from None
    merged = msgspec.convert({**known, **given}, Generation)
    for name, (holds, allowed) in _RULES.items():
        value = getattr(merged, name)
        if not holds(value):
            raise InputError(f"{name} is {value}: it must be {allowed}")
    if merged.min_tokens > merged.max_tokens:
        raise InputError(
            f"min_tokens is {merged.min_tokens}: "
            f"it must be at most max_tokens, which is {merged.max_tokens}"
        )
    if merged.do_sample and merged.num_beams > 1:
        raise InputError(
            f"num_beams is {merged.num_beams}, and sampling uses one beam: "
            "give num_beams 1, or no option that samples, such as top_k"
        )
    return merged


def process(scores: Scores, seen: Ids | None, made: int, options: Generation) -> Scores:
    """Apply what greedy, sampling and beams share, in the order that this module's head names.

    Args:
        scores: Logits, or log-probabilities for beams, float32 [rows, vocabulary].
        seen: Ids of prompt and new text, int64 [rows, n]; those outside the vocabulary (-1 for
            padding) are ignored. None when `options` looks back at nothing.
        made: New tokens so far.
        options: The call's.

    Returns:
        Scores float32 [rows, vocabulary]; the same array when there was nothing to do.
    """
    vocabulary = scores.shape[-1]
    forced = _forced(made, options)
    if forced is not None:  # whatever comes before it
        only = np.full_like(scores, -np.inf)
        only[:, forced] = 0
        return only
    if seen is not None and options.repetition_penalty != 1.0:
        scores = _penalized(scores, seen, options.repetition_penalty)
    if seen is not None and 0 < options.no_repeat_ngram_size <= seen.shape[1]:
        scores = _unrepeated(scores, seen, options.no_repeat_ngram_size)
    if made < options.min_tokens:
        scores = scores.copy()
        scores[:, [token for token in options.eos_ids if token < vocabulary]] = -np.inf
    return scores


def _forced(made: int, options: Generation) -> int | None:
    """Return the token that must come, if one must; the last one wins."""
    if options.forced_eos_id is not None and made + 1 == options.max_tokens:
        return options.forced_eos_id
    return options.forced_bos_id if made == 0 else None


def _penalized(scores: Scores, seen: Ids, penalty: float) -> Scores:
    """Make tokens that were seen less likely.

    CTRL, https://arxiv.org/abs/1909.05858, section 4.1; once a token, however often seen: all its
    copies read the score before any of them writes it.
    """
    row, column = np.nonzero((seen >= 0) & (seen < scores.shape[-1]))
    token = seen[row, column]
    scores = scores.copy()
    score = scores[row, token]
    scores[row, token] = np.where(score < 0, score * penalty, score / penalty)
    return scores


def _unrepeated(scores: Scores, seen: Ids, size: int) -> Scores:
    """Rule out what would end a run of `size` tokens that was seen; one with padding is none.

    Paulus et al. 2017, arXiv 1705.04304, section 2.5.
    """
    runs = np.lib.stride_tricks.sliding_window_view(seen, size, axis=1)  # [rows, runs, size]
    begun = seen[:, None, seen.shape[1] + 1 - size :]  # [rows, 1, size - 1]
    last = runs[:, :, -1]
    again = (runs[:, :, :-1] == begun).all(-1) & (runs >= 0).all(-1) & (last < scores.shape[-1])
    row, column = np.nonzero(again)
    scores = scores.copy()
    scores[row, last[row, column]] = -np.inf
    return scores


def warp(scores: Scores, options: Generation) -> Scores:
    """Shape the distribution to draw from: temperature, top-k, top-p.

    Args:
        scores: Processed logits, float32 [rows, vocabulary].
        options: The call's.

    Returns:
        Scores float32 [rows, vocabulary], -inf where a token was cut.
    """
    if options.temperature != 1.0:
        if options.temperature < COLD:  # the division would give inf for several
            scores = scores - scores.max(axis=-1, keepdims=True)
        with np.errstate(over="ignore"):  # to -inf, or of a heat that is inf in float32
            scores = scores / np.maximum(np.float32(options.temperature), TINY)
    if 0 < options.top_k < scores.shape[-1]:
        # ties with the k-th stay, as in TopKLogitsWarper
        least = np.partition(scores, -options.top_k, axis=-1)[:, -options.top_k, None]
        scores = np.where(scores < least, np.float32(-np.inf), scores)
    if options.top_p < 1.0:
        least = np.array([_nucleus(row, options.top_p) for row in scores], np.float32)[:, None]
        scores = np.where(scores < least, np.float32(-np.inf), scores)
    return scores


def _nucleus(row: Scores, top_p: float) -> np.float32:
    """Return the lowest score in the smallest set of tokens with probability `top_p`.

    Nucleus sampling, https://arxiv.org/abs/1904.09751, with the float32 steps of
    TopPLogitsWarper. Ties with that score stay; transformers cuts some, as its sort falls.
    """
    ascending = np.sort(row[row > -np.inf])
    shares = np.exp(ascending - ascending[-1])
    shares /= shares.sum()
    # torch adds up in double and rounds each sum
    below = np.cumsum(shares, dtype=np.float64).astype(np.float32) <= np.float32(1 - top_p)
    cut = min(int(np.count_nonzero(below)), len(ascending) - 1)
    lowest: np.float32 = ascending[cut]
    return lowest


def draw(scores: Scores, generators: Sequence[np.random.Generator]) -> Ids:
    """Draw one token a row from softmax(scores), by inversion.

    Args:
        scores: Warped logits, float32 [rows, vocabulary].
        generators: One a row, so that a row's text does not hang on its neighbours'.

    Returns:
        Ids, int64 [rows].
    """
    ids = np.empty(len(scores), np.int64)
    for i, (row, generator) in enumerate(zip(scores, generators, strict=True)):
        kept = np.flatnonzero(row > -np.inf)
        heights = row[kept].astype(np.float64)
        heap = np.cumsum(np.exp(heights - heights.max()))
        found = np.searchsorted(heap, generator.random() * heap[-1], side="right")
        ids[i] = kept[min(int(found), len(kept) - 1)]
    return ids


def log_softmax(logits: Scores) -> Scores:
    """Return log(softmax(logits)) along the last axis, float32, in torch's order of steps."""
    shifted: Scores = logits - logits.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def top(scores: Scores, count: int) -> NDArray[np.intp]:
    """Return the indices of the `count` highest scores, best first; a tie goes to the lower index.

    argpartition takes 2 ms on 5 x 50272 scores, this 0.1 ms: the count-th largest of the maxima
    of disjoint groups is at most the count-th largest score, so few scores reach it.

    Args:
        scores: float32 [n], contiguous.
        count: At most n.
    """
    groups = len(scores) // 64
    if groups < count:
        reach = np.arange(len(scores))
    else:
        maxima = scores[: groups * 64].reshape(64, groups).max(axis=0)
        reach = np.flatnonzero(scores >= np.partition(maxima, -count)[-count])
    return reach[np.argsort(-scores[reach], kind="stable")[:count]]
