"""Decoding steps that are recorded as CUDA graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from kit.fake_cuda import Notes
from kit.shelf import module
from kit.tensorrt import VERSIONS, Use, build, clock, engine, graphs, only, prompt

from vlmedge.bundle import Bundle
from vlmedge.run.model import Model
from vlmedge.shelves import engine_store as building
from vlmedge.shelves.build_options import BuildOptions
from vlmedge.shelves.registry import ENGINES

RECORDED = BuildOptions(precision="float32", components=("decoder",), record=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_recorded_steps_give_what_plain_ones_do(
    version: str, use: Use, blip2: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts, steps, a rewound text and beams, on a graph that plays what it has recorded."""
    gpu = use(version)
    clock(monkeypatch, 3.0, 2.0)
    notes = Notes()
    (built,) = build(blip2, RECORDED, notes)
    assert notes.lines == ["decoder: a step takes 3.00 ms, recorded 2.00 ms: steps are recorded"]
    assert building.read_sidecar(built.folder)["records"] is True
    gpu.played = 0
    held, there = len(gpu.held), ENGINES["ort"].open(blip2, "decoder")
    here = ENGINES["tensorrt"].open(blip2, "decoder")
    for rows in (1, 2, 1):
        for graph in (here, there):
            graph.reset()
        length, played = 0, gpu.played
        more = 3 if rows == 1 else 1  # ONNX Runtime takes several tokens after a past for one row
        for tokens in (9, *[1] * 6, more, *[1] * 5):
            length += tokens
            feeds = prompt(rows, tokens, length)
            expected, found = there.run(feeds)["logits"], here.run(feeds)["logits"]
            np.testing.assert_allclose(found, expected, atol=2e-4)
        assert gpu.played > played + 4  # of 11 steps; two of each run are not, nor what is recorded
    repeated = np.array([0, 0])
    for graph in (here, there):
        graph.reorder(repeated)
    for _ in range(5):
        length += 1
        feeds = prompt(2, 1, length)
        feeds["inputs_embeds"][1] *= 2
        expected, found = there.run(feeds)["logits"], here.run(feeds)["logits"]
        np.testing.assert_allclose(found, expected, atol=2e-4)
    for graph in (here, there):
        graph.rewind(10)
    for name, array in there.snapshot(10).items():
        np.testing.assert_allclose(here.snapshot(10)[name], array, atol=1e-5)
    here.close()
    assert len(gpu.held) == held and gpu.recordings == {}


def test_captions_of_recorded_steps_are_those_of_onnx_runtime(
    use: Use, blip2: Bundle, monkeypatch: pytest.MonkeyPatch, pictures: list[Path]
) -> None:
    gpu = use("trt103")
    clock(monkeypatch, 3.0, 2.0)
    paths = [str(p) for p in pictures]
    build(blip2, BuildOptions(precision="float32", record=True))
    gpu.played = 0
    model, known = Model(blip2, "tensorrt"), Model(blip2)
    assert [model.caption(path) for path in paths] == known.caption(paths)
    assert gpu.played
    assert model.caption(paths, num_beams=3) == known.caption(paths, num_beams=3)
    model.graphs.close()


def test_steps_that_outgrow_their_capacity_are_recorded_anew(
    use: Use, blip2: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording = module("runtimes", "_tensorrt.cuda_graphs")
    monkeypatch.setattr(recording, "CAPACITY_MIN", 8)
    gpu = use("trt103")
    clock(monkeypatch, 3.0, 2.0)
    build(blip2, RECORDED)
    here, there = (ENGINES[name].open(blip2, "decoder") for name in ("tensorrt", "ort"))
    gpu.dropped = 0
    for length in range(4, 40):
        feeds = prompt(1, 4 if length == 4 else 1, length)
        expected, found = there.run(feeds)["logits"], here.run(feeds)["logits"]
        np.testing.assert_allclose(found, expected, atol=2e-4)
    assert (gpu.dropped, len(gpu.recordings)) == (3, 1)  # 8, 16, 32, then 64 positions
    here.close()


@pytest.mark.parametrize(
    ("times", "other", "unrecordable", "words"),
    [
        ((2.0, 2.0), False, False, "recorded 2.00 ms: steps are not recorded"),
        ((3.0, 2.0), True, False, "recorded steps give other outputs (cosine -1.0"),
        ((3.0, 2.0), False, True, "its steps cannot be recorded"),
    ],
)
def test_steps_are_not_recorded_in_vain(
    times: tuple[float, ...],
    other: bool,
    unrecordable: bool,
    words: str,
    use: Use,
    blip2: Bundle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where they are not faster, give something else, or the driver refuses: in one line."""
    gpu = use("trt103")
    clock(monkeypatch, *times)
    gpu.unrecordable = unrecordable
    if other:
        made = engine.RecordedGraph
        ran = made.run
        monkeypatch.setattr(
            made, "run", lambda graph, feeds: {n: -a for n, a in ran(graph, feeds).items()}
        )
    notes = Notes()
    (built,) = build(blip2, RECORDED, notes)
    (line,) = notes.lines
    assert words in line
    assert building.read_sidecar(built.folder)["records"] is False
    graph = ENGINES["tensorrt"].open(blip2, "decoder")
    assert type(graph) is graphs.TrtGraph
    graph.close()


def test_what_has_no_cache_is_not_recorded(use: Use, clip: Bundle) -> None:
    use("trt103")
    notes = Notes()
    (built,) = build(clip, only("vision_encoder", record=True), notes)
    assert notes.lines == []
    assert building.read_sidecar(built.folder)["records"] is False
