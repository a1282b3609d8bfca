"""The four things that a file in export/, quantize/, runtimes/ or devices/ can be, and a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from vlmedge.arrays import Array, Arrays
from vlmedge.spec import AdapterSlot, Component, EmbeddingTable, ModelSpec
from vlmedge.spec.manifest import KeptLayer

if TYPE_CHECKING:
    import onnx_ir as ir

    from vlmedge.bundle import Bundle
    from vlmedge.bundle.embedding_table import EmbeddingRows
    from vlmedge.lora.adapter import Weighted


class Graph(Protocol):
    """One component, loaded. It keeps its state (a decoder's cache) between calls."""

    @property
    def component(self) -> Component:
        """What goes in and comes out."""
        ...

    @property
    def reads(self) -> int:
        """Number of runs and resets so far.

        If it has changed, the cache no longer holds your text.
        """
        ...

    def run(self, feeds: Arrays, *, last: bool = False) -> dict[str, Array]:
        """Run once; state inputs may be left out and then come from the call before.

        Args:
            feeds: Every input that is not state, by name.
            last: Whether `logits` are wanted of the last token alone: an engine that can then
                returns no others, [batch, 1, vocabulary].

        Returns:
            Every output that is not state, by name.
        """
        ...

    def reset(self) -> None:
        """Forget the state: the next call starts with an empty cache."""
        ...

    def reorder(self, rows: NDArray[np.int64]) -> None:
        """Make state row i the row `rows[i]` of now; may repeat and drop rows (beams)."""
        ...

    def rewind(self, tokens: int) -> None:
        """Keep the first `tokens` positions of state row 0, and forget all else of the state."""
        ...

    def snapshot(self, tokens: int) -> dict[str, Array]:
        """Copy the first `tokens` positions of state row 0, by input: `run` may be fed them."""
        ...

    def close(self) -> None:
        """Give the memory back; the graph cannot run after it."""
        ...


class Engine(Protocol):
    """`ENGINE` in runtimes/<name>.py: what turns a component on disk into a `Graph`.

    Beside it the file of an engine that no device has run yet holds the literal EXPERIMENTAL =
    True, which is read without importing the engine's packages.
    """

    def open(self, bundle: Bundle, component: str) -> Graph:
        """Load one component, lowered to what is fastest here."""
        ...


@runtime_checkable
class FallsBack(Protocol):
    """An engine that refuses to run nodes on the CPU by default and can be told to allow it."""

    def falling_back(self) -> Engine:
        """Return this engine as one that leaves to the CPU what its device cannot run."""
        ...


@runtime_checkable
class Spins(Protocol):
    """An engine whose threads may wait awake between operators: faster, and never idle."""

    def spinning(self, spin: bool | None) -> Engine:
        """Return this engine as one model's, whose threads wait awake or asleep.

        None: awake unless the machine saves power when the first component is opened.
        """
        ...


@dataclass(frozen=True, slots=True)
class Stats:
    """What a tensor did over the calibration data.

    Attributes:
        amax: Largest absolute value.
        rms: Root of the mean square.
        channels: Largest absolute value of each channel (the last axis), float32 [channels], or
            none where only the first two were asked for.
        rows: Some of its rows as they came, float16 [rows, channels], or none.
    """

    amax: float
    rms: float
    channels: NDArray[np.float32] | None = None
    rows: NDArray[np.float16] | None = None

    def divided(self, scale: NDArray[np.float32]) -> Stats:
        """Return the statistics of the tensor divided by `scale`, float32 [channels]."""
        assert self.channels is not None and self.rows is not None
        channels = self.channels / scale
        rows = self.rows / scale
        rms = float(np.sqrt(np.square(rows).mean())) if rows.size else self.rms
        return Stats(float(channels.max()), rms, channels, rows.astype(np.float16))


@dataclass(frozen=True, slots=True)
class Watched:
    """The tensors of one float graph that a scheme wants to know about.

    Attributes:
        names: Which; none when the scheme looks at weights alone.
        rows: Whether it wants channels and rows too, not the largest value alone.
    """

    names: tuple[str, ...] = ()
    rows: bool = True


@dataclass(frozen=True, slots=True)
class LayerError:
    """What a scheme does to one layer.

    Attributes:
        error: Of its output on the calibration data, relative, 0..1.
        bits: Of its weights.
    """

    error: float
    bits: int


class Scheme(Protocol):
    """`SCHEME` in quantize/<name>.py: a portable graph in, a smaller portable graph out.

    The fields of one that is a `msgspec.Struct` are options, which a recipe may set.
    """

    @property
    def timed(self) -> bool:
        """Whether it is there for speed on a CPU, so that what became slower here is dropped."""
        ...

    @property
    def table(self) -> str:
        """What the token embedding table becomes: "float16", or "int8" with one scale a row."""
        ...

    def watch(self, component: Component, model: ir.Model) -> Watched:
        """Name the tensors whose statistics `rewrite` wants."""
        ...

    def rewrite(
        self,
        component: Component,
        model: ir.Model,
        stats: Mapping[str, Stats],
        keep: Mapping[str, str] = {},
    ) -> list[KeptLayer]:
        """Make one graph small, in place.

        Initializers stay lazy: what was read on demand in float is read on demand and quantized,
        so memory stays at a few tensors.

        Args:
            component: Its spec.
            model: The float graph.
            stats: Of what `watch` named.
            keep: Layers that get other numbers than the scheme's: their weights' names, and a
                precision, which is "float32" or one that the scheme knows.

        Returns:
            What stays float for the scheme's own reasons.
        """
        ...

    def harms(
        self, component: Component, model: ir.Model, stats: Mapping[str, Stats]
    ) -> dict[str, LayerError]:
        """Say what rounding each layer alone would do, by the name of its weight."""
        ...


class Slotter(Protocol):
    """`SLOTS` in quantize/<name>.py: opens a graph for adapters that come and go at run time."""

    def add(
        self, component: Component, model: ir.Model, rank: int, modules: Sequence[str] = ()
    ) -> tuple[AdapterSlot, ...]:
        """Give Linears of a float graph the inputs of an adapter, in place.

        Args:
            component: Its spec; the caller puts what is returned into it.
            model: The graph.
            rank: The largest rank that an adapter may have.
            modules: Ends of the Linears' paths ("q_proj"); none: all in repeated layers.

        Returns:
            One slot for each Linear; none where the component has no such Linear.
        """
        ...


class Export(Protocol):
    """One checkpoint, opened for export and as the reference of the gate."""

    @property
    def spec(self) -> ModelSpec:
        """What the runtime will know."""
        ...

    def trace(self, component: str) -> ir.Model:
        """Trace one component into a portable graph whose weights are read on demand."""
        ...

    def assets(self) -> Iterator[tuple[str, Callable[[Path], None]]]:
        """Yield (path inside the bundle, function that writes it there)."""
        ...

    def embeddings(self) -> EmbeddingTable | None:
        """Describe the token embedding table among the assets, if there is one."""
        ...

    def rows(self) -> EmbeddingRows | None:
        """Read the token embedding table as the checkpoint has it, if there is one."""
        ...

    def merged(self, adapters: Sequence[Weighted]) -> Export:
        """Return the same checkpoint with LoRA adapters merged into its weights.

        Everything reads weights through it, so graphs, tables and the reference all have them.

        Raises:
            AdapterError: An adapter does not fit the checkpoint.
        """
        ...

    def open(self, component: str, dtype: str = "float32") -> Graph:
        """Load one component in PyTorch, computing in `dtype`; close it before the next one."""
        ...


class Family(Protocol):
    """`FAMILY` in export/<name>.py: how one kind of checkpoint becomes graphs.

    Beside it the file holds three literals that are read without importing torch: ARCHITECTURES
    (names in config.json), ALIASES (short name -> hub id) and TINY (names that `tiny` knows).
    """

    def open(self, folder: Path, *, allow_pickle: bool = False) -> Export:
        """Read a checkpoint folder in Hugging Face layout; no weights yet."""
        ...

    def tiny(self, name: str, folder: Path) -> Any:
        """Write the smallest random checkpoint that runs, and return its PyTorch model.

        The tests of every family run on it, so a new family is tested when its file is there.
        """
        ...


@dataclass(frozen=True, slots=True)
class Rates:
    """Dense tera-operations a second, a multiply-add being two; none: it cannot.

    Attributes:
        fp32: Of the plain float units, not TF32.
        fp16: With sums in float32, which is what TensorRT does.
        int8: Of 8-bit integers.
        fp8: Of E4M3.
        fp4: Of NVFP4.
    """

    fp32: float
    fp16: float | None = None
    int8: float | None = None
    fp8: float | None = None
    fp4: float | None = None


@dataclass(frozen=True, slots=True)
class Device:
    """A value of `DEVICES` in devices/<product line>.py: a board, in numbers that decide.

    Attributes:
        title: What people call it.
        kind: What it is; only a gpu has memory apart from the system's.
        engines: What runs on it, the best first.
        precisions: What it computes in, or unpacks while it computes (int4).
        rates: Of the whole device; of one core for a CPU.
        bandwidth_gb_s: Between memory and processor, as published.
        memory_gib: What is built in; none: it differs from machine to machine.
        compute_capability: CUDA's, or none.
        marks: By what it is known: module ids of a Jetson, names that nvidia-smi gives, CPU flags.
        dla_cores: Deep-learning accelerators.
        dla_int8_tops: What they do together, dense.
        jetpacks: The JetPack releases that run on it, a prefix each.
        power_modes: Names as nvpmodel has them; their numbers differ, so they are read there.
    """

    title: str
    kind: Literal["jetson", "gpu", "cpu"]
    engines: tuple[str, ...]
    precisions: tuple[str, ...]
    rates: Rates
    bandwidth_gb_s: float
    memory_gib: float | None = None
    compute_capability: str | None = None
    marks: tuple[str, ...] = ()
    dla_cores: int = 0
    dla_int8_tops: float = 0.0
    jetpacks: tuple[str, ...] = ()
    power_modes: tuple[str, ...] = ()

    @property
    def shared_memory(self) -> bool:
        """Whether the system and its desktop live in the same memory."""
        return self.kind != "gpu"
