"""BLIP-2: a ViT, a Q-Former that looks at it, a projection, then OPT or T5."""

from __future__ import annotations

from vlmedge.plan.shape import Fields, Shape

from . import _qformer, _t5, _writers

LANGUAGE_MODELS = ("opt", *_t5.DEFAULTS)


def count(config: Fields) -> Shape:
    """Count a Blip2ForConditionalGeneration, whose language model is OPT or a T5."""
    model = _writers.language_model(config, "blip2", LANGUAGE_MODELS)
    tower = _qformer.tower(config)
    seeing = (tower, _qformer.qformer(config, tower))
    return _writers.whole(config, "blip2", model, seeing, _qformer.queries(config))


SHAPE = count
