"""FP8 (E4M3): 8-bit floats, for GPUs from compute capability 8.9 on.

Other machines can run it, in float32: that proves the numbers, not the speed.
"""

from __future__ import annotations

from ._formats import FP8_LARGEST, Fp8Columns
from ._static import Static

SCHEME = Static(Fp8Columns(), FP8_LARGEST, noisy=False, timed=False, table="float16")
