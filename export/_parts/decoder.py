"""Decoder-only language models behind the soft prompt: one module and one spec for all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import transformers

from vlmedge.errors import CheckpointError
from vlmedge.spec import Component, TensorSpec

from .._trace.hub_export import cache_argument, cache_of, cached, positions, state_pairs

EMBED_TOKENS = "language_model.model.embed_tokens.weight"
LM_HEAD = "language_model.lm_head.weight"
TIED = {LM_HEAD: EMBED_TOKENS}


class Decoder(torch.nn.Module):
    """A causal language model with its cache as inputs and outputs, for prefill and decode."""

    def __init__(self, config: Any, first_position: int = 0) -> None:
        super().__init__()
        self.language_model = transformers.AutoModelForCausalLM.from_config(config)
        # rows are looked up on the host, so the table is no part of the graph
        del self.language_model.model.embed_tokens
        self._first_position = first_position

    def forward(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, past: list[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Read [batch, tokens, width] and give logits [batch, tokens, vocabulary] and the cache."""
        return self._run(inputs_embeds, attention_mask, None, past)

    def _run(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        together: torch.Tensor | None,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Read on; `together`, bool [batch, 1, tokens, total], lets some look ahead."""
        tokens = inputs_embeds.shape[1]
        cache = cache_of(past)
        position_ids = positions(attention_mask, tokens) + self._first_position
        config = self.language_model.config
        kinds = set(getattr(config, "layer_types", None) or ())
        window = getattr(config, "sliding_window", None)
        asks, looks = _places(attention_mask, tokens)
        reaches = {"full_attention": looks <= asks}
        if window is not None:  # the last `window` tokens, the asking one included
            reaches["sliding_attention"] = (looks <= asks) & (asks - looks < window)
        masks = {}
        for kind, reach in reaches.items():
            allowed = reach[None, None]
            if together is not None:
                allowed = allowed | together
            masks[kind] = _scores(allowed & (attention_mask > 0)[:, None, None, :])
        # a model that names its layers' kinds chooses for each layer
        mask: Any = masks if kinds else masks[next(reversed(masks))]
        out = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=mask,
            position_ids=position_ids,
            use_cache=True,
            **cache_argument(self.language_model, cache),
        )
        return out.logits, cached(cache)


class PrefixDecoder(Decoder):
    """A decoder whose prompt's tokens see each other, also those that come later."""

    def forward(  # type: ignore[override]
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Read on; token_type_ids, int64 [batch, total], is 0 in the prompt and 1 after it."""
        prompt = token_type_ids == 0
        asks = prompt[:, -inputs_embeds.shape[1] :]
        together = asks[:, None, :, None] & prompt[:, None, None, :]
        return self._run(inputs_embeds, attention_mask, together, past)


def _places(attention_mask: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return who asks, [tokens, 1], and who is looked at, [1, total]."""
    total = attention_mask.shape[1]
    asks = torch.arange(tokens, device=attention_mask.device) + (total - tokens)
    return asks[:, None], torch.arange(total, device=attention_mask.device)[None, :]


def _scores(allowed: torch.Tensor) -> torch.Tensor:
    """Make what is added to the attention scores; written out for the engines' sake."""
    return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)


def describe_decoder(config: Any, *, prefix: bool = False) -> Component:
    """Name a decoder's inputs and outputs; its cache has as many heads as keys have."""
    layers = config.num_hidden_layers
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    state = state_pairs(layers)
    past = [TensorSpec(i, "float32", ("batch", heads, "past", width)) for _, i in state]
    present = [TensorSpec(o, "float32", ("batch", heads, "total", width)) for o, _ in state]
    types = [TensorSpec("token_type_ids", "int64", ("batch", "total"))] if prefix else []
    return Component(
        "decoder",
        inputs=(
            TensorSpec("inputs_embeds", "float32", ("batch", "tokens", config.hidden_size)),
            TensorSpec("attention_mask", "int64", ("batch", "total")),
            *types,
            *past,
        ),
        outputs=(
            TensorSpec("logits", "float32", ("batch", "tokens", config.vocab_size)),
            *present,
        ),
        state=state,
    )


def check_language_model(folder: object, config: Any, known: Iterable[str]) -> None:
    """Refuse a language model that a family does not export, by name."""
    if config.model_type not in known:
        raise CheckpointError(
            f"{folder}: its language model is {config.model_type!r}: "
            f"choose a checkpoint with {', '.join(known)}"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise CheckpointError(
            f"{folder}: its positions are {kind!r}, which depend on the text's length: "
            "choose a checkpoint with default, linear, llama3 or yarn"
        )
