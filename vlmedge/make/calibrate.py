"""Watch a float model at work: the statistics that a scheme wants, one component at a time.

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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from vlmedge.arrays import Array
from vlmedge.bundle import ENGINES as ENGINE_CACHE
from vlmedge.bundle import Bundle
from vlmedge.errors import InputError
from vlmedge.graphs.pieces import cut
from vlmedge.graphs.portable import onnx_ir, save_graph, weights_bytes
from vlmedge.make.calibration_graph import ROW_STEP, _constant, _figures
from vlmedge.make.calibration_stats import (
    ROWS,
    _Made,
    _no_past,
    _Recorder,
    _row,
    _Rows,
    _Stored,
    _Tally,
)
from vlmedge.parity.samples import Samples, codes_for, texts_for
from vlmedge.progress import Progress
from vlmedge.run.decode import loop
from vlmedge.run.decode import prompt as prompts
from vlmedge.run.decode.prompt import Prompt
from vlmedge.run.inputs.image import Grid
from vlmedge.run.inputs.image_files import ImageSource
from vlmedge.run.tasks import encode as encoding
from vlmedge.run.tasks import paint as painting
from vlmedge.run.tasks import prompt as prompting
from vlmedge.run.tasks.context import TaskContext
from vlmedge.shelves.contracts import Engine, Graph, Scheme, Stats, Wanted
from vlmedge.spec import Component, GenerateTask, Generation, MatchTask, TensorSpec, wiring

if TYPE_CHECKING:
    import onnx_ir as ir

SCRATCH = ".calibration"
NEW_TOKENS = 8  # that a decoder writes for each picture
TRIALS = 30
TRIAL_S = 1.0  # no component is timed for longer, once it ran twice
LARGE_BYTES = 2**30  # of float weights: above it they are rounded for calibration
HUGE_BYTES = 16 * 2**30  # of a decoder's: above it, it runs in pieces
PIECE_BYTES = 2**29  # of float weights in each
PROMPT_TOKENS = 2 * ROWS * ROW_STEP  # that go through pieces: twice what ROWS are kept of


class Calibration:
    """The pictures, and what the components so far made of them."""

    def __init__(
        self, bundle: Bundle, engine: Engine, light: Scheme, samples: Samples, progress: Progress
    ) -> None:
        """Prepare the inputs of the first components.

        Args:
            bundle: Holds the assets; its folder may be written.
            engine: Runs the graphs.
            light: Makes large components small enough to run, by their weights alone.
            samples: What runs through them.
            progress: Watches.
        """
        self._bundle, self._engine, self._light = bundle, engine, light
        self._samples, self._progress = samples, progress
        self._context = TaskContext(bundle, {})
        self._scratch = bundle.path / SCRATCH
        self._scratch.mkdir()
        self._pool: dict[str, _Rows] = {}
        images = (*samples.images, *samples.singles)
        if bundle.spec.image is not None or bundle.spec.video is not None:
            self._pool["pixel_values"] = _Made(
                len(images), lambda i: _pixels(self._context, images[i])
            )
        if any(spec.name == "input_ids" for c in bundle.spec.components for spec in c.inputs):
            ids, mask = self._context.tokenizer.encode(self._texts())
            self._add({"input_ids": ids, "attention_mask": mask})
        if bundle.spec.instruction is not None:
            self._instruct(len(images))
        self._add(codes_for(bundle.spec, len(images)))
        # every input of one row is asked for before the next row's
        trial = lru_cache(maxsize=1)(partial(painting.trial, self._context, images))

        def feed(name: str, i: int) -> Array:
            return trial(i)[name]

        for task in painting.painting_tasks(self._context)[:1]:
            for spec in bundle.spec.component(task.paint[0]).inputs:
                self._pool[spec.name] = _Made(len(images), partial(feed, spec.name))

    def observe(self, component: Component, model: ir.Model, wanted: Wanted) -> dict[str, Stats]:
        """Run one component over all samples; its outputs become inputs of the next ones.

        Args:
            component: Its spec.
            model: The float graph; it stays as it is.
            wanted: What to watch.
        """
        self._soften(component)
        ready = all(spec.name in self._pool for spec in component.inputs)
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
        """Time a component in float and as the bundle has it, in turns, on one picture.

        Both are open at once: one after the other, the machine's mood would decide between them,
        and to open each anew for its turn takes longer than the turns. Only components below
        LARGE_BYTES get here, and a session keeps no more than its largest run took.

        Returns:
            Milliseconds in float and in the bundle, or none for a component that never ran.
        """
        floats = self._write(component, model.clone(), Wanted())
        small = self._engine.open(bundle, component.name)
        try:
            with self._opened(floats) as graph:
                runs = [self._trial(component, g) for g in (graph, small)]
                return None if runs[0] is None or runs[1] is None else in_turns(runs[0], runs[1])
        finally:
            small.close()
            shutil.rmtree(bundle.path / ENGINE_CACHE, ignore_errors=True)

    def _trial(self, component: Component, graph: Graph) -> Callable[[], object] | None:
        if all(spec.name in self._pool for spec in component.inputs):
            feeds = {spec.name: self._pool[spec.name].at(0) for spec in component.inputs}
            return lambda: graph.run(feeds)
        if component.state:
            return lambda: self._write_about(component, graph, 0)
        return None

    def close(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _texts(self) -> list[str]:
        matched = any(isinstance(task, MatchTask) for task in self._bundle.spec.tasks.values())
        if matched and self._samples.captions is not None:
            return list(self._samples.captions)
        return texts_for(self._bundle.spec, self._samples)

    def _add(self, tensors: Mapping[str, Array]) -> None:
        """Put whole tensors into the pool, to be taken row by row."""
        for name, array in tensors.items():
            self._pool[name] = _Made(len(array), partial(_row, array))

    def _soften(self, component: Component) -> None:
        """Make what a reader of soft prompts takes: the embeddings of pictures and texts."""
        names = {spec.name for spec in component.inputs}
        if component.state or "inputs_embeds" not in names or "inputs_embeds" in self._pool:
            return
        tasks = [t for t in self._bundle.spec.tasks.values() if isinstance(t, GenerateTask)]
        task = next(task for task in reversed(tasks) if component.name in task.read)
        rows = range(len(self._pool[task.soft_prompt]))
        soft = [list(self._pool[task.soft_prompt].at(i)) for i in rows]
        texts = [prompting.fill(task, self._said(task, i)) for i in rows]
        self._add(prompting.sources(self._context, task, soft, texts))

    def _instruct(self, count: int) -> None:
        """Make what reads a text before the language model does: a question about each picture."""
        tasks = [t for t in self._bundle.spec.tasks.values() if isinstance(t, GenerateTask)]
        task = next(task for task in reversed(tasks) if task.instruct)
        texts = [prompting.fill(task, self._said(task, i)) for i in range(count)]
        ids, mask = self._context.instruction_tokenizer.encode(texts)
        self._add({"qformer_input_ids": ids, "qformer_attention_mask": mask})

    def _run(self, component: Component, graph: Graph, tally: _Tally) -> None:
        """Feed a stateless component from the pool."""
        names = [spec.name for spec in component.inputs]
        stores = {
            spec.name: _Stored(self._scratch / f"{spec.name}.rows") for spec in component.outputs
        }
        count = min(len(self._pool[name]) for name in names)
        with self._progress.step(f"calibrating {component.name}", count) as advance:
            for i in range(count):
                out = graph.run({name: self._pool[name].at(i) for name in names})
                tally.add(out)
                for name, store in stores.items():
                    store.append(out[name])
                advance(1)
        self._pool |= stores

    def _decode(self, component: Component, graph: Graph, tally: _Tally) -> None:
        """Let a decoder write about every picture."""
        count = len(self._pool["pixel_values"])
        recorder = _Recorder(graph, tally)
        with self._progress.step(f"calibrating {component.name}", count) as advance:
            for i in range(count):
                self._write_about(component, recorder, i)
                advance(1)

    def _observe_pieces(
        self, component: Component, model: ir.Model, wanted: Wanted
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
                here = Wanted(tuple(n for n in wanted.names if n in piece.made | first))
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
        """Make what a decoder reads about the first pictures, until it is PROMPT_TOKENS."""
        found: list[dict[str, Array]] = []
        tokens = 0
        for i in range(len(self._pool["pixel_values"])):
            _, prompt = self._asked(component, self._context, i)
            mask, length = prompt.attention_mask, prompt.embeds.shape[1]
            given = prompts.feeds(component, prompt.embeds, mask, length, prompt.media_index)
            found.append({**given, **prompt.held, **_no_past(component)})
            tokens += length
            if tokens >= PROMPT_TOKENS:
                break
        return found

    def _write_about(self, component: Component, graph: Graph, i: int) -> None:
        """Write a few tokens about picture i."""
        context = TaskContext(self._bundle, {component.name: graph})
        options, prompt = self._asked(component, context, i)
        loop.generate(graph, context.embed, prompt, options)

    def _asked(
        self, component: Component, context: TaskContext, i: int
    ) -> tuple[Generation, Prompt]:
        """Make the prompt about picture i, and say how much is written about it."""
        options = self._bundle.spec.generation
        assert options is not None
        options = msgspec.structs.replace(
            options, max_tokens=NEW_TOKENS, num_beams=1, do_sample=False
        )
        tasks = [
            task
            for task in self._bundle.spec.tasks.values()
            if isinstance(task, GenerateTask) and task.decoder == component.name
        ]
        task = encoding.settled(tasks[i % len(tasks)])
        images = (*self._samples.images, *self._samples.singles)
        grids = self._context.pictures([images[i]]).grids
        found = self._pool[task.soft_prompt].at(i)
        soft = [encoding.flat(found)]
        if task.source == "image":
            soft = encoding.rows(found, grids)
        else:
            grids = (Grid(),)  # a video of one frame
        text = prompting.fill(task, self._said(task, i), grids)
        held = self._held(component, i) if task.read else None
        return options, prompting.make_prompt(context, task, soft, [text], options, held)

    def _held(self, component: Component, i: int) -> dict[str, Array]:
        """Take what a decoder is fed throughout out of what the components before it gave."""
        found = {}
        for name in wiring.held(component):
            rows = self._pool["attention_mask" if name == "encoder_attention_mask" else name]
            found[name] = rows.at(i % len(rows))
        return found

    def _said(self, task: GenerateTask, i: int) -> str:
        """Choose what a decoder reads: a question, or a caption where one was given."""
        samples = self._samples
        if "{question}" in task.prompt:
            return samples.questions[i % len(samples.questions)]
        known = samples.captions
        return known[i] if known is not None and i < len(known) else ""

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

    def _write(self, component: Component, model: ir.Model, wanted: Wanted) -> Bundle:
        """Write a component with its watched tensors' figures as further outputs.

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


def _pixels(context: TaskContext, image: ImageSource) -> Array:
    """Make the pixel_values of one picture; an error names its file."""
    try:
        return context.pixels([image])
    except InputError as error:
        name = str(image) if isinstance(image, Path) else ""
        raise error if name in str(error) else InputError(f"{name}: {error}") from None


def in_turns(first: Callable[[], object], second: Callable[[], object]) -> tuple[float, float]:
    """Return the least milliseconds of each of two works; a busy machine is busy for both."""
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
