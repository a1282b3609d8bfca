"""OpenFlamingo (Awadalla et al. 2023, arXiv 2308.01390) in torch: its own layers, and the whole.

pictures -> CLIP's patches before its last norm -> Perceiver -> latents of each picture
                                                                  |  keys and values
text -> layer -> ... -> layer -> gated cross-attention -> layer -> ... -> logits

A token looks at the last picture before it and at no other. Parameters have the names of the
authors' state dict, in which the gated layers stand beside the language model's.

Source: open_flamingo 2.0.1 on PyPI: src/helpers.py, src/flamingo_lm.py, src/factory.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers

from ..shapes.openflamingo import HEAD_WIDTH, HEADS, MLP_RATIO, gated_layers

IMAGE, END = "<image>", "<|endofchunk|>"
INNER = HEADS * HEAD_WIDTH


@dataclass(frozen=True)
class Names:
    """Names that a kind of language model has for its parts.

    Attributes:
        body: All but the projection to logits.
        layers: Inside the body.
        table: The token embeddings, inside the body.
        norm: The last one, inside the body.
    """

    body: str
    layers: str
    table: str
    norm: str


LANGUAGE_MODELS = {
    "gpt_neox": Names("gpt_neox", "layers", "embed_in", "final_layer_norm"),
    "mpt": Names("transformer", "blocks", "wte", "norm_f"),
}
"""By model_type."""


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shut: torch.Tensor | None = None
) -> torch.Tensor:
    """Mix values by heads.

    Args:
        query: float [batch, asking, heads * width of a head].
        key: float [batch, looked at, the same].
        value: As the key.
        shut: Mask added to the scores, float [batch, 1, asking, looked at], or none.
    """

    def split(flat: torch.Tensor) -> torch.Tensor:
        batch, length, _ = flat.shape
        return flat.view(batch, length, HEADS, HEAD_WIDTH).transpose(1, 2)

    scores = split(query) @ split(key).transpose(2, 3) * HEAD_WIDTH**-0.5
    if shut is not None:
        scores = scores + shut
    mixed: torch.Tensor = (scores.softmax(-1) @ split(value)).transpose(1, 2).flatten(2)
    return mixed


def feed_forward(width: int) -> torch.nn.Sequential:
    """Make an MLP with its norm before it."""
    return torch.nn.Sequential(
        torch.nn.LayerNorm(width),
        torch.nn.Linear(width, MLP_RATIO * width, bias=False),
        torch.nn.GELU(),
        torch.nn.Linear(MLP_RATIO * width, width, bias=False),
    )


class PerceiverAttention(torch.nn.Module):
    """Latents look at a picture and at each other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_media = torch.nn.LayerNorm(width)
        self.norm_latents = torch.nn.LayerNorm(width)
        self.to_q = torch.nn.Linear(width, INNER, bias=False)
        self.to_kv = torch.nn.Linear(width, 2 * INNER, bias=False)
        self.to_out = torch.nn.Linear(INNER, width, bias=False)

    def forward(self, seen: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Return what latents [batch, latents, width] learn from seen [batch, patches, width]."""
        latents = self.norm_latents(latents)
        both = torch.cat([self.norm_media(seen), latents], dim=1)
        key, value = self.to_kv(both).chunk(2, dim=-1)
        learnt: torch.Tensor = self.to_out(attend(self.to_q(latents), key, value))
        return learnt


class Perceiver(torch.nn.Module):
    """Resamples the patches of a picture to a few latents."""

    def __init__(self, width: int, depth: int, latents: int) -> None:
        super().__init__()
        self.latents = torch.nn.Parameter(torch.randn(latents, width))
        layers = [[PerceiverAttention(width), feed_forward(width)] for _ in range(depth)]
        self.layers = torch.nn.ModuleList(torch.nn.ModuleList(layer) for layer in layers)
        self.norm = torch.nn.LayerNorm(width)

    def forward(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """Map [batch, patches, width] to [batch, latents, width]."""
        latents = self.latents.expand(image_embeds.shape[0], -1, -1)
        for layer in self.layers:
            attention, mlp = layer.children()
            latents = latents + attention(image_embeds, latents)
            latents = latents + mlp(latents)
        found: torch.Tensor = self.norm(latents)
        return found


class MediaAttention(torch.nn.Module):
    """The weights with which text looks at pictures."""

    def __init__(self, width: int, seen_width: int) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.to_q = torch.nn.Linear(width, INNER, bias=False)
        self.to_kv = torch.nn.Linear(seen_width, 2 * INNER, bias=False)
        self.to_out = torch.nn.Linear(INNER, width, bias=False)


class GatedLayer(torch.nn.Module):
    """Cross-attention and an MLP, each behind a gate that training opens from 0."""

    def __init__(self, width: int, seen_width: int) -> None:
        super().__init__()
        self.attn = MediaAttention(width, seen_width)
        self.attn_gate = torch.nn.Parameter(torch.zeros(1))
        self.ff = feed_forward(width)
        self.ff_gate = torch.nn.Parameter(torch.zeros(1))

    def forward(
        self,
        hidden: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        shut: torch.Tensor | None,
        sees: torch.Tensor,
    ) -> torch.Tensor:
        """Look at keys and values that are known.

        Args:
            hidden: float [batch, tokens, width].
            key: float [batch, media, heads * width of a head].
            value: As the key.
            shut: Mask added to the scores, float [batch, 1, tokens, media], or none.
            sees: Whether a token sees a picture at all, bool [batch, tokens, 1].
        """
        query = self.attn.to_q(self.attn.norm(hidden))
        found = self.attn.to_out(attend(query, key, value, shut))
        hidden = hidden + self.attn_gate.tanh() * torch.where(sees, found, 0.0)
        out: torch.Tensor = hidden + self.ff_gate.tanh() * self.ff(hidden)
        return out


def make_gated(width: int, seen_width: int, layers: int, every: int) -> torch.nn.ModuleDict:
    """Make the gated layers, by the number of the layer that each stands before."""
    places = gated_layers(layers, every)
    return torch.nn.ModuleDict({str(i): GatedLayer(width, seen_width) for i in places})


class OpenFlamingo(torch.nn.Module):
    """The whole: the gated layers hook into transformers' own CLIP and language model.

    Each token's picture is picked before it is looked at. The exported graph shuts the others out
    of one attention over all, so that the two can be compared.
    """

    def __init__(
        self,
        vision: Any,
        text: Any,
        *,
        every: int,
        depth: int,
        latents: int,
        image_id: int,
        end_id: int,
    ) -> None:
        """Build it with random weights.

        Args:
            vision: transformers' config of a CLIP vision tower.
            text: transformers' config of a GPT-NeoX or an MPT.
            every: Before which layers a gated one stands: the last of so many.
            depth: Layers of the Perceiver.
            latents: Rows that it makes of a picture.
            image_id: The token that stands for a picture.
            end_id: The token that ends what is written about one.
        """
        super().__init__()
        self.config = text
        self.vision_encoder: Any = transformers.CLIPVisionModel(vision)
        self.perceiver = Perceiver(vision.hidden_size, depth, latents)
        self.lang_encoder: Any = transformers.AutoModelForCausalLM.from_config(text)
        self._names = LANGUAGE_MODELS[text.model_type]
        layers = self.lang_encoder.get_submodule(f"{self._names.body}.{self._names.layers}")
        self.gated = make_gated(text.hidden_size, vision.hidden_size, len(layers), every)
        for number, gated in self.gated.items():
            layers[int(number)].register_forward_pre_hook(partial(self._look, gated))
        self._image_id, self._end_id = image_id, end_id
        self._seen: tuple[torch.Tensor, torch.Tensor] | None = None

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map float [batch, pictures, 3, height, width] to [batch, pictures, latents, width]."""
        seen = self.vision_encoder(pixel_values.flatten(0, 1)).last_hidden_state
        latents: torch.Tensor = self.perceiver(seen[:, 1:])
        return latents.view(*pixel_values.shape[:2], *latents.shape[1:])

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, pixel_values: torch.Tensor
    ) -> Any:
        """Read a text with its pictures and give the language model's output.

        Args:
            input_ids: int64 [batch, tokens].
            attention_mask: int64 [batch, tokens]: 1 for a token, 0 for padding.
            pixel_values: float [batch, pictures, 3, height, width].
        """
        self._show(input_ids, pixel_values)
        return self.lang_encoder(input_ids=input_ids, attention_mask=attention_mask)

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pixel_values: torch.Tensor,
        **options: Any,
    ) -> torch.Tensor:
        """Write on up to the end token, as transformers' generate does, with its options."""
        self._show(input_ids, pixel_values)
        options = {"eos_token_id": self._end_id, **options}
        ids: torch.Tensor = self.lang_encoder.generate(
            input_ids=input_ids, attention_mask=attention_mask, **options
        )
        return ids

    def trained(self) -> Mapping[str, torch.Tensor]:
        """Return what the authors' checkpoints hold, under their names."""
        names, state = self._names, self.lang_encoder.state_dict()
        found = {f"perceiver.{n}": p for n, p in self.perceiver.state_dict().items()}
        for number, gated in self.gated.items():
            place = f"lang_encoder.{names.body}.{names.layers}.{number}.gated_cross_attn_layer"
            found |= {f"{place}.{n}": p for n, p in gated.state_dict().items()}
        table = f"{names.body}.{names.table}.weight"
        found[f"lang_encoder.{table}"] = state[table]
        if not self.config.tie_word_embeddings:
            found["lang_encoder.embed_out.weight"] = state["lm_head.weight"]
        return found

    def _show(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> None:
        """Set what the tokens of a text see; tokens written later see what its last one does."""
        index = (input_ids == self._image_id).cumsum(1) - 1
        self._seen = self.encode(pixel_values), index

    def _look(self, gated: Any, layer: object, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Run a gated layer on what a layer is about to get."""
        assert self._seen is not None
        hidden, *rest = arguments
        media, index = (t.repeat_interleave(len(hidden) // len(t), dim=0) for t in self._seen)
        tokens = hidden.shape[1]  # all so far, or the last one where there is a cache
        written = index[:, -1:].expand(-1, max(0, tokens - index.shape[1]))
        index = torch.cat([index, written], dim=1)[:, -tokens:]
        rows = torch.arange(len(hidden))[:, None]
        picked = media[rows, index.clamp(min=0)].flatten(0, 1)  # [batch * tokens, latents, width]
        key, value = gated.attn.to_kv(picked).chunk(2, dim=-1)
        asking = hidden.flatten(0, 1)[:, None]
        out = gated(asking, key, value, None, (index >= 0).flatten()[:, None, None])
        return out.view_as(hidden), *rest


class Processor:
    """Texts with pictures among them, as OpenFlamingo reads them."""

    def __init__(self, images: Any, tokenizer: Any) -> None:
        """Take transformers' own processor and tokenizer; the tokenizer learns two tokens."""
        tokenizer.add_special_tokens({"additional_special_tokens": [END, IMAGE]})
        self.images, self.tokenizer = images, tokenizer

    def __call__(
        self, *, text: str | Sequence[Sequence[Any]], images: Any = None, return_tensors: str = "pt"
    ) -> dict[str, torch.Tensor]:
        """Process one text.

        Args:
            text: With a mark for its picture; or a row of texts and pictures, in a list.
            images: The picture that is marked.
            return_tensors: As transformers has it.
        """
        parts = [text] if isinstance(text, str) else text[0]
        pictures = [images] if isinstance(text, str) else [p for p in parts if not _is_text(p)]
        written = "".join(part if _is_text(part) else IMAGE for part in parts)
        encoded = self.tokenizer(written, return_tensors=return_tensors)
        pixels = self.images(pictures, return_tensors=return_tensors)["pixel_values"]
        return {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "pixel_values": pixels[None],
        }


def _is_text(part: Any) -> bool:
    return isinstance(part, str)
