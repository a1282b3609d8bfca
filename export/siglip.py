"""SigLIP (Zhai et al. 2023, arXiv 2303.15343) and SigLIP 2 (arXiv 2502.14786) of one resolution."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

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
from ._checkpoint.folder import TOKENIZER, read_config, read_image_front_end, read_padded_tokenizer
from ._checkpoint.weights import open_weights
from ._tiny import VOCABULARY, save
from ._trace.hub_export import HubExport

ARCHITECTURES = ("SiglipModel",)
ALIASES = {
    "siglip": "google/siglip-base-patch16-224",
    "siglip2": "google/siglip2-base-patch16-224",
}
TINY = ("siglip",)

TEMPLATE = "This is a photo of {}."  # as transformers' documentation of SigLIP has it


class VisionEncoder(torch.nn.Module):
    """Image tower; a learned query reads its tokens."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.vision_model = transformers.SiglipModel(config).vision_model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map float [batch, 3, height, width] to image_embeds [batch, width]."""
        embeds: torch.Tensor = self.vision_model(pixel_values=pixel_values).pooler_output
        return embeds


class TextEncoder(torch.nn.Module):
    """Text tower; the last position is the text, so every row is filled up to the full length.

    It was trained without a mask: the padding is looked at like any token.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.text_model = transformers.SiglipModel(config).text_model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Map int64 [batch, positions] to text_embeds float [batch, width]."""
        embeds: torch.Tensor = self.text_model(input_ids=input_ids).pooler_output
        return embeds


def describe(
    config: Any,
    image: ImageFrontEnd,
    logits: tuple[float, float],
    padding: tuple[int, Literal["left", "right"]],
) -> ModelSpec:
    """Name the graphs and tasks of one checkpoint.

    Args:
        config: transformers'.
        image: The image front end.
        logits: Scale and bias.
        padding: Id and side.
    """
    text, vision = config.text_config, config.vision_config
    positions, pixels = text.max_position_embeddings, (vision.image_size, vision.image_size)
    vision_encoder = Component(
        "vision_encoder",
        inputs=(TensorSpec("pixel_values", "float32", ("batch", 3, *pixels)),),
        outputs=(TensorSpec("image_embeds", "float32", ("batch", vision.hidden_size)),),
    )
    text_encoder = Component(
        "text_encoder",
        inputs=(TensorSpec("input_ids", "int64", ("batch", positions)),),
        outputs=(TensorSpec("text_embeds", "float32", ("batch", text.projection_size)),),
    )
    pad_id, side = padding
    return ModelSpec(
        family="siglip",
        components=(vision_encoder, text_encoder),
        tasks={
            "classify": MatchTask(
                image=("vision_encoder",),
                image_output="image_embeds",
                text=("text_encoder",),
                text_output="text_embeds",
                logit_scale=logits[0],
                template=TEMPLATE,
                logit_bias=logits[1],
                activation="sigmoid",
            ),
            "embed_image": EmbedTask("image", ("vision_encoder",), "image_embeds"),
            "embed_text": EmbedTask("text", ("text_encoder",), "text_embeds"),
        },
        front_ends={
            "pixel_values": image,
            "input_ids": TextFrontEnd(TOKENIZER, positions, pad_id, side, pad_to=positions),
        },
    )


class Siglip:
    """SigLIP checkpoints in transformers' layout."""

    def open(self, folder: Path, *, allow_pickle: bool = False) -> HubExport:
        """Read a checkpoint folder; no weights but scale and bias yet."""
        config = read_config(folder, needed=("text_config", "vision_config"))
        weights = open_weights(folder, allow_pickle=allow_pickle)
        tokenizer, pad_id, side = read_padded_tokenizer(folder)  # first: it may be refused
        default = presets.half(config.vision_config.image_size)
        names = tuple(n for n in ("logit_scale", "logit_bias") if n in weights.shapes())
        found = {name: float(np.ravel(weights.read(name))[0]) for name in names}
        logits = float(np.exp(found.get("logit_scale", 0.0))), found.get("logit_bias", 0.0)
        front = read_image_front_end(folder, default)
        spec = describe(config, front, logits, (pad_id, side))
        builds = {
            "vision_encoder": lambda: VisionEncoder(config),
            "text_encoder": lambda: TextEncoder(config),
        }
        return HubExport(folder, spec, builds, weights, tokenizer, extra=names)

    def tiny(self, name: str, folder: Path) -> transformers.SiglipModel:
        """Write a random SigLIP of 2 and 2 layers."""
        common = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        config = transformers.SiglipConfig(
            text_config={
                **common,
                "vocab_size": VOCABULARY,
                "max_position_embeddings": 40,
                "bos_token_id": 0,
                "eos_token_id": 2,
                "pad_token_id": 1,
            },
            vision_config={**common, "image_size": 32, "patch_size": 8},
        )
        model = transformers.SiglipModel(config)
        images = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})

        def processor(tokenizer: Any) -> Any:
            # as the hub's checkpoints have it (recalled): no mask, or padding would be hidden
            tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = ["input_ids"]
            return transformers.SiglipProcessor(images, tokenizer)

        save(model, folder, template="$A </s>", image_processor=images, processor=processor)
        return model


FAMILY = Siglip()
