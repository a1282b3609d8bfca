"""Export an image tower as PyTorch's own documentation does it: torch.onnx.export.

python make_onnx.py CHECKPOINT OUT.onnx
"""

from __future__ import annotations

import sys

import torch
import transformers
from torch import Tensor


class Tower(torch.nn.Module):
    """What all sides run: pixels to the projected class token, or to all that BLIP-2 reads."""

    def __init__(self, checkpoint: str) -> None:
        super().__init__()
        config = transformers.AutoConfig.from_pretrained(checkpoint)
        architecture = getattr(transformers, config.architectures[0])
        model = architecture.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.vision, self.size = model.vision_model, config.vision_config.image_size
        self.projection = getattr(model, "visual_projection", None)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map float32 [batch, 3, size, size] to what goes on."""
        seen = self.vision(pixel_values)
        return self.projection(seen.pooler_output) if self.projection else seen.last_hidden_state


def main(checkpoint: str, out: str) -> None:
    """Write OUT.onnx, with its weights in OUT.onnx.data."""
    tower = Tower(checkpoint)
    pixels = torch.zeros(2, 3, tower.size, tower.size)
    axes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(tower, (pixels,), out, dynamo=True, dynamic_shapes=axes, external_data=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
