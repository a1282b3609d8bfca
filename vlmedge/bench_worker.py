"""One side of a benchmark: `python -m vlmedge.bench_worker TASK` measures a round for each line.

TASK is {"bundle": folder, "checkpoint": folder or null, "how": engine, or PyTorch's dtype}. Each
line on stdin is answered with one line of JSON on stdout: times of every component, first token,
tokens a second, and the peak of memory so far.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmedge import generate as loop
from vlmedge.bundle import Bundle
from vlmedge.contracts import Array, Arrays, Graph
from vlmedge.errors import BundleError, VlmEdgeError
from vlmedge.image import load_image
from vlmedge.registry import ENGINES, FAMILIES
from vlmedge.sampling import options
from vlmedge.scenes import CLASSES, draw_scene
from vlmedge.spec import Component, EmbedTask, GenerateTask, LabelTask, MatchTask, PaintTask
from vlmedge.tasks import embed as embedding
from vlmedge.tasks import generate as generating
from vlmedge.tasks import paint as painting
from vlmedge.tasks._parts import Parts

NEW_TOKENS = 20


class _Timed:
    """A graph that notes how long each run took."""

    def __init__(self, graph: Graph, spans_ms: dict[str, list[float]]) -> None:
        self._graph = graph
        self._spans_ms = spans_ms
        self._empty = True  # its state

    @property
    def component(self) -> Component:
        return self._graph.component

    def run(self, feeds: Arrays) -> dict[str, Array]:
        start = time.perf_counter()
        outputs = self._graph.run(feeds)
        taken_ms = 1000 * (time.perf_counter() - start)
        name = self.component.name
        if self.component.state:
            name += " prefill" if self._empty else " step"
            self._empty = False
        self._spans_ms.setdefault(name, []).append(taken_ms)
        return outputs

    def reset(self) -> None:
        self._empty = True
        self._graph.reset()

    def reorder(self, rows: NDArray[np.int64]) -> None:
        self._graph.reorder(rows)

    def rewind(self, tokens: int) -> None:
        self._graph.rewind(tokens)

    def snapshot(self, tokens: int) -> dict[str, Array]:
        return self._graph.snapshot(tokens)

    def close(self) -> None:
        self._graph.close()


class _Side:
    """A bundle's tasks, with an engine's graphs or PyTorch's."""

    def __init__(self, bundle: Bundle, checkpoint: str | None, how: str) -> None:
        self._spans_ms: dict[str, list[float]] = {}
        if checkpoint is None:
            opened = {c.name: ENGINES[how].open(bundle, c.name) for c in bundle.spec.components}
        else:
            opened = _torch_graphs(bundle, checkpoint, how)
        graphs: Mapping[str, Graph] = {
            name: _Timed(graph, self._spans_ms) for name, graph in opened.items()
        }
        self._parts = Parts(bundle, graphs)
        self._tasks = bundle.spec.tasks
        self._image = load_image(draw_scene(0, "heldout").image)

    def round(self) -> dict[str, Any]:
        """Run every component, and write one text."""
        self._spans_ms.clear()
        found: dict[str, Any] = dict.fromkeys(
            ("first_token_ms", "tokens_per_s", "prompt_tokens", "new_tokens")
        )
        writing = [task for task in self._tasks.values() if isinstance(task, GenerateTask)]
        if writing:
            found |= self._write(writing[0])
        for task in self._tasks.values():
            if isinstance(task, MatchTask):
                self._see(task.image, task.image_output)
                self._read(task.text, task.text_output)
            elif isinstance(task, LabelTask) or (
                isinstance(task, EmbedTask) and task.modality == "image"
            ):
                self._see(task.encode, task.output)
            elif isinstance(task, EmbedTask):
                self._read(task.encode, task.output)
            elif isinstance(task, PaintTask) and task.paint[-1] not in self._spans_ms:
                self._parts.chain(task.paint, painting.trial(self._parts, [self._image], 0))
        spans = {name: list(times) for name, times in self._spans_ms.items()}
        return {**found, "components_ms": spans, "peak_memory_mib": peak_memory_mib()}

    def _see(self, components: tuple[str, ...], output: str) -> None:
        if components[-1] not in self._spans_ms:
            embedding.embed_images(self._parts, components, output, [self._image])

    def _read(self, components: tuple[str, ...], output: str) -> None:
        if components[-1] not in self._spans_ms:
            embedding.embed_texts(self._parts, components, output, [f"a photo of a {CLASSES[0]}"])

    def _write(self, task: GenerateTask) -> dict[str, Any]:
        """Write a text of fixed length, greedy, so that every side takes the same steps."""
        defaults = self._parts.bundle.spec.generation
        assert defaults is not None
        count = max(2, min(NEW_TOKENS, defaults.max_tokens))
        chosen = options(defaults, max_tokens=count, min_tokens=count, num_beams=1, do_sample=False)
        start = time.perf_counter()
        pictures = self._parts.pictures([self._image])
        encoded = generating.encode(self._parts, task, pictures.pixel_values)
        soft = generating.rows(encoded, pictures.grids)
        question = "what is it?" if "{question}" in task.prompt else ""
        text = generating.fill(task, question, pictures.grids)
        prompt = generating.make_prompt(self._parts, task, soft, [text], chosen)
        ids = loop.stream(self._parts.graphs[task.decoder], self._parts.embed, prompt, chosen)
        next(ids)
        first = time.perf_counter()
        rest = sum(1 for _ in ids)
        return {
            "first_token_ms": 1000 * (first - start),
            "tokens_per_s": rest / (time.perf_counter() - first),
            "prompt_tokens": prompt.embeds.shape[1],
            "new_tokens": 1 + rest,
        }


def peak_memory_mib() -> float | None:
    """Return the most memory that this process has had.

    Not getrusage: its figure begins with that of the process that started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return found[0] / 1024 if found else None


def _torch_graphs(bundle: Bundle, checkpoint: str, dtype: str) -> dict[str, Graph]:
    """Open all components in PyTorch, through the family."""
    export = FAMILIES[bundle.spec.family].open(Path(checkpoint))
    if export.spec.components != bundle.spec.bare():
        raise BundleError(
            f"{bundle.path} has other shapes than {checkpoint}: they do not belong together"
        )
    return {c.name: export.open(c.name, dtype) for c in bundle.spec.components}


def main() -> None:
    """Answer until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to the log
    task = json.loads(sys.argv[1])
    side = None
    for _ in sys.stdin:
        try:
            if side is None:
                side = _Side(Bundle.load(task["bundle"]), task["checkpoint"], task["how"])
            answer = side.round()
        except VlmEdgeError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
