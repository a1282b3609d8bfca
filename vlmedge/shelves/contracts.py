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
        """The component's inputs, outputs and state."""
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
            last: Whether only the last token's `logits` are needed; an engine that can returns
                these alone, [batch, 1, vocabulary].

        Returns:
            Every output that is not state, by name.
        """
        ...

    def reset(self) -> None:
        """Forget the state: the next call starts with an empty cache."""
        ...

    def reorder(self, rows: NDArray[np.int64]) -> None:
        """Replace state row i by the present row `rows[i]`; rows may repeat or drop out (beams)."""
        ...

    def rewind(self, tokens: int) -> None:
        """Keep the first `tokens` positions of state row 0, and drop the rest of the state."""
        ...

    def snapshot(self, tokens: int) -> dict[str, Array]:
        """Return a copy of the first `tokens` positions of state row 0, by input, to feed `run`."""
        ...

    def close(self) -> None:
        """Free the memory; the graph cannot run afterwards."""
        ...


class Engine(Protocol):
    """`ENGINE` in runtimes/<name>.py: it turns a component on disk into a `Graph`.

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
    """Statistics of a tensor over the calibration data.

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
        names: Names of the tensors; none when the scheme looks at weights alone.
        rows: Whether it needs `Stats.channels` and `Stats.rows` too.
    """

    names: tuple[str, ...] = ()
    rows: bool = True


@dataclass(frozen=True, slots=True)
class LayerError:
    """Effect of a scheme on one layer.

    Attributes:
        error: Quantization error of the layer's output on the calibration data, relative, 0..1.
        bits: Bits of each of its weights.
    """

    error: float
    bits: int


class Scheme(Protocol):
    """`SCHEME` in quantize/<name>.py: a portable graph in, a smaller portable graph out.

    The fields of one that is a `msgspec.Struct` are options, which a recipe may set.
    """

    @property
    def timed(self) -> bool:
        """Whether it is meant for speed on a CPU: a component that it makes slower stays float."""
        ...

    @property
    def table(self) -> str:
        """Type of the token embedding table: "float16", or "int8" with one scale a row."""
        ...

    def watch(self, component: Component, model: ir.Model) -> Watched:
        """Return the tensors whose statistics `rewrite` needs."""
        ...

    def rewrite(
        self,
        component: Component,
        model: ir.Model,
        stats: Mapping[str, Stats],
        keep: Mapping[str, str] = {},
    ) -> list[KeptLayer]:
        """Quantize one graph, in place.

        Initializers stay lazy: a weight is read and quantized when it is asked for, so memory
        stays at a few tensors.

        Args:
            component: Its spec.
            model: The float graph.
            stats: Statistics of the tensors that `watch` named.
            keep: Precision of layers that differ from the scheme, by the names of their weights:
                "float32" or a precision that the scheme knows.

        Returns:
            The layers that stay float for the scheme's own reasons.
        """
        ...

    def harms(
        self, component: Component, model: ir.Model, stats: Mapping[str, Stats]
    ) -> dict[str, LayerError]:
        """Return the error that quantizing each layer alone causes, by the name of its weight."""
        ...


class Slotter(Protocol):
    """`SLOTS` in quantize/<name>.py: gives a graph inputs for adapters set at run time."""

    def add(
        self, component: Component, model: ir.Model, rank: int, modules: Sequence[str] = ()
    ) -> tuple[AdapterSlot, ...]:
        """Give Linears of a float graph the inputs of an adapter, in place.

        Args:
            component: Its spec; the caller adds the returned slots to it.
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
        """The model's spec, which goes into the bundle for the runtime."""
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

        Graphs, tables and the reference all read the merged weights.

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
    """Dense tera-operations a second, a multiply-add being two; none: the device cannot.

    Attributes:
        fp32: Rate of the plain float units, not TF32.
        fp16: Rate with sums in float32, as TensorRT computes.
        int8: Rate of 8-bit integers.
        fp8: Rate of E4M3.
        fp4: Rate of NVFP4.
    """

    fp32: float
    fp16: float | None = None
    int8: float | None = None
    fp8: float | None = None
    fp4: float | None = None


@dataclass(frozen=True, slots=True)
class Device:
    """A value of `DEVICES` in devices/<product line>.py: a board, in the numbers that matter.

    Attributes:
        title: The board's common name.
        kind: Its class; only a gpu has memory apart from the system's.
        engines: Engines that run on it, the best first.
        precisions: Number formats that it computes in, or unpacks while it computes (int4).
        rates: Rates of the whole device; for a CPU, of one core.
        bandwidth_gb_s: Memory bandwidth, as published.
        memory_gib: Built-in memory; none: it differs from machine to machine.
        compute_capability: CUDA's compute capability, or none.
        marks: How it is recognized: module ids of a Jetson, names that nvidia-smi gives, CPU flags.
        dla_cores: Number of deep-learning accelerators.
        dla_int8_tops: Their rate together, dense.
        jetpacks: The JetPack releases that run on it, a prefix each.
        power_modes: Names of nvpmodel's modes; their numbers differ, so they are read there.
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
        """Whether the system and its desktop use the same memory."""
        return self.kind != "gpu"
