"""What each JetPack release holds, and how its boards get ONNX Runtime.

Versions are those of NVIDIA's own apt manifests, as github.com/anduril/jetpack-nixos keeps them
(sourceinfo/r*-debs.json); JetPack 4 is from pytorch.org's and users' tables. The light runtime runs
in the system's Python, since NVIDIA's `tensorrt` module is installed for that one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_JP6_WHEEL = "pip install onnxruntime-gpu --index-url https://pypi.jetson-ai-lab.io/jp6/cu126"


@dataclass(frozen=True, slots=True)
class JetPack:
    """One release.

    Attributes:
        name: JetPack's version.
        l4t: L4T's version, or the beginning that its updates share.
        cuda: Major and minor.
        tensorrt: The version that the release installs.
        cudnn: Major and minor.
        ubuntu: The release that it is based on.
        python: The system's.
        wheel: How ONNX Runtime with CUDA is installed, or none.
    """

    name: str
    l4t: str
    cuda: str
    tensorrt: str
    cudnn: str
    ubuntu: str
    python: str
    wheel: str | None


JETPACKS = (
    # 4.x: last for Nano, TX1, TX2. TensorRT 8.2 has no execute_async_v3, Python 3.6 no msgspec.
    JetPack("4.6", "32.6", "10.2", "8.0.1", "8.2", "18.04", "3.6", None),
    JetPack("4.6.6", "32.7", "10.2", "8.2.1", "8.2", "18.04", "3.6", None),
    # 5.x: last for Xavier. 5.1.1 and 5.1.2 have the same versions (third-party tables).
    JetPack("5.1.1", "35.3", "11.4", "8.5.2", "8.6", "20.04", "3.8", None),
    JetPack("5.1.2", "35.4", "11.4", "8.5.2", "8.6", "20.04", "3.8", None),
    JetPack("5.1.5", "35.6", "11.4", "8.5.2", "8.6", "20.04", "3.8", None),
    JetPack("5.1.6", "35.6.4", "11.4", "8.5.2", "8.6", "20.04", "3.8", None),
    # jetson-containers says CUDA 12.4 for 36.3; NVIDIA's manifest says 12.2
    JetPack("6.0", "36.3", "12.2", "8.6.2", "8.9", "22.04", "3.10", None),
    JetPack("6.1", "36.4.0", "12.6", "10.3.0", "9.3", "22.04", "3.10", _JP6_WHEEL),
    JetPack("6.2", "36.4.3", "12.6", "10.3.0", "9.3", "22.04", "3.10", _JP6_WHEEL),
    JetPack("6.2.1", "36.4", "12.6", "10.3.0", "9.3", "22.04", "3.10", _JP6_WHEEL),
    JetPack("6.2.2", "36.5", "12.6", "10.3.0", "9.3", "22.04", "3.10", _JP6_WHEEL),
    # PyPI's aarch64 wheels are for CUDA 13 and Python 3.11 and newer. That they hold code for
    # sm_87 and sm_110 is not verified.
    JetPack(
        "7.0", "38.2", "13.0", "10.13.3", "9.12", "24.04", "3.12", "pip install onnxruntime-gpu"
    ),
    JetPack(
        "7.1", "38.4", "13.0", "10.13.3", "9.12", "24.04", "3.12", "pip install onnxruntime-gpu"
    ),
    JetPack(
        "7.2", "39.2", "13.2", "10.16.2", "9.20", "24.04", "3.12", "pip install onnxruntime-gpu"
    ),
)

OLDEST = (8, 6)  # TensorRT that engines are built with
DLA_VERSIONS = "8.5 to 10.7, and 11.4.1 on AGX Orin"


def number(version: str) -> tuple[int, ...]:
    """Return major, minor and patch of a version, as far as it has them."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def has_dla(tensorrt: str) -> bool:
    """Return whether a TensorRT compiles for deep-learning accelerators.

    "TensorRT 10.7 was the last 10.x release that supported DLA", 11.4.1 has it again, on AGX Orin
    with JetPack 7.2.2: docs.nvidia.com/deeplearning/tensorrt/11.4.1, Working with DLA.
    """
    version = number(tensorrt)
    return version[:2] <= (10, 7) or version >= (11, 4, 1)


def tensorrt_of(releases: Sequence[str]) -> list[str]:
    """Return the TensorRT of all JetPack releases whose version begins so, the oldest first."""
    fitting = [
        jetpack.tensorrt
        for jetpack in JETPACKS
        if any(f"{jetpack.name}.".startswith(f"{prefix}.") for prefix in releases)
    ]
    return list(dict.fromkeys(fitting))


def jetpack_of(l4t: str) -> JetPack | None:
    """Return the release of an L4T version such as 36.4.3: the longest beginning that fits."""
    fitting = [j for j in JETPACKS if f"{l4t}.".startswith(f"{j.l4t}.")]
    return max(fitting, key=lambda j: len(j.l4t), default=None)
