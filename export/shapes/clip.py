"""CLIP: a picture tower and a text tower, each with a projection."""

from __future__ import annotations

from vlmedge.plan.shape import Fields, Part, Shape, transformer, vision_tower

# What transformers' CLIPVisionConfig and CLIPTextConfig take for a field that is not there
VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}
TEXT = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
}
PROJECTION = 512


def count(config: Fields) -> Shape:
    """Count a CLIPModel."""
    out = config.size("projection_dim", PROJECTION)
    vision = config.part("vision_config").filled(VISION)
    text = config.part("text_config").filled(TEXT)
    width, rows = text.size("hidden_size", None), text.size("max_position_embeddings", None)
    inner, layers = text.size("intermediate_size", None), text.size("num_hidden_layers", None)
    weights, rest = transformer(layers, width, inner)
    return Shape(
        "clip",
        (
            vision_tower(vision, "vision_encoder", conv_bias=False, norms=2, out=out),
            Part(
                "text_encoder",
                weights + width * out,
                rest + rows * width + 2 * width,
                width,
                inner,
                layers,
                text.size("num_attention_heads", None),
                rows,
                table=text.size("vocab_size", None) * width,
            ),
        ),
        extra=1,  # logit_scale
    )


SHAPE = count
