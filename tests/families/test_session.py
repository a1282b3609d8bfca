"""One picture asked several times, of every family: the same answers, and less work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from kit.bundles import bundle_of
from kit.counted import Counted
from kit.tiny import kinds
from PIL import Image

import vlmedge
from vlmedge.checkpoints.scenes import draw_scene
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
