"""Checks of the machine: what it is, memory, swap, disk, cores, power and clocks."""

from __future__ import annotations

import re
from collections.abc import Mapping

from vlmedge.doctor.patient import Check, Finding, Level, Patient
from vlmedge.host.power import saves_power
from vlmedge.shelves.contracts import Device
from vlmedge.shelves.registry import devices
from vlmedge.units import GIB

LITTLE_MEMORY = 2 * GIB  # a 4-bit model of 2 billion parameters
NO_MEMORY = GIB // 2
LITTLE_DISK = 5 * GIB  # a bundle of 3 billion parameters and its engines
NO_DISK = GIB
SMALL_BOARD_GIB = 16  # building engines takes more than boards of this size have
OLDEST_PYTHON = (3, 10)


def check_device(patient: Patient) -> list[Finding]:
    """Check which machine it is, and whether vlmedge runs in its Python."""
    found, python = patient.found, ".".join(map(str, patient.python))
    board = _device(patient)
    what = board.title if board else found.model or (found.gpus[0].name if found.gpus else "")
    details = [f"Python {python} on {patient.architecture}"]
    details += [f"driver {gpu.driver}" for gpu in found.gpus[:1] if gpu.driver]
    if found.is_jetson:
        release = f"JetPack {found.jetpack.name}" if found.jetpack else "unknown JetPack"
        details.append(f"{release} (L4T {found.l4t or 'unknown'})")
    line = f"{what or 'a machine'}, {', '.join(details)}"
    findings = [Finding("device", "ok", f"{found.device}: {line}")]
    if found.device is None:
        cure = "give a device of `vlmedge list` to `vlmedge plan`"
        findings = [Finding("device", "warn", f"{line}: not in the catalogue", cure)]
    jetpack = found.jetpack
    if found.is_jetson and jetpack is None:
        cure = "update vlmedge; `cat /etc/nv_tegra_release` shows what is installed"
        findings.append(Finding("device", "warn", f"L4T {found.l4t!r} is not known", cure))
    elif jetpack is not None and patient.python != _version(jetpack.python):
        needed = _version(jetpack.python)
        if needed < OLDEST_PYTHON:
            oldest = ".".join(map(str, OLDEST_PYTHON))
            what = f"JetPack {jetpack.name} has Python {jetpack.python}, vlmedge needs {oldest}"
            boards = "this board" if board is None else board.title
            newer = "6" if board is not None and "6" in board.jetpacks else None
            cure = (
                f"flash JetPack {newer}"
                if newer
                else f"{boards} has no newer JetPack: use another board"
            )
            findings.append(Finding("device", "bad", what, cure))
        else:
            what = f"Python {python} is not the system's {jetpack.python}: it has no `tensorrt`"
            cure = f"python{jetpack.python} -m venv --system-site-packages ENV"
            findings.append(Finding("device", "warn", what, cure))
    return findings


def check_memory(patient: Patient) -> list[Finding]:
    """Look at the memory that is free, and at a limit on this process."""
    facts = _meminfo(patient)
    total, free = facts.get("MemTotal", 0), facts.get("MemAvailable", 0)
    if not total:
        return [Finding("memory", "warn", "the system does not report its memory")]
    line = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    cure = "end other programs; on a board, `sudo systemctl set-default multi-user.target`"
    level: Level = "bad" if free < NO_MEMORY else "warn" if free < LITTLE_MEMORY else "ok"
    findings = [Finding("memory", level, line, "" if level == "ok" else cure)]
    limit = _limit(patient, "memory.max", "memory/memory.limit_in_bytes")
    if limit is not None and limit < total:
        what = f"a control group allows {limit / GIB:.1f} of {total / GIB:.1f} GiB"
        cure = "plan with `--free-gib`, or start the container with a larger --memory"
        findings.append(Finding("memory", "warn", what, cure))
    for gpu in patient.found.gpus:
        if gpu.memory_mib:
            share = gpu.free_mib / gpu.memory_mib
            line = f"{gpu.name}: {gpu.free_mib / 1024:.1f} of {gpu.memory_mib / 1024:.1f} GiB free"
            cure = "" if share > 0.5 else "`nvidia-smi` lists the processes that have the rest"
            findings.append(Finding("memory", "warn" if cure else "ok", line, cure))
    return findings


def check_swap(patient: Patient) -> list[Finding]:
    """Look for swap, which small boards need to build engines."""
    facts = _meminfo(patient)
    total, free = facts.get("SwapTotal", 0), facts.get("SwapFree", 0)
    small = patient.found.is_jetson and facts.get("MemTotal", 0) <= SMALL_BOARD_GIB * GIB
    if not total:
        if not small:
            return [Finding("swap", "ok", "none")]
        cure = (
            "sudo fallocate -l 8G /swapfile && sudo chmod 600 /swapfile && "
            "sudo mkswap /swapfile && sudo swapon /swapfile"
        )
        return [Finding("swap", "warn", "none: building engines may run out of memory", cure)]
    line = f"{(total - free) / GIB:.1f} of {total / GIB:.1f} GiB used"
    if free < total / 2:
        return [Finding("swap", "warn", line, "end other programs: swapped-out memory is slow")]
    return [Finding("swap", "ok", line)]


def check_disk(patient: Patient) -> list[Finding]:
    """Look at the disks on which engines and bundles are."""
    findings = []
    for folder in (patient.cache, *patient.bundles):
        free, total = patient.disk_bytes(folder)
        line = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free for {folder}"
        cure = "make room, or set VLMEDGE_CACHE to a folder on another disk"
        if free < NO_DISK:
            findings.append(Finding("disk", "bad", line, cure))
        elif free < LITTLE_DISK:
            findings.append(Finding("disk", "warn", line, cure))
        else:
            findings.append(Finding("disk", "ok", line))
    return findings


def check_cores(patient: Patient) -> list[Finding]:
    """Look for limits on cores: fewer than there are, or less time than cores."""
    line = f"{patient.cpus} of {patient.all_cpus} cores, {patient.threads} threads"
    if patient.cpus < patient.all_cpus:
        cure = (
            f"`taskset -pc 0-{patient.all_cpus - 1} $$` allows all; a container needs --cpuset-cpus"
        )
        findings = [Finding("cores", "warn", f"{line}: this process may use only some cores", cure)]
    else:
        findings = [Finding("cores", "ok", line)]
    quota = _quota(patient)
    if quota is not None and quota < patient.cpus:
        threads = max(1, min(patient.threads, round(quota)))  # machine.cores
        what = (
            f"a control group allows {quota:.1f} cores' time, the CPU engine uses {threads} threads"
        )
        cure = (
            f"start the container with --cpuset-cpus for {max(1, int(quota))} cores instead of "
            "--cpus: threads that wait for time are slower than fewer threads"
        )
        findings.append(Finding("cores", "warn", what, cure))
    return findings


def check_power(patient: Patient) -> list[Finding]:
    """Look for a battery in use, at a Jetson's power mode, and at a card's power limit."""
    power, findings = patient.found.power, []
    if why := saves_power(patient.sources):
        what = f"{why}: the CPU engine's threads sleep between operators, which is slower"
        cure = "vlmedge.load(..., spin=True) keeps them awake"
        findings.append(Finding("power", "warn", what, cure))
    if power.modes:
        best, now = power.fastest, power.mode
        assert best is not None
        if now is None:
            cure = f"sudo nvpmodel -m {best.id}"
            findings.append(Finding("power", "warn", "the power mode is not known", cure))
        elif (now.gpu_mhz, now.memory_mhz) != (best.gpu_mhz, best.memory_mhz):
            slow = f" (GPU at most {now.gpu_mhz:.0f} MHz)" if now.gpu_mhz else ""
            what = f"mode {now.name}{slow}, the fastest is {best.name}"
            findings.append(Finding("power", "warn", what, f"sudo nvpmodel -m {best.id}"))
        else:
            findings.append(Finding("power", "ok", f"mode {now.name}, the fastest"))
    elif patient.found.is_jetson:
        cure = "sudo apt install nvidia-l4t-nvpmodel"
        findings.append(Finding("power", "warn", "/etc/nvpmodel.conf has no power modes", cure))
    query = ("nvidia-smi", "--query-gpu=power.limit,power.default_limit")
    said = patient.sources.run((*query, "--format=csv,noheader,nounits")) or ""
    for now_w, full_w in re.findall(r"^\s*([\d.]+),\s*([\d.]+)\s*$", said, re.MULTILINE):
        if float(now_w) < float(full_w):
            what = f"the card is limited to {now_w} W of {full_w}"
            findings.append(Finding("power", "warn", what, f"sudo nvidia-smi -pl {full_w}"))
        else:
            findings.append(Finding("power", "ok", f"the card may take {now_w} W"))
    return findings


def check_clocks(patient: Patient) -> list[Finding]:
    """Look for clocks that rise only under load, and for a governor that saves power."""
    findings, root = [], patient.sources.root
    for folder in sorted((root / "sys/class/devfreq").glob("*gpu*")):
        place = f"/sys/class/devfreq/{folder.name}"
        low, high = (_number(patient, f"{place}/{n}_freq") for n in ("min", "max"))
        if low and high and low < high:
            what = f"the GPU's clock moves between {low / 1e6:.0f} and {high / 1e6:.0f} MHz"
            findings.append(Finding("clocks", "warn", what, "sudo jetson_clocks"))
        elif high:
            findings.append(
                Finding("clocks", "ok", f"the GPU's clock stays at {high / 1e6:.0f} MHz")
            )
    place = "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"
    if patient.sources.read(place) == "powersave":
        cure = "sudo cpupower frequency-set -g performance"
        # Intel's own driver calls its normal mode so, and is not slow in it
        if patient.sources.read(place.replace("governor", "driver")) != "intel_pstate":
            findings.append(Finding("clocks", "warn", "the CPU's governor is powersave", cure))
    return findings


def _device(patient: Patient) -> Device | None:
    return devices().get(patient.found.device or "")


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def _meminfo(patient: Patient) -> dict[str, int]:
    """Read /proc/meminfo, bytes by name."""
    lines = re.findall(r"^(\w+):\s*(\d+) kB", patient.sources.read("/proc/meminfo"), re.MULTILINE)
    return {name: 1024 * int(value) for name, value in lines}


def _limit(patient: Patient, new: str, old: str) -> int | None:
    """Read a control group's limit, version 2 or 1; none: there is no limit."""
    text = patient.sources.read(f"/sys/fs/cgroup/{new}")
    text = text or patient.sources.read(f"/sys/fs/cgroup/{old}")
    return int(text) if text.isdigit() else None


def _quota(patient: Patient) -> float | None:
    """Read how many cores' time a control group gives; none: all."""
    text = patient.sources.read("/sys/fs/cgroup/cpu.max")
    if not text:
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        text = " ".join(patient.sources.read(f"/sys/fs/cgroup/cpu/{name}") for name in names)
    match = re.fullmatch(r"(\d+) (\d+)", text)
    return int(match[1]) / int(match[2]) if match and int(match[2]) else None


def _number(patient: Patient, path: str) -> int:
    text = patient.sources.read(path)
    return int(text) if text.isdigit() else 0


CHECKS: Mapping[str, Check] = {
    "device": check_device,
    "memory": check_memory,
    "swap": check_swap,
    "disk": check_disk,
    "cores": check_cores,
    "power": check_power,
    "clocks": check_clocks,
}
