"""BLIP-2 (Li et al. 2023, arXiv 2301.12597) that writes with OPT, Flan-T5 or mT5 (mBLIP)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import transformers

from vlmedge.spec import ModelSpec, TextFrontEnd

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
from ._parts.decoder import check_language_model
from ._tiny import VOCABULARY, save
from ._trace.hub_export import HubExport

ARCHITECTURES = ("Blip2ForConditionalGeneration",)
ALIASES = {
    "blip2": "Salesforce/blip2-opt-2.7b",
    "blip2-opt-6.7b": "Salesforce/blip2-opt-6.7b",
    "blip2-flan-t5-xl": "Salesforce/blip2-flan-t5-xl",
    "blip2-flan-t5-xxl": "Salesforce/blip2-flan-t5-xxl",
    "mblip": "Gregor/mblip-mt0-xl",
}
TINY = ("blip2", "blip2-flan-t5", "blip2-mt5")

# section 4.1 of the paper
QUESTIONS = {
    "opt": "Question: {question} Answer:",
    **dict.fromkeys(_t5.MODELS, "Question: {question} Short answer:"),
}
WRITERS = {"opt": _writers.opt, **dict.fromkeys(_t5.MODELS, _writers.t5)}


class Blip2:
    """BLIP-2 checkpoints in transformers' layout."""

    def open(self, folder: Path, *, allow_pickle: bool = False) -> HubExport:
        """Read a checkpoint folder; no weights yet."""
        config = read_config(folder, needed=("text_config", "vision_config", "qformer_config"))
        check_language_model(folder, config.text_config, WRITERS)
        weights = open_weights(folder, allow_pickle=allow_pickle)
        tokenizer = read_tokenizer(folder)  # before any work: it may be refused
        kind = config.text_config.model_type
        writer, question = WRITERS[kind](config, weights), QUESTIONS[kind]
        generation = read_generation(folder, config.text_config)
        image = presets.clip_stretched(config.vision_config.image_size)
        spec = ModelSpec(
            family="blip2",
            components=(*_qformer.components(config), *writer.components),
            tasks={
                "caption": writer.task,
                "ask": msgspec.structs.replace(writer.task, prompt=question),
            },
            front_ends={
                "pixel_values": read_image_front_end(folder, image),
                "input_ids": TextFrontEnd(TOKENIZER, writer.room, generation.pad_id, "left"),
            },
            generation=generation,
        )
        seeing = {name: partial(build, config) for name, build in _qformer.BUILDS.items()}
        return HubExport(
            folder,
            spec,
            {**seeing, **writer.builds},
            weights,
            tokenizer,
            writer.tied,
            writer.table,
            unused=writer.unused,
        )

    def tiny(self, name: str, folder: Path) -> transformers.Blip2ForConditionalGeneration:
        """Write a random BLIP-2 of 2, 4 and 2 layers, with the language model of one kind."""
        text = TEXTS[name]()
        config = transformers.Blip2Config(
            **_qformer.tiny_parts(VOCABULARY),
            text_config=text,
            image_token_index=4,
        )
        model = transformers.Blip2ForConditionalGeneration(config)
        if name == "blip2-flan-t5":
            _t5.untie(model.language_model)
        images = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
        save(
            model,
            folder,
            words=0.1,
            bos="</s>",
            template="</s> $A" if text["model_type"] == "opt" else "$A </s>",
            image_processor=images,
            processor=lambda tokenizer: transformers.Blip2Processor(images, tokenizer, 6),
        )
        return model


TEXTS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "blip2": _writers.tiny_opt,
    "blip2-flan-t5": partial(_t5.tiny_config, "t5"),
    "blip2-mt5": partial(_t5.tiny_config, "mt5"),
}

FAMILY = Blip2()
