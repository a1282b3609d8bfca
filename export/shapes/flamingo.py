"""Flamingo as IDEFICS has it: a tower, a resampler, and a decoder with gated cross-attention."""

from __future__ import annotations

from dataclasses import replace

from vlmedge.plan.shape import Fields, Part, Shape, followed, vision_tower

from . import _language

# What transformers' IdeficsVisionConfig and IdeficsPerceiverConfig take for a gap
VISION = {
    "embed_dim": 768,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}
PERCEIVER = {
    "resampler_n_latents": 64,
    "resampler_depth": 6,
    "resampler_n_heads": 16,
    "resampler_head_dim": 96,
}
MLP_RATIO = 4


def count(config: Fields) -> Shape:
    """Count an IdeficsForVisionText2Text, for one picture."""
    vision = config.part("vision_config").filled(VISION)
    vision = vision.filled({"hidden_size": vision.size("embed_dim", None)})
    tower = vision_tower(vision, "vision_encoder", conv_bias=False, norms=1)
    resampler = _resampler(config.part("perceiver_config"), tower)
    text = config.filled(_language.LLAMA)
    width, inner = text.size("hidden_size", None), text.size("intermediate_size", None)
    layers, heads = text.size("num_hidden_layers", None), text.size("num_attention_heads", None)
    gated = layers // config.size("cross_layer_interval", 1)
    normed = config.flag("qk_layer_norms", False)
    split = width // heads if normed else 0
    assert resampler.rows is not None
    cross = Part(
        "cross_kv", 2 * gated * tower.width * width, gated * split, width, rows=resampler.rows
    )
    decoder = _language.decoder(text, "llama")
    gates = 2 * (width if config.text("alpha_type", "float") == "vector" else 1)
    added = config.whole("additional_vocab_size", 0)
    decoder = replace(
        followed(decoder, (gated * (2 * width * width + 3 * width * inner), 0)),
        other=decoder.other + gated * (gates + split + 2 * width),
        vocabulary=decoder.vocabulary + added * width,
        logits=decoder.logits + added,
        held=2 * gated * width * resampler.rows,
    )
    return Shape(
        "flamingo",
        (tower, resampler, cross, decoder),
        max_positions=text.size("max_position_embeddings", None),
        host_table=decoder.vocabulary,
        tied=config.flag("tie_word_embeddings", False),
        extra=2 * tower.width,  # the tower's last norm, for its class token
    )


def _resampler(config: Fields, tower: Part) -> Part:
    """Count the latents, and layers of which each looks at the picture and has an MLP."""
    fields, width = config.filled(PERCEIVER), tower.width
    depth, latents = fields.size("resampler_depth", None), fields.size("resampler_n_latents", None)
    heads, each = fields.size("resampler_n_heads", None), fields.size("resampler_head_dim", None)
    inner = MLP_RATIO * width
    norms = 3 * 2 * width  # of the picture, of the latents, before the MLP
    if config.flag("qk_layer_norms_perceiver", False):
        norms += 2 * 2 * each
    weights = 4 * width * heads * each + 2 * width * inner
    return Part(
        "resampler",
        depth * weights,
        latents * width + depth * norms + 2 * width,
        width,
        inner,
        depth,
        heads,
        latents,
        source_linear=depth * 2 * width * heads * each,
        source_rows=(tower.rows or 0) + latents,
    )


SHAPE = count
