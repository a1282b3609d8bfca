"""INT4: 4-bit weights in decoders, and INT8 in what stands before them.

An encoder's time is its multiplications, which 8-bit integers do fastest; a decoder's is the memory
that its weights take. Its vocabulary projection is int8, unless a recipe's options say otherwise:
errors there choose the word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
import onnx_ir as ir

from vlmedge.shelves.contracts import LayerError, Stats, Watched
from vlmedge.spec import Component
from vlmedge.spec.manifest import KeptLayer

from ._formats import INT8_LEVELS, Int4Blocks, Int8Columns
from ._linear import FLOAT, Format, Linear, importance, layer_error, linears, shrink
from ._smooth import groups, smooth
from ._static import Static

# The larger the faster; the widest that divides a weight's rows is taken.
BLOCKS: tuple[Literal[32, 64, 128], ...] = (128, 64, 32)
OPSET = 21  # the first whose DequantizeLinear has blocks
ENCODERS = Static(Int8Columns(), INT8_LEVELS, noisy=True, timed=True)


class Int4(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The scheme `int4`; its fields are what a recipe's options may set.

    Attributes:
        blocks: Weights of a column that share a scale, in order of preference.
        awq: Whether what the calibration saw scales and weighs the weights; without it each block
            takes the scale of the least plain error.
        vocabulary: Format of the projection to the logits.
    """

    blocks: Annotated[tuple[Literal[32, 64, 128], ...], msgspec.Meta(min_length=1)] = BLOCKS
    awq: bool = True
    vocabulary: Literal["int4", "int8"] = "int8"
    timed = True
    table = "int8"

    def watch(self, component: Component, model: ir.Model) -> Watched:
        """Name what the Linears read."""
        if not component.state:
            return ENCODERS.watch(component, model)
        return Watched(tuple(dict.fromkeys(str(linear.x.name) for linear in linears(model))))

    def rewrite(
        self,
        component: Component,
        model: ir.Model,
        stats: Mapping[str, Stats],
        keep: Mapping[str, str] = {},
    ) -> list[KeptLayer]:
        """Round every Linear; see `Scheme.rewrite`."""
        if not component.state:
            return ENCODERS.rewrite(component, model, stats, keep)
        stats = dict(stats) if self.awq else {}
        chosen = [linear for linear in linears(model) if keep.get(linear.name) != FLOAT]
        finer = self._finer(model) | {n for n, to in keep.items() if to == "int8"}
        for group in groups(chosen):
            name = str(group.x.name)
            form = self._form(group.linears[0], finer)
            if name in stats and isinstance(form, Int4Blocks):
                scale = smooth(group, stats[name], form, None)
                if scale is not None:
                    stats |= group.divided(stats, scale)
        for linear in chosen:
            shrink(model.graph, linear, self._form(linear, finer), importance(stats, linear))
        model.opset_imports[""] = max(model.opset_imports[""] or OPSET, OPSET)
        return []

    def harms(
        self, component: Component, model: ir.Model, stats: Mapping[str, Stats]
    ) -> dict[str, LayerError]:
        """Return the error that quantizing each layer alone causes; see `Scheme.harms`."""
        if not component.state:
            return ENCODERS.harms(component, model, stats)
        finer = self._finer(model)
        return {
            linear.name: layer_error(linear, stats, self._form(linear, finer), None)
            for linear in linears(model)
        }

    def _form(self, linear: Linear, finer: set[str]) -> Format:
        """Choose a weight's numbers; rows that no block divides are int8."""
        if linear.name in finer:
            return Int8Columns()
        for block in self.blocks:
            if linear.shape[0] % block == 0:
                return Int4Blocks(block)
        return Int8Columns()

    def _finer(self, model: ir.Model) -> set[str]:
        """Name the weight that gives the logits, unless it is like the others."""
        if self.vocabulary == "int4":
            return set()
        outputs = {value.name for value in model.graph.outputs}
        return {linear.name for linear in linears(model) if linear.node.outputs[0].name in outputs}


SCHEME = Int4()
