"""Example pictures with their paintings and one picture in, that picture's painting out.

Nothing is trained: the examples say what to do, and all answers are paintings. What a painting's
pixels mean is the task's data. Sources: Wang et al. 2022, arXiv 2212.02499 (Painter), and Wang et
al. 2023, arXiv 2304.03284 (SegGPT, which looks at several examples at once).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import msgspec
import numpy as np
import PIL.Image
from numpy.typing import NDArray

from vlmedge.arrays import Array, Arrays
from vlmedge.errors import InputError
from vlmedge.run.inputs.image import preprocess
from vlmedge.run.inputs.image_files import ImageSource, load_image, load_painting
from vlmedge.run.inputs.interpolate import interpolate
from vlmedge.run.tasks.context import IMAGES_PER_BATCH, TaskContext
from vlmedge.run.tasks.trial import Choices, Column, Facts, Made, Pool, Samples, Trial
from vlmedge.spec import Component, PaintTask

LABELS_MOST = 255  # a PNG's palette has 256 entries, and the first is the background

Example = tuple[ImageSource, ImageSource | NDArray[np.uint16]]
"""A picture and its painting: RGB, labels, gray, or a depth as uint16 in millimetres."""


@dataclass(frozen=True, slots=True)
class Painting:
    """The answer of `Model.paint` for one picture.

    Attributes:
        pixels: The painting, uint8 [height, width, 3], RGB, of the picture's size.
        values: Meaning of the pixels, by the task. Labels: uint8 [height, width], 0 is the
            background, or gray values if no number of labels was given. Depth: float32
            [height, width], metres. Points: float32 [points, height, width], 0..1, 1 at the point
            itself. None where the painting is a picture.
    """

    pixels: NDArray[np.uint8]
    values: NDArray[np.uint8] | NDArray[np.float32] | None = None


def paint(
    context: TaskContext,
    task: PaintTask,
    images: Sequence[ImageSource],
    examples: Sequence[Example],
    labels: int | None = None,
) -> list[Painting]:
    """Paint each picture as the examples show.

    Args:
        context: The model.
        task: Its wiring.
        images: Pictures to paint.
        examples: At least one; several are looked at together.
        labels: How many there are beside the background, where pixels mean labels.
    """
    if not images:
        raise InputError("no images: give at least one")
    shown = show(context, task, examples, labels)
    found = []
    each = max(1, IMAGES_PER_BATCH // len(examples))
    for start in range(0, len(images), each):
        opened = [load_image(image) for image in images[start : start + each]]
        rows = feeds(context, task, preprocess(opened, context.image_front), shown)
        painted = context.chain(task.paint, rows)[task.output][:: len(examples)]
        for image, row in zip(opened, painted, strict=True):
            size = image.height, image.width
            found.append(read(task, colors(context, row), size, labels))
    return found


def show(
    context: TaskContext, task: PaintTask, examples: Sequence[Example], labels: int | None = None
) -> dict[str, NDArray[np.float32]]:
    """Make prompt_pixel_values and prompt_masks, float32 [examples, 3, height, width] each."""
    if not examples:
        raise InputError("no examples: give at least one picture with its painting")
    if labels is not None and task.means != "labels":
        raise InputError("labels: this task paints no labels: leave it out")
    if labels is not None and not 1 <= labels <= LABELS_MOST:
        raise InputError(f"labels is {labels}: it must be 1 to {LABELS_MOST}")
    front = context.image_front
    masks = msgspec.structs.replace(front, resample=task.example_resample)
    painted = [_colored(load_painting(painting), task, labels) for _, painting in examples]
    return {
        "prompt_pixel_values": preprocess([load_image(image) for image, _ in examples], front),
        "prompt_masks": preprocess(painted, masks),
    }


def feeds(
    context: TaskContext, task: PaintTask, pixels: NDArray[np.float32], shown: Arrays
) -> dict[str, Array]:
    """Make a row of each picture with each example, the examples of one picture together."""
    pictures, examples = len(pixels), len(shown["prompt_masks"])
    rows = {name: np.tile(array, (pictures, 1, 1, 1)) for name, array in shown.items()}
    return {
        **rows,
        context.bundle.spec.pixels: np.repeat(pixels, examples, axis=0),
        "group": np.repeat(np.arange(pictures), examples),
        "instance": np.full(pictures * examples, task.instance),
    }


def colors(context: TaskContext, painted: NDArray[np.float32]) -> NDArray[np.float32]:
    """Undo the normalisation of float32 [3, height, width]: 0..255, or beyond."""
    front = context.image_front
    mean, std = (
        np.array(x, np.float32)[:, None, None] for x in (front.image_mean, front.image_std)
    )
    undone: NDArray[np.float32] = (painted * std + mean) * np.float32(255)
    return undone


def read(
    task: PaintTask, painted: NDArray[np.float32], size: tuple[int, int], labels: int | None = None
) -> Painting:
    """Bring a painting back to a picture's size, and say what it means.

    Args:
        task: Says what pixels mean.
        painted: From `colors`, float32 [3, height, width].
        size: The picture's height and width, pixels.
        labels: As of `paint`.
    """
    if task.resample == "bicubic":  # goes beyond what it is given
        planes = np.clip(interpolate(painted, size, "bicubic"), 0, 255)
    else:
        planes = interpolate(np.clip(painted, 0, 255), size, task.resample)
    pixels = np.ascontiguousarray(planes.astype(np.uint8).transpose(1, 2, 0))
    if task.means == "labels":
        mean = planes.mean(axis=0).astype(np.uint8)
        return Painting(pixels, mean if labels is None else _nearest(planes, palette(labels)))
    if task.means == "depth":
        assert task.depth_m is not None
        return Painting(pixels, planes.mean(axis=0) * np.float32(task.depth_m / 255))
    if task.means == "points":
        return Painting(pixels, _heat(pixels, len(task.points)))
    return Painting(pixels)


def palette(labels: int) -> list[tuple[int, int, int]]:
    """Return a colour for the background, black, and one for each label, far from each other.

    Source: Painter's gen_color_coco_panoptic_segm.py, as SegGptImageProcessor has it.
    """
    steps = int(labels ** (1 / 3)) + 1
    step = 256 // steps
    places = [(i // steps**2, i % steps**2 // steps, i % steps) for i in range(labels)]
    return [(0, 0, 0), *((255 - r * step, 255 - g * step, 255 - b * step) for r, g, b in places)]


def point_colors(points: int) -> list[tuple[int, int]]:
    """Return green and blue of each point.

    Source: Painter's define_colors_gb_mean_sep.
    """
    steps = int(points ** (1 / 2)) + 1
    step = 256 // steps
    return [(255 - i // steps * step, 255 - i % steps * step) for i in range(points)]


def peaks(heat: NDArray[np.float32]) -> list[tuple[int, int, float]]:
    """Return the x, y and height of each map's top; heat is float32 [points, height, width]."""
    width = heat.shape[2]
    tops = heat.reshape(len(heat), -1).argmax(axis=1).tolist()
    return [
        (top % width, top // width, float(plane.flat[top]))
        for plane, top in zip(heat, tops, strict=True)
    ]


def trial(context: TaskContext, images: Sequence[ImageSource], i: int) -> dict[str, Array]:
    """Make feeds to compare and calibrate on, of one row: picture i, shown the one before it.

    That one's painting is white where it is brighter than its mean. The painting tasks, which
    share their graph, take turns; nothing is made where there are none.
    """
    tasks = painting_tasks(context)
    if not tasks:
        return {}
    task = tasks[i % len(tasks)]
    before = load_image(images[i - 1])
    gray = np.asarray(before.convert("L"))
    white = np.where(gray > gray.mean(), 255, 0).astype(np.uint8)
    shown = show(context, task, [(before, np.stack([white] * 3, axis=-1))])
    rows = feeds(context, task, preprocess([load_image(images[i])], context.image_front), shown)
    return {**rows, "group": np.array([i])}


def painting_tasks(context: TaskContext) -> list[PaintTask]:
    """List a model's painting tasks."""
    return [task for task in context.bundle.spec.tasks.values() if isinstance(task, PaintTask)]


class PaintTrial(Trial[PaintTask], of=PaintTask):
    """A painting, on samples."""

    @property
    def components(self) -> tuple[str, ...]:
        """The components of the wiring."""
        return self.task.paint

    def inputs(self, component: Component, samples: Samples) -> dict[str, Column]:
        """Show each picture the one before it; see `trial`."""
        if component.name not in self.task.paint:
            return {}
        # every input of one row is asked for before the next row's
        row = lru_cache(maxsize=1)(partial(trial, self.context, samples.images))

        def column(name: str) -> Column:
            return Made(len(samples.images), lambda i: row(i)[name])

        return {spec.name: column(spec.name) for spec in component.inputs}

    def answer(self, samples: Samples, tokens: int) -> Facts:
        """Paint one picture."""
        picture = samples.images[0]
        paint(self.context, self.task, [picture], [(picture, picture)])
        return {}

    def choices(self, pool: Pool) -> Choices:
        """Return the main colour of each painting; all tasks that paint share the graph."""
        colours = list(main_colors(self.context, pool.whole(self.task.output)))
        return Choices("paint, main colour", colours)


def main_colors(context: TaskContext, painted: NDArray[np.float32]) -> Iterator[int]:
    """Return for each painting the one of a few colours that is nearest on the whole."""
    for row in painted:
        mean = np.clip(colors(context, row), 0, 255).mean(axis=(1, 2), keepdims=True)
        yield int(_nearest(mean, palette(26))[0, 0])


def _nearest(planes: NDArray[np.float32], known: Sequence[Sequence[int]]) -> NDArray[np.uint8]:
    """Return the number of the nearest colour of each pixel; a tie goes to the lower one."""
    least = np.full(planes.shape[1:], np.inf, np.float32)
    found = np.zeros(planes.shape[1:], np.uint8)
    for number, color in enumerate(known):
        away = planes - np.array(color, np.float32)[:, None, None]
        distance = np.square(away).sum(axis=0)
        found[distance < least] = number
        least = np.minimum(least, distance)
    return found


def _heat(pixels: NDArray[np.uint8], points: int) -> NDArray[np.float32]:
    """Take each point's map out of a painting: red, where green and blue are nearest to its own.

    Source: Painter's TopDownCustom.decode_images_to_heatmaps_minmax.
    """
    told = pixels[..., 1:].astype(np.int16)
    known = [*point_colors(points), (0, 0)]  # the last is no point
    away = np.stack([np.abs(told - np.array(color, np.int16)).sum(axis=-1) for color in known])
    nearest = away.argmin(axis=0)
    red = pixels[..., 0].astype(np.float32) / np.float32(255)
    return np.stack([np.where(nearest == i, red, np.float32(0)) for i in range(points)])


def _colored(painting: PIL.Image.Image, task: PaintTask, labels: int | None) -> PIL.Image.Image:
    """Give an example's painting the colours that the model knows."""
    if painting.mode == "I;16":
        if task.means != "depth" or task.depth_m is None:
            raise InputError(
                "an example's painting has 16 bits: give 8, only a depth map may have 16"
            )
        whole = np.asarray(painting) / (1000 * task.depth_m) * 255
        painting = PIL.Image.fromarray(np.clip(whole, 0, 255).astype(np.uint8))
    if task.means == "labels" and labels is not None and painting.mode in ("P", "L"):
        numbers = np.asarray(painting)
        if numbers.max() > labels:
            raise InputError(
                f"an example's painting has label {numbers.max()}, labels is {labels}: "
                "number them from 0, the background; or leave labels out for shades of gray"
            )
        return PIL.Image.fromarray(np.array(palette(labels), np.uint8)[numbers])
    return load_image(painting)
