"""InstructBLIP: BLIP-2 whose Q-Former reads the instruction too; LLaMA, T5 or OPT writes."""

from __future__ import annotations

from vlmedge.plan.shape import Fields, Shape

from . import _qformer, _t5, _writers

LANGUAGE_MODELS = ("opt", "llama", *_t5.DEFAULTS)


def count(config: Fields) -> Shape:
    """Count an InstructBlipForConditionalGeneration."""
    model = _writers.language_model(config, "instructblip", LANGUAGE_MODELS)
    tower = _qformer.tower(config)
    # queries and the instruction: as many rows as the language model's prompt has
    reads = _qformer.with_words(_qformer.qformer(config, tower), config, rows=None)
    queries = _qformer.queries(config)
    return _writers.whole(config, "instructblip", model, (tower, reads), queries)


SHAPE = count
