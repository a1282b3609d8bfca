"""The walk of the wiring: a kind of task and a modality that nobody knew go all the way."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from vlmedge.arrays import Array
from vlmedge.bench import items as bench_items
from vlmedge.bundle import Bundle
from vlmedge.graphs.portable import load_graph
from vlmedge.make import calibrate as calibrating
from vlmedge.parity import feeds, samples
from vlmedge.parity import gate as checking
from vlmedge.parity import probe as probes
from vlmedge.parity.feeds import Feeds
from vlmedge.progress import SILENT
from vlmedge.run.tasks.context import TaskContext
from vlmedge.run.tasks.trial import Choices, Facts, Made, Pool, Samples, Trial, Whole, trials
from vlmedge.shelves.checked_graph import CheckedGraph
from vlmedge.shelves.contracts import Watched
from vlmedge.shelves.registry import ENGINES, SCHEMES
from vlmedge.spec import ChatTask, Component, GenerateTask, Generation, ModelSpec, Task, TensorSpec
from vlmedge.spec.manifest import FORMAT, CheckpointId, Manifest

WALKERS = (feeds, checking, calibrating, samples, bench_items, probes)
KINDS = [kind for kind in get_args(Task) if kind is not ChatTask]
BINS, NOTES, COUNT = 16, 5, 12  # of a sound, of what it may be, and of samples
WEIGHT = np.random.default_rng(0).standard_normal((BINS, NOTES)).astype(np.float32)
SAMPLES = Samples((np.zeros((8, 8, 3), np.uint8),) * COUNT, ("what is it?",) * COUNT)


class Sound(msgspec.Struct, frozen=True):
    """A front end of a modality that the project does not have."""

    loudness: float


def listen(walk: Feeds, name: str, front: Sound) -> dict[str, Any]:
    """Make a sound of each sample."""

    def sound(i: int) -> Array:
        loud = np.float32(front.loudness)
        return loud * np.random.default_rng(i).standard_normal((1, BINS)).astype(np.float32)

    return {name: Made(len(walk.samples.images), sound)}


class HearTask(msgspec.Struct, frozen=True, tag="hear"):
    """A kind of task that the project does not have: a sound and a knock in, a note out."""

    encode: tuple[str, ...]
    output: str


class HearTrial(Trial[HearTask], of=HearTask):
    """All that its file in tasks/ would say of it."""

    @property
    def components(self) -> tuple[str, ...]:
        """Name what hears."""
        return self.task.encode

    def inputs(self, component: Component, samples: Samples) -> dict[str, Any]:
        """Knock once more at each sample."""
        knocks = np.arange(len(samples.images), dtype=np.float32)
        return {"knock": Whole(knocks[:, None])}

    def answer(self, samples: Samples, tokens: int) -> Facts:
        """Hear one sound."""
        feed = {"input_features": np.ones((1, BINS), np.float32), "knock": np.ones((1, 1), "f")}
        self.context.chain(self.task.encode, feed)
        return {"heard": 1}

    def choices(self, pool: Pool) -> Choices:
        """Return the loudest note."""
        return Choices("hear", pool.whole(self.task.output).argmax(axis=1).tolist())


ENCODER = Component(
    "audio_encoder",
    (
        TensorSpec("input_features", "float32", ("batch", BINS)),
        TensorSpec("knock", "float32", ("batch", 1)),
    ),
    (TensorSpec("notes", "float32", ("batch", NOTES)),),
)


class Reference(CheckedGraph):
    """The encoder as PyTorch would have it."""

    def infer(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """Multiply and add."""
        return {"notes": feeds["input_features"] @ WEIGHT + feeds["knock"]}


@pytest.fixture
def heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """Write a bundle that hears; nothing but this file knows how."""
    monkeypatch.setattr(feeds, "front_ends_by_input", lambda spec: {"input_features": Sound(2.0)})
    monkeypatch.setitem(feeds.FRONT_ENDS, Sound, listen)
    given = [
        helper.make_tensor_value_info(s.name, TensorProto.FLOAT, s.shape) for s in ENCODER.inputs
    ]
    made = [
        helper.make_tensor_value_info(s.name, TensorProto.FLOAT, s.shape) for s in ENCODER.outputs
    ]
    nodes = [
        helper.make_node("MatMul", ["input_features", "w"], ["product"]),
        helper.make_node("Add", ["product", "knock"], ["notes"]),
    ]
    graph = helper.make_graph(nodes, "g", given, made, [numpy_helper.from_array(WEIGHT, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (tmp_path / "graphs").mkdir()
    onnx.save(onnx.shape_inference.infer_shapes(model), tmp_path / "graphs/audio_encoder.onnx")
    tasks: Any = {"hear": HearTask(("audio_encoder",), "notes")}
    identity = CheckpointId("ear", None, "0" * 64)
    spec = ModelSpec("ear", (ENCODER,), tasks)
    return Bundle(tmp_path, Manifest(FORMAT, "0", identity, "float32", spec, (), (), {}))


def test_gate_compares_a_new_kind_of_task(heard: Bundle) -> None:
    export: Any = SimpleNamespace(open=lambda name: Reference(ENCODER), rows=lambda: None)
    given = Samples(SAMPLES.images, SAMPLES.questions, singles=SAMPLES.images)
    parity = checking.run_gate(heard, export, given, SILENT)
    assert parity.passed, parity
    assert [(task.task, task.samples) for task in parity.tasks] == [("hear", COUNT)]
    assert [one.component for one in parity.components] == ["audio_encoder"]


def test_calibration_watches_a_new_modality(heard: Bundle) -> None:
    calibration = calibrating.Calibration(heard, ENGINES["ort"], SCHEMES["int8"], SAMPLES, SILENT)
    model: ir.Model = load_graph(heard.path, "audio_encoder")
    wanted = Watched(("input_features",))
    found = calibration.observe(ENCODER, model, wanted)["input_features"]
    calibration.close()
    walk = Feeds(TaskContext(heard, {}), SAMPLES)
    assert walk.prepare(ENCODER)
    rows = np.concatenate([walk.feed(ENCODER, i)["input_features"] for i in range(COUNT)])
    assert found.amax == np.abs(rows).max()
    assert found.rms == pytest.approx(np.sqrt(np.square(rows).mean()))


def test_probe_feeds_a_new_modality(heard: Bundle) -> None:
    graph = ENGINES["ort"].open(heard, "audio_encoder")
    (fed,) = probes.Probe(heard).steps(graph)
    assert graph.run(fed)["notes"].shape == (1, NOTES)
    first = listen(Feeds(TaskContext(heard, {}), SAMPLES), "x", Sound(2.0))["x"].at(0)
    np.testing.assert_array_equal(fed["input_features"], first)
    assert fed["knock"] == 0


def test_benchmark_asks_a_new_kind_of_task(heard: Bundle) -> None:
    graphs = {"audio_encoder": ENGINES["ort"].open(heard, "audio_encoder")}
    items = bench_items.items(TaskContext(heard, graphs))
    assert {name: item(1) for name, item in items.items()} == {"hear": {"heard": 1}}


@pytest.mark.parametrize("walker", WALKERS, ids=lambda module: module.__name__)
def test_walkers_name_no_kind_of_task(walker: Any) -> None:
    """What compares, watches, tries and times is the same for every kind."""
    assert not {kind.__name__ for kind in KINDS} & set(vars(walker))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_task_has_a_trial(kind: type) -> None:
    context: Any = SimpleNamespace(bundle=SimpleNamespace(spec=SimpleNamespace(tasks={})))
    assert trials(context) == []  # the files are read
    assert kind in Trial.kinds


def test_columns_return_each_samples_rows() -> None:
    column = Whole(np.arange(6), [1, 3, 2])
    assert [column.at(i).tolist() for i in range(len(column))] == [[0], [1, 2, 3], [4, 5]]
    assert [row.tolist() for row in map(Whole(np.arange(2)).at, range(2))] == [[0], [1]]


def test_shorter_columns_begin_again_and_clips_go_round(heard: Bundle) -> None:
    walk = Feeds(TaskContext(heard, {}), SAMPLES, frames=3)
    walk.add({"x": Whole(np.arange(6), [1, 3, 2])})
    assert walk.at("x", 4).tolist() == [1, 2, 3]
    assert walk.clip("x", 1).tolist() == [1, 4, 0]  # the first piece of each
    alone = Feeds(TaskContext(heard, {}), SAMPLES)
    alone.add({"x": Whole(np.arange(6), [1, 3, 2])})
    assert alone.clip("x", 1).tolist() == [1, 2, 3]  # the pieces of one picture


def test_sides_share_what_the_samples_alone_make(heard: Bundle) -> None:
    walk = Feeds(TaskContext(heard, {}), SAMPLES)
    other = walk.beside(TaskContext(heard, {}))
    for side in (walk, other):
        assert side.prepare(ENCODER)
        list(side.batches(ENCODER))
    assert walk.column("knock") is other.column("knock")
    assert walk.column("input_features") is other.column("input_features")
    walk.learn(ENCODER, {"notes": np.zeros((COUNT, NOTES), np.float32)})
    assert "notes" in walk and "notes" not in other


def test_a_component_is_not_ready_before_those_that_feed_it(heard: Bundle) -> None:
    later = Component("fusion", ENCODER.outputs, ())
    walk = Feeds(TaskContext(heard, {}), SAMPLES)
    assert not walk.prepare(later)
    walk.add({"notes": Whole(np.zeros((COUNT, NOTES), np.float32))})
    assert walk.prepare(later)


def test_a_decoder_has_no_prompt_before_its_pictures_are_seen(tmp_path: Path) -> None:
    state = TensorSpec("past", "float32", ("batch", "past")), TensorSpec("present", "float32", ())
    embeds = TensorSpec("inputs_embeds", "float32", ("batch", "tokens", 4))
    decoder = Component("decoder", (embeds, state[0]), (state[1],), (("present", "past"),))
    task = GenerateTask(("vision_encoder",), "image_embeds", "decoder", "{prompt}")
    spec = ModelSpec("x", (decoder,), {"caption": task}, generation=Generation((), 0))
    manifest = Manifest(FORMAT, "0", CheckpointId("x", None, "0"), "float32", spec, (), (), {})
    bundle = Bundle(tmp_path, manifest)
    walk = Feeds(TaskContext(bundle, {}), SAMPLES)
    assert not walk.prepare(decoder)
    assert walk.prompt(decoder, 0, Generation((), 0)) is None
    (prefill, step) = probes.Probe(bundle).steps(SimpleNamespace(component=decoder))
    assert prefill["inputs_embeds"].shape == (1, 4, 4)  # numbers that stand for it
    assert step["inputs_embeds"].shape == (1, 1, 4)
