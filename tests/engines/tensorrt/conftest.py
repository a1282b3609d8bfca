"""A version of TensorRT to import, and bundles to build."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.bundles import bundle_of
from kit.fake_cuda import FakeCuda
from kit.tensorrt import STANDINS, Use, copied, engine

from vlmedge.bundle import Bundle


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Use]:
    """Put one version's stand-in where `import tensorrt` finds it, here and in child processes."""

    def forget() -> None:
        for name in ("tensorrt", "trt_core"):
            sys.modules.pop(name, None)

    def put(version: str) -> FakeCuda:
        forget()
        places = [str(STANDINS / version), str(STANDINS)]
        for place in reversed(places):
            monkeypatch.syspath_prepend(place)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(places))
        gpu = FakeCuda()
        monkeypatch.setattr(engine, "connect", lambda: gpu)
        return gpu

    yield put
    forget()


@pytest.fixture
def clip(clip_int8: Path, tmp_path: Path) -> Bundle:
    return copied(clip_int8, tmp_path)


@pytest.fixture
def blip2(blip2_bundle: Path, tmp_path: Path) -> Bundle:
    return copied(blip2_bundle, tmp_path)


@pytest.fixture(scope="module")
def t5_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_of("blip2-flan-t5", tmp_path_factory.mktemp("t5") / "bundle")


@pytest.fixture
def t5(t5_bundle: Path, tmp_path: Path) -> Bundle:
    return copied(t5_bundle, tmp_path)
