"""T5, T5 1.1, Flan-T5 and mT5 behind a soft prompt: an encoder, and a decoder that looks at it."""

from __future__ import annotations

from vlmedge.plan.shape import Fields, Part

# What transformers' T5Config and MT5Config take for a field that is not there
T5 = {
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "vocab_size": 32128,
}
MT5 = {**T5, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "vocab_size": 250112}
DEFAULTS = {"t5": T5, "mt5": MT5}
ACTIVATIONS = {"t5": "relu", "mt5": "gated-gelu"}
POSITIONS = 512  # that they were trained with; their positions have no end
TEXT_ROWS = 64  # of a question, beside the picture's


def filled(text: Fields) -> Fields:
    """Fill a config's gaps."""
    return text.filled(DEFAULTS[text.text("model_type", "t5")])


def gated(text: Fields) -> bool:
    """Return whether its MLP has a gate, as since T5 1.1, whose head is its own too."""
    model = text.text("model_type", "t5")
    return text.text("feed_forward_proj", ACTIVATIONS[model]).startswith("gated")


def parts_of(text: Fields, soft_rows: int) -> tuple[Part, Part, Part]:
    """Count the encoder, the decoder's keys and values of it, and the decoder.

    Args:
        text: Its config, gaps filled.
        soft_rows: Rows of the picture, which the encoder reads beside the text.
    """
    width, inner = text.size("d_model", None), text.size("d_ff", None)
    heads, words = text.size("num_heads", None), text.size("vocab_size", None)
    layers = text.size("num_layers", None)
    written = text.size("num_decoder_layers", layers)
    across = heads * text.size("d_kv", None)
    attention = 4 * width * across
    mlp = (3 if gated(text) else 2) * width * inner
    places = text.size("relative_attention_num_buckets", None) * heads
    encoder = Part(
        "text_encoder",
        layers * (attention + mlp),
        places + (2 * layers + 1) * width,
        width,
        inner,
        layers,
        heads,
    )
    cross = Part("cross_kv", written * attention // 2, 0, width)
    decoder = Part(
        "decoder",
        written * (attention + attention // 2 + mlp),
        places + (3 * written + 1) * width,
        width,
        inner,
        written,
        heads,
        rows=1,  # the start id: the text is the encoder's
        vocabulary=words * width,
        logits=words,
        cache_width=2 * written * across,
        held=2 * written * across * (soft_rows + TEXT_ROWS),
    )
    return encoder, cross, decoder
