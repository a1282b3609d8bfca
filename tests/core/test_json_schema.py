"""Published schemas do not depend on the msgspec that makes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

import vlmedge
from vlmedge.bench import result as bench_result
from vlmedge.compositions import composition
from vlmedge.json_schema import json_schema
from vlmedge.spec import manifest

PUBLISHED = {
    "bench.schema.json": bench_result.schema,
    "composition.schema.json": composition.schema,
    "manifest.schema.json": manifest.schema,
}
TEXT = "What it is.\n\nAttributes:\n    x: A number."
INDENTED = "What it is.\n\n    Attributes:\n        x: A number.\n    "
AS_MADE_BY = {
    "0.19": {
        "description": INDENTED,
        "properties": {"x": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/X"}]}},
    },
    "0.22": {
        "description": INDENTED,
        "properties": {"x": {"anyOf": [{"$ref": "#/$defs/X"}, {"type": "null"}]}},
    },
    "0.23": {
        "description": TEXT,
        "properties": {"x": {"anyOf": [{"$ref": "#/$defs/X"}, {"type": "null"}]}},
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_file_is_what_schema_makes(name: str) -> None:
    """To the byte: `python tests/test_json_schema.py` writes the files anew."""
    assert file(name).read_text(encoding="utf-8") == text(PUBLISHED[name])


@pytest.mark.parametrize("version", AS_MADE_BY)
def test_wordings_of_msgspec_become_one(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(msgspec.json, "schema", lambda type_: AS_MADE_BY[version])
    assert json_schema(object) == AS_MADE_BY["0.23"]


def test_property_of_the_name_description_is_left() -> None:
    class Told(msgspec.Struct):
        description: str
        anyOf: int

    words = json_schema(Told)["$defs"]["Told"]["properties"]
    assert words == {"description": {"type": "string"}, "anyOf": {"type": "integer"}}


def file(name: str) -> Path:
    return Path(vlmedge.__file__).with_name(name)


def text(schema: Callable[[], dict[str, Any]]) -> str:
    return json.dumps(schema(), indent=2) + "\n"


if __name__ == "__main__":
    for name, schema in PUBLISHED.items():
        file(name).write_text(text(schema), encoding="utf-8")
