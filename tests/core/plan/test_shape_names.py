"""A shape counts what the family of its name exports: the architectures are written there alone."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from vlmedge.errors import UnknownNameError
from vlmedge.plan.plan import SHAPES, read_shape
from vlmedge.shelves.registry import FAMILIES

ROOT = Path(__file__).parents[3]
ARCHITECTURES = [
    (name, architecture)
    for name in SHAPES.names()
    for architecture in FAMILIES.literal(name, "ARCHITECTURES")
]


def config(folder: Path, architecture: str, **fields: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({"architectures": [architecture], **fields}))
    return file


def test_shape_has_the_name_of_a_family() -> None:
    assert set(SHAPES.names()) < set(FAMILIES.names())


@pytest.mark.parametrize(("name", "architecture"), ARCHITECTURES)
def test_shape_is_found_by_the_familys_architectures(name: str, architecture: str) -> None:
    found = {"architectures": [architecture]}
    file = Path("config.json")
    assert SHAPES.covering(found, file, "plan") == FAMILIES.covering(found, file, "family") == name


@pytest.mark.parametrize("name", sorted(set(FAMILIES.names()) - set(SHAPES.names())))
def test_family_without_a_shape_is_refused_by_name(name: str, tmp_path: Path) -> None:
    architecture = FAMILIES.literal(name, "ARCHITECTURES")[0]
    with pytest.raises(
        UnknownNameError, match=f"no plan for the architecture '{architecture}': .*choose from .*"
    ):
        read_shape(config(tmp_path, architecture))


def test_seggpt_in_its_authors_layout_counts_as_in_transformers(tmp_path: Path) -> None:
    theirs = read_shape(config(tmp_path, "SegGPT"))
    assert theirs == read_shape(config(tmp_path, "SegGptForImageSegmentation"))
    assert theirs.parameters != read_shape(config(tmp_path, "Painter")).parameters  # fewer tokens


@pytest.mark.parametrize("name", FAMILIES.names())
def test_literal_is_what_the_whole_file_assigns(name: str) -> None:
    found = {}
    for node in ast.parse((ROOT / "export" / f"{name}.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node.value
    for constant in ("ARCHITECTURES", "ALIASES", "TINY"):
        if constant in found:
            assert FAMILIES.literal(name, constant) == ast.literal_eval(found[constant])


def test_literal_that_is_not_there_is_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"export/clip\.py: it has no literal NOTHING"):
        FAMILIES.literal("clip", "NOTHING")
