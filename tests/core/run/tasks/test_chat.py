"""Conversations: what is refused and loses nothing; in the terminal; the template as data."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from kit.bundles import bundle_of
from kit.command import Run

import vlmedge
from vlmedge.checkpoints.scenes import draw_scene
from vlmedge.errors import InputError, UnknownNameError
from vlmedge.run.tasks.chat import Chat
from vlmedge.spec import ChatTask

NEW = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a random LLaVA, with a chat template."""
    return bundle_of("llava", tmp_path_factory.mktemp("llava") / "bundle")


@pytest.fixture(scope="module")
def model(folder: Path) -> vlmedge.Model:
    return vlmedge.load(folder)


@pytest.fixture
def image():  # type: ignore[no-untyped-def]
    return draw_scene(0, "heldout").image


def test_template_is_data(model: vlmedge.Model) -> None:
    task = model.bundle.spec.tasks["chat"]
    assert isinstance(task, ChatTask)
    assert task.user == "USER: {text} ASSISTANT:"
    assert task.user_images == "USER: {images}{text} ASSISTANT:"
    assert task.image == "{image}\n"
    assert task.system == "SYSTEM: {text} "


def test_words_that_are_no_unicode_are_said_as_far_as_they_are(folder: Path) -> None:
    command = [sys.executable, "-X", "utf8", "-m", "vlmedge.cli", "chat", str(folder)]
    env = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    given = b"what\xff?\n"
    done = subprocess.run(
        [*command, "--max-tokens", "2"], input=given, capture_output=True, env=env
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr


def test_conversations_of_several_threads_take_turns(model: vlmedge.Model) -> None:
    said = [["what?", "and where?"], ["who is it?", "why?"]]
    alone = [[chat.ask(text, seed=1) for text in texts] for chat, texts in _chats(model, said)]
    chats, found = _chats(model, said), [[], []]  # type: ignore[var-annotated]

    def talk(number: int) -> None:
        chat, texts = chats[number]
        found[number] = [chat.ask(text, seed=1) for text in texts]

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


def _chats(model: vlmedge.Model, said: list[list[str]]) -> list[tuple[Chat, list[str]]]:
    return [(model.chat(max_tokens=NEW), texts) for texts in said]


def test_system_text_changes_the_reply_and_stands_first(model: vlmedge.Model) -> None:
    chat = model.chat("be brief", max_tokens=NEW)
    chat.ask("what?")
    assert chat._prompt is not None
    read = model._context.tokenizer.decode(chat._prompt.history[0])
    assert read.startswith("SYSTEM: be brief USER: what? ASSISTANT:")


def test_refusals_lose_nothing(model: vlmedge.Model, image) -> None:  # type: ignore[no-untyped-def]
    chat, plain = model.chat(max_tokens=NEW), model.chat(max_tokens=NEW)
    assert chat.ask("what?", image) == plain.ask("what?", image)
    for text, options, refusal in (
        ("  ", {}, "the turn is empty"),
        ("long " * 300, {}, "the model has room for"),
        ("what is <image>?", {}, "leave '<image>' out of the text"),
        ("what?", {"num_beams": 2}, "must be 1 in a conversation"),
    ):
        with pytest.raises(InputError, match=refusal):
            chat.ask(text, **options)
    assert len(chat.turns) == 1
    assert chat.ask("and now?") == plain.ask("and now?")


def test_reply_that_is_cut_short_stays(model: vlmedge.Model, image) -> None:  # type: ignore[no-untyped-def]
    chat = model.chat(max_tokens=NEW)
    pieces = chat.stream("what?", [image])
    first = next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert chat.turns == [("what?", first.strip())]
    assert isinstance(chat.ask("and now?"), str)
    assert len(chat.turns) == 2


def test_replies_are_longer_than_captions_unless_told(model: vlmedge.Model) -> None:
    assert model.bundle.spec.generation is not None
    beyond = model.bundle.spec.generation.max_tokens + 1
    assert model.chat().ask("what?", min_tokens=beyond)
    with pytest.raises(InputError, match="min_tokens"):
        model.chat(max_tokens=beyond - 1).ask("what?", min_tokens=beyond)


def test_model_that_does_not_chat_is_refused(blip2_bundle: Path) -> None:
    with pytest.raises(UnknownNameError, match="no task 'chat'"):
        vlmedge.load(blip2_bundle).chat()


def test_terminal_talks(
    vlmedge: Run, folder: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = f"what?\n/image {pictures[1]}\nand this?\n/new\nagain\n/quit\nno\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    ran = vlmedge("chat", folder, pictures[0], "--max-tokens", NEW)
    assert ran.code == 0, ran.err
    assert ran.out.count("\n") == 3  # a line for each of three turns


def test_terminal_goes_on_after_a_line_that_fails_and_a_script_exits_1(
    vlmedge: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("/nothing\n/image no.png\nwhat?\n"))
    ran = vlmedge("chat", folder, "--max-tokens", NEW)
    assert ran.code == 1
    assert ran.out.count("\n") == 1
    assert "no command '/nothing'" in ran.err
    assert "no file no.png" in ran.err
