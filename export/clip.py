"""CLIP (Radford et al. 2021, arXiv 2103.00020) with a ViT image tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from vlmedge.spec import (
    Component,
    EmbedTask,
    ImageFrontEnd,
    MatchTask,
    ModelSpec,
    TensorSpec,
    TextFrontEnd,
)

from ._checkpoint import presets
from ._checkpoint.folder import TOKENIZER, read_config, read_image_front_end, read_tokenizer
from ._checkpoint.weights import open_weights
from ._tiny import VOCABULARY, save
from ._trace.hub_export import HubExport, causal_mask

ARCHITECTURES = ("CLIPModel",)
ALIASES = {
    "clip": "openai/clip-vit-base-patch32",
    "clip-b16": "openai/clip-vit-base-patch16",
    "clip-l14": "openai/clip-vit-large-patch14",
}

TINY = ("clip", "clip-gelu")

TEMPLATE = "a photo of a {}"


class VisionEncoder(torch.nn.Module):
    """Image tower and projection."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        model = transformers.CLIPModel(config)
        self.vision_model = model.vision_model
        self.visual_projection = model.visual_projection

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map float [batch, 3, height, width] to image_embeds [batch, width]."""
        pooled = self.vision_model(pixel_values=pixel_values).pooler_output
        embeds: torch.Tensor = self.visual_projection(pooled)
        return embeds


class TextEncoder(torch.nn.Module):
    """Text tower and projection; the row at the end token is the text."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        model = transformers.CLIPModel(config)
        self.text_model = model.text_model
        self.text_projection = model.text_projection

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Map int64 [batch, tokens] to text_embeds float [batch, width]."""
        mask = causal_mask(attention_mask, input_ids.shape[1])
        pooled = self.text_model(input_ids=input_ids, attention_mask=mask).pooler_output
        embeds: torch.Tensor = self.text_projection(pooled)
        return embeds


def describe(config: Any, image: ImageFrontEnd, logit_scale: float) -> ModelSpec:
    """Name the graphs and tasks of one checkpoint, with its numbers."""
    text, size, width = config.text_config, config.vision_config.image_size, config.projection_dim
    vision_encoder = Component(
        "vision_encoder",
        inputs=(TensorSpec("pixel_values", "float32", ("batch", 3, size, size)),),
        outputs=(TensorSpec("image_embeds", "float32", ("batch", width)),),
    )
    text_encoder = Component(
        "text_encoder",
        inputs=(
            TensorSpec("input_ids", "int64", ("batch", "tokens")),
            TensorSpec("attention_mask", "int64", ("batch", "tokens")),
        ),
        outputs=(TensorSpec("text_embeds", "float32", ("batch", width)),),
    )
    pad = text.pad_token_id
    return ModelSpec(
        family="clip",
        components=(vision_encoder, text_encoder),
        tasks={
            "classify": MatchTask(
                image=("vision_encoder",),
                image_output="image_embeds",
                text=("text_encoder",),
                text_output="text_embeds",
                logit_scale=logit_scale,
                template=TEMPLATE,
            ),
            "embed_image": EmbedTask("image", ("vision_encoder",), "image_embeds"),
            "embed_text": EmbedTask("text", ("text_encoder",), "text_embeds"),
        },
        front_ends={
            "pixel_values": image,
            "input_ids": TextFrontEnd(
                tokenizer=TOKENIZER,
                max_tokens=text.max_position_embeddings,
                pad_id=0 if pad is None else pad,
                padding_side="right",
            ),
        },
    )


class Clip:
    """CLIP checkpoints in transformers' layout."""

    def open(self, folder: Path, *, allow_pickle: bool = False) -> HubExport:
        """Read a checkpoint folder; no weights but the temperature yet."""
        config = read_config(folder, needed=("text_config", "vision_config"))
        weights = open_weights(folder, allow_pickle=allow_pickle)
        tokenizer = read_tokenizer(folder)  # before any work: it may be refused
        default = presets.clip(config.vision_config.image_size)
        scale = np.exp(weights.read("logit_scale")) if "logit_scale" in weights.shapes() else 1.0
        spec = describe(config, read_image_front_end(folder, default), float(scale))
        builds = {
            "vision_encoder": lambda: VisionEncoder(config),
            "text_encoder": lambda: TextEncoder(config),
        }
        return HubExport(folder, spec, builds, weights, tokenizer, extra=("logit_scale",))

    def tiny(self, name: str, folder: Path) -> transformers.CLIPModel:
        """Write a random CLIP of 3 and 2 layers, with the activation of OpenAI's or of others."""
        common = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "hidden_act": "gelu" if name == "clip-gelu" else "quick_gelu",
        }
        config = transformers.CLIPConfig(
            text_config={
                **common,
                "vocab_size": VOCABULARY,
                "num_hidden_layers": 2,
                "max_position_embeddings": 24,
                "bos_token_id": 0,
                "eos_token_id": 3,
                "pad_token_id": 1,
            },
            vision_config={**common, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8},
            projection_dim=24,
        )
        model = transformers.CLIPModel(config)
        images = transformers.CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        )
        save(
            model,
            folder,
            eos="<e>",
            template="<s> $A <e>",
            image_processor=images,
            processor=lambda tokenizer: transformers.CLIPProcessor(images, tokenizer),
        )
        return model


FAMILY = Clip()
