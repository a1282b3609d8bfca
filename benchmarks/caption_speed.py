"""Caption speed and memory of a bundle beside transformers in bf16 and fp32, in one run.

    python benchmarks/caption_speed.py BUNDLE CHECKPOINT [rounds] [--no-fp32]

All sides run in processes of their own, in turns, on the same cores and the same picture: first
token (picture to first token, everything included), tokens a second after it, and the caption of
20 tokens, greedy. PyTorch is transformers' own model and generate, with SDPA. BLIP and BLIP-2.
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

TOKENS = 20


def picture() -> Any:
    """Draw the picture that both sides see."""
    from PIL import Image

    from vlmedge.checkpoints.scenes import draw_scene

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


def theirs(checkpoint: str, dtype: str) -> dict[str, float]:
    """Caption with transformers."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    began = time.perf_counter()
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    architecture = getattr(transformers, config.architectures[0])
    precision = getattr(torch, dtype)
    model = architecture.from_pretrained(checkpoint, dtype=precision).eval()
    size = config.vision_config.image_size
    processor = transformers.BlipImageProcessor(size={"height": size, "width": size})
    image = picture()

    def caption(count: int) -> None:
        pixels = processor(image, return_tensors="pt")["pixel_values"].to(precision)
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
    first_s, rate = min(first for first, _ in runs), max(rate for _, rate in runs)
    return {
        "first_token_ms": round(1000 * first_s, 1),
        "tokens_per_s": round(rate, 2),
        "caption_ms": round(1000 * min(first + (TOKENS - 1) / rate for first, rate in runs), 1),
        "open_s": round(opened_s, 1),
        "peak_gib": round(peak_kib / 2**20, 2),
    }


def main() -> None:
    """Run all sides in turns and print how many times slower PyTorch is."""
    words = [word for word in sys.argv[1:] if word != "--no-fp32"]
    bundle, checkpoint = words[:2]
    rounds = int(words[2]) if len(words) > 2 else 2
    sides = {"vlmedge": bundle, "bfloat16": checkpoint, "float32": checkpoint}
    if "--no-fp32" in sys.argv:
        del sides["float32"]
    results: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, argument in sides.items():
            command = [sys.executable, str(Path(__file__)), "--side", side, argument]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[side].append(json.loads(out.splitlines()[-1]))
            print(f"{side:9} {results[side][-1]}", flush=True)
    mine = results.pop("vlmedge")
    for side, found in results.items():
        ratios = []
        for name, better in (("first_token_ms", min), ("tokens_per_s", max), ("caption_ms", min)):
            pair = [better(run[name] for run in runs) for runs in (found, mine)]
            ratio = pair[0] / pair[1] if better is min else pair[1] / pair[0]
            ratios.append(f"{ratio:.2f}x {name.rsplit('_', 1)[0]}")
        print(f"vlmedge against PyTorch {side}: {', '.join(ratios)}")


if __name__ == "__main__":
    if sys.argv[1] == "--side":
        side, path = sys.argv[2:]
        print(json.dumps(ours(path) if side == "vlmedge" else theirs(path, side)))
    else:
        main()
