"""OpenFlamingo 4B and 9B (Awadalla et al. 2023, arXiv 2308.01390) on GPT-NeoX or MPT.

What is released holds the layers that were trained, and no others. A checkpoint is a folder of

    config.json       {"architectures": ["OpenFlamingo"],
                       "cross_attn_every_n_layers": 2 of the 4B, 4 of the 9B,
                       "vision": "clip", "text": "lm": where the other two lie, from here}
    checkpoint.pt     as it is released, or its tensors as model.safetensors:
                          openflamingo/OpenFlamingo-4B-vitl-rpj3b, -4B-vitl-rpj3b-langinstruct,
                          openflamingo/OpenFlamingo-9B-vitl-mpt7b
    clip/             openai/clip-vit-large-patch14
    lm/               togethercomputer/RedPajama-INCITE-Base-3B-v1 or -Instruct-3B-v1 of the 4B,
                      anas-awadalla/mpt-7b of the 9B; with its tokenizer

A `perceiver_depth` of other than 6 layers or `perceiver_latents` of other than 64 are told by
config.json too. Tensors of checkpoint.pt take the place of the parts' own.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers
from safetensors.torch import save_file
from transformers.cache_utils import DynamicCache
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from vlmedge.spec import Generation, ImageFrontEnd, ImageText, ModelSpec, TextFrontEnd

from ._checkpoint import presets
from ._checkpoint.folder import (
    TOKENIZER,
    read_generation,
    read_image_front_end,
    read_json,
    read_tokenizer,
)
from ._checkpoint.weights import Renamed, Together, Weights, open_weights
from ._parts.gated_media import components, describe_decoder, task, visible
from ._parts.llava import VisionEncoder, seen_patches, unused_layers
from ._parts.llava_v1 import tower_prefixes
from ._parts.openflamingo import (
    END,
    IMAGE,
    INNER,
    LANGUAGE_MODELS,
    OpenFlamingo,
    Perceiver,
    Processor,
    make_gated,
)
from ._parts.openflamingo_folder import (
    HEAD,
    LM,
    TOWER,
    check_trained,
    cut_vocabulary,
    open_trained,
    read_place,
    read_size,
    read_text,
    read_vision,
)
from ._tiny import SPECIAL, VOCABULARY, free_id, save
from ._trace.hub_export import HubExport, cache_of, cached, causal_mask, positions
from .shapes.openflamingo import (
    DEPTH,
    EVERY,
    LATENTS,
    PERCEIVER_DEPTH,
    PERCEIVER_LATENTS,
    gated_layers,
)

ARCHITECTURES = ("OpenFlamingo",)
ALIASES: dict[str, str] = {}
TINY = ("openflamingo-neox", "openflamingo-mpt")

SPARE = ("clip.", "open_clip.", "tied.")  # text sides, the frozen tower, heads that are the table
CAPTION, ASK = "{image}Output:{prompt}", "{image}Question:{question} Short answer:"


class Resampler(torch.nn.Module):
    """The Perceiver, under the checkpoint's name for it."""

    def __init__(self, width: int, depth: int, latents: int) -> None:
        super().__init__()
        self.perceiver = Perceiver(width, depth, latents)

    def forward(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """Map [batch, patches, width] to latent_embeds [batch, latents, width]."""
        latents: torch.Tensor = self.perceiver(image_embeds)
        return latents


class CrossKv(torch.nn.Module):
    """Keys and values of a picture, for all gated layers in one tensor."""

    def __init__(self, width: int, seen_width: int, layers: int, every: int) -> None:
        super().__init__()
        self.lang_encoder: Any = torch.nn.Module()  # so that names are the checkpoint's
        gated: Any = make_gated(width, seen_width, layers, every)
        for layer in gated.values():
            kept: Any = torch.nn.Module()
            kept.to_kv = layer.attn.to_kv
            for name in ("attn_gate", "ff_gate", "ff"):
                delattr(layer, name)
            layer.attn = kept
        self.lang_encoder.gated_cross_attn_layers = gated

    def forward(self, latent_embeds: torch.Tensor) -> torch.Tensor:
        """Map [batch, latents, width] to soft_prompt [batch, latents, 2 * inner * layers]."""
        layers = self.lang_encoder.gated_cross_attn_layers.values()
        return torch.cat([layer.attn.to_kv(latent_embeds) for layer in layers], dim=-1)


class Decoder(torch.nn.Module, ABC):
    """A language model with gated cross-attention before some of its layers."""

    def __init__(self, config: Any, seen_width: int, every: int, latents: int) -> None:
        super().__init__()
        self._names, self._latents = LANGUAGE_MODELS[config.model_type], latents
        self.lang_encoder: Any = transformers.AutoModelForCausalLM.from_config(config)
        delattr(self.body, self._names.table)  # rows are looked up on the host
        layers = config.num_hidden_layers
        gated: Any = make_gated(config.hidden_size, seen_width, layers, every)
        for layer in gated.values():
            del layer.attn.to_kv  # see CrossKv
        self.lang_encoder.gated_cross_attn_layers = gated

    @property
    def body(self) -> Any:
        """The language model without its projection to logits."""
        return self.lang_encoder.get_submodule(self._names.body)

    @abstractmethod
    def prepare(
        self, hidden: torch.Tensor, attention_mask: torch.Tensor, cache: DynamicCache
    ) -> Callable[[Any, torch.Tensor], torch.Tensor]:
        """Make what all layers need, once; return what runs one of them."""

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
                float [batch, media, 2 * inner * layers].
            past: The cache.
        """
        cache = cache_of(past)
        run = self.prepare(inputs_embeds, attention_mask, cache)
        shut, sees = visible(media_index, media.shape[1], self._latents)
        gated = self.lang_encoder.gated_cross_attn_layers
        pairs = iter(media.chunk(2 * len(gated), dim=-1))
        hidden = inputs_embeds
        for number, layer in enumerate(getattr(self.body, self._names.layers)):
            if str(number) in gated:
                hidden = gated[str(number)](hidden, next(pairs), next(pairs), shut, sees)
            hidden = run(layer, hidden)
        logits = self.lang_encoder.lm_head(getattr(self.body, self._names.norm)(hidden))
        return logits, cached(cache)


class NeoxDecoder(Decoder):
    """On GPT-NeoX, which turns queries and keys by their positions."""

    def prepare(
        self, hidden: torch.Tensor, attention_mask: torch.Tensor, cache: DynamicCache
    ) -> Callable[[Any, torch.Tensor], torch.Tensor]:
        """Compute the mask and the turns."""
        tokens = hidden.shape[1]
        mask = causal_mask(attention_mask, tokens)
        turns = self.body.rotary_emb(hidden, position_ids=positions(attention_mask, tokens))

        def run(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = layer(
                hidden, attention_mask=mask, position_embeddings=turns, layer_past=cache
            )
            return out

        return run


class MptDecoder(Decoder):
    """On MPT, whose attention fades with distance, at a slope of each head's own (ALiBi)."""

    def __init__(self, config: Any, seen_width: int, every: int, latents: int) -> None:
        super().__init__(config, seen_width, every, latents)
        rising = build_mpt_alibi_tensor(config.n_heads, 2)  # [heads, 1, 2]: -slope, 0
        self.register_buffer("slopes", -rising[:, :, :1].float(), persistent=False)

    def prepare(
        self, hidden: torch.Tensor, attention_mask: torch.Tensor, cache: DynamicCache
    ) -> Callable[[Any, torch.Tensor], torch.Tensor]:
        """Compute a mask of each head's own, float [batch, heads, tokens, total].

        MPT counts from the last key on, which comes to the same behind a softmax. Distances stay
        small where they matter, also in half precision, and neither padding nor a cache moves them.
        """
        tokens, total = hidden.shape[1], attention_mask.shape[1]
        looks = torch.arange(total, device=hidden.device)
        asks = torch.arange(tokens, device=hidden.device) + (total - tokens)
        fading = (looks[None, :] - asks[:, None]) * self.get_buffer("slopes")
        shut = causal_mask(attention_mask, tokens)
        mask = torch.where(shut < 0, shut, fading[None])

        def run(block: Any, hidden: torch.Tensor) -> torch.Tensor:
            hidden = hidden + _attend(block.attn, block.norm_1(hidden), mask, cache)
            out: torch.Tensor = block.ffn(block.norm_2(hidden), hidden)
            return out

        return run


DECODERS: Mapping[str, type[Decoder]] = {"gpt_neox": NeoxDecoder, "mpt": MptDecoder}


def _attend(
    attention: Any, hidden: torch.Tensor, mask: torch.Tensor, cache: DynamicCache
) -> torch.Tensor:
    """Run modeling_mpt.MptAttention with one mask, which an engine's kernels know."""
    joined = attention.Wqkv(hidden)
    if attention.clip_qkv:
        joined = joined.clamp(-attention.clip_qkv, attention.clip_qkv)
    batch, tokens, _ = hidden.shape
    query, key, value = (
        part.view(batch, tokens, attention.n_heads, attention.head_dim).transpose(1, 2)
        for part in joined.chunk(3, dim=-1)
    )
    key, value = cache.update(key, value, attention.layer_idx)
    scores = query @ key.transpose(2, 3) * attention.softmax_scale + mask
    mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    out: torch.Tensor = attention.out_proj(mixed)
    return out


def describe(
    seeing: Any,
    text: Any,
    rows: int,
    every: int,
    latents: int,
    image: ImageFrontEnd,
    generation: Generation,
    image_token_id: int,
) -> ModelSpec:
    """Name the graphs and tasks of one checkpoint, with its numbers."""
    vision, layers = seeing.vision_config, text.num_hidden_layers
    media_width = 2 * INNER * len(gated_layers(layers, every))
    decoder = describe_decoder(
        layers, text.num_attention_heads, text.hidden_size, media_width, rows
    )

    shown = ImageText(IMAGE, IMAGE)
    prompts = {"caption": CAPTION, "ask": ASK}
    room = getattr(text, "max_seq_len", None) or text.max_position_embeddings
    return ModelSpec(
        family="openflamingo",
        components=components(
            vision.image_size,
            seen_patches(seeing),
            vision.hidden_size,
            latents,
            media_width,
            decoder,
        ),
        tasks={
            name: task(prompt, f"{{text}}{END}", shown, image_token_id)
            for name, prompt in prompts.items()
        },
        front_ends={
            "pixel_values": image,
            "input_ids": TextFrontEnd(TOKENIZER, room, generation.pad_id, "left"),
        },
        generation=generation,
    )


class OpenFlamingoFamily:
    """OpenFlamingo out of what is released and of the two models that it was trained around."""

    def open(self, folder: Path, *, allow_pickle: bool = False) -> HubExport:
        """Read a checkpoint folder; no weights yet."""
        raw = read_json(folder, "config.json") or {}
        every = read_size(folder, raw, EVERY)
        depth = read_size(folder, raw, PERCEIVER_DEPTH, DEPTH)
        latents = read_size(folder, raw, PERCEIVER_LATENTS, LATENTS)
        clip, lm = (read_place(folder, raw, name) for name in ("vision", "text"))
        seeing, text = read_vision(clip), read_text(lm)
        tokenizer = read_tokenizer(lm)  # before any work: it may be refused
        tokenizer.add_special_tokens([END, IMAGE])  # in the authors' order, which their ids are in
        names, layers = LANGUAGE_MODELS[text.model_type], text.num_hidden_layers
        trained = open_trained(folder, names, layers, allow_pickle=allow_pickle)
        check_trained(folder, trained, layers, every)
        head = "tied." if text.tie_word_embeddings else f"{LM}.lm_head."
        table = f"{LM}.{names.body}.{names.table}.weight"
        weights: Weights = Together(
            Renamed(open_weights(clip, allow_pickle=allow_pickle), tower_prefixes(TOWER)),
            Renamed(
                open_weights(lm, allow_pickle=allow_pickle),
                {"embed_out.": head, "lm_head.": head, "": f"{LM}."},
            ),
            trained,
        )
        weights = cut_vocabulary(folder, weights, trained, table, tokenizer)
        rows = weights.shapes()[table][0] if table in weights.shapes() else text.vocab_size
        text.vocab_size = rows
        end, picture = (tokenizer.token_to_id(token) for token in (END, IMAGE))
        assert end is not None and picture is not None  # they were added
        generation = msgspec.structs.replace(read_generation(lm, text), eos_ids=(end,))
        has_its_own = (folder / "preprocessor_config.json").is_file()
        size = seeing.vision_config.image_size
        image = read_image_front_end(folder if has_its_own else clip, presets.clip(size))
        width, seen_width = text.hidden_size, seeing.vision_config.hidden_size
        return HubExport(
            folder,
            describe(seeing, text, rows, every, latents, image, generation, picture),
            {
                "vision_encoder": partial(VisionEncoder, seeing, TOWER),
                "resampler": partial(Resampler, seen_width, depth, latents),
                "cross_kv": partial(CrossKv, width, seen_width, layers, every),
                "decoder": partial(DECODERS[text.model_type], text, seen_width, every, latents),
            },
            weights,
            tokenizer,
            tied={HEAD: table},
            embed_tokens=table,
            unused=(*SPARE, *unused_layers(seeing, TOWER)),
        )

    def tiny(self, name: str, folder: Path) -> OpenFlamingo:
        """Write a random one of 2, 2 and 4 layers, gated before the second and the fourth."""
        shape: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 2}
        turned: dict[str, Any] = {"rotary_pct": 1.0}  # of a head; it becomes a rope parameter
        texts = {
            "openflamingo-neox": transformers.GPTNeoXConfig(
                **shape,
                **turned,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=4,
                num_attention_heads=4,
                max_position_embeddings=128,
                use_parallel_residual=False,  # as RedPajama-INCITE has it, with the above
                pad_token_id=1,
            ),
            "openflamingo-mpt": transformers.MptConfig(
                **shape, d_model=32, n_layers=4, n_heads=4, max_seq_len=128, pad_token_id=1
            ),
        }
        vision = transformers.CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        )
        model = OpenFlamingo(
            vision,
            texts[name],
            every=2,
            depth=2,
            latents=2,
            image_id=SPECIAL.index(IMAGE),
            end_id=free_id(),
        )
        images = transformers.CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        )
        images.save_pretrained(folder)
        save(model.vision_encoder, folder / "clip", image_processor=images)
        save(model.lang_encoder, folder / "lm", template="$A")
        _draw(model)
        config = {
            "architectures": list(ARCHITECTURES),
            EVERY: 2,
            PERCEIVER_DEPTH: 2,
            PERCEIVER_LATENTS: 2,
            "vision": "clip",
            "text": "lm",
        }
        (folder / "config.json").write_text(json.dumps(config))
        tensors = {name: tensor.contiguous() for name, tensor in model.trained().items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        reader = transformers.AutoTokenizer.from_pretrained(folder / "lm")
        model.processor = Processor(images, reader)  # type: ignore[assignment]
        return model.eval()


def _draw(model: OpenFlamingo) -> None:
    """Draw what is trained; no norm is closed, and no gate, as it would be to begin with.

    A small table keeps a model whose head is that table from saying its last word again and again.
    """
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.trained().items():
        drawn = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim >= 2:
            size = 0.5 if "perceiver" in name or "gated" in name else 0.25
            drawn *= size * tensor.shape[-1] ** -0.5
        else:
            drawn = 0.1 * drawn + (0.0 if name.endswith("bias") else 1.0)
        tensor.copy_(drawn)


FAMILY = OpenFlamingoFamily()
