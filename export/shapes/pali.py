"""PaLI: a ViT, one Linear and an mT5, by a preset, by their configs, or by folders they lie in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmedge.errors import CheckpointError
from vlmedge.plan.shape import Fields, Part, Shape, linear, vision_tower

from . import _t5
from ._siglip import VISION  # the same as transformers' ViTConfig

# The kinds of a part, and how many tokens a ViT has before its patches
CLASS_TOKENS = {"siglip_vision_model": 0, "vit": 1}
LANGUAGE_MODELS = ("mt5",)

_VIT: Mapping[str, Any] = {
    "model_type": "siglip_vision_model",
    "image_size": 224,
    "patch_size": 14,
    "num_attention_heads": 16,
}
_VIT_G = {**_VIT, "hidden_size": 1664, "intermediate_size": 8192, "num_hidden_layers": 48}
_VIT_E = {**_VIT, "hidden_size": 1792, "intermediate_size": 15360, "num_hidden_layers": 56}
_MT5: Mapping[str, Any] = {"model_type": "mt5", "vocab_size": 250112, "d_kv": 64, "num_layers": 24}
_MT5_LARGE = {**_MT5, "d_model": 1024, "d_ff": 2816, "num_heads": 16}
_MT5_XXL = {**_MT5, "d_model": 4096, "d_ff": 10240, "num_heads": 64}

# ViT-G is of Zhai et al. 2021 (arXiv 2106.04560); ViT-e, PaLI's own, is as open_clip writes it down
PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "3B": {"vision": _VIT_G, "text": _MT5_LARGE},
    "15B": {"vision": _VIT_G, "text": _MT5_XXL},
    "17B": {"vision": _VIT_E, "text": _MT5_XXL},
}
"""Name -> the configs of the ViT and of the mT5."""


def count(config: Fields) -> Shape:
    """Count a PaLIForConditionalGeneration.

    Raises:
        CheckpointError: Nothing tells a part, or it is of another kind, or not where it should be.
    """
    vision = _part(config, "vision", tuple(CLASS_TOKENS))
    text = _t5.filled(_part(config, "text", LANGUAGE_MODELS))
    leading = CLASS_TOKENS[vision.text("model_type", "")]
    tower = vision_tower(
        vision.filled(VISION), "vision_encoder", conv_bias=True, norms=1, class_tokens=leading
    )
    assert tower.rows is not None
    patches = tower.rows - leading
    written = _t5.parts_of(text, patches)
    width = written[0].width
    projector = Part("projector", *linear(tower.width, width), width=width, rows=patches)
    return Shape(
        "pali",
        (tower, projector, *written),
        soft_rows=patches,
        # patches take no room from the text: a T5 has no last place
        max_positions=patches + text.size("n_positions", _t5.POSITIONS),
        host_table=written[-1].vocabulary,
    )


def _part(config: Fields, name: str, known: tuple[str, ...]) -> Fields:
    """Find what tells "vision" or "text": a folder, else a config inside, else the preset."""
    found = config.elsewhere(name)
    if found is not None:
        found = found.maybe(f"{name}_config") or found  # of the whole of SigLIP
    else:
        found = config.maybe(f"{name}_config")
    preset = config.text("preset", "")
    if found is None and preset:
        if preset not in PRESETS:
            raise CheckpointError(f"preset is {preset!r}: choose from {', '.join(PRESETS)}")
        found = Fields(PRESETS[preset][name], f"preset {preset}")
    if found is None:
        raise CheckpointError(
            f"config.json does not describe its {name} part: "
            f"give a 'preset', a {name + '_config'!r}, or a folder as {name!r}"
        )
    model = found.text("model_type", "")
    if model not in known:
        raise CheckpointError(f"its {name} part is {model!r}: choose one of {', '.join(known)}")
    return found


SHAPE = count
