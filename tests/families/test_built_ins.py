"""Every built-in checkpoint, by accuracy: right answers on held-out scenes in small schemes."""

from __future__ import annotations

from pathlib import Path

import pytest
from kit.bundles import bundle_of
from kit.tiny import schemes, trained

from vlmedge.bundle import Bundle
from vlmedge.make.check import check

LEAST = 0.95  # of the answers right, whatever the scheme


@pytest.mark.parametrize("scheme", schemes("int8", "int4"))
@pytest.mark.parametrize("name", trained())
def test_scheme_keeps_the_answers(name: str, scheme: str, tmp_path: Path) -> None:
    check(bundle_of(name, tmp_path / "b", scheme), name)
    bundle = Bundle.load(tmp_path / "b")
    assert bundle.verified, bundle.manifest.parity
    assert bundle.manifest.parity is not None
    for task in bundle.manifest.parity.tasks:
        assert task.reference_accuracy is not None and task.reference_accuracy >= LEAST, task
        assert task.accuracy is not None and task.accuracy >= LEAST, task
