"""A stream of pictures in, a stream of answers out, bounded and in order; one graph at a time."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kit.command import Run

import vlmedge
from vlmedge.checkpoints.scenes import draw_scene
from vlmedge.errors import InputError
from vlmedge.host.hardware import cores
from vlmedge.run import answering
from vlmedge.run.inputs.image_files import HUSH
from vlmedge.run.tasks.context import IMAGES_PER_BATCH
from vlmedge.run.tasks.streaming import respond

COUNT = 2 * IMAGES_PER_BATCH + 3
LABELS = ["a red star", "a blue circle"]


@pytest.fixture(scope="module")
def scenes() -> list[Any]:
    return [draw_scene(i, "heldout").image for i in range(COUNT)]


def test_captions_are_those_of_one_by_one(blip2_int8: Path, scenes: list[Any]) -> None:
    model = vlmedge.load(blip2_int8)
    found = model.caption(iter(scenes))
    assert isinstance(found, Iterator)
    assert list(found) == [model.caption(scene) for scene in scenes] == model.caption(scenes)
    assert list(model.caption(iter(()))) == []


def test_draws_belong_to_a_place_in_the_list(
    blip2_bundle: Path, scenes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same at any size of batch, and whatever stands in the other places."""
    model = vlmedge.load(blip2_bundle)  # int8 rows share the scales of a batch
    options = {"temperature": 3.0, "seed": 7, "max_tokens": 8}
    same = model.caption([scenes[0]] * COUNT, **options)
    assert same[IMAGES_PER_BATCH:][:IMAGES_PER_BATCH] != same[:IMAGES_PER_BATCH]
    assert len(set(same)) > COUNT // 2
    assert same[0] == model.caption(scenes[0], **options)
    assert same == model.captions(scenes[0], COUNT, **options)
    holes = [b"no picture" if place in (0, 3, 9) else scenes[0] for place in range(COUNT)]
    found = [*model.caption(iter(holes), on_error=lambda image, error: None, **options)]
    assert found == [None if place in (0, 3, 9) else same[place] for place in range(COUNT)]

    monkeypatch.setattr(answering, "respond", partial(respond, per_batch=3))
    assert model.caption([scenes[0]] * COUNT, **options) == same


@pytest.mark.parametrize("good", [0, 3, IMAGES_PER_BATCH, IMAGES_PER_BATCH + 2])
def test_what_the_iterable_raises_comes_after_the_answers_before_it(
    clip_int8: Path, scenes: list[Any], good: int
) -> None:
    def breaks() -> Iterator[Any]:
        yield from scenes[:good]
        raise OSError("the camera is gone")

    found = []
    with pytest.raises(OSError, match="the camera is gone"):
        for vector in vlmedge.load(clip_int8).embed_image(breaks()):
            found.append(vector)
    assert len(found) == good


def test_vectors_and_labels_are_those_of_a_list(clip_int8: Path, scenes: list[Any]) -> None:
    model = vlmedge.load(clip_int8)
    vectors = list(model.embed_image(iter(scenes)))
    np.testing.assert_allclose(np.stack(vectors), model.embed_image(scenes), atol=1e-6)
    assert list(model.classify(iter(scenes), LABELS)) == model.classify(scenes, LABELS)


def test_two_batches_are_read_ahead_and_no_more(clip_int8: Path, scenes: list[Any]) -> None:
    taken = []

    def endless() -> Iterator[Any]:
        while True:
            taken.append(0)
            yield scenes[0]

    found = vlmedge.load(clip_int8).embed_image(endless())
    assert not taken
    for number in range(3 * IMAGES_PER_BATCH):
        next(found)
        assert len(taken) <= 2 * IMAGES_PER_BATCH + number
    found.close()  # type: ignore[attr-defined]


def test_broken_picture_is_named_after_the_answers_before_it(
    clip_int8: Path, scenes: list[Any], pictures: list[Path], tmp_path: Path
) -> None:
    model = vlmedge.load(clip_int8)
    for broken, name in ((tmp_path / "no.png", "no.png"), (np.zeros((2, 2)), "image 3: image arr")):
        found = model.embed_image(iter([*scenes[:3], broken, scenes[3]]))
        for _ in range(3):
            next(found)
        with pytest.raises(InputError, match=name):
            next(found)
    told: list[tuple[Any, str]] = []
    several = [scenes[0], b"", scenes[1], pictures[0]]
    rows = list(model.embed_image(iter(several), on_error=lambda s, e: told.append((s, str(e)))))
    assert [row is None for row in rows] == [False, True, False, False]
    assert told == [(b"", "image 1: image of 0 bytes: give the whole file's bytes")]
    with pytest.raises(InputError, match="on_error is for a stream"):
        model.embed_image([scenes[0]], on_error=lambda s, e: None)  # type: ignore[call-overload]


def test_filters_of_warnings_are_left_alone(clip_int8: Path, scenes: list[Any]) -> None:
    before = list(warnings.filters)
    for _ in vlmedge.load(clip_int8).embed_image(iter(scenes)):
        assert list(warnings.filters) == before
    with HUSH, HUSH:
        warnings.warn("not heard", stacklevel=1)
    assert list(warnings.filters) == before


def test_command_goes_on_after_a_broken_picture(
    vlmedge: Run, blip2_int8: Path, pictures: list[Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    ran = vlmedge("caption", blip2_int8, pictures[0], broken, pictures[1])
    assert ran.code == 1
    assert [line.split(": ")[0] for line in ran.out.splitlines()] == [
        str(pictures[0]),
        str(pictures[1]),
    ]
    assert "broken.png is in a format that Pillow cannot read" in ran.err
    assert "1 of 3 pictures have no caption" in ran.err
    found = json.loads(vlmedge("caption", blip2_int8, pictures[0], broken, "--json").out)
    assert "caption" in found[0] and "in a format that Pillow cannot read" in found[1]["error"]


def test_low_memory_has_one_component_open(
    blip2_int8: Path, clip_int8: Path, scenes: list[Any]
) -> None:
    usual, small = vlmedge.load(blip2_int8), vlmedge.load(blip2_int8, low_memory=True)
    opened: list[int] = []
    plain = type(small.graphs).__getitem__

    def watched(name: str) -> Any:
        graph = plain(small.graphs, name)
        opened.append(len(small.graphs._open))
        return graph

    small._context.graphs.__class__ = type(
        "Watched", (type(small.graphs),), {"__getitem__": lambda self, name: watched(name)}
    )
    assert small.caption(scenes[:3]) == usual.caption(scenes[:3])
    assert small.ask(scenes[0], "what color is the star?", num_beams=3) == usual.ask(
        scenes[0], "what color is the star?", num_beams=3
    )
    session = small.session(scenes[0])
    assert session.caption() == session.caption() == usual.caption(scenes[0])
    assert set(opened) == {1}
    clip = vlmedge.load(clip_int8, low_memory=True)
    assert clip.classify(scenes[0], LABELS) == vlmedge.load(clip_int8).classify(scenes[0], LABELS)


def test_low_memory_of_a_command_changes_nothing(
    vlmedge: Run, blip2_int8: Path, pictures: list[Path]
) -> None:
    usual = vlmedge("caption", blip2_int8, *pictures)
    small = vlmedge("caption", blip2_int8, *pictures, "--low-memory")
    assert small.code == 0 and small.out == usual.out


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "100000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        (
            {
                "proc/self/cgroup": "4:memory:/\n3:cpu,cpuacct:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            1,
        ),
        ({}, None),
    ],
)
def test_cores_heed_the_quota(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cores(tmp_path) == (cores(tmp_path / "nowhere") if expected is None else expected)
