"""BLIP-2 (Li et al. 2023, arXiv 2301.12597) with an OPT decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers
from transformers.cache_utils import DynamicCache

from vlmedge.errors import CheckpointError
from vlmedge.spec import (
    Component,
    GenerateTask,
    Generation,
    ImageFrontEnd,
    ModelSpec,
    TensorSpec,
    TextFrontEnd,
)

from ._checkpoint import (
    CLIP_MEAN,
    CLIP_STD,
    TOKENIZER,
    read_config,
    read_generation,
    read_image_front_end,
    read_tokenizer,
)
from ._family import HubExport, cache_argument, causal_mask, state_pairs
from ._tiny import VOCABULARY, save
from ._weights import open_weights

ARCHITECTURES = ("Blip2ForConditionalGeneration",)
ALIASES = {
    "blip2": "Salesforce/blip2-opt-2.7b",
    "blip2-opt-6.7b": "Salesforce/blip2-opt-6.7b",
}
TINY = ("blip2",)

EMBED_TOKENS = "language_model.model.decoder.embed_tokens.weight"
ENCODE = ("vision_encoder", "qformer", "projector")


class VisionEncoder(torch.nn.Module):
    """ViT-g: every token, after the last norm."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.vision_model = transformers.Blip2ForConditionalGeneration(config).vision_model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map float [batch, 3, height, width] to image_embeds [batch, patches + 1, width]."""
        embeds: torch.Tensor = self.vision_model(pixel_values=pixel_values).last_hidden_state
        return embeds


class QFormer(torch.nn.Module):
    """The learned queries look at the image."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        model = transformers.Blip2ForConditionalGeneration(config)
        self.query_tokens = model.query_tokens
        self.qformer = model.qformer

    def forward(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """Map [batch, patches + 1, width] to query_embeds [batch, queries, width]."""
        queries = self.query_tokens.expand(image_embeds.shape[0], -1, -1)
        out = self.qformer(query_embeds=queries, encoder_hidden_states=image_embeds)
        embeds: torch.Tensor = out.last_hidden_state
        return embeds


class Projector(torch.nn.Module):
    """From the Q-Former's width to the language model's."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        model = transformers.Blip2ForConditionalGeneration(config)
        self.language_projection = model.language_projection

    def forward(self, query_embeds: torch.Tensor) -> torch.Tensor:
        """Map [batch, queries, width] to soft_prompt [batch, queries, width of the LM]."""
        soft: torch.Tensor = self.language_projection(query_embeds)
        return soft


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


def describe(config: Any, image: ImageFrontEnd, generation: Generation) -> ModelSpec:
    """Name the graphs and tasks of one checkpoint, with its numbers."""
    vision, text = config.vision_config, config.text_config
    patches = (vision.image_size // vision.patch_size) ** 2
    pixels = ("batch", 3, vision.image_size, vision.image_size)
    seen = TensorSpec("image_embeds", "float32", ("batch", patches + 1, vision.hidden_size))
    asked = ("batch", config.num_query_tokens, config.qformer_config.hidden_size)
    queries = TensorSpec("query_embeds", "float32", asked)
    soft_shape = ("batch", config.num_query_tokens, text.hidden_size)
    soft = TensorSpec("soft_prompt", "float32", soft_shape)
    heads, layers = text.num_attention_heads, text.num_hidden_layers
    head_width = text.hidden_size // heads
    state = state_pairs(layers)
    past = [TensorSpec(i, "float32", ("batch", heads, "past", head_width)) for _, i in state]
    present = [TensorSpec(o, "float32", ("batch", heads, "total", head_width)) for o, _ in state]
    decoder = Component(
        "decoder",
        inputs=(
            TensorSpec("inputs_embeds", "float32", ("batch", "tokens", text.word_embed_proj_dim)),
            TensorSpec("attention_mask", "int64", ("batch", "total")),
            *past,
        ),
        outputs=(
            TensorSpec("logits", "float32", ("batch", "tokens", text.vocab_size)),
            *present,
        ),
        state=state,
    )
    caption = GenerateTask(
        encode=ENCODE,
        soft_prompt="soft_prompt",
        decoder="decoder",
        prompt="{prompt}",
        image_token_id=config.image_token_index,
    )
    return ModelSpec(
        family="blip2",
        components=(
            Component(
                "vision_encoder",
                inputs=(TensorSpec("pixel_values", "float32", pixels),),
                outputs=(seen,),
            ),
            Component("qformer", inputs=(seen,), outputs=(queries,)),
            Component("projector", inputs=(queries,), outputs=(soft,)),
            decoder,
        ),
        tasks={
            "caption": caption,
            "ask": msgspec.structs.replace(caption, prompt="Question: {question} Answer:"),
        },
        image=image,
        text=TextFrontEnd(
            tokenizer=TOKENIZER,
            max_tokens=text.max_position_embeddings - config.num_query_tokens,
            pad_id=generation.pad_id,
            padding_side="left",
        ),
        generation=generation,
    )


class Blip2:
    """BLIP-2 checkpoints in transformers' layout."""

    def open(self, folder: Path, *, allow_pickle: bool = False) -> HubExport:
        """Read a checkpoint folder; no weights yet."""
        config = read_config(folder, needed=("text_config", "vision_config", "qformer_config"))
        if config.text_config.model_type != "opt":
            raise CheckpointError(
                f"{folder}: its language model is {config.text_config.model_type!r}: "
                "blip2 exports those with 'opt'"
            )
        weights = open_weights(folder, allow_pickle=allow_pickle)
        tokenizer = read_tokenizer(folder)  # before any work: it may be refused
        size = config.vision_config.image_size
        default = ImageFrontEnd(
            resize="exact",
            resize_size=(size, size),
            resample="bicubic",
            crop_size=None,
            rescale_factor=1 / 255,
            image_mean=CLIP_MEAN,
            image_std=CLIP_STD,
        )
        generation = read_generation(folder, config.text_config)
        spec = describe(config, read_image_front_end(folder, default), generation)
        builds = {
            "vision_encoder": lambda: VisionEncoder(config),
            "qformer": lambda: QFormer(config),
            "projector": lambda: Projector(config),
            "decoder": lambda: Decoder(config),
        }
        tied = {"language_model.lm_head.weight": EMBED_TOKENS}
        return HubExport(folder, spec, builds, weights, tokenizer, tied, EMBED_TOKENS)

    def tiny(self, name: str, folder: Path) -> transformers.Blip2ForConditionalGeneration:
        """Write a random BLIP-2 of 2, 4 and 2 layers."""
        common = {"hidden_size": 32, "num_attention_heads": 4}
        config = transformers.Blip2Config(
            vision_config={
                **common,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "image_size": 32,
                "patch_size": 8,
            },
            qformer_config={
                **common,
                "intermediate_size": 64,
                "num_hidden_layers": 4,
                "encoder_hidden_size": 32,
                "cross_attention_frequency": 2,
                "vocab_size": VOCABULARY,
            },
            text_config={
                **common,
                "model_type": "opt",
                "vocab_size": VOCABULARY,
                "ffn_dim": 64,
                "num_hidden_layers": 2,
                "max_position_embeddings": 160,
                "word_embed_proj_dim": 32,
                "bos_token_id": 2,
                "eos_token_id": 2,
                "pad_token_id": 1,
            },
            num_query_tokens=6,
            image_token_index=4,
        )
        model = transformers.Blip2ForConditionalGeneration(config)
        images = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
        save(
            model,
            folder,
            bos="</s>",
            template="</s> $A",
            image_processor=images,
            processor=lambda tokenizer: transformers.Blip2Processor(images, tokenizer, 6),
        )
        return model


FAMILY = Blip2()
