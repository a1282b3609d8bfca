"""What the stand-ins of `tensorrt` share: engines that run their graph on ONNX Runtime's CPU.

A stand-in holds the names that its version has, and no others: reading or setting any other name
fails, as it does in the real bindings. Addresses are the host's, so that a stand-in of CUDA is a
dictionary of buffers. $TRT_STANDIN_FAULT names a fault for the builder to have.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
from rounding import session

MAGIC = b"standin plan\n"
NUMPY = {
    1: ("FLOAT", np.float32),
    10: ("HALF", np.float16),
    3: ("INT8", np.int8),
    6: ("INT32", np.int32),
    7: ("INT64", np.int64),
    9: ("BOOL", np.bool_),
}
POOLS = ("WORKSPACE", "TACTIC_DRAM")
SCRATCH_BYTES = 4096
recording: list[Any] | None = None  # what a stand-in of CUDA lets run later, or none


class Strict:
    """An object of the bindings: only the names of its version can be read or set."""

    NAMES: frozenset[str] = frozenset()

    def __getattribute__(self, name: str) -> Any:
        """Read a name that the version has."""
        if not name.startswith("_") and name not in type(self).NAMES:
            raise AttributeError(f"{type(self).__name__} has no {name} in this version")
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a name that the version has."""
        if not name.startswith("_") and name not in type(self).NAMES:
            raise AttributeError(f"{type(self).__name__} has no {name} in this version")
        super().__setattr__(name, value)


class Flags:
    """An enum of the bindings, without their numbers' history."""

    def __init__(self, **values: int) -> None:
        for name, value in values.items():
            setattr(self, name, Flag(value, name))


class Flag(int):
    """One value of an enum; enums of different kinds are never equal."""

    label: str

    def __new__(cls, value: int, name: str) -> Flag:
        """Make a number with a name."""
        made = super().__new__(cls, value)
        made.label = name
        return made

    def __eq__(self, other: object) -> bool:
        """Compare names, as pybind compares types."""
        return isinstance(other, Flag) and other.label == self.label

    def __hash__(self) -> int:
        """Hash the name."""
        return hash(self.label)


class Memory(Strict):
    """IHostMemory."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __bytes__(self) -> bytes:
        """Copy."""
        return self._data


class TimingCache(Strict):
    """ITimingCache: how many kernels were timed."""

    NAMES = frozenset({"serialize", "combine", "reset"})

    def __init__(self, data: bytes) -> None:
        self._timed = int(data or b"0")

    def serialize(self) -> Memory:
        """Write it."""
        return Memory(str(self._timed).encode())


class Profile(Strict):
    """IOptimizationProfile."""

    NAMES = frozenset({"set_shape", "get_shape", "set_shape_input", "get_shape_input"})

    def __init__(self) -> None:
        self._shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        """Keep what an input may be."""
        if not all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True)):
            raise ValueError(f"{input}: {min} {opt} {max}")
        self._shapes[input] = [list(min), list(opt), list(max)]


class Network(Strict):
    """INetworkDefinition: the graph that was parsed, its weights inside."""

    NAMES = frozenset({"num_inputs", "num_outputs", "get_input", "get_output", "name"})

    def __init__(self) -> None:
        self._model: onnx.ModelProto | None = None
        self._typed = False


class ParserError(Strict):
    """IParserError."""

    NAMES = frozenset({"desc", "code", "node", "file", "line", "func"})

    def __init__(self, text: str) -> None:
        self._text = text

    def desc(self) -> str:
        """Say it."""
        return self._text


def fault() -> str:
    """Return the fault that a test has asked for."""
    return os.environ.get("TRT_STANDIN_FAULT", "")


def install(
    module: ModuleType,
    *,
    version: str,
    names: dict[str, str],
    network_flags: dict[str, int],
    builder_flags: str,
    dtypes: str,
    monitor: bool,
    opset: int,
    sources: str,
    dla: bool,
) -> None:
    """Fill a module with one version's names."""
    major = int(version.split(".")[0])
    allowed = {kind: frozenset(text.split()) for kind, text in names.items()}
    dtype = Flags(**{name: i for i, name in enumerate(dtypes.split())})
    builder_flag = Flags(**{name: i for i, name in enumerate(builder_flags.split())})
    source = Flags(**{name: i for i, name in enumerate(sources.split())})
    devices = Flags(GPU=0, DLA=1)
    # how many a board has; a version that cannot use them finds none
    cores = int(os.environ.get("TRT_STANDIN_DLA", "0")) if dla else 0
    preview = Flags(PROFILE_SHARING_0806=0)
    severity = Flags(INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3, VERBOSE=4)

    class ILogger:
        Severity = severity

        def __init__(self) -> None:
            self._ready = True

        def log(self, severity: Any, msg: str) -> None:
            raise NotImplementedError

    class IProgressMonitor:
        def __init__(self) -> None:
            self._ready = True

    class Config(Strict):
        NAMES = allowed["IBuilderConfig"]

        def __init__(self) -> None:
            self._flags: list[str] = []
            self._cleared: list[str] = []
            self._profiles: list[Profile] = []
            self._pools: dict[str, int] = {}
            self._cache: TimingCache | None = None
            self._sources = (1 << len(sources.split())) - 1  # all are allowed
            self._shared = major >= 10  # profiles, by contexts
            self.builder_optimization_level = 3
            self.default_device_type = devices.GPU  # type: ignore[attr-defined]
            self.DLA_core = -1
            if monitor:
                self.progress_monitor = None

        def set_flag(self, flag: Flag) -> None:
            self._flags.append(flag.label)

        def clear_flag(self, flag: Flag) -> None:
            self._cleared.append(flag.label)

        def set_memory_pool_limit(self, pool: Flag, pool_size: int) -> None:
            self._pools[pool.label] = pool_size

        def set_preview_feature(self, feature: Flag, enable: bool) -> None:
            assert feature == preview.PROFILE_SHARING_0806
            self._shared = enable

        def get_tactic_sources(self) -> int:
            return self._sources

        def set_tactic_sources(self, tactic_sources: int) -> bool:
            self._sources = tactic_sources
            return True

        def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache:
            return TimingCache(serialized_timing_cache)

        def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
            self._cache = cache
            return not ignore_mismatch

        def get_timing_cache(self) -> TimingCache | None:
            return self._cache

        def add_optimization_profile(self, profile: Profile) -> int:
            self._profiles.append(profile)
            return len(self._profiles) - 1

    class Builder(Strict):
        NAMES = allowed["Builder"]

        def __init__(self, logger: ILogger) -> None:
            assert logger._ready
            self._logger = logger
            if fault() == "unready":  # what pybind makes of a constructor that gives nothing
                logger.log(severity.ERROR, "CUDA initialization failure with error: 35")
                raise TypeError("pybind11::init(): factory function returned nullptr")

        def create_network(self, flags: int = 0) -> Network:
            known = {label for label, bit in network_flags.items() if flags >> bit & 1}
            if flags >> (max(network_flags.values()) + 1):
                raise ValueError(f"{flags}: no such flag")
            if major == 8 and "EXPLICIT_BATCH" not in known:
                raise ValueError("the ONNX parser wants an explicit batch")
            if major >= 11 and known:
                raise ValueError(f"{known} set: networks are strongly typed")
            network = Network()
            network._typed = major >= 11 or "STRONGLY_TYPED" in known
            return network

        def create_builder_config(self) -> Config:
            return Config()

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, network: Network, config: Config) -> Memory | None:
            model = network._model
            assert model is not None
            watcher = config.progress_monitor if monitor else None
            if watcher is not None:
                watcher.phase_start("Building Engine", None, 3)
                watcher.phase_start("Timing", "Building Engine", 1)
                for step in range(3):
                    watcher.step_complete("Building Engine", step)
                watcher.step_complete("Timing", 0)
                watcher.phase_finish("Building Engine")
            if reason := self._misbehave(config):
                self._logger.log(severity.ERROR, reason)
                return None
            if network._typed and {"FP16", "INT8"} & set(config._flags):
                self._logger.log(severity.ERROR, "kFP16 is not compatible with strong typing")
                return None
            quantized = any(node.op_type == "DequantizeLinear" for node in model.graph.node)
            if major == 8 and quantized and "INT8" not in config._flags:
                self._logger.log(severity.ERROR, "Q/DQ without BuilderFlag.INT8")
                return None
            read = {n.input[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
            if major == 8 and read & {value.name for value in model.graph.initializer}:
                words = "Assertion params.weights.type() != DataType::kINT8 failed."  # seen
                self._logger.log(severity.ERROR, words)
                return None
            dynamic = any(
                d.dim_param for i in model.graph.input for d in i.type.tensor_type.shape.dim
            )
            if dynamic and not config._profiles:
                self._logger.log(severity.ERROR, "dynamic inputs without a profile")
                return None
            on_dla = config.default_device_type.label == "DLA"
            if on_dla and (reason := self._refused(network, config, quantized)):
                self._logger.log(severity.ERROR, reason)
                return None
            if config._cache is not None:
                config._cache._timed += 1
            head = {
                "version": version,
                "profiles": [profile._shapes for profile in config._profiles],
                "flags": config._flags,
                "cleared": config._cleared,
                "level": config.builder_optimization_level,
                "dla_core": config.DLA_core if on_dla else None,
                "pools": config._pools,
                "shared": config._shared,
                "sources": [
                    name for i, name in enumerate(sources.split()) if config._sources >> i & 1
                ],
            }
            return Memory(MAGIC + json.dumps(head).encode() + b"\n" + model.SerializeToString())

        def _refused(self, network: Network, config: Config, quantized: bool) -> str:
            if not 0 <= config.DLA_core < cores:
                return f"DLA core {config.DLA_core} of {cores}"
            shapes = [each for p in config._profiles for each in p._shapes.values()]
            if any(not low == usual == high for low, usual, high in shapes):
                return "DLA does not support dynamic dimensions"
            if "GPU_FALLBACK" not in config._flags:
                return "MatMul is unsupported on DLA"
            if major < 11 and (network._typed or quantized or "FP16" not in config._flags):
                return "DLA takes networks typed by flag, without Q/DQ, in FP16"
            return "Error Code 1: DLA" if fault() == "dla" else ""

        def _misbehave(self, config: Config) -> str:
            kind = fault()
            if kind == "hog":  # what TensorRT does to a small board
                kept = np.ones(256 * 2**20, np.uint8)
                time.sleep(30)
                return str(kept[0])
            if kind == "slow":
                Path(os.environ["TRT_STANDIN_MARK"]).touch()
                time.sleep(30)
            if kind == "pause":
                time.sleep(1.5)
            if kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "crash":
                print("free(): invalid pointer", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGSEGV)
            return {
                "memory": "Error Code 2: OutOfMemory (no further information)",
                "refuses": "Error Code 10: Could not find any implementation for node {ForeignNode",
            }.get(kind, "")

    class OnnxParser(Strict):
        NAMES = allowed["OnnxParser"]

        def __init__(self, network: Network, logger: ILogger) -> None:
            self._network = network
            self._errors: list[str] = []

        @property
        def num_errors(self) -> int:
            return len(self._errors)

        def get_error(self, index: int) -> ParserError:
            return ParserError(self._errors[index])

        def parse_from_file(self, model: str) -> bool:
            found = onnx.load(model)  # external weights by the file's folder
            newest = max(o.version for o in found.opset_import if not o.domain)
            if newest > opset:
                self._errors.append(f"opset {newest} is newer than {opset}")
                return False
            onnx.checker.check_model(found)
            if major < 9 and any(
                len(n.input) < 3 for n in found.graph.node if "Linear" in n.op_type
            ):
                # seen: DequantizeLinear without a zero point, which it reads all the same
                self._errors.append("vector::_M_range_check: __n (which is 2) >= this->size()")
                return False
            self._network._model = found
            return True

    class Runtime(Strict):
        NAMES = allowed["Runtime"]

        def __init__(self, logger: ILogger) -> None:
            self._logger = logger
            self.DLA_core = -1

        @property
        def num_DLA_cores(self) -> int:
            return cores

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Engine | None:
            data = bytes(serialized_engine)
            try:
                assert data.startswith(MAGIC)
                head, _, rest = data[len(MAGIC) :].partition(b"\n")
                found = json.loads(head)
                assert found["dla_core"] in (None, self.DLA_core)
                return Engine(self._logger, found, rest)
            except Exception:
                self._logger.log(severity.ERROR, "Serialization assertion failed: magic tag")
                return None

    class Engine(Strict):
        NAMES = allowed["ICudaEngine"]

        def __init__(self, logger: ILogger, head: dict[str, Any], model: bytes) -> None:
            if head["version"] != version:
                raise ValueError(f"version tag does not match: {head['version']}")
            self._logger = logger
            self._head = head
            self._model = onnx.load_from_string(model)
            self._values = [*self._model.graph.input, *self._model.graph.output]
            self._contexts: weakref.WeakSet[Context] = weakref.WeakSet()

        @property
        def num_io_tensors(self) -> int:
            return len(self._values)

        def get_tensor_name(self, index: int) -> str:
            return str(self._values[index].name)

        def get_tensor_dtype(self, name: str) -> Flag:
            value = next(v for v in self._values if v.name == name)
            label = NUMPY[value.type.tensor_type.elem_type][0]
            # before 9.0 the parser cast int64 to int32
            found: Flag = getattr(dtype, "INT32" if major < 9 and label == "INT64" else label)
            return found

        def create_execution_context(self, strategy: Flag | None = None) -> Context:
            return Context(self, bare=strategy is not None and strategy.label == "USER_MANAGED")

        def create_execution_context_without_device_memory(self) -> Context:
            return Context(self, bare=True)

        @property
        def device_memory_size(self) -> int:
            return SCRATCH_BYTES

        @property
        def device_memory_size_v2(self) -> int:
            return SCRATCH_BYTES

    class Context(Strict):
        NAMES = allowed["IExecutionContext"]

        def __init__(self, engine: Engine, *, bare: bool) -> None:
            self._engine = engine
            self._lent = not bare
            self._shapes: dict[str, tuple[int, ...]] = {}
            self._addresses: dict[str, int] = {}
            self._session = session(engine._model)
            taken = any(other._profile == 0 for other in engine._contexts)
            self._profile = -1 if taken and not engine._head["shared"] else 0
            engine._contexts.add(self)

        def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
            others = {other._profile for other in self._engine._contexts if other is not self}
            alone = not self._engine._head["shared"]
            assert not (alone and profile_index in others), "8.6.0 ends here (SIGSEGV)"
            self._profile = profile_index
            self._shapes = {}
            return profile_index < len(self._engine._head["profiles"])

        @property
        def device_memory(self) -> int:
            raise AttributeError("it can only be set")

        @device_memory.setter
        def device_memory(self, address: int) -> None:
            self._lent = bool(address)

        def set_device_memory(self, memory: int, size: int) -> None:
            assert memory and size >= SCRATCH_BYTES
            self._lent = True

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            profiles = self._engine._head["profiles"]
            limits = profiles[self._profile].get(name) if profiles else None
            if limits is not None:
                low, _, high = limits
                if not all(a <= s <= b for a, s, b in zip(low, shape, high, strict=True)):
                    self._engine._logger.log(severity.ERROR, f"{name}: {shape} not in {limits}")
                    return False
            self._shapes[name] = tuple(shape)
            return True

        def set_tensor_address(self, name: str, memory: int) -> bool:
            if not memory:
                raise ValueError(f"{name}: a null address")
            self._addresses[name] = memory
            return True

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            axes: dict[str, int] = {}
            for value in self._engine._model.graph.input:
                dims = value.type.tensor_type.shape.dim
                for dim, size in zip(dims, self._shapes[value.name], strict=True):
                    if dim.dim_param:
                        axes[dim.dim_param] = size
            value = next(v for v in self._engine._values if v.name == name)
            return tuple(
                eval(d.dim_param, {}, axes) if d.dim_param else d.dim_value
                for d in value.type.tensor_type.shape.dim
            )

        def execute_async_v3(self, stream_handle: int) -> bool:
            assert self._lent, "a context without memory"
            shapes, addresses = dict(self._shapes), dict(self._addresses)
            if recording is not None:  # it is put down, and not run
                recording.append(lambda: self._execute(shapes, addresses))
                return True
            return self._execute(shapes, addresses)

        def _execute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> bool:
            model = self._engine._model.graph
            taken = [addresses[v.name] for v in self._engine._values]
            assert len(set(taken)) == len(taken), "two tensors share memory"
            feeds = {}
            for value in model.input:
                stored = NUMPY[value.type.tensor_type.elem_type][1]
                held = np.int32 if major < 9 and stored is np.int64 else stored
                shape = shapes[value.name]
                count = int(np.prod(shape)) * np.dtype(held).itemsize
                data = ctypes.string_at(addresses[value.name], count)
                feeds[value.name] = np.frombuffer(data, held).reshape(shape).astype(stored)
            for value, array in zip(model.output, self._session.run(None, feeds), strict=True):
                if shapes == self._shapes:
                    assert array.shape == self.get_tensor_shape(value.name), value.name
                if major < 9 and array.dtype == np.int64:
                    array = array.astype(np.int32)
                data = np.ascontiguousarray(array).tobytes()
                ctypes.memmove(addresses[value.name], data, len(data))
            return True

    offered: dict[str, Any] = {
        "Builder": Builder,
        "BuilderFlag": builder_flag,
        "DataType": dtype,
        "DeviceType": devices,
        "ILogger": ILogger,
        "IProgressMonitor": IProgressMonitor,
        "MemoryPoolType": Flags(**{name: i for i, name in enumerate(POOLS)}),
        "NetworkDefinitionCreationFlag": Flags(**network_flags),
        "TacticSource": source,
        "OnnxParser": OnnxParser,
        "Runtime": Runtime,
        "__version__": version,
        "init_libnvinfer_plugins": lambda logger, namespace: True,
    }
    if not monitor:
        del offered["IProgressMonitor"]
    if major < 10:
        offered["PreviewFeature"] = preview
    if major >= 10:
        offered["ExecutionContextAllocationStrategy"] = Flags(
            STATIC=0, ON_PROFILE_CHANGE=1, USER_MANAGED=2
        )
    for name, value in offered.items():
        setattr(module, name, value)
