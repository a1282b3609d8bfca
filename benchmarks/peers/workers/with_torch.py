"""PyTorch with transformers' own models and its choice of attention."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
import transformers
from _serve import Opened, Sample, Task, decoded, serve, timed
from PIL import Image

BATCH = 16


def _load(task: Task) -> Any:
    """Load what the checkpoint says that it is."""
    torch.set_num_threads(task["threads"])
    config = transformers.AutoConfig.from_pretrained(task["checkpoint"])
    architecture = getattr(transformers, config.architectures[0])
    dtype = getattr(torch, task["dtype"])
    return architecture.from_pretrained(task["checkpoint"], dtype=dtype).eval()


def tower(task: Task) -> Opened:
    """Open the image tower of a CLIP, with its projection, or of a BLIP-2."""
    model = _load(task)
    vision = model.vision_model
    projection = getattr(model, "visual_projection", None)
    pixels = torch.from_numpy(np.load(task["pixels"])).to(model.dtype)
    del model

    def work() -> None:
        with torch.inference_mode():
            seen = vision(pixels)
            if projection is not None:
                projection(seen.pooler_output)

    return Opened(timed(work))


def decoder(task: Task) -> Opened:
    """Open a decoder; the logits of the last position only."""
    model = _load(task)
    cache: dict[str, Any] = {}

    def step(ids: list[int]) -> int:
        with torch.inference_mode():
            found = model(torch.tensor([ids]), use_cache=True, logits_to_keep=1, **cache)
        cache["past_key_values"] = found.past_key_values
        return int(found.logits[0, -1].argmax())

    def read(ids: list[int]) -> int:
        cache.clear()
        return step(ids)

    return decoded(read, lambda token: step([token]), task)


def caption(task: Task) -> Opened:
    """Open a whole BLIP-2."""
    model = _load(task)
    processor = transformers.BlipImageProcessor(size={"height": 224, "width": 224})

    def write(count: int) -> float:
        began = time.perf_counter()
        image = Image.open(task["image"]).convert("RGB")
        pixels = processor(image, return_tensors="pt")["pixel_values"].to(model.dtype)
        with torch.inference_mode():
            model.generate(
                pixel_values=pixels, max_new_tokens=count, min_new_tokens=count, do_sample=False
            )
        return time.perf_counter() - began

    def run() -> Sample:
        first_s = write(1)
        rest_s = write(1 + task["new_tokens"]) - first_s
        return {"first_token_ms": 1000 * first_s, "decode_tok_s": task["new_tokens"] / rest_s}

    return Opened(run)


def classify(task: Task) -> Opened:
    """Open a whole CLIP; the labels are embedded once, as a user would."""
    model = _load(task)
    processor = transformers.CLIPImageProcessor()
    labels = torch.from_numpy(np.load(task["label_vectors"])).to(model.dtype)

    def run() -> Sample:
        began = time.perf_counter()
        for start in range(0, len(task["images"]), BATCH):
            files = task["images"][start : start + BATCH]
            images = [Image.open(file).convert("RGB") for file in files]
            pixels = processor(images, return_tensors="pt")["pixel_values"].to(model.dtype)
            with torch.inference_mode():
                seen = model.visual_projection(model.vision_model(pixels).pooler_output)
                ((seen / seen.norm(dim=-1, keepdim=True)) @ labels.T).argmax(dim=-1).tolist()
        return {"images_per_s": len(task["images"]) / (time.perf_counter() - began)}

    return Opened(run)


if __name__ == "__main__":
    serve(
        {"tower": tower, "decoder": decoder, "caption": caption, "classify": classify},
        ("torch", "transformers"),
    )
