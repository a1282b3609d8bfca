"""FLAVA (Singh et al. 2022, arXiv 2112.04482): two towers, and a third that reads both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import transformers
from transformers.models.flava.modeling_flava import FlavaITMHead, FlavaMaskedPredictionHead

from vlmedge.errors import CheckpointError
from vlmedge.spec import (
    Component,
    EmbedTask,
    ImageFrontEnd,
    InfillTask,
    MatchTask,
    ModelSpec,
    ScoreTask,
    TensorSpec,
    TextFrontEnd,
)

from ._checkpoint import presets
from ._checkpoint.folder import (
    TOKENIZER,
    read_config,
    read_image_front_end,
    read_json,
    read_tokenizer,
)
from ._checkpoint.weights import open_weights
from ._parts.cross_attention import padding_mask
from ._tiny import VOCABULARY, save
from ._trace.hub_export import HubExport

ARCHITECTURES = ("FlavaForPreTraining",)
ALIASES = {"flava": "facebook/flava-full"}
TINY = ("flava",)

TEMPLATE = "a photo of a {}"
WORDS = "mmm_text_head"
# what only its training needs: other heads, and the codebook that makes their targets
UNUSED = ("image_codebook.", "mim_head.", "mlm_head.", "mmm_image_head.")


class VisionEncoder(torch.nn.Module):
    """The image tower: what the third tower reads, and the vector that is compared."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        model = transformers.FlavaModel(config)
        self.flava = torch.nn.Module()
        self.flava.image_model = model.image_model
        self.flava.image_projection = model.image_projection
        self.flava.image_to_mm_projection = model.image_to_mm_projection

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map float [batch, 3, height, width] to image_states and image_embeds."""
        flava: Any = self.flava
        out = flava.image_model(
            pixel_values=pixel_values, output_hidden_states=True, return_dict=True
        )
        # the third tower reads what has not been through the last norm
        states = flava.image_to_mm_projection(out.hidden_states[-1])
        return states, flava.image_projection(out.last_hidden_state[:, 0])


class TextEncoder(torch.nn.Module):
    """The text tower, in the same way."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        model = transformers.FlavaModel(config)
        self.flava = torch.nn.Module()
        self.flava.text_model = model.text_model
        self.flava.text_projection = model.text_projection
        self.flava.text_to_mm_projection = model.text_to_mm_projection

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Map int64 [batch, tokens] twice to text_states and text_embeds."""
        flava: Any = self.flava
        out = flava.text_model(
            input_ids=input_ids,
            attention_mask=padding_mask(attention_mask),
            output_hidden_states=True,
            return_dict=True,
        )
        states = flava.text_to_mm_projection(out.hidden_states[-1])
        return states, flava.text_projection(out.last_hidden_state[:, 0])


class Fusion(torch.nn.Module):
    """The third tower with two heads: do both belong together, and which word stands where.

    [class token | image_states | text_states]
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.flava = torch.nn.Module()
        self.flava.multimodal_model = transformers.FlavaModel(config).multimodal_model
        self.itm_head = FlavaITMHead(config)
        self.mmm_text_head = FlavaMaskedPredictionHead(config.text_config)
        del self.mmm_text_head.bias  # the same as the decoder's, which is what is added

    def forward(
        self,
        image_states: torch.Tensor,
        text_states: torch.Tensor,
        attention_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Map both and int64 [batch, tokens] to match_logits and word_logits."""
        flava: Any = self.flava
        both = torch.cat([image_states, text_states], dim=1)
        # ones for the picture and the class token
        seen = torch.ones_like(image_states[:, :1, 0], dtype=torch.int64)
        seen = seen.expand(-1, image_states.shape[1] + 1)
        mask = padding_mask(torch.cat([seen, attention_mask], dim=1))
        states = flava.multimodal_model(
            both, attention_mask=mask, return_dict=True
        ).last_hidden_state
        words = states[:, 1 + image_states.shape[1] :]
        return self.itm_head(states), self.mmm_text_head(words)


def describe(
    config: Any, image: ImageFrontEnd, logit_scale: float, mask: tuple[int, str]
) -> ModelSpec:
    """Name the graphs and tasks of one checkpoint.

    Args:
        config: transformers'.
        image: The image front end.
        logit_scale: Multiplies the cosine.
        mask: The token that stands for a gap: its id and how it is written.
    """
    vision, text = config.image_config, config.text_config
    width, size = config.multimodal_config.hidden_size, vision.image_size
    count = (size // vision.patch_size) ** 2 + 1
    image_states = TensorSpec("image_states", "float32", ("batch", count, width))
    text_states = TensorSpec("text_states", "float32", ("batch", "tokens", width))
    attention = TensorSpec("attention_mask", "int64", ("batch", "tokens"))
    vector = ("batch", config.projection_dim)
    towers = ("vision_encoder",), ("text_encoder",)
    pair = ("text_encoder", "fusion")
    return ModelSpec(
        family="flava",
        components=(
            Component(
                "vision_encoder",
                inputs=(TensorSpec("pixel_values", "float32", ("batch", 3, size, size)),),
                outputs=(image_states, TensorSpec("image_embeds", "float32", vector)),
            ),
            Component(
                "text_encoder",
                inputs=(TensorSpec("input_ids", "int64", ("batch", "tokens")), attention),
                outputs=(text_states, TensorSpec("text_embeds", "float32", vector)),
            ),
            Component(
                "fusion",
                inputs=(image_states, text_states, attention),
                outputs=(
                    TensorSpec("match_logits", "float32", ("batch", 2)),
                    TensorSpec("word_logits", "float32", ("batch", "tokens", text.vocab_size)),
                ),
            ),
        ),
        tasks={
            "classify": MatchTask(
                image=towers[0],
                image_output="image_embeds",
                text=towers[1],
                text_output="text_embeds",
                logit_scale=logit_scale,
                template=TEMPLATE,
            ),
            "match": ScoreTask(towers[0], pair, "match_logits"),
            "infill": InfillTask(towers[0], pair, "word_logits", *mask),
            "embed_image": EmbedTask("image", towers[0], "image_embeds"),
            "embed_text": EmbedTask("text", towers[1], "text_embeds"),
        },
        front_ends={
            "pixel_values": image,
            "input_ids": TextFrontEnd(
                TOKENIZER, text.max_position_embeddings, text.pad_token_id, "right"
            ),
        },
    )


class Flava:
    """FLAVA checkpoints in transformers' layout."""

    def open(self, folder: Path, *, allow_pickle: bool = False) -> HubExport:
        """Read a checkpoint folder; no weights but the temperature yet."""
        config = read_config(folder, needed=("image_config", "text_config", "multimodal_config"))
        config.image_config.mask_token = True  # its weight is there, though no picture is masked
        weights = open_weights(folder, allow_pickle=allow_pickle)
        tokenizer = read_tokenizer(folder)  # before any work: it may be refused
        written = _mask_text(folder)
        mask_id = tokenizer.token_to_id(written)
        if mask_id is None:
            raise CheckpointError(
                f"{folder}: its tokenizer has no mask token {written!r}: download it again"
            )
        size = (config.image_config.image_size,) * 2
        default = msgspec.structs.replace(presets.clip_stretched(size), crop_size=size)
        scale = float(np.exp(weights.read("flava.logit_scale")))
        front = read_image_front_end(folder, default)
        builds = {
            "vision_encoder": lambda: VisionEncoder(config),
            "text_encoder": lambda: TextEncoder(config),
            "fusion": lambda: Fusion(config),
        }
        tied = {f"{WORDS}.decoder.bias": f"{WORDS}.bias"}
        extra = [name for name in (f"{WORDS}.bias",) if name in weights.shapes()]
        return HubExport(
            folder,
            describe(config, front, scale, (mask_id, written)),
            builds,
            weights,
            tokenizer,
            tied,
            extra=("flava.logit_scale", *extra),
            unused=UNUSED,
        )

    def tiny(self, name: str, folder: Path) -> transformers.FlavaForPreTraining:
        """Write a random FLAVA of 2, 2 and 2 layers."""
        common = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        config = transformers.FlavaConfig(
            image_config={**common, "image_size": 32, "patch_size": 8, "vocab_size": 64},
            text_config={
                **common,
                "vocab_size": VOCABULARY,
                "max_position_embeddings": 64,
                "pad_token_id": 1,
            },
            multimodal_config=common,
            image_codebook_config={
                "hidden_size": 8,
                "num_groups": 2,
                "num_blocks_per_group": 1,
                "vocab_size": 64,
            },
            hidden_size=32,
            projection_dim=24,
        )
        model = transformers.FlavaForPreTraining(config)
        images = transformers.FlavaImageProcessor(
            size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32}
        )

        def processor(tokenizer: Any) -> Any:
            tokenizer.mask_token = "<image>"
            return transformers.FlavaProcessor(images, tokenizer)

        save(
            model,
            folder,
            template="<s> $A </s>",
            image_processor=images,
            processor=processor,
        )
        return model


def _mask_text(folder: Path) -> str:
    """Return how the checkpoint writes a gap."""
    found = (read_json(folder, "tokenizer_config.json") or {}).get("mask_token") or "[MASK]"
    return str(found.get("content")) if isinstance(found, dict) else str(found)


FAMILY = Flava()
