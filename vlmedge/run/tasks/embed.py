"""One image or text in, one vector of length 1 out; and images matched with texts.

An image may be several vectors (BLIP-2's queries): then the nearest to a text counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vlmedge.errors import InputError
from vlmedge.run.inputs.image_files import ImageSource
from vlmedge.run.tasks.context import TaskContext, activate
from vlmedge.run.tasks.imagenet_templates import IMAGENET
from vlmedge.run.tasks.trial import Choices, Column, Facts, Pool, Samples, Trial, Whole
from vlmedge.spec import Component, EmbedTask, MatchTask

Vectors = NDArray[np.float32]
TEXTS_PER_BATCH = 32


def embed_images(
    context: TaskContext, components: Sequence[str], output: str, images: Sequence[ImageSource]
) -> Vectors:
    """Return unit vectors of images, float32 [images, width] or [images, vectors, width]."""
    found = [
        embed_pixels(context, components, output, pixels) for pixels in context.batches(images)
    ]
    return np.concatenate(found)


def embed_pixels(
    context: TaskContext, components: Sequence[str], output: str, pixel_values: Vectors
) -> Vectors:
    """Return unit vectors of pixel_values, float32 [images, 3, height, width]: as above."""
    return unit(context.chain(components, {context.bundle.spec.pixels: pixel_values})[output])


def embed_texts(
    context: TaskContext, components: Sequence[str], output: str, texts: Sequence[str]
) -> Vectors:
    """Return unit vectors of texts, float32 [texts, width]."""
    if not texts:
        raise InputError("no texts: give at least one")
    found = []
    for start in range(0, len(texts), TEXTS_PER_BATCH):
        ids, mask = context.tokenizer.encode(texts[start : start + TEXTS_PER_BATCH])
        feeds = {"input_ids": ids, "attention_mask": mask}
        found.append(context.chain(components, feeds)[output])
    return unit(np.concatenate(found))


def fill(template: str, labels: Sequence[str]) -> list[str]:
    """Put labels into a template, and refuse what makes no sense to choose from."""
    if isinstance(labels, str):
        raise InputError(f"labels {labels!r} are one text: give a list of str")
    if not labels:
        raise InputError("no labels: give at least one")
    for label in labels:
        if not isinstance(label, str):
            raise InputError(f"label of type {type(label).__name__}: give a list of str")
    blank = [i for i, label in enumerate(labels) if not label.strip()]
    if blank:
        raise InputError(f"label {blank[0] + 1} is empty: give it a name or leave it out")
    seen: set[str] = set()
    for label in labels:
        if label in seen:
            raise InputError(f"label {label!r} is given twice: give each label once")
        seen.add(label)
    if template.count("{}") != 1:
        raise InputError(f"template {template!r}: it must have one {{}} for the label")
    return [template.replace("{}", label) for label in labels]


def sentences(template: str | Sequence[str], labels: Sequence[str]) -> list[list[str]]:
    """Put labels into one template or several: a row of sentences for each template."""
    if template == "imagenet":
        template = IMAGENET
    several = [template] if isinstance(template, str) else list(template)
    if not several:
        raise InputError("no templates: give at least one")
    return [fill(one, labels) for one in several]


def embed_ensemble(
    context: TaskContext, task: MatchTask, texts: Sequence[Sequence[str]]
) -> Vectors:
    """Return one unit vector a label, float32 [labels, width]: the mean over templates.

    Source: Radford et al. 2021, arXiv 2103.00020, section 3.1.4: the mean is taken of unit
    vectors, and made one again.

    Args:
        context: The model.
        task: Its wiring.
        texts: From `sentences`.
    """
    found = [embed_texts(context, task.text, task.text_output, row) for row in texts]
    return found[0] if len(found) == 1 else unit(np.mean(found, axis=0, dtype=np.float32))


def probabilities(task: MatchTask, images: Vectors, texts: Vectors) -> Vectors:
    """Return activation(scale * cosine + bias), float32 [images, texts].

    Source: Radford et al. 2021, arXiv 2103.00020, figure 3 (softmax over texts); Zhai et al. 2023,
    arXiv 2303.15343, section 3.2 (sigmoid, with a bias).
    """
    logits = cosines(images, texts) * np.float32(task.logit_scale) + np.float32(task.logit_bias)
    return activate(logits, task.activation)


def cosines(images: Vectors, texts: Vectors) -> Vectors:
    """Return the cosine of each image with each text, float32 [images, texts].

    Source: Li et al. 2023, arXiv 2301.12597, section 3.2 (of several vectors, the nearest).

    Args:
        images: float32 [images, width] or [images, vectors, width], each of length 1.
        texts: float32 [texts, width], each of length 1.
    """
    found: Vectors = images @ texts.T
    return found if images.ndim == 2 else found.max(axis=1)


def unit(vectors: Vectors) -> Vectors:
    """Scale vectors to length 1, float32 [..., width]."""
    lengths: Vectors = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / lengths


class MatchTrial(Trial[MatchTask], of=MatchTask):
    """A choice among labels, on samples."""

    @property
    def components(self) -> tuple[str, ...]:
        """Both towers."""
        return (*self.task.image, *self.task.text)

    def inputs(self, component: Component, samples: Samples) -> dict[str, Column]:
        """Return the labels' texts, or the texts of the pictures."""
        if "input_ids" not in {spec.name for spec in component.inputs}:
            return {}
        texts = samples.said or fill(self.task.template, samples.labels)
        ids, mask = self.context.tokenizer.encode(texts)
        return {"input_ids": Whole(ids), "attention_mask": Whole(mask)}

    def answer(self, samples: Samples, tokens: int) -> Facts:
        """Match one picture with one text."""
        task = self.task
        image = embed_images(self.context, task.image, task.image_output, samples.images[:1])
        text = embed_texts(self.context, task.text, task.text_output, samples.labels[:1])
        probabilities(task, image, text)
        return {}

    def choices(self, pool: Pool) -> Choices:
        """Return the label that each picture gets."""
        images, texts = (
            unit(pool.whole(name)) for name in (self.task.image_output, self.task.text_output)
        )
        best = probabilities(self.task, images, texts).argmax(axis=1).tolist()
        title = f"classify, {len(pool.samples.labels)} labels"
        return Choices(title, best, pool.samples.classes)


class EmbedTrial(Trial[EmbedTask], of=EmbedTask):
    """One vector of a picture or a text, on samples."""

    @property
    def components(self) -> tuple[str, ...]:
        """The tower."""
        return self.task.encode

    def answer(self, samples: Samples, tokens: int) -> Facts:
        """Embed one picture or one text."""
        if self.task.modality == "image":
            embed_images(self.context, self.task.encode, self.task.output, samples.images[:1])
        else:
            embed_texts(self.context, self.task.encode, self.task.output, samples.labels[:1])
        return {}
