"""The comparison with the peers: its sums, its file, its figure, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from kit import ROOT


@pytest.fixture(scope="module")
def peers() -> Any:
    """Return benchmarks.peers, which lives in the checkout and is installed nowhere."""
    sys.path.insert(0, str(ROOT))
    try:
        names = ("cases", "errors", "figure", "kit", "limits", "report", "turns")
        for name in names:
            import_module(f"benchmarks.peers.{name}")
        return import_module("benchmarks.peers")
    finally:
        sys.path.remove(str(ROOT))


def main(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.peers", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def side(name: str, ours: bool, samples: list[float], reason: str | None = None) -> dict[str, Any]:
    return {
        "name": name, "peer": "host", "ours": ours, "unit": "int8", "reason": reason,
        "variant": None, "versions": {}, "opened_s": 1.0, "peak_mib": 100.0, "weights_bytes": 10,
        "samples": {"image_ms": samples} if samples else {}, "limits": {"image_ms": 5.0},
    }  # fmt: skip


@pytest.fixture
def case() -> dict[str, Any]:
    """Return a case as a run writes it."""
    return {
        "name": "vit-b-16",
        "title": "ViT",
        "machine": {"cpu": "a CPU"},
        "threads": 2,
        "metrics": [{"name": "image_ms", "title": "ms an image", "lower": True}],
        "sides": [
            side("vlmedge int8", True, [10.0, 12.0, 11.0]),
            side("slow", False, [22.0]),
            side("absent", False, [], "no compiler"),
        ],
    }


def test_middle_and_spread(peers: Any) -> None:
    found = peers.report.summary([4, 1, 2, 3, 5])
    assert (found.p10, found.p50, found.p90, found.count) == (1.4, 3, 4.6, 5)
    with pytest.raises(ValueError, match="no samples"):
        peers.report.summary([])


def test_operations_of_a_vit_are_those_of_its_paper(peers: Any) -> None:
    """ViT-B/16 at 224 pixels has 17.6 * 10^9 multiply-adds, as papers count it."""
    vision = {
        "hidden_size": 768, "intermediate_size": 3072, "patch_size": 16, "image_size": 224,
        "num_hidden_layers": 12,
    }  # fmt: skip
    assert peers.limits.tower_gop(vision) / 2 == pytest.approx(17.6, rel=0.01)


def test_weights_of_a_decoder_are_those_of_transformers(peers: Any) -> None:
    import torch
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    matrices = [p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    assert peers.limits.decoder_weights(config.to_dict()) == sum(matrices)


def test_table_says_how_much_faster_and_who_is_absent(peers: Any, case: dict[str, Any]) -> None:
    lines = peers.report.table(case).splitlines()
    assert "| vlmedge int8 | 11 (10.2 to 11.8), 45% of the limit | 100 | 1.00x |" in lines
    assert any(line.startswith("| slow |") and line.endswith("| 2.00x |") for line in lines)
    assert "| absent | no compiler |" in lines


def test_cases_of_several_runs_meet_in_one_file(
    peers: Any, case: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "peers.json"
    peers.report.add(file, {**case, "name": "b"}, "ab")
    peers.report.add(file, {**case, "name": "a"}, "ab")
    peers.report.add(file, {**case, "name": "b", "title": "again"}, "ab")
    found = json.loads(file.read_text())["cases"]
    assert [(c["name"], c["title"]) for c in found] == [("a", "ViT"), ("b", "again")]
    assert [f.name for f in tmp_path.iterdir()] == ["peers.json"]


def test_figure_is_drawn_from_a_saved_report(
    peers: Any, case: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    saved, drawn = tmp_path / "peers.json", tmp_path / "peers.png"
    peers.report.add(saved, case, ["vit-b-16"])
    done = main("--redraw", saved, "--figure", drawn, "--json", saved)
    assert done.returncode == 0, done.stderr
    assert drawn.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON: give what a run has written"),
        ('{"format": 0}', "is no report of format 1"),
        (None, "cannot be read: No such file"),
    ],
)
def test_report_that_is_none_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "peers.json"
    if content is not None:
        file.write_text(content)
    done = main("--redraw", file, "--json", tmp_path / "other.json")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert message in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--case", "vit-z"), "invalid choice: 'vit-z'"),
        (("--rounds", "0"), "'0' is no number of rounds: give a number from 1 on"),
        (("--side", "vlmedge int9"), "invalid choice: 'vlmedge int9'"),
        (("--starts", "0"), "'0' is no number of starts: give a number from 1 on"),
        (("--depth", "one"), "'one' is no depth: give a number from 2 on"),
        (("--json", "/no/where/peers.json"), "/no/where is no folder: make it first"),
    ],
)
def test_what_cannot_be_done_is_refused(arguments: tuple[str, ...], message: str) -> None:
    done = main(*arguments)
    assert done.returncode in (1, 2)
    assert message in done.stderr.replace("\n", " ")


def test_what_failed_is_not_taken_for_made(peers: Any, tmp_path: Path) -> None:
    kit = peers.kit.Kit(tmp_path, threads=1)

    def make(code: str) -> Callable[[str, str], list[str]]:
        return lambda python, out: [python, "-c", f"import sys; {code}", out]

    with pytest.raises(peers.errors.Unavailable, match="no luck"):
        kit.made("a/b", "host", make("open(sys.argv[1], 'w'); sys.exit('no luck')"))
    assert not (tmp_path / "whole" / "a" / "b").exists()
    assert not list(tmp_path.glob("**/.partial-*"))
    made = kit.made("a/b", "host", make("open(sys.argv[1], 'w').write('1')"))
    assert kit.made("a/b", "host", make("sys.exit('made again')")) == made


def test_worker_that_fails_is_a_row_with_its_reason(
    peers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of a worker's ends: an error that it tells, an exit, and a kill."""
    monkeypatch.setattr(peers.turns, "WORKERS", tmp_path)
    ends = {
        "tells": ('print(\'{"error": "no model"}\', flush=True); input()', "no model"),
        "exits": ("raise SystemExit('no engine')", "stopped: .*no engine"),
        "killed": ("import os; os.kill(os.getpid(), 9)", "killed by signal 9: too little memory"),
    }
    for name, (code, message) in ends.items():
        (tmp_path / f"{name}.py").write_text(f"input(); {code}")
        with ExitStack() as stack:
            worker = peers.turns.Worker(Path(sys.executable), f"{name}.py", 1, stack)
            with pytest.raises(peers.errors.Unavailable, match=message):
                worker.ask({})


def answer(worker: Path, sample: str) -> None:
    """Write a worker that opens and then gives a sample, an expression, whenever it is asked."""
    worker.write_text(
        "import json, os\n"
        "input()\n"
        "print(json.dumps({'opened_s': 1, 'variant': None, 'versions': {}}), flush=True)\n"
        f"told = json.dumps({{'sample': {sample}, 'peak_mib': 2}})\n"
        "while input(): print(told, flush=True)\n"
    )


def test_a_side_that_fails_leaves_the_others_alone(
    peers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers.turns, "WORKERS", tmp_path)
    answer(tmp_path / "well.py", "{'x': 1.5}")
    (tmp_path / "ill.py").write_text("input(); raise SystemExit('ill')")

    def of(name: str) -> Any:
        return peers.cases.Side(name, "host", f"{name}.py", "fp32", lambda kit: {})

    case = peers.cases.Case("two", (peers.cases.Metric("x", "x"),), (of("ill"), of("well")))
    kit = peers.kit.Kit(tmp_path, threads=1)
    ill, well_row = peers.turns.prepare(case, kit, ["host"])
    peers.turns.run(case, kit, [ill, well_row], 3)
    assert ill.reason == "stopped: ill" and not ill.samples
    assert well_row.reason is None and well_row.samples == [{"x": 1.5}] * 3


def test_sides_are_opened_anew_for_each_start(
    peers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers.turns, "WORKERS", tmp_path)
    answer(tmp_path / "own.py", "{'x': os.getpid()}")
    side = peers.cases.Side("own", "host", "own.py", "fp32", lambda kit: {})
    case = peers.cases.Case("one", (peers.cases.Metric("x", "x"),), (side,))
    kit = peers.kit.Kit(tmp_path, threads=1)
    rows = peers.turns.prepare(case, kit, ["host"])
    assert not peers.turns.prepare(case, kit, ["host"], ["another"])
    peers.turns.run(case, kit, rows, 3, starts=2)
    processes = [sample["x"] for sample in rows[0].samples]
    assert len(processes) == 6 and len(set(processes)) == 2
