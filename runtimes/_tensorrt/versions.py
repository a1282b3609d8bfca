"""What differs between TensorRT 8.6, 10.x and 11.x, looked up by name; never a flag by number.

Which names are where was read in the headers and bindings of the tags 8.6.1 to 11.1 of
github.com/NVIDIA/TensorRT. The numbers behind the names have moved: STRONGLY_TYPED is 1 in 10.x
and 0 in 11, where 1 means another thing.

                      8.6                      10.x                        11.x
    network           EXPLICIT_BATCH           STRONGLY_TYPED              no flag: always both
    float16, int8     BuilderFlag.FP16, INT8   types in the graph          types in the graph
    int64 in and out  int32                    int64                       int64
    progress          none                     IProgressMonitor            IProgressMonitor
    on a DLA          as above                 no flag: types by flag      types in the graph
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vlmedge.errors import MissingExtraError

from .operators import Version, version_of

_NUMPY = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT8": np.int8,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}


def load(root: Path = Path("/")) -> Any:
    """Import TensorRT, or say how to get it on this machine.

    Args:
        root: Where the system's files are.
    """
    try:
        trt = importlib.import_module("tensorrt")
        trt.Builder  # noqa: B018  PyPI's newer packages are stubs that import and hold nothing
    except (ImportError, AttributeError, OSError) as error:
        broken = not isinstance(error, ModuleNotFoundError) and "tensorrt" in sys.modules
        why = f"cannot be loaded ({error})" if broken else "is not installed"
        raise MissingExtraError(f"TensorRT {why}: {how_to_get(root)}") from None
    version_of(trt.__version__)  # refuses what is too old
    return trt


def how_to_get(root: Path) -> str:
    """Return how to get TensorRT on this JetPack, or on a desktop."""
    release = root / "etc/nv_tegra_release"
    try:
        text = release.read_text(encoding="utf-8")
    except OSError:
        return (
            "pip install tensorrt (11.x, for Turing and newer; for older GPUs tensorrt==8.6.1 "
            "on Python 3.8 to 3.11), or use --engine ort"
        )
    line = text.split("(")[0].strip("# \n")  # "# R36 (release), REVISION: 4.3"
    major = int(line[1:]) if line[1:].isdecimal() else 0
    python = {36: "3.10", 38: "3.12", 39: "3.12"}.get(major)
    if python is None:
        return f"L4T {line} has TensorRT 8.5 or older: update to JetPack 6, or use --engine ort"
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if here != python:
        return (
            f"JetPack's is for Python {python}, this is {here}: make an environment with "
            f"`python{python} -m venv --system-site-packages ENV`"
        )
    if any((root / "usr/lib").glob("python3*/dist-packages/tensorrt")):
        return (
            "JetPack's is outside this environment: make one with "
            f"`python{python} -m venv --system-site-packages ENV`"
        )
    return "sudo apt install python3-libnvinfer (not from PyPI: those packages are not JetPack's)"


def version(trt: Any) -> Version:
    """Return (major, minor)."""
    return version_of(trt.__version__)


def dtype_of(trt: Any, dtype: Any) -> np.dtype[Any]:
    """Return numpy's type of a tensor of an engine."""
    for name, kind in _NUMPY.items():
        if getattr(trt.DataType, name, None) == dtype:
            return np.dtype(kind)
    raise TypeError(f"{dtype}: numpy has no such type")


def is_typed(trt: Any, *, dla: bool) -> bool:
    """Return whether the types of a graph count, and not flags; see the table above."""
    return version(trt)[0] >= (11 if dla else 10)


def network_flags(trt: Any, *, typed: bool) -> int:
    """Return what create_network takes; see the table above."""
    names = {8: ("EXPLICIT_BATCH",), 10: ("STRONGLY_TYPED",) * typed}.get(version(trt)[0], ())
    flags = [getattr(trt.NetworkDefinitionCreationFlag, name) for name in names]
    return sum(1 << int(flag) for flag in flags)


def set_precision(trt: Any, config: Any, *, half: bool, quantized: bool, typed: bool) -> None:
    """Allow float16 and int8 by flag, unless the types are the graph's.

    What is float32 alone is not rounded to TF32's 10 bits, which all versions do by default.

    An explicitly quantized network wants INT8 and FP16 set there (NVIDIA's guide, recalled).
    """
    if not half:
        config.clear_flag(trt.BuilderFlag.TF32)
    if typed:
        return
    for name, wanted in (("FP16", half), ("INT8", quantized)):
        if wanted:
            config.set_flag(getattr(trt.BuilderFlag, name))


def use_dla(trt: Any, config: Any, core: int) -> None:
    """Put on a deep-learning accelerator what it can do; the GPU does the rest."""
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = core
    config.set_flag(trt.BuilderFlag.GPU_FALLBACK)


def share_profiles(trt: Any, config: Any) -> None:
    """Let several contexts have the same profile: a preview in 8.6, later versions' only way.

    Without it 8.6.0 ends in a segmentation fault when a second context asks for one; seen on a GPU.
    """
    if version(trt)[0] < 10:
        config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)


def logger(trt: Any, heard: Callable[[str], None]) -> Any:
    """Make a logger that passes errors on."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                heard(message)

    return Log()


def watch(trt: Any, config: Any, begun: Callable[[int], None], done: Callable[[], None]) -> Any:
    """Report the outermost phase's steps, where the version has a progress monitor.

    Returns:
        What must live as long as the builder.
    """
    if not hasattr(trt, "IProgressMonitor"):
        return None

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._outer = ""

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self._outer = phase_name
                begun(num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name == self._outer:
                done()
            return True

        def phase_finish(self, phase_name: str) -> None:
            pass

    monitor = config.progress_monitor = Monitor()
    return monitor
