"""A checkpoint folder in Hugging Face layout, as far as every family reads it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import PIL.Image
import tokenizers
import transformers

from vlmedge.errors import CheckpointError
from vlmedge.spec import Generation, ImageFrontEnd

from .preprocessor import front_end

TOKENIZER = "assets/tokenizer.json"

# Tokenized by both sides at export: what breaks tokenizers is rarely plain English.
GOLDENS = (
    "",
    "a photo of a cat",
    "Question: what colour is the circle? Answer:",
    "  two  spaces\tand a tab\n",
    "Ünïcödé, naïve café",
    "数は三つです。",
    "🦙👩‍👩‍👧 emoji",
    "MiXeD CaSe, it's 3.14!",
    "</s><|endoftext|>",
)


def read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """Read a JSON file of a checkpoint; none when it is not there."""
    file = folder / name
    if not file.is_file():
        return None
    try:
        data = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        raise CheckpointError(f"{file} is not valid JSON: download it again") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} is not a JSON object: download it again")
    return data


def read_config(folder: Path, needed: Iterable[str]) -> Any:
    """Read config.json as transformers does, in eager float32, and refuse one with gaps.

    Args:
        folder: The checkpoint.
        needed: Fields that have no sane default.
    """
    raw = read_json(folder, "config.json") or {}
    for field in needed:
        if field not in raw:
            raise CheckpointError(
                f"{folder / 'config.json'} lacks the field {field!r}: download it again"
            )
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises what each config class happens to raise
        line = " ".join(str(error).split())[:300]  # the reason may stand in its second line
        raise CheckpointError(f"{folder / 'config.json'} is refused: {line}") from None
    eager_float32(config)
    return config


def eager_float32(config: Any) -> None:
    """Trace the plain attention (SDPA's export is a maze), in float32 whatever the disk holds."""
    config._attn_implementation = "eager"
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        part.dtype = "float32"
        part._attn_implementation = "eager"


def read_image_processor(folder: Path) -> Any:
    """Read the image processor's config: a file of its own, or inside the processor's; or none."""
    config = read_json(folder, "preprocessor_config.json")
    if config is None:
        config = (read_json(folder, "processor_config.json") or {}).get("image_processor")
    return config


def read_image_front_end(folder: Path, default: ImageFrontEnd) -> ImageFrontEnd:
    """Read how a checkpoint's pictures become pixels.

    Old files leave out what their class had as a default: it comes from `default`.
    """
    config = read_image_processor(folder)
    if config is None:
        return default
    filled = {
        "resample": int(PIL.Image.Resampling[default.resample.upper()]),
        "image_mean": default.image_mean,
        "image_std": default.image_std,
    }
    return front_end({**filled, **config})


LOCATED_TOKENS = 256  # of an answer that says where things are: a box alone takes four and more


def read_generation(folder: Path, text_config: Any, max_tokens: int | None = None) -> Generation:
    """Read generation_config.json; what it leaves out comes from the text config.

    Args:
        folder: Folder of the checkpoint.
        text_config: Config of its language model.
        max_tokens: Limit of new tokens where the checkpoint gives none; none: the usual one.
    """
    config = read_json(folder, "generation_config.json") or {}

    def pick(name: str) -> Any:
        found = config.get(name)
        return getattr(text_config, name, None) if found is None else found

    eos = pick("eos_token_id")
    eos_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    pad = pick("pad_token_id")
    options = {
        ours: config[theirs]
        for ours, theirs in {
            "max_tokens": "max_new_tokens",
            "min_tokens": "min_new_tokens",
            "num_beams": "num_beams",
            "do_sample": "do_sample",
            "temperature": "temperature",
            "top_k": "top_k",
            "top_p": "top_p",
            "repetition_penalty": "repetition_penalty",
            "length_penalty": "length_penalty",
            "no_repeat_ngram_size": "no_repeat_ngram_size",
            "forced_eos_id": "forced_eos_token_id",
        }.items()
        if config.get(theirs) is not None
    }
    if config.get("early_stopping") is not None:
        options["early_stopping"] = bool(config["early_stopping"])
    if max_tokens is not None:
        options.setdefault("max_tokens", max_tokens)
    return Generation(
        eos_ids=eos_ids,
        pad_id=pad if pad is not None else eos_ids[0] if eos_ids else 0,
        bos_id=pick("bos_token_id"),
        **options,
    )


def read_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """Build the fast tokenizer, also from vocab.json and merges.txt alone.

    Its ids are compared with transformers' own on goldens, special tokens included.
    """
    return read_padded_tokenizer(folder)[0]


def read_padded_tokenizer(
    folder: Path,
) -> tuple[tokenizers.Tokenizer, int, Literal["left", "right"]]:
    """Build the fast tokenizer, and say with which id and on which side short rows are filled.

    Only a model whose result depends on its padding needs to know: SigLIP reads the last position,
    whatever stands there.
    """
    sources = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model", "vocab.txt")
    if not any((folder / name).is_file() for name in sources):
        raise CheckpointError(
            f"{folder} has no tokenizer: add tokenizer.json, or vocab.json and merges.txt"
        )
    try:
        full = transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers raises what each tokenizer happens to raise
        line = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{folder}: its tokenizer is refused: {line}") from None
    if full.is_fast:
        fast = tokenizers.Tokenizer.from_str(full.backend_tokenizer.to_str())
    elif (folder / "tokenizer.json").is_file():  # beside SentencePiece code; the goldens decide
        fast = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    else:
        raise CheckpointError(
            f"{folder}: {type(full).__name__} has no fast version, and the runtime has no other: "
            "add a tokenizer.json"
        )
    fast.no_padding()
    fast.no_truncation()
    for text in GOLDENS:
        ours, theirs = fast.encode(text).ids, full(text)["input_ids"]
        if ours != theirs:
            raise CheckpointError(
                f"{folder}: tokenizer.json gives {ours} for {text!r}, transformers gives {theirs} "
                "by code that the runtime does not have: choose a checkpoint with a complete "
                "tokenizer.json"
            )
    pad = full.pad_token_id
    return fast, 0 if pad is None else pad, "left" if full.padding_side == "left" else "right"


def token_text(
    folder: Path, tokenizer: tokenizers.Tokenizer, field: str, number: int | None
) -> str:
    """Return the text of the token that a config names in `field`."""
    found = None if number is None else tokenizer.id_to_token(number)
    if found is None:
        raise CheckpointError(
            f"{folder}: {field} is {number}, which its tokenizer does not have: download both again"
        )
    return found


def bare(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Take a tokenizer's special tokens off, for prompts that have their own written out."""
    written = json.loads(tokenizer.to_str())
    written["post_processor"] = None
    return tokenizers.Tokenizer.from_str(json.dumps(written))


def goldens(tokenizer: tokenizers.Tokenizer) -> bytes:
    """Return texts and their ids, for `check` on the device."""
    table = [{"text": text, "ids": tokenizer.encode(text).ids} for text in GOLDENS]
    return json.dumps(table, ensure_ascii=False, indent=1).encode() + b"\n"


def check_weights(
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    ignored: Iterable[str],
) -> None:
    """Refuse missing, extra and misshapen weights by name.

    Args:
        found: Shapes in the checkpoint.
        expected: Shapes that the modules need.
        ignored: Endings of names that checkpoints carry and nobody needs.
    """
    missing = sorted(set(expected) - set(found))
    if missing:
        raise CheckpointError(
            f"weight {missing[0]!r} is missing{_more(missing)}: download the weights again"
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise CheckpointError(
                f"weight {name!r} is {list(found[name])}: config.json asks for {list(shape)}"
            )
    endings = tuple(ignored)
    extra = sorted(n for n in set(found) - set(expected) if not n.endswith(endings))
    if extra:
        raise CheckpointError(
            f"weight {extra[0]!r} belongs to no part of the model{_more(extra)}: "
            "download config.json and the weights of one model"
        )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
