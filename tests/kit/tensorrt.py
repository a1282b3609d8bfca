"""The TensorRT engine over stand-ins of three versions, which run graphs on a CPU.

What cannot be had without a GPU is whether TensorRT takes the graphs and how fast they are; what
can is every name that is used, profiles, types, state, the cache, the lock and how builds fail.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vlmedge
from kit.fake_cuda import FakeCuda
from kit.shelf import module
from vlmedge.arrays import Array
from vlmedge.bundle import Bundle
from vlmedge.progress import SILENT
from vlmedge.run.model import Model
from vlmedge.shelves.build_options import BuildOptions
from vlmedge.shelves.registry import ENGINES
from vlmedge.spec.wiring import writing

engine, api = module("runtimes", "tensorrt"), module("runtimes", "_tensorrt.versions")
builder, cache = module("runtimes", "_tensorrt.compile"), module("runtimes", "_tensorrt.store")
cuda, accelerators = module("runtimes", "_cuda"), module("runtimes", "_tensorrt.dla")
graphs, profile = module("runtimes", "_tensorrt.graph"), module("runtimes", "_tensorrt.profiles")
tactics, judging = module("runtimes", "_tensorrt.tactic_libraries"), module("runtimes", "_judge")
STANDINS = Path(__file__).parent / "standins"
VERSIONS = {"trt86": "8.6.1", "trt103": "10.3.0", "trt110": "11.0.0"}
EXACT = BuildOptions(precision="float32")
Use = Callable[[str], FakeCuda]


def copied(source: Path, folder: Path) -> Bundle:
    """Copy a bundle without its engines."""
    target = folder / "bundle"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("engines"))
    return Bundle.load(target)


def build(bundle: Bundle, options: BuildOptions = EXACT, progress: Any = SILENT) -> Any:
    return ENGINES["tensorrt"].build(bundle, options, progress)  # type: ignore[attr-defined]


def only(name: str, **more: Any) -> BuildOptions:
    return BuildOptions(precision="float32", components=(name,), **more)


def left(bundle: Bundle) -> list[str]:
    """List what is in engines/ besides the stamps of verified files."""
    return sorted(f.name for f in (bundle.path / "engines").iterdir() if f.suffix != ".json")


def plan_head(folder: Path) -> dict[str, Any]:
    _, head, _ = (folder / "engine.plan").read_bytes().split(b"\n", 2)
    found: dict[str, Any] = json.loads(head)
    return found


def forbidden(*args: object, **more: object) -> None:
    raise AssertionError("it was built again")


def token_feeds(bundle: Bundle, rows: int) -> dict[str, Array]:
    spec = bundle.spec.component("text_encoder")
    assert bundle.spec.text is not None
    tokens = bundle.spec.text.pad_to or bundle.spec.text.max_tokens
    return {i.name: np.ones((rows, tokens), i.dtype) for i in spec.inputs}


def prompt(rows: int, tokens: int, total: int) -> dict[str, Array]:
    random = np.random.default_rng(tokens)
    embeds = random.standard_normal((rows, tokens, 128)).astype(np.float32)
    return {"inputs_embeds": embeds, "attention_mask": np.ones((rows, total), np.int64)}


def writes_the_same(bundle: Bundle, pictures: list[Path]) -> None:
    there, here = Model(bundle), Model(bundle, "tensorrt")
    clip = vlmedge.Video(np.random.default_rng(0).integers(0, 256, (11, 40, 52, 3), np.uint8))
    shown: dict[str, Any] = {"image": [str(picture) for picture in pictures], "video": [clip]}
    for task, beams in itertools.product(writing(bundle.spec), (1, 3)):
        more: Any = {"max_tokens": 6, "num_beams": beams}
        if "{question}" in task.prompt:
            more["question"] = "what color is the star?"
        texts = [
            (model.ask if "question" in more else model.caption)(shown[task.source], **more)
            for model in (there, here)
        ]
        assert texts[0] == texts[1]
    here.graphs.close()


def clock(monkeypatch: pytest.MonkeyPatch, *times: float) -> None:
    """Have plain and recorded steps take these times, ms."""
    taken, walked = itertools.cycle(times), engine.walked
    monkeypatch.setattr(engine, "walked", lambda *a: (walked(*a)[0], next(taken)))
