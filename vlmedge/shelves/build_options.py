"""Options of `vlmedge build`, and what a build reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, get_args, runtime_checkable

from vlmedge.bundle import Bundle
from vlmedge.errors import InputError
from vlmedge.progress import Progress
from vlmedge.shelves.contracts import Engine
from vlmedge.spec.manifest import ComponentParity

LEVELS = range(6)  # of the builder's optimization

Precision = Literal["float32", "float16"]
Dla = Literal["off", "auto", "faster", "always"]


@dataclass(frozen=True, slots=True)
class AxisRange:
    """Sizes of a named axis that an engine is built for."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        """Refuse what is no range."""
        if not 0 <= self.min <= self.opt <= self.max:
            raise InputError(f"axis {self}: it must be MIN:OPT:MAX, in ascending order")

    def __str__(self) -> str:
        """Write it as the command line takes it."""
        return f"{self.min}:{self.opt}:{self.max}"

    @classmethod
    def parse(cls, text: str) -> AxisRange:
        """Read MIN:OPT:MAX, or one number for all three."""
        parts = text.split(":")
        if len(parts) not in (1, 3) or not all(part.isdecimal() for part in parts):
            raise InputError(f"axis {text!r}: it must be MIN:OPT:MAX, or one number")
        numbers = [int(part) for part in parts]
        return cls(*(numbers if len(numbers) == 3 else numbers * 3))


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How to compile.

    Attributes:
        precision: Number format that the float layers compute in; quantized ones keep their own.
        axes: Ranges of named axes, in place of those that the manifest implies.
        level: The builder's optimization level, 0 (quick) to 5 (thorough), or its default.
        workspace_mib: Scratch memory that a layer may take, or none: a share of what is free.
        memory_mib: The build is stopped when it takes more of the host's memory, or none.
        components: Only these, or all.
        keep_slower: Whether quantized layers stay where float16 would be faster.
        record: Whether a decoder's steps are recorded (CUDA graphs), if that is equal and faster.
        dla: Whether a vision tower is built for the board's deep-learning accelerator too, and
            kept if that is faster than the GPU: auto, where it may gain; faster, or refuse where
            there is none; always, kept though it be slower, since it takes less power.
    """

    precision: Precision = "float16"
    axes: Mapping[str, AxisRange] = field(default_factory=dict)
    level: int | None = None
    workspace_mib: int | None = None
    memory_mib: int | None = None
    components: tuple[str, ...] = ()
    keep_slower: bool = False
    record: bool = False
    dla: Dla = "off"

    def __post_init__(self) -> None:
        """Refuse what no engine takes."""
        if self.dla not in (modes := get_args(Dla)):
            raise InputError(f"dla {self.dla!r}: it must be {', '.join(modes[:-1])} or {modes[-1]}")
        if self.dla in ("faster", "always") and self.precision == "float32":
            raise InputError("precision 'float32': a DLA computes in float16 or int8, give float16")
        if self.precision not in (known := get_args(Precision)):
            raise InputError(f"precision {self.precision!r}: it must be {' or '.join(known)}")
        if self.level is not None and self.level not in LEVELS:
            raise InputError(f"level is {self.level}: it must be 0 to {LEVELS[-1]}")
        for name in ("workspace_mib", "memory_mib"):
            if (size := getattr(self, name)) is not None and size < 1:
                raise InputError(f"{name} is {size}: it must be at least 1")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing in a graph that an engine would refuse.

    Attributes:
        component: Where.
        node: Its name in the graph.
        operator: Its kind.
        problem: The thing that the engine does not support.
        remedy: The way around it.
    """

    component: str
    node: str
    operator: str
    problem: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Built:
    """One component, compiled.

    Attributes:
        component: Its name.
        folder: Where the engine is.
        precision: Number format that its float layers compute in; float32 if float16 gave nan or
            inf.
        bytes: Its size.
        seconds: How long it took; 0 for one that was there.
        reused: Whether it was there.
        restored: Nodes of a float16 engine that compute in float32, since they overflowed.
        parity: Level 4: how far it is from its portable graph; none: it could not be compared.
        latency_ms: Time of one pass over the gate's picture or prompt.
        dropped: Variants that were built beside it and are not faster, with their latency, ms.
        dla: Whether it runs on a deep-learning accelerator.
    """

    component: str
    folder: Path
    precision: str
    bytes: int
    seconds: float
    reused: bool
    restored: tuple[str, ...] = ()
    parity: ComponentParity | None = None
    latency_ms: float | None = None
    dropped: Mapping[str, float] = field(default_factory=dict)
    dla: bool = False


@runtime_checkable
class Compiler(Engine, Protocol):
    """An engine that is built for a machine before it runs."""

    def build(self, bundle: Bundle, options: BuildOptions, progress: Progress) -> list[Built]:
        """Compile a bundle's components for this machine; what fits is not built again."""
        ...

    def lint(self, bundle: Bundle, options: BuildOptions, version: str) -> list[Finding]:
        """Name all that `version` of the engine would refuse; no GPU is needed."""
        ...
