"""Shikra (Chen et al. 2023, arXiv 2306.15195): the first LLaVA, which points at what it speaks of.

It writes boxes in plain figures, and reads them; `vlmedge.run.tasks.boxes` has how. A folder holds

    config.json, tokenizer, model*  Shikra; or what it has more than LLaMA, as it was published
    base/                           of such a delta alone: LLaMA 7B in Hugging Face layout
    vision_tower/                   CLIP L/14: config.json, preprocessor_config.json, weights

Source: github.com/shikras/shikra.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import transformers

from vlmedge.errors import CheckpointError
from vlmedge.spec import (
    ChatTask,
    GenerateTask,
    Generation,
    ImageFrontEnd,
    ImageText,
    ModelSpec,
    Task,
    TensorSpec,
)

from ._checkpoint import presets
from ._checkpoint.folder import (
    LOCATED_TOKENS,
    read_generation,
    read_image_front_end,
    read_tokenizer,
)
from ._checkpoint.weights import Renamed, Summed, Together, Weights, open_weights
from ._parts.llava import (
    ENCODE,
    opened,
    picture_builds,
    picture_components,
    seen_patches,
    text_front_end,
    tiny_configs,
)
from ._parts.llava_v1 import PREFIXES, SPARE, TOWER, add_marks, open_tower, read_configs
from ._tiny import free_id, save
from ._trace.hub_export import HubExport

ARCHITECTURES = ("ShikraLlamaForCausalLM",)
ALIASES: dict[str, str] = {}
TINY = ("shikra",)

BASE = "base"
PATCH, START, END = "<im_patch>", "<im_start>", "<im_end>"
NORM = "language_model.model.norm.weight"
DELTA_LIMIT = 0.1  # mean size of a norm's weights: LLaMA's are about 1, a difference is near 0
WHITE = (255, 255, 255)
# vicuna_v1.1. The tokenizer that it was trained with took the space before a picture away.
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# from its training's templates and its authors' demo
REQUESTS = {
    "caption": " Describe this image{image} as simply as possible.",
    "ask": "{image} {question}",
    "detect": " Can you point out {question} in the image{image} and provide the coordinates of "
    "its location?",
    "detect_all": " Provide a comprehensive description of the image{image} and specify the "
    "positions of any mentioned objects in square brackets.",
}


class Projector(torch.nn.Module):
    """From the tower's width to the language model's."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        seen, width = config.vision_config.hidden_size, config.text_config.hidden_size
        self.mm_projector = torch.nn.Linear(seen, width)

    def forward(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """Map [batch, patches, width] to soft_prompt [batch, patches, width of the LM]."""
        soft: torch.Tensor = self.mm_projector(image_embeds)
        return soft


def tasks(patch: int, eos: str) -> dict[str, Task]:
    """Wire what is asked of a picture; the same graphs answer."""
    shared = GenerateTask(
        encode=ENCODE,
        soft_prompt="soft_prompt",
        decoder="decoder",
        prompt="",
        image_token_id=patch,
        image_text=ImageText(PATCH, f"{START}{PATCH}{END}"),
    )
    odd: dict[str, dict[str, Any]] = {
        "ask": {"regions": "brackets"},
        "detect": {"answer": "brackets", "named_by": "question"},
        "detect_all": {"answer": "brackets"},
    }
    found: dict[str, Task] = {
        name: msgspec.structs.replace(
            shared, prompt=f"{SYSTEM} USER:{request} ASSISTANT:", **odd.get(name, {})
        )
        for name, request in REQUESTS.items()
    }
    found["caption"] = msgspec.structs.replace(
        found["caption"], prompt=f"{SYSTEM} USER:{REQUESTS['caption']} ASSISTANT:{{prompt}}"
    )
    found["chat"] = ChatTask(
        write="ask",
        start=SYSTEM,
        user=" USER: {text} ASSISTANT:",
        user_images=" USER:{images} {text} ASSISTANT:",
        image="{image}",
        reply_end=eos,
    )
    return found


def describe(
    config: Any, image: ImageFrontEnd, generation: Generation, patch: int, eos: str
) -> ModelSpec:
    """Name the graphs and tasks of one checkpoint, with its numbers."""
    shape = "batch", seen_patches(config), config.text_config.hidden_size
    return ModelSpec(
        family="shikra",
        components=picture_components(config, TensorSpec("soft_prompt", "float32", shape)),
        tasks=tasks(patch, eos),
        front_ends={
            "pixel_values": image,
            "input_ids": text_front_end(config, generation),
        },
        generation=generation,
    )


def open_language_model(folder: Path, *, allow_pickle: bool) -> Weights:
    """Find Shikra's weights, added to LLaMA's where they are a delta to them."""
    own = open_weights(folder, allow_pickle=allow_pickle)
    weights: Weights = Renamed(own, PREFIXES)
    is_delta = NORM in weights.shapes() and np.abs(weights.read(NORM)).mean() < DELTA_LIMIT
    has_base = (folder / BASE).is_dir()
    if is_delta and not has_base:
        raise CheckpointError(
            f"{folder} holds a delta, which needs LLaMA's weights: put LLaMA 7B into its folder "
            f"{BASE}/, or merge both first"
        )
    if has_base and not is_delta:
        raise CheckpointError(f"{folder} holds no delta: remove its folder {BASE}/")
    if has_base:
        base = Renamed(open_weights(folder / BASE, allow_pickle=allow_pickle), PREFIXES)
        weights = Summed(weights, base, apart=("mm_projector.",))
    return weights


class Shikra:
    """Shikra checkpoints in their authors' layout, with CLIP beside them."""

    def open(self, folder: Path, *, allow_pickle: bool = False) -> HubExport:
        """Read a checkpoint folder; no weights yet, but a norm's."""
        config = read_configs(folder)
        tokenizer = read_tokenizer(folder)  # before any work: it may be refused
        weights: Weights = Together(
            open_language_model(folder, allow_pickle=allow_pickle),
            open_tower(folder, allow_pickle=allow_pickle),
        )
        cure = "download both again"
        patch, words = add_marks(folder, tokenizer, weights, (PATCH, START, END), cure)
        config.text_config.vocab_size = words
        generation = read_generation(folder, config.text_config, LOCATED_TOKENS)
        eos = tokenizer.id_to_token(generation.eos_ids[0]) if generation.eos_ids else None
        if eos is None:
            raise CheckpointError(
                f"{folder}: its tokenizer has no eos_token_id {list(generation.eos_ids)}: "
                "download both again"
            )
        size = config.vision_config.image_size
        front = read_image_front_end(folder / TOWER, presets.clip(size))
        front = msgspec.structs.replace(front, square=WHITE)
        builds = picture_builds(config, lambda: Projector(config))
        spec = describe(config, front, generation, patch, eos)
        return opened(folder, config, spec, builds, weights, tokenizer, spare=SPARE)

    def tiny(self, name: str, folder: Path) -> transformers.LlavaForConditionalGeneration:
        """Write a random one of 3 and 2 layers.

        It is transformers' LLaVA, whose second projection does nothing, so that this is what the
        tests compare with. Its pictures' mean is white: then transformers fills them up with white.
        """
        patch = free_id()
        configs = tiny_configs(max_position_embeddings=1024, vocab_size=patch + 3)
        config = transformers.LlavaConfig(
            **configs, image_token_index=patch, image_seq_length=16, projector_hidden_act="linear"
        )
        model = transformers.LlavaForConditionalGeneration(config)
        model.generation_config.max_new_tokens = 24
        white: dict[str, Any] = {
            "size": {"shortest_edge": 32},
            "crop_size": {"height": 32, "width": 32},
            "image_mean": (1.0, 1.0, 1.0),
            "image_std": presets.CLIP_STD,
        }
        images = transformers.LlavaImageProcessor(**white, do_pad=True)
        save(
            model,
            folder,
            gain=0.5,
            words=0.1,
            template="<s> $A",
            image_processor=images,
            processor=lambda tokenizer: transformers.LlavaProcessor(
                images,
                tokenizer,
                patch_size=8,
                vision_feature_select_strategy="default",
                image_token=PATCH,
                num_additional_image_tokens=1,
            ),
            more=(PATCH, START, END),
        )
        second: Any = model.model.multi_modal_projector.linear_2
        torch.nn.init.eye_(second.weight)
        torch.nn.init.zeros_(second.bias)
        _write_parts(model, folder)
        transformers.CLIPImageProcessor(**white).save_pretrained(folder / TOWER)
        return model


def _write_parts(model: transformers.LlavaForConditionalGeneration, folder: Path) -> None:
    """Write LLaVA's weights and config as Shikra's authors have theirs."""
    from safetensors.torch import save_file

    inner: Any = model.model
    text: Any = model.config.text_config
    parts = {f"model.{name}": p for name, p in inner.language_model.state_dict().items()}
    first = inner.multi_modal_projector.linear_1.state_dict()
    parts |= {f"model.mm_projector.{name}": p for name, p in first.items()}
    parts["lm_head.weight"] = model.lm_head.weight.data
    save_file(parts, folder / "model.safetensors", metadata={"format": "pt"})
    inner.vision_tower.save_pretrained(folder / TOWER)
    written = {
        **text.to_dict(),
        "architectures": list(ARCHITECTURES),
        "model_type": "shikra",
        "mm_vision_tower": "openai/clip-vit-large-patch14",
    }
    (folder / "config.json").write_text(json.dumps(written))


FAMILY = Shikra()
