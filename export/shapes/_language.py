"""Decoders of Llama's kind, counted without the token table, which the host reads."""

from __future__ import annotations

from vlmedge.errors import CheckpointError
from vlmedge.plan.shape import Fields, Part

# What transformers takes for a field that is not there
LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "vocab_size": 32000,
}
MISTRAL = {
    **LLAMA,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096 * 32,
}
QWEN2 = {
    **LLAMA,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "vocab_size": 151936,
}
GEMMA = {
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "vocab_size": 256000,
}
GEMMA2 = {
    **GEMMA,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
DEFAULTS = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
}
BIASED = ("qwen2",)  # queries, keys and values have biases
NORMS = {"gemma2": 4}  # of a layer; others have 2


def filled(text: Fields, kind: str, known: tuple[str, ...]) -> Fields:
    """Return a language model's config with its gaps filled; the first of `known` is the default.

    Raises:
        CheckpointError: It is of no kind that is known.
    """
    model = text.text("model_type", known[0])
    if model not in known:
        names = " or ".join(map(repr, known))
        raise CheckpointError(
            f"its model_type {model!r} cannot be planned: {kind} is planned with {names}"
        )
    return text.filled(DEFAULTS[model])


def decoder(fields: Fields, model: str | None = None) -> Part:
    """Count the decoder of a config whose gaps are filled; `model` is its own kind, or given."""
    model = model or fields.text("model_type", "llama")
    width, inner = fields.size("hidden_size", None), fields.size("intermediate_size", None)
    layers, words = fields.size("num_hidden_layers", None), fields.size("vocab_size", None)
    heads = fields.size("num_attention_heads", None)
    head_width = fields.size("head_dim", width // heads)
    kept = fields.size("num_key_value_heads", heads) * head_width
    attention = 2 * width * heads * head_width + 2 * width * kept
    biases = heads * head_width + 2 * kept if model in BIASED else 0
    return Part(
        "decoder",
        layers * (attention + 3 * width * inner),
        layers * (NORMS.get(model, 2) * width + biases) + width,
        width,
        inner,
        layers,
        heads,
        vocabulary=words * width,
        logits=words,
        cache_width=2 * layers * kept,
    )
