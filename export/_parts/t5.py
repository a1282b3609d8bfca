"""T5 (Raffel et al. 2020, arXiv 1910.10683), T5 1.1, Flan-T5 and mT5: an encoder and a decoder.

soft prompt, text -> text_encoder -> text_states -> cross_kv -> cross.{i}.key, cross.{i}.value
                                                                    |  the same at every step
                               token, past_key_values -> decoder <--

Written out rather than taken from transformers, whose stack adds the positions' bias and the mask
to the scores one after the other, and rounds a logarithm in the graph. Parameters carry T5's names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers.activations import ACT2FN

from vlmedge.errors import CheckpointError
from vlmedge.spec import Component

from .._checkpoint.weights import Weights
from .._tiny import VOCABULARY
from .._trace.hub_export import causal_mask
from .cross_attention import CrossKV, encoder_decoder, nest, padding_mask, split_heads

MODELS = ("t5", "mt5")
POSITIONS = 512  # that they were trained with; their positions have no end
READ = ("text_encoder", "cross_kv")
ROOT = "language_model"

TABLES = tuple(
    f"{ROOT}.{name}.weight" for name in ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
)
LM_HEAD = f"{ROOT}.lm_head.weight"
CROSS = ROOT + ".decoder.block.{}.layer.1.EncDecAttention.{}"
# old checkpoints have it, and nobody reads it
LEFT = f"{ROOT}.decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


class Norm(torch.nn.Module):
    """Scale to a root mean square of 1; nothing is subtracted and nothing added."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(config.d_model))
        self._epsilon = config.layer_norm_epsilon

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map [batch, tokens, width] to the same."""
        square = states.float().pow(2).mean(-1, keepdim=True)
        scaled = states * torch.rsqrt(square + self._epsilon)
        return self.weight * scaled.to(self.weight.dtype)


class Attention(torch.nn.Module):
    """Attention whose scores are not divided by anything: T5's initialisation takes care of it."""

    def __init__(self, config: Any, *, crosses: bool = False) -> None:
        super().__init__()
        width, inner = config.d_model, config.num_heads * config.d_kv
        self._heads = config.num_heads
        self.q = torch.nn.Linear(width, inner, bias=False)
        if not crosses:  # else its keys and values come from cross_kv
            self.k = torch.nn.Linear(width, inner, bias=False)
            self.v = torch.nn.Linear(width, inner, bias=False)
        self.o = torch.nn.Linear(inner, width, bias=False)

    def seen(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map [batch, tokens, width] to keys and values [batch, heads, tokens, head width]."""
        return split_heads(self.k(states), self._heads), split_heads(self.v(states), self._heads)

    def forward(
        self, states: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        """Look at keys and values; bias, [batch or 1, heads or 1, tokens, keys], is added."""
        query = split_heads(self.q(states), self._heads)
        scores = torch.matmul(query, key.transpose(2, 3)) + bias
        mixed = torch.matmul(torch.softmax(scores, dim=-1), value).transpose(1, 2)
        batch, tokens = states.shape[:2]
        found: torch.Tensor = self.o(mixed.reshape(batch, tokens, self.o.in_features))
        return found


class FeedForward(torch.nn.Module):
    """Two layers, or since T5 1.1 three, of which one opens and shuts what another gives."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self._act = ACT2FN[config.dense_act_fn]
        self._inner = ("wi_0", "wi_1") if config.is_gated_act else ("wi",)
        for name in self._inner:
            self.add_module(name, torch.nn.Linear(config.d_model, config.d_ff, bias=False))
        self.wo = torch.nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map [batch, tokens, width] to the same."""
        first, *second = (self.get_submodule(name)(states) for name in self._inner)
        inner = self._act(first)
        found: torch.Tensor = self.wo(inner * second[0] if second else inner)
        return found


class Layer(torch.nn.Module):
    """A norm and a sublayer, whose result is added to the norm's input."""

    def __init__(self, config: Any, name: str, part: torch.nn.Module) -> None:
        super().__init__()
        self.add_module(name, part)
        self.layer_norm = Norm(config)
        self._name = name

    @property
    def part(self) -> Any:
        """The sublayer that reads the norm."""
        return self.get_submodule(self._name)


class Block(torch.nn.Module):
    """Self-attention, in a decoder cross-attention, and the MLP."""

    def __init__(self, config: Any, *, first: bool, decodes: bool) -> None:
        super().__init__()
        attention = Attention(config)
        if first:  # all layers share its positions
            attention.relative_attention_bias = torch.nn.Embedding(
                config.relative_attention_num_buckets, config.num_heads
            )
        parts: dict[str, torch.nn.Module] = {"SelfAttention": attention}
        if decodes:
            parts["EncDecAttention"] = Attention(config, crosses=True)
        parts["DenseReluDense"] = FeedForward(config)
        self.layer = torch.nn.ModuleList(Layer(config, *named) for named in parts.items())

    def forward(
        self,
        states: torch.Tensor,
        bias: torch.Tensor,
        past: tuple[torch.Tensor, ...] = (),
        cross: tuple[torch.Tensor, ...] = (),
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Map [batch, tokens, width] to the same, and to the layer's keys and values.

        Args:
            states: Output of the layer below.
            bias: Added to the scores of self-attention.
            past: Keys and values of the tokens before, or none.
            cross: Keys, values and what is added to their scores, or none.
        """
        attends: Any = self.layer[0]
        normed = attends.layer_norm(states)
        key, value = attends.part.seen(normed)
        if past:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        states = states + attends.part(normed, key, value, bias)
        rest: Any = self.layer[1:]
        for layer in rest:
            given = cross if len(self.layer) == 3 and layer is self.layer[1] else ()
            states = states + layer.part(layer.layer_norm(states), *given)
        return states, key, value


class Stack(torch.nn.Module):
    """The blocks of one side, and the positions that they share."""

    buckets: torch.Tensor

    def __init__(self, config: Any, *, decodes: bool) -> None:
        super().__init__()
        layers = config.num_decoder_layers if decodes else config.num_layers
        self.block = torch.nn.ModuleList(
            Block(config, first=i == 0, decodes=decodes) for i in range(layers)
        )
        self.final_layer_norm = Norm(config)
        self._reach = config.relative_attention_max_distance
        table = buckets(config.relative_attention_num_buckets, self._reach, both=not decodes)
        self.register_buffer("buckets", table, persistent=False)

    def positions(self, tokens: int, total: int) -> torch.Tensor:
        """Return the bias that distance adds to scores: the last `tokens` positions, of `total`.

        Places are counted from the end, which a cache does not move, so that nothing has to know
        how long it is. float32 [1, heads, tokens, total].
        """
        first: Any = self.block[0]
        learnt = first.layer[0].part.relative_attention_bias.weight  # [buckets, heads]
        device = self.buckets.device
        asks = torch.arange(tokens, device=device)[:, None] + (total - tokens)
        looks = torch.arange(total, device=device)[None, :]
        distance = (looks - asks).clamp(-self._reach, self._reach)
        bias: torch.Tensor = learnt.t()[:, self.buckets[distance + self._reach]]
        return bias[None]


def buckets(count: int, reach: int, *, both: bool) -> torch.Tensor:
    """Sort distances into the buckets that a bias was learnt for.

    Half of the buckets are for one distance each, the others grow with the logarithm up to `reach`.
    Source: T5's mesh_tensorflow, transformer_layers.py; its float32 logarithm is rounded down, so
    it is taken here and once, where two libraries could differ at a bucket's edge.

    Args:
        count: How many there are.
        reach: The distance from which on all are one.
        both: Whether positions ahead have buckets of their own; else they share bucket 0.

    Returns:
        int64 [2 * reach + 1]: of the places from `reach` before to `reach` ahead.
    """
    distance = torch.arange(-reach, reach + 1)
    side = count // 2 if both else count
    ahead = (distance > 0) * side if both else torch.zeros_like(distance)
    away = distance.abs() if both else (-distance).clamp(min=0)
    exact = side // 2
    grown = torch.log(away.float().clamp(min=1) / exact) / math.log(reach / exact)
    far = (exact + (grown * (side - exact)).long()).clamp(max=side - 1)
    return ahead + torch.where(away < exact, away, far)


class TextEncoder(torch.nn.Module):
    """T5's encoder, of embeddings: whatever stands among them."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        nest(self, f"{ROOT}.encoder", Stack(config, decodes=False))

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Map [batch, tokens, width] and int64 [batch, tokens] to text_states."""
        stack: Any = self.get_submodule(f"{ROOT}.encoder")
        tokens = inputs_embeds.shape[1]
        bias = stack.positions(tokens, tokens) + padding_mask(attention_mask)
        states = inputs_embeds
        for block in stack.block:
            states, _, _ = block(states, bias)
        found: torch.Tensor = stack.final_layer_norm(states)
        return found


def cross_kv(config: Any) -> CrossKV:
    """Make what gives the decoder its keys and values of the encoder's states."""
    widths, layers = (config.d_model, config.num_heads * config.d_kv), config.num_decoder_layers
    return CrossKV(CROSS, ("k", "v"), layers, config.num_heads, widths, bias=False)


class Decoder(torch.nn.Module):
    """T5's decoder with its cache, and what it looks at, as inputs."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        nest(self, f"{ROOT}.decoder", Stack(config, decodes=True))
        head = torch.nn.Linear(config.d_model, config.vocab_size, bias=False)
        nest(self, LM_HEAD.removesuffix(".weight"), head)
        # where the head was trained as the embedding table, its input has another length
        scaled = config.model_type == "t5" and config.scale_decoder_outputs  # mT5 never is
        self._scale = config.d_model**-0.5 if scaled else 1.0

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
        cross: list[torch.Tensor],
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Read [batch, tokens, width] and give logits [batch, tokens, vocabulary] and the cache."""
        language_model: Any = self.get_submodule(ROOT)
        stack, tokens = language_model.decoder, inputs_embeds.shape[1]
        bias = stack.positions(tokens, attention_mask.shape[1]) + causal_mask(
            attention_mask, tokens
        )
        looked_at = padding_mask(encoder_attention_mask)
        states, present = inputs_embeds, []
        for i, block in enumerate(stack.block):
            pair = slice(2 * i, 2 * i + 2)
            states, key, value = block(states, bias, tuple(past[pair]), (*cross[pair], looked_at))
            present += [key, value]
        states = stack.final_layer_norm(states)
        return language_model.lm_head(states * self._scale), present


BUILDS = {"text_encoder": TextEncoder, "cross_kv": cross_kv, "decoder": Decoder}


def components(config: Any) -> tuple[Component, ...]:
    """Name the graphs of a T5 behind a soft prompt."""
    return encoder_decoder(
        config.d_model,
        config.num_heads,
        config.num_decoder_layers,
        config.d_kv,
        config.vocab_size,
    )


def room(config: Any, soft: int) -> int:
    """Return how many tokens of text a T5 takes beside a soft prompt of `soft` rows."""
    return max(getattr(config, "n_positions", POSITIONS) - soft, 1)


def embedding_table(weights: Weights) -> str:
    """Name the one table of both sides, and refuse sides that have a table each.

    transformers writes one of three names, or all, for what T5 has always had as one tensor.
    """
    shapes = weights.shapes()
    found = [name for name in TABLES if name in shapes]
    if not found:
        raise CheckpointError(f"weight {TABLES[0]!r} is missing: download the weights again")
    first, *others = found
    for name in others:
        if shapes[name] != shapes[first] or not np.array_equal(
            weights.read(name), weights.read(first)
        ):
            raise CheckpointError(
                f"weight {name!r} differs from {first!r}: T5's encoder and decoder share one "
                "table: convert the checkpoint again"
            )
    return first


def unused(table: str) -> tuple[str, ...]:
    """Name what a checkpoint may hold beside the one table."""
    return (LEFT, *(name for name in TABLES if name != table))


def tied(table: str) -> Mapping[str, str]:
    """Return what stands for a head that is not in the checkpoint; one that is there counts.

    transformers 5 calls every T5 tied, also Flan-T5 and mT5, whose heads are their own.
    """
    return {LM_HEAD: table}


def tiny_config(model_type: str) -> dict[str, Any]:
    """Return the smallest config, of 2 and 2 layers; T5's logits are scaled, mT5's are not."""
    return {
        "model_type": model_type,
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        # so few and so near that every one of them is met
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20,
        "feed_forward_proj": "gated-gelu",
        "decoder_start_token_id": 1,
        "pad_token_id": 1,
        "eos_token_id": 2,
    }


def untie(model: Any) -> None:
    """Give the head of one of transformers' models weights of its own, as real checkpoints do."""
    model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
