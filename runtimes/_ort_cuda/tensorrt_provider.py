"""ONNX Runtime's two providers that compile with TensorRT: what both need of a bundle.

    portable graph --lower--> what the parser of TensorRT 10.3 takes, and so all after it
    engines/<engine>-<key>/ --session--> a session, whose plans are kept in that folder

The types are the graph's: a provider that is told no precision has TensorRT typed strongly. Each
input has one range that covers prompt and steps, since a provider that meets a size beyond what it
has seen compiles again, and a cache grows at every step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import onnxruntime as ort

from vlmedge.bundle import Bundle
from vlmedge.parity.on_device import OnDevice
from vlmedge.progress import Progress
from vlmedge.shelves.contracts import Graph
from vlmedge.spec import Component

from .._tensorrt.profiles import profiles, shapes
from .graph import DeviceGraph, Opened
from .session import Provider, open_session, refuse_strays, require
from .store import stored

if TYPE_CHECKING:
    import onnx_ir as ir

LOWERING = 1  # count it up when _tensorrt/lower.py writes something else: engines are made again
PARSER = (10, 3)  # the oldest that a wheel with these providers may have
_SHAPES = "vlmedge.shapes"

Options = Callable[[Path, Mapping[str, str]], Mapping[str, str]]  # folder, ranges -> provider's own


class OrtTensorRt:
    """One of the two providers.

    Attributes:
        name: The engine's, by which its folders are called.
        provider: ONNX Runtime's.
        options: Makes the provider's options.
        allow_fallback: Whether nodes may run on the CPU.
    """

    def __init__(
        self, name: str, provider: Provider, options: Options, *, allow_fallback: bool = False
    ) -> None:
        self.name, self.provider, self.options = name, provider, options
        self.allow_fallback = allow_fallback

    def falling_back(self) -> OrtTensorRt:
        """Return it as one that lets nodes run on the CPU."""
        return OrtTensorRt(self.name, self.provider, self.options, allow_fallback=True)

    def open(self, bundle: Bundle, component: str) -> Graph:
        """Open one component; the first time it is compiled, which takes minutes."""
        require(self.provider)
        spec = bundle.spec.component(component)
        files = stored(bundle, component, self.name, LOWERING, _lower)
        own = self.options(files.graph.parent, ranges(bundle, spec))
        provider = dataclasses.replace(self.provider, options=own)
        session = open_session(files.graph.read_bytes(), component, provider, files.root)
        known = session.get_modelmeta().custom_metadata_map
        if not self.allow_fallback:
            refuse_strays(session, component, provider, frozenset(known[_SHAPES].splitlines()))
        return DeviceGraph(spec, Opened(session, None, provider, records=False, in_place=False))

    def judge(self, bundle: Bundle, progress: Progress) -> list[OnDevice]:
        """Hold what the device gives against the portable graphs."""
        from .._cuda import connect
        from .._judge import judge_all  # it draws pictures, which running does not need

        require(self.provider)
        title = f"ONNX Runtime {ort.__version__}, {self.provider.name} (experimental)"
        return judge_all(self, bundle, "float16", title, connect().name, progress)


def _lower(component: Component, model: ir.Model) -> None:
    """Lower a graph; what a scheme made small computes in float16, as on the CUDA provider."""
    from .._tensorrt.lower import lower
    from .lower import shape_nodes

    small = any(node.op_type == "DequantizeLinear" for node in model.graph)
    lower(model, PARSER, "float16" if small else "float32")
    model.metadata_props[_SHAPES] = "\n".join(shape_nodes(model))


def ranges(bundle: Bundle, component: Component) -> dict[str, str]:
    """Write the least, usual and largest shapes of all inputs, as both providers read them.

    What is usual is that of the last profile: a decoder's steps, of which there are most.

    Returns:
        "name:1x3,name:1x4" by "min", "opt" and "max".
    """
    built_for = [shapes(component, one) for one in profiles(bundle.spec, component, {})]
    found: dict[str, list[str]] = {"min": [], "opt": [], "max": []}
    for name in built_for[0]:
        least, usual, most = zip(*(one[name] for one in built_for), strict=True)
        joined = (map(min, *least, least[0]), usual[-1], map(max, *most, most[0]))
        for listed, shape in zip(found.values(), joined, strict=True):
            listed.append(f"{name}:{'x'.join(map(str, shape))}")
    return {which: ",".join(listed) for which, listed in found.items()}
