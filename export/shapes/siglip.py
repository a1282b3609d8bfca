"""SigLIP: a picture tower whose patches a learned query reads, and a text tower."""

from __future__ import annotations

from vlmedge.plan.shape import Fields, Part, Shape, followed, linear, transformer

from . import _siglip

# What transformers' SiglipTextConfig takes for a field that is not there
TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 64,
    "vocab_size": 32000,
}


def count(config: Fields) -> Shape:
    """Count a SiglipModel."""
    vision = _siglip.head(_siglip.tower(config.part("vision_config").filled(_siglip.VISION)))
    text = config.part("text_config").filled(TEXT)
    width, rows = text.size("hidden_size", None), text.size("max_position_embeddings", None)
    inner, layers = text.size("intermediate_size", None), text.size("num_hidden_layers", None)
    weights, rest = transformer(layers, width, inner)
    reader = Part(
        "text_encoder",
        weights,
        rest + rows * width + 2 * width,
        width,
        inner,
        layers,
        text.size("num_attention_heads", None),
        rows,
        table=text.size("vocab_size", None) * width,
    )
    projection = linear(width, text.size("projection_size", width))
    return Shape(
        "siglip", (vision, followed(reader, projection)), extra=2
    )  # logit_scale, logit_bias


SHAPE = count
