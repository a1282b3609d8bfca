"""An NVIDIA GPU: vlmedge's engines beside PyTorch float16, eager and compiled, in one run.

    python benchmarks/gpu.py WORK OUT.json [CASE...]

Makes bundles of random weights under WORK (ViT-L/14, BLIP base, BLIP-2 OPT-2.7b), each once and
without the gate, and times in turns, batch 1, numpy arrays in and out on both sides: an image
tower, and captions of 1 and of 25 tokens, greedy, whose difference is the decode step.
PyTorch's models have the same shapes, their weights drawn on the GPU.
The outputs of the towers are compared with the CPU engine's; texts are in tests/engines/ort_cuda,
on trained checkpoints, for random weights say nothing that can be read.

The CUDA engine is timed where onnxruntime-gpu is installed; TensorRT where $TENSORRT_PYTHON names
a Python that has it and vlmedge, often not the one that has PyTorch, so it runs after the others,
in a process of its own ($TENSORRT_LEVEL: its builder's optimization level).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
import torch
import transformers
from make_checkpoint import MODELS, write

import vlmedge
from vlmedge.checkpoints.scenes import draw_scene
from vlmedge.make.export import export
from vlmedge.make.recipe import Recipe

TOKENS, ROUNDS = 25, 7
SIZES = {"blip-base": 384, "blip2-opt-2.7b": 224}  # pixels
COMPILES = ("blip2-opt-2.7b",)  # BLIP's decoder asserts on the GPU with a static cache
CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
Sides = dict[str, Callable[[], Any]]


def on_gpu(kind: str) -> Any:
    """Return PyTorch's model of this kind, float16, on the GPU."""
    config, architecture = MODELS[kind]
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("cuda"):
            return architecture(config()).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def bundle(kind: str, scheme: str, work: Path) -> Path:
    """Export a kind of checkpoint at a scheme, once."""
    out = work / f"{kind}-{scheme}"
    if not out.exists():
        if not (work / kind).exists():
            write(kind, work / kind)
        recipe = Recipe() if scheme == "float32" else Recipe(scheme, keep_slower=True)
        export(str(work / kind), out, recipe=recipe, check=False)
    return out


def in_turns(sides: Sides, warm: int = 4) -> dict[str, float]:
    """Return the median ms of each side; the sides take turns."""
    taken: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(warm + ROUNDS):
        for side, work in sides.items():
            torch.cuda.synchronize()
            began = time.perf_counter()
            work()
            torch.cuda.synchronize()
            if turn >= warm:
                taken[side].append(1000 * (time.perf_counter() - began))
    return {side: round(median(times), 3) for side, times in taken.items()}


def tower(work: Path) -> dict[str, Any]:
    """Time ViT-L/14: pixels float32 (1, 3, 224, 224) from the host, embedding to the host."""
    model = on_gpu("clip-vit-l-14")
    pixels = np.random.default_rng(0).standard_normal((1, 3, 224, 224), np.float32)

    def of(function: Callable[..., Any]) -> Callable[[], Any]:
        def embed() -> Any:
            with torch.inference_mode():
                given = torch.from_numpy(pixels).to("cuda", torch.float16)
                found = function(pixel_values=given)
                pooled = getattr(found, "pooler_output", found)
                return pooled.float().cpu().numpy()

        return embed

    sides: Sides = {"torch eager": of(model.get_image_features)}
    sides["torch compile"] = of(torch.compile(model.get_image_features))
    sides["torch reduce-overhead"] = of(
        torch.compile(model.get_image_features, mode="reduce-overhead")
    )
    for scheme in ("float32", "fp16", "int8") if CUDA else ():
        opened = vlmedge.load(bundle("clip-vit-l-14", scheme, work), engine="ort_cuda")
        graph = opened.graphs["vision_encoder"]
        (name,) = (i.name for i in graph.component.inputs)
        sides[f"vlmedge {scheme}"] = lambda g=graph, n=name: g.run({n: pixels})
    return {"ms": in_turns(sides), "tensorrt": tensorrt("clip-vit-l-14", work, ("fp16", "int8"))}


def tensorrt(kind: str, work: Path, schemes: Iterable[str]) -> dict[str, Any]:
    """Return TensorRT's column: what _tensorrt_worker.py prints for each scheme."""
    found: dict[str, Any] = {}
    python = os.environ.get("TENSORRT_PYTHON")
    for scheme in schemes if python else ():
        worker = Path(__file__).with_name("_tensorrt_worker.py")
        level = os.environ.get("TENSORRT_LEVEL", "")
        command = [str(python), str(worker), str(bundle(kind, scheme, work))]
        numbers = [str(TOKENS), str(ROUNDS), level]
        ran = subprocess.run([*command, *numbers], stdout=subprocess.PIPE, text=True)
        failed = f"failed with exit code {ran.returncode}"
        found[scheme] = failed if ran.returncode else json.loads(ran.stdout.splitlines()[-1])
        print(kind, scheme, json.dumps(found[scheme]), flush=True)
    return found


def cosine(a: Any, b: Any) -> float:
    """Return the cosine of two vectors."""
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def captioner(kind: str, work: Path, schemes: Iterable[str]) -> dict[str, Any]:
    """Time captions, and compare the tower's output with the CPU engine's."""
    size, model = SIZES[kind], on_gpu(kind)
    image = draw_scene(0, "heldout").image
    processor = transformers.BlipImageProcessor(size={"height": size, "width": size})

    def theirs(count: int, **options: Any) -> Any:
        pixels = processor(image, return_tensors="pt")["pixel_values"].to("cuda", torch.float16)
        with torch.inference_mode():
            return model.generate(
                pixel_values=pixels,
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                num_beams=1,
                **options,
            )

    result: dict[str, Any] = {"cosine, tower to the CPU engine's": {}}
    opened = {}
    pixels = np.random.default_rng(0).standard_normal((1, 3, size, size), np.float32)
    for scheme in schemes if CUDA else ():
        path = bundle(kind, scheme, work)
        opened[scheme] = vlmedge.load(path, engine="ort_cuda")
        towers = []
        for model_ in (opened[scheme], vlmedge.load(path)):
            graph = model_.graphs["vision_encoder"]
            name = graph.component.inputs[0].name
            towers.append(next(iter(graph.run({name: pixels}).values())).ravel())
        result["cosine, tower to the CPU engine's"][scheme] = cosine(*towers)
    for name, count in (("first token", 1), ("caption", TOKENS)):
        sides: Sides = {"torch eager": lambda n=count: theirs(n)}
        for scheme, ours in opened.items():
            sides[f"vlmedge {scheme}"] = caption(ours, image, count)
        result[name] = in_turns(sides)
    result["step"] = {
        side: round((result["caption"][side] - result["first token"][side]) / (TOKENS - 1), 3)
        for side in result["caption"]
    }
    if kind in COMPILES:
        compiled = {
            name: in_turns({"": lambda n=n: theirs(n, cache_implementation="static")})[""]
            for name, n in (("first token", 1), ("caption", TOKENS))
        }
        step = (compiled["caption"] - compiled["first token"]) / (TOKENS - 1)
        result["torch compile, static cache"] = {**compiled, "step": round(step, 3)}
    torch.cuda.empty_cache()
    within = [scheme for scheme in schemes if scheme != "int4"]  # which TensorRT 8.6 has not
    return result | {"tensorrt": tensorrt(kind, work, within)}


def caption(model: vlmedge.Model, image: Any, count: int) -> Callable[[], str]:
    """Return what makes a caption of so many tokens."""
    return lambda: model.caption(image, max_tokens=count, min_tokens=count)


def main() -> None:
    """Run all, each by itself; what fails says so and the rest goes on."""
    work, file, *wanted = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]
    work.mkdir(parents=True, exist_ok=True)
    out: dict[str, Any] = {
        "machine": f"{torch.cuda.get_device_name()}, torch {torch.__version__}",
        "rounds": ROUNDS,
    }
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "clip-vit-l-14": lambda: tower(work),
        "blip-base": lambda: captioner("blip-base", work, ("fp16", "int8")),
        "blip2-opt-2.7b": lambda: captioner("blip2-opt-2.7b", work, ("fp16", "int4")),
    }
    for name, case in cases.items():
        if wanted and name not in wanted:
            continue
        began = time.perf_counter()
        try:
            out[name] = case()
        except Exception as error:
            out[name] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:600]}"
        torch.cuda.empty_cache()
        print(name, f"{time.perf_counter() - began:.0f} s", json.dumps(out[name]), flush=True)
        file.write_text(json.dumps(out, indent=2) + "\n")


if __name__ == "__main__":
    main()
