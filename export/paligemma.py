"""PaliGemma (Beyer et al. 2024, arXiv 2407.07726) and PaliGemma 2 (arXiv 2412.03555).

They follow PaLI-3's recipe (arXiv 2310.09199) with open weights; PaLI's own were never released.
A checkpoint's folder may hold vae-oid.npz too: then `segment` gives masks, see
_parts/mask_decoder.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from vlmedge.spec import (
    Component,
    GenerateTask,
    Generation,
    ImageFrontEnd,
    ImageText,
    MaskCodes,
    ModelSpec,
    TensorSpec,
    TextFrontEnd,
)

from ._checkpoint import presets
from ._checkpoint.folder import (
    LOCATED_TOKENS,
    TOKENIZER,
    bare,
    read_config,
    read_generation,
    read_image_front_end,
    read_tokenizer,
    token_text,
)
from ._checkpoint.weights import Renamed, Together, Weights, open_weights
from ._parts import mask_decoder as _mask_decoder
from ._parts.decoder import (
    EMBED_TOKENS,
    TIED,
    PrefixDecoder,
    check_language_model,
    describe_decoder,
)
from ._tiny import VOCABULARY, save
from ._trace.hub_export import HubExport
from ._trace.torch_modules import Build
from .shapes.paligemma import MASK_FILE

ARCHITECTURES = ("PaliGemmaForConditionalGeneration",)
ALIASES = {
    "paligemma": "google/paligemma-3b-mix-224",
    "paligemma2": "google/paligemma2-3b-mix-224",
}
TINY = ("paligemma", "paligemma-2")

LANGUAGE_MODELS = ("gemma", "gemma2")
ENCODE = ("vision_encoder", "projector")
PREFIXES = {
    "vision_tower.vision_model.": "vision_tower.",
    "model.vision_tower.vision_model.": "vision_tower.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}
# the mix checkpoints' requests (big_vision's README, recalled)
REQUESTS = {
    "caption": "caption en",
    "ask": "answer en {question}",
    "detect": "detect {question}",
    "segment": "segment {question}",
}
LOCATE = ("detect", "segment")


class VisionEncoder(torch.nn.Module):
    """SigLIP: every patch, after the last norm."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.vision_tower = transformers.AutoModel.from_config(config.vision_config)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map float [batch, 3, height, width] to image_embeds [batch, patches, width]."""
        embeds: torch.Tensor = self.vision_tower(pixel_values=pixel_values).last_hidden_state
        return embeds


class Projector(torch.nn.Module):
    """From the tower's width to the language model's."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        seen, width = config.vision_config.hidden_size, config.vision_config.projection_dim
        self.multi_modal_projector = torch.nn.ModuleDict({"linear": torch.nn.Linear(seen, width)})

    def forward(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """Map [batch, patches, width] to soft_prompt [batch, patches, width of the LM]."""
        soft: torch.Tensor = self.multi_modal_projector["linear"](image_embeds)
        return soft


def describe(
    config: Any,
    image: ImageFrontEnd,
    generation: Generation,
    placeholder: str,
    bos: str,
    masks: Component | None,
) -> ModelSpec:
    """Name the graphs and tasks of one checkpoint, with its numbers; `masks` decodes masks."""
    vision, text = config.vision_config, config.text_config
    size = vision.image_size
    patches = (size // vision.patch_size) ** 2
    seen = TensorSpec("image_embeds", "float32", ("batch", patches, vision.hidden_size))
    soft = TensorSpec("soft_prompt", "float32", ("batch", patches, vision.projection_dim))

    codes = MaskCodes(MASK_FILE, None if masks is None else masks.name)

    def task(name: str) -> GenerateTask:
        return GenerateTask(
            encode=ENCODE,
            soft_prompt="soft_prompt",
            decoder="decoder",
            prompt=f"{{image}}{bos}{REQUESTS[name]}\n",
            image_token_id=config.image_token_id,
            image_text=ImageText(placeholder, placeholder),
            answer="locations" if name in LOCATE else "text",
            masks=codes if name == "segment" else None,
            several=" ; " if name in LOCATE else None,
        )

    return ModelSpec(
        family="paligemma",
        components=(
            Component(
                "vision_encoder",
                inputs=(TensorSpec("pixel_values", "float32", ("batch", 3, size, size)),),
                outputs=(seen,),
            ),
            Component("projector", inputs=(seen,), outputs=(soft,)),
            describe_decoder(text, prefix=True),
            *([] if masks is None else [masks]),
        ),
        tasks={name: task(name) for name in REQUESTS},
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


class PaliGemma:
    """PaliGemma checkpoints in transformers' layout."""

    def open(self, folder: Path, *, allow_pickle: bool = False) -> HubExport:
        """Read a checkpoint folder; no weights yet."""
        config = read_config(folder, needed=("text_config", "vision_config"))
        text = config.text_config
        check_language_model(folder, text, LANGUAGE_MODELS)
        weights: Weights = Renamed(open_weights(folder, allow_pickle=allow_pickle), PREFIXES)
        tokenizer = bare(read_tokenizer(folder))  # before any work: it may be refused
        default = presets.half(config.vision_config.image_size)
        answer_tokens = min(LOCATED_TOKENS, text.max_position_embeddings // 2)
        generation = read_generation(folder, text, answer_tokens)
        words = {"image_token_index": config.image_token_id, "bos_token_id": generation.bos_id}
        found = [token_text(folder, tokenizer, *named) for named in words.items()]
        front = read_image_front_end(folder, default)
        masks = _mask_decoder.find(folder)
        described = None if masks is None else _mask_decoder.COMPONENT
        placeholder, bos = found
        spec = describe(config, front, generation, placeholder, bos, described)
        builds: dict[str, Build] = {
            "vision_encoder": lambda: VisionEncoder(config),
            "projector": lambda: Projector(config),
            # its positions count from 1
            "decoder": lambda: PrefixDecoder(text, first_position=1),
        }
        if masks is not None:
            weights = Together(weights, masks)
            builds[_mask_decoder.NAME] = _mask_decoder.MaskDecoder
        # Gemma multiplies its embeddings, and the picture's come as they are
        scale = float(text.hidden_size**0.5)
        return HubExport(
            folder, spec, builds, weights, tokenizer, TIED, EMBED_TOKENS, embed_scale=scale
        )

    def tiny(self, name: str, folder: Path) -> transformers.PaliGemmaForConditionalGeneration:
        """Write a random PaliGemma of 2 and 2 layers.

        The first brings its decoder of masks; the second one's layers have a sliding window.
        """
        text = {
            "model_type": "gemma2" if name == "paligemma-2" else "gemma",
            "vocab_size": VOCABULARY + 1024 + 128,  # the processor adds locations and segments
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 256,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 1,
        }
        if name == "paligemma-2":
            text |= {"sliding_window": 12, "query_pre_attn_scalar": 16}
        config = transformers.PaliGemmaConfig(
            vision_config={
                "model_type": "siglip_vision_model",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 32,
                "patch_size": 8,
                "vision_use_head": False,
            },
            text_config=text,
            image_token_index=4,
            projection_dim=32,
            hidden_size=32,
        )
        model = transformers.PaliGemmaForConditionalGeneration(config)
        images = transformers.SiglipImageProcessor(
            size={"height": 32, "width": 32}, image_seq_length=16
        )
        save(
            model,
            folder,
            gain=0.5,
            words=0.1,
            template="$A",
            image_processor=images,
            processor=lambda tokenizer: transformers.PaliGemmaProcessor(images, tokenizer),
        )
        if name == "paligemma":
            _mask_decoder.save_tiny(folder)
        return model


FAMILY = PaliGemma()
