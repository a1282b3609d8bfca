"""What `vlmedge plan` counts of every family, against what was exported."""

from __future__ import annotations

import json

import pytest
from kit.reference import Case

from vlmedge.graphs.portable import load_graph
from vlmedge.plan.plan import read_shape

OWN = ("query_tokens", "image_newline")  # parameters of the model itself
UNPLANNED = dict.fromkeys(
    ("ShikraLlamaForCausalLM", "VideoChatGPTLlamaForCausalLM"), "its tower's config is another file"
)


def test_plan_counts_what_was_exported(case: Case) -> None:
    """From config.json alone: the components, and the numbers in each."""
    kind = json.loads((case.folder / "config.json").read_text())["architectures"][0]
    if kind in UNPLANNED:
        pytest.skip(UNPLANNED[kind])
    shape, bundle = read_shape(case.folder), case.model.bundle
    assert [part.name for part in shape.parts] == [c.name for c in bundle.spec.components]
    for part in shape.parts:
        stored = load_graph(bundle.path, part.name).graph.initializers
        # what tracing has folded, masks and the like, has a name without dots; rotary is no weight
        found = [v for name, v in stored.items() if "." in name or name in OWN]
        weights = [v.const_value for v in found if not str(v.name).endswith("inv_freq")]
        counted = sum(w.size for w in weights if w is not None and w.dtype.name == "FLOAT")
        if part.name == "projector" and 2 * counted == part.parameters:
            continue  # the first LLaVA's one Linear: its config does not tell it from two
        assert part.parameters == counted
