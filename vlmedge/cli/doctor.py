"""The command `doctor`: what is wrong with this machine, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmedge.cli import output
from vlmedge.cli.options import Json

if TYPE_CHECKING:
    from vlmedge.doctor.patient import Finding

EXIT_FAILED = 1

_COLOURS = {"ok": "green", "warn": "yellow", "bad": "bold red"}


def doctor(
    bundles: Annotated[
        list[Path] | None,
        typer.Argument(metavar="BUNDLE", help="Bundles whose compiled engines are checked too."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check this machine for problems, and say how to solve each."""
    from vlmedge.bundle import read_manifest
    from vlmedge.doctor.examine import examine
    from vlmedge.doctor.patient import this_patient

    for bundle in bundles or ():
        read_manifest(bundle)  # refuse what is no bundle before any work
    findings = examine(this_patient(tuple(bundles or ())))
    output.emit(findings) if as_json else _show_findings(findings)
    if any(finding.level == "bad" for finding in findings):
        raise typer.Exit(EXIT_FAILED)


def _show_findings(findings: Sequence[Finding]) -> None:
    """Print one line a finding, and the cure below it."""
    from rich.text import Text

    from vlmedge.cli.tables import print_table, row, table

    for finding in findings:
        mark = Text(f"{finding.level:<4}", _COLOURS[finding.level])
        lines = table("", "", "", left=(0, 1, 2))
        lines.show_header = False
        lines.box = None
        cure = f"\n-> {finding.cure}" if finding.cure else ""
        row(lines, mark, f"{finding.check:<9}", f"{finding.what}{cure}")
        print_table(lines, spaced=False)
    count = {level: sum(f.level == level for f in findings) for level in _COLOURS}
    print(f"{count['bad']} bad, {count['warn']} to look at, {count['ok']} ok")
