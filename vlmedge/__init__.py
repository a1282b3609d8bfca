"""Put a vision-language model on a CPU, a Jetson or a desktop GPU, proven equal to PyTorch.

import vlmedge
model = vlmedge.load("blip2-int8")
model.caption("cat.jpg")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmedge.model import Model as Model
    from vlmedge.model import load as load
    from vlmedge.tasks.compose import compose as compose
    from vlmedge.video import Video as Video

__version__ = "0.1.0"
__all__ = ["Model", "Video", "__version__", "compose", "load"]


def __getattr__(name: str) -> Any:
    """Import the runtime when it is first used: `import vlmedge` stays quick."""
    if name in ("Model", "Video", "load"):
        from vlmedge import model

        return getattr(model, name)
    if name == "compose":
        from vlmedge.tasks.compose import compose

        return compose
    raise AttributeError(f"module 'vlmedge' has no attribute {name!r}")
