"""Machines as folders of files: what a board or a desktop has, and what its tools print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vlmedge.host.identify import Sources

# As on an Orin Nano developer kit with JetPack 6.2, shortened to what is read
NVPMODEL_SUPER = """\
#
# Copyright (c) NVIDIA CORPORATION.
#
< PARAM TYPE=FILE NAME=CPU_ONLINE >
CORE_0 /sys/devices/system/cpu/cpu0/online
< PARAM TYPE=CLOCK NAME=GPU >
MAX_FREQ /sys/devices/platform/17000000.gpu/devfreq_dev/max_freq

###########################
# POWER_MODEL DEFINITIONS #
###########################
# < POWER_MODEL ID=9 NAME=COMMENTED_OUT >
< POWER_MODEL ID=0 NAME=15W >
CPU_ONLINE CORE_0 1
GPU MIN_FREQ 0
GPU MAX_FREQ 612000000
EMC MAX_FREQ 2133000000
< POWER_MODEL ID=1 NAME=25W >
GPU MAX_FREQ 918000000
EMC MAX_FREQ 3199000000
< POWER_MODEL ID=2 NAME=MAXN_SUPER >
GPU MAX_FREQ -1
EMC MAX_FREQ 3199000000
< POWER_MODEL ID=3 NAME=7W >
GPU MAX_FREQ 408000000
EMC MAX_FREQ 2133000000

< PM_CONFIG DEFAULT=1 >
"""
RELEASE = (
    "# R{} (release), REVISION: {}, GCID: 38968081, BOARD: generic, EABI: aarch64, "
    "DATE: Wed Jan  8 01:49:37 UTC 2025\n# KERNEL_VARIANT: oot\n"
)
MEMINFO = (
    "MemTotal:        7802876 kB\nMemFree:          512000 kB\nMemAvailable:    {} kB\n"
    "SwapTotal:       {} kB\nSwapFree:        {} kB\n"
)
I2C = "/sys/bus/i2c/devices"
ORIN_NANO_RAILS = {
    f"{I2C}/1-0040/name": "ina3221\n",
    f"{I2C}/1-0040/hwmon/hwmon1/in1_label": "VDD_IN\n",
    f"{I2C}/1-0040/hwmon/hwmon1/in1_input": "5000\n",
    f"{I2C}/1-0040/hwmon/hwmon1/curr1_input": "1200\n",
    f"{I2C}/1-0040/hwmon/hwmon1/in2_label": "VDD_CPU_GPU_CV\n",
    f"{I2C}/1-0040/hwmon/hwmon1/in2_input": "5000\n",
    f"{I2C}/1-0040/hwmon/hwmon1/curr2_input": "400\n",
    f"{I2C}/1-0040/hwmon/hwmon1/in7_label": "sum of shunt voltages\n",
}
RTX_4090 = "NVIDIA GeForce RTX 4090, 8.9, 24564, 23028, 570.86.15\n"


def seed(root: Path, files: Mapping[str, str]) -> None:
    """Write files by their absolute paths below `root`."""
    for path, text in files.items():
        file = root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode())


def machine(
    root: Path, files: Mapping[str, str] = {}, tools: Mapping[str, str] | None = None
) -> Sources:
    """Make a machine of files, and of what its tools print by their whole command lines' start."""
    seed(root, files)
    printed = tools or {}

    def run(command: Sequence[str]) -> str | None:
        line = " ".join(command)
        return next((text for start, text in printed.items() if line.startswith(start)), None)

    return Sources(root, run)


def orin_nano(**changes: str) -> dict[str, str]:
    """Return the files of an Orin Nano developer kit; some may be changed by their last name."""
    files = {
        "/etc/nv_tegra_release": RELEASE.format(36, "4.3"),
        "/etc/nvpmodel.conf": NVPMODEL_SUPER,
        "/proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit\0",
        "/proc/device-tree/compatible": (
            "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0"
        ),
        "/proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd evtstrm asimddp\n",
        "/proc/meminfo": MEMINFO.format(6000000, 3901436, 3901436),
    }
    return {path: changes.get(Path(path).name.split(".")[0], text) for path, text in files.items()}
