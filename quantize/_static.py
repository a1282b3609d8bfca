"""Quantized weights and, where their range is known, activations: shared by int8 and fp8.

    x -> QuantizeLinear -> DequantizeLinear -> MatMul
                    W -> DequantizeLinear ------^

Q/DQ stand on the inputs of MatMuls only, symmetric, one scale for a whole activation and one for
each column of a weight, which is what TensorRT asks for (its "Explicit Quantization" chapter).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from vlmedge.shelves.contracts import LayerError, Stats, Watched
from vlmedge.spec import Component
from vlmedge.spec.manifest import KeptLayer

from ._linear import (
    FLOAT,
    Floats,
    Format,
    Linear,
    last_projections,
    layer_error,
    linears,
    round_activation,
    shrink,
)
from ._smooth import groups, smooth

# Rounding to steps of amax/127 leaves noise of step/sqrt(12). Above this share of the signal's rms
# a layer's activations stay float: that is amax > 44 rms, where ordinary layers have 4 to 20.
NOISE_LIMIT = 0.10

LAST = "the last projection: its error would go straight into the output"


@dataclass(frozen=True)
class Static:
    """Weights and activations in one small type.

    Attributes:
        form: Format of the weights.
        largest: Quantized value of an activation's largest magnitude.
        noisy: Whether rounding leaves the same noise whatever the size (integers do).
        timed: See `Scheme.timed`.
        table: See `Scheme.table`.
    """

    form: Format
    largest: float
    noisy: bool
    timed: bool
    table: str = "int8"

    def watch(self, component: Component, model: ir.Model) -> Watched:
        """Name what the Linears of a stateless component read; a decoder's activations stay."""
        if component.state:
            return Watched()
        last = last_projections(component, model)
        names = [str(linear.x.name) for linear in linears(model) if linear.name not in last]
        return Watched(tuple(dict.fromkeys(names)))

    def rewrite(
        self,
        component: Component,
        model: ir.Model,
        stats: Mapping[str, Stats],
        keep: Mapping[str, str] = {},
    ) -> list[KeptLayer]:
        """Round every Linear; see `Scheme.rewrite`."""
        last, kept = last_projections(component, model), []
        chosen = []
        for linear in linears(model):
            if linear.name in last:
                kept.append(KeptLayer(component.name, linear.name, LAST))
            elif keep.get(linear.name) != FLOAT:
                chosen.append(linear)
        stats = {} if component.state else dict(stats)
        for group in groups(chosen):
            name = str(group.x.name)
            if name in stats:
                rows = self._round_rows(stats[name])
                scale = smooth(group, stats[name], self.form, rows)
                if scale is not None:
                    stats |= group.divided(stats, scale)
        rounded: dict[str, ir.Value] = {}
        for linear in chosen:
            shrink(model.graph, linear, self.form)
            name = str(linear.x.name)
            if name not in stats:
                continue
            noise = self._noise(stats[name])
            if noise > NOISE_LIMIT:
                times = stats[name].amax / stats[name].rms
                reason = (
                    f"activations reach {times:.0f} times their rms: 8 bits would leave "
                    f"{noise:.0%} noise; its weights are rounded"
                )
                kept.append(KeptLayer(component.name, str(linear.node.name), reason))
                continue
            if name not in rounded:
                step = (stats[name].amax or 1.0) / self.largest
                rounded[name] = round_activation(
                    model.graph, linear.node, linear.x, step, self.form.dtype
                )
            linear.node.replace_input_with(0, rounded[name])
        return kept

    def harms(
        self, component: Component, model: ir.Model, stats: Mapping[str, Stats]
    ) -> dict[str, LayerError]:
        """Return the error that quantizing each layer alone causes; see `Scheme.harms`."""
        last = last_projections(component, model)
        found = {}
        for linear in linears(model):
            if linear.name not in last:
                found[linear.name] = self._layer_error(component, linear, stats)
        return found

    def _layer_error(
        self, component: Component, linear: Linear, stats: Mapping[str, Stats]
    ) -> LayerError:
        seen = stats.get(str(linear.x.name))
        rows = None if seen is None or component.state else self._round_rows(seen)
        return layer_error(linear, stats, self.form, rows)

    def _noise(self, seen: Stats) -> float:
        """Return the share of the signal that rounding to integers adds as noise."""
        if not self.noisy or not seen.rms:
            return 0.0
        return seen.amax / self.largest / math.sqrt(12) / seen.rms

    def _round_rows(self, seen: Stats):  # type: ignore[no-untyped-def]
        """Make the function that rounds rows as the graph will, with the range of those rows."""
        known = None if seen.rows is None else float(np.abs(seen.rows.astype(np.float32)).max())
        share = 1.0 if not known else seen.amax / known

        def round_rows(rows: Floats) -> Floats:
            step = np.float32(share * float(np.abs(rows).max()) / self.largest) or np.float32(1)
            scaled = rows / step
            if self.noisy:
                return np.asarray(np.clip(np.rint(scaled), -self.largest, self.largest) * step)
            return np.asarray(scaled.astype(self.form.dtype.numpy()).astype(np.float32) * step)

        return round_rows
