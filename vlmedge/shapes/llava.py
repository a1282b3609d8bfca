"""LLaVA with Llama or Vicuna: CLIP's picture tower, two projections, a decoder."""

from __future__ import annotations

from vlmedge.errors import CheckpointError
from vlmedge.shape import Fields, Part, Shape, linear, vision_tower
from vlmedge.shapes import clip

ARCHITECTURES = ("LlavaForConditionalGeneration",)

# What transformers' LlamaConfig takes for a field that is not there
LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "vocab_size": 32000,
}


# And MistralConfig, where that is another number
MISTRAL = {
    **LLAMA,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096 * 32,
}
LANGUAGE_MODELS = {"llama": LLAMA, "mistral": MISTRAL}


def count(config: Fields) -> Shape:
    """Count a LlavaForConditionalGeneration.

    The tower counts whole, although the layers after vision_feature_layer need not be kept.
    """
    parts = _, projector, _ = parts_of(config, "llava")
    assert projector.rows is not None
    return whole(config, "llava", parts, soft_rows=projector.rows)


def parts_of(config: Fields, kind: str) -> tuple[Part, Part, Part]:
    """Count what LLaVA's line has: a tower, a projector and a decoder."""
    text, vision = config.part("text_config"), config.part("vision_config")
    for part, known in ((text, tuple(LANGUAGE_MODELS)), (vision, ("clip_vision_model",))):
        if (found := part.text("model_type", known[0])) not in known:
            names = " or ".join(map(repr, known))
            raise CheckpointError(f"its model_type {found!r} is not planned: {kind} has {names}")
    tower = vision_tower(vision.filled(clip.VISION), "vision_encoder", conv_bias=False, norms=2)
    decoder = _llama(_filled(text))
    bias = config.flag("multimodal_projector_bias", True)
    pair = linear(tower.width, decoder.width, bias), linear(decoder.width, decoder.width, bias)
    assert tower.rows is not None
    keeps_class = config.text("vision_feature_select_strategy", "default") == "full"
    projector = Part(
        "projector",
        sum(weights for weights, _ in pair),
        sum(biases for _, biases in pair),
        width=decoder.width,
        inner=decoder.width,
        rows=tower.rows if keeps_class else tower.rows - 1,
    )
    return tower, projector, decoder


def whole(
    config: Fields, kind: str, parts: tuple[Part, ...], soft_rows: int, extra: int = 0
) -> Shape:
    """Put the parts of a model of LLaVA's line together; the decoder is the last."""
    text = _filled(config.part("text_config"))
    return Shape(
        kind,
        parts,
        soft_rows=soft_rows,
        max_positions=text.size("max_position_embeddings", None),
        host_table=parts[-1].vocabulary,
        tied=text.flag("tie_word_embeddings", False),
        extra=extra,
    )


def _filled(text: Fields) -> Fields:
    return text.filled(LANGUAGE_MODELS[text.text("model_type", "llama")])


def _llama(fields: Fields) -> Part:
    """Count Llama without its token table, which the host reads."""
    width, inner = fields.size("hidden_size", None), fields.size("intermediate_size", None)
    layers, words = fields.size("num_hidden_layers", None), fields.size("vocab_size", None)
    heads = fields.size("num_attention_heads", None)
    head_width = fields.size("head_dim", width // heads)
    kept = fields.size("num_key_value_heads", heads) * head_width
    attention = 2 * width * heads * head_width + 2 * width * kept
    return Part(
        "decoder",
        layers * (attention + 3 * width * inner),
        layers * 2 * width + width,
        width,
        inner,
        layers,
        heads,
        vocabulary=words * width,
        logits=words,
        cache_width=2 * layers * kept,
    )


SHAPE = count
