"""Caption speed and memory of a BLIP-2 bundle beside transformers in bf16, in one run.

    python benchmarks/caption_speed.py BUNDLE CHECKPOINT [rounds]

Both sides run in processes of their own, in turns, on the same cores and the same picture: first
token (picture to first token, everything included) and tokens a second after it, greedy, 24 new
tokens. PyTorch is transformers' own model and generate, bf16, with SDPA.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TOKENS = 24


def picture() -> Any:
    """Draw the picture that both sides see."""
    from PIL import Image

    from vlmedge.scenes import draw_scene

    return Image.fromarray(draw_scene(0, "heldout").image).resize((640, 480))


def ours(bundle: str) -> dict[str, float]:
    """Caption with vlmedge, without torch."""
    import vlmedge

    began = time.perf_counter()
    model = vlmedge.load(bundle)
    image = picture()
    model.caption(image, max_tokens=2, min_tokens=2)  # opens the sessions
    opened_s = time.perf_counter() - began
    runs = []
    for _ in range(3):
        marks = [time.perf_counter()]
        for count in (1, TOKENS):
            model.caption(image, max_tokens=count, min_tokens=count)
            marks.append(time.perf_counter())
        first = marks[1] - marks[0]
        runs.append((first, (TOKENS - 1) / (marks[2] - marks[1] - first)))
    assert "torch" not in sys.modules
    return figures(runs, opened_s)


def torch_bf16(checkpoint: str) -> dict[str, float]:
    """Caption with transformers."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    began = time.perf_counter()
    model = transformers.Blip2ForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.bfloat16
    ).eval()
    processor = transformers.BlipImageProcessor(size={"height": 224, "width": 224})
    image = picture()

    def caption(count: int) -> None:
        pixels = processor(image, return_tensors="pt")["pixel_values"].to(torch.bfloat16)
        with torch.inference_mode():
            model.generate(
                pixel_values=pixels, max_new_tokens=count, min_new_tokens=count, do_sample=False
            )

    caption(2)
    opened_s = time.perf_counter() - began
    runs = []
    for _ in range(3):
        marks = [time.perf_counter()]
        for count in (1, TOKENS):
            caption(count)
            marks.append(time.perf_counter())
        first = marks[1] - marks[0]
        runs.append((first, (TOKENS - 1) / (marks[2] - marks[1] - first)))
    return figures(runs, opened_s)


def figures(runs: list[tuple[float, float]], opened_s: float) -> dict[str, float]:
    """Take the best of the runs: noise only ever slows."""
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "first_token_ms": round(1000 * min(first for first, _ in runs), 1),
        "tokens_per_s": round(max(rate for _, rate in runs), 2),
        "open_s": round(opened_s, 1),
        "peak_gib": round(peak_kib / 2**20, 2),
    }


def main() -> None:
    """Run both sides in turns and print one table."""
    bundle, checkpoint = sys.argv[1:3]
    rounds = int(sys.argv[3]) if len(sys.argv) > 3 else 2
    results: dict[str, list[dict[str, float]]] = {"ours": [], "torch_bf16": []}
    for _ in range(rounds):
        for side, argument in (("ours", bundle), ("torch_bf16", checkpoint)):
            command = [sys.executable, str(Path(__file__)), f"--{side}", argument]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[side].append(json.loads(out.splitlines()[-1]))
            print(f"{side:11} {results[side][-1]}", flush=True)
    best = {
        side: (min(r["first_token_ms"] for r in found), max(r["tokens_per_s"] for r in found))
        for side, found in results.items()
    }
    first = best["torch_bf16"][0] / best["ours"][0]
    rate = best["ours"][1] / best["torch_bf16"][1]
    print(f"first token {first:.2f} times, tokens a second {rate:.2f} times PyTorch bf16")


if __name__ == "__main__":
    if sys.argv[1] == "--ours":
        print(json.dumps(ours(sys.argv[2])))
    elif sys.argv[1] == "--torch_bf16":
        print(json.dumps(torch_bf16(sys.argv[2])))
    else:
        main()
