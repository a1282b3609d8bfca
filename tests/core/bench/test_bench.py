"""The benchmark: every side in a process of its own, over the same work."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import jsonschema
import msgspec
import pytest
from kit.machines import ORIN_NANO_RAILS, orin_nano, seed

import vlmedge
from vlmedge.bench import result as bench_result
from vlmedge.bench import run as benching
from vlmedge.bench import side as bench_side
from vlmedge.bench import start as bench_start
from vlmedge.bench.result import BenchResult, Latency
from vlmedge.bench.run import bench
from vlmedge.bench.side import Worker
from vlmedge.bundle import Bundle
from vlmedge.errors import VlmEdgeError
from vlmedge.host import hardware as machine
from vlmedge.progress import SILENT

SCHEMA = Path(vlmedge.__file__).with_name("bench.schema.json")


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep it short: what is tested is not the machine."""
    monkeypatch.setattr(benching, "ROUNDS_MAX", 3)
    monkeypatch.setattr(bench_start, "STARTS", 1)
    monkeypatch.setattr(bench_side, "ENERGY_S", 0.2)


def plain(result: BenchResult) -> dict:
    return json.loads(msgspec.json.encode(result))


def test_bench_measures_pytorch_beside_a_bundle(
    blip2_int8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed(tmp_path, orin_nano() | ORIN_NANO_RAILS)
    monkeypatch.setattr(benching, "_fit_at_once", lambda bundle, checkpoint: True)
    result = bench(Bundle.load(blip2_int8), "tiny-blip2", SILENT, root=tmp_path)
    assert [side.name for side in result.sides] == ["ort int8", "torch float32", "torch bfloat16"]
    assert result.alternated and result.rounds == 3
    assert result.new_tokens is not None and result.new_tokens > 2
    for side in result.sides:
        assert list(side.components) == [
            "vision_encoder",
            "qformer",
            "projector",
            "decoder prefill",
            "decoder step",
        ]
        steps = side.components["decoder step"]
        assert steps.samples == 3 * (result.new_tokens - 1)
        assert 0 < steps.p50_ms <= steps.p90_ms <= steps.p99_ms
        (whole,) = side.end_to_end.values()
        assert side.first_token is not None and 0 < side.first_token.p50_ms < whole.p50_ms
        assert whole.p50_ms > steps.p50_ms * steps.samples / 3
        assert side.tokens_per_s is not None and side.tokens_per_s > 0
        assert side.start_warm is not None
        assert side.start_warm.p50_ms > side.first_token.p50_ms
        assert side.energy is not None and side.energy.task == next(iter(side.end_to_end))
        assert side.energy.watts == pytest.approx(6.0) and side.energy.items >= 1
        seconds = side.energy.joules_per_item / side.energy.watts
        assert 0 < seconds < 50 * whole.p99_ms / 1000
        assert side.error is None
    ours, theirs = (side.peak_memory_mib for side in result.sides[:2])
    assert ours is not None and theirs is not None and 0 < ours < theirs
    assert result.sides[0].start_cold is not None and result.no_cold_start is None
    assert result.sides[1].start_cold is None
    assert result.energy_source == "INA3221 VDD_IN" and result.board.jetpack == "6.2"
    jsonschema.validate(plain(result), json.loads(SCHEMA.read_text()))


def test_sides_that_do_not_fit_at_once_run_one_after_the_other(
    clip_int8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benching, "_fit_at_once", lambda bundle, checkpoint: False)
    monkeypatch.setattr(benching, "measure_starts", lambda side, bundle: None)
    result = bench(Bundle.load(clip_int8), "tiny-clip", SILENT)
    assert not result.alternated and result.rounds == 3
    for side in result.sides:
        assert set(side.components) == {"vision_encoder", "text_encoder"}
        assert side.error is None and side.first_token is None


def test_all_weights_count_where_sides_are_to_fit_at_once(
    clip_int8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.load(clip_int8)
    ours = sum(file.stat().st_size for file in (clip_int8 / "graphs").iterdir())
    (tmp_path / "vision").mkdir()
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    (tmp_path / "vision" / "pytorch_model.bin").write_bytes(bytes(500))
    rest = sum(f.bytes for f in bundle.manifest.files if not f.path.startswith("graphs/"))
    needed = 3 * 1500 + ours + rest
    monkeypatch.setattr(benching, "free_bytes", lambda: 2 * needed)
    assert not benching._fit_at_once(bundle, tmp_path)
    monkeypatch.setattr(benching, "free_bytes", lambda: 2 * needed + 2)
    assert benching._fit_at_once(bundle, tmp_path)


def test_schema_is_the_published_one() -> None:
    assert json.loads(SCHEMA.read_text()) == json.loads(msgspec.json.encode(bench_result.schema()))


def test_bench_prints_a_table(vlmedge, clip_int8: Path) -> None:
    ran = vlmedge("bench", clip_int8)
    for word in (
        "vision_encoder, ms",
        "text_encoder, ms",
        "classify, end to end, ms",
        "start cold, s",
        "start warm, s",
        "peak memory, MiB",
        "energy: ",
        "onnxruntime",
    ):
        assert word in ran.out
    assert "tokens/s" not in ran.out


def test_json_is_what_the_schema_says(vlmedge, clip_int8: Path) -> None:
    found = json.loads(vlmedge("bench", clip_int8, "--json", "--quiet").out)
    published = json.loads(SCHEMA.read_text())
    jsonschema.validate(found, published)
    assert found["sides"][0]["components"]["vision_encoder"]["p50_ms"] > 0
    assert found["machine"]["threads"] >= 1 and found["machine"]["memory_gib"] > 0
    assert {"classify", "embed_image", "embed_text"} <= found["sides"][0]["end_to_end"].keys()
    for broken in (found | {"format": "1"}, found | {"more": 1}, {**found, "machine": {}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, published)


def test_machine_without_a_meter_says_so(clip_int8: Path, tmp_path: Path) -> None:
    result = bench(Bundle.load(clip_int8), None, SILENT, root=tmp_path)
    assert result.energy_source == "not told by this machine"
    assert result.sides[0].energy is None


def test_cold_start_has_no_engines_and_leaves_the_bundle_s(
    clip_int8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.load(shutil.copytree(clip_int8, tmp_path / "clip"))
    (bundle.path / "engines" / "mine").mkdir(parents=True)
    states = []

    def start(side: Worker, folder: Path | None = None) -> list[float]:
        assert folder is not None and Bundle.load(folder).manifest == bundle.manifest
        engines = folder / "engines"
        states.append(sorted(file.name for file in engines.glob("*-*")))
        (engines / "ort-made").mkdir(exist_ok=True)
        return [1.0]

    monkeypatch.setattr(Worker, "start_ms", start)
    monkeypatch.setattr(bench_start, "STARTS", 2)
    side = Worker("ort int8", bundle.path, None, "ort", 1)
    assert bench_start.measure_starts(side, bundle) is None
    assert states == [[], ["ort-made"]] * 2
    assert side.cold_ms == side.warm_ms == [1.0, 1.0]
    left = {file.name for file in (bundle.path / "engines").iterdir()}
    assert "mine" in left and not [name for name in left if name.startswith(".start-")]


def test_bundle_that_cannot_be_copied_has_a_warm_start_alone(
    clip_int8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", refuse)
    result = bench(Bundle.load(clip_int8), None, SILENT)
    assert str(result.no_cold_start).endswith("cannot be copied: No space left on device")
    assert result.sides[0].start_cold is None and result.sides[0].start_warm is not None


def test_error_of_a_side_is_told(clip_int8: Path) -> None:
    with pytest.raises(VlmEdgeError, match="tensorrd int8: no engine 'tensorrd'"):
        bench(Bundle.load(clip_int8), None, SILENT, engine="tensorrd")


def side_of(tmp_path: Path, code: str) -> Worker:
    command = (sys.executable, "-c", code)
    return Worker("torch float32", tmp_path, tmp_path, "float32", 1, command)


def test_side_killed_for_memory_has_an_error(tmp_path: Path) -> None:
    side = side_of(tmp_path, "import os; os.kill(os.getpid(), 9)")
    with side.running():
        assert side.round() == {} and side.round() == {}
    assert "killed by signal 9" in str(side.result().error)


def test_bug_of_a_side_keeps_its_traceback(tmp_path: Path) -> None:
    side = side_of(tmp_path, "raise RuntimeError('a bug')")
    with side.running(), pytest.raises(RuntimeError, match="a bug"):
        side.round()


def test_latency_is_of_percentiles() -> None:
    found = Latency.of([4.0, 1.0, 2.0, 3.0, 5.0])
    assert found == Latency(3.0, 4.6, pytest.approx(4.96), 5)


def test_machine_counts_cores_that_may_be_used() -> None:
    found = machine.this_machine(["numpy", "no-such-package"])
    assert 1 <= found.threads <= found.cores == os.cpu_count()
    assert list(found.versions) == ["numpy"]
