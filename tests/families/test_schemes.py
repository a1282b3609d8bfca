"""Every family in every scheme."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kit.bundles import bundle_of
from kit.reference import (
    Case,
    Record,
)
from kit.tiny import schemes

from vlmedge.bundle import Bundle
from vlmedge.make.check import check

CLOSE = {"fp16": 0.999, "int8": 0.98, "fp8": 0.9, "int4": 0.8}  # least cosine, on random weights


@pytest.mark.parametrize("scheme", schemes())
def test_scheme_keeps_every_component_close(
    case: Case,
    scheme: str,
    tmp_path: Path,
    record_property: Record,
    request: pytest.FixtureRequest,
) -> None:
    """Random weights have no accuracy to lose, and amplify what trained ones damp.

    So the limits are wider than the gate's; a wrong scale or a lost layer is at 0.5 or below.
    """
    kind = request.node.callspec.params["case"]
    check(bundle_of(kind, tmp_path / "b", scheme), str(case.folder))
    parity = Bundle.load(tmp_path / "b").manifest.parity
    assert parity is not None
    record_property("cosine", json.dumps({c.component: c.cosine for c in parity.components}))
    for result in parity.components:
        assert result.cosine >= CLOSE[scheme], result
