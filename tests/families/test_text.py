"""What every family writes about pictures, against transformers' own generate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from kit.reference import NEW, QUESTIONS, Case, generated, processor_of
from numpy.typing import NDArray
from PIL import Image

import vlmedge
from vlmedge.errors import InputError
from vlmedge.run.tasks import encode as encoding
from vlmedge.run.tasks import generate as generating
from vlmedge.run.tasks import prompt as prompting
from vlmedge.run.tasks.context import TaskContext
from vlmedge.run.tasks.prompt import Example
from vlmedge.spec import GenerateTask, wiring


@pytest.mark.parametrize("beams", [1, 3])
def test_text_is_transformers(case: Case, images: list[Image.Image], beams: int) -> None:
    tasks = case.model.bundle.spec.tasks
    if "ask" not in tasks and "caption" not in tasks:
        pytest.skip("writes nothing")
    for name in {"ask", "caption"} & set(tasks):
        task = tasks[name]
        assert isinstance(task, GenerateTask)
        if name == "ask":
            ours = case.model.ask(images, QUESTIONS[1], max_tokens=NEW, num_beams=beams)
            text = task.prompt.replace("{question}", QUESTIONS[1])
        else:
            begin = "a" if "{prompt}" in task.prompt else ""
            ours = case.model.caption(images, begin, max_tokens=NEW, num_beams=beams)
            text = task.prompt.replace("{prompt}", begin)
        assert ours == generated(case, images, task, text, beams)


def test_answers_depend_on_picture_and_text(
    case: Case, images: list[Image.Image], clips: list[NDArray[np.uint8]]
) -> None:
    """Else the comparisons above would not see a lost picture, or a lost question."""
    tasks = case.model.bundle.spec.tasks
    written = [name for name in ("ask", "caption", "ask_video", "caption_video") if name in tasks]
    if not written:
        pytest.skip("writes nothing")
    for name in written:
        task = tasks[name]
        assert isinstance(task, GenerateTask)
        shown: list[Any] = list(images)
        if task.source == "video":
            shown = [vlmedge.Video(clip) for clip in clips]
        asks = "{question}" in task.prompt
        write = case.model.ask if asks else case.model.caption
        texts = QUESTIONS if asks else ["a", "two", "é"] if "{prompt}" in task.prompt else []
        answers = [[write(each, t, max_tokens=NEW) for each in shown] for t in texts or [""]]
        assert len(set(answers[0])) > 1, f"{name}: all pictures are answered alike"
        alike = all(answer == answers[0] for answer in answers[1:])
        assert not (texts and alike), f"{name}: all texts are answered alike"


def test_question_may_begin_with_another_token(case: Case, images: list[Image.Image]) -> None:
    task = case.model.bundle.spec.tasks.get("ask")
    if not isinstance(task, GenerateTask):
        pytest.skip("answers nothing")
    if "input_ids" not in wiring.wanted(case.model.bundle.spec, task):
        with pytest.raises(InputError, match="this model has no encoder for questions"):
            case.model.ask(images[0], "what?", first_token="<s>")
        return
    processor = transformers.AutoProcessor.from_pretrained(case.folder)
    usual = case.model.ask(images, QUESTIONS[0], max_tokens=NEW)
    changed = []
    for token in ("<image>", "<e>", "</s>"):
        theirs = []
        for image in images:
            inputs = processor(images=image, text=QUESTIONS[0], return_tensors="pt")
            inputs["input_ids"][:, 0] = processor.tokenizer.convert_tokens_to_ids(token)
            with torch.no_grad():
                ids = case.reference.generate(**inputs, max_new_tokens=NEW)[0]
            text = processor.tokenizer.decode(ids[len(task.start_ids) :], skip_special_tokens=True)
            theirs.append(text.strip())
        assert case.model.ask(images, QUESTIONS[0], max_tokens=NEW, first_token=token) == theirs
        changed += [a != b for a, b in zip(usual, theirs, strict=True)]
    assert any(changed)
    with pytest.raises(InputError, match=r"first_token 'two words' is \d+ tokens: give one"):
        case.model.ask(images[0], "what?", first_token="two words")


def test_instruction_has_its_say_in_what_is_seen(case: Case, images: list[Image.Image]) -> None:
    task = case.model.bundle.spec.tasks.get("ask")
    context = TaskContext(case.model.bundle, case.model.graphs)
    if not isinstance(task, GenerateTask) or not task.instruct:
        with pytest.raises(InputError, match="has no text front end for instructions"):
            assert context.instruction_tokenizer
        return
    pixels = context.pixels(images[:1])
    encoded = list(encoding.encode(context, task, pixels))
    together = encoding.instructed(context, task, [encoded] * len(QUESTIONS), QUESTIONS)
    processor = transformers.AutoProcessor.from_pretrained(case.folder)
    for [soft], question in zip(together, QUESTIONS, strict=True):
        read = processor.qformer_tokenizer(question, return_tensors="pt")
        with torch.no_grad():
            theirs = case.reference.get_image_features(
                torch.from_numpy(pixels), read["input_ids"], read["attention_mask"]
            ).pooler_output[0]
        np.testing.assert_allclose(soft, theirs.numpy(), atol=1e-5)
    assert np.abs(together[0][0] - together[1][0]).max() > 0.01
    with pytest.raises(InputError, match=r"prompt of \d+ tokens: the model has room for 64"):
        case.model.ask(images[0], "x" * 80, max_tokens=NEW)


def test_prompts_of_unequal_length_are_kept_apart(case: Case, images: list[Image.Image]) -> None:
    task = case.model.bundle.spec.tasks.get("ask")
    if not isinstance(task, GenerateTask):
        pytest.skip("answers nothing")
    context = TaskContext(case.model.bundle, case.model.graphs)
    options = context.options({"max_tokens": NEW})
    pictures = context.pictures(images[:3])
    texts = [
        prompting.fill(task, question, [grid])
        for question, grid in zip(QUESTIONS, pictures.grids, strict=True)
    ]
    soft = encoding.encode(context, task, pictures.pixel_values)
    encoded = encoding.rows(soft, pictures.grids)
    together = generating.write(context, task, encoded, texts, options)
    alone = [
        generating.write(context, task, encoded[i : i + 1], [text], options)[0]
        for i, text in enumerate(texts)
    ]
    assert together == alone


def test_examples_are_transformers(case: Case, images: list[Image.Image]) -> None:
    task = case.model.bundle.spec.tasks.get("caption")
    if not isinstance(task, GenerateTask) or task.example is None:
        pytest.skip("takes no examples")
    examples = [
        Example(image, f"{word} star") for image, word in zip(images[:2], ("a", "no"), strict=True)
    ]
    ours = case.model.caption(images[2], examples=examples, max_tokens=NEW)
    processor = processor_of(case)
    assert task.image_text is not None
    layout: list[Any] = []  # what a processor of interleaved prompts takes
    for example in examples:
        layout += [
            example.image,
            task.example.replace("{image}", "").replace("{text}", example.text),
        ]
    layout += [images[2], task.prompt.split("{image}")[1].replace("{prompt}", "")]
    inputs = processor(text=[layout], return_tensors="pt")
    with torch.no_grad():
        ids = case.reference.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    new = ids[0, inputs["input_ids"].shape[1] :]
    assert ours == processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert ours != case.model.caption(images[2], max_tokens=NEW)
