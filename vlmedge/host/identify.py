"""What machine this is: the system's own files, and what NVIDIA's tools print.

Everything is read below a root folder and asked of a runner, so that a machine is a folder of
files.
"""

from __future__ import annotations

import csv
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vlmedge.host.jetpack import JetPack, jetpack_of
from vlmedge.shelves.contracts import Device
from vlmedge.shelves.registry import devices

TOOL_S = 10  # nvidia-smi takes seconds when the driver sleeps
GPU_FIELDS = ("name", "compute_cap", "memory.total", "memory.free", "driver_version")

Runner = Callable[[Sequence[str]], "str | None"]


def run_tool(command: Sequence[str]) -> str | None:
    """Return what a command prints, or none where it is not there or fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TOOL_S, check=True, errors="replace"
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


@dataclass(frozen=True, slots=True)
class Sources:
    """Where facts about a machine come from.

    Attributes:
        root: The folder that stands for /.
        run: Runs a command and returns what it prints, or none.
    """

    root: Path = Path("/")
    run: Runner = run_tool

    def read(self, path: str) -> str:
        """Return the text of a file by its absolute path, without NULs; empty if there is none."""
        try:
            text = (self.root / path.lstrip("/")).read_bytes().decode(errors="replace")
        except OSError:
            return ""
        return text.replace("\0", "\n").strip()


@dataclass(frozen=True, slots=True)
class Gpu:
    """A line of nvidia-smi's.

    Attributes:
        name: As NVIDIA has it.
        compute_capability: Major and minor, "" where the driver is too old to tell.
        memory_mib: In all; 0 where it shares the system's.
        free_mib: The free part of `memory_mib`.
        driver: Its version.
    """

    name: str
    compute_capability: str
    memory_mib: int
    free_mib: int
    driver: str


@dataclass(frozen=True, slots=True)
class PowerMode:
    """A mode of nvpmodel.conf.

    Attributes:
        id: Its number on this board.
        name: NVIDIA's name for it.
        gpu_mhz: The GPU's highest clock in it; none: no limit.
        memory_mhz: The same of the memory.
    """

    id: int
    name: str
    gpu_mhz: float | None = None
    memory_mhz: float | None = None


@dataclass(frozen=True, slots=True)
class Power:
    """State of nvpmodel: all modes, and the number of the one that is on."""

    modes: tuple[PowerMode, ...] = ()
    current: int | None = None

    @property
    def mode(self) -> PowerMode | None:
        """Return the mode that is on."""
        return next((m for m in self.modes if m.id == self.current), None)

    @property
    def fastest(self) -> PowerMode | None:
        """Return the mode with the highest clocks; of equals, the one that is called MAXN."""
        return max(self.modes, key=_clocks, default=None)

    @property
    def slowest(self) -> PowerMode | None:
        """Return the mode with the lowest clocks; none where all have the same."""
        slowest, fastest = min(self.modes, key=_clocks, default=None), self.fastest
        if slowest is None or fastest is None or _clocks(slowest)[:2] == _clocks(fastest)[:2]:
            return None
        return slowest


@dataclass(frozen=True, slots=True)
class Found:
    """A machine.

    Attributes:
        device: Its name in the catalogue, or none.
        model: The board's name in the device tree, or "".
        l4t: Jetson's Linux, or "".
        jetpack: Its release, or none.
        gpus: GPUs that nvidia-smi lists.
        cpu_flags: CPU flags from /proc/cpuinfo.
        power: nvpmodel's modes.
    """

    device: str | None
    model: str = ""
    l4t: str = ""
    jetpack: JetPack | None = None
    gpus: tuple[Gpu, ...] = ()
    cpu_flags: frozenset[str] = field(default_factory=frozenset)
    power: Power = Power()

    @property
    def is_jetson(self) -> bool:
        """Whether it is one of NVIDIA's boards."""
        return bool(self.l4t) or "Jetson" in self.model


def detect(sources: Sources | None = None) -> Found:
    """Look at the machine."""
    sources = sources or Sources()
    l4t = read_l4t(sources)
    model = sources.read("/proc/device-tree/model")
    gpus, flags, power = read_gpus(sources), read_cpu_flags(sources), read_power(sources)
    jetson = bool(l4t) or "Jetson" in model
    modules = read_modules(sources, power)
    known = devices()
    name = (_jetson(known, modules) if jetson else _card(known, gpus)) or (
        None if jetson or gpus else _cpu(known, flags)
    )
    return Found(name, model, l4t, jetpack_of(l4t) if l4t else None, gpus, flags, power)


def read_l4t(sources: Sources) -> str:
    """Read L4T's version of "# R36 (release), REVISION: 4.3, ...", as 36.4.3."""
    match = re.search(
        r"R(\d+)\s*\(release\),\s*REVISION:\s*([\d.]+)", sources.read("/etc/nv_tegra_release")
    )
    return f"{match[1]}.{match[2].rstrip('.')}" if match else ""


def read_modules(sources: Sources, power: Power) -> set[str]:
    """Read a Jetson's module ids, such as p3767-0005; "super" where it has Super modes."""
    text = "\n".join(
        sources.read(f"/proc/device-tree/{name}") for name in ("compatible", "nvidia,dtsfilename")
    )
    found = set(re.findall(r"p\d{4}-\d{4}", text))
    # a Super device tree can be on a board whose nvpmodel.conf has no such mode, and counts as not
    return found | ({"super"} if any("SUPER" in m.name for m in power.modes) else set())


def read_gpus(sources: Sources) -> tuple[Gpu, ...]:
    """Ask nvidia-smi for every GPU."""
    query = f"--query-gpu={','.join(GPU_FIELDS)}"
    text = sources.run(("nvidia-smi", query, "--format=csv,noheader,nounits"))
    found = []
    for row in csv.reader((text or "").splitlines(), skipinitialspace=True):
        if len(row) == len(GPU_FIELDS):
            name, capability, total, free, driver = (cell.strip() for cell in row)
            capability = capability if re.fullmatch(r"\d+\.\d+", capability) else ""
            name = name.removesuffix(" (nvgpu)")  # Jetson; CUDA calls it without
            found.append(Gpu(name, capability, _int(total), _int(free), driver))
    return tuple(found)


def read_cpu_flags(sources: Sources) -> frozenset[str]:
    """Read what the first core can: `flags` on x86, `Features` on Arm."""
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", sources.read("/proc/cpuinfo"), re.MULTILINE)
    return frozenset(match[1].split() if match else ())


def read_power(sources: Sources) -> Power:
    """Read the modes of /etc/nvpmodel.conf and ask which is on."""
    modes = parse_power_modes(sources.read("/etc/nvpmodel.conf"))
    if not modes:
        return Power()
    said = sources.run(("nvpmodel", "-q")) or ""  # "NV Power Mode: 15W", then its number
    numbers = re.findall(r"^\s*(\d+)\s*$", said, re.MULTILINE)
    if not numbers:  # the tool wants root on some releases; its own note does not
        numbers = re.findall(r"pmode:(\d+)", sources.read("/var/lib/nvpmodel/status"))
    return Power(modes, int(numbers[-1]) if numbers else None)


def parse_power_modes(text: str) -> tuple[PowerMode, ...]:
    """Parse nvpmodel.conf: a `< POWER_MODEL ID=n NAME=x >` line, then that mode's settings."""
    modes = []
    parts = re.split(r"^\s*<\s*POWER_MODEL\s+(.*?)>", _without_comments(text), flags=re.MULTILINE)
    for head, body in zip(parts[1::2], parts[2::2], strict=True):
        values = dict(re.findall(r"(\w+)=(\S+)", head))
        if values.get("ID", "").isdigit() and "NAME" in values:
            clocks = _mhz(body, "GPU"), _mhz(body, "EMC")
            modes.append(PowerMode(int(values["ID"]), values["NAME"], *clocks))
    return tuple(modes)


def _without_comments(text: str) -> str:
    return "\n".join(line.split("#")[0] for line in text.splitlines())


def _mhz(body: str, unit: str) -> float | None:
    """Read `GPU MAX_FREQ 612000000`; -1 and 0 are no limit."""
    match = re.search(rf"^\s*{unit}\w*\s+MAX_FREQ\s+(-?\d+)", body, re.MULTILINE)
    return int(match[1]) / 1e6 if match and int(match[1]) > 0 else None


def _jetson(known: dict[str, Device], modules: set[str]) -> str | None:
    """Find the board whose module is there; one whose every mark fits beats the others."""
    fitting = [
        (("super" in d.marks), name)
        for name, d in known.items()
        if d.kind == "jetson"
        and modules & (set(d.marks) - {"super"})
        and ("super" not in d.marks or "super" in modules)
    ]
    return max(fitting, default=(False, None))[1]


def _card(known: dict[str, Device], gpus: tuple[Gpu, ...]) -> str | None:
    return next(
        (n for gpu in gpus for n, d in known.items() if d.kind == "gpu" and gpu.name in d.marks),
        None,
    )


def _cpu(known: dict[str, Device], flags: frozenset[str]) -> str | None:
    """Find the kind of core with the most that this one can."""
    arm = platform.machine().lower() in ("aarch64", "arm64")
    flags = flags or frozenset(("asimd",) if arm else ())  # macOS and Windows do not tell
    fitting = {n: d for n, d in known.items() if d.kind == "cpu" and set(d.marks) <= flags}
    rates = {name: device.rates.int8 or 0.0 for name, device in fitting.items()}
    return max(rates, key=lambda name: rates[name], default=None)


def _clocks(mode: PowerMode) -> tuple[float, float, bool]:
    unlimited = float("inf")
    return (
        unlimited if mode.gpu_mhz is None else mode.gpu_mhz,
        unlimited if mode.memory_mhz is None else mode.memory_mhz,
        mode.name.startswith("MAXN"),
    )


def _int(text: str) -> int:
    return int(text) if text.isdigit() else 0
