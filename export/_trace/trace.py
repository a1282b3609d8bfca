"""From a torch module without weights to a portable ONNX graph without weights."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from vlmedge.arrays import Array
from vlmedge.errors import CheckpointError
from vlmedge.spec import Component, TensorSpec

from .torch_modules import Build, build_on_meta, is_layered

OPSET = 20  # the newest that TensorRT 10.3 (JetPack 6) parses

# Sizes to trace at. All differ, and none is 0 or 1, which torch.export would take for constants.
AXES = {"batch": 2, "tokens": 3, "past": 5, "total": 8, "media": 14, "states": 7, "frames": 4}


def trace(component: Component, build: Build) -> tuple[ir.Model, dict[str, Array]]:
    """Trace one component.

    Args:
        component: Names and shapes of inputs and outputs, in the order of the module's forward;
            what there is of every layer comes as one list, and the state, another, last.
        build: Makes the module; its parameters carry the checkpoint's names.

    Returns:
        The graph, whose weights are initializers without data, and the values of buffers.
    """
    module, buffers = build_on_meta(build)
    state = {into for _, into in component.state}
    specs = {spec.name: spec for spec in component.inputs}
    plain = [spec for spec in component.inputs if spec.name not in state]
    past = [specs[into] for _, into in component.state]
    single = [spec for spec in plain if not is_layered(spec.name)]
    layered = [spec for spec in plain if is_layered(spec.name)]
    args: list[object] = [_example(spec) for spec in single]
    axes: list[object] = [_dynamic(spec) for spec in single]
    for group in (layered, past):
        if group:
            args.append([_example(spec) for spec in group])
            axes.append([_dynamic(spec) for spec in group])
    with _quiet(), _scalars_with_values():
        program = torch.onnx.export(
            module,
            tuple(args),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=tuple(axes),
            input_names=[spec.name for spec in (*single, *layered, *past)],
            output_names=[spec.name for spec in component.outputs],
            optimize=False,  # it would read the weights
            verbose=False,
        )
        if program is None:
            raise CheckpointError(f"{component.name}: torch.onnx gave no graph")
        model: ir.Model = program.model
        for value in model.graph.initializers.values():
            raw = getattr(value.const_value, "raw", None)
            if isinstance(raw, torch.Tensor) and raw.device.type == "meta":
                value.const_value = None
        onnxscript.optimizer.optimize_ir(model)
    # torch notes the line of Python that each node came from: a path of the machine that traced
    ClearMetadataAndDocStringPass()(model)
    return model, buffers


def _example(spec: TensorSpec) -> torch.Tensor:
    shape = [axis if isinstance(axis, int) else AXES[axis] for axis in spec.shape]
    return torch.zeros(shape, dtype=getattr(torch, spec.dtype), device="meta")


def _dynamic(spec: TensorSpec) -> dict[int, str]:
    return {i: axis for i, axis in enumerate(spec.shape) if isinstance(axis, str)}


@contextlib.contextmanager
def _scalars_with_values() -> Iterator[None]:
    """Make `torch.tensor(0.0, device=meta)` a node of the graph.

    torch.export would lift it to a constant, whose value is lost with all others on that device;
    transformers before 5.24 writes masks so.
    """
    plain: Any = torch.tensor

    def tensor(data: Any, *, device: Any = None, dtype: Any = None, **more: Any) -> Any:
        if isinstance(data, bool | int | float) and device == torch.device("meta"):
            dtype = dtype or plain(data, device="cpu").dtype
            return torch.full((), data, dtype=dtype, device=device)
        return plain(data, device=device, dtype=dtype, **more)

    setattr(torch, "tensor", tensor)  # noqa: B010 - mypy refuses the assignment
    try:
        yield
    finally:
        setattr(torch, "tensor", plain)  # noqa: B010


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the exporter's chatter about what is normal here: weights without data."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
