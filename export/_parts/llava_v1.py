"""The layout of the first LLaVA's descendants: a language model's folder, and its tower beside it.

    config.json, tokenizer      of the language model, with the architecture's name
    model*.safetensors or .bin  the language model, mostly with the projector
    vision_tower/               CLIP: config.json, preprocessor_config.json, weights

Pictures have tokens of their own, which the embedding table must have rows for.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tokenizers
import transformers

from vlmedge.errors import CheckpointError

from .._checkpoint.folder import eager_float32, read_config, read_json
from .._checkpoint.weights import Renamed, Weights, open_weights
from .decoder import EMBED_TOKENS

TOWER = "vision_tower"
SPARE = ("clip.", f"language_model.model.{TOWER}.")  # which no component needs
PREFIXES = {
    "model.mm_projector.": "mm_projector.",
    "model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}


def tower_prefixes(tower: str) -> dict[str, str]:
    """Return how the names of a CLIP begin, the whole or its tower alone; all else is "clip."."""
    parts = ("embeddings", "pre_layrnorm", "encoder", "post_layernorm")
    return {"vision_model.": f"{tower}.", **{f"{p}.": f"{tower}.{p}." for p in parts}, "": "clip."}


def read_configs(folder: Path) -> Any:
    """Read what the language model's config.json and the tower's say, as LLaVA's config has it."""
    if not (folder / TOWER / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has no {TOWER}/config.json: put the CLIP model that it was trained with "
            "there"
        )
    raw = read_json(folder, "config.json") or {}
    text = transformers.LlamaConfig.from_dict({**raw, "model_type": "llama"})
    eager_float32(text)
    vision = read_config(folder / TOWER, needed=())
    return SimpleNamespace(
        text_config=text,
        vision_config=getattr(vision, "vision_config", vision),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def open_tower(folder: Path, *, allow_pickle: bool) -> Weights:
    """Find the tower's weights; what is not the tower's, of a whole CLIP, is called "clip."."""
    found = open_weights(folder / TOWER, allow_pickle=allow_pickle)
    return Renamed(found, tower_prefixes(TOWER))


def add_marks(
    folder: Path,
    tokenizer: tokenizers.Tokenizer,
    weights: Weights,
    marks: tuple[str, str, str],
    cure: str,
) -> tuple[int, int]:
    """Give a tokenizer the tokens around a picture, if it lacks them.

    Args:
        folder: The checkpoint.
        tokenizer: Its own.
        weights: With the embedding table.
        marks: The token of a patch, and those before and after a picture.
        cure: Advice where the embedding table has no rows for them.

    Returns:
        The first one's id, and how many rows the embedding table has.
    """
    tokenizer.add_special_tokens([*marks])
    rows = weights.shapes().get(EMBED_TOKENS, (0,))[0]
    ids = [tokenizer.token_to_id(mark) or 0 for mark in marks]
    if max(ids) >= rows:
        raise CheckpointError(
            f"{folder}: {marks[ids.index(max(ids))]} is token {max(ids)} of its tokenizer, and the "
            f"embedding table has {rows} rows: {cure}"
        )
    return ids[0], rows
