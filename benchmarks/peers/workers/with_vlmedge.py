"""vlmedge, on ONNX Runtime: what `Model` does, or the part of it that the case asks for."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from _serve import Opened, Sample, Task, rates, serve, timed

import vlmedge
from vlmedge.bundle import Bundle
from vlmedge.run.decode import loop
from vlmedge.run.decode.prompt import Prompt
from vlmedge.run.decode.sampling import options
from vlmedge.run.tasks.context import TaskContext
from vlmedge.shelves.registry import ENGINES


def tower(task: Task) -> Opened:
    """Open the image tower alone."""
    graph = ENGINES["ort"].open(Bundle.load(task["bundle"]), "vision_encoder")
    pixels = np.load(task["pixels"])
    return Opened(timed(lambda: graph.run({"pixel_values": pixels})))


def decoder(task: Task) -> Opened:
    """Open the decoder alone, and write with the loop that `Model.caption` runs."""
    bundle = Bundle.load(task["bundle"])
    graph = ENGINES["ort"].open(bundle, "decoder")
    context = TaskContext(bundle, {"decoder": graph})
    count = 1 + task["new_tokens"]
    defaults = bundle.spec.generation
    assert defaults is not None
    chosen = options(defaults, max_tokens=count, min_tokens=count, num_beams=1, do_sample=False)
    ids = np.array([task["prompt"]], np.int64)

    def run() -> Sample:
        began = time.perf_counter()
        prompt = Prompt(context.embed(ids), np.ones_like(ids), ids)
        written = loop.stream(graph, context.embed, prompt, chosen)
        next(written)
        first = time.perf_counter()
        for _ in written:
            pass
        return rates(task, first - began, time.perf_counter() - first)

    return Opened(run)


def caption(task: Task) -> Opened:
    """Open a whole BLIP-2."""
    model = vlmedge.load(task["bundle"])

    def write(count: int) -> float:
        began = time.perf_counter()
        model.caption(task["image"], max_tokens=count, min_tokens=count, num_beams=1)
        return time.perf_counter() - began

    return Opened(lambda: captioned(write, task["new_tokens"]))


def captioned(write: Any, new_tokens: int) -> Sample:
    """Tell the first token from those after it, by a caption of 1 and one of all."""
    first_s = write(1)
    rest_s = write(1 + new_tokens) - first_s
    return {"first_token_ms": 1000 * first_s, "decode_tok_s": new_tokens / rest_s}


def classify(task: Task) -> Opened:
    """Open a whole CLIP."""
    model = vlmedge.load(task["bundle"])
    images = [Path(image) for image in task["images"]]

    def run() -> Sample:
        began = time.perf_counter()
        model.classify(images, task["labels"])
        return {"images_per_s": len(images) / (time.perf_counter() - began)}

    return Opened(run)


if __name__ == "__main__":
    serve(
        {"tower": tower, "decoder": decoder, "caption": caption, "classify": classify},
        ("vlmedge", "onnxruntime", "numpy"),
    )
    assert "torch" not in sys.modules
