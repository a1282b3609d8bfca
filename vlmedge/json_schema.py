"""JSON Schemas of msgspec's types, the same bytes whichever version of msgspec made them.

The schemas that vlmedge publishes are compared with what it makes, on machines with any msgspec
that pyproject.toml allows. What a schema means has not changed between those, its wording has:

    up to 0.21   anyOf: [null, X]     a description is the docstring with its indentation
    0.22         anyOf: [X, null]     the same
    from 0.23    anyOf: [X, null]     a description is the docstring without its indentation
"""

from __future__ import annotations

import inspect
from typing import Any

import msgspec

NULL = {"type": "null"}


def json_schema(type_: Any) -> dict[str, Any]:
    """Make the JSON Schema of a type, its descriptions without indentation and null last.

    Args:
        type_: Any type that `msgspec.json.schema` takes.
    """
    made: dict[str, Any] = _settled(msgspec.json.schema(type_))
    return made


def _settled(value: Any) -> Any:
    """Settle the wording of a schema, and of all the schemas in it."""
    if isinstance(value, list):
        return [_settled(each) for each in value]
    if not isinstance(value, dict):
        return value
    found = {key: _settled(each) for key, each in value.items()}
    if isinstance(text := found.get("description"), str):
        found["description"] = inspect.cleandoc(text)
    if isinstance(choices := found.get("anyOf"), list):
        found["anyOf"] = sorted(choices, key=lambda choice: choice == NULL)  # else as they were
    return found
