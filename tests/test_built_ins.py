"""Every built-in checkpoint, by accuracy: right answers on held-out scenes in small schemes."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmedge.checkpoints.resolve import built_ins
from vlmedge.make.export import export
from vlmedge.make.quantize import quantize
from vlmedge.make.recipe import Recipe

LEAST = 0.95  # of the answers right, whatever the scheme


@pytest.fixture(scope="module", params=built_ins())
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export one in float32, without the gate: it is held against PyTorch in small."""
    return export(request.param, tmp_path_factory.mktemp(request.param) / "b", check=False).path


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_scheme_keeps_the_answers(case: Path, scheme: str, tmp_path: Path) -> None:
    bundle = quantize(case, Recipe(scheme, keep_slower=True), tmp_path / "small")
    assert bundle.verified, bundle.manifest.parity
    assert bundle.manifest.parity is not None
    for task in bundle.manifest.parity.tasks:
        assert task.reference_accuracy is not None and task.reference_accuracy >= LEAST, task
        assert task.accuracy is not None and task.accuracy >= LEAST, task
