"""A random checkpoint as PyTorch and as a bundle have it, and what transformers makes of inputs.

The gate compares components and answers through the project's own loop; here the other side is
transformers' processor, model and generate.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image
from transformers.video_utils import VideoMetadata, default_sample_indices_fn

import vlmedge
from vlmedge.run.tasks.context import TaskContext
from vlmedge.run.tasks.paint import palette
from vlmedge.spec import GenerateTask, PaintTask, wiring

SIZES = [(32, 32), (64, 64), (101, 57), (33, 90)]
QUESTIONS = ["what?", "what color is the star, and where is it?", "é?"]
LABELS = ["a cat", "a red star", "é", "two boxes"]  # as many as SIZES: FLAVA fuses pairs
NEW = 8  # tokens
Record = Callable[[str, object], None]


@dataclass(frozen=True)
class Case:
    """One random checkpoint, as PyTorch has it and as a bundle has it."""

    folder: Path
    reference: Any
    model: vlmedge.Model


def matched(case: Case, images: list[Image.Image], texts: list[str]) -> Any:
    """Give transformers' probability that each picture and its text match."""
    processor = transformers.AutoProcessor.from_pretrained(case.folder)
    inputs = processor(images=images, text=texts, return_tensors="pt", padding=True)
    found = forward(case, {**inputs, "use_image_text_matching_head": True})
    names = ("itm_score", "itm_logits", "logits_per_image")
    return found[next(name for name in names if name in found)].softmax(-1)[:, 1]


def painted(
    case: Case, image: Image.Image, examples: list[Any], task: PaintTask, labels: int | None
) -> Any:
    """What transformers paints, and its processor."""
    processor = transformers.AutoImageProcessor.from_pretrained(case.folder)
    shown, masks = zip(*examples, strict=True)
    inputs = processor(images=[image] * len(shown), prompt_images=shown, return_tensors="pt")
    resample = Image.Resampling[task.example_resample.upper()]
    if resample is not Image.Resampling.NEAREST:  # its own filter for masks is fixed
        masks = [
            Image.fromarray(np.array(palette(labels), np.uint8)[mask] if labels else mask)
            .convert("RGB")
            .resize(inputs["pixel_values"].shape[:1:-1], resample)
            for mask in masks
        ]
        extra = processor(
            images=None, prompt_masks=masks, do_convert_rgb=False, return_tensors="pt"
        )
    else:
        extra = processor(
            images=None, prompt_masks=list(masks), num_labels=labels, return_tensors="pt"
        )
    with torch.no_grad():
        outputs = case.reference(
            **inputs,
            **extra,
            feature_ensemble=len(shown) > 1,
            embedding_type="instance" if task.instance else "semantic",
        )
    return outputs, processor


def scored(case: Case, images: list[Image.Image], texts: list[str]) -> Any:
    """What transformers makes of every picture with every text."""
    processor = transformers.AutoProcessor.from_pretrained(case.folder)
    front = case.model.bundle.spec.text
    assert front is not None
    padding: dict[str, Any] = {"padding": True}
    if front.pad_to is not None:
        padding = {"padding": "max_length", "max_length": front.pad_to}
    inputs = processor(images=images, text=texts, return_tensors="pt", **padding)
    return forward(case, {**inputs, "use_itm_head": False})


def forward(case: Case, inputs: Mapping[str, Any]) -> Any:
    """Run the reference on what it takes of `inputs`, without a loss."""
    accepted = inspect.signature(case.reference.forward).parameters
    given = {k: v for k, v in {**inputs, "return_loss": False}.items() if k in accepted}
    with torch.no_grad():
        return case.reference(**given)


def given(processor: Any, image: Image.Image, task: GenerateTask, text: str) -> str:
    """Make of a prompt what a processor is given: less what it puts around a text by itself."""
    if task.image_text is None:
        return text
    text = text.replace("{examples}", "")
    token = str(getattr(processor, "image_token", ""))
    if token:  # it marks the picture's place
        writes_nothing_around = isinstance(processor, transformers.LlavaProcessor)
        shown = task.image_text.alone if writes_nothing_around else token
        text = text.replace("{image}", shown)
        _, layout, *_ = processor.prepare_inputs_layout(images=image, text=[f"{token}PROBE"])
        if layout[0].count(token) > 1:  # it puts the mark there by itself
            _, layout, *_ = processor.prepare_inputs_layout(images=image, text=["PROBE"])
            token = ""
        before, after = layout[0].split("PROBE")
    else:  # a picture comes before its text
        text = text.replace("{image}", task.image_text.alone)
        ids = processor(images=image, text="PROBE")["input_ids"][0]
        before, after = processor.tokenizer.decode(ids).split("PROBE")
    if text.startswith(before) and text.endswith(after):
        text = token + text[len(before) : len(text) - len(after)]
    return text


def processor_of(case: Case) -> Any:
    """Return transformers' processor of a checkpoint, or that of a family with a model of ours."""
    own = getattr(case.reference, "processor", None)
    return transformers.AutoProcessor.from_pretrained(case.folder) if own is None else own


def prompt_tokens(case: Case, task: GenerateTask, text: str, read: int) -> int:
    """Count what transformers' decoder repeats before what it writes."""
    if not task.read:
        return 1 if case.reference.config.is_encoder_decoder else read
    context = TaskContext(case.model.bundle, {})
    if wiring.reads_text(case.model.bundle.spec, task):
        return len(task.start_ids)
    return len(task.start_ids) + len(context.tokenizer.ids(text, whole=task.special_tokens))


def generated(
    case: Case, images: list[Image.Image], task: GenerateTask, text: str, beams: int
) -> list[str]:
    """What transformers writes about each picture, one at a time."""
    processor = processor_of(case)
    found = []
    for image in images:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PaliGemma's processor is older than numpy 2
            prompt = given(processor, image, task, text)
            inputs = processor(images=image, text=prompt, return_tensors="pt")
        with torch.no_grad():
            ids = case.reference.generate(
                **inputs, max_new_tokens=NEW, num_beams=beams, do_sample=False
            )
        start = prompt_tokens(case, task, text, inputs["input_ids"].shape[1])
        found.append(processor.tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip())
    return found


def seen(case: Case, clip: NDArray[np.uint8], task: GenerateTask, text: str, beams: int) -> str:
    """Return what transformers writes about a video.

    Its video processors need torchvision, so each frame goes through its image processor.
    """
    front = case.model.bundle.spec.video
    assert front is not None and task.image_text is not None
    if isinstance(case.reference, transformers.PreTrainedModel):
        metadata = VideoMetadata(total_num_frames=len(clip))
        places = default_sample_indices_fn(metadata, num_frames=min(front.frames, len(clip)))
        processor = transformers.CLIPImageProcessor.from_pretrained(case.folder)
        frames = [Image.fromarray(clip[i]) for i in places]
        pixels = processor(frames, return_tensors="pt")["pixel_values"]
    else:  # not of transformers; core/run/inputs/test_video.py has how its frames become pixels
        context = TaskContext(case.model.bundle, {})
        pixels = torch.from_numpy(context.frames(context.open(vlmedge.Video(clip))))
    tokenizer = transformers.AutoTokenizer.from_pretrained(case.folder)
    with torch.no_grad():
        inner = getattr(case.reference, "model", case.reference)
        rows = inner.get_video_features(pixels[None]).pooler_output
        count = rows.numel() // rows.shape[-1]
        token = task.image_text.placeholder
        text = text.replace("{image}", task.image_text.alone.replace(token, token * count))
        inputs = tokenizer(text, return_tensors="pt")
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        ids = case.reference.generate(
            **inputs,
            pixel_values_videos=pixels[None],
            max_new_tokens=NEW,
            num_beams=beams,
            do_sample=False,
        )
    new = ids[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True)).strip()
