"""What this runs on: processor, cores, memory, versions of libraries."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from vlmedge.units import GIB, MIB

RESERVE_BYTES = 256 * MIB  # of free memory: with less left, the whole machine stalls

# What kernels are chosen by, as /proc/cpuinfo names it.
FEATURES = {
    *("avx", "avx2", "fma", "avx512f", "avx512bw", "avx512_bf16"),
    *("avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),  # of Arm
}


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine of a measurement.

    Attributes:
        cpu: The processor's name.
        cores: As the system counts them.
        threads: How many threads engines use by default: hyperthreads count once.
        load: How many processes wanted a core before it began, or none.
        versions: Versions of libraries.
        system: The operating system, its version and the kind of processor.
        python: Its version.
        memory_gib: Built-in memory; 0 where the system does not report it.
    """

    cpu: str
    cores: int
    threads: int
    load: float | None
    versions: dict[str, str]
    system: str
    python: str
    memory_gib: float


def this_machine(libraries: Iterable[str]) -> Machine:
    """Describe the machine, with the versions of `libraries` that are installed."""
    return Machine(
        cpu_name(),
        os.cpu_count() or 1,
        _physical_cores(),
        _load(),
        dict(_versions(libraries)),
        platform.platform(),
        platform.python_version(),
        round(_memory_bytes("MemTotal") / GIB, 1),
    )


def allowed_cores() -> int:
    """Count the cores that this process may run on: by its affinity alone."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def cores(root: Path = Path("/")) -> int:
    """Count the cores that this process may keep busy: by its affinity and its cgroup's quota.

    Args:
        root: Root of the file system that holds the quota.
    """
    allowed, quota = allowed_cores(), _quota(root)
    return allowed if quota is None else max(1, min(allowed, round(quota)))


def cpu_features() -> tuple[str, ...]:
    """Return those of `FEATURES` that the processor has; none where it does not say."""
    for name, value in map(_fact, _lines("/proc/cpuinfo")):
        if name in ("flags", "Features"):
            return tuple(sorted(FEATURES.intersection(value.split())))
    return ()


def _quota(root: Path) -> float | None:
    """Return how many cores' time the cgroup has, or none where it has no limit.

    Source: the kernel's admin-guide/cgroup-v2 (cpu.max) and scheduler/sched-bwc (version 1). In a
    container the process's own group is the root of what is mounted.
    """
    folder = root / "sys/fs/cgroup"
    for line in _lines(str(root / "proc/self/cgroup")):
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        inside = group.strip("/")
        if not controllers:
            files = [folder / inside / "cpu.max", folder / "cpu.max"]
            words = [" ".join(_lines(str(file))).split() for file in files]
        else:
            places = [folder / "cpu" / inside, folder / "cpu"]
            names = "cpu.cfs_quota_us", "cpu.cfs_period_us"
            words = [" ".join(w for n in names for w in _lines(str(p / n))).split() for p in places]
        for found in words:
            if len(found) == 2 and found[0].isdigit() and found[1].isdigit() and int(found[1]):
                return int(found[0]) / int(found[1])
    return None


def free_bytes() -> int:
    """Return how much memory is free; 0 where the system does not tell."""
    return _memory_bytes("MemAvailable")


def _memory_bytes(fact: str) -> int:
    for line in _lines("/proc/meminfo"):
        name, value = _fact(line)
        if name == fact:
            return int(value.split()[0]) * 1024
    return 0


def _physical_cores() -> int:
    """Count the cores that this process may use."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    cores = set()
    for block in "\n".join(_lines("/proc/cpuinfo")).split("\n\n"):
        facts = dict(_fact(line) for line in block.splitlines())
        number = facts.get("processor", "")
        if number.isdigit() and int(number) in allowed:
            cores.add((facts.get("physical id", ""), facts.get("core id", number)))
    return len(cores) or len(allowed)


def cpu_name() -> str:
    """Return the processor's name."""
    names = [value for name, value in map(_fact, _lines("/proc/cpuinfo")) if name == "model name"]
    return names[0] if names else platform.processor() or platform.machine()


def _load() -> float | None:
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def _versions(libraries: Iterable[str]) -> Iterable[tuple[str, str]]:
    for library in libraries:
        try:
            yield library, metadata.version(library)
        except metadata.PackageNotFoundError:
            continue


def _lines(file: str) -> list[str]:
    try:
        return Path(file).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _fact(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name.strip(), value.strip()
