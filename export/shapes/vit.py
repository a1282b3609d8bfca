"""ViT and DeiT with a closed head: one tower and its classifier, or DeiT's two."""

from __future__ import annotations

from vlmedge.plan.shape import Fields, Shape, followed, linear, vision_tower

from ._siglip import VISION  # the same as transformers' ViTConfig and DeiTConfig

LABELS = 2  # transformers' own, where there are no names


def count(config: Fields) -> Shape:
    """Count one of the architectures."""
    fields = config.filled(VISION)
    deit = config.text("model_type", "vit") == "deit"
    tower = vision_tower(
        fields, "vision_encoder", conv_bias=True, norms=1, class_tokens=2 if deit else 1
    )
    head = linear(tower.width, config.entries("id2label", LABELS))
    teacher = config.names("architectures")[0].endswith("WithTeacher")
    return Shape("vit", (followed(tower, head, *([head] if teacher else [])),))


SHAPE = count
