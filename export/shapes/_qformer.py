"""What every BLIP-2 has before its language model: a ViT, and queries that look at it."""

from __future__ import annotations

from dataclasses import replace

from vlmedge.plan.shape import Fields, Part, followed, linear, transformer, vision_tower

# What transformers' Blip2VisionConfig and Blip2QFormerConfig, and InstructBLIP's, take for a gap
VISION = {
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}
QFORMER = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "vocab_size": 30522,
    "cross_attention_frequency": 2,
}
QUERIES = 32


def tower(config: Fields) -> Part:
    """Count the ViT, with its last norm."""
    vision = config.part("vision_config").filled(VISION)
    return vision_tower(vision, "vision_encoder", conv_bias=True, norms=1)


def fields(config: Fields) -> Fields:
    """Return the Q-Former's config, gaps filled."""
    return config.part("qformer_config").filled(QFORMER)


def queries(config: Fields) -> int:
    """Return how many rows it makes of a picture."""
    return config.size("num_query_tokens", QUERIES)


def qformer(config: Fields, seen: Part) -> Part:
    """Count BERT layers of which every second looks at the picture; queries are parameters."""
    text = fields(config)
    width, inner = text.size("hidden_size", None), text.size("intermediate_size", None)
    layers, rows = text.size("num_hidden_layers", None), queries(config)
    looking = -(-layers // text.size("cross_attention_frequency", None))
    weights, rest = transformer(layers, width, inner)
    source = 2 * seen.width * width  # keys and values
    weights += looking * (source + 2 * width * width)
    rest += looking * (4 * width + 2 * width) + 2 * width + rows * width
    return Part(
        "qformer",
        weights,
        rest,
        width,
        inner,
        layers,
        text.size("num_attention_heads", None),
        rows,
        source_linear=looking * source,
        source_rows=seen.rows or 0,
    )


def with_words(part: Part, config: Fields, *, rows: int | None) -> Part:
    """Add what reads a text beside the queries: embeddings, and in each layer an MLP with a norm.

    A row takes one of the two MLPs only, so its arithmetic is counted somewhat too high.

    Args:
        part: A Q-Former.
        config: The whole one.
        rows: Queries and tokens, or none: as many as the prompt has.
    """
    width, inner = part.width, part.inner
    up, down = linear(width, inner), linear(inner, width)
    mlps = part.layers * (up[0] + down[0]), part.layers * (up[1] + down[1] + 2 * width)
    words, places = embeddings(config)
    return followed(replace(part, rows=rows, table=words), mlps, (0, places))


def embeddings(config: Fields) -> tuple[int, int]:
    """Count the tables of words and of positions; the norm behind them is the queries' own."""
    text = fields(config)
    width = text.size("hidden_size", None)
    places = text.size("max_position_embeddings", None)
    return text.size("vocab_size", None) * width, places * width
