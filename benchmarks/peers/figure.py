"""The one figure: a panel for each figure of each case, bars with their spread."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .errors import PeersError
from .report import summary

COLUMNS = 3
OURS, THEIRS = "#1f6f8b", "#b8c4cc"
INK = "#333333"


def draw(report: dict[str, Any], file: Path) -> None:
    """Draw a report; ours in colour, what 8 of 10 runs lie between as a line, limits as ticks."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise PeersError("the figure needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [(case, metric) for case in report["cases"] for metric in case["metrics"]]
    if not panels:
        raise PeersError("nothing to draw: the report has no case")
    rows = math.ceil(len(panels) / COLUMNS)
    columns = min(COLUMNS, len(panels))
    tallest = max(len(case["sides"]) for case, _ in panels)
    figure, axes = pyplot.subplots(
        rows, columns, squeeze=False, figsize=(5.4 * columns, (0.9 + 0.27 * tallest) * rows)
    )
    for axis, (case, metric) in zip(axes.flat, panels, strict=False):
        _panel(axis, case, metric)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    machine = report["cases"][0]["machine"]
    figure.text(
        0.01,
        0.004,
        f"{machine['cpu']}, {report['cases'][0]['threads']} threads. Bars: median; lines: 10th to "
        "90th percentile; ticks: what memory or arithmetic would allow.",
        fontsize=7,
        color=INK,
    )
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    try:
        figure.savefig(file, dpi=110)
    except (OSError, ValueError) as error:
        raise PeersError(f"{file} cannot be written: {error}") from None
    finally:
        pyplot.close(figure)


def _panel(axis: Any, case: dict[str, Any], metric: dict[str, Any]) -> None:
    """Draw one figure of one case, the first side on top."""
    name = metric["name"]
    sides = case["sides"]
    for place, side in enumerate(sides):
        if side["reason"] or not side["samples"].get(name):
            axis.text(0, place, " not run", va="center", fontsize=7, color=INK)
            continue
        found = summary(side["samples"][name])
        axis.barh(place, found.p50, color=OURS if side["ours"] else THEIRS, height=0.7)
        axis.plot([found.p10, found.p90], [place, place], color=INK, linewidth=1.2)
        axis.text(
            0,
            place,
            f" {found.p50:.3g}" if found.p50 < 1000 else f" {found.p50:.0f}",
            va="center",
            fontsize=7,
            color=INK,
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "linewidth": 0, "alpha": 0.6},
        )
        if limit := side["limits"].get(name):
            axis.plot([limit, limit], [place - 0.35, place + 0.35], color=INK, linewidth=0.8)
    axis.set_yticks(range(len(sides)), [side["name"] for side in sides], fontsize=7)
    axis.invert_yaxis()
    axis.tick_params(axis="x", labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
    better = "less" if metric["lower"] else "more"
    axis.set_title(
        f"{case['title']}\n{metric['title']} ({better} is better)", fontsize=8, loc="left"
    )
