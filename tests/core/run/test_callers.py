"""One model and several callers: threads, streams that cross, other processes, odd arguments."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vlmedge
from vlmedge.checkpoints.scenes import draw_scene
from vlmedge.errors import InputError

CROSSED = "decoder was closed or has read something else since this text began: take a stream to"


@pytest.fixture(scope="module")
def model(blip2_int8: Path) -> vlmedge.Model:
    return vlmedge.load(blip2_int8)


@pytest.fixture(scope="module")
def scenes() -> list[Any]:
    return [draw_scene(i, "heldout").image for i in range(6)]


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """Run each call in a thread of its own; return what they return, or raise."""
    found: list[Any] = [None] * len(calls)
    start = threading.Barrier(len(calls))

    def run(number: int) -> None:
        start.wait()
        try:
            found[number] = calls[number]()
        except BaseException as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("low_memory", [False, True])
def test_threads_take_turns(blip2_int8: Path, scenes: list[Any], low_memory: bool) -> None:
    expected = [vlmedge.load(blip2_int8).caption(scene) for scene in scenes]
    shared = vlmedge.load(blip2_int8, low_memory=low_memory)  # no graph is open yet

    def session() -> list[str]:
        with shared.session(scenes[0]) as opened:
            return [opened.caption() for _ in range(2)]

    found = at_once(
        *(lambda scene=scene: [shared.caption(scene), shared.caption(scene)] for scene in scenes),
        lambda: shared.caption(scenes),
        lambda: list(shared.caption(iter(scenes))),
        session,
    )
    assert found == [
        *([caption] * 2 for caption in expected),
        expected,
        expected,
        [expected[0]] * 2,
    ]


@pytest.mark.parametrize("of", ["model", "session"])
def test_stream_that_another_call_crosses_says_so(
    model: vlmedge.Model, scenes: list[Any], of: str
) -> None:
    """It went on with the other picture's cache, once."""
    begin = model.stream if of == "model" else lambda image: model.session(image).stream()
    crossed = begin(scenes[0])
    assert next(crossed)
    answer = model.caption(scenes[1])
    with pytest.raises(InputError, match=CROSSED):
        list(crossed)
    assert model.caption(scenes[1]) == answer
    closed = begin(scenes[0])
    next(closed)
    model.close()
    with pytest.raises(InputError, match=CROSSED):
        list(closed)
    assert "".join(begin(scenes[0])).strip() == model.caption(scenes[0])


@pytest.mark.parametrize("session_mib", [0, 256])
@pytest.mark.parametrize("low_memory", [False, True])
def test_stream_of_a_session_begins_when_it_is_asked_for(
    blip2_int8: Path, scenes: list[Any], session_mib: int, low_memory: bool
) -> None:
    """Its prompt was made for a cache that is gone by then."""
    model = vlmedge.load(blip2_int8, session_mib=session_mib, low_memory=low_memory)
    session, other = model.session(scenes[0]), model.session(scenes[1])
    expected = model.ask(scenes[0], "what color is the square?")
    session.ask("what color is the moon?")
    late = session.stream(question="what color is the square?")
    other.ask("what color is the arrow?")
    assert "".join(late).strip() == expected
    session.ask("what color is the moon?")
    late = session.stream(question="what color is the square?")
    model.caption(scenes[1])
    assert "".join(late).strip() == expected


def test_stream_that_is_dropped_leaves_nothing(model: vlmedge.Model, scenes: list[Any]) -> None:
    dropped = model.stream(scenes[0])
    next(dropped)
    dropped.close()  # type: ignore[attr-defined]
    del dropped
    [answer] = at_once(lambda: model.caption(scenes[1]))  # nothing waits for a turn that has gone
    assert answer == model.caption(scenes[1])


def test_model_goes_to_another_process(model: vlmedge.Model, scenes: list[Any]) -> None:
    expected = model.caption(scenes[0])
    assert model.graphs._open
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert not other.graphs._open and other.caption(scenes[0]) == expected
    with vlmedge.load(model.bundle.path, low_memory=True, session_mib=1) as opened:
        other = pickle.loads(pickle.dumps(opened))
        assert other._opened_with == opened._opened_with
        opened.caption(scenes[0])
    assert not opened.graphs._open
    assert repr(model) == f"<Model {str(model.bundle.path)!r}, ort: ask, caption>"


ODD: list[tuple[Callable[[vlmedge.Model, Any], Any], str]] = [
    (lambda m, image: m.ask([image] * 2, ["a?", "b?"]), "question of type list: give one str"),
    (lambda m, image: m.caption(image, None), "prompt of type NoneType: give one str"),
    (lambda m, image: m.caption(image, seed="a", top_k=2), "seed is 'a': it must be a whole"),
    (lambda m, image: m.caption(image, seed=1.5, top_k=2), "seed is 1.5: it must be a whole"),
    (lambda m, image: m.captions(image, 2.5, top_k=2), "count is 2.5: it must be a whole"),
    (
        lambda m, image: m.caption(image, max_tokens=10**6),
        "room for 0 beside 1000000 new ones .max",
    ),
    (lambda m, image: m.caption(io.BytesIO(b"a")), "image of type BytesIO: give a path, bytes"),
    (lambda m, image: m.caption(bytearray(b"a")), "image of type bytearray: give a path, bytes"),
    (
        lambda m, image: m.graphs["vision_encoder"].run({"pixel_values": [1]}),
        "vision_encoder: 'pixel_values' is of type list: give a numpy array",
    ),
    (
        lambda m, image: m.graphs["vision_encoder"].run(
            {"pixel_values": np.zeros((0, 3, 64, 64), np.float32)}
        ),
        "vision_encoder: a batch of 0 rows: feed at least one",
    ),
    (
        lambda m, image: vlmedge.load(m.bundle.path, session_mib=float("inf")),
        "session_mib is inf: it must be finite",
    ),
]


@pytest.mark.parametrize(("call", "message"), ODD)
def test_odd_arguments_are_refused(
    model: vlmedge.Model, scenes: list[Any], call: Callable[..., Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        call(model, scenes[0])


def test_labels_are_a_list_of_texts(clip_int8: Path, scenes: list[Any]) -> None:
    model = vlmedge.load(clip_int8)
    with pytest.raises(InputError, match="labels 'abc' are one text: give a list of str"):
        model.classify(scenes[0], "abc")
    with pytest.raises(InputError, match="label of type int: give a list of str"):
        model.classify(scenes[0], [1, 2])  # type: ignore[list-item]
    labels = ["a red star", "a blue circle"]
    drawn = model.classify(scenes[0], (label for label in labels))  # type: ignore[call-overload]
    assert drawn == model.classify(scenes[0], labels)
