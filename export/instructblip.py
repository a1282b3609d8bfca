"""InstructBLIP (Dai et al. 2023, arXiv 2305.06500): BLIP-2 whose Q-Former reads the instruction.

A text is read twice, each time by a tokenizer of its own:

    pixels -> vision_encoder -> image_states -> qformer -> projector -> soft_prompt -> writer
                                                   ^                                      ^
                                                 text                                   text
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers

from vlmedge.errors import CheckpointError
from vlmedge.spec import Component, GenerateTask, ModelSpec, Task, TensorSpec, TextFrontEnd

from ._checkpoint import presets
from ._checkpoint.folder import (
    TOKENIZER,
    read_config,
    read_generation,
    read_image_front_end,
    read_tokenizer,
)
from ._checkpoint.weights import open_weights
from ._parts import qformer as _qformer
from ._parts import qformer_writers as _writers
from ._parts import t5 as _t5
from ._parts.cross_attention import padding_mask
from ._parts.decoder import check_language_model
from ._tiny import VOCABULARY, save, tokenizer
from ._trace.hub_export import HubExport

ARCHITECTURES = ("InstructBlipForConditionalGeneration",)
ALIASES = {
    "instructblip": "Salesforce/instructblip-vicuna-7b",
    "instructblip-13b": "Salesforce/instructblip-vicuna-13b",
    "instructblip-flan-t5-xl": "Salesforce/instructblip-flan-t5-xl",
    "instructblip-flan-t5-xxl": "Salesforce/instructblip-flan-t5-xxl",
}
TINY = ("instructblip", "instructblip-flan-t5", "instructblip-opt")

READER = "qformer_tokenizer"  # the folder where transformers puts it
INSTRUCTION_TOKENIZER = "assets/qformer_tokenizer.json"

CAPTION = "A short image description: {prompt}"  # appendix E of the paper, for captions
WRITERS = {
    "llama": _writers.llama,
    "opt": _writers.opt,
    **dict.fromkeys(_t5.MODELS, _writers.t5),
}


class VisionEncoder(torch.nn.Module):
    """ViT-g: every token, after the last norm."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.vision_model = transformers.InstructBlipVisionModel(config.vision_config)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map float [batch, 3, height, width] to image_states [batch, patches + 1, width]."""
        states: torch.Tensor = self.vision_model(pixel_values=pixel_values).last_hidden_state
        return states


class QFormer(torch.nn.Module):
    """The learned queries look at the picture and at the instruction."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.qformer_config.hidden_size
        self.query_tokens = torch.nn.Parameter(torch.empty(1, config.num_query_tokens, width))
        self.qformer = transformers.InstructBlipQFormerModel(config.qformer_config)

    def forward(
        self,
        qformer_input_ids: torch.Tensor,
        qformer_attention_mask: torch.Tensor,
        image_states: torch.Tensor,
    ) -> torch.Tensor:
        """Map int64 [batch, tokens] twice and image_states to query_embeds."""
        count = self.query_tokens.shape[1]
        seen = torch.ones_like(qformer_attention_mask[:, :1]).expand(-1, count)
        out = self.qformer(
            input_ids=qformer_input_ids,
            attention_mask=padding_mask(torch.cat([seen, qformer_attention_mask], dim=1)),
            query_embeds=self.query_tokens.expand(image_states.shape[0], -1, -1),
            encoder_hidden_states=image_states,
        )
        embeds: torch.Tensor = out.last_hidden_state[:, :count]
        return embeds


def components(config: Any) -> tuple[Component, ...]:
    """Describe the three graphs from a picture and an instruction to the soft prompt."""
    sees = _qformer.vision_encoder(config, "image_states")
    _, reads, projects = _qformer.components(config)
    asked = (
        TensorSpec("qformer_input_ids", "int64", ("batch", "tokens")),
        TensorSpec("qformer_attention_mask", "int64", ("batch", "tokens")),
    )
    return sees, msgspec.structs.replace(reads, inputs=(*asked, *sees.outputs)), projects


BUILDS: Mapping[str, Callable[[Any], torch.nn.Module]] = {
    "vision_encoder": VisionEncoder,
    "qformer": QFormer,
    "projector": _qformer.Projector,
}


def tasks(writes: GenerateTask) -> dict[str, Task]:
    """Wire both tasks; a question is an instruction as it is."""
    sees, *instruct = _qformer.ENCODE
    task = msgspec.structs.replace(writes, encode=(sees,), instruct=tuple(instruct))
    return {
        "caption": msgspec.structs.replace(task, prompt=CAPTION),
        "ask": msgspec.structs.replace(task, prompt="{question}"),
    }


class InstructBlip:
    """InstructBLIP checkpoints in transformers' layout."""

    def open(self, folder: Path, *, allow_pickle: bool = False) -> HubExport:
        """Read a checkpoint folder; no weights yet."""
        config = read_config(folder, needed=("text_config", "vision_config", "qformer_config"))
        check_language_model(folder, config.text_config, WRITERS)
        if not (folder / READER).is_dir():
            raise CheckpointError(
                f"{folder} has no {READER}/, the Q-Former's tokenizer: download the whole folder"
            )
        weights = open_weights(folder, allow_pickle=allow_pickle)
        # before any work: they may be refused
        tokenizer, reader = read_tokenizer(folder), read_tokenizer(folder / READER)
        writer = WRITERS[config.text_config.model_type](config, weights)
        generation = read_generation(folder, config.text_config)
        qformer = config.qformer_config
        image = presets.clip_stretched(config.vision_config.image_size)
        spec = ModelSpec(
            family="instructblip",
            components=(*components(config), *writer.components),
            tasks=tasks(writer.task),
            front_ends={
                "pixel_values": read_image_front_end(folder, image),
                "input_ids": TextFrontEnd(TOKENIZER, writer.room, generation.pad_id, "left"),
                "qformer_input_ids": TextFrontEnd(
                    INSTRUCTION_TOKENIZER,
                    qformer.max_position_embeddings,
                    qformer.pad_token_id or 0,
                    "right",
                ),
            },
            generation=generation,
        )
        seeing = {name: partial(build, config) for name, build in BUILDS.items()}
        return HubExport(
            folder,
            spec,
            {**seeing, **writer.builds},
            weights,
            tokenizer,
            writer.tied,
            writer.table,
            unused=writer.unused,
            files={INSTRUCTION_TOKENIZER: reader.to_str().encode()},
        )

    def tiny(self, name: str, folder: Path) -> transformers.InstructBlipForConditionalGeneration:
        """Write a random one of 2, 4 and 2 layers, with the language model of one kind."""
        text = TEXTS[name]()
        parts = _qformer.tiny_parts(VOCABULARY)
        parts["qformer_config"] |= {"max_position_embeddings": 64, "pad_token_id": 1}
        config = transformers.InstructBlipConfig(**parts, text_config=text, image_token_index=4)
        model = transformers.InstructBlipForConditionalGeneration(config)
        if text["model_type"] == "t5":
            _t5.untie(model.language_model)
        images = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
        reader = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer("<e> $A </s>", ("what color is the star", "description")),
            bos_token="<e>",
            eos_token="</s>",
            pad_token="<pad>",
        )
        save(
            model,
            folder,
            template="$A </s>" if text["model_type"] == "t5" else "<s> $A",
            image_processor=images,
            processor=lambda tokenizer: transformers.InstructBlipProcessor(
                images, tokenizer, reader, config.num_query_tokens
            ),
        )
        return model


def _tiny_llama() -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_hidden_layers": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 160,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


TEXTS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "instructblip": _tiny_llama,
    "instructblip-flan-t5": partial(_t5.tiny_config, "t5"),
    "instructblip-opt": _writers.tiny_opt,
}

FAMILY = InstructBlip()
