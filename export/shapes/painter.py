"""SegGPT and Painter: one ViT over two pictures that stand on each other, and a small decoder."""

from __future__ import annotations

from vlmedge.plan.shape import Fields, Part, Shape, followed, linear, transformer

# What transformers' SegGptConfig takes for a field that is not there
SEGGPT = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 16,
    "decoder_hidden_size": 64,
    "merge_index": 2,
}
IMAGE = (896, 448)
LOOKED_AT = (5, 11, 17, 23)
MLP_RATIO = 4
KERNEL, CHANNELS = 3, 3


def count(config: Fields) -> Shape:
    """Count one of the architectures."""
    fields = config.filled(SEGGPT)
    width, layers = fields.size("hidden_size", None), fields.size("num_hidden_layers", None)
    inner, patch = fields.size("mlp_dim", MLP_RATIO * width), fields.size("patch_size", None)
    heads, small = (
        fields.size("num_attention_heads", None),
        fields.size("decoder_hidden_size", None),
    )
    sides = [side // patch for side in fields.sizes("image_size", IMAGE)]
    down, across = sides[0], sides[-1]
    weights, rest = transformer(layers, width, inner)
    if not fields.flag("qkv_bias", True):
        rest -= layers * 3 * width
    if fields.flag("use_relative_position_embeddings", True):
        rest += layers * (2 * down - 1 + 2 * across - 1) * (width // heads)
    # Tokens for what is hidden, for pictures and paintings; SegGPT's for kinds and for single
    # things. Positions are brought to the picture's size at export.
    tokens = 5 if "Painter" not in config.names("architectures") else 3
    rest += (tokens + down * across) * width + 3 * patch * patch * width + width + 2 * width
    rest += KERNEL * KERNEL * small * small + small + 2 * small + small * CHANNELS + CHANNELS
    # two streams go through the first layers, which are merged then
    streams = 1 + (fields.size("merge_index", None) + 1) / layers
    rows = round(down * across * streams)
    part = Part("dense", weights, rest, width, inner, layers, heads, rows)
    seen = len(fields.sizes("intermediate_hidden_state_indices", LOOKED_AT))
    whole = followed(part, linear(seen * width, patch * patch * small))
    # the positions as they are in the checkpoint: of a smaller square, with a class token
    pretrained = (fields.size("pretrain_image_size", 224) // patch) ** 2 + 1
    return Shape("painter", (whole,), extra=(pretrained - down * across) * width)


SHAPE = count
