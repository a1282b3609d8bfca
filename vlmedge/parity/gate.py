"""The gate: a bundle against PyTorch, component by component and task by task.

One component's torch weights are in memory at a time: each component runs over all samples in
PyTorch, then in the engine, and only its outputs are kept for the next one. An engine's component
is compared on PyTorch's inputs (its own error) and runs again on the engine's (the task's error).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import msgspec
import numpy as np

from vlmedge.arrays import Array, Arrays
from vlmedge.bundle import Bundle
from vlmedge.bundle.embedding_table import TABLE, EmbeddingRows
from vlmedge.parity.feeds import Feeds, cut, prefill, step
from vlmedge.parity.on_device import reported
from vlmedge.parity.tolerances import compare, divergence, judge, worst
from vlmedge.progress import Advance, Progress
from vlmedge.run.decode import loop
from vlmedge.run.decode.prompt import Prompt
from vlmedge.run.tasks.context import IMAGES_PER_BATCH, TaskContext
from vlmedge.run.tasks.trial import Run, Samples, Shown, Writer, trials
from vlmedge.shelves.checked_graph import CheckedGraph
from vlmedge.shelves.contracts import Export, Graph
from vlmedge.shelves.registry import ENGINES
from vlmedge.spec import Component, Generation
from vlmedge.spec.manifest import FLOAT, ComponentParity, Parity, TaskParity

BEAM_SAMPLES = 32
LOGIT_SAMPLES = 8  # whose logits are compared
TABLE_SAMPLES = 1024  # rows of the token embedding table
CLIP_FRAMES = 3

Ids = list[int]
Opener = Callable[[str], Graph]
"""Opens a component by its name."""


def run_gate(
    bundle: Bundle,
    export: Export,
    samples: Samples,
    progress: Progress,
    beam_samples: int = BEAM_SAMPLES,
) -> Parity:
    """Compare, and write reports/parity.json and the manifest.

    Args:
        bundle: The bundle to check; its folder is written.
        export: The checkpoint that it came from.
        samples: Samples to compare on.
        progress: Watches.
        beam_samples: How many of them are captioned with beams too; they cost five times more.
    """
    gate = _Gate(bundle, export, samples, progress, beam_samples)
    components, tasks = gate.run()
    parity = Parity(
        passed=all(r.passed for r in components) and all(r.passed for r in tasks),
        components=tuple(components),
        tasks=tuple(tasks),
    )
    report = {
        "bundle_of": bundle.manifest.checkpoint.id,
        "scheme": bundle.manifest.scheme,
        **msgspec.to_builtins(parity),
        "level4": msgspec.to_builtins(reported(bundle.path)),
    }
    bundle.with_parity(parity, json.dumps(report, indent=2).encode() + b"\n")
    return parity


class _Gate:
    """One run of the gate."""

    def __init__(
        self,
        bundle: Bundle,
        export: Export,
        samples: Samples,
        progress: Progress,
        beam_samples: int,
    ) -> None:
        self._bundle = bundle
        self._beam_samples = beam_samples
        self._progress = progress
        self._scheme = bundle.manifest.scheme
        engine, rows = ENGINES["ort"], export.rows()  # PyTorch's side has its own table
        self._theirs = _Side(bundle, export.open, rows)
        self._ours = _Side(bundle, lambda name: engine.open(bundle, name))
        if not any(isinstance(trial, Writer) for trial in trials(self._theirs.context)):
            samples = replace(samples, images=samples.singles)
        feeds = Feeds(self._theirs.context, samples, CLIP_FRAMES)
        self._theirs.feeds, self._ours.feeds = feeds, feeds.beside(self._ours.context)

    def run(self) -> tuple[list[ComponentParity], list[TaskParity]]:
        """Compare all components, then all tasks."""
        results, answers = self._rows(), list[TaskParity]()
        components = self._bundle.spec.components
        results += [self._one(component) for component in components if not component.state]
        for component in components:
            if component.state:
                result, written = self._decoder(component)
                results.append(result)
                answers += written
        return results, [*answers, *self._choices()]

    def _rows(self) -> list[ComponentParity]:
        """Compare some rows of the token embedding table, if it was quantized."""
        theirs = self._theirs.context.rows
        if theirs is None or self._scheme == FLOAT:
            return []
        ids = np.linspace(0, len(theirs) - 1, min(len(theirs), TABLE_SAMPLES)).astype(np.int64)
        ours = self._ours.context.embed(ids)
        # as one sample: the cosine of a single row would not see its scale
        return [compare(TABLE, self._scheme, theirs[ids][None], ours[None])]

    def _one(self, component: Component) -> ComponentParity:
        """Run a component without state on both sides; each side learns what its own gave."""
        theirs, ours, name = self._theirs.feeds, self._ours.feeds, component.name
        theirs.prepare(component)
        ours.prepare(component)
        # another batch size, or a shorter clip
        few = {n: array[:1] for n, array in theirs.feed(component, 0).items()}
        with self._progress.step(f"checking {name}", 3 * theirs.count(component)) as advance:
            with self._theirs.opened(name) as graph:
                expected = _over(graph, theirs.batches(component), advance)
                wanted = graph.run(few)
            with self._ours.opened(name) as graph:
                got = _over(graph, theirs.batches(component), advance)
                alone = graph.run(few)
                same = all(theirs.column(n) is ours.column(n) for n in few)
                final = got if same else _over(graph, ours.batches(component), advance)
        theirs.learn(component, expected)
        ours.learn(component, final)
        pairs = (expected, got), (wanted, alone)
        return worst(
            [compare(name, self._scheme, a[output], b[output]) for a, b in pairs for output in b]
        )

    def _decoder(self, component: Component) -> tuple[ComponentParity, list[TaskParity]]:
        """Compare logits of a prefill and of a step, and what the decode loop writes."""
        theirs, ours, samples = self._theirs, self._ours, self._theirs.feeds.samples
        writers = theirs.feeds.writers(component)
        runs = [
            (n, run)
            for n, writer in enumerate(writers)
            for run in writer.runs(samples, self._beam_samples)
        ]
        with self._progress.step(f"checking {component.name}", 2 * len(runs)) as advance:
            theirs.show(component)
            ours.show(component)
            prompt = theirs.prompt(component)
            with theirs.opened(component.name) as graph:
                expected = _logits(graph, prompt)
                reference = [theirs.write(graph, n, run, advance) for n, run in runs]
            with ours.opened(component.name) as graph:
                got = _logits(graph, prompt)
                written = [ours.write(graph, n, run, advance) for n, run in runs]
        logits = zip(expected, got, strict=True)
        result = worst([compare(component.name, self._scheme, a, b) for a, b in logits])
        kl = divergence(expected[0][:, -1], got[0][:, -1])
        texts = zip(runs, reference, written, strict=True)
        return (
            msgspec.structs.replace(result, kl=kl),
            [self._judge_texts(run, a, b) for (_, run), a, b in texts],
        )

    def _judge_texts(self, run: Run, theirs: list[Ids], ours: list[Ids]) -> TaskParity:
        """Compare what both sides wrote."""
        if run.right is not None:
            decode = self._ours.context.tokenizer.decode
            left, right = ([decode(ids).strip() for ids in texts] for texts in (theirs, ours))
            return judge(run.title, self._scheme, [*left], [*right], [*run.right])
        # without labels the first token decides: after one near tie two texts of one
        # model differ in every token that follows
        first = None if self._scheme == FLOAT else 1
        title = run.title if first is None else f"{run.title}, first token"
        begun = [[tuple(ids[:first]) for ids in texts] for texts in (theirs, ours)]
        return judge(title, self._scheme, [*begun[0]], [*begun[1]], None)

    def _choices(self) -> list[TaskParity]:
        """Compare what was chosen without writing: labels, verdicts, words, colours."""
        theirs, ours = self._theirs.feeds, self._ours.feeds
        found: dict[str, TaskParity] = {}
        for one, other in zip(theirs.trials, ours.trials, strict=True):
            a, b = one.choices(theirs), other.choices(ours)
            if a is None or b is None or a.title in found:
                continue
            right = None if a.right is None else list(a.right)
            found[a.title] = judge(a.title, self._scheme, [*a.answers], [*b.answers], right)
        return list(found.values())


class _Side:
    """PyTorch's side, or the engine's."""

    feeds: Feeds

    def __init__(self, bundle: Bundle, opener: Opener, rows: EmbeddingRows | None = None) -> None:
        self._opener = opener
        graphs = {c.name: _Brief(c, self.opened) for c in bundle.spec.components}
        self.context = TaskContext(bundle, graphs, rows)
        self._shown: list[Shown] = []

    @contextmanager
    def opened(self, name: str) -> Iterator[Graph]:
        """Open a component for a while."""
        graph = self._opener(name)
        try:
            yield graph
        finally:
            graph.close()

    def show(self, decoder: Component) -> None:
        """Run what stands between the samples and a decoder, for each task that writes with it."""
        self._shown = [writer.shown(self.feeds) for writer in self.feeds.writers(decoder)]

    def prompt(self, decoder: Component) -> Prompt:
        """Make what a decoder reads about some samples, for the first task."""
        shown = self._shown[0].some(slice(LOGIT_SAMPLES))
        return self.feeds.writers(decoder)[0].prompt(shown, self._options())

    def write(self, graph: Graph, n: int, run: Run, advance: Advance) -> list[Ids]:
        """Write about the samples of a run of the n-th task."""
        writer = self.feeds.writers(graph.component)[n]
        chosen = msgspec.structs.replace(self._options(), num_beams=run.num_beams, do_sample=False)
        shown = self._shown[n].some(slice(run.count))
        written: list[Ids] = []
        for start in range(0, len(shown.texts), IMAGES_PER_BATCH):
            prompt = writer.prompt(shown.some(slice(start, start + IMAGES_PER_BATCH)), chosen)
            written += loop.generate(graph, self.context.embed, prompt, chosen)
        advance(1)
        return written

    def _options(self) -> Generation:
        defaults = self.context.bundle.spec.generation
        assert defaults is not None
        return defaults


class _Brief(CheckedGraph):
    """A graph that is open only while it runs, on a few rows at a time."""

    def __init__(
        self, component: Component, opened: Callable[[str], AbstractContextManager[Graph]]
    ) -> None:
        super().__init__(component)
        self._opened = opened

    def infer(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """Open it, run it on all rows, and close it."""
        own = {spec.name: feeds[spec.name] for spec in self.component.inputs}  # it has its slots
        with self._opened(self.component.name) as graph:
            return _over(graph, cut(own), lambda _: None)


def _logits(graph: Graph, prompt: Prompt) -> list[Array]:
    """Run a prefill and one step with the cache; return both logits."""
    graph.reset()
    first = graph.run(prefill(graph.component, prompt))["logits"]
    return [first, graph.run(step(graph.component, prompt))["logits"]]


def _over(graph: Graph, batches: Iterable[Arrays], advance: Advance) -> dict[str, Array]:
    """Run a graph over batches, or clips."""
    found: dict[str, list[Array]] = {}
    for feeds in batches:
        for name, array in graph.run(feeds).items():
            found.setdefault(name, []).append(array)
        advance(1 if graph.component.takes_clips else len(next(iter(feeds.values()))))
    return {name: np.concatenate(arrays) for name, arrays in found.items()}
