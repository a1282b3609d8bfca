"""Which libraries beside its own TensorRT may take kernels from, on this machine.

A builder whose configuration allows cuBLAS or cuDNN opens them, and its build ends where that
fails: they are not there, are another CUDA's, or do not know the GPU. So they are tried first.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Library:
    """A library that has a source's kernels.

    Attributes:
        name: Its file name after "lib".
        create: Its function that makes a handle; 0 is success.
        destroy: The function that frees it.
        releases: The major versions that TensorRT 8.6 and newer were made for.
    """

    name: str
    create: str
    destroy: str
    releases: tuple[int, ...]


# By the source's name: the numbers have moved (EDGE_MASK_CONVOLUTIONS is 3 in 8.6 and 10, 0 in 11,
# which has none of these three).
LIBRARIES = {
    "CUBLAS": Library("cublas", "cublasCreate_v2", "cublasDestroy_v2", (13, 12, 11)),
    "CUBLAS_LT": Library("cublasLt", "cublasLtCreate", "cublasLtDestroy", (13, 12, 11)),
    "CUDNN": Library("cudnn", "cudnnCreate", "cudnnDestroy", (9, 8)),
}


def leave_out_unusable(
    trt: Any, config: Any, usable: Callable[[Library], bool] | None = None
) -> list[str]:
    """Take those sources from a configuration that cannot be used here.

    Args:
        trt: TensorRT.
        config: An IBuilderConfig; sources that it does not allow are not tried.
        usable: Tells whether a library is.

    Returns:
        The names of the sources that were taken away.
    """
    usable = usable or is_usable
    allowed, left_out = int(config.get_tactic_sources()), []
    for name, library in LIBRARIES.items():
        source = getattr(trt.TacticSource, name, None)
        if source is None or not allowed >> int(source) & 1 or usable(library):
            continue
        allowed &= ~(1 << int(source))
        left_out.append(name)
    if left_out:
        config.set_tactic_sources(allowed)
    return left_out


def is_usable(library: Library, mapped: Path = Path("/proc/self/maps")) -> bool:
    """Return whether a library loads and makes a handle for this machine's GPU."""
    for file in _files(library, mapped):
        with contextlib.suppress(OSError, AttributeError):  # not there; not what it is called
            opened = ctypes.CDLL(file)
            create, destroy = getattr(opened, library.create), getattr(opened, library.destroy)
            handle = ctypes.c_void_p()
            if create(ctypes.byref(handle)) == 0:
                destroy(handle)
                return True
    return False


def _files(library: Library, mapped: Path) -> Iterator[str]:
    """Name what TensorRT would open: what is loaded with it already, else the loader's."""
    pattern = re.compile(rf"\S*/lib{library.name}\.so[.\d]*$", re.MULTILINE)
    with contextlib.suppress(OSError):
        loaded = dict.fromkeys(pattern.findall(mapped.read_text(errors="replace")))
        if loaded:
            yield from loaded
            return
    for release in library.releases:
        yield f"lib{library.name}.so.{release}"
