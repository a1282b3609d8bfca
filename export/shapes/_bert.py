"""BERT as BLIP and FLAVA have it: self-attention, perhaps cross-attention, an MLP."""

from __future__ import annotations

from vlmedge.plan.shape import Fields, Part, transformer

# What transformers' BlipTextConfig takes for a field that is not there
TEXT = {
    "hidden_size": 768,
    "encoder_hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
    "vocab_size": 30524,
}


def reader(
    fields: Fields, name: str, *, rows: int | None, looks_at: Part | None = None, table: bool = True
) -> Part:
    """Count its embeddings and layers.

    Args:
        fields: Its config, gaps filled.
        name: The component's.
        rows: Tokens that it reads, or none: the prompt's.
        looks_at: The part that its cross-attention looks at, whose keys and values it computes; or
            none.
        table: Whether the graph has the words' table.
    """
    width, inner = fields.size("hidden_size", None), fields.size("intermediate_size", None)
    layers, words = fields.size("num_hidden_layers", None), fields.size("vocab_size", None)
    weights, rest = transformer(layers, width, inner)
    rest += fields.size("max_position_embeddings", None) * width + 2 * width
    source = 0
    if looks_at is not None:
        source, biases = keys_and_values(fields)
        asks, more = queries_and_output(fields)
        weights, rest = weights + source + asks, rest + biases + more
    return Part(
        name,
        weights,
        rest,
        width,
        inner,
        layers,
        fields.size("num_attention_heads", None),
        rows,
        table=words * width if table else 0,
        source_linear=source,
        source_rows=0 if looks_at is None else looks_at.rows or 0,
    )


def keys_and_values(fields: Fields) -> tuple[int, int]:
    """Count those of the cross-attention, all layers: (weights, biases)."""
    width, layers = fields.size("hidden_size", None), fields.size("num_hidden_layers", None)
    seen = fields.size("encoder_hidden_size", width)
    return 2 * layers * seen * width, 2 * layers * width


def queries_and_output(fields: Fields) -> tuple[int, int]:
    """Count the rest of the cross-attention, all layers: (weights, biases and norms)."""
    width, layers = fields.size("hidden_size", None), fields.size("num_hidden_layers", None)
    return 2 * layers * width * width, layers * (2 * width + 2 * width)
