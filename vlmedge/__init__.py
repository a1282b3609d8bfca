"""Put a vision-language model on a CPU, a Jetson or a desktop GPU, proven equal to PyTorch.

    import vlmedge

    model = vlmedge.load("blip2-int8")  # the folder that `vlmedge export` made
    model.caption("cat.jpg")

`load` opens a bundle as a `Model`. `compose` chains the tasks of several bundles. `Video` and
`Example` are arguments of a model's methods, `load_index` reads an index of pictures, and
`vlmedge.errors` has every error that is raised on purpose.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from vlmedge.version import __version__

if TYPE_CHECKING:
    from vlmedge.compositions.run import compose as compose
    from vlmedge.run.inputs.video import Video as Video
    from vlmedge.run.model import Model as Model
    from vlmedge.run.model import load as load
    from vlmedge.run.tasks.prompt import Example as Example
    from vlmedge.run.tasks.retrieve import load_index as load_index

# From 1.29 on ONNX Runtime's wheels tell Microsoft on Linux too which models are opened (names,
# hashes), and leave a device's id in ~/.cache. It reads this when it is imported; 0 allows it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
__all__ = ["Example", "Model", "Video", "__version__", "compose", "load", "load_index"]

_HOMES = {
    "Example": "vlmedge.run.tasks.prompt",
    "Model": "vlmedge.run.model",
    "Video": "vlmedge.run.inputs.video",
    "compose": "vlmedge.compositions.run",
    "load": "vlmedge.run.model",
    "load_index": "vlmedge.run.tasks.retrieve",
}


def __getattr__(name: str) -> Any:
    """Import the runtime when it is first used: `import vlmedge` stays quick."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'vlmedge' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List what is public, also what has not been imported yet."""
    return sorted({*globals(), *__all__})
