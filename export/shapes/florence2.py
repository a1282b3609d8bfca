"""Florence-2: DaViT, a projection, then BART's encoder and decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vlmedge.errors import CheckpointError
from vlmedge.plan.shape import Fields, Part, Shape, followed, transformer

from ._t5 import TEXT_ROWS

# What transformers' Florence2VisionConfig takes for a field that is not there
STAGES = {
    "depths": (1, 1, 9, 1),
    "patch_size": (7, 3, 3, 3),
    "patch_stride": (4, 2, 2, 2),
    "patch_padding": (3, 1, 1, 1),
    "embed_dim": (128, 256, 512, 1024),
    "num_heads": (4, 8, 16, 32),
    "num_groups": (4, 8, 16, 32),
}
PRENORM = (False, True, True, True)
WINDOW, MLP_RATIO = 12, 4.0
PROJECTION, PLACES = 1024, 50  # projection_dim, max_position_embeddings
# What its BartConfig takes
BART = {
    "d_model": 1024,
    "encoder_layers": 12,
    "encoder_ffn_dim": 4096,
    "encoder_attention_heads": 16,
    "decoder_layers": 12,
    "decoder_ffn_dim": 4096,
    "decoder_attention_heads": 16,
    "max_position_embeddings": 1024,
    "vocab_size": 50265,
}
OFFSET = 2  # BART's positions begin at 2
IMAGE = 768  # pixels a side, of all that were released; config.json does not tell it


@dataclass(frozen=True, slots=True)
class Stage:
    """Layers of one width and of as many rows, with the convolution before them.

    Attributes:
        weights: Weights of matrix products.
        convolution: Weights of the convolution.
        other: Biases, norms, and the small convolutions between the layers.
        side: Rows are its square.
        width: Width of a row.
        inner: Width of a row inside the MLP.
        layers: How many: for each that looks at positions one that looks at channels.
        scores: How many scores its largest attention has.
        seen: Rows that cost as much as what one looks at, on average of both kinds.
    """

    weights: int
    convolution: int
    other: int
    side: int
    width: int
    inner: int
    layers: int
    scores: int
    seen: float


def count(config: Fields) -> Shape:
    """Count a Florence2ForConditionalGeneration.

    Raises:
        CheckpointError: It is in another layout than transformers', or its writer is no BART.
    """
    vision, text = config.part("vision_config"), config.part("text_config")
    if vision.names("dim_embed"):
        raise CheckpointError(
            "this Florence-2 is in Microsoft's layout: use the same weights in transformers' "
            "layout, such as florence-community/Florence-2-base"
        )
    model = text.text("model_type", "bart")
    if model != "bart":
        raise CheckpointError(f"the language model is {model!r}: florence2 is planned with 'bart'")
    text = text.filled(BART)
    stages = _stages(vision)
    last, width = stages[-1], vision.size("projection_dim", PROJECTION)
    rows = 1 + last.side**2  # their mean comes first
    places = vision.size("max_position_embeddings", PLACES) * last.width
    projector = Part("projector", last.width * width, places + 2 * width, width=width, rows=rows)
    written = _bart(text, rows)
    return Shape(
        "florence2",
        (_tower(stages), projector, *written),
        soft_rows=rows,
        max_positions=text.size("max_position_embeddings", None),
        host_table=written[-1].vocabulary,
        tied=True,
    )


def _stages(vision: Fields) -> list[Stage]:
    """Count DaViT by stages."""
    numbers = {name: vision.sizes(name, default) for name, default in STAGES.items()}
    depths, sizes, strides, paddings, widths, heads, groups = numbers.values()
    prenorm = vision.flags("patch_prenorm", PRENORM)
    listed: dict[str, Sequence[object]] = {**numbers, "patch_prenorm": prenorm}
    for name, given in listed.items():
        if len(given) != len(depths):
            raise CheckpointError(
                f"{name} has {len(given)} entries, depths {len(depths)}: give one for each stage"
            )
    window, ratio = vision.size("window_size", WINDOW), vision.ratio("mlp_ratio", MLP_RATIO)
    biased = vision.flag("qkv_bias", True)
    found, side, before = [], IMAGE, vision.size("in_channels", 3)
    for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        side = (side + 2 * paddings[i] - sizes[i]) // strides[i] + 1
        layers = 2 * depth
        inner = int(width * ratio)
        weights, other = transformer(layers, width, inner)
        other += layers * 2 * (9 * width + width)  # a channel's own 3 x 3, twice
        other -= 0 if biased else layers * 3 * width
        other += width + 2 * (before if prenorm[i] else width)  # of the convolution
        convolution = sizes[i] ** 2 * before * width
        near, across = min(window, side) ** 2, width // groups[i]
        scores, seen = side**2 * near * heads[i], (near + across) / 2
        found.append(Stage(weights, convolution, other, side, width, inner, layers, scores, seen))
        before = width
    return found


def _tower(stages: list[Stage]) -> Part:
    """Make one part of all stages, whose arithmetic and widest tensors are theirs."""
    weights = sum(s.weights for s in stages)
    work = sum((s.weights + s.convolution) * s.side**2 for s in stages)
    rows = max(1, round(work / weights))
    plane = max(s.side**2 * s.width for s in stages)
    width = max(1, round(plane / rows))
    inner = max(1, round(max(s.side**2 * s.inner for s in stages) / rows))
    layers = sum(s.layers for s in stages)
    looks = sum(s.layers * s.side**2 * s.seen * s.width for s in stages)
    keys = max(1, round(looks / (layers * rows * width)))
    heads = max(1, round(max(s.scores for s in stages) / (rows * keys)))
    other = sum(s.other + s.convolution for s in stages)
    return Part("vision_encoder", weights, other, width, inner, layers, heads, rows, keys=keys)


def _bart(text: Fields, soft_rows: int) -> tuple[Part, Part, Part]:
    """Count the encoder, the decoder's keys and values of it, and the decoder."""
    width, words = text.size("d_model", None), text.size("vocab_size", None)
    places = (text.size("max_position_embeddings", None) + OFFSET) * width + 2 * width
    encoder, decoder = (
        _side(text, side, name, width, places)
        for side, name in (("encoder", "text_encoder"), ("decoder", "decoder"))
    )
    kept = 2 * decoder.layers * width
    cross = Part("cross_kv", kept * width, kept, width)
    decoder = replace(
        # queries and the output, and a norm
        followed(decoder, (kept * width, kept + kept)),
        rows=1,  # the start id: the text is the encoder's
        vocabulary=words * width,
        logits=words,
        cache_width=kept,
        held=kept * (soft_rows + TEXT_ROWS),
    )
    return encoder, cross, decoder


def _side(text: Fields, side: str, name: str, width: int, places: int) -> Part:
    """Count layers of self-attention and an MLP, with positions and the norm behind them."""
    layers, inner = text.size(f"{side}_layers", None), text.size(f"{side}_ffn_dim", None)
    weights, other = transformer(layers, width, inner)
    heads = text.size(f"{side}_attention_heads", None)
    return Part(name, weights, other + places, width, inner, layers, heads)


SHAPE = count
