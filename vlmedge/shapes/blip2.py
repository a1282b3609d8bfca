"""BLIP-2: a ViT, a Q-Former that looks at it, a projection, then OPT or T5."""

from __future__ import annotations

from vlmedge.errors import CheckpointError
from vlmedge.shape import Fields, Part, Shape, linear, transformer, vision_tower
from vlmedge.shapes import _t5

ARCHITECTURES = ("Blip2ForConditionalGeneration",)

# What transformers' Blip2VisionConfig, Blip2QFormerConfig and OPTConfig take for a gap
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
    "encoder_hidden_size": 1408,
    "cross_attention_frequency": 2,
}
OPT = {
    "hidden_size": 768,
    "ffn_dim": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 2048,
    "vocab_size": 50272,
}
QUERIES = 32
OFFSET = 2  # OPT's positions begin at 2


def count(config: Fields) -> Shape:
    """Count a Blip2ForConditionalGeneration, whose language model is OPT or a T5."""
    text = config.part("text_config")
    model = text.text("model_type", "opt")
    if model != "opt" and model not in _t5.DEFAULTS:
        known = " or ".join(map(repr, ("opt", *_t5.DEFAULTS)))
        raise CheckpointError(f"the language model is {model!r}: blip2 is planned with {known}")
    vision = config.part("vision_config").filled(VISION)
    tower = vision_tower(vision, "vision_encoder", conv_bias=True, norms=1)
    queries = config.size("num_query_tokens", QUERIES)
    qformer = _qformer(config.part("qformer_config").filled(QFORMER), queries, tower)
    if model == "opt":
        text = text.filled(OPT)
        written: tuple[Part, ...] = (_opt(text),)
        positions, tied = text.size("max_position_embeddings", None), True
    else:
        text = _t5.filled(text)
        written = _t5.parts_of(text, queries)
        positions, tied = text.size("n_positions", _t5.POSITIONS), not _t5.gated(text)
    projection = linear(qformer.width, written[0].width)
    projector = Part("projector", *projection, width=written[0].width, rows=queries)
    return Shape(
        "blip2",
        (tower, qformer, projector, *written),
        soft_rows=queries,
        max_positions=positions,
        host_table=written[-1].vocabulary,
        tied=tied,
    )


def _qformer(fields: Fields, queries: int, seen: Part) -> Part:
    """Count BERT layers of which every second looks at the picture; queries are parameters."""
    width, inner = fields.size("hidden_size", None), fields.size("intermediate_size", None)
    layers = fields.size("num_hidden_layers", None)
    looking = -(-layers // fields.size("cross_attention_frequency", None))
    weights, rest = transformer(layers, width, inner)
    source = 2 * fields.size("encoder_hidden_size", None) * width  # keys and values
    weights += looking * (source + 2 * width * width)
    rest += looking * (4 * width + 2 * width) + 2 * width + queries * width
    return Part(
        "qformer",
        weights,
        rest,
        width,
        inner,
        layers,
        fields.size("num_attention_heads", None),
        queries,
        source_linear=looking * source,
        source_rows=seen.rows or 0,
    )


def _opt(fields: Fields) -> Part:
    """Count OPT without its token table, which the host reads."""
    width, inner = fields.size("hidden_size", None), fields.size("ffn_dim", None)
    layers, words = fields.size("num_hidden_layers", None), fields.size("vocab_size", None)
    weights, rest = transformer(layers, width, inner)
    positions = fields.size("max_position_embeddings", None) + OFFSET
    return Part(
        "decoder",
        weights,
        rest + positions * width + 2 * width,
        width,
        inner,
        layers,
        fields.size("num_attention_heads", None),
        vocabulary=words * width,
        logits=words,
        cache_width=2 * layers * width,
    )


SHAPE = count
