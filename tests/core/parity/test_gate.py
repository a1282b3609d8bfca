"""The whole way against transformers' own models: processor, model, generate.

The gate compares components through the project's own loop and front ends; here the other side is
nothing but transformers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from kit.bundles import bundle_of
from kit.tiny import tiny
from numpy.typing import NDArray
from PIL import Image

import vlmedge
import vlmedge.errors
from vlmedge.checkpoints.scenes import CLASSES, draw_scene
from vlmedge.make.check import check

SIZES = [(32, 32), (64, 64), (101, 57), (33, 90)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    """Torch's threads cost tiny models more than they give, most of all on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="module")
def clip(folder: Path) -> tuple[transformers.CLIPModel, vlmedge.Model]:
    model, bundle = tiny("clip", folder / "clip"), bundle_of("clip", folder / "clip-b")
    check(bundle, str(folder / "clip"))
    return model, vlmedge.load(bundle)


@pytest.fixture(scope="module")
def blip2(folder: Path) -> tuple[transformers.Blip2ForConditionalGeneration, vlmedge.Model]:
    model, bundle = tiny("blip2", folder / "blip2"), bundle_of("blip2", folder / "blip2-b")
    check(bundle, str(folder / "blip2"))
    return model, vlmedge.load(bundle)


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    drawn = [Image.fromarray(draw_scene(i, "heldout").image) for i in range(12)]
    return [image.resize(SIZES[i % len(SIZES)]) for i, image in enumerate(drawn)]


def clip_pixels(images: list[Image.Image]) -> torch.Tensor:
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    return processor(images, return_tensors="pt")["pixel_values"]


def blip2_pixels(images: list[Image.Image]) -> torch.Tensor:
    processor = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
    return processor(images, return_tensors="pt")["pixel_values"]


def test_gate_has_passed(clip, blip2) -> None:  # type: ignore[no-untyped-def]
    for _, model in (clip, blip2):
        assert model.bundle.verified
        assert (model.bundle.path / "reports" / "parity.json").is_file()


def test_clip_probabilities_are_transformers(clip, images, folder) -> None:  # type: ignore[no-untyped-def]
    reference, model = clip
    labels = list(CLASSES[:20])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "clip")
    texts = tokenizer([f"a photo of a {n}" for n in labels], padding=True, return_tensors="pt")
    inputs = {k: texts[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = reference(pixel_values=clip_pixels(images), **inputs).logits_per_image
    expected: NDArray[np.float32] = logits.softmax(1).numpy()
    for row, ranking in zip(expected, model.classify(images, labels), strict=True):
        assert ranking[0][0] == labels[row.argmax()]
        shares = dict(ranking)
        np.testing.assert_allclose([shares[n] for n in labels], row, atol=1e-5)


def test_clip_embeddings_are_transformers(clip, images, folder) -> None:  # type: ignore[no-untyped-def]
    reference, model = clip
    with torch.no_grad():
        found = reference.vision_model(pixel_values=clip_pixels(images)).pooler_output
        expected = torch.nn.functional.normalize(reference.visual_projection(found), dim=-1)
    np.testing.assert_allclose(model.embed_image(images), expected.numpy(), atol=1e-5)
    assert model.embed_image(images[0]).shape == (24,)
    assert model.embed_text("a cat").shape == (24,)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"num_beams": 5}, {"num_beams": 5}),
        ({"num_beams": 3, "length_penalty": 2.0}, {"num_beams": 3, "length_penalty": 2.0}),
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"min_tokens": 5, "num_beams": 2}, {"min_new_tokens": 5, "num_beams": 2}),
    ],
    ids=["greedy", "beams", "length", "repetition", "min"],
)
def test_blip2_captions_are_transformers(  # type: ignore[no-untyped-def]
    blip2, images, folder, ours, theirs
) -> None:
    reference, model = blip2
    with torch.no_grad():
        ids = reference.generate(
            pixel_values=blip2_pixels(images), max_new_tokens=12, do_sample=False, **theirs
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "blip2")
    prompt = reference.config.num_query_tokens + 1  # image places and the start token
    texts = tokenizer.batch_decode(ids[:, prompt:], skip_special_tokens=True)
    expected = [text.strip() for text in texts]
    assert model.caption(images, max_tokens=12, **ours) == expected


def test_blip2_answers_are_transformers(blip2, images, folder) -> None:  # type: ignore[no-untyped-def]
    reference, model = blip2
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "blip2")
    text = tokenizer("Question: what is red? Answer:", return_tensors="pt")["input_ids"]
    places = torch.full((1, reference.config.num_query_tokens), reference.config.image_token_index)
    ids = torch.cat([places, text], dim=1).repeat(len(images), 1)
    with torch.no_grad():
        out = reference.generate(
            pixel_values=blip2_pixels(images), input_ids=ids, max_new_tokens=12, do_sample=False
        )
    new = out[:, ids.shape[1] :]
    expected = [t.strip() for t in tokenizer.batch_decode(new, skip_special_tokens=True)]
    assert model.ask(images, "what is red?", max_tokens=12) == expected


def test_stream_gives_the_caption_in_pieces(blip2, images) -> None:  # type: ignore[no-untyped-def]
    _, model = blip2
    pieces = list(model.stream(images[0], max_tokens=12))
    assert "".join(pieces).strip() == model.caption(images[0], max_tokens=12)


def test_one_component_runs_alone(blip2) -> None:  # type: ignore[no-untyped-def]
    _, model = blip2
    pixels = np.zeros((1, 3, 32, 32), np.float32)
    seen = model.graphs["vision_encoder"].run({"pixel_values": pixels})["image_embeds"]
    assert seen.shape == (1, 17, 32)
    with pytest.raises(vlmedge.errors.InputError, match=r"must be float32\[batch, 3, 32, 32\]"):
        model.graphs["vision_encoder"].run({"pixel_values": pixels[:, :1]})
    with pytest.raises(vlmedge.errors.InputError, match="'pixel_values' is missing"):
        model.graphs["vision_encoder"].run({})
    with pytest.raises(vlmedge.errors.UnknownNameError, match="no component 'vision'"):
        model.graphs["vision"]


def test_task_that_a_bundle_lacks_is_refused(blip2, clip, images) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(vlmedge.errors.UnknownNameError, match="choose from ask, caption"):
        blip2[1].classify(images[0], ["a"])
    with pytest.raises(vlmedge.errors.UnknownNameError, match="choose from classify"):
        clip[1].caption(images[0])


@pytest.mark.parametrize(
    ("labels", "template", "message"),
    [
        ([], None, "no labels"),
        (["a", "b", "a"], None, "label 'a' is given twice"),
        (["a", " "], None, "label 2 is empty"),
        (["a"], "a photo", "must have one {}"),
        (["a " * 40], None, "the model has room for 24"),
    ],
)
def test_bad_labels_are_refused(clip, images, labels, template, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(vlmedge.errors.InputError, match=message):
        clip[1].classify(images[0], labels, template)


def test_long_prompt_is_refused(blip2, images) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(vlmedge.errors.InputError, match="the model has room for"):
        blip2[1].caption(images[0], prompt="word " * 200)
