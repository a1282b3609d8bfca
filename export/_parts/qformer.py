"""What every BLIP-2 has before its language model: a ViT, and queries that look at it."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from vlmedge.spec import Component, TensorSpec

ENCODE = ("vision_encoder", "qformer", "projector")


class VisionEncoder(torch.nn.Module):
    """ViT-g: every token, after the last norm."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.vision_model = transformers.Blip2VisionModel(config.vision_config)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map float [batch, 3, height, width] to [batch, patches + 1, width]."""
        embeds: torch.Tensor = self.vision_model(pixel_values=pixel_values).last_hidden_state
        return embeds


class QFormer(torch.nn.Module):
    """The learned queries look at the image."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.qformer_config.hidden_size
        self.query_tokens = torch.nn.Parameter(torch.empty(1, config.num_query_tokens, width))
        self.qformer = transformers.Blip2QFormerModel(config.qformer_config)

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
        width = config.qformer_config.hidden_size
        self.language_projection = torch.nn.Linear(width, config.text_config.hidden_size)

    def forward(self, query_embeds: torch.Tensor) -> torch.Tensor:
        """Map [batch, queries, width] to soft_prompt [batch, queries, width of the LM]."""
        soft: torch.Tensor = self.language_projection(query_embeds)
        return soft


BUILDS = {"vision_encoder": VisionEncoder, "qformer": QFormer, "projector": Projector}


def vision_encoder(config: Any, output: str = "image_embeds") -> Component:
    """Describe the ViT, whose tokens are called `output`."""
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    pixels = ("batch", 3, vision.image_size, vision.image_size)
    seen = TensorSpec(output, "float32", ("batch", patches + 1, vision.hidden_size))
    return Component(
        "vision_encoder",
        inputs=(TensorSpec("pixel_values", "float32", pixels),),
        outputs=(seen,),
    )


def components(config: Any) -> tuple[Component, ...]:
    """Describe the three graphs from a picture to the soft prompt."""
    looks = vision_encoder(config)
    asked = ("batch", config.num_query_tokens, config.qformer_config.hidden_size)
    queries = TensorSpec("query_embeds", "float32", asked)
    soft_shape = ("batch", config.num_query_tokens, config.text_config.hidden_size)
    soft = TensorSpec("soft_prompt", "float32", soft_shape)
    return (
        looks,
        Component("qformer", inputs=looks.outputs, outputs=(queries,)),
        Component("projector", inputs=(queries,), outputs=(soft,)),
    )


def tiny_parts(vocabulary: int) -> dict[str, Any]:
    """Return the smallest configs of the ViT, of 2 layers, and the Q-Former, of 4."""
    common = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    return {
        "vision_config": {**common, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8},
        "qformer_config": {
            **common,
            "num_hidden_layers": 4,
            "encoder_hidden_size": 32,
            "cross_attention_frequency": 2,
            "vocab_size": vocabulary,
        },
        "num_query_tokens": 6,
    }
