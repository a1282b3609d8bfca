"""A composition: named steps, each a task of a bundle or work on texts, and what takes what.

    {"bundles": {"captioner": null, "matcher": "../blip-itm-int8"},
     "steps": [{"name": "said", "task": "caption", "bundle": "captioner"},
               {"name": "scored", "task": "match", "bundle": "matcher", "inputs": ["said"]}]}

A bundle is a folder, seen from that of the file, or null: whoever runs it gives one. Steps may
stand in any order; the texts of the one that no other takes are the answer. What a step's words are
is in `vlmedge.compositions.steps`; vlmedge/composition.schema.json is made of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from functools import reduce
from graphlib import CycleError, TopologicalSorter
from operator import or_
from pathlib import Path
from typing import Any

import msgspec

from vlmedge.compositions.steps import KINDS, ModelStep, Step
from vlmedge.errors import InputError, UnknownNameError
from vlmedge.json_schema import json_schema
from vlmedge.shelves.registry import unknown

BUILT_INS = Path(__file__).parent


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Contents of a file, before each step is looked at.

    Attributes:
        steps: Each with its name, its task and that task's words.
        bundles: Folders by their names, seen from the file; none where it is to be given.
        about: Its purpose, for those who read it.
        schema: Where editors find the JSON Schema.
    """

    steps: list[dict[str, Any]]
    bundles: dict[str, str | None] = {}
    about: str = ""
    schema: str = msgspec.field(default="", name="$schema")


class Composition(msgspec.Struct, frozen=True):
    """A composition that makes sense.

    Attributes:
        steps: Each after those that it takes; the last one's texts are the answer.
        bundles: Folders by their names; none where it is to be given.
    """

    steps: tuple[Step, ...]
    bundles: dict[str, Path | None]


def built_ins() -> list[str]:
    """Name the compositions that ship with vlmedge."""
    return sorted(file.stem for file in BUILT_INS.glob("*.json"))


def schema() -> dict[str, Any]:
    """Make the JSON Schema that is published as vlmedge/composition.schema.json."""
    made = json_schema(_File)
    steps = json_schema(reduce(or_, KINDS.values()))
    words = made["$defs"]["_File"]["properties"]
    words["steps"] = {"type": "array", "minItems": 1, "items": {"anyOf": steps["anyOf"]}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **made["$defs"]["_File"],
        "title": "vlmedge composition",
        "$defs": steps["$defs"],
    }


def read_composition(
    source: str | Path | Mapping[str, Any], changes: Mapping[str, Any] | None = None
) -> Composition:
    """Read a composition and refuse what makes no sense, before any bundle is looked at.

    Args:
        source: A JSON file, the name of a built-in one, or what would stand in a file.
        changes: Other values for words of its steps, by "step.word" ("kept.at_least") or
            "step.options.word".

    Raises:
        InputError: It cannot be read or makes no sense; so does UnknownNameError.
    """
    if isinstance(source, Mapping):
        name, folder, data = "composition", Path(), deepcopy(dict(source))
    else:
        file = _find(source)
        name, folder, data = str(source), file.parent, _decode(file)
    try:
        found = msgspec.convert(data, _File)
        for path, value in (changes or {}).items():
            _change(found.steps, path, value)
        steps = _ordered([_step(number, each) for number, each in enumerate(found.steps, 1)])
        _check_bundles(steps, found.bundles)
    except msgspec.ValidationError as error:
        raise InputError(f"{name} is no composition: {_lowered(error)}") from None
    except (InputError, UnknownNameError) as error:
        raise type(error)(f"{name}: {error}") from None
    folders = {
        key: None if path is None else folder / Path(path).expanduser()
        for key, path in found.bundles.items()
    }
    return Composition(tuple(steps), folders)


def _find(source: str | Path) -> Path:
    """Find a file, or a built-in one by its name."""
    if str(source) in built_ins():
        return BUILT_INS / f"{source}.json"
    file = Path(source)
    if file.suffix != ".json" and not file.exists():
        raise unknown("composition", str(source), [*built_ins(), "a .json file"])
    return file


def _decode(file: Path) -> Any:
    try:
        return msgspec.json.decode(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is no composition: {error}") from None


def _change(steps: list[dict[str, Any]], path: str, value: Any) -> None:
    """Put another value in place of one of a step's."""
    name, *words = path.split(".")
    if not words:
        raise InputError(f"change {path!r}: it must be STEP.WORD, such as kept.at_least")
    known = {str(step.get("name")): step for step in steps}
    if name not in known:
        raise unknown("step", name, list(known))
    place = known[name]
    for word in words[:-1]:
        place = place.setdefault(word, {})
        if not isinstance(place, dict):
            raise InputError(
                f"change {path!r}: {word} is a value, not a table: leave out what follows it"
            )
    place[words[-1]] = value


def _step(number: int, given: dict[str, Any]) -> Step:
    """Make one step; errors name it."""
    name, task = given.get("name"), given.get("task")
    if not isinstance(name, str) or not name or "." in name:
        raise InputError(f"step {number} is named {name!r}: give it a name without dots")
    if not isinstance(task, str) or task not in KINDS:
        raise UnknownNameError(f"step {name!r}: {unknown('task', str(task), list(KINDS))}")
    words = KINDS[task].__struct_fields__
    for word in given:
        if word not in words and word != "task":
            raise UnknownNameError(f"step {name!r}, {task}: {unknown('word', word, sorted(words))}")
    try:
        step = msgspec.convert(given, KINDS[task])
    except msgspec.ValidationError as error:
        raise InputError(f"step {name!r}, {task}: {_lowered(error)}") from None
    if step.takes_texts and not step.inputs:
        raise InputError(
            f"step {name!r} has no inputs, and {task} takes texts: name the steps that give them"
        )
    if step.inputs and not step.takes_texts:
        raise InputError(
            f"step {name!r} has inputs, and {task} takes no texts here: leave them out"
        )
    return step


def _ordered(steps: list[Step]) -> list[Step]:
    """Put each step after those that it takes, and refuse what does not hang together."""
    known: dict[str, Step] = {}
    for step in steps:
        if step.name in known:
            raise InputError(f"two steps are named {step.name!r}: give each a name of its own")
        known[step.name] = step
    for step in steps:
        for name in step.inputs:
            if name not in known:
                raise UnknownNameError(
                    f"step {step.name!r}, inputs: {unknown('step', name, list(known))}"
                )
    try:
        order = [*TopologicalSorter({step.name: step.inputs for step in steps}).static_order()]
    except CycleError as error:
        circle = " -> ".join(error.args[1])
        raise InputError(f"steps {circle} form a cycle: change the inputs of one of them") from None
    if not order:
        raise InputError("a composition ends in one step, this one has none: add steps")
    taken = {name for step in steps for name in step.inputs}
    ends = [name for name in order if name not in taken]
    if len(ends) != 1:
        raise InputError(
            f"a composition ends in one step, this one ends in {len(ends)} ({', '.join(ends)}): "
            "name the others in some step's inputs, or remove them"
        )
    scored: dict[str, bool] = {}
    for step in (known[name] for name in order):
        if step.needs_scores:
            for name in step.inputs:
                if not scored[name]:
                    raise InputError(
                        f"step {step.name!r} needs scores and {name!r} gives none: "
                        "put a step that gives some between them (match, cosine)"
                    )
        scored[step.name] = step.scores([scored[name] for name in step.inputs])
    return [known[name] for name in order]


def _check_bundles(steps: list[Step], bundles: Mapping[str, str | None]) -> None:
    """Refuse a bundle that no step uses, or that no line names."""
    used = {step.bundle: step for step in steps if isinstance(step, ModelStep)}
    for name, step in used.items():
        if name not in bundles:
            raise UnknownNameError(f"step {step.name!r}: {unknown('bundle', name, list(bundles))}")
    for name in bundles:
        if name not in used:
            raise InputError(f"bundle {name!r} is used by no step: leave it out")


def _lowered(error: Exception) -> str:
    text = str(error)
    return text[0].lower() + text[1:]
