"""BLIP: a ViT, and BERT that reads a question, writes about a picture or judges a text."""

from __future__ import annotations

from dataclasses import replace

from vlmedge.plan.shape import Fields, Part, Shape, followed, linear, vision_tower

from . import _bert

# What transformers' BlipVisionConfig takes for a field that is not there
VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 384,
    "patch_size": 16,
}
EMBEDS = 256  # image_text_hidden_size
MATCHES = 2  # whether picture and text belong together, or not


def count(config: Fields) -> Shape:
    """Count one of the architectures."""
    text = config.part("text_config").filled(_bert.TEXT)
    vision = config.part("vision_config").filled(VISION)
    tower = vision_tower(vision, "vision_encoder", conv_bias=True, norms=1)
    kinds = {
        "BlipForConditionalGeneration": _captions,
        "BlipForQuestionAnswering": _answers,
        "BlipForImageTextRetrieval": _matches,
    }
    known = next(name for name in config.names("architectures") if name in kinds)
    return kinds[known](config, text, tower)


def _captions(config: Fields, text: Fields, tower: Part) -> Shape:
    """The decoder looks at the picture's rows."""
    return _writing(text, (tower,), tower.rows or 0, prompt=None)


def _answers(config: Fields, text: Fields, tower: Part) -> Shape:
    """An encoder reads the question and looks at the picture, the decoder looks at the encoder."""
    question = _bert.reader(text, "question_encoder", rows=None, looks_at=tower)
    return _writing(text, (tower, question), 0, prompt=1)


def _matches(config: Fields, text: Fields, tower: Part) -> Shape:
    """One BERT, with its cross-attention and without."""
    out = config.size("image_text_hidden_size", EMBEDS)
    alone = _bert.reader(text, "text_encoder", rows=text.size("max_position_embeddings", None))
    fusion = _bert.reader(text, "fusion", rows=alone.rows, looks_at=tower)
    parts = (
        followed(tower, linear(tower.width, out)),
        followed(alone, linear(alone.width, out)),
        followed(fusion, linear(fusion.width, MATCHES)),
    )
    return Shape("blip", parts, shared=alone.parameters)


def _writing(text: Fields, encoders: tuple[Part, ...], seen: int, prompt: int | None) -> Shape:
    """Add what writes.

    Args:
        text: Its config.
        encoders: The parts before it.
        seen: Rows that the decoder looks at; 0: as many as the question has.
        prompt: Rows that it reads before it writes, or none: the prompt's.
    """
    rows = seen or text.size("max_position_embeddings", None)
    keys = _bert.keys_and_values(text)
    width = text.size("hidden_size", None)
    cross = Part("cross_kv", *keys, width=width, rows=seen or None)
    asks = _bert.queries_and_output(text)
    decoder = followed(_bert.reader(text, "decoder", rows=prompt, table=False), asks)
    words = text.size("vocab_size", None)
    dense, bias = linear(width, width)
    layers = text.size("num_hidden_layers", None)
    decoder = replace(
        decoder,
        linear=decoder.linear + dense,
        other=decoder.other + bias + 2 * width + words,  # a norm, and the words' biases
        vocabulary=words * width,
        logits=words,
        cache_width=2 * layers * width,
        held=2 * layers * width * rows,
    )
    return Shape(
        "blip",
        (*encoders, cross, decoder),
        max_positions=text.size("max_position_embeddings", None),
        host_table=decoder.vocabulary,
        tied=True,
    )


SHAPE = count
