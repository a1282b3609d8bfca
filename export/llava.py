"""LLaVA 1.5 (Liu et al. 2023, arXiv 2310.03744) and the first one (arXiv 2304.08485)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from vlmedge.spec import ChatTask, Generation, ImageFrontEnd, ImageText, ModelSpec, TensorSpec

from ._checkpoint import presets
from ._checkpoint.chat_template import read_chat, write_template
from ._checkpoint.folder import read_generation, read_image_front_end, read_tokenizer, token_text
from ._checkpoint.weights import Renamed, Weights, open_weights
from ._parts.llava import (
    CHAT,
    LANGUAGE_MODELS,
    PREFIXES,
    Projector,
    opened,
    picture_builds,
    picture_components,
    picture_tasks,
    read_checked_config,
    save_tiny,
    seen_patches,
    text_front_end,
    tiny_configs,
)
from ._trace.hub_export import HubExport

ARCHITECTURES = ("LlavaForConditionalGeneration",)
ALIASES = {
    "llava": "llava-hf/llava-1.5-7b-hf",
    "llava-13b": "llava-hf/llava-1.5-13b-hf",
}
TINY = ("llava", "llava-linear", "llava-mistral", "llava-qwen2")

SECOND = "multi_modal_projector.linear_2.weight"


def describe(
    config: Any,
    image: ImageFrontEnd,
    generation: Generation,
    placeholder: str,
    chat: ChatTask | None,
) -> ModelSpec:
    """Name the graphs and tasks of one checkpoint, with its numbers."""
    shape = "batch", seen_patches(config), config.text_config.hidden_size
    soft = TensorSpec("soft_prompt", "float32", shape)
    return ModelSpec(
        family="llava",
        components=picture_components(config, soft),
        tasks=picture_tasks(config, ImageText(placeholder, placeholder), chat),
        front_ends={
            "pixel_values": image,
            "input_ids": text_front_end(config, generation),
        },
        generation=generation,
    )


class Llava:
    """LLaVA checkpoints in transformers' layout."""

    def open(self, folder: Path, *, allow_pickle: bool = False) -> HubExport:
        """Read a checkpoint folder; no weights yet."""
        config = read_checked_config(folder)
        weights: Weights = Renamed(open_weights(folder, allow_pickle=allow_pickle), PREFIXES)
        tokenizer = read_tokenizer(folder)  # before any work: it may be refused
        front = read_image_front_end(folder, presets.clip(config.vision_config.image_size))
        generation = read_generation(folder, config.text_config)
        placeholder = token_text(folder, tokenizer, "image_token_index", config.image_token_id)
        chat = read_chat(folder, "ask", placeholder)
        spec = describe(config, front, generation, placeholder, chat)
        single = SECOND not in weights.shapes()
        builds = picture_builds(config, lambda: Projector(config, single))
        return opened(folder, config, spec, builds, weights, tokenizer)

    def tiny(self, name: str, folder: Path) -> transformers.LlavaForConditionalGeneration:
        """Write a random LLaVA of 3 and 2 layers, with one of its language models."""
        kind = name.removeprefix("llava-") if name.removeprefix("llava-") in LANGUAGE_MODELS else ""
        tower = "siglip_vision_model" if kind == "qwen2" else "clip_vision_model"
        config = transformers.LlavaConfig(
            **tiny_configs(kind or "llama", tower),
            image_token_index=4,
            image_seq_length=16,
            projector_hidden_act="linear" if name == "llava-linear" else "gelu",
            vision_feature_select_strategy="full" if kind == "qwen2" else "default",
        )
        model = transformers.LlavaForConditionalGeneration(config)
        images = transformers.CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        )
        save_tiny(
            model,
            folder,
            images,
            transformers.LlavaProcessor,
            strategy=config.vision_feature_select_strategy,
            class_token=kind != "qwen2",
        )
        if name == "llava-linear":
            _drop_second(model, folder)
        if name != "llava-mistral":
            write_template(folder, CHAT)
        return model


def _drop_second(model: transformers.LlavaForConditionalGeneration, folder: Path) -> None:
    """Make the projector a single Linear, on disk by leaving the second one out."""
    from safetensors.torch import load_file, save_file

    second = model.model.multi_modal_projector.linear_2
    torch.nn.init.eye_(second.weight)
    torch.nn.init.zeros_(second.bias)
    file = folder / "model.safetensors"
    left = {n: t for n, t in load_file(file).items() if ".linear_2." not in n}
    save_file(left, file, metadata={"format": "pt"})


FAMILY = Llava()
