"""OpenFlamingo: a CLIP tower, a Perceiver, and gated layers among those of a language model."""

from __future__ import annotations

from dataclasses import replace

from vlmedge.errors import CheckpointError
from vlmedge.plan.shape import Fields, Part, Shape, linear, transformer, vision_tower

from .clip import VISION

# Fixed in the authors' code; depth and latents are what all released checkpoints have
HEADS, HEAD_WIDTH, MLP_RATIO = 8, 64, 4
DEPTH, LATENTS = 6, 64
EVERY = "cross_attn_every_n_layers"
PERCEIVER_DEPTH, PERCEIVER_LATENTS = "perceiver_depth", "perceiver_latents"

# What transformers' GPTNeoXConfig and MptConfig take for a gap
NEOX = {
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "max_position_embeddings": 2048,
    "vocab_size": 50432,
}
MPT = {"d_model": 2048, "n_heads": 16, "n_layers": 24, "max_seq_len": 2048, "vocab_size": 50368}


def gated_layers(layers: int, every: int) -> list[int]:
    """Number the layers that have a gated one before them."""
    return [i for i in range(layers) if (i + 1) % every == 0]


def count(config: Fields) -> Shape:
    """Count an OpenFlamingo, for one picture.

    Its vocabulary is the language model's. Checkpoints cut some rows that no token has: 152 of the
    50,432 in the released ones.

    Raises:
        CheckpointError: A part is of another kind, or not where it should be.
    """
    seeing, writing = (_part(config, name) for name in ("vision", "text"))
    vision = (seeing.maybe("vision_config") or seeing).filled(VISION)
    tower = vision_tower(vision, "vision_encoder", conv_bias=False, norms=1)
    depth = config.size(PERCEIVER_DEPTH, DEPTH)
    latents = config.size(PERCEIVER_LATENTS, LATENTS)
    resampler = _resampler(tower, depth, latents)
    known = {"gpt_neox": _neox, "mpt": _mpt}
    model = writing.text("model_type", "")
    if model not in known:
        raise CheckpointError(
            f"its language model is {model!r}: choose one of {', '.join(sorted(known))}"
        )
    decoder, positions, tied = known[model](writing)
    gated = len(gated_layers(decoder.layers, config.size(EVERY, None)))
    inner, width = HEADS * HEAD_WIDTH, decoder.width
    cross = Part("cross_kv", gated * 2 * tower.width * inner, 0, tower.width, rows=latents)
    decoder = replace(
        decoder,
        linear=decoder.linear + gated * (2 * width * inner + 2 * MLP_RATIO * width**2),
        other=decoder.other + gated * (2 * 2 * width + 2),  # two norms, two gates
        held=2 * gated * inner * latents,
    )
    return Shape(
        "openflamingo",
        (tower, resampler, cross, decoder),
        max_positions=positions,
        host_table=decoder.vocabulary,
        tied=tied,
        extra=2 * tower.width,  # the tower's last norm
    )


def _part(config: Fields, name: str) -> Fields:
    found = config.elsewhere(name)
    if found is None:
        raise CheckpointError(f"config.json has no {name!r}: name the folder of its {name} part")
    return found


def _resampler(tower: Part, depth: int, latents: int) -> Part:
    """Count the latents, and layers of which each looks at the picture and has an MLP."""
    width, inner = tower.width, HEADS * HEAD_WIDTH
    return Part(
        "resampler",
        depth * (4 * width * inner + 2 * MLP_RATIO * width**2),
        latents * width + depth * 3 * 2 * width + 2 * width,
        width,
        MLP_RATIO * width,
        depth,
        HEADS,
        latents,
        source_linear=depth * 2 * width * inner,
        source_rows=(tower.rows or 0) - 1 + latents,
    )


def _neox(text: Fields) -> tuple[Part, int, bool]:
    """Count a GPT-NeoX, its positions, and whether its head is its table."""
    fields = text.filled(NEOX)
    width, inner = fields.size("hidden_size", None), fields.size("intermediate_size", None)
    layers, words = fields.size("num_hidden_layers", None), fields.size("vocab_size", None)
    weights, rest = transformer(layers, width, inner)
    if not text.flag("attention_bias", True):
        rest -= layers * 4 * width
    part = _decoder(weights, rest + 2 * width, width, inner, layers, words)
    heads = fields.size("num_attention_heads", None)
    positions = fields.size("max_position_embeddings", None)
    return replace(part, heads=heads), positions, text.flag("tie_word_embeddings", False)


def _mpt(text: Fields) -> tuple[Part, int, bool]:
    """Count an MPT, which has no biases and no positions of its own."""
    fields = text.filled(MPT)
    width, layers = fields.size("d_model", None), fields.size("n_layers", None)
    inner, words = 4 * width, fields.size("vocab_size", None)
    attention, mlp = 4 * linear(width, width)[0], 2 * linear(width, inner)[0]
    rest = (2 * layers + 1) * width
    part = _decoder(layers * (attention + mlp), rest, width, inner, layers, words)
    part = replace(part, heads=fields.size("n_heads", None))
    return part, fields.size("max_seq_len", None), True


def _decoder(weights: int, rest: int, width: int, inner: int, layers: int, words: int) -> Part:
    return Part(
        "decoder",
        weights,
        rest,
        width,
        inner,
        layers,
        vocabulary=words * width,
        logits=words,
        cache_width=2 * layers * width,
    )


SHAPE = count
