"""The names that users import: all are there, say what they take, and survive a pickle."""

from __future__ import annotations

import inspect
import pickle
import pickletools
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vlmedge
from vlmedge import errors
from vlmedge.run.answering import AskOptions, CaptionOptions, DecodeOptions, DetectOptions
from vlmedge.run.tasks.boxes import Box
from vlmedge.run.tasks.chat import Chat
from vlmedge.run.tasks.paint import Painting
from vlmedge.run.tasks.retrieve import Index
from vlmedge.run.tasks.session import Session
from vlmedge.spec import Generation

Public = Callable[..., Any]
FUNCTIONS: tuple[Public, ...] = (vlmedge.load, vlmedge.load_index, vlmedge.compose)
WORKERS: tuple[Any, ...] = (vlmedge.Model, Session, Chat, Index, Box)
METHODS = [
    method
    for kind in WORKERS
    for name, method in inspect.getmembers(kind, inspect.isfunction)
    if not name.startswith("_")
]
VALUES: tuple[Any, ...] = (vlmedge.Video, vlmedge.Example, Box, Painting, Index)


def test_public_names_are_there() -> None:
    assert set(vlmedge.__all__) <= set(dir(vlmedge))
    assert all(getattr(vlmedge, name) is not None for name in vlmedge.__all__)
    with pytest.raises(AttributeError, match="module 'vlmedge' has no attribute 'lod'"):
        _ = vlmedge.lod


@pytest.mark.parametrize("made", [*FUNCTIONS, *METHODS], ids=lambda f: f.__qualname__)
def test_every_argument_has_a_line(made: Public) -> None:
    text = inspect.getdoc(made) or ""
    for name in [name for name in inspect.signature(made).parameters if name != "self"]:
        shown = re.escape(f"**{name}" if name == "options" else name)
        assert re.search(rf"^ +{shown}: \S", text, re.M), f"{made.__qualname__}: {name}"


@pytest.mark.parametrize("kind", VALUES, ids=lambda kind: kind.__name__)
def test_every_attribute_has_a_line(kind: Any) -> None:
    text = inspect.getdoc(kind) or ""
    for name in kind.__dataclass_fields__:
        assert re.search(rf"^ +{name}: \S", text, re.M), f"{kind.__name__} says nothing of {name}"


def test_every_error_is_in_the_tree() -> None:
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
    assert all(kind.__name__ in (errors.__doc__ or "") for kind in kinds)


def test_types_of_decode_options_are_the_specs() -> None:
    """A type checker knows every option that the runtime takes, and no other."""
    assert set(DecodeOptions.__annotations__) == set(Generation.__struct_fields__)
    for method, known in (
        (vlmedge.Model.caption, CaptionOptions),
        (vlmedge.Model.ask, AskOptions),
        (vlmedge.Model.detect, DetectOptions),
    ):
        own = set(known.__annotations__) - set(DecodeOptions.__annotations__)
        parameters = inspect.signature(method).parameters.values()
        keywords = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - {"on_error"}
        assert own == keywords


def test_pickled_model_names_public_places_alone(clip_bundle: Path) -> None:
    """A file of the package may move, and what was pickled before still opens."""
    data = pickle.dumps(vlmedge.load(clip_bundle))
    texts = [arg for _, arg, _ in pickletools.genops(data) if isinstance(arg, str)]
    assert [text for text in texts if text.startswith("vlmedge")] == ["vlmedge"]
    assert texts[texts.index("vlmedge") + 1] == "load"
    code = "import pickle, sys; print(pickle.loads(sys.stdin.buffer.read()))"
    other = subprocess.run(
        [sys.executable, "-c", code], input=data, capture_output=True, check=True
    )
    assert other.stdout.decode().startswith(f"<Model {str(clip_bundle.resolve())!r}, ort: ")


def test_index_goes_to_a_file_and_back(tmp_path: Path) -> None:
    vectors = np.eye(2, 3, dtype=np.float32)
    index = Index(vectors, ("a.png", "b/c.png"), "/photos", "0" * 64)
    file = str(tmp_path / "photos.npz")
    index.save(file)
    for back in (vlmedge.load_index(file), vlmedge.load_index(Path(file))):
        assert back.search(vectors[1]) == [("b/c.png", 1.0), ("a.png", 0.0)]
        assert (back.paths, back.folder, back.checkpoint) == (index.paths, "/photos", "0" * 64)
