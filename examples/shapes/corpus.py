"""What the training scripts learn from: rendered scenes as arrays, and texts about them."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlmedge.checkpoints import scenes
from vlmedge.checkpoints.scenes import Plan, Thing

CACHE = Path("/tmp/vlmedge-shapes")

# CLIP's image statistics (Radford et al. 2021), which BLIP-2 keeps.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def render(kind: str, count: int, split: str = "train") -> NDArray[np.uint8]:
    """Draw pictures 0 to `count` of a split, once: later calls read them from a cache.

    Args:
        kind: "labelled", "scene" or "crowd".
        count: how many.
        split: a split of `vlmedge.checkpoints.scenes`; training code never asks for "heldout".

    Returns:
        uint8 (count, 64, 64, 3).
    """
    source = Path(scenes.__file__).read_bytes() + Path(__file__).read_bytes()
    version = hashlib.sha256(source).hexdigest()[:12]
    path = CACHE / f"{kind}-{split}-{count}-{version}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        tasks = [(kind, split, start, min(start + 1000, count)) for start in range(0, count, 1000)]
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            images = np.concatenate(list(pool.map(_render_range, tasks)))
        partial = path.with_suffix(f".{os.getpid()}.npy")
        np.save(partial, images)
        partial.replace(path)
    return np.load(path)  # type: ignore[no-any-return]


def _render_range(task: tuple[str, str, int, int]) -> NDArray[np.uint8]:
    kind, split, start, stop = task
    plan_of = planner(kind)
    return np.stack([scenes.draw_plan(plan_of(i, split)) for i in range(start, stop)])


def plans(kind: str, count: int, split: str = "train") -> list[Plan]:
    """The plans of pictures 0 to `count` of a split."""
    tasks = [(kind, split, start, min(start + 1000, count)) for start in range(0, count, 1000)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return [plan for part in pool.map(_plan_range, tasks) for plan in part]


def _plan_range(task: tuple[str, str, int, int]) -> list[Plan]:
    kind, split, start, stop = task
    plan_of = planner(kind)
    return [plan_of(i, split) for i in range(start, stop)]


def planner(kind: str) -> Callable[[int, str], Plan]:
    """The function that plans pictures of a kind."""
    known = {"labelled": scenes.plan_labelled, "scene": scenes.plan_scene, "crowd": plan_crowd}
    return known[kind]


def plan_crowd(index: int, split: str) -> Plan:
    """Decide what crowd `index` holds: three to five things, for training alone.

    Of the two things of a scene a model may guess one, and does so for thousands of steps. Here
    only looking pays, so it learns that first. Captions and counts are for scenes: a crowd has
    neither.
    """
    if split != "train":
        raise ValueError(f"split {split!r}: crowds are there for training, choose 'train'")
    rng = random.Random(index)
    while (centres := _scatter(rng, count := rng.choice((3, 4, 5)))) is None:
        pass
    shapes, colors = rng.sample(scenes.SHAPES, count), rng.sample(list(scenes.COLORS), count)
    things = tuple(
        Thing(shape, color, size, x_px, y_px, radius_px, rng.uniform(-12, 12))
        for shape, color, (size, x_px, y_px, radius_px) in zip(shapes, colors, centres, strict=True)
    )
    background = rng.choice(list(scenes.BACKGROUNDS))
    named = [(thing.size, thing.color, thing.shape, thing.place or NOWHERE) for thing in things]
    questions = tuple(_asked_of(rng, background, named))
    return Plan(things, background, "", questions, tuple(range(4)), (0, 4, index))


def _scatter(rng: random.Random, count: int) -> list[tuple[str, float, float, float]] | None:
    """Sizes, centres and radii of things that do not touch, most of them small; none if no luck."""
    placed: list[tuple[str, float, float, float]] = []
    for _ in range(60):
        size = "large" if rng.random() < 0.25 else "small"
        radius_px = rng.uniform(11.5, 14.0) if size == "large" else rng.uniform(6.5, 8.0)
        margin = radius_px * 1.15 + 0.5
        x_px, y_px = (rng.uniform(margin, scenes.IMAGE_SIZE_PX - margin) for _ in range(2))
        if all(
            max(abs(x_px - x), abs(y_px - y)) > 1.1 * (radius_px + r) + 1 for _, x, y, r in placed
        ):
            placed.append((size, x_px, y_px, radius_px))
        if len(placed) == count:
            return placed
    return None


@dataclass(frozen=True, slots=True)
class Form:
    """What is in a scene as 16 bags of words, with no word of the picture itself.

    Four bags for the scene and twelve for its things. The language model reads a bag as the sum of
    its words' embeddings, and is pretrained to write captions and answers from such forms. So,
    once it is frozen, it can read a prefix of 16 vectors; BLIP-2's soft prompt then takes the
    form's place.

    Attributes:
        bags: the words.
        questions: (question, answer) pairs that the form answers.
        caption: of the scene, or none where the grammar has no caption for it.
    """

    bags: tuple[tuple[str, ...], ...]
    questions: tuple[tuple[str, str], ...]
    caption: str | None


NOWHERE = "somewhere"
_THING_BAGS = 12


def form(plan: Plan) -> Form:
    """The form of a scene that is drawn: four bags for each thing, in reading order."""
    relation = plan.relation.split()[0] if plan.relation else "none"
    scene = (("scene",), (scenes.COUNTS[len(plan.things) - 1],), (plan.background,), (relation,))
    things = [(t.size, t.color, t.shape, t.place or NOWHERE) for t in plan.things]
    return Form((*scene, *_thing_bags(things, 4)), plan.questions, plan.caption)


def crowd(rng: random.Random) -> Form:
    """The form of a scene of two to six things that nobody draws.

    Of two things a language model may guess one, and does so for thousands of steps. Here only
    looking up pays, so it learns that first.
    """
    count = rng.randint(2, 6)
    shapes, colors = rng.sample(scenes.SHAPES, count), rng.sample(list(scenes.COLORS), count)
    places = ("left", "right", "top", "bottom", "center", NOWHERE)
    things = [
        (rng.choice(("small", "large")), color, shape, rng.choice(places))
        for shape, color in zip(shapes, colors, strict=True)
    ]
    background = rng.choice(list(scenes.BACKGROUNDS))
    bags = (("scene",), ("many",), (background,), ("none",))
    pairs = _asked_of(rng, background, things)
    return Form((*bags, *_thing_bags(things, _THING_BAGS // count)), tuple(pairs), None)


def _asked_of(
    rng: random.Random, background: str, things: list[tuple[str, str, str, str]]
) -> list[tuple[str, str]]:
    """Questions and answers about many things, each a size, a colour, a shape and a place."""
    pairs = [("what color is the background?", background)]
    for size, color, shape, place in things:
        pairs.append((f"what color is the {shape}?", color))
        pairs.append((f"what shape is the {color} object?", shape))
        pairs.append((f"how big is the {shape}?", size))
        if place != NOWHERE:
            pairs.append((f"where is the {shape}?", place))
    _, color, shape, _ = rng.choice(things)
    pairs.append((f"is there {scenes.an(f'{color} {shape}')}?", "yes"))
    there = {(color, shape) for _, color, shape, _ in things}
    near = [(c, s) for _, c, _, _ in things for _, _, s, _ in things if (c, s) not in there]
    color, shape = rng.choice(near)
    pairs.append((f"is there {scenes.an(f'{color} {shape}')}?", "no"))
    return pairs


def _thing_bags(things: list[tuple[str, ...]], each: int) -> list[tuple[str, ...]]:
    bags = [thing for thing in things for _ in range(each)]
    return bags + [("none",)] * (_THING_BAGS - len(bags))


def prompt(question: str) -> str:
    """A question in BLIP-2's format (Li et al. 2023, arXiv 2301.12597, section 4.1)."""
    return f"Question: {question} Answer:"
