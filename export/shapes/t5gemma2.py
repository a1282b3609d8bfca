"""T5Gemma 2: SigLIP's tower, a projection, Gemma's layers as an encoder and as a decoder."""

from __future__ import annotations

from dataclasses import replace

from vlmedge.plan.shape import Fields, Part, Shape

from . import _siglip
from ._t5 import TEXT_ROWS

# What transformers' T5Gemma2TextConfig and T5Gemma2DecoderConfig take for a gap
TEXT = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "vocab_size": 262208,
}
ROWS = 256  # mm_tokens_per_image
NORMS = 4  # of a layer


def count(config: Fields) -> Shape:
    """Count a T5Gemma2ForConditionalGeneration."""
    encoder = config.part("encoder")
    text = encoder.part("text_config").filled(TEXT)
    writes = config.part("decoder").filled(TEXT)
    vision = encoder.part("vision_config")
    tower = _siglip.tower(vision.filled(_siglip.VISION))
    reader = _layers(text, "text_encoder")
    soft = encoder.size("mm_tokens_per_image", ROWS)
    projector = Part("projector", tower.width * reader.width, tower.width, reader.width, rows=soft)
    cross = _cross(writes)
    words = writes.size("vocab_size", None)
    layers, heads = (writes.size(f"num_{n}", None) for n in ("hidden_layers", "key_value_heads"))
    kept = 2 * layers * heads * writes.size("head_dim", None)
    decoder = replace(
        _layers(writes, "decoder"),
        rows=1,  # the start id: the text is the encoder's
        vocabulary=words * reader.width,
        logits=words,
        cache_width=kept,
        held=kept * (soft + TEXT_ROWS),
    )
    extra = reader.width  # the row of the table that ends a picture
    if vision.flag("vision_use_head", True):
        extra += _siglip.head(tower).parameters - tower.parameters
    return Shape(
        "t5gemma2",
        (tower, projector, reader, cross, decoder),
        soft_rows=soft,
        max_positions=text.size("max_position_embeddings", None),
        host_table=decoder.vocabulary,
        tied=True,
        extra=extra,
        shared=cross.parameters,  # a decoder's layer reads both sides by the same matrices
    )


def _layers(fields: Fields, name: str) -> Part:
    """Count layers of Gemma's kind, whose queries and keys have norms, and the last norm."""
    width, inner = fields.size("hidden_size", None), fields.size("intermediate_size", None)
    layers, heads = fields.size("num_hidden_layers", None), fields.size("num_attention_heads", None)
    head = fields.size("head_dim", None)
    asked, kept = heads * head, fields.size("num_key_value_heads", None) * head
    biases = asked + 2 * kept + width if fields.flag("attention_bias", False) else 0
    return Part(
        name,
        layers * (2 * width * asked + 2 * width * kept + 3 * width * inner),
        layers * (NORMS * width + 2 * head + biases) + width,
        width,
        inner,
        layers,
        heads,
    )


def _cross(fields: Fields) -> Part:
    """Count keys, their norms, and values of what the encoder gave."""
    width, layers = fields.size("hidden_size", None), fields.size("num_hidden_layers", None)
    head = fields.size("head_dim", None)
    kept = fields.size("num_key_value_heads", None) * head
    biases = 2 * kept if fields.flag("attention_bias", False) else 0
    return Part("cross_kv", layers * 2 * width * kept, layers * (head + biases), width)


SHAPE = count
