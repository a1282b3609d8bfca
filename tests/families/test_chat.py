"""Chats of every family, against transformers' own generate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from kit.reference import NEW, QUESTIONS, Case
from PIL import Image


def test_chat_is_transformers_with_its_cache_kept_or_lost(
    case: Case, images: list[Image.Image]
) -> None:
    if "chat" not in case.model.bundle.spec.tasks:
        pytest.skip("does not chat")
    turns = [(QUESTIONS[1], [images[0]]), (QUESTIONS[0], []), (QUESTIONS[2], images[1:3])]
    chat = case.model.chat(max_tokens=NEW)
    kept = [chat.ask(text, seen) for text, seen in turns]
    assert chat._prompt is not None and chat._prompt.before is not None
    disturbed = case.model.chat(max_tokens=NEW)
    lost = []
    for text, seen in turns:
        lost.append(disturbed.ask(text, seen))
        case.model.ask(images[3], QUESTIONS[0], max_tokens=2)  # takes the cache away
    assert lost == kept
    assert [reply for _, reply in chat.turns] == kept
    processor = transformers.AutoProcessor.from_pretrained(case.folder)
    # by embeddings: a random model may write the picture's token, which transformers then refuses
    read = np.stack(chat._vectors[: chat._prompt.tokens])[None]
    given = {"inputs_embeds": torch.from_numpy(read), "attention_mask": torch.ones(read.shape[:2])}
    with torch.no_grad():
        new = case.reference.generate(**given, max_new_tokens=NEW, do_sample=False)[0]
    assert processor.tokenizer.decode(new, skip_special_tokens=True).strip() == kept[-1]
