"""Batteries and power modes, on machines that are folders of files; what the CPU engine does."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from kit.machines import machine, orin_nano

import vlmedge
from vlmedge.errors import InputError
from vlmedge.host.power import saves_power
from vlmedge.shelves.registry import ENGINES

SUPPLY = "/sys/class/power_supply"
ort: Any = import_module(type(ENGINES["ort"]).__module__)


def supply(name: str, **facts: str) -> dict[str, str]:
    return {f"{SUPPLY}/{name}/{fact}": f"{text}\n" for fact, text in facts.items()}


BATTERY = supply("BAT0", type="Battery", scope="System", status="Discharging")
SILENT = supply("BAT0", type="Battery", status="Unknown")
MOUSE = supply("hidpp_battery_0", type="Battery", scope="Device", status="Discharging")
PLUGGED = supply("AC", type="Mains", online="1")
UNPLUGGED = supply("AC", type="Mains", online="0")
SOCKET = supply("ucsi-source-psy-1", type="USB", online="0")


@pytest.mark.parametrize(
    ("files", "why"),
    [
        (BATTERY, "on its battery"),
        (BATTERY | UNPLUGGED | SOCKET, "on its battery"),
        (SILENT | UNPLUGGED, "on its battery"),
        (BATTERY | PLUGGED, ""),
        (BATTERY | UNPLUGGED | supply("usb", type="USB", online="2"), ""),
        (supply("BAT0", type="Battery", status="Full") | PLUGGED, ""),
        (SILENT | SOCKET, ""),
        (MOUSE | SOCKET, ""),
        (MOUSE | UNPLUGGED, ""),
        ({}, ""),
    ],
)
def test_battery_in_use_is_told_from_the_rest(
    files: dict[str, str], why: str, tmp_path: Path
) -> None:
    assert saves_power(machine(tmp_path, files)) == why


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("NV Power Mode: 7W\n3\n", "in its slowest power mode, 7W"),
        ("NV Power Mode: 15W\n0\n", ""),
        ("NV Power Mode: MAXN_SUPER\n2\n", ""),
        ("", ""),
    ],
)
def test_slowest_mode_of_a_board_saves_power(said: str, why: str, tmp_path: Path) -> None:
    board = machine(tmp_path, orin_nano() | SOCKET, {"nvpmodel -q": said})
    assert saves_power(board) == why


def test_board_whose_modes_have_the_same_clocks_saves_nothing(tmp_path: Path) -> None:
    conf = "< POWER_MODEL ID=0 NAME=A >\n< POWER_MODEL ID=1 NAME=B >\n"
    board = machine(tmp_path, orin_nano(nvpmodel=conf), {"nvpmodel -q": "NV Power Mode: B\n1\n"})
    assert saves_power(board) == ""


@pytest.mark.parametrize(
    ("why", "asked", "entry"),
    [
        ("", None, None),
        ("on its battery", None, "0"),
        ("on its battery", True, None),
        ("", False, "0"),
    ],
)
def test_threads_sleep_on_a_battery_unless_asked_otherwise(
    why: str,
    asked: bool | None,
    entry: str | None,
    clip_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ort, "saves_power", lambda: why)
    model = vlmedge.load(clip_bundle, spin=asked)
    options = model.graphs["text_encoder"]._session.get_session_options()  # type: ignore[attr-defined]
    if entry is None:
        with pytest.raises(RuntimeError):  # not set: ONNX Runtime's default, which spins
            options.get_session_config_entry("session.intra_op.allow_spinning")
    else:
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == entry


def test_machine_is_asked_once_for_all_of_a_model(
    clip_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[None] = []
    monkeypatch.setattr(ort, "saves_power", lambda: asked.append(None) or "")
    for number in (1, 2):  # another model asks again: the machine may have been unplugged
        model = vlmedge.load(clip_bundle)
        assert all(model.graphs[name] for name in model.graphs)
        assert len(asked) == number


def test_spinning_is_refused_by_engines_that_have_none(clip_bundle: Path) -> None:
    with pytest.raises(InputError, match="tensorrt has no threads that spin: leave spin out"):
        vlmedge.load(clip_bundle, "tensorrt", spin=False)
