"""Tasks of several bundles in a chain: CapFilt, files of one's own, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from kit.bundles import bundle_of
from kit.command import Run

import vlmedge
import vlmedge as package
from vlmedge.checkpoints.scenes import draw_scene
from vlmedge.compositions import composition
from vlmedge.compositions.composition import built_ins, read_composition
from vlmedge.errors import BundleError, InputError, UnknownNameError, VlmEdgeError
from vlmedge.run.tasks.context import IMAGES_PER_BATCH

SCHEMA = Path(vlmedge.__file__).with_name("composition.schema.json")

# hot, so that they differ; and short, for the random matchers know few words
DRAWN = {"temperature": 3.0, "max_tokens": 8}
CAPTION = {"name": "said", "task": "caption", "bundle": "a"}
MATCH = {"name": "scored", "task": "match", "bundle": "b", "inputs": ["said"]}
FILTER = {"name": "kept", "task": "filter", "inputs": ["scored"], "at_least": 0.5}


@pytest.fixture(scope="module")
def captioner(blip2_bundle: Path) -> Path:
    """Take tiny-blip2, which describes scenes."""
    return blip2_bundle


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export tiny-clip, which tells scenes apart by vectors."""
    return bundle_of("tiny-clip", tmp_path_factory.mktemp("ranker") / "bundle")


@pytest.fixture(scope="module")
def matcher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a random BLIP that matches."""
    return random(tmp_path_factory.mktemp("itm"), "blip-itm")


@pytest.fixture(scope="module")
def scenes() -> list[Any]:
    return [draw_scene(i, "heldout").image for i in range(3)]


def random(folder: Path, kind: str) -> Path:
    return bundle_of(kind, folder / "bundle")


def steps(*given: dict[str, Any], bundles: tuple[str, ...] = ("a", "b")) -> dict[str, Any]:
    used = {step.get("bundle") for step in given}
    return {"bundles": {b: None for b in bundles if b in used}, "steps": list(given)}


@pytest.mark.parametrize("kind", ["blip-itm", "blip2-itm"])
def test_capfilt_is_caption_match_and_filter(
    captioner: Path, scenes: list[Any], kind: str, matcher: Path, tmp_path: Path
) -> None:
    judge = package.load(matcher if kind == "blip-itm" else random(tmp_path, kind))
    writer = package.load(captioner)
    texts = list(dict.fromkeys(writer.captions(scenes[0], 8, seed=0, **DRAWN)))
    scores = judge.match(scenes[0], texts)
    middle = sorted(scores)[len(scores) // 2]
    pairs = {"captioner": writer, "matcher": judge}
    changes = {"kept.at_least": middle, "candidates.options": DRAWN}
    found = package.compose("capfilt", pairs, changes).run(scenes[0])
    kept = [(t, s) for t, s in zip(texts, scores, strict=True) if s >= middle]
    assert found == sorted(kept, key=lambda pair: -pair[1])
    assert 0 < len(found) < len(texts)


def test_captions_are_drawn_apart_and_seen_once(captioner: Path, scenes: list[Any]) -> None:
    model = package.load(captioner)
    runs = []
    plain = model.graphs["vision_encoder"].run
    model.graphs["vision_encoder"].run = lambda feeds: runs.append(0) or plain(feeds)  # type: ignore
    options = {"temperature": 3.0, "seed": 3}
    many = model.captions(scenes[0], IMAGES_PER_BATCH + 3, **options)
    assert len(runs) == 1 and len(many) == IMAGES_PER_BATCH + 3 and len(set(many)) > 3
    assert many[:IMAGES_PER_BATCH] == model.caption([scenes[0]] * IMAGES_PER_BATCH, **options)
    assert many[0] == model.caption(scenes[0], **options)
    assert many[IMAGES_PER_BATCH:] != many[:3]
    assert model.captions(scenes[0], 1) == [model.caption(scenes[0])]
    with pytest.raises(InputError, match="count is 2, and without sampling all would be the same"):
        model.captions(scenes[0], 2)
    with pytest.raises(InputError, match="count is 0: it must be at least 1"):
        model.captions(scenes[0], 0)


def test_best_by_vectors_is_right_more_often_than_one_draw(captioner: Path, ranker: Path) -> None:
    changes = {
        "scored.task": "cosine",
        "kept.at_least": -1.0,
        "candidates.options": {"temperature": 3.0, "max_tokens": 20},
    }
    capfilt = package.compose("capfilt", {"captioner": captioner, "matcher": ranker}, changes)
    truths = [draw_scene(i, "heldout") for i in range(16)]
    best = [texts[0][0] for texts in capfilt.run([scene.image for scene in truths])]
    draw = capfilt.models["captioner"]
    once = [draw.caption(scene.image, seed=0, **changes["candidates.options"]) for scene in truths]  # type: ignore
    right = [
        sum(text == scene.caption for text, scene in zip(texts, truths, strict=True))
        for texts in (best, once)
    ]
    assert right[0] > right[1] and right[0] > 0, right


def test_stream_is_one_by_one_with_two_pictures_in_memory(
    captioner: Path, matcher: Path, scenes: list[Any]
) -> None:
    pair = {"captioner": captioner, "matcher": matcher}
    changes = {"kept.at_least": 0.0, "candidates.count": 2, "candidates.options": DRAWN}
    capfilt = package.compose("capfilt", pair, changes)
    taken = []

    def endless() -> Iterator[Any]:
        while True:
            taken.append(0)
            yield scenes[len(taken) % 3]

    found = capfilt.run(endless())
    assert not taken
    for number in range(1, 7):
        assert next(found) == capfilt.run(scenes[number % 3])
        assert len(taken) == number + 1
    small = package.compose("capfilt", pair, changes, low_memory=True)
    assert small.run(scenes) == capfilt.run(scenes)
    assert not any(model.graphs._open for model in small.models.values())
    with pytest.raises(InputError, match="no images: give at least one"):
        capfilt.run([])
    with pytest.raises(InputError, match="on_error is for a stream"):
        capfilt.run(scenes, on_error=lambda s, e: None)  # type: ignore[call-overload]


def test_bad_picture_does_not_lose_the_others(captioner: Path, scenes: list[Any]) -> None:
    composed = package.compose(steps(CAPTION), {"a": captioner})
    told: list[str] = []
    several = [scenes[0], b"", scenes[1]]
    rows = list(composed.run(iter(several), on_error=lambda s, e: told.append(str(e))))
    assert rows == [composed.run(scenes[0]), None, composed.run(scenes[1])]
    assert told == ["image 1: image of 0 bytes: give the whole file's bytes"]
    found = composed.run(iter(several))
    next(found)
    with pytest.raises(InputError, match="image 1: image of 0 bytes"):
        next(found)


def test_step_that_cannot_take_a_text_names_step_and_picture(
    blip2_bundle: Path, scenes: list[Any]
) -> None:
    ask = {"name": "more", "task": "ask", "bundle": "a", "question": "what " * 500 + "{text}?"}
    composed = package.compose(steps(CAPTION, ask | {"inputs": ["said"]}), {"a": blip2_bundle})
    told: list[str] = []
    assert list(composed.run(iter(scenes[:2]), on_error=lambda s, e: told.append(str(e)))) == [
        None,
        None,
    ]
    assert told[1].startswith("image 1: step 'more': prompt of ")
    with pytest.raises(InputError, match="^step 'more': prompt of .* tokens"):
        composed.run(scenes[0])


def test_file_may_chain_what_it_likes(
    blip2_bundle: Path, ranker: Path, scenes: list[Any], tmp_path: Path
) -> None:
    given = {
        "bundles": {"eyes": str(blip2_bundle), "labels": str(ranker), "again": str(blip2_bundle)},
        "steps": [  # in no order
            {"name": "top", "task": "best", "inputs": ["which"], "count": 1},
            {
                "name": "told",
                "task": "ask",
                "bundle": "again",
                "question": "what color is the {text}?",
                "inputs": ["top"],
            },
            {
                "name": "which",
                "task": "classify",
                "bundle": "labels",
                "labels": ["star", "circle"],
                "top": 2,
            },
            {"name": "said", "task": "caption", "bundle": "eyes"},
            {"name": "all", "task": "unique", "inputs": ["said", "told", "said"]},
        ],
    }
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(given))
    composed = package.compose(file)
    assert composed.models["eyes"] is composed.models["again"]
    eyes, labels = composed.models["eyes"], composed.models["labels"]
    first = labels.classify(scenes[0], ["star", "circle"])[0][0]
    told = eyes.ask(scenes[0], f"what color is the {first}?")
    assert composed.run(scenes[0]) == [(eyes.caption(scenes[0]), None), (told, None)]
    composed.close()
    assert not eyes.graphs._open


def test_folders_are_seen_from_the_file(captioner: Path, tmp_path: Path) -> None:
    (tmp_path / "near").symlink_to(captioner)
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(steps(CAPTION) | {"bundles": {"a": "near"}}))
    assert package.compose(file).models["a"].bundle.path == tmp_path / "near"


REFUSED = [
    ({}, "missing required field `steps`"),
    ({"steps": [], "extra": 1}, "unknown field `extra`"),
    ({"steps": []}, "a composition ends in one step, this one has none"),
    (steps({"task": "caption"}), "step 1 is named None: give it a name without dots"),
    (steps(CAPTION | {"name": "a.b"}), "is named 'a.b': give it a name without dots"),
    (steps(CAPTION | {"task": "captoin"}), "'said': no task 'captoin': did you mean 'caption'"),
    (steps(CAPTION | {"prmpt": "a"}), "'said', caption: no word 'prmpt': did you mean 'prompt'"),
    (steps(CAPTION | {"count": 0}), "'said', caption: expected `int` >= 1"),
    (steps(CAPTION | {"seed": -1}), "'said', caption: expected `int` >= 0"),
    (steps(CAPTION | {"options": {"topp": 1}}), "'said', caption: no option 'topp'"),
    (steps(CAPTION | {"options": {"top_p": 2}}), "'said', caption: top_p is 2"),
    (steps(CAPTION | {"inputs": ["said"]}), "caption takes no texts here: leave them out"),
    (steps(CAPTION, MATCH | {"inputs": []}), "match takes texts: name the steps that give them"),
    (steps(CAPTION, MATCH | {"inputs": ["sad"]}), "'scored', inputs: no step 'sad'"),
    (steps(CAPTION, CAPTION), "two steps are named 'said'"),
    (
        steps(CAPTION, CAPTION | {"name": "b"}),
        r"ends in one step, this one ends in 2 \(said, b\): name",
    ),
    (steps(MATCH | {"inputs": ["scored"]}), "steps scored -> scored form a cycle"),
    (
        steps(CAPTION, MATCH | {"inputs": ["said", "kept"]}, FILTER),
        "form a cycle: change the inputs of one of them",
    ),
    (steps(CAPTION, FILTER | {"inputs": ["said"]}), "'kept' needs scores and 'said' gives none"),
    (steps(CAPTION, bundles=()), "step 'said': no bundle 'a': choose from none"),
    (steps(CAPTION) | {"bundles": {"a": None, "z": None}}, "bundle 'z' is used by no step"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_composition_that_makes_no_sense_is_refused_before_any_bundle(
    given: dict[str, Any], message: str
) -> None:
    with pytest.raises(VlmEdgeError, match=message) as refused:
        package.compose(given, {"a": "nowhere", "b": "nowhere"})
    assert not isinstance(refused.value, BundleError) and "\n" not in str(refused.value)


def test_schema_is_the_published_one_and_draws_the_same_line() -> None:
    published = json.loads(SCHEMA.read_text())
    assert published == json.loads(msgspec.json.encode(composition.schema()))
    jsonschema.Draft202012Validator.check_schema(published)
    for name in built_ins():
        shipped = json.loads((composition.BUILT_INS / f"{name}.json").read_text())
        jsonschema.validate(shipped, published)
        assert (composition.BUILT_INS / shipped["$schema"]).resolve() == SCHEMA
    jsonschema.validate(steps(CAPTION, MATCH, FILTER), published)
    for broken in (
        {},
        {"steps": []},
        {"steps": [], "extra": 1},
        steps({"task": "caption"}),
        steps(CAPTION | {"name": "a.b"}),
        steps(CAPTION | {"task": "captoin"}),
        steps(CAPTION | {"prmpt": "a"}),
        steps(CAPTION | {"count": 0}),
        steps(CAPTION | {"seed": -1}),
        steps(CAPTION | {"options": {"topp": 1}}),
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, published)
        with pytest.raises(VlmEdgeError):
            read_composition(broken)


def test_changes_that_lead_nowhere_are_refused() -> None:
    for changes, message in (
        ({"kept": 1}, "change 'kept': it must be STEP.WORD"),
        ({"kpt.at_least": 1}, "no step 'kpt': did you mean 'kept'"),
        ({"kept.at_least.x": 1}, "at_least is a value, not a table"),
        ({"kept.atleast": 1}, "no word 'atleast': did you mean 'at_least'"),
        ({"kept.at_least": "high"}, "'kept', filter: expected `float`, got `str`"),
    ):
        with pytest.raises(VlmEdgeError, match=message):
            read_composition("capfilt", changes)
    assert built_ins() == ["capfilt"]


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="no composition 'capfit': did you mean 'capfilt'"):
        package.compose("capfit")
    with pytest.raises(InputError, match="no.json cannot be read: No such file"):
        package.compose(tmp_path / "no.json")
    file = tmp_path / "bad.json"
    for text, message in (("{", "bad.json is no composition"), ("[]", "is no composition: expect")):
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            package.compose(file)


def test_bundle_that_does_not_fit_is_refused_before_it_runs(
    captioner: Path, ranker: Path, matcher: Path, blip2_bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"no bundle for captioner and matcher: .*captioner=DIR"):
        package.compose("capfilt")
    with pytest.raises(UnknownNameError, match="no bundle 'macher': did you mean 'matcher'"):
        package.compose("capfilt", {"macher": matcher})
    with pytest.raises(BundleError, match="nowhere: no such folder"):
        package.compose("capfilt", {"captioner": captioner, "matcher": tmp_path / "nowhere"})
    with pytest.raises(UnknownNameError, match=r"'scored': .*: no task 'match': .*task=cosine"):
        package.compose("capfilt", {"captioner": captioner, "matcher": ranker})
    with pytest.raises(UnknownNameError, match=r"step 'candidates': .*: no task 'caption'"):
        package.compose("capfilt", {"captioner": matcher, "matcher": matcher})
    for step, bundle, message in (
        (CAPTION | {"count": 2}, captioner, "step 'said': count is 2, and without sampling"),
        (CAPTION | {"bundle_task": "ask"}, blip2_bundle, "task 'ask' describes no picture"),
        (CAPTION | {"options": {"min_tokens": 999}}, captioner, "min_tokens is 999"),
        (
            {"name": "x", "task": "classify", "bundle": "a"},
            ranker,
            "step 'x': .* has no labels of its own: give labels",
        ),
    ):
        with pytest.raises(VlmEdgeError, match=message):
            package.compose(steps(step), {"a": bundle})


def test_list_names_the_compositions(vlmedge: Run) -> None:
    assert json.loads(vlmedge("list", "--json").out)["compositions"] == built_ins()
    assert vlmedge("list").out.splitlines()[-1].split() == ["compositions", *built_ins()]


def test_bundle_that_is_given_twice_is_refused(vlmedge: Run) -> None:
    ran = vlmedge("compose", "capfilt", "a.png", "--bundle", "matcher=a", "--bundle", "matcher=b")
    assert ran.code == 2 and "matcher, matcher: give each name once" in ran.err


def test_command_prints_what_is_kept(
    vlmedge: Run, captioner: Path, matcher: Path, pictures: list[Path], tmp_path: Path
) -> None:
    given = ["--bundle", f"captioner={captioner}", "--bundle", f"matcher={matcher}"]
    given += ["--set", 'candidates.options={"temperature": 3, "max_tokens": 8}']
    every = [*given, "--set", "kept.at_least=0", "--set", "candidates.count=3"]
    ran = vlmedge("compose", "capfilt", pictures[0], *every)
    composed = package.compose(
        "capfilt",
        {"captioner": captioner, "matcher": matcher},
        {"kept.at_least": 0, "candidates.count": 3, "candidates.options": DRAWN},
    )
    expected = composed.run(pictures[0])
    assert ran.code == 0 and ran.out.splitlines() == [f"{s:.3f} {t}" for t, s in expected]
    assert ran.err.count("is unverified") == 2
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    ran = vlmedge("compose", "capfilt", pictures[0], broken, pictures[1], *every)
    assert ran.code == 1 and "broken.png is in a format that Pillow cannot read" in ran.err
    assert "1 of 3 pictures have no texts: see above" in ran.err
    assert {line.split(": ")[0] for line in ran.out.splitlines()} == set(map(str, pictures[:2]))
    ran = vlmedge("compose", "capfilt", pictures[0], broken, *every, "--json")
    found = json.loads(ran.out)
    assert found[0]["texts"] == [{"text": t, "score": s} for t, s in expected]
    assert "in a format that Pillow cannot read" in found[1]["error"]
    ran = vlmedge("compose", "capfilt", pictures[0], *given, "--set", "kept.at_least=2")
    assert (ran.code, ran.out) == (0, "") and f"{pictures[0]}: no text is left" in ran.err


def test_command_refuses_in_one_line(vlmedge: Run, pictures: list[Path]) -> None:
    ran = vlmedge("compose", "capfilt", pictures[0])
    assert ran.code == 1 and ran.out == "" and len(ran.err.splitlines()) == 1
    assert "no bundle for captioner and matcher" in ran.err
    ran = vlmedge("compose", "capfilt", pictures[0], "--bundle", "captioner")
    assert ran.code == 2 and "NAME=DIR" in ran.err
    ran = vlmedge("compose", "capfilt", pictures[0], "--set", "kept.at_least=high")
    assert ran.code == 1 and "expected `float`, got `str`" in ran.err
