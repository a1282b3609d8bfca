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


def count(config: Fields) -> Shape:
    """Count a LlavaForConditionalGeneration.

    The tower counts whole, although the layers after vision_feature_layer need not be kept.
    """
    text, vision = config.part("text_config"), config.part("vision_config")
    for part, known in ((text, "llama"), (vision, "clip_vision_model")):
        if (found := part.text("model_type", known)) != known:
            raise CheckpointError(f"its model_type {found!r} is not planned: llava has {known!r}")
    vision, text = vision.filled(clip.VISION), text.filled(LLAMA)
    tower = vision_tower(vision, "vision_encoder", conv_bias=False, norms=2)
    decoder = _llama(text)
    bias = config.flag("multimodal_projector_bias", True)
    pair = linear(tower.width, decoder.width, bias), linear(decoder.width, decoder.width, bias)
    assert tower.rows is not None
    whole = config.text("vision_feature_select_strategy", "default") == "full"
    patches = tower.rows if whole else tower.rows - 1  # without the class token
    projector = Part(
        "projector",
        sum(weights for weights, _ in pair),
        sum(biases for _, biases in pair),
        width=decoder.width,
        inner=decoder.width,
        rows=patches,
    )
    return Shape(
        "llava",
        (tower, projector, decoder),
        soft_rows=patches,
        max_positions=text.size("max_position_embeddings", None),
        host_table=decoder.vocabulary,
        tied=text.flag("tie_word_embeddings", False),
    )


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
