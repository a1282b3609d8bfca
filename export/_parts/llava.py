"""What LLaVA's line shares: a tower up to one of its layers, a projector, prompts, tiny configs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import tokenizers
import torch
import transformers
from transformers.activations import ACT2FN

from vlmedge.errors import CheckpointError
from vlmedge.spec import (
    ChatTask,
    Component,
    GenerateTask,
    Generation,
    ImageFrontEnd,
    ImageText,
    ModelSpec,
    Task,
    TensorSpec,
    TextFrontEnd,
    VideoFrontEnd,
)

from .._checkpoint import presets
from .._checkpoint.chat_template import ask_template, caption_template, read_chat
from .._checkpoint.folder import TOKENIZER, read_config, read_json, token_text
from .._checkpoint.preprocessor import front_end
from .._checkpoint.weights import Weights
from .._tiny import VOCABULARY, save
from .._trace.hub_export import HubExport
from .._trace.torch_modules import Build
from .decoder import EMBED_TOKENS, TIED, Decoder, check_language_model, describe_decoder

TOWERS = ("clip_vision_model", "siglip_vision_model")
LANGUAGE_MODELS = ("llama", "mistral", "qwen2")
ENCODE = ("vision_encoder", "projector")

# names that older releases of transformers wrote, and newer ones inside a model
PREFIXES = {
    "vision_tower.vision_model.": "vision_tower.",
    "model.vision_tower.vision_model.": "vision_tower.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}
# vicuna_v1's, for checkpoints that bring no template; without its system text, as transformers has
ASK = "USER: {image}\n{question} ASSISTANT:"
REQUEST = "Describe the image in one sentence."
VIDEO_REQUEST = "Describe the video in one sentence."
# in the words of llava-hf's own
CHAT = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% elif part['type'] == 'video' %}{{ '<video>\n' }}"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


class VisionEncoder(torch.nn.Module):
    """The layers of a tower up to the last one that is looked at.

    Args:
        config: The checkpoint's.
        name: The tower's, in the checkpoint.
        keeps_class: Whether CLIP's class token stays; none: as the config says.
    """

    def __init__(
        self, config: Any, name: str = "vision_tower", keeps_class: bool | None = None
    ) -> None:
        super().__init__()
        vision = copy.deepcopy(config.vision_config)
        self._layers = feature_layers(config)
        vision.num_hidden_layers = max(self._layers)
        default = config.vision_feature_select_strategy != "default"
        self._keeps_class = default if keeps_class is None else keeps_class
        self._name = name
        tower = transformers.AutoModel.from_config(vision)
        for part in ("post_layernorm", "head"):  # what comes after is not looked at
            if hasattr(tower, part):
                delattr(tower, part)
        self.add_module(name, tower)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map float [batch, 3, height, width] to image_embeds [batch, patches, width]."""
        tower: Any = self.get_submodule(self._name)
        hidden = tower.embeddings(pixel_values)
        if hasattr(tower, "pre_layrnorm"):  # CLIP's, and their spelling
            hidden = tower.pre_layrnorm(hidden)
        states = [hidden]
        for layer in tower.encoder.layers:
            hidden = layer(hidden, attention_mask=None)
            states.append(hidden)
        seen = torch.cat([states[i] for i in self._layers], dim=-1)
        return seen if self._keeps_class else seen[:, 1:]


class Projector(torch.nn.Module):
    """One Linear (the first LLaVA) or two with an activation between (LLaVA 1.5)."""

    def __init__(self, config: Any, single: bool = False) -> None:
        super().__init__()
        width, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        layers = {"linear_1": torch.nn.Linear(seen_width(config), width, bias)}
        if not single:
            layers["linear_2"] = torch.nn.Linear(width, width, bias)
        self.multi_modal_projector = torch.nn.ModuleDict(layers)
        self._act = ACT2FN[config.projector_hidden_act]

    def forward(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """Map [batch, patches, width] to soft_prompt [batch, patches, width of the LM]."""
        return self.project(image_embeds)

    def project(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """Map rows of the tower's width to rows of the language model's."""
        layers = self.multi_modal_projector
        soft: torch.Tensor = layers["linear_1"](image_embeds)
        if "linear_2" in layers:
            soft = layers["linear_2"](self._act(soft))
        return soft


def feature_layers(config: Any) -> list[int]:
    """Return how many layers of the tower each output that is looked at has behind it."""
    chosen = config.vision_feature_layer
    count = config.vision_config.num_hidden_layers
    several = [chosen] if isinstance(chosen, int) else list(chosen)
    return [i if i >= 0 else count + 1 + i for i in several]


def unused_layers(config: Any, tower: str = "vision_tower") -> Iterator[str]:
    """Name what a checkpoint has of a tower beyond the last layer that is looked at."""
    yield from (f"{tower}.post_layernorm.", f"{tower}.head.")
    for i in range(max(feature_layers(config)), config.vision_config.num_hidden_layers):
        yield f"{tower}.encoder.layers.{i}."


def seen_width(config: Any) -> int:
    """Return the width of what the tower gives: of several layers side by side."""
    width: int = config.vision_config.hidden_size * len(feature_layers(config))
    return width


def seen_patches(config: Any) -> int:
    """Return how many rows the tower gives for a picture."""
    vision = config.vision_config
    patches: int = (vision.image_size // vision.patch_size) ** 2
    whole = config.vision_feature_select_strategy != "default"
    return patches + int(whole and vision.model_type == "clip_vision_model")  # its class token


def read_checked_config(folder: Path) -> Any:
    """Read config.json, and refuse a tower or a language model that is not of this line."""
    config = read_config(folder, needed=("text_config", "vision_config"))
    check_language_model(folder, config.text_config, LANGUAGE_MODELS)
    tower = config.vision_config.model_type
    if tower not in TOWERS:
        raise CheckpointError(
            f"{folder}: its vision tower is {tower!r}: choose a checkpoint with {', '.join(TOWERS)}"
        )
    return config


def read_placeholders(
    folder: Path, config: Any, tokenizer: tokenizers.Tokenizer
) -> tuple[str, str]:
    """Return the texts of the image token and of the video token."""
    return (
        token_text(folder, tokenizer, "image_token_index", config.image_token_id),
        token_text(folder, tokenizer, "video_token_index", config.video_token_id),
    )


def read_chats(
    folder: Path, placeholders: tuple[str, str]
) -> tuple[ChatTask | None, ChatTask | None]:
    """Read the chat template with a picture, and with a video in its place."""
    return (
        read_chat(folder, "ask", placeholders[0]),
        read_chat(folder, "ask_video", placeholders[1], "video"),
    )


def picture_builds(config: Any, projector: Build) -> dict[str, Build]:
    """Return what makes the modules of `picture_components`."""
    return {
        "vision_encoder": lambda: VisionEncoder(config),
        "projector": projector,
        "decoder": lambda: Decoder(config.text_config),
    }


def opened(
    folder: Path,
    config: Any,
    spec: ModelSpec,
    builds: Mapping[str, Build],
    weights: Weights,
    tokenizer: tokenizers.Tokenizer,
    towers: Sequence[str] = ("vision_tower",),
    spare: tuple[str, ...] = (),
) -> HubExport:
    """Put an export together; what its towers have above the last layer looked at is unused.

    Args:
        folder: The checkpoint.
        config: As transformers has it.
        spec: The spec, for the runtime.
        builds: Makes each component's module.
        weights: The tensors on disk.
        tokenizer: Tokenizer of the language model.
        towers: How the names of each tower's weights begin.
        spare: How names begin that no component needs either.
    """
    layers = (name for tower in towers for name in unused_layers(config, tower))
    return HubExport(
        folder, spec, builds, weights, tokenizer, TIED, EMBED_TOKENS, unused=(*spare, *layers)
    )


def text_front_end(config: Any, generation: Generation) -> TextFrontEnd:
    """Return how the decoder's texts become ids."""
    return TextFrontEnd(
        tokenizer=TOKENIZER,
        max_tokens=config.text_config.max_position_embeddings,
        pad_id=generation.pad_id,
        padding_side="left",
    )


def picture_components(config: Any, *prompts: TensorSpec) -> tuple[Component, ...]:
    """Name a tower, a projector that gives `prompts`, and a decoder."""
    size = config.vision_config.image_size
    seen = TensorSpec(
        "image_embeds", "float32", ("batch", seen_patches(config), seen_width(config))
    )
    return (
        Component(
            "vision_encoder",
            inputs=(TensorSpec("pixel_values", "float32", ("batch", 3, size, size)),),
            outputs=(seen,),
        ),
        Component("projector", inputs=(seen,), outputs=prompts),
        describe_decoder(config.text_config),
    )


def picture_tasks(config: Any, image_text: ImageText, chat: ChatTask | None) -> dict[str, Task]:
    """Wire what is written about pictures, in the words of the checkpoint's template."""
    ask = GenerateTask(
        encode=ENCODE,
        soft_prompt="soft_prompt",
        decoder="decoder",
        prompt=ASK if chat is None else ask_template(chat),
        image_token_id=config.image_token_id,
        image_text=image_text,
    )
    plain = ASK.replace("{question}", REQUEST) + "{prompt}"
    prompt = plain if chat is None else caption_template(chat, REQUEST)
    caption = msgspec.structs.replace(ask, prompt=prompt)
    return {"caption": caption, "ask": ask, **({} if chat is None else {"chat": chat})}


def video_tasks(
    config: Any, encode: tuple[str, ...], soft_prompt: str, placeholder: str, chat: ChatTask | None
) -> dict[str, Task]:
    """Wire what is written about videos; `chat` has a video in the place of an image."""
    ask = GenerateTask(
        encode=encode,
        soft_prompt=soft_prompt,
        decoder="decoder",
        prompt=ASK if chat is None else ask_template(chat),
        image_token_id=config.video_token_id,
        image_text=ImageText(placeholder, placeholder),
        source="video",
    )
    plain = ASK.replace("{question}", VIDEO_REQUEST) + "{prompt}"
    prompt = plain if chat is None else caption_template(chat, VIDEO_REQUEST)
    return {"caption_video": msgspec.structs.replace(ask, prompt=prompt), "ask_video": ask}


def read_video_front_end(folder: Path, default: ImageFrontEnd, frames: int) -> VideoFrontEnd:
    """Read how frames are chosen and become pixels.

    Args:
        folder: The checkpoint; an old one has one file for pictures and frames.
        default: Front end for the fields that the files leave out.
        frames: How many, where the file says nothing: transformers then takes all that it is given.
    """
    inside = read_json(folder, "processor_config.json") or {}
    found = read_json(folder, "video_preprocessor_config.json") or inside.get("video_processor")
    if found is None:
        found = read_json(folder, "preprocessor_config.json") or inside.get("image_processor") or {}
    side = default.resize_size[0]
    other = ("do_pad", "do_sample_frames")  # how a batch is filled up, and what comes here
    plain = {name: value for name, value in found.items() if name not in other}
    samples = bool(found.get("do_sample_frames"))
    return VideoFrontEnd(
        frame=front_end({**presets.clip_fields(side), **plain}),
        frames=(found.get("num_frames") if samples else None) or frames,
        fps=found.get("fps") if samples and not found.get("num_frames") else None,
    )


def save_tiny(
    model: Any,
    folder: Path,
    images: Any,
    processor: Any,
    *,
    strategy: str = "default",
    class_token: bool = True,
    more: tuple[str, ...] = (),
) -> None:
    """Draw a tiny model of `tiny_configs` and write it with its processor.

    Args:
        model: In PyTorch.
        folder: Made here.
        images: Its image processor.
        processor: The class that joins it and the tokenizer.
        strategy: The config's vision_feature_select_strategy.
        class_token: Whether its tower has one.
        more: Further special tokens.
    """
    save(
        model,
        folder,
        gain=0.5,
        template="<s> $A",
        image_processor=images,
        processor=lambda tokenizer: processor(
            images,
            tokenizer,
            patch_size=8,
            vision_feature_select_strategy=strategy,
            num_additional_image_tokens=int(class_token),
        ),
        more=more,
    )


def tiny_configs(
    language: str = "llama", tower: str = "clip_vision_model", **text: int
) -> dict[str, Any]:
    """Return the smallest configs of a tower of 3 layers and a language model of 2.

    Args:
        language: The language model's type.
        tower: The tower's.
        **text: What differs in the language model's.
    """
    common = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    words: dict[str, Any] = {
        **common,
        "model_type": language,
        "vocab_size": VOCABULARY,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }
    if language == "mistral":
        words |= {"head_dim": 16, "sliding_window": 64}
    vision = {
        **common,
        "model_type": tower,
        "num_hidden_layers": 3,
        "image_size": 32,
        "patch_size": 8,
    }
    return {"vision_config": vision, "text_config": {**words, **text}}
