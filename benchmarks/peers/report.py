"""The one JSON: written after every case, so that a run can be done in parts."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlmedge.host.hardware import this_machine

from .cases import Case
from .errors import PeersError

FORMAT = 1
LIBRARIES = ("vlmedge", "onnxruntime", "torch", "transformers", "numpy")


@dataclass(frozen=True)
class Summary:
    """Samples of one figure: the middle, and what 8 of 10 lie between."""

    p10: float
    p50: float
    p90: float
    count: int


def summary(samples: Iterable[float]) -> Summary:
    """Sum up at least one sample; between two of them the line is straight."""
    found = sorted(samples)
    if not found:
        raise ValueError("no samples: there must be at least one")

    def at(share: float) -> float:
        place = share * (len(found) - 1)
        low = math.floor(place)
        high = min(low + 1, len(found) - 1)
        return found[low] + (place - low) * (found[high] - found[low])

    return Summary(at(0.1), at(0.5), at(0.9), len(found))


def better_by(ours: float, theirs: float, *, lower: bool) -> float:
    """Return how many times better ours is."""
    return theirs / ours if lower else ours / theirs


def case_report(name: str, case: Case, rows: list[dict[str, Any]], **about: Any) -> dict[str, Any]:
    """Describe a case that has run, with the machine as it was."""
    machine = asdict(this_machine(LIBRARIES))
    return {
        "name": name,
        "title": case.title,
        "ended": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine | {"system": platform.platform(), "commit": _commit()},
        **about,
        "metrics": [asdict(metric) for metric in case.metrics],
        "sides": rows,
    }


def add(file: Path, case: dict[str, Any], order: Iterable[str]) -> dict[str, Any]:
    """Put a case into the file, in place of what it said of that case."""
    cases = {old["name"]: old for old in read(file)["cases"]} if file.is_file() else {}
    cases[case["name"]] = case
    places = list(order)
    report = {
        "format": FORMAT,
        "cases": sorted(cases.values(), key=lambda c: places.index(c["name"])),
    }
    partial = file.with_name(f".{file.name}-{os.getpid()}")
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)
    return report


def read(file: Path) -> dict[str, Any]:
    """Read a saved report.

    Raises:
        PeersError: It is not there, or something else.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise PeersError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError:
        raise PeersError(f"{file} is no JSON: give what a run has written") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT or "cases" not in found:
        raise PeersError(f"{file} is no report of format {FORMAT}: give what a run has written")
    return found


def table(case: dict[str, Any]) -> str:
    """Write a case as Markdown: the middle, the spread, how far from the limit, and ours beside."""
    sides = case["sides"]
    ours = [side for side in sides if side["ours"] and not side["reason"]]
    head = ["", *(m["title"] for m in case["metrics"]), "peak MiB"]
    head += [f"{side['name']} is" for side in ours]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for side in sides:
        name = side["name"] + (f" [{side['variant']}]" if side["variant"] else "")
        if side["reason"]:
            lines.append(f"| {name} | {side['reason']} |")
            continue
        cells = [name]
        for metric in case["metrics"]:
            found = summary(side["samples"][metric["name"]])
            cell = f"{found.p50:.4g} ({found.p10:.4g} to {found.p90:.4g})"
            if limit := side["limits"].get(metric["name"]):
                share = better_by(found.p50, limit, lower=metric["lower"])
                cell += f", {share:.0%} of the limit"
            cells.append(cell)
        cells.append(f"{side['peak_mib']:.0f}" if side["peak_mib"] else "")
        for one in ours:
            times = [
                better_by(
                    summary(one["samples"][m["name"]]).p50,
                    summary(side["samples"][m["name"]]).p50,
                    lower=m["lower"],
                )
                for m in case["metrics"]
            ]
            cells.append(", ".join(f"{factor:.2f}x" for factor in times))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _commit() -> str | None:
    """Return what of vlmedge was measured, or none outside of a checkout."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
