"""Make docs/tensorrt_lint.md: what each version of TensorRT would refuse of each family.

    python benchmarks/lint_table.py [KIND ...]

Exports the smallest random checkpoint of every kind that the registry has, quantizes it to every
scheme with nothing kept in float for speed, and asks of each bundle what
`vlmedge build BUNDLE --check-only --tensorrt VERSION` asks, in both precisions. Where kinds are
given, the page keeps its rows of the others. tests/engines/tensorrt/test_lint.py asks the same of
each kind (`-m slow`).
"""

from __future__ import annotations

import re
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from vlmedge.bundle import Bundle
from vlmedge.make.export import export
from vlmedge.make.quantize import quantize
from vlmedge.make.recipe import Recipe
from vlmedge.shelves.build_options import BuildOptions, Precision
from vlmedge.shelves.registry import ENGINES, FAMILIES, SCHEMES
from vlmedge.spec.manifest import FLOAT

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "tensorrt_lint.md"
VERSIONS = ("8.6", "10.3", "10.13", "10.16", "11.x")
HEAD = """# What TensorRT's parsers take

Made by `python benchmarks/lint_table.py`; not written by hand. Each kind is the smallest random
checkpoint of an architecture, exported and quantized to {schemes},
with every layer that the scheme can take. Each of these bundles is lowered and judged as
`vlmedge build --check-only --tensorrt VERSION` does it, in float16 and float32: by NVIDIA's own
tables of what each parser reads and by its rules on Q/DQ (`runtimes/_tensorrt/operators.py`,
`runtimes/_tensorrt/lint.py`). It takes no GPU, and proves no engine: that a version takes a graph
is one thing, that it builds another.

"""

Refusal = tuple[str, str]  # scheme, what


def families() -> dict[str, str]:
    """Return the family of every kind."""
    names = FAMILIES.names()
    return {kind: name for name in names for kind in FAMILIES.literal(name, "TINY")}


def bundles(kind: str, folder: Path) -> Iterator[tuple[str, Bundle]]:
    """Export a kind in float32, and give it in every scheme."""
    FAMILIES[families()[kind]].tiny(kind, folder / "checkpoint")
    exported = export(str(folder / "checkpoint"), folder / FLOAT, check=False)
    yield FLOAT, exported
    for scheme in SCHEMES.names():
        recipe = Recipe(scheme, keep_slower=True)
        yield scheme, quantize(exported.path, recipe, folder / scheme, check=False)


def refusals(kind: str, folder: Path) -> tuple[list[str], dict[str, set[Refusal]]]:
    """Return a kind's components, and what each version would refuse of it."""
    compiler: Any = ENGINES["tensorrt"]
    found: dict[str, set[Refusal]] = {version: set() for version in VERSIONS}
    names: list[str] = []
    for scheme, bundle in bundles(kind, folder):
        names = [component.name for component in bundle.spec.components]
        for version in VERSIONS:
            for precision in get_args(Precision):
                for f in compiler.lint(bundle, BuildOptions(precision=precision), version):
                    found[version].add((scheme, f"{f.operator}: {f.problem}"))
    return names, found


def row(kind: str, notes: dict[str, int]) -> str:
    """Judge one kind; `notes` numbers what is refused."""
    with tempfile.TemporaryDirectory() as folder, _quiet():
        names, found = refusals(kind, Path(folder))
    cells = [families()[kind], kind, ", ".join(names)]
    for version in VERSIONS:
        reasons: dict[str, list[str]] = defaultdict(list)
        for scheme, what in sorted(found[version]):
            reasons[scheme].append(str(notes.setdefault(what, max(notes.values(), default=0) + 1)))
        refused = [f"refuses {scheme} ({', '.join(why)})" for scheme, why in reasons.items()]
        cells.append("; ".join(refused) or "passes")
    return f"| {' | '.join(cells)} |"


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's and transformers' own
        yield


def read_page(page: Path) -> tuple[dict[str, str], dict[str, int]]:
    """Return a page's rows by kind, and what is refused by its number."""
    rows: dict[str, str] = {}
    notes: dict[str, int] = {}
    for line in page.read_text().splitlines():
        if line.startswith("| ") and not line.startswith(("| family |", "| --- |")):
            rows[line.split(" | ")[1]] = line
        elif found := re.fullmatch(r"(\d+)\. (.+)", line):
            notes[found[2]] = int(found[1])
    return rows, notes


def named(rows: Iterable[str]) -> set[int]:
    """Return the numbers of what rows refuse: a kind that is judged again may refuse less."""
    lists = (found for row in rows for found in re.findall(r"\(([\d, ]+)\)", row))
    return {int(number) for listed in lists for number in listed.split(", ")}


def main() -> None:
    """Judge the kinds that are named, or all of them, and write the page."""
    import torch

    torch.set_num_threads(1)  # tiny models gain nothing by more
    asked = sys.argv[1:]
    rows, notes = read_page(PAGE) if asked else ({}, {})
    for kind in asked or families():
        rows[kind] = row(kind, notes)
        print(rows[kind], flush=True)
    columns = ("family", "kind", "components", *VERSIONS)
    lines = [f"| {' | '.join(columns)} |", f"| {' | '.join('---' for _ in columns)} |"]
    lines += [rows[kind] for kind in families() if kind in rows]
    notes = {what: number for what, number in notes.items() if number in named(rows.values())}
    if notes:
        lines += ["", "What is refused, by number:", ""]
        lines += [f"{number}. {what}" for what, number in notes.items()]
    schemes = ", ".join(SCHEMES.names())
    PAGE.write_text(HEAD.format(schemes=schemes) + "\n".join(lines) + "\n")
    print(f"{PAGE.relative_to(ROOT)}: {len(rows)} kinds, {len(notes)} refusals")


if __name__ == "__main__":
    main()
