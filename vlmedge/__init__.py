"""Put a vision-language model on a CPU, a Jetson or a desktop GPU, proven equal to PyTorch.

import vlmedge
model = vlmedge.load("blip2-int8")
model.caption("cat.jpg")
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from vlmedge.version import __version__

if TYPE_CHECKING:
    from vlmedge.compositions.run import compose as compose
    from vlmedge.run.inputs.video import Video as Video
    from vlmedge.run.model import Model as Model
    from vlmedge.run.model import load as load

# From 1.29 on ONNX Runtime's wheels tell Microsoft on Linux too which models are opened (names,
# hashes), and leave a device's id in ~/.cache. It reads this when it is imported; 0 allows it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
__all__ = ["Model", "Video", "__version__", "compose", "load"]


def __getattr__(name: str) -> Any:
    """Import the runtime when it is first used: `import vlmedge` stays quick."""
    if name in ("Model", "Video", "load"):
        from vlmedge.run import model

        return getattr(model, name)
    if name == "compose":
        from vlmedge.compositions.run import compose

        return compose
    raise AttributeError(f"module 'vlmedge' has no attribute {name!r}")
