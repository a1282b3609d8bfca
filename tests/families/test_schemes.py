"""Every family in every scheme."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from kit.bundles import bundle_of
from kit.reference import Case, Record
from kit.shelf import module
from kit.tiny import schemes

from vlmedge.bundle import Bundle
from vlmedge.make.check import check
from vlmedge.parity.probe import Probe
from vlmedge.shelves.registry import ENGINES

ort = module("runtimes", "ort")

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


@pytest.mark.parametrize("scheme", schemes("int8", "int4"))
def test_engines_of_either_sort_of_processor_open_and_agree(
    case: Case,
    scheme: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """With VNNI and without: the tests above run this processor's own, here the other is forced.

    Both give the same numbers, unless this processor has no VNNI and its int8 sums overflow.
    """
    kind = request.node.callspec.params["case"]
    bundle, overflows = Bundle.load(bundle_of(kind, tmp_path / "b", scheme)), ort._overflows()
    probe = Probe(bundle)
    for component in bundle.spec.components:
        given = {}
        for forced in (False, True):
            monkeypatch.setattr(ort, "_overflows", lambda forced=forced: forced)
            graph = ENGINES["ort"].open(bundle, component.name)
            given[forced] = [graph.run(feeds) for feeds in probe.steps(graph)]
            graph.close()
        if not component.state:  # the next ones are fed what this one gives
            probe.learn(given[overflows][0])
        if overflows:
            continue
        for one, other in zip(given[False], given[True], strict=True):
            for name, array in one.items():
                np.testing.assert_array_equal(array, other[name], err_msg=name)
