"""Write a bundle's graphs by a recipe: calibrate, quantize, time, and restore bits as needed."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from vlmedge.bundle import Bundle, graph_path
from vlmedge.bundle.embedding_table import TABLE
from vlmedge.errors import BundleError, InputError
from vlmedge.graphs.portable import save_graph, weights_bytes
from vlmedge.graphs.shared_weights import borrows, common, store_once
from vlmedge.make.calibrate import LARGE_BYTES, Calibration
from vlmedge.make.recipe import Recipe
from vlmedge.progress import Progress
from vlmedge.run.tasks.trial import Samples
from vlmedge.shelves.contracts import LayerError, Stats
from vlmedge.shelves.registry import ENGINES, SCHEMES
from vlmedge.spec import Component
from vlmedge.spec.manifest import FLOAT, KeptLayer, Parity
from vlmedge.units import MIB

if TYPE_CHECKING:
    import onnx_ir as ir

REPORT = "reports/quantize.json"
SLOWER = 1.1  # times: below it is the clock's own noise
SLOWER_MS = 0.05

# What a layer of so many bits becomes when they are too few, and its bytes a weight.
FINER = {4: ("int8", 1.0), 8: (FLOAT, 4.0), 16: (FLOAT, 4.0)}

GateRun = Callable[[Bundle], Parity]


@dataclass
class _Part:
    """One component while it is quantized.

    Attributes:
        component: Its spec.
        model: The float graph, weights unread; it stays as it is.
        stats: Statistics from calibration, where layers are ranked.
        harms: Error that quantizing each layer causes, where layers are ranked.
        keep: Layers that get more bits than the scheme's.
        kept: Layers that differ from the scheme's choice, and why.
        timing: Milliseconds before and after.
        float_only: Whether it stays float, since it was slower when quantized.
    """

    component: Component
    model: ir.Model
    stats: dict[str, Stats] = field(default_factory=dict)
    harms: dict[str, LayerError] = field(default_factory=dict)
    keep: dict[str, str] = field(default_factory=dict)
    kept: list[KeptLayer] = field(default_factory=list)
    timing: dict[str, float] = field(default_factory=dict)
    float_only: bool = False


class MixedPrecision:
    """One bundle being written by one recipe."""

    def __init__(
        self, bundle: Bundle, recipe: Recipe, samples: Samples, progress: Progress
    ) -> None:
        """Prepare the folder.

        Args:
            bundle: Its folder holds the assets and gets the graphs.
            recipe: How to quantize.
            samples: Samples to calibrate with.
            progress: Watches.
        """
        self._bundle, self._recipe, self._progress = bundle, recipe, progress
        self._scheme = recipe.chosen()
        self._calibration = Calibration(bundle, ENGINES["ort"], SCHEMES["int8"], samples, progress)
        self._parts: list[_Part] = []
        self._layers = [TABLE] if bundle.manifest.embeddings is not None else []

    def add(self, component: Component, model: ir.Model) -> None:
        """Calibrate a component and write it quantized, unless it is faster in float."""
        wanted = self._scheme.watch(component, model)
        stats = self._calibration.observe(component, model, wanted)
        part = _Part(component, model)
        if self._recipe.mixes:  # its layers may be written again
            part.stats = stats
            with self._progress.step(f"ranking {component.name}"):
                part.harms = self._scheme.harms(component, model, stats)
        weights = model.graph.initializers.values()
        layers = [str(v.name) for v in weights if len(v.shape or ()) == 2]
        self._layers += layers
        part.keep = self._recipe.kept(layers)
        self._write(part, stats)
        if self._scheme.timed and not self._recipe.keep_slower:
            self._compare_speed(part)
        self._parts.append(part)

    def refuse_idle_patterns(self) -> None:
        """Refuse a pattern that matches no layer of any component: it has a typing error."""
        for pattern in self._recipe.keep:
            if not any(fnmatch.fnmatchcase(layer, pattern) for layer in self._layers):
                some = ", ".join(self._layers[:: max(1, len(self._layers) // 3)][:3])
                raise InputError(f"keep {pattern!r} matches no layer: layers are named like {some}")

    def finish(self) -> None:
        """Remove calibration's files, and write the report."""
        self._calibration.close()
        report = self._bundle.path / REPORT
        report.parent.mkdir(exist_ok=True)
        report.write_text(json.dumps(self._report(), indent=2) + "\n")

    @property
    def kept(self) -> list[KeptLayer]:
        """Layers that differ from the scheme's choice, and why."""
        return [layer for part in self._parts for layer in part.kept]

    def to_budget(self, budget_mib: float) -> None:
        """Give layers more bits, the largest error for its size first, while all graphs fit.

        Raises:
            BundleError: The scheme alone is larger than the budget.
        """
        store_once(self._bundle.path, self._names())
        have = self._graphs_mib()
        if have > budget_mib:
            raise BundleError(
                f"budget_mib is {budget_mib:g}, and the smallest mix of "
                f"{self._recipe.scheme} takes {have:.1f} MiB: give at least that"
            )
        for part, layer, cost_mib in self._ranked(by_size=True):
            if have + cost_mib <= budget_mib:
                have += cost_mib
                _give_back(part, layer)
        self._rewrite()

    def to_target(self, target: float, gate: GateRun, seal: Callable[[], Bundle]) -> Parity:
        """Give layers more bits, the largest error first, until the gate passes.

        Args:
            target: The largest drop; see `Recipe.target_drop`.
            gate: Compares a bundle with PyTorch.
            seal: Makes a bundle of the folder as it is.

        Returns:
            What the gate found last, passed or not.
        """
        ranked = self._ranked(by_size=False)
        step = 1
        while True:
            parity = gate(seal())
            lost = drop(parity)
            passed = lost <= target and all(result.passed for result in parity.components)
            self._progress.note(f"drop {lost:.2f} (target {target:g}): {self._given()} layers back")
            if passed or not ranked:
                return parity
            for part, layer, _ in ranked[:step]:
                _give_back(part, layer)
            del ranked[:step]
            step *= 2
            self._rewrite()

    def _ranked(self, *, by_size: bool) -> list[tuple[_Part, str, float]]:
        """List (part, layer, MiB that more bits cost at most), the most worth it first.

        A layer that another graph holds too may stay as it is there, beside its finer form here.
        """
        found = []
        shared = common(self._bundle.path, self._names())
        for part in self._parts:
            if part.float_only:
                continue
            stay = {name.rpartition(".")[0] for name in shared[part.component.name]}
            for layer, measured in part.harms.items():
                if layer in part.keep:
                    continue
                tensor = part.model.graph.initializers[layer].const_value
                assert tensor is not None
                freed = 0.0 if layer in stay else measured.bits / 8
                cost_mib = tensor.size * (FINER[measured.bits][1] - freed) / MIB
                worth = measured.error / cost_mib if by_size else measured.error
                found.append((worth, part, layer, cost_mib))
        found.sort(key=lambda entry: -entry[0])
        return [(part, layer, cost_mib) for _, part, layer, cost_mib in found]

    def _given(self) -> int:
        return sum(len(part.keep) for part in self._parts)

    def _rewrite(self) -> None:
        """Write the components again whose layers changed, and those that point into these."""
        for part in self._parts:
            changed = part.keep and not part.float_only
            if changed or borrows(self._bundle.path, part.component.name):
                self._write(part, part.stats)

    def _write(self, part: _Part, stats: dict[str, Stats]) -> None:
        """Quantize one component, unless it stays in float, and write it."""
        model = part.model.clone()
        name = part.component.name
        if part.float_only:
            write_graph(model, self._bundle.path, name, self._progress)
            return
        part.kept = self._scheme.rewrite(part.component, model, stats, part.keep)
        for layer, precision in part.keep.items():
            known = part.harms.get(layer)
            measured = "" if known is None else f": alone it costs {known.error:.2%}"
            part.kept.append(KeptLayer(name, layer, f"{precision} instead{measured}"))
        write_graph(model, self._bundle.path, name, self._progress)

    def _compare_speed(self, part: _Part) -> None:
        """Time a component quantized and in float; the faster one stays."""
        name = part.component.name
        if weights_bytes(part.model) > LARGE_BYTES:  # its float form may not even fit this machine
            return
        with self._progress.step(f"timing {name}"):
            times = self._calibration.race(self._bundle, part.component, part.model)
        if times is None:
            return
        before, after = times
        part.timing = {"float32_ms": round(before, 3), f"{self._recipe.scheme}_ms": round(after, 3)}
        if after < before * SLOWER or after < before + SLOWER_MS:
            return
        part.float_only = True
        reason = f"{after / before:.1f} times slower here: {after:.2f} ms, {before:.2f} in float32"
        part.kept = [KeptLayer(name, "every layer", reason)]
        self._write(part, {})

    def _names(self) -> list[str]:
        return [part.component.name for part in self._parts]

    def _graphs_mib(self) -> float:
        files = (self._bundle.path / "graphs").iterdir()
        return sum(file.stat().st_size for file in files) / MIB

    def _report(self) -> dict[str, object]:
        return {
            "recipe": msgspec.to_builtins(self._recipe),
            "components": {
                part.component.name: {
                    **part.timing,
                    "kept": [msgspec.to_builtins(layer) for layer in part.kept],
                    "harms": {name: round(one.error, 5) for name, one in part.harms.items()},
                }
                for part in self._parts
            },
        }


def _give_back(part: _Part, layer: str) -> None:
    """Give a layer the next larger number of bits."""
    part.keep[layer] = FINER[part.harms[layer].bits][0]


def drop(parity: Parity) -> float:
    """Return the largest loss of any task; see `Recipe.target_drop`."""
    points = [
        100 * (task.reference_accuracy - task.accuracy)
        for task in parity.tasks
        if task.accuracy is not None and task.reference_accuracy is not None
    ]
    if points:
        return max(points)
    nats = [result.kl for result in parity.components if result.kl is not None]
    return 100 * max(nats) if nats else 0.0


def write_graph(model: ir.Model, folder: Path, component: str, progress: Progress) -> None:
    """Write a component, with a bar of its bytes, and have onnx check it."""
    done = 0
    with progress.step(f"writing {component}", weights_bytes(model)) as advance:

        def wrote(bytes_written: int, bytes_total: int) -> None:
            nonlocal done
            advance(bytes_written - done)
            done = bytes_written

        save_graph(model, folder, component, wrote)
    _check_graph(folder, component)


def _check_graph(folder: Path, component: str) -> None:
    """Level 0: onnx's own checker reads the file by path, so weights of any size stay on disk."""
    import onnx

    try:
        onnx.checker.check_model(str(folder / graph_path(component)))
    except onnx.checker.ValidationError as error:
        raise BundleError(f"{component}: the graph is not valid ONNX: {error}") from None
