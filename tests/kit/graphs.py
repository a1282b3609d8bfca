"""Graphs that tests write by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from vlmedge.arrays import Array

FLOAT, HALF, INT8 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT8
V10_3, V11 = (10, 3), (11, 0)  # of TensorRT


class Draft:
    """A graph of a few nodes, x float32 [2, 8] in, y out."""

    def __init__(self, opset: int = 20, dtype: ir.DataType = FLOAT) -> None:
        self.x = ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape(["batch", 8]))
        self.nodes: list[ir.Node] = []
        self.constants: list[ir.Value] = []
        self.opset = opset

    def constant(self, array: Any, dtype: Any = None) -> ir.Value:
        """Add an initializer."""
        data = np.array(array, dtype)
        name = f"c{len(self.constants)}"
        tensor = ir.tensor(data, name=name)
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype))
        value.shape = ir.Shape(data.shape)
        self.constants.append(value)
        return value

    def add(
        self, kind: str, *inputs: ir.Value | None, dtype: ir.DataType = FLOAT, **attributes: Any
    ) -> ir.Value:
        """Add a node; return its output."""
        domain = attributes.pop("domain", "")
        node = ir.node(kind, list(inputs), attributes, domain=domain, name=f"n{len(self.nodes)}")
        node.outputs[0].name = f"v{len(self.nodes)}"
        node.outputs[0].type = ir.TensorType(dtype)
        self.nodes.append(node)
        return node.outputs[0]

    def model(self, y: ir.Value, rank: int = 2) -> ir.Model:
        """Close the graph with y as its output."""
        y.name = "y"
        y.shape = ir.Shape(["rows", "columns"][:rank])
        graph = ir.Graph(
            [self.x],
            [y],
            nodes=self.nodes,
            initializers=self.constants,
            opset_imports={"": self.opset},
            name="draft",
        )
        return ir.Model(graph, ir_version=10)


class Writer:
    """A graph under construction."""

    def __init__(self, *inputs: tuple[str, ir.DataType, list[int | str]]) -> None:
        self.inputs = {
            name: ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
            for name, dtype, shape in inputs
        }
        self.nodes: list[ir.Node] = []
        self.constants: list[ir.Value] = []
        self.random = np.random.default_rng(0)

    def constant(self, array: Array) -> ir.Value:
        """Add an initializer."""
        name = f"c{len(self.constants)}"
        self.constants.append(ir.Value(name=name, const_value=ir.tensor(array, name=name)))
        return self.constants[-1]

    def add(self, kind: str, *inputs: ir.Value, **attributes: int | list[int]) -> ir.Value:
        """Add a node; return its output."""
        found = [
            ir.AttrInt64s(name, value) if isinstance(value, list) else ir.AttrInt64(name, value)
            for name, value in attributes.items()
        ]
        node = ir.Node("", kind, list(inputs), found, name=f"n{len(self.nodes)}")
        node.outputs[0].name = f"v{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def rounded(self, x: ir.Value) -> ir.Value:
        """Put x through Q/DQ; it must lie in -4..4."""
        step = self.constant(np.array(4 / 127, np.float32))
        zero = self.constant(np.array(0, np.int8))
        return self.add("DequantizeLinear", self.add("QuantizeLinear", x, step, zero), step, zero)

    def linear(self, x: ir.Value, rows: int, columns: int, *, bias: bool, zero: bool) -> ir.Value:
        """Add an int8 Linear, with or without the zero points that are 0."""
        values = self.random.integers(-127, 128, (rows, columns), dtype=np.int8)
        scale = (self.random.random(columns) + 0.1) / 127 / np.sqrt(rows)
        parts = [self.constant(values), self.constant(scale.astype(np.float32))]
        if zero:
            parts.append(self.constant(np.zeros(columns, np.int8)))
        weight = self.add("DequantizeLinear", *parts, axis=1)
        out = self.add("MatMul", x, weight)
        if bias:
            vector = self.random.standard_normal(columns).astype(np.float32)
            out = self.add("Add", out, self.constant(vector))
        return out

    def model(self, **outputs: tuple[ir.Value, ir.DataType]) -> ir.Model:
        """Close the graph; `__` in an output's name stands for a dot."""
        for name, (value, dtype) in outputs.items():
            value.name, value.type = name.replace("__", "."), ir.TensorType(dtype)
        graph = ir.Graph(
            list(self.inputs.values()),
            [value for value, _ in outputs.values()],
            nodes=self.nodes,
            initializers=self.constants,
            opset_imports={"": 20},
            name="tiny",
        )
        return ir.Model(graph, ir_version=10)
