"""Tables that people read: what the gate found, what a bundle holds."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlmedge.bundle import Bundle, readers, weights_path
from vlmedge.checkpoints import resolve as checkpoint
from vlmedge.compositions import composition
from vlmedge.parity.on_device import OnDevice, reported
from vlmedge.shelves import registry
from vlmedge.shelves.engine_store import stored_engines
from vlmedge.spec import TensorSpec
from vlmedge.spec.manifest import ComponentParity, Parity

MIB = 2**20
WIDE = 1000  # a file or a pipe has no edge to wrap at
FLOAT = "float32"


def verdict(bundle: Bundle) -> dict[str, Any]:
    """Sum up an export, a quantization or a check, for JSON."""
    return {
        "bundle": str(bundle.path),
        "checkpoint": bundle.manifest.checkpoint.id,
        "scheme": bundle.manifest.scheme,
        "bytes": size_bytes(bundle),
        "verified": bundle.verified,
        "parity": bundle.manifest.parity,
    }


def show_verdict(bundle: Bundle) -> None:
    """Print what the gate found, and the bundle's name."""
    if bundle.manifest.parity is not None:
        show_parity(bundle.manifest.parity)
    word = "verified" if bundle.verified else "NOT verified"
    if bundle.manifest.parity is None:
        word = "unverified"
    scheme, size = bundle.manifest.scheme, size_bytes(bundle) / MIB
    print(f"{bundle.path}: {word} ({scheme}, {size:.1f} MiB)")


def show_parity(parity: Parity) -> None:
    """Print the gate's two tables."""
    table = _table(
        "component", "max abs difference", "cosine", "allowed", "verdict", left=(0, 3, 4)
    )
    for c in parity.components:
        figures = f"{c.max_abs:.2e}", f"{c.cosine:.7f}"
        _row(table, c.component, *figures, c.tolerance, _passed(c.passed))
    _print(table)
    if not parity.tasks:
        return
    table = _table(
        "task", "samples", "agreement", "ours / PyTorch", "allowed", "verdict", left=(0, 4, 5)
    )
    for t in parity.tasks:
        accuracy = f"{_percent(t.accuracy)} / {_percent(t.reference_accuracy)}"
        row = t.task, str(t.samples), _percent(t.agreement), accuracy, t.tolerance
        _row(table, *row, _passed(t.passed))
    _print(table)


def show_info(bundle: Bundle) -> None:
    """Print what a bundle holds."""
    manifest = bundle.manifest
    spec, source = manifest.spec, manifest.checkpoint
    print(f"{bundle.path}: {'verified' if bundle.verified else 'unverified'}")
    made = ", ".join(f"{name} {value}" for name, value in sorted(manifest.provenance.items()))
    facts = {
        "checkpoint": source.id + (f" at {source.revision}" if source.revision else ""),
        "family": spec.family,
        "scheme": manifest.scheme,
        "tasks": ", ".join(sorted(spec.tasks)),
        "size": f"{size_bytes(bundle) / MIB:.1f} MiB in {len(manifest.files)} files",
        "made by": f"vlmedge {manifest.vlmedge}; {made}",
    }
    if spec.image is not None:
        height, width = spec.image.crop_size or spec.image.resize_size
        facts["images"] = f"{width} x {height} pixels, {spec.image.resample}"
    if spec.text is not None:
        facts["text"] = f"at most {spec.text.max_tokens} tokens"
    for name, value in facts.items():
        print(f"  {name:<11} {value}")
    table = _table("component", "MiB", "inputs", "outputs", left=(0, 2, 3))
    state = {name for c in spec.components for pair in c.state for name in pair}
    for component in spec.components:
        stem = f"graphs/{component.name}."
        size = sum(f.bytes for f in manifest.files if f.path.startswith(stem))
        ends = _tensors(component.inputs, state), _tensors(component.outputs, state)
        _row(table, component.name, f"{size / MIB:.1f}", *ends)
    _print(table)
    for component in spec.components:
        found = readers(bundle.path, manifest, weights_path(component.name))
        if others := [name for name in found if name != component.name]:
            print(f"  {component.name} holds weights of {', '.join(others)} too, stored once")
    if manifest.kept:
        table = _table("kept in float", "component", "why", left=(0, 1, 2))
        for layer in manifest.kept:
            _row(table, layer.layer, layer.component, layer.reason)
        _print(table)
    show_fusions(bundle)
    if manifest.parity is not None:
        show_parity(manifest.parity)
    if on_devices := reported(bundle.path):
        show_level4(on_devices)


def show_fusions(bundle: Bundle) -> None:
    """Print what the engines that were built so far have fused, and what they left and why."""
    engines = [engine for engine in stored_engines(bundle.path) if engine.fusions]
    if not engines:
        return
    table = _table("engine of", "fused", "left as it is", left=(0, 1, 2))
    for engine in engines:
        done = [f"{one['done']}/{one['total']} {one['kind']}" for one in engine.fusions]
        left = [f"{one['kind']}: {line}" for one in engine.fusions for line in one["left"]]
        _row(table, str(engine.identity.get("component")), ", ".join(done), "; ".join(left))
    _print(table)


def show_level4(found: Sequence[OnDevice]) -> None:
    """Print what engines give on their machines, against the portable graphs."""
    table = _table("component", "engine", "on", "ms", "level 4", left=(0, 1, 2, 4))
    for one in found:
        told = level4_words(one.verdict.parity, one.verdict.latency_ms)
        _row(table, one.component, one.engine, one.device, *told)
    _print(table)


def level4_words(parity: ComponentParity | None, latency_ms: float | None) -> tuple[str, str]:
    """Tell how fast an engine is, and how far from its portable graph."""
    latency = "" if latency_ms is None else f"{latency_ms:.2f}"
    if parity is None:
        return latency, "not compared"
    word = "passed" if parity.passed else "FAILED"
    return latency, f"{word}, cosine {parity.cosine:.6f} ({parity.tolerance})"


def shelves() -> dict[str, Any]:
    """Name all that can be named on the command line."""
    families = registry.FAMILIES
    return {
        "built_ins": checkpoint.built_ins(),
        "aliases": checkpoint.aliases(),
        "families": {name: families.literal(name, "ARCHITECTURES") for name in families.names()},
        "schemes": [FLOAT, *registry.SCHEMES.names()],
        "engines": registry.ENGINES.names(),
        "experimental": registry.experimental(),
        "devices": list(registry.devices()),
        "compositions": composition.built_ins(),
    }


def show_list() -> None:
    """Print what `shelves` finds."""
    found = shelves()
    families = [f"{name} ({', '.join(known)})" for name, known in found["families"].items()]
    lines = {
        "checkpoints": found["built_ins"],
        "aliases": [f"{alias} = {hub_id}" for alias, hub_id in found["aliases"].items()],
        "families": families,
        "schemes": found["schemes"],
        "engines": [_marked(name, found["experimental"]) for name in found["engines"]],
        "devices": found["devices"],
        "compositions": found["compositions"],
    }
    for name, values in lines.items():
        print(f"{name:<12} {', '.join(values) or 'none'}")


def _marked(engine: str, experimental: Sequence[str]) -> str:
    """Name an engine, and say so where no device has run it."""
    return f"{engine} (experimental)" if engine in experimental else engine


def size_bytes(bundle: Bundle) -> int:
    """Return the size of all that a bundle ships."""
    return sum(file.bytes for file in bundle.manifest.files)


def _table(*columns: str, left: tuple[int, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i in left else "right")
    return table


def _row(table: Table, *cells: str | Text) -> None:
    """Add a row; a plain string is no markup, whatever brackets it has."""
    table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))


def _print(table: Table, *, spaced: bool = True) -> None:
    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else WIDE, highlight=False)
    console.print(table)
    if spaced:
        console.print()


def _passed(passed: bool) -> Text:
    return Text("passed", "green") if passed else Text("FAILED", "bold red")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _tensors(tensors: tuple[TensorSpec, ...], state: set[str]) -> str:
    """Describe tensors; a decoder's cache is one word."""
    plain = [t for t in tensors if t.name not in state]
    texts = [f"{t.name} {t.dtype}{list(t.shape)}".replace("'", "") for t in plain]
    texts += [f"{len(tensors) - len(plain)} cache tensors"] if len(plain) < len(tensors) else []
    return ", ".join(texts)
