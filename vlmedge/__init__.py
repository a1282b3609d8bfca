"""Put a vision-language model on a CPU, a Jetson or a desktop GPU, proven equal to PyTorch."""

from __future__ import annotations

__version__ = "0.1.0"
