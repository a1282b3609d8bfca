"""What a type checker tells a user of the answers: one, a list, or an iterator."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
from collections.abc import Iterator
from typing_extensions import assert_type
import vlmedge

model = vlmedge.load("bundle")
stream: Iterator[str] = iter(["a.jpg"])

def note(image: object, error: Exception) -> None: ...

assert_type(model.caption("a.jpg"), str)
assert_type(model.caption(vlmedge.Video("a.mp4"), max_tokens=3), str)
assert_type(model.caption(["a.jpg"], "a photo of", seed=1, temperature=0.5), list[str])
assert_type(model.caption(stream), Iterator[str])
assert_type(model.caption(stream, on_error=note), Iterator[str | None])
assert_type(model.ask("a.jpg", "Why?"), str)
assert_type(model.ask(("a.jpg", "b.jpg"), "Why?"), list[str])
assert_type(model.classify("a.jpg", ["a"]), list[tuple[str, float]])
assert_type(model.classify(["a.jpg"], ["a"]), list[list[tuple[str, float]]])
assert_type(model.classify(stream, ["a"]), Iterator[list[tuple[str, float]]])
assert_type(model.detect("a.jpg", "cat")[0].label, str)
assert_type(model.detect(["a.jpg"], "cat")[0][0].label, str)
model.caption("a.jpg", on_error=note)  # type: ignore[call-overload]
model.caption("a.jpg", max_tokns=3)  # type: ignore[call-overload]
model.caption("a.jpg", max_tokens="3")  # type: ignore[call-overload]
model.ask(stream, "Why?")  # type: ignore[call-overload]
model.detect(vlmedge.Video("a.mp4"))  # type: ignore[call-overload]
"""


@pytest.mark.slow  # mypy reads the whole core
def test_answers_have_types(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(CODE)
    command = [sys.executable, "-m", "mypy", "--strict", str(tmp_path / "user.py")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
