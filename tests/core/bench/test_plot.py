"""The table and the plot of a benchmark, and what is refused before anything is measured."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from PIL import Image

from vlmedge.bench import run as benching
from vlmedge.bench.plot import draw
from vlmedge.bench.result import FORMAT, BenchResult, Board, Energy, Latency, Side
from vlmedge.cli.bench import show_bench
from vlmedge.errors import InputError
from vlmedge.host.hardware import this_machine


def result() -> BenchResult:
    """Make what `bench` finds; the third side has died."""
    fast, slow = Latency(1.0, 1.5, 2.0, 9), Latency(4.0, 4.5, 5.0, 9)
    ours = Side(
        "ort int8", {"x": fast}, {"caption": fast}, fast, 90.0, slow, fast, 80.0,
        Energy("caption", 0.5, 6.0, 12),
    )  # fmt: skip
    theirs = Side("torch float32", {"x": slow}, {"caption": slow}, slow, 9.0, None, slow, 600.0)
    dead = Side("torch bfloat16", {}, {}, error="killed by signal 9")
    board = Board("cpu", None, None, None, ())
    return BenchResult(
        FORMAT, "0", "folder", "tiny", "int8", 2, 3, True, 9, 20, "INA3221 VDD_IN", None,
        this_machine(()), board, (ours, theirs, dead),
    )  # fmt: skip


def test_table_tells_ratios_energy_and_what_died(capsys: pytest.CaptureFixture[str]) -> None:
    show_bench(result())
    rows = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert rows["caption, end to end, ms"].split("  ")[-1].strip() == "-"
    assert "1.00 / 1.50 / 2.00" in rows["x, ms"] and "4.00 / 4.50 / 5.00 (4.0x)" in rows["x, ms"]
    assert "9 (10.0x)" in rows["tokens/s"]
    assert rows["energy an answer, J"].split()[-3:] == ["0.5", "-", "-"]
    assert "torch bfloat16: killed by signal 9" in rows
    assert "energy: INA3221 VDD_IN" in rows


@pytest.mark.parametrize("ending", ["png", "svg", "PDF"])
def test_plot_is_drawn(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"bench.{ending}"
    draw(result(), file)
    if ending == "png":
        with Image.open(file) as image:
            colors = {color for _, color in image.convert("RGB").getcolors(1 << 20)}
            assert image.format == "PNG" and image.width > 1000
        assert {(0x1F, 0x6F, 0x8B), (0xB8, 0xC4, 0xCC)} <= colors
    elif ending == "svg":
        assert file.read_text().count("<!-- torch bfloat16 -->") >= 1
    else:
        assert file.read_bytes().startswith(b"%PDF")
    assert list(tmp_path.iterdir()) == [file]


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where something is measured."""

    def measure(*arguments: object, **options: object) -> None:
        raise AssertionError("measured before it was refused")

    monkeypatch.setattr(benching, "bench", measure)


@pytest.mark.usefixtures("unmeasured")
def test_plot_that_cannot_be_written_is_refused_first(vlmedge, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    for name, words in (
        ("bench.txt", "must end in .png, .svg, .pdf"),
        ("none/bench.png", "cannot be written: there is no folder"),
        ("folder.png", "is a folder: name a file"),
    ):
        ran = vlmedge("bench", tmp_path, "--plot", tmp_path / name)
        assert ran.code == 1 and ran.out == "" and words in ran.err
        assert len(ran.err.splitlines()) == 1 and name in ran.err


@pytest.mark.usefixtures("unmeasured")
def test_missing_matplotlib_names_the_extra(
    vlmedge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    hidden = lambda name, *rest: None if name == "matplotlib" else found(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    ran = vlmedge("bench", tmp_path, "--plot", tmp_path / "bench.png")
    assert ran.code == 1 and ran.out == ""
    assert ran.err == (
        "vlmedge: plots need the package matplotlib: pip install 'vlmedge[report]'\n"
    )


def test_full_disk_leaves_no_half_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vlmedge.bench.plot.replace_file", full)
    with pytest.raises(InputError, match=r"bench\.png cannot be written: No space left"):
        draw(result(), tmp_path / "bench.png")
    assert not list(tmp_path.iterdir())
