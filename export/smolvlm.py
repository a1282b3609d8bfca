"""SmolVLM (Marafioti et al. 2025, arXiv 2504.05299) and Idefics3 (arXiv 2408.12637)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers

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
    Tiling,
)

from ._checkpoint.chat_template import ask_template, caption_template, read_chat, write_template
from ._checkpoint.folder import (
    TOKENIZER,
    read_config,
    read_generation,
    read_image_processor,
    read_tokenizer,
    token_text,
)
from ._checkpoint.preprocessor import front_end
from ._checkpoint.weights import Renamed, Weights, open_weights
from ._parts.decoder import EMBED_TOKENS, TIED, Decoder, check_language_model, describe_decoder
from ._tiny import VOCABULARY, save
from ._trace.hub_export import HubExport

ARCHITECTURES = ("SmolVLMForConditionalGeneration", "Idefics3ForConditionalGeneration")
ALIASES = {
    "smolvlm": "HuggingFaceTB/SmolVLM-256M-Instruct",
    "smolvlm-500m": "HuggingFaceTB/SmolVLM-500M-Instruct",
    "smolvlm2": "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
    "idefics3": "HuggingFaceM4/Idefics3-8B-Llama3",
}
TINY = ("smolvlm", "smolvlm-idefics3")

LANGUAGE_MODELS = ("llama",)
ENCODE = ("vision_encoder", "projector")
PREFIXES = {
    "model.text_model.": "language_model.model.",
    "model.vision_model.": "vision_model.",
    "model.connector.": "connector.",
    "lm_head.": "language_model.lm_head.",
}
FAKE, GLOBAL, END = "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"
ASK = f"User:{{image}}{{question}}{END}\nAssistant:"
REQUEST = "Describe the image in one sentence."
CAPTION = ASK.replace("{question}", REQUEST) + "{prompt}"
CHAT = (  # SmolVLM's own, as transformers' SMOLVLM processor has it
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


class VisionEncoder(torch.nn.Module):
    """A SigLIP tower; of the whole of a square, so that every place is known at export."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        vision = config.vision_config
        self.vision_model = _model(config).vision_model
        self.register_buffer("places", places(vision), persistent=False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map float [pieces, 3, height, width] to image_embeds [pieces, patches, width]."""
        tower = self.vision_model
        patches = tower.embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        hidden = patches + tower.embeddings.position_embedding(self.places)
        for layer in tower.encoder.layers:
            hidden = layer(hidden, attention_mask=None)
        embeds: torch.Tensor = tower.post_layernorm(hidden)
        return embeds


class Projector(torch.nn.Module):
    """Neighbouring patches side by side (pixel shuffle), then a Linear."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.connector = _model(config).connector

    def forward(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """Map [pieces, patches, width] to soft_prompt [pieces, patches / scale², width]."""
        soft: torch.Tensor = self.connector(image_embeds)
        return soft


def _model(config: Any) -> Any:
    return transformers.AutoModel.from_config(config)


def places(vision: Any) -> torch.Tensor:
    """Return the row of the position table for each patch, int64 [patches].

    They come from fractions, as for pictures of any shape, so that what rounding does to them is
    the same here: modeling_idefics3.Idefics3VisionEmbeddings.
    """
    side = vision.image_size // vision.patch_size
    boundaries = torch.arange(1 / side, 1.0, 1 / side)
    fractions = torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor(side))
    buckets = torch.bucketize(fractions.clamp(max=1.0 - 1e-6), boundaries, right=True)
    found: torch.Tensor = (buckets[:, None] * side + buckets[None, :]).flatten()
    return found


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
    seen = TensorSpec("image_embeds", "float32", ("batch", patches, vision.hidden_size))
    count = patches // config.scale_factor**2
    soft = TensorSpec("soft_prompt", "float32", ("batch", count, text.hidden_size))
    ask = GenerateTask(
        encode=ENCODE,
        soft_prompt="soft_prompt",
        decoder="decoder",
        prompt=ASK if chat is None else ask_template(chat),
        image_token_id=config.image_token_id,
        image_text=ImageText(
            placeholder,
            alone=f"{FAKE}{GLOBAL}{placeholder}{FAKE}",
            tile=f"{FAKE}<row_{{row}}_col_{{column}}>{placeholder}",
            row_end="\n",
            whole=f"\n{FAKE}{GLOBAL}{placeholder}{FAKE}",
        ),
    )
    caption = CAPTION if chat is None else caption_template(chat, REQUEST)
    tasks: dict[str, Task] = {"caption": msgspec.structs.replace(ask, prompt=caption), "ask": ask}
    if chat is not None:
        tasks["chat"] = chat
    return ModelSpec(
        family="smolvlm",
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
        front_ends={
            "pixel_values": image,
            "input_ids": TextFrontEnd(
                tokenizer=TOKENIZER,
                max_tokens=text.max_position_embeddings,
                pad_id=generation.pad_id,
                padding_side="left",
            ),
        },
        generation=generation,
    )


def read_tiled_front_end(folder: Path, size: int) -> ImageFrontEnd:
    """Read how pictures are cut; what the file leaves out is transformers' default."""
    config = read_image_processor(folder) or {}
    longest = (config.get("size") or {}).get("longest_edge", 4 * 364)
    tile = (config.get("max_image_size") or {}).get("longest_edge", 364)
    if tile != size:
        raise CheckpointError(
            f"{folder}: its tiles are {tile} pixels, its vision tower takes {size}: "
            "download preprocessor_config.json and config.json of one model"
        )
    tiled = ("do_image_splitting", "do_pad", "size", "max_image_size")
    plain = {name: value for name, value in config.items() if name not in tiled}
    defaults = {"resample": 1, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    square = front_end({**defaults, **plain, "size": {"height": tile, "width": tile}})
    split = bool(config.get("do_image_splitting", True))
    return msgspec.structs.replace(square, tiling=Tiling(longest, tile, split))


class SmolVlm:
    """SmolVLM and Idefics3 checkpoints in transformers' layout."""

    def open(self, folder: Path, *, allow_pickle: bool = False) -> HubExport:
        """Read a checkpoint folder; no weights yet."""
        config = read_config(folder, needed=("text_config", "vision_config"))
        check_language_model(folder, config.text_config, LANGUAGE_MODELS)
        weights: Weights = Renamed(open_weights(folder, allow_pickle=allow_pickle), PREFIXES)
        tokenizer = read_tokenizer(folder)  # before any work: it may be refused
        front = read_tiled_front_end(folder, config.vision_config.image_size)
        generation = read_generation(folder, config.text_config)
        placeholder = token_text(folder, tokenizer, "image_token_id", config.image_token_id)
        chat = read_chat(folder, "ask", placeholder)
        spec = describe(config, front, generation, placeholder, chat)
        builds = {
            "vision_encoder": lambda: VisionEncoder(config),
            "projector": lambda: Projector(config),
            "decoder": lambda: Decoder(config.text_config),
        }
        return HubExport(folder, spec, builds, weights, tokenizer, TIED, EMBED_TOKENS)

    def tiny(self, name: str, folder: Path) -> Any:
        """Write a random SmolVLM or Idefics3 of 2 and 2 layers.

        SmolVLM's processor asks for a package that reads out numbers, for its videos; Idefics3's
        does the same with pictures.
        """
        common = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
        small = name == "smolvlm"
        kind = "SmolVLM" if small else "Idefics3"
        config = getattr(transformers, f"{kind}Config")(
            vision_config={**common, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8},
            text_config={
                **common,
                "model_type": "llama",
                "vocab_size": VOCABULARY + 4,  # the processor adds tokens
                "num_hidden_layers": 2,
                "num_key_value_heads": 2,
                "max_position_embeddings": 1024,
                "bos_token_id": 0,
                "eos_token_id": 2,
                "pad_token_id": 1,
            },
            image_token_id=4,
            scale_factor=2,
            tie_word_embeddings=small,
            pad_token_id=1,
        )
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
        images = transformers.Idefics3ImageProcessor(
            size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
        )
        save(
            model,
            folder,
            words=0.3,
            template="<s> $A",
            image_processor=images,
            processor=lambda tokenizer: transformers.Idefics3Processor(
                images, tokenizer, image_seq_len=4
            ),
        )
        if small:
            write_template(folder, CHAT)
        return model


FAMILY = SmolVlm()
