"""Cross-attention whose keys and values are computed once: what BLIP's and T5's kind share.

picture or text -> encoder -> states -> cross_kv -> cross.{i}.key, cross.{i}.value
                                                         |  the same at every step
                      token, past_key_values -> decoder <-
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.cache_utils import EncoderDecoderCache

from vlmedge.spec import Component, TensorSpec

from .._trace.hub_export import cache_of, state_pairs


def cross_specs(
    layers: int, heads: int, states: int | str, head_width: int
) -> tuple[TensorSpec, ...]:
    """Name the keys and values of every layer, float32 [batch, heads, states, width of a head]."""
    return tuple(
        TensorSpec(f"cross.{i}.{part}", "float32", ("batch", heads, states, head_width))
        for i in range(layers)
        for part in ("key", "value")
    )


def encoder_decoder(
    width: int, heads: int, layers: int, head_width: int, vocabulary: int, *, places: bool = False
) -> tuple[Component, ...]:
    """Name the graphs of an encoder and a decoder behind a soft prompt.

    Args:
        width: Width of the states of both.
        heads: Heads of the decoder's keys and values.
        layers: Layers of the decoder.
        head_width: Width of the decoder's heads.
        vocabulary: How many tokens it chooses from.
        places: Whether the decoder takes position_ids.
    """
    position_ids = [TensorSpec("position_ids", "int64", ("batch", "tokens"))] if places else []
    states = TensorSpec("text_states", "float32", ("batch", "states", width))
    cross, state = cross_specs(layers, heads, "states", head_width), state_pairs(layers)
    past = [TensorSpec(i, "float32", ("batch", heads, "past", head_width)) for _, i in state]
    present = [TensorSpec(o, "float32", ("batch", heads, "total", head_width)) for o, _ in state]
    embeds = TensorSpec("inputs_embeds", "float32", ("batch", "tokens", width))
    return (
        Component(
            "text_encoder",
            inputs=(embeds, TensorSpec("attention_mask", "int64", ("batch", "tokens"))),
            outputs=(TensorSpec("text_states", "float32", ("batch", "tokens", width)),),
        ),
        Component("cross_kv", inputs=(states,), outputs=cross),
        Component(
            "decoder",
            inputs=(
                embeds,
                TensorSpec("attention_mask", "int64", ("batch", "total")),
                *position_ids,
                TensorSpec("encoder_attention_mask", "int64", ("batch", "states")),
                *cross,
                *past,
            ),
            outputs=(
                TensorSpec("logits", "float32", ("batch", "tokens", vocabulary)),
                *present,
            ),
            state=state,
        ),
    )


class CrossKV(torch.nn.Module):
    """A decoder's keys and values of what it looks at, for every layer."""

    def __init__(
        self,
        path: str,
        parts: tuple[str, str],
        layers: int,
        heads: int,
        widths: tuple[int, int],
        *,
        bias: bool = True,
    ) -> None:
        """Make the Linears under the checkpoint's names.

        Args:
            path: Path of one Linear: `path.format(layer, part)`.
            parts: The checkpoint's names for keys and values.
            layers: Layers of the decoder.
            heads: Heads of a layer.
            widths: Width of the rows that are looked at, and of the keys of all heads together.
            bias: Whether the Linears have one.
        """
        super().__init__()
        self._heads = heads
        self._paths = [path.format(layer, part) for layer in range(layers) for part in parts]
        for each in self._paths:
            nest(self, each, torch.nn.Linear(*widths, bias=bias))

    def forward(self, states: torch.Tensor) -> list[torch.Tensor]:
        """Map [batch, states, width] to 2 x layers of [batch, heads, states, width of a head]."""
        return [split_heads(self.get_submodule(path)(states), self._heads) for path in self._paths]


def filled_cache(
    past: Sequence[torch.Tensor], cross: Sequence[torch.Tensor]
) -> EncoderDecoderCache:
    """Make a cache whose cross-attention is known, so that no layer computes it again."""
    both = EncoderDecoderCache(cache_of(past), cache_of(cross))
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
