"""ViT (Dosovitskiy et al. 2021, arXiv 2010.11929) and DeiT (arXiv 2012.12877) with their heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from ._checkpoint import presets
from ._checkpoint.folder import read_config, read_image_front_end
from ._checkpoint.labels import describe, label_file, read_labels
from ._checkpoint.weights import open_weights
from ._tiny import save
from ._trace.hub_export import HubExport
from ._trace.rename import VIT, respell

ARCHITECTURES = (
    "ViTForImageClassification",
    "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
)
ALIASES = {
    "vit": "google/vit-base-patch16-224",
    "deit": "facebook/deit-base-distilled-patch16-224",
}
TINY = ("vit", "deit", "deit-teacher")


class VisionEncoder(torch.nn.Module):
    """The tower and its head, which reads the class token (and DeiT's second one)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        model = getattr(transformers, config.architectures[0])(config)
        self.heads = [name for name, _ in model.named_children()][1:]
        self.prefix = model.base_model_prefix
        for name, child in model.named_children():
            self.add_module(name, child)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map float [batch, 3, height, width] to embeds [batch, width], logits [batch, labels]."""
        tokens = self.get_submodule(self.prefix)(pixel_values=pixel_values).last_hidden_state
        found = [self.get_submodule(head)(tokens[:, i]) for i, head in enumerate(self.heads)]
        return tokens[:, 0], sum(found[1:], found[0]) / len(found)


class Vit:
    """ViT and DeiT checkpoints in transformers' layout."""

    def open(self, folder: Path, *, allow_pickle: bool = False) -> HubExport:
        """Read a checkpoint folder; no weights yet."""
        config = read_config(folder, needed=("hidden_size", "image_size"))
        labels = read_labels(config)
        size = _pair(config.image_size)
        default = presets.half(size, "bilinear")
        front = read_image_front_end(folder, default)
        spec = describe("vit", config, front, size, config.hidden_size)
        builds = {"vision_encoder": lambda: VisionEncoder(config)}
        weights = respell(open_weights(folder, allow_pickle=allow_pickle), VIT, builds)
        return HubExport(folder, spec, builds, weights, files=label_file(labels))

    def tiny(self, name: str, folder: Path) -> transformers.PreTrainedModel:
        """Write a random ViT, or a DeiT with one head or two, of 2 layers and 7 labels."""
        common: dict[str, Any] = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "image_size": 32,
            "patch_size": 8,
            "num_labels": 7,
        }
        model: transformers.PreTrainedModel
        if name == "vit":
            model = transformers.ViTForImageClassification(transformers.ViTConfig(**common))
            images: Any = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
        else:
            kind = "DeiTForImageClassification" + ("WithTeacher" if name == "deit-teacher" else "")
            model = getattr(transformers, kind)(transformers.DeiTConfig(**common))
            images = transformers.DeiTImageProcessor(
                size={"height": 36, "width": 36}, crop_size={"height": 32, "width": 32}
            )
        save(model, folder, image_processor=images)
        return model


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


FAMILY = Vit()
