"""Captions and answers of a model in PyTorch, greedy, and how many of them are exactly right."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from corpus import prompt
from PIL import Image

from vlmedge.checkpoints.scenes import Scene

BATCH = 50
REQUEST = "Describe the image in one sentence."  # what vlmedge says to a LLaVA for a caption

Writer = Callable[[list[Image.Image], list[str] | None], list[str]]
"""Maps pictures, and questions about them or none, to texts."""


def blip2_writer(model: Any, processor: Any) -> Writer:
    """Write as BLIP-2 does."""

    def write(images: list[Image.Image], questions: list[str] | None) -> list[str]:
        prompts = None if questions is None else [prompt(question) for question in questions]
        return _decoder_only(model, processor, images, prompts)

    return write


def llava_writer(model: Any, processor: Any) -> Writer:
    """Write as LLaVA does: a caption is the reply to a request."""

    def write(images: list[Image.Image], questions: list[str] | None) -> list[str]:
        asked = [REQUEST] * len(images) if questions is None else questions
        prompts = [f"USER: <image>\n{question} ASSISTANT:" for question in asked]
        return _decoder_only(model, processor, images, prompts)

    return write


def _decoder_only(
    model: Any, processor: Any, images: list[Image.Image], prompts: list[str] | None
) -> list[str]:
    inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
    inputs = inputs.to(model.device)
    limit = model.generation_config.max_new_tokens
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=limit)
    # With input_ids given, transformers returns the prompt too.
    ids = ids[:, inputs["input_ids"].shape[1] :] if prompts else ids
    return _texts(processor, ids)


def blip_writer(model: Any, processor: Any) -> Writer:
    """Write as BLIP does, whose two checkpoints caption or answer.

    Questions of one length go together: transformers' BLIP looks at the padding of shorter ones.
    """

    def generate(images: list[Image.Image], questions: list[str] | None) -> list[str]:
        inputs = processor(images=images, text=questions, return_tensors="pt").to(model.device)
        limit = model.generation_config.max_new_tokens
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=limit)
        return _texts(processor, ids)

    def write(images: list[Image.Image], questions: list[str] | None) -> list[str]:
        if questions is None:
            return generate(images, None)
        by_length: dict[int, list[int]] = defaultdict(list)
        for i, question in enumerate(questions):
            by_length[len(processor.tokenizer(question)["input_ids"])].append(i)
        written = [""] * len(questions)
        for rows in by_length.values():
            texts = generate([images[i] for i in rows], [questions[i] for i in rows])
            for i, text in zip(rows, texts, strict=True):
                written[i] = text
        return written

    return write


def _texts(processor: Any, ids: torch.Tensor) -> list[str]:
    return [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]


def score(
    write: Writer, scenes: Sequence[Scene], *, caption: bool = True, ask: bool = True
) -> dict[str, Any]:
    """Captions and answers that are exactly right, in percent, and answers by kind of question.

    Args:
        write: the model.
        scenes: what it is shown; each has as many questions as the others.
        caption: whether it captions.
        ask: whether it answers.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(scenes), BATCH):
        part = scenes[start : start + BATCH]
        images = [Image.fromarray(scene.image) for scene in part]
        if caption:
            for scene, text in zip(part, write(images, None), strict=True):
                right["caption"].append(text == scene.caption)
        for number in range(len(part[0].questions) if ask else 0):
            asked = [scene.questions[number] for scene in part]
            texts = write(images, [question for question, _ in asked])
            for (question, answer), text in zip(asked, texts, strict=True):
                kind = " ".join(question.split()[:2])
                for key in ("questions", f"questions: {kind}"):
                    right[key].append(text == answer)
    percent = {key: round(100.0 * sum(hits) / len(hits), 2) for key, hits in right.items()}
    scores: dict[str, Any] = {}
    if caption:
        scores["caption_exact_percent"] = percent["caption"]
    if ask:
        kinds = {k.split(": ")[1]: v for k, v in sorted(percent.items()) if ": " in k}
        scores["questions_right_percent"] = percent["questions"]
        scores["questions"] = len(right["questions"])
        for kind, value in kinds.items():
            scores[f"questions_right_percent_{kind.replace(' ', '_')}"] = value
    return scores
