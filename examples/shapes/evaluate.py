"""Score a saved tiny checkpoint on held-out scenes, in PyTorch float32, and write scores.json."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from scoring import BATCH, blip2_writer, blip_writer, llava_writer, score
from transformers import AutoProcessor, CLIPModel

from vlmedge.checkpoints.scenes import CLASSES, TEMPLATE, draw_labelled, draw_scene

MARK = "<!-- scores, by evaluate.py -->"
WRITERS = {
    "Blip2ForConditionalGeneration": blip2_writer,
    "BlipForConditionalGeneration": blip_writer,
    "BlipForQuestionAnswering": blip_writer,
    "LlavaForConditionalGeneration": llava_writer,
}


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


def score_writer(folder: Path, count: int, split: str) -> dict[str, Any]:
    """Captions and answers that are exactly right, greedy, in percent."""
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    return score(
        WRITERS[kind](model, processor),
        [draw_scene(i, split) for i in range(count)],
        caption=kind != "BlipForQuestionAnswering",
        ask=kind != "BlipForConditionalGeneration",
    )


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
    score_kind = score_clip if config["model_type"] == "clip" else score_writer
    with torch.inference_mode():
        scores = score_kind(options.folder, options.scenes, options.split)
    scores = {"split": options.split, "scenes": options.scenes, **scores}
    text = json.dumps(scores, indent=2)
    print(text)
    if not options.dry:
        (options.folder / "scores.json").write_text(text + "\n")
        write_card(options.folder / "README.md", scores)


if __name__ == "__main__":
    main()
