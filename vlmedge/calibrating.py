"""Find the ranges of activations, with the weights quantized as they will be."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import numpy as np

from vlmedge.bundle import Bundle
from vlmedge.contracts import Array, Engine, Range, Scheme
from vlmedge.manifest import KeptLayer
from vlmedge.portable import load_graph, onnx_ir, save_edited
from vlmedge.progress import Advance, Progress
from vlmedge.samples import CALIBRATION_IMAGES, Samples, drawn
from vlmedge.spec import Component, MatchTask, TensorSpec
from vlmedge.tasks._parts import Parts
from vlmedge.tasks.embed import fill

_MAX, _MIN, _LENGTH, _SIZE = (f".calibration.{name}" for name in ("max", "min", "length", "size"))
_FIGURES = {
    _MAX: ("ReduceMax", "float32"),
    _MIN: ("ReduceMin", "float32"),
    _LENGTH: ("ReduceL2", "float32"),
    _SIZE: ("Size", "int64"),
}
_WATCHED = ".calibration"

# An engine may keep every watched tensor to the end of a run, so memory grows with the batch.
_BATCH = 1


def calibration_samples() -> Samples:
    """Draw the pictures that are calibrated with."""
    return drawn(CALIBRATION_IMAGES, "calibration", labelled=False)


def calibrate(
    bundle: Bundle, scheme: Scheme, engine: Engine, samples: Samples, progress: Progress
) -> list[KeptLayer]:
    """Give every component that wants it its activations' ranges, in place on disk.

    Args:
        bundle: Weights quantized, activations not yet; its folder may be written.
        scheme: Which tensors it watches, and what it makes of their ranges.
        engine: Runs the graphs.
        samples: What runs through them.
        progress: Watches.

    Returns:
        Layers whose activations stay float.
    """
    pool = _inputs(bundle, samples)
    kept: list[KeptLayer] = []
    for component in bundle.spec.components:
        if any(spec.name not in pool for spec in component.inputs):
            continue  # a decoder: it comes last and its inputs are made token by token
        model = load_graph(bundle.path, component.name)
        names = scheme.watch(component, model)
        with progress.step(f"calibrating {component.name}", len(_first(component, pool))) as step:
            ranges = _measure(bundle, component, names, engine, pool, step)
        if names:
            kept += scheme.calibrate(component, model, ranges)
            save_edited(model, bundle.path, component.name)
    return kept


def _inputs(bundle: Bundle, samples: Samples) -> dict[str, Array]:
    """Run the front ends."""
    parts = Parts(bundle, {})
    pool: dict[str, Array] = {}
    if bundle.spec.image is not None:
        pool["pixel_values"] = parts.pixels([*samples.images, *samples.singles])
    matches = [t for t in bundle.spec.tasks.values() if isinstance(t, MatchTask)]
    if matches:
        texts = fill(matches[0].template, samples.labels)
        pool["input_ids"], pool["attention_mask"] = parts.tokenizer.encode(texts)
    return pool


def _first(component: Component, pool: dict[str, Array]) -> Array:
    return pool[component.inputs[0].name]


def _measure(
    bundle: Bundle,
    component: Component,
    names: list[str],
    engine: Engine,
    pool: dict[str, Array],
    advance: Advance,
) -> dict[str, Range]:
    """Run one component over the pool with its tensors watched; add its outputs to the pool."""
    watched = _watch(bundle, component, names)
    found: dict[str, list[Array]] = {spec.name: [] for spec in component.outputs}
    amax = dict.fromkeys(names, 0.0)
    squares = dict.fromkeys(names, 0.0)
    sizes = dict.fromkeys(names, 0)
    try:
        graph = engine.open(watched, component.name + _WATCHED)
        for start in range(0, len(_first(component, pool)), _BATCH):
            rows = slice(start, start + _BATCH)
            out = graph.run({spec.name: pool[spec.name][rows] for spec in component.inputs})
            for name in names:
                largest = max(float(out[name + _MAX]), -float(out[name + _MIN]))
                amax[name] = max(amax[name], largest)
                squares[name] += float(out[name + _LENGTH]) ** 2
                sizes[name] += int(out[name + _SIZE])
            for name, arrays in found.items():
                arrays.append(out[name])
            advance(len(out[component.outputs[0].name]))
        graph.close()
    finally:
        watched.graph_file(component.name + _WATCHED).unlink()
    pool |= {name: np.concatenate(arrays) for name, arrays in found.items()}
    return {name: Range(amax[name], math.sqrt(squares[name] / sizes[name])) for name in names}


def _watch(bundle: Bundle, component: Component, names: list[str]) -> Bundle:
    """Write a component's graph beside it, with two figures of each watched tensor as outputs.

    x -> Abs -> ReduceMax          x -> Mul(x, x) -> ReduceMean
    """
    onnx_ir()
    import onnx_ir as ir

    model = load_graph(bundle.path, component.name)
    values = {str(v.name): v for node in model.graph for v in node.outputs}
    values |= {str(v.name): v for v in model.graph.inputs}
    outputs: list[TensorSpec] = []
    for name in names:
        for ending, (kind, dtype) in _FIGURES.items():
            attributes = [] if kind == "Size" else [ir.AttrInt64("keepdims", 0)]
            node = ir.Node("", kind, [values[name]], attributes)
            value = node.outputs[0]
            value.name, value.shape = name + ending, ir.Shape([])
            value.type = ir.TensorType(ir.DataType.INT64 if kind == "Size" else ir.DataType.FLOAT)
            model.graph.append(node)
            model.graph.outputs.append(value)
            outputs.append(TensorSpec(name + ending, dtype, ()))
    model.graph.sort()
    watched = Component(component.name + _WATCHED, component.inputs, (*component.outputs, *outputs))
    save_edited(model, bundle.path, watched.name)
    spec = msgspec.structs.replace(bundle.spec, components=(*bundle.spec.components, watched))
    return Bundle(Path(bundle.path), msgspec.structs.replace(bundle.manifest, spec=spec))
