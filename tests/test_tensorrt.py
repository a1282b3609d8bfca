"""The TensorRT engine, driven against stand-ins of three versions that run graphs on a CPU.

What cannot be had without a GPU is whether TensorRT takes the graphs and how fast they are; what
can is every name that is used, profiles, types, state, the cache, the lock and how builds fail.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from overflow import COMPONENT, overflowing
from tiny import KINDS, tiny

import vlmedge
from vlmedge.arrays import Array
from vlmedge.bundle import Bundle
from vlmedge.cli import build as cli_build
from vlmedge.errors import BundleError, InputError, MissingExtraError, VlmEdgeError
from vlmedge.make import export as exporting
from vlmedge.parity import on_device as level4
from vlmedge.parity.tolerances import compare
from vlmedge.progress import SILENT
from vlmedge.run.model import Model
from vlmedge.shelves import engine_store as building
from vlmedge.shelves.build_options import AxisRange, BuildOptions, Finding
from vlmedge.shelves.contracts import Graph
from vlmedge.shelves.registry import ENGINES, FAMILIES
from vlmedge.spec.wiring import writing

engine: Any = import_module(type(ENGINES["tensorrt"]).__module__)
package = engine.__package__
api, builder, cache, cuda, accelerators, graphs, profile, tactics = (
    import_module(f"{package}.{name}")
    for name in (
        "_tensorrt.versions",
        "_tensorrt.compile",
        "_tensorrt.store",
        "_cuda",
        "_tensorrt.dla",
        "_tensorrt.graph",
        "_tensorrt.profiles",
        "_tensorrt.tactic_libraries",
    )
)
judging = import_module(f"{package}._judge")
STANDINS = Path(__file__).parent / "standins"
VERSIONS = {"trt86": "8.6.1", "trt103": "10.3.0", "trt110": "11.0.0"}
EXACT = BuildOptions(precision="float32")


class _FakeCuda:
    """A GPU whose memory is the host's: addresses are real, and what is freed twice is found."""

    name = "NVIDIA Orin Nano"
    capability = "8.7"

    def __init__(self) -> None:
        self.held: dict[int, Any] = {}
        self.allocations = 0
        self.copied_bytes = {"up": 0, "down": 0, "inside": 0}
        self.streams = 0
        self.free = 4 * 2**30
        self.recordings: dict[int, list[Callable[[], Any]]] = {}
        self.played = self.dropped = 0
        self.unrecordable = False

    def memory(self) -> tuple[int, int]:
        return self.free, 8 * 2**30

    def allocate(self, size: int) -> int:
        data = ctypes.create_string_buffer(b"\xff" * size, size)  # nan, should anyone read it
        self.allocations += 1
        self.held[ctypes.addressof(data)] = data
        return ctypes.addressof(data)

    def release(self, address: int) -> None:
        del self.held[address]

    def stream(self) -> int:
        self.streams += 1
        return self.streams

    def close_stream(self, stream: int) -> None:
        self.streams -= 1

    def upload(self, address: int, array: Array, stream: int) -> None:
        assert array.flags.c_contiguous and array.nbytes <= len(self._at(address))
        ctypes.memmove(address, array.ctypes.data, array.nbytes)
        self.copied_bytes["up"] += array.nbytes

    def download(self, array: Array, address: int, stream: int) -> None:
        assert array.nbytes <= len(self._at(address))
        ctypes.memmove(array.ctypes.data, address, array.nbytes)
        self.copied_bytes["down"] += array.nbytes

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        ctypes.memmove(target, source, size)
        self.copied_bytes["inside"] += size

    def copy_rows(
        self,
        target: int,
        target_pitch: int,
        source: int,
        source_pitch: int,
        width: int,
        rows: int,
        stream: int,
    ) -> None:
        assert width <= target_pitch and width <= source_pitch
        for row in range(rows):
            ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)
        self.copied_bytes["inside"] += rows * width

    def clear(self, address: int, size: int, stream: int) -> None:
        assert size <= len(self._at(address))
        ctypes.memset(address, 0, size)

    def begin_recording(self, stream: int) -> None:
        sys.modules["trt_core"].recording = []  # type: ignore[attr-defined]

    def end_recording(self, stream: int) -> int:
        core: Any = sys.modules["trt_core"]
        made, core.recording = core.recording, None
        if self.unrecordable:
            raise VlmEdgeError("Orin: cudaStreamEndCapture: operation not permitted")
        self.recordings[len(self.recordings) + self.dropped + 1] = made
        return len(self.recordings) + self.dropped

    def play(self, recording: int, stream: int) -> None:
        assert self.recordings[recording]
        self.played += 1
        for run in self.recordings[recording]:
            run()

    def drop_recording(self, recording: int) -> None:
        del self.recordings[recording]
        self.dropped += 1

    def wait(self, stream: int) -> None:
        pass

    def _at(self, address: int) -> Any:
        return self.held[address]


class _Notes:
    """Progress that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.totals: list[int | None] = []
        self.advanced = 0

    def step(self, title: str, total: int | None = None) -> Any:
        self.totals.append(total)
        return _Step(self)

    def note(self, text: str) -> None:
        self.lines.append(text)


class _Step:
    def __init__(self, notes: _Notes) -> None:
        self._notes = notes

    def __enter__(self) -> Callable[[int], None]:
        return self._advance

    def __exit__(self, *error: object) -> None:
        pass

    def _advance(self, amount: int) -> None:
        self._notes.advanced += amount


Use = Callable[[str], _FakeCuda]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Use]:
    """Put one version's stand-in where `import tensorrt` finds it, here and in child processes."""

    def forget() -> None:
        for name in ("tensorrt", "trt_core"):
            sys.modules.pop(name, None)

    def put(version: str) -> _FakeCuda:
        forget()
        places = [str(STANDINS / version), str(STANDINS)]
        for place in reversed(places):
            monkeypatch.syspath_prepend(place)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(places))
        gpu = _FakeCuda()
        monkeypatch.setattr(engine, "connect", lambda: gpu)
        return gpu

    yield put
    forget()


@pytest.fixture
def clip(clip_int8: Path, tmp_path: Path) -> Bundle:
    return copied(clip_int8, tmp_path)


@pytest.fixture
def blip2(blip2_bundle: Path, tmp_path: Path) -> Bundle:
    return copied(blip2_bundle, tmp_path)


def copied(source: Path, folder: Path) -> Bundle:
    """Copy a bundle without its engines."""
    target = folder / "bundle"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("engines"))
    return Bundle.load(target)


def build(bundle: Bundle, options: BuildOptions = EXACT, progress: Any = SILENT) -> Any:
    return ENGINES["tensorrt"].build(bundle, options, progress)  # type: ignore[attr-defined]


def only(name: str, **more: Any) -> BuildOptions:
    return BuildOptions(precision="float32", components=(name,), **more)


def left(bundle: Bundle) -> list[str]:
    """List what is in engines/ besides the stamps of verified files."""
    return sorted(f.name for f in (bundle.path / "engines").iterdir() if f.suffix != ".json")


def plan_head(folder: Path) -> dict[str, Any]:
    _, head, _ = (folder / "engine.plan").read_bytes().split(b"\n", 2)
    found: dict[str, Any] = json.loads(head)
    return found


def forbidden(*args: object, **more: object) -> None:
    raise AssertionError("it was built again")


# ---- one code path, three versions


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_captions_are_those_of_onnx_runtime(
    version: str, precision: Any, use: Use, blip2: Bundle, pictures: list[Path]
) -> None:
    """Prefill, decode, state, beams and rows that end early go through the profiles."""
    use(version)
    build(blip2, BuildOptions(precision=precision))
    there, here = Model(blip2), Model(blip2, "tensorrt")
    paths = [str(p) for p in pictures]
    assert here.caption(paths) == there.caption(paths)
    assert here.caption(paths, num_beams=3) == there.caption(paths, num_beams=3)
    here.graphs.close()


@pytest.mark.parametrize("version", VERSIONS)
def test_quantized_clip_classifies_as_onnx_runtime_does(
    version: str, use: Use, clip: Bundle, pictures: list[Path]
) -> None:
    use(version)
    build(clip)
    labels = ["red circle", "blue star", "green square"]
    for picture in pictures:
        expected = dict(Model(clip).classify(str(picture), labels))
        found = dict(Model(clip, "tensorrt").classify(str(picture), labels))
        for label, probability in expected.items():
            assert abs(found[label] - probability) < 0.05  # ORT rounds activations call by call
        assert max(found, key=found.__getitem__) == max(expected, key=expected.__getitem__)


@pytest.mark.parametrize("version", VERSIONS)
def test_builder_is_told_by_the_names_of_its_version(version: str, use: Use, clip: Bundle) -> None:
    use(version)
    options = BuildOptions(level=2, workspace_mib=64, components=("vision_encoder",))
    (built,) = build(clip, options)
    head = plan_head(built.folder)
    assert head["version"] == VERSIONS[version]
    assert head["level"] == 2
    assert head["pools"] == {"WORKSPACE": 64 * 2**20}
    assert head["flags"] == (["FP16", "INT8"] if version == "trt86" else [])


def test_workspace_is_half_of_what_is_free(use: Use, clip: Bundle) -> None:
    gpu = use("trt103")
    gpu.free = 2**30
    (built,) = build(clip, only("vision_encoder"))
    assert plan_head(built.folder)["pools"] == {"WORKSPACE": 2**29}


@pytest.mark.parametrize("version", VERSIONS)
def test_tactic_sources_without_a_usable_library_are_left_out(
    version: str, use: Use, clip: Bundle
) -> None:
    """By name; in the child process it is this machine's libraries that are tried."""
    use(version)
    trt = api.load()
    config = trt.Builder(api.logger(trt, print)).create_builder_config()
    no_cudnn = tactics.leave_out_unusable(trt, config, lambda library: library.name != "cudnn")
    own = ["EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"]
    others = [] if version == "trt110" else ["CUBLAS", "CUBLAS_LT", "CUDNN"]
    assert no_cudnn == others[2:]
    assert config.get_tactic_sources() == (1 << len(others + own)) - 1 - 4 * bool(others)
    (built,) = build(clip, only("vision_encoder"))
    here = [n for n in others if tactics.is_usable(tactics.LIBRARIES[n])]
    assert plan_head(built.folder)["sources"] == here + own


def test_a_library_is_usable_if_it_makes_a_handle(tmp_path: Path) -> None:
    """What is loaded already is what counts: its name is that of the CUDA that is used."""
    libc = tactics.Library("c", "getpid", "free", (6,))  # getpid is not 0: no handle
    assert not tactics.is_usable(libc)
    assert not tactics.is_usable(tactics.Library("c", "no_such_function", "free", (6,)))
    assert not tactics.is_usable(tactics.Library("cublas-of-nowhere", "a", "b", (12,)))
    made = tactics.Library("c", "sched_yield", "free", (6,))  # 0, and free takes null
    assert tactics.is_usable(made)
    nowhere = tmp_path / "maps"
    nowhere.write_text("7f00-7f01 r--p 0000 00:00 1    /nowhere/libc.so.6\n")
    assert not tactics.is_usable(made, nowhere)


@pytest.mark.parametrize("version", VERSIONS)
def test_progress_is_the_builder_s_outer_phase(version: str, use: Use, clip: Bundle) -> None:
    use(version)
    notes = _Notes()
    build(clip, only("vision_encoder"), notes)
    monitored = version != "trt86"
    assert notes.totals == [None, 3] if monitored else [None]
    assert notes.advanced == (3 if monitored else 0)


@pytest.mark.parametrize("version", VERSIONS)
def test_stand_in_refuses_names_of_other_versions(version: str, use: Use) -> None:
    use(version)
    trt = api.load()
    config = trt.Builder(api.logger(trt, print)).create_builder_config()
    with pytest.raises(AttributeError):
        config.max_tactics = 3
    assert hasattr(trt, "IProgressMonitor") == (version != "trt86")
    assert hasattr(trt.BuilderFlag, "FP16") == (version != "trt110")
    assert hasattr(config, "progress_monitor") == (version != "trt86")


def test_int64_beyond_int32_is_refused_by_8_6(use: Use, clip: Bundle) -> None:
    use("trt86")
    build(clip, only("text_encoder"))
    graph = ENGINES["tensorrt"].open(clip, "text_encoder")
    feeds = token_feeds(clip, 1)
    feeds["input_ids"][0, 0] = 2**40
    with pytest.raises(InputError, match=r"'input_ids' holds 1099511627776: .* takes int32"):
        graph.run(feeds)
    graph.close()


def token_feeds(bundle: Bundle, rows: int) -> dict[str, Array]:
    spec = bundle.spec.component("text_encoder")
    assert bundle.spec.text is not None
    tokens = bundle.spec.text.pad_to or bundle.spec.text.max_tokens
    return {i.name: np.ones((rows, tokens), i.dtype) for i in spec.inputs}


# ---- state and memory on the GPU


@pytest.fixture
def decoder(use: Use, blip2: Bundle) -> Iterator[tuple[Graph, _FakeCuda, Graph]]:
    """The decoder on the stand-in of 10.3, its GPU, and the same on ONNX Runtime."""
    gpu = use("trt103")
    build(blip2, only("decoder"))
    graph = ENGINES["tensorrt"].open(blip2, "decoder")
    yield graph, gpu, ENGINES["ort"].open(blip2, "decoder")
    graph.close()


def prompt(rows: int, tokens: int, total: int) -> dict[str, Array]:
    random = np.random.default_rng(tokens)
    embeds = random.standard_normal((rows, tokens, 128)).astype(np.float32)
    return {"inputs_embeds": embeds, "attention_mask": np.ones((rows, total), np.int64)}


@pytest.mark.parametrize("version", ["trt86", "trt103", "trt110"])
def test_each_profile_has_a_context_and_all_share_one_memory(
    version: str, use: Use, blip2: Bundle
) -> None:
    """A context that changed its profile at every text lost tens of milliseconds on a GPU."""
    gpu = use(version)
    build(blip2, only("decoder"))
    before = len(gpu.held)
    graph: Any = ENGINES["tensorrt"].open(blip2, "decoder")
    made = []
    for _ in range(2):
        graph.run(prompt(1, 9, 9))
        graph.run(prompt(1, 1, 10))
        graph.reset()
        made.append(dict(graph._contexts._made))
    assert set(made[0]) == {0, 1}
    assert made[0] == made[1]
    graph.close()
    assert len(gpu.held) == before


def test_state_stays_on_the_gpu(decoder: tuple[Graph, _FakeCuda, Graph]) -> None:
    graph, gpu, other = decoder
    graph.run(prompt(2, 9, 9))
    other.run(prompt(2, 9, 9))
    gpu.copied_bytes = dict.fromkeys(gpu.copied_bytes, 0)
    feeds = prompt(2, 1, 10)
    found = graph.run(feeds)["logits"]
    np.testing.assert_allclose(found, other.run(feeds)["logits"], atol=1e-4)
    assert gpu.copied_bytes["up"] == sum(array.nbytes for array in feeds.values())
    assert gpu.copied_bytes["down"] == found.nbytes
    assert gpu.copied_bytes["inside"] == 0


@pytest.mark.parametrize("rows", [[1, 0], [1, 1], [0, 1, 1, 0], [1]])
def test_state_is_reordered_on_the_gpu(
    decoder: tuple[Graph, _FakeCuda, Graph], rows: list[int]
) -> None:
    graph, gpu, other = decoder
    for each in (graph, other):
        each.run(prompt(2, 9, 9))
        each.run(prompt(2, 1, 10))
    gpu.copied_bytes = dict.fromkeys(gpu.copied_bytes, 0)
    for each in (graph, other):
        each.reorder(np.array(rows))
    assert gpu.copied_bytes["up"] == gpu.copied_bytes["down"] == 0
    feeds = prompt(len(rows), 1, 11)
    expected = other.run(feeds)["logits"]
    np.testing.assert_allclose(graph.run(feeds)["logits"], expected, atol=1e-4)


def test_rows_that_are_not_there_are_refused(decoder: tuple[Graph, _FakeCuda, Graph]) -> None:
    graph, _, _ = decoder
    graph.run(prompt(2, 9, 9))
    with pytest.raises(IndexError, match=r"rows \[0, 2\] of 2"):
        graph.reorder(np.array([0, 2]))


def test_state_is_forgotten_by_reset(decoder: tuple[Graph, _FakeCuda, Graph]) -> None:
    graph, _, _ = decoder
    first = graph.run(prompt(1, 9, 9))["logits"]
    graph.reset()
    np.testing.assert_array_equal(graph.run(prompt(1, 9, 9))["logits"], first)


def test_past_can_be_fed(decoder: tuple[Graph, _FakeCuda, Graph]) -> None:
    graph, _, other = decoder
    feeds = prompt(1, 1, 4)
    for name, _ in ((i.name, 0) for i in graph.component.inputs if i.name.startswith("past")):
        feeds[name] = np.random.default_rng(3).standard_normal((1, 4, 3, 32)).astype(np.float32)
    expected = other.run(feeds)["logits"]
    np.testing.assert_allclose(graph.run(feeds)["logits"], expected, atol=1e-4)


def test_buffers_are_kept_while_they_are_large_enough(
    decoder: tuple[Graph, _FakeCuda, Graph],
) -> None:
    graph, gpu, _ = decoder
    graph.run(prompt(1, 30, 30))
    for total in range(31, 35):
        graph.run(prompt(1, 1, total))
    before = gpu.allocations
    for total in range(35, 45):
        graph.run(prompt(1, 1, total))
    assert gpu.allocations == before


def test_closed_graph_gives_all_memory_back(use: Use, blip2: Bundle) -> None:
    gpu = use("trt103")
    build(blip2, only("decoder"))
    graph = ENGINES["tensorrt"].open(blip2, "decoder")
    graph.run(prompt(1, 9, 9))
    graph.run(prompt(1, 1, 10))
    assert gpu.held
    graph.close()
    graph.close()
    assert not gpu.held
    assert gpu.streams == 0
    with pytest.raises(RuntimeError, match="decoder is closed"):
        graph.run(prompt(1, 9, 9))


def test_longer_batch_goes_through_in_pieces(use: Use, clip: Bundle) -> None:
    use("trt103")
    build(clip, only("text_encoder", axes={"batch": AxisRange(1, 2, 3)}))
    graph, feeds = ENGINES["tensorrt"].open(clip, "text_encoder"), token_feeds(clip, 8)
    feeds["input_ids"] = feeds["input_ids"] * np.arange(1, 9)[:, None]
    together = graph.run(feeds)
    for i in range(8):
        alone = graph.run({name: array[i : i + 1] for name, array in feeds.items()})
        for name, array in alone.items():
            np.testing.assert_allclose(together[name][i : i + 1], array, atol=1e-5)
    graph.close()


# ---- profiles


def test_qformer_is_built_for_the_texts_that_its_own_tokenizer_may_give(tmp_path: Path) -> None:
    tiny("instructblip-flan-t5", tmp_path)
    spec = FAMILIES["instructblip"].open(tmp_path).spec
    most = {
        name: profile.profiles(spec, spec.component(name), {})[0]["tokens"].max
        for name in ("qformer", "text_encoder")
    }
    rows = int(spec.component("projector").outputs[0].shape[1])  # of the picture, before the text
    assert most == {"qformer": 64, "text_encoder": rows + spec.text.max_tokens}


def test_profile_that_does_not_cover_names_axis_size_and_range(use: Use, blip2: Bundle) -> None:
    use("trt103")
    build(blip2, only("decoder", axes={"past": AxisRange(1, 8, 12), "tokens": AxisRange(1, 8, 9)}))
    graph = ENGINES["tensorrt"].open(blip2, "decoder")
    with pytest.raises(
        InputError, match=r"decoder: tokens is 20: its engine takes 1 to 9: .*--axis tokens=1:9:20"
    ):
        graph.run(prompt(1, 20, 20))
    graph.run(prompt(1, 9, 9))
    for total in range(10, 14):
        graph.run(prompt(1, 1, total))
    with pytest.raises(InputError, match=r"decoder: (past|total) is 1[34]: .*--axis past="):
        graph.run(prompt(1, 1, 14))
    with pytest.raises(InputError, match=r"decoder: batch is 9: its engine takes 1 to 8: "):
        graph.reset()
        graph.run(prompt(9, 4, 4))
    graph.close()


@pytest.mark.parametrize("text", ["3:2:1", "1:2", "x", "1:2:3:4", "-1:1:2"])
def test_wrong_range_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="it must be MIN:OPT:MAX"):
        AxisRange.parse(text)


def test_range_of_an_unknown_axis_is_refused(use: Use, clip: Bundle) -> None:
    use("trt103")
    options = BuildOptions(axes={"bach": AxisRange(1, 1, 2)})
    with pytest.raises(InputError, match="no axis 'bach': give a range of batch"):
        build(clip, options)


# What has an axis of its own: a cross cache, media that is looked at
QUICK = ("blip-vqa", "flamingo")
SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind not in QUICK]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [*QUICK, *SLOW])
def test_every_kind_fits_its_profiles(
    case: str, use: Use, tmp_path: Path, pictures: list[Path]
) -> None:
    """Probing and writing stay in the ranges of the axes, and the texts are ONNX Runtime's."""
    tiny(case, tmp_path / "checkpoint")
    bundle = exporting.export(str(tmp_path / "checkpoint"), tmp_path / "bundle", check=False)
    use("trt103")
    build(bundle)
    writes_the_same(bundle, pictures)


def writes_the_same(bundle: Bundle, pictures: list[Path]) -> None:
    there, here = Model(bundle), Model(bundle, "tensorrt")
    clip = vlmedge.Video(np.random.default_rng(0).integers(0, 256, (11, 40, 52, 3), np.uint8))
    shown: dict[str, Any] = {"image": [str(picture) for picture in pictures], "video": [clip]}
    for task, beams in itertools.product(writing(bundle.spec), (1, 3)):
        more: Any = {"max_tokens": 6, "num_beams": beams}
        if "{question}" in task.prompt:
            more["question"] = "what color is the star?"
        texts = [
            (model.ask if "question" in more else model.caption)(shown[task.source], **more)
            for model in (there, here)
        ]
        assert texts[0] == texts[1]
    here.graphs.close()


def test_encoder_and_decoder_write_what_onnx_runtime_does(
    use: Use, t5: Bundle, pictures: list[Path]
) -> None:
    use("trt103")
    build(t5)
    writes_the_same(t5, pictures)


def test_states_are_what_a_reader_has_read(t5: Bundle) -> None:
    """T5's encoder reads the picture's rows and the text, and the decoder looks at all of it."""
    spec = t5.spec
    assert spec.text is not None
    read = AxisRange(1, 6 + 16, 6 + spec.text.max_tokens)
    (encoder,) = profile.profiles(spec, spec.component("text_encoder"), {})
    (cross,) = profile.profiles(spec, spec.component("cross_kv"), {})
    prefill, decode = profile.profiles(spec, spec.component("decoder"), {})
    assert encoder["tokens"] == cross["states"] == prefill["states"] == decode["states"] == read
    assert prefill["tokens"] == AxisRange(1, 1, 1)  # the start id: the text is read elsewhere
    wider = {"tokens": AxisRange(1, 30, 60)}
    for part in ("cross_kv", "decoder"):
        found = profile.profiles(spec, spec.component(part), wider)
        assert [one["states"] for one in found] == [AxisRange(1, 30, 60)] * len(found)


def test_states_beyond_the_profile_are_named(use: Use, t5: Bundle) -> None:
    use("trt103")
    build(t5, only("cross_kv", axes={"states": AxisRange(1, 8, 9)}))
    graph = ENGINES["tensorrt"].open(t5, "cross_kv")
    states = np.zeros((1, 10, 32), np.float32)
    with pytest.raises(
        InputError, match=r"cross_kv: states is 10: its engine takes 1 to 9: .*--axis states=1:9:10"
    ):
        graph.run({"text_states": states})
    graph.close()


def test_cross_cache_goes_up_once(use: Use, t5: Bundle, pictures: list[Path]) -> None:
    gpu = use("trt103")
    build(t5)
    model = Model(t5, "tensorrt")
    sent = []
    for tokens in (2, 6):
        gpu.copied_bytes["up"] = 0
        model.caption(str(pictures[0]), max_tokens=tokens, min_tokens=tokens)
        sent.append(gpu.copied_bytes["up"])
    cross = 4 * 4 * 8 * 4 * 8  # 2 layers' keys and values, 4 heads, more than 8 states, float32
    assert 0 < sent[1] - sent[0] < cross
    model.graphs.close()


@pytest.fixture(scope="module")
def t5_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("t5")
    tiny("blip2-flan-t5", root / "checkpoint")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's and transformers' own
        return exporting.export(str(root / "checkpoint"), root / "bundle", check=False).path


@pytest.fixture
def t5(t5_bundle: Path, tmp_path: Path) -> Bundle:
    return copied(t5_bundle, tmp_path)


# ---- the cache


def test_engine_is_built_once(use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    use("trt103")
    first = build(clip)
    monkeypatch.setattr(engine, "compile_component", forbidden)
    second = build(clip)
    assert [b.reused for b in first] == [False, False]
    assert [b.reused for b in second] == [True, True]
    assert [b.folder for b in first] == [b.folder for b in second]
    assert len([name for name in left(clip) if name.endswith(".timing")]) == 1
    assert not [name for name in left(clip) if name.startswith(".")]


def test_record_says_what_an_engine_is_for(use: Use, clip: Bundle) -> None:
    use("trt103")
    (built,) = build(clip, only("vision_encoder"))
    identity = building.read_sidecar(built.folder)["identity"]
    assert identity["component"] == "vision_encoder"
    assert identity["tensorrt"] == "10.3.0"
    assert (identity["gpu"], identity["compute_capability"]) == ("NVIDIA Orin Nano", "8.7")
    assert identity["precision"] == "float32"
    assert identity["profiles"] == [{"batch": "1:1:8"}]
    assert sorted(f.name for f in built.folder.iterdir()) == ["engine.json", "engine.plan"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tensorrt": "10.3.1"}, "tensorrt was 10.3.0 and is 10.3.1"),
        ({"capability": "8.9"}, "compute_capability was 8.7 and is 8.9"),
        ({"name": "NVIDIA A2"}, "gpu was NVIDIA Orin Nano and is NVIDIA A2"),
        ({"precision": "float16"}, "precision was float32 and is float16"),
        ({"level": 1}, "level was None and is 1"),
        ({"axes": {"batch": AxisRange(1, 1, 2)}}, "profiles changed"),
    ],
)
def test_changed_field_is_named_and_built_again(
    change: dict[str, Any], words: str, use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = use("trt103")
    build(clip, only("vision_encoder"))
    for name in ("name", "capability"):
        if name in change:
            monkeypatch.setattr(gpu, name, change[name])
    if "tensorrt" in change:
        monkeypatch.setattr(api.load(), "__version__", change["tensorrt"])
    asked = {k: v for k, v in change.items() if k in ("precision", "level", "axes")}
    options = BuildOptions(**{"precision": "float32", "components": ("vision_encoder",), **asked})
    notes = _Notes()
    (built,) = build(clip, options, notes)
    assert not built.reused
    assert notes.lines[0] == f"vision_encoder: built again: {words}"


def test_changed_weights_are_another_engine(use: Use, clip: Bundle) -> None:
    use("trt103")
    build(clip, only("vision_encoder"))
    files = tuple(
        type(f)(f.path, "0" * 64, f.bytes) if f.path == "graphs/vision_encoder.bin" else f
        for f in clip.manifest.files
    )
    import msgspec

    other = Bundle(clip.path, msgspec.structs.replace(clip.manifest, files=files))
    notes = _Notes()
    build(other, only("vision_encoder"), notes)
    assert notes.lines == ["vision_encoder: built again: weights changed"]


def test_another_machine_s_plan_is_left_alone_and_never_read(
    use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = use("trt103")
    (desktop,) = build(clip, only("vision_encoder"))
    monkeypatch.setattr(gpu, "name", "NVIDIA GeForce RTX 4090")
    (desktop.folder / "engine.plan").write_bytes(b"do not read me")
    build(clip, only("vision_encoder"))
    assert (desktop.folder / "engine.plan").read_bytes() == b"do not read me"
    ENGINES["tensorrt"].open(clip, "vision_encoder").close()


@pytest.mark.parametrize("damage", ["truncated", "foreign", "gone", "record"])
def test_broken_engine_is_built_again(damage: str, use: Use, clip: Bundle) -> None:
    use("trt103")
    (built,) = build(clip, only("vision_encoder"))
    plan, good = built.folder / "engine.plan", (built.folder / "engine.plan").read_bytes()
    if damage == "truncated":
        plan.write_bytes(good[: len(good) // 2])
    elif damage == "foreign":
        plan.write_bytes(good[::-1])
    elif damage == "gone":
        plan.unlink()
    else:
        (built.folder / "engine.json").write_text("{")
    notes = _Notes()
    (again,) = build(clip, only("vision_encoder"), notes)
    assert not again.reused
    why = "engine.plan is not the file that was built"
    assert notes.lines == [f"vision_encoder: built again: {why}"]
    assert plan.read_bytes() == good


def test_open_keeps_to_the_options_of_the_build(
    use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("trt103")
    build(clip, only("vision_encoder", level=1, axes={"batch": AxisRange(1, 2, 4)}))
    monkeypatch.setattr(engine, "compile_component", forbidden)
    ENGINES["tensorrt"].open(clip, "vision_encoder").close()


def test_built_engine_opens_without_onnx_ir(
    use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("trt103")
    build(clip, only("vision_encoder"))
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    ENGINES["tensorrt"].open(clip, "vision_encoder").close()


def test_engine_imports_without_onnx_ir_and_tensorrt() -> None:
    code = "import sys; sys.modules['onnx_ir'] = sys.modules['tensorrt'] = None\n"
    code += "from vlmedge.shelves.registry import ENGINES; ENGINES['tensorrt']"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_cannot_be_built_runs_on_the_cpu_when_that_is_said(
    use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use("trt103")

    def refuse(*_: Any, plain: bool) -> None:
        raise BundleError("vision_encoder: no")

    monkeypatch.setattr(engine, "compile_component", refuse)
    with pytest.raises(BundleError, match="no"):
        vlmedge.load(clip.path, engine="tensorrt").graphs["vision_encoder"]
    pixels = np.zeros((1, 3, 64, 64), np.float32)
    model = vlmedge.load(clip.path, engine="tensorrt", allow_fallback=True)
    (ours,) = model.graphs["vision_encoder"].run({"pixel_values": pixels}).values()
    assert "vision_encoder: runs on the CPU, for vision_encoder: no" in caplog.text
    (theirs,) = (
        vlmedge.load(clip.path).graphs["vision_encoder"].run({"pixel_values": pixels}).values()
    )
    np.testing.assert_array_equal(ours, theirs)


def test_open_builds_what_is_missing_and_says_so(
    use: Use, clip: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    use("trt103")
    ENGINES["tensorrt"].open(clip, "vision_encoder").close()
    assert "building vision_encoder: this takes minutes, once" in caplog.text


def test_read_only_bundle_has_its_engines_in_the_users_cache(
    use: Use, clip: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("trt103")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # chmod does not bind root
    monkeypatch.setenv("VLMEDGE_CACHE", str(tmp_path / "cache"))
    (built,) = build(clip, only("vision_encoder"))
    assert built.folder.is_relative_to(tmp_path / "cache")
    assert not [name for name in left(clip) if name.startswith("trt-")]


def test_timings_are_handed_on(use: Use, clip: Bundle) -> None:
    use("trt103")
    build(clip)
    (file,) = (clip.path / "engines").glob("*.timing")
    assert file.name == "trt-nvidia-orin-nano-10.3.0.timing"
    assert file.read_bytes() == b"2"  # components


def test_engines_are_listed_and_cleaned(use: Use, clip: Bundle, vlmedge: Any) -> None:
    use("trt103")
    build(clip)
    listed = vlmedge("engines", "list", clip.path)
    assert listed.out.count("10.3.0, NVIDIA Orin Nano, float32") == 2
    rows = json.loads(vlmedge("engines", "list", clip.path, "--json").out)
    assert {row["identity"]["component"] for row in rows} == {"text_encoder", "vision_encoder"}
    assert vlmedge("engines", "clean", clip.path).out.startswith("2 engines removed, ")
    assert not [name for name in left(clip) if "trt" in name]
    assert "no engines" in vlmedge("engines", "list", clip.path).out
    Bundle.load(clip.path)


def test_engines_of_no_bundle_are_refused(tmp_path: Path, vlmedge: Any) -> None:
    ran = vlmedge("engines", "clean", tmp_path)
    assert (ran.code, "is no bundle" in ran.err) == (1, True)


# ---- numbers that are none


def test_nan_in_float16_falls_back_to_float32(
    use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("trt103")
    verdicts = iter(["image_embeds", ""])
    monkeypatch.setattr(engine, "not_finite", lambda graph, probe: next(verdicts))
    notes = _Notes()
    (built,) = build(clip, BuildOptions(components=("vision_encoder",), keep_slower=True), notes)
    assert built.precision == "float32"
    assert notes.lines == ["vision_encoder: image_embeds is nan or inf in float16: built again"]


@pytest.mark.parametrize("version", ["trt103", "trt110"])
def test_overflow_in_float16_is_repaired_node_by_node(
    version: str,
    use: Use,
    clip_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use(version)
    bundle = overflowing(clip_bundle, tmp_path)
    notes = _Notes()
    (built,) = build(bundle, BuildOptions(components=(COMPONENT,)), notes)
    assert built.precision == "float16"
    count = len(built.restored)
    assert 0 < count < 20
    assert notes.lines == [
        f"{COMPONENT}: image_embeds is nan or inf in float16: {count} nodes in float32, built again"
    ]
    record = building.read_sidecar(built.folder)["restored"]
    assert [node["node"] for node in record] == list(built.restored)
    assert max(node["largest"] for node in record) > 65504
    graph = ENGINES["tensorrt"].open(bundle, COMPONENT)
    probe = import_module("vlmedge.parity.probe").Probe(bundle)
    (feeds,) = probe.steps(graph)
    found = graph.run(feeds)["image_embeds"]
    expected = ENGINES["ort"].open(bundle, COMPONENT).run(feeds)["image_embeds"]
    assert compare(COMPONENT, "fp16", expected, found).passed
    graph.close()
    cli_build.show_built([built])
    assert f"float16, {count} nodes float32" in capsys.readouterr().out


def test_overflow_that_no_node_explains_falls_back_to_float32(
    use: Use, clip_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The repairs are bounded: as many as there are margins, and then float32."""
    use("trt103")
    bundle = overflowing(clip_bundle, tmp_path)
    tried: list[str] = []
    compiled = engine.compile_component

    def note_precision(*arguments: Any, plain: bool) -> None:
        tried.append(arguments[3])
        compiled(*arguments, plain=plain)

    monkeypatch.setattr(engine, "compile_component", note_precision)
    monkeypatch.setattr(engine, "not_finite", lambda *_: "y" * (tried[-1] == "float16"))
    notes = _Notes()
    (built,) = build(bundle, BuildOptions(components=(COMPONENT,)), notes)
    assert (built.precision, built.restored) == ("float32", ())
    assert 2 <= tried.count("float16") <= 3
    assert notes.lines[-1] == f"{COMPONENT}: y is nan or inf in float16: built again"


def test_weight_beyond_float16_falls_back_to_float32(
    use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("trt103")
    compiled = engine.compile_component

    def refuse(*arguments: Any, plain: bool) -> None:
        if arguments[3] == "float16":
            raise api.BeyondHalfError("w reaches 1.0e+05, beyond float16: build with float32")
        compiled(*arguments, plain=plain)

    monkeypatch.setattr(engine, "compile_component", refuse)
    notes = _Notes()
    (built,) = build(clip, BuildOptions(components=("vision_encoder",), keep_slower=True), notes)
    assert built.precision == "float32"
    assert notes.lines == ["vision_encoder: w reaches 1.0e+05, beyond float16: built in float32"]


def test_nan_in_float32_is_refused(use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    use("trt103")
    monkeypatch.setattr(engine, "not_finite", lambda graph, probe: "image_embeds")
    with pytest.raises(BundleError, match="image_embeds is nan or inf even in float32: check"):
        build(clip, BuildOptions(components=("vision_encoder",)))
    assert not [name for name in left(clip) if "trt" in name and not name.endswith(".timing")]


def test_outputs_are_looked_at_for_nan() -> None:
    probe = import_module("vlmedge.parity.probe")
    component = SimpleNamespace(inputs=(), state=())
    for bad in (np.nan, np.inf):
        outputs = {"ids": np.ones(2, np.int64), "y": np.array([1, bad], np.float16)}
        graph = SimpleNamespace(
            component=component, reset=lambda: None, run=lambda feeds, out=outputs: out
        )
        known = SimpleNamespace(steps=lambda graph: [{}], learn=lambda outputs: None)
        assert probe.not_finite(graph, known) == "y"
    outputs["y"] = np.ones(2, np.float16)
    assert probe.not_finite(graph, known) == ""


# ---- level 4: what an engine gives on its device


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_engine_is_held_against_its_portable_graph(
    version: str, precision: Any, use: Use, blip2: Bundle
) -> None:
    use(version)
    for built in build(blip2, BuildOptions(precision=precision)):
        assert built.parity is not None and built.parity.passed
        allowed = "cosine >= 0.999" if precision == "float16" else "relative <= 0.0001"
        assert built.parity.tolerance == allowed
        assert built.latency_ms is not None and built.latency_ms > 0
        kept = building.read_sidecar(built.folder)["level4"]
        assert kept["against"].startswith("its graph on ONNX Runtime 1.")
        assert kept["parity"]["component"] == built.component
        cleared = ["TF32"] if precision == "float32" else []
        assert plan_head(built.folder)["cleared"] == cleared
    assert build(blip2, BuildOptions(precision=precision))[0].parity is not None  # kept


def test_engine_that_computes_something_else_fails(
    use: Use,
    clip: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    vlmedge: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    use("trt103")
    ran = graphs.TrtGraph.run

    def off(graph: Graph, feeds: Any) -> dict[str, Array]:
        return {name: array[:, ::-1] for name, array in ran(graph, feeds).items()}

    monkeypatch.setattr(graphs.TrtGraph, "run", off)
    ran_build = vlmedge("build", clip.path, "--component", "vision_encoder")
    assert ran_build.code == 1
    assert "FAILED, cosine" in ran_build.out.replace("\n", " ")
    assert "vision_encoder on this device is not what its graph gives: try --prec" in ran_build.err
    ran_check = vlmedge("check", clip.path, "--engine", "tensorrt")
    assert ran_check.code == 1 and "FAILED, cosine" in ran_check.out
    assert "vision_encoder on NVIDIA Orin Nano is not what its portable" in ran_check.err
    ENGINES["tensorrt"].open(clip, "vision_encoder").close()
    assert "vision_encoder: its engine is not what its graph gives" in caplog.text  # every time


def test_board_without_onnx_runtime_is_not_compared(
    use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("trt103")

    def missing(*_: object) -> None:
        raise ImportError("No module named 'onnxruntime'")

    monkeypatch.setattr(judging, "_Portable", missing)
    (built,) = build(clip, only("vision_encoder"))
    assert built.parity is None
    assert built.latency_ms is not None


def test_board_without_memory_for_both_is_not_compared(
    use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("trt103")
    weights = clip.path.joinpath("graphs/vision_encoder.bin").stat().st_size
    for more, compared in ((1.0, False), (2.0, True)):
        free = builder.RESERVE_BYTES + int(more * weights)
        monkeypatch.setattr(judging, "free_bytes", lambda free=free: free)
        (built,) = build(clip, only("vision_encoder", level=int(more)))
        assert (built.parity is not None) == compared


@pytest.mark.parametrize("read_only", [False, True])
def test_level_4_of_engines_is_shown_and_reported(
    read_only: bool,
    use: Use,
    clip: Bundle,
    vlmedge: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Engines of a bundle that cannot be written lie elsewhere, and what they say is read there."""
    use("trt103")
    engines, report = tmp_path / "cache", clip.path / "reports/parity.json"
    monkeypatch.setenv("VLMEDGE_CACHE", str(engines))
    before = json.loads(report.read_bytes())
    if read_only:
        may = os.access  # root may write what nobody may
        monkeypatch.setattr(os, "access", lambda p, m, **k: m != os.W_OK and may(p, m, **k))
    assert vlmedge("build", clip.path, "--keep-slower").code == 0
    assert engines.exists() == read_only
    ran = vlmedge("check", clip.path, "--engine", "tensorrt", "--json")
    found = json.loads(ran.out)
    assert ran.code == 0 and ("cannot be written" in ran.err) == read_only
    names = [component.name for component in clip.spec.components]
    assert [one["component"] for one in found] == names
    for one in found:
        assert (one["engine"], one["device"]) == ("TensorRT 10.3.0, float16", "NVIDIA Orin Nano")
        assert one["verdict"]["parity"]["passed"] and one["verdict"]["latency_ms"] > 0
    now = json.loads(report.read_bytes())
    assert now.pop("level4", []) == ([] if read_only else found)
    assert now == {name: value for name, value in before.items() if name != "level4"}
    assert Bundle.load(clip.path, thorough=True).verified
    shown = vlmedge("info", clip.path).out
    assert ("TensorRT 10.3.0" in shown) == (not read_only)
    # what the processor's engine gives stands beside it
    ran = vlmedge("check", clip.path, "--quiet")
    assert ran.code == 0 and ran.out.count("passed, cosine") == 2 * len(names)
    assert "ONNX Runtime 1." in ran.out and "TensorRT 10.3.0" in ran.out


def test_level_4_of_an_older_graph_is_no_longer_shown(
    use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("trt103")
    build(clip, only("vision_encoder"))
    assert [one.component for one in level4.recorded(clip)] == ["vision_encoder"]
    monkeypatch.setattr(level4, "digest", lambda file: "of another graph")
    assert level4.recorded(clip) == []


def test_level_4_of_what_is_not_built_is_refused(clip: Bundle, vlmedge: Any) -> None:
    ran = vlmedge("check", clip.path, "--engine", "tensorrt")
    assert ran.code == 1 and ran.out == ""
    assert ran.err.endswith("tensorrt has built nothing of it: run `vlmedge build` first\n")


# ---- steps that are recorded


RECORDED = BuildOptions(precision="float32", components=("decoder",), record=True)


def clock(monkeypatch: pytest.MonkeyPatch, *times: float) -> None:
    """Have plain and recorded steps take these times, ms."""
    taken, walked = itertools.cycle(times), engine.walked
    monkeypatch.setattr(engine, "walked", lambda *a: (walked(*a)[0], next(taken)))


@pytest.mark.parametrize("version", VERSIONS)
def test_recorded_steps_give_what_plain_ones_do(
    version: str, use: Use, blip2: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts, steps, a rewound text and beams, on a graph that plays what it has recorded."""
    gpu = use(version)
    clock(monkeypatch, 3.0, 2.0)
    notes = _Notes()
    (built,) = build(blip2, RECORDED, notes)
    assert notes.lines == ["decoder: a step takes 3.00 ms, recorded 2.00 ms: they are recorded"]
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
    recording = import_module(f"{package}._tensorrt.cuda_graphs")
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
        ((2.0, 2.0), False, False, "recorded 2.00 ms: they are not recorded"),
        ((3.0, 2.0), True, False, "recorded steps give something else (cosine -1.0"),
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
    notes = _Notes()
    (built,) = build(blip2, RECORDED, notes)
    (line,) = notes.lines
    assert words in line
    assert building.read_sidecar(built.folder)["records"] is False
    graph = ENGINES["tensorrt"].open(blip2, "decoder")
    assert type(graph) is graphs.TrtGraph
    graph.close()


def test_what_has_no_cache_is_not_recorded(use: Use, clip: Bundle) -> None:
    use("trt103")
    notes = _Notes()
    (built,) = build(clip, only("vision_encoder", record=True), notes)
    assert notes.lines == []
    assert building.read_sidecar(built.folder)["records"] is False


# ---- a deep-learning accelerator


@pytest.fixture
def accelerated(use: Use, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], _FakeCuda]:
    """Use a stand-in on a board with two accelerators."""

    def put(version: str) -> _FakeCuda:
        monkeypatch.setenv("TRT_STANDIN_DLA", "2")
        return use(version)

    return put


def tower(**more: Any) -> BuildOptions:
    return BuildOptions(components=("vision_encoder",), **more)


@pytest.mark.parametrize("version", ["trt86", "trt103"])
@pytest.mark.parametrize("faster", ["GPU", "DLA"])
def test_faster_of_gpu_and_dla_is_kept_with_the_other_s_figure(
    version: str,
    faster: str,
    accelerated: Use,
    clip_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accelerated(version)
    bundle, notes = copied(clip_bundle, tmp_path), _Notes()
    times = iter([2.0, 1.0] if faster == "DLA" else [2.0, 1.99])
    monkeypatch.setattr(judging, "time_ms", lambda graph, probe: next(times))
    (built,) = build(bundle, tower(dla="faster"), notes)
    head = plan_head(built.folder)
    assert built.dla is (faster == "DLA")
    assert built.dropped == ({"GPU": 2.0} if faster == "DLA" else {"DLA": 1.99})
    assert notes.lines[-1].endswith(f": the {faster} is kept")
    assert head["dla_core"] == (0 if faster == "DLA" else None)
    if faster == "DLA":
        assert head["flags"] == ["FP16", "GPU_FALLBACK"]
        assert head["profiles"] == [{"pixel_values": [[1, 3, 64, 64]] * 3}]
    assert sorted(f.name for f in built.folder.iterdir()) == ["engine.json", "engine.plan"]


def test_dla_runs_what_was_built_for_it_row_by_row(
    accelerated: Use, clip: Bundle, pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of an int8 bundle it is the plain graph: Q/DQ are not for a DLA before 11."""
    accelerated("trt103")
    (built,) = build(clip, tower(dla="always"))
    assert (built.dla, set(built.dropped)) == (
        True,
        {"int8", "float16", "GPU"} & set(built.dropped),
    )
    assert "GPU" in built.dropped
    assert b"QuantizeLinear" not in (built.folder / "engine.plan").read_bytes()
    paths = [str(picture) for picture in pictures]
    here, there = Model(clip, "tensorrt"), Model(clip)
    found, expected = here.embed_image(paths), there.embed_image(paths)
    assert (np.sum(found * expected, axis=1) > 0.99).all()
    cli_build.show_built([built])
    assert "float16 on the DLA" in " ".join(capsys.readouterr().out.split())


def test_dla_is_in_the_key_and_in_what_is_built_again(accelerated: Use, clip: Bundle) -> None:
    accelerated("trt103")
    (plain,) = build(clip, tower())
    notes = _Notes()
    (tried,) = build(clip, tower(dla="always"), notes)
    assert "vision_encoder: built again: dla was off and is always" in notes.lines
    assert (plain.folder.name != tried.folder.name, tried.reused) == (True, False)
    assert build(clip, tower(dla="always"))[0].reused
    assert cache.last_options(clip, "vision_encoder", "NVIDIA Orin Nano").dla == "always"


@pytest.mark.parametrize(
    ("version", "cores", "options", "words"),
    [
        ("trt110", "2", {}, r"TensorRT 11\.0\.0 has no DLA \(8\.5 to 10\.7, and 11\.4\.1 on AGX"),
        ("trt103", "0", {}, r"NVIDIA Orin Nano has no DLA \(Xavier, Orin NX and AGX Orin have\)"),
        ("trt103", "2", {"components": ("text_encoder",)}, "text_encoder: no vision tower of fix"),
    ],
)
@pytest.mark.parametrize("mode", ["faster", "always", "auto"])
def test_dla_is_refused_where_there_is_none_and_auto_does_without(
    version: str,
    cores: str,
    options: dict[str, Any],
    words: str,
    mode: Any,
    use: Use,
    clip: Bundle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRT_STANDIN_DLA", cores)
    use(version)
    wanted = BuildOptions(dla=mode, **({"components": ("vision_encoder",)} | options))
    if mode == "auto":
        notes = _Notes()
        (built,) = build(clip, wanted, notes)
        assert not built.dla
        told = any("built for the GPU alone: " in line for line in notes.lines)
        assert told == (built.component == "vision_encoder")
        return
    monkeypatch.setattr(builder, "_run", forbidden)
    with pytest.raises(InputError, match=words):
        build(clip, wanted)


def test_auto_leaves_a_tower_of_matrix_products_to_the_gpu(
    accelerated: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerated("trt103")
    notes = _Notes()
    (built,) = build(clip, tower(dla="auto"), notes)
    assert not built.dla
    assert any(
        line.endswith("% of its products' weights are convolutions, a DLA has no others")
        for line in notes.lines
    )
    monkeypatch.setattr(accelerators, "CONVOLUTIONS", 0.0)
    clip_again = Bundle.load(clip.path)
    building.clean_engines(clip.path)
    (built,) = build(clip_again, tower(dla="auto"))
    assert {"GPU", "DLA"} & set(built.dropped)


def test_decoder_is_never_for_a_dla(accelerated: Use, blip2: Bundle) -> None:
    accelerated("trt103")
    with pytest.raises(InputError, match="decoder: no vision tower of fixed sizes"):
        build(blip2, BuildOptions(components=("decoder",), dla="always"))


def test_failed_dla_leaves_the_gpu_s_engine_unless_it_must_be(
    accelerated: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerated("trt103")
    monkeypatch.setenv("TRT_STANDIN_FAULT", "dla")
    notes = _Notes()
    (built,) = build(clip, tower(dla="faster"), notes)
    assert not built.dla
    assert notes.lines[-1].startswith("vision_encoder: no DLA: ")
    before = left(clip)
    with pytest.raises(BundleError, match=r"TensorRT cannot build it: Error Code 1: DLA"):
        build(clip, tower(dla="always"))
    assert left(clip) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dla": "yes"}, "dla 'yes': it must be off, auto, faster or always"),
        ({"dla": "always", "precision": "float32"}, "a DLA computes in float16 or int8"),
    ],
)
def test_impossible_dla_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        BuildOptions(**options)


# ---- quantized layers have to be faster


@pytest.mark.parametrize(("slow", "kept"), [("int8", "float16"), ("float16", "int8")])
def test_slower_of_int8_and_float16_is_dropped_with_its_figures(
    slow: str, kept: str, use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("trt103")
    times = iter([5.0, 2.0] if slow == "int8" else [2.0, 2.05])
    monkeypatch.setattr(judging, "time_ms", lambda graph, probe: next(times))
    notes = _Notes()
    (built,) = build(clip, BuildOptions(components=("vision_encoder",)), notes)
    figures = "5.00 ms, float16 2.00" if slow == "int8" else "2.00 ms, float16 2.05"
    fate = "dropped for it" if slow == "int8" else "kept"
    assert notes.lines == [f"vision_encoder: int8 takes {figures} ms: int8 is {fate}"]
    assert built.dropped == {slow: 5.0 if slow == "int8" else 2.05}
    assert building.read_sidecar(built.folder)["dropped"] == built.dropped
    plan = (built.folder / "engine.plan").read_bytes()
    assert (b"QuantizeLinear" in plan) == (kept == "int8")
    assert built.parity is not None and built.parity.passed
    assert sorted(f.name for f in built.folder.iterdir()) == ["engine.json", "engine.plan"]


def test_faster_float16_that_fails_level_4_drops_nothing(
    use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("trt103")
    bad = compare("vision_encoder", "int8", np.ones((1, 4)), -np.ones((1, 4)))
    verdicts = iter([(None, 5.0), (bad, 2.0)])
    monkeypatch.setattr(engine, "judge", lambda *_: level4.Verdict("its graph", *next(verdicts)))
    (built,) = build(clip, BuildOptions(components=("vision_encoder",)))
    assert b"QuantizeLinear" in (built.folder / "engine.plan").read_bytes()
    assert built.dropped == {"float16": 2.0}


def test_slower_int8_is_kept_when_that_is_asked_for(
    use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("trt103")
    options = BuildOptions(components=("vision_encoder",), keep_slower=True)
    (built,) = build(clip, options)
    assert built.dropped == {}
    assert b"QuantizeLinear" in (built.folder / "engine.plan").read_bytes()
    assert cache.last_options(clip, "vision_encoder", "NVIDIA Orin Nano").keep_slower


def test_float16_that_cannot_be_built_leaves_int8(
    use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("trt103")
    compiled = engine.compile_component

    def refuse(*arguments: Any, plain: bool) -> None:
        if plain:
            raise BundleError("vision_encoder: no room")
        compiled(*arguments, plain=plain)

    monkeypatch.setattr(engine, "compile_component", refuse)
    notes = _Notes()
    (built,) = build(clip, BuildOptions(components=("vision_encoder",)), notes)
    assert b"QuantizeLinear" in (built.folder / "engine.plan").read_bytes()
    assert notes.lines == [
        "vision_encoder: int8 was not timed against float: vision_encoder: no room"
    ]


# ---- what goes wrong


def test_no_gpu_is_told(use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    use("trt103")
    monkeypatch.setattr(engine, "connect", cuda.connect)
    monkeypatch.setattr(cuda, "_load", lambda names: None)
    with pytest.raises(VlmEdgeError, match=r"no NVIDIA GPU: its driver .* or use --engine ort"):
        build(clip)


def test_driver_without_a_gpu_is_told() -> None:
    class Runtime:
        class cudaGetErrorString:
            restype: Any = None

            def __new__(cls, error: int) -> Any:
                return b"no CUDA-capable device is detected"

        @staticmethod
        def cudaGetDeviceCount(count: Any) -> int:
            return 100

    with pytest.raises(VlmEdgeError, match="no NVIDIA GPU: no CUDA-capable device is detected"):
        cuda.Cudart(Runtime, None)


def test_missing_tensorrt_is_told(clip: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingExtraError, match="TensorRT is not installed: pip install tensorrt"):
        build(clip)


def test_empty_package_from_pypi_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace())  # type: ignore[arg-type]
    with pytest.raises(MissingExtraError, match="TensorRT cannot be loaded .*: pip install"):
        api.load()


HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"


@pytest.mark.parametrize(
    ("release", "python", "words"),
    [
        ("# R36 (release), REVISION: 4.3", "3.10", "python3-libnvinfer"),
        ("# R36 (release), REVISION: 4.3", "3.99", "python3.10 -m venv --system-site-packages"),
        ("# R39 (release), REVISION: 2.0", "3.99", "python3.12 -m venv --system-site-packages"),
        ("# R35 (release), REVISION: 6.1", "3.10", "L4T R35 has TensorRT 8.5 or older"),
        ("# R32 (release), REVISION: 7.6", "3.10", "L4T R32 has TensorRT 8.5 or older"),
    ],
)
def test_jetpack_is_told_how_to_get_tensorrt(
    release: str, python: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text(release + ", GCID: 1, BOARD: generic")
    major, minor = python.split(".")
    monkeypatch.setattr(api.sys, "version_info", (int(major), int(minor), 0))
    assert words in api.how_to_get(tmp_path)


def test_jetpack_s_own_tensorrt_is_found_outside_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text("# R36 (release), REVISION: 4.3")
    (tmp_path / "usr/lib/python3.10/dist-packages/tensorrt").mkdir(parents=True)
    monkeypatch.setattr(api.sys, "version_info", (3, 10, 0))
    assert "venv --system-site-packages" in api.how_to_get(tmp_path)


def test_too_old_tensorrt_is_refused(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    use("trt86")
    monkeypatch.setattr(import_module("tensorrt"), "__version__", "8.5.2.2")
    with pytest.raises(InputError, match=r"TensorRT 8\.5\.2\.2 is too old: 8\.6"):
        api.load()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("memory", r"vision_encoder: the build ran out of memory .*--level 1; --workspace 256"),
        ("killed", r"vision_encoder: the build ran out of memory .*add swap"),
        ("refuses", r"TensorRT cannot build it: .*Could not find any implementation"),
        ("unready", r"TensorRT cannot build it: CUDA initialization failure with error: 35"),
        ("crash", r"builder ended with signal 11: .*free\(\): invalid pointer"),
    ],
)
def test_failed_build_ends_in_one_line_and_leaves_nothing(
    fault: str, words: str, use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("trt103")
    monkeypatch.setenv("TRT_STANDIN_FAULT", fault)
    with pytest.raises(BundleError, match=words) as got:
        build(clip, only("vision_encoder"))
    assert "\n" not in str(got.value)
    assert left(clip) == []


def test_build_that_takes_too_much_memory_is_stopped(
    use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("trt103")
    monkeypatch.setenv("TRT_STANDIN_FAULT", "hog")
    start = time.monotonic()
    with pytest.raises(BundleError, match=r"ran out of memory \(it took \d+ MiB"):
        build(clip, only("vision_encoder", memory_mib=200))
    assert time.monotonic() - start < 25  # it would have slept for 30 s
    assert left(clip) == []


def test_weights_that_do_not_fit_the_gpu_are_refused_before_the_build(
    use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = use("trt103")
    gpu.free = 2**18
    monkeypatch.setattr(builder, "_run", forbidden)
    with pytest.raises(BundleError, match=r"the GPU has 0 MiB free, its weights alone take 1 MiB"):
        build(clip, only("vision_encoder"))


def test_full_disk_is_refused_before_the_build(
    use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("trt103")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    monkeypatch.setattr(builder, "_run", forbidden)
    with pytest.raises(BundleError, match=r"the disk has 1 MiB free, building takes about \d+"):
        build(clip, only("vision_encoder"))
    assert left(clip) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is full")
def test_disk_that_fills_up_in_the_build_is_told(
    use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("trt103")
    make = builder._write

    def full(model: Any, changed: bool, bundle: Bundle, name: str, partial: Path) -> Path:
        (partial / "engine.plan").symlink_to("/dev/full")
        found: Path = make(model, changed, bundle, name, partial)
        return found

    monkeypatch.setattr(builder, "_write", full)
    with pytest.raises(BundleError, match=r"vision_encoder: the disk is full .*VLMEDGE_CACHE"):
        build(clip, only("vision_encoder"))
    assert left(clip) == []


def test_graph_that_a_version_refuses_is_named_before_the_build(
    use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("trt103")
    monkeypatch.setattr(builder, "_run", forbidden)
    finding = Finding("vision_encoder", "n1", "Det", "no such operator", "decompose it")
    monkeypatch.setattr(builder, "lowered", lambda *a, **_: (None, False, [finding]))
    with pytest.raises(BundleError, match=r"TensorRT 10\.3 refuses Det 'n1': no such operator"):
        build(clip, only("vision_encoder"))


def test_two_builds_at_once_build_once(
    use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads hold the lock as two processes do: a file handle each."""
    use("trt103")
    monkeypatch.setenv("TRT_STANDIN_FAULT", "pause")
    monkeypatch.setattr(engine, "terminate_as_interrupt", no_signals)
    notes, found = [_Notes(), _Notes()], []

    def run(i: int) -> None:
        found.extend(build(clip, only("vision_encoder"), notes[i]))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(b.reused for b in found) == [False, True]
    said = notes[0].lines + notes[1].lines
    assert said == ["vision_encoder: another process builds it, waiting"]
    assert len([name for name in left(clip) if name.startswith("trt-") and "." not in name]) == 1


def no_signals() -> Any:
    return _Nothing()


class _Nothing:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
from importlib import import_module
from pathlib import Path
from vlmedge.registry import ENGINES, FAMILIES
sys.path.insert(0, sys.argv[2])
import test_tensorrt as t
t.engine.connect = t._FakeCuda
from vlmedge.cli import main
main(["build", sys.argv[1], "--component", "vision_encoder", "--precision", "float32"])
"""


def start(bundle: Bundle, mark: Path, fault: str) -> subprocess.Popen[str]:
    environment = os.environ | {"TRT_STANDIN_FAULT": fault, "TRT_STANDIN_MARK": str(mark)}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(bundle.path), str(Path(__file__).parent)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(file: Path) -> None:
    for _ in range(600):
        if file.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{file} did not come")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130)], ids=["ctrl-c", "kill"]
)
def test_interrupted_build_leaves_nothing(
    number: int, code: int, use: Use, clip: Bundle, tmp_path: Path
) -> None:
    use("trt103")
    mark = tmp_path / "mark"
    child = start(clip, mark, "slow")
    wait_for(mark)
    began = time.monotonic()
    child.send_signal(number)
    out, err = child.communicate(timeout=20)
    assert child.returncode == code, err
    assert err.splitlines()[-1] == "vlmedge: interrupted"
    assert "Traceback" not in err + out
    assert time.monotonic() - began < 15  # the builder would have slept for 30 s
    assert left(clip) == []


@pytest.mark.skipif(sys.platform != "linux", reason="the system ends the child there")
def test_killed_build_is_cleaned_up_by_the_next(use: Use, clip: Bundle, tmp_path: Path) -> None:
    use("trt103")
    mark = tmp_path / "mark"
    child = start(clip, mark, "slow")
    wait_for(mark)
    child.kill()
    child.communicate(timeout=20)
    assert [name for name in left(clip) if name.startswith(".")]
    build(clip, only("vision_encoder"))
    assert not [name for name in left(clip) if name.startswith(".")]


# ---- the command


def test_build_command_prints_what_it_built(use: Use, clip: Bundle, vlmedge: Any) -> None:
    use("trt103")
    ran = vlmedge("build", clip.path, "--quiet")
    assert ran.code == 0
    assert ["vision_encoder", "float16"] in [line.split()[:2] for line in ran.out.splitlines()]
    again = json.loads(vlmedge("build", clip.path, "--quiet", "--json").out)
    assert [row["reused"] for row in again] == [True, True]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--level", "9"], "--level is 9: it must be 0 to 5"),
        (["--workspace", "0"], "--workspace is 0: it must be at least 1"),
        (["--axis", "batch=4:1:1"], "it must be MIN:OPT:MAX"),
        (["--axis", "depth=1"], "no axis 'depth'"),
        (["--component", "decoder"], "no component 'decoder'"),
        (["--engine", "ort"], "--engine 'ort' is not built"),
        (["--precision", "int3"], "--precision 'int3': it must be float32 or float16"),
    ],
)
def test_build_command_refuses(
    arguments: list[str], words: str, use: Use, clip: Bundle, vlmedge: Any
) -> None:
    use("trt103")
    ran = vlmedge("build", clip.path, *arguments)
    assert ran.code == 1
    assert len(ran.err.splitlines()) == 1
    assert words in ran.err


def test_commands_run_on_the_engine_that_is_asked_for(
    use: Use, clip: Bundle, pictures: list[Path], vlmedge: Any
) -> None:
    gpu = use("trt103")
    build(clip)
    gpu.copied_bytes["up"] = 0
    ran = vlmedge(
        "classify", clip.path, pictures[0], "--labels", "red circle,cat", "--engine", "tensorrt"
    )
    assert ran.code == 0
    assert "%" in ran.out
    assert gpu.copied_bytes["up"] > 0


def test_unknown_engine_is_refused(clip: Bundle, pictures: list[Path], vlmedge: Any) -> None:
    ran = vlmedge("embed", clip.path, pictures[0], "--engine", "tensort")
    assert "no engine 'tensort': did you mean 'tensorrt'?" in ran.err


def test_check_only_and_version_go_together(clip: Bundle, vlmedge: Any) -> None:
    assert vlmedge("build", clip.path, "--check-only").code == 2
    assert vlmedge("build", clip.path, "--tensorrt", "10.3").code == 2


# ---- on a GPU


@pytest.fixture
def real() -> None:
    """Skip where TensorRT or a GPU is missing."""
    pytest.importorskip("tensorrt")
    try:
        cuda.connect()
    except VlmEdgeError as error:
        pytest.skip(str(error))


@pytest.mark.gpu
def test_real_vectors_are_those_of_onnx_runtime(
    real: None, clip: Bundle, pictures: list[Path]
) -> None:
    for precision in ("float32", "float16"):
        build(clip, BuildOptions(precision=precision))  # type: ignore[arg-type]
        model, reference = vlmedge.load(clip.path, engine="tensorrt"), Model(clip)
        for picture in map(str, pictures):
            assert float(model.embed_image(picture) @ reference.embed_image(picture)) > 0.99


@pytest.mark.gpu
def test_real_captions_are_those_of_onnx_runtime(
    real: None, blip2: Bundle, pictures: list[Path]
) -> None:
    build(blip2, BuildOptions(precision="float32"))
    there, here, paths = Model(blip2), Model(blip2, "tensorrt"), [str(p) for p in pictures]
    assert here.caption(paths) == there.caption(paths)
    assert here.caption(paths, num_beams=3) == there.caption(paths, num_beams=3)
