"""PaLI (Chen et al. 2022, arXiv 2209.06794): a ViT and an mT5, with one Linear between them.

PaLI's weights were never released, by Google or by anyone: what is exported here is a model of its
kind that you trained or put together yourself. A checkpoint is a folder of

    config.json         {"architectures": ["PaLIForConditionalGeneration"],
                         "preset": "3B", "15B" or "17B": both of the paper's own configs; or
                         "vision_config": {...}, "text_config": {...}: transformers' configs; or
                         "vision": "vit", "text": "mt5": where two other checkpoints lie, from here
                         "prompts": {"caption": "...", "ask": "... {question}"}: if not the paper's}
    model.safetensors   projector.weight [width of the mT5, width of the ViT], projector.bias, and
                        what is trained: vision_model.*, language_model.*
    vit/                any SigLIP, SigLIP 2 of one resolution, or ViT, as it comes from the hub
    mt5/                any mT5, such as mT0

The ways to name a part may be mixed, and for each part the later one counts. What model.safetensors
holds takes the place of the parts' tensors. The tokenizer, preprocessor_config.json and
generation_config.json are those of the parts where the folder has none.

PaliGemma and mBLIP (families paligemma and blip2) are the near relatives whose weights are open.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from vlmedge.errors import CheckpointError
from vlmedge.spec import (
    Component,
    GenerateTask,
    Generation,
    ImageFrontEnd,
    ModelSpec,
    TensorSpec,
    TextFrontEnd,
)

from ._checkpoint import presets
from ._checkpoint.folder import (
    TOKENIZER,
    eager_float32,
    read_config,
    read_generation,
    read_image_front_end,
    read_json,
    read_tokenizer,
)
from ._checkpoint.weights import Renamed, Together, Weights, open_weights
from ._parts import t5 as _t5
from ._parts.pali import LEADING, PROJECTOR, TOWER, PaliModel, Tower, make_config, pair
from ._tiny import save
from ._trace.hub_export import HubExport
from ._trace.rename import VIT, respell
from ._trace.torch_modules import Build
from .shapes.pali import PRESETS

ARCHITECTURES = ("PaLIForConditionalGeneration",)
ALIASES: dict[str, str] = {}
TINY = ("pali", "pali-parts")

ENCODE = ("vision_encoder", "projector")
KINDS = {"vision": tuple(LEADING), "text": ("mt5",)}
# the paper's (recalled); EN is any of its languages
PROMPTS = {
    "caption": "Generate the alt_text in EN at 0:",
    "ask": "Answer in EN: {question}",
}
REST = f"{TOWER}.rest."  # SigLIP's text side, a classifier
TOWER_PREFIXES = {
    "vision_model.": f"{TOWER}.",
    "vit.": f"{TOWER}.",
    **{
        f"{part}.": f"{TOWER}.{part}."
        for part in ("embeddings", "encoder", "layers", "layernorm", "post_layernorm")
    },
    "": REST,
}
POOLING = (f"{TOWER}.head.", f"{TOWER}.pooler.")


class Projector(torch.nn.Module):
    """From the ViT's width to the mT5's."""

    def __init__(self, seen: int, width: int) -> None:
        super().__init__()
        self.projector = torch.nn.Linear(seen, width)

    def forward(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """Map [batch, patches, width] to soft_prompt [batch, patches, width of the mT5]."""
        soft: torch.Tensor = self.projector(image_embeds)
        return soft


@dataclass(frozen=True)
class Part:
    """One of the two models that a PaLI is put together from.

    Attributes:
        config: transformers'.
        folder: Where it lies, or none where the checkpoint itself holds it.
    """

    config: Any
    folder: Path | None = None

    def weights(self, prefixes: Mapping[str, str], *, allow_pickle: bool) -> tuple[Weights, ...]:
        """Open its own weights, if it has any, under a PaLI's names."""
        if self.folder is None:
            return ()
        return (Renamed(open_weights(self.folder, allow_pickle=allow_pickle), prefixes),)

    def holder(self, folder: Path, *names: str) -> Path:
        """Say whose files are read: the checkpoint's where it has one of them, else the part's."""
        if self.folder is None or any((folder / name).is_file() for name in names):
            return folder
        return self.folder


def read_part(folder: Path, raw: Mapping[str, Any], name: str) -> Part:
    """Read what config.json says of the part `name`, "vision" or "text"; refuse another kind."""
    place, inline = raw.get(name), raw.get(f"{name}_config")
    if place is not None:
        inside = folder / str(place)
        if not (inside / "config.json").is_file():
            raise CheckpointError(
                f"{inside / 'config.json'} is missing: {folder / 'config.json'} says that "
                f"its {name} part lies there: put it there"
            )
        config = read_config(inside, needed=("model_type",))
        config = getattr(config, f"{name}_config", config)  # of the whole of SigLIP
        check_kind(inside, name, config.model_type)
        return Part(config, inside)
    preset = raw.get("preset")
    if inline is None and preset is not None:
        if str(preset) not in PRESETS:
            raise CheckpointError(
                f"{folder / 'config.json'}: preset is {preset!r}: choose from {', '.join(PRESETS)}"
            )
        inline = PRESETS[str(preset)][name]
    if not isinstance(inline, Mapping):
        raise CheckpointError(
            f"{folder / 'config.json'} does not describe its {name} part: "
            f"give a 'preset', a {name + '_config'!r}, or a folder as {name!r}"
        )
    check_kind(folder, name, inline.get("model_type"))
    config = make_config(inline)
    eager_float32(config)
    return Part(config)


def check_kind(folder: Path, name: str, kind: object) -> None:
    """Refuse a part whose config is of another model_type."""
    if kind not in KINDS[name]:
        raise CheckpointError(
            f"{folder}: its {name} part is {kind!r}: choose one of {', '.join(KINDS[name])}"
        )


def read_prompts(folder: Path, raw: Mapping[str, Any]) -> dict[str, str]:
    """Read the templates of the tasks; those that config.json leaves out are the paper's."""
    given = raw.get("prompts", {})
    known = isinstance(given, Mapping) and set(given) <= set(PROMPTS)
    if not known or not all(isinstance(text, str) for text in given.values()):
        raise CheckpointError(
            f"{folder / 'config.json'}: prompts is {given!r}: give texts for {', '.join(PROMPTS)}"
        )
    prompts = {**PROMPTS, **given}
    if "{question}" not in prompts["ask"]:
        raise CheckpointError(
            f"{folder / 'config.json'}: the prompt of ask is {prompts['ask']!r}: "
            "write {question} where the question stands"
        )
    return prompts


def check_widths(folder: Path, weights: Weights, vision: Any, text: Any) -> None:
    """Refuse a projector that was trained between parts of other widths."""
    found = weights.shapes().get(f"{PROJECTOR}.weight")
    if found is not None and found != (text.d_model, vision.hidden_size):
        raise CheckpointError(
            f"{folder}: weight '{PROJECTOR}.weight' is {list(found)}, and its mT5 is "
            f"{text.d_model} wide, its ViT {vision.hidden_size}: "
            "take the mT5 and the ViT that the projector was trained with"
        )


def describe(
    vision: Any,
    text: Any,
    image: ImageFrontEnd,
    generation: Generation,
    prompts: Mapping[str, str],
) -> ModelSpec:
    """Name the graphs and tasks of one checkpoint, with its numbers."""
    height, width = pair(vision.image_size)
    high, wide = pair(vision.patch_size)
    patches = (height // high) * (width // wide)
    seen = TensorSpec("image_embeds", "float32", ("batch", patches, vision.hidden_size))
    soft = TensorSpec("soft_prompt", "float32", ("batch", patches, text.d_model))

    def task(prompt: str) -> GenerateTask:
        return GenerateTask(
            encode=ENCODE,
            soft_prompt=soft.name,
            decoder="decoder",
            prompt=prompt,
            read=_t5.READ,
            start_ids=(text.decoder_start_token_id,),
        )

    return ModelSpec(
        family="pali",
        components=(
            Component(
                "vision_encoder",
                inputs=(TensorSpec("pixel_values", "float32", ("batch", 3, height, width)),),
                outputs=(seen,),
            ),
            Component("projector", inputs=(seen,), outputs=(soft,)),
            *_t5.components(text),
        ),
        tasks={name: task(prompt) for name, prompt in prompts.items()},
        front_ends={
            "pixel_values": image,
            # the patches take no room: at 588 px they alone are 1764, and T5 has no last place
            "input_ids": TextFrontEnd(TOKENIZER, _t5.room(text, 0), generation.pad_id, "left"),
        },
        generation=generation,
    )


class Pali:
    """PaLI out of a checkpoint of its own, or of a ViT's and an mT5's."""

    def open(self, folder: Path, *, allow_pickle: bool = False) -> HubExport:
        """Read a checkpoint folder; no weights yet."""
        raw = read_json(folder, "config.json") or {}
        seeing, writing = (read_part(folder, raw, name) for name in KINDS)
        vision, text = seeing.config, writing.config
        prompts = read_prompts(folder, raw)
        # before any work: it may be refused
        files = ("tokenizer.json", "spiece.model", "tokenizer.model")
        tokenizer = read_tokenizer(writing.holder(folder, *files))
        weights = Together(
            *seeing.weights(TOWER_PREFIXES, allow_pickle=allow_pickle),
            *writing.weights({"": f"{_t5.ROOT}."}, allow_pickle=allow_pickle),
            open_weights(folder, allow_pickle=allow_pickle),
        )
        check_widths(folder, weights, vision, text)
        shown = seeing.holder(folder, "preprocessor_config.json", "processor_config.json")
        generation = read_generation(writing.holder(folder, "generation_config.json"), text)
        image = read_image_front_end(shown, presets.half(pair(vision.image_size)))
        builds: dict[str, Build] = {
            "vision_encoder": partial(Tower, vision),
            "projector": partial(Projector, vision.hidden_size, text.d_model),
            **{name: partial(build, text) for name, build in _t5.BUILDS.items()},
        }
        table = _t5.embedding_table(weights)
        return HubExport(
            folder,
            describe(vision, text, image, generation, prompts),
            builds,
            respell(weights, VIT, {"vision_encoder": builds["vision_encoder"]}),
            tokenizer,
            _t5.tied(table),
            table,
            unused=(REST, *POOLING, *_t5.unused(table)),
        )

    def tiny(self, name: str, folder: Path) -> PaliModel:
        """Write a random PaLI of 2, 2 and 2 layers: with SigLIP and whole, or a ViT's parts."""
        inside = name == "pali"
        vision = {
            "model_type": "siglip_vision_model" if inside else "vit",
            "hidden_size": 24,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
        }
        configs = make_config(vision), make_config(_t5.tiny_config("mt5"))
        for config in configs:
            eager_float32(config)
        model = PaliModel(*configs)
        size = {"height": 32, "width": 32}
        kind = transformers.SiglipImageProcessor if inside else transformers.ViTImageProcessor
        images: Any = kind(size=size)

        def processor(tokenizer: Any) -> Any:
            tokenizer.model_input_names = ["input_ids", "attention_mask"]
            return transformers.VisionTextDualEncoderProcessor(images, tokenizer)

        saved: Any = model  # none of transformers' models, and saved like one
        save(
            saved,
            folder,
            bos="</s>",
            template="$A </s>",
            image_processor=images,
            processor=processor,
        )
        if not inside:
            _take_apart(model, folder)
        return model


def _take_apart(model: PaliModel, folder: Path) -> None:
    """Put the ViT and the mT5 of a checkpoint into folders of their own, as the hub has them."""
    tower: Any = model.get_submodule(TOWER)
    places = {"vision": "vit", "text": "mt5"}
    tower.save_pretrained(folder / places["vision"])
    model.language_model.save_pretrained(folder / places["text"])
    for name, place in (("preprocessor_config", "vit"), ("tokenizer", "mt5")):
        for file in folder.glob(f"{name}*.json"):
            shutil.copy(file, folder / place)
    config = {"architectures": list(ARCHITECTURES), **places}
    (folder / "config.json").write_text(json.dumps(config))
    bridge = {f"{PROJECTOR}.{name}": p.detach() for name, p in model.projector.named_parameters()}
    save_file(bridge, folder / "model.safetensors", metadata={"format": "pt"})


FAMILY = Pali()
