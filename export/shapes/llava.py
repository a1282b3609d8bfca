"""LLaVA: CLIP's or SigLIP's picture tower, two projections, a decoder."""

from __future__ import annotations

from vlmedge.errors import CheckpointError
from vlmedge.plan.shape import Fields, Part, Shape, linear, vision_tower

from . import _language, _siglip, clip

LANGUAGE_MODELS = ("llama", "mistral", "qwen2")
TOWERS = {"clip_vision_model": clip.VISION, "siglip_vision_model": _siglip.VISION}
LAYER = -2  # of the tower, that is looked at


def count(config: Fields) -> Shape:
    """Count a LlavaForConditionalGeneration.

    The first LLaVA has one projection, which its config does not tell: two are counted.
    """
    parts = _, projector, _ = parts_of(config, "llava")
    assert projector.rows is not None
    return whole(config, "llava", parts, soft_rows=projector.rows)


def parts_of(config: Fields, kind: str) -> tuple[Part, Part, Part]:
    """Count what LLaVA's line has: a tower, a projector and a decoder.

    Of the tower only the layers up to the last one that is looked at are exported.
    """
    text = _language.filled(config.part("text_config"), kind, LANGUAGE_MODELS)
    vision = config.part("vision_config")
    model = tower_kind(vision, kind)
    layers = feature_layers(config)
    tower = _tower(vision, model, max(layers))
    decoder = _language.decoder(text)
    bias = config.flag("multimodal_projector_bias", True)
    pair = (
        linear(tower.width * len(layers), decoder.width, bias),
        linear(decoder.width, decoder.width, bias),
    )
    assert tower.rows is not None
    drops_class = (
        model == "clip_vision_model"
        and config.text("vision_feature_select_strategy", "default") == "default"
    )
    projector = Part(
        "projector",
        sum(weights for weights, _ in pair),
        sum(biases for _, biases in pair),
        width=decoder.width,
        inner=decoder.width,
        rows=tower.rows - 1 if drops_class else tower.rows,
    )
    return tower, projector, decoder


def tower_kind(vision: Fields, kind: str) -> str:
    """Return the model_type of a tower; refuse one that is not of this line."""
    found = vision.text("model_type", next(iter(TOWERS)))
    if found not in TOWERS:
        names = " or ".join(map(repr, TOWERS))
        raise CheckpointError(
            f"its model_type {found!r} cannot be planned: {kind} is planned with {names}"
        )
    return found


def feature_layers(config: Fields) -> list[int]:
    """Return how many layers of the tower each output that is looked at has behind it."""
    vision = config.part("vision_config")
    known = TOWERS[vision.text("model_type", next(iter(TOWERS)))]
    count = vision.filled(known).size("num_hidden_layers", None)
    places = config.places("vision_feature_layer", LAYER)
    return [place if place >= 0 else count + 1 + place for place in places]


def whole(
    config: Fields, kind: str, parts: tuple[Part, ...], soft_rows: int, shared: int = 0
) -> Shape:
    """Put the parts of a model of LLaVA's line together; the decoder is the last."""
    text = _language.filled(config.part("text_config"), kind, LANGUAGE_MODELS)
    return Shape(
        kind,
        parts,
        soft_rows=soft_rows,
        max_positions=text.size("max_position_embeddings", None),
        host_table=parts[-1].vocabulary,
        tied=text.flag("tie_word_embeddings", False),
        extra=unseen(config),
        shared=shared,
    )


def unseen(config: Fields) -> int:
    """Count the tower's parameters behind what is looked at: layers, the last norm, a head."""
    vision = config.part("vision_config")
    model = vision.text("model_type", next(iter(TOWERS)))
    whole, seen = _tower(vision, model, None), _tower(vision, model, max(feature_layers(config)))
    head = 0
    if model == "siglip_vision_model" and vision.flag("vision_use_head", True):
        head = _siglip.head(whole).parameters - whole.parameters
    return whole.parameters - seen.parameters + 2 * whole.width + head


def _tower(vision: Fields, model: str, layers: int | None) -> Part:
    fields = vision.filled(TOWERS[model])
    if model == "siglip_vision_model":
        return _siglip.tower(fields, norms=0, layers=layers)
    return vision_tower(fields, "vision_encoder", conv_bias=False, norms=1, layers=layers)


SHAPE = count
