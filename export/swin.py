"""Swin (Liu et al. 2021, arXiv 2103.14030) and Swin V2 (arXiv 2111.09883) with their heads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from vlmedge.arrays import Array

from ._checkpoint import presets
from ._checkpoint.folder import read_config, read_image_front_end
from ._checkpoint.labels import describe, label_file, read_labels
from ._checkpoint.weights import Weights, WeightsView, open_weights
from ._tiny import save
from ._trace.hub_export import HubExport
from ._trace.rename import respell
from ._trace.torch_modules import build_on_meta

ARCHITECTURES = ("SwinForImageClassification", "Swinv2ForImageClassification")
ALIASES = {
    "swin": "microsoft/swin-tiny-patch4-window7-224",
    "swinv2": "microsoft/swinv2-tiny-patch4-window8-256",
}
TINY = ("swin", "swinv2")

RULES = (  # transformers.conversion_mapping 5.23, "swin"
    (r"attention\.self\.query", "attention.q_proj"),
    (r"attention\.self\.key", "attention.k_proj"),
    (r"attention\.self\.value", "attention.v_proj"),
    (
        r"attention\.self\.relative_position_bias_table",
        "attention.relative_position_bias.relative_position_bias_table",
    ),
    (r"attention\.output\.dense", "attention.o_proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
)


class PositionTable(torch.nn.Module):
    """Output of Swin V2's small network for its constant coordinates, as one weight.

    It depends on no picture: left in the graph it would be computed for each, and its weights
    would be rounded in vain.
    """

    def __init__(self, coordinates: torch.Tensor, heads: int) -> None:
        super().__init__()
        self.coordinates = coordinates.numpy().copy()  # no buffer: the graph does not need it
        self.table = torch.nn.Parameter(torch.empty(*coordinates.shape[:-1], heads))

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        """Give float [1, rows, columns, heads], whatever comes in."""
        return self.table


class PositionTables(WeightsView):
    """Weights in which each such network has become its table."""

    def __init__(self, weights: Weights, model: torch.nn.Module) -> None:
        super().__init__(weights)
        self.made = self._coordinates = {
            f"{name}.table": module.coordinates
            for name, module in model.named_modules()
            if isinstance(module, PositionTable)
        }

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of every tensor, by name."""
        shapes = dict(self._weights.shapes())
        for name, coordinates in self._coordinates.items():
            parts = [shapes.pop(part, None) for part in _network(name)]
            last = parts[-1]
            if None not in parts and last is not None:
                shapes[name] = (*coordinates.shape[:-1], last[0])
        return shapes

    def dtype(self, name: str) -> str:
        """Return the dtype on disk; a table's is what it is computed in."""
        return "float32" if name in self.made else super().dtype(name)

    def make(self, name: str) -> Array:
        """Compute a table: Linear, ReLU, Linear."""
        into, bias, out = (self._weights.read(part) for part in _network(name))
        hidden = np.maximum(self._coordinates[name] @ into.T + bias, 0)
        table: Array = hidden @ out.T
        return table


def _network(table: str) -> tuple[str, str, str]:
    """Name the weights that a table is made of."""
    prefix = table.removesuffix(".table")
    return f"{prefix}.0.weight", f"{prefix}.0.bias", f"{prefix}.2.weight"


class VisionEncoder(torch.nn.Module):
    """The tower and its head, which reads the mean of all tokens.

    The picture's size is fixed in the graph, so the masks of the shifted windows are constants.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        model = getattr(transformers, config.architectures[0])(config)
        self.prefix = model.base_model_prefix
        self.add_module(self.prefix, model.base_model)
        self.classifier = model.classifier
        layers: list[Any] = [*self.modules()]
        for layer in layers:
            if not hasattr(layer, "continuous_position_bias_mlp"):
                continue
            heads = layer.num_attention_heads
            layer.continuous_position_bias_mlp = PositionTable(layer.relative_coords_table, heads)
            layer.relative_coords_table = None

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map float [batch, 3, height, width] to embeds [batch, width], logits [batch, labels]."""
        pooled = self.get_submodule(self.prefix)(pixel_values=pixel_values).pooler_output
        return pooled, self.classifier(pooled)


class Swin:
    """Swin and Swin V2 checkpoints in transformers' layout."""

    def open(self, folder: Path, *, allow_pickle: bool = False) -> HubExport:
        """Read a checkpoint folder; no weights yet."""
        config = read_config(folder, needed=("embed_dim", "depths", "window_size", "image_size"))
        labels = read_labels(config)
        size = (config.image_size, config.image_size)
        default = presets.imagenet(size)
        width = config.embed_dim * 2 ** (len(config.depths) - 1)
        spec = describe("swin", config, read_image_front_end(folder, default), size, width)
        builds = {"vision_encoder": lambda: VisionEncoder(config)}
        respelled = respell(open_weights(folder, allow_pickle=allow_pickle), RULES, builds)
        weights = PositionTables(respelled, build_on_meta(builds["vision_encoder"])[0])
        return HubExport(folder, spec, builds, weights, files=label_file(labels))

    def tiny(self, name: str, folder: Path) -> transformers.PreTrainedModel:
        """Write a random Swin of 2 stages whose second layer shifts its windows, and 7 labels."""
        common: dict[str, Any] = {
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
            "mlp_ratio": 2.0,
            "num_labels": 7,
        }
        model: transformers.PreTrainedModel
        if name == "swin":
            model = transformers.SwinForImageClassification(transformers.SwinConfig(**common))
        else:
            model = transformers.Swinv2ForImageClassification(transformers.Swinv2Config(**common))
        images = transformers.ViTImageProcessor(
            size={"height": 32, "width": 32},
            resample=3,
            image_mean=presets.IMAGENET_MEAN,
            image_std=presets.IMAGENET_STD,
        )
        save(model, folder, image_processor=images)
        return model


FAMILY = Swin()
