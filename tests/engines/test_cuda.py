"""CUDA by ctypes, against a libcudart of Python whose memory is the host's."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from kit.shelf import module

from vlmedge.errors import VlmEdgeError

cuda, rooms = module("runtimes", "_cuda"), module("runtimes", "_tensorrt.recorded_cache")
OUT_OF_MEMORY, INVALID = 2, 1
TEXTS = {OUT_OF_MEMORY: b"out of memory", INVALID: b"invalid argument"}


class _Function:
    """A foreign function: it can be called, and has a result type."""

    restype: Any = None

    def __init__(self, call: Any) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)


class _Runtime:
    """libcudart's functions that are used, with C's types; any other name fails."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._held: dict[int, Any] = {}
        self.kinds: list[int] = []
        self.calls: list[str] = []
        self.refuses = 0
        self.cudaGetErrorString = _Function(lambda error: TEXTS[error])

    def cudaGetDeviceCount(self, count: Any) -> int:
        count._obj.value = 1
        return 0

    def cudaDeviceGetAttribute(self, value: Any, number: int, device: int) -> int:
        value._obj.value = {75: 8, 76: 7}[number]  # cudaDevAttrComputeCapabilityMajor, Minor
        return 0

    def cudaMemGetInfo(self, free: Any, total: Any) -> int:
        free._obj.value, total._obj.value = self._room, 2**40
        return 0

    def cudaMalloc(self, address: Any, size: ctypes.c_size_t) -> int:
        if size.value > self._room:
            return OUT_OF_MEMORY
        data = ctypes.create_string_buffer(size.value)
        self._held[ctypes.addressof(data)] = data
        address._obj.value = ctypes.addressof(data)
        return 0

    def cudaFree(self, address: ctypes.c_void_p) -> int:
        return INVALID if self._held.pop(address.value or 0, None) is None else 0

    def cudaStreamCreate(self, stream: Any) -> int:
        stream._obj.value = 0x7F00_0000_0010  # does not fit a C int
        return 0

    def cudaStreamSynchronize(self, stream: ctypes.c_void_p) -> int:
        return 0 if stream.value == 0x7F00_0000_0010 else INVALID

    cudaStreamDestroy = cudaStreamSynchronize

    def cudaMemcpyAsync(
        self,
        target: ctypes.c_void_p,
        source: ctypes.c_void_p,
        size: ctypes.c_size_t,
        kind: ctypes.c_int,
        stream: ctypes.c_void_p,
    ) -> int:
        assert target.value and source.value
        ctypes.memmove(target.value, source.value, size.value)
        self.kinds.append(kind.value)
        return self.cudaStreamSynchronize(stream)

    def cudaMemcpy2DAsync(
        self,
        target: ctypes.c_void_p,
        target_pitch: ctypes.c_size_t,
        source: ctypes.c_void_p,
        source_pitch: ctypes.c_size_t,
        width: ctypes.c_size_t,
        rows: ctypes.c_size_t,
        kind: ctypes.c_int,
        stream: ctypes.c_void_p,
    ) -> int:
        if width.value > min(target_pitch.value, source_pitch.value):
            return INVALID
        for row in range(rows.value):
            to = (target.value or 0) + row * target_pitch.value
            ctypes.memmove(to, (source.value or 0) + row * source_pitch.value, width.value)
        self.kinds.append(kind.value)
        return self.cudaStreamSynchronize(stream)

    def cudaMemsetAsync(
        self, target: ctypes.c_void_p, byte: ctypes.c_int, size: ctypes.c_size_t, stream: Any
    ) -> int:
        ctypes.memset(target.value or 0, byte.value, size.value)
        return self.cudaStreamSynchronize(stream)

    def cudaStreamBeginCapture(self, stream: ctypes.c_void_p, mode: ctypes.c_int) -> int:
        assert mode.value == 1  # cudaStreamCaptureModeThreadLocal
        self.calls.append("begin")
        return self.cudaStreamSynchronize(stream)

    def cudaStreamEndCapture(self, stream: ctypes.c_void_p, graph: Any) -> int:
        graph._obj.value = 0x7F00_0000_0020
        self.calls.append("end")
        return self.cudaStreamSynchronize(stream)

    def cudaGraphInstantiateWithFlags(
        self, ready: Any, graph: ctypes.c_void_p, flags: ctypes.c_ulonglong
    ) -> int:
        assert (graph.value, flags.value) == (0x7F00_0000_0020, 0)
        ready._obj.value = 0x7F00_0000_0030
        self.calls.append("make ready")
        return self.refuses

    def cudaGraphDestroy(self, graph: ctypes.c_void_p) -> int:
        assert graph.value == 0x7F00_0000_0020
        self.calls.append("drop graph")
        return 0

    def cudaGraphLaunch(self, ready: ctypes.c_void_p, stream: ctypes.c_void_p) -> int:
        assert ready.value == 0x7F00_0000_0030
        self.calls.append("play")
        return self.cudaStreamSynchronize(stream)

    def cudaGraphExecDestroy(self, ready: ctypes.c_void_p) -> int:
        assert ready.value == 0x7F00_0000_0030
        self.calls.append("drop")
        return 0


class _Driver:
    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGetName(self, label: Any, size: int, device: int) -> int:
        label.value = b"Orin"
        return 0


@pytest.fixture
def runtime() -> _Runtime:
    return _Runtime(2**20)


@pytest.fixture
def gpu(runtime: _Runtime) -> Any:
    return cuda.Cudart(runtime, _Driver())


def test_gpu_tells_name_capability_and_memory(gpu: Any) -> None:
    assert (gpu.name, gpu.capability, gpu.memory()) == ("Orin", "8.7", (2**20, 2**40))


def test_bytes_go_up_over_and_down(gpu: Any, runtime: _Runtime) -> None:
    stream, sent = gpu.stream(), np.arange(6, dtype=np.float32).reshape(2, 3)
    first, second = gpu.allocate(sent.nbytes), gpu.allocate(sent.nbytes)
    got = np.empty_like(sent)
    gpu.upload(first, sent, stream)
    gpu.copy(second, first, sent.nbytes, stream)
    gpu.download(got, second, stream)
    gpu.wait(stream)
    np.testing.assert_array_equal(got, sent)
    assert runtime.kinds == [1, 3, 2]  # to the device, on it, to the host: cudaMemcpyKind
    gpu.upload(first, np.empty(0, np.float32), stream)  # nothing to copy is no call
    assert len(runtime.kinds) == 3
    gpu.release(first)
    gpu.release(second)
    gpu.close_stream(stream)


def test_rows_are_copied_from_pitch_to_pitch(gpu: Any, runtime: _Runtime) -> None:
    """Two rows of three numbers go to the end of rows of five, which were cleared before."""
    stream, sent = gpu.stream(), np.arange(1, 7, dtype=np.int32).reshape(2, 3)
    source, target = gpu.allocate(sent.nbytes), gpu.allocate(40)
    gpu.upload(source, sent, stream)
    gpu.clear(target, 40, stream)
    gpu.copy_rows(target + 8, 20, source, 12, 12, 2, stream)
    got = np.ones((2, 5), np.int32)
    gpu.download(got, target, stream)
    assert got.tolist() == [[0, 0, 1, 2, 3], [0, 0, 4, 5, 6]]
    assert runtime.kinds == [1, 3, 2]
    gpu.copy_rows(target, 20, source, 12, 0, 2, stream)  # nothing to copy is no call
    assert len(runtime.kinds) == 3


def test_newest_position_of_all_tensors_moves_by_one_copy(gpu: Any, runtime: _Runtime) -> None:
    """Two tensors of two texts with three heads; a position is two numbers."""
    stream, numbers = gpu.stream(), np.random.default_rng(0)
    pasts = numbers.standard_normal((2, 6, 2, 2), np.float32)
    presents = numbers.standard_normal((2, 6, 5, 2), np.float32)
    room = rooms.Room(gpu, tensors=2, heads=3, position_bytes=8)
    room.settle(2, 4, stream)
    assert (room.past(1) - room.past(0)) % 256 == (room.present(1) - room.present(0)) % 256 == 0
    source, target = gpu.allocate(pasts[0].nbytes), gpu.allocate(6 * 3 * 8)
    for number, (past, present) in enumerate(zip(pasts, presents, strict=True)):
        gpu.upload(source, past, stream)
        room.enter(number, source, 2, stream)
        gpu.upload(room.present(number), present, stream)
    before = len(runtime.kinds)
    room.keep(2, stream)
    assert len(runtime.kinds) == before + 1
    for number, (past, present) in enumerate(zip(pasts, presents, strict=True)):
        got, whole = np.empty((6, 3, 2), np.float32), np.empty((6, 4, 2), np.float32)
        room.leave(number, target, 3, stream)
        gpu.download(got, target, stream)
        np.testing.assert_array_equal(got, np.concatenate([past, present[:, 4:]], 1))
        gpu.download(whole, room.past(number), stream)
        assert not whole[:, 3:].any()  # what nobody has filled yet
    room.close()
    assert room.places == (0, 0)


def test_recording_is_made_ready_played_and_dropped(gpu: Any, runtime: _Runtime) -> None:
    stream = gpu.stream()
    gpu.begin_recording(stream)
    recording = gpu.end_recording(stream)
    gpu.play(recording, stream)
    gpu.drop_recording(recording)
    assert runtime.calls == ["begin", "end", "make ready", "drop graph", "play", "drop"]
    runtime.calls, runtime.refuses = [], INVALID
    with pytest.raises(VlmEdgeError, match="cudaGraphInstantiateWithFlags: invalid argument"):
        gpu.end_recording(stream)
    assert runtime.calls == ["end", "make ready", "drop graph"]  # nothing of it is left


def test_too_little_memory_says_how_much_there_is(gpu: Any) -> None:
    with pytest.raises(VlmEdgeError, match=r"Orin has no 8 MiB left \(1 MiB free\): close other"):
        gpu.allocate(2**23)


def test_other_errors_carry_cuda_s_own_words(gpu: Any) -> None:
    with pytest.raises(VlmEdgeError, match="Orin: cudaFree: invalid argument"):
        gpu.release(1)
