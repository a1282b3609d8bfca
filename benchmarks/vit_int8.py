"""One image through ViT-B/16, in ms: PyTorch, ONNX Runtime as it comes, and vlmedge's INT8.

    python benchmarks/vit_int8.py [rounds] [batch]

A CLIP checkpoint of random weights is written to a temporary folder, exported twice and removed.
All variants take turns in one run on the same cores, so that their ratios hold on a busy machine
too. The cosine is that of image_embeds with PyTorch's in float32.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import transformers
from make_checkpoint import write
from onnxruntime.quantization import quantize_dynamic

from vlmedge.arrays import Array
from vlmedge.make.export import export
from vlmedge.shelves.registry import ENGINES

Run = Callable[[Array], Array]
PART = "vision_encoder"


def pytorch(checkpoint: Path, dtype: torch.dtype) -> Run:
    """Load transformers' own model, with its own choice of attention."""
    model = transformers.CLIPModel.from_pretrained(checkpoint, dtype=dtype).eval()
    vision, projection = model.vision_model, model.visual_projection

    def run(pixels: Array) -> Array:
        with torch.inference_mode():
            pooled = vision(torch.from_numpy(pixels).to(dtype)).pooler_output
            found: Array = projection(pooled).float().numpy()
        return found

    return run


def plain(file: Path) -> Run:
    """Open a graph as a user of onnxruntime would."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    session = onnxruntime.InferenceSession(str(file), options)
    return lambda pixels: session.run(["image_embeds"], {"pixel_values": pixels})[0]


def variants(folder: Path) -> dict[str, Run]:
    """Export and load everything that takes part."""
    checkpoint = folder / "checkpoint"
    write("clip-vit-b-16", checkpoint)
    float32 = export(str(checkpoint), folder / "float32", check=False)
    int8 = export(str(checkpoint), folder / "int8", "int8", check=False)
    dynamic = folder / "dynamic.onnx"
    quantize_dynamic(str(float32.graph_file(PART)), str(dynamic), per_channel=True)
    ours = ENGINES["ort"].open(int8, PART)
    return {
        "PyTorch float32": pytorch(checkpoint, torch.float32),
        "PyTorch bfloat16": pytorch(checkpoint, torch.bfloat16),
        "ONNX Runtime float32": plain(float32.graph_file(PART)),
        "ONNX Runtime quantize_dynamic": plain(dynamic),
        "vlmedge int8": lambda pixels: ours.run({"pixel_values": pixels})["image_embeds"],
    }


def cosine(a: Array, b: Array) -> float:
    """Return the worst row's."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(axis=1) / lengths).min())


def main(rounds: int = 30, batch: int = 1) -> None:
    """Print the table."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    pixels = np.random.default_rng(0).standard_normal((batch, 3, 224, 224)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        runs = variants(Path(folder))
        times: dict[str, list[float]] = {name: [] for name in runs}
        found: dict[str, Any] = {name: run(pixels) for name, run in runs.items()}
        for _ in range(rounds):
            for name, run in runs.items():
                began = time.perf_counter()
                run(pixels)
                times[name].append((time.perf_counter() - began) * 1e3)
    medians = {name: float(np.median(values)) for name, values in times.items()}
    ours, reference = medians["vlmedge int8"], found["PyTorch float32"]
    load = os.getloadavg()[0]
    print(f"\nViT-B/16, batch {batch}, {cores} cores, {rounds} rounds, load {load:.1f}\n")
    print(f"{'':32}{'ms p50':>8}{'ms p10':>8}{'ours is':>10}{'cosine':>10}")
    for name, ms in medians.items():
        p10 = float(np.percentile(times[name], 10))
        near = cosine(found[name], reference)
        print(f"{name:32}{ms:8.1f}{p10:8.1f}{ms / ours:9.2f}x{near:10.5f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
