"""Weights under the names that today's transformers gives them.

transformers 5 renamed parameters of old models (vit.encoder.layer.0.attention.attention.query is
vit.layers.0.attention.q_proj in memory) while every checkpoint on disk keeps its names; which
models are renamed differs between its releases.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from .._checkpoint.weights import Named, Weights
from .torch_modules import Build, build_on_meta

Rules = Sequence[tuple[str, str]]
"""Regular expression -> replacement, applied one after the other, each wherever it fits."""

VIT: Rules = (  # transformers.conversion_mapping 5.23, "ViT-style vision models"
    (r"\.encoder\.layer\.", ".layers."),
    (r"attention\.attention\.query", "attention.q_proj"),
    (r"attention\.attention\.key", "attention.k_proj"),
    (r"attention\.attention\.value", "attention.v_proj"),
    (r"attention\.output\.dense", "attention.o_proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
)


def respell(weights: Weights, rules: Rules, builds: Mapping[str, Build]) -> Named:
    """Rename weights to what the modules of `builds` call them, where those do not know them so."""
    needed: set[str] = set()
    for build in builds.values():
        module, _ = build_on_meta(build)
        needed |= {name for name, _ in module.named_parameters()}
    return Named(
        weights,
        {name if name in needed else _respell(name, rules): name for name in weights.shapes()},
    )


def _respell(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
