"""SigLIP's towers: no class token, and for pictures a head that not every model takes."""

from __future__ import annotations

from dataclasses import replace

from vlmedge.plan.shape import Fields, Part, followed, transformer, vision_tower

# What transformers' SiglipVisionConfig takes for a field that is not there
VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
}


def tower(fields: Fields, *, norms: int = 1, layers: int | None = None) -> Part:
    """Count the tower up to its last norm; see `vlmedge.plan.shape.vision_tower`."""
    return vision_tower(
        fields, "vision_encoder", conv_bias=True, norms=norms, class_tokens=0, layers=layers
    )


def head(tower: Part) -> Part:
    """Add the layer in which one learned query looks at the patches; it has one norm, not two."""
    weights, rest = transformer(1, tower.width, tower.inner)
    query, norm = tower.width, 2 * tower.width
    return followed(replace(tower, layers=tower.layers + 1), (weights, rest - norm + query))
