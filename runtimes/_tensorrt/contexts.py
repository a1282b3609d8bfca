"""One execution context for each profile of an engine, on one scratch memory.

A context that changes its profile sets itself up again: a decoder that did so between prompt and
first token, and back for the next picture, lost tens of milliseconds on each text (seen on an
H100 with 8.6.0). Only one of them runs at a time, so their activations may lie in the same place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .._cuda import Cuda


class Contexts:
    """The contexts of one engine, each made when its profile is first asked for."""

    def __init__(self, trt: Any, engine: Any, cuda: Cuda, profiles: int, stream: int) -> None:
        """Make the first, so that a GPU without room for it says so at once.

        Args:
            trt: TensorRT.
            engine: Deserialized.
            cuda: The GPU.
            profiles: How many the engine has.
            stream: The queue on which all of them run.
        """
        self._engine, self._cuda, self._stream = engine, cuda, stream
        self._scratch = 0
        bare = _without_memory(trt, engine) if profiles > 1 else None
        self._make: Callable[[], Any] = bare or engine.create_execution_context
        self._shares = bare is not None
        self._made: dict[int, Any] = {}
        self.fits = self.of(0) is not None

    def of(self, number: int) -> Any:
        """Return the context of a profile, or none: TensorRT cannot make it and has logged why."""
        if number not in self._made:
            context = self.fresh(number)
            if context is None:
                return None
            self._made[number] = context
        return self._made[number]

    def fresh(self, number: int) -> Any:
        """Make one more context of a profile, for who must be alone in setting its shapes."""
        context = self._make()
        if context is None:
            return None
        if self._shares:
            self._lend(context)
        if number and not context.set_optimization_profile_async(number, self._stream):
            return None
        return context

    def close(self) -> None:
        """Free all of them and what they share."""
        self._made = {}
        if self._scratch:
            self._cuda.release(self._scratch)
        self._scratch = 0

    def _lend(self, context: Any) -> None:
        size = max(_memory_size(self._engine), 1)
        self._scratch = self._scratch or self._cuda.allocate(size)
        if hasattr(context, "set_device_memory"):  # 10.1
            context.set_device_memory(self._scratch, size)
        else:
            context.device_memory = self._scratch


def _without_memory(trt: Any, engine: Any) -> Callable[[], Any] | None:
    """Return what makes a context without memory of its own, by the version's name for it."""
    strategy = getattr(trt, "ExecutionContextAllocationStrategy", None)  # 10.0
    if strategy is not None:
        return lambda: engine.create_execution_context(strategy.USER_MANAGED)
    make: Callable[[], Any] | None = getattr(
        engine, "create_execution_context_without_device_memory", None
    )
    return make


def _memory_size(engine: Any) -> int:
    """Return what the largest profile takes, bytes."""
    size = getattr(engine, "device_memory_size_v2", None)  # 10.1; 11.0 has no other
    return int(engine.device_memory_size if size is None else size)
