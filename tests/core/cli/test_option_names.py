"""Errors name a parameter of Python; the command line names the option that the user typed."""

from __future__ import annotations

import re

import pytest
import typer

from vlmedge.cli.app import app
from vlmedge.cli.output import as_typed
from vlmedge.errors import InputError

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("command", "said", "shown"),
    [
        ("caption", "max_tokens is 0: it must be", "--max-tokens is 0: it must be"),
        (
            "caption",
            "room for 5 beside 9 new ones (max_tokens)",
            "beside 9 new ones (--max-tokens)",
        ),
        ("caption", "lower top_k, top_p", "lower --top-k, --top-p"),
        ("caption", "give num_beams=1 to sample", "give --num-beams=1 to sample"),
        ("caption", "seed is -1: it must be", "--seed is -1: it must be"),
        ("ask", "region 1,2,3: give left", "--region 1,2,3: give left"),
        ("caption", "task 'max_tokens' is not", "--task 'max_tokens' is not"),
        ("classify", "template 'a photo': it must", "--template 'a photo': it must"),
        ("export", "keep 'fc9' matches no layer", "--keep 'fc9' matches no layer"),
        ("build", "memory_mib is 0: it must be", "--memory is 0: it must be"),
        ("compose", "capfilt: change 'kept': it must be", "capfilt: --set 'kept': it must be"),
        ("caption", "leave allow_fallback (--allow-fallback) out", "leave --allow-fallback out"),
    ],
)
def test_option_is_named_as_typed(command: str, said: str, shown: str) -> None:
    assert shown in as_typed(InputError(said), COMMANDS[command])


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("caption", "no file /data/max_tokens/a.png: give the path"),
        ("caption", "no file max_tokens.png: give the path"),
        ("caption", "the seed is in no language"),
        ("caption", "prompt of 9 tokens: the model has room for 8"),
        ("ask", "question with 2 marks {region}: put a {region} where each belongs"),
        ("classify", "num_beams is 2: it must be 1"),
        ("info", "max_tokens is 0: it must be at least 1"),
    ],
)
def test_other_words_stay(command: str, said: str) -> None:
    assert as_typed(InputError(said), COMMANDS[command]) == said


def test_several_lines_become_one() -> None:
    assert as_typed(InputError("a\nb"), COMMANDS["info"]) == "a b"


def test_no_help_names_a_parameter_of_python() -> None:
    """Whoever reads a page of help types options, so it names no parameter."""
    for name, command in COMMANDS.items():
        names = [str(p.name) for p in command.params if "_" in str(p.name)]
        texts = [command.help, *(getattr(p, "help", None) for p in command.params)]
        for text in filter(None, texts):
            assert not re.search(rf"\b({'|'.join(names) or 'as_json'})\b", text), (name, text)
