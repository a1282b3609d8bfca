"""Scenes drawn by a seed: the data behind the built-in checkpoints, endless and offline.

A scene is a 64x64 picture of one or two objects (a size, a colour and a shape each) on a
textured background. Its caption and its answers are functions of what was drawn: objects of one
scene never share a shape or a colour, and no relation or place is ever a near tie. So exact match
is a fair metric.

The splits share one distribution and no picture: the generator of a scene is seeded by the pair
(number of the split, index), and numpy's `SeedSequence` keeps different pairs apart. Only
`Generator.random` is drawn from, whose stream numpy keeps stable over its versions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

__all__ = [
    "CLASSES",
    "COLORS",
    "IMAGE_SIZE_PX",
    "SHAPES",
    "TEMPLATE",
    "Plan",
    "Scene",
    "Thing",
    "an",
    "draw_labelled",
    "draw_plan",
    "draw_scene",
    "plan_labelled",
    "plan_scene",
]

IMAGE_SIZE_PX = 64
TEMPLATE = "a photo of a {}"

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "orange": (245, 140, 25),
    "yellow": (245, 228, 60),
    "green": (40, 165, 55),
    "blue": (40, 75, 220),
    "purple": (135, 45, 175),
    "black": (22, 22, 24),
    "white": (244, 244, 244),
}
# No object has a background's colour, so every object stands out.
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "gray": (130, 130, 132),
    "pink": (240, 165, 190),
    "brown": (120, 82, 52),
    "teal": (70, 165, 165),
}
COUNTS = ("one", "two")
QUESTIONS_PER_SCENE = 4

_SPLITS = {"train": 0, "heldout": 1, "calibration": 2}
_SUPERSAMPLE = 4
_SMALL_RADIUS_PX = (6.5, 8.0)
_LARGE_RADIUS_PX = (11.5, 14.0)
_TILT_DEGREES = 12.0

Points = NDArray[np.float64]
T = TypeVar("T")


def _polar(radii: Sequence[float], start_degrees: float = -90.0) -> Points:
    """Points at these radii, at equal angles; -90 degrees is up, since y grows downwards."""
    angles = np.radians(start_degrees + np.arange(len(radii)) * 360.0 / len(radii))
    circle = np.stack([np.cos(angles), np.sin(angles)], 1)
    return np.asarray(circle * np.asarray(radii)[:, None], dtype=np.float64)


def _heart() -> Points:
    t = np.linspace(0.0, 2.0 * np.pi, 40, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.asarray(np.stack([x, y - 2.5], 1) / 15.0, dtype=np.float64)


_DISC = _polar([0.95] * 40)
_TRIANGLE = np.add(_polar([1.15] * 3), (0.0, 0.25))
_DIAMOND = np.array([(0.0, -1.15), (0.75, 0.0), (0.0, 1.15), (-0.75, 0.0)])
_CORNER = [(-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1), (-1, -3)]
_CROSS = np.array([*_CORNER, *((-x, -y) for x, y in _CORNER)]) / 3.0
_SIDE = [(0.95, 0.0), (0.35, 0.0), (0.35, 1.1)]
_ARROW = np.array([(0.0, -1.1), *_SIDE, *((-x, y) for x, y in reversed(_SIDE))])
# Each shape is an outline and, where it has one, a part cut out of it; units of the radius.
_OUTLINES: dict[str, tuple[Points, Points | None]] = {
    "circle": (_DISC, None),
    "square": (_polar([1.13] * 4, -45.0), None),
    "triangle": (_TRIANGLE, None),
    "diamond": (_DIAMOND, None),
    "star": (_polar([1.15, 0.45] * 5), None),
    "cross": (_CROSS, None),
    "ring": (_DISC * 1.05, _DISC * 0.58),
    "heart": (_heart(), None),
    "moon": (_DISC * 1.1, np.add(_DISC * 0.95, (0.52, 0.0))),
    "arrow": (_ARROW, None),
}
SHAPES: tuple[str, ...] = tuple(_OUTLINES)
CLASSES: tuple[str, ...] = tuple(f"{color} {shape}" for shape in SHAPES for color in COLORS)


@dataclass(frozen=True, slots=True)
class Scene:
    """One picture and what is true of it.

    Attributes:
        image: uint8 (64, 64, 3), RGB.
        caption: the one right caption.
        questions: four (question, answer) pairs.
    """

    image: NDArray[np.uint8]
    caption: str
    questions: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: `x_px` and `y_px` are its centre, `radius_px` about half its width."""

    shape: str
    color: str
    size: str
    x_px: float
    y_px: float
    radius_px: float
    tilt_degrees: float

    @property
    def name(self) -> str:
        """Colour and shape, such as "red circle"."""
        return f"{self.color} {self.shape}"

    @property
    def place(self) -> str | None:
        """left, right, top, bottom or center; None where that would be a near tie."""
        dx, dy = self.x_px - IMAGE_SIZE_PX / 2, self.y_px - IMAGE_SIZE_PX / 2
        near, far = sorted((abs(dx), abs(dy)))
        if far <= 5:
            return "center"
        if far < 11 or far - near < 6:
            return None
        if abs(dx) > abs(dy):
            return "left" if dx < 0 else "right"
        return "top" if dy < 0 else "bottom"


@dataclass(frozen=True, slots=True)
class Plan:
    """Contents of a scene, before it is drawn.

    Attributes:
        things: in reading order: the left one first, or the upper one.
        background: the name of its colour.
        relation: "left of" or "above" for two things, else "".
        questions: every (question, answer) pair of the grammar, "no" answers sampled.
        asked: the indices of the questions that the scene shows.
        seed: of the picture's pixels.
    """

    things: tuple[Thing, ...]
    background: str
    relation: str
    questions: tuple[tuple[str, str], ...]
    asked: tuple[int, ...]
    seed: tuple[int, int, int]

    @property
    def caption(self) -> str:
        """The one right caption."""
        end = f" on a {self.background} background"
        names = [f"a {thing.size} {thing.name}" for thing in self.things]
        return f" {self.relation} ".join(names) + end


class _Dice:
    """Choices from `Generator.random` alone."""

    def __init__(self, *seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(self._rng.random())

    def index(self, count: int) -> int:
        return int(self._rng.random() * count)

    def pick(self, items: Sequence[T]) -> T:
        return items[self.index(len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        order = np.argsort(self._rng.random(len(items)), kind="stable")
        return [items[i] for i in order[:count]]

    def field(self, *shape: int) -> NDArray[np.float64]:
        """Uniform in [-1, 1)."""
        return self._rng.random(shape) * 2.0 - 1.0


def draw_scene(index: int, split: str) -> Scene:
    """Draw scene `index` of a split: "train", "heldout" or "calibration".

    The same (index, split) gives the same scene always; no two splits share a seed (see above).
    """
    plan = plan_scene(index, split)
    questions = tuple(plan.questions[i] for i in plan.asked)
    return Scene(draw_plan(plan), plan.caption, questions)


def draw_labelled(index: int, split: str) -> tuple[NDArray[np.uint8], int]:
    """Draw a picture of one object: uint8 (64, 64, 3), RGB, and its index in `CLASSES`."""
    plan = plan_labelled(index, split)
    return draw_plan(plan), CLASSES.index(plan.things[0].name)


def plan_scene(index: int, split: str) -> Plan:
    """Decide what scene `index` of a split holds, without drawing it."""
    dice = _Dice(_split_number(split), 0, index)
    count = 1 + (dice.uniform(0, 1) > 0.3)
    return _plan(dice, count, (_split_number(split), 1, index))


def plan_labelled(index: int, split: str) -> Plan:
    """Decide what labelled picture `index` of a split holds, without drawing it."""
    return _plan(_Dice(_split_number(split), 2, index), 1, (_split_number(split), 3, index))


def _plan(dice: _Dice, count: int, seed: tuple[int, int, int]) -> Plan:
    shapes, colors = dice.sample(SHAPES, count), dice.sample(tuple(COLORS), count)
    sizes = [("small", "large")[dice.index(2)] for _ in shapes]
    radii = [
        dice.uniform(*(_SMALL_RADIUS_PX if size == "small" else _LARGE_RADIUS_PX)) for size in sizes
    ]
    relation = ""
    if count == 1:
        centres = [(_inside(dice, radii[0]), _inside(dice, radii[0]))]
    else:
        relation, centres = _place_two(dice, radii[0], radii[1])
    tilt = [dice.uniform(-_TILT_DEGREES, _TILT_DEGREES) for _ in shapes]
    things = tuple(
        Thing(shapes[i], colors[i], sizes[i], *centres[i], radii[i], tilt[i]) for i in range(count)
    )
    background = dice.pick(tuple(BACKGROUNDS))
    questions = _questions(dice, things, background, relation)
    asked = tuple(dice.sample(range(len(questions)), QUESTIONS_PER_SCENE))
    return Plan(things, background, relation, questions, asked, seed)


def _inside(dice: _Dice, radius_px: float) -> float:
    """A coordinate that keeps an object of this radius within the picture."""
    margin = radius_px * 1.15 + 0.5
    return dice.uniform(margin, IMAGE_SIZE_PX - margin)


def _place_two(
    dice: _Dice, first_px: float, second_px: float
) -> tuple[str, list[tuple[float, float]]]:
    """Centres of two objects that are apart along one axis, and clearly less along the other."""
    first_margin, second_margin = first_px * 1.15 + 0.5, second_px * 1.15 + 0.5
    gap = (first_px + second_px) * 1.1 + 1.0
    a = dice.uniform(first_margin, IMAGE_SIZE_PX - second_margin - gap)
    b = dice.uniform(a + gap, IMAGE_SIZE_PX - second_margin)
    slack = b - a - 8.0
    c = dice.uniform(first_margin, IMAGE_SIZE_PX - first_margin)
    d = dice.uniform(max(c - slack, second_margin), min(c + slack, IMAGE_SIZE_PX - second_margin))
    if dice.index(2):
        return "left of", [(a, c), (b, d)]
    return "above", [(c, a), (d, b)]


def _questions(
    dice: _Dice, things: tuple[Thing, ...], background: str, relation: str
) -> tuple[tuple[str, str], ...]:
    pairs = [
        ("how many objects are there?", COUNTS[len(things) - 1]),
        ("what color is the background?", background),
    ]
    for thing in things:
        pairs.append((f"what color is the {thing.shape}?", thing.color))
        pairs.append((f"what shape is the {thing.color} object?", thing.shape))
        pairs.append((f"how big is the {thing.shape}?", thing.size))
        if thing.place:
            pairs.append((f"where is the {thing.shape}?", thing.place))
    pairs.extend(_existence(dice, things))
    if relation:
        first, second = things
        back = "right of" if relation == "left of" else "below"
        pairs.append((f"what is {relation} the {second.shape}?", an(first.name)))
        pairs.append((f"what is {back} the {first.shape}?", an(second.name)))
    return tuple(pairs)


def _existence(dice: _Dice, things: tuple[Thing, ...]) -> list[tuple[str, str]]:
    """One question whose answer is yes and one whose answer is no, half of these near misses."""
    there = dice.pick(things)
    shape, color = dice.pick(things).shape, dice.pick(tuple(COLORS))
    if dice.index(2):
        shape, color = dice.pick(SHAPES), dice.pick(things).color
    while any(thing.name == f"{color} {shape}" for thing in things):
        shape, color = dice.pick(SHAPES), dice.pick(tuple(COLORS))
    return [
        (f"is there {an(there.name)}?", "yes"),
        (f"is there {an(f'{color} {shape}')}?", "no"),
    ]


def an(name: str) -> str:
    """A name with its article: "an orange circle"."""
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _split_number(split: str) -> int:
    if split not in _SPLITS:
        raise ValueError(f"split {split!r}: choose one of {', '.join(_SPLITS)}")
    return _SPLITS[split]


def draw_plan(plan: Plan) -> NDArray[np.uint8]:
    """Draw a plan: uint8 (64, 64, 3), RGB, edges smoothed by supersampling."""
    dice = _Dice(*plan.seed)
    canvas = _background(dice, BACKGROUNDS[plan.background])
    for thing in plan.things:
        color = np.asarray(COLORS[thing.color]) + dice.field(3) * 14.0
        alpha = _mask(thing)[:, :, None]
        canvas += alpha * (color - canvas)
    canvas += dice.field(IMAGE_SIZE_PX, IMAGE_SIZE_PX, 1) * dice.uniform(0.0, 8.0)
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def _background(dice: _Dice, color: tuple[int, int, int]) -> NDArray[np.float64]:
    """A jittered colour under one of five textures: plain, gradient, stripes, patches, noise."""
    y, x = np.mgrid[0:IMAGE_SIZE_PX, 0:IMAGE_SIZE_PX] / IMAGE_SIZE_PX - 0.5
    angle, strength = dice.uniform(0, 2 * math.pi), dice.uniform(6.0, 22.0)
    ramp = x * math.cos(angle) + y * math.sin(angle)
    kind = dice.index(5)
    if kind == 0:
        light = np.zeros_like(ramp)
    elif kind == 1:
        light = ramp * 2.0
    elif kind == 2:
        light = np.sin(ramp * dice.uniform(15.0, 50.0) + dice.uniform(0, 6))
    elif kind == 3:
        light = np.kron(dice.field(8, 8), np.ones((8, 8)))
    else:
        light = dice.field(IMAGE_SIZE_PX, IMAGE_SIZE_PX)
    base = np.asarray(color) + dice.field(3) * 10.0
    return np.asarray(base + light[:, :, None] * strength, dtype=np.float64)


def _mask(thing: Thing) -> NDArray[np.float64]:
    """How much of each pixel the object covers: float64 (64, 64) in [0, 1]."""
    angle = math.radians(thing.tilt_degrees)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    side = IMAGE_SIZE_PX * _SUPERSAMPLE
    image = Image.new("L", (side, side))
    pen = ImageDraw.Draw(image)
    for part, fill in zip(_OUTLINES[thing.shape], (255, 0), strict=True):
        if part is not None:
            points = (part @ turn * thing.radius_px + [thing.x_px, thing.y_px]) * _SUPERSAMPLE
            pen.polygon([(float(px), float(py)) for px, py in points], fill=fill)
    return np.asarray(image.reduce(_SUPERSAMPLE), dtype=np.float64) / 255.0
