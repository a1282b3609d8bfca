"""One picture asked several times: the same answers, less work, and a budget that holds."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from kit.counted import Counted
from PIL import Image

import vlmedge
from vlmedge.checkpoints.scenes import draw_scene
from vlmedge.errors import InputError, UnknownNameError
from vlmedge.run.decode import reader
from vlmedge.run.tasks.cache import ByteBudgetCache

NEW = 6  # tokens


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(draw_scene(1, "heldout").image)


@pytest.mark.parametrize("by_hand", ["run", "reset"])
def test_decoder_that_somebody_else_ran_reads_the_picture_again(
    blip2_bundle: Path, image: Image.Image, by_hand: str
) -> None:
    model = vlmedge.load(blip2_bundle)
    questions = ["how many objects are there?", "what color is the star?"]
    expected = [model.ask(image, question) for question in questions]
    with model.session(image) as session:
        found = [session.ask(questions[0])]
        decoder = model.graphs["decoder"]
        decoder.reset()
        if by_hand == "run":
            noise = np.random.default_rng(0).standard_normal((1, 60, 128), np.float32)
            mask = np.ones((1, 60), np.int64)
            decoder.run({"inputs_embeds": noise, "attention_mask": mask})
        found.append(session.ask(questions[1]))
    assert found == expected


@pytest.fixture(scope="module")
def blip2(blip2_bundle: Path) -> Iterator[vlmedge.Model]:
    yield vlmedge.load(blip2_bundle)


def test_what_is_kept_goes_with_the_session(blip2: vlmedge.Model, image: Image.Image) -> None:
    session = blip2.session(image)
    first = session.caption()
    assert blip2._kept.size_bytes > 0
    session.close()
    assert blip2._kept.size_bytes == 0
    assert session.caption() == first
    assert blip2._kept.size_bytes > 0
    del session
    gc.collect()
    assert blip2._kept.size_bytes == 0


def test_oldest_goes_first_when_the_budget_is_spent(blip2_bundle: Path, image: Image.Image) -> None:
    model = vlmedge.load(blip2_bundle)
    session = model.session(image)
    expected = session.caption()
    each = model._kept.size_bytes
    small = vlmedge.load(blip2_bundle, session_mib=2.5 * each / 2**20)
    sessions = [small.session(image) for _ in range(4)]
    assert [one.caption() for one in sessions] == [expected] * 4
    assert each < small._kept.size_bytes <= 2.5 * each
    counted = Counted()
    counted.watch(small)
    sessions[3].caption()
    sessions[2].caption()
    assert "vision_encoder" not in counted.runs
    sessions[0].caption()
    assert counted.runs["vision_encoder"] == 1


def test_repetition_penalty_sees_what_is_cached(blip2: vlmedge.Model, image: Image.Image) -> None:
    options = {"repetition_penalty": 1.5, "max_tokens": NEW}
    session = blip2.session(image)
    for question in ("what color is the star?", "what color is the circle?"):
        assert session.ask(question, **options) == blip2.ask(image, question, **options)


def test_nothing_counts_as_cached_when_the_adapter_changes(
    blip2_bundle: Path, image: Image.Image
) -> None:
    model = vlmedge.load(blip2_bundle)
    session = model.session(image)
    session.caption()
    decoder = model.graphs["decoder"]
    assert session._last is not None and reader.cached(decoder, session._last[0])
    model.set_adapter(None)
    assert not reader.cached(decoder, session._last[0])
    assert model._kept.size_bytes == 0


def test_refusals(blip2: vlmedge.Model, image: Image.Image, clip_bundle: Path) -> None:
    with pytest.raises(InputError, match="no file no.png"):
        blip2.session("no.png")
    session = blip2.session(image)
    with pytest.raises(InputError, match="the question is empty"):
        session.ask(" ")
    with pytest.raises(InputError, match="num_beams is 2: it must be 1 to stream"):
        session.stream(num_beams=2)
    with pytest.raises(InputError, match="no option 'max_token'"):
        session.caption(max_token=3)
    with pytest.raises(UnknownNameError, match="no task 'ask'"):
        vlmedge.load(clip_bundle).session(image).ask("what?")
    with pytest.raises(InputError, match="session_mib is -1: it must be finite and at least 0"):
        vlmedge.load(clip_bundle, session_mib=-1)


def test_kept_is_bounded_and_drops_what_was_used_longest_ago() -> None:
    kept = ByteBudgetCache(10)
    kept.put((0, "a"), 1, 4)
    kept.put((1, "b"), 2, 4)
    assert kept.get((0, "a")) == 1  # used: now b is the oldest
    kept.put((2, "c"), 3, 4)
    assert [kept.get(key) for key in ((0, "a"), (1, "b"), (2, "c"))] == [1, None, 3]
    kept.put((3, "d"), 4, 11)
    assert kept.get((3, "d")) is None and kept.size_bytes == 8
    kept.put((2, "c"), 5, 6)
    assert kept.get((2, "c")) == 5 and kept.size_bytes == 10
    kept.drop(0)
    assert kept.size_bytes == 6
