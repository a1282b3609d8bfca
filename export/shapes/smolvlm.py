"""SmolVLM and Idefics3: SigLIP's tower on the tiles of a picture, a projection, a small decoder."""

from __future__ import annotations

from dataclasses import replace

from vlmedge.plan.shape import Fields, Part, Shape

from . import _language, _siglip

# What transformers' Idefics3VisionConfig and SmolVLMVisionConfig take for a gap
VISION = {
    **_siglip.VISION,
    "hidden_size": 1152,
    "num_attention_heads": 16,
    "patch_size": 32,
}
SCALE = 2
# preprocessor_config.json says how large a picture may be; transformers' default is four tiles wide
TILES = 4 * 4 + 1


def count(config: Fields) -> Shape:
    """Count one of the architectures, for the picture that has most tiles."""
    text = _language.filled(config.part("text_config"), "smolvlm", ("llama",))
    tower = _siglip.tower(config.part("vision_config").filled(VISION))
    decoder = _language.decoder(text)
    scale = config.size("scale_factor", SCALE) ** 2
    assert tower.rows is not None
    rows = tower.rows // scale
    weights = tower.width * scale * decoder.width
    projector = Part("projector", weights, 0, width=decoder.width, rows=rows, runs=TILES)
    return Shape(
        "smolvlm",
        (replace(tower, runs=TILES), projector, decoder),
        soft_rows=TILES * rows,
        max_positions=text.size("max_position_embeddings", None),
        host_table=decoder.vocabulary,
        tied=config.flag("tie_word_embeddings", False),
    )


SHAPE = count
