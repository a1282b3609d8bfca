"""OpenVINO on the CPU, tuned for latency; decoders by OpenVINO GenAI and by a loop of our own."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import openvino
import openvino_genai
from _pictures import classified
from _serve import Opened, Sample, Task, decoded, fastest, rates, serve, timed


def _settings(task: Task) -> dict[str, Any]:
    """Return how to compile: OpenVINO computes in bfloat16 where it can unless told otherwise."""
    found = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": task["threads"]}
    if "precision" in task:
        found["INFERENCE_PRECISION_HINT"] = task["precision"]
    return found


def _tower(task: Task, batch: int | None) -> Callable[[Any], Any]:
    """Compile a tower; a fixed batch lets OpenVINO plan ahead."""
    core = openvino.Core()
    model = core.read_model(task["graph"])
    if batch is not None:
        sizes = list(model.inputs[0].partial_shape)[1:]
        model.reshape([batch, *[int(str(size)) for size in sizes]])
    request = core.compile_model(model, "CPU", _settings(task)).create_infer_request()

    def run(pixels: Any) -> Any:
        request.infer([pixels], share_inputs=True)
        return request.get_output_tensor(0).data

    return run


def tower(task: Task) -> Opened:
    """Open an image tower."""
    pixels = np.load(task["pixels"])
    run = _tower(task, len(pixels))
    return Opened(timed(lambda: run(pixels)))


def classify(task: Task) -> Opened:
    """Open CLIP's image tower behind a front end."""
    return Opened(classified(_tower(task, None), task))


def decoder(task: Task) -> Opened:
    """Open a decoder: the fastest of GenAI's pipelines and of a loop over the stateful model."""
    runs = {"plain loop": _plain(task)}
    for backend in ("PA", "SDPA"):
        try:
            pipeline = _pipeline(task, backend)
            pipeline()
        except Exception as error:  # the others are left, and the log says why
            print(f"GenAI {backend}: {error}", file=sys.stderr)
        else:
            runs[f"GenAI {backend}"] = pipeline
    if len(runs) == 1:
        return Opened(runs["plain loop"], "plain loop")
    runs["plain loop"]()
    name = fastest(runs, 2)
    return Opened(runs[name], name)


def _plain(task: Task) -> Callable[[], Sample]:
    """Drive the stateful model by its infer request."""
    core = openvino.Core()
    model = core.read_model(f"{task['model']}/openvino_model.xml")
    request = core.compile_model(model, "CPU", _settings(task)).create_infer_request()
    names = {name for one in model.inputs for name in one.names}
    past = 0

    def step(ids: list[int]) -> int:
        nonlocal past
        total = past + len(ids)
        feeds = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(past, total, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        request.infer({name: feeds[name] for name in names}, share_inputs=True)
        past = total
        return int(request.get_output_tensor(0).data[0, -1].argmax())

    def read(ids: list[int]) -> int:
        nonlocal past
        request.reset_state()
        past = 0
        return step(ids)

    return decoded(read, lambda token: step([token]), task).run


def _pipeline(task: Task, backend: str) -> Callable[[], Sample]:
    """Drive GenAI's own loop, and note when each token comes.

    Its paged attention keeps the prefix of one prompt for the next: here each is read anew.
    """
    settings = {**_settings(task), "ATTENTION_BACKEND": backend}
    if backend == "PA":
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        settings["scheduler_config"] = scheduler
    pipeline = openvino_genai.LLMPipeline(task["model"], "CPU", **settings)
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = 1 + task["new_tokens"]
    config.ignore_eos = True
    prompt = openvino.Tensor(np.array([task["prompt"]], np.int64))
    mask = openvino.Tensor(np.ones((1, len(task["prompt"])), np.int64))
    inputs = openvino_genai.TokenizedInputs(prompt, mask)

    def run() -> Sample:
        began = time.perf_counter()
        metrics = pipeline.generate(inputs, config).perf_metrics
        whole_s = time.perf_counter() - began
        first_s = metrics.get_ttft().mean / 1000
        return rates(task, first_s, whole_s - first_s)

    return run


if __name__ == "__main__":
    serve(
        {"tower": tower, "decoder": decoder, "classify": classify},
        ("openvino", "openvino-genai", "nncf"),
    )
