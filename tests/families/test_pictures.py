"""What every family makes of pictures, against transformers' own processor and model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from kit.reference import LABELS, SIZES, Case, forward, matched, painted, scored
from PIL import Image

from vlmedge.errors import InputError
from vlmedge.run.tasks.context import TaskContext
from vlmedge.spec import InfillTask, LabelTask, MatchTask, PaintTask, ScoreTask


def test_pixels_are_transformers(case: Case, images: list[Image.Image]) -> None:
    if case.model.bundle.spec.image is None:
        pytest.skip("no pictures")
    processor = transformers.AutoImageProcessor.from_pretrained(case.folder)
    context = TaskContext(case.model.bundle, {})
    for image in images:
        row = context.pixels([image])
        found = processor(image, return_tensors="np")
        theirs = found["pixel_values"][0] if hasattr(found, "keys") else np.asarray(found[0])
        theirs = theirs.reshape(-1, *theirs.shape[-3:])
        front = case.model.bundle.spec.image
        # one step of 255 before mean and std
        np.testing.assert_allclose(row, theirs, atol=1.001 / 255 / min(front.image_std))


def test_labels_are_transformers(case: Case, images: list[Image.Image]) -> None:
    if not isinstance(case.model.bundle.spec.tasks.get("classify"), LabelTask):
        pytest.skip("no closed head")
    processor = transformers.AutoImageProcessor.from_pretrained(case.folder)
    with torch.no_grad():
        inputs = [processor(image, return_tensors="pt") for image in images]
        logits = torch.cat([case.reference(**each).logits for each in inputs])
    names = case.reference.config.id2label
    for ranking, theirs in zip(case.model.classify(images), logits.softmax(-1), strict=True):
        assert ranking[0][0] == names[int(theirs.argmax())]
        ours = [dict(ranking)[names[i]] for i in range(len(names))]
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)
    with pytest.raises(
        InputError, match="has a closed head with labels of its own: leave labels out"
    ):
        case.model.classify(images, ["a", "b"])


def test_vectors_are_transformers(case: Case, images: list[Image.Image]) -> None:
    """Of every model that knows pictures and texts: unit vectors, and the scores made of them."""
    task = case.model.bundle.spec.tasks.get("classify")
    if not isinstance(task, MatchTask):
        pytest.skip("embeds no texts")
    texts = [task.template.replace("{}", label) for label in LABELS]
    theirs = scored(case, images, texts)
    ours = case.model.embed_image(images), case.model.embed_text(texts)
    for mine, name in zip(ours, ("image_embeds", "text_embeds"), strict=True):
        if name in theirs:
            np.testing.assert_allclose(mine, theirs[name], atol=1e-5)
    if ours[0].ndim == 3:  # several vectors of a picture; transformers keeps no temperature
        nearest = np.einsum("ivw,tw->itv", *ours).max(-1)
        np.testing.assert_allclose(nearest, theirs.logits_per_image, atol=1e-5)
        shares = (theirs.logits_per_image * task.logit_scale).softmax(-1)
        for ranking, row in zip(case.model.classify(images, LABELS), shares, strict=True):
            shown = [dict(ranking)[label] for label in LABELS]
            np.testing.assert_allclose(shown, row.numpy(), rtol=2e-4, atol=1e-6)
        return
    if "itm_score" in theirs:
        np.testing.assert_allclose(ours[0] @ ours[1].T, theirs.itm_score, atol=1e-5)
        return  # transformers keeps no temperature for it
    kept = [name for name in theirs if name.endswith("logits_per_image")]
    logits = theirs[kept[0]]
    shares = logits.softmax(-1) if task.activation == "softmax" else logits.sigmoid()
    for ranking, row in zip(case.model.classify(images, LABELS), shares, strict=True):
        shown = [dict(ranking)[label] for label in LABELS]
        np.testing.assert_allclose(shown, row.numpy(), rtol=2e-4, atol=1e-6)


def test_scores_are_transformers(case: Case, images: list[Image.Image]) -> None:
    if not isinstance(case.model.bundle.spec.tasks.get("match"), ScoreTask):
        pytest.skip("matches nothing")
    theirs = [matched(case, images, [text] * len(images)) for text in LABELS]
    ours = case.model.match(images, LABELS)
    np.testing.assert_allclose(ours, np.transpose(theirs), atol=1e-5)
    assert case.model.match(images[0], LABELS) == pytest.approx(ours[0], abs=1e-6)
    assert case.model.match(images[0], LABELS[1]) == pytest.approx(ours[0][1], abs=1e-5)
    with pytest.raises(InputError, match="no texts: give at least one"):
        case.model.match(images[0], [])


def test_gaps_are_filled_as_transformers_does(case: Case, images: list[Image.Image]) -> None:
    task = case.model.bundle.spec.tasks.get("infill")
    if not isinstance(task, InfillTask):
        pytest.skip("fills no gaps")
    text = f"a {task.mask_text} of a {task.mask_text}"
    processor = transformers.AutoProcessor.from_pretrained(case.folder)
    for image in images:
        inputs = processor(images=[image], text=[text], return_tensors="pt")
        logits = forward(case, inputs).mmm_text_logits[0]
        places = inputs["input_ids"][0] == task.mask_id
        theirs = logits[places].softmax(-1)
        ours = case.model.infill(image, text, top=3)
        assert len(ours) == 2
        for ranking, row in zip(ours, theirs, strict=True):
            best = row.topk(3)
            assert [p for _, p in ranking] == pytest.approx(best.values.tolist(), rel=1e-4)
            words = [processor.tokenizer.decode([i]).strip() for i in best.indices.tolist()]
            assert [word for word, _ in ranking] == words
    with pytest.raises(InputError, match="has no gap: write"):
        case.model.infill(images[0], "a photo of a cat")
    with pytest.raises(InputError, match="top is 0"):
        case.model.infill(images[0], text, top=0)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_paintings_are_transformers(case: Case, images: list[Image.Image], count: int) -> None:
    """With one example and with several: labels by palette and without, and what is painted."""
    tasks = {n: t for n, t in case.model.bundle.spec.tasks.items() if isinstance(t, PaintTask)}
    if not tasks:
        pytest.skip("paints nothing")
    rng = np.random.default_rng(count)
    numbered = [rng.integers(0, 8, size[::-1]).astype(np.uint8) for size in SIZES[:count]]
    asked, examples = images[3], list(zip(images, numbered, strict=False))
    for name, task in tasks.items():
        labelled = task.means == "labels"
        outputs, processor = painted(case, asked, examples, task, 7 if labelled else None)
        found = case.model.paint(asked, examples, task=name, labels=7 if labelled else None)
        theirs = outputs.pred_masks[0, :, outputs.pred_masks.shape[2] // 2 :]
        mean, std = (
            torch.tensor(x)[:, None, None] for x in (processor.image_mean, processor.image_std)
        )
        whole = (theirs * std + mean) * 255
        exact = {} if task.resample == "nearest" else {"align_corners": False}
        whole = torch.nn.functional.interpolate(
            (whole if task.resample == "bicubic" else whole.clip(0, 255))[None],
            size=asked.size[::-1],
            mode=task.resample,
            **exact,
        )[0].clip(0, 255)
        difference = np.abs(found.pixels.transpose(2, 0, 1) - whole.numpy())
        assert difference.max() <= 1.01  # pixels are cut to whole numbers
        if labelled and task.resample == "nearest":
            size = [(asked.height, asked.width)] * count
            (best, *_) = processor.post_process_semantic_segmentation(outputs, size, num_labels=7)
            np.testing.assert_array_equal(found.values, best.numpy())
            assert len(np.unique(found.values)) > 2
        elif task.means == "depth":
            np.testing.assert_allclose(found.values, whole.mean(0).numpy() / 25.5, atol=1e-4)
    alone = [case.model.paint(image, examples) for image in images]
    together = case.model.paint(images, examples)
    for one, other in zip(alone, together, strict=True):
        assert np.abs(one.pixels.astype(int) - other.pixels).max() <= 1
