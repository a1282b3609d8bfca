"""How big a bundle's components are: from its manifest, its files, and the shapes in its graphs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmedge.graphs.portable import load_graph
from vlmedge.graphs.shared_weights import stored_bytes
from vlmedge.plan.shape import Part, Shape
from vlmedge.spec import Component
from vlmedge.spec.manifest import Manifest
from vlmedge.spec.wiring import picture_rows, writing

if TYPE_CHECKING:
    import onnx_ir as ir

PRODUCTS = ("MatMul", "Gemm")
THROUGH = ("DequantizeLinear", "Cast", "Transpose", "Reshape")  # between a weight and its product


def bundle_shape(path: Path, manifest: Manifest) -> tuple[Shape, dict[str, float]]:
    """Count a bundle's parts.

    Args:
        path: Its folder.
        manifest: As it was read; the files are not digested.

    Returns:
        Its shape, and the resident bytes of each component's weights.
    """
    parts, sizes = [], {}
    for component in manifest.spec.components:
        model = load_graph(path, component.name)
        part, mapped_bytes = _part(manifest, component, model)
        parts.append(part)
        sizes[component.name] = float(stored_bytes(model) - mapped_bytes)
    table = manifest.embeddings
    return (
        Shape(
            manifest.spec.family,
            tuple(parts),
            soft_rows=_soft_rows(manifest),
            max_positions=_positions(manifest),
            host_table=0 if table is None else table.shape[0] * table.shape[1],
            # whether it is tied is not recorded: a table in a file of its own counts
            tied=table is not None and table.file.startswith("graphs/"),
        ),
        sizes,
    )


def _part(manifest: Manifest, component: Component, model: ir.Model) -> tuple[Part, int]:
    """Count one component; also the bytes of tables of which few rows are read."""
    graph = model.graph
    shapes: Counter[tuple[int, int]] = Counter()
    linear = table = table_bytes = counted = 0
    patch = 0
    heads = 0
    for value in graph.initializers.values():
        if value.const_value is None or value.shape is None:
            continue
        shape = value.const_value.shape.numpy()
        count = value.const_value.size
        users = _users(value)
        if "Conv" in users and len(shape) == 4:
            patch = shape[-1]
        if len(shape) >= 2 and set(users) & set(PRODUCTS):
            linear += count
            shapes[shape[-2], shape[-1]] += 1
        elif "Gather" in users and len(shape) == 2 and component.inputs[0].dtype == "int64":
            table += count
            table_bytes += value.const_value.nbytes
        counted += count
    rows = _rows(manifest, component, patch)
    logits = _width(component.outputs, "logits")
    vocabulary = _vocabulary(shapes, logits)
    widths = Counter(n for shape, times in shapes.items() for n in [shape[0]] * times)
    width = widths.most_common(1)[0][0] if widths else 1
    inner = max((n for shape in shapes for n in shape if n != logits), default=width)
    state = [t for t in component.inputs if t.name in {i for _, i in component.state}]
    cache = sum(int(t.shape[1]) * int(t.shape[3]) for t in state)
    if state:
        heads = int(state[0].shape[1])
    part = Part(
        component.name,
        linear - vocabulary,
        counted - linear - table,
        width,
        inner,
        layers=len(state) // 2 or sum(node.op_type == "Softmax" for node in graph),
        heads=heads or max(1, width // 64),  # 64 wide, as nearly all are
        rows=rows,
        table=table,
        vocabulary=vocabulary,
        logits=logits,
        cache_width=cache,
    )
    return part, table_bytes


def _users(value: ir.Value) -> set[str]:
    """Name the operators that get a weight, directly, dequantized or transposed."""
    found: set[str] = set()
    for node, _ in value.uses():
        if node.op_type in THROUGH:
            for output in node.outputs:
                found |= _users(output)
        else:
            found.add(node.op_type)
    return found


def _rows(manifest: Manifest, component: Component, patch: int) -> int | None:
    """Return how many rows a component works on; none for the decoder."""
    if component.state:
        return None
    fixed = [t.shape[1] for t in component.outputs if len(t.shape) == 3]
    if patch and isinstance(side := component.inputs[0].shape[-1], int):
        return (side // patch) ** 2 + 1
    if fixed and isinstance(fixed[0], int):
        return fixed[0]
    return manifest.spec.text.max_tokens if manifest.spec.text else 1


def _vocabulary(shapes: Counter[tuple[int, int]], logits: int) -> int:
    """Count the weights of the projection to logits."""
    return next((a * b for a, b in shapes if logits and logits in (a, b)), 0)


def _width(tensors: tuple[Any, ...], name: str) -> int:
    return next((int(t.shape[-1]) for t in tensors if t.name == name), 0)


def _soft_rows(manifest: Manifest) -> int:
    """Return the picture's rows in the prompt: of the picture that has most of them."""
    spec = manifest.spec
    among = [t for t in writing(spec) if t.source == "image" and not t.media and not t.read]
    return max((picture_rows(spec, task) for task in among), default=0)


def _positions(manifest: Manifest) -> int | None:
    """Return the most tokens that the decoder can have."""
    text = manifest.spec.text
    if text is None or not any(c.state for c in manifest.spec.components):
        return None
    alone = any(task.image_text is None for task in writing(manifest.spec))
    return text.max_tokens + (_soft_rows(manifest) if alone else 0)
