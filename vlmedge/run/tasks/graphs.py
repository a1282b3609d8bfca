"""A model's graphs, each opened when it is first needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from vlmedge.bundle import Bundle
from vlmedge.lora.slots import Factors
from vlmedge.run.decode import reader
from vlmedge.shelves.checked_graph import CheckedGraph
from vlmedge.shelves.contracts import Engine, Graph


class Graphs(Mapping[str, Graph]):
    """The components of a bundle; each is opened when it is first asked for."""

    def __init__(self, bundle: Bundle, engine: Engine, *, low_memory: bool = False) -> None:
        """Remember the bundle and the engine; no component is opened yet.

        Args:
            bundle: The bundle whose components these are.
            engine: Engine that opens them.
            low_memory: Whether to close the open component before the next one opens.
        """
        self._bundle = bundle
        self._engine = engine
        self._low_memory = low_memory
        self._open: dict[str, Graph] = {}
        self.factors: Factors = {}

    def __getitem__(self, name: str) -> Graph:
        """Open a component, unless it is open, and return its graph."""
        if name not in self._open:
            self._bundle.spec.component(name)  # refuses an unknown one
            if self._low_memory:
                self.close()
            graph = self._engine.open(self._bundle, name)
            if self.factors:
                _adapt(graph, self.factors)
            self._open[name] = graph
        return self._open[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of all components, open or not."""
        return iter(component.name for component in self._bundle.spec.components)

    def __len__(self) -> int:
        """Count components."""
        return len(self._bundle.spec.components)

    def adapt(self, factors: Factors) -> None:
        """Fill the adapter slots of all components from now on; an empty table fills in zeros."""
        self.factors = factors
        for graph in self._open.values():
            _adapt(graph, factors)
            reader.forget(graph)

    def close(self) -> None:
        """Free the memory of all open components."""
        for graph in self._open.values():
            graph.close()
        self._open.clear()


def _adapt(graph: Graph, factors: Factors) -> None:
    """Feed one graph's slots, if it has any."""
    name = graph.component.name
    if graph.component.slots:
        assert isinstance(graph, CheckedGraph)  # as every engine's is
        graph.adapt(factors.get(name))
