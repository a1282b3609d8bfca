"""The drawn scenes: the same for a seed, apart between splits, and true to their words."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from vlmedge.checkpoints import scenes
from vlmedge.checkpoints.scenes import (
    CLASSES,
    COLORS,
    SHAPES,
    Plan,
    Thing,
    draw_labelled,
    draw_scene,
)

SPLITS = ("train", "heldout", "calibration")


def test_draw_scene_repeats_itself() -> None:
    first, second = draw_scene(7, "train"), draw_scene(7, "train")
    assert (first.image == second.image).all()
    assert (first.caption, first.questions) == (second.caption, second.questions)
    assert first.image.shape == (64, 64, 3)
    assert first.image.dtype == np.uint8


def test_splits_share_no_picture() -> None:
    drawn = [draw_scene(i, split).image.tobytes() for split in SPLITS for i in range(50)]
    drawn += [draw_labelled(i, split)[0].tobytes() for split in SPLITS for i in range(50)]
    assert len(set(drawn)) == len(drawn)


def test_unknown_split_names_the_splits() -> None:
    with pytest.raises(ValueError, match="train, heldout, calibration"):
        draw_scene(0, "test")


def test_every_class_is_drawn() -> None:
    labels = {CLASSES.index(scenes.plan_labelled(i, "train").things[0].name) for i in range(1500)}
    assert len(CLASSES) >= 80
    assert labels == set(range(len(CLASSES)))


def test_caption_and_answers_are_true() -> None:
    for i in range(120):
        plan, scene = scenes.plan_scene(i, "heldout"), draw_scene(i, "heldout")
        assert scene.caption == plan.caption
        assert f"on a {plan.background} background" in scene.caption
        names = [thing.name for thing in plan.things]
        places = [scene.caption.index(name) for name in names]
        assert places == sorted(places)
        assert len(scene.questions) == len(set(scene.questions)) == scenes.QUESTIONS_PER_SCENE
        for question, answer in plan.questions:
            assert answer == _answer(question, plan)


def _answer(question: str, plan: Plan) -> str:
    """Answer from the numbers of the plan, by another way than the drawing code's."""
    words = question.rstrip("?").split()
    by_shape = {thing.shape: thing for thing in plan.things}
    by_color = {thing.color: thing for thing in plan.things}
    thing = by_shape.get(words[-1])
    if words[:2] == ["how", "many"]:
        return {1: "one", 2: "two"}[len(plan.things)]
    if words[:2] == ["is", "there"]:
        return "yes" if thing is not None and thing.color == words[-2] else "no"
    if words[-1] == "background":
        return plan.background
    if words[:2] == ["what", "shape"]:
        return by_color[words[-2]].shape
    assert thing is not None
    if words[:2] == ["what", "color"]:
        return thing.color
    if words[:2] == ["how", "big"]:
        return "small" if thing.radius_px < 10 else "large"
    if words[0] == "where":
        return _place(thing)
    (other,) = (t for t in plan.things if t is not thing)
    sign = {
        "left": other.x_px < thing.x_px,
        "right": other.x_px > thing.x_px,
        "above": other.y_px < thing.y_px,
        "below": other.y_px > thing.y_px,
    }
    assert sign[words[2]]
    return f"{'an' if other.color[0] in 'aeiou' else 'a'} {other.name}"


def _place(thing: Thing) -> str:
    ends = {
        "left": 32 - thing.x_px,
        "right": thing.x_px - 32,
        "top": 32 - thing.y_px,
        "bottom": thing.y_px - 32,
    }
    name, offset = max(ends.items(), key=lambda item: item[1])
    return name if offset > 5 else "center"


def test_existence_is_balanced() -> None:
    answers = [
        answer
        for i in range(500)
        for question, answer in draw_scene_questions(i)
        if question.startswith("is there")
    ]
    assert 0.42 < answers.count("yes") / len(answers) < 0.58


def draw_scene_questions(index: int) -> tuple[tuple[str, str], ...]:
    """The questions that scene `index` shows, without drawing it."""
    plan = scenes.plan_scene(index, "train")
    return tuple(plan.questions[i] for i in plan.asked)


def test_things_stay_inside_and_apart() -> None:
    for i in range(300):
        plan = scenes.plan_scene(i, "train")
        for thing in plan.things:
            for value in (thing.x_px, thing.y_px):
                assert thing.radius_px <= value <= 64 - thing.radius_px
        for a, b in itertools.combinations(plan.things, 2):
            dx, dy = abs(a.x_px - b.x_px), abs(a.y_px - b.y_px)
            assert max(dx, dy) > a.radius_px + b.radius_px
            if plan.relation:
                assert abs(dx - dy) >= 7.9  # no near tie between "left of" and "above"


def test_small_shapes_can_be_told_apart() -> None:
    masks = {
        shape: scenes._mask(Thing(shape, "red", "small", 32, 32, 6.5, 0.0)) for shape in SHAPES
    }
    for a, b in itertools.combinations(SHAPES, 2):
        # 15 whole pixels of about 130 differ in the nearest pair.
        assert np.abs(masks[a] - masks[b]).sum() > 15, (a, b)


def test_colors_can_be_told_apart() -> None:
    palette = [np.array(rgb) for rgb in (*COLORS.values(), *scenes.BACKGROUNDS.values())]
    distances = [np.abs(a - b).max() for a, b in itertools.combinations(palette, 2)]
    assert min(distances) > 2 * 14  # colours are moved by at most 14 each
