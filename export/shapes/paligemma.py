"""PaliGemma and PaliGemma 2: SigLIP's tower, a projection, Gemma's decoder; a decoder of masks."""

from __future__ import annotations

import math

from vlmedge.plan.shape import Fields, Part, Shape, linear

from . import _language, _siglip

LANGUAGE_MODELS = ("gemma", "gemma2")

# What a checkpoint may have beside it, and the tensors that count in there
MASK_FILE = "vae-oid.npz"
MASK_DECODER: dict[str, tuple[int, ...]] = {
    "_vq_vae._embedding": (128, 512),
    "decoder.0.weight": (128, 512, 1, 1),
    "decoder.0.bias": (128,),
    **{
        f"decoder.{block}.net.{layer}.{leaf}": shape
        for block in (2, 3)
        for layer, side in ((0, 3), (2, 3), (4, 1))
        for leaf, shape in (("weight", (128, 128, side, side)), ("bias", (128,)))
    },
    "decoder.4.weight": (128, 128, 4, 4),
    "decoder.4.bias": (128,),
    "decoder.6.weight": (128, 64, 4, 4),
    "decoder.6.bias": (64,),
    "decoder.8.weight": (64, 32, 4, 4),
    "decoder.8.bias": (32,),
    "decoder.10.weight": (32, 16, 4, 4),
    "decoder.10.bias": (16,),
    "decoder.12.weight": (1, 16, 1, 1),
    "decoder.12.bias": (1,),
}


def count(config: Fields) -> Shape:
    """Count a PaliGemmaForConditionalGeneration."""
    text = _language.filled(config.part("text_config"), "paligemma", LANGUAGE_MODELS)
    tower = _siglip.tower(config.part("vision_config").filled(_siglip.VISION))
    decoder = _language.decoder(text)
    assert tower.rows is not None
    projection = linear(tower.width, decoder.width)
    projector = Part("projector", *projection, width=decoder.width, rows=tower.rows)
    masks = [_mask_decoder()] if config.has_beside(MASK_FILE) else []
    return Shape(
        "paligemma",
        (tower, projector, decoder, *masks),
        soft_rows=tower.rows,
        max_positions=text.size("max_position_embeddings", None),
        host_table=decoder.vocabulary,
        tied=True,
    )


def _mask_decoder() -> Part:
    """Count the convolutions, which no scheme makes smaller, and the codebook."""
    kinds, width = MASK_DECODER["_vq_vae._embedding"]
    every = sum(math.prod(shape) for shape in MASK_DECODER.values())
    return Part("mask_decoder", 0, every - kinds * width, width, table=kinds * width, rows=1)


SHAPE = count
