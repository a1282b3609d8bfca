"""LLaVA-NeXT, also called LLaVA 1.6 (Liu et al. 2024): pictures of any size, in tiles.

Source: llava-vl.github.io/blog/2024-01-30-llava-next, and transformers' modeling_llava_next.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import transformers

from vlmedge.spec import ChatTask, Generation, ImageFrontEnd, ImageText, ModelSpec

from ._checkpoint.chat_template import read_chat, write_template
from ._checkpoint.folder import read_generation, read_tokenizer, token_text
from ._checkpoint.weights import Renamed, Weights, open_weights
from ._parts.anyres import (
    SIZES,
    LineProjector,
    check_patches,
    line_prompt,
    read_anyres_front_end,
    save_tiny_anyres,
)
from ._parts.llava import (
    CHAT,
    PREFIXES,
    opened,
    picture_builds,
    picture_components,
    picture_tasks,
    read_checked_config,
    text_front_end,
    tiny_configs,
)
from ._trace.hub_export import HubExport

ARCHITECTURES = ("LlavaNextForConditionalGeneration",)
ALIASES = {
    "llava-next": "llava-hf/llava-v1.6-mistral-7b-hf",
    "llava-next-vicuna-7b": "llava-hf/llava-v1.6-vicuna-7b-hf",
    "llava-next-vicuna-13b": "llava-hf/llava-v1.6-vicuna-13b-hf",
    "llava-next-34b": "llava-hf/llava-v1.6-34b-hf",
    "llava-next-llama3": "llava-hf/llama3-llava-next-8b-hf",
    "llava-next-72b": "llava-hf/llava-next-72b-hf",
}
TINY = ("llava-next", "llava-next-qwen2")


def describe(
    config: Any,
    image: ImageFrontEnd,
    generation: Generation,
    placeholder: str,
    chat: ChatTask | None,
) -> ModelSpec:
    """Name the graphs and tasks of one checkpoint, with its numbers."""
    soft = line_prompt(config)
    return ModelSpec(
        family="llava_next",
        components=picture_components(config, soft),
        tasks=picture_tasks(config, ImageText(placeholder, placeholder, whole=placeholder), chat),
        front_ends={
            "pixel_values": image,
            "input_ids": text_front_end(config, generation),
        },
        generation=generation,
    )


class LlavaNext:
    """LLaVA-NeXT checkpoints in transformers' layout."""

    def open(self, folder: Path, *, allow_pickle: bool = False) -> HubExport:
        """Read a checkpoint folder; no weights yet."""
        config = read_checked_config(folder)
        check_patches(folder, config)
        weights: Weights = Renamed(
            open_weights(folder, allow_pickle=allow_pickle),
            {**PREFIXES, "model.image_newline": "image_newline"},
        )
        tokenizer = read_tokenizer(folder)  # before any work: it may be refused
        front = read_anyres_front_end(folder, config)
        generation = read_generation(folder, config.text_config)
        placeholder = token_text(folder, tokenizer, "image_token_index", config.image_token_id)
        chat = read_chat(folder, "ask", placeholder)
        spec = describe(config, front, generation, placeholder, chat)
        builds = picture_builds(config, lambda: LineProjector(config))
        return opened(folder, config, spec, builds, weights, tokenizer)

    def tiny(self, name: str, folder: Path) -> transformers.LlavaNextForConditionalGeneration:
        """Write a random LLaVA-NeXT of 3 and 2 layers, with one of its language models."""
        other = name == "llava-next-qwen2"
        strategy: Literal["full", "default"] = "full" if other else "default"
        config = transformers.LlavaNextConfig(
            **tiny_configs(
                "qwen2" if other else "llama",
                "siglip_vision_model" if other else "clip_vision_model",
                max_position_embeddings=512,
            ),
            image_token_index=4,
            image_seq_length=16,
            image_grid_pinpoints=SIZES,
            vision_feature_select_strategy=strategy,
        )
        model = transformers.LlavaNextForConditionalGeneration(config)
        save_tiny_anyres(model, folder, strategy=strategy, class_token=not other)
        if not other:
            write_template(folder, CHAT)
        return model


FAMILY = LlavaNext()
