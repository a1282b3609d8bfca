"""BLIP-2 (Li et al. 2023, arXiv 2301.12597) that writes with OPT, Flan-T5 or mT5 (mBLIP)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers
from transformers.cache_utils import DynamicCache

from vlmedge.spec import Component, GenerateTask, ModelSpec, TensorSpec, TextFrontEnd

from . import _qformer, _t5
from ._checkpoint import (
    TOKENIZER,
    read_config,
    read_generation,
    read_image_front_end,
    read_tokenizer,
)
from ._decoder import check_language_model
from ._family import HubExport, cache_argument, causal_mask, state_pairs
from ._tiny import VOCABULARY, save
from ._torch import Build
from ._weights import Weights, open_weights

ARCHITECTURES = ("Blip2ForConditionalGeneration",)
ALIASES = {
    "blip2": "Salesforce/blip2-opt-2.7b",
    "blip2-opt-6.7b": "Salesforce/blip2-opt-6.7b",
    "blip2-flan-t5-xl": "Salesforce/blip2-flan-t5-xl",
    "blip2-flan-t5-xxl": "Salesforce/blip2-flan-t5-xxl",
    "mblip": "Gregor/mblip-mt0-xl",
}
TINY = ("blip2", "blip2-flan-t5", "blip2-mt5")

EMBED_TOKENS = "language_model.model.decoder.embed_tokens.weight"


class Decoder(torch.nn.Module):
    """OPT with its cache as inputs and outputs: one graph for prefill and decode."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.language_model = transformers.Blip2ForConditionalGeneration(config).language_model
        # rows are looked up on the host, so the table is no part of the graph
        del self.language_model.model.decoder.embed_tokens

    def forward(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, past: list[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Read [batch, tokens, width] and give logits [batch, tokens, vocabulary] and the cache."""
        tokens = inputs_embeds.shape[1]
        cache = DynamicCache()
        for layer, (key, value) in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(key, value, layer)
        # OPT counts positions over real tokens only, so left padding does not shift them
        position_ids = (attention_mask.cumsum(1) * attention_mask - 1)[:, -tokens:]
        out = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=causal_mask(attention_mask, tokens),
            position_ids=position_ids,
            use_cache=True,
            **cache_argument(self.language_model, cache),
        )
        layers: Any = cache.layers
        present = [t for layer in layers for t in (layer.keys, layer.values)]
        return out.logits, present


def describe_decoder(config: Any) -> Component:
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


@dataclass(frozen=True)
class _Writer:
    """What a language model of one kind brings.

    Attributes:
        components: Its graphs.
        builds: Their modules.
        caption: How its texts are wired.
        question: Its template of questions (section 4.1 of the paper).
        room: Tokens of text that it takes.
        table: Name of the token embedding table.
        tied: As of `HubExport`.
        unused: As of `HubExport`.
    """

    components: tuple[Component, ...]
    builds: Mapping[str, Build]
    caption: GenerateTask
    question: str
    room: int
    table: str
    tied: Mapping[str, str]
    unused: tuple[str, ...] = ()


def _opt(config: Any, weights: Weights) -> _Writer:
    text = config.text_config
    return _Writer(
        (describe_decoder(text),),
        {"decoder": lambda: Decoder(config)},
        GenerateTask(
            encode=_qformer.ENCODE,
            soft_prompt="soft_prompt",
            decoder="decoder",
            prompt="{prompt}",
            image_token_id=config.image_token_index,
        ),
        "Question: {question} Answer:",
        text.max_position_embeddings - config.num_query_tokens,
        EMBED_TOKENS,
        {"language_model.lm_head.weight": EMBED_TOKENS},
    )


def _t5_writer(config: Any, weights: Weights) -> _Writer:
    text = config.text_config
    table = _t5.embedding_table(weights)
    return _Writer(
        _t5.components(text),
        {name: partial(build, text) for name, build in _t5.BUILDS.items()},
        GenerateTask(
            encode=_qformer.ENCODE,
            soft_prompt="soft_prompt",
            decoder="decoder",
            prompt="{prompt}",
            image_token_id=config.image_token_index,
            read=_t5.READ,
            start_ids=(text.decoder_start_token_id,),
        ),
        "Question: {question} Short answer:",
        _t5.room(text, config.num_query_tokens),
        table,
        _t5.tied(table),
        _t5.unused(table),
    )


WRITERS = {"opt": _opt, **dict.fromkeys(_t5.MODELS, _t5_writer)}


class Blip2:
    """BLIP-2 checkpoints in transformers' layout."""

    def open(self, folder: Path, *, allow_pickle: bool = False) -> HubExport:
        """Read a checkpoint folder; no weights yet."""
        config = read_config(folder, needed=("text_config", "vision_config", "qformer_config"))
        check_language_model(folder, config.text_config, WRITERS)
        weights = open_weights(folder, allow_pickle=allow_pickle)
        tokenizer = read_tokenizer(folder)  # before any work: it may be refused
        writer = WRITERS[config.text_config.model_type](config, weights)
        generation = read_generation(folder, config.text_config)
        spec = ModelSpec(
            family="blip2",
            components=(*_qformer.components(config), *writer.components),
            tasks={
                "caption": writer.caption,
                "ask": msgspec.structs.replace(writer.caption, prompt=writer.question),
            },
            image=read_image_front_end(folder, _qformer.default_image(config)),
            text=TextFrontEnd(TOKENIZER, writer.room, generation.pad_id, "left"),
            generation=generation,
        )
        seeing = {name: partial(build, config) for name, build in _qformer.BUILDS.items()}
        return HubExport(
            folder,
            spec,
            {**seeing, **writer.builds},
            weights,
            tokenizer,
            writer.tied,
            writer.table,
            unused=writer.unused,
        )

    def tiny(self, name: str, folder: Path) -> transformers.Blip2ForConditionalGeneration:
        """Write a random BLIP-2 of 2, 4 and 2 layers, with the language model of one kind."""
        text = TEXTS[name]()
        config = transformers.Blip2Config(
            **_qformer.tiny_parts(VOCABULARY),
            text_config=text,
            image_token_index=4,
        )
        model = transformers.Blip2ForConditionalGeneration(config)
        if name == "blip2-flan-t5":
            _t5.untie(model.language_model)
        images = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
        save(
            model,
            folder,
            bos="</s>",
            template="</s> $A" if text["model_type"] == "opt" else "$A </s>",
            image_processor=images,
            processor=lambda tokenizer: transformers.Blip2Processor(images, tokenizer, 6),
        )
        return model


def _tiny_opt() -> dict[str, Any]:
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


TEXTS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "blip2": _tiny_opt,
    "blip2-flan-t5": partial(_t5.tiny_config, "t5"),
    "blip2-mt5": partial(_t5.tiny_config, "mt5"),
}

FAMILY = Blip2()
