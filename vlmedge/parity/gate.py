"""The gate: a bundle against PyTorch, component by component and task by task.

One component's torch weights are in memory at a time: each component runs over all samples in
PyTorch, then in the engine, and only its outputs are kept for the next one. An engine's component
is compared on PyTorch's inputs (its own error) and runs again on the engine's (the task's error).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import msgspec
import numpy as np
from numpy.typing import NDArray

from vlmedge.arrays import Array, Arrays
from vlmedge.bundle import Bundle
from vlmedge.bundle.embedding_table import TABLE
from vlmedge.parity.on_device import reported
from vlmedge.parity.samples import Samples, codes_for, texts_for
from vlmedge.parity.tolerances import compare, divergence, judge, worst
from vlmedge.progress import Advance, Progress
from vlmedge.run.decode.prompt import feeds
from vlmedge.run.inputs.image import Grid, pieces
from vlmedge.run.tasks import encode as encoding
from vlmedge.run.tasks import generate as generating
from vlmedge.run.tasks import paint as painting
from vlmedge.run.tasks import prompt as prompting
from vlmedge.run.tasks.context import IMAGES_PER_BATCH, TaskContext
from vlmedge.run.tasks.embed import probabilities, unit
from vlmedge.run.tasks.encode import Soft
from vlmedge.shelves.contracts import Export, Graph
from vlmedge.shelves.registry import ENGINES
from vlmedge.spec import (
    Component,
    GenerateTask,
    InfillTask,
    LabelTask,
    MatchTask,
    ScoreTask,
    wiring,
)
from vlmedge.spec.manifest import FLOAT, ComponentParity, Parity, TaskParity

BEAM_SAMPLES = 32
LOGIT_SAMPLES = 8  # whose logits are compared
TABLE_SAMPLES = 1024  # rows of the token embedding table
CLIP_FRAMES = 3
BEAMS = 5  # as BLIP-2's paper captions

Pool = dict[str, Array]


def run_gate(
    bundle: Bundle,
    export: Export,
    samples: Samples,
    progress: Progress,
    beam_samples: int = BEAM_SAMPLES,
) -> Parity:
    """Compare, and write reports/parity.json and the manifest.

    Args:
        bundle: What is put to the gate; its folder is written.
        export: The checkpoint that it came from.
        samples: What to compare on.
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
        self._export = export
        self._engine = ENGINES["ort"]
        self._beam_samples = beam_samples
        self._samples = samples
        self._progress = progress
        self._scheme = bundle.manifest.scheme
        self._context = TaskContext(bundle, {})
        self._theirs = TaskContext(bundle, {}, export.rows())  # PyTorch's side has its own table
        self._grids: tuple[Grid, ...] = ()
        self._clips: list[NDArray[np.int64]] = []

    def run(self) -> tuple[list[ComponentParity], list[TaskParity]]:
        """Compare all components, then all tasks."""
        tasks = self._bundle.spec.tasks.values()
        writes = any(isinstance(task, GenerateTask) for task in tasks)
        images = self._samples.images if writes else self._samples.singles
        reference = self._inputs(images)
        ours = dict(reference)
        results = self._rows()
        for component in self._bundle.spec.components:
            if not component.state:
                results.append(self._one(component, reference, ours))
        decoders = [c for c in self._bundle.spec.components if c.state]
        answers: list[TaskParity] = []
        for component in decoders:
            result, answers = self._decoder(component, reference, ours)
            results.append(result)
        answers += self._choices(reference, ours)
        return results, [*answers, *self._pairs(reference, ours), *self._matches(reference, ours)]

    def _rows(self) -> list[ComponentParity]:
        """Compare the token embedding table, if it was rounded: some of its rows."""
        theirs = self._theirs.rows
        if theirs is None or self._scheme == FLOAT:
            return []
        ids = np.linspace(0, len(theirs) - 1, min(len(theirs), TABLE_SAMPLES)).astype(np.int64)
        # as one sample: the cosine of a single row would not see its scale
        return [compare(TABLE, self._scheme, theirs[ids][None], self._context.embed(ids)[None])]

    def _inputs(self, images: Sequence[object]) -> Pool:
        """Run the front ends over all samples."""
        pool: Pool = {}
        wanted = {i.name for c in self._bundle.spec.components for i in c.inputs}
        if "pixel_values" in wanted:
            pictures = self._context.pictures(images)  # type: ignore[arg-type]
            pool["pixel_values"], self._grids = pictures.pixel_values, pictures.grids
            self._clips = _clips(self._grids)
        if "input_ids" in wanted:
            texts = texts_for(self._bundle.spec, self._samples)
            pool["input_ids"], pool["attention_mask"] = self._context.tokenizer.encode(texts)
        if "qformer_input_ids" in wanted:
            pool |= self._instructions()
        pool |= codes_for(self._bundle.spec, len(images))
        if painting.painting_tasks(self._context):
            count = range(len(images))
            rows = [painting.trial(self._context, images, i) for i in count]  # type: ignore[arg-type]
            pool |= {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        return pool

    def _instructions(self) -> Pool:
        """Make what reads a text before the language model does: the samples' questions."""
        tasks = self._bundle.spec.tasks.values()
        task = [t for t in tasks if isinstance(t, GenerateTask) and t.instruct][-1]
        texts = self._texts(task, self._samples.questions)
        ids, mask = self._context.instruction_tokenizer.encode(texts)
        return {"qformer_input_ids": ids, "qformer_attention_mask": mask}

    def _soft(self, task: GenerateTask, pool: Pool) -> list[Soft]:
        """Take what each sample's picture, or clip of pictures, became out of a pool."""
        found = pool[task.soft_prompt]
        if task.source == "image":
            return encoding.rows(found, self._grids)
        if any(self._bundle.spec.component(name).takes_clips for name in task.encode):
            return [encoding.flat(clip) for clip in found]
        return [encoding.flat(found[clip]) for clip in self._clips]

    def _texts(self, task: GenerateTask, said: Sequence[str]) -> list[str]:
        """Fill a task's template for each sample."""
        return [
            prompting.fill(task, text, [Grid() if task.source == "video" else grid])
            for text, grid in zip(said, self._grids, strict=True)
        ]

    def _soften(self, context: TaskContext, component: Component, pool: Pool) -> None:
        """Make what a reader of soft prompts takes: the embeddings of pictures and texts."""
        names = {spec.name for spec in component.inputs}
        if "inputs_embeds" not in names or "inputs_embeds" in pool:
            return
        task = next(
            task
            for task in reversed(self._bundle.spec.tasks.values())
            if isinstance(task, GenerateTask) and component.name in task.read
        )
        soft, texts = self._soft(task, pool), self._texts(task, self._samples.questions)
        pool |= prompting.sources(context, task, soft, texts)

    def _match(self) -> MatchTask | None:
        found = [t for t in self._bundle.spec.tasks.values() if isinstance(t, MatchTask)]
        return found[0] if found else None

    @contextmanager
    def _opened(self, opener: Callable[[str], Graph], name: str) -> Iterator[Graph]:
        graph = opener(name)
        try:
            yield graph
        finally:
            graph.close()

    def _engine_graph(self, name: str) -> Graph:
        return self._engine.open(self._bundle, name)

    def _one(self, component: Component, reference: Pool, ours: Pool) -> ComponentParity:
        """Run a stateless component on both sides; add its outputs to both pools."""
        names = [spec.name for spec in component.inputs]
        self._soften(self._theirs, component, reference)
        self._soften(self._context, component, ours)
        count = _count(names, reference)
        clips = self._clips if component.takes_clips else None
        one = self._clips[0][:1] if clips else np.arange(1)  # another batch size, or clip
        few = {name: reference[name][one] for name in names}
        with self._progress.step(f"checking {component.name}", 3 * count) as advance:
            with self._opened(self._export.open, component.name) as graph:
                expected = _batched(graph, names, reference, advance, clips)
                wanted = graph.run(few)
            with self._opened(self._engine_graph, component.name) as graph:
                got = _batched(graph, names, reference, advance, clips)
                alone = graph.run(few)
                same = all(reference[n] is ours[n] for n in names)
                final = got if same else _batched(graph, names, ours, advance, clips)
        reference |= expected
        ours |= final
        results = [
            compare(component.name, self._scheme, theirs[name], array)
            for theirs, mine in ((expected, got), (wanted, alone))
            for name, array in mine.items()
        ]
        return worst(results)

    def _decoder(
        self, component: Component, reference: Pool, ours: Pool
    ) -> tuple[ComponentParity, list[TaskParity]]:
        """Compare logits of a prefill and of a step, and what the decode loop writes."""
        runs = list(self._runs(component))
        with self._progress.step(f"checking {component.name}", 2 * len(runs)) as advance:
            their_soft = self._instructed(self._theirs, self._export.open, runs, reference)
            our_soft = self._instructed(self._context, self._engine_graph, runs, ours)
            their_held = self._read(self._theirs, self._export.open, runs, their_soft)
            our_held = self._read(self._context, self._engine_graph, runs, our_soft)
            with self._opened(self._export.open, component.name) as graph:
                expected = self._logits(component, graph, their_soft, runs[0], their_held)
                fed = self._theirs, graph, their_soft, their_held
                theirs = [self._written(*fed, run, advance) for run in runs]
            with self._opened(self._engine_graph, component.name) as graph:
                got = self._logits(component, graph, their_soft, runs[0], their_held)
                fed = self._context, graph, our_soft, our_held
                written = [self._written(*fed, run, advance) for run in runs]
        pairs = list(zip(expected, got, strict=True))
        result = worst([compare(component.name, self._scheme, a, b) for a, b in pairs])
        kl = divergence(expected[0][:, -1], got[0][:, -1])
        result = msgspec.structs.replace(result, kl=kl)
        answers = []
        for run, a, b in zip(runs, theirs, written, strict=True):
            decode = self._context.tokenizer.decode
            if run.right is None:
                # without labels the first token decides: after one near tie two texts of one
                # model differ in every token that follows
                first = 1 if self._scheme != "float32" else None
                left: list[object] = [tuple(ids[:first]) for ids in a]
                right: list[object] = [tuple(ids[:first]) for ids in b]
                title = run.title if first is None else f"{run.title}, first token"
                answers.append(judge(title, self._scheme, left, right, None))
            else:
                left = [decode(ids).strip() for ids in a]
                right = [decode(ids).strip() for ids in b]
                wanted: list[object] = list(run.right)
                answers.append(judge(run.title, self._scheme, left, right, wanted))
        return result, answers

    def _runs(self, component: Component) -> Iterator[_Run]:
        """List what is written with this decoder."""
        samples = self._samples
        count = len(samples.images)
        for name, task in self._bundle.spec.tasks.items():
            if not isinstance(task, GenerateTask) or task.decoder != component.name:
                continue
            if "{question}" in task.prompt:
                texts = self._texts(task, samples.questions)
                yield _Run(f"{name}, greedy", task, texts, 1, samples.answers)
            else:
                texts = self._texts(task, [""] * count)
                yield _Run(f"{name}, greedy", task, texts, 1, samples.captions)
                few = min(count, self._beam_samples)
                right = samples.captions[:few] if samples.captions else None
                yield _Run(f"{name}, {BEAMS} beams", task, texts[:few], BEAMS, right)

    def _instructed(
        self, context: TaskContext, opener: Callable[[str], Graph], runs: list[_Run], pool: Pool
    ) -> dict[str, list[Soft]]:
        """Make what each task's decoder sees of the pictures, its texts having had their say."""
        found: dict[str, list[Soft]] = {}
        for run in runs:
            task = run.task
            if task.prompt in found:
                continue
            if not task.instruct:
                found[task.prompt] = self._soft(task, pool)
                continue
            seen = encoding.rows(pool[wiring.pictured(self._bundle.spec, task)], self._grids)
            known = encoding.instructions(context, task, seen, run.texts)
            found[task.prompt] = self._soft(task, self._chain(opener, task.instruct, known))
        return found

    def _chain(
        self, opener: Callable[[str], Graph], components: Sequence[str], known: Pool
    ) -> Pool:
        """Run some components, of which one is open at a time."""
        for name in components:
            with self._opened(opener, name) as graph:
                names = [spec.name for spec in graph.component.inputs]
                known |= _batched(graph, names, known, lambda _: None)
        return known

    def _read(
        self,
        context: TaskContext,
        opener: Callable[[str], Graph],
        runs: list[_Run],
        softs: dict[str, list[Soft]],
    ) -> dict[str, Pool]:
        """Run what stands between the texts and the decoder, one component after the other.

        Returns:
            What the decoder is fed throughout, for the texts of each task that reads some.
        """
        found: dict[str, Pool] = {}
        for run in runs:
            if run.task.prompt in found or not run.task.read:
                continue
            soft = softs[run.task.prompt]
            known = prompting.sources(context, run.task, soft, run.texts)
            known = self._chain(opener, run.task.read, known)
            names = wiring.held(self._bundle.spec.component(run.task.decoder))
            found[run.task.prompt] = {name: known[name] for name in names}
        return found

    def _written(
        self,
        side: TaskContext,
        graph: Graph,
        softs: dict[str, list[Soft]],
        held: dict[str, Pool],
        run: _Run,
        advance: Advance,
    ) -> list[list[int]]:
        """Write on from every sample's soft prompt."""
        defaults = self._bundle.spec.generation
        assert defaults is not None
        chosen = msgspec.structs.replace(defaults, num_beams=run.num_beams, do_sample=False)
        context = TaskContext(self._bundle, {run.task.decoder: graph}, side.rows)
        written: list[list[int]] = []
        every, task = softs[run.task.prompt], encoding.settled(run.task)
        for start in range(0, len(run.texts), IMAGES_PER_BATCH):
            texts = run.texts[start : start + IMAGES_PER_BATCH]
            rows = slice(start, start + len(texts))
            known = _cut(held.get(run.task.prompt), rows)
            written += generating.write(context, task, every[rows], texts, chosen, held=known)
        advance(1)
        return written

    def _logits(
        self,
        component: Component,
        graph: Graph,
        softs: dict[str, list[Soft]],
        run: _Run,
        held: dict[str, Pool],
    ) -> list[Array]:
        """Run a prefill of some samples and one step with the cache; return both logits."""
        defaults = self._bundle.spec.generation
        assert defaults is not None
        soft = softs[run.task.prompt][:LOGIT_SAMPLES]
        texts = run.texts[: len(soft)]
        known = _cut(held.get(run.task.prompt), slice(0, len(soft)))
        task = encoding.settled(run.task)
        prompt = prompting.make_prompt(self._theirs, task, soft, texts, defaults, known)
        graph.reset()
        mask, tokens, media = prompt.attention_mask, prompt.embeds.shape[1], prompt.media_index
        given = feeds(component, prompt.embeds, mask, tokens, media)
        first = graph.run({**given, **prompt.held})["logits"]
        mask = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)
        given = feeds(component, prompt.embeds[:, -1:], mask, tokens, media)
        second = graph.run({**given, **prompt.held})["logits"]
        return [first, second]

    def _choices(self, reference: Pool, ours: Pool) -> list[TaskParity]:
        """Compare what each picture becomes: a label of a closed head, or a painting."""
        found = []
        for name, task in self._bundle.spec.tasks.items():
            if isinstance(task, LabelTask):
                theirs, mine = (
                    pool[task.output].argmax(axis=1).tolist() for pool in (reference, ours)
                )
                title = f"{name}, {reference[task.output].shape[1]} labels of its own"
                found.append(judge(title, self._scheme, theirs, mine, None))
        for task in painting.painting_tasks(self._context)[:1]:  # all share the graph
            their_colors: list[object] = [
                *painting.main_colors(self._context, reference[task.output])
            ]
            our_colors: list[object] = [*painting.main_colors(self._context, ours[task.output])]
            title = "paint, main colour"
            found.append(judge(title, self._scheme, their_colors, our_colors, None))
        return found

    def _pairs(self, reference: Pool, ours: Pool) -> list[TaskParity]:
        """Compare what is said of a picture and a text together: a verdict, or a word of it."""
        found = []
        for name, task in self._bundle.spec.tasks.items():
            if isinstance(task, ScoreTask):
                theirs, mine = (p[task.output].argmax(axis=1).tolist() for p in (reference, ours))
                found.append(judge(f"{name}, yes or no", self._scheme, theirs, mine, None))
            elif isinstance(task, InfillTask):
                count = len(reference[task.output])
                last = reference["attention_mask"][:count].sum(axis=1) - 2  # before the end token
                theirs, mine = (
                    p[task.output][np.arange(count), last].argmax(axis=1).tolist()
                    for p in (reference, ours)
                )
                found.append(judge(f"{name}, last word", self._scheme, theirs, mine, None))
        return found

    def _matches(self, reference: Pool, ours: Pool) -> list[TaskParity]:
        """Compare the label that each picture gets."""
        task = self._match()
        if task is None:
            return []

        def best(pool: Arrays) -> list[object]:
            images, texts = unit(pool[task.image_output]), unit(pool[task.text_output])
            return [int(i) for i in probabilities(task, images, texts).argmax(axis=1)]

        right = self._samples.classes
        wanted: list[object] | None = None if right is None else list(right)
        title = f"classify, {len(self._samples.labels)} labels"
        return [judge(title, self._scheme, best(reference), best(ours), wanted)]


class _Run(msgspec.Struct, frozen=True):
    """One way to run a generating task over the samples."""

    title: str
    task: GenerateTask
    texts: list[str]
    num_beams: int
    right: tuple[str, ...] | None


def _cut(pool: Pool | None, rows: slice) -> Pool | None:
    """Take some rows of every tensor."""
    return None if pool is None else {name: array[rows] for name, array in pool.items()}


def _count(names: list[str], pool: Pool) -> int:
    """Count the rows that a component can have: of pictures and texts, as many as of both."""
    return min(len(pool[name]) for name in names)


def _clips(grids: Sequence[Grid]) -> list[NDArray[np.int64]]:
    """Make a short clip of each sample: the first pieces of its picture and the next ones."""
    firsts = np.cumsum([0, *(pieces(grid) for grid in grids[:-1])])
    return [np.roll(firsts, -i)[:CLIP_FRAMES] for i in range(len(grids))]


def _batched(
    graph: Graph,
    names: list[str],
    pool: Pool,
    advance: Advance,
    clips: list[NDArray[np.int64]] | None = None,
) -> Pool:
    """Run a graph over all rows of its inputs, a batch or a clip at a time."""
    found: dict[str, list[Array]] = {}
    count = _count(names, pool)
    batches = [
        np.arange(start, min(start + IMAGES_PER_BATCH, count))
        for start in range(0, count, IMAGES_PER_BATCH)
    ]
    for rows in clips or batches:
        for name, array in graph.run({n: pool[n][rows] for n in names}).items():
            found.setdefault(name, []).append(array)
        advance(1 if clips else len(rows))
    return {name: np.concatenate(arrays) for name, arrays in found.items()}
