"""The little of CUDA that running an engine takes, by ctypes: memory, copies, one stream.

No CUDA package is asked for: JetPack 6 has Python 3.10 and CUDA 12.6, for which there are no
cuda-bindings that fit everywhere. Where NVIDIA's pathfinder is installed, it finds libcudart.
"""

from __future__ import annotations

import ctypes
import glob
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from vlmedge.arrays import Array
from vlmedge.errors import VlmEdgeError

_TO_DEVICE, _TO_HOST, _ON_DEVICE = 1, 2, 3  # cudaMemcpyKind, driver_types.h
_CAPABILITY = (75, 76)  # cudaDevAttrComputeCapabilityMajor and Minor, driver_types.h
_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
_THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal, driver_types.h
_LIBRARIES = ("libcudart.so", "libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0")


class Cuda(Protocol):
    """One GPU."""

    @property
    def name(self) -> str:
        """NVIDIA's name for it."""
        ...

    @property
    def capability(self) -> str:
        """Its compute capability, "8.7"."""
        ...

    def memory(self) -> tuple[int, int]:
        """Return its free and its whole memory, bytes."""
        ...

    def allocate(self, size: int) -> int:
        """Return the address of `size` bytes."""
        ...

    def release(self, address: int) -> None:
        """Give memory back."""
        ...

    def stream(self) -> int:
        """Open a queue of work; return its handle."""
        ...

    def close_stream(self, stream: int) -> None:
        """Close it."""
        ...

    def upload(self, address: int, array: Array, stream: int) -> None:
        """Copy a contiguous array to the GPU."""
        ...

    def download(self, array: Array, address: int, stream: int) -> None:
        """Copy from the GPU into a contiguous array; it is there after `wait`."""
        ...

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        """Copy on the GPU."""
        ...

    def copy_rows(
        self,
        target: int,
        target_pitch: int,
        source: int,
        source_pitch: int,
        width: int,
        rows: int,
        stream: int,
    ) -> None:
        """Copy `width` bytes of each of some rows on the GPU; a pitch leads from row to row."""
        ...

    def clear(self, address: int, size: int, stream: int) -> None:
        """Fill memory with zeros."""
        ...

    def begin_recording(self, stream: int) -> None:
        """Record what is put on a stream from now on, and run none of it."""
        ...

    def end_recording(self, stream: int) -> int:
        """Return the handle of what was recorded (a CUDA graph, made ready)."""
        ...

    def play(self, recording: int, stream: int) -> None:
        """Put all of a recording on a stream at once."""
        ...

    def drop_recording(self, recording: int) -> None:
        """Free it."""
        ...

    def wait(self, stream: int) -> None:
        """Return when all work of a stream is done."""
        ...


class Cudart:
    """The first GPU, through libcudart, and libcuda for its name."""

    def __init__(self, runtime: Any, driver: Any) -> None:
        self._runtime = runtime
        runtime.cudaGetErrorString.restype = ctypes.c_char_p
        count = ctypes.c_int()
        error = runtime.cudaGetDeviceCount(ctypes.byref(count))
        if error or not count.value:
            why = self._text(error) if error else "none is there"
            raise VlmEdgeError(
                f"no NVIDIA GPU: {why}: check with nvidia-smi (on a Jetson: that you are in the "
                "groups video and render), or use --engine ort"
            )
        label = ctypes.create_string_buffer(256)
        driver.cuInit(0)
        driver.cuDeviceGetName(label, len(label), 0)
        self.name = label.value.decode()
        self.capability = ".".join(str(self._attribute(number)) for number in _CAPABILITY)

    def memory(self) -> tuple[int, int]:
        """Return its free and its whole memory, bytes."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._do("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def allocate(self, size: int) -> int:
        """Return the address of `size` bytes."""
        address = ctypes.c_void_p()
        error = self._runtime.cudaMalloc(ctypes.byref(address), ctypes.c_size_t(size))
        if error == _OUT_OF_MEMORY:
            free = self.memory()[0] / 2**20
            raise VlmEdgeError(
                f"{self.name} has no {size / 2**20:.0f} MiB left ({free:.0f} MiB free): close "
                "other programs, or build for less: vlmedge build BUNDLE --axis batch=1"
            )
        self._judge("cudaMalloc", error)
        return int(address.value or 0)

    def release(self, address: int) -> None:
        """Give memory back."""
        self._do("cudaFree", ctypes.c_void_p(address))

    def stream(self) -> int:
        """Open a queue of work; return its handle."""
        handle = ctypes.c_void_p()
        self._do("cudaStreamCreate", ctypes.byref(handle))
        return int(handle.value or 0)

    def close_stream(self, stream: int) -> None:
        """Close it."""
        self._do("cudaStreamDestroy", ctypes.c_void_p(stream))

    def upload(self, address: int, array: Array, stream: int) -> None:
        """Copy a contiguous array to the GPU."""
        self._copy(address, array.ctypes.data, array.nbytes, _TO_DEVICE, stream)

    def download(self, array: Array, address: int, stream: int) -> None:
        """Copy from the GPU into a contiguous array."""
        self._copy(array.ctypes.data, address, array.nbytes, _TO_HOST, stream)

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        """Copy on the GPU."""
        self._copy(target, source, size, _ON_DEVICE, stream)

    def copy_rows(
        self,
        target: int,
        target_pitch: int,
        source: int,
        source_pitch: int,
        width: int,
        rows: int,
        stream: int,
    ) -> None:
        """Copy `width` bytes of each of some rows on the GPU; a pitch leads from row to row."""
        if width and rows:
            self._do(
                "cudaMemcpy2DAsync",
                ctypes.c_void_p(target),
                ctypes.c_size_t(target_pitch),
                ctypes.c_void_p(source),
                ctypes.c_size_t(source_pitch),
                ctypes.c_size_t(width),
                ctypes.c_size_t(rows),
                ctypes.c_int(_ON_DEVICE),
                ctypes.c_void_p(stream),
            )

    def clear(self, address: int, size: int, stream: int) -> None:
        """Fill memory with zeros."""
        place, handle = ctypes.c_void_p(address), ctypes.c_void_p(stream)
        self._do("cudaMemsetAsync", place, ctypes.c_int(0), ctypes.c_size_t(size), handle)

    def begin_recording(self, stream: int) -> None:
        """Record what is put on a stream from now on, and run none of it."""
        self._do("cudaStreamBeginCapture", ctypes.c_void_p(stream), ctypes.c_int(_THREAD_LOCAL))

    def end_recording(self, stream: int) -> int:
        """Return the handle of what was recorded (a CUDA graph, made ready).

        `cudaGraphInstantiateWithFlags` has one signature in CUDA 11.4 to 13, unlike its elder.
        """
        graph, ready = ctypes.c_void_p(), ctypes.c_void_p()
        self._do("cudaStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
        try:
            self._do(
                "cudaGraphInstantiateWithFlags", ctypes.byref(ready), graph, ctypes.c_ulonglong(0)
            )
        finally:
            self._do("cudaGraphDestroy", graph)
        return int(ready.value or 0)

    def play(self, recording: int, stream: int) -> None:
        """Put all of a recording on a stream at once."""
        self._do("cudaGraphLaunch", ctypes.c_void_p(recording), ctypes.c_void_p(stream))

    def drop_recording(self, recording: int) -> None:
        """Free it."""
        self._do("cudaGraphExecDestroy", ctypes.c_void_p(recording))

    def wait(self, stream: int) -> None:
        """Return when all work of a stream is done."""
        self._do("cudaStreamSynchronize", ctypes.c_void_p(stream))

    def _copy(self, target: int, source: int, size: int, kind: int, stream: int) -> None:
        if size:
            self._do(
                "cudaMemcpyAsync",
                ctypes.c_void_p(target),
                ctypes.c_void_p(source),
                ctypes.c_size_t(size),
                ctypes.c_int(kind),
                ctypes.c_void_p(stream),
            )

    def _attribute(self, number: int) -> int:
        value = ctypes.c_int()
        self._do("cudaDeviceGetAttribute", ctypes.byref(value), number, 0)
        return value.value

    def _do(self, function: str, *arguments: Any) -> None:
        self._judge(function, getattr(self._runtime, function)(*arguments))

    def _judge(self, function: str, error: int) -> None:
        if error:
            raise VlmEdgeError(f"{self.name}: {function}: {self._text(error)}: see dmesg")

    def _text(self, error: int) -> str:
        text: bytes = self._runtime.cudaGetErrorString(error)
        return text.decode()


def connect() -> Cuda:
    """Open the first GPU.

    Raises:
        VlmEdgeError: There is none, or no CUDA.
    """
    runtime = _load(_runtimes())
    driver = _load(iter(("libcuda.so.1", "libcuda.so")))
    if driver is None:
        raise VlmEdgeError(
            "no NVIDIA GPU: its driver (libcuda.so.1) is not installed: install it, "
            "or use --engine ort"
        )
    if runtime is None:
        raise VlmEdgeError(
            "the CUDA runtime (libcudart) is not installed: pip install nvidia-cuda-runtime "
            "(on a Jetson: sudo apt install nvidia-jetpack)"
        )
    return Cudart(runtime, driver)


def _runtimes() -> Iterator[str]:
    """Name where libcudart may be: what NVIDIA's own finder says, the loader's path, wheels."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        yield str(load_nvidia_dynamic_lib("cudart").abs_path)
    except Exception:  # it is not installed, or finds nothing: each release says so otherwise
        pass
    yield from _LIBRARIES
    yield from sorted(glob.glob("/usr/local/cuda*/lib64/libcudart.so*"), reverse=True)
    for folder in sys.path:  # the wheels nvidia-cuda-runtime and nvidia-cuda-runtime-cu12
        for place in ("nvidia/cu1?/lib", "nvidia/cuda_runtime/lib"):
            yield from map(str, Path(folder or ".").glob(f"{place}/libcudart.so.1?"))


def _load(names: Iterator[str]) -> Any:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None
