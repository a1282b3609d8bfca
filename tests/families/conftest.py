"""Every kind of checkpoint, after its gate; pictures and videos to show it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from kit.bundles import bundle_of
from kit.reference import SIZES, Case, Record
from kit.tiny import kinds, tiny
from numpy.typing import NDArray
from PIL import Image

import vlmedge
from vlmedge.checkpoints.scenes import draw_scene
from vlmedge.make.check import check


@dataclass
class Told:
    """Keeps what the gate has to say beside its verdict."""

    notes: list[str] = field(default_factory=list)

    def step(self, title: str, total: int | None = None) -> AbstractContextManager[Any]:
        """Draw nothing."""
        return nullcontext(lambda amount: None)

    def note(self, text: str) -> None:
        """Keep a line."""
        self.notes.append(text)


@pytest.fixture(scope="session", params=kinds())
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Write one kind of checkpoint, and put its bundle in float32 through the gate."""
    torch.set_num_threads(1)  # tiny models gain nothing by more
    root = tmp_path_factory.mktemp(request.param)
    reference = tiny(request.param, root / "checkpoint")
    bundle = bundle_of(request.param, root / "bundle")
    told = Told()
    check(bundle, str(root / "checkpoint"), progress=told)
    assert not told.notes  # the cache's bundle is of this very checkpoint
    return Case(root / "checkpoint", reference, vlmedge.load(bundle))


@pytest.fixture(autouse=True)
def recorded(request: pytest.FixtureRequest, record_property: Record) -> None:
    """Tell docs/families.md what a result is of."""
    call = getattr(request.node, "callspec", None)
    if call is not None and "case" in call.params:
        record_property("kind", call.params["case"])
        record_property("scheme", call.params.get("scheme"))


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    drawn = [Image.fromarray(draw_scene(i, "heldout").image) for i in range(4)]
    return [image.resize(size) for image, size in zip(drawn, SIZES, strict=True)]


@pytest.fixture(scope="session")
def clips() -> list[NDArray[np.uint8]]:
    """Draw videos of more frames than any family looks at, of as many, and of fewer."""
    rng = np.random.default_rng(0)
    scenes = [Image.fromarray(draw_scene(i, "heldout").image) for i in range(3)]
    return [
        np.stack(
            [np.asarray(scene.rotate(int(rng.integers(360))).resize(size)) for _ in range(count)]
        )
        for scene, size, count in zip(scenes, SIZES[1:], (21, 8, 3), strict=True)
    ]
