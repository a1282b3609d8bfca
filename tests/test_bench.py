"""The benchmark: every side in a process of its own, over the same work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlmedge import bench as benching
from vlmedge import machine
from vlmedge.bench import Latency, bench
from vlmedge.bundle import Bundle
from vlmedge.errors import VlmEdgeError
from vlmedge.progress import SILENT


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep it short: what is tested is not the machine."""
    monkeypatch.setattr(benching, "ROUNDS_MAX", 3)


@pytest.mark.parametrize("together", [True, False])
def test_bench_measures_pytorch_beside_a_bundle(
    together: bool, blip2_int8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benching, "_fit_at_once", lambda checkpoint: together)
    result = bench(Bundle.load(blip2_int8), "tiny-blip2", SILENT)
    assert [side.name for side in result.sides] == ["ort int8", "torch float32", "torch bfloat16"]
    assert result.alternated is together and result.rounds == 3
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
        assert 0 < steps.p50_ms <= steps.p90_ms
        assert side.first_token is not None and side.first_token.p50_ms > 0
        assert side.tokens_per_s is not None and side.tokens_per_s > 0
        assert side.error is None
    ours, theirs = (side.peak_memory_mib for side in result.sides[:2])
    assert ours is not None and theirs is not None and 0 < ours < theirs


def test_bench_prints_a_table(vlmedge, clip_int8: Path) -> None:
    ran = vlmedge("bench", clip_int8)
    for word in ("vision_encoder, ms", "text_encoder, ms", "peak memory, MiB", "onnxruntime"):
        assert word in ran.out
    assert "tokens/s" not in ran.out
    found = json.loads(vlmedge("bench", clip_int8, "--json").out)
    assert found["sides"][0]["components"]["vision_encoder"]["p50_ms"] > 0
    assert found["machine"]["threads"] >= 1


def test_worker_of_a_bundle_needs_no_torch(clip_int8: Path) -> None:
    code = (
        "import io, json, sys; from vlmedge import bench_worker as w;"
        f"sys.argv = ['', json.dumps(dict(bundle={str(clip_int8)!r}, checkpoint=None, how='ort'))];"
        "sys.stdin = io.StringIO('round\\n'); w.main();"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["components_ms"]["vision_encoder"]


def test_error_of_a_side_is_told(clip_int8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benching, "ENGINE", "tensorrd")
    with pytest.raises(VlmEdgeError, match="tensorrd int8: no engine 'tensorrd'"):
        bench(Bundle.load(clip_int8), None, SILENT)


def test_side_killed_for_memory_has_an_error(tmp_path: Path) -> None:
    side = benching._Worker("torch float32", tmp_path, tmp_path, "float32", 1)
    side._command = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), 9)"]
    with side.running():
        assert side.round() == {} and side.round() == {}
    assert "killed by signal 9" in str(side.result().error)


def test_bug_of_a_side_keeps_its_traceback(tmp_path: Path) -> None:
    side = benching._Worker("torch float32", tmp_path, tmp_path, "float32", 1)
    side._command = [sys.executable, "-c", "raise RuntimeError('a bug')"]
    with side.running(), pytest.raises(RuntimeError, match="a bug"):
        side.round()


def test_latency_is_of_percentiles() -> None:
    assert benching._latency([4.0, 1.0, 2.0, 3.0, 5.0]) == Latency(3.0, 4.6, 5)


def test_machine_counts_cores_that_may_be_used() -> None:
    found = machine.this_machine(["numpy", "no-such-package"])
    assert 1 <= found.threads <= found.cores == os.cpu_count()
    assert list(found.versions) == ["numpy"]
