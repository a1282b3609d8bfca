"""BLIP-2's first stage: one Q-Former that sees pictures, reads texts, and judges both together."""

from __future__ import annotations

from dataclasses import replace

from vlmedge.errors import CheckpointError
from vlmedge.plan.shape import Fields, Part, Shape, followed, linear, transformer

from . import _qformer

EMBEDS = 256  # image_text_hidden_size
MATCHES = 2  # whether picture and text belong together, or not


def count(config: Fields) -> Shape:
    """Count a Blip2ForImageTextRetrieval.

    Raises:
        CheckpointError: Its Q-Former reads no text.
    """
    text = _qformer.fields(config)
    if not text.flag("use_qformer_text_input", False):
        raise CheckpointError(
            "qformer_config says use_qformer_text_input false, so its Q-Former reads no text: "
            "choose a checkpoint whose Q-Former does"
        )
    out, words = config.size("image_text_hidden_size", EMBEDS), _words(config)
    tower = _qformer.tower(config)
    queries = _qformer.qformer(config, tower)
    assert queries.rows is not None and words.rows is not None
    fusion = _qformer.with_words(queries, config, rows=queries.rows + words.rows)
    parts = (
        tower,
        followed(queries, linear(queries.width, out)),
        followed(words, linear(words.width, out)),
        followed(replace(fusion, name="fusion"), linear(fusion.width, MATCHES)),
    )
    # the fusion has all that the other two have, but for their projections
    return Shape("blip2_retrieval", parts, shared=queries.parameters + words.parameters)


def _words(config: Fields) -> Part:
    """Count the Q-Former without queries and without cross-attention."""
    text = _qformer.fields(config)
    width, inner = text.size("hidden_size", None), text.size("intermediate_size", None)
    layers = text.size("num_hidden_layers", None)
    weights, rest = transformer(layers, width, inner)
    table, places = _qformer.embeddings(config)
    return Part(
        "text_encoder",
        weights,
        rest + places + 2 * width,
        width,
        inner,
        layers,
        text.size("num_attention_heads", None),
        rows=text.size("max_position_embeddings", None),
        table=table,
    )


SHAPE = count
