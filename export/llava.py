"""LLaVA 1.5 (Liu et al. 2023, arXiv 2310.03744) and the first one (arXiv 2304.08485)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import msgspec
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
)

from ._chat import ask_template, caption_template, read_chat, write_template
from ._checkpoint import (
    CLIP_MEAN,
    CLIP_STD,
    TOKENIZER,
    read_config,
    read_generation,
    read_image_front_end,
    read_tokenizer,
)
from ._decoder import EMBED_TOKENS, TIED, Decoder, check_language_model, describe_decoder
from ._family import HubExport
from ._tiny import VOCABULARY, save
from ._weights import Renamed, Weights, open_weights

ARCHITECTURES = ("LlavaForConditionalGeneration",)
ALIASES = {
    "llava": "llava-hf/llava-1.5-7b-hf",
    "llava-13b": "llava-hf/llava-1.5-13b-hf",
}
TINY = ("llava", "llava-linear", "llava-mistral", "llava-qwen2")

TOWERS = ("clip_vision_model", "siglip_vision_model")
LANGUAGE_MODELS = ("llama", "mistral", "qwen2")
SECOND = "multi_modal_projector.linear_2.weight"
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
CAPTION = ASK.replace("{question}", REQUEST) + "{prompt}"
# in the words of llava-hf's own
CHAT = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


class VisionEncoder(torch.nn.Module):
    """The layers of the tower up to the last one that is looked at."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        vision = copy.deepcopy(config.vision_config)
        self._layers = feature_layers(config)
        vision.num_hidden_layers = max(self._layers)
        self._has_class = config.vision_feature_select_strategy == "default"
        self.vision_tower = transformers.AutoModel.from_config(vision)
        for name in ("post_layernorm", "head"):  # what comes after is not looked at
            if hasattr(self.vision_tower, name):
                delattr(self.vision_tower, name)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map float [batch, 3, height, width] to image_embeds [batch, patches, width]."""
        tower = self.vision_tower
        hidden = tower.embeddings(pixel_values)
        if hasattr(tower, "pre_layrnorm"):  # CLIP's, and their spelling
            hidden = tower.pre_layrnorm(hidden)
        states = [hidden]
        for layer in tower.encoder.layers:
            hidden = layer(hidden, attention_mask=None)
            states.append(hidden)
        seen = torch.cat([states[i] for i in self._layers], dim=-1)
        return seen[:, 1:] if self._has_class else seen


class Projector(torch.nn.Module):
    """One Linear (the first LLaVA) or two with an activation between (LLaVA 1.5)."""

    def __init__(self, config: Any, single: bool) -> None:
        super().__init__()
        width, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        seen = config.vision_config.hidden_size * len(feature_layers(config))
        layers = {"linear_1": torch.nn.Linear(seen, width, bias)}
        if not single:
            layers["linear_2"] = torch.nn.Linear(width, width, bias)
        self.multi_modal_projector = torch.nn.ModuleDict(layers)
        self._act = ACT2FN[config.projector_hidden_act]

    def forward(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """Map [batch, patches, width] to soft_prompt [batch, patches, width of the LM]."""
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


def describe(
    config: Any,
    image: ImageFrontEnd,
    generation: Generation,
    placeholder: str,
    chat: ChatTask | None,
) -> ModelSpec:
    """Name the graphs and tasks of one checkpoint, with its numbers."""
    vision, text = config.vision_config, config.text_config
    size = vision.image_size
    patches = (size // vision.patch_size) ** 2
    whole = config.vision_feature_select_strategy != "default"
    patches += whole and vision.model_type == "clip_vision_model"  # its class token stays
    width = vision.hidden_size * len(feature_layers(config))
    seen = TensorSpec("image_embeds", "float32", ("batch", patches, width))
    soft = TensorSpec("soft_prompt", "float32", ("batch", patches, text.hidden_size))
    caption = CAPTION if chat is None else caption_template(chat, REQUEST)
    ask = GenerateTask(
        encode=ENCODE,
        soft_prompt="soft_prompt",
        decoder="decoder",
        prompt=ASK if chat is None else ask_template(chat),
        image_token_id=config.image_token_id,
        image_text=ImageText(placeholder, placeholder),
    )
    tasks: dict[str, Task] = {"caption": msgspec.structs.replace(ask, prompt=caption), "ask": ask}
    if chat is not None:
        tasks["chat"] = chat
    return ModelSpec(
        family="llava",
        components=(
            Component(
                "vision_encoder",
                inputs=(TensorSpec("pixel_values", "float32", ("batch", 3, size, size)),),
                outputs=(seen,),
            ),
            Component("projector", inputs=(seen,), outputs=(soft,)),
            describe_decoder(text),
        ),
        tasks=tasks,
        image=image,
        text=TextFrontEnd(
            tokenizer=TOKENIZER,
            max_tokens=text.max_position_embeddings,
            pad_id=generation.pad_id,
            padding_side="left",
        ),
        generation=generation,
    )


class Llava:
    """LLaVA checkpoints in transformers' layout."""

    def open(self, folder: Path, *, allow_pickle: bool = False) -> HubExport:
        """Read a checkpoint folder; no weights yet."""
        config = read_config(folder, needed=("text_config", "vision_config"))
        check_language_model(folder, config.text_config, LANGUAGE_MODELS)
        tower = config.vision_config.model_type
        if tower not in TOWERS:
            raise CheckpointError(
                f"{folder}: its vision tower is {tower!r}: "
                f"choose a checkpoint with {', '.join(TOWERS)}"
            )
        weights: Weights = Renamed(open_weights(folder, allow_pickle=allow_pickle), PREFIXES)
        tokenizer = read_tokenizer(folder)  # before any work: it may be refused
        size = config.vision_config.image_size
        default = ImageFrontEnd(
            resize="shortest_edge",
            resize_size=(size, size),
            resample="bicubic",
            crop_size=(size, size),
            rescale_factor=1 / 255,
            image_mean=CLIP_MEAN,
            image_std=CLIP_STD,
        )
        generation = read_generation(folder, config.text_config)
        placeholder = tokenizer.id_to_token(config.image_token_id)
        if placeholder is None:
            raise CheckpointError(
                f"{folder}: image_token_index is {config.image_token_id}, which its tokenizer "
                "does not have: download both again"
            )
        front = read_image_front_end(folder, default)
        chat = read_chat(folder, "ask", placeholder)
        spec = describe(config, front, generation, placeholder, chat)
        single = SECOND not in weights.shapes()
        builds = {
            "vision_encoder": lambda: VisionEncoder(config),
            "projector": lambda: Projector(config, single),
            "decoder": lambda: Decoder(config.text_config),
        }
        last, count = max(feature_layers(config)), config.vision_config.num_hidden_layers
        unused = (
            "vision_tower.post_layernorm.",
            "vision_tower.head.",
            *(f"vision_tower.encoder.layers.{i}." for i in range(last, count)),
        )
        return HubExport(
            folder, spec, builds, weights, tokenizer, TIED, EMBED_TOKENS, unused=unused
        )

    def tiny(self, name: str, folder: Path) -> transformers.LlavaForConditionalGeneration:
        """Write a random LLaVA of 3 and 2 layers, with one of its language models."""
        common = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
        kind = name.removeprefix("llava-") if name.removeprefix("llava-") in LANGUAGE_MODELS else ""
        text = {
            **common,
            "model_type": kind or "llama",
            "vocab_size": VOCABULARY,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 1,
        }
        if kind == "mistral":
            text |= {"head_dim": 16, "sliding_window": 12}
        config = transformers.LlavaConfig(
            vision_config={
                **common,
                "model_type": "siglip_vision_model" if kind == "qwen2" else "clip_vision_model",
                "num_hidden_layers": 3,
                "image_size": 32,
                "patch_size": 8,
            },
            text_config=text,
            image_token_index=4,
            image_seq_length=16,
            projector_hidden_act="linear" if name == "llava-linear" else "gelu",
            vision_feature_select_strategy="full" if kind == "qwen2" else "default",
        )
        model = transformers.LlavaForConditionalGeneration(config)
        images = transformers.CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        )
        save(
            model,
            folder,
            gain=0.5,
            template="<s> $A",
            image_processor=images,
            processor=lambda tokenizer: transformers.LlavaProcessor(
                images,
                tokenizer,
                patch_size=8,
                vision_feature_select_strategy=config.vision_feature_select_strategy,
                num_additional_image_tokens=0 if kind == "qwen2" else 1,
            ),
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
