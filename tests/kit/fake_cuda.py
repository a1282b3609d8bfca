"""A GPU of ctypes buffers, and a watcher that keeps what it is told."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

from vlmedge.arrays import Array
from vlmedge.errors import VlmEdgeError


class FakeCuda:
    """A GPU whose memory is the host's: addresses are real, and what is freed twice is found."""

    name = "NVIDIA Orin Nano"
    capability = "8.7"

    def __init__(self) -> None:
        self.held: dict[int, Any] = {}
        self.allocations = 0
        self.copied_bytes = {"up": 0, "down": 0, "inside": 0}
        self.streams = 0
        self.free = 4 * 2**30
        self.recordings: dict[int, list[Callable[[], Any]]] = {}
        self.played = self.dropped = 0
        self.unrecordable = False

    def memory(self) -> tuple[int, int]:
        return self.free, 8 * 2**30

    def allocate(self, size: int) -> int:
        data = ctypes.create_string_buffer(b"\xff" * size, size)  # nan, should anyone read it
        self.allocations += 1
        self.held[ctypes.addressof(data)] = data
        return ctypes.addressof(data)

    def release(self, address: int) -> None:
        del self.held[address]

    def stream(self) -> int:
        self.streams += 1
        return self.streams

    def close_stream(self, stream: int) -> None:
        self.streams -= 1

    def upload(self, address: int, array: Array, stream: int) -> None:
        assert array.flags.c_contiguous and array.nbytes <= len(self._at(address))
        ctypes.memmove(address, array.ctypes.data, array.nbytes)
        self.copied_bytes["up"] += array.nbytes

    def download(self, array: Array, address: int, stream: int) -> None:
        assert array.nbytes <= len(self._at(address))
        ctypes.memmove(array.ctypes.data, address, array.nbytes)
        self.copied_bytes["down"] += array.nbytes

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        ctypes.memmove(target, source, size)
        self.copied_bytes["inside"] += size

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
        assert width <= target_pitch and width <= source_pitch
        for row in range(rows):
            ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)
        self.copied_bytes["inside"] += rows * width

    def clear(self, address: int, size: int, stream: int) -> None:
        assert size <= len(self._at(address))
        ctypes.memset(address, 0, size)

    def begin_recording(self, stream: int) -> None:
        sys.modules["trt_core"].recording = []  # type: ignore[attr-defined]

    def end_recording(self, stream: int) -> int:
        core: Any = sys.modules["trt_core"]
        made, core.recording = core.recording, None
        if self.unrecordable:
            raise VlmEdgeError("Orin: cudaStreamEndCapture: operation not permitted")
        self.recordings[len(self.recordings) + self.dropped + 1] = made
        return len(self.recordings) + self.dropped

    def play(self, recording: int, stream: int) -> None:
        assert self.recordings[recording]
        self.played += 1
        for run in self.recordings[recording]:
            run()

    def drop_recording(self, recording: int) -> None:
        del self.recordings[recording]
        self.dropped += 1

    def wait(self, stream: int) -> None:
        pass

    def _at(self, address: int) -> Any:
        return self.held[address]


class Notes:
    """Progress that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.totals: list[int | None] = []
        self.advanced = 0

    def step(self, title: str, total: int | None = None) -> Any:
        self.totals.append(total)
        return _Step(self)

    def note(self, text: str) -> None:
        self.lines.append(text)


class _Step:
    def __init__(self, notes: Notes) -> None:
        self._notes = notes

    def __enter__(self) -> Callable[[int], None]:
        return self._advance

    def __exit__(self, *error: object) -> None:
        pass

    def _advance(self, amount: int) -> None:
        self._notes.advanced += amount
