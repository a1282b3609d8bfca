"""Swin and Swin v2 with a closed head: stages of which each has a quarter of the rows."""

from __future__ import annotations

from vlmedge.plan.shape import Fields, Part, Shape, linear, transformer

# What transformers' SwinConfig and Swinv2Config take for a field that is not there
DEPTHS, HEADS = (2, 2, 6, 2), (3, 6, 12, 24)
EMBED, PATCH, IMAGE, WINDOW = 96, 4, 224, 7
MLP_RATIO = 4.0
LABELS = 2
BIAS_MLP = 512  # Swin v2 computes its positions' bias by two Linears of this width


def count(config: Fields) -> Shape:
    """Count one of the architectures."""
    second = config.text("model_type", "swin") == "swinv2"
    depths, heads = config.sizes("depths", DEPTHS), config.sizes("num_heads", HEADS)
    width, ratio = config.size("embed_dim", EMBED), config.ratio("mlp_ratio", MLP_RATIO)
    patch, window = config.size("patch_size", PATCH), config.size("window_size", WINDOW)
    side = config.size("image_size", IMAGE) // patch
    plane = side * side * width  # numbers of the widest tensor
    weights, other, extra, work = 0, 3 * patch * patch * width + 3 * width, 0, 0
    if config.flag("use_absolute_embeddings", False):
        other += plane
    for stage, (depth, split) in enumerate(zip(depths, heads, strict=False)):
        linears, rest = transformer(depth, width, int(width * ratio))
        seen = min(window, side) if second else window
        other += rest + depth * (2 * seen - 1) ** 2 * split
        if second:  # keys have no bias, scores a learnt factor; the bias is computed at export
            other += depth * (split - width)
            extra += depth * (3 * BIAS_MLP + BIAS_MLP * split - (2 * seen - 1) ** 2 * split)
        work += linears * side * side
        weights += linears
        if stage + 1 < len(depths):
            weights += 8 * width * width
            work += 8 * width * width * (side // 2) ** 2
            other += (4 if second else 8) * width
            side, width = side // 2, 2 * width
    head, bias = linear(width, config.entries("id2label", LABELS))
    weights, other = weights + head, other + bias + 2 * width
    # One number of rows stands for all stages: as many as give the same arithmetic, and so wide
    # that a plane of them is the first stage's.
    rows = max(1, round(work / weights))
    across = max(1, round(plane / rows))
    tower = Part(
        "vision_encoder", weights, other, across, int(across * ratio), sum(depths), 1, rows
    )
    return Shape("swin", (tower,), extra=extra)


SHAPE = count
