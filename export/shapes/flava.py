"""FLAVA: a picture tower, a text tower, and a transformer over what both give."""

from __future__ import annotations

from dataclasses import replace

from vlmedge.plan.shape import Fields, Part, Shape, followed, linear, transformer, vision_tower

from . import _bert, _siglip

# What transformers' FlavaTextConfig and FlavaMultimodalConfig take for a field that is not there;
# FlavaImageConfig has the numbers of SiglipVisionConfig
TEXT = {**_bert.TEXT, "num_attention_heads": 12, "vocab_size": 30522, "type_vocab_size": 2}
FUSION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
}
PROJECTION = 768
TEXT_ROWS = 77  # that its processor pads texts to
MATCHES = 2


def count(config: Fields) -> Shape:
    """Count a FlavaForPreTraining, without what only its training needs."""
    out = config.size("projection_dim", PROJECTION)
    text = config.part("text_config").filled(TEXT)
    mixed = config.part("multimodal_config").filled(FUSION)
    image = config.part("image_config").filled(_siglip.VISION)
    tower = vision_tower(image, "vision_encoder", conv_bias=True, norms=1)
    rows = min(TEXT_ROWS, text.size("max_position_embeddings", None))
    reader = _bert.reader(text, "text_encoder", rows=rows)
    # kinds of tokens, and the norm behind the layers
    norm = 2 * reader.width
    kinds = text.size("type_vocab_size", None) * reader.width
    reader = replace(reader, other=reader.other + kinds + norm)
    width = mixed.size("hidden_size", None)
    towers = [followed(p, linear(p.width, out), linear(p.width, width)) for p in (tower, reader)]
    fusion = _fusion(mixed, text.size("vocab_size", None), sum(p.rows or 0 for p in towers))
    return Shape("flava", (*towers, fusion), extra=1)  # logit_scale


def _fusion(fields: Fields, words: int, rows: int) -> Part:
    """Count the layers over both, the head that matches and the one that fills gaps."""
    width, inner = fields.size("hidden_size", None), fields.size("intermediate_size", None)
    layers = fields.size("num_hidden_layers", None)
    weights, rest = transformer(layers, width, inner)
    own = fields.flag("use_cls_token", True)
    part = Part(
        "fusion",
        weights,
        rest + (width if own else 0) + 2 * width + 2 * width + words,  # norms, the words' biases
        width,
        inner,
        layers,
        fields.size("num_attention_heads", None),
        rows + 1 if own else rows,
        vocabulary=words * width,
        logits=words,
    )
    return followed(part, linear(width, width), linear(width, MATCHES), linear(width, width))


SHAPE = count
