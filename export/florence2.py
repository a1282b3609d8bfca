"""Florence-2 (Xiao et al. 2023, arXiv 2311.06242): DaViT, then BART that reads and writes.

pixels -> vision_encoder -> projector -> soft_prompt
soft_prompt, text -> text_encoder -> text_states -> cross_kv -> cross.{i}.key, cross.{i}.value
                                                                    |  the same at every step
                               token, past_key_values -> decoder <--
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers
from transformers.models.bart.modeling_bart import BartDecoder, BartEncoder
from transformers.models.florence2.modeling_florence2 import Florence2VisionBackbone

from vlmedge.errors import CheckpointError
from vlmedge.spec import (
    Component,
    GenerateTask,
    Generation,
    ImageFrontEnd,
    ImageText,
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
    read_json,
    read_tokenizer,
    token_text,
)
from ._checkpoint.weights import Weights, open_weights
from ._parts.cross_attention import CrossKV, encoder_decoder, filled_cache, nest, padding_mask
from ._tiny import free_id, save
from ._trace.hub_export import HubExport, cache_argument, cached, causal_mask

ARCHITECTURES = ("Florence2ForConditionalGeneration",)
ALIASES = {
    "florence2": "florence-community/Florence-2-base",
    "florence2-large": "florence-community/Florence-2-large",
    "florence2-ft": "florence-community/Florence-2-base-ft",
}
TINY = ("florence2",)

ENCODE, READ = ("vision_encoder", "projector"), ("text_encoder", "cross_kv")
TOWER, PROJECTOR = "model.vision_tower", "model.multi_modal_projector"
ENCODER, DECODER = "model.language_model.encoder", "model.language_model.decoder"
EMBED_TOKENS = "model.language_model.shared.weight"
COPIES = (f"{ENCODER}.embed_tokens.weight", f"{DECODER}.embed_tokens.weight")
TIED = {"lm_head.weight": EMBED_TOKENS}
CROSS = DECODER + ".layers.{}.encoder_attn.{}_proj"
TEMPORAL = f"{PROJECTOR}.visual_temporal_embed."  # a table of sines, of which one row is read
OFFSET = 2  # of BART's positions
# What its processor makes of <CAPTION>, <DETAILED_CAPTION> and so on: the model reads the words.
WORDS = {
    "caption": "What does the image describe?",
    "detailed_caption": "Describe in detail what is shown in the image.",
    "more_detailed_caption": "Describe with a paragraph what is shown in the image.",
    "ocr": "What is the text in the image?",
    "ask": "{question}",
}
BOXES = {
    "detect": "Locate {question} in the image.",
    "detect_all": "Locate the objects with category name in the image.",
    "regions": "Locate the objects in the image, with their descriptions.",
    "ground": "Locate the phrases in the caption: {question}",
}
POLYGONS = {"segment": "Locate {question} in the image with mask"}


class VisionEncoder(torch.nn.Module):
    """DaViT: attention within windows of positions, then within groups of channels."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        nest(self, TOWER, Florence2VisionBackbone(config.vision_config))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map float [batch, 3, height, width] to image_states [batch, width, rows, columns]."""
        found: torch.Tensor = self.get_submodule(TOWER)(pixel_values).last_hidden_state
        return found


class Projector(torch.nn.Module):
    """The mean of all positions, then each position, in the language model's width.

    Written out: of the sines for a video's moments a picture takes the first row, sin 0 and cos 0.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        vision = config.vision_config
        width = vision.embed_dim[-1]
        for name, size in (("row", width // 2), ("column", width - width // 2)):
            table = torch.nn.Embedding(vision.max_position_embeddings, size)
            nest(self, f"{PROJECTOR}.image_position_embed.{name}_embeddings", table)
        linear = torch.nn.Linear(width, vision.projection_dim, bias=False)
        nest(self, f"{PROJECTOR}.image_projection", linear)
        nest(self, f"{PROJECTOR}.image_proj_norm", torch.nn.LayerNorm(vision.projection_dim))

    def forward(self, image_states: torch.Tensor) -> torch.Tensor:
        """Map [batch, width, rows, columns] to soft_prompt [batch, 1 + rows * columns, width]."""
        parts: Any = self.get_submodule(PROJECTOR)
        width, rows, columns = image_states.shape[1:]
        across = parts.image_position_embed.column_embeddings.weight[:columns]
        down = parts.image_position_embed.row_embeddings.weight[:rows]
        places = torch.cat(
            [
                across[None].expand(rows, -1, -1),
                down[:, None].expand(-1, columns, -1),
            ],
            dim=-1,
        ).reshape(rows * columns, width)
        moment = (torch.arange(width, device=image_states.device) % 2).to(image_states.dtype)
        states = image_states.flatten(2).transpose(1, 2) + places + moment
        states = torch.cat([states.mean(dim=1, keepdim=True), states], dim=1)
        found: torch.Tensor = parts.image_proj_norm(parts.image_projection(states))
        return found


class TextEncoder(torch.nn.Module):
    """BART's encoder, of embeddings: a soft prompt among those of a text."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        encoder = BartEncoder(config.text_config)
        del encoder.embed_tokens
        nest(self, ENCODER, encoder)

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Map [batch, tokens, width] and int64 [batch, tokens] to text_states."""
        encoder: Any = self.get_submodule(ENCODER)
        # positions are counted from a row's first token, on whichever side its padding is
        places = (attention_mask.cumsum(1) - 1).clamp(min=0) + OFFSET
        states = inputs_embeds + encoder.embed_positions.weight[places]
        states = encoder.layernorm_embedding(states)
        mask = padding_mask(attention_mask)
        for layer in encoder.layers:
            states = layer(states, mask)
        found: torch.Tensor = states
        return found


def cross_kv(config: Any) -> CrossKV:
    """Make what gives the decoder its keys and values of the encoder's states."""
    text = config.text_config
    widths = (text.d_model, text.d_model)
    return CrossKV(CROSS, ("k", "v"), text.decoder_layers, text.decoder_attention_heads, widths)


class Decoder(torch.nn.Module):
    """BART's decoder with its cache, and what it looks at, as inputs."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        text = config.text_config
        decoder = BartDecoder(text)
        del decoder.embed_tokens
        layers: Any = decoder.layers
        for layer in layers:  # their keys and values come from cross_kv
            del layer.encoder_attn.k_proj, layer.encoder_attn.v_proj
        nest(self, DECODER, decoder)
        self.lm_head = torch.nn.Linear(text.d_model, text.vocab_size, bias=False)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
        cross: list[torch.Tensor],
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Read [batch, tokens, width] and give logits [batch, tokens, vocabulary] and the cache."""
        decoder: Any = self.get_submodule(DECODER)
        cache = filled_cache(past, cross)
        mask = causal_mask(attention_mask, inputs_embeds.shape[1])
        looked_at = padding_mask(encoder_attention_mask)
        states = inputs_embeds + decoder.embed_positions.weight[position_ids + OFFSET]
        states = decoder.layernorm_embedding(states)
        for layer in decoder.layers:
            states = layer(
                states,
                mask,
                # not looked at, for the cache has all; its being there asks for the attention
                encoder_hidden_states=states,
                encoder_attention_mask=looked_at,
                **cache_argument(layer, cache),
            )
        return self.lm_head(states), cached(cache.self_attention_cache)


BUILDS = {
    "vision_encoder": VisionEncoder,
    "projector": Projector,
    "text_encoder": TextEncoder,
    "cross_kv": cross_kv,
    "decoder": Decoder,
}


def components(config: Any, image: ImageFrontEnd) -> tuple[Component, ...]:
    """Name the graphs of one checkpoint, with its numbers."""
    vision, text = config.vision_config, config.text_config
    height, width = image.resize_size
    rows, columns = _cells(vision, height), _cells(vision, width)
    seen = TensorSpec("image_states", "float32", ("batch", vision.embed_dim[-1], rows, columns))
    soft = ("batch", 1 + rows * columns, vision.projection_dim)
    return (
        Component(
            "vision_encoder",
            inputs=(TensorSpec("pixel_values", "float32", ("batch", 3, height, width)),),
            outputs=(seen,),
        ),
        Component(
            "projector", inputs=(seen,), outputs=(TensorSpec("soft_prompt", "float32", soft),)
        ),
        *encoder_decoder(
            text.d_model,
            text.decoder_attention_heads,
            text.decoder_layers,
            text.d_model // text.decoder_attention_heads,
            text.vocab_size,
            places=True,
        ),
    )


def tasks(config: Any, start: int, placeholder: str, bos: str, eos: str) -> dict[str, GenerateTask]:
    """Wire its requests, which the same graphs answer."""
    shared = GenerateTask(
        encode=ENCODE,
        soft_prompt="soft_prompt",
        decoder="decoder",
        prompt="",
        image_token_id=config.image_token_id,
        image_text=ImageText(placeholder, placeholder),
        read=READ,
        start_ids=(start,),
    )
    kinds: dict[Any, dict[str, str]] = {"text": WORDS, "boxes": BOXES, "polygons": POLYGONS}
    return {
        name: msgspec.structs.replace(shared, prompt=f"{{image}}{bos}{request}{eos}", answer=answer)
        for answer, requests in kinds.items()
        for name, request in requests.items()
    }


class Florence2:
    """Florence-2 checkpoints in transformers' layout."""

    def open(self, folder: Path, *, allow_pickle: bool = False) -> HubExport:
        """Read a checkpoint folder; no weights yet."""
        vision = (read_json(folder, "config.json") or {}).get("vision_config")
        if isinstance(vision, dict) and "dim_embed" in vision:
            raise CheckpointError(
                f"{folder} is in Microsoft's layout: use the same weights in transformers' layout, "
                f"such as {ALIASES['florence2']}"
            )
        config = read_config(folder, needed=("text_config", "vision_config"))
        text = config.text_config
        if text.model_type != "bart":
            raise CheckpointError(
                f"{folder} has the language model {text.model_type!r}: choose a checkpoint with "
                "'bart'"
            )
        weights = open_weights(folder, allow_pickle=allow_pickle)
        tokenizer = bare(read_tokenizer(folder))  # before any work: it may be refused
        default = presets.imagenet(768)
        image = read_image_front_end(folder, default)
        most = config.vision_config.max_position_embeddings
        rows, columns = (_cells(config.vision_config, side) for side in image.resize_size)
        if max(rows, columns) > most:
            raise CheckpointError(
                f"{folder}: pictures of {list(image.resize_size)} pixels are {rows} x {columns} "
                f"positions, and the model has {most} a side: lower size in "
                "preprocessor_config.json"
            )
        room = text.max_position_embeddings - rows * columns  # the placeholder is one already
        generation = _generation(folder, text, room)
        words = {
            "image_token_id": config.image_token_id,
            "bos_token_id": generation.bos_id,
            "eos_token_id": generation.eos_ids[0] if generation.eos_ids else None,
        }
        found = [token_text(folder, tokenizer, *named) for named in words.items()]
        _check_copies(weights)
        spec = ModelSpec(
            family="florence2",
            components=components(config, image),
            tasks=dict(tasks(config, _start(folder, text), *found)),
            front_ends={
                "pixel_values": image,
                "input_ids": TextFrontEnd(TOKENIZER, room, generation.pad_id, "right"),
            },
            generation=generation,
        )
        return HubExport(
            folder,
            spec,
            {name: partial(build, config) for name, build in BUILDS.items()},
            weights,
            tokenizer,
            TIED,
            EMBED_TOKENS,
            unused=(TEMPORAL, *COPIES),
            embed_scale=math.sqrt(text.d_model) if text.scale_embedding else 1.0,
        )

    def tiny(self, name: str, folder: Path) -> transformers.Florence2ForConditionalGeneration:
        """Write a random Florence-2: two stages, whose windows need padding.

        It knows every fourth place, so that its texts have words too.
        """
        marks = (*(f"<loc_{i}>" for i in range(0, 1000, 4)), "<poly>", "</poly>", "<sep>")
        config = transformers.Florence2Config(
            vision_config={
                "depths": (1, 2),
                "patch_size": (7, 3),
                "patch_stride": (4, 2),
                "patch_padding": (3, 1),
                "patch_prenorm": (False, True),
                "embed_dim": (16, 32),
                "num_heads": (2, 4),
                "num_groups": (2, 4),
                "window_size": 3,
                "projection_dim": 32,
                "max_position_embeddings": 6,
            },
            text_config={
                "model_type": "bart",
                "vocab_size": free_id() + len(marks),
                "d_model": 32,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_ffn_dim": 64,
                "decoder_ffn_dim": 64,
                "encoder_attention_heads": 4,
                "decoder_attention_heads": 4,
                "max_position_embeddings": 128,
                "scale_embedding": True,
            },
            image_token_id=4,
        )
        model = transformers.Florence2ForConditionalGeneration(config)
        options = model.generation_config
        options.forced_bos_token_id, options.forced_eos_token_id = 0, 2
        options.decoder_start_token_id = 2
        options.no_repeat_ngram_size, options.num_beams, options.early_stopping = 2, 3, True
        options.min_new_tokens, options.max_new_tokens = 6, 12
        images = transformers.CLIPImageProcessor(
            size={"height": 32, "width": 32},
            do_center_crop=False,
            image_mean=presets.IMAGENET_MEAN,
            image_std=presets.IMAGENET_STD,
            image_seq_length=1 + 4 * 4,
        )

        def processor(tokenizer: Any) -> transformers.Florence2Processor:
            marked = transformers.PreTrainedTokenizerFast(
                tokenizer_object=tokenizer.backend_tokenizer,
                bos_token="<s>",
                eos_token="</s>",
                pad_token="<pad>",
                extra_special_tokens={"image_token": "<image>"},
            )
            return transformers.Florence2Processor(images, marked)

        save(
            model,
            folder,
            template="<s> $A </s>",
            image_processor=images,
            processor=processor,
            more=marks,
        )
        return model


def _cells(vision: Any, side: int) -> int:
    """Count the positions along a side of so many pixels after all stages."""
    sizes = vision.patch_size, vision.patch_stride, vision.patch_padding
    for size, stride, padding in zip(*sizes, strict=True):
        side = (side + 2 * padding - size) // stride + 1
    return side


def _start(folder: Path, text: Any) -> int:
    """Return the token that the decoder begins with."""
    written = (read_json(folder, "generation_config.json") or {}).get("decoder_start_token_id")
    return int(text.decoder_start_token_id if written is None else written)


def _generation(folder: Path, text: Any, room: int) -> Generation:
    """Read the defaults; answers may be long unless the checkpoint says otherwise."""
    written = read_json(folder, "generation_config.json") or {}
    found = read_generation(folder, text, min(LOCATED_TOKENS, room - 1))
    return msgspec.structs.replace(found, forced_bos_id=written.get("forced_bos_token_id"))


def _check_copies(weights: Weights) -> None:
    """Refuse sides that have an embedding table each: BART's share one, whatever is written."""
    names = [name for name in (EMBED_TOKENS, *COPIES) if name in weights.shapes()]
    for name in names[1:]:
        if (weights.read(name) != weights.read(names[0])).any():
            raise CheckpointError(
                f"weight {name!r} differs from {names[0]!r}: encoder and decoder share one table: "
                "convert the checkpoint again"
            )


FAMILY = Florence2()
