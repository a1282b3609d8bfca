"""What the machine would allow at best: bytes over its bandwidth, operations over its peak."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GIGA = 1e9


@dataclass(frozen=True)
class Work:
    """What one run of a case comes to.

    Attributes:
        image_gop: Of the tower, for one picture, 10^9 operations; a multiply-add is two.
        token_gop: Of the decoder's matrices, for one token.
    """

    image_gop: float | None = None
    token_gop: float | None = None


def tower_gop(vision: Mapping[str, Any]) -> float:
    """Count the operations of a ViT's matrices and attention, for one picture.

    Args:
        vision: The vision_config of a checkpoint's config.json.
    """
    width, inner = vision["hidden_size"], vision["intermediate_size"]
    patch = vision["patch_size"]
    tokens = (vision["image_size"] // patch) ** 2 + 1
    layer = tokens * (4 * width**2 + 2 * width * inner) + 2 * tokens**2 * width
    return 2 * (vision["num_hidden_layers"] * layer + tokens * 3 * patch**2 * width) / GIGA


def decoder_weights(text: Mapping[str, Any]) -> int:
    """Count the weights that one token is multiplied with, in LLaMA and OPT.

    Args:
        text: The config of the decoder.
    """
    width, heads = text["hidden_size"], text["num_attention_heads"]
    groups = text.get("num_key_value_heads") or heads
    gated = "intermediate_size" in text
    inner = text["intermediate_size"] if gated else text["ffn_dim"]
    attention = 2 * width**2 + 2 * width * (width // heads) * groups
    layer = attention + (3 if gated else 2) * width * inner
    return int(text["num_hidden_layers"] * layer + text["vocab_size"] * width)


def limits(
    work: Work, unit: str, weights_bytes: int | None, machine: Mapping[str, float]
) -> dict[str, float]:
    """Return the best figure that each metric could have.

    Args:
        work: Of the case.
        unit: What the side multiplies in: fp32, bf16 or int8.
        weights_bytes: What it reads for one token, or none.
        machine: What measure_machine.py found.
    """
    found: dict[str, float] = {}
    peak = machine.get(f"{unit}_gops")
    if peak and work.image_gop:
        found["image_ms"] = 1000 * work.image_gop / peak
        found["images_per_s"] = peak / work.image_gop
    if peak and work.token_gop:
        found["prefill_tok_s"] = peak / work.token_gop
    if weights_bytes and machine.get("read_gb_s"):
        found["decode_tok_s"] = machine["read_gb_s"] * GIGA / weights_bytes
    return found
