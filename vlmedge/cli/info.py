"""The commands `info` and `list`: what a bundle holds, and what can be named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vlmedge.cli import output
from vlmedge.cli.options import BundleFolder, Json, Quiet

if TYPE_CHECKING:
    from vlmedge.bundle import Bundle
    from vlmedge.spec import TensorSpec


def info(bundle: BundleFolder, as_json: Json = False, quiet: Quiet = False) -> None:
    """Show what a bundle contains."""
    opened = output.load(bundle)
    output.emit(opened.manifest) if as_json else show_info(opened)


def list_(as_json: Json = False, quiet: Quiet = False) -> None:
    """List checkpoints, families, schemes, engines, devices and compositions."""
    output.emit(shelves()) if as_json else show_list()


def shelves() -> dict[str, Any]:
    """Name all that can be named on the command line."""
    from vlmedge.checkpoints import resolve
    from vlmedge.compositions import composition
    from vlmedge.shelves import registry

    families = registry.FAMILIES
    return {
        "built_ins": resolve.built_ins(),
        "aliases": resolve.aliases(),
        "families": {name: families.literal(name, "ARCHITECTURES") for name in families.names()},
        "schemes": ["float32", *registry.SCHEMES.names()],
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


def show_info(bundle: Bundle) -> None:
    """Print what a bundle holds."""
    from vlmedge.cli.tables import show_level4, show_parity
    from vlmedge.parity.on_device import reported

    print(f"{bundle.path}: {'verified' if bundle.verified else 'unverified'}")
    for name, value in _facts(bundle).items():
        print(f"  {name:<11} {value}")
    _show_components(bundle)
    _show_kept(bundle)
    show_fusions(bundle)
    if bundle.manifest.parity is not None:
        show_parity(bundle.manifest.parity)
    if on_devices := reported(bundle.path):
        show_level4(on_devices)


def _facts(bundle: Bundle) -> dict[str, str]:
    from vlmedge.cli.tables import size_bytes
    from vlmedge.units import MIB

    manifest, spec = bundle.manifest, bundle.spec
    source = manifest.checkpoint
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
    return facts


def _show_components(bundle: Bundle) -> None:
    """Print each component's size, inputs and outputs, and whose weights it holds."""
    from vlmedge.bundle import readers, weights_path
    from vlmedge.cli.tables import print_table, row, table
    from vlmedge.units import MIB

    manifest, components = bundle.manifest, bundle.spec.components
    rows = table("component", "MiB", "inputs", "outputs", left=(0, 2, 3))
    state = {name for c in components for pair in c.state for name in pair}
    for component in components:
        stem = f"graphs/{component.name}."
        size = sum(f.bytes for f in manifest.files if f.path.startswith(stem))
        ends = _tensors(component.inputs, state), _tensors(component.outputs, state)
        row(rows, component.name, f"{size / MIB:.1f}", *ends)
    print_table(rows)
    for component in components:
        found = readers(bundle.path, manifest, weights_path(component.name))
        if others := [name for name in found if name != component.name]:
            print(f"  {component.name} holds weights of {', '.join(others)} too, stored once")


def _show_kept(bundle: Bundle) -> None:
    """Print the layers that a scheme left in float, and why."""
    from vlmedge.cli.tables import print_table, row, table

    if not bundle.manifest.kept:
        return
    rows = table("kept in float", "component", "why", left=(0, 1, 2))
    for layer in bundle.manifest.kept:
        row(rows, layer.layer, layer.component, layer.reason)
    print_table(rows)


def show_fusions(bundle: Bundle) -> None:
    """Print what the engines that were built so far have fused, and what they left and why."""
    from vlmedge.cli.tables import print_table, row, table
    from vlmedge.shelves.engine_store import stored_engines

    engines = [engine for engine in stored_engines(bundle.path) if engine.fusions]
    if not engines:
        return
    rows = table("engine of", "fused", "left as it is", left=(0, 1, 2))
    for engine in engines:
        done = [f"{one['done']}/{one['total']} {one['kind']}" for one in engine.fusions]
        left = [f"{one['kind']}: {line}" for one in engine.fusions for line in one["left"]]
        row(rows, str(engine.identity.get("component")), ", ".join(done), "; ".join(left))
    print_table(rows)


def _tensors(tensors: tuple[TensorSpec, ...], state: set[str]) -> str:
    """Describe tensors; a decoder's cache is one word."""
    plain = [t for t in tensors if t.name not in state]
    texts = [f"{t.name} {t.dtype}{list(t.shape)}".replace("'", "") for t in plain]
    texts += [f"{len(tensors) - len(plain)} cache tensors"] if len(plain) < len(tensors) else []
    return ", ".join(texts)
