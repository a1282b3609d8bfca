"""What language models bring that write after a Q-Former: OPT, T5's kind, LLaMA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers

from vlmedge.spec import Component, GenerateTask, TensorSpec

from .._checkpoint.weights import Weights
from .._tiny import VOCABULARY
from .._trace.hub_export import (
    cache_argument,
    cache_of,
    cached,
    causal_mask,
    positions,
    state_pairs,
)
from .._trace.torch_modules import Build
from . import decoder as _decoder
from . import qformer as _qformer
from . import t5 as _t5

OPT_TABLE = "language_model.model.decoder.embed_tokens.weight"


@dataclass(frozen=True)
class Writer:
    """Parts of an export that depend on the kind of language model.

    Attributes:
        components: Its graphs.
        builds: Their modules.
        task: How its texts are wired; the caller's text is all that it reads.
        room: Tokens of text that it takes.
        table: Name of the token embedding table.
        tied: As of `HubExport`.
        unused: As of `HubExport`.
    """

    components: tuple[Component, ...]
    builds: Mapping[str, Build]
    task: GenerateTask
    room: int
    table: str
    tied: Mapping[str, str]
    unused: tuple[str, ...] = ()


class OptDecoder(torch.nn.Module):
    """OPT with its cache as inputs and outputs: one graph for prefill and decode."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.language_model = transformers.AutoModelForCausalLM.from_config(config)
        # rows are looked up on the host, so the table is no part of the graph
        del self.language_model.model.decoder.embed_tokens

    def forward(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, past: list[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Read [batch, tokens, width] and give logits [batch, tokens, vocabulary] and the cache."""
        tokens = inputs_embeds.shape[1]
        cache = cache_of(past)
        out = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=causal_mask(attention_mask, tokens),
            position_ids=positions(attention_mask, tokens),
            use_cache=True,
            **cache_argument(self.language_model, cache),
        )
        return out.logits, cached(cache)


def describe_opt(config: Any) -> Component:
    """Name what OPT takes and gives."""
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    head_width = config.hidden_size // heads
    state = state_pairs(layers)
    past = [TensorSpec(i, "float32", ("batch", heads, "past", head_width)) for _, i in state]
    present = [TensorSpec(o, "float32", ("batch", heads, "total", head_width)) for o, _ in state]
    return Component(
        "decoder",
        inputs=(
            TensorSpec("inputs_embeds", "float32", ("batch", "tokens", config.word_embed_proj_dim)),
            TensorSpec("attention_mask", "int64", ("batch", "total")),
            *past,
        ),
        outputs=(
            TensorSpec("logits", "float32", ("batch", "tokens", config.vocab_size)),
            *present,
        ),
        state=state,
    )


def _task(config: Any, **more: Any) -> GenerateTask:
    return GenerateTask(
        encode=_qformer.ENCODE,
        soft_prompt="soft_prompt",
        decoder="decoder",
        prompt="{prompt}",
        image_token_id=config.image_token_index,
        **more,
    )


def opt(config: Any, weights: Weights) -> Writer:
    """Let OPT write."""
    text = config.text_config
    return Writer(
        (describe_opt(text),),
        {"decoder": lambda: OptDecoder(text)},
        _task(config),
        text.max_position_embeddings - config.num_query_tokens,
        OPT_TABLE,
        {"language_model.lm_head.weight": OPT_TABLE},
    )


def llama(config: Any, weights: Weights) -> Writer:
    """Let LLaMA write, or Vicuna, which is one."""
    text = config.text_config
    return Writer(
        (_decoder.describe_decoder(text),),
        {"decoder": lambda: _decoder.Decoder(text)},
        _task(config),
        text.max_position_embeddings - config.num_query_tokens,
        _decoder.EMBED_TOKENS,
        _decoder.TIED,
    )


def t5(config: Any, weights: Weights) -> Writer:
    """Let T5, Flan-T5 or mT5 write."""
    text = config.text_config
    table = _t5.embedding_table(weights)
    return Writer(
        _t5.components(text),
        {name: partial(build, text) for name, build in _t5.BUILDS.items()},
        _task(config, read=_t5.READ, start_ids=(text.decoder_start_token_id,)),
        _t5.room(text, config.num_query_tokens),
        table,
        _t5.tied(table),
        _t5.unused(table),
    )


def tiny_opt() -> dict[str, Any]:
    """Return the smallest config, of 2 layers."""
    return {
        "model_type": "opt",
        "hidden_size": 32,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "max_position_embeddings": 160,
        "word_embed_proj_dim": 32,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }
