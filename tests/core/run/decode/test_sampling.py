"""Warpers element by element against transformers' processor classes; options and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.generation import (
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vlmedge.errors import InputError
from vlmedge.run.decode.sampling import draw, log_softmax, options, process, top, warp
from vlmedge.spec import Generation

ROWS, VOCABULARY = 3, 1000
DEFAULTS = Generation(eos_ids=(2, 7), pad_id=1)


@pytest.fixture
def scores() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 4, (ROWS, VOCABULARY)).astype(np.float32)


@pytest.fixture
def seen() -> np.ndarray:
    return np.random.default_rng(1).integers(0, VOCABULARY, (ROWS, 40))


def apply(processor, scores, seen=None):
    ids = torch.zeros((ROWS, 1), dtype=torch.int64) if seen is None else torch.from_numpy(seen)
    return processor(ids, torch.from_numpy(scores.copy())).numpy()


@pytest.mark.parametrize("penalty", [0.5, 1.2, 3.0])
def test_repetition_penalty_equals_transformers(scores, seen, penalty):
    seen[:, 20:] = seen[:, :20]  # a token seen twice is penalized once
    got = process(scores, seen, 0, options(DEFAULTS, repetition_penalty=penalty))
    assert np.array_equal(got, apply(RepetitionPenaltyLogitsProcessor(penalty), scores, seen))


def test_repetition_penalty_ignores_padding_and_ids_outside_the_vocabulary(scores, seen):
    seen[:, 5] = VOCABULARY + 3
    padding = np.array([0, 3, 9])
    hf = RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=torch.from_numpy(padding))
    wanted = apply(hf, scores, seen)
    seen[np.arange(40) < padding[:, None]] = -1
    got = process(scores, seen, 0, options(DEFAULTS, repetition_penalty=1.5))
    assert np.array_equal(got, wanted)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 40, 41])
def test_no_repeat_ngram_equals_transformers(scores, size):
    seen = np.random.default_rng(2).integers(0, 3, (ROWS, 40))  # so few that runs come again
    seen[:, 7] = VOCABULARY + 3
    seen[0] = 5
    got = process(scores, seen, 0, options(DEFAULTS, no_repeat_ngram_size=size))
    assert np.array_equal(got, apply(NoRepeatNGramLogitsProcessor(size), scores, seen))
    assert np.isinf(got[0]).any() == (size < 41)


def test_no_repeat_ngram_passes_over_padding(scores, seen):
    seen[:, -3:] = [4, 5, 4]
    alone = process(scores, seen, 0, options(DEFAULTS, no_repeat_ngram_size=2))
    padded = np.concatenate([np.full((ROWS, 4), -1), seen], axis=1)
    padded[:, 3] = -1
    assert np.isinf(alone[:, 5]).all()
    given = options(DEFAULTS, no_repeat_ngram_size=2)
    assert np.array_equal(process(scores, padded, 0, given), alone)


@pytest.mark.parametrize("made", [0, 1, 6, 7, 8])
def test_forced_tokens_equal_transformers(scores, made):
    given = options(DEFAULTS, forced_bos_id=3, forced_eos_id=2, max_tokens=8, min_tokens=8)
    ids = np.zeros((ROWS, 1 + made), np.int64)  # after the decoder's one start token
    wanted = apply(MinNewTokensLengthLogitsProcessor(1, 8, [2, 7]), scores, ids)
    wanted = apply(ForcedBOSTokenLogitsProcessor(3), wanted, ids)
    wanted = apply(ForcedEOSTokenLogitsProcessor(9, 2), wanted, ids)
    assert np.array_equal(process(scores, None, made, given), wanted)


@pytest.mark.parametrize("made", [0, 2, 3, 4])
def test_min_tokens_equals_transformers(scores, made):
    hf = MinNewTokensLengthLogitsProcessor(5, 3, [2, 7, VOCABULARY])
    given = options(DEFAULTS, min_tokens=3, eos_ids=(2, 7, VOCABULARY))
    wanted = apply(hf, scores, np.zeros((ROWS, 5 + made), np.int64))
    assert np.array_equal(process(scores, None, made, given), wanted)


def test_process_leaves_its_input_alone(scores, seen):
    before = scores.copy()
    process(scores, seen, 0, options(DEFAULTS, min_tokens=3, repetition_penalty=2.0))
    assert np.array_equal(scores, before)
    assert process(scores, seen, 0, DEFAULTS) is scores


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 1.9])
def test_temperature_equals_transformers(scores, temperature):
    got = warp(scores, options(DEFAULTS, temperature=temperature))
    assert np.array_equal(got, apply(TemperatureLogitsWarper(temperature), scores))


@pytest.mark.parametrize("top_k", [1, 5, 50, 999, 1000, 5000])
def test_top_k_equals_transformers(scores, top_k):
    scores = np.round(scores, 1)  # ties: transformers keeps those of the k-th, too
    got = warp(scores, options(DEFAULTS, top_k=top_k))
    assert np.array_equal(got, apply(TopKLogitsWarper(top_k), scores))


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.99, 0.9999])
def test_top_p_equals_transformers(scores, top_p):
    got = warp(scores, options(DEFAULTS, top_p=top_p))
    assert np.array_equal(got, apply(TopPLogitsWarper(top_p), scores))


def test_warpers_together_equal_transformers_in_its_order(scores, seen):
    given = options(
        DEFAULTS, repetition_penalty=1.3, min_tokens=2, temperature=1.7, top_k=40, top_p=0.8
    )
    wanted = scores
    for processor in (
        RepetitionPenaltyLogitsProcessor(1.3),
        MinNewTokensLengthLogitsProcessor(40, 2, [2, 7]),
        TemperatureLogitsWarper(1.7),
        TopKLogitsWarper(40),
        TopPLogitsWarper(0.8),
    ):
        wanted = apply(processor, wanted, seen)
    assert np.array_equal(warp(process(scores, seen, 0, given), given), wanted)


def test_log_softmax_equals_torch(scores):
    wanted = torch.from_numpy(scores).log_softmax(-1).numpy()
    np.testing.assert_allclose(log_softmax(scores), wanted, rtol=3e-7, atol=1e-6)


@pytest.mark.parametrize("size", [10, 64, 640, 5001, 50272])
@pytest.mark.parametrize("count", [1, 10])
def test_top_equals_a_stable_sort(size, count):
    scores = np.round(np.random.default_rng(size).normal(size=size), 2).astype(np.float32)
    scores[::3] = -np.inf
    assert np.array_equal(top(scores, count), np.argsort(-scores, kind="stable")[:count])


def test_top_finds_scores_in_the_tail_beyond_the_last_whole_group():
    scores = np.zeros(64 * 20 + 3, np.float32)
    scores[-2:] = 1, 2
    assert top(scores, 2).tolist() == [len(scores) - 1, len(scores) - 2]


def test_draw_follows_the_softmax():
    scores = np.append(np.log(np.float32([0.5, 0.3, 0.2])), np.float32(-np.inf))[None]
    generator = [np.random.default_rng(0)]
    counts = np.bincount([int(draw(scores, generator)[0]) for _ in range(4000)], minlength=4)
    # four standard deviations, sqrt(0.25 / 4000) = 0.008
    np.testing.assert_allclose(counts / 4000, [0.5, 0.3, 0.2, 0.0], atol=0.032)
    assert counts[3] == 0


def test_draw_gives_each_row_its_own_generator(scores):
    def fresh(seeds):
        return [np.random.default_rng(seed) for seed in seeds]

    together = draw(scores, fresh([1, 2, 3]))
    assert np.array_equal(together, draw(scores, fresh([1, 2, 3])))
    assert draw(scores[2:], fresh([3]))[0] == together[2]


def test_options_keep_defaults_that_are_not_given():
    defaults = Generation(eos_ids=(2,), pad_id=1, num_beams=5, length_penalty=0.5)
    assert options(defaults) == defaults
    assert options(defaults, num_beams=None, max_tokens=7).num_beams == 5
    assert options(defaults, max_tokens=7).max_tokens == 7
    assert options(defaults, eos_ids=[3, 4]).eos_ids == (3, 4)


def test_least_length_of_a_checkpoint_gives_way_to_the_callers_greatest():
    defaults = Generation(eos_ids=(2, 7), pad_id=1, min_tokens=6)
    assert options(defaults, max_tokens=2).min_tokens == 2
    assert options(defaults, max_tokens=9).min_tokens == 6
    with pytest.raises(InputError, match="min_tokens is 6: it must be at most max_tokens"):
        options(defaults, max_tokens=2, min_tokens=6)


@pytest.mark.parametrize("temperature", [1e-7, 1e-40, 1e-60])
def test_next_to_no_heat_draws_the_likeliest(scores, temperature):
    """There a plain division gives inf for several tokens, and a draw among them."""
    warped = warp(scores, options(DEFAULTS, temperature=temperature))
    assert not np.isnan(warped).any() and (warped.max(axis=-1) == 0).all()
    ids = draw(warped, [np.random.default_rng(row) for row in range(len(scores))])
    assert np.array_equal(ids, scores.argmax(axis=-1))


def test_figures_of_numpy_are_figures():
    got = options(DEFAULTS, max_tokens=np.int64(3), temperature=np.float32(0.5))
    assert (got.max_tokens, got.temperature, got.do_sample) == (3, 0.5, True)


@pytest.mark.parametrize("given", [{"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.9}])
def test_options_sample_when_given_a_shape_of_the_distribution(given):
    assert options(DEFAULTS, **given).do_sample
    assert not options(DEFAULTS, **given, do_sample=False).do_sample


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0: it must be at least 1"),
        ({"min_tokens": -1}, "min_tokens is -1: it must be at least 0"),
        ({"num_beams": 0}, "num_beams is 0: it must be at least 1"),
        (
            {"temperature": 0},
            r"temperature is 0.0: it must be finite and above 0 \(without sampling",
        ),
        ({"temperature": float("inf")}, "temperature is inf: it must be finite and above 0"),
        ({"top_k": -1}, r"top_k is -1: it must be at least 0 \(0 keeps all\)"),
        ({"top_p": 0.0}, "top_p is 0.0: it must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1: it must be above 0 and at most 1"),
        ({"top_p": float("nan")}, "top_p is nan: it must be above 0 and at most 1"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty is 0.0: it must be finite and above 0"),
        ({"length_penalty": float("nan")}, "length_penalty is nan: it must be finite"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens is 9: it must be at most max_tokens"),
        ({"num_beams": 2, "do_sample": True}, "num_beams is 2, and sampling uses one beam: give"),
        ({"num_beams": 2, "top_k": 3}, "num_beams is 2, and sampling uses one beam: give"),
        ({"max_new_tokens": 5}, "no option 'max_new_tokens': did you mean 'max_tokens'"),
        ({"temprature": 5}, "no option 'temprature': did you mean 'temperature'"),
        ({"max_tokens": "9"}, "max_tokens is '9': expected `int`, got `str`"),
        ({"num_beams": True}, "num_beams is True: expected `int`, got `bool`"),
    ],
)
def test_options_refuse_what_cannot_be(given, message):
    with pytest.raises(InputError, match=message) as caught:
        options(DEFAULTS, **given)
    assert "\n" not in str(caught.value)
