"""Make docs/families.md out of the registry and of what the tests of all families found.

    python benchmarks/families_table.py [results.xml]...

Runs tests/families, all kinds in all schemes, unless results are given (`pytest --junitxml`); of a
test that is in several files the last counts. What the page has of a kind that no result is of
stays, so a new kind costs its own tests alone:

    pytest -o junit_family=xunit1 -m "not gpu" -k KIND --junitxml=KIND.xml tests/families
    python benchmarks/families_table.py KIND.xml

Runs on published weights are quoted from docs/real-weights.json, where
`vlmedge check BUNDLE --against CHECKPOINT --record docs/real-weights.json` puts them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmedge.parity.records import read_records
from vlmedge.shelves.registry import FAMILIES, SCHEMES

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "families.md"
RECORDS = ROOT / "docs" / "real-weights.json"
COLUMNS = (
    "family",
    "kind",
    "hub ids",
    "components",
    "tasks",
    "tests",
    "difference",
    "schemes passed (cosine)",
    "real weights",
)
HEAD = """# Families

Made by `python benchmarks/families_table.py` from the registry and the results of
`tests/families`; not written by hand. Each kind is the smallest random checkpoint of an
architecture: all its parameters are drawn anew, and what the bundle gives is held against
transformers' own processor, model and generate. *Difference* is the largest of any component in
float32, relative to the largest value of PyTorch's output; *cosine* is the worst of any
component, on random weights, which damp no error as trained ones do.

"""


def run() -> Path:
    """Run the tests and return their results."""
    file = Path(tempfile.mkdtemp()) / "results.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", f"--junitxml={file}"]
    family = ("-o", "junit_family=xunit1")  # the newer form has no place for what a test records
    subprocess.run([*command, *family, "tests/families"], cwd=ROOT, check=False)
    return file


class Kind:
    """What the tests found out about one kind of checkpoint."""

    def __init__(self) -> None:
        self.passed = self.failed = 0
        self.parity: dict[str, Any] = {}
        self.schemes: dict[str, str] = {}

    def add(self, case: ElementTree.Element, recorded: Mapping[str, str]) -> None:
        """Count one test, and keep the figures that it recorded."""
        if case.find("skipped") is not None:
            return
        failed = case.find("failure") is not None or case.find("error") is not None
        self.failed += failed
        self.passed += not failed
        if "parity" in recorded:
            self.parity = json.loads(recorded["parity"])
        if "cosine" in recorded and not failed:
            scheme, cosine = recorded["scheme"], json.loads(recorded["cosine"])
            self.schemes[scheme] = f"{scheme} ({min(cosine.values()):.4f})"

    def cells(self) -> list[str]:
        """Make what the page has of it: components, tasks, tests, difference and schemes."""
        return [
            ", ".join(self.parity.get("components", {})),
            ", ".join(self.parity.get("tasks", [])),
            f"{self.passed} passed" + (f", {self.failed} FAILED" if self.failed else ""),
            f"{max(self.parity['components'].values()):.1e}" if self.parity else "not run",
            ", ".join(self.schemes[s] for s in SCHEMES.names() if s in self.schemes) or "none",
        ]


def kinds(results: list[Path]) -> dict[str, Kind]:
    """Read the results of the tests, by kind."""
    cases = {
        str(case.get("name")): case
        for file in results
        for case in ElementTree.parse(file).getroot().iter("testcase")
        if ".families." in str(case.get("classname"))
    }
    found: dict[str, Kind] = defaultdict(Kind)
    for case in cases.values():
        recorded = {str(p.get("name")): str(p.get("value")) for p in case.iter("property")}
        if "kind" in recorded:
            found[recorded["kind"]].add(case, recorded)
    return found


def before() -> dict[str, list[str]]:
    """Read what the page has of each kind, as `Kind.cells` made it."""
    found = {}
    for line in PAGE.read_text().splitlines() if PAGE.is_file() else []:
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if len(cells) == len(COLUMNS):
            found[cells[1]] = cells[3:8]
    return found


def rows(results: list[Path]) -> list[str]:
    """Make one line for each kind of each family."""
    seen, known, records = kinds(results), before(), read_records(RECORDS)
    lines = []
    for family in FAMILIES.names():
        hub = ", ".join(dict.fromkeys(FAMILIES.literal(family, "ALIASES").values()))
        run_on = [f"{r.checkpoint} {r.scheme}" for r in records if r.family == family and r.passed]
        for name in FAMILIES.literal(family, "TINY"):
            measured = seen[name].cells() if name in seen else known.get(name, Kind().cells())
            run = ", ".join(run_on) or "random weights"
            cells = [family, name, hub or "none", *measured, run]
            lines.append(f"| {' | '.join(cells)} |")
            hub = "as above"
    return lines


def main() -> None:
    """Write the page."""
    results = [Path(file) for file in sys.argv[1:]] or [run()]
    lines = rows(results)
    head = [f"| {' | '.join(COLUMNS)} |", f"| {' | '.join('---' for _ in COLUMNS)} |"]
    PAGE.write_text(HEAD + "\n".join([*head, *lines]) + "\n")
    print(f"{PAGE.relative_to(ROOT)}: {len(lines)} kinds")


if __name__ == "__main__":
    main()
