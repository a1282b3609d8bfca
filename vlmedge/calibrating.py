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
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from vlmedge.arrays import Array, Arrays
from vlmedge.bundle import ENGINES as ENGINE_CACHE
from vlmedge.bundle import Bundle
from vlmedge.errors import InputError
from vlmedge.graphs.pieces import cut
from vlmedge.graphs.portable import onnx_ir, save_graph, weights_bytes
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
ROWS = 192  # of each watched tensor that are kept: enough to compare roundings
ROW_STEP = 7  # every 7th row of each picture is a candidate
NEW_TOKENS = 8  # that a decoder writes for each picture
TRIALS = 30
TRIAL_S = 1.0  # no component is timed for longer, once it ran twice
LARGE_BYTES = 2**30  # of float weights: above it they are rounded for calibration
HUGE_BYTES = 16 * 2**30  # of a decoder's: above it, it runs in pieces
PIECE_BYTES = 2**29  # of float weights in each
PROMPT_TOKENS = 2 * ROWS * ROW_STEP  # that go through pieces: twice what ROWS are kept of

_AMAX, _LENGTH, _SIZE, _CHANNELS, _SOME = (
    f".calibration.{name}" for name in ("amax", "length", "size", "channels", "rows")
)


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


def _figures(
    ir: Any, graph: ir.Graph, x: ir.Value, rows: bool
) -> Iterator[tuple[ir.Node, TensorSpec | None]]:
    """Make the nodes that compute one tensor's figures, and say which are outputs."""
    name = str(x.name)

    def typed(node: ir.Node, kind: Any, rank: int | None) -> ir.Node:
        value = node.outputs[0]
        value.type = ir.TensorType(kind)
        value.shape = None if rank is None else ir.Shape([None] * rank)
        return node

    scalar = [ir.AttrInt64("keepdims", 0)]
    if not rows:
        magnitude = typed(ir.Node("", "Abs", [x]), ir.DataType.FLOAT, None)
        yield magnitude, None
        amax = ir.Node("", "ReduceMax", [magnitude.outputs[0]], scalar)
        yield typed(amax, ir.DataType.FLOAT, 0), TensorSpec(name + _AMAX, "float32", ())
        return
    length = typed(ir.Node("", "ReduceL2", [x], scalar), ir.DataType.FLOAT, 0)
    yield length, TensorSpec(name + _LENGTH, "float32", ())
    size = typed(ir.Node("", "Size", [x]), ir.DataType.INT64, 0)
    yield size, TensorSpec(name + _SIZE, "int64", ())
    constants = {n: graph.initializers[f".calibration.{n}"] for n in ("from", "to", "axis", "step")}
    assert x.shape is not None
    width = int(str(x.shape[-1]))
    flat_shape = _constant(graph, f"{name}.calibration.shape", [-1, width])
    flat = typed(ir.Node("", "Reshape", [x, flat_shape]), ir.DataType.FLOAT, 2)
    yield flat, None
    some = typed(ir.Node("", "Slice", [flat.outputs[0], *constants.values()]), ir.DataType.FLOAT, 2)
    yield some, TensorSpec(name + _SOME, "float32", (f"{name}.rows", width))
    upright = typed(ir.Node("", "Abs", [flat.outputs[0]]), ir.DataType.FLOAT, 2)
    yield upright, None
    channels = typed(
        ir.Node("", "ReduceMax", [upright.outputs[0], constants["axis"]], scalar),
        ir.DataType.FLOAT,
        1,
    )
    yield channels, TensorSpec(name + _CHANNELS, "float32", (width,))


def _constant(graph: ir.Graph, name: str, numbers: list[int]) -> ir.Value:
    """Add an int64 constant to a graph."""
    import onnx_ir as ir

    tensor = ir.tensor(np.array(numbers, np.int64), name=name)
    value = ir.Value(name=name, const_value=tensor)
    value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape([len(numbers)])
    graph.register_initializer(value)
    return value


class _Tally:
    """The statistics so far."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._amax = dict.fromkeys(wanted.names, 0.0)
        self._squares = dict.fromkeys(wanted.names, 0.0)
        self._sizes = dict.fromkeys(wanted.names, 0)
        self._channels: dict[str, NDArray[np.float32]] = {}
        self._rows: dict[str, list[NDArray[np.float16]]] = {name: [] for name in wanted.names}
        self._seen = dict.fromkeys(wanted.names, 0)
        self._rng = np.random.default_rng(0)

    def add(self, out: Arrays) -> None:
        """Add the figures of one run."""
        for name in self._wanted.names:
            if not self._wanted.rows:
                self._amax[name] = max(self._amax[name], float(out[name + _AMAX]))
                continue
            self._squares[name] += float(out[name + _LENGTH]) ** 2
            self._sizes[name] += int(out[name + _SIZE])
            channels = out[name + _CHANNELS]
            known = self._channels.get(name)
            self._channels[name] = channels if known is None else np.maximum(known, channels)
            self._keep(name, out[name + _SOME])

    def _keep(self, name: str, rows: Array) -> None:
        """Keep a fair sample of all rows that came (Vitter 1985, algorithm R)."""
        kept = self._rows[name]
        for row in np.clip(rows, -65504, 65504).astype(np.float16):
            self._seen[name] += 1
            if len(kept) < ROWS:
                kept.append(row)
            elif (place := int(self._rng.integers(self._seen[name]))) < ROWS:
                kept[place] = row

    def stats(self) -> dict[str, Stats]:
        """Return what was found."""
        if not self._wanted.rows:
            return {name: Stats(amax, 0.0) for name, amax in self._amax.items()}
        return {
            name: Stats(
                float(self._channels[name].max()),
                math.sqrt(self._squares[name] / max(self._sizes[name], 1)),
                self._channels[name],
                np.stack(self._rows[name]),
            )
            for name in self._wanted.names
            if self._rows[name]
        }


class _Recorder:
    """A decoder that tells a tally what it did."""

    def __init__(self, graph: Graph, tally: _Tally) -> None:
        self._graph, self._tally = graph, tally
        self.component = graph.component

    def run(self, feeds: Arrays, *, last: bool = False) -> dict[str, Array]:
        """Run, and add the figures, which are of all tokens whatever is wanted of them."""
        out = self._graph.run(feeds)
        self._tally.add(out)
        return out

    def __getattr__(self, name: str) -> Any:
        """Leave the rest to the graph."""
        return getattr(self._graph, name)


def _no_past(component: Component) -> dict[str, Array]:
    """Make the empty state of one row."""
    sizes = {"batch": 1, "past": 0}
    specs = {spec.name: spec for spec in component.inputs}
    found = {}
    for _, into in component.state:
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in specs[into].shape]
        found[into] = np.zeros(shape, specs[into].dtype)
    return found


def _row(array: Array, i: int) -> Array:
    return array[i : i + 1]


def _pixels(context: TaskContext, image: ImageSource) -> Array:
    """Make the pixel_values of one picture; an error names its file."""
    try:
        return context.pixels([image])
    except InputError as error:
        name = str(image) if isinstance(image, Path) else ""
        raise error if name in str(error) else InputError(f"{name}: {error}") from None


class _Made:
    """Rows that are made when they are asked for."""

    def __init__(self, count: int, make: Callable[[int], Array]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    def at(self, i: int) -> Array:
        """Return row i with a leading axis of 1."""
        return self._make(i)


class _Stored:
    """What each sample gave, in a file: mapped it would count as memory."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._places: list[tuple[int, tuple[int, ...]]] = []  # offset in bytes, shape
        self._end_bytes = 0
        file.write_bytes(b"")

    def __len__(self) -> int:
        return len(self._places)

    def append(self, row: Array) -> None:
        """Add one sample's, with a leading axis: 1, or how many tiles its picture has."""
        self._dtype = row.dtype
        self._places.append((self._end_bytes, row.shape))
        self._end_bytes += row.nbytes
        with self._file.open("ab") as stream:
            stream.write(np.ascontiguousarray(row).data)

    def at(self, i: int) -> Array:
        """Return sample i's as it came."""
        offset, shape = self._places[i]
        return np.fromfile(self._file, self._dtype, math.prod(shape), offset=offset).reshape(shape)


_Rows = _Made | _Stored


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
