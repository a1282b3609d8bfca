"""Pictures and texts to calibrate with and to compare on.

Without pictures of the user's, scenes are drawn: for the built-in checkpoints these are labelled
data of their own distribution, for every other checkpoint merely pictures.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from vlmedge.errors import InputError
from vlmedge.image import ImageSource, load_image
from vlmedge.scenes import CLASSES, draw_labelled, draw_scene

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
QUESTION = "what is in the picture?"
CALIBRATION_IMAGES = 8  # of each kind: several objects, and one


@dataclass(frozen=True, slots=True)
class Samples:
    """What the gate compares on.

    Attributes:
        images: Pictures for captions and questions.
        questions: One for each picture.
        captions: The right caption of each picture, or none when nobody knows.
        answers: The right answer to each question, or none.
        singles: Pictures to classify.
        labels: What to choose from.
        classes: The right label of each single, or none.
    """

    images: tuple[ImageSource, ...]
    questions: tuple[str, ...]
    captions: tuple[str, ...] | None = None
    answers: tuple[str, ...] | None = None
    singles: tuple[ImageSource, ...] = ()
    labels: tuple[str, ...] = field(default=CLASSES)
    classes: tuple[int, ...] | None = None


def drawn(count: int, split: str, *, labelled: bool) -> Samples:
    """Draw scenes; `labelled` when the checkpoint has learnt to name them."""
    scenes = [draw_scene(i, split) for i in range(count)]
    singles = [draw_labelled(i, split) for i in range(count)]
    asked = [scene.questions[i % len(scene.questions)] for i, scene in enumerate(scenes)]
    return Samples(
        images=tuple(scene.image for scene in scenes),
        questions=tuple(question for question, _ in asked),
        captions=tuple(scene.caption for scene in scenes) if labelled else None,
        answers=tuple(answer for _, answer in asked) if labelled else None,
        singles=tuple(image for image, _ in singles),
        classes=tuple(label for _, label in singles) if labelled else None,
    )


def from_folder(folder: Path, count: int) -> Samples:
    """Take the first `count` pictures of a folder, by name."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder: give one that holds pictures")
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in IMAGE_ENDINGS)
    if not files:
        raise InputError(f"{folder} has no pictures: {', '.join(IMAGE_ENDINGS)} are read")
    images = tuple(load_image(file) for file in files[:count])
    return Samples(images=images, questions=(QUESTION,) * len(images), singles=images)
