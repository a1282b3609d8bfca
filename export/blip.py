"""BLIP (Li et al. 2022, arXiv 2201.12086): captions, answers, and pictures matched with texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers
from transformers.models.blip.modeling_blip_text import BlipTextModel, BlipTextSelfAttention

from vlmedge.spec import (
    Component,
    EmbedTask,
    GenerateTask,
    Generation,
    MatchTask,
    ModelSpec,
    ScoreTask,
    Task,
    TensorSpec,
    TextFrontEnd,
)

from ._checkpoint import presets
from ._checkpoint.folder import (
    TOKENIZER,
    read_config,
    read_generation,
    read_image_front_end,
    read_tokenizer,
)
from ._checkpoint.weights import open_weights
from ._parts.cross_attention import CrossKV, cross_specs, filled_cache, padding_mask
from ._tiny import VOCABULARY, save
from ._trace.hub_export import HubExport, cache_argument, cached, causal_mask, state_pairs
from ._trace.torch_modules import Build

CAPTION, ANSWER = "BlipForConditionalGeneration", "BlipForQuestionAnswering"
MATCH = "BlipForImageTextRetrieval"
ARCHITECTURES = (
    "BlipForConditionalGeneration",
    "BlipForQuestionAnswering",
    "BlipForImageTextRetrieval",
)
ALIASES = {
    "blip": "Salesforce/blip-image-captioning-base",
    "blip-large": "Salesforce/blip-image-captioning-large",
    "blip-vqa": "Salesforce/blip-vqa-base",
    "blip-itm": "Salesforce/blip-itm-base-coco",
}
TINY = ("blip", "blip-vqa", "blip-itm")

EMBED_TOKENS = "text_decoder.bert.embeddings.word_embeddings.weight"
TIED = {
    "text_decoder.cls.predictions.decoder.weight": EMBED_TOKENS,
    "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
    "text_decoder.cls.predictions.bias": "text_decoder.cls.predictions.decoder.bias",
}
CROSS = "text_decoder.bert.encoder.layer.{}.crossattention.self.{}"
TEMPLATE = "a picture of {}"  # BLIP's own prompt when it was trained to describe
# Its training began at this temperature (configs of github.com/salesforce/BLIP, recalled) and
# transformers' classes keep no learnt one; a ranking does not depend on it.
TEMPERATURE = 0.07


class VisionEncoder(torch.nn.Module):
    """The image tower, and where the checkpoint has it, the projection of its class token."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        model = getattr(transformers, config.architectures[0])(config)
        self.vision_model = model.vision_model
        self.vision_proj = getattr(model, "vision_proj", None)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Map float [batch, 3, height, width] to image_states, and to image_embeds if it can."""
        states = self.vision_model(pixel_values=pixel_values).last_hidden_state
        return (states,) if self.vision_proj is None else (states, self.vision_proj(states[:, 0]))


class QuestionEncoder(torch.nn.Module):
    """BERT that reads a question while it looks at the picture."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.text_encoder = BlipTextModel(config.text_config, add_pooling_layer=False)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, image_states: torch.Tensor
    ) -> torch.Tensor:
        """Map int64 [batch, tokens] twice and image_states to question_states."""
        states: torch.Tensor = self.text_encoder(
            input_ids=input_ids,
            attention_mask=padding_mask(attention_mask),
            encoder_hidden_states=image_states,
        ).last_hidden_state
        return states


class Fusion(QuestionEncoder):
    """The same BERT with the head that says whether text and picture belong together."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.itm_head = torch.nn.Linear(config.text_config.hidden_size, 2)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, image_states: torch.Tensor
    ) -> torch.Tensor:
        """Map int64 [batch, tokens] twice and image_states to match_logits [batch, 2]."""
        states = super().forward(input_ids, attention_mask, image_states)
        logits: torch.Tensor = self.itm_head(states[:, 0])
        return logits


class TextEncoder(torch.nn.Module):
    """The same BERT without a picture, and its projection."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.text_encoder = BlipTextModel(config.text_config, add_pooling_layer=False)
        for layer in self.text_encoder.encoder.layer:
            del layer.crossattention
        self.text_proj = torch.nn.Linear(
            config.text_config.hidden_size, config.image_text_hidden_size
        )

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Map int64 [batch, tokens] twice to text_embeds [batch, width]."""
        mask = padding_mask(attention_mask)
        states = self.text_encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state
        embeds: torch.Tensor = self.text_proj(states[:, 0])
        return embeds


def cross_kv(config: Any) -> CrossKV:
    """Make what gives the decoder its keys and values of what it looks at."""
    text = config.text_config
    layers, widths = text.num_hidden_layers, (text.encoder_hidden_size, text.hidden_size)
    return CrossKV(CROSS, ("key", "value"), layers, text.num_attention_heads, widths)


class CrossAttention(BlipTextSelfAttention):
    """Cross-attention that heeds its mask.

    In transformers 5.23 the layer around it hands the mask over as that of the text, which
    cross-attention does not look at: there the padding of a batch's shorter questions is seen.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """See BlipTextSelfAttention; both masks are the encoder's.

        The cache is among `kwargs`, under either name.
        """
        mask = attention_mask if encoder_attention_mask is None else encoder_attention_mask
        return super().forward(hidden_states, None, encoder_hidden_states, mask, **kwargs)


class Decoder(torch.nn.Module):
    """BERT as a language model, with its cache and its cross-attention's as inputs."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.text_decoder = decoder = transformers.BlipTextLMHeadModel(config.text_config)
        # rows are looked up on the host, and keys and values come from cross_kv
        del decoder.bert.embeddings.word_embeddings
        layers: Any = decoder.bert.encoder.layer
        for layer in layers:
            attention = layer.crossattention.self
            attention.__class__ = CrossAttention
            del attention.key, attention.value

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        cross: list[torch.Tensor],
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Read [batch, tokens, width] and give logits [batch, tokens, vocabulary] and the cache."""
        return self.step(inputs_embeds, attention_mask, position_ids, None, cross, past)

    def step(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None,
        cross: list[torch.Tensor],
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run with or without padding among what is looked at."""
        mask = encoder_attention_mask
        cache = filled_cache(past, cross)
        out = self.text_decoder(
            inputs_embeds=inputs_embeds.clone(),  # positions are added in place
            attention_mask=causal_mask(attention_mask, inputs_embeds.shape[1]),
            position_ids=position_ids,
            # not looked at, for the cache has all layers; its being there asks for the attention
            encoder_hidden_states=inputs_embeds,
            encoder_attention_mask=None if mask is None else padding_mask(mask),
            use_cache=True,
            **cache_argument(self.text_decoder, cache),
        )
        return out.logits, cached(cache.self_attention_cache)


class AnswerDecoder(Decoder):
    """The same, looking at a question, which may be padded."""

    def forward(  # type: ignore[override]
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
        cross: list[torch.Tensor],
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """As the decoder's, with encoder_attention_mask int64 [batch, states]."""
        mask = encoder_attention_mask
        return self.step(inputs_embeds, attention_mask, position_ids, mask, cross, past)


def components(config: Any) -> dict[str, Component]:
    """Describe every graph that a BLIP of some kind may have."""
    vision, text = config.vision_config, config.text_config
    size, width = vision.image_size, text.hidden_size
    count = (size // vision.patch_size) ** 2 + 1
    seen = TensorSpec("image_states", "float32", ("batch", count, vision.hidden_size))
    image_embeds = TensorSpec("image_embeds", "float32", ("batch", config.image_text_hidden_size))
    asked = (
        TensorSpec("input_ids", "int64", ("batch", "tokens")),
        TensorSpec("attention_mask", "int64", ("batch", "tokens")),
    )
    answers, matches = (config.architectures[0] == name for name in (ANSWER, MATCH))
    question = TensorSpec("question_states", "float32", ("batch", "states", width))
    looked_at = question if answers else seen
    heads, layers = text.num_attention_heads, text.num_hidden_layers
    cross = cross_specs(layers, heads, looked_at.shape[1], width // heads)
    state = state_pairs(layers)
    past = [TensorSpec(i, "float32", ("batch", heads, "past", width // heads)) for _, i in state]
    present = [
        TensorSpec(o, "float32", ("batch", heads, "total", width // heads)) for o, _ in state
    ]
    padded = (TensorSpec("encoder_attention_mask", "int64", ("batch", "states")),)
    found = (
        Component(
            "vision_encoder",
            inputs=(TensorSpec("pixel_values", "float32", ("batch", 3, size, size)),),
            outputs=(seen, image_embeds) if matches else (seen,),
        ),
        Component(
            "question_encoder",
            inputs=(*asked, seen),
            outputs=(msgspec.structs.replace(question, shape=("batch", "tokens", width)),),
        ),
        Component(
            "text_encoder",
            inputs=asked,
            outputs=(msgspec.structs.replace(image_embeds, name="text_embeds"),),
        ),
        Component(
            "fusion",
            inputs=(*asked, seen),
            outputs=(TensorSpec("match_logits", "float32", ("batch", 2)),),
        ),
        Component("cross_kv", inputs=(looked_at,), outputs=cross),
        Component(
            "decoder",
            inputs=(
                TensorSpec("inputs_embeds", "float32", ("batch", "tokens", width)),
                TensorSpec("attention_mask", "int64", ("batch", "total")),
                TensorSpec("position_ids", "int64", ("batch", "tokens")),
                *(padded if answers else ()),
                *cross,
                *past,
            ),
            outputs=(
                TensorSpec("logits", "float32", ("batch", "tokens", text.vocab_size)),
                *present,
            ),
            state=state,
        ),
    )
    return {component.name: component for component in found}


GRAPHS = {
    CAPTION: ("vision_encoder", "cross_kv", "decoder"),
    ANSWER: ("vision_encoder", "question_encoder", "cross_kv", "decoder"),
    MATCH: ("vision_encoder", "text_encoder", "fusion"),
}


def tasks(config: Any) -> dict[str, Task]:
    """Wire what a checkpoint can do."""
    kind, encode = config.architectures[0], ("vision_encoder",)
    caption = GenerateTask(
        encode=encode,
        soft_prompt="image_states",
        decoder="decoder",
        prompt="{prompt}",
        read=("cross_kv",),
        start_ids=(config.text_config.bos_token_id,),
        special_tokens=False,  # the first is bos in their place, and the last would end the text
    )
    if kind == CAPTION:
        return {"caption": caption}
    if kind == ANSWER:
        read = ("question_encoder", "cross_kv")
        return {"ask": msgspec.structs.replace(caption, prompt="{question}", read=read)}
    return {
        "classify": MatchTask(
            image=encode,
            image_output="image_embeds",
            text=("text_encoder",),
            text_output="text_embeds",
            logit_scale=1 / TEMPERATURE,
            template=TEMPLATE,
        ),
        "match": ScoreTask(image=encode, text=("fusion",), output="match_logits"),
        "embed_image": EmbedTask("image", encode, "image_embeds"),
        "embed_text": EmbedTask("text", ("text_encoder",), "text_embeds"),
    }


class Blip:
    """BLIP checkpoints in transformers' layout."""

    def open(self, folder: Path, *, allow_pickle: bool = False) -> HubExport:
        """Read a checkpoint folder; no weights yet."""
        config = read_config(folder, needed=("text_config", "vision_config"))
        config.text_config.is_decoder = True  # its classes count on the cross-attention
        weights = open_weights(folder, allow_pickle=allow_pickle)
        tokenizer = read_tokenizer(folder)  # before any work: it may be refused
        text, kind = config.text_config, config.architectures[0]
        default = presets.clip_stretched(config.vision_config.image_size)
        writes = "decoder" in GRAPHS[kind]
        described = components(config)
        spec = ModelSpec(
            family="blip",
            components=tuple(described[name] for name in GRAPHS[kind]),
            tasks=tasks(config),
            front_ends={
                "pixel_values": read_image_front_end(folder, default),
                "input_ids": TextFrontEnd(
                    TOKENIZER, text.max_position_embeddings, text.pad_token_id, "right"
                ),
            },
            generation=_generation(folder, text) if writes else None,
        )
        makers: Mapping[str, Callable[[], torch.nn.Module]] = {
            "vision_encoder": lambda: VisionEncoder(config),
            "question_encoder": lambda: QuestionEncoder(config),
            "text_encoder": lambda: TextEncoder(config),
            "fusion": lambda: Fusion(config),
            "cross_kv": lambda: cross_kv(config),
            "decoder": lambda: AnswerDecoder(config) if kind == ANSWER else Decoder(config),
        }
        builds: dict[str, Build] = {name: makers[name] for name in GRAPHS[kind]}
        both = tuple(name for name in TIED if name in weights.shapes())
        return HubExport(
            folder,
            spec,
            builds,
            weights,
            tokenizer,
            TIED,
            EMBED_TOKENS if writes else None,
            extra=both,
        )

    def tiny(self, name: str, folder: Path) -> transformers.PreTrainedModel:
        """Write a random BLIP of 2 and 2 layers: one that captions, answers or matches."""
        common = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        config = transformers.BlipConfig(
            text_config={
                **common,
                "vocab_size": VOCABULARY,
                "encoder_hidden_size": 32,
                "projection_dim": 24,
                "max_position_embeddings": 64,
                "bos_token_id": 4,
                "eos_token_id": 2,
                "sep_token_id": 2,
                "pad_token_id": 1,
                "is_decoder": True,
            },
            vision_config={**common, "image_size": 32, "patch_size": 8},
            projection_dim=24,
            image_text_hidden_size=20,
        )
        kind = {"blip": CAPTION, "blip-vqa": ANSWER, "blip-itm": MATCH}[name]
        model: transformers.PreTrainedModel = getattr(transformers, kind)(config)
        images = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
        save(
            model,
            folder,
            template="<s> $A </s>",
            image_processor=images,
            processor=lambda tokenizer: transformers.BlipProcessor(images, tokenizer),
        )
        return model


def _generation(folder: Path, text: Any) -> Generation:
    """Read the defaults; a text ends at [SEP], whatever the file calls its end."""
    found = read_generation(folder, text)
    return msgspec.structs.replace(
        found, eos_ids=(text.sep_token_id,), pad_id=text.pad_token_id, bos_id=text.bos_token_id
    )


FAMILY = Blip()
