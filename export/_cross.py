"""Cross-attention whose keys and values are computed once: what BLIP's and T5's kind share.

picture or text -> encoder -> states -> cross_kv -> cross.{i}.key, cross.{i}.value
                                                         |  the same at every step
                      token, past_key_values -> decoder <-
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from vlmedge.spec import TensorSpec


def cross_specs(
    layers: int, heads: int, states: int | str, head_width: int
) -> tuple[TensorSpec, ...]:
    """Name the keys and values of every layer, float32 [batch, heads, states, width of a head]."""
    return tuple(
        TensorSpec(f"cross.{i}.{part}", "float32", ("batch", heads, states, head_width))
        for i in range(layers)
        for part in ("key", "value")
    )


def filled_cache(
    past: Sequence[torch.Tensor], cross: Sequence[torch.Tensor]
) -> EncoderDecoderCache:
    """Make a cache whose cross-attention is known, so that no layer computes it again."""
    caches = []
    for tensors in (past, cross):
        cache = DynamicCache()
        for layer, (key, value) in enumerate(zip(tensors[::2], tensors[1::2], strict=True)):
            cache.update(key, value, layer)
        caches.append(cache)
    both = EncoderDecoderCache(*caches)
    both.is_updated = dict.fromkeys(range(len(cross) // 2), True)
    return both


def nest(root: torch.nn.Module, path: str, leaf: torch.nn.Module) -> None:
    """Put a module where a checkpoint's names have it: root.a.b.c for the path "a.b.c"."""
    *folders, last = path.split(".")
    for folder in folders:
        if not hasattr(root, folder):
            root.add_module(folder, torch.nn.Module())
        root = root.get_submodule(folder)
    root.add_module(last, leaf)


def split_heads(states: torch.Tensor, heads: int) -> torch.Tensor:
    """Cut float [batch, states, width] into [batch, heads, states, width of a head]."""
    batch, count, width = states.shape
    return states.reshape(batch, count, heads, width // heads).transpose(1, 2)


def padding_mask(attention_mask: torch.Tensor) -> torch.Tensor:
    """Turn int64 [batch, states] into what is added to scores, float32 [batch, 1, 1, states]."""
    lowest = torch.finfo(torch.float32).min
    return torch.where(attention_mask[:, None, None, :] > 0, 0.0, lowest)
