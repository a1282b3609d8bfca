"""A machine as the checks see it, and what a check finds."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Literal

from vlmedge.host.hardware import allowed_cores, this_machine
from vlmedge.host.identify import Found, Sources, detect

Level = Literal["ok", "warn", "bad"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a check has seen.

    Attributes:
        check: Name of the check that found it.
        level: ok; warn: it works, slowly or not for all; bad: it does not work.
        what: In one line.
        cure: The remedy, or "".
    """

    check: str
    level: Level
    what: str
    cure: str = ""


@dataclass(frozen=True, slots=True)
class Patient:
    """A machine to look at.

    Attributes:
        sources: Its files and tools.
        found: The board or machine that was identified.
        packages: Folders with Python packages.
        python: Major and minor.
        architecture: x86_64, aarch64, ...
        cpus: How many this process may use.
        all_cpus: How many there are.
        threads: How many threads engines use by default.
        cache: Where engines go; its disk is looked at.
        bundles: The bundles with the engines to check.
        disk_bytes: Free and all of the disk of a folder.
    """

    sources: Sources
    found: Found
    packages: tuple[Path, ...]
    python: tuple[int, int]
    architecture: str
    cpus: int
    all_cpus: int
    threads: int
    cache: Path
    bundles: tuple[Path, ...] = ()
    disk_bytes: Callable[[Path], tuple[int, int]] = field(default=lambda path: disk_bytes(path))

    def version(self, package: str) -> str | None:
        """Return the version of an installed package, or none."""
        found = metadata.distributions(name=package, path=[str(p) for p in self.packages])
        return next((d.version for d in found if d.version), None)

    def folder(self, module: str) -> Path | None:
        """Return the folder of an installed package's module."""
        return next((p / module for p in self.packages if (p / module).is_dir()), None)


def this_patient(bundles: tuple[Path, ...] = (), sources: Sources | None = None) -> Patient:
    """Describe the machine that this runs on."""
    sources = sources or Sources()
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Patient(
        sources,
        detect(sources),
        tuple(Path(p) for p in sys.path if p and Path(p).is_dir()),
        (sys.version_info.major, sys.version_info.minor),
        platform.machine(),
        allowed_cores(),
        os.cpu_count() or 1,
        this_machine(()).threads,
        Path(os.environ.get("VLMEDGE_CACHE") or home / "vlmedge"),
        bundles,
    )


def disk_bytes(path: Path) -> tuple[int, int]:
    """Return free and all bytes of the disk on which `path` is, or will be."""
    while not path.exists() and path != path.parent:
        path = path.parent
    usage = shutil.disk_usage(path)
    return usage.free, usage.total


Check = Callable[[Patient], list[Finding]]
