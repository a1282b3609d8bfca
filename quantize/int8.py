"""INT8: 8-bit weights everywhere, 8-bit activations in what is not a decoder.

A decoder's step is bound by the memory that its weights take, so its activations stay float.
"""

from __future__ import annotations

from ._formats import INT8_LEVELS, Int8Columns
from ._static import Static

SCHEME = Static(Int8Columns(), INT8_LEVELS, noisy=True, timed=True)
