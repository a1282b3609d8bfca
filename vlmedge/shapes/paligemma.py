"""PaliGemma and PaliGemma 2: SigLIP's tower, a projection, Gemma's decoder."""

from __future__ import annotations

from vlmedge.shape import Fields, Part, Shape, linear
from vlmedge.shapes import _language, _siglip

ARCHITECTURES = ("PaliGemmaForConditionalGeneration",)

LANGUAGE_MODELS = ("gemma", "gemma2")


def count(config: Fields) -> Shape:
    """Count a PaliGemmaForConditionalGeneration."""
    text = _language.filled(config.part("text_config"), "paligemma", LANGUAGE_MODELS)
    tower = _siglip.tower(config.part("vision_config").filled(_siglip.VISION))
    decoder = _language.decoder(text)
    assert tower.rows is not None
    projection = linear(tower.width, decoder.width)
    projector = Part("projector", *projection, width=decoder.width, rows=tower.rows)
    return Shape(
        "paligemma",
        (tower, projector, decoder),
        soft_rows=tower.rows,
        max_positions=text.size("max_position_embeddings", None),
        host_table=decoder.vocabulary,
        tied=True,
    )


SHAPE = count
