"""Pictures and texts to calibrate with and to compare on.

Without pictures of the user's, scenes are drawn: for the built-in checkpoints these are labelled
data of their own distribution, for every other checkpoint merely pictures.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from vlmedge.checkpoints.scenes import draw_labelled, draw_scene
from vlmedge.errors import InputError
from vlmedge.run.inputs.image_files import load_image, pictures_in
from vlmedge.run.tasks.trial import Samples

QUESTION = "what is in the picture?"
CALIBRATION_IMAGES = 8  # of each kind: several objects, and one
CALIBRATION_ADVISED = 16
CAPTIONS = "captions.jsonl"


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


def calibration_folder(folder: Path, note: Callable[[str], None]) -> Samples:
    """Take every picture of a folder that can be read, to calibrate with.

    `captions.jsonl` beside them may hold lines such as {"image": "a.jpg", "caption": "a cat"}; a
    decoder then reads a caption with its picture. Pictures are opened when they are needed.

    Args:
        folder: The folder of pictures.
        note: Called with a line when some could not be read, and when there are few.

    Raises:
        InputError: There are none, or more than half cannot be read.
    """
    files = pictures_in(folder)
    readable = [file for file in files if _is_readable(file)]
    broken = len(files) - len(readable)
    if 2 * broken > len(files):
        raise InputError(
            f"{folder}: {broken} of {len(files)} pictures cannot be read: repair or remove them"
        )
    if broken:
        note(f"{folder}: {broken} of {len(files)} pictures cannot be read and are left out")
    if len(readable) < CALIBRATION_ADVISED:
        note(f"{folder} has {len(readable)} pictures: {CALIBRATION_ADVISED} or more are advised")
    written = _captions(folder)
    captions = tuple(written.get(file.name, "") for file in readable) if written else None
    return Samples(tuple(readable), (QUESTION,) * len(readable), captions)


def _is_readable(file: Path) -> bool:
    try:
        load_image(file)
    except InputError:
        return False
    return True


def _captions(folder: Path) -> dict[str, str]:
    """Read captions.jsonl, if it is there."""
    file = folder / CAPTIONS
    if not file.is_file():
        return {}
    found = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
            found[str(entry["image"])] = str(entry["caption"])
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f'{file} line {number}: it must be {{"image": "a.jpg", "caption": "a cat"}}'
            ) from None
    return found


def from_folder(folder: Path, count: int) -> Samples:
    """Take the first `count` pictures of a folder, by name."""
    images = tuple(load_image(file) for file in pictures_in(folder)[:count])
    return Samples(images=images, questions=(QUESTION,) * len(images), singles=images)
