"""The folder of an OpenFlamingo checkpoint: what is released, and the two models around it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tokenizers

from vlmedge.errors import CheckpointError

from .._checkpoint.folder import read_config
from .._checkpoint.weights import Cut, Renamed, Weights, open_saved
from ..shapes.openflamingo import EVERY, gated_layers
from .decoder import check_language_model
from .openflamingo import END, IMAGE, LANGUAGE_MODELS, Names

TOWER, LM = "vision_encoder", "lang_encoder"
GATED, HEAD = f"{LM}.gated_cross_attn_layers", f"{LM}.lm_head.weight"
CHECKPOINT = "checkpoint.pt"


def read_place(folder: Path, raw: Mapping[str, Any], name: str) -> Path:
    """Find the folder of the part `name`, "vision" or "text"."""
    place = raw.get(name)
    if not isinstance(place, str):
        raise CheckpointError(
            f"{folder / 'config.json'} has no {name!r}: name the folder of its {name} part"
        )
    if not (folder / place / "config.json").is_file():
        raise CheckpointError(
            f"{folder / place / 'config.json'} is missing: {folder / 'config.json'} says that "
            f"its {name} part lies there: put it there"
        )
    return folder / place


def read_vision(folder: Path) -> Any:
    """Read CLIP's config, as LLaVA's line has it: the last layer's patches are looked at."""
    config = read_config(folder, needed=("model_type",))
    config = getattr(config, "vision_config", config)  # of the whole of CLIP
    if config.model_type != "clip_vision_model":
        raise CheckpointError(
            f"{folder}: its vision part is {config.model_type!r}: choose a CLIP, such as "
            "openai/clip-vit-large-patch14"
        )
    return SimpleNamespace(
        vision_config=config, vision_feature_layer=-1, vision_feature_select_strategy="default"
    )


def read_text(folder: Path) -> Any:
    """Read the language model's config, and refuse what transformers' own MPT passes over."""
    config = read_config(folder, needed=("model_type",))
    check_language_model(folder, config, LANGUAGE_MODELS)
    attention = getattr(config, "attn_config", None)
    if attention is None:
        return config
    usual = {"alibi": True, "alibi_bias_max": 8, "qk_ln": False, "prefix_lm": False}
    for name, value in usual.items():
        if getattr(attention, name) != value:
            raise CheckpointError(
                f"{folder}: {name} is {getattr(attention, name)!r}: choose an MPT with {value!r}, "
                "such as anas-awadalla/mpt-7b"
            )
    return config


def read_size(folder: Path, raw: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """Read a count of 1 or more from config.json."""
    found = raw.get(name, default)
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise CheckpointError(
            f"{folder / 'config.json'}: {name} is {found!r}: it must be a whole number of 1 or more"
        )
    return found


def open_trained(folder: Path, names: Names, layers: int, *, allow_pickle: bool) -> Weights:
    """Open what the checkpoint itself holds, and give its gated layers one name each.

    The authors' module has them twice, beside the language model and before its layers, and these
    twice likewise; what is saved depends on how it was trained.
    """
    if not any(folder.glob("model*.safetensors")) and not (folder / CHECKPOINT).is_file():
        raise CheckpointError(f"{folder} has no weights: put {CHECKPOINT} there")
    trained = open_saved(folder, CHECKPOINT, "model_state_dict", allow_pickle=allow_pickle)
    trained = Renamed(trained, {"module.": ""})  # of several GPUs
    prefixes = {}
    for i in range(layers):
        place = f"{LM}.{names.body}.{names.layers}.{i}."
        prefixes[f"{place}gated_cross_attn_layer."] = f"{GATED}.{i}."
        prefixes[f"{place}decoder_layer."] = place
        prefixes[f"{LM}.old_decoder_blocks.{i}."] = place
    head = {f"{LM}.embed_out.": f"{LM}.lm_head.", f"{TOWER}.": "open_clip."}
    return Renamed(trained, {**prefixes, **head})


def check_trained(folder: Path, trained: Weights, layers: int, every: int) -> None:
    """Refuse gated layers at other places, and a Perceiver that counts pictures or frames."""
    named = [name for name in trained.shapes() if name.startswith(f"{GATED}.")]
    places = sorted({int(name.removeprefix(f"{GATED}.").partition(".")[0]) for name in named})
    if places != gated_layers(layers, every):
        raise CheckpointError(
            f"{folder}: its gated layers stand before layers {places} of {layers}: "
            f"{EVERY} {every} asks for {gated_layers(layers, every)}"
        )
    for name in ("perceiver.frame_embs", "perceiver.media_time_embs"):
        if name in trained.shapes():
            raise CheckpointError(
                f"{folder}: weight {name!r} belongs to a Perceiver for videos: choose a checkpoint "
                "without it, such as any released one"
            )


def cut_vocabulary(
    folder: Path, weights: Weights, trained: Weights, table: str, tokenizer: tokenizers.Tokenizer
) -> Weights:
    """Leave the rows that the checkpoint's table has, or that the tokenizer has tokens for."""
    shapes = weights.shapes()
    own = trained.shapes().get(table)
    rows = tokenizer.get_vocab_size() if own is None else own[0]
    last = max(tokenizer.token_to_id(token) or 0 for token in (END, IMAGE))
    found = shapes[table][0] if table in shapes else rows
    if last >= min(rows, found):
        raise CheckpointError(
            f"{folder}: {END} and {IMAGE} are tokens up to {last}, and the embedding table has "
            f"{min(rows, found)} rows: put {CHECKPOINT} beside its own language model"
        )
    return Cut(weights, {table: rows, HEAD: rows})
