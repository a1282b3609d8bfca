"""A LoRA adapter as PEFT writes it: adapter_config.json and adapter_model.safetensors.

    W = W0 + scale * B A        A [rank, in], B [out, rank]
    scale = alpha / rank, or alpha / sqrt(rank) for rslora (Kalajdzievski 2023, arXiv 2312.03732)

Source: Hu et al. 2021, arXiv 2106.09685; names and options are those of PEFT 0.21 (LoraConfig,
get_peft_model_state_dict). Tensors are read when they are asked for.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmedge.arrays import Array
from vlmedge.bundle.weights import SafeWeights
from vlmedge.errors import AdapterError
from vlmedge.files import digest

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."

# Options that change nothing once the tensors are there; every other one must be off.
_HARMLESS = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",  # the weight's own layout decides, as in PEFT
    "inference_mode",
    "init_lora_weights",  # see _INITS
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "loftq_config",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
}
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # the rest changes the base weights

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<kind>[AB])(?:\.[^.]+)?\.(?P<leaf>weight|bias)")
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<kind>[AB])(?:\.[^.]+)?")
_SAVED = re.compile(r"\.modules_to_save(\.default)?(?=\.)")


@dataclass(frozen=True, slots=True)
class Factors:
    """The adapter's tensors for one module.

    Attributes:
        a: The tensor A.
        b: The tensor B.
        bias: The tensor that is added to the bias, or none.
        rank: Rank of the product.
        scale: Multiplies it.
        shape: (out, in) of the product; (vocabulary, width) of an embedding table's.
        embedding: The module is an embedding table, which lies the other way round.
    """

    a: str
    b: str
    bias: str | None
    rank: int
    scale: float
    shape: tuple[int, int]
    embedding: bool


@dataclass(frozen=True)
class Adapter:
    """One adapter, opened; its tensors are on disk.

    Attributes:
        folder: Where it lies.
        modules: Factors by the module's path in the model that was trained.
        replaced: Path of a parameter that was trained itself (modules_to_save, biases) -> tensor.
        base: Those of them that are the base model's, kept beside (PEFT's base_layer): where two
            modules share a weight, it changes in both.
        tensors: The file.
    """

    folder: Path
    modules: Mapping[str, Factors]
    replaced: Mapping[str, str]
    base: frozenset[str]
    tensors: SafeWeights

    def digest(self) -> str:
        """Return the sha256 over both files' own."""
        both = [digest(self.folder / name) for name in (CONFIG, TENSORS)]
        return hashlib.sha256(" ".join(both).encode()).hexdigest()

    def pair(self, module: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Read A, float32 [rank, in], and B, float32 [out, rank], of one module."""
        found = self.modules[module]
        return self.tensors.read(found.a), self.tensors.read(found.b)

    def delta(self, module: str) -> NDArray[np.float32]:
        """Return scale * B A, float32 of the module's `shape`."""
        found = self.modules[module]
        a, b = self.pair(module)
        product = (b @ a).T if found.embedding else b @ a
        product *= np.float32(found.scale)
        return product


@dataclass(frozen=True)
class Weighted:
    """An adapter and how much of it is wanted.

    Attributes:
        adapter: Which.
        weight: Multiplies its scale; 1 is as it was trained.
    """

    adapter: Adapter
    weight: float = 1.0


def parse(text: str) -> Weighted:
    """Open what the command line names: DIR, or DIR=WEIGHT."""
    name, equals, number = text.rpartition("=")
    if not equals or Path(text).is_dir():
        return Weighted(open_adapter(Path(text)))
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise AdapterError(f"{text}: {number!r} is no weight: give DIR or DIR=0.7")
    return Weighted(open_adapter(Path(name)), weight)


def open_adapter(folder: Path) -> Adapter:
    """Read an adapter's config and the header of its tensors.

    Raises:
        AdapterError: It is none, not LoRA, uses an option that is not supported, or its tensors
            do not fit its config.
    """
    config = _config(folder)
    file = folder / TENSORS
    if not file.is_file():
        pickled = f": {PICKLE} can run code when it is read, save it as safetensors"
        cure = pickled if (folder / PICKLE).is_file() else ": copy the whole folder again"
        raise AdapterError(f"{folder}: {TENSORS} is missing{cure}")
    _refuse_options(folder, config)
    tensors = SafeWeights([file])
    pairs: dict[str, dict[str, str]] = {}
    replaced: dict[str, str] = {}
    base: set[str] = set()
    for name in tensors.shapes():
        path = name.removeprefix(PREFIX)
        if ".original_module." in path:  # the base model's own, kept beside what was trained
            continue
        factor, embedding = _FACTOR.fullmatch(path), _EMBEDDING.fullmatch(path)
        if factor is not None:
            kind = factor["kind"] if factor["leaf"] == "weight" else f"bias of {factor['kind']}"
            _put(folder, pairs, factor["module"], kind, name)
        elif embedding is not None:
            _put(folder, pairs, embedding["module"], f"embedding {embedding['kind']}", name)
        elif ".lora_" in path or "lora_" in path.rpartition(".")[2]:
            raise AdapterError(
                f"{folder}: tensor {name!r} belongs to a kind of LoRA that is not supported: "
                "merge it with PEFT's merge_and_unload and export the result"
            )
        else:
            parameter = _SAVED.sub("", path).replace(".base_layer.", ".")
            replaced[parameter] = name
            if ".base_layer." in path:
                base.add(parameter)
    shapes = tensors.shapes()
    modules = {m: _factors(folder, config, shapes, m, found) for m, found in pairs.items()}
    if not modules and not replaced:
        raise AdapterError(f"{folder}: {TENSORS} holds no LoRA tensors: train the adapter first")
    return Adapter(folder, modules, replaced, frozenset(base), tensors)


def locate(
    adapter: Adapter,
    paths: Collection[str],
    known: Collection[str],
    fits: Callable[[str, str], bool],
) -> dict[str, str]:
    """Find the modules of an adapter in a model that may have them under a longer path.

    An adapter trained on a part (CLIPVisionModel, the language model alone) leaves out how that
    part is called in the whole. What it leaves out must be the same for all its modules, or each
    must be found at one place only. The word `model` is heard over, and text_model is
    language_model: transformers moved and renamed them, and checkpoints stayed as they were.

    Args:
        adapter: The adapter, for messages.
        paths: Module paths to find.
        known: Module paths that the model has.
        fits: Whether path's shapes are known's, to tell two places apart.

    Raises:
        AdapterError: A path is nowhere, or at several places.
    """
    by_leaf: dict[str, list[tuple[tuple[str, ...], str]]] = {}
    for name in known:
        parts = _parts(name)
        by_leaf.setdefault(parts[-1], []).append((parts, name))
    found: dict[str, dict[tuple[str, ...], str]] = {}
    for path in paths:
        parts = _parts(path)
        found[path] = {
            whole[: -len(parts)]: name
            for whole, name in by_leaf.get(parts[-1], [])
            if whole[-len(parts) :] == parts
        }
        if not found[path]:
            near = difflib.get_close_matches(path, known, n=1, cutoff=0.3)
            hint = f", the nearest is {near[0]!r}" if near else ""
            raise AdapterError(
                f"{adapter.folder}: module {path!r} is not in the model{hint}: "
                "give the adapter the base model that it was trained on"
            )
    everywhere = set.intersection(*(set(places) for places in found.values())) if found else set()
    if () in everywhere:
        everywhere = {()}
    if len(everywhere) > 1:
        everywhere = {
            prefix
            for prefix in everywhere
            if all(fits(path, places[prefix]) for path, places in found.items())
        }
    if len(everywhere) == 1:
        (prefix,) = everywhere
        return {path: places[prefix] for path, places in found.items()}
    for path, places in found.items():
        if () not in places and len(places) > 1:
            names = " and ".join(repr(name) for name in sorted(places.values())[:2])
            raise AdapterError(
                f"{adapter.folder}: module {path!r} could be {names}: "
                "train it on the whole model, or write the full path into its tensors' names"
            )
    return {path: places.get((), next(iter(places.values()))) for path, places in found.items()}


def misfit(adapter: Adapter, path: str, got: object, name: str, wanted: object) -> AdapterError:
    """Build the error for a module whose shapes are another model's."""
    return AdapterError(
        f"{adapter.folder}: module {path!r} is {got}, the model's {name!r} is {wanted}: "
        "give the adapter the base model that it was trained on"
    )


def _parts(path: str) -> tuple[str, ...]:
    parts = path.split(".")
    heard = ("language_model" if part == "text_model" else part for part in parts)
    return tuple(part for part in heard if part != "model") or tuple(parts)


def _config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such folder: give the folder that holds {CONFIG}")
    if not file.is_file():
        raise AdapterError(f"{folder} is no adapter: it has no {CONFIG}")
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise AdapterError(f"{file} is not a JSON object: download it again")
    return config


def _refuse_options(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse what would make other weights than W0 + scale * B A."""
    merge = "merge it with PEFT's merge_and_unload and export the result"
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{folder} is {kind!r}, not LORA: {merge}")
    if config.get("use_dora"):
        raise AdapterError(f"{folder}: it is DoRA (use_dora), which is not supported: {merge}")
    init = config.get("init_lora_weights", True)
    if init not in _INITS:
        raise AdapterError(
            f"{folder}: init_lora_weights {init!r} changes the base weights too: {merge}"
        )
    for option, value in config.items():
        if value and option not in _HARMLESS:
            raise AdapterError(f"{folder}: option {option!r} is not supported: {merge}")
    for option in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(option) or {}, dict):
            raise AdapterError(f"{folder}: {option} is no table: write the adapter again")


def _put(folder: Path, pairs: dict[str, dict[str, str]], module: str, kind: str, name: str) -> None:
    """Note one tensor; a file with two adapters in it has a kind twice."""
    found = pairs.setdefault(module.replace(".base_layer", ""), {})
    if kind in found:
        raise AdapterError(
            f"{folder}: {found[kind]!r} and {name!r} are both {kind} of {module!r}: "
            "save one adapter to a folder"
        )
    found[kind] = name


def _factors(
    folder: Path,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    module: str,
    found: Mapping[str, str],
) -> Factors:
    """Check one module's tensors against the config."""
    embedding = "embedding A" in found or "embedding B" in found
    kinds = ("embedding A", "embedding B") if embedding else ("A", "B")
    for kind in kinds:
        if kind not in found:
            raise AdapterError(f"{folder}: module {module!r} has no {kind}: save it again")
    a, b = (found[kind] for kind in kinds)
    rank = _patterned(folder, config, "rank_pattern", "r", module)
    alpha = _patterned(folder, config, "alpha_pattern", "lora_alpha", module)
    for name, axis in ((a, 0), (b, 1)):
        shape = shapes[name]
        if len(shape) != 2:
            raise AdapterError(
                f"{folder}: tensor {name!r} is {list(shape)}, a convolution's: only Linears and "
                "embedding tables are supported, merge it with PEFT's merge_and_unload"
            )
        if shape[axis] != rank:
            raise AdapterError(
                f"{folder}: tensor {name!r} is {list(shape)}, {CONFIG} says rank {rank:g}: "
                "the two files do not belong together"
            )
    rows, columns = shapes[b][0], shapes[a][1]
    return Factors(
        a,
        b,
        found.get("bias of B"),
        int(rank),
        alpha / (math.sqrt(rank) if config.get("use_rslora") else rank),
        (columns, rows) if embedding else (rows, columns),
        embedding,
    )


def _patterned(
    folder: Path, config: Mapping[str, Any], pattern: str, plain: str, module: str
) -> float:
    """Look up a module's rank or alpha: the first pattern that ends its path, or the plain one."""
    value = config.get(plain, 8)  # PEFT's default of both
    for key, special in (config.get(pattern) or {}).items():
        try:
            matches = re.match(rf"(.*\.)?({key})$", module)
        except re.error:
            raise AdapterError(
                f"{folder}: {pattern} {key!r} is not a regular expression: correct it"
            ) from None
        if matches:
            value = special
            break
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise AdapterError(f"{folder}: {plain} of {module!r} is {value!r}: it must be above 0")
    return value


def read_bias(adapter: Adapter, module: str) -> Array | None:
    """Read what is added to a module's bias, float32 [out], scale included; none if nothing is."""
    found = adapter.modules[module]
    if found.bias is None:
        return None
    return adapter.tensors.read(found.bias) * np.float32(found.scale)
