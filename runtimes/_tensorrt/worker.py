"""Compile one graph: `python -m vlmedge.runtimes._tensorrt.worker FOLDER`, in a process of its own.

A builder that runs out of memory takes its process with it, and some of its errors end a process
too; here that is the child, and the parent says what happened. FOLDER holds request.json; the
worker writes engine.plan, timing and result.json into it, and prints one line of JSON for each step
that is done.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from . import versions as api
from .tactic_libraries import leave_out_unusable

REQUEST, RESULT, PLAN, TIMING = "request.json", "result.json", "engine.plan", "timing"
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG, linux/prctl.h
_MEMORY_WORDS = ("out of memory", "outofmemory", "bad_alloc", "cannot allocate", "insufficient mem")

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # min, opt, max


class Request(msgspec.Struct, frozen=True):
    """A graph to compile, and how.

    Attributes:
        graph: The ONNX file; its weights are found from its path.
        profiles: Shapes of every dynamic input, for each profile.
        half: Whether float layers may be float16 where that is a flag.
        quantized: Whether the graph has Q/DQ.
        level: The builder's optimization level, or its default.
        workspace_bytes: Scratch memory that a layer may take.
        dla_core: The deep-learning accelerator that it is for, or none: the GPU.
    """

    graph: str
    profiles: tuple[dict[str, Shapes], ...]
    half: bool
    quantized: bool
    level: int | None
    workspace_bytes: int
    dla_core: int | None = None


class Result(msgspec.Struct, frozen=True):
    """How it went.

    Attributes:
        error: TensorRT's message, or none.
        memory: Whether it was memory that there was too little of.
        disk: Whether it was the disk.
    """

    error: str | None = None
    memory: bool = False
    disk: bool = False


def compile_graph(
    trt: Any,
    request: Request,
    timing: bytes,
    begun: Callable[[int], None],
    done: Callable[[], None],
) -> tuple[bytes, bytes]:
    """Return the plan and the timing cache.

    Raises:
        RuntimeError: TensorRT refuses, with its own message.
    """
    heard: list[str] = []
    try:
        return _compile(trt, request, timing, begun, done, heard)
    except RuntimeError:
        raise
    except Exception as error:  # of the bindings, which say less than TensorRT's own log
        if not heard:
            raise
        raise RuntimeError("; ".join(heard)) from error


def _compile(
    trt: Any,
    request: Request,
    timing: bytes,
    begun: Callable[[int], None],
    done: Callable[[], None],
    heard: list[str],
) -> tuple[bytes, bytes]:
    """Do it; what TensorRT logs of errors goes to `heard`."""
    log = api.logger(trt, heard.append)
    if plugins := getattr(trt, "init_libnvinfer_plugins", None):  # ScatterElements is one
        plugins(log, "")
    builder = trt.Builder(log)
    typed = api.is_typed(trt, dla=request.dla_core is not None)
    network = builder.create_network(api.network_flags(trt, typed=typed))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(request.graph):
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise RuntimeError("; ".join(errors or heard) or "the graph cannot be parsed")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace_bytes)
    api.set_precision(trt, config, half=request.half, quantized=request.quantized, typed=typed)
    api.share_profiles(trt, config)
    if request.dla_core is not None:
        api.use_dla(trt, config, request.dla_core)
    if left_out := leave_out_unusable(trt, config):
        print(f"tactic sources left out: {', '.join(left_out)}", file=sys.stderr)
    if request.level is not None:
        config.builder_optimization_level = request.level
    cache = config.create_timing_cache(timing)
    if cache is not None:
        config.set_timing_cache(cache, False)
    for shapes in request.profiles:
        profile = builder.create_optimization_profile()
        for name, (least, usual, most) in shapes.items():
            profile.set_shape(name, least, usual, most)
        if shapes:
            config.add_optimization_profile(profile)
    monitor = api.watch(trt, config, begun, done)
    plan = builder.build_serialized_network(network, config)
    del monitor
    if plan is None:
        raise RuntimeError("; ".join(heard) or "the builder gave no engine and no reason")
    found = config.get_timing_cache()
    return bytes(plan), b"" if found is None else bytes(found.serialize())


def work(folder: Path, tell: Callable[[Mapping[str, int]], None]) -> Result:
    """Compile what `folder` asks for, into it."""
    request = msgspec.json.decode((folder / REQUEST).read_bytes(), type=Request)
    known = folder / TIMING
    try:
        plan, timing = compile_graph(
            api.load(),
            request,
            known.read_bytes() if known.is_file() else b"",
            lambda steps: tell({"total": steps}),
            lambda: tell({"done": 1}),
        )
    except MemoryError:
        return Result("the host has no memory left", memory=True)
    except Exception as error:  # TensorRT's own have no common base
        text = " ".join(str(error).split()) or type(error).__name__
        return Result(text, memory=any(word in text.lower() for word in _MEMORY_WORDS))
    (folder / PLAN).write_bytes(plan)
    known.write_bytes(timing)
    return Result()


def main(folder: Path) -> None:
    """Work; TensorRT's C++ prints where it likes, so our lines have a channel of their own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too and ends us
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    channel = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)

    def tell(message: Mapping[str, int]) -> None:
        channel.write(msgspec.json.encode(message) + b"\n")

    try:
        result = work(folder, tell)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        (folder / PLAN).unlink(missing_ok=True)  # there must be room for the result
        result = Result(f"{error.strerror}: {error.filename or folder}", disk=full)
    (folder / RESULT).write_bytes(msgspec.json.encode(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
