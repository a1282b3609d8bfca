"""T5Gemma 2 (Zhang et al. 2025): PaLI's layout, an encoder and a decoder, with open weights.

SigLIP's patches stand among the text of an encoder. The decoder looks at its own tokens and at what
the encoder gave in one attention, whose keys and values of the latter are computed once:

picture -> vision_encoder -> projector -> soft_prompt, text -> text_encoder -> text_states
                       token, past_key_values -> decoder <- cross.{i}.* <- cross_kv <-|

The checkpoints were pretrained and not tuned: they go on with a text about a picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from vlmedge.arrays import Array
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
    TOKENIZER,
    read_config,
    read_generation,
    read_image_front_end,
    read_json,
    read_tokenizer,
)
from ._checkpoint.weights import Renamed, RowReader, Weights, WeightsView, open_weights, row_reader
from ._parts.cross_attention import encoder_decoder, filled_cache, nest, padding_mask, split_heads
from ._tiny import VOCABULARY, free_id, save
from ._trace.hub_export import HubExport, cache_argument, cached, positions

ARCHITECTURES = ("T5Gemma2ForConditionalGeneration",)
ALIASES = {
    "t5gemma2": "google/t5gemma-2-270m-270m",
    "t5gemma2-1b": "google/t5gemma-2-1b-1b",
    "t5gemma2-4b": "google/t5gemma-2-4b-4b",
}
TINY = ("t5gemma2",)

ENCODE, READ = ("vision_encoder", "projector"), ("text_encoder", "cross_kv")
ENCODER, DECODER = "model.encoder", "model.decoder"
TABLE = f"{ENCODER}.text_model.embed_tokens.weight"
END_ROW = f"{ENCODER}.text_model.embed_tokens.eoi_embedding"
EMBED_TOKENS = f"{ENCODER}.text_model.embed_tokens.whole"
CROSS = DECODER + ".layers.{}.self_attn.{}"
PREFIXES = {
    f"{ENCODER}.vision_tower.vision_model.": f"{ENCODER}.vision_tower.",
    # what lies on disk knows of no text_model
    **{
        f"{ENCODER}.{part}.": f"{ENCODER}.text_model.{part}."
        for part in ("embed_tokens", "layers", "norm")
    },
}
CAPTION = "{image} in this image, there is{prompt}"  # as its documentation begins one
ASK = "{image}Question: {question} Answer:"


class WithEndRow(WeightsView):
    """Weights, and the table of embeddings with the row that ends a picture in its place."""

    made = (EMBED_TOKENS,)

    def __init__(self, weights: Weights, row: int, scale: float) -> None:
        """Name the table `EMBED_TOKENS`.

        Args:
            weights: As they lie on disk.
            row: The id of the token that ends a picture.
            scale: Factor that the table, but not that row, is multiplied by later.
        """
        super().__init__(weights)
        self._row, self._scale = row, scale

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of every tensor, by name."""
        shapes = dict(self._weights.shapes())
        if TABLE in shapes:
            shapes[EMBED_TOKENS] = shapes[TABLE]
        return shapes

    def source(self, name: str) -> tuple[Weights, str]:
        """Return where a tensor lies; the table is the one on disk but for a row."""
        return self._weights, TABLE if name == EMBED_TOKENS else name

    def make(self, name: str) -> Array:
        """Read the table, and put the row in."""
        table = self._weights.read(TABLE)
        table[self._row] = self._end_row()
        return table

    def row_reader(self, name: str) -> RowReader:
        """Return what reads rows of one tensor."""
        if name != EMBED_TOKENS:
            return super().row_reader(name)
        read, end = row_reader(self._weights, TABLE), self._end_row()

        def rows(start: int, stop: int) -> Array:
            found = read(start, stop)
            if start <= self._row < stop:
                found = found.copy()
                found[self._row - start] = end
            return found

        return rows

    def _end_row(self) -> Array:
        return self._weights.read(END_ROW) / np.float32(self._scale)


class VisionEncoder(torch.nn.Module):
    """SigLIP: every patch, after the last norm."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        tower = transformers.AutoModel.from_config(config.encoder.vision_config)
        nest(self, f"{ENCODER}.vision_tower", tower)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map float [batch, 3, height, width] to image_embeds [batch, patches, width]."""
        tower = self.get_submodule(f"{ENCODER}.vision_tower")
        embeds: torch.Tensor = tower(pixel_values=pixel_values).last_hidden_state
        return embeds


class Projector(torch.nn.Module):
    """Means of neighbouring patches, a norm, and a matrix to the text's width."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        part = _model(config).encoder.multi_modal_projector
        nest(self, f"{ENCODER}.multi_modal_projector", part)

    def forward(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """Map [batch, patches, width] to soft_prompt [batch, tokens of a picture, width]."""
        project = self.get_submodule(f"{ENCODER}.multi_modal_projector")
        soft: torch.Tensor = project(image_embeds)
        return soft


class TextEncoder(torch.nn.Module):
    """The encoder, of embeddings: each token sees all others, or those that are near."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        part = _model(config).encoder.text_model
        part.embed_tokens = None  # rows are looked up on the host
        nest(self, f"{ENCODER}.text_model", part)
        self._window = config.encoder.text_config.sliding_window

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Map [batch, tokens, width] and int64 [batch, tokens] to text_states."""
        places = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
        ahead = places[None, :] - places[:, None]
        near = (ahead > -((self._window + 1) // 2)) & (ahead <= self._window // 2)
        shown = (attention_mask > 0)[:, None, None, :]
        masks = {
            "full_attention": _scores(shown | torch.zeros_like(near)),
            "sliding_attention": _scores(shown & near),
        }
        encoder = self.get_submodule(f"{ENCODER}.text_model")
        out = encoder(
            inputs_embeds=inputs_embeds, attention_mask=masks, position_ids=places[None, :]
        )
        states: torch.Tensor = out.last_hidden_state
        return states


class CrossKv(torch.nn.Module):
    """Keys and values of what the encoder gave, by the decoder's own matrices."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        text = config.decoder
        self._heads, self._layers = text.num_key_value_heads, text.num_hidden_layers
        for i, layer in enumerate(_model(config).decoder.layers):
            for name in ("k_proj", "v_proj", "k_norm"):
                nest(self, CROSS.format(i, name), getattr(layer.self_attn, name))

    def forward(self, text_states: torch.Tensor) -> list[torch.Tensor]:
        """Map [batch, states, width] to 2 x layers of [batch, heads, states, width of a head]."""
        found = []
        for i in range(self._layers):
            key, value = (
                split_heads(self.get_submodule(CROSS.format(i, name))(text_states), self._heads)
                for name in ("k_proj", "v_proj")
            )
            found += [self.get_submodule(CROSS.format(i, "k_norm"))(key), value]
        return found


class Decoder(torch.nn.Module):
    """The decoder with its cache, and what it looks at, as inputs."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        whole: Any = transformers.T5Gemma2ForConditionalGeneration(config)
        whole.model.decoder.embed_tokens = None  # rows are looked up on the host
        nest(self, DECODER, whole.model.decoder)
        self.lm_head = whole.lm_head
        self._window = config.decoder.sliding_window
        self._cap = config.decoder.final_logit_softcapping

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
        cross: list[torch.Tensor],
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Read [batch, tokens, width] and give logits [batch, tokens, vocabulary] and the cache."""
        decoder: Any = self.get_submodule(DECODER)
        tokens, total = inputs_embeds.shape[1], attention_mask.shape[1]
        asks = torch.arange(tokens, device=inputs_embeds.device)[:, None] + (total - tokens)
        looks = torch.arange(total, device=inputs_embeds.device)[None, :]
        shown = (attention_mask > 0)[:, None, None, :]
        states = padding_mask(encoder_attention_mask)
        states = states.expand(-1, -1, tokens, -1)
        reaches = {
            "full_attention": looks <= asks,
            "sliding_attention": (looks <= asks) & (asks - looks < self._window),
        }
        masks = {kind: _scores(reach[None, None] & shown) for kind, reach in reaches.items()}
        cache = filled_cache(past, cross)
        out = decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=masks,
            position_ids=positions(attention_mask, tokens),
            encoder_hidden_states=cross[0][:, 0],  # nothing but its length is read
            encoder_attention_mask={"full_attention": states},
            use_cache=True,
            **cache_argument(decoder, cache),
        )
        logits = self.lm_head(out.last_hidden_state)
        if self._cap is not None:
            logits = torch.tanh(logits / self._cap) * self._cap
        return logits, cached(cache.self_attention_cache)


def _scores(allowed: torch.Tensor) -> torch.Tensor:
    """Make what is added to the attention scores; written out for the engines' sake."""
    return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)


def _model(config: Any) -> Any:
    return transformers.T5Gemma2Model(config)


def describe(
    config: Any,
    image: ImageFrontEnd,
    generation: Generation,
    words: tuple[str, str, str],
    start: int,
) -> ModelSpec:
    """Name the graphs and tasks of one checkpoint, with its numbers.

    Args:
        config: transformers'.
        image: The image front end.
        generation: How it writes.
        words: Texts that begin a picture, stand for it and end it in a prompt.
        start: Token ids that the decoder begins with.
    """
    encoder, writer = config.encoder, config.decoder
    vision, text = encoder.vision_config, encoder.text_config
    size, rows = vision.image_size, encoder.mm_tokens_per_image
    patches = (size // vision.patch_size) ** 2
    seen = TensorSpec("image_embeds", "float32", ("batch", patches, vision.hidden_size))
    soft = TensorSpec("soft_prompt", "float32", ("batch", rows, text.hidden_size))
    begins, stands, ends = words

    def task(prompt: str) -> GenerateTask:
        return GenerateTask(
            encode=ENCODE,
            soft_prompt=soft.name,
            decoder="decoder",
            prompt=prompt,
            image_token_id=config.image_token_index,
            image_text=ImageText(stands, f"\n\n{begins}{stands}{ends}\n\n"),
            read=READ,
            start_ids=(start,),
        )

    return ModelSpec(
        family="t5gemma2",
        components=(
            Component(
                "vision_encoder",
                inputs=(TensorSpec("pixel_values", "float32", ("batch", 3, size, size)),),
                outputs=(seen,),
            ),
            Component("projector", inputs=(seen,), outputs=(soft,)),
            *encoder_decoder(
                writer.hidden_size,
                writer.num_key_value_heads,
                writer.num_hidden_layers,
                writer.head_dim,
                writer.vocab_size,
            ),
        ),
        tasks={"caption": task(CAPTION), "ask": task(ASK)},
        front_ends={
            "pixel_values": image,
            "input_ids": TextFrontEnd(
                TOKENIZER, text.max_position_embeddings, generation.pad_id, "left"
            ),
        },
        generation=generation,
    )


class T5Gemma2:
    """T5Gemma 2 checkpoints in transformers' layout."""

    def open(self, folder: Path, *, allow_pickle: bool = False) -> HubExport:
        """Read a checkpoint folder; no weights yet."""
        config = read_config(folder, needed=("encoder", "decoder"))
        scale = float(config.encoder.text_config.hidden_size**0.5)
        weights: Weights = WithEndRow(
            Renamed(open_weights(folder, allow_pickle=allow_pickle), PREFIXES),
            config.eoi_token_index,
            scale,
        )
        tokenizer = read_tokenizer(folder)  # before any work: it may be refused
        begins = (read_json(folder, "tokenizer_config.json") or {}).get("boi_token")
        stands, ends = (
            tokenizer.id_to_token(i) for i in (config.image_token_index, config.eoi_token_index)
        )
        if not isinstance(begins, str) or stands is None or ends is None:
            raise CheckpointError(
                f"{folder}: its tokenizer lacks the tokens that begin, stand for and end a picture "
                "(boi_token, image_token_index, eoi_token_index): download it again"
            )
        generation = read_generation(folder, config.decoder)
        start = (read_json(folder, "generation_config.json") or {}).get("decoder_start_token_id")
        default = presets.half(config.encoder.vision_config.image_size, "bilinear")
        spec = describe(
            config,
            read_image_front_end(folder, default),
            generation,
            (begins, stands, ends),
            config.decoder.bos_token_id if start is None else start,
        )
        builds = {
            "vision_encoder": lambda: VisionEncoder(config),
            "projector": lambda: Projector(config),
            "text_encoder": lambda: TextEncoder(config),
            "cross_kv": lambda: CrossKv(config),
            "decoder": lambda: Decoder(config),
        }
        return HubExport(
            folder,
            spec,
            builds,
            weights,
            tokenizer,
            tied={"lm_head.out_proj.weight": TABLE},
            embed_tokens=EMBED_TOKENS,
            extra=(END_ROW,),
            unused=(TABLE, f"{DECODER}.embed_tokens."),
            embed_scale=scale,
        )

    def tiny(self, name: str, folder: Path) -> transformers.T5Gemma2ForConditionalGeneration:
        """Write a random T5Gemma 2 of 2, 2 and 2 layers, one of two with a sliding window."""
        begins, ends = "<boi>", "<eoi>"
        text = {
            "vocab_size": VOCABULARY + 8,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 128,
            "sliding_window": 6,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 1,
        }
        config = transformers.T5Gemma2Config(
            encoder={
                "text_config": text,
                "vision_config": {
                    "model_type": "siglip_vision_model",
                    "hidden_size": 24,
                    "intermediate_size": 48,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "image_size": 32,
                    "patch_size": 8,
                    "vision_use_head": False,
                },
                "mm_tokens_per_image": 4,
                "image_token_index": 4,
                "eoi_token_index": free_id() + 1,
            },
            decoder=dict(text),
            image_token_index=4,
        )
        model = transformers.T5Gemma2ForConditionalGeneration(config)
        images = transformers.Gemma3ImageProcessor(size={"height": 32, "width": 32})

        def processor(tokenizer: Any) -> Any:
            tokens = {"boi_token": begins, "image_token": "<image>", "eoi_token": ends}
            tokenizer._set_model_specific_special_tokens(special_tokens=tokens)
            return transformers.Gemma3Processor(images, tokenizer, image_seq_length=4)

        save(
            model,
            folder,
            gain=0.5,
            template="<s> $A",
            image_processor=images,
            processor=processor,
            more=(begins, ends),
        )
        return model


FAMILY = T5Gemma2()
