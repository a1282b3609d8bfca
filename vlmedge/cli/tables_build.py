"""Tables of what was compiled and of what would be refused."""

from __future__ import annotations

from collections.abc import Sequence

from vlmedge.cli.tables import MIB, _print, _row, _table, level4_words
from vlmedge.shelves.build_options import Built, Finding
from vlmedge.shelves.engine_store import StoredEngine


def show_built(built: Sequence[Built]) -> None:
    """Print what became of each component."""
    table = _table("component", "precision", "MiB", "built in", "ms", "level 4", left=(0, 1, 5))
    for one in built:
        taken = "already there" if one.reused else f"{one.seconds:.1f} s"
        precision = one.precision
        if one.restored:
            precision += f", {len(one.restored)} nodes float32"
        if one.dla:
            precision += " on the DLA (experimental)"
        for what, latency_ms in one.dropped.items():
            precision += f" ({what}: {latency_ms:.2f} ms)"
        told = level4_words(one.parity, one.latency_ms)
        _row(table, one.component, precision, f"{one.bytes / MIB:.1f}", taken, *told)
    _print(table)


def show_findings(findings: Sequence[Finding]) -> None:
    """Print what an engine would refuse, a row each."""
    if not findings:
        return
    table = _table("component", "operator", "node", "problem", "what to do", left=(0, 1, 2, 3, 4))
    for f in findings:
        _row(table, f.component, f.operator, f.node, f.problem, f.remedy)
    _print(table)


def show_engines(found: Sequence[StoredEngine]) -> None:
    """Print the engines of a bundle."""
    table = _table("engine", "component", "MiB", "for", left=(0, 1, 3))
    for one in found:
        _row(table, one.name, str(one.identity.get("component", "")), *_size_and_target(one))
    _print(table) if found else print("no engines: vlmedge build makes them")


def show_removed(removed: Sequence[StoredEngine]) -> None:
    """Print what was removed."""
    size = sum(one.bytes for one in removed) / MIB
    print(f"{len(removed)} engines removed, {size:.1f} MiB")


def _size_and_target(one: StoredEngine) -> tuple[str, str]:
    told = [one.identity.get(name) for name in ("tensorrt", "gpu", "precision")]
    return f"{one.bytes / MIB:.1f}", ", ".join(str(word) for word in told if word)
