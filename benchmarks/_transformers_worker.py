"""transformers' own model beside a bundle, behind the protocol of vlmedge/bench_worker.py.

    python benchmarks/_transformers_worker.py TASK

TASK is {"bundle": folder, "checkpoint": folder, "how": dtype}; "first" and "round" are answered, on
the first task that bench_items.py would time. The model is read with from_pretrained and runs with
the attention that transformers chooses (SDPA where it has it), and its own `generate`. Pixels and
token ids come from the bundle's front ends: transformers' processors would only be slower.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers

from vlmedge.bench.items import NEW_TOKENS, PICTURE, TEXT, items
from vlmedge.bench.worker import WRITING, peak_memory_mib
from vlmedge.bundle import Bundle
from vlmedge.run.tasks import paint as painting
from vlmedge.run.tasks import prompt as prompting
from vlmedge.run.tasks.context import TaskContext
from vlmedge.spec import GenerateTask


class Clock(transformers.StoppingCriteria):
    """Notes when each token is there, and never stops."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Note one token."""
        self.marks.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Reference:
    """One checkpoint in PyTorch."""

    def __init__(self, bundle: Bundle, checkpoint: str, dtype: str) -> None:
        self._dtype = getattr(torch, dtype)
        config = transformers.AutoConfig.from_pretrained(checkpoint)
        kind = config.architectures[0]
        architecture = getattr(transformers, kind)
        self._model = architecture.from_pretrained(checkpoint, dtype=self._dtype).eval()
        self._context = TaskContext(bundle, {})
        self._task = main_task(bundle)
        runs: dict[str, Callable[[int], dict[str, Any]]] = {
            "FlavaForPreTraining": self._match,
            "SegGptForImageSegmentation": self._paint,
        }
        self._run = runs.get(kind, self._write)

    def first(self) -> dict[str, Any]:
        """Give the first token, or the first answer."""
        self._answer(1)
        return {"task": self._task}

    def round(self) -> dict[str, Any]:
        """Give one answer."""
        start = time.perf_counter()
        facts = self._answer(NEW_TOKENS)
        taken_ms = 1000 * (time.perf_counter() - start)
        found = {**dict.fromkeys(WRITING), **facts, "tasks_ms": {self._task: [taken_ms]}}
        return {**found, "components_ms": {}, "peak_memory_mib": peak_memory_mib()}

    def _answer(self, tokens: int) -> dict[str, Any]:
        with torch.inference_mode():
            return self._run(tokens)

    def _float(self, values: Any) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._dtype)

    def _write(self, tokens: int) -> dict[str, Any]:
        """Write a text of fixed length, greedy."""
        task = self._context.bundle.spec.tasks[self._task]
        assert isinstance(task, GenerateTask)
        start = time.perf_counter()
        inputs: dict[str, Any] = {"pixel_values": self._float(self._context.pixels([PICTURE]))}
        if task.image_text is not None:
            ids = torch.tensor([self._prompt(task)])
            inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        clock = Clock()
        self._model.generate(
            **inputs,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            stopping_criteria=transformers.StoppingCriteriaList([clock]),
        )
        written, marks = len(clock.marks), clock.marks
        rest_s = marks[-1] - marks[0]
        return {
            "first_token_ms": 1000 * (marks[0] - start),
            "tokens_per_s": (written - 1) / rest_s if written > 1 else None,
            "prompt_tokens": inputs["input_ids"].shape[1] if "input_ids" in inputs else None,
            "new_tokens": written,
        }

    def _prompt(self, task: GenerateTask) -> list[int]:
        """Write the task's prompt as ids, with a placeholder for each row of the soft prompt."""
        spec = self._context.bundle.spec
        outputs = spec.component(task.encode[-1]).outputs
        (rows,) = (out.shape[-2] for out in outputs if out.name == task.soft_prompt)
        ids: list[int] = []
        for token in self._context.tokenizer.ids(prompting.fill(task, "")):
            ids += [token] * (int(rows) if token == task.image_token_id else 1)
        return ids

    def _match(self, tokens: int) -> dict[str, Any]:
        """Say whether a picture and a text belong together."""
        ids, mask = self._context.tokenizer.encode([TEXT])
        seen = self._model.flava(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            pixel_values=self._float(self._context.pixels([PICTURE])),
        )
        self._model.itm_head(seen.multimodal_embeddings).softmax(-1)
        return {}

    def _paint(self, tokens: int) -> dict[str, Any]:
        """Paint one picture as another one is painted."""
        feeds = painting.trial(self._context, [PICTURE], 0)
        names = ("pixel_values", "prompt_pixel_values", "prompt_masks")
        painted = self._model(**{name: self._float(feeds[name]) for name in names})
        painted.pred_masks.float().numpy()
        return {}


def main_task(bundle: Bundle) -> str:
    """Name the task that is compared: what reads a picture and a text, or else the first."""
    names = items(TaskContext(bundle, {}))
    return next((name for name in ("match", "caption") if name in names), next(iter(names)))


def main() -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to the log
    task = json.loads(sys.argv[1])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    side = None
    for line in sys.stdin:
        if side is None:
            side = Reference(Bundle.load(task["bundle"]), task["checkpoint"], task["how"])
        answer = {"first": side.first, "round": side.round}[line.strip()]()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
