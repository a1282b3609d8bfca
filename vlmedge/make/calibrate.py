"""Collect the statistics that a scheme needs from a float model, one component at a time.

A component runs with its watched tensors as further outputs. Pictures are read when they are
needed and what one component gives the next lies on disk, so memory does not grow with the number
of pictures. The weights of a large component are rounded to 8 bits for this, which hardly moves
the activations, so that it fits where its float weights would not. A decoder that would still not
fit runs in pieces, each over all prompts before the next one is opened; it writes nothing then.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from vlmedge.arrays import Array
from vlmedge.bundle import ENGINES as ENGINE_CACHE
from vlmedge.bundle import Bundle
from vlmedge.graphs.pieces import cut
from vlmedge.graphs.portable import onnx_ir, save_graph, weights_bytes
from vlmedge.make.calibration_graph import ROW_STEP, _constant, _figures
from vlmedge.make.calibration_stats import ROWS, _no_past, _Recorder, _Stored, _Tally
from vlmedge.parity.feeds import Feeds, prefill
from vlmedge.progress import Progress
from vlmedge.run.decode import loop
from vlmedge.run.decode.prompt import Prompt
from vlmedge.run.tasks.context import TaskContext
from vlmedge.run.tasks.trial import Samples
from vlmedge.shelves.contracts import Engine, Graph, Scheme, Stats, Watched
from vlmedge.spec import Component, Generation, TensorSpec
from vlmedge.units import GIB

if TYPE_CHECKING:
    import onnx_ir as ir

SCRATCH = ".calibration"
NEW_TOKENS = 8  # that a decoder writes for each picture
TRIALS = 30
TRIAL_S = 1.0  # no component is timed for longer, once it ran twice
LARGE_BYTES = GIB  # of float weights: above it they are rounded for calibration
HUGE_BYTES = 16 * GIB  # of a decoder's: above it, it runs in pieces
PIECE_BYTES = GIB // 2  # of float weights in each
PROMPT_TOKENS = 2 * ROWS * ROW_STEP  # that go through pieces: twice what ROWS are kept of


class Calibration:
    """One walk over all components of a bundle."""

    def __init__(
        self, bundle: Bundle, engine: Engine, light: Scheme, samples: Samples, progress: Progress
    ) -> None:
        """Prepare the inputs of the first components.

        Args:
            bundle: Holds the assets; its folder may be written.
            engine: Runs the graphs.
            light: Makes large components small enough to run, by their weights alone.
            samples: The samples to run through the graphs.
            progress: Watches.
        """
        self._bundle, self._engine, self._light = bundle, engine, light
        self._progress = progress
        self._scratch = bundle.path / SCRATCH
        self._scratch.mkdir()
        read = () if samples.captions is None else samples.captions
        images = (*samples.images, *samples.singles)
        self._feeds = Feeds(TaskContext(bundle, {}), replace(samples, images=images, said=read))

    def observe(self, component: Component, model: ir.Model, wanted: Watched) -> dict[str, Stats]:
        """Run one component over all samples; its outputs become inputs of the next ones.

        Args:
            component: Its spec.
            model: The float graph; it stays as it is.
            wanted: The tensors to watch.
        """
        ready = self._feeds.prepare(component)
        if not ready and not (component.state and wanted.names):
            return {}
        if not ready and weights_bytes(model) > HUGE_BYTES:
            return self._observe_pieces(component, model, wanted)
        proxy = model.clone()
        if weights_bytes(model) > LARGE_BYTES:
            self._light.rewrite(component, proxy, {})
        watched = self._write(component, proxy, wanted)
        tally = _Tally(wanted)
        with self._opened(watched) as graph:
            if ready:
                self._run(component, graph, tally)
            else:
                self._decode(component, graph, tally)
        return tally.stats()

    def race(
        self, bundle: Bundle, component: Component, model: ir.Model
    ) -> tuple[float, float] | None:
        """Time a component in float and as the bundle stores it, in turns, on one picture.

        Both are open at once: one after the other, the machine's mood would decide between them,
        and to open each anew for its turn takes longer than the turns. Only components below
        LARGE_BYTES get here, and a session keeps no more than its largest run took.

        Returns:
            Milliseconds in float and in the bundle, or none for a component that never ran.
        """
        floats = self._write(component, model.clone(), Watched())
        small = self._engine.open(bundle, component.name)
        try:
            with self._opened(floats) as graph:
                runs = [self._trial(component, g) for g in (graph, small)]
                return None if runs[0] is None or runs[1] is None else in_turns(runs[0], runs[1])
        finally:
            small.close()
            shutil.rmtree(bundle.path / ENGINE_CACHE, ignore_errors=True)

    def _trial(self, component: Component, graph: Graph) -> Callable[[], object] | None:
        if self._feeds.prepare(component):
            feeds = self._feeds.feed(component, 0)
            return lambda: graph.run(feeds)
        if component.state:
            return lambda: self._write_about(component, graph, 0)
        return None

    def close(self) -> None:
        """Remove the files that were written."""
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _run(self, component: Component, graph: Graph, tally: _Tally) -> None:
        """Feed a stateless component from the pool."""
        stores = {
            spec.name: _Stored(self._scratch / f"{spec.name}.rows") for spec in component.outputs
        }
        count = self._feeds.count(component)
        with self._progress.step(f"calibrating {component.name}", count) as advance:
            for i in range(count):
                out = graph.run(self._feeds.feed(component, i))
                tally.add(out)
                for name, store in stores.items():
                    store.append(out[name])
                advance(1)
        self._feeds.add(stores)

    def _decode(self, component: Component, graph: Graph, tally: _Tally) -> None:
        """Let a decoder write about every picture."""
        count = len(self._feeds.samples.images)
        recorder = _Recorder(graph, tally)
        with self._progress.step(f"calibrating {component.name}", count) as advance:
            for i in range(count):
                self._write_about(component, recorder, i)
                advance(1)

    def _observe_pieces(
        self, component: Component, model: ir.Model, wanted: Watched
    ) -> dict[str, Stats]:
        """Run the prompts through a decoder, one piece of it after the other."""
        model = model.clone()
        model.graph.sort()
        prompts = self._prompts(component)
        first = set(wanted.names) & {spec.name for spec in component.inputs}
        stats: dict[str, Stats] = {}
        stored: dict[str, _Stored] = {}
        with self._progress.step(f"calibrating {component.name}", weights_bytes(model)) as advance:
            for piece in cut(component, model, PIECE_BYTES):
                here = Watched(tuple(n for n in wanted.names if n in piece.made | first))
                if not (here.names or piece.component.outputs):  # behind all that is watched
                    break
                tally = _Tally(here)
                watched = self._write(piece.component, piece.model, here)
                gives = {
                    spec.name: _Stored(self._scratch / f"{len(stored) + i}.rows")
                    for i, spec in enumerate(piece.component.outputs)
                }
                with self._opened(watched) as graph:
                    for i, feed in enumerate(prompts):
                        takes = (spec.name for spec in piece.component.inputs)
                        out = graph.run(
                            {n: feed[n] if n in feed else stored[n].at(i) for n in takes}
                        )
                        tally.add(out)
                        for name, store in gives.items():
                            store.append(out[name])
                stored |= gives
                stats |= tally.stats()
                first = set()
                advance(weights_bytes(piece.model))
        return stats

    def _prompts(self, component: Component) -> list[dict[str, Array]]:
        """Make a decoder's prompts about the first pictures, up to PROMPT_TOKENS."""
        found: list[dict[str, Array]] = []
        tokens = 0
        for i in range(len(self._feeds.samples.images)):
            prompt = self._prompt(component, i)
            found.append({**prefill(component, prompt), **_no_past(component)})
            tokens += prompt.tokens
            if tokens >= PROMPT_TOKENS:
                break
        return found

    def _write_about(self, component: Component, graph: Graph, i: int) -> None:
        """Write a few tokens about picture i."""
        prompt = self._prompt(component, i)
        loop.generate(graph, self._feeds.context.embed, prompt, self._options())

    def _prompt(self, component: Component, i: int) -> Prompt:
        prompt = self._feeds.prompt(component, i, self._options())
        assert prompt is not None  # all components before it were observed
        return prompt

    def _options(self) -> Generation:
        options = self._bundle.spec.generation
        assert options is not None
        return msgspec.structs.replace(options, max_tokens=NEW_TOKENS, num_beams=1, do_sample=False)

    @contextmanager
    def _opened(self, bundle: Bundle) -> Iterator[Graph]:
        name = bundle.spec.components[0].name
        graph = self._engine.open(bundle, name)
        try:
            yield graph
        finally:
            graph.close()
            bundle.graph_file(name).unlink()
            bundle.graph_file(name).with_suffix(".bin").unlink(missing_ok=True)
            shutil.rmtree(self._scratch / ENGINE_CACHE, ignore_errors=True)

    def _write(self, component: Component, model: ir.Model, wanted: Watched) -> Bundle:
        """Write a component with its watched tensors' statistics as further outputs.

        x -> ReduceL2      x -> Size      x -> Reshape -> Slice
                                       x -> Reshape -> Abs -> ReduceMax
        """
        onnx_ir()
        import onnx_ir as ir

        graph = model.graph
        values = {str(v.name): v for node in graph for v in node.outputs}
        values |= {str(v.name): v for v in graph.inputs}
        outputs: list[TensorSpec] = []
        if wanted.names and wanted.rows:
            numbers = {"from": 0, "to": 2**40, "axis": 0, "step": ROW_STEP}
            for name, number in numbers.items():
                _constant(graph, f".calibration.{name}", [number])
        for name in wanted.names:
            for node, spec in _figures(ir, graph, values[name], wanted.rows):
                graph.append(node)
                if spec is not None:
                    value = node.outputs[0]
                    value.name = spec.name
                    graph.outputs.append(value)
                    outputs.append(spec)
        graph.sort()
        watched = msgspec.structs.replace(component, outputs=(*component.outputs, *outputs))
        save_graph(model, self._scratch, component.name)
        manifest = msgspec.structs.replace(
            self._bundle.manifest,
            spec=msgspec.structs.replace(self._bundle.spec, components=(watched,)),
        )
        return Bundle(self._scratch, manifest)


def in_turns(first: Callable[[], object], second: Callable[[], object]) -> tuple[float, float]:
    """Return the least milliseconds of two functions, run in turns: load slows both."""
    best = [math.inf, math.inf]
    first(), second()
    began = time.perf_counter()
    for trial in range(TRIALS):
        for i, run in enumerate((first, second)):
            start = time.perf_counter()
            run()
            best[i] = min(best[i], 1000 * (time.perf_counter() - start))
        if trial and time.perf_counter() - began > TRIAL_S:
            break
    return best[0], best[1]
