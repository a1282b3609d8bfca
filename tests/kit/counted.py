"""Counts what the graphs of a model do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import vlmedge
from vlmedge.arrays import Array
from vlmedge.shelves.contracts import Graph


@dataclass
class Counted:
    """Tokens that a decoder reads and runs of all else, of a model's graphs."""

    runs: dict[str, int] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)

    def watch(self, model: vlmedge.Model) -> None:
        """Count from now on."""
        for name in model.graphs:
            self._watch(model.graphs[name])

    def _watch(self, graph: Graph) -> None:
        plain, name = graph.run, graph.component.name

        def run(feeds: Mapping[str, Array], *, last: bool = False) -> dict[str, Array]:
            self.runs[name] = self.runs.get(name, 0) + 1
            if graph.component.state:
                self.tokens.append(feeds["inputs_embeds"].shape[1])
            return plain(feeds, last=last)

        graph.run = run  # type: ignore[method-assign]
