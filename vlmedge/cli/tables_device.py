"""Tables about machines: what will fit on a device, and what is wrong with this one."""

from __future__ import annotations

from rich.text import Text

from vlmedge.cli.tables import _print, _row, _table
from vlmedge.doctor.patient import Finding
from vlmedge.plan.plan import Plan, SchemePlan
from vlmedge.units import GIB, MIB

_COLOURS = {"ok": "green", "warn": "yellow", "bad": "bold red"}
_GOOD = {"fits": "green", "tight": "yellow"}


def show_plan(plan: Plan, scheme: str | None) -> None:
    """Print the schemes side by side, then the components of one of them.

    Args:
        plan: What to print.
        scheme: Whose components; none: the recommended one's, else the smallest one's.
    """
    print(
        f"{plan.model} ({plan.parameters / 1e6:.1f} M parameters) on {plan.title} "
        f"by {plan.engine}: {plan.free_bytes / GIB:.1f} GiB free {plan.free_is}"
    )
    time = "first token" if plan.picture_tokens else "picture + text"
    table = _table(
        "scheme", "weights", "all", "build peak", time, "tokens/s", "verdict", left=(0, 6)
    )
    for one in plan.schemes:
        _row(
            table,
            one.scheme,
            _size(sum(part.weights_bytes for part in one.parts)),
            _size(one.total_bytes),
            _size(one.build_bytes) if one.build_bytes else "-",
            *_speed(one),
            Text(one.verdict, _GOOD.get(one.verdict, "bold red")),
        )
    _print(table)
    smallest = min(plan.schemes, key=lambda s: s.total_bytes).scheme
    chosen = plan.scheme(scheme or plan.recommended or smallest)
    table = _table(
        chosen.scheme,
        "M parameters",
        "weights",
        "activations",
        "cache",
        "workspace",
        "build peak",
        "ms",
        left=(0,),
    )
    for part in chosen.parts:
        step = "" if part.step_ms is None else f" + {part.step_ms:.1f} a token"
        _row(
            table,
            part.component,
            f"{part.parameters / 1e6:.1f}",
            _size(part.weights_bytes),
            _size(part.activations_bytes),
            _size(part.cache_bytes) if part.cache_bytes else "-",
            _size(part.workspace_bytes),
            _size(part.build_bytes) if part.build_bytes else "-",
            f"{part.run_ms:.1f}{step}",
        )
    _row(table, "the engine itself", "", _size(chosen.process_bytes), *[""] * 5)
    _print(table)
    text = f"{plan.picture_tokens} + {plan.prompt_tokens} tokens in, {plan.new_tokens} out"
    work = f"one picture, {text}" if plan.picture_tokens else "one picture, one text"
    ranges = ", ".join(f"{axis} {sizes}" for axis, sizes in plan.profile.items())
    print(f"for {work}; profile (min:opt:max): {ranges}")
    for note in plan.notes:
        print(f"note: {note}")
    if plan.recommended is not None:
        print(f"recommended: {plan.recommended}")


def show_findings(findings: tuple[Finding, ...]) -> None:
    """Print one line a finding, and the cure below it."""
    for finding in findings:
        mark = Text(f"{finding.level:<4}", _COLOURS[finding.level])
        table = _table("", "", "", left=(0, 1, 2))
        table.show_header = False
        table.box = None
        cure = f"\n-> {finding.cure}" if finding.cure else ""
        _row(table, mark, f"{finding.check:<9}", f"{finding.what}{cure}")
        _print(table, spaced=False)
    count = {level: sum(f.level == level for f in findings) for level in _COLOURS}
    print(f"{count['bad']} bad, {count['warn']} to look at, {count['ok']} ok")


def _speed(one: SchemePlan) -> tuple[str, str]:
    if one.verdict == "no arithmetic":
        return "-", "-"
    if one.first_token_ms is None or one.tokens_per_s is None:
        return f"{sum(part.run_ms for part in one.parts):.1f} ms", "-"
    return f"{one.first_token_ms:.0f} ms", f"{one.tokens_per_s:.1f}"


def _size(size: float) -> str:
    """Write bytes in the unit that people would take."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"
