"""Lowered graphs on disk: made once, whole or not at all, beside the bundle's other engines.

engines/<engine>-<key>/<component>.onnx        for the device; it points to the bundle's weights
<component>.host.onnx   for the host, if there is such a part
<component>.bin         what had to be repacked, if anything
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort

from vlmedge.bundle import Bundle
from vlmedge.graphs.edit import external, refer
from vlmedge.graphs.portable import EXTERNAL_THRESHOLD_BYTES, load_graph
from vlmedge.shelves.engine_store import engines_folder
from vlmedge.spec import Component

from .._ort.store import GRAPHS, make, root

ALIGNMENT_BYTES = 4096  # so that every tensor can be mapped


@dataclass(frozen=True, slots=True)
class Stored:
    """A lowered component on disk.

    Attributes:
        graph: The file for the device.
        host: The file for the host, or none.
        root: The folder from which `graph` names its weight files.
    """

    graph: Path
    host: Path | None
    root: Path


def stored(
    bundle: Bundle, component: str, engine: str, version: int, lower: Callable[..., object]
) -> Stored:
    """Return a component lowered for an engine, made if it is not there.

    Args:
        bundle: Its bundle.
        component: Its name.
        engine: Whose; the first part of the folder's name.
        version: Version of the lowering: another version makes another engine.
        lower: Takes the component's spec and its graph, which it rewrites, and returns the graph of
            the host or none.
    """
    name = f"{engine}-{_key(bundle, component, version)}"
    folder = engines_folder(bundle, name) / name
    if not (folder / f"{component}.onnx").is_file():
        spec = bundle.spec.component(component)
        make(
            bundle, component, folder, lambda partial: _write(bundle, spec, partial, folder, lower)
        )
    host = folder / f"{component}.host.onnx"
    return Stored(
        folder / f"{component}.onnx",
        host if host.is_file() else None,
        root(bundle, folder, component),
    )


def _key(bundle: Bundle, component: str, version: int) -> str:
    """Digest all that the engine is made from: graph, weights, lowering, ONNX Runtime."""
    graph = bundle.graph_file(component).read_bytes()
    weights = [f for f in bundle.manifest.files if f.path.endswith(".bin")]
    used = [f.sha256 for f in weights if Path(f.path).name.encode() in graph]
    parts = [*used, str(version), ort.__version__]
    return hashlib.sha256(graph + " ".join(parts).encode()).hexdigest()[:16]


def _write(
    bundle: Bundle, component: Component, partial: Path, folder: Path, lower: Callable[..., object]
) -> None:
    """Write the lowered graphs, and the weights that had to be repacked, into `partial`."""
    model = load_graph(bundle.path, component.name)
    import onnx_ir as ir  # not needed once the engine is there

    host = lower(component, model)
    values = list(model.graph.initializers.values())
    kept = external(model)
    made = [v for v in values if isinstance(v.const_value, ir.LazyTensor)]
    weights = f"{component.name}.bin"
    if folder.is_relative_to(bundle.path):
        location = (folder.relative_to(bundle.path) / weights).as_posix()
    else:
        location = weights
        if made:  # ONNX Runtime refuses files outside of one root, and links: it has them all
            made, kept = [*made, *kept], []
    refer(kept, bundle.path, GRAPHS)
    if made:
        with (partial / weights).open("wb") as stream:
            for value in made:
                assert value.const_value is not None
                value.const_value = _put(stream, value.const_value, str(value.name), location)
    ir.save(model, partial / f"{component.name}.onnx")
    if isinstance(host, ir.Model):
        for value in host.graph.initializers.values():  # small, and it stands alone
            assert value.const_value is not None
            value.const_value = ir.tensor(value.const_value.numpy(), name=str(value.name))
        ir.save(host, partial / f"{component.name}.host.onnx")


def _put(stream: Any, tensor: Any, name: str, location: str) -> Any:
    """Write one tensor, and return what stands for it: small ones stay in the graph."""
    import onnx_ir as ir

    data = tensor.tobytes()
    if len(data) < EXTERNAL_THRESHOLD_BYTES:
        return ir.tensor(tensor.numpy(), name=name)
    stream.seek(-stream.tell() % ALIGNMENT_BYTES, 1)
    place = (location, stream.tell(), len(data))
    stream.write(data)
    return ir.ExternalTensor(*place, tensor.dtype, shape=tensor.shape, name=name)
