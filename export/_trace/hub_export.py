"""What every family shares once it has named its components: trace, bind, list, refer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import tokenizers
import torch
from transformers.cache_utils import DynamicCache
from transformers.pytorch_utils import Conv1D

from vlmedge.arrays import Array
from vlmedge.bundle.embedding_table import ROWS_AT_ONCE, EmbeddingRows, ReadRows
from vlmedge.bundle.weights import RowReader, row_reader
from vlmedge.lora.adapter import Weighted
from vlmedge.lora.merge import Merged
from vlmedge.shelves.contracts import Graph
from vlmedge.spec import EmbeddingTable, ModelSpec

from .._checkpoint.folder import TOKENIZER, check_weights, goldens
from .._checkpoint.weights import Weights
from .clean import bind, clean
from .pool_early import read_one_token
from .torch_modules import Build, TorchGraph, build_on_meta
from .trace import trace

EMBEDDINGS = "assets/embed_tokens.bin"
IGNORED = (
    ".position_ids",
    ".inv_freq",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    ".relative_position_index",
    ".relative_coords_table",
)


@dataclass(frozen=True)
class HubExport:
    """A checkpoint in Hugging Face layout, opened for export.

    Attributes:
        folder: Where it lies.
        spec: The spec, for the runtime.
        builds: Makes each component's torch module; its parameters carry the checkpoint's names.
        weights: The tensors on disk.
        tokenizer: From `read_tokenizer`, or none for a model without text.
        tied: Weights that may be absent, and the one that stands for them.
        embed_tokens: Name of the token embedding table that the host reads, or none.
        extra: Weights that are read otherwise (logit_scale), by name.
        unused: How names begin that no component needs, such as layers above the chosen one.
        embed_scale: Multiplies the rows of the table that the host reads.
        files: Further files of the bundle, by path inside it.
    """

    folder: Path
    spec: ModelSpec
    builds: Mapping[str, Build]
    weights: Weights
    tokenizer: tokenizers.Tokenizer | None = None
    tied: Mapping[str, str] = field(default_factory=dict)
    embed_tokens: str | None = None
    extra: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    embed_scale: float = 1.0
    files: Mapping[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse weights that do not fit the modules before any work is done."""
        expected: dict[str, tuple[int, ...]] = {}
        for build in self.builds.values():
            module, _ = build_on_meta(build)
            expected |= {name: tuple(p.shape) for name, p in module.named_parameters()}
        shapes = self.weights.shapes()
        found = {n: shape for n, shape in shapes.items() if not n.startswith(self.unused)}
        for name, source in self.tied.items():
            if name in expected and name not in found and source in shapes:
                found[name] = shapes[source]
        for name in (*self.extra, *([self.embed_tokens] if self.embed_tokens else [])):
            expected.setdefault(name, found.get(name, ()))
        check_weights(found, expected, IGNORED)

    def merged(self, adapters: Sequence[Weighted]) -> HubExport:
        """Return this checkpoint with LoRA adapters in its weights."""
        turned = set()  # stored [in, out], which only the module's class tells
        for build in self.builds.values():
            module, _ = build_on_meta(build)
            found = ((n, m) for n, m in module.named_modules() if isinstance(m, Conv1D))
            turned |= {f"{name}.weight" for name, _ in found}
        return replace(self, weights=Merged(self.weights, adapters, turned, self.tied))

    def read(self, name: str) -> Array:
        """Read a weight as float32; a tied one that is absent is its source."""
        return self.weights.read(self._stored(name))

    def _stored(self, name: str) -> str:
        tied = name in self.tied and name not in self.weights.shapes()
        return self.tied[name] if tied else name

    def trace(self, component: str) -> ir.Model:
        """Trace one component and bind its weights lazily."""
        spec = self.spec.component(component)
        model, buffers = trace(spec, self.builds[component])
        transposed = clean(model)
        read_one_token(model)
        bind(model, self.read, self._rows_of, buffers, transposed)
        return model

    def assets(self) -> Iterator[tuple[str, Callable[[Path], None]]]:
        """Yield what the bundle holds beside graphs."""
        if self.tokenizer is not None:
            tokenizer = self.tokenizer
            yield TOKENIZER, lambda file: tokenizer.save(str(file))
            yield "assets/goldens.json", lambda file: _write(file, goldens(tokenizer))
        if self.embed_tokens is not None:
            yield EMBEDDINGS, self._write_embeddings
        for name, data in self.files.items():
            yield name, partial(_write, data=data)

    def embeddings(self) -> EmbeddingTable | None:
        """Describe the embedding table, in the precision that it has on disk."""
        if self.embed_tokens is None:
            return None
        vocabulary, width = self.weights.shapes()[self.embed_tokens]
        return EmbeddingTable(EMBEDDINGS, 0, self._table_dtype(), (vocabulary, width))

    def rows(self) -> EmbeddingRows | None:
        """Read the token embedding table, in the precision that it has on disk."""
        described = self.embeddings()
        if described is None:
            return None
        return EmbeddingRows(ReadRows(self._read_rows(), described.shape))

    def open(self, component: str, dtype: str = "float32") -> Graph:
        """Load one component in PyTorch, as the gate's and the benchmark's reference."""
        spec = self.spec.component(component)
        return TorchGraph(spec, self.builds[component], self.read, getattr(torch, dtype))

    def _table_dtype(self) -> str:
        assert self.embed_tokens is not None
        half = self.weights.dtype(self.embed_tokens) == "float16" and self.embed_scale == 1.0
        return "float16" if half else "float32"  # numpy has no bfloat16; float32 holds it exactly

    def _rows_of(self, name: str) -> RowReader:
        return row_reader(self.weights, self._stored(name))

    def _read_rows(self) -> RowReader:
        assert self.embed_tokens is not None
        read = row_reader(self.weights, self.embed_tokens)
        dtype, scale = self._table_dtype(), np.float32(self.embed_scale)
        return lambda start, stop: (read(start, stop) * scale).astype(dtype, copy=False)

    def _write_embeddings(self, file: Path) -> None:
        assert self.embed_tokens is not None
        rows, read = self.weights.shapes()[self.embed_tokens][0], self._read_rows()
        with file.open("wb") as stream:  # a large vocabulary's table is gigabytes
            for start in range(0, rows, ROWS_AT_ONCE):
                stream.write(np.ascontiguousarray(read(start, start + ROWS_AT_ONCE)).data)


def cache_argument(module: torch.nn.Module, cache: object) -> dict[str, Any]:
    """Name a cache as the installed transformers does: `cache` from 5.24 on."""
    known = inspect.signature(module.forward).parameters
    return {"cache" if "cache" in known else "past_key_values": cache}


def cache_of(past: Sequence[torch.Tensor]) -> DynamicCache:
    """Fill a cache with keys and values of its layers, in turn, [batch, heads, past, width]."""
    cache = DynamicCache()
    for layer, (key, value) in enumerate(zip(past[::2], past[1::2], strict=True)):
        cache.update(key, value, layer)
    return cache


def cached(cache: DynamicCache) -> list[torch.Tensor]:
    """Return keys and values of a cache's layers, in turn, [batch, heads, total, width]."""
    layers: Any = cache.layers
    return [tensor for layer in layers for tensor in (layer.keys, layer.values)]


def state_pairs(layers: int) -> tuple[tuple[str, str], ...]:
    """Pair each present.i.key with the past_key_values.i.key that it becomes."""
    return tuple(
        (f"present.{i}.{part}", f"past_key_values.{i}.{part}")
        for i in range(layers)
        for part in ("key", "value")
    )


def positions(attention_mask: torch.Tensor, tokens: int) -> torch.Tensor:
    """Count the last tokens' positions, from 0, over real tokens only: left padding shifts none.

    Args:
        attention_mask: int64 [batch, total], 1 for a token and 0 for padding.
        tokens: How many of the last positions are wanted.

    Returns:
        int64 [batch, tokens].
    """
    return (attention_mask.cumsum(1) * attention_mask - 1).clamp(min=0)[:, -tokens:]


def causal_mask(attention_mask: torch.Tensor, tokens: int) -> torch.Tensor:
    """Turn a padding mask into what is added to the attention scores.

    Written out, since transformers' own masks trace into GatherND, which few engines love.

    Args:
        attention_mask: int64 [batch, total], 1 for a token and 0 for padding.
        tokens: How many of the last positions ask.

    Returns:
        float32 [batch, 1, tokens, total]: 0 where a position may look, else the lowest float.
    """
    total = attention_mask.shape[1]
    asks = torch.arange(tokens, device=attention_mask.device) + (total - tokens)
    looks = torch.arange(total, device=attention_mask.device)
    causal = looks[None, :] <= asks[:, None]  # [tokens, total]
    allowed = causal[None, None] & (attention_mask[:, None, None, :] > 0)
    lowest = torch.finfo(torch.float32).min
    return torch.where(allowed, 0.0, lowest)


def _write(file: Path, data: bytes) -> None:
    file.write_bytes(data)
