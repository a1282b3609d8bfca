"""PaLI (Chen et al. 2022, arXiv 2209.06794) as one torch module, to be trained or compared with.

pixel_values -> ViT, no pooling -> every patch -> Linear -> in front of the text's embeddings
                                                            -> mT5's encoder -> mT5's decoder

Google released neither weights nor code. `PRESETS` of export/shapes/pali.py are the paper's sizes;
its ViTs have no class token, which is how SigLIP's tower is built.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers

from . import t5 as _t5

ARCHITECTURE = "PaLIForConditionalGeneration"
TOWER, PROJECTOR = "vision_model", "projector"

LEADING = {"siglip_vision_model": 0, "vit": 1}
"""The kinds of ViT, and how many tokens each puts before its patches."""


def make_config(fields: Mapping[str, Any]) -> Any:
    """Make transformers' config out of a dict that names its `model_type`."""
    return transformers.AutoConfig.for_model(**fields)


def pair(size: Any) -> tuple[int, int]:
    """Return height and width of what a config may give as one number."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


class Tower(torch.nn.Module):
    """A ViT whose patches are all kept, and nothing else: no class token, no pooled vector."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        tower = transformers.AutoModel.from_config(config)
        for pooling in ("head", "pooler"):  # SigLIP's and ViT's
            if hasattr(tower, pooling):
                setattr(tower, pooling, None)
        tower.use_head = False  # SigLIP asks
        self.add_module(TOWER, tower)
        self._leading = LEADING[config.model_type]

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map float [batch, 3, height, width] to image_embeds [batch, patches, width]."""
        tokens = self.get_submodule(TOWER)(pixel_values=pixel_values).last_hidden_state
        embeds: torch.Tensor = tokens[:, self._leading :]
        return embeds


class PaliModel(Tower):
    """The whole of it. Parameters carry the names that a checkpoint has on disk."""

    def __init__(self, vision: Any, text: Any) -> None:
        """Build it with random weights.

        Args:
            vision: transformers' config of the ViT.
            text: transformers' config of the mT5.
        """
        super().__init__(vision)
        self._configs = {"vision_config": vision, "text_config": text}
        self.projector = torch.nn.Linear(vision.hidden_size, text.d_model)
        self.language_model = transformers.MT5ForConditionalGeneration(text)
        _t5.untie(self.language_model)  # every mT5 has a head of its own

    def embed(self, pixel_values: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Make what the mT5 reads, float [batch, patches + tokens, width]."""
        soft = self.projector(super().forward(pixel_values))
        return torch.cat([soft, self.get_input_embeddings()(input_ids)], dim=1)

    def forward(  # type: ignore[override]
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        **targets: torch.Tensor,
    ) -> Any:
        """Read a picture and a text, and give mT5's output.

        Args:
            pixel_values: float [batch, 3, height, width].
            input_ids: int64 [batch, tokens].
            attention_mask: int64 [batch, tokens]: 1 for a token, 0 for padding.
            targets: `labels`, for a loss, or `decoder_input_ids`.
        """
        embeds = self.embed(pixel_values, input_ids)
        mask = self._with_patches(attention_mask, embeds)
        return self.language_model(inputs_embeds=embeds, attention_mask=mask, **targets)

    def generate(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        **options: Any,
    ) -> torch.Tensor:
        """Write about a picture as transformers' generate does, with its options."""
        embeds = self.embed(pixel_values, input_ids)
        mask = self._with_patches(attention_mask, embeds)
        generate: Any = self.language_model.generate
        ids: torch.Tensor = generate(inputs_embeds=embeds, attention_mask=mask, **options)
        return ids

    def get_input_embeddings(self) -> Any:
        """Return the table of token embeddings."""
        return self.language_model.get_input_embeddings()

    def save_pretrained(self, folder: Path) -> None:
        """Write config.json and model.safetensors, which the family `pali` exports."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        configs = {name: config.to_dict() for name, config in self._configs.items()}
        config = {"architectures": [ARCHITECTURE], "model_type": "pali", **configs}
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        # named_parameters gives the one table of encoder and decoder once
        tensors = {name: p.detach().contiguous() for name, p in self.named_parameters()}
        safetensors.torch.save_file(
            tensors, folder / "model.safetensors", metadata={"format": "pt"}
        )

    @staticmethod
    def _with_patches(attention_mask: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """Let a mask of the text show every patch before it."""
        batch, tokens = attention_mask.shape
        shown = attention_mask.new_ones(batch, embeds.shape[1] - tokens)
        return torch.cat([shown, attention_mask], dim=1)
