"""What language models bring that write after a Q-Former: OPT, T5's kind, LLaMA."""

from __future__ import annotations

from vlmedge.errors import CheckpointError
from vlmedge.plan.shape import Fields, Part, Shape, linear, transformer

from . import _language, _t5

# What transformers' OPTConfig takes for a field that is not there
OPT = {
    "hidden_size": 768,
    "ffn_dim": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 2048,
    "vocab_size": 50272,
}
OFFSET = 2  # OPT's positions begin at 2


def language_model(config: Fields, kind: str, known: tuple[str, ...]) -> str:
    """Return the kind of the language model.

    Args:
        config: The whole one.
        kind: The file in shapes/.
        known: Kinds that it may be; the first is transformers' default.

    Raises:
        CheckpointError: It is none of them.
    """
    model = config.part("text_config").text("model_type", known[0])
    if model not in known:
        names = " or ".join(map(repr, known))
        raise CheckpointError(f"the language model is {model!r}: {kind} is planned with {names}")
    return model


def whole(config: Fields, kind: str, model: str, seeing: tuple[Part, ...], queries: int) -> Shape:
    """Put a projection and what writes behind a Q-Former.

    Args:
        config: The whole one.
        kind: The file in shapes/.
        model: The kind of the language model.
        seeing: The parts before it; a Q-Former is the last.
        queries: Rows that it makes of a picture.
    """
    text = config.part("text_config")
    written: tuple[Part, ...]
    if model in _t5.DEFAULTS:
        text = _t5.filled(text)
        written = _t5.parts_of(text, queries)
        positions, tied = text.size("n_positions", _t5.POSITIONS), not _t5.gated(text)
    elif model == "opt":
        text = text.filled(OPT)
        written = (_opt(text),)
        positions, tied = text.size("max_position_embeddings", None), True
    else:
        text = text.filled(_language.DEFAULTS[model])
        written = (_language.decoder(text, model),)
        positions = text.size("max_position_embeddings", None)
        tied = text.flag("tie_word_embeddings", False)
    projection = linear(seeing[-1].width, written[0].width)
    projector = Part("projector", *projection, width=written[0].width, rows=queries)
    return Shape(
        kind,
        (*seeing, projector, *written),
        soft_rows=queries,
        max_positions=positions,
        host_table=written[-1].vocabulary,
        tied=tied,
    )


def _opt(fields: Fields) -> Part:
    """Count OPT without its token table, which the host reads."""
    width, inner = fields.size("hidden_size", None), fields.size("ffn_dim", None)
    layers, words = fields.size("num_hidden_layers", None), fields.size("vocab_size", None)
    weights, rest = transformer(layers, width, inner)
    positions = fields.size("max_position_embeddings", None) + OFFSET
    return Part(
        "decoder",
        weights,
        rest + positions * width + 2 * width,
        width,
        inner,
        layers,
        fields.size("num_attention_heads", None),
        vocabulary=words * width,
        logits=words,
        cache_width=2 * layers * width,
    )
