"""Energy, where the machine tells it: Intel's and AMD's RAPL counters, a Jetson's INA3221 rails.

RAPL counts microjoules, so it is read twice. A rail tells the power of the moment, so a thread adds
it up. Everything is read below a root folder: a machine is a folder of files. Sources: the kernel's
power/powercap/powercap and hwmon/ina3221; NVIDIA's developer guides for the names of the rails.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

NOT_TOLD = "not told by this machine"
TOTALS = ("VDD_IN", "POM_5V_IN", "VIN")  # rails through which a whole module is fed
SAMPLE_S = 0.02  # the sensors take some milliseconds for a reading


@dataclass(slots=True)
class Reading:
    """Energy used while the block ran; known when it has ended."""

    joules: float = 0.0
    seconds: float = 0.0

    @property
    def watts(self) -> float:
        """Return the mean power."""
        return self.joules / self.seconds


class Meter(Protocol):
    """Something that tells energy."""

    @property
    def source(self) -> str:
        """Name of the sensors that are read."""
        ...

    def measure(self) -> AbstractContextManager[Reading]:
        """Measure what the whole machine uses while the block runs, idle power included."""
        ...


@dataclass(frozen=True, slots=True)
class Zone:
    """One RAPL counter; it starts again at 0 after `range_uj`, which takes minutes."""

    name: str
    file: Path
    range_uj: int

    def read_uj(self) -> int:
        """Read the counter."""
        return int(self.file.read_text())


@dataclass(frozen=True, slots=True)
class Rapl:
    """Processors, and memory where it has a counter of its own."""

    zones: tuple[Zone, ...]

    @property
    def source(self) -> str:
        """Name the zones."""
        return f"RAPL {', '.join(zone.name for zone in self.zones)}"

    @contextmanager
    def measure(self) -> Iterator[Reading]:
        """Read the counters before and after."""
        reading, start = Reading(), time.perf_counter()
        before = [zone.read_uj() for zone in self.zones]
        yield reading
        after = [zone.read_uj() for zone in self.zones]
        reading.seconds = time.perf_counter() - start
        for zone, first, last in zip(self.zones, before, after, strict=True):
            reading.joules += (last - first) % (zone.range_uj + 1) / 1e6


@dataclass(frozen=True, slots=True)
class Rail:
    """One channel of an INA3221.

    Attributes:
        name: As the board has it.
        factors: Files whose product is its power.
        unit_w: Unit of the product, in watts.
    """

    name: str
    factors: tuple[Path, ...]
    unit_w: float

    def watts(self) -> float:
        """Read its power."""
        power = self.unit_w
        for file in self.factors:
            power *= int(file.read_text())
        return power


@dataclass(frozen=True, slots=True)
class Rails:
    """A board's rails: the one that feeds the module, or all where none does."""

    rails: tuple[Rail, ...]

    @property
    def source(self) -> str:
        """Name the rails."""
        return f"INA3221 {', '.join(rail.name for rail in self.rails)}"

    @contextmanager
    def measure(self) -> Iterator[Reading]:
        """Add up power over time, by trapezoids, in a thread."""
        reading, ended = Reading(), threading.Event()

        def sample() -> None:
            start = last = time.perf_counter()
            before_w = self._watts()
            while True:
                over = ended.wait(SAMPLE_S)
                now, now_w = time.perf_counter(), self._watts()
                reading.joules += (before_w + now_w) / 2 * (now - last)
                reading.seconds = now - start
                last, before_w = now, now_w
                if over:
                    return

        thread = threading.Thread(target=sample, name="vlmedge-energy", daemon=True)
        thread.start()
        try:
            yield reading
        finally:
            ended.set()
            thread.join()

    def _watts(self) -> float:
        return sum(rail.watts() for rail in self.rails)


def find_meter(root: Path = Path("/")) -> tuple[Meter | None, str]:
    """Look for what tells energy.

    Args:
        root: The folder that stands for /.

    Returns:
        A meter and its source, or none and why there is none.
    """
    rails = _rails(root)
    totals = [rail for rail in rails if rail.name in TOTALS]
    if rails:
        board = Rails(tuple(totals[:1] or rails))
        return board, board.source
    zones = _zones(root)
    try:
        for zone in zones:
            zone.read_uj()
    except PermissionError:
        return None, "RAPL is for root alone: sudo chmod a+r /sys/class/powercap/*/energy_uj"
    except (OSError, ValueError):
        return None, NOT_TOLD
    processors = Rapl(tuple(zones))
    return (processors, processors.source) if zones else (None, NOT_TOLD)


def _zones(root: Path) -> list[Zone]:
    """Find the counters that add up: packages, and DRAM, which no package has in it.

    Cores and graphics are parts of their package, "psys" holds the packages, and intel-rapl-mmio
    tells the same again.
    """
    found = []
    for folder in sorted((root / "sys/class/powercap").glob("intel-rapl:*")):
        name, limit = _text(folder / "name"), _text(folder / "max_energy_range_uj")
        if re.match(r"package|dram", name) and limit.isdigit():
            parent = _text(folder.with_name(folder.name.rpartition(":")[0]) / "name")
            label = f"{parent} {name}" if name == "dram" and parent else name
            found.append(Zone(label, folder / "energy_uj", int(limit)))
    return found


def _rails(root: Path) -> list[Rail]:
    """Find every channel that is connected and can be read."""
    found = []
    for device in sorted((root / "sys/bus/i2c/devices").glob("*")):
        if "ina3221" not in _text(device / "name"):
            continue
        for label in sorted(device.glob("hwmon/hwmon*/in[123]_label")):  # JetPack 5 on: mV, mA
            volts, amperes = (f"{kind}{label.name[2]}_input" for kind in ("in", "curr"))
            files = label.with_name(volts), label.with_name(amperes)
            found.append(Rail(_text(label), files, 1e-6))
        for label in sorted(device.glob("iio:device*/rail_name_[012]")):  # JetPack 4: mW
            power = label.with_name(f"in_power{label.name[-1]}_input")
            found.append(Rail(_text(label), (power,), 1e-3))
    return [
        rail
        for rail in found
        if rail.name not in ("", "NC") and all(_text(file).isdigit() for file in rail.factors)
    ]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
