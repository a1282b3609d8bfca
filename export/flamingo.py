"""Flamingo (Alayrac et al. 2022, arXiv 2204.14198) as IDEFICS, its open reproduction, has it.

DeepMind's own weights were never released. A picture is resampled to a few latents; they become
keys and values of the gated cross-attention layers once, before the text is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from vlmedge.errors import CheckpointError
from vlmedge.spec import Generation, ImageFrontEnd, ImageText, ModelSpec, TextFrontEnd

from ._checkpoint import presets
from ._checkpoint.folder import (
    TOKENIZER,
    bare,
    read_config,
    read_generation,
    read_image_processor,
    read_tokenizer,
)
from ._checkpoint.preprocessor import front_end
from ._checkpoint.weights import Joined, Weights, open_weights
from ._parts.gated_media import components, describe_decoder, task, visible
from ._tiny import VOCABULARY, save
from ._trace.hub_export import HubExport, cache_argument, cache_of, cached, causal_mask, positions

ARCHITECTURES = ("IdeficsForVisionText2Text",)
ALIASES = {
    "flamingo": "HuggingFaceM4/idefics-9b",
    "idefics": "HuggingFaceM4/idefics-9b",
    "idefics-instruct": "HuggingFaceM4/idefics-9b-instruct",
}
TINY = ("flamingo", "flamingo-plain")

EMBED_TOKENS = "model.embed_tokens.joined"
TABLE, ADDED = "model.embed_tokens.weight", "model.embed_tokens.additional_embedding.weight"
FAKE, IMAGE, END = "<fake_token_around_image>", "<image>", "<end_of_utterance>"


class VisionEncoder(torch.nn.Module):
    """A CLIP tower: every token, before the last norm."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.model: Any = torch.nn.Module()  # so that names are the checkpoint's
        tower = _model(config).vision_model
        del tower.post_layernorm  # it is for the class token alone
        self.model.vision_model = tower

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map float [batch, 3, height, width] to image_embeds [batch, patches + 1, width]."""
        tower = self.model.vision_model
        hidden = tower.pre_layrnorm(tower.embeddings(pixel_values))
        embeds: torch.Tensor = tower.encoder(inputs_embeds=hidden).last_hidden_state
        return embeds


class Resampler(torch.nn.Module):
    """Latents look at a picture (Perceiver), however many patches it has."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.model: Any = torch.nn.Module()  # so that names are the checkpoint's
        self.model.perceiver_resampler = _model(config).perceiver_resampler

    def forward(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """Map [batch, patches + 1, width] to latent_embeds [batch, latents, width]."""
        latents: torch.Tensor = self.model.perceiver_resampler(image_embeds)
        return latents


class CrossKv(torch.nn.Module):
    """Keys and values of a picture, for all gated layers in one tensor."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.model: Any = torch.nn.Module()  # so that names are the checkpoint's
        layers = torch.nn.ModuleList()
        for gated in _model(config).gated_cross_attn_layers:
            kept: Any = torch.nn.Module()
            kept.cross_attn = torch.nn.Module()
            for name in ("k_proj", "v_proj", *(["k_layer_norm"] if config.qk_layer_norms else [])):
                setattr(kept.cross_attn, name, getattr(gated.cross_attn, name))
            layers.append(kept)
        self.model.gated_cross_attn_layers = layers
        self._heads = config.num_attention_heads

    def forward(self, latent_embeds: torch.Tensor) -> torch.Tensor:
        """Map [batch, latents, width] to soft_prompt [batch, latents, 2 * layers * width of LM]."""
        found = []
        for layer in self.model.gated_cross_attn_layers:
            attention = layer.cross_attn
            key = attention.k_proj(latent_embeds)
            if hasattr(attention, "k_layer_norm"):  # of each head
                batch, length, width = key.shape
                split = key.view(batch, length, self._heads, width // self._heads)
                key = attention.k_layer_norm(split).flatten(-2)
            found += [key, attention.v_proj(latent_embeds)]
        return torch.cat(found, dim=-1)


class Decoder(torch.nn.Module):
    """LLaMA with gated cross-attention before every few layers."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        whole: Any = transformers.IdeficsForVisionText2Text(config)
        self.model: Any = torch.nn.Module()  # so that names are the checkpoint's
        for name in ("layers", "norm", "gated_cross_attn_layers"):
            setattr(self.model, name, getattr(whole.model, name))
        for gated in whole.model.gated_cross_attn_layers:
            for name in ("k_proj", "v_proj", "k_layer_norm"):  # see CrossKv
                if hasattr(gated.cross_attn, name):
                    delattr(gated.cross_attn, name)
        self.lm_head = whole.lm_head
        self._every = config.cross_layer_interval
        self._latents = config.perceiver_config.resampler_n_latents

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        media_index: torch.Tensor,
        media: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Read on.

        Args:
            inputs_embeds: float [batch, tokens, width].
            attention_mask: int64 [batch, total].
            media_index: Index of the picture that each token sees, int64 [batch, tokens]; -1 is
                none.
            media: Keys and values that CrossKv computed from the pictures, one after the other,
                float [batch, media, 2 * layers * width].
            past: The cache.
        """
        tokens = inputs_embeds.shape[1]
        cache = cache_of(past)
        places = positions(attention_mask, tokens)
        mask = causal_mask(attention_mask, tokens)
        shut, sees = visible(media_index, media.shape[1], self._latents)
        pairs = media.chunk(2 * len(self.model.gated_cross_attn_layers), dim=-1)
        hidden = inputs_embeds
        for number, layer in enumerate(self.model.layers):
            if number % self._every == 0:
                i = number // self._every
                gated = self.model.gated_cross_attn_layers[i]
                hidden = _look(gated, hidden, pairs[2 * i], pairs[2 * i + 1], shut, sees)
            named = cache_argument(layer, cache)
            hidden = layer(hidden, attention_mask=mask, position_ids=places, **named)
        logits = self.lm_head(self.model.norm(hidden))
        return logits, cached(cache)


def _look(
    gated: Any,
    hidden: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    shut: torch.Tensor,
    sees: torch.Tensor,
) -> torch.Tensor:
    """Run one gated layer: modeling_idefics.IdeficsGatedCrossAttentionLayer on given keys."""
    attention = gated.cross_attn
    heads = attention.num_heads

    def split(flat: torch.Tensor) -> torch.Tensor:
        batch, length, width = flat.shape
        return flat.view(batch, length, heads, width // heads).transpose(1, 2)

    query = split(attention.q_proj(gated.input_layernorm(hidden)))
    if attention.qk_layer_norms:
        query = attention.q_layer_norm(query)
    scores = query @ split(key).transpose(2, 3) * attention.scaling + shut
    mixed = (scores.softmax(-1) @ split(value)).transpose(1, 2).flatten(2)
    # a token before every picture looks at none, where softmax would share out evenly
    found = torch.where(sees, attention.o_proj(mixed), 0.0)
    hidden = hidden + gated.alpha_cross_attn.tanh() * found
    grown = gated.mlp(gated.post_attention_layernorm(hidden))
    out: torch.Tensor = hidden + gated.alpha_dense.tanh() * grown
    return out


def _model(config: Any) -> Any:
    return transformers.IdeficsModel(config)


def describe(
    config: Any,
    image: ImageFrontEnd,
    generation: Generation,
    bos: str,
    image_token_id: int,
    chats: bool,
) -> ModelSpec:
    """Name the graphs and tasks of one checkpoint, with its numbers."""
    vision = config.vision_config
    layers, width = config.num_hidden_layers, config.hidden_size
    media_width = 2 * (layers // config.cross_layer_interval) * width
    vocabulary = config.vocab_size + config.additional_vocab_size
    heads = config.num_attention_heads

    ask, caption, answer = (
        "{image}Question: {question} Answer:",
        "{image}Caption:{prompt}",
        " {text}\n",
    )
    if chats:
        ask = f"User:{{image}}{{question}}{END}\nAssistant:"
        caption = ask.replace("{question}", "Describe this image.") + "{prompt}"
        answer = f" {{text}}{END}\n"
    shown = ImageText(IMAGE, f"{FAKE}{IMAGE}{FAKE}")
    prompts = {"caption": caption, "ask": ask}
    return ModelSpec(
        family="flamingo",
        components=components(
            vision.image_size,
            (vision.image_size // vision.patch_size) ** 2 + 1,
            vision.embed_dim,
            config.perceiver_config.resampler_n_latents,
            media_width,
            describe_decoder(layers, heads, width, media_width, vocabulary),
        ),
        tasks={
            name: task(prompt, answer, shown, image_token_id, bos)
            for name, prompt in prompts.items()
        },
        front_ends={
            "pixel_values": image,
            "input_ids": TextFrontEnd(
                tokenizer=TOKENIZER,
                max_tokens=getattr(config, "max_position_embeddings", 2048),
                pad_id=generation.pad_id,
                padding_side="left",
            ),
        },
        generation=generation,
    )


class Flamingo:
    """IDEFICS checkpoints in transformers' layout."""

    def open(self, folder: Path, *, allow_pickle: bool = False) -> HubExport:
        """Read a checkpoint folder; no weights yet."""
        config = read_config(folder, needed=("vision_config", "cross_layer_interval"))
        if not config.use_resampler:
            raise CheckpointError(
                f"{folder}: use_resampler is false: choose an IDEFICS checkpoint with a resampler"
            )
        weights: Weights = Joined(
            open_weights(folder, allow_pickle=allow_pickle), {EMBED_TOKENS: (TABLE, ADDED)}
        )
        tokenizer = bare(read_tokenizer(folder))  # before any work: it may be refused
        raw = read_image_processor(folder) or {}
        side = config.vision_config.image_size
        front = front_end(
            {
                "size": {"height": side, "width": side},
                "resample": 3,
                "image_mean": presets.CLIP_MEAN,
                "image_std": presets.CLIP_STD,
                **raw,
            }
        )
        generation = read_generation(folder, config)
        image, fake = tokenizer.token_to_id(IMAGE), tokenizer.token_to_id(FAKE)
        bos = None if generation.bos_id is None else tokenizer.id_to_token(generation.bos_id)
        if image is None or fake is None or bos is None:
            raise CheckpointError(
                f"{folder}: its tokenizer lacks {IMAGE!r}, {FAKE!r} or bos_token_id: "
                "download tokenizer.json again"
            )
        chats = tokenizer.token_to_id(END) is not None
        spec = describe(config, front, generation, bos, image, chats)
        builds = {
            "vision_encoder": lambda: VisionEncoder(config),
            "resampler": lambda: Resampler(config),
            "cross_kv": lambda: CrossKv(config),
            "decoder": lambda: Decoder(config),
        }
        return HubExport(
            folder,
            spec,
            builds,
            weights,
            tokenizer,
            tied={"lm_head.weight": TABLE, "lm_head.additional_fc.weight": ADDED},
            embed_tokens=EMBED_TOKENS,
            unused=(TABLE, ADDED, "model.vision_model.post_layernorm."),
        )

    def tiny(self, name: str, folder: Path) -> transformers.IdeficsForVisionText2Text:
        """Write a random IDEFICS of 2 and 4 layers, two of them with gates before them."""
        config = transformers.IdeficsConfig(
            vocab_size=VOCABULARY,
            additional_vocab_size=1,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            cross_layer_interval=2,
            use_resampler=True,
            qk_layer_norms=name == "flamingo",
            alpha_type="vector" if name == "flamingo" else "float",
            vision_config={
                "embed_dim": 24,
                "image_size": 32,
                "patch_size": 8,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 64,
            },
            perceiver_config={
                "resampler_n_latents": 2,
                "resampler_depth": 2,
                "resampler_n_heads": 4,
                "resampler_head_dim": 8,
                "qk_layer_norms_perceiver": name == "flamingo",
            },
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=1,
        )
        model = transformers.IdeficsForVisionText2Text(config)
        images = transformers.IdeficsImageProcessor(image_size=32)

        def processor(tokenizer: Any) -> Any:
            tokenizer.add_special_tokens({"additional_special_tokens": [FAKE, IMAGE]})
            return transformers.IdeficsProcessor(images, tokenizer)

        save(model, folder, gain=0.5, template="$A", image_processor=images, processor=processor)
        return model


FAMILY = Flamingo()
