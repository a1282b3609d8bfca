"""Score a saved tiny checkpoint on held-out scenes, in PyTorch float32, and write scores.json."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from corpus import prompt
from PIL import Image
from transformers import (
    AutoProcessor,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    CLIPModel,
)

from vlmedge.scenes import CLASSES, TEMPLATE, Scene, draw_labelled, draw_scene

BATCH = 50
MARK = "<!-- scores, by evaluate.py -->"


def score_clip(folder: Path, count: int, split: str) -> dict[str, Any]:
    """Zero-shot top-1 over `CLASSES`, in percent, as in CLIP (Radford et al. 2021, section 3.1)."""
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    texts = [TEMPLATE.format(name) for name in CLASSES]
    pictures = [draw_labelled(i, split) for i in range(count)]
    hits, margins = 0, []
    for start in range(0, count, BATCH):
        part = pictures[start : start + BATCH]
        images = [Image.fromarray(image) for image, _ in part]
        inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
        logits = model(**inputs).logits_per_image
        labels = torch.tensor([label for _, label in part])
        hits += int((logits.argmax(1) == labels).sum())
        best = logits.topk(2, dim=1).values
        margins += (best[:, 0] - best[:, 1]).tolist()
    return {
        "zero_shot_top1_percent": 100.0 * hits / count,
        "classes": len(CLASSES),
        "median_margin_logits": round(sorted(margins)[count // 2], 2),
    }


def score_blip2(folder: Path, count: int, split: str) -> dict[str, Any]:
    """Captions and answers that are exactly right, greedy, in percent."""
    model = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = Blip2Processor.from_pretrained(folder)
    scenes = [draw_scene(i, split) for i in range(count)]
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, count, BATCH):
        part = scenes[start : start + BATCH]
        for scene, text in zip(part, _generate(model, processor, part, None), strict=True):
            right["caption"].append(text == scene.caption)
        for number in range(len(part[0].questions)):
            asked = [scene.questions[number] for scene in part]
            texts = _generate(model, processor, part, [prompt(q) for q, _ in asked])
            for (question, answer), text in zip(asked, texts, strict=True):
                kind = " ".join(question.split()[:2])
                for key in ("questions", f"questions: {kind}"):
                    right[key].append(text == answer)
    percent = {key: round(100.0 * sum(hits) / len(hits), 2) for key, hits in right.items()}
    kinds = {k.split(": ")[1]: v for k, v in sorted(percent.items()) if ": " in k}
    return {
        "caption_exact_percent": percent["caption"],
        "questions_right_percent": percent["questions"],
        "questions": len(right["questions"]),
        **{f"questions_right_percent_{kind.replace(' ', '_')}": v for kind, v in kinds.items()},
    }


def _generate(
    model: Blip2ForConditionalGeneration,
    processor: Blip2Processor,
    scenes: list[Scene],
    prompts: list[str] | None,
) -> list[str]:
    inputs = processor(
        images=[Image.fromarray(scene.image) for scene in scenes],
        text=prompts,
        padding=True,
        return_tensors="pt",
    )
    limit = model.generation_config.max_new_tokens
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=limit)
    # With input_ids given, transformers returns the prompt too.
    ids = ids[:, inputs["input_ids"].shape[1] :] if prompts else ids
    return [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]


def write_card(card: Path, scores: dict[str, Any]) -> None:
    """Put the scores between the card's two marks, so that nobody writes them by hand."""
    rows = [f"| {name.replace('_', ' ')} | {value} |" for name, value in scores.items()]
    table = "\n".join(["| held-out, PyTorch float32 | |", "| --- | --- |", *rows])
    before, _, rest = card.read_text().partition(MARK)
    after = rest.partition(MARK)[2]
    card.write_text(f"{before}{MARK}\n{table}\n{MARK}{after}")


def main() -> None:
    """Score one folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--split", default="heldout")
    parser.add_argument("--dry", action="store_true", help="print, do not write scores.json")
    options = parser.parse_args()
    torch.set_num_threads(2)
    config = json.loads((options.folder / "config.json").read_text())
    score = {"clip": score_clip, "blip-2": score_blip2}[config["model_type"]]
    with torch.inference_mode():
        scores = score(options.folder, options.scenes, options.split)
    scores = {"split": options.split, "scenes": options.scenes, **scores}
    text = json.dumps(scores, indent=2)
    print(text)
    if not options.dry:
        (options.folder / "scores.json").write_text(text + "\n")
        write_card(options.folder / "README.md", scores)


if __name__ == "__main__":
    main()
