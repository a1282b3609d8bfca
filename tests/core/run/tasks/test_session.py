"""One picture asked several times: the same answers, less work, and a budget that holds."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kit.bundles import bundle_of
from kit.tiny import kinds
from PIL import Image

import vlmedge
from vlmedge.arrays import Array
from vlmedge.checkpoints.scenes import draw_scene
from vlmedge.errors import InputError, UnknownNameError
from vlmedge.run.decode import reader
from vlmedge.run.tasks.cache import ByteBudgetCache
from vlmedge.shelves.contracts import Graph
from vlmedge.spec import GenerateTask, wiring

QUESTIONS = ["what?", "what color is the star, and where is it?", "é?", "what?"]
NEW = 6  # tokens


@pytest.fixture(scope="module", params=kinds())
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Take the bundle of one kind of tiny random checkpoint."""
    return bundle_of(request.param, tmp_path_factory.mktemp(request.param) / "bundle")


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(draw_scene(1, "heldout").image)


@pytest.fixture
def other() -> Image.Image:
    return Image.fromarray(draw_scene(2, "heldout").image)


@dataclass
class Counted:
    """Tokens that a decoder reads and runs of all else, of a model's graphs."""

    runs: dict[str, int] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)

    def watch(self, model: vlmedge.Model) -> None:
        """Count from now on."""
        for name in model.graphs:
            self._watch(model.graphs[name])

    def _watch(self, graph: Graph) -> None:
        plain, name = graph.run, graph.component.name

        def run(feeds: Mapping[str, Array], *, last: bool = False) -> dict[str, Array]:
            self.runs[name] = self.runs.get(name, 0) + 1
            if graph.component.state:
                self.tokens.append(feeds["inputs_embeds"].shape[1])
            return plain(feeds, last=last)

        graph.run = run  # type: ignore[method-assign]


def texts(model: vlmedge.Model, image: Any, **options: Any) -> list[str]:
    """All that a model can be asked about a picture, one by one."""
    found = []
    tasks = model.bundle.spec.tasks
    if "ask" in tasks:
        found += [model.ask(image, question, **options) for question in QUESTIONS]
    if "caption" in tasks:
        begins = ["", "a"] if "{prompt}" in tasks["caption"].prompt else ["", ""]
        found += [model.caption(image, begin, **options) for begin in begins]
    return found


def test_captions_are_those_of_as_many_copies(folder: Path, image: Image.Image) -> None:
    """Several draws of one picture, whatever the family: the picture is read once, then copied."""
    model = in_ids(writes(folder))
    task = model.bundle.spec.tasks.get("caption")
    if not isinstance(task, GenerateTask):
        pytest.skip("captions no pictures")
    options = {"top_k": 5, "num_beams": 1, "max_tokens": NEW, "seed": 7}
    found = model.captions(image, 3, **options)
    assert found == model.caption([image] * 3, **options)
    assert len(set(found)) > 1


class Asked:
    """A session behind the methods of a model."""

    def __init__(self, model: vlmedge.Model, session: Any) -> None:
        self.bundle, self._session = model.bundle, session

    def ask(self, image: Any, question: str, **options: Any) -> str:
        """Ask; the picture is the session's."""
        return self._session.ask(question, **options)

    def caption(self, image: Any, prompt: str, **options: Any) -> str:
        """Caption; the picture is the session's."""
        return self._session.caption(prompt, **options)


def writes(folder: Path, **options: Any) -> vlmedge.Model:
    model = vlmedge.load(folder, **options)
    if not {"ask", "caption"} & set(model.bundle.spec.tasks):
        pytest.skip("writes nothing")
    return model


def keeps_prefix(model: vlmedge.Model) -> bool:
    """Tell whether the decoder reads the text itself, from left to right."""
    task = model.bundle.spec.tasks.get("ask") or model.bundle.spec.tasks["caption"]
    assert isinstance(task, GenerateTask)
    decoder = model.bundle.spec.component(task.decoder)
    ahead = "token_type_ids" in {tensor.name for tensor in decoder.inputs}
    by_encoder = bool(task.read) and wiring.reads_text(model.bundle.spec, task)
    return not ahead and not by_encoder and not task.instruct


def in_ids(model: vlmedge.Model) -> vlmedge.Model:
    """Let a model answer in token ids: random ones may write tokens that no text shows."""
    model._context.tokenizer.decode = lambda ids: str([*ids])  # type: ignore[method-assign]
    return model


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


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_are_the_model_s(
    folder: Path, image: Image.Image, other: Image.Image, beams: int
) -> None:
    """In a row; with other work in between, copies kept; and with nothing kept."""
    model = in_ids(writes(folder))
    options = {"max_tokens": NEW, "min_tokens": NEW, "num_beams": beams}
    expected = texts(model, image, **options)
    # where a prefix is kept, answers must tell one question from another
    assert len(set(expected)) > 1 or not keeps_prefix(model)
    with model.session(image) as session:
        assert texts(Asked(model, session), image, **options) == expected
    for mib in (256.0, 0.0):
        model = in_ids(writes(folder, session_mib=mib))
        session, another = model.session(image), model.session(other)
        found, rest = [], []
        asked = [Asked(model, session), Asked(model, another)]
        tasks = model.bundle.spec.tasks
        if "ask" in tasks:
            for question in QUESTIONS:
                found.append(asked[0].ask(None, question, **options))
                rest.append(asked[1].ask(None, question, **options))
            assert found == expected[: len(QUESTIONS)]
            assert rest == texts(model, other, **options)[: len(QUESTIONS)]
        assert model._kept.size_bytes <= mib * 2**20


def test_streams_are_the_answers(folder: Path, image: Image.Image) -> None:
    model = writes(folder)
    session = model.session(image)
    if "ask" not in model.bundle.spec.tasks:
        expected = model.caption(image, max_tokens=NEW, num_beams=1)
        assert "".join(session.stream(max_tokens=NEW)).strip() == expected
        return
    for question in QUESTIONS:
        pieces = session.stream(question=question, max_tokens=NEW)
        expected = model.ask(image, question, max_tokens=NEW, num_beams=1)
        assert "".join(pieces).strip() == expected
        next(session.stream(question=question, max_tokens=NEW), None)  # cut short: all stays right


def test_second_question_reads_what_is_new(folder: Path, image: Image.Image) -> None:
    """And runs no encoder, whichever way the picture reaches the decoder."""
    model = writes(folder)
    name = "ask" if "ask" in model.bundle.spec.tasks else "caption"
    task = model.bundle.spec.tasks[name]
    assert isinstance(task, GenerateTask)
    session = model.session(image)
    ask = session.ask if name == "ask" else session.caption
    first = ["what?", "who?"] if name == "ask" or "{prompt}" in task.prompt else ["", ""]
    counted = Counted()
    counted.watch(model)
    ask(first[0], max_tokens=2)
    whole, counted.runs, counted.tokens = counted.tokens[0], {}, []
    ask(first[1], max_tokens=2)
    assert not set(task.encode) & set(counted.runs)
    free = keeps_prefix(model)
    if free and first[0] != "":
        assert counted.tokens[0] < whole
        assert not set(task.read) & set(counted.runs)
    model.caption(image, max_tokens=1) if name == "caption" else model.ask(image, "x", max_tokens=1)
    counted.tokens = []
    ask(first[0], max_tokens=2)
    assert (counted.tokens[0] < whole) == (free and whole > 1)


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
